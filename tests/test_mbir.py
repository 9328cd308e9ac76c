"""ADMM with total variation along z, and DiffusionMBIR on a prior known exactly."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from stacks import Toy, cut_after, roughness, seeded, stack
from torch import Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, solve
from invsolve.operators import (
    Fourier,
    GaussianNoise,
    LinearOperator,
    Mask,
    TransmissionNoise,
)
from invsolve.priors import Prior
from invsolve.samplers import mbir
from invsolve.samplers.ztv import LIMITED_ANGLE, MRI, SPARSE_VIEW, DataStep
from invsolve.shapes import X, Y

D, N = 4, 3
"""Of small volumes, (1, 1, D, 1, N), whose matrices are written out."""


class EachSlice(LinearOperator):
    """y_k = M x_k, of slices (1, N)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def apply(self, x: X) -> Y:
        return x @ self.matrix.mT

    def adjoint(self, y: Y) -> X:
        return y @ self.matrix


def small(sigma: float = 0.5, rows: int = 5) -> tuple[InverseProblem, Tensor, Tensor]:
    """A problem, and its whitened matrix and measurements over flattened volumes."""
    g = seeded(4)
    M = torch.randn(rows, N, generator=g, dtype=torch.float64)
    y = torch.randn(1, 1, D, 1, rows, generator=g, dtype=torch.float64)
    given = InverseProblem(y, EachSlice(M), GaussianNoise(sigma))
    return given, torch.kron(torch.eye(D).double(), M) / sigma, y.flatten() / sigma


def jumps(periodic: bool = False) -> Tensor:
    """D as a matrix over flattened volumes."""
    one = torch.roll(torch.eye(D), 1, 1) - torch.eye(D)
    return torch.kron(one if periodic else one[:-1], torch.eye(N)).double()


def minimiser(A: Tensor, y: Tensor, lam: float, Dz: Tensor) -> Tensor:
    """argmin ½‖Ax − y‖² + λ‖Dx‖₁ by its dual, a bounded least squares of SciPy's."""
    from scipy.optimize import lsq_linear

    M = (A.T @ A).numpy()
    half = np.linalg.inv(np.linalg.cholesky(M))
    # x = M⁻¹(Aᵀy − Dᵀu), and u is the least of ½(Aᵀy − Dᵀu)ᵀM⁻¹(…) with |u| ≤ λ.
    b = (A.T @ y).numpy()
    dual = lsq_linear(half @ Dz.T.numpy(), half @ b, (-lam, lam), tol=1e-14)
    return torch.from_numpy(np.linalg.solve(M, b - Dz.T.numpy() @ dual.x))


def fixed_point(step: DataStep, like: Tensor, rounds: int = 80) -> Tensor:
    x, q = torch.zeros_like(like), step.jumps(like)
    for _ in range(rounds):
        step(x, q, cg_steps=8)
    return x


# --- the step


@pytest.mark.parametrize("periodic", [False, True])
def test_admm_comes_to_rest_at_the_minimum(periodic: bool) -> None:
    given, A, y = small()
    step = DataStep.of(given, rho=0.3, lam=0.02, periodic=periodic)
    lam = step.threshold * float(step.rho)
    x = fixed_point(step, given.image_like())
    expected = minimiser(A, y, lam, jumps(periodic))
    assert_close(x.flatten(), expected, rtol=1e-4, atol=1e-4)
    plain = torch.linalg.lstsq(A, y).solution
    assert (expected - plain).norm() > 0.1 * plain.norm()


def test_one_step_is_what_the_formulas_say() -> None:
    given, A, y = small()
    step = DataStep.of(given, rho=0.05, lam=0.02)
    Dz, rho, kappa = jumps(), float(step.rho), 0.3
    g = seeded(1)
    x = torch.randn(given.image_like().shape, generator=g, dtype=torch.float64)
    q = torch.randn(step.jumps(x).shape, generator=g, dtype=torch.float64)
    before, q0 = x.flatten().clone(), q.flatten().clone()
    step(x, q, cg_steps=4 * D * N, kappa=kappa)
    z = q0.sign() * (q0.abs() - step.threshold).clamp_min(0)
    w = q0 - z
    M = A.T @ A + rho * Dz.T @ Dz + kappa * torch.eye(D * N).double()
    b = A.T @ y + rho * Dz.T @ (z - w) + kappa * before
    assert_close(x.flatten(), torch.linalg.solve(M, b))
    assert_close(q.flatten(), Dz @ x.flatten() + w)
    assert 0 < int((z == 0).sum()) < z.numel()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_conjugate_gradients_stop_where_they_are_told_to(steps: int) -> None:
    """The k-th iterate is the best of the k-th Krylov space around where it began."""
    given, A, y = small()
    step = DataStep.of(given, rho=0.05, lam=0.0)
    M = A.T @ A + float(step.rho) * jumps().T @ jumps()
    x, q = given.image_like(), step.jumps(given.image_like())
    r = A.T @ y
    krylov = torch.stack([torch.matrix_power(M, k) @ r for k in range(steps)], 1)
    krylov = torch.linalg.qr(krylov).Q
    best = krylov @ torch.linalg.solve(krylov.T @ M @ krylov, krylov.T @ r)
    step(x, q, cg_steps=steps)
    assert_close(x.flatten(), best, rtol=1e-7, atol=1e-7)


