"""Samplers, where the posterior is known, and the laws that all of them obey."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, final

import numpy as np
import pytest
import torch
from exact import (
    COV,
    MEAN,
    POSTERIOR_COV,
    PRIOR,
    PROBLEM,
    SIGMA_Y,
    Matrix,
    Refusing,
    chain,
    ddpm_grid,
    eigen_ratios,
    image_prior,
    real,
    with_noise,
)
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.operators import GaussianNoise, Identity, Mask, ParallelBeam
from invsolve.priors import GaussianPrior, Prior, ddpm_sigmas, karras_sigmas
from invsolve.samplers import (
    cgls,
    daps,
    ddnm,
    ddrm,
    dds,
    diffpir,
    dps,
    ensemble,
    fbp,
    mmps,
    pigdm,
    pnp,
    red,
    reddiff,
    score_sde,
    sirt,
    tmpd,
    tv,
)
from invsolve.samplers.dps import misfit_norm_grad
from invsolve.shapes import Sigma, X
from invsolve.variation import divergence, gradient

EYE = torch.eye(2, dtype=torch.float64)
Sampler = Callable[..., Tensor]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- one step by hand

SIGMA, SIGMA_NEXT = 1.4, 0.6
D_GAIN = COV @ torch.linalg.inv(COV + SIGMA**2 * EYE)  # D(x) = m + gain (x − m)


def step(sampler: Sampler, n: Tensor, **options: Any) -> Tensor:
    """The state after the first step, from √(1+σ²) n[0], with fresh noise n[1].

    The second step's noise level is where a prior that returns its input hands it over.
    """
    levels = real([SIGMA, SIGMA_NEXT])
    seen: list[Tensor] = []

    @final
    class Watching(Prior):
        sigma_min, sigma_max = 1e-3, 200.0

        def denoise(self, x: X, sigma: Sigma) -> X:
            seen.append(x.detach())
            return PRIOR.denoise(x, sigma)

    noise = torch.stack([*n, torch.zeros_like(n[0])])
    with_noise(noise, sampler, PROBLEM, Watching(), sigmas=levels, **options)
    close(seen[0], (1 + SIGMA**2) ** 0.5 * n[0])
    return seen[1]


@pytest.mark.parametrize(("lam", "zeta"), [(1.0, 0.1), (2.5, 1.0), (0.4, 0.0)])
def test_one_step_of_diffpir(lam: float, zeta: float, generator: Generator) -> None:
    n = torch.randn(2, 1, 2, generator=generator, dtype=torch.float64)
    x = (1 + SIGMA**2) ** 0.5 * n[0]
    D = MEAN + (x - MEAN) @ D_GAIN.T
    rho = lam * SIGMA_Y**2 / SIGMA**2
    x0 = D.clone()
    x0[:, 0] = (1.5 + rho * D[:, 0]) / (1 + rho)  # (AᵀA + ρI)⁻¹(Aᵀy + ρD)
    eps = (x - x0) / SIGMA
    expected = x0 + SIGMA_NEXT * ((1 - zeta) ** 0.5 * eps + zeta**0.5 * n[1])
    close(step(diffpir, n, lam=lam, zeta=zeta, rtol=1e-13), expected)


@pytest.mark.parametrize(("gamma", "eta"), [(5.0, 0.85), (1.0, 0.0), (None, 1.0)])
def test_one_step_of_dds(gamma: float | None, eta: float, generator: Generator) -> None:
    n = torch.randn(2, 1, 2, generator=generator, dtype=torch.float64)
    x = (1 + SIGMA**2) ** 0.5 * n[0]
    D = MEAN + (x - MEAN) @ D_GAIN.T
    g = SIGMA**2 / SIGMA_Y**2 if gamma is None else gamma
    x0 = D.clone()
    x0[:, 0] = (D[:, 0] + g * 1.5) / (1 + g)  # (I + γAᵀA)⁻¹(D + γAᵀy)
    eps = (x - D) / SIGMA
    expected = x0 + SIGMA_NEXT * ((1 - eta**2) ** 0.5 * eps + eta * n[1])
    close(step(dds, n, gamma=gamma, eta=eta), expected)


def test_dds_stops_its_conjugate_gradients_early(generator: Generator) -> None:
    """One step of CG from D is steepest descent with the exact step length."""
    H = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    y, n = torch.randn(2, 1, 3, generator=generator, dtype=torch.float64)
    problem = InverseProblem(y, Matrix(H), GaussianNoise(1.0))
    noise = torch.stack([n[:, :2], torch.zeros(1, 2).double()])
    options = {"sigmas": real([SIGMA]), "gamma": 5.0, "cg_steps": 1}
    got = with_noise(noise, dds, problem, PRIOR, **options)
    D = MEAN + ((1 + SIGMA**2) ** 0.5 * noise[0] - MEAN) @ D_GAIN.T
    Q = EYE + 5 * H.T @ H
    r = D + 5 * y @ H - D @ Q.T
    close(got, D + (r * r).sum() / (r @ Q @ r.T) * r)


def published_dps(
    sigmas: Tensor, n: Tensor, y: Tensor, H: Tensor, zeta: float, eta: float
) -> Tensor:
    """The recursion for x_t = √ᾱ x₀ + √(1−ᾱ) n, with autograd, for one item."""
    abar = torch.cat([1 / (1 + sigmas**2), real([1.0])])
    x = n[0]
    for k in range(len(sigmas)):
        a, b = abar[k].sqrt(), abar[k + 1].sqrt()
        s, r = (1 - abar[k]).sqrt(), (1 - abar[k + 1]).sqrt()
        x = x.detach().requires_grad_()
        P = a**2 * COV + s**2 * EYE
        x0 = MEAN + a * COV @ torch.linalg.solve(P, x - a * MEAN)
        (gradient,) = torch.autograd.grad((y - H @ x0).norm(), x)
        eps = (x - a * x0) / s
        c1 = eta * (1 - abar[k] / abar[k + 1]).sqrt() * r / s
        x = b * x0 + (r**2 - c1**2).sqrt() * eps + c1 * n[k + 1] - zeta * gradient
    return x.detach()


@pytest.mark.parametrize(("zeta", "eta"), [(1.0, 1.0), (0.3, 0.5), (0.7, 0.0)])
def test_dps_is_the_published_recursion(
    zeta: float, eta: float, generator: Generator
) -> None:
    """Item by item: each has a norm of its own."""
    H = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    n = torch.randn(9, 2, 2, generator=generator, dtype=torch.float64)
    problem = InverseProblem(y, Matrix(H), GaussianNoise(SIGMA_Y))
    sigmas = ddpm_sigmas(8)
    used = n if eta else n[:1]
    got = with_noise(used, dps, problem, PRIOR, sigmas=sigmas, zeta=zeta, eta=eta)
    for item in range(2):
        expected = published_dps(sigmas, n[:, item], y[item], H, zeta, eta)
        close(got[item], expected)


def test_dps_guidance_is_the_pulled_back_residual(generator: Generator) -> None:
    """∇ ‖y − AD‖ = Jᵀ Aᵀ (AD − y)/‖AD − y‖ with J = C (C + σ²I)⁻¹."""
    H = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    problem = InverseProblem(y, Matrix(H), GaussianNoise(SIGMA_Y))
    D, gradient = misfit_norm_grad(problem, PRIOR, x, real(SIGMA))
    close(D, PRIOR.denoise(x, real(SIGMA)))
    r = D @ H.T - y
    close(gradient, r / r.norm(dim=1, keepdim=True) @ H @ D_GAIN)


# --- mean and covariance without Monte Carlo


@pytest.mark.parametrize(
    ("sampler", "options", "steps", "mean", "ratios"),
    [
        (diffpir, {"zeta": 1.0}, 1000, (1.4606, 0.2532), (0.477, 0.503)),
        (diffpir, {"zeta": 1.0}, 100, (1.4575, 0.1927), (0.40, 0.52)),
        (diffpir, {"zeta": 0.1}, 1000, (1.4557, 0.1560), (0.91, 1.14)),
        (dds, {"gamma": 5.0, "eta": 0.85}, 1000, (1.5, 0.284), (0.0, 0.770)),
    ],
    ids=["diffpir-1-1000", "diffpir-1-100", "diffpir-0.1-1000", "dds-1000"],
)
def test_mean_and_covariance_on_the_toy(
    sampler: Sampler,
    options: dict[str, float],
    steps: int,
    mean: tuple[float, float],
    ratios: tuple[float, float],
) -> None:
    """Against an independent calculation; (1.4615, 0.2692) and (1, 1) are exact."""
    sigmas = ddpm_grid(steps)
    exactly = {"rtol": 1e-12} if sampler is diffpir else {}
    draws = len(sigmas) + 1
    got = chain(sampler, PROBLEM, PRIOR, draws, sigmas=sigmas, **options, **exactly)
    digits = [10.0 ** -len(str(r).split(".")[1]) for r in ratios]
    close(got.mean, real(mean), 5e-4 if sampler is dds else 6e-5)
    error = (eigen_ratios(got.cov, POSTERIOR_COV) - real(ratios)).abs()
    assert (error <= 0.6 * real(digits).clamp_max(0.01)).all()
    assert (got.factors[-1] == 0).all()  # the last step adds no noise


@pytest.mark.parametrize(
    ("sampler", "option", "kappa"),
    [
        (diffpir, {"zeta": 1.0}, 0.0),
        (diffpir, {"zeta": 0.1}, 0.9**0.5),
        (dds, {"eta": 0.85}, (1 - 0.85**2) ** 0.5),
        (dds, {"eta": 0.0}, 1.0),
    ],
)
def test_renoising_cools_what_is_not_measured(
    sampler: Sampler, option: dict[str, float], kappa: float
) -> None:
    """The covariance tends to (1 + κ)/2 of the prior's: κ = √(1−ζ) or √(1−η²)."""
    mean, cov = real([2.0, -1.0]), real([[0.6, 0.3], [0.3, 0.5]])
    hidden = InverseProblem(
        real([[0.0]]), Matrix(real([[0.0, 0.0]])), GaussianNoise(1.0)
    )
    prior = GaussianPrior(mean, cov)
    steps = 800
    sigmas = real(np.geomspace(100.0, 1e-3, steps))
    got = chain(sampler, hidden, prior, steps + 1, sigmas=sigmas, **option)
    close(got.mean, mean, 2e-2 * (1 + 20 * kappa))
    expected = torch.full((2,), (1 + kappa) / 2, dtype=torch.float64)
    close(eigen_ratios(got.cov, cov), expected, 0.015)


