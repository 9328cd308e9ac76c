"""One call loads every family's files, says what it decided, and runs nothing of them."""

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    fill,
    image,
    persistent,
    save_edm,
    save_score_sde,
    score_sde_shapes,
)
from safetensors.torch import save_file
from test_reading import mutated, payloads, watched as watched
from torch import Generator, Tensor, nn

from invsolve import priors
from invsolve.cli import main
from invsolve.priors import (
    Affine,
    AffineMap,
    DiscretePrior,
    EDMPrior,
    FlowPrior,
    GaussianPrior,
    Info,
    Prior,
    UNet,
    UNetConfig,
)
from invsolve.priors.base import Prior as BasePrior
from invsolve.priors.families import FAMILIES
from invsolve.priors.networks.adm import ADMConfig, ADMUNet
from invsolve.priors.networks.song import SongConfig, SongUNet
from invsolve.priors.weights import card_of, read_card, sha256

ADM = ADMConfig(
    1, 2, 32, (32, 64), 1, (False, True), None, 4, False, True, "residual", None
)
SONG = {
    "kind": "song",
    "channels": 1,
    "out_channels": 1,
    "resolution": 16,
    "widths": (16, 32),
    "blocks": 1,
    "attention": (False, True),
    "stem": 16,
    "noise_channels": 16,
    "emb_channels": 64,
    "fourier": False,
    "encoder": "standard",
    "decoder": "standard",
    "taps": (1.0, 1.0),
    "classes": None,
}


def shapes(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in make().state_dict().items()}


def save_adm(folder: Path) -> Path:
    torch.save(fill(shapes(lambda: ADMUNet(ADM))), folder / "file.pt")
    return folder / "file.pt"


def save_adm_as_safetensors(folder: Path) -> Path:
    state = {f"module.{k}": v for k, v in fill(shapes(lambda: ADMUNet(ADM))).items()}
    save_file(state, folder / "file.safetensors")
    return folder / "file.safetensors"


def save_song(folder: Path) -> Path:
    state = {
        f"model.{k}": v
        for k, v in fill(shapes(lambda: SongUNet(SongConfig(**SONG)))).items()
    }
    network = persistent(state, "EDMPrecond", sigma_data=0.4, sigma_max=60.0)
    save_edm(folder / "file.pkl", network)
    return folder / "file.pkl"


def save_sde(folder: Path) -> Path:
    sigmas = torch.linspace(60.0, 0.01, 20)
    save_score_sde(folder / "file.pth", fill(score_sde_shapes()), sigmas)
    return folder / "file.pth"


def save_own(folder: Path) -> Path:
    config = UNetConfig(widths=(8, 16), groups=4)
    state = fill(shapes(lambda: UNet(config)))
    save_file(state, folder / "file.safetensors")
    map = AffineMap(0.02, 0.1)
    card = card_of("file", config, sigma_data=0.5, map=map, unit="1/mm", training={})
    (folder / "file.json").write_text(json.dumps(card | {"licence": "BSD-3-Clause"}))
    return folder / "file.json"


def save_diffusers(folder: Path) -> Path:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    net = UNet2DModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    net.load_state_dict(fill({k: tuple(v.shape) for k, v in net.state_dict().items()}))
    net.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)
    return folder


def save_monai(folder: Path) -> Path:
    nets = pytest.importorskip("monai.networks", reason="monai==1.6.1").nets
    told = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_res_blocks": 1}
    told |= {"channels": [4, 8], "attention_levels": [False, True]}
    told |= {"norm_num_groups": 4, "num_head_channels": 4}
    (folder / "configs").mkdir()
    (folder / "models").mkdir()
    state = fill(shapes(lambda: nets.DiffusionModelUNet(**told)))
    torch.save(state, folder / "models" / "model.pt")
    target = {"_target_": "monai.networks.nets.DiffusionModelUNet"}
    config = {"network_def": target | told}
    (folder / "configs" / "train.json").write_text(json.dumps(config))
    return folder


