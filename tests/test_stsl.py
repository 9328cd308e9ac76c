"""STSL: what its trace term estimates, what it costs, and what it reduces to."""

from typing import Any

import pytest
import torch
from exact import (
    MIXTURE,
    MIXTURE_A,
    MIXTURE_PROBLEM,
    PRIOR,
    PROBLEM,
    Matrix,
    image_prior,
    real,
    with_noise,
)
from torch import Generator, Tensor

import invsolve as iv
from invsolve import InverseProblem
from invsolve.operators import GaussianNoise, Mask, PhaseRetrieval
from invsolve.priors import GaussianPrior
from invsolve.samplers.jacobian import denoise_with_vjp
from invsolve.samplers.latents import Pixels
from invsolve.samplers.stsl import (
    Trace,
    begin,
    laplacian_estimate,
    shorter,
    stsl,
    trace_grad,
)

TRACES: list[Trace] = ["paper", "scaled", "bound"]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def log_density(z: Tensor, sigma: float) -> Tensor:
    """log p_σ of the mixture at each z, from its definition."""
    logs = []
    for w, part in zip(MIXTURE.weights, MIXTURE.components, strict=True):
        cov = part.cov + sigma**2 * torch.eye(2, dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(part.mean, cov)
        logs.append(w.log() + law.log_prob(z))
    return torch.stack(logs).logsumexp(0)


def hessian(z: Tensor, sigma: float) -> Tensor:
    """∇∇ᵀlog p_σ at each z, by differentiating twice."""
    z = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(log_density(z, sigma).sum(), z, create_graph=True)
    rows = [
        torch.autograd.grad(first[:, i].sum(), z, retain_graph=True)[0] for i in (0, 1)
    ]
    return torch.stack(rows, 1)


def laplacian(z: Tensor, sigma: float) -> Tensor:
    """∇²log p_σ at each z."""
    return hessian(z, sigma).diagonal(dim1=1, dim2=2).sum(1)


# --- the trace's estimator


@pytest.mark.parametrize("bandwidth", [0.1, 0.5, 1.0])
def test_its_mean_is_the_smoothed_laplacian(
    bandwidth: float, generator: Generator
) -> None:
    """Stein: E nᵀ(s(z + δn) − s(z))/δ = E ∇²log p(z + δn); not ∇²log p(z) itself."""
    sigma, n = 0.4, 40_000
    z = real([[0.3, -0.2]]).expand(n, 2)
    draw = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    values = laplacian_estimate(MIXTURE, z, real(sigma), draw, real(bandwidth))
    other = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    smoothed = laplacian(z[:2000] + bandwidth * other, sigma)
    error = (values.var() / n + smoothed.var() / 2000).sqrt()
    assert abs(float(values.mean() - smoothed.mean())) < 5 * float(error)
    local = float(laplacian(z[:1], sigma))
    if bandwidth == 1.0:  # what the paper's bandwidth costs
        assert abs(float(values.mean()) - local) > 10 * float(error)


def test_the_covariance_is_in_the_score_s_jacobian(generator: Generator) -> None:
    """Tweedie's second formula: Cov[z₀ | z] = σ²(I + σ²∇²log p), for the bound."""
    sigma, eye = 0.6, torch.eye(2, dtype=torch.float64)
    z = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    for point, H in zip(z, hessian(z, sigma), strict=True):
        law = MIXTURE.posterior(eye, point, sigma)
        means = torch.stack([part.mean for part in law.components])
        mean = law.weights @ means
        parts = zip(law.weights, law.components, means - mean, strict=True)
        cov = torch.stack(
            [w * (part.cov + torch.outer(d, d)) for w, part, d in parts]
        ).sum(0)
        close(cov, sigma**2 * (eye + sigma**2 * H))


def estimate_vp(z: Tensor, sigma: Tensor, n: Tensor, bandwidth: Tensor) -> Tensor:
    """nᵀ(s̃(z̃ + δ̃n) − s̃(z̃))/δ̃ by its definition, in the variance-preserving frame."""
    a = 1 / (1 + sigma**2).sqrt()

    def score(x: Tensor) -> Tensor:  # of x = a z₀ + s n
        return MIXTURE.score(x / a, sigma) / a

    delta = a * bandwidth
    difference = score(a * z + delta * n) - score(a * z)
    return (n * difference).sum(1) / delta


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_its_gradient_is_autodiff_s_and_that_of_finite_differences(
    sigma: float, generator: Generator
) -> None:
    z, n, d = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    level, bandwidth = real(sigma), real(0.7 * sigma)
    vjp = denoise_with_vjp(MIXTURE, z, level)[1]
    grad = trace_grad(MIXTURE, z, level, n, bandwidth, vjp)
    w = z.clone().requires_grad_()
    value = estimate_vp(w, level, n, bandwidth).sum()
    close(grad, torch.autograd.grad(value, w)[0], 1e-8)
    h = 1e-5
    up, down = (estimate_vp(z + k * h * d, level, n, bandwidth) for k in (1, -1))
    close((grad * d).sum(1), (up - down) / (2 * h), 1e-6)
    scale = 1 + level**2
    close(
        estimate_vp(z, level, n, bandwidth),
        scale * laplacian_estimate(MIXTURE, z, level, n, bandwidth),
    )


@pytest.mark.parametrize("trace", TRACES)
def test_the_trace_of_a_gaussian_prior_has_no_gradient(trace: Trace) -> None:
    """Exactly: the result is the same to the last bit, and the same draws were made."""
    prior = image_prior(Generator().manual_seed(1))
    A = Mask(torch.rand(1, 4, 4, generator=Generator().manual_seed(3)).round().double())
    y = A(prior.sample(2, generator=Generator().manual_seed(4)))
    given = InverseProblem(y, A, GaussianNoise(0.1))
    options: Any = {"steps": 5, "averages": 3, "lam": 0.1, "inversion": "ddim"}
    traces: tuple[Trace, ...] = (trace, "off")
    on = stsl(given, prior, trace=trace, **options, generator=Generator())
    off = stsl(given, prior, trace="off", **options, generator=Generator())
    assert torch.equal(on, off)
    mixed = [
        stsl(MIXTURE_PROBLEM, MIXTURE, trace=t, **options, generator=Generator())
        for t in traces
    ]
    assert float((mixed[0] - mixed[1]).abs().max()) > 1e-5


# --- the steps


def test_one_inner_step_by_hand(generator: Generator) -> None:
    """λ∇‖r‖ and η s² ∇τ/d, for the variance-preserving state; then DDIM to 0."""
    sigma, lam, eta = real(0.8), 0.3, 0.5
    noise = torch.randn(2, 1, 2, generator=generator, dtype=torch.float64)
    options = {"lam": lam, "eta": eta, "averages": 1}
    got = with_noise(
        noise, stsl, MIXTURE_PROBLEM, MIXTURE, sigmas=sigma[None], **options
    )
    A, y = MIXTURE_A, MIXTURE_PROBLEM.y
    x0 = y @ A / (A @ A.T)  # the adjoint over ‖A‖²
    z = (x0 + sigma * noise[0]).requires_grad_()
    a = 1 / (1 + sigma**2).sqrt()
    s2 = 1 - a**2
    misfit = (y - MIXTURE.denoise(z, sigma) @ A.T).norm()
    tau = estimate_vp(z, sigma, noise[1], sigma).sum()
    (grad,) = torch.autograd.grad(lam * misfit + eta * s2 / 2 * tau, z)
    # With respect to az, and then divided by a again.
    moved = (z - grad / a**2).detach()
    close(got, MIXTURE.denoise(moved, sigma), 1e-9)


def test_the_squared_loss_and_the_bound(generator: Generator) -> None:
    """With λ = 1/(2σ_y²) both together are the gradient of the bound, if it is not cut.

    log p(y | z) ≥ −(‖y − A D‖² + ‖A‖² tr Cov)/(2σ_y²), with Cov = σ²(I + σ²∇²log p).
    """
    sigma_y, level = 1.0, real(0.5)
    A = Matrix(real([[0.9, 0.3]]))
    given = InverseProblem(real([[0.4]]), A, GaussianNoise(sigma_y))
    lam = 1 / (2 * sigma_y**2)
    noise = torch.randn(2, 1, 2, generator=generator, dtype=torch.float64)
    options = {"sigmas": level[None], "averages": 1, "lam": lam, "loss": "squared"}
    got = with_noise(noise, stsl, given, MIXTURE, trace="bound", **options)
    z = A.adjoint(given.y) / A.norm(given.image_like()) ** 2 + level * noise[0]
    z.requires_grad_()
    misfit = (given.y - A(MIXTURE.denoise(z, level))).square().sum()
    spread = level**4 * laplacian_estimate(MIXTURE, z, level, noise[1], level).sum()
    first, second = (
        torch.autograd.grad(lam * v, z)[0]
        for v in (misfit, float(A.matrix.norm()) ** 2 * spread)
    )
    step = (1 + level**2) * (first + shorter(second, first))
    close(got, MIXTURE.denoise((z - step).detach(), level), 1e-6)


def test_a_step_is_cut_to_the_other_s_length() -> None:
    a, b = real([[3.0, 4.0], [0.3, 0.4]]), real([[1.0, 0.0], [1.0, 0.0]])
    close(shorter(a, b), real([[0.6, 0.8], [0.3, 0.4]]))
    close(shorter(a, 0 * b), 0 * a)


def test_the_data_are_fitted_more_with_more_averages(generator: Generator) -> None:
    def misfit(averages: int) -> float:
        g = Generator().manual_seed(0)
        given = MIXTURE_PROBLEM.items(torch.zeros(200, dtype=torch.long))
        x = stsl(given, MIXTURE, averages=averages, lam=0.05, trace="off", generator=g)
        return float((given.y - given.operator(x)).square().mean())

    values = [misfit(k) for k in (0, 1, 5)]
    assert values[0] > 1.5 * values[1] > 1.5**2 * values[2]


def test_no_inner_steps_are_ddim(generator: Generator) -> None:
    """K = 0, no noise: the probability-flow ODE from the prior's terminal law."""
    noise = torch.randn(1, 1, 2, generator=generator, dtype=torch.float64)
    options = {"steps": 500, "averages": 0, "init": "gaussian", "trace": "off"}
    got = with_noise(noise, stsl, PROBLEM, PRIOR, **options)
    top = PRIOR.sigma_max
    values, basis = torch.linalg.eigh(PRIOR.cov)
    shrink = (values / (values + top**2)).sqrt()
    x = (1 + top**2) ** 0.5 * noise[0]
    exact = PRIOR.mean + (x - PRIOR.mean) @ basis @ shrink.diag() @ basis.T
    close(got, exact, 0.03)


# --- where it begins


def test_beginnings(generator: Generator) -> None:
    """The adjoint over ‖A‖², the pseudo-inverse, or an image; with noise, or carried up."""
    m = real([[2.0, 0.0], [0.0, 1.0]])
    given = InverseProblem(real([[2.0, 3.0]]), Matrix(m), GaussianNoise(0.1))
    sigmas = real([5.0, 1.0, 1e-3])
    images = Pixels()

    def start(init: Any, inversion: Any = "noise") -> Tensor:
        g = Generator().manual_seed(7)
        return begin(given, PRIOR, images, init, inversion, sigmas, g)

    n = torch.randn(1, 2, generator=Generator().manual_seed(7), dtype=torch.float64)
    close(start("adjoint"), real([[1.0, 0.75]]) + 5 * n, 1e-4)
    close(start("pinv"), real([[1.0, 3.0]]) + 5 * n, 1e-4)
    image = real([[-1.0, 1.0]])
    close(start(image), image + 5 * n)
    close(start("gaussian"), 26**0.5 * n)
    fine = real([20.0, *torch.logspace(1.2, -3, 3000).tolist()])
    top = begin(given, PRIOR, images, image, "ddim", fine, generator)
    values, basis = torch.linalg.eigh(PRIOR.cov)
    stretch = ((values + 400) / (values + 1e-6)).sqrt()
    exact = PRIOR.mean + (image - PRIOR.mean) @ basis @ stretch.diag() @ basis.T
    torch.testing.assert_close(top, exact, rtol=0.02, atol=0.1)


def test_an_image_to_begin_from_is_in_the_image_s_unit(generator: Generator) -> None:
    from invsolve.priors import Affine, AffineMap

    inner = GaussianPrior(real([0.0, 0.0]), real([[1.0, 0.0], [0.0, 1.0]]))
    prior = Affine(inner, AffineMap(10.0, 5.0))
    x = real([[14.0, 2.0]])
    A = Matrix(torch.eye(2, dtype=torch.float64))
    given = InverseProblem(x, A, GaussianNoise(0.1))
    options = {
        "steps": 300,
        "averages": 0,
        "init": x,
        "inversion": "ddim",
        "trace": "off",
    }
    got = iv.solve(given, prior, stsl, generator=generator, **options)
    # Carried up and down again the image is back, but for the steps' errors.
    torch.testing.assert_close(got.samples[0], x, rtol=0, atol=0.5)


# --- cost


@pytest.mark.parametrize(("trace", "F", "B"), [("scaled", 2, 3), ("off", 1, 1)])
def test_what_it_costs(trace: str, F: int, B: int, generator: Generator) -> None:
    """T(2K + 1) forwards and 3TK backwards; T(K + 1) and TK at first order."""
    T, K = 4, 3
    got = iv.solve(
        MIXTURE_PROBLEM,
        MIXTURE,
        stsl,
        generator=generator,
        steps=T,
        averages=K,
        trace=trace,
    )
    assert got.stats.network_forwards == T * (F * K + 1)
    assert got.stats.network_backwards == B * T * K


def test_it_needs_a_linear_operator_only_to_begin(generator: Generator) -> None:
    prior = image_prior(generator)
    y = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    given = InverseProblem(y, PhaseRetrieval((4, 4)), GaussianNoise(0.1))
    ways: list[Any] = [{}, {"init": "pinv"}, {"init": "gaussian", "trace": "bound"}]
    for more in ways:
        with pytest.raises(ValueError, match="needs a linear operator"):
            stsl(given, prior, steps=2, **more, generator=generator)
    x = stsl(given, prior, steps=2, lam=0.1, init="gaussian", generator=generator)
    assert x.shape == (1, 1, 4, 4)
