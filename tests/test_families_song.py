"""score_sde's and EDM's checkpoints: from the file to the denoiser."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    fill,
    filled,
    image,
    persistent,
    save_edm,
    save_score_sde,
    score_sde_shapes,
    summary,
)
from torch import Generator, Tensor

from invsolve.priors import DiscretePrior, EDMPrior, GaussianPrior, Prior
from invsolve.priors.families import FAMILIES
from invsolve.priors.families.sde import VEPrior, VPPrior
from invsolve.priors.networks.song import SongConfig, SongUNet
from invsolve.priors.reading import read_checkpoint

BY_NAME = {family.name: family for family in FAMILIES}
LEVELS = torch.tensor([0.05, 3.0])
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
SIGMAS = torch.exp(torch.linspace(5.934894, -4.605170, 2000))  # 378 … 0.01


def loaded(path: Path, name: str, **card: Any) -> Prior:
    state, facts = read_checkpoint(path)
    takers = [family.name for family in FAMILIES if family.sniff(state, facts | card)]
    assert takers == [name]
    return BY_NAME[name].load(state, facts | card)


def decisions(prior: Prior) -> str:
    return "\n".join(vars(prior)["decisions"])


def agrees(prior: Prior, x: Tensor, sigma: Tensor, expected: list[float]) -> None:
    # Values of the families' own code, to the digits that it gave.
    seen = summary(prior.denoise(x, sigma))
    torch.testing.assert_close(
        seen, torch.tensor(expected).double(), rtol=1e-5, atol=2e-5
    )


# --- score_sde


def test_diffusionmbir_denoises_as_its_own_code_does(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    save_score_sde(path, fill(score_sde_shapes()), SIGMAS)
    prior = loaded(path, "score-sde")
    agrees(
        prior,
        image(1, LEVELS),
        LEVELS,
        [-0.009843, -0.071489, 0.719728, 2.165699, -2.75743, -0.275104, 2.03873],
    )
    assert prior.sigma_min == pytest.approx(0.01, rel=1e-4)
    assert prior.sigma_max == pytest.approx(378, rel=1e-4)
    told = decisions(prior)
    assert "residual encoder" in told and "[0, 1]" in told and "1, 3, 3, 1" in told


def test_ddpmpp_denoises_as_its_own_code_does(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    shapes = score_sde_shapes(fourier=False, residual=False)
    save_score_sde(path, fill(shapes), SIGMAS)
    sigma = torch.tensor([0.17414286732673645, 11.812750816345215])  # t = 0.05, 0.7
    agrees(
        loaded(path, "score-sde"),
        image(1, sigma),
        sigma,
        [-0.032648, -0.104831, 0.770722, 6.621946, -9.266249, -1.120286, 6.264206],
    )


def test_steps_of_a_discrete_ve_network_are_its_levels() -> None:
    told: list[Tensor] = []

    def net(x: Tensor, noise: Tensor) -> Tensor:
        told.append(noise)
        return x

    sigmas = torch.exp(torch.linspace(3.0, -4.0, 50))
    prior = VEPrior(net, float(sigmas[-1]), float(sigmas[0]), steps=50)
    for step in (0, 7, 49):
        prior.denoise(torch.zeros(2, 1, 4, 4), sigmas[step])
    seen = torch.stack(told)[:, 0]
    torch.testing.assert_close(seen, torch.tensor([0.0, 7.0, 49.0]), rtol=0, atol=1e-4)


def test_positional_networks_are_taken_as_ve_where_the_card_says_so(
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoint.pth"
    save_score_sde(path, fill(score_sde_shapes(fourier=False)), SIGMAS)
    x = image(1, LEVELS)
    centered = loaded(path, "score-sde", sde="ve", centered=True)
    assert centered.sigma_max == pytest.approx(378, rel=1e-4)
    # The images in [0, 1] are (u + 1)/2 of those in [−1, 1], at half the noise; the
    # network, told of steps, hears the same of both.
    halved = loaded(path, "score-sde", sde="ve")
    u = centered.denoise(2 * x - 1, LEVELS)
    same = VEPrior(vars(centered)["net"], 0.02, 756.0, steps=2000)
    torch.testing.assert_close(
        halved.denoise(x, LEVELS), (same.denoise(2 * x - 1, 2 * LEVELS) + 1) / 2
    )
    assert not torch.allclose(u, same.denoise(2 * x - 1, LEVELS))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("multiples", [(1,), (1, 2), (1, 2, 1)])
@pytest.mark.parametrize("everywhere", [True, False])
def test_score_sde_architecture_is_read_from_the_order_of_modules(
    tmp_path: Path, blocks: int, multiples: tuple[int, ...], everywhere: bool
) -> None:
    path = tmp_path / "checkpoint.pth"
    attends = (everywhere,) * len(multiples)
    shapes = score_sde_shapes(
        multiples=multiples, blocks=blocks, attends=attends, channels=2
    )
    save_score_sde(path, fill(shapes), SIGMAS)
    prior = loaded(path, "score-sde")
    config: SongConfig = vars(vars(prior)["inner"])["net"].config
    assert config.widths == tuple(16 * m for m in multiples)
    assert config.blocks == blocks and config.attention == attends
    prior.check((2, 16, 16))
    with pytest.raises(ValueError, match="2 channel"):
        prior.check((1, 16, 16))


def test_score_sde_weights_that_are_not_ncsnpp_are_refused(tmp_path: Path) -> None:
    state = fill(score_sde_shapes())
    family = BY_NAME["score-sde"]
    full = {"sigmas": SIGMAS, **state}
    with pytest.raises(ValueError, match="lack 'sigmas'"):
        family.load(state, {})
    family.load(state, {"sigma_min": 0.01, "sigma_max": 100})
    with pytest.raises(ValueError, match=r"module 3 is norm, not conv"):
        family.load(full | {"all_modules.3.weight": torch.zeros(16)}, {})
    with pytest.raises(ValueError, match=r"'all_modules.x.weight' is unknown"):
        family.load(full | {"all_modules.x.weight": torch.zeros(16)}, {})
    last = max(int(k.split(".")[1]) for k in state) + 1
    with pytest.raises(ValueError, match="left over"):
        family.load(full | {f"all_modules.{last}.weight": torch.zeros(16)}, {})
    shape = {"all_modules.4.Conv_0.weight": torch.zeros(16, 16, 1, 1)}
    with pytest.raises(ValueError, match=r"conv0.weight' is "):
        family.load(full | shape, {})
    with pytest.raises(ValueError, match="sde must be"):
        family.load(full, {"sde": "subvp"})
    with pytest.raises(ValueError, match="entry 'depth' is unknown"):
        family.load(full, {"network": {"depth": 3}})


# --- EDM


def edm_state(config: SongConfig, *, filters: bool = True) -> dict[str, Tensor]:
    """A U-Net's weights by the rule, with the filters that EDM keeps among them."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in SongUNet(config).state_dict().items()}
    state = fill(shapes, "model.")
    if filters:
        taps = torch.tensor(config.taps)
        state["enc.8x8_down.conv0.resample_filter"] = (
            taps.outer(taps) / taps.sum() ** 2
        )[None, None]
    return {f"model.{k}": v for k, v in state.items()}


