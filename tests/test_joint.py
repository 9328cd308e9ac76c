"""Priors of images and labels: modes recovered, labels from files, quantities bounded."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact import with_noise
from torch import Generator, Tensor
from torch.testing import assert_close

import invsolve as iv
from invsolve import io, priors, samplers
from invsolve.io import Image
from invsolve.operators import GaussianNoise, Mask, Stack, on_channels
from invsolve.priors import (
    Affine,
    AffineMap,
    GaussianMixturePrior,
    GaussianPrior,
    Tilted,
    UNet,
    UNetConfig,
)
from invsolve.training import TrainConfig, begun, train
from invsolve.training_data import Data, load, load_classes
from invsolve.units import MU_WATER

# --- a mixture whose component is the label: p(label | y) is known

SIDE, SIGMA_Y = 2, 0.4
ONE_HOT = torch.eye(3, dtype=torch.float64)[:, :2]
"""Of three labels the first two have a channel; the third is where neither is."""


def mixture(generator: Generator) -> GaussianMixturePrior:
    """Images of one channel and labels of two, each label with a texture of its own."""
    d = SIDE**2
    image = 0.6 * torch.randn(
        3, 1, SIDE, SIDE, generator=generator, dtype=torch.float64
    )
    labels = ONE_HOT[..., None, None].expand(3, 2, SIDE, SIDE)
    factor = torch.randn(3, d, 2, generator=generator, dtype=torch.float64)
    covs = 0.01 * torch.eye(3 * d, dtype=torch.float64).repeat(3, 1, 1)
    covs[:, :d, :d] = 0.15 * torch.eye(d) + 0.1 * factor @ factor.mT
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixturePrior(
        weights, torch.cat([image, labels], 1), covs, 0.01, 20.0
    )


def label_of(x: Tensor) -> Tensor:
    """0, 1 or 2, by the sign of 2m − 1 in the labels' channels."""
    inside = 2 * x[:, 1:].mean((2, 3)) - 1 > 0
    return torch.where(inside.any(1), inside.int().argmax(1), 2)


