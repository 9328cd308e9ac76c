"""SIRT, CGLS, total variation of volumes, and filtered back-projection of any beam."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import pi
from typing import final

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import InverseProblem
from invsolve.operators import (
    GaussianNoise,
    Identity,
    LinearOperator,
    Mask,
    ParallelBeam,
    TransmissionNoise,
)
from invsolve.operators.ct import ConeBeam, FanBeam
from invsolve.samplers.classical import (
    cgls,
    fbp,
    sirt,
    tv,
)
from invsolve.shapes import X, Y
from invsolve.variation import divergence, gradient

float64 = torch.float64


@final
@dataclass(frozen=True, eq=False)
class Dense(LinearOperator):
    """y = M x of vectors."""

    matrix: Tensor
    adjoint_is_exact: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    def apply(self, x: X) -> Y:
        return x @ self.matrix.T

    def adjoint(self, y: Y) -> X:
        return y @ self.matrix.conj()


def dense(generator: Generator, rows: int = 12, columns: int = 7) -> Dense:
    matrix = torch.rand(rows, columns, generator=generator, dtype=float64)
    return Dense(matrix + 0.05)


def random(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=float64)


def least_squares(M: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    root = weight.sqrt()
    return torch.linalg.lstsq(root[:, None] * M, (root * y).T).solution.T


# --- SIRT


def test_sirt_s_first_step_is_what_it_says(generator: Generator) -> None:
    A = dense(generator)
    y = random(2, 12, generator=generator)
    M = A.matrix
    R, C = 1 / M.sum(1), 1 / M.sum(0)
    problem = InverseProblem(y, A, GaussianNoise(0.3))
    assert_close(sirt(problem, steps=1), C * ((R * y) @ M))
    assert_close(sirt(problem, steps=1, relaxation=1.5), 1.5 * C * ((R * y) @ M))


@pytest.mark.parametrize("relaxation", [0.7, 1.9])
def test_sirt_finds_the_weighted_least_squares(
    relaxation: float, generator: Generator
) -> None:
    A = dense(generator, 12, 4)
    y = random(2, 12, generator=generator)
    problem = InverseProblem(y, A, GaussianNoise(0.3))
    got = sirt(problem, steps=3000, relaxation=relaxation)
    expected = least_squares(A.matrix, y, 1 / A.matrix.sum(1))
    assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_nonnegative_sirt_is_the_best_of_the_nonnegative(
    generator: Generator,
) -> None:
    from scipy.optimize import nnls

    A = dense(generator, 12, 4)
    y = random(1, 12, generator=generator)
    problem = InverseProblem(y, A, GaussianNoise(0.3))
    assert sirt(problem, steps=10).min() < 0
    got = sirt(problem, steps=5000, nonnegative=True)
    root = (1 / A.matrix.sum(1)).sqrt()
    best, _ = nnls((root[:, None] * A.matrix).numpy(), (root * y[0]).numpy())
    assert_close(got[0], torch.from_numpy(best), rtol=1e-5, atol=1e-5)


def test_sirt_leaves_out_what_no_ray_connects(generator: Generator) -> None:
    matrix = dense(generator).matrix.clone()
    matrix[3], matrix[:, 5] = 0, 0
    y = random(1, 12, generator=generator)
    x = sirt(InverseProblem(y, Dense(matrix), GaussianNoise(0.3)), steps=20)
    assert x.isfinite().all()
    assert float(x[0, 5]) == 0
    other = y.clone()
    other[0, 3] = 99
    again = sirt(InverseProblem(other, Dense(matrix), GaussianNoise(0.3)), steps=20)
    assert torch.equal(x, again)


@pytest.mark.parametrize("relaxation", [0.0, 2.0, -1.0])
def test_sirt_refuses_what_would_diverge(
    relaxation: float, generator: Generator
) -> None:
    problem = InverseProblem(
        random(1, 12, generator=generator), dense(generator), GaussianNoise(1.0)
    )
    with pytest.raises(ValueError, match="relaxation must lie between 0 and 2"):
        sirt(problem, relaxation=relaxation)


def test_sirt_refuses_negative_operators(generator: Generator) -> None:
    A = -0.5 * dense(generator)
    problem = InverseProblem(random(1, 12, generator=generator), A, GaussianNoise(1.0))
    with pytest.raises(ValueError, match="without negative entries"):
        sirt(problem)


# --- CGLS


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_cgls_is_the_best_of_the_krylov_space(steps: int, generator: Generator) -> None:
    """Of span{b, Nb, N²b, …} with N = AᵀWA and b = AᵀWy."""
    A = dense(generator)
    counts = 50 * torch.rand(2, 12, generator=generator, dtype=float64) + 5
    noise = TransmissionNoise(100.0)
    y = (100 / counts).log()
    problem = InverseProblem(y, A, noise)
    weight = noise.precision(y)
    assert isinstance(weight, Tensor)
    got = cgls(problem, steps=steps, discrepancy=0.0)
    for x, data, w in zip(got, y, weight, strict=True):
        M = w.sqrt()[:, None] * A.matrix
        vectors = [M.T @ (w.sqrt() * data)]
        for _ in range(steps - 1):
            vectors.append(M.T @ (M @ vectors[-1] / vectors[-1].norm()))
        basis, _ = torch.linalg.qr(torch.stack(vectors, 1))
        z = torch.linalg.lstsq(M @ basis, (w.sqrt() * data)[:, None]).solution
        assert_close(x, (basis @ z)[:, 0], rtol=1e-6, atol=1e-6)


def test_cgls_finds_the_least_squares(generator: Generator) -> None:
    A = dense(generator)
    y = random(3, 12, generator=generator)
    problem = InverseProblem(y, A, GaussianNoise(0.1))
    got = cgls(problem, steps=30, discrepancy=0.0)
    expected = least_squares(A.matrix, y, torch.ones(12, dtype=float64))
    assert_close(got, expected, rtol=1e-7, atol=1e-7)


def test_cgls_of_consistent_data_is_the_solution_of_least_norm(
    generator: Generator,
) -> None:
    A = dense(generator, 5, 9)
    y = A(random(2, 9, generator=generator))
    got = cgls(InverseProblem(y, A, GaussianNoise(1e-9)), steps=30, discrepancy=0.0)
    assert_close(got, y @ torch.linalg.pinv(A.matrix).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("discrepancy", [1.0, 1.5])
def test_cgls_stops_at_the_first_step_that_fits_the_noise(
    discrepancy: float, generator: Generator
) -> None:
    A, sigma = dense(generator, 40, 30), 0.2
    x = random(3, 30, generator=generator)
    y = A(x) + sigma * random(3, 40, generator=generator)
    problem = InverseProblem(y, A, GaussianNoise(sigma))
    stopped = cgls(problem, steps=30, discrepancy=discrepancy)
    most = discrepancy**2 * 40
    for i in range(3):
        one = problem.items(torch.tensor([i]))
        path = [cgls(one, steps=k, discrepancy=0.0)[0] for k in range(31)]
        misfits = [
            float((A(v[None])[0] - y[i]).square().sum()) / sigma**2 for v in path
        ]
        first = next(k for k, misfit in enumerate(misfits) if misfit <= most)
        assert 0 < first < 30
        assert_close(stopped[i], path[first], rtol=1e-4, atol=1e-5)


def test_cgls_counts_only_measurements_of_some_weight(generator: Generator) -> None:
    from invsolve.samplers.classical import _measurements

    y = random(2, 3, 4, generator=generator)
    problem = InverseProblem(y, Identity(), GaussianNoise(0.5))
    assert _measurements(problem).tolist() == [12, 12]
    complex_y = torch.complex(y, y)
    problem = InverseProblem(complex_y, Identity(), GaussianNoise(0.5))
    assert _measurements(problem).tolist() == [24, 24]


def test_cgls_takes_complex_operators(generator: Generator) -> None:
    matrix = torch.complex(dense(generator).matrix, dense(generator).matrix)
    y = torch.complex(
        random(2, 12, generator=generator), random(2, 12, generator=generator)
    )
    problem = InverseProblem(y, Dense(matrix), GaussianNoise(0.1))
    got = cgls(problem, steps=40, discrepancy=0.0)
    expected = torch.linalg.lstsq(matrix, y.T).solution.T
    assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_cgls_takes_few_steps_where_the_adjoint_is_a_guess(
    generator: Generator,
) -> None:
    A = dense(generator, 40, 30)
    y = random(1, 40, generator=generator)

    def run(operator: Dense, steps: int) -> Tensor:
        problem = InverseProblem(y, operator, GaussianNoise(1.0))
        return cgls(problem, steps=steps, discrepancy=0.0)

    rough = Dense(A.matrix, adjoint_is_exact=False)
    assert torch.equal(run(rough, 29), run(A, 20))
    assert not torch.equal(run(A, 29), run(A, 20))


def test_no_data_give_no_image() -> None:
    problem = InverseProblem(
        torch.zeros(1, 12, dtype=float64), Dense(torch.ones(12, 3).double()),
        GaussianNoise(0.1),
    )  # fmt: skip
    for method in (cgls, sirt):
        assert torch.equal(method(problem), torch.zeros(1, 3, dtype=float64))


# --- laws of both


def test_items_do_not_know_of_each_other(generator: Generator) -> None:
    A = ParallelBeam((8, 8), torch.linspace(0, pi, 7)[:-1])
    y = random(2, 1, *A.measurement_shape, generator=generator)
    y[1] *= 100
    both = InverseProblem(y, A, GaussianNoise(0.3))
    for method in (cgls, sirt):
        singly = [method(both.items(torch.tensor([i])), steps=8) for i in (0, 1)]
        assert_close(method(both, steps=8), torch.cat(singly), rtol=1e-6, atol=1e-6)


def test_they_say_what_they_give_and_wrap_their_loop(generator: Generator) -> None:
    problem = InverseProblem(
        random(1, 12, generator=generator), dense(generator), GaussianNoise(1e-6)
    )
    for method in (cgls, sirt):
        seen: list[int] = []

        def watch(loop: Iterable, seen: list[int] = seen) -> Iterable:
            for i in loop:
                seen.append(i)
                yield i

        method(problem, None, steps=5, generator=generator, progress=watch)
        assert seen == [0, 1, 2, 3, 4]
        assert method.kind == "point_estimate"  # pyright: ignore


# --- total variation of volumes


def test_a_volume_has_three_differences(generator: Generator) -> None:
    x = random(2, 1, 3, 4, 5, generator=generator)
    d = gradient(x)
    assert d.shape == (2, 3, 1, 3, 4, 5)
    assert_close(d[:, 0, :, :-1], x[:, :, 1:] - x[:, :, :-1])
    assert_close(d[:, 1, :, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1])
    assert_close(d[:, 2, ..., :-1], x[..., 1:] - x[..., :-1])
    assert float(d[:, 0, :, -1].abs().max()) == 0
    q = random(2, 3, 1, 3, 4, 5, generator=generator)
    assert_close((d * q).sum(), (x * divergence(q)).sum())
    flat = gradient(x, 0.5)
    assert_close(flat[:, 0], 2 * d[:, 0])
    assert_close(flat[:, 1:], d[:, 1:])
    assert_close((flat * q).sum(), (x * divergence(q, 0.5)).sum())


def test_an_image_has_two(generator: Generator) -> None:
    assert gradient(torch.ones(2, 4, 3, 5)).shape == (2, 2, 4, 3, 5)
    x = random(2, 4, 3, 5, generator=generator)
    assert_close(gradient(x, 0.5), gradient(x))


def objective(
    x: Tensor, problem: InverseProblem, lam: float, aspect: float = 1.0
) -> float:
    d = torch.zeros(3, *x.shape[2:], dtype=float64)
    d[0, :-1] = x[0, 0].diff(dim=0) / aspect
    d[1, :, :-1] = x[0, 0].diff(dim=1)
    d[2, :, :, :-1] = x[0, 0].diff(dim=2)
    return float(problem.misfit(x)) + lam * float(d.norm(dim=0).sum())


@pytest.mark.parametrize(("lam", "aspect"), [(0.5, 1.0), (2.0, 1.0), (0.5, 0.6)])
def test_tv_of_a_volume_is_at_its_minimum(
    lam: float, aspect: float, generator: Generator
) -> None:
    """It satisfies the optimality conditions: AᵀW(y − Ax) = λ ∇ᵀp with ‖p‖ ≤ 1.

    Where ∇x ≠ 0, p = ∇x/‖∇x‖; the rest of p is found by projected gradient descent.
    """
    mask = (torch.rand(3, 4, 4, generator=generator) < 0.7).double()
    y = mask * random(1, 1, 3, 4, 4, generator=generator)
    problem = InverseProblem(y, Mask(mask), GaussianNoise(0.4))
    x = tv(problem, lam=lam, steps=600, aspect=aspect)
    pull = -problem.misfit_grad(x)
    d = gradient(x, aspect)
    length = d.square().sum(1, keepdim=True).sqrt()
    edge = length > 1e-4
    known = torch.where(edge, d / length.clamp_min(1e-9), 0)
    assert bool(edge.any())
    p = known
    for _ in range(4000):
        slope = gradient(divergence(p, aspect) - pull / lam, aspect)
        p = p - slope * aspect**2 / 12
        p = p / p.square().sum(1, keepdim=True).sqrt().clamp_min(1)
        p = torch.where(edge, known, p)
    assert_close(lam * divergence(p, aspect), pull, rtol=0, atol=0.02 * lam)
    least = objective(x, problem, lam, aspect)
    for _ in range(10):
        step = random(*x.shape, generator=generator)
        for size in (1e-3, 1e-1):
            other = x + size * step / step.norm()
            assert objective(other, problem, lam, aspect) >= least * (1 - 1e-7)


def test_tv_refuses_voxels_without_a_height() -> None:
    problem = InverseProblem(
        torch.ones(1, 1, 2, 2, 2), Mask(torch.ones(2, 2, 2)), GaussianNoise(1.0)
    )
    with pytest.raises(ValueError, match="aspect must be > 0, got 0"):
        tv(problem, aspect=0.0)


def test_a_volume_s_slices_are_smoothed_together() -> None:
    """Two slices, one voxel each: they move to each other by λσ²."""
    y = torch.tensor([1.0, 4.0], dtype=float64).reshape(1, 1, 2, 1, 1)
    x = tv(InverseProblem(y, Identity(), GaussianNoise(0.5)), lam=2.0, steps=100)
    expected = torch.tensor([1.5, 3.5], dtype=float64).reshape(1, 1, 2, 1, 1)
    assert_close(x, expected, rtol=1e-5, atol=1e-5)


# --- filtered back-projection of any beam

ANGLES = torch.arange(90) * (2 * pi / 90)
BEAMS = {
    "parallel": ParallelBeam((24, 24), ANGLES),
    "fan": FanBeam((24, 24), ANGLES, 60.0, 100.0),
    "curved fan": FanBeam((24, 24), ANGLES, 60.0, 100.0, curved=True, offset_mm=0.4),
    "short fan": FanBeam((24, 24), torch.arange(100) * 0.045, 60.0, 100.0),
    "cone": ConeBeam((9, 24, 24), ANGLES, 60.0, 100.0, offset_mm=(0.3, -0.2)),
    "curved cone": ConeBeam((9, 24, 24), ANGLES, 60.0, 100.0, curved=True),
}


@pytest.mark.parametrize("A", BEAMS.values(), ids=BEAMS.keys())
def test_fbp_undoes_the_operator(A: ParallelBeam | FanBeam | ConeBeam) -> None:
    """Of a smooth blob off the centre, in its own unit."""
    along = torch.arange(24, dtype=float64) - 11.5
    blob = 0.02 * torch.exp(-((along - 3) ** 2 + (along[:, None] - 2) ** 2) / 18)
    x = blob.expand(1, 1, *A.image_shape).clone()
    if len(A.image_shape) == 3:
        z = torch.arange(9, dtype=float64) - 4
        x = x * torch.exp(-((z - 0.5) ** 2) / 5)[:, None, None]
    noise = GaussianNoise(1e-3)
    y = A(x)
    got = fbp(InverseProblem(y, A, noise), window="ram-lak")
    # Interpolating along z as well blurs the blob a little more.
    allowed = 0.08 if x.ndim == 5 else 0.04
    assert float((got - x).abs().max()) < allowed * 0.02
    assert float(got.sum()) == pytest.approx(float(x.sum()), rel=0.01)
    scaled = InverseProblem(3.0 * y, 3.0 * A, noise)
    assert_close(fbp(scaled, window="ram-lak"), got)


def test_fbp_refuses_a_helix_and_what_is_no_beam() -> None:
    A = ConeBeam((3, 8, 8), ANGLES, 60.0, 100.0, pitch_mm=2.0)
    y = torch.zeros(1, 1, *A.measurement_shape)
    with pytest.raises(ValueError, match="circular scan"):
        fbp(InverseProblem(y, A, GaussianNoise(0.1)))
    with pytest.raises(ValueError, match="FanBeam or a ConeBeam"):
        fbp(InverseProblem(torch.ones(1, 1, 4, 4), Identity(), GaussianNoise(0.1)))
