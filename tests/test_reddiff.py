"""RED-diff, whose steps on a Gaussian prior are affine and so known exactly."""

import math
from typing import Any, Literal

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
    SIGMA_MAX,
    SIGMA_MIN,
    SIGMA_Y,
    Y_SEEN,
    A,
    Matrix,
    real,
    with_noise,
)
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.operators import GaussianNoise
from invsolve.operators.nonlinear import Saturate
from invsolve.priors import GaussianPrior, ddpm_alphas_cumprod
from invsolve.samplers import reddiff
from invsolve.samplers.reddiff import PRESETS, Order, Weight, weigh

EYE = torch.eye(2, dtype=torch.float64)
ABAR = ddpm_alphas_cumprod()
SNR = ABAR / (1 - ABAR)
M = torch.linalg.inv(EYE + SNR[:, None, None] * COV)  # (I + SNR_t C)⁻¹ for every t


def streams(n: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in range(n)]


def copies(n: int) -> InverseProblem:
    return PROBLEM.items(torch.zeros(n, dtype=torch.long))


@pytest.mark.parametrize("normalize", ["mean", "sum", "bayes"])
@pytest.mark.parametrize("sigma_x0", [0.0, 0.3])
def test_one_step_is_the_gradient(
    normalize: Literal["mean", "sum", "bayes"], sigma_x0: float, generator: Generator
) -> None:
    """∇ = c_y v Aᵀ(Ax₀ − y) + c_x λh(σ)(ε̂ − n), with three measurements of d = 2."""
    H = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    y, mu, e0, n = torch.randn(4, 1, 3, generator=generator, dtype=torch.float64)
    mu, e0, n = mu[:, :2], e0[:, :2], n[:, :2]
    problem = InverseProblem(y, Matrix(H), GaussianNoise(SIGMA_Y))
    sigma, lam, v = 0.9, 0.3, 0.7
    after = with_noise(
        torch.stack([e0, n] if sigma_x0 else [n]),
        reddiff,
        problem,
        PRIOR,
        sigmas=real([sigma]),
        lam=lam,
        obs_weight=v,
        sigma_x0=sigma_x0,
        lr=1.0,
        optimizer="sgd",
        normalize=normalize,
        init=mu,
    )
    x0 = mu + sigma_x0 * e0
    inverse = torch.linalg.inv(COV + sigma**2 * EYE)
    eps_hat = sigma * (x0 + sigma * n - MEAN) @ inverse
    c_y, c_x = {"mean": (1 / 3, 1 / 2), "sum": (1, 1), "bayes": (1 / SIGMA_Y**2, 1)}[
        normalize
    ]
    gradient = c_y * v * (x0 @ H.T - y) @ H + c_x * lam * sigma * (eps_hat - n)
    torch.testing.assert_close(mu - after, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1000, (1.49996124, 0.16730406)), (100, (1.49899391, -0.19458856))],
)
def test_antithetic_descent_is_a_recursion(
    steps: int, expected: tuple[float, float], generator: Generator
) -> None:
    """μ ← μ − lr [Aᵀ(Aμ − y)/m + λ/d (I + SNR_t C)⁻¹(μ − m)], t falling."""
    mu = A.T @ Y_SEEN
    for t in reversed(range(0, 1000, 1000 // steps)):
        mu = mu - 0.5 * (A.T @ (A @ mu - Y_SEEN) + 0.125 * M[t] @ (mu - MEAN))
    got = reddiff(
        PROBLEM,
        PRIOR,
        steps=steps,
        lam=0.25,
        lr=0.5,
        optimizer="sgd",
        antithetic=True,
        generator=generator,
    )
    torch.testing.assert_close(got[0], mu, rtol=0, atol=1e-10)
    torch.testing.assert_close(got[0], real(expected), rtol=0, atol=1e-7)


def test_adam_is_that_of_the_paper(generator: Generator) -> None:
    """The same recursion through Adam with β = (0.9, 0.99)."""
    mu = A.T @ Y_SEEN
    first, second = torch.zeros_like(mu), torch.zeros_like(mu)
    for k, t in enumerate(reversed(range(0, 1000, 10)), start=1):
        gradient = A.T @ (A @ mu - Y_SEEN) + 0.125 * M[t] @ (mu - MEAN)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        root = (second / (1 - 0.99**k)).sqrt() + 1e-8
        mu = mu - 0.1 * first / (1 - 0.9**k) / root
    got = reddiff(PROBLEM, PRIOR, steps=100, antithetic=True, generator=generator)
    torch.testing.assert_close(got[0], mu, rtol=0, atol=1e-9)


def test_random_order_settles_at_the_stationary_point() -> None:
    """E μ* = m + (c_y AᵀA + λM)⁻¹ c_y Aᵀ(y − Am), M = E_t (I + SNR_t C)⁻¹, c_y = d/m.

    Levels drawn afresh make the mean's recursion exact: only the number of runs blurs
    it. The unobserved coordinate is far from the posterior mean's 0.269.
    """
    mean_M = M.mean(0)
    stationary = MEAN + torch.linalg.solve(
        2 * A.T @ A + 0.25 * mean_M, 2 * A.T @ (Y_SEEN - A @ MEAN)
    )
    torch.testing.assert_close(
        stationary, real([1.414411, -0.399810]), rtol=0, atol=1e-6
    )
    n = 32
    mu = reddiff(
        copies(n),
        PRIOR,
        steps=1000,
        lam=0.25,
        lr=0.2,
        optimizer="sgd",
        order="random",
        antithetic=True,
        generator=streams(n),
    )
    error = 5 * mu.std(0) / math.sqrt(n)
    assert (error < 0.08).all()
    assert ((mu.mean(0) - stationary).abs() <= error).all()


def test_isotropic_priors_have_a_weight_that_is_bayes(generator: Generator) -> None:
    """With C = I and λ = 1/E_t[1/(1 + SNR_t)] descent rests at the posterior mean."""
    lam = float(1 / (1 / (1 + SNR)).mean())
    assert lam == pytest.approx(1.380287, abs=1e-6)
    prior = GaussianPrior(MEAN, EYE, SIGMA_MIN, SIGMA_MAX)
    H = real([[1.0, 0.5]])
    cov = torch.linalg.inv(EYE + H.T @ H / SIGMA_Y**2)
    posterior_mean = cov @ (MEAN + H.T @ Y_SEEN / SIGMA_Y**2)
    problem = InverseProblem(Y_SEEN[None], Matrix(H), GaussianNoise(SIGMA_Y))

    at = torch.stack([posterior_mean, posterior_mean + 0.01])
    lr = 1e-9  # so small that every level is taken at one and the same point
    after = reddiff(
        problem.items(torch.zeros(2, dtype=torch.long)),
        prior,
        steps=1000,
        lam=lam,
        lr=lr,
        optimizer="sgd",
        normalize="bayes",
        antithetic=True,
        init=at,
        generator=generator,
    )
    gradient = (at - after) / lr / 1000
    torch.testing.assert_close(gradient[0], 0 * MEAN, rtol=0, atol=1e-5)
    assert gradient[1].norm() > 1e-2


def answers(order: Order, lr: float) -> Tensor:
    """Adam's answers from fifty seeds."""
    g = Generator().manual_seed(0)
    return reddiff(copies(50), PRIOR, steps=1000, lr=lr, order=order, generator=g)


@pytest.fixture(scope="module")
def descending() -> Tensor:
    return answers("descending", 0.1)


def test_adam_descending_anneals_to_the_noiseless_mean(descending: Tensor) -> None:
    """(1.5, 0.3) is E[x₀ | Ax₀ = y]; the measured part fits y, its noise included."""
    mean = descending.mean(0)
    assert ((mean - real([1.500, 0.260])).abs() <= real([0.005, 0.10])).all()
    assert (descending[:, 0] - Y_SEEN).abs().max() < 0.03


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_proximal_steps_settle_where_the_gradient_vanishes(
    tau: float, generator: Generator
) -> None:
    """AᵀA μ/σ_y² + λ(C + σ²)⁻¹(μ − m) = Aᵀy/σ_y², whatever the step τ is."""
    sigma, lam = 0.4, 0.7
    got = reddiff(
        PROBLEM,
        PRIOR,
        sigmas=real([sigma]).expand(400),
        lam=lam,
        lr=tau,
        weight="calibrated",
        normalize="bayes",
        optimizer="prox",
        antithetic=True,
        init="zeros",
        generator=generator,
    )
    precision = lam * torch.linalg.inv(COV + sigma**2 * EYE)
    data = A.T @ A / SIGMA_Y**2
    expected = torch.linalg.solve(
        data + precision, A.T @ Y_SEEN / SIGMA_Y**2 + precision @ MEAN
    )
    torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=1e-6)


def test_proximal_steps_need_the_noise(generator: Generator) -> None:
    with pytest.raises(ValueError, match="bayes"):
        reddiff(PROBLEM, PRIOR, optimizer="prox", generator=generator)


@pytest.mark.parametrize(
    ("order", "expected", "bound"),
    [
        ("random", (1.413, -0.406), (0.100, 0.10)),
        ("ascending", (1.389, -0.500), (0.010, 0.02)),
    ],
)
def test_adam_in_another_order_does_not(
    order: Order, expected: tuple[float, float], bound: tuple[float, float]
) -> None:
    mean = answers(order, 0.1).mean(0)
    assert ((mean - real(expected)).abs() <= real(bound)).all()


def test_the_spread_over_seeds_is_not_the_posterior_s(descending: Tensor) -> None:
    """It is the optimiser's noise: it grows with the step, and misses the data's."""
    slow, fast = descending.std(0), answers("descending", 0.25).std(0)
    posterior = POSTERIOR_COV.diagonal().sqrt()
    assert slow[0] < 0.1 * posterior[0]
    assert slow[1] < 0.7 * posterior[1]
    assert fast[1] > 1.25 * slow[1]
    assert reddiff.kind == "point_estimate"  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize(
    ("lr", "mean", "spread"), [(0.1, 0.165, (0.20, 0.35)), (0.5, 0.3, (0.55, 0.90))]
)
def test_a_hundred_steps_need_to_be_longer(
    lr: float, mean: float, spread: tuple[float, float], generator: Generator
) -> None:
    """Short ones stop halfway from 0 to 0.3; long ones arrive, and leave more noise."""
    n = 200
    mu = reddiff(copies(n), PRIOR, steps=100, lr=lr, generator=generator)[:, 1]
    assert abs(float(mu.mean()) - mean) < 4 * float(mu.std()) / math.sqrt(n)
    assert spread[0] < float(mu.std()) < spread[1]


def test_adam_does_not_heed_lam_where_nothing_is_measured() -> None:
    """Its steps are of one length whatever the gradient's: order and lr decide there."""
    weak, strong = (
        reddiff(copies(20), PRIOR, steps=1000, lam=lam, generator=streams(20))[:, 1]
        for lam in (0.05, 1.0)
    )
    assert (weak - strong).abs().max() < 0.1
    assert weak.std() > 0.15


def test_a_mixture_s_occupancy_is_biased(generator: Generator) -> None:
    """A known bias: modes are taken .74/.26 where the posterior has .50/.50.

    And they lie on the data, far closer than the noise would have it.
    """
    n = 100
    problem = MIXTURE_PROBLEM.items(torch.zeros(n, dtype=torch.long))
    mu = reddiff(problem, MIXTURE, steps=1000, lr=0.1, generator=generator)
    occupancy = MIXTURE.responsibilities(mu, real(0.0)).mean(0)
    posterior = MIXTURE.posterior(MIXTURE_A, MIXTURE_Y, MIXTURE_SIGMA_Y)
    torch.testing.assert_close(
        posterior.weights, real([0.0, 0.504, 0.496]), rtol=0, atol=1e-3
    )
    assert occupancy[0] < 0.01
    assert 0.6 < occupancy[1] < 0.88
    residual = (mu @ MIXTURE_A.T - MIXTURE_Y).square().mean().sqrt()
    assert residual < 0.1 * MIXTURE_SIGMA_Y


H_OF_Z: dict[Weight, Any] = {
    "linear": lambda z: z,
    "sqrt": math.sqrt,
    "square": lambda z: z * z,
    "log": lambda z: math.log(1 + z),
    "trunc_linear": lambda z: min(z, 1.0),
    "power2over3": lambda z: z ** (2 / 3),
    "const": lambda z: 1.0,
    "calibrated": lambda z: 1 / z,
}


@pytest.mark.parametrize("weight", H_OF_Z)
def test_weights_are_the_published_functions(weight: Weight) -> None:
    z = real([0.01, 0.5, 1.0, 3.0, 150.0])
    expected = real([H_OF_Z[weight](float(value)) for value in z])
    torch.testing.assert_close(weigh(z, weight), expected)


@pytest.mark.parametrize("weight", H_OF_Z)
def test_the_weight_enters_the_step(weight: Weight, generator: Generator) -> None:
    sigma, mu = 2.0, real([[0.2, 0.9]])
    after = reddiff(
        PROBLEM,
        PRIOR,
        sigmas=real([sigma]),
        lam=0.3,
        lr=1.0,
        obs_weight=0.0,
        weight=weight,
        optimizer="sgd",
        normalize="sum",
        antithetic=True,
        init=mu,
        generator=generator,
    )
    eps_hat = sigma * (mu - MEAN) @ torch.linalg.inv(COV + sigma**2 * EYE)
    torch.testing.assert_close(mu - after, 0.3 * H_OF_Z[weight](sigma) * eps_hat)


def test_the_calibrated_weight_tends_to_the_prior_s_gradient(
    generator: Generator,
) -> None:
    """∇ → −∇ log p(x₀ | y) as σ → 0, with an error that falls as σ²."""
    mu = real([[0.2, 0.9]])
    gradient = PROBLEM.misfit_grad(mu) + torch.linalg.solve(COV, (mu - MEAN)[0])

    def error(sigma: float) -> float:
        after = reddiff(
            PROBLEM,
            PRIOR,
            sigmas=real([sigma]),
            lam=1.0,
            lr=1.0,
            weight="calibrated",
            optimizer="sgd",
            normalize="bayes",
            antithetic=True,
            init=mu,
            generator=generator,
        )
        return float((mu - after - gradient).norm())

    assert error(0.01) < 0.005 * float(gradient.norm())
    assert error(0.02) / error(0.01) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    ("order", "levels"),
    [("descending", [3.0, 2.0, 1.0]), ("ascending", [1.0, 2.0, 3.0])],
)
def test_levels_are_visited_in_order(
    order: Order, levels: list[float], generator: Generator
) -> None:
    seen: list[float] = []

    def watch(sigmas: Any) -> Any:
        for sigma in sigmas:
            seen.append(float(sigma))
            yield sigma

    reddiff(
        PROBLEM,
        PRIOR,
        sigmas=real([3.0, 2.0, 1.0]),
        order=order,
        generator=generator,
        progress=watch,
    )
    assert seen == levels


