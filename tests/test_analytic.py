"""Oracles: mixtures of fields, exact means at image size, and modes recovered."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import (
    MIXTURE,
    MIXTURE_A,
    MIXTURE_PROBLEM,
    MIXTURE_SIGMA_Y,
    MIXTURE_Y,
    real,
    recovery,
    with_noise,
)
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.operators import Blur, GaussianNoise, kernels
from invsolve.priors import GaussianMixturePrior, GaussianPrior, StationaryPrior
from invsolve.samplers import (
    daps,
    ddnm,
    dds,
    diffpir,
    dps,
    mmps,
    pigdm,
    reddiff,
    tmpd,
)
from invsolve.samplers.ddrm import ddrm

SHAPE = (6, 6)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def blur(width: float, shape: tuple[int, int]) -> Blur:
    kernel = kernels.gaussian(width, size=min(2 * int(4 * width) + 1, shape[0] - 1))
    made = Blur.from_kernel(kernel.double(), shape)
    assert isinstance(made, Blur)
    return made


# --- mixtures of fields


def fields(generator: Generator) -> list[StationaryPrior]:
    """Two of two channels, with means and smoothness of their own."""
    mean = torch.randn(2, 2, *SHAPE, generator=generator, dtype=torch.float64)
    power = [StationaryPrior.matern(SHAPE, scale).spectrum for scale in (0.5, 2.0)]
    return [StationaryPrior(m, S) for m, S in zip(mean, power, strict=True)]


def dense(prior: StationaryPrior) -> GaussianPrior:
    d = prior.mean.numel()
    unit = torch.eye(d, dtype=torch.float64).reshape(d, *prior.mean.shape)
    columns = torch.fft.ifft2(prior.spectrum * torch.fft.fft2(unit)).real
    return GaussianPrior(prior.mean, columns.reshape(d, d))


def test_a_mixture_of_fields_is_that_of_their_matrices(generator: Generator) -> None:
    parts, weights = fields(generator), real([1.0, 3.0])
    of_fields = GaussianMixturePrior.of(weights, parts)
    matrices = [dense(p) for p in parts]
    for part, matrix in zip(parts, matrices, strict=True):
        close(part.cov, matrix.cov)
    other = GaussianMixturePrior(
        weights,
        torch.stack([p.mean for p in matrices]),
        torch.stack([p.cov for p in matrices]),
    )
    x = torch.randn(3, 2, *SHAPE, generator=generator, dtype=torch.float64)
    for sigma in (real(0.3), real([0.5, 1.0, 5.0])):
        close(of_fields.denoise(x, sigma), other.denoise(x, sigma))
        log_p = torch.stack([p.log_density(x, sigma) for p in matrices])
        by_hand = (log_p + real([[0.25], [0.75]]).log()).logsumexp(0)
        close(of_fields.log_density(x, sigma), by_hand, 1e-9)


def test_its_posterior_is_that_of_their_matrices(generator: Generator) -> None:
    """Their evidence too, which makes the weights: neither of them near 0 or 1."""
    parts, A = fields(generator), blur(0.8, SHAPE)
    of_fields = GaussianMixturePrior.of(real([1.0, 3.0]), parts)
    other = GaussianMixturePrior.of(real([1.0, 3.0]), [dense(p) for p in parts])
    y = A((parts[0].mean + parts[1].mean)[None] / 2)
    unit = torch.eye(72, dtype=torch.float64).reshape(72, 2, *SHAPE)
    matrix, sigma = A(unit).flatten(1).T, 2.0
    got = of_fields.posterior(A.otf, y[0], sigma)
    expected = other.posterior(matrix, y.flatten(), sigma)
    log_p = [dense(p).evidence(matrix, y.flatten(), sigma) for p in parts]
    close(got.weights, (torch.stack(log_p) + real([1.0, 3.0]).log()).softmax(0), 1e-8)
    assert 0.01 < float(got.weights[0]) < 0.99
    x = torch.randn(2, 2, *SHAPE, generator=generator, dtype=torch.float64)
    close(got.denoise(x, real(0.4)), expected.denoise(x, real(0.4)), 1e-8)


def test_an_image_says_which_field_it_is_of(generator: Generator) -> None:
    """16,384 blurred pixels leave no doubt, and weights of 0 do no harm."""
    shape, sigma = (128, 128), 0.1
    parts = [StationaryPrior.matern(shape, scale) for scale in (2.0, 8.0)]
    prior, A = GaussianMixturePrior.of(real([0.5, 0.5]), parts), blur(1.5, shape)
    for k, part in enumerate(parts):
        x = part.sample(1, generator=generator)
        y = GaussianNoise(sigma).sample(A(x), generator=generator)
        posterior = prior.posterior(A.otf, y[0], sigma)
        close(posterior.weights, torch.eye(2, dtype=torch.float64)[k], 1e-12)
        single = part.posterior(A.otf, y[0], sigma)
        close(posterior.denoise(x, real(1.0)), single.denoise(x, real(1.0)))
        draw = posterior.sample(1, generator=generator)
        assert draw.shape == x.shape and draw.isfinite().all()


def test_it_moves_with_its_components(generator: Generator) -> None:
    prior = GaussianMixturePrior.of(real([1.0, 3.0]), fields(generator))
    x = torch.zeros(1, 2, *SHAPE).double()
    there = torch.device("meta")
    moved = prior.to(there)
    assert moved.denoise(x.to(there), real(0.5).to(there)).device == there
    assert prior.denoise(x, real(0.5)).device.type == "cpu"


@pytest.mark.parametrize(
    ("weights", "parts", "says"),
    [
        ([-1.0, 2.0], 2, "at least 0"),
        ([0.0, 0.0], 2, "not all"),
        ([1.0], 2, "one component for each of 1"),
        ([1.0, 1.0, 1.0], 3, "of one shape"),
    ],
)
def test_what_is_no_mixture_is_refused(
    weights: list[float], parts: int, says: str, generator: Generator
) -> None:
    components = [*fields(generator), StationaryPrior.matern((4, 4), 1.0)][:parts]
    with pytest.raises(ValueError, match=says):
        GaussianMixturePrior.of(real(weights), components)


# --- an exact mean at image size


@pytest.mark.parametrize("steps", [3, 5])
def test_mmps_deblurs_to_the_exact_mean(steps: int, generator: Generator) -> None:
    """128² pixels. Without noise its chain stays on the mean, at any number of steps.

    But for the start, which is at the noise's mean and not at the posterior's: that is
    forgotten as C/σ_max².
    """
    shape, sigma_y = (128, 128), 0.3
    prior, A = StationaryPrior.matern(shape, 4.0), blur(1.5, shape)
    noise = GaussianNoise(sigma_y)
    y = noise.sample(A(prior.sample(1, generator=generator)), generator=generator)
    x = with_noise(
        torch.zeros(steps + 1, *y.shape, dtype=y.dtype),
        mmps,
        InverseProblem(y, A, noise),
        prior,
        sigmas=torch.logspace(5, -2, steps, dtype=torch.float64),
        cg_steps=200,
        rtol=1e-12,
    )
    mean = prior.posterior(A.otf, y[0], sigma_y).mean
    close(x[0], mean, 1e-6)
    assert float(mean.std()) > 0.3


# --- modes


def test_exact_draws_have_the_posterior_s_weights() -> None:
    """0, 0.504 and 0.496, within 5 standard errors and the few nearer to another."""
    n = 4000
    posterior = MIXTURE.posterior(MIXTURE_A, MIXTURE_Y, MIXTURE_SIGMA_Y)
    got = recovery(posterior.sample(n, generator=Generator().manual_seed(0)))
    assert (got.occupancy - posterior.weights).abs().max() < 2.5 / n**0.5 + 0.02
    assert 0.65 < got.chi2 < 0.9


SAMPLERS: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (mmps, {"cg_steps": 5}),
    (pigdm, {}),
    (tmpd, {}),
    (daps, {"sigma_range": (0.05, 50.0), "rtol": 1e-8}),
    (diffpir, {}),
    (dds, {}),
    (ddnm, {}),
    (ddrm, {}),
    (dps, {}),
    (reddiff, {"steps": 300, "lr": 0.25}),
]


@pytest.mark.parametrize(
    ("sampler", "options"), SAMPLERS, ids=[s.__name__ for s, _ in SAMPLERS]
)
def test_both_modes_are_found(
    sampler: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    """By every sampler that is random, if not with the right weights; no third one."""
    problem = MIXTURE_PROBLEM.items(torch.zeros(1000, dtype=torch.long))
    generator = Generator().manual_seed(0)
    options = {"steps": 60, **options}
    draws = sampler(problem, MIXTURE, generator=generator, **options)
    got = recovery(draws)
    assert got.occupancy[0] < 0.15
    assert got.occupancy[1:].min() > 0.2
    if sampler is ddnm:  # it fits the data exactly
        assert got.chi2 < 1e-12