def test_draws_agree_with_their_chain() -> None:
    """Monte Carlo against the exact chain: means and covariances within 5 s.e."""
    n, sigmas = 4000, ddpm_grid(25)
    law = chain(diffpir, PROBLEM, PRIOR, len(sigmas) + 1, sigmas=sigmas, zeta=0.3)
    problem = PROBLEM.items(torch.zeros(n, dtype=torch.long))
    g = Generator().manual_seed(0)
    x = diffpir(problem, PRIOR, sigmas=sigmas, zeta=0.3, generator=g)
    v = law.cov.diagonal()
    assert ((x.mean(0) - law.mean).abs() <= 5 * (v / n).sqrt()).all()
    error = ((v[:, None] * v + law.cov**2) / n).sqrt()
    assert ((x.T.cov() - law.cov).abs() <= 5 * error).all()


def test_one_step_of_tmpd_is_bayes(generator: Generator) -> None:
    """Where C is diagonal, x̂₀ = E[x₀ | x, y] and the step is DDIM's."""
    v, sigma, sigma_next, eta = real([0.3, 1.0, 2.5]), 1.4, 0.6, 0.7
    prior = GaussianPrior(torch.zeros_like(v), v)
    H = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    y, n = real([[0.4, -0.7]]), torch.randn(3, 1, 3, generator=generator).double()
    problem = InverseProblem(y, Matrix(H), GaussianNoise(SIGMA_Y))
    seen: list[Tensor] = []

    @final
    class Watching(Prior):
        sigma_min, sigma_max = 1e-3, 200.0

        def denoise(self, x: X, sigma: Sigma) -> X:
            seen.append(x[:1])
            return prior.denoise(x, sigma)

    levels = real([sigma, sigma_next])
    with_noise(
        n, tmpd, problem, Watching(), sigmas=levels, eta=eta, cg_steps=20, rtol=1e-14
    )
    x = (1 + sigma**2) ** 0.5 * n[0]
    precision = (1 / v + 1 / sigma**2).diag() + H.T @ H / SIGMA_Y**2
    right = x[0] / sigma**2 + H.T @ y[0] / SIGMA_Y**2
    x0 = torch.linalg.solve(precision, right)[None]
    fresh = eta * sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
    kept = (sigma_next**2 - fresh**2) ** 0.5
    close(seen[1], x0 + kept * (x - x0) / sigma + fresh * n[1], 1e-9)


