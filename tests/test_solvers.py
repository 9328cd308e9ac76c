"""Solvers: their orders, their identities, and what they make of a posterior."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from exact import (
    COV,
    POSTERIOR_COV,
    POSTERIOR_MEAN,
    PRIOR,
    PROBLEM,
    SIGMA_Y,
    Y_SEEN,
    A,
    chain,
    ddpm_grid,
    eigen_ratios,
    image_prior,
    real,
    with_noise,
)
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.priors import GaussianMixturePrior, GaussianPrior, Prior, karras_sigmas
from invsolve.samplers import (
    ddnm,
    dds,
    diffpir,
    dps,
    mmps,
    pigdm,
    tmpd,
    unconditional,
)
from invsolve.samplers.core import path
from invsolve.samplers.solvers import (
    DDIM,
    SDE,
    Heun,
    Momentum,
    Multistep,
    Renoise,
    Scheduler,
    Singlestep,
    Solver,
    _weights,
)
from invsolve.shapes import Sigma, X

EYE = torch.eye(2, dtype=torch.float64)
EVERY: list[Solver] = [
    DDIM(),
    DDIM(1.0),
    Renoise(0.5),
    Multistep(2),
    Multistep(3, "eps"),
    Singlestep(2),
    Singlestep(3),
    Heun(),
    SDE(),
    Momentum(3, 0.8),
    Momentum(2, 0.8, "hb"),
]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- orders, on a mixture of three Gaussians in the plane

THREE = GaussianMixturePrior(
    real([0.3, 0.5, 0.2]),
    real([[1.0, -0.5], [-1.2, 0.8], [0.3, 1.5]]),
    torch.stack([s**2 * EYE for s in (0.35, 0.45, 0.3)]),
)


def reference(x: Tensor, sigma: float, to: float) -> Tensor:
    """The probability flow by an adaptive method of order 8."""
    from scipy.integrate import solve_ivp

    def slope(log_sigma: float, values: np.ndarray) -> np.ndarray:
        s = real(math.exp(log_sigma))
        state = torch.from_numpy(values).reshape(x.shape)
        return (s * THREE.eps(state, s)).flatten().numpy()

    span = (math.log(sigma), math.log(to))
    start = x.flatten().numpy()
    found = solve_ivp(slope, span, start, method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.from_numpy(found.y[:, -1]).reshape(x.shape)


# The variance-preserving diffusion of β = 0.1 … 20 from t = 1 to λ = 2.5.
LAM_0, LAM_1 = -math.log(math.expm1(10.05)) / 2, 2.5
A_0, A_1 = (1 / math.hypot(1, math.exp(-lam)) for lam in (LAM_0, LAM_1))
NOISE = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
START = NOISE / A_0


@pytest.fixture(scope="module")
def flowed() -> Tensor:
    return reference(START, math.exp(-LAM_0), math.exp(-LAM_1))


def error(solver: Solver, sigmas: Tensor, exact: Tensor) -> float:
    """Root mean square, of the variance-preserving state."""
    got = solver(THREE.denoise, START, sigmas, generator=Generator())
    return A_1 * float((got - exact).square().mean().sqrt())


def even_in_lam(n: int) -> Tensor:
    return (-torch.linspace(LAM_0, LAM_1, n + 1, dtype=torch.float64)).exp()


@pytest.mark.parametrize(
    ("solver", "low", "high", "at_40"),
    [
        (DDIM(), 1.0, 1.08, 3.62e-2),
        (Heun(), 1.9, 2.1, None),
        (Singlestep(2), 1.9, 2.1, None),
        (Singlestep(3), 2.85, 3.1, 2.92e-5),
        (Multistep(2), 1.9, 2.1, 2.82e-3),
        (Multistep(3), 2.95, 3.4, 5.66e-4),
        (Multistep(2, "eps"), 1.85, 2.05, None),
        (Multistep(3, "eps"), 2.7, 3.1, None),
        (Multistep(4, "eps"), 3.9, 4.4, None),
    ],
    ids=str,
)
def test_orders_and_errors(
    solver: Solver, low: float, high: float, at_40: float | None, flowed: Tensor
) -> None:
    """Against an independent calculation at 40 steps; orders from 80 to 160."""
    order = math.log2(
        error(solver, even_in_lam(80), flowed) / error(solver, even_in_lam(160), flowed)
    )
    assert low <= order <= high
    if at_40 is not None:
        assert error(solver, even_in_lam(40), flowed) == pytest.approx(at_40, rel=2e-3)


@pytest.mark.parametrize(
    ("solver", "order", "slack"),
    [
        (Momentum(1), 1.0, 0.05),
        (Momentum(2), 2.0, 0.05),
        (Momentum(3), 3.0, 0.2),
        (Momentum(4), 4.0, 0.3),
        (Momentum(2, 0.5), 2.0, 0.1),
        (Momentum(3, 0.5), 3.0, 0.25),
        (Momentum(2, 0.5, "hb"), 1.0, 0.05),
    ],
    ids=str,
)
def test_momentum_s_order(solver: Solver, order: float, slack: float) -> None:
    """k, or 1 of the heavy ball, on the even grid in σ that its weights assume."""
    exact = reference(20 * NOISE, 20.0, 0.5)

    def off(n: int) -> float:
        sigmas = torch.linspace(20.0, 0.5, n + 1, dtype=torch.float64)
        got = solver(THREE.denoise, 20 * NOISE, sigmas, generator=Generator())
        return float((got - exact).norm())

    assert math.log2(off(800) / off(1600)) == pytest.approx(order, abs=slack)


@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        (Momentum(1), 2.0),
        (Momentum(2), 1.0),
        (Momentum(3), 6 / 11),
        (Momentum(4), 3 / 10),
        (Momentum(1, 0.5, "hb"), 6.0),
        (Momentum(2, 0.5, "hb"), 3.0),
        (Momentum(3, 0.5, "hb"), 18 / 11),
        (Momentum(4, 0.5, "hb"), 0.9),
        (Momentum(2, 0.5), 1.5),
        (Momentum(3, 0.5), 0.782),
        (Momentum(4, 0.5), 0.428),
    ],
    ids=str,
)
def test_damping_widens_the_stable_interval(solver: Solver, limit: float) -> None:
    """For x′ = x − z x: PLMS's interval, (2−β)/β times it for the heavy ball."""
    sigmas = torch.linspace(801, 1, 801, dtype=torch.float64)

    def size(z: float) -> float:
        # ε̂ = z x, so that a step of σ by −1 takes z x away.
        x = solver(
            lambda x, s: x - s * z * x, real([[1.0]]), sigmas, generator=Generator()
        )
        return float(x.abs())

    assert size(0.97 * limit) < 1 < size(1.03 * limit)