def song(**changes: Any) -> SongConfig:
    values: dict[str, Any] = {
        "kind": "song",
        "channels": 2,
        "out_channels": 2,
        "resolution": 16,
        "widths": (16, 32),
        "blocks": 1,
        "attention": (False, True),
        "stem": 16,
        "noise_channels": 32,
        "emb_channels": 64,
        "fourier": True,
        "encoder": "residual",
        "decoder": "standard",
        "taps": (1.0, 3.0, 3.0, 1.0),
        "classes": None,
    }
    return SongConfig(**(values | changes))


DHARIWAL = song(
    kind="dhariwal",
    widths=(32, 128),
    stem=32,
    noise_channels=32,
    emb_channels=128,
    fourier=False,
    encoder="standard",
    taps=(1.0, 1.0),
    classes=4,
)
DDPMPP = song(
    fourier=False,
    noise_channels=16,
    encoder="skip",
    decoder="skip",
    taps=(1.0, 1.0),
)


def save(path: Path, state: dict[str, Tensor], kind: str, **arguments: Any) -> None:
    save_edm(path, persistent(state, kind, img_resolution=16, **arguments))


def test_edm_ncsnpp_denoises_as_its_own_code_does(tmp_path: Path) -> None:
    path = tmp_path / "network.pkl"
    state = edm_state(song(classes=4))
    state["model.map_label.weight"] *= 100  # or the class would hardly be heard
    state["model.map_augment.weight"] = filled("model.map_augment.weight", (32, 3))
    save(path, state, "EDMPrecond", sigma_data=0.5)
    agrees(
        loaded(path, "edm", class_label=2),
        image(2, LEVELS),
        LEVELS,
        [-0.000462, 0.723338, -0.600157, 0.100981, -0.010923, -0.008356, 0.523868],
    )


