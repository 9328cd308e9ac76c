"""PnP, RED and Score-SDE: their fixed points and recursions, and when to stop."""

import pytest
import torch
from exact import (
    COV,
    MEAN,
    POSTERIOR_MEAN,
    PRIOR,
    PROBLEM,
    SIGMA_Y,
    Y_SEEN,
    A,
    Matrix,
    chain,
    eigen_ratios,
    real,
    with_noise,
)
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.operators import ComplexChannels, Fourier, GaussianNoise, Identity, Mask
from invsolve.priors import GaussianPrior, karras_sigmas
from invsolve.samplers import pnp, red, reddiff, score_sde
from invsolve.samplers.stopping import Discrepancy

EYE = torch.eye(2, dtype=torch.float64)
EXACTLY = {"cg_steps": 20, "rtol": 1e-13}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def level(sigma: float, steps: int) -> Tensor:
    return torch.full((steps,), sigma, dtype=torch.float64)


def most_likely(lam: float, cov: Tensor) -> Tensor:
    """argmin −log p(y | x) + λ/2 (x − m)ᵀ C⁻¹ (x − m)."""
    precision = lam * torch.linalg.inv(cov)
    hessian = A.T @ A / SIGMA_Y**2 + precision
    return torch.linalg.solve(hessian, A.T @ Y_SEEN / SIGMA_Y**2 + precision @ MEAN)


# --- fixed points


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("lam", [1.0, 0.4])
def test_admm_finds_the_most_likely(sigma: float, lam: float) -> None:
    """With the mean under N(m, C) for denoiser, whatever its level."""
    x = pnp(
        PROBLEM,
        PRIOR,
        method="admm",
        sigmas=level(sigma, 3000),
        lam=lam,
        generator=Generator(),
        **EXACTLY,
    )
    close(x[0], most_likely(lam, COV), 1e-8)
    if lam == 1:
        close(x[0], POSTERIOR_MEAN, 1e-8)


def test_proximal_gradient_finds_the_same() -> None:
    x = pnp(
        PROBLEM,
        PRIOR,
        method="pgd",
        lr=0.03,
        sigmas=level(0.3, 8000),
        generator=Generator(),
    )
    close(x[0], most_likely(0.3**2 / 0.03, COV), 1e-8)


def test_half_quadratic_splitting_has_its_own_fixed_point() -> None:
    """z = D(P(z)), solved for as one linear system."""
    sigma, lam = 0.5, 0.7
    z = pnp(
        PROBLEM,
        PRIOR,
        sigmas=level(sigma, 2000),
        lam=lam,
        generator=Generator(),
        **EXACTLY,
    )
    rho = lam / sigma**2
    inverse = torch.linalg.inv(A.T @ A / SIGMA_Y**2 + rho * EYE)
    gain = COV @ torch.linalg.inv(COV + sigma**2 * EYE)
    constant = gain @ (inverse @ A.T @ Y_SEEN / SIGMA_Y**2 - MEAN) + MEAN
    close(z[0], torch.linalg.solve(EYE - rho * gain @ inverse, constant), 1e-8)


def test_half_quadratic_splitting_step_by_step() -> None:
    sigmas = real([0.8, 0.3])
    got = pnp(PROBLEM, PRIOR, sigmas=sigmas, lam=0.23, generator=Generator(), **EXACTLY)
    z = PROBLEM.linear.pinv(PROBLEM.y)
    for sigma in sigmas:
        rho = 0.23 / sigma**2
        hessian = A.T @ A / SIGMA_Y**2 + rho * EYE
        x = torch.linalg.solve(hessian, A.T @ Y_SEEN / SIGMA_Y**2 + rho * z[0])
        z = PRIOR.denoise(x[None], sigma)
    close(got, z, 1e-8)


