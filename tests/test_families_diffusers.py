"""diffusers' folders: from the files to the denoiser, against diffusers' own arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from invsolve import priors
from invsolve.priors import DiscretePrior, EDMPrior, FlowPrior, Prior
from invsolve.priors.families.betas import alphas_cumprod
from invsolve.priors.families.sde import VEPrior

theirs: Any = pytest.importorskip("diffusers.schedulers")
UNet2DModel: Any = pytest.importorskip("diffusers.models.unets.unet_2d").UNet2DModel

TINY: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def randomised(net: nn.Module, generator: Generator) -> Any:
    for parameter in net.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return net.eval().requires_grad_(False)


def saved(
    folder: Path, generator: Generator, scheduler: Any = None, **changes: Any
) -> Any:
    """A tiny pipeline's folder, and its network."""
    unet = randomised(UNet2DModel(**(TINY | changes)), generator)
    unet.save_pretrained(folder / "unet")
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    return unet


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def close(seen: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def innermost(prior: Prior) -> Any:
    return prior.normalised[0]


# --- parity


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_denoiser_is_the_schedulers_original_sample(
    prediction: str, schedule: str, tmp_path: Path, generator: Generator
) -> None:
    scheduler = theirs.DDIMScheduler(
        beta_schedule=schedule, prediction_type=prediction, clip_sample=False
    )
    scheduler.set_timesteps(1000)
    unet = saved(tmp_path, generator, scheduler)
    prior = priors.load(tmp_path)
    assert isinstance(prior, DiscretePrior)
    assert prior.info.parameterisation == {"epsilon": "eps", "sample": "x0"}.get(
        prediction, "v"
    )
    for t in (1, 250, 700):
        x_t = torch.randn(2, 1, 16, 16, generator=generator)
        out = unet(x_t, t).sample
        expected = scheduler.step(out, t, x_t).pred_original_sample
        # Its level in double precision: diffusers' own table is rounded at low noise.
        sigma = prior.log_sigmas[t].exp().float()
        seen = prior.denoise(x_t * (1 + sigma**2).sqrt(), sigma)
        scale = float(expected.abs().max())  # 1/√ᾱ where all is noise
        close(seen / scale, expected / scale)


def test_edm_scheduler_is_edms_preconditioning(
    tmp_path: Path, generator: Generator
) -> None:
    for i, prediction in enumerate(["epsilon", "v_prediction"]):
        scheduler = theirs.EDMEulerScheduler(
            sigma_data=0.7, sigma_min=0.01, sigma_max=50.0, prediction_type=prediction
        )
        folder = tmp_path / str(i)
        unet = saved(folder, generator, scheduler)
        prior = priors.load(folder)
        assert isinstance(prior, EDMPrior)
        assert (prior.sigma_min, prior.sigma_max) == (0.01, 50.0)
        for level in (0.05, 2.0, 30.0):
            sigma = torch.tensor(level)
            x = (1 + level) * torch.randn(2, 1, 16, 16, generator=generator)
            out = unet(
                scheduler.precondition_inputs(x, sigma),
                scheduler.precondition_noise(sigma),
            ).sample
            expected = scheduler.precondition_outputs(x, out, sigma)
            close(prior.denoise(x, sigma), expected)


def test_flow_matching_velocity_points_to_the_noise(
    tmp_path: Path, generator: Generator
) -> None:
    scheduler = theirs.FlowMatchEulerDiscreteScheduler(shift=3.0)
    unet = saved(tmp_path, generator, scheduler)
    prior = priors.load(tmp_path)
    assert isinstance(prior, FlowPrior)
    # One Euler step from any time to 0 is the scheduler's estimate of x₀.
    for t in (0.02, 0.5, 0.9):
        scheduler.set_timesteps(sigmas=[t / (3 - 2 * t)])  # its shift makes it t
        sigma = scheduler.sigmas[0]
        x_t = torch.randn(2, 1, 16, 16, generator=generator)
        out = unet(x_t, scheduler.timesteps[0]).sample
        expected = scheduler.step(out, scheduler.timesteps[0], x_t).prev_sample
        assert float(scheduler.sigmas[1]) == 0 and float(sigma) == pytest.approx(t)
        close(prior.denoise(x_t / (1 - sigma), sigma / (1 - sigma)), expected)


def test_score_sde_in_diffusers_is_tweedies_formula(
    tmp_path: Path, generator: Generator
) -> None:
    scheduler = theirs.ScoreSdeVeScheduler(sigma_max=60.0)
    unet = saved(
        tmp_path,
        generator,
        scheduler,
        time_embedding_type="fourier",
        center_input_sample=True,
    )
    prior = priors.load(tmp_path)
    assert isinstance(prior, VEPrior) and prior.sigma_max == 60.0
    assert prior.info.range == (0.0, 1.0)
    for level in (0.05, 1.0, 20.0):
        sigma = torch.full((2,), level)
        x = (1 + level) * torch.randn(2, 1, 16, 16, generator=generator)
        expected = x + level**2 * unet(x, sigma).sample
        close(prior.denoise(x, sigma) / level, expected / level)


def test_zero_terminal_snr_leaves_out_the_step_without_an_image(
    tmp_path: Path, generator: Generator
) -> None:
    scheduler = theirs.DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False
    )
    unet = saved(tmp_path, generator, scheduler)
    prior = priors.load(tmp_path)
    assert len(innermost(prior).log_sigmas) == 999
    scheduler.set_timesteps(1000)
    x_t = torch.randn(2, 1, 16, 16, generator=generator)
    expected = scheduler.step(unet(x_t, 500).sample, 500, x_t).pred_original_sample
    abar = scheduler.alphas_cumprod[500]
    close(prior.denoise(x_t / abar.sqrt(), (1 / abar - 1).sqrt()), expected)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "cosine"])
