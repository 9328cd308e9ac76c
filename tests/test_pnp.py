"""PnP and RED on priors that are not Gaussian, on nonlinear operators, and by default."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import (
    MIXTURE,
    MIXTURE_A,
    MIXTURE_PROBLEM,
    MIXTURE_SIGMA_Y,
    PRIOR,
    real,
    recovery,
)
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.operators import (
    Blur,
    Fourier,
    GaussianNoise,
    Identity,
    PoissonNoise,
    RealImage,
)
from invsolve.operators.nonlinear import Saturate
from invsolve.priors import GaussianPrior, StationaryPrior
from invsolve.samplers.pnp import pnp
from invsolve.samplers.red import red

EXACTLY = {"cg_steps": 20, "rtol": 1e-13}
BOTH: list[Callable[..., Tensor]] = [pnp, red]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def level(sigma: float, steps: int) -> Tensor:
    return torch.full((steps,), sigma, dtype=torch.float64)


def test_admm_and_proximal_gradient_settle_at_one_image() -> None:
    """z = D(z + τ ∇ log p(y | z); σ) with τ = σ²/λ, on a mixture too."""
    sigma, lam = 0.25, 1.5
    tau = sigma**2 / lam
    assert tau < 2 * MIXTURE_SIGMA_Y**2 / MIXTURE_A.norm() ** 2
    by: dict[Any, dict[str, Any]] = {
        "admm": {"lam": lam, **EXACTLY},
        "pgd": {"lr": tau},
    }
    z, other = (
        pnp(MIXTURE_PROBLEM, MIXTURE, method=m, sigmas=level(sigma, 3000), **options)
        for m, options in by.items()
    )
    step = z - tau * MIXTURE_PROBLEM.misfit_grad(z)
    close(z, MIXTURE.denoise(step, real(sigma)), 1e-9)
    close(z, other, 1e-9)


@pytest.mark.parametrize("method", ["fixed-point", "gradient"])
def test_red_settles_where_the_smoothed_posterior_is_flat(method: Any) -> None:
    """∇ log p(y | x) + λ ∇ log p_σ(x) = 0, on a mixture too."""
    sigma, lam = 0.25, 0.8
    x = red(
        MIXTURE_PROBLEM,
        MIXTURE,
        method=method,
        sigmas=level(sigma, 3000),
        lam=lam,
        **EXACTLY,
    )
    slope = lam * MIXTURE.score(x, real(sigma)) - MIXTURE_PROBLEM.misfit_grad(x)
    close(slope, torch.zeros_like(x), 1e-8)


@pytest.mark.parametrize(
    ("sampler", "method"), [(pnp, "pgd"), (red, "gradient")], ids=["pnp", "red"]
)
def test_steps_of_their_own_length_do_not_diverge(
    sampler: Callable[..., Tensor], method: str, generator: Generator
) -> None:
    """Of data that hardly have noise, with a prior that hardly says anything."""
    y = 3 * torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    A = Fourier() @ RealImage()
    problem = InverseProblem(A(y), A, GaussianNoise(0.01))
    prior = GaussianPrior(torch.zeros(1, 4, 4).double(), torch.ones(1, 4, 4).double())
    sigmas = level({pnp: 1e-3, red: 1.0}[sampler], 60)
    x = sampler(problem, prior, method=method, sigmas=sigmas, init="zeros")
    close(x, y, 2e-2)


@pytest.mark.parametrize(
    ("sampler", "method"), [(pnp, "pgd"), (red, "gradient")], ids=["pnp", "red"]
)
def test_one_nonlinear_step_is_the_gradient_s(
    sampler: Callable[..., Tensor], method: str
) -> None:
    """Where 2x overflows the data say nothing; elsewhere 2(2x − y)/σ_y²."""
    y, x, sigma_y, sigma = real([[1.0, -0.4]]), real([[0.9, 0.3]]), 0.5, 0.2
    problem = InverseProblem(y, Saturate(), GaussianNoise(sigma_y))
    lr = 0.01
    got = sampler(
        problem, PRIOR, method=method, sigmas=real([sigma]), lr=lr, lam=0.7, init=x
    )
    gradient = real([[0.0, 2 * (0.6 + 0.4) / sigma_y**2]])
    if sampler is pnp:
        expected = PRIOR.denoise(x - lr * gradient, real(sigma))
    else:
        expected = x - lr * (gradient - 0.7 * PRIOR.score(x, real(sigma)))
    close(got, expected)
    with pytest.raises(ValueError, match="needs a linear operator"):
        sampler(problem, PRIOR, method=method)


@pytest.mark.parametrize(
    ("sampler", "method"),
    [(pnp, "hqs"), (pnp, "admm"), (red, "fixed-point")],
    ids=["hqs", "admm", "red"],
)
def test_proximal_maps_refuse_nonlinear_operators(
    sampler: Callable[..., Tensor], method: str
) -> None:
    problem = InverseProblem(real([[1.0, -0.4]]), Saturate(), GaussianNoise(0.1))
    with pytest.raises(ValueError, match="needs a linear operator"):
        sampler(problem, PRIOR, method=method)


@pytest.mark.parametrize("sampler", BOTH)
def test_levels_fall_evenly_in_their_logarithm(sampler: Callable[..., Tensor]) -> None:
    seen: list[float] = []

    def watch(sigmas: Tensor) -> Any:
        for sigma in sigmas:
            seen.append(float(sigma))
            yield sigma

    sampler(MIXTURE_PROBLEM, MIXTURE, steps=3, sigma_range=(0.1, 0.4), progress=watch)
    close(real(seen), real([0.4, 0.2, 0.1]))


@pytest.mark.parametrize("sampler", BOTH)
def test_counts_enter_by_their_precision(
    sampler: Callable[..., Tensor], generator: Generator
) -> None:
    y = torch.rand(1, 1, 4, 4, generator=generator, dtype=torch.float64) + 0.5
    prior = GaussianPrior(torch.ones(1, 4, 4).double(), torch.ones(1, 4, 4).double())
    counts = InverseProblem(y, Identity(), PoissonNoise(0.1))
    weighted = InverseProblem(y, Identity(), GaussianNoise((0.1 * y[0]).sqrt()))
    one, other = (sampler(p, prior, **EXACTLY) for p in (counts, weighted))
    close(one, other, 1e-8)


@pytest.mark.parametrize("sampler", BOTH)
def test_an_image_sized_posterior_mean(
    sampler: Callable[..., Tensor], generator: Generator
) -> None:
    """64² pixels, λ = 1: PnP's by ADMM at any level, RED's of the smoothed prior."""
    prior = StationaryPrior.matern((64, 64), 4.0)
    A = Blur.gaussian(1.5, (64, 64))
    assert isinstance(A, Blur)
    A = Blur(A.otf.to(torch.complex128))
    truth = prior.sample(2, generator=generator)
    noise = GaussianNoise(0.2)
    problem = InverseProblem(noise.sample(A(truth), generator=generator), A, noise)
    sigma, known = 0.5, prior
    method = "admm"
    if sampler is red:
        method = "fixed-point"
        known = StationaryPrior(prior.mean, prior.spectrum + sigma**2)
    x = sampler(problem, prior, method=method, sigmas=level(sigma, 600), lam=1.0)
    mean = [known.posterior(A.otf, y, 0.2).mean for y in problem.y]
    close(x, torch.stack(mean), 1e-6)


@pytest.mark.parametrize("sampler", BOTH)
def test_unknown_methods_are_refused(sampler: Callable[..., Tensor]) -> None:
    with pytest.raises(Exception, match="method"):
        sampler(MIXTURE_PROBLEM, MIXTURE, method="newton")


@pytest.mark.parametrize("sampler", BOTH)
def test_what_is_not_random_finds_one_mode(sampler: Callable[..., Tensor]) -> None:
    problem = MIXTURE_PROBLEM.items(torch.zeros(3, dtype=torch.long))
    got = recovery(sampler(problem, MIXTURE))
    assert sorted(got.occupancy.tolist()) == [0.0, 0.0, 1.0]