SAVERS: dict[str, Callable[[Path], Path]] = {
    "adm": save_adm,
    "adm safetensors": save_adm_as_safetensors,
    "edm": save_song,
    "score-sde": save_sde,
    "edm-unet": save_own,
    "diffusers": save_diffusers,
    "monai": save_monai,
}


# --- what is told


EXPECTED: dict[str, Info] = {
    "adm": Info("adm", "eps", "", (-1.0, 1.0), 1, 2, 2, 0.01, 157.4),
    "edm": Info("edm", "edm", "", (-1.0, 1.0), 1, 2, 2, 0.002, 60.0),
    "score-sde": Info("score-sde", "score", "", (0.0, 1.0), 1, 2, 2, 0.01, 60.0),
    "edm-unet": Info(
        "edm-unet", "edm", "1/mm", None, 1, 2, 4, 4e-5, 0.4, "", "BSD-3-Clause"
    ),
    "diffusers": Info("diffusers", "eps", "", (-1.0, 1.0), 1, 2, 2, 0.01, 157.4),
    "monai": Info("monai", "eps", "", (0.0, 1.0), 1, 3, 2, 0.01, 157.4),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_family_loads_by_one_call_and_tells_what_it_is(
    name: str, tmp_path: Path
) -> None:
    prior = priors.load(SAVERS[name](tmp_path))
    info, expected = prior.info, EXPECTED[name]
    levels = (info.sigma_min, info.sigma_max)
    assert levels == pytest.approx((expected.sigma_min, expected.sigma_max), rel=2e-2)
    assert levels == (prior.sigma_min, prior.sigma_max)
    for fact in ("family", "parameterisation", "unit", "range", "channels", "licence"):
        assert getattr(info, fact) == getattr(expected, fact), fact
    assert (info.spatial_dims, info.multiple_of) == (
        expected.spatial_dims,
        expected.multiple_of,
    )
    assert prior.decisions[0].startswith(f"{info.family}, by its ")
    assert any("widths" in d for d in prior.decisions)
    assert any(f"divisible by {info.multiple_of}" in d for d in prior.decisions)
    x = image(1, torch.ones(2)) if info.spatial_dims == 2 else torch.rand(2, 1, 4, 4, 4)
    assert prior.denoise(x, torch.tensor([0.1, 0.3])).isfinite().all()


def test_the_range_follows_the_image_to_another_unit(tmp_path: Path) -> None:
    path = save_sde(tmp_path)  # its images are in [0, 1], its network's in [−1, 1]
    assert priors.load(path).info.range == (0.0, 1.0)
    scaled = priors.load(path, {"scale": 2000.0, "offset": -1000.0, "unit": "HU"})
    assert scaled.info.range == (-1000.0, 1000.0) and scaled.info.unit == "HU"
    assert Affine(scaled, AffineMap(0.5, 0.0)).info.range == (-500.0, 500.0)
    assert Affine(scaled, AffineMap(0.5, 0.0)).info.licence == ""


def test_priors_that_no_file_told_of_are_described_too() -> None:
    net = nn.Conv3d(2, 2, 3, padding=1)
    made = EDMPrior(net, multiple_of=8, channels=2).info  # pyright: ignore
    assert (made.parameterisation, made.spatial_dims) == ("edm", 3)
    assert (made.multiple_of, made.channels, made.sigma_max) == (8, 2, 80.0)
    assert FlowPrior(net).info.parameterisation == "flow"  # pyright: ignore
    analytic = GaussianPrior(torch.zeros(2), torch.eye(2))
    assert analytic.info.family == "" and analytic.info.channels is None
    assert dict(analytic.info)["range"] == "unknown" and analytic.decisions == ()


def test_devices_do_not_lose_what_was_told(tmp_path: Path) -> None:
    prior = priors.load(save_adm(tmp_path), {"scale": 2.0})
    moved = prior.to(torch.device("cpu"))
    assert moved.decisions == prior.decisions and moved.info == prior.info


# --- the same point through any parameterisation


def test_one_point_has_one_answer_in_every_parameterisation(
    generator: Generator,
) -> None:
    # A Gaussian's networks are known in every convention.
    mean, std = 0.3, 0.7
    exact = GaussianPrior(torch.full((16,), mean), std**2 * torch.eye(16))

    def x0(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        return (std**2 * x + s**2 * mean) / (std**2 + s**2)

    abar = priors.ddpm_alphas_cumprod()
    sigmas = (1 / abar - 1).sqrt().float()

    def level(t: Tensor) -> Tensor:
        low = t.floor().long().clamp(0, 998)
        part = t - low
        return ((1 - part) * sigmas[low].log() + part * sigmas[low + 1].log()).exp()

    def discrete(what: str) -> Callable[[Tensor, Tensor], Tensor]:
        def net(x_t: Tensor, t: Tensor) -> Tensor:
            s = level(t).reshape(-1, 1, 1, 1)
            x = x_t * (1 + s**2).sqrt()
            clean = x0(x, level(t))
            noise = (x - clean) / s
            v = (noise - s * clean) / (1 + s**2).sqrt()
            return {"x0": clean, "eps": noise, "v": v}[what]

        return net

    def flow(x_t: Tensor, t: Tensor) -> Tensor:
        part = t.reshape(-1, 1, 1, 1)
        return (x_t - x0(x_t / (1 - part), t / (1 - t))) / part

    def edm(x: Tensor, c_noise: Tensor) -> Tensor:
        sigma = (4 * c_noise).exp()
        s = sigma.reshape(-1, 1, 1, 1)
        total = (s**2 + 0.25).sqrt()
        return (
            (x0(x * total, sigma) - (0.5 / total) ** 2 * x * total) * total / (s * 0.5)
        )

    def noise(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - x0(x, sigma)) / sigma.reshape(-1, 1, 1, 1)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return -noise(x, sigma) / sigma.reshape(-1, 1, 1, 1)

    made: list[BasePrior] = [
        *(DiscretePrior(discrete(w), abar, w) for w in ("eps", "v", "x0")),
        FlowPrior(flow),
        EDMPrior(edm),
        priors.from_callable(x0, 0.01, 100.0),
        priors.from_callable(noise, 0.01, 100.0, predicts="eps"),
        priors.from_callable(score, 0.01, 100.0, predicts="score"),
    ]
    x = torch.randn(2, 1, 4, 4, generator=generator)
    sigma = torch.tensor([0.2, 3.0])
    expected = torch.stack(
        [
            exact.denoise(x[i].reshape(1, 16), sigma[i]).reshape(1, 4, 4)
            for i in range(2)
        ]
    )
    for prior in made:
        torch.testing.assert_close(
            prior.denoise(x, sigma), expected, rtol=1e-4, atol=1e-5
        )
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(prior.denoise(given, sigma).sum(), given)
        slope = std**2 / (std**2 + sigma**2)  # the posterior's variance over σ²
        torch.testing.assert_close(
            gradient, slope.reshape(-1, 1, 1, 1).expand_as(x), rtol=1e-3, atol=1e-4
        )


# --- functions and deepinv's denoisers


def test_a_function_is_asked_within_its_levels() -> None:
    seen: list[Tensor] = []

    def f(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return x

    prior = priors.from_callable(f, 0.1, 2.0, channels=3, multiple_of=4, unit="HU")
    prior.denoise(torch.zeros(3, 3, 4, 4), torch.tensor([0.01, 1.0, 50.0]))
    assert torch.equal(seen[0], torch.tensor([0.1, 1.0, 2.0]))
    prior.denoise(torch.zeros(2, 3, 4, 4), torch.tensor(1.0))
    assert seen[1].shape == (2,)
    assert prior.info.unit == "HU" and prior.info.family == "callable"
    with pytest.raises(ValueError, match="3 channel"):
        prior.check((1, 4, 4))
    with pytest.raises(ValueError, match="rise from above 0"):
        priors.from_callable(f, 2.0, 0.1)


def deepinv_denoiser(kind: str) -> Any:
    models = pytest.importorskip("deepinv.models", reason="deepinv is an extra")
    if kind == "DRUNet":
        net = models.DRUNet(1, 1, nc=(4, 4, 8, 8), nb=1, pretrained=None)
    else:
        small = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1}
        net = models.NCSNpp(**small, img_resolution=16, pretrained=None)
    chance = Generator().manual_seed(0)
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=chance)
        parameter.data = noise * 0.1
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["DRUNet", "NCSNpp"])
def test_deepinvs_denoisers_are_what_they_are_in_deepinv(
    kind: str, generator: Generator
) -> None:
    net = deepinv_denoiser(kind)
    prior = priors.from_deepinv(net, channels=1 if kind == "DRUNet" else 3)
    channels = prior.info.channels or 1
    x = torch.rand(2, channels, 32, 32, generator=generator)
    sigma = torch.tensor([0.05, 0.15])
    both = prior.denoise(x, sigma)
    for i in range(2):
        expected = net(x[i : i + 1], float(sigma[i]))
        torch.testing.assert_close(both[i : i + 1], expected, rtol=1e-5, atol=1e-5)
    assert prior.info.range == (0.0, 1.0) and prior.info.family == "deepinv"
    assert f"deepinv's {kind}" in prior.decisions[0]
    assert (prior.sigma_max < 0.2) == (kind == "DRUNet")
    assert priors.from_deepinv(net, 0.01, 0.5).sigma_max == 0.5


