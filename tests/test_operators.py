"""The laws that every linear operator obeys."""

import pickle
from collections.abc import Callable
from typing import TypedDict

import pytest
import torch
from cases import LINEAR, Case, H, W, blur, float64, weights
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import operators as ops
from invsolve.operators import LinearOperator
from invsolve.shapes import per_item


class Steps(TypedDict):
    max_steps: int
    rtol: float


@pytest.fixture(params=LINEAR.values(), ids=list(LINEAR))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def A(case: Case, generator: Generator) -> LinearOperator:
    return case.make(generator, float64)


@pytest.fixture
def x(case: Case, generator: Generator) -> Tensor:
    return case.image(generator)


@pytest.fixture
def y(A: LinearOperator, x: Tensor, generator: Generator) -> Tensor:
    Ax = A(x)
    return torch.randn(Ax.shape, dtype=Ax.dtype, generator=generator)


def real(t: Tensor) -> Tensor:
    """A batch as real vectors: ℂⁿ is ℝ²ⁿ."""
    return (torch.view_as_real(t) if t.is_complex() else t).flatten(1)


def unreal(r: Tensor, like: Tensor) -> Tensor:
    if not like.is_complex():
        return r.reshape(-1, *like.shape[1:])
    return torch.view_as_complex(r.reshape(-1, *like.shape[1:], 2).contiguous())


def dense(A: LinearOperator, like: Tensor) -> Tensor:
    """A's matrix over the reals: its columns are the images of the unit vectors."""
    basis = torch.eye(real(like).shape[1], dtype=float64)
    return real(A.apply(unreal(basis, like))).T


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (float64, 1e-10)], ids=str
)
def test_adjoint(
    case: Case, dtype: torch.dtype, bound: float, generator: Generator
) -> None:
    A, x = case.make(generator, dtype), case.image(generator, dtype)
    Ax = A(x)
    y = torch.randn(Ax.shape, dtype=Ax.dtype, generator=generator)
    assert Ax.real.dtype == A.adjoint(y).real.dtype == dtype
    assert ops.dottest(A, x, y) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, float64], ids=str)
@pytest.mark.parametrize("of_parameters", [torch.float32, float64], ids=str)
def test_precision_follows_the_image(
    case: Case, dtype: torch.dtype, of_parameters: torch.dtype, generator: Generator
) -> None:
    A, x = case.make(generator, of_parameters), case.image(generator, dtype)
    y = A(x)
    z = A.prox(x, y, 0.5)
    for t in (y, z, A.adjoint(y), A.normal(x), A.pinv(y, max_steps=2)):
        assert t.real.dtype == dtype


def test_dottest_finds_a_wrong_adjoint(generator: Generator) -> None:
    class Wrong(LinearOperator):
        def apply(self, x: Tensor) -> Tensor:
            return x.roll(1, -1)

        def adjoint(self, y: Tensor) -> Tensor:
            return y.roll(1, -1)

    x, y = torch.randn(2, 3, 1, H, W, generator=generator)
    assert ops.dottest(Wrong(), x, y) > 1e-2


def test_linear(A: LinearOperator, x: Tensor, y: Tensor) -> None:
    z = x.flip(0)
    assert_close(A(2 * x - z), 2 * A(x) - A(z))
    assert_close(A.adjoint(2 * y - y.flip(0)), 2 * A.adjoint(y) - A.adjoint(y).flip(0))


def test_call_is_apply(A: LinearOperator, x: Tensor) -> None:
    assert torch.equal(A(x), A.apply(x))