@pytest.fixture
def seen() -> tuple[GaussianMixturePrior, iv.InverseProblem, GaussianMixturePrior]:
    """The prior, an image of which three pixels are measured, and p(image, label | y)."""
    g = Generator().manual_seed(0)
    prior = mixture(g)
    pixels = Mask(torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    A = on_channels(pixels, 0, of=3)
    y = A(prior.sample(1, generator=g))
    y = y + SIGMA_Y * torch.randn(y.shape, generator=g, dtype=torch.float64)
    rows = torch.eye(3 * SIDE**2, dtype=torch.float64).reshape(-1, 3, SIDE, SIDE)
    posterior = prior.posterior(A(rows).flatten(1).T, y.flatten(), SIGMA_Y)
    return prior, iv.InverseProblem(y, A, GaussianNoise(SIGMA_Y)), posterior


def shares(x: Tensor) -> Tensor:
    return label_of(x).bincount(minlength=3) / len(x)


def test_labels_are_recovered_as_often_as_bayes_says(seen: Any) -> None:
    """The exact posterior, sampled by its own diffusion: within four standard errors."""
    prior, _, posterior = seen
    p, n = posterior.weights, 3000
    like = torch.zeros(n, 3, SIDE, SIDE, dtype=torch.float64)
    g = Generator().manual_seed(1)
    found = shares(samplers.unconditional(posterior, like, steps=60, generator=g))
    assert ((found - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 0.005).all()
    assert (
        prior.weights - p
    ).abs().sum() / 2 > 0.45  # the image says much of the label


@pytest.mark.parametrize(
    ("sampler", "options", "off"),
    [
        (samplers.dds, {"eta": 1.0}, 0.13),
        (samplers.mmps, {"cg_steps": 4}, 0.12),
        (samplers.pigdm, {}, 0.09),
    ],
)
def test_samplers_recover_the_label_from_the_image_alone(
    seen: Any, sampler: Callable[..., Tensor], options: dict[str, Any], off: float
) -> None:
    """Their bias is of the method; who learnt nothing from the image is off by 0.45."""
    prior, problem, posterior = seen
    solution = iv.solve(
        problem,
        prior,
        sampler,
        samples=500,
        chunk=500,
        steps=60,
        generator=Generator().manual_seed(1),
        **options,
    )
    found = shares(solution.samples[:, 0])
    assert (found - posterior.weights).abs().sum() / 2 < off


def test_a_scribble_tells_of_the_label(seen: Any) -> None:
    """One pixel of an unlikely label, measured beside the image, leaves no doubt.

    A sampler that carries it to other pixels makes most draws follow.
    """
    prior, problem, posterior = seen
    assert posterior.weights[1] < 0.05
    one = torch.zeros(2, SIDE, SIDE, dtype=torch.float64)
    one[1, 0, 0] = 1
    scribble = 4.0 * on_channels(Mask(one), (1, 2), of=3)
    both = Stack([problem.operator, scribble], shape=(3, SIDE, SIDE))
    y = both.join([problem.y, 4 * one[None]])
    rows = torch.eye(3 * SIDE**2, dtype=torch.float64).reshape(-1, 3, SIDE, SIDE)
    exact = prior.posterior(both(rows).T, y.flatten(), SIGMA_Y)
    assert exact.weights[1] > 0.999
    solution = iv.solve(
        iv.InverseProblem(y, both, GaussianNoise(SIGMA_Y)),
        prior,
        samplers.mmps,
        samples=200,
        chunk=200,
        steps=60,
        generator=Generator().manual_seed(1),
    )
    assert shares(solution.samples[:, 0])[1] > 0.65


# --- a quantity bounded


def gaussian() -> GaussianPrior:
    """An image and a label that are correlated."""
    g = Generator().manual_seed(0)
    factor = torch.randn(8, 3, generator=g, dtype=torch.float64) / 2
    mean = torch.randn(2, 2, 2, generator=g, dtype=torch.float64)
    cov = torch.eye(8).double() / 4 + factor @ factor.mT
    return GaussianPrior(mean, cov, 1e-3, 1e3)


def area(x: Tensor) -> Tensor:
    return x[:, 1].sum((1, 2))


ROW = torch.tensor([0.0] * 4 + [1.0] * 4, dtype=torch.float64)
"""f(x) = aᵀx of the flattened image."""


def moved(prior: GaussianPrior, strength: float) -> GaussianPrior:
    """N(m, C) exp(s aᵀx), normalised: N(m + s C a, C)."""
    shift = strength * (prior.cov @ ROW).reshape(prior.mean.shape)
    return GaussianPrior(
        prior.mean + shift, prior.cov, prior.sigma_min, prior.sigma_max
    )


@pytest.mark.parametrize("strength", [-0.7, 0.7])
def test_a_tilted_gaussian_is_that_gaussian_moved(strength: float) -> None:
    prior, g = gaussian(), Generator().manual_seed(1)
    x = torch.randn(3, 2, 2, 2, generator=g, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    found = Tilted(prior, area, strength).denoise(x, sigma)
    assert_close(found, moved(prior, strength).denoise(x, sigma))


def test_a_tilted_prior_has_the_jacobian_of_its_own(strength: float = 0.7) -> None:
    """Of a mixture: by finite differences, for the samplers that look through it."""
    prior = Tilted(mixture(Generator().manual_seed(0)), area, strength)
    g = Generator().manual_seed(1)
    x = torch.randn(1, 3, SIDE, SIDE, generator=g, dtype=torch.float64)
    sigma = torch.tensor(0.5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: prior.denoise(x, sigma), x.requires_grad_(), atol=1e-6
    )


@pytest.mark.parametrize("strength", [-0.7, 0.7])
def test_a_quantity_is_bounded_by_the_tilted_posterior(strength: float) -> None:
    """E[x | y] moves by s Σ a, and with it f by s aᵀΣa; Σ is the posterior's covariance."""
    prior, s = gaussian(), 0.3
    A = on_channels(Mask(torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()), 0, of=2)
    y = torch.tensor([[0.5, 0.0], [-0.2, 1.0]], dtype=torch.float64)[None, None]
    rows = torch.eye(8, dtype=torch.float64).reshape(-1, 2, 2, 2)
    exact = prior.posterior(A(rows).flatten(1).T, y.flatten(), s)
    shift = strength * (exact.cov @ ROW).reshape(1, 2, 2, 2)

    # mmps is affine in its draws, so that without noise it gives its mean.
    found = with_noise(
        torch.zeros(1, 1, 2, 2, 2, dtype=torch.float64),
        samplers.mmps,
        iv.InverseProblem(y, A, GaussianNoise(s)),
        Tilted(prior, area, strength),
        eta=0.0,
        cg_steps=8,
        rtol=1e-12,
    )
    assert_close(found, exact.mean + shift, atol=2e-3, rtol=0)
    assert area(found - exact.mean).sign() == math.copysign(1, strength)


def test_a_quantity_is_of_the_image_in_its_own_unit() -> None:
    map = AffineMap(0.2, 0.1)
    inner, to_unit = Tilted(Affine(gaussian(), map), area, 0.7).normalised
    u = torch.randn(1, 2, 2, 2, generator=Generator().manual_seed(1)).double()
    sigma = torch.tensor(0.5, dtype=torch.float64)
    assert to_unit == map
    assert_close(
        inner.denoise(u, sigma), moved(gaussian(), 0.2 * 0.7).denoise(u, sigma)
    )


# --- labels from files

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])
BITS = {"jaw": [6], "glands": [2, 3]}


def volumes(
    folder: Path, seed: int, *, drawn: int = 0b1001100
) -> tuple[Tensor, Tensor]:
    """A CT of two slices, and bits of which each is somewhere; beside other files."""
    g, name = Generator().manual_seed(seed), f"pt{seed:03}"
    hu = torch.randint(-500, 500, (2, 16, 16), generator=g).float()
    bits = torch.randint(0, 2**10, (2, 16, 16), generator=g) & drawn
    folder.mkdir(exist_ok=True)
    io.write(folder / f"{name}_ct.nii.gz", Image(hu, LPS, "HU"))
    io.write(folder / f"{name}_structures.nii.gz", Image(bits.float(), LPS))
    return hu, bits


def labelled(folder: Path, **options: Any) -> Data:
    told = {
        "train": folder,
        "val": folder,
        "pattern": "*_ct.nii.gz",
        "unit": "HU",
        "scale": MU_WATER,
        "shift": 0,
        "labels": {"bits": BITS, "value": 0.5},
    }
    return Data.model_validate({**told, **options})


def test_labels_are_the_bits_of_the_contours(tmp_path: Path) -> None:
    hu, bits = volumes(tmp_path, 1)
    x = load(tmp_path, labelled(tmp_path), Generator()).float()
    assert x.shape == (2, 3, 16, 16)
    assert_close(x[:, 0], 1 + hu / 1000, atol=1e-3, rtol=0)
    assert_close(x[:, 1], 0.5 * (bits >> 6 & 1))
    assert_close(x[:, 2], 0.5 * ((bits >> 2 & 1) | (bits >> 3 & 1)))


@pytest.mark.parametrize("drawn", [0b0001100, 0b1000100, 0b1001000, 0])
def test_who_lacks_a_contour_is_left_out(tmp_path: Path, drawn: int) -> None:
    """Of glands, too, both must be drawn; and files keep their classes."""
    for seed, folder in ((1, "a"), (2, "a"), (3, "b")):
        which = drawn if seed == 1 else 0b1001100
        volumes(tmp_path / folder, seed, drawn=which)
    images = load_classes(tmp_path, labelled(tmp_path, classes=True), Generator())
    assert images.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"no file .* has contours of all labels"):
        volumes(tmp_path / "c", 4, drawn=drawn)
        load(tmp_path / "c", labelled(tmp_path), Generator())


