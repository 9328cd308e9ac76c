"""Samplers that look through the denoiser, project, or anneal: where all is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exact import (
    COV,
    MEAN,
    MIXTURE,
    MIXTURE_A,
    MIXTURE_PROBLEM,
    MIXTURE_SIGMA_Y,
    MIXTURE_Y,
    POSTERIOR_COV,
    PRIOR,
    PROBLEM,
    SIGMA_Y,
    Matrix,
    chain,
    ddpm_grid,
    eigen_ratios,
    image_prior,
    real,
    with_noise,
)
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.operators import Downsample, GaussianNoise, PoissonNoise
from invsolve.priors import GaussianPrior
from invsolve.samplers import daps, ddnm, mmps, pigdm
from invsolve.samplers.daps import flow
from invsolve.samplers.jacobian import denoise_with_vjp
from invsolve.shapes import X

EXACTLY = {"cg_steps": 20, "rtol": 1e-13}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_vjp_is_the_jacobian_s(generator: Generator) -> None:
    x, v = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    D, vjp = denoise_with_vjp(PRIOR, x, real(0.7))
    J = COV @ torch.linalg.inv(COV + 0.7**2 * torch.eye(2, dtype=torch.float64))
    close(D, MEAN + (x - MEAN) @ J.T)
    close(vjp(v), v @ J)
    close(vjp(2 * v), 2 * v @ J)  # as often as it is asked


# --- ΠGDM and MMPS


@pytest.mark.parametrize(
    ("sampler", "eta", "steps", "mean", "ratios"),
    [
        (mmps, 1.0, 20, (1.4615, 0.2692), (0.385, 0.639)),
        (mmps, 1.0, 100, (1.4615, 0.2692), (0.753, 0.894)),
        (mmps, 0.0, 1000, (1.4597, 0.2678), (0.984, 0.995)),
        (pigdm, 1.0, 1000, (1.4471, 0.2317), (0.979, 1.098)),
    ],
)
def test_mean_and_covariance_on_the_toy(
    sampler, eta: float, steps: int, mean: tuple[float, float], ratios
) -> None:
    """Against an independent calculation; MMPS' mean is exact at every step count."""
    sigmas = ddpm_grid(steps)
    draws = len(sigmas) + 1 if eta else 1
    got = chain(sampler, PROBLEM, PRIOR, draws, sigmas=sigmas, eta=eta, **EXACTLY)
    close(got.mean, real(mean), 6e-5)
    close(eigen_ratios(got.cov, POSTERIOR_COV), real(ratios), 6e-4)


def test_mmps_covariance_error_falls_as_one_over_steps() -> None:
    def error(steps: int) -> float:
        sigmas = real(np.geomspace(100.0, 1e-3, steps))
        got = chain(mmps, PROBLEM, PRIOR, steps + 1, sigmas=sigmas, **EXACTLY)
        return float((1 - eigen_ratios(got.cov, POSTERIOR_COV)).abs().max())

    assert 1.7 < error(200) / error(400) < 2.3


def test_pigdm_is_mmps_where_the_prior_is_white(generator: Generator) -> None:
    """Cov[x₀ | x] = r²I exactly, with the prior's own spread for s."""
    spread = 1.7
    prior = GaussianPrior(MEAN, spread**2 * torch.eye(2, dtype=torch.float64))
    problem = InverseProblem(
        real([[1.5]]), Matrix(real([[1.0, 0.5]])), GaussianNoise(SIGMA_Y)
    )
    n = torch.randn(41, 1, 2, generator=generator, dtype=torch.float64)
    sigmas = real(np.geomspace(50.0, 1e-2, 40))
    one = with_noise(n, pigdm, problem, prior, sigmas=sigmas, spread=spread, **EXACTLY)
    other = with_noise(n, mmps, problem, prior, sigmas=sigmas, **EXACTLY)
    close(one, other)
    apart = with_noise(n, pigdm, problem, prior, sigmas=sigmas, **EXACTLY)
    assert float((apart - other).abs().max()) > 1e-3