@pytest.mark.parametrize("method", ["fixed-point", "gradient"])
@pytest.mark.parametrize("lam", [1.0, 0.4])
def test_red_finds_the_most_likely_of_the_blurred_prior(
    method: str, lam: float
) -> None:
    sigma = 0.4
    x = red(
        PROBLEM,
        PRIOR,
        method=method,  # pyright: ignore[reportArgumentType]
        sigmas=level(sigma, 6000),
        lam=lam,
        generator=Generator(),
        **EXACTLY,
    )
    close(x[0], most_likely(lam, COV + sigma**2 * EYE), 1e-8)


# --- when to stop


def test_the_true_image_has_one_for_its_ratio(generator: Generator) -> None:
    truth = torch.randn(6, 1, 40, 40, generator=generator, dtype=torch.float64)
    noise = torch.randn(6, 1, 40, 40, generator=generator, dtype=torch.float64)
    mask = (torch.rand(1, 40, 40, generator=generator) < 0.5).double()
    problem = InverseProblem(mask * truth + 0.3 * noise, Mask(mask), GaussianNoise(0.3))
    ratio = Discrepancy(problem, truth, 1.0).ratio(truth)
    assert (ratio - 1).abs().max() < 5 * (2 / 800) ** 0.5


def test_complex_measurements_count_twice(generator: Generator) -> None:
    F = Fourier() @ ComplexChannels()
    truth = torch.randn(4, 2, 32, 32, generator=generator, dtype=torch.float64)
    noise = 0.2 * torch.randn(2, 4, 1, 32, 32, generator=generator).double()
    problem = InverseProblem(F(truth) + torch.complex(*noise), F, GaussianNoise(0.2))
    ratio = Discrepancy(problem, truth, 1.0).ratio(truth)
    assert (ratio - 1).abs().max() < 5 * (2 / 2048) ** 0.5


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (reddiff, {"steps": 200, "lam": 0.0, "init": "zeros"}),
        (
            reddiff,
            {
                "steps": 200,
                "init": "zeros",
                "optimizer": "prox",
                "normalize": "bayes",
                "lam": 50.0,
            },
        ),
        (red, {"steps": 200, "lam": 200.0, "method": "gradient"}),
        (pnp, {"steps": 200, "lam": 200.0}),
    ],
)
def test_items_stop_one_by_one(sampler, options, generator: Generator) -> None:
    """Each at the first of its own iterates that fits, whatever else is in the batch."""
    prior = GaussianPrior(torch.zeros(30).double(), torch.ones(30).double())
    y = real([[3.0], [0.5]]) * torch.ones(2, 30, dtype=torch.float64)
    H = torch.randn(30, 30, generator=generator, dtype=torch.float64) / 30**0.5
    problem = InverseProblem(y @ H.T, Matrix(H), GaussianNoise(0.3))

    def run(problem: InverseProblem, tau: float | None, steps: int) -> Tensor:
        streams = [Generator().manual_seed(k) for k in range(len(problem.y))]
        changed = {**options, "steps": steps}
        if sampler is reddiff:
            changed["sigmas"] = torch.linspace(1, 0.1, 200).double()[:steps]
            changed.pop("steps")
        else:
            changed["sigmas"] = torch.linspace(1, 0.1, 200).double()[:steps]
        return sampler(problem, prior, discrepancy=tau, generator=streams, **changed)

    def ratio(x: Tensor) -> Tensor:
        return ((y @ H.T - x @ H.T) ** 2).sum(1) / 0.3**2 / 30

    free = [ratio(run(problem, None, steps)) for steps in range(1, 60)]
    tau = float((free[3] + free[20]).mean() / 2) if sampler is not pnp else 3.0
    stopped = run(problem, tau, 200)
    for item in range(2):
        alone = run(problem.items(torch.tensor([item])), tau, 200)
        if item == 0:  # the streams of a single item are the first one's
            close(alone[0], stopped[item], 1e-9)
        reached = [k for k, r in enumerate(free) if r[item] <= tau]
        if reached:
            close(ratio(stopped)[item], free[reached[0]][item], 1e-9)