def test_schedules_are_diffusers(name: str) -> None:
    called = {"cosine": "squaredcos_cap_v2"}.get(name, name)
    scheduler = theirs.DDPMScheduler(
        200, beta_start=2e-4, beta_end=0.015, beta_schedule=called
    )
    seen = alphas_cumprod(name, 200, 2e-4, 0.015).float()
    torch.testing.assert_close(seen, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_trained_betas_are_the_schedule(tmp_path: Path, generator: Generator) -> None:
    betas = [0.01 * (1 + i) for i in range(20)]
    saved(tmp_path, generator, theirs.DDPMScheduler(20, trained_betas=betas))
    prior = priors.load(tmp_path)
    abar = (1 - torch.tensor(betas).double()).cumprod(0)
    torch.testing.assert_close(innermost(prior).log_sigmas, (1 / abar - 1).sqrt().log())


NETWORKS: dict[str, dict[str, Any]] = {
    "colour": {"in_channels": 3, "out_channels": 3},
    "learnt variance": {"out_channels": 2},
    "three levels": {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
    },
    "odd": {
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "act_fn": "mish",
        "resnet_time_scale_shift": "scale_shift",
        "mid_block_scale_factor": 1.4,
        "norm_eps": 1e-3,
    },
    "skip": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 32),
        "in_channels": 3,  # diffusers' skip blocks are of colour images alone
        "out_channels": 3,
    },
    "no attention": {"add_attention": False, "down_block_types": ("DownBlock2D",) * 2}
    | {"up_block_types": ("UpBlock2D",) * 2},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_entry_of_the_configuration_counts(
    name: str, tmp_path: Path, generator: Generator
) -> None:
    unet = saved(tmp_path, generator, theirs.DDPMScheduler(), **NETWORKS[name])
    prior = priors.load(tmp_path)
    channels = unet.config["in_channels"]
    assert prior.info.channels == channels
    x = torch.randn(2, channels, 16, 16, generator=generator)
    t = torch.tensor([3.0, 700.25])
    close(innermost(prior).net(x, t), unet(x, t).sample)


def test_the_class_is_the_cards(tmp_path: Path, generator: Generator) -> None:
    unet = saved(tmp_path, generator, theirs.DDPMScheduler(), num_class_embeds=5)
    with pytest.raises(ValueError, match="class_label of 0 … 4"):
        priors.load(tmp_path)
    prior = priors.load(tmp_path, {"class_label": 3})
    assert prior.info.conditioning == "class 3"
    x, t = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([3.0, 700.0])
    expected = unet(x, t, class_labels=torch.tensor([3, 3])).sample
    close(innermost(prior).net(x, t), expected)


def test_attention_as_the_first_models_spelt_it(
    tmp_path: Path, generator: Generator
) -> None:
    unet = saved(tmp_path, generator, theirs.DDPMScheduler())
    old = {
        "to_q.": "query.",
        "to_k.": "key.",
        "to_v.": "value.",
        "to_out.0.": "proj_attn.",
    }

    def spelt(name: str) -> str:
        for new, before in old.items():
            name = name.replace(new, before)
        return name

    state = {spelt(k): v for k, v in unet.state_dict().items()}
    assert "mid_block.attentions.0.proj_attn.bias" in state
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    x, t = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([3.0, 700.0])
    close(innermost(priors.load(tmp_path)).net(x, t), unet(x, t).sample)


# --- folders


def test_the_folder_its_network_and_its_weights_load_alike(
    tmp_path: Path, generator: Generator
) -> None:
    saved(tmp_path, generator, theirs.DDPMScheduler(beta_end=0.01))
    x = torch.randn(1, 1, 8, 8, generator=generator)
    expected = priors.load(tmp_path).denoise(x, torch.tensor(1.0))
    unet = tmp_path / "unet"
    for path in (unet, unet / "diffusion_pytorch_model.safetensors"):
        prior = priors.load(path)
        assert torch.equal(prior.denoise(x, torch.tensor(1.0)), expected)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "scheduler" / "scheduler_config.json").rename(
        unet / "scheduler_config.json"
    )
    assert torch.equal(priors.load(unet).denoise(x, torch.tensor(1.0)), expected)


