"""MONAI's diffusion U-Nets: from the files to the denoiser, against MONAI's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from invsolve import priors
from invsolve.priors import DiscretePrior, FlowPrior
from invsolve.priors.families.monai import architecture, literal, load

monai = pytest.importorskip(
    "monai.networks", reason="monai==1.6.1 is a test dependency"
)
nets, schedulers = monai.nets, monai.schedulers

TINY: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_res_blocks": (1, 1),
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_head_channels": 8,
}
CARD = {"network": {"norm_num_groups": 4, "num_head_channels": 8}}


def unet(generator: Generator, **changes: Any) -> Any:
    net = nets.DiffusionModelUNet(**(TINY | changes))
    for parameter in net.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return net.eval().requires_grad_(False)


def saved(path: Path, net: nn.Module) -> Path:
    torch.save(net.state_dict(), path)
    return path


def bundle(folder: Path, net: nn.Module, scheduler: Any = None, **changes: Any) -> Path:
    """A bundle whose network is told by references and literals."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    saved(folder / "models" / "model.pt", net)
    network = {
        "_target_": "monai.networks.nets.DiffusionModelUNet",
        "in_channels": "@image_channels",
        "out_channels": "@network_def#in_channels",
        "channels": [8, 16],
        "spatial_dims": "$len(@size)",  # told by the weights
        "attention_levels": [False, True],
        "norm_num_groups": "@groups#0",
        "num_head_channels": 8,
    }
    config: dict[str, Any] = {
        "image_channels": 1,
        "groups": [4, 8],
        "bundle_root": "$import('os').system('false')",
        "network_def": network | changes,
        "network": "$@network_def.to(@device)",
    }
    if scheduler is not None:
        config["scheduler"] = scheduler
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    return folder


def close(seen: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


def innermost(prior: Any) -> Any:
    return prior.normalised[0]


# --- the network


NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "volumes": {"spatial_dims": 3},
    "residual": {"resblock_updown": True},
    "combined": {"use_combined_linear": True},
    "no last layer": {"include_fc": False},
    "levels": {
        "channels": (8, 8, 16),
        "num_res_blocks": (1, 2, 1),
        "attention_levels": (True, False, True),
        "num_head_channels": (4, 0, 8),
    },
    "learnt variance": {"in_channels": 3, "out_channels": 6},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_monais_inferred_from_its_weights(
    name: str, tmp_path: Path, generator: Generator
) -> None:
    net = unet(generator, **NETWORKS[name])
    heads = NETWORKS[name].get("num_head_channels", 8)
    card = {"network": {"norm_num_groups": 4, "num_head_channels": heads}}
    prior = priors.load(saved(tmp_path / "model.pt", net), card)
    dims, channels = net.conv_in.conv.weight.ndim - 2, net.in_channels
    info = prior.info
    assert (info.spatial_dims, info.channels) == (dims, channels)
    assert info.multiple_of == 2 ** (len(net.block_out_channels) - 1)
    x = torch.randn(2, channels, *(8,) * dims, generator=generator)
    t = torch.tensor([3.0, 700.25])
    close(innermost(prior).net(x, t), net(x, t))


def test_the_class_is_the_cards(tmp_path: Path, generator: Generator) -> None:
    net = unet(generator, num_class_embeds=3)
    path = saved(tmp_path / "model.pt", net)
    with pytest.raises(ValueError, match="class_label of 0 … 2"):
        priors.load(path, CARD)
    prior = priors.load(path, CARD | {"class_label": 2})
    x, t = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([3.0, 70.0])
    close(innermost(prior).net(x, t), net(x, t, class_labels=torch.tensor([2, 2])))


def test_weights_as_monai_generative_models_named_them(
    tmp_path: Path, generator: Generator
) -> None:
    net = unet(generator)
    state = {
        k.replace(".attn.to_", ".to_")
        .replace(".attn.out_proj", ".proj_attn")
        .replace("postconv", "conv"): v
        for k, v in net.state_dict().items()
    }
    assert state.keys() != net.state_dict().keys()
    torch.save(state, tmp_path / "model.pt")
    x, t = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([3.0, 70.0])
    prior = priors.load(tmp_path / "model.pt", CARD)
    close(innermost(prior).net(x, t), net(x, t))


# --- the denoiser


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear_beta", "scaled_linear_beta", "cosine"])
def test_denoiser_is_the_schedulers_original_sample(
    schedule: str, prediction: str, tmp_path: Path, generator: Generator
) -> None:
    net = unet(generator)
    betas = {} if schedule == "cosine" else {"beta_start": 0.0015, "beta_end": 0.0195}
    told = {"schedule": schedule, "prediction_type": prediction} | betas
    target = {"_target_": "monai.networks.schedulers.DDIMScheduler"}
    prior = priors.load(bundle(tmp_path / "b", net, target | told))
    assert isinstance(prior, DiscretePrior)
    scheduler = schedulers.DDIMScheduler(clip_sample=False, **told)
    scheduler.set_timesteps(1000)
    for t in (1, 300, 700):
        x_t = torch.randn(2, 1, 16, 16, generator=generator)
        _, expected = scheduler.step(net(x_t, torch.tensor([t, t])), t, x_t)
        sigma = prior.log_sigmas[t].exp().float()
        seen = prior.denoise(x_t * (1 + sigma**2).sqrt(), sigma)
        scale = float(expected.abs().max())
        torch.testing.assert_close(seen / scale, expected / scale, rtol=1e-4, atol=1e-5)


def test_rectified_flow_runs_to_the_image(tmp_path: Path, generator: Generator) -> None:
    net = unet(generator, spatial_dims=3)
    target = {"_target_": "monai.networks.schedulers.RFlowScheduler"}
    steps = {"num_train_timesteps": 500}
    prior = priors.load(bundle(tmp_path / "b", net, target | steps))
    assert isinstance(prior, FlowPrior)
    scheduler = schedulers.RFlowScheduler(**steps)
    scheduler.set_timesteps(10)
    for t in (50, 250, 450):
        x_t = torch.randn(2, 1, 8, 8, 8, generator=generator)
        _, expected = scheduler.step(net(x_t, torch.tensor([t, t])), t, x_t)
        part = torch.tensor(t / 500)
        seen = prior.denoise(x_t / (1 - part), part / (1 - part))
        close(seen, expected)


def test_a_prior_of_volumes_denoises_item_by_item(
    tmp_path: Path, generator: Generator
) -> None:
    net = unet(generator, spatial_dims=3)
    prior = priors.load(saved(tmp_path / "model.pt", net), CARD | {"scale": 100.0})
    x = 100 * torch.rand(2, 1, 8, 8, 10, generator=generator)
    sigma = torch.tensor([3.0, 200.0])
    both = prior.denoise(x, sigma)
    for i in range(2):
        alone = prior.denoise(x[i : i + 1], sigma[i])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-3)
    assert prior.info.range == (0.0, 100.0)
    with pytest.raises(ValueError, match="divisible by 2"):
        prior.check((1, 8, 8, 9))