@pytest.mark.parametrize("init", ["pinv", "adjoint", "zeros"])
def test_where_it_starts(
    init: Literal["pinv", "adjoint", "zeros"], generator: Generator
) -> None:
    H = real([[2.0, 0.0]])
    problem = InverseProblem(Y_SEEN[None], Matrix(H), GaussianNoise(SIGMA_Y))
    start = {"pinv": [0.75, 0.0], "adjoint": [3.0, 0.0], "zeros": [0.0, 0.0]}[init]
    got = reddiff(problem, PRIOR, steps=1, lr=0.0, init=init, generator=generator)
    torch.testing.assert_close(got, real([start]))


def test_it_starts_where_another_method_ends(generator: Generator) -> None:
    problem = InverseProblem(
        Y_SEEN[None], Matrix(real([[2.0, 0.0]])), GaussianNoise(SIGMA_Y)
    )
    got = reddiff(
        problem,
        PRIOR,
        steps=1,
        lr=0.0,
        init=lambda p: p.linear.adjoint(p.y) / 2,
        generator=generator,
    )
    torch.testing.assert_close(got, real([[1.5, 0.0]]))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_options(preset: str, generator: Generator) -> None:
    mu = reddiff(
        PROBLEM, PRIOR, generator=generator, **{"steps": 50, **PRESETS[preset]}
    )
    assert (mu[0, 0] - Y_SEEN[0]).abs() < 0.5