def test_tmpd_tends_to_a_diagonal_posterior() -> None:
    """The mean is exact but for the start; the covariance's error falls as 1/steps."""
    mean, v = real([0.5, -0.5]), real([0.4, 1.5])
    prior = GaussianPrior(mean, v)
    H = real([[1.0, 0.5]])
    problem = InverseProblem(real([[1.5]]), Matrix(H), GaussianNoise(SIGMA_Y))
    cov = torch.linalg.inv((1 / v).diag() + H.T @ H / SIGMA_Y**2)
    expected = cov @ (mean / v + 1.5 * H[0] / SIGMA_Y**2)

    def ratios(steps: int) -> Tensor:
        sigmas = karras_sigmas(steps, 1e-3, 200.0).double()
        exactly = {"cg_steps": 20, "rtol": 1e-12}
        got = chain(tmpd, problem, prior, steps + 1, sigmas=sigmas, **exactly)
        close(got.mean, expected, 1e-3)
        return 1 - eigen_ratios(got.cov, cov)

    few, many = ratios(50), ratios(400)
    assert (many.abs() < 0.06).all()
    assert (few / many > 5).all() and (few / many < 9).all()


# --- total variation and filtered back-projection


def objective(x: Tensor, problem: InverseProblem, lam: float, smooth: float) -> Tensor:
    """½‖Ax − y‖²/σ_y² + λ Σ √(|∇x|² + smooth²), differences done anew."""
    dy = torch.nn.functional.pad(x.diff(dim=-2), (0, 0, 0, 1))
    dx = torch.nn.functional.pad(x.diff(dim=-1), (0, 1))
    return problem.misfit(x).sum() + lam * (dx**2 + dy**2 + smooth**2).sqrt().sum()