# --- identities


@pytest.mark.parametrize("of", ["x0", "eps"])
def test_multistep_integrates_polynomials_exactly(of: str) -> None:
    from scipy.integrate import quad

    lams = [0.7, 0.3, -0.4, -0.6]
    lam_next = 1.6
    for power in range(4):
        weights = _weights(of, lam_next, lams)
        got = sum(w * lam**power for w, lam in zip(weights, lams, strict=True))
        sign = 1 if of == "x0" else -1
        integral, _ = quad(
            lambda lam, p=power, s=sign: math.exp(s * lam) * lam**p, lams[0], lam_next
        )
        scale = math.exp(-lam_next) if of == "x0" else -1
        assert got == pytest.approx(scale * integral, rel=1e-10)


@pytest.mark.parametrize(
    "solver", [Multistep(1), Multistep(1, "eps"), Momentum(1), Momentum(1, 1.0, "hb")]
)
def test_order_one_is_ddim(solver: Solver) -> None:
    sigmas = even_in_lam(12)
    one, other = (
        s(THREE.denoise, START, sigmas, generator=Generator()) for s in (solver, DDIM())
    )
    close(one, other)


def test_the_sde_of_order_one_is_ancestral() -> None:
    sigmas = path(even_in_lam(12))
    one, other = (
        s(THREE.denoise, START, sigmas, generator=Generator().manual_seed(0))
        for s in (SDE(1), DDIM(1.0))
    )
    close(one, other)


def test_momentum_of_order_two_is_adams_bashforth(generator: Generator) -> None:
    sigmas = real([3.0, 2.0, 1.0, 0.5])
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    got = Momentum(2)(THREE.denoise, x, sigmas, generator=generator)
    before = None
    for s, r in pairwise(sigmas):
        slope = THREE.eps(x, s)
        d = slope if before is None else 1.5 * slope - 0.5 * before
        x, before = x + (r - s) * d, slope
    close(got, x)


@pytest.mark.parametrize("solver", EVERY, ids=str)
def test_the_last_step_to_zero_gives_the_denoised(solver: Solver) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def denoise(x: X, sigma: Sigma) -> X:
        seen.append((x, sigma))
        return THREE.denoise(x, sigma)

    got = solver(denoise, NOISE, real([1.0, 0.6, 0.3, 0.0]), generator=Generator())
    assert float(seen[-1][1]) == pytest.approx(0.3)
    close(got, THREE.denoise(*seen[-1]))