def test_items_know_nothing_of_each_other() -> None:
    given, _, _ = small()
    y = torch.cat([given.y, 1e3 * given.y.flip(2) + 1])
    both = DataStep.of(InverseProblem(y, given.operator, given.noise), **MRI)
    x = torch.zeros(2, 1, D, 1, N).double()
    q = both.jumps(x)
    both(x, q, cg_steps=3)
    for i in range(2):
        alone = InverseProblem(y[i : i + 1], given.operator, given.noise)
        one, r = torch.zeros_like(x[:1]), torch.zeros_like(q[:1])
        DataStep.of(alone, **MRI)(one, r, cg_steps=3)
        assert_close(x[i : i + 1], one)
        assert_close(q[i : i + 1], r)


def test_complex_volumes_lose_length_and_keep_direction() -> None:
    """By a change of phase everything turns along."""
    g = seeded()
    mask = (torch.rand(4, 4, generator=g) < 0.7).double()
    A = Mask(mask) @ Fourier()
    x = torch.randn(1, 1, 3, 4, 4, generator=g, dtype=torch.complex128)
    turn = torch.exp(torch.tensor(1.1j, dtype=torch.complex128))
    made = []
    for factor in (torch.ones_like(turn), turn):
        step = DataStep.of(InverseProblem(factor * A(x), A, GaussianNoise(1.0)), **MRI)
        v = torch.zeros_like(x)
        q = step.jumps(v)
        for _ in range(3):
            step(v, q, cg_steps=2)
        made.append(v)
    assert_close(made[1], turn * made[0])
    assert step._dual(q).abs().max() <= step.threshold * (1 + 1e-12)


# --- what its numbers mean


def test_the_norm_is_that_of_the_whitened_operator() -> None:
    given, A, _ = small(sigma=0.3)
    step = DataStep.of(given, rho=1.0, lam=0.5)
    assert float(step.rho) == pytest.approx(
        float(torch.linalg.norm(A, 2)) ** 2, rel=0.05
    )
    assert step.threshold == 0.5


def test_presets_mean_the_same_for_any_operator() -> None:
    """A and y times a factor, σ times another: the same volume."""
    given, _, _ = small()
    prior = stack(1, N)
    results = []
    for factor, sigma in ((1.0, 0.5), (7.0, 0.5), (1e-3, 0.5), (1.0, 0.01)):
        other = InverseProblem(
            factor * given.y, factor * given.linear, GaussianNoise(sigma)
        )
        run = solve(
            other, prior, mbir, steps=8, rho=0.05, lam=0.02, final=False,
            generator=seeded(),
        )  # fmt: skip
        results.append(run.mean)
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-6, atol=1e-6)
    assert SPARSE_VIEW["lam"] / SPARSE_VIEW["rho"] == pytest.approx(0.004)
    assert LIMITED_ANGLE["lam"] / LIMITED_ANGLE["rho"] == pytest.approx(0.04)
    assert MRI["lam"] / MRI["rho"] == pytest.approx(0.5)


