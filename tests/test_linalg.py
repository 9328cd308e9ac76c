"""Conjugate gradients and power iteration against dense linear algebra."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve.linalg import cg, dot, largest_eigenvalue
from invsolve.shapes import per_item

N = 12
KINDS = [torch.float64, torch.complex128]


def randn(*shape: int, g: Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=g)


def hermitian(eigenvalues: Tensor, g: Generator, dtype: torch.dtype) -> Tensor:
    """Q diag(λ) Qᴴ with a random unitary Q."""
    n = len(eigenvalues)
    Q = torch.linalg.qr(randn(n, n, g=g, dtype=dtype)).Q
    return (Q * eigenvalues) @ Q.mH


def times(M: Tensor) -> Callable[[Tensor], Tensor]:
    """x ↦ M x for a batch of vectors, or M_i x_i."""
    return lambda x: (M @ x[..., None])[..., 0]


def test_rounding_beside_a_null_space_does_not_grow(generator: Generator) -> None:
    # A mask in Fourier space is a projection: two steps solve it, and all that the
    # further ones see is rounding, part of which no step can reach.
    seen = (torch.rand(32, 32, generator=generator) < 0.3).float()

    def project(x: Tensor) -> Tensor:
        return torch.fft.ifft2(seen * torch.fft.fft2(x)).real

    b = project(torch.randn(2, 32, 32, generator=generator))
    short = cg(project, b, torch.zeros_like(b), max_steps=10, rtol=1e-4)
    long = cg(project, b, torch.zeros_like(b), max_steps=50, rtol=0.0)
    assert_close(long, short, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
class TestConjugateGradients:
    def test_it_solves(self, dtype: torch.dtype, generator: Generator) -> None:
        M = hermitian(torch.linspace(1, 50, N).double(), generator, dtype)
        b, x = randn(2, 3, N, g=generator, dtype=dtype)
        got = cg(times(M), b, x, max_steps=100, rtol=1e-12)
        assert_close(got, torch.linalg.solve(M, b.T).T, rtol=1e-9, atol=1e-9)

    def test_it_is_exact_after_as_many_steps_as_eigenvalues(
        self, dtype: torch.dtype, generator: Generator
    ) -> None:
        M = hermitian(torch.tensor([1.0, 2, 5]).double().repeat(4), generator, dtype)
        b = randn(3, N, g=generator, dtype=dtype)
        zero = torch.zeros_like(b)
        exact = torch.linalg.solve(M, b.T).T
        assert_close(cg(times(M), b, zero, max_steps=3, rtol=0.0), exact)
        two = cg(times(M), b, zero, max_steps=2, rtol=0.0)
        assert float((two - exact).norm() / exact.norm()) > 1e-3

    def test_from_zero_no_application_is_spent_on_the_residual(
        self, dtype: torch.dtype, generator: Generator
    ) -> None:
        M = hermitian(torch.linspace(1, 50, N).double(), generator, dtype)
        b = randn(3, N, g=generator, dtype=dtype)
        calls = []

        def counted(x: Tensor) -> Tensor:
            calls.append(x)
            return times(M)(x)

        none = cg(counted, b, None, max_steps=4, rtol=0.0)
        assert len(calls) == 4
        zero = cg(counted, b, torch.zeros_like(b), max_steps=4, rtol=0.0)
        assert len(calls) == 9
        assert_close(none, zero, rtol=0, atol=0)

    def test_more_steps_than_needed_do_no_harm(
        self, dtype: torch.dtype, generator: Generator
    ) -> None:
        M = hermitian(torch.linspace(1, 5, N).double(), generator, dtype)
        b = randn(3, N, g=generator, dtype=dtype)
        got = cg(times(M), b, torch.zeros_like(b), max_steps=500, rtol=0.0)
        assert_close(got, torch.linalg.solve(M, b.T).T)

    def test_singular_but_consistent_gives_the_least_norm(
        self, dtype: torch.dtype, generator: Generator
    ) -> None:
        eigenvalues = torch.linspace(1, 3, N).double()
        eigenvalues[:5] = 0
        M = hermitian(eigenvalues, generator, dtype)
        b = times(M)(randn(3, N, g=generator, dtype=dtype))
        got = cg(times(M), b, torch.zeros_like(b), max_steps=100, rtol=1e-12)
        expected = b @ torch.linalg.pinv(M, rtol=1e-9, hermitian=True).T
        assert_close(got, expected, rtol=1e-8, atol=1e-8)

    def test_items_are_independent(
        self, dtype: torch.dtype, generator: Generator
    ) -> None:
        easy = torch.ones(N).double()
        hard = torch.logspace(0, 3, N).double()
        M = torch.stack([hermitian(e, generator, dtype) for e in (easy, hard, easy)])
        b, x = randn(2, 3, N, g=generator, dtype=dtype)
        b[2] = 0
        for steps in (1, 5, 100):
            batch = cg(times(M), b, x, max_steps=steps, rtol=1e-6)
            for i in range(3):
                one = slice(i, i + 1)
                single = cg(times(M[one]), b[one], x[one], max_steps=steps, rtol=1e-6)
                assert_close(batch[one], single, rtol=1e-12, atol=1e-12)

    def test_it_stops_at_rtol(self, dtype: torch.dtype, generator: Generator) -> None:
        M = hermitian(torch.logspace(0, 3, N).double(), generator, dtype)
        b = randn(3, N, g=generator, dtype=dtype)
        calls = 0

        def counted(x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return times(M)(x)

        x = cg(counted, b, torch.zeros_like(b), max_steps=100, rtol=1e-2)
        loose, calls = calls, 0
        assert (times(M)(x) - b).norm(dim=1).le(1e-2 * b.norm(dim=1)).all()
        cg(counted, b, torch.zeros_like(b), max_steps=100, rtol=1e-8)
        assert loose < calls
        calls = 0
        assert torch.equal(cg(counted, b, x, max_steps=0, rtol=0.0), x)
        assert torch.equal(cg(counted, times(M)(x), x, max_steps=9, rtol=1e-6), x)
        assert calls == 2

    def test_the_largest_eigenvalue(
        self, dtype: torch.dtype, generator: Generator
    ) -> None:
        M = hermitian(torch.linspace(0, 7, N).double(), generator, dtype)
        x = randn(1, N, g=generator, dtype=dtype)
        got = largest_eigenvalue(times(M), x, max_steps=1000, rtol=1e-12)
        assert float(got) == pytest.approx(7, rel=1e-8)
        few = [
            float(largest_eigenvalue(times(M), x, max_steps=n, rtol=0.0))
            for n in range(1, 9)
        ]
        assert few == sorted(few)
        assert few[-1] < 7

    def test_the_inner_product_is_real(
        self, dtype: torch.dtype, generator: Generator
    ) -> None:
        a, b = randn(2, 3, 4, 5, g=generator, dtype=dtype)
        parts = (a.real * b.real).sum((1, 2))
        if dtype.is_complex:
            parts = parts + (a.imag * b.imag).sum((1, 2))
        assert not dot(a, b).is_complex()
        assert_close(dot(a, b), parts)
        assert_close(dot(a, a), a.abs().square().sum((1, 2)))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_a_system_of_large_or_small_numbers_is_solved(scale: float) -> None:
    # As of whitened weights in a small unit; squares of its products overflow float32.
    b = scale * torch.ones(1, 100)
    x = cg(lambda v: scale * v, b, None, max_steps=10, rtol=1e-6)
    torch.testing.assert_close(x, torch.ones(1, 100))


def test_nothing_has_the_eigenvalue_zero() -> None:
    x = torch.ones(1, N, dtype=torch.float64)
    assert largest_eigenvalue(torch.zeros_like, x, max_steps=10, rtol=1e-6) == 0
    assert largest_eigenvalue(lambda x: x, 0 * x, max_steps=10, rtol=1e-6) == 0


def test_one_value_for_each_item() -> None:
    x = torch.ones(2, 3, 4)
    scaled = per_item(torch.tensor([1.0, 2.0]), x) * x
    assert torch.equal(scaled[1], 2 * x[1])
    assert torch.equal(scaled[0], x[0])
    scalar = torch.tensor(3.0)
    assert per_item(scalar, x) is scalar