@pytest.mark.parametrize("solver", EVERY, ids=str)
def test_an_item_does_not_depend_on_its_batch(solver: Solver) -> None:
    sigmas = path(even_in_lam(6))

    def run(items: slice) -> Tensor:
        streams = [Generator().manual_seed(k) for k in range(5)][items]
        return solver(THREE.denoise, START[:5][items], sigmas, generator=streams)

    close(run(slice(0, 5))[2:3], run(slice(2, 3)), 1e-13)


def test_few_steps_lower_the_order_at_the_end() -> None:
    sigmas = even_in_lam(3)
    generator = Generator()
    lowered = Multistep(3)(THREE.denoise, START, sigmas, generator=generator)
    kept = Multistep(3, lower_final=False)(
        THREE.denoise, START, sigmas, generator=generator
    )
    assert not torch.equal(lowered, kept)
    # By hand: orders 1, 2 (of two outputs), and 1 at the end.
    x, outputs, lams = START, [], (-sigmas.log()).tolist()
    for i, k in enumerate([1, 2, 1]):
        outputs.insert(0, THREE.denoise(x, sigmas[i]))
        weights = _weights("x0", lams[i + 1], lams[i::-1][:k])
        x = sigmas[i + 1] / sigmas[i] * x + sum(
            w * D for w, D in zip(weights, outputs, strict=False)
        )
    close(lowered, x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Multistep(5),
        lambda: Multistep(0),
        lambda: Singlestep(1),
        lambda: SDE(3),
        lambda: Momentum(5),
        lambda: Momentum(2, 0.0),
        lambda: Momentum(2, 1.5),
    ],
)
def test_what_no_solver_can_do_is_refused(make) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        make()


# --- the prior alone


def gaussian_flow(prior: GaussianPrior, x: Tensor, sigma: float, to: float) -> Tensor:
    """x(σ′) = m + √((C + σ′²)/(C + σ²)) (x − m)."""
    ratio = (prior.eigenvalues + to**2) / (prior.eigenvalues + sigma**2)
    centred = (x - prior.mean).flatten(1) @ prior.basis
    return prior.mean + ((centred * ratio.sqrt()) @ prior.basis.T).reshape(x.shape)


def drawn(n: Tensor, prior: Prior, **options: Any) -> Tensor:
    """The prior's draws when the k-th draw of noise is n[k]."""

    def draw(
        problem: InverseProblem, prior: Prior, generator: Generator, **options: Any
    ) -> Tensor:
        return unconditional(prior, n[0], generator=generator, **options)

    return with_noise(n, draw, PROBLEM, prior, **options)


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [(None, 1e-4), (DDIM(), 2e-2), (Multistep(3), 1e-3), (Momentum(2), 3e-3)],
    ids=str,
)
def test_the_ode_follows_the_gaussian_flow(
    solver: Solver | None, tolerance: float, generator: Generator
) -> None:
    prior = image_prior(generator)
    n = torch.randn(1, 4, 1, 4, 4, generator=generator, dtype=torch.float64)
    got = drawn(n, prior, steps=300, sigma_range=(1e-3, 10.0), solver=solver)
    close(got, gaussian_flow(prior, 101**0.5 * n[0], 10.0, 0.0), tolerance)


@pytest.mark.parametrize("solver", [DDIM(1.0), SDE()], ids=str)
def test_stochastic_draws_have_the_prior_s_covariance(solver: Solver) -> None:
    """Read off the affine map from noise to draw; the error falls with the steps."""

    def off(steps: int) -> float:
        draws = steps + int(isinstance(solver, DDIM))
        n = torch.zeros(draws, 1 + 2 * draws, 2, dtype=torch.float64)
        k = torch.arange(draws).repeat_interleave(2)
        n[k, 1 + torch.arange(2 * draws), torch.arange(2).repeat(draws)] = 1
        sigmas = real(np.geomspace(100.0, 1e-3, steps))
        x = drawn(n, PRIOR, sigmas=sigmas, solver=solver)
        columns = (x[1:] - x[0]).reshape(draws, 2, 2).mT
        cov = (columns @ columns.mT).sum(0)
        return float((1 - eigen_ratios(cov, COV)).abs().max())

    few, many = off(100), off(200)
    assert many < 0.1
    # Twice the steps: half the error, or a quarter.
    assert few / many == pytest.approx(2 if isinstance(solver, DDIM) else 4, rel=0.25)