def test_divergence_is_the_gradient_s_adjoint(generator: Generator) -> None:
    x = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    q = torch.randn(2, 2, 3, 5, 7, generator=generator, dtype=torch.float64)
    close((gradient(x) * q).sum(), (x * divergence(q)).sum())


def test_gradient_is_of_forward_differences() -> None:
    x = real([[[[1.0, 4.0], [3.0, 10.0]]]])
    expected = real([[[[[2.0, 6.0], [0.0, 0.0]]], [[[3.0, 0.0], [7.0, 0.0]]]]])
    close(gradient(x), expected)


@pytest.mark.parametrize("lam", [0.5, 3.0, 100.0])
def test_tv_of_two_pixels(lam: float) -> None:
    """Each pixel moves to the other by λσ_y², until they meet at their mean."""
    y, sigma_y = real([[[[1.0, 4.0]]]]), 0.5
    problem = InverseProblem(y, Identity(), GaussianNoise(sigma_y))
    move = min(lam * sigma_y**2, 1.5)
    expected = real([[[[1.0 + move, 4.0 - move]]]])
    close(tv(problem, lam=lam, steps=100), expected, 1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_constant_image_is_its_own_tv(value: float) -> None:
    y = torch.full((1, 1, 4, 5), value, dtype=torch.float64)
    close(tv(InverseProblem(y, Identity(), GaussianNoise(0.5)), steps=5), y)


@pytest.mark.parametrize("lam", [2.0, 20.0])
def test_tv_finds_the_minimum(lam: float, generator: Generator) -> None:
    """It is no higher than a quasi-Newton method's on a smoothed objective."""
    from scipy.optimize import minimize

    mask = (torch.rand(6, 6, generator=generator) < 0.7).double()
    y = mask * torch.randn(1, 1, 6, 6, generator=generator, dtype=torch.float64)
    problem = InverseProblem(y, Mask(mask), GaussianNoise(0.3))
    got = tv(problem, lam=lam, steps=300)

    def smoothed(values: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(values).reshape(y.shape).requires_grad_()
        value = objective(x, problem, lam, smooth=1e-4)
        (gradient,) = torch.autograd.grad(value, x)
        return float(value.detach()), gradient.flatten().numpy()

    found = minimize(smoothed, np.zeros(36), jac=True, options={"maxiter": 500})
    other = torch.from_numpy(found.x).reshape(y.shape)
    least = float(objective(got, problem, lam, 0.0))
    assert least <= float(objective(other, problem, lam, 0.0)) * (1 + 1e-5)
    assert least >= float(found.fun) * (1 - 1e-2)
    for _ in range(20):  # and a convex function's local minimum is its minimum
        d = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        for size in (1e-3, 1e-1):
            nearby = objective(got + size * d / d.norm(), problem, lam, 0.0)
            assert float(nearby) >= least * (1 - 1e-7)


def test_more_tv_steps_lower_the_objective(generator: Generator) -> None:
    y = torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    problem = InverseProblem(y, Identity(), GaussianNoise(0.3))
    values = [
        float(objective(tv(problem, lam=4.0, steps=n), problem, 4.0, 0.0))
        for n in (2, 10, 50)
    ]
    assert values == sorted(values, reverse=True)


def test_nonnegative_tv_is_nonnegative(generator: Generator) -> None:
    y = torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    problem = InverseProblem(y, Identity(), GaussianNoise(0.3))
    free, bounded = (
        tv(problem, lam=1.0, nonnegative=flag, steps=100) for flag in (False, True)
    )
    assert free.min() < 0
    assert bounded.min() >= 0
    assert objective(bounded, problem, 1.0, 0.0) <= objective(
        free.clamp_min(0), problem, 1.0, 0.0
    )


def test_tv_is_each_item_s_own(generator: Generator) -> None:
    A = ParallelBeam((8, 8), torch.linspace(0, torch.pi, 7)[:-1])
    x = torch.rand(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    both = InverseProblem(A(x), A, GaussianNoise(0.3))
    singly = [tv(both.items(torch.tensor([i])), lam=3.0, steps=40) for i in (0, 1)]
    close(tv(both, lam=3.0, steps=40), torch.cat(singly), 1e-8)


def test_fbp_is_the_operator_s(generator: Generator) -> None:
    A = ParallelBeam((16, 16), torch.linspace(0, torch.pi, 31)[:-1])
    x = torch.rand(1, 1, 16, 16, generator=generator, dtype=torch.float64)
    y = A(x)
    expected = A.fbp(y, window="cosine")
    noise = GaussianNoise(0.1)
    close(fbp(InverseProblem(y, A, noise), window="cosine"), expected)
    close(fbp(InverseProblem(3.0 * y, 3.0 * A, noise), window="cosine"), expected)


def test_fbp_is_for_ct_only() -> None:
    with pytest.raises(ValueError, match="needs a ParallelBeam, not Identity"):
        y = torch.ones(1, 1, 4, 4)
        fbp(InverseProblem(y, Identity(), GaussianNoise(0.1)))


# --- laws of them all

STEPS = 6
WITH_PRIOR = [
    pytest.param(dps, {"steps": STEPS}, id="dps"),
    pytest.param(diffpir, {"steps": STEPS}, id="diffpir"),
    pytest.param(dds, {"steps": STEPS}, id="dds"),
    pytest.param(dds, {"steps": STEPS, "gamma": 2.0}, id="dds-gamma"),
    pytest.param(tmpd, {"steps": STEPS}, id="tmpd"),
    pytest.param(pigdm, {"steps": STEPS}, id="pigdm"),
    pytest.param(mmps, {"steps": STEPS}, id="mmps"),
    pytest.param(ddnm, {"steps": STEPS}, id="ddnm"),
    pytest.param(ddnm, {"steps": STEPS, "noisy": True}, id="ddnm-noisy"),
    pytest.param(ddrm, {"steps": STEPS}, id="ddrm"),
    pytest.param(daps, {"steps": STEPS}, id="daps"),
    pytest.param(
        daps,
        {"steps": STEPS, "inner": "langevin", "langevin_steps": 3},
        id="daps-langevin",
    ),
    pytest.param(score_sde, {"steps": STEPS}, id="score-sde"),
    pytest.param(reddiff, {"steps": STEPS}, id="reddiff"),
    pytest.param(reddiff, {"steps": STEPS, "order": "random"}, id="reddiff-random"),
    pytest.param(reddiff, {"steps": STEPS, "sigma_x0": 0.1}, id="reddiff-spread"),
    pytest.param(
        ensemble,
        {"methods": (partial(pnp, steps=1), partial(reddiff, steps=STEPS - 1))},
        id="ensemble",
    ),
]
DETERMINISTIC = [
    pytest.param(pnp, {"steps": STEPS}, id="pnp"),
    pytest.param(pnp, {"steps": STEPS, "method": "admm"}, id="pnp-admm"),
    pytest.param(pnp, {"steps": STEPS, "method": "pgd"}, id="pnp-pgd"),
    pytest.param(red, {"steps": STEPS}, id="red"),
    pytest.param(red, {"steps": STEPS, "method": "gradient"}, id="red-gradient"),
]
laws = pytest.mark.parametrize(("sampler", "options"), WITH_PRIOR + DETERMINISTIC)
random_laws = pytest.mark.parametrize(("sampler", "options"), WITH_PRIOR)
KINDS = {
    dps: "steered",
    diffpir: "posterior_sample",
    dds: "posterior_sample",
    tmpd: "posterior_sample",
    pigdm: "posterior_sample",
    mmps: "posterior_sample",
    ddnm: "posterior_sample",
    ddrm: "posterior_sample",
    daps: "posterior_sample",
    score_sde: "posterior_sample",
    reddiff: "point_estimate",
    pnp: "point_estimate",
    ensemble: "point_estimate",
    red: "point_estimate",
    fbp: "point_estimate",
    tv: "point_estimate",
    sirt: "point_estimate",
    cgls: "point_estimate",
}


@final
class Counting(Prior):
    def __init__(self, inner: Prior) -> None:
        self.inner, self.images = inner, 0
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        self.images += len(x)
        return self.inner.denoise(x, sigma)


def inpainting(generator: Generator, batch: int = 1) -> tuple[InverseProblem, Prior]:
    prior = image_prior(generator)
    mask = (torch.rand(1, 4, 4, generator=generator) < 0.6).double()
    x = prior.sample(batch, generator=generator)
    return InverseProblem(mask * x, Mask(mask), GaussianNoise(0.1)), prior


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@random_laws
def test_the_generator_decides_everything(
    sampler: Sampler, options: dict[str, Any], generator: Generator
) -> None:
    problem, prior = inpainting(generator)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sampler(problem, prior, generator=seeded(0), **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, sampler(problem, prior, generator=seeded(0), **options))
    assert not torch.equal(
        first, sampler(problem, prior, generator=seeded(1), **options)
    )


@laws
def test_a_batch_of_two_is_two_singles(
    sampler: Sampler, options: dict[str, Any], generator: Generator
) -> None:
    problem, prior = inpainting(generator, batch=2)
    both = sampler(problem, prior, generator=[seeded(3), seeded(4)], **options)
    singly = [
        sampler(
            problem.items(torch.tensor([i])),
            prior,
            generator=[seeded(3 + i)],
            **options,
        )
        for i in (0, 1)
    ]
    close(both, torch.cat(singly))


@laws
def test_a_step_is_a_pass_of_the_network(
    sampler: Sampler, options: dict[str, Any], generator: Generator
) -> None:
    problem, prior = inpainting(generator, batch=2)
    counting = Counting(prior)
    sampler(problem, counting, generator=generator, **options)
    passes = {tmpd: 2, daps: 5}.get(sampler, 1) * STEPS
    if sampler is score_sde:
        passes = 2 * STEPS - 1  # one predictor a level, and one corrector but at 0
    assert counting.images == 2 * passes


def test_antithetic_steps_are_two_passes(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    counting = Counting(prior)
    reddiff(problem, counting, steps=STEPS, antithetic=True, generator=generator)
    assert counting.images == 2 * STEPS


@laws
def test_what_the_mask_hides_does_not_matter(
    sampler: Sampler, options: dict[str, Any], generator: Generator
) -> None:
    problem, prior = inpainting(generator)
    results = [
        sampler(p, prior, generator=seeded(0), **options)
        for p in (problem, with_hidden(problem, 9.0))
    ]
    assert torch.equal(*results)


def with_hidden(problem: InverseProblem, value: float) -> InverseProblem:
    """The same measurements, but for those that the mask hides."""
    assert isinstance(problem.operator, Mask)
    hidden = problem.operator.mask == 0
    assert hidden.any()
    y = torch.where(hidden, value, problem.y)
    return InverseProblem(y, problem.operator, problem.noise)


def test_what_the_mask_hides_does_not_matter_to_tv(generator: Generator) -> None:
    problem, _ = inpainting(generator)
    assert torch.equal(tv(problem, steps=20), tv(with_hidden(problem, 9.0), steps=20))


@pytest.mark.parametrize("sampler", [dps, diffpir, dds, tmpd, pigdm, mmps, ddnm, daps])
def test_levels_can_be_given(sampler: Sampler, generator: Generator) -> None:
    problem, prior = inpainting(generator)
    sigmas = karras_sigmas(STEPS, prior.sigma_min, prior.sigma_max).double()
    if sampler is dps:
        sigmas = ddpm_sigmas(STEPS).clamp(prior.sigma_min, prior.sigma_max)
    given = sampler(problem, prior, sigmas=sigmas, generator=seeded(0))
    assert torch.equal(given, sampler(problem, prior, steps=STEPS, generator=seeded(0)))


@pytest.mark.parametrize("sampler", KINDS)
def test_every_sampler_says_what_it_gives(sampler: Any) -> None:
    assert sampler.kind == KINDS[sampler]


@pytest.mark.parametrize("sampler", [fbp, tv, sirt, cgls])
def test_classical_methods_ask_no_network(
    sampler: Sampler, generator: Generator
) -> None:
    A = ParallelBeam((8, 8), torch.linspace(0, math.pi, 7)[:-1])
    y = torch.rand(1, 1, 6, A.detectors, generator=generator, dtype=torch.float64)
    problem = InverseProblem(y, A, GaussianNoise(0.1))
    assert torch.equal(sampler(problem, Refusing()), sampler(problem, None))