def test_contours_that_cannot_be_used_are_told_in_one_line(tmp_path: Path) -> None:
    volumes(tmp_path, 1)
    beside, data = tmp_path / "pt001_structures.nii.gz", labelled(tmp_path)
    with pytest.raises(
        ValueError, match=r"no pt001_masks\.nii\.gz: check data\.pattern"
    ):
        suffixes = {"bits": BITS, "suffixes": ("_ct", "_masks")}
        load(tmp_path, labelled(tmp_path, labels=suffixes), Generator())
    io.write(beside, Image(torch.full((2, 16, 16), 76.5), LPS))
    with pytest.raises(ValueError, match="not whole numbers"):
        load(tmp_path, data, Generator())
    io.write(beside, Image(torch.full((2, 16, 8), 76.0), LPS))
    with pytest.raises(ValueError, match="not of one size"):
        load(tmp_path, data, Generator())
    with pytest.raises(ValueError, match="labels are of slices"):
        labelled(tmp_path, dims=3)


# --- a prior of images and labels, from training to masks


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    volumes(tmp_path / "data", 1)
    told = {
        "name": "toy",
        "data": labelled(tmp_path / "data"),
        "network": {"channels": 3, "widths": [8, 8], "patch": 2, "groups": 4},
        "optimisation": {"images": 16, "batch": 8, "bf16": False},
    }
    return TrainConfig.model_validate(told)