# --- what is told, and what is refused


def test_what_the_weights_do_not_tell_is_asked_for(
    tmp_path: Path, generator: Generator
) -> None:
    path = saved(tmp_path / "model.pt", unet(generator))
    with pytest.raises(ValueError, match="num_head_channels") as caught:
        priors.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match="MONAI cannot make"
    ):  # 32 groups of 8 channels
        priors.load(path, {"network": {"num_head_channels": 8}})
    told = "\n".join(priors.load(path, CARD).decisions)
    assert "DiffusionModelUNet in 2 dimensions: widths 8, 16; 1, 1 block(s)" in told
    assert "8 channels a head; 4 groups" in told
    assert "eps in 1000 steps, linear_beta schedule (assumed)" in told


def test_expressions_are_refused_only_where_their_value_is_needed(
    tmp_path: Path, generator: Generator
) -> None:
    net = unet(generator)
    x, sigma = torch.randn(1, 1, 8, 8, generator=generator), torch.tensor(1.0)
    expected = priors.load(bundle(tmp_path / "a", net)).denoise(x, sigma)
    folder = bundle(tmp_path / "b", net, num_head_channels="$8")
    with pytest.raises(
        ValueError, match=r"'num_head_channels' is the expression '\$8'"
    ):
        priors.load(folder)
    prior = priors.load(folder, {"network": {"num_head_channels": 8}})
    assert torch.equal(prior.denoise(x, sigma), expected)
    inside = priors.load(folder / "models" / "model.pt", CARD)
    assert torch.equal(inside.denoise(x, sigma), expected)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("@a", "itself"),
        ("@b#0#x", "not there"),
        ("@b#2", "not there"),
        ("@b::1", r"expression '\$1\+1'"),
        (["@c", "$2"], r"expression '\$2'"),
    ],
)
def test_references_that_lead_nowhere_are_refused(value: Any, why: str) -> None:
    config = {"a": "@a", "b": ["@c", "$1+1"], "c": 3}
    assert literal(["@b#0", 4, "x"], config, "n") == [3, 4, "x"]
    with pytest.raises(ValueError, match=why):
        literal(value, config, "n")


def test_bundles_of_something_else_are_refused(
    tmp_path: Path, generator: Generator
) -> None:
    net = unet(generator)
    folder = bundle(tmp_path / "b", net)
    config = folder / "configs" / "inference.json"
    told = json.loads(config.read_text())

    def refused(why: str) -> None:
        with pytest.raises(ValueError, match=why) as caught:
            priors.load(folder)
        assert "\n" not in str(caught.value)

    config.write_text(json.dumps(told | {"n2": told["network_def"]}))
    refused("has 2 DiffusionModelUNets")
    encoder = {"_target_": "monai.networks.nets.AutoencoderKL"}
    config.write_text(json.dumps(told | {"autoencoder": encoder}))
    refused("latent model")
    evil = {"_target_": "os.DiffusionModelUNet"}
    config.write_text(json.dumps({"n": evil}))
    refused("has 0 DiffusionModelUNets")
    config.write_text(json.dumps(told))
    saved(folder / "models" / "other.pt", net)
    (folder / "models" / "model.pt").rename(folder / "models" / "third.pt")
    refused("has 2 files of weights")


def test_weights_of_something_else_are_refused(generator: Generator) -> None:
    state = unet(generator).state_dict()
    assert architecture(state)["channels"] == (8, 16)
    context = "down_blocks.1.attentions.0.transformer_blocks.0.x"
    with pytest.raises(ValueError, match="context"):
        load(state | {context: state["out.0.bias"]}, {})
    name = "middle_block.resnet_1.norm1.weight"
    with pytest.raises(ValueError, match=f"lack '{name}'"):
        load({k: v for k, v in state.items() if k != name}, CARD)
    with pytest.raises(ValueError, match="'depth' is unknown"):
        load(state, {"network": {"depth": 3}})
    with pytest.raises(ValueError, match="they have 0 levels"):
        load({k: v for k, v in state.items() if "down" not in k}, CARD)
    far = "down_blocks.999999.resnets.0.conv1.conv.weight"
    with pytest.raises(ValueError, match="they have 1000000 levels"):
        load(state | {far: state["out.0.bias"]}, CARD)