def test_edm_adm_denoises_as_its_own_code_does(tmp_path: Path) -> None:
    path = tmp_path / "network.pkl"
    save(path, edm_state(DHARIWAL), "EDMPrecond")
    agrees(
        loaded(path, "edm", class_label=2),
        image(2, LEVELS),
        LEVELS,
        [0.009099, 0.716561, -0.610574, 0.005855, -0.048671, -0.058139, 0.527129],
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "VEPrecond",
            [-0.003124, 0.72532, -0.613105, 3.926111, 1.017184, -0.302634, 2.136844],
        ),
        (
            "VPPrecond",
            [0.003279, 0.735395, -0.587692, 3.49802, 2.032515, 0.304819, 2.122938],
        ),
    ],
)
def test_edm_preconditionings_denoise_as_its_own_code_does(
    tmp_path: Path, kind: str, expected: list[float]
) -> None:
    path = tmp_path / "network.pkl"
    save(path, edm_state(DDPMPP), kind)
    agrees(loaded(path, "edm"), image(2, LEVELS), LEVELS, expected)


def test_edm_iddpm_denoises_as_its_own_code_does(tmp_path: Path) -> None:
    path = tmp_path / "network.pkl"
    # Karras et al. 2022, Table 1: u_{j−1}² = (u_j² + 1)/max(ᾱ_{j−1}/ᾱ_j, C₁) − 1.
    j = torch.arange(1001, dtype=torch.float64)
    alpha = (torch.pi / 2 * j / 1000 / 1.008).sin() ** 2
    u = torch.zeros(1001, dtype=torch.float64)
    for i in range(1000, 0, -1):
        u[i - 1] = (
            (u[i] ** 2 + 1) / (alpha[i - 1] / alpha[i]).clamp_min(1e-3) - 1
        ).sqrt()
    config = song(**{**vars(DDPMPP), "out_channels": 4})
    save(path, edm_state(config) | {"u": u.float()}, "iDDPMPrecond")
    prior = loaded(path, "edm")
    sigma = torch.tensor([0.16943570971488953, 32.072757720947266])  # u at 900 and 20
    x = image(2, sigma)
    assert isinstance(prior, DiscretePrior)
    torch.testing.assert_close(prior.step(sigma), torch.tensor([99.0, 979.0]))
    agrees(
        prior,
        x,
        sigma,
        [0.011214, 0.830288, -0.626798, 28.765951, 18.206421, 3.205442, 17.361656],
    )


def test_edm_card_and_arguments_decide(tmp_path: Path) -> None:
    path = tmp_path / "network.pkl"
    save(path, edm_state(song()), "EDMPrecond", sigma_data=0.3, sigma_max=float("inf"))
    prior = loaded(path, "edm")
    assert isinstance(prior, EDMPrior)
    assert (prior.sigma_data, prior.sigma_min, prior.sigma_max) == (0.3, 0.002, 80.0)
    assert isinstance(loaded(path, "edm", preconditioning="ve"), VEPrior)
    x = image(2, LEVELS)
    scaled = loaded(path, "edm", scale=0.5, offset=0.5)
    torch.testing.assert_close(
        scaled.denoise((x + 1) / 2, LEVELS / 2), (prior.denoise(x, LEVELS) + 1) / 2
    )
    with pytest.raises(ValueError, match="unknown preconditioning 'flow'"):
        loaded(path, "edm", preconditioning="flow")


def test_edm_weights_alone_are_taken_as_edm_and_said_so() -> None:
    config = song(encoder="skip", decoder="skip", classes=3)
    prior = BY_NAME["edm"].load(edm_state(config, filters=False), {})
    assert vars(prior)["net"].config == config
    assert "preconditioning edm (assumed)" in decisions(prior)
    assert "none of its 3 classes" in decisions(prior)


def test_no_class_is_the_class_label_of_nothing() -> None:
    state = edm_state(song(classes=3))
    state["model.map_label.weight"].zero_()
    x = image(2, LEVELS)
    none, two = (
        BY_NAME["edm"].load(state, card).denoise(x, LEVELS)
        for card in ({}, {"class_label": 2})
    )
    torch.testing.assert_close(none, two)


