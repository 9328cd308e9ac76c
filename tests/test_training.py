"""Training: the loss in closed form, runs that can be cut, and what they leave."""

import csv
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from invsolve import io, priors
from invsolve.io import Image
from invsolve.priors import Affine, EDMPrior, GaussianPrior
from invsolve.priors.parameterisation import Predicts, preconditioning
from invsolve.training import TrainConfig, matching, noised, samples, shown, train
from invsolve.training_data import Data, draw, faded, load
from invsolve.training_loop import Optimisation, Plan, warm_ema
from invsolve.units import MU_WATER

# --- the loss

SIGMA_DATA, MEAN, VARIANCE = 0.5, 0.3, 0.09


def optimisation(**options: Any) -> Optimisation:
    return Optimisation.model_validate(options)


OPT = optimisation(sigma_data=SIGMA_DATA, bf16=False)


def ideal(u: Tensor, c_noise: Tensor) -> Tensor:
    """F = (D − c_skip x)/c_out, for pixels x₀ ~ N(m, v): D = m + v/(v + σ²)(x − m)."""
    sigma = (4 * c_noise).exp().reshape(-1, 1, 1, 1)
    total = (sigma**2 + SIGMA_DATA**2).sqrt()
    x = u * total
    D = MEAN + VARIANCE / (VARIANCE + sigma**2) * (x - MEAN)
    return (D - SIGMA_DATA**2 / total**2 * x) / (sigma * SIGMA_DATA / total)


def edm_loss(
    net: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    opt: Optimisation,
    generator: Generator,
) -> Tensor:
    def named(x: Tensor, c_noise: Tensor) -> Tensor:
        return net(x, c_noise)

    return matching(named, bf16=opt.bf16, **noised(x0, opt, generator))


def losses(net: Callable[[Tensor, Tensor], Tensor], opt: Optimisation) -> Tensor:
    """Independent estimates of the loss on Gaussian data."""
    g, values = Generator().manual_seed(0), []
    for _ in range(40):
        noise = torch.randn(32, 1, 16, 16, generator=g)
        values.append(edm_loss(net, MEAN + VARIANCE**0.5 * noise, opt, g))
    return torch.stack(values)


def within_five_errors(values: Tensor, expected: float) -> bool:
    error = 5 * float(values.std()) / math.sqrt(len(values))
    return abs(float(values.mean()) - expected) <= error


@pytest.mark.parametrize("log_sigma", [(-1.4, 1.4), (0.5, 0.6)])
def test_the_ideal_network_has_the_least_loss(log_sigma: tuple[float, float]) -> None:
    """E over ln σ ~ N(P_mean, P_std²) of v (σ² + σ_d²)/(σ_d² (v + σ²))."""
    mean, std = log_sigma
    opt = OPT.model_copy(update={"log_sigma_mean": mean, "log_sigma_std": std})
    z = np.linspace(-6, 6, 4001)
    weight = np.exp(-(z**2) / 2)
    s2 = np.exp(2 * (mean + std * z))
    integrand = VARIANCE * (s2 + SIGMA_DATA**2) / SIGMA_DATA**2 / (VARIANCE + s2)
    least = float((weight * integrand).sum() / weight.sum())
    assert within_five_errors(losses(ideal, opt), least)
    for scale in (0.9, 1.1):
        assert losses(lambda u, c, k=scale: k * ideal(u, c), opt).mean() > least * 1.002