def test_the_moving_average_is_taken_where_there_is_one(
    tmp_path: Path, generator: Generator
) -> None:
    saved(tmp_path, generator, theirs.DDPMScheduler())
    average = randomised(UNet2DModel(**TINY), generator)
    average.save_pretrained(tmp_path / "unet_ema")
    x, t = torch.randn(1, 1, 8, 8, generator=generator), torch.tensor([3.0])
    close(innermost(priors.load(tmp_path)).net(x, t), average(x, t).sample)


def test_without_a_scheduler_the_assumption_is_told(
    tmp_path: Path, generator: Generator
) -> None:
    saved(tmp_path, generator)
    prior = priors.load(tmp_path)
    told = "\n".join(prior.decisions)
    assert "eps in 1000 steps, linear schedule (assumed)" in told
    assert "UNet2DModel: widths 8, 16; 1 block(s) a level" in told
    assert prior.info.family == "diffusers" and prior.info.range == (-1, 1)


def test_the_card_overrides_the_folder(tmp_path: Path, generator: Generator) -> None:
    saved(tmp_path, generator, theirs.DDPMScheduler())
    card = {"predicts": "x0", "scheduler": {"beta_end": 0.01}, "scale": 2.0}
    prior = priors.load(tmp_path, card | {"unit": "HU", "licence": "MIT"})
    assert innermost(prior).predicts == "x0"
    abar = alphas_cumprod("linear", 1000, 1e-4, 0.01)
    assert prior.sigma_max == pytest.approx(2 * float((1 / abar[-1] - 1).sqrt()))
    info = prior.info
    assert (info.unit, info.licence, info.range) == ("HU", "MIT", (-2.0, 2.0))


def test_unknown_entries_of_a_configuration_are_told(
    tmp_path: Path, generator: Generator
) -> None:
    saved(tmp_path, generator, theirs.DDPMScheduler())
    edit(tmp_path / "unet" / "config.json", tomorrow=1)
    assert "left out of its config: tomorrow" in "\n".join(
        priors.load(tmp_path).decisions
    )


# --- refusals


def refused(path: Path, why: str, card: dict[str, Any] | None = None) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        priors.load(path, card)
    assert "\n" not in str(caught.value)


def test_models_of_something_else_are_refused(
    tmp_path: Path, generator: Generator
) -> None:
    saved(tmp_path, generator, theirs.DDPMScheduler())
    config = tmp_path / "unet" / "config.json"
    edit(config, _class_name="UNet2DConditionModel")
    refused(tmp_path, "is a UNet2DConditionModel: of diffusers' only UNet2DModel")
    edit(config, _class_name="UNet2DModel")
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    told = scheduler.read_text()
    scheduler.write_text('{"_class_name": "SCMScheduler"}')
    refused(tmp_path, "scheduler SCMScheduler is unknown")
    scheduler.write_text(told)
    edit(scheduler, prediction_type="angle")
    refused(tmp_path, "predicts must be")
    edit(scheduler, prediction_type="epsilon", beta_schedule="laplace")
    refused(tmp_path, "'laplace' is unknown")
    edit(scheduler, beta_schedule="linear", num_train_timesteps=10**9)
    refused(tmp_path, "no noise schedule")
    (tmp_path / "vqvae").mkdir()
    for path in (tmp_path, tmp_path / "unet"):
        refused(path, "latent model")


def test_folders_that_lack_something_are_refused(
    tmp_path: Path, generator: Generator
) -> None:
    saved(tmp_path, generator, theirs.DDPMScheduler())
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(weights.read_bytes())
    refused(alone, "needs its config.json")
    weights.unlink()
    refused(tmp_path, "no weights in")
    (tmp_path / "unet" / "config.json").unlink()
    refused(tmp_path, "has no U-Net")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"block_out_channels": [8, 32]}, "do not fit"),
        ({"layers_per_block": 10**9}, "layers a block, the weights fewer"),
        ({"block_out_channels": None}, "lacks block_out_channels"),
        ({"block_out_channels": ["8", 16]}, "lacks block_out_channels"),
        ({"class_embed_type": "timestep"}, "conditional on a 'timestep'"),
        ({"norm_num_groups": 3}, "diffusers cannot make"),
        ({"norm_num_groups": 0}, "diffusers cannot make"),
        ({"down_block_types": ["os.system", "x"]}, "diffusers cannot make"),
        ({"act_fn": "exec"}, "diffusers cannot make"),
    ],
)
def test_configurations_that_cannot_be_are_refused(
    changes: dict[str, Any], why: str, tmp_path: Path, generator: Generator
) -> None:
    saved(tmp_path, generator, theirs.DDPMScheduler())
    edit(tmp_path / "unet" / "config.json", **changes)
    refused(tmp_path, why)


def test_networks_conditional_on_images_are_refused(
    tmp_path: Path, generator: Generator
) -> None:
    saved(tmp_path, generator, theirs.DDPMScheduler(), in_channels=3)
    refused(tmp_path, "takes 3 channels and gives 1")


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 10**5, "\x00", '{"a": ' * 10**4])
def test_damaged_configurations_are_refused(
    content: str, tmp_path: Path, generator: Generator
) -> None:
    saved(tmp_path, generator, theirs.DDPMScheduler())
    (tmp_path / "unet" / "config.json").write_text(content)
    refused(tmp_path, "cannot read the configuration")