@pytest.mark.parametrize("label", [-1, 4, "cat", 1.0])
def test_classes_that_are_not_there_are_refused(label: Any) -> None:
    with pytest.raises(ValueError, match="class_label must be one of 0 … 3"):
        BY_NAME["edm"].load(edm_state(DHARIWAL), {"class_label": label})


def test_edm_weights_that_do_not_fit_are_refused() -> None:
    state = edm_state(song())
    family = BY_NAME["edm"]
    lacking = {k: v for k, v in state.items() if k != "model.dec.8x8_in1.conv1.bias"}
    with pytest.raises(ValueError, match=r"lack 'dec.8x8_in1.conv1.bias'"):
        family.load(lacking, {})
    with pytest.raises(ValueError, match="also hold 'more'"):
        family.load(state | {"model.more": torch.zeros(1)}, {})
    bare = {
        "enc.8x8_block0.conv1.weight": torch.zeros(8, 8, 3, 3),
        "enc.8x8_conv.weight": torch.zeros(8, 1, 3, 3),
        "dec.8x8_aux_conv.weight": torch.zeros(1, 8, 3, 3),
    }
    with pytest.raises(ValueError, match=r"lack 'map_layer0.weight'"):
        family.load(bare, {})
    conditional = edm_state(song(channels=3))
    with pytest.raises(ValueError, match="takes 3 channels and gives 2"):
        family.load(conditional, {})
    with pytest.raises(ValueError, match="lack iDDPM's noise levels"):
        family.load(state, {"preconditioning": "iddpm"})


def test_loading_draws_no_random_numbers_and_keeps_single_precision() -> None:
    state = {k: v.half() for k, v in edm_state(song()).items()}
    before = torch.get_rng_state()
    prior = BY_NAME["edm"].load(state, {})
    assert torch.equal(before, torch.get_rng_state())
    parameters = list(vars(prior)["net"].parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    assert not any(p.requires_grad for p in parameters)


@pytest.mark.parametrize(
    "config", [song(), DHARIWAL, DDPMPP], ids=["ncsn", "adm", "ddpm"]
)
def test_a_batch_is_its_items_and_has_gradients(config: SongConfig) -> None:
    prior = BY_NAME["edm"].load(edm_state(config), {})
    x = image(2, LEVELS, size=24).requires_grad_()
    both = prior.denoise(x, LEVELS)
    for i in range(2):
        alone = prior.denoise(x[i : i + 1], LEVELS[i])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(both[0].sum(), x)
    assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0


# --- the SDEs


def test_every_parameterisation_gives_the_gaussian_denoiser(
    generator: Generator,
) -> None:
    # x₀ ~ N(0, v): what each convention's perfect network says, and what it is told.
    v = 0.7
    x = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)
    exact = GaussianPrior(
        torch.zeros(1, 4, 4).double(), v * torch.eye(16).double()
    ).denoise(x, sigma)

    def ve(x: Tensor, noise: Tensor) -> Tensor:
        s = (noise.exp() * 2)[:, None, None, None]
        return -s * x / (v + s**2)

    def vp(x_t: Tensor, time: Tensor) -> Tensor:
        t = time / 999
        s2 = torch.expm1(19.9 / 2 * t**2 + 0.1 * t)[:, None, None, None]
        return s2.sqrt() * x_t * (1 + s2) ** 0.5 / (v + s2)

    for prior in (VEPrior(ve, 0.02, 100.0), VPPrior(vp)):
        torch.testing.assert_close(prior.denoise(x, sigma), exact, rtol=1e-6, atol=1e-8)


def test_vp_levels_are_those_of_its_times() -> None:
    prior = VPPrior(lambda x, t: x, 0.1, 20.0, t_min=1e-3)
    t = torch.tensor([1e-3, 0.3, 1.0], dtype=torch.float64)
    sigma = torch.expm1(19.9 / 2 * t**2 + 0.1 * t).sqrt()
    torch.testing.assert_close(prior.time(sigma), t)
    assert prior.sigma_min == pytest.approx(float(sigma[0]))
    assert prior.sigma_max == pytest.approx(float(sigma[2]))


def test_noise_levels_and_rates_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 1 to 0.5"):
        VEPrior(lambda x, t: x, 1.0, 0.5)
    with pytest.raises(ValueError, match="rates must rise"):
        VPPrior(lambda x, t: x, 20.0, 0.1)