def test_mmps_takes_noise_of_any_precision(generator: Generator) -> None:
    """Counts enter by their weights: as Gaussian noise of that precision would."""
    H = torch.rand(3, 2, generator=generator, dtype=torch.float64) + 0.5
    y = real([[2.0, 3.0, 1.5]])
    gain = 0.1
    counts = InverseProblem(y, Matrix(H), PoissonNoise(gain))
    root = (1 / (gain * y)).sqrt()
    white = InverseProblem(root * y, Matrix(root.T * H), GaussianNoise(1.0))
    n = torch.randn(9, 1, 2, generator=generator, dtype=torch.float64)
    sigmas = real(np.geomspace(50.0, 1e-2, 8))
    a, b = (
        with_noise(n, mmps, p, PRIOR, sigmas=sigmas, **EXACTLY) for p in (counts, white)
    )
    close(a, b, 1e-8)


# --- DDNM


def test_ddnm_on_the_toy() -> None:
    sigmas = ddpm_grid(1000)
    got = chain(ddnm, PROBLEM, PRIOR, len(sigmas) + 1, sigmas=sigmas, eta=0.85)
    close(got.mean, real([1.5, 0.287]), 6e-4)
    close(eigen_ratios(got.cov, POSTERIOR_COV), real([0.0, 0.767]), 6e-4)


def test_ddnm_fits_the_data_exactly(generator: Generator) -> None:
    prior = image_prior(generator)
    A = Downsample(2, (4, 4))
    y = A(prior.sample(3, generator=generator))
    x = ddnm(
        InverseProblem(y, A, GaussianNoise(0.3)), prior, steps=5, generator=generator
    )
    close(A(x), y)


@pytest.mark.parametrize("sigma_next", [0.6, 0.05])
def test_one_step_of_noisy_ddnm(sigma_next: float, generator: Generator) -> None:
    """Where there is no room for all of the data's noise, only part of y comes in."""
    prior = image_prior(generator)
    A, sigma, sigma_y, eta = Downsample(2, (4, 4)), 1.4, 0.1, 0.85
    y = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)
    problem = InverseProblem(y, A, GaussianNoise(sigma_y))
    n = torch.randn(3, 1, 1, 4, 4, generator=generator, dtype=torch.float64)
    options = {"sigmas": real([sigma, sigma_next]), "noisy": True, "eta": eta}
    got = with_noise(n, ddnm, problem, prior, **options)
    x = (1 + sigma**2) ** 0.5 * n[0]
    D = prior.denoise(x, real(sigma))
    nu = (1 - eta**2) ** 0.5 * (x - D) / sigma + eta * n[1]
    tau = 2 * sigma_y  # ‖A‖ = ½

    def blocks(t: Tensor) -> Tensor:  # A⁺A: every pixel its block's mean
        return A.adjoint(A(t)) * 4

    kappa = min(1.0, sigma_next / tau)
    room = (sigma_next**2 - (kappa * tau) ** 2) ** 0.5 if kappa == 1 else 0.0
    x = (
        D
        + kappa * 4 * A.adjoint(y - A(D))
        + sigma_next * (nu - blocks(nu))
        + room * blocks(nu)
    )
    close(got, prior.denoise(x, real(sigma_next)))


def test_noisy_ddnm_needs_one_sigma() -> None:
    y = torch.ones(1, 1, 2, 2)
    problem = InverseProblem(y, Downsample(2, (4, 4)), PoissonNoise(0.1))
    with pytest.raises(ValueError, match="noise of one standard deviation"):
        ddnm(problem, PRIOR, noisy=True, generator=Generator())


# --- DAPS

SQUARE = InverseProblem(
    real([[1.5, 0.0]]), Matrix(real([[1.0, 0.0], [0.0, 0.0]])), GaussianNoise(SIGMA_Y)
)
"""The toy, with an empty second measurement, so that all draws are of one shape."""