@pytest.mark.parametrize(
    ("predicts", "part"),
    [
        ("x0", lambda s2: VARIANCE * s2 / (VARIANCE + s2)),
        ("eps", lambda s2: VARIANCE / (VARIANCE + s2)),
        ("flow", lambda s2: VARIANCE * (1 + s2**0.5) ** 2 / (VARIANCE + s2)),
    ],
)
def test_what_is_left_of_other_predictions(
    predicts: Predicts, part: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Cov[x₀ | x] = vσ²/(v + σ²), seen through x₀, n = (x − x₀)/σ or n − x₀."""
    opt = OPT.model_copy(update={"predicts": predicts})

    def net(u: Tensor, c_noise: Tensor) -> Tensor:
        told = c_noise.reshape(-1, 1, 1, 1)
        sigma = told / (1 - told) if predicts == "flow" else (4 * told).exp()
        skip, out, into, _ = preconditioning(predicts, sigma, SIGMA_DATA)
        x = u / into
        D = MEAN + VARIANCE / (VARIANCE + sigma**2) * (x - MEAN)
        return (D - skip * x) / out

    z = np.linspace(-6, 6, 4001)
    weight = np.exp(-(z**2) / 2)
    least = float((weight * part(np.exp(2 * (-1.4 + 1.4 * z)))).sum() / weight.sum())
    assert within_five_errors(losses(net, opt), least)
    assert losses(lambda u, c: 1.1 * net(u, c), opt).mean() > least * 1.002


@pytest.mark.parametrize("predicts", ["edm", "x0", "eps", "flow"])
def test_weighed_by_snr_every_prediction_has_the_denoiser_s_loss(
    predicts: Predicts, generator: Generator
) -> None:
    """⟨(D − x₀)² (1/σ² + 1/σ_d²)⟩ of D = c_skip x + c_out F, whatever F is."""
    opt = optimisation(
        sigma_data=SIGMA_DATA, bf16=False, predicts=predicts, weighting="snr+1"
    )
    x0 = torch.randn(16, 1, 8, 8, generator=generator)
    state = generator.get_state()
    rows = noised(x0, opt, generator)
    generator.set_state(state)
    # The same levels, noise and so x of a network whose D is 0.7 x.
    plain = noised(x0, optimisation(sigma_data=SIGMA_DATA, bf16=False), generator)
    sigma = (4 * plain["c_noise"]).exp().reshape(-1, 1, 1, 1)
    x = plain["x"] * (sigma**2 + SIGMA_DATA**2).sqrt()

    def net(x: Tensor, c_noise: Tensor) -> Tensor:
        skip, out, into, _ = preconditioning(predicts, sigma, SIGMA_DATA)
        return (0.7 - skip) / out * x / into

    weight = 1 / sigma**2 + 1 / SIGMA_DATA**2
    expected = ((0.7 * x - x0).square() * weight).mean()
    torch.testing.assert_close(matching(net, bf16=False, **rows), expected)
    if predicts == "edm":
        torch.testing.assert_close(rows["weight"], torch.ones(16, 1, 1, 1))


def test_channels_of_their_own_sigma_data_weigh_the_same(generator: Generator) -> None:
    """For x₀ ~ N(0, σ_d²) in each channel F = 0 is ideal and every target N(0, 1)."""
    data = (0.4, 0.01, 3.0)
    spread = torch.tensor(data).reshape(-1, 1, 1)
    opt = optimisation(sigma_data=data, log_sigma_std=1.0)
    x0 = spread * torch.randn(64, 3, 32, 32, generator=generator)
    target = noised(x0, opt, generator)["target"]
    assert (target.square().mean((0, 2, 3)) - 1).abs().max() < 0.03


def test_a_sigma_data_for_each_channel_is_trained_kept_and_loaded(
    config: TrainConfig, tmp_path: Path, generator: Generator
) -> None:
    def run(sigma_data: Any) -> Path:
        opt = config.optimisation.model_copy(update={"sigma_data": sigma_data})
        told = config.model_copy(update={"optimisation": opt})
        return train(told, tmp_path / "each", seed=0)

    with pytest.raises(ValueError, match=r"images have 1 channels, sigma_data 2 numb"):
        run((0.4, 0.01))
    card = run((0.4,))
    assert json.loads(card.read_text())["sigma_data"] == [0.4]
    inner = priors.load(card).normalised[0]
    assert isinstance(inner, EDMPrior) and inner.sigma_data == (0.4,)
    same = EDMPrior(inner.net, 0.4)
    x = torch.randn(2, 1, 16, 16, generator=generator)
    for level in (torch.tensor([0.1, 2.0]), torch.tensor(0.1)):
        torch.testing.assert_close(inner.denoise(x, level), same.denoise(x, level))
    with pytest.raises(ValueError, match="one for each of 3 channels, got 2"):
        EDMPrior(inner.net, (0.4, 0.1), channels=3)


def test_the_ideal_network_has_no_gradient() -> None:
    """In a factor on it, at 1; beside it there is one, that points back."""

    def gradients(at: float) -> Tensor:
        scale = torch.ones(40, requires_grad=True)
        uses = iter(scale)
        values = losses(lambda u, c: at * next(uses) * ideal(u, c), OPT)
        (gradient,) = torch.autograd.grad(values.sum(), scale)
        return gradient

    assert within_five_errors(gradients(1.0), 0.0)
    assert gradients(0.8).mean() < -0.01
    assert gradients(1.2).mean() > 0.01


def test_unit_data_and_no_network_lose_one() -> None:
    """With v = σ_d² and m = 0 the target has unit variance at every level."""
    g = Generator().manual_seed(0)
    x0 = SIGMA_DATA * torch.randn(256, 1, 16, 16, generator=g)
    loss = edm_loss(lambda u, c: torch.zeros_like(u), x0, OPT, g)
    assert float(loss) == pytest.approx(1.0, abs=5 * math.sqrt(2 / x0.numel()))


def test_the_network_sees_unit_images_and_its_level() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def net(u: Tensor, c_noise: Tensor) -> Tensor:
        seen.append((u, c_noise))
        return torch.zeros_like(u)

    g = Generator().manual_seed(0)
    x0 = SIGMA_DATA * torch.randn(64, 1, 32, 32, generator=g)
    edm_loss(net, x0, OPT, g)
    ((u, c_noise),) = seen
    torch.testing.assert_close(u.std((1, 2, 3)), torch.ones(64), rtol=0, atol=0.12)
    # One level in each of 64 equally likely strata, lowest first.
    quantile = torch.distributions.Normal(-1.4, 1.4).cdf(4 * c_noise)
    assert torch.equal((64 * quantile).floor(), torch.arange(64.0))


# --- the plan


def test_the_plan_warms_up_and_falls_to_nothing() -> None:
    plan = Plan(optimisation(images=800, batch=8, warmup=10, decay=0.5), 0.0)
    assert plan.steps == 100
    assert plan.seen(plan.steps) == 800
    rates = [plan.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0


def test_crops_count_by_their_area() -> None:
    opt = optimisation(images=800, batch=8, crop_batch=16, crop_part=0.5)
    plan = Plan(opt, 0.25)
    assert plan.crop_steps == 100  # of 16/4 images' area each
    assert plan.steps == 100 + 50
    assert plan.seen(100) == 400 and plan.seen(150) == 800


# --- the data


def volume(seed: int, n: int = 4) -> Tensor:
    """Slices with a bright block well inside, and noise on it."""
    g = Generator().manual_seed(seed)
    x = torch.zeros(n, 16, 16)
    x[:, 5:11, 4:10] = 0.5 + 0.5 * torch.rand(n, 6, 6, generator=g)
    return x


@pytest.fixture
def data(tmp_path: Path) -> Data:
    for part in ("train", "val"):
        folder = tmp_path / part
        folder.mkdir()
        np.save(folder / "a.npy", volume(1).numpy())
        np.save(folder / "b.npy", volume(2).numpy())
    return folders(tmp_path / "train", tmp_path / "val", pattern="*.npy", shift=2)


def folders(train: Path, val: Path, **options: Any) -> Data:
    return Data.model_validate({"train": train, "val": val, **options})


def read(folder: Path, data: Data, seed: int = 0) -> Tensor:
    return load(folder, data, Generator().manual_seed(seed))


def test_slices_are_all_of_every_volume_but_the_empty(data: Data) -> None:
    empty = torch.zeros(3, 16, 16)
    np.save(data.train / "c.npy", torch.cat([empty, volume(3)]).numpy())
    expected = torch.cat([volume(k) for k in (1, 2, 3)])[:, None].half()
    assert torch.equal(read(data.train, data), expected)


def test_hounsfield_units_become_the_prior_s_range(tmp_path: Path) -> None:
    hu = torch.full((2, 8, 8), -1000.0)
    hu[:, 2:6, 2:6] = 500.0
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    io.write(tmp_path / "a.nii.gz", Image(hu, affine, "HU"))
    data = folders(tmp_path, tmp_path, unit="HU", scale=MU_WATER)
    expected = (hu / 1000 + 1)[:, None].half()
    torch.testing.assert_close(read(tmp_path, data), expected)


def test_folders_without_images_are_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file matches"):
        read(tmp_path, data)
    np.save(tmp_path / "dark.npy", np.zeros((2, 16, 16)))
    with pytest.raises(ValueError, match="is background"):
        read(tmp_path, data)


def photo(path: Path, height: int, width: int) -> None:
    """Colours that tell the place: red the row, green the column."""
    row, column = np.mgrid[:height, :width]
    picture(path, np.stack([row, column, 0 * row + 7], axis=2).astype(np.uint8))


def picture(path: Path, array: np.ndarray) -> None:
    from skimage.io import imsave

    imsave(path, array, check_contrast=False)


def photographs(folder: Path, **options: Any) -> Data:
    given = {"pattern": "*.png", "photo_crops": 50, "size": 8, "zoom": 1.0}
    return folders(folder, folder, **{**given, **options})


def test_squares_are_parts_of_the_photographs(tmp_path: Path) -> None:
    """Unscaled they are the pixels, from anywhere, edges included."""
    photo(tmp_path / "a.png", 11, 13)
    data = photographs(tmp_path, scale=0.5, offset=0.5)
    squares = read(tmp_path, data).float()
    assert squares.shape == (50, 3, 8, 8)
    colours = 255 * (squares + 1) / 2
    first = colours[:, :, 0, 0].round()
    steps = torch.arange(8.0)
    expected = torch.stack(
        [
            first[:, 0, None, None] + steps[:, None].expand(8, 8),
            first[:, 1, None, None] + steps.expand(8, 8),
            torch.full((50, 8, 8), 7.0),
        ],
        1,
    )
    torch.testing.assert_close(colours, expected, rtol=0, atol=0.1)  # float16
    assert first[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert first[:, 1].unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_scales_are_even_in_their_logarithm(tmp_path: Path) -> None:
    """A square of side s shows a ramp s/8 times as steep: its mean over areas."""
    photo(tmp_path / "a.png", 64, 90)
    data = photographs(tmp_path, zoom=4.0, photo_crops=400)
    squares = 255 * read(tmp_path, data).float()
    steepness = (squares[:, 0, 7, 0] - squares[:, 0, 0, 0]) / 7
    assert 0.9 < steepness.min() < 1.1 and 3.8 < steepness.max() < 4.1
    # Half of them between 1 and √zoom = 2, within four standard errors.
    assert abs(float((steepness < 2).float().mean()) - 0.5) < 4 * 0.5 / 400**0.5
    assert torch.equal(squares, 255 * read(tmp_path, data).float())
    assert not torch.equal(squares, 255 * read(tmp_path, data, seed=1).float())


def test_a_photograph_bounds_its_scales(tmp_path: Path) -> None:
    """A square is no larger than the photograph, whatever zoom allows."""
    photo(tmp_path / "a.png", 16, 30)
    squares = 255 * read(tmp_path, photographs(tmp_path, zoom=100.0)).float()
    down = (squares[:, 0, 7, 0] - squares[:, 0, 0, 0]) / 7
    right = (squares[:, 1, 0, 7] - squares[:, 1, 0, 0]) / 7
    assert 1.5 < down.max() < 2.1
    torch.testing.assert_close(down, right, rtol=0, atol=0.1)


def test_scaling_down_is_averaging(tmp_path: Path) -> None:
    """Stripes of one pixel vanish at half the scale, at which 16 pixels become 8."""
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2] = 200
    picture(tmp_path / "a.png", stripes)
    data = photographs(tmp_path, zoom=2.0, photo_crops=200)
    squares = 255 * read(tmp_path, data).float()
    even = ((squares - 100).abs() < 0.1).flatten(1).all(1)
    assert even.any() and not even.all()


def test_faded_squares_keep_their_colours(tmp_path: Path, generator: Generator) -> None:
    """x̄ + u (x − x̄): a part of them, ln u evenly from ln 0.03 to 0, the rest as it was."""
    x = torch.randn(4000, 2, 3, 3, generator=generator)
    shown = faded(x, 0.25, generator)
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(shown.mean((2, 3), keepdim=True), mean)
    u = (shown - mean).flatten(1).std(1) / (x - mean).flatten(1).std(1)
    torch.testing.assert_close(
        shown, mean + u[:, None, None, None] * (x - mean), rtol=1e-4, atol=1e-5
    )
    below = u[u < 0.999]
    assert abs(len(below) / len(x) - 0.25) < 4 * (0.25 * 0.75 / len(x)) ** 0.5
    place = below.log() / math.log(0.03)
    assert 0 <= place.min() < 0.01 and 0.99 < place.max() <= 1.0001
    assert abs(float(place.mean()) - 0.5) < 4 / (12 * len(below)) ** 0.5
    photo(tmp_path / "a.png", 16, 30)
    data = photographs(tmp_path)
    images = read(tmp_path, data)
    plain, half = (
        draw(images, options, 50, 0, Generator().manual_seed(1)).x.flatten(1).std(1)
        for options in (data, photographs(tmp_path, fade=1.0))
    )
    assert (half[plain > 0] < plain[plain > 0]).all()


def test_photographs_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    data = photographs(tmp_path)
    with pytest.raises(ValueError, match="no file matches"):
        read(tmp_path, data)
    path = tmp_path / "a.png"
    photo(path, 7, 90)
    with pytest.raises(ValueError, match=r"a\.png is smaller than data\.size"):
        read(tmp_path, data)
    picture(path, np.zeros((80, 80), np.uint8))
    with pytest.raises(ValueError, match="no colours"):
        read(tmp_path, data)
    photo(path, 40, 40)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read .*a\.png") as refused:
        read(tmp_path, data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"photo_crops": 2, "crop": 8}, "are for slices"),
        ({"photo_crops": 2, "unit": "HU"}, "are for slices"),
        ({"grey": 0.5}, "grey is for photographs: set photo_crops"),
        ({"fade": 0.5}, "fade is for photographs: set photo_crops"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        folders(tmp_path, tmp_path, **options)


def batch(
    data: Data, n: int = 64, crop: int = 0, **changes: Any
) -> tuple[Tensor, Tensor]:
    """The images, and a batch of them under changed options."""
    images = read(data.train, data)
    changed = data.model_copy(update=changes)
    drawn = draw(images, changed, n, crop, Generator().manual_seed(0))
    return images.float(), drawn.x


def test_some_photographs_lose_their_colours(tmp_path: Path) -> None:
    """Their luma remains, 0.299 R + 0.587 G + 0.114 B, in each channel."""
    photo(tmp_path / "a.png", 40, 30)
    images, x = batch(photographs(tmp_path), n=200, grey=0.25, flip=False)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None] * images
    plain = luma.sum(1, keepdim=True).expand_as(images)
    both = torch.stack([images, plain])
    same = ((x[:, None, None] - both).abs() < 1e-6).flatten(3).all(3).any(2)
    assert (same.sum(1) == 1).all()
    assert abs(int(same[:, 1].sum()) - 50) < 4 * (200 * 0.25 * 0.75) ** 0.5


def test_a_batch_is_of_the_images(data: Data) -> None:
    images, x = batch(data, shift=0, flip=False)
    same = (x[:, None] == images[None]).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    assert same.any(0).all()  # each is drawn at times


def test_mirroring_is_left_to_right(data: Data) -> None:
    images, x = batch(data, shift=0, flip=True)
    both = torch.stack([images, images.flip(-1)])
    same = (x[:, None, None] == both[None]).flatten(3).all(3)
    assert (same.sum((1, 2)) == 1).all()
    assert 16 < int(same[:, 1].sum()) < 48


def test_shifts_move_what_is_there(data: Data) -> None:
    images, x = batch(data, n=200, shift=2, flip=False)
    totals = images.sum((1, 2, 3))
    error = (x.sum((1, 2, 3))[:, None] - totals).abs().min(1).values
    assert (error < 1e-4).all()
    tops = (x > 0).any(-1).float().argmax(-1).flatten()
    lefts = (x > 0).any(-2).float().argmax(-1).flatten()
    assert tops.unique().tolist() == [3, 4, 5, 6, 7]
    assert lefts.unique().tolist() == [2, 3, 4, 5, 6]


def test_crops_are_around_the_foreground(data: Data) -> None:
    images, x = batch(data, crop=8, flip=False)
    assert x.shape == (64, 1, 8, 8)
    windows = images.unfold(2, 8, 1).unfold(3, 8, 1).reshape(-1, 1, 8, 8)
    assert (x[:, None] == windows[None]).flatten(2).all(2).any(1).all()
    assert (x > 0.25).flatten(1).any(1).all()


def test_the_average_forgets_its_first_steps() -> None:
    average = warm_ema(0.99)
    mean, new = torch.tensor(1.0), torch.tensor(3.0)
    for n, decay in ((0, 0.1), (8, 0.5), (10**6, 0.99)):
        expected = decay * mean + (1 - decay) * new
        torch.testing.assert_close(average(mean, new, n), expected)


# --- whole runs


@pytest.mark.parametrize("predicts", ["eps", "x0", "flow"])
def test_a_prior_says_what_it_predicts(
    predicts: str, config: TrainConfig, tmp_path: Path
) -> None:
    opt = config.optimisation.model_copy(update={"predicts": predicts})
    run = config.model_copy(update={"optimisation": opt})
    prior = priors.load(train(run, tmp_path / "run", seed=0))
    assert isinstance(prior, Affine) and isinstance(prior.inner, EDMPrior)
    assert prior.inner.predicts == prior.info.parameterisation == predicts


@pytest.fixture
def config(data: Data) -> TrainConfig:
    return TrainConfig(
        name="tiny",
        data=data.model_copy(update={"scale": 0.5, "offset": 0.25}),
        network={"widths": [8, 16], "groups": 4},
        optimisation=optimisation(images=32, batch=4, warmup=3, lr=1e-3, bf16=False),
        card={"licence": "CC0"},
    )


def after(steps: int) -> Callable[[], bool]:
    """A clock that says stop after so many steps."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= steps


def weights(out: Path) -> dict[str, Tensor]:
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    return {**state["net"], **{f"ema.{k}": v for k, v in state["ema"].items()}}


def test_a_run_leaves_a_prior_that_loads(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = torch.get_rng_state()
    path = train(config, out, seed=0, checkpoint_every=16)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.pt",
        "losses.csv",
        "tiny.json",
        "tiny.safetensors",
    ]
    prior = priors.load(path)
    assert isinstance(prior, Affine) and isinstance(prior.inner, EDMPrior)
    assert (prior.map.scale, prior.map.offset) == (0.5, 0.25)
    assert prior.inner.sigma_data == config.optimisation.sigma_data
    assert prior.denoise(torch.zeros(1, 1, 16, 16), torch.tensor(0.1)).isfinite().all()
    card = json.loads(path.read_text())
    assert (card["licence"], card["training"]["images_seen"]) == ("CC0", 32)
    with (out / "losses.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["images", "loss", "psnr_at_0.05", "psnr_at_0.2", "psnr_at_0.8"]
    assert [float(row[0]) for row in rows] == [16, 32]
    assert all(math.isfinite(float(value)) for row in rows for value in row)


def test_the_exported_weights_are_the_averaged(
    config: TrainConfig, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    train(config, tmp_path / "out", seed=0)
    exported = load_file(tmp_path / "out" / "tiny.safetensors")
    state = weights(tmp_path / "out")
    for name, value in exported.items():
        assert torch.equal(value, state[f"ema.module.{name}"].half())
    assert any(not torch.equal(exported[k], state[k].half()) for k in exported)


def test_eight_steps_are_four_and_four(config: TrainConfig, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config, whole, seed=0, checkpoint_every=16)
    train(config, cut, seed=0, checkpoint_every=16, stop=after(4))
    halfway = weights(cut)
    train(config, cut, seed=0, checkpoint_every=16)
    expected, got = weights(whole), weights(cut)
    for name, value in expected.items():
        assert torch.equal(got[name], value)
    assert any(not torch.equal(halfway[k], v) for k, v in got.items())
    assert (whole / "losses.csv").read_text() == (cut / "losses.csv").read_text()


def test_a_finished_run_has_nothing_to_do(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "out", seed=0)
    before = weights(tmp_path / "out")
    train(config, tmp_path / "out", seed=0)
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, before[name])


def test_photographs_are_trained_on_in_parts(tmp_path: Path) -> None:
    """Bit for bit as in one go: the squares, their order and the noise are the same."""
    photo(tmp_path / "a.png", 40, 30)
    config = TrainConfig(
        name="tiny",
        data=photographs(tmp_path, scale=0.5, offset=0.5, zoom=3.0, grey=0.2),
        network={"channels": 3, "widths": [8, 16], "groups": 4},
        optimisation=optimisation(images=16, batch=4, warmup=3, bf16=False),
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    card = train(config, whole, seed=0)
    train(config, cut, seed=0, stop=after(2))
    train(config, cut, seed=0)
    expected, got = weights(whole), weights(cut)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    prior = priors.load(card)
    colours = torch.zeros(1, 3, 8, 8)
    assert prior.denoise(colours, torch.tensor(0.1)).shape == colours.shape
    with pytest.raises(ValueError, match="have 3 channel"):
        prior.check((1, 8, 8))


@pytest.mark.parametrize(
    ("network", "crop", "why"),
    [
        ({"channels": 3}, 0, r"set network\.channels = 1"),
        ({"widths": [8, 8, 8, 8, 8]}, 0, r"that 32 divides, got images of \(16, 16\)"),
        ({}, 6, "crops of 6"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(
    config: TrainConfig, tmp_path: Path, network: dict[str, Any], crop: int, why: str
) -> None:
    other = config.model_copy(
        update={
            "network": {**config.network, **network},
            "data": config.data.model_copy(update={"crop": crop}),
        }
    )
    with pytest.raises(ValueError, match=why):
        train(other, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()


def test_the_seed_decides(config: TrainConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config, tmp_path / name, seed=seed, stop=after(2))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_a_checkpoint_of_another_network_is_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(config, tmp_path / "out", seed=0, stop=after(1))
    other = config.model_copy(update={"network": {"widths": [8, 8], "groups": 4}})
    with pytest.raises(ValueError, match="differs in widths: choose"):
        train(other, tmp_path / "out", seed=0)


# --- the configuration

GOOD = 'name = "tiny"\n[data]\ntrain = "a"\nval = "b"\n'


def test_a_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(GOOD + "[optimisation]\nbatch = 3\n")
    config = TrainConfig.read(path)
    assert (config.name, config.data.val, config.optimisation.batch) == (
        "tiny",
        Path("b"),
        3,
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'name = "tiny"\n', "data: Field required"),
        (GOOD.encode() + b"shfit = 3\n", "data.shfit: Extra inputs"),
        (GOOD.encode() + b"scale = 0\n", "data.scale: Input should be greater"),
        (GOOD.encode() + b'unit = "kg"\n', "data.unit: Input should be 'HU'"),
        (GOOD.encode() + b"[optimisation]\nema = 1.0\n", "optimisation.ema: .* less"),
        (b"name = \n", "cannot read"),
        (b"name = '\xff'\n", "cannot read"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, text: bytes, why: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=why) as refused:
        TrainConfig.read(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_missing_configuration_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read") as refused:
        TrainConfig.read(tmp_path / "none.toml")
    assert "\n" not in str(refused.value)


def test_a_run_shows_its_samples(config: TrainConfig, tmp_path: Path) -> None:
    """And nothing is changed by it."""
    pytest.importorskip("tensorboard")
    shown = config.model_copy(update={"tensorboard": True})
    for name, run in (("plain", config), ("shown", shown)):
        train(run, tmp_path / name, seed=0, checkpoint_every=16)
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "shown")
    assert all(torch.equal(a[k], b[k]) for k in a)
    module = "tensorboard.backend.event_processing.event_accumulator"
    reader = importlib.import_module(module).EventAccumulator
    told = reader(str(tmp_path / "shown" / "tensorboard")).Reload()
    assert [s.step for s in told.Images("samples")] == [16, 32]
    assert {"loss", "psnr_at_0.2", "learning_rate"} <= set(told.Tags()["scalars"])


def test_samples_are_of_the_prior() -> None:
    """Of N(m, v) they have its mean and spread; what is shown is cut to the range."""
    mean, cov = (torch.full((1, 8, 8), value) for value in (MEAN, VARIANCE))
    prior, like = GaussianPrior(mean, cov), torch.zeros(200, 1, 8, 8)
    x = samples(prior, like)
    assert x.shape == like.shape
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.var()) == pytest.approx(VARIANCE, rel=0.25)  # of 12 steps
    scale = torch.tensor([-1.0, 3.0])
    expected = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(shown(torch.tensor([-2.0, 0.0, 3.5]), scale), expected)


# --- several processes


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """On the command line, by two processes with two parts each; a batch is odd, too."""
    pytest.importorskip("accelerate")
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        np.save(tmp_path / part / "a.npy", volume(1).numpy())
    text = (
        'name = "tiny"\n[data]\ntrain = "train"\nval = "val"\npattern = "*.npy"\n'
        "shift = 2\n[network]\nwidths = [8, 16]\ngroups = 4\n[optimisation]\n"
        "images = 42\nbatch = 7\nwarmup = 3\nlr = 1e-3\nbf16 = false\n"
    )
    (tmp_path / "one.toml").write_text(text)
    (tmp_path / "two.toml").write_text(text + "accumulate = 2\n")
    told = [str(tmp_path / "two.toml"), "--out", str(tmp_path / "two")]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *together, "-m", "invsolve.cli", "train", *told]
    environment = {**os.environ, "INVSOLVE_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, "--device", "cpu"], env=environment, capture_output=True, timeout=500
    )
    assert process.returncode == 0, process.stderr.decode()
    assert process.stdout.decode().count("wrote") == 1

    config = TrainConfig.read(tmp_path / "one.toml")
    homes = {k: tmp_path / k for k in ("train", "val")}
    config = config.model_copy(update={"data": config.data.model_copy(update=homes)})
    train(config, tmp_path / "one", seed=0)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)
    tables = [
        np.loadtxt(tmp_path / name / "losses.csv", delimiter=",", skiprows=1)
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(*tables, rtol=0, atol=1e-4)


def test_without_accelerate_it_is_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModuleNotFoundError, match=r"invsolve\[train\]"):
        train(config, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()