def test_draws_are_in_the_image_s_own_unit(generator: Generator) -> None:
    from invsolve.priors import Affine, AffineMap

    like = torch.zeros(2, 2, dtype=torch.float64)
    plain, mapped = (
        unconditional(prior, like, steps=5, generator=Generator().manual_seed(0))
        for prior in (PRIOR, Affine(PRIOR, AffineMap(0.02, 3.0)))
    )
    close(mapped, 0.02 * plain + 3)


@pytest.mark.parametrize(
    ("solver", "passes"),
    [
        (None, 9),
        (DDIM(), 5),
        (Multistep(3), 5),
        (SDE(), 5),
        (Singlestep(2), 9),
        (Singlestep(3), 13),
    ],
    ids=str,
)
def test_passes_of_the_network(solver: Solver | None, passes: int) -> None:
    calls = []

    class Counting(Prior):
        sigma_min, sigma_max = 0.01, 10.0

        def denoise(self, x: X, sigma: Sigma) -> X:
            calls.append(x)
            return PRIOR.denoise(x, sigma)

    like = torch.zeros(1, 2, dtype=torch.float64)
    unconditional(Counting(), like, steps=5, solver=solver, generator=Generator())
    assert len(calls) == passes


# --- posteriors

EXACTLY = {"cg_steps": 20, "rtol": 1e-13}


@pytest.mark.parametrize(
    ("solver", "order"), [(Multistep(2), 2), (Multistep(3), 3), (DDIM(), 1)], ids=str
)
def test_mmps_has_its_solver_s_order(solver: Solver, order: int) -> None:
    """E[x₀ | x, y] is exact on a Gaussian prior, so that only the ODE's error is left."""

    def off(steps: int) -> float:
        # So high that the start's mean, which is 0, does not matter.
        sigmas = real(np.geomspace(1e7, 1e-4, steps))
        got = chain(mmps, PROBLEM, PRIOR, 1, sigmas=sigmas, solver=solver, **EXACTLY)
        close(got.mean, POSTERIOR_MEAN, 1e-6)
        return float((1 - eigen_ratios(got.cov, POSTERIOR_COV)).abs().max())

    assert math.log2(off(200) / off(400)) > order - 0.25


def test_ten_passes_of_a_high_order_suffice() -> None:
    def off(solver: Solver) -> float:
        sigmas = real(np.geomspace(100.0, 0.01, 10))
        got = chain(mmps, PROBLEM, PRIOR, 1, sigmas=sigmas, solver=solver, **EXACTLY)
        return float((got.cov - POSTERIOR_COV).norm() / POSTERIOR_COV.norm())

    assert off(Multistep(3, "eps")) < 0.3 * off(DDIM())


def test_a_better_solver_leaves_the_proximal_step_s_bias() -> None:
    """Whatever the order, many steps lead to one and the same wrong covariance."""

    def limit(solver: Solver) -> Tensor:
        sigmas = real(np.geomspace(100.0, 1e-3, 400))
        options = {"sigmas": sigmas, "solver": solver, "rtol": 1e-12}
        return chain(diffpir, PROBLEM, PRIOR, 1, **options).cov

    two, three = limit(Multistep(2)), limit(Multistep(3))
    close(two, three, 1e-3)
    assert float((1 - eigen_ratios(two, POSTERIOR_COV)).abs().max()) > 0.05


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (mmps, EXACTLY),
        (pigdm, EXACTLY),
        (tmpd, EXACTLY),
        (diffpir, {"rtol": 1e-12}),
    ],
)
def test_a_sampler_s_own_solver_is_one_of_them(sampler, options) -> None:
    own = Renoise(0.3) if sampler is diffpir else DDIM(0.6)
    setting = {"zeta": 0.3} if sampler is diffpir else {"eta": 0.6}
    sigmas = real(np.geomspace(50.0, 0.01, 9))
    default, given = (
        sampler(
            PROBLEM,
            PRIOR,
            sigmas=sigmas,
            generator=Generator().manual_seed(0),
            **options,
            **extra,
        )
        for extra in (setting, {"solver": own})
    )
    assert torch.equal(default, given)


@pytest.mark.parametrize("sampler", [dds, ddnm])
def test_projections_by_any_solver_fit_noiseless_data(sampler) -> None:
    options = {"gamma": 1e9} if sampler is dds else {}
    x = sampler(
        PROBLEM, PRIOR, steps=8, solver=Multistep(2), generator=Generator(), **options
    )
    close(x @ A.T, Y_SEEN[None], 1e-6)