def test_daps_on_the_toy() -> None:
    """Against an independent calculation: the right mean nearly, and too wide."""
    steps = 200
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = 100 ** (1 / 7), 0.1 ** (1 / 7)
    sigmas = (high + ramp * (low - high)) ** 7
    got = chain(daps, SQUARE, PRIOR, 3 * steps, sigmas=sigmas, rtol=1e-13)
    close(got.mean, real([1.4732, 0.2297]), 6e-5)
    close(eigen_ratios(got.cov, POSTERIOR_COV), real([1.01, 1.73]), 6e-3)


def test_daps_is_exact_where_the_prior_is_white() -> None:
    """With the prior's own spread, one ODE step and three levels: the posterior."""
    spread = 0.7
    prior = GaussianPrior(MEAN, spread**2 * torch.eye(2, dtype=torch.float64))
    gain = spread**2 / (spread**2 + SIGMA_Y**2)
    mean = MEAN + real([gain * (1.5 - float(MEAN[0])), 0.0])
    cov = spread**2 * real([[1 - gain, 0.0], [0.0, 1.0]])
    sigmas = real([1e5, 3.0, 0.5])
    options = {"sigmas": sigmas, "ode_steps": 1, "rtol": 1e-13}
    got = chain(daps, SQUARE, prior, 9, spread=spread, **options)
    close(got.mean, mean, 1e-8)
    close(got.cov, cov, 1e-8)
    wide = chain(daps, SQUARE, prior, 9, **options)
    assert float(eigen_ratios(wide.cov, cov).max()) > 1.2


def test_the_flow_is_first_order(generator: Generator) -> None:
    """Halving the steps' length halves the error against the closed form."""
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    values, basis = torch.linalg.eigh(COV)
    shrink = (values / (values + 4.0)).sqrt()
    exact = MEAN + (x - MEAN) @ basis @ shrink.diag() @ basis.T

    def error(steps: int) -> float:
        return float((flow(PRIOR, x, real(2.0), steps, 1e-4) - exact).norm())

    assert 1.8 < error(40) / error(80) < 2.2


def test_one_step_of_flow_is_the_denoiser(generator: Generator) -> None:
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    close(flow(PRIOR, x, real(0.8), 1, 0.01), PRIOR.denoise(x, real(0.8)))


def test_langevin_tends_to_the_exact_inner_law() -> None:
    """With many small steps the chain's last x₀ has the law that ``exact`` draws."""
    sigmas = real([0.8])
    exact = chain(daps, SQUARE, PRIOR, 3, sigmas=sigmas, rtol=1e-13)
    h = 2e-3
    count = 2000
    many = chain(
        daps,
        SQUARE,
        PRIOR,
        1 + count,
        sigmas=sigmas,
        inner="langevin",
        langevin_steps=count,
        lr=h,
    )
    close(many.mean, exact.mean, 2e-3)
    close(eigen_ratios(many.cov, exact.cov), torch.ones(2).double(), 0.05)


# --- a mixture


def test_draws_fall_into_the_right_mode() -> None:
    """Label recovery: the posterior's weights, within what each method's bias allows."""
    n = 2000
    posterior = MIXTURE.posterior(MIXTURE_A, MIXTURE_Y, MIXTURE_SIGMA_Y)
    problem = MIXTURE_PROBLEM.items(torch.zeros(n, dtype=torch.long))

    def weights(x: X) -> Tensor:
        means = torch.stack([part.mean for part in posterior.components])
        distance = ((x[:, None] - means) ** 2).sum(-1)
        label = distance.argmin(1)
        return torch.bincount(label, minlength=3) / n

    exact = posterior.sample(n, generator=Generator().manual_seed(1))
    methods: list[tuple[Callable[..., Tensor], dict[str, Any], float]] = [
        (mmps, {"steps": 100, "cg_steps": 5}, 0.07),
        (pigdm, {"steps": 100}, 0.15),
        (daps, {"steps": 60, "sigma_range": (0.05, 50.0), "rtol": 1e-8}, 0.07),
    ]
    for sampler, options, slack in methods:
        x = sampler(problem, MIXTURE, generator=Generator().manual_seed(0), **options)
        assert (weights(x) - weights(exact)).abs().max() < slack, sampler.__name__