def test_what_cannot_be_called_is_no_denoiser() -> None:
    with pytest.raises(ValueError, match="denoiser"):
        priors.from_deepinv(3)


# --- latent models


def test_latent_models_load_by_the_same_call(tmp_path: Path) -> None:
    from invsolve.priors.latent import AutoencoderConfig, LatentPrior, latent_card

    coding = AutoencoderConfig(3, 4, (8, 8), 1, 2, 4)
    network = UNetConfig(4, (8, 8), 1, 1, 4)
    parts = {"autoencoder": coding.build, "network": lambda: UNet(network)}
    made = {f"{k}.{n}": s for k, f in parts.items() for n, s in shapes(f).items()}
    save_file(fill(made), tmp_path / "small.safetensors")
    map = AffineMap(0.5, 0.5)
    told = {"sigma_data": 1.0, "map": map, "unit": "", "training": {}}
    card = latent_card("small", coding, network, **told)
    (tmp_path / "small.json").write_text(json.dumps(card))
    prior = priors.load(tmp_path / "small.json", {"licence": "MIT"})
    assert isinstance(prior, LatentPrior) and prior.info.licence == "MIT"
    assert prior.info.family == card["family"] and prior.info.channels == 3


def test_diffusers_latent_folders_load_by_the_same_call(
    tmp_path: Path, generator: Generator
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    from invsolve.priors.latent import LatentPrior, load_latent

    blocks: Any = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    sides: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    sides |= {"up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(latent_channels=3, **sides, **blocks).save_pretrained(
        tmp_path / "vae"
    )
    UNet2DModel(
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
        **blocks,
    ).save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    prior = priors.load(tmp_path, {"licence": "OpenRAIL-M"})
    assert isinstance(prior, LatentPrior) and prior.info.licence == "OpenRAIL-M"
    assert read_card(tmp_path)[1] == tmp_path
    z, sigma = torch.randn(1, 3, 8, 8, generator=generator), torch.tensor(0.5)
    expected = load_latent(tmp_path).denoise(z, sigma)
    assert torch.equal(prior.denoise(z, sigma), expected)
    refused(tmp_path, "gives unit and licence, not 'prompt'", {"prompt": "a head"})


# --- cards


def test_a_card_overrides_the_file(tmp_path: Path) -> None:
    path = save_adm(tmp_path)
    card = {"predicts": "x0", "network": {"heads": 2}, "licence": "MIT"}
    x, sigma = image(1, torch.ones(2)), torch.tensor([0.5, 2.0])
    given = priors.load(path, card)
    (tmp_path / "card.json").write_text(json.dumps(card))
    from_file = priors.load(path, tmp_path / "card.json")
    (tmp_path / "file.json").write_text(json.dumps(card))
    beside = priors.load(path)
    by_card = priors.load(tmp_path / "file.json")
    plain = priors.load(path, {"predicts": "eps", "network": {"heads": 4}})
    expected = given.denoise(x, sigma)
    for prior in (from_file, beside, by_card):
        assert torch.equal(prior.denoise(x, sigma), expected)
        assert prior.info.licence == "MIT"
    assert not torch.allclose(plain.denoise(x, sigma), expected)
    assert plain.info.licence == "MIT"  # what is not overridden stays
    assert read_card(path)[0] == card | {"name": "file"}
    assert read_card(path)[1] == tmp_path / "file.json"


def test_a_checkpoint_without_a_card_has_its_name(tmp_path: Path) -> None:
    path = save_adm(tmp_path)
    assert read_card(path) == ({"name": "file"}, path)


def test_the_sum_of_a_card_is_believed(tmp_path: Path) -> None:
    path = save_adm(tmp_path)
    priors.load(path, {"sha256": sha256(path)})
    refused(path, "sha256", {"sha256": "0" * 64})


def test_the_moving_average_is_taken_and_told(tmp_path: Path) -> None:
    path = save_adm(tmp_path)
    x, sigma = image(1, torch.ones(2)), torch.tensor([0.5, 2.0])
    expected = priors.load(path).denoise(x, sigma)
    state = torch.load(path, weights_only=True)
    other = {k: v + 1 for k, v in state.items()}
    torch.save({"model": other, "ema": state, "step": 3}, path)
    prior = priors.load(path)
    assert torch.equal(prior.denoise(x, sigma), expected)
    assert prior.decisions[:2] == [
        "adm, by its weights",
        "took its entry 'ema' (moving average)",
    ]


def test_what_lies_beside_a_checkpoint_by_chance_is_left_alone(tmp_path: Path) -> None:
    path = save_adm(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    for folder in ("configs", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "configs" / "train.json").write_text('{"lr": 1}')
    moved = path.rename(tmp_path / "runs" / path.name)
    assert priors.load(moved).info.family == "adm"


# --- refusals


def refused(path: Path, why: str, card: Any = None) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        priors.load(path, card)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_is_named_by_its_first_weights(tmp_path: Path) -> None:
    torch.save(
        {"lin.weight": torch.ones(2), "lin.bias": torch.ones(2)}, tmp_path / "a.pt"
    )
    names = ", ".join(f.name for f in FAMILIES)
    refused(
        tmp_path / "a.pt", rf"looked for {names}, .*\): they begin with lin.weight, lin"
    )
    refused(save_adm(tmp_path), "are not monai's: they begin", {"family": "monai"})
    refused(tmp_path / "file.pt", "family 'gan' is unknown", {"family": "gan"})
    refused(tmp_path / "none.pt", "unknown prior")
    refused(tmp_path / "file.pt", "cannot read the configuration", tmp_path / "no.json")


@pytest.mark.parametrize(
    "value", [None, 3, "x", [1], {"widths": None}, {"widths": 10**9}]
)
@pytest.mark.parametrize("name", ["adm", "edm", "score-sde", "edm-unet", "diffusers"])
def test_cards_of_nonsense_are_refused(value: Any, name: str, tmp_path: Path) -> None:
    path = SAVERS[name](tmp_path)
    if name == "diffusers" and isinstance(value, dict):
        value = {"block_out_channels": value["widths"]}
    refused(path, "cannot load", {"network": value, "scheduler": value})


@pytest.mark.parametrize("payload", payloads(Path()))
@pytest.mark.parametrize("name", ["adm", "edm", "diffusers"])
def test_code_in_a_checkpoint_is_not_run(
    payload: str, name: str, tmp_path: Path, watched: list[str]
) -> None:
    canary = tmp_path / "canary"
    attack = payloads(canary)[payload]
    path = SAVERS[name](tmp_path)
    match name:
        case "adm":
            torch.save(torch.load(path) | {"x": attack}, path)
        case "edm":
            save_edm(path, persistent(fill({"weight": (2,)})), loss_fn=attack)
        case "diffusers":
            (path / "diffusion_pytorch_model.safetensors").unlink()
            torch.save({"x": attack}, path / "diffusion_pytorch_model.bin")
    watched.clear()
    refused(path, "cannot load the prior")
    assert not watched and not canary.exists()


@pytest.mark.parametrize("name", SAVERS)
def test_what_is_not_finite_truncated_or_too_large_is_refused(
    name: str, tmp_path: Path
) -> None:
    path = SAVERS[name](tmp_path)
    file = weights_of(path)
    whole = file.read_bytes()
    for part in (0.0, 0.1, 0.5, 0.99):
        file.write_bytes(whole[: int(part * len(whole))])
        refused(path, "cannot load the prior")
    file.write_bytes(whole)
    if file.suffix in (".pt", ".bin"):
        state = torch.load(file, weights_only=True)
        first = next(iter(state))
        torch.save(state | {first: torch.full_like(state[first], torch.nan)}, file)
        refused(path, "not finite")
        huge = torch.zeros(1).expand(10**6, 10**6)
        torch.save(state | {first: huge}, file)
        refused(path, "larger than the file")


def weights_of(path: Path) -> Path:
    if path.is_dir():
        found = [*path.glob("*.safetensors"), *path.glob("models/*.pt")]
        return found[0]
    return path.with_suffix(".safetensors") if path.suffix == ".json" else path


# --- fuzzing


MUTATIONS = int(os.environ.get("INVSOLVE_MUTATIONS", "150"))


@pytest.mark.parametrize("name", SAVERS)
def test_damaged_files_load_or_are_refused_in_one_line_and_nothing_runs(
    name: str, tmp_path: Path, watched: list[str]
) -> None:
    good = tmp_path / "good"
    good.mkdir()
    path = SAVERS[name](good)
    priors.load(path)  # what it imports is imported
    chance, loaded = random.Random(0), 0
    files = [p for p in sorted(good.rglob("*")) if p.is_file()]
    for i in range(MUTATIONS):
        bad = tmp_path / f"bad{i}"
        shutil.copytree(good, bad)
        victim = bad / chance.choice(files).relative_to(good)
        victim.write_bytes(mutated(victim.read_bytes(), chance))
        watched.clear()
        try:
            with warnings.catch_warnings(action="ignore"):  # as it is outside tests
                prior = priors.load(bad / path.relative_to(good))
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(prior, Prior) and prior.info.family == name.split()[0]
            loaded += 1
        assert not watched
        shutil.rmtree(bad)
    assert 0 < loaded < MUTATIONS  # numbers changed, and structure broken


# --- the command line


def test_inspect_tells_what_a_file_is(tmp_path: Path, capsys: Any) -> None:
    path = save_adm(tmp_path)
    (tmp_path / "card.json").write_text('{"scale": 0.5, "unit": "1/mm"}')
    assert (
        main(["priors", "inspect", str(path), "--card", str(tmp_path / "card.json")])
        == 0
    )
    out = capsys.readouterr().out
    for line in (
        "family            adm",
        "parameterisation  eps",
        "unit              1/mm",
        "range             -0.5 … 0.5",
        "size rule         each size divisible by 2",
        "noise levels      0.005 … 78.7",
        "licence           unknown",
        "decided           ADM U-Net: widths 32, 64; 1 block(s) a level",
    ):
        assert line in out
    torch.save({"x": payloads(tmp_path / "canary")["exec"]}, path)
    assert main(["priors", "inspect", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "canary").exists()


def test_priors_are_listed_with_and_without_the_word(capsys: Any) -> None:
    assert main(["priors"]) == 0
    listed = capsys.readouterr().out
    assert main(["priors", "list"]) == 0
    assert capsys.readouterr().out == listed
    assert "ct-headneck-128" in listed and "google/ddpm-cifar10-32" in listed
    assert main(["priors", "ct-headneck-128"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["name"] == "ct-headneck-128" and Path(card["file"]).is_file()