# --- nonlinear operators


@pytest.fixture
def saturated() -> InverseProblem:
    """x in [−0.5, 0.5] is read as it is, and doubled."""
    return InverseProblem(real([[1.0, -0.4]]), Saturate(), GaussianNoise(0.1))


@pytest.mark.parametrize(
    ("init", "expected"), [("pinv", [0.5, -0.2]), ("zeros", [0.0, 0.0])]
)
def test_a_nonlinear_descent_begins_at_the_guess(
    init: Any, expected: list[float], saturated: InverseProblem, generator: Generator
) -> None:
    start = reddiff(saturated, PRIOR, steps=3, lr=0.0, init=init, generator=generator)
    torch.testing.assert_close(start, real([expected]))


def test_one_nonlinear_step_is_the_gradient(
    saturated: InverseProblem, generator: Generator
) -> None:
    """Where 2x overflows the data say nothing; elsewhere 2(2x − y), over their mean."""
    after = reddiff(
        saturated,
        PRIOR,
        steps=1,
        lr=1.0,
        lam=0.0,
        optimizer="sgd",
        init=real([[0.9, 0.3]]),
        generator=generator,
    )
    torch.testing.assert_close(after, real([[0.9, 0.3 - 2 * (0.6 + 0.4) / 2]]))


@pytest.mark.parametrize(
    "options",
    [{"init": "adjoint"}, {"optimizer": "prox", "normalize": "bayes"}],
    ids=str,
)
def test_what_asks_for_an_adjoint_refuses_nonlinear_problems(
    options: dict[str, Any], saturated: InverseProblem, generator: Generator
) -> None:
    with pytest.raises(ValueError, match="needs a linear operator"):
        reddiff(saturated, PRIOR, generator=generator, **options)