@pytest.mark.parametrize(
    ("steps", "ratios"),
    [(20, (0.49, 91.6)), (100, (0.30, 0.77)), (1000, (0.46, 0.88))],
)
def test_dps_by_its_equation(steps: int, ratios: tuple[float, float]) -> None:
    """The mean fits the noise, and few steps diverge: an independent calculation."""
    sigmas = ddpm_grid(steps)
    draws = len(sigmas) + 1
    got = chain(dps, PROBLEM, PRIOR, draws, sigmas=sigmas, loss="likelihood")
    close(got.mean, real([1.5, 0.474]), 1e-3)
    error = (eigen_ratios(got.cov, POSTERIOR_COV) / real(ratios) - 1).abs()
    assert (error < 0.02).all()


def test_dps_by_its_equation_pulls_the_misfit_back(generator: Generator) -> None:
    n = torch.randn(2, 1, 2, generator=generator, dtype=torch.float64)
    sigmas = real([1.3, 0.4])
    got = with_noise(
        n[:1], dps, PROBLEM, PRIOR, sigmas=sigmas, loss="likelihood", eta=0.0, zeta=0.3
    )
    x = (1 + 1.3**2) ** 0.5 * n[0]

    def guided(x: Tensor, sigma: float) -> Tensor:
        J = COV @ torch.linalg.inv(COV + sigma**2 * EYE)
        D = PRIOR.denoise(x, real(sigma))
        return D + 0.3 * sigma**2 * (Y_SEEN - D @ A.T) / SIGMA_Y**2 @ A @ J

    first = guided(x, 1.3)
    close(got, guided(first + 0.4 * (x - first) / 1.3, 0.4))


def test_solvers_that_a_method_has_no_place_for_are_refused() -> None:
    with pytest.raises(ValueError, match="loss='likelihood'"):
        dps(PROBLEM, PRIOR, steps=2, solver=Heun(), generator=Generator())
    with pytest.raises(ValueError, match="leave one of them out"):
        ddnm(PROBLEM, PRIOR, noisy=True, solver=Heun(), generator=Generator())


# --- diffusers

ITS_OWN = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

VP = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}


def scheduler(name: str, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**VP, **options)


def test_diffusers_ddim_is_ours_at_its_levels() -> None:
    options = {"clip_sample": False, "timestep_spacing": "trailing"}
    theirs = scheduler("DDIMScheduler", prediction_type="sample", **options)
    theirs.set_timesteps(20)
    sigmas = (1 / theirs.alphas_cumprod[theirs.timesteps].double() - 1).sqrt()
    for kind in ("sample", "epsilon", "v_prediction"):
        solver = Scheduler(scheduler("DDIMScheduler", prediction_type=kind, **options))
        n = NOISE * (1 + sigmas[0] ** 2).sqrt()
        got, expected = (
            s(THREE.denoise, n, path(sigmas), generator=Generator())
            for s in (solver, DDIM())
        )
        close(got, expected, 1e-4)


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, 0.1),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}, 0.1),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, 0.15),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, 0.1),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 0.4),
    ],
)
@ITS_OWN
def test_diffusers_schedulers_draw_from_the_posterior(
    name: str, options: dict[str, Any], most: float
) -> None:
    """Fed with E[x₀ | x, y], 20 steps, the affine map read off unit noise."""
    if name == "DPMSolverMultistepScheduler":
        options = {**options, "final_sigmas_type": "zero"}
    solver = Scheduler(scheduler(name, prediction_type="sample", **options))
    sigmas = karras_sigmas(20, 1e-3, 100.0).double()
    got = chain(mmps, PROBLEM, PRIOR, 1, sigmas=sigmas, solver=solver, **EXACTLY)
    close(got.mean, POSTERIOR_MEAN, 0.05)
    off = float((got.cov - POSTERIOR_COV).norm() / POSTERIOR_COV.norm())
    assert off < most


def test_a_stochastic_scheduler_draws_from_the_given_streams() -> None:
    solver = Scheduler(
        scheduler("DDPMScheduler", prediction_type="sample", clip_sample=False)
    )

    def run(items: slice) -> Tensor:
        streams = [Generator().manual_seed(k) for k in range(4)][items]
        torch.manual_seed(int(items.start))  # of no consequence
        return solver(
            THREE.denoise, START[:4][items], even_in_lam(5), generator=streams
        )

    close(run(slice(0, 4))[1:3], run(slice(1, 3)), 1e-6)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample=False"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding=False"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "for flows"),
    ],
)
def test_schedulers_that_clip_or_flow_are_refused(
    name: str, options: dict[str, bool], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Scheduler(scheduler(name, prediction_type="sample", **options))