def test_a_trained_one_gives_images_and_masks_in_their_units(
    config: TrainConfig, tmp_path: Path
) -> None:
    """Every sampler, of the image's measurements alone."""
    card = train(config, tmp_path / "run", seed=0)
    told, _ = priors.weights.read_card(card)
    assert told["labels"] == ["jaw", "glands"]
    assert told["label_value"] == pytest.approx(0.5 * MU_WATER)
    prior = priors.load(card)
    truth = load(config.data.train, config.data, Generator()).float() * MU_WATER
    A = on_channels(Mask(torch.ones(16, 16)), 0, of=3)
    problem = iv.InverseProblem(A(truth), A, GaussianNoise(1e-3 * MU_WATER))
    for sampler in (
        samplers.dds,
        samplers.mmps,
        samplers.diffpir,
        samplers.pnp,
        samplers.reddiff,
    ):
        g = Generator().manual_seed(0)
        solution = iv.solve(problem, prior, sampler, steps=4, generator=g)
        assert solution.samples.shape == (1, 2, 3, 16, 16)
        if sampler in (samplers.dds, samplers.diffpir):
            close = solution.mean[:, :1] - truth[:, :1]
            assert close.abs().max() < 0.05 * MU_WATER


@pytest.mark.parametrize("own", [False, True])
def test_it_may_begin_with_a_prior_of_images(
    config: TrainConfig, tmp_path: Path, own: bool
) -> None:
    """F of the image is that prior's, whatever the labels are; F of the labels is 0.

    Its σ_d is the image channel's, if each has its own.
    """
    alone = config.model_copy(
        update={
            "data": config.data.model_copy(update={"labels": None}),
            "network": {**config.network, "channels": 1},
        }
    )
    card = train(alone, tmp_path / "alone", seed=0)
    told = config.model_copy(update={"start": str(card)})
    if own:
        opt = told.optimisation.model_copy(update={"sigma_data": (0.5, 0.01, 0.01)})
        told = told.model_copy(update={"optimisation": opt})
    wanted = UNetConfig.from_dict({**UNetConfig().to_dict(), **config.network})
    net = begun(UNet(wanted), told)
    old = vars(priors.load(card).normalised[0])["net"]
    g = Generator().manual_seed(0)
    x, c = torch.randn(2, 3, 16, 16, generator=g), torch.rand(2, generator=g)
    with torch.no_grad():
        F = net.eval()(x, c)
        assert_close(F[:, :1], old(x[:, :1], c))
        assert not F[:, 1:].any()
    flow = told.optimisation.model_copy(update={"predicts": "flow"})
    other = begun(UNet(wanted), told.model_copy(update={"optimisation": flow}))
    assert_close(other.state_dict(), net.state_dict())
    made = json.loads(train(told, tmp_path / "run", seed=0).read_text())
    assert made["training"]["start"] == str(card)
    other = UNet(UNetConfig.from_dict({**wanted.to_dict(), "widths": (8, 16)}))
    with pytest.raises(ValueError, match="cannot be begun with"):
        begun(other, told)
    opt = told.optimisation.model_copy(update={"sigma_data": (0.4, 0.5, 0.5)})
    with pytest.raises(ValueError, match="sigma_data is another"):
        begun(net, told.model_copy(update={"optimisation": opt}))
