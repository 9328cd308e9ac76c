"""ADM's checkpoints: from the file to the denoiser, against another implementation."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoint_files import fill, image
from torch import Generator, Tensor, nn

from invsolve.priors import DiscretePrior, Prior
from invsolve.priors.families import FAMILIES
from invsolve.priors.families.adm import (
    FAMILY,
    architecture,
    cosine_alphas_cumprod,
    load,
    sniff,
)
from invsolve.priors.networks.adm import ADMConfig, ADMUNet
from invsolve.priors.reading import read_checkpoint

LEVELS = torch.tensor([0.05, 3.0])


def config(**changes: Any) -> ADMConfig:
    values: dict[str, Any] = {
        "channels": 1,
        "out_channels": 2,
        "width": 32,
        "widths": (32, 64),
        "blocks": 1,
        "attention": (False, True),
        "head_channels": None,
        "heads": 4,
        "new_attention_order": False,
        "scale_shift": True,
        "resample": "residual",
        "classes": None,
    }
    return ADMConfig(**(values | changes))


def shapes(config: ADMConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        net = ADMUNet(config)
    return {k: tuple(v.shape) for k, v in net.state_dict().items()}


def weights(config: ADMConfig) -> dict[str, Tensor]:
    return fill(shapes(config))


def valueless(config: ADMConfig) -> dict[str, Tensor]:
    """Tensors that have a shape and no values."""
    return {k: torch.empty(v, device="meta") for k, v in shapes(config).items()}


def decisions(prior: Prior) -> str:
    return "\n".join(vars(prior)["decisions"])


# --- against azula's port


@pytest.fixture
def azula_unet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """azula's ADM network (MIT): the original's to the last bit."""
    # What fetches azula's weights is not needed here.
    monkeypatch.setitem(sys.modules, "gdown", ModuleType("gdown"))
    pytest.importorskip("azula", reason="azula==0.11.1 is a test dependency")
    from azula.plugins.adm._src import unet

    return unet.UNetModel


def randomised(net: nn.Module, generator: Generator) -> dict[str, Tensor]:
    # As they are made, the last layer of each block is zero and would hide the rest.
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.1 * noise
    return net.eval().requires_grad_(False).state_dict()


NETWORKS: dict[str, dict[str, Any]] = {
    "residual": {"resblock_updown": True, "use_scale_shift_norm": True},
    "conv": {"num_res_blocks": 2},
    "pool": {"conv_resample": False, "use_scale_shift_norm": True},
    "new order": {"resblock_updown": True, "use_new_attention_order": True},
    "head channels": {"num_heads": 1, "num_head_channels": 16},
    "classes": {"num_classes": 5, "resblock_updown": True},
    "everywhere": {"attention_resolutions": (1, 2, 4), "out_channels": 1},
    "nowhere": {"attention_resolutions": (), "resblock_updown": True},
    "one level": {"channel_mult": (1,), "num_res_blocks": 2},
    "three channels": {"in_channels": 3, "out_channels": 6, "channel_mult": (0.5, 1)}
    | {"model_channels": 64},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_agrees_with_azulas(
    name: str, azula_unet: Any, tmp_path: Path, generator: Generator
) -> None:
    options = {
        "image_size": 16,
        "in_channels": 1,
        "model_channels": 32,
        "out_channels": 2,
        "num_res_blocks": 1,
        "attention_resolutions": (2, 4),
        "channel_mult": (1, 2, 2),
        "num_heads": 4,
    } | NETWORKS[name]
    theirs = azula_unet(**options)
    path = tmp_path / "model.pt"
    torch.save(randomised(theirs, generator), path)
    network: dict[str, Any] = {"heads": options["num_heads"]}
    if options.get("use_new_attention_order"):
        network["new_attention_order"] = True
    if "num_head_channels" in options:
        network = {"head_channels": options["num_head_channels"]}
    card = {"class_label": 3, "network": network}
    state, facts = read_checkpoint(path)
    assert [f.name for f in FAMILIES if f.sniff(state, facts)] == ["adm"]
    prior = FAMILY.load(state, facts | card)

    x = torch.randn(2, options["in_channels"], 16, 16, generator=generator)
    t = torch.tensor([3.0, 700.25])
    label = torch.tensor([3, 3]) if "num_classes" in options else None
    expected = theirs(x, t, y=label)
    seen = vars(prior)["net"](x, t)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


# --- the denoiser


def test_denoiser_is_the_networks_noise_taken_away() -> None:
    # By definition, at a step of the schedule: x₀ = (x_t − √(1−ᾱ) n̂)/√ᾱ.
    state = weights(config())
    prior = load(state, {})
    assert isinstance(prior, DiscretePrior)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas_cumprod = torch.exp(torch.log1p(-beta).cumsum(0))
    for step in (0, 300, 999):
        abar = alphas_cumprod[step].float()
        x_t = image(1, torch.zeros(2))
        noise = vars(prior)["net"](x_t, torch.full((2,), float(step)))[:, :1]
        expected = (x_t - (1 - abar).sqrt() * noise) / abar.sqrt()
        seen = prior.denoise(x_t / abar.sqrt(), ((1 - abar) / abar).sqrt())
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)


def test_schedules_keep_their_ends_whatever_the_number_of_steps() -> None:
    for schedule, low, high in (("linear", 0.01, 157.4), ("cosine", 0.0064, 2.029e4)):
        card = {"schedule": schedule}
        prior = load(weights(config()), card)
        assert prior.sigma_min == pytest.approx(low, rel=0.01)
        assert prior.sigma_max == pytest.approx(high, rel=0.05)
    coarse = load(weights(config()), {"steps": 250})
    assert coarse.sigma_max == pytest.approx(157.4, rel=0.15)


def test_cosine_schedule_is_its_closed_form() -> None:
    s = torch.arange(1, 1000, dtype=torch.float64) / 1000
    closed = torch.cos((s + 0.008) / 1.008 * torch.pi / 2) ** 2
    closed = (
        closed / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2).double()) ** 2
    )
    abar = cosine_alphas_cumprod(1000)
    # But for the last step, whose β is held at 0.999.
    torch.testing.assert_close(abar[:-1], closed)
    torch.testing.assert_close(abar[-1] / abar[-2], torch.tensor(0.001).double())


def test_other_predictions_and_units_are_the_cards() -> None:
    state = weights(config())
    x = image(1, LEVELS)
    prior = load(state, {})
    scaled = load(state, {"scale": 1000.0, "offset": -24.0})
    torch.testing.assert_close(
        (scaled.denoise(1000 * x - 24, 1000 * LEVELS) + 24) / 1000,
        prior.denoise(x, LEVELS),
        rtol=1e-4,
        atol=1e-4,
    )
    assert "x = 1000·u + -24" in decisions(scaled)
    direct = load(state, {"predicts": "x0"})
    assert isinstance(direct, DiscretePrior) and direct.predicts == "x0"
    with pytest.raises(ValueError, match="predicts must be"):
        load(state, {"predicts": "score"})
    with pytest.raises(ValueError, match="schedule must be 'linear' or 'cosine'"):
        load(state, {"schedule": "sigmoid"})


def test_a_batch_is_its_items_and_has_gradients() -> None:
    prior = load(weights(config()), {})
    x = image(1, LEVELS, size=24).requires_grad_()
    both = prior.denoise(x, LEVELS)
    assert both.shape == x.shape  # the learnt variance is gone
    for i in range(2):
        alone = prior.denoise(x[i : i + 1], LEVELS[i])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(both[0].sum(), x)
    assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0


def test_the_class_matters_and_must_be_given() -> None:
    state = weights(config(classes=5))
    with pytest.raises(ValueError, match="give the card a class_label of 0 … 4"):
        load(state, {})
    with pytest.raises(ValueError, match="class_label of 0 … 4"):
        load(state, {"class_label": 5})
    x = image(1, LEVELS)
    one, two = (load(state, {"class_label": i}).denoise(x, LEVELS) for i in (1, 2))
    assert not torch.allclose(one, two)


# --- the architecture


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("resample", ["residual", "conv", "pool"])
@pytest.mark.parametrize("widths", [(32,), (32, 64), (32, 64, 64, 96)])
def test_architecture_is_read_from_the_shapes(
    blocks: int, resample: Any, widths: tuple[int, ...]
) -> None:
    attention = (*(False for _ in widths[1:]), True)
    if len(widths) == 1:
        resample = "pool"  # nothing is resampled
    made = config(
        widths=widths,
        blocks=blocks,
        resample=resample,
        attention=attention,
        classes=7,
        head_channels=None if widths[-1] % 64 else 64,
    )
    inferred, _ = architecture(valueless(made))
    assert ADMConfig(**inferred) == made


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (
            config(
                width=192,
                widths=(192, 384, 576, 768),
                blocks=3,
                attention=(False, True, True, True),
                classes=1000,
            ),
            {"new_attention_order": True, "schedule": "cosine", "head_channels": 64},
        ),
        (
            config(
                width=256,
                widths=(256, 256, 512, 768, 1024),
                blocks=2,
                attention=(False, False, True, True, True),
                classes=1000,
            ),
            {"new_attention_order": False, "head_channels": None, "heads": 4},
        ),
        (
            config(
                width=256,
                widths=(256, 256, 512, 512, 1024, 1024),
                blocks=2,
                attention=(False, False, False, True, True, True),
            ),
            {"new_attention_order": False, "head_channels": 64},
        ),
        (
            config(
                width=128,
                widths=(128, 128, 256, 256, 512, 512),
                attention=(False, False, False, False, True, False),
            ),
            {"new_attention_order": False, "head_channels": 64},
        ),
    ],
    ids=["ImageNet 64", "ImageNet 128", "ImageNet 256", "FFHQ 256"],
)
def test_published_models_are_known_by_their_shapes(
    made: ADMConfig, expected: dict[str, Any]
) -> None:
    inferred, told = architecture(valueless(made))
    assert expected.items() <= inferred.items()
    assert inferred["widths"] == made.widths and inferred["blocks"] == made.blocks
    assert inferred["attention"] == made.attention
    assert ("published" in " ".join(told)) == (made.classes is not None)


def test_decisions_tell_what_was_assumed() -> None:
    told = decisions(load(weights(config()), {}))
    assert "widths 32, 64; 1 block(s) a level" in told
    assert "64 channels a head in the legacy order (assumed)" in told
    assert "predicts eps in 1000 steps, linear schedule" in told
    assert "learnt variance is left out" in told
    assert "1 channel(s) in [-1, 1], sizes divisible by 2" in told
    card = {"network": {"head_channels": 16, "new_attention_order": True}}
    assert "16 channels a head in the new order (card)" in decisions(
        load(weights(config()), card)
    )


def test_half_precision_is_made_single_and_no_random_number_is_drawn() -> None:
    state = {k: v.half() for k, v in weights(config()).items()}
    before = torch.get_rng_state()
    net: nn.Module = vars(load(state, {}))["net"]
    assert torch.equal(before, torch.get_rng_state())
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in net.parameters())


def test_images_that_cannot_be_halved_are_refused() -> None:
    prior = load(weights(config()), {})
    prior.check((1, 18, 16))
    with pytest.raises(ValueError, match="divisible by 2"):
        prior.check((1, 17, 16))
    with pytest.raises(ValueError, match="1 channel"):
        prior.check((3, 16, 16))


# --- refusals


def test_weights_that_are_not_an_adm_unet_are_refused() -> None:
    state = weights(config())
    assert sniff(state, {}) and not sniff(state, {"family": "edm"})
    assert not sniff({k: v for k, v in state.items() if k != "out.2.weight"}, {})
    lacking = {k: v for k, v in state.items() if k != "middle_block.1.qkv.bias"}
    with pytest.raises(ValueError, match=r"lack 'middle_block.1.qkv.bias'"):
        load(lacking, {})
    name = "input_blocks.3.1.transformer_blocks.0.norm1.weight"
    with pytest.raises(ValueError, match=r"also hold 'input_blocks.3.1.transformer"):
        load(state | {name: torch.zeros(64)}, {})
    with pytest.raises(ValueError, match=r"'out.0.weight' is \(64,\), not \(32,\)"):
        load(state | {"out.0.weight": torch.zeros(64)}, {})
    with pytest.raises(ValueError, match="no ADM U-Net"):
        load({k: v for k, v in state.items() if "output" not in k}, {})
    with pytest.raises(ValueError, match="do not make levels"):
        load(state | {"output_blocks.4.0.in_layers.2.weight": torch.zeros(1)}, {})
    volume = {"input_blocks.0.0.weight": torch.zeros(32, 1, 3, 3, 3)}
    with pytest.raises(ValueError, match="3 dimensions"):
        load(state | volume, {})


def test_networks_conditional_on_images_are_refused() -> None:
    with pytest.raises(ValueError, match="takes 3 channels and gives 2"):
        load(weights(config(channels=3)), {})


def test_cards_that_say_what_cannot_be_are_refused() -> None:
    state = weights(config())
    with pytest.raises(ValueError, match="entry 'depth' is unknown"):
        load(state, {"network": {"depth": 3}})
    with pytest.raises(ValueError, match="entry 'heads' cannot be '4'"):
        load(state, {"network": {"heads": "4"}})
    with pytest.raises(ValueError, match="entry 'attention' cannot be True"):
        load(state, {"network": {"attention": True}})
    with pytest.raises(ValueError, match="cannot be cut into heads"):
        load(state, {"network": {"heads": 5}})
    with pytest.raises(ValueError, match="do not fit"):
        load(state, {"network": {"widths": [32, 96]}})