@pytest.mark.parametrize("sampler", [pnp, red, reddiff])
def test_a_discrepancy_must_be_positive(sampler) -> None:
    with pytest.raises(ValueError, match="discrepancy must be > 0"):
        sampler(PROBLEM, PRIOR, steps=2, discrepancy=0.0, generator=Generator())


def test_reddiff_can_return_what_the_authors_score(generator: Generator) -> None:
    """x₀ is μ before the last step: the μ of one step less, with Adam's first one."""
    n = torch.randn(3, 1, 2, generator=generator, dtype=torch.float64)
    sigmas = real([2.0, 1.0, 0.5])
    scored = with_noise(n, reddiff, PROBLEM, PRIOR, sigmas=sigmas, returns="x0")
    before = with_noise(n[:2], reddiff, PROBLEM, PRIOR, sigmas=sigmas[:2])
    close(scored, before)


# --- Score-SDE


def test_score_sde_step_by_step(generator: Generator) -> None:
    H = torch.randn(1, 2, generator=generator, dtype=torch.float64)
    problem = InverseProblem(real([[0.7]]), Matrix(H), GaussianNoise(SIGMA_Y))
    n = torch.randn(5, 1, 2, generator=generator, dtype=torch.float64)
    s, r, snr, lam = 1.5, 0.6, 0.3, 0.8
    got = with_noise(
        n,
        score_sde,
        problem,
        PRIOR,
        sigmas=real([s, r]),
        snr=snr,
        lam=lam,
        rtol=1e-13,
    )
    pinv = torch.linalg.pinv(H)

    def project(x: Tensor, m: Tensor, sigma: float) -> Tensor:
        return x + lam * (real([[0.7]]) + sigma * m @ H.T - x @ H.T) @ pinv.T

    x = (1 + s**2) ** 0.5 * n[0]
    x = x + (s**2 - r**2) * PRIOR.score(x, real(s)) + (s**2 - r**2) ** 0.5 * n[1]
    x = project(x, n[2], r)
    score = PRIOR.score(x, real(r))
    h = 2 * (snr * n[3].norm() / score.norm()) ** 2
    x = project(x + h * score + (2 * h) ** 0.5 * n[3], n[4], r)
    close(got, project(PRIOR.denoise(x, real(r)), n[4], 0.0))


def test_the_predictor_alone_draws_from_the_prior() -> None:
    """Of what is not measured; reverse diffusion's covariance errs as 1/steps."""
    nothing = InverseProblem(
        real([[0.0]]), Matrix(real([[0.0, 0.0]])), GaussianNoise(1.0)
    )

    def off(steps: int) -> float:
        sigmas = karras_sigmas(steps, 1e-3, 60.0).double()
        # One draw to start with; at each level but the last one, two.
        draws = 1 + 2 * (steps - 1)
        got = chain(score_sde, nothing, PRIOR, draws, sigmas=sigmas, correctors=0)
        close(got.mean, MEAN, 2e-2)
        return float((1 - eigen_ratios(got.cov, COV)).abs().max())

    few, many = off(100), off(200)
    assert many < 0.1
    assert 1.6 < few / many < 2.4


def test_score_sde_fits_the_data(generator: Generator) -> None:
    y = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    prior = GaussianPrior(torch.zeros(1, 4, 4).double(), torch.ones(1, 4, 4).double())
    problem = InverseProblem(y, Identity(), GaussianNoise(0.1))
    close(score_sde(problem, prior, steps=4, generator=generator), y)


def test_score_sde_is_of_each_item_alone(generator: Generator) -> None:
    """The authors' corrector takes the batch's mean norm, so that items mix."""
    y = real([[0.5], [50.0]])
    problem = InverseProblem(y, Matrix(A), GaussianNoise(SIGMA_Y))
    streams = [Generator().manual_seed(k) for k in range(2)]
    both = score_sde(problem, PRIOR, steps=6, generator=streams)
    alone = score_sde(
        problem.items(torch.tensor([0])),
        PRIOR,
        steps=6,
        generator=[Generator().manual_seed(0)],
    )
    close(both[:1], alone)