def test_slices_half_as_high_are_coupled_twice_as_much() -> None:
    """Each slice measured twice, as two of half its height: the same volume twice."""
    given, _, _ = small()
    twice = InverseProblem(given.y.repeat_interleave(2, 2), given.operator, given.noise)
    one = fixed_point(DataStep.of(given, rho=0.3, lam=0.02), given.image_like())
    two = fixed_point(
        DataStep.of(twice, rho=0.3, lam=0.02, aspect=0.5), twice.image_like()
    )
    assert_close(two, one.repeat_interleave(2, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cg_steps": 3}, "lock the noise of the iterate in"),
        ({"cg_steps": 0}, "cg_steps must be 1 to 2"),
        ({"rho": -1.0}, "rho must be > 0"),
        ({"rho": 0.0, "lam": 0.1}, "or both 0"),
        ({"aspect": 0.0}, "aspect must be > 0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    options: dict[str, Any], message: str
) -> None:
    given, _, _ = small()
    with pytest.raises(ValueError, match=message):
        mbir(given, stack(1, N), generator=seeded(), **options)


def test_slices_are_no_volumes() -> None:
    flat = InverseProblem(
        torch.ones(2, 1, 4, 4), Mask(torch.ones(4, 4)), GaussianNoise(1.0)
    )
    with pytest.raises(ValueError, match="needs volumes"):
        mbir(flat, stack(4, 4), generator=seeded())


# --- the last step


def test_the_last_step_is_one_of_sirt() -> None:
    given, _, _ = small()
    M = given.operator.matrix.abs()  # pyright: ignore[reportAttributeAccessIssue]
    M[:, 1] = 0  # a voxel that nothing sees
    step = DataStep.of(InverseProblem(given.y, EachSlice(M), given.noise), **MRI)
    x = torch.randn(given.image_like().shape, generator=seeded(), dtype=torch.float64)
    seen = M.T @ (M @ torch.ones(N).double())
    gap = (given.y - x @ M.T) @ M
    expected = x + torch.where(seen > 0, gap / seen.clamp_min(1e-12), 0)
    assert_close(step.sirt(x.clone()), expected)


def test_it_is_refused_before_the_first_pass() -> None:
    A = EachSlice(torch.tensor([[1.0, -2.0, 0.0]]).double())
    given = InverseProblem(torch.ones(1, 1, D, 1, 1).double(), A, GaussianNoise(0.5))
    with pytest.raises(ValueError, match="give final=False"):
        mbir(given, Never(), generator=seeded())


class Never(Prior):
    sigma_min, sigma_max = 0.01, 20.0

    def denoise(self, x: X, sigma: Tensor) -> X:
        raise AssertionError("the network was asked")


# --- the sampler


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.make()


def run(toy: Toy, **options: Any) -> Tensor:
    return mbir(
        toy.problem, toy.prior, steps=100, final=False, generator=seeded(1), **options
    )


def test_coupling_brings_it_nearer_to_the_truth(toy: Toy) -> None:
    """On a Gaussian field whose slices are alike, seen slice by slice."""
    alone = run(toy, rho=0.0, lam=0.0)
    coupled = run(toy, rho=0.0257, lam=0.0257 * 0.04)
    assert toy.psnr(coupled) > toy.psnr(alone) + 0.5
    assert roughness(coupled) < 0.7 * roughness(alone)


def test_more_conjugate_gradients_lock_the_noise_in(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = run(toy, cg_steps=1), run(toy, cg_steps=2)
    assert min(toy.psnr(one), toy.psnr(two)) > 15
    module = importlib.import_module("invsolve.samplers.mbir")
    monkeypatch.setattr(module, "MOST_CG_STEPS", 8)
    assert toy.psnr(run(toy, cg_steps=8)) < 0


def test_predictor_and_corrector_are_what_the_formulas_say() -> None:
    """One level of them, on numbers that are given; the data step is not asked."""
    given, _, _ = small()
    prior, sigma = stack(1, N), torch.tensor([3.0]).double()
    step = DataStep.of(given, rho=0.05, lam=0.02)
    g = seeded(9)
    shape = given.image_like().shape
    n0, n1, n2 = (
        torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)
    )
    x = n0 * (1 + sigma**2).sqrt()
    x = x + sigma**2 * prior.score(x, sigma[0]) + sigma * n1
    s = prior.score(x, sigma[0])
    h = 2 * (0.2 * n2.norm() / s.norm()) ** 2
    x = x + h * s + (2 * h).sqrt() * n2
    step(x, step.jumps(x), cg_steps=1)
    made = mbir(
        given, prior, sigmas=sigma, snr=0.2, rho=0.05, lam=0.02, final=False,
        generator=seeded(9),
    )  # fmt: skip
    assert_close(made, x)


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_a_cut_solve_goes_on_bit_for_bit(cut: int, tmp_path: Any) -> None:
    given, _, _ = small()
    options: dict[str, Any] = {"steps": 10, "rho": 0.05, "lam": 0.02, "final": False}
    whole = solve(given, stack(1, N), mbir, samples=2, generator=seeded(), **options)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "checkpoint_every": 2}
    with pytest.raises(InterruptedError):
        solve(
            given, stack(1, N), mbir, samples=2, generator=seeded(),
            progress=cut_after(10 + cut), **kept, **options,
        )  # fmt: skip
    left: list[int] = []
    again = solve(
        given, stack(1, N), mbir, samples=2, generator=seeded(),
        progress=lambda loop: left.append(len(loop)) or loop,  # pyright: ignore
        **kept, **options,
    )  # fmt: skip
    assert torch.equal(again.samples, whole.samples)
    assert left == [10 - cut // 2 * 2]
    assert again.stats.network_forwards == whole.stats.network_forwards


def test_weights_of_counts_are_the_data_s_precision() -> None:
    """PWLS: the step's normal operator is AᵀWA with W of the counts."""
    given, _, _ = small(sigma=1.0)
    noise = TransmissionNoise(1e3)
    y = given.y.abs()
    step = DataStep.of(InverseProblem(y, given.operator, noise), rho=0.0, lam=0.0)
    x = torch.zeros(given.image_like().shape, dtype=torch.float64)
    step(x, step.jumps(x), cg_steps=40)
    M = given.operator.matrix  # pyright: ignore[reportAttributeAccessIssue]
    for k in range(D):
        W = noise.precision(y)[0, 0, k, 0].diag()
        expected = torch.linalg.solve(M.T @ W @ M, M.T @ W @ y[0, 0, k, 0])
        assert_close(x[0, 0, k, 0], expected, rtol=1e-6, atol=1e-6)