def test_vjp_is_autograd(A: LinearOperator, x: Tensor, y: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(A.apply(leaf), leaf, y)
    assert_close(A.vjp(x, y), grad)


def test_adjoint_is_differentiable(A: LinearOperator, x: Tensor, y: Tensor) -> None:
    leaf = y.clone().requires_grad_()
    (grad,) = torch.autograd.grad(A.adjoint(leaf), leaf, x)
    assert_close(grad, A.apply(x))


def test_normal_is_apply_then_adjoint(A: LinearOperator, x: Tensor) -> None:
    assert_close(A.normal(x), A.adjoint(A.apply(x)))


def test_pinv_is_the_dense_pseudo_inverse(
    A: LinearOperator, x: Tensor, y: Tensor
) -> None:
    expected = real(y) @ torch.linalg.pinv(dense(A, x), rtol=1e-8).T
    got = real(A.pinv(y, max_steps=5000, rtol=1e-12))
    assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_pinv_gives_the_measurements_again(A: LinearOperator, x: Tensor) -> None:
    y = A(x)
    again = A(A.pinv(y, max_steps=5000, rtol=1e-12))
    assert_close(again, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rho", [0.7, torch.tensor([0.1, 1.0, 10.0])], ids=type)
def test_prox_is_the_minimiser(
    A: LinearOperator, x: Tensor, y: Tensor, rho: float | Tensor
) -> None:
    v = x
    rho = per_item(rho.double(), x) if isinstance(rho, Tensor) else rho
    x = A.prox(v, y, rho, max_steps=1000, rtol=1e-13)
    gradient = A.adjoint(A(x) - y) + rho * (x - v)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)

    M, eye = dense(A, v), torch.eye(real(v).shape[1], dtype=float64)
    r = torch.as_tensor(rho, dtype=float64).flatten()[:, None].expand(len(v), 1)
    b = real(y) @ M + r * real(v)
    expected = torch.linalg.solve(M.T @ M + r[..., None] * eye, b)
    assert_close(real(x), expected, rtol=1e-8, atol=1e-8)


def test_the_default_steps_of_prox_are_enough(
    A: LinearOperator, x: Tensor, y: Tensor
) -> None:
    exact = A.prox(x, y, 0.7, max_steps=1000, rtol=1e-13)
    assert_close(A.prox(x, y, 0.7), exact, rtol=1e-4, atol=1e-4)


def test_closed_forms_are_the_general_solution(
    A: LinearOperator, x: Tensor, y: Tensor
) -> None:
    class General(LinearOperator):
        """A with nothing known of it but its two directions."""

        def apply(self, x: Tensor) -> Tensor:
            return A.apply(x)

        def adjoint(self, y: Tensor) -> Tensor:
            return A.adjoint(y)

    def near(a: Tensor, b: Tensor) -> None:
        assert_close(a, b, rtol=1e-6, atol=1e-6)

    general, steps = General(), Steps(max_steps=5000, rtol=1e-12)
    near(A.prox(x, y, 0.3, **steps), general.prox(x, y, 0.3, **steps))
    near(A.pinv(y, **steps), general.pinv(y, **steps))
    assert A.norm(x, **steps) == pytest.approx(general.norm(x, **steps), rel=1e-6)


def test_norm_is_the_largest_singular_value(A: LinearOperator, x: Tensor) -> None:
    largest = float(torch.linalg.svdvals(dense(A, x)).max())
    assert A.norm(x, max_steps=5000, rtol=1e-12) == pytest.approx(largest, rel=1e-6)
    assert A.norm(x) == pytest.approx(largest, rel=5e-3)


def test_norm_makes_an_image_of_its_own(A: LinearOperator, x: Tensor) -> None:
    iterates = type(A).norm is LinearOperator.norm and not A.is_unitary
    if iterates and not A.image_shape:
        with pytest.raises(ValueError, match="give norm an image"):
            A.norm()
    else:
        assert A.norm() == pytest.approx(A.norm(x), rel=2e-2)


def test_unitary_operators_are_unitary(A: LinearOperator, x: Tensor) -> None:
    M = dense(A, x)
    square = M.shape[0] == M.shape[1]
    unitary = square and torch.allclose(M.T @ M, torch.eye(len(M), dtype=float64))
    assert A.is_unitary == unitary


def test_layout_in_memory_changes_nothing(
    A: LinearOperator, x: Tensor, y: Tensor
) -> None:
    def strided(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    assert not strided(x).is_contiguous()
    assert_close(A(strided(x)), A(x))
    assert_close(A.adjoint(strided(y)), A.adjoint(y))


def test_a_batch_of_two_is_two_singles(A: LinearOperator, x: Tensor, y: Tensor) -> None:
    def each(f: Callable[[Tensor, Tensor], Tensor]) -> None:
        singles = [f(x[i : i + 1], y[i : i + 1]) for i in range(2)]
        assert_close(f(x[:2], y[:2]), torch.cat(singles))

    each(lambda x, y: A(x))
    each(lambda x, y: A.adjoint(y))
    # To rounding: at a looser tolerance the last bit, which differs between machines,
    # may decide on one step of conjugate gradients more.
    each(lambda x, y: A.prox(x, y, 0.7, rtol=0.0))
    each(lambda x, y: A.pinv(y, max_steps=5, rtol=0.0))


def test_moving_to_a_device_changes_nothing(A: LinearOperator, x: Tensor) -> None:
    moved = A.to(torch.device("cpu"))
    assert type(moved) is type(A)
    assert torch.equal(moved(x), A(x))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same(A: LinearOperator, x: Tensor, y: Tensor) -> None:
    cuda = torch.device("cuda")
    there = A.to(cuda)
    assert_close(there(x.to(cuda)).cpu(), A(x))
    assert_close(there.adjoint(y.to(cuda)).cpu(), A.adjoint(y))


def test_pickling_changes_nothing(A: LinearOperator, x: Tensor) -> None:
    assert torch.equal(pickle.loads(pickle.dumps(A))(x), A(x))


def test_repr_names_the_operator(A: LinearOperator) -> None:
    assert repr(A).startswith(f"{type(A).__name__}(")


def test_fields_are_frozen(A: LinearOperator) -> None:
    with pytest.raises(AttributeError):
        A.anything = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "name", [name for name, case in LINEAR.items() if not case.any_shape]
)
def test_wrong_shapes_are_refused_in_one_line(name: str, generator: Generator) -> None:
    case = LINEAR[name]
    A, x = case.make(generator, float64), case.image(generator)
    y = A(x)
    A.check_image(x)
    A.check_measurements(y)
    for wrong in (x[..., :-1], x[..., :-1, :], x[0, 0]):
        with pytest.raises(ValueError, match="expects an image of shape") as error:
            A(wrong)
        assert "\n" not in str(error.value)
    for wrong in (y[..., :-1], y[..., :-1, :], y[0, 0]):
        with pytest.raises(ValueError, match="expects measurements of shape") as error:
            A.check_measurements(wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", [k for k, case in LINEAR.items() if case.complex_image and "blur" not in k]
)
def test_real_images_are_refused_where_complex_ones_are_measured(
    name: str, generator: Generator
) -> None:
    case = LINEAR[name]
    A, x = case.make(generator, float64), case.image(generator)
    with pytest.raises(ValueError, match=r"A @ RealImage\(\)"):
        A(x.real)


@pytest.mark.parametrize("make", [lambda x: x + 0j, Tensor.int])
def test_attenuation_is_real(make: Callable[[Tensor], Tensor]) -> None:
    A = ops.ParallelBeam((4, 4), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="attenuation is real"):
        A.check_image(make(torch.ones(1, 1, 4, 4)))
    with pytest.raises(ValueError, match="attenuation is real"):
        A.check_measurements(make(torch.ones(1, 1, 2, A.detectors)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_complex_image_is_two_channels(channels: int) -> None:
    with pytest.raises(ValueError, match=f"two channels, got {channels}"):
        ops.ComplexChannels()(torch.ones(2, channels, H, W))


def test_composition_is_application_in_turn(generator: Generator) -> None:
    x = torch.randn(2, 1, H, W, dtype=float64, generator=generator)
    B, M = blur(generator, float64), weights(generator, float64)
    assert torch.equal((M @ B)(x), M(B(x)))
    assert torch.equal((-3.0 * B)(x), -3.0 * B(x))


def test_scaling_by_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="scaled by 0 measures nothing"):
        ops.Scaled(0.0, ops.Identity())


def test_a_nonlinear_operator_pulls_back_by_autodiff(generator: Generator) -> None:
    class Square(ops.Operator):
        def apply(self, x: Tensor) -> Tensor:
            return x**2

    x, v = torch.randn(2, 3, 1, H, W, dtype=float64, generator=generator)
    A = Square()
    assert_close(A.vjp(x, v), 2 * x * v)
    assert A.to(torch.device("cpu")) is A
    assert torch.equal(A(x), x**2)
