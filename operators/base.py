"""What every forward operator can do, and how operators combine."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar, final, overload

import torch
from torch import Generator, Tensor

from invsolve.linalg import cg, dot, largest_eigenvalue
from invsolve.random import randn_like
from invsolve.shapes import X, Y

Same = TypeVar("Same", bound="Operator")

INEXACT_STEPS = 20
"""Conjugate gradients with a mismatched adjoint drift away after about so many steps."""


class Operator(ABC):
    """A forward map A: X → Y, the same for every item of the batch unless it says so.

    Images are (batch, channels, *space), measurements (batch, …). Operators are frozen
    values: their fields are their parameters, and nothing changes them.
    """

    not_linear: ClassVar[str] = "the problem's is not"
    """What is told where a linear one is needed."""

    @abstractmethod
    def apply(self, x: X) -> Y:
        """A(x)."""

    def __call__(self, x: X) -> Y:
        self.check_image(x)
        return self.apply(x)

    def vjp(self, x: X, v: Y) -> X:
        """J_A(x)ᴴ v, the pull-back of v; by autodiff unless a subclass knows better."""
        return autodiff(self.apply, x)[1](v)

    def pullback(self, x: X) -> tuple[Y, Callable[[Y], X]]:
        """A(x), and v ↦ J_A(x)ᴴ v.

        A subclass whose pull-back needs what A(x) has computed does both in one pass.
        """
        return self.apply(x), partial(self.vjp, x)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The trailing dimensions that an image must have; empty if any will do."""
        return ()

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        """The trailing dimensions that measurements must have; empty if any will do."""
        return ()

    def image_like(self, y: Y) -> X:
        """Zeros of the images' shape, where y are their measurements.

        Channel by channel as y; an operator that takes any shape keeps it.
        """
        if not self.image_shape:
            return torch.zeros_like(y)
        kept = y.ndim - len(self.measurement_shape or self.image_shape)
        return y.new_zeros(*y.shape[:kept], *self.image_shape)

    def guess(self, y: Y) -> X:
        """An image to begin a descent from; zeros unless a subclass knows better."""
        return self.image_like(y)

    def check_image(self, x: Tensor) -> None:
        """Refuse, with a ValueError that says why, what cannot be measured."""
        _check(x, self.image_shape, "an image", type(self).__name__)

    def check_measurements(self, y: Tensor) -> None:
        """Refuse, with a ValueError that says why, what cannot have been measured."""
        _check(y, self.measurement_shape, "measurements", type(self).__name__)

    def items(self: Same, index: Tensor, ndim: int) -> Same:
        """The operator of some of the batch's items; itself, where it is one for all.

        Here: of the operators that it is made of. One that has parameters for each item
        knows better.

        Args:
            index: of the items; one may be named repeatedly.
            ndim: how many dimensions measurements have, the batch among them.
        """
        if not is_dataclass(self):
            return self
        parts = {
            f.name: (part, part.items(index, ndim))
            for f in fields(self)
            if f.init and isinstance(part := getattr(self, f.name), Operator)
        }
        changed = {k: some for k, (all_, some) in parts.items() if some is not all_}
        return replace(self, **changed) if changed else self

    def to(self: Same, device: torch.device) -> Same:
        """The same operator with its tensors on a device."""
        if not is_dataclass(self):
            return self
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if f.init and isinstance(value := getattr(self, f.name), Tensor | Operator)
        }
        return replace(self, **moved)

    def __matmul__(self, inner: "Operator") -> "Operator":
        return Chain(self, inner)


def autodiff(f: Callable[[X], Y], x: X) -> tuple[Y, Callable[[Y], X]]:
    """f(x), and v ↦ J_f(x)ᴴ v, by autodiff in one pass."""
    y, pull, *_ = torch.func.vjp(f, x)
    return y, lambda v: pull(v)[0]


class LinearOperator(Operator):
    """A linear map with its exact adjoint: Re⟨A x, y⟩ = Re⟨x, Aᴴ y⟩."""

    is_unitary: ClassVar[bool] = False
    """Whether AᴴA = AAᴴ = I, which gives compositions their closed forms."""

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        if self.takes_complex and not x.is_complex():
            raise ValueError(
                f"{type(self).__name__} takes complex images, got {x.dtype}: write "
                "A @ RealImage(), or A @ ComplexChannels() for two channels"
            )

    @property
    def adjoint_is_exact(self) -> bool:
        """Whether ``adjoint`` is Aᴴ to rounding; else inner iterations are kept few."""
        return True

    @property
    def image_channels(self) -> int:
        """How many channels an image must have; 1 if any number will do."""
        return 1

    @property
    def takes_complex(self) -> bool:
        """Whether images must be complex."""
        return False

    @property
    def makes_complex(self) -> bool:
        """Whether measurements are complex though images are real."""
        return False

    @abstractmethod
    def adjoint(self, y: Y) -> X:
        """Aᴴ y."""

    def normal(self, x: X) -> X:
        """AᴴA x."""
        return self.adjoint(self.apply(x))

    def vjp(self, x: X, v: Y) -> X:
        """Aᴴ v, wherever x is."""
        return self.adjoint(v)

    def image_like(self, y: Y) -> X:
        return torch.zeros_like(self.adjoint(y))

    def guess(self, y: Y) -> X:
        """A⁺y."""
        return self.pinv(y)

    def pinv(self, y: Y, *, max_steps: int = 100, rtol: float = 1e-6) -> X:
        """A⁺y, the least-squares solution of least norm.

        In closed form where there is one; else by conjugate gradients on AᴴA x = Aᴴy
        from x = 0, so that x stays in the range of Aᴴ.
        """
        b = self.adjoint(y)
        if self.is_unitary:
            return b
        max_steps = self._steps(max_steps)
        return cg(self.normal, b, None, max_steps=max_steps, rtol=rtol)

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 50,
        rtol: float = 1e-6,
    ) -> X:
        """argmin_x ½‖Ax − y‖² + ρ/2 ‖x − v‖².

        In closed form where there is one; else by conjugate gradients on
        (AᴴA + ρ) x = Aᴴy + ρ v from x = v.
        """
        b = self.adjoint(y) + rho * v
        if self.is_unitary:
            return b / (1 + rho)
        max_steps = self._steps(max_steps)
        return cg(
            lambda x: self.normal(x) + rho * x, b, v, max_steps=max_steps, rtol=rtol
        )

    def _steps(self, most: int) -> int:
        return most if self.adjoint_is_exact else min(most, INEXACT_STEPS)

    def _an_image(self) -> X:
        shape = self.image_shape
        if not shape:
            raise ValueError(
                f"{type(self).__name__} takes images of any shape: give norm an image"
            )
        if len(shape) == 2:
            shape = (self.image_channels, *shape)
        dtype = torch.complex64 if self.takes_complex else torch.float32
        device = next((t.device for t in tensors(self)), torch.device("cpu"))
        return torch.zeros(1, *shape, dtype=dtype, device=device)

    def norm(
        self, like: X | None = None, *, max_steps: int = 200, rtol: float = 1e-5
    ) -> float:
        """‖A‖, the largest singular value; by power iteration unless it is known.

        Args:
            like: any image the operator takes: its shape, dtype and device are used. It
                may be left out where ``image_shape`` or a closed form tells enough.
            max_steps: of the power iteration, which approaches from below.
            rtol: stop when a step changes it by less.
        """
        if self.is_unitary:
            return 1.0
        like = self._an_image() if like is None else like
        start = randn_like(like[:1], Generator().manual_seed(0))
        if self.items(torch.tensor([0]), like.ndim) is not self:
            start = start.expand_as(like)  # the largest of all items'
        value = largest_eigenvalue(self.normal, start, max_steps=max_steps, rtol=rtol)
        return float(value) ** 0.5

    @overload
    def __matmul__(self, inner: "LinearOperator") -> "Compose": ...
    @overload
    def __matmul__(self, inner: Operator) -> Operator: ...
    def __matmul__(self, inner: Operator) -> Operator:
        if isinstance(inner, LinearOperator):
            return Compose(self, inner)
        return Chain(self, inner)

    def __rmul__(self, factor: float) -> "Scaled":
        return Scaled(factor, self)


@final
@dataclass(frozen=True, eq=False)
class Identity(LinearOperator):
    """y = x: denoising."""

    is_unitary: ClassVar[bool] = True

    def apply(self, x: X) -> Y:
        return x

    def adjoint(self, y: Y) -> X:
        return y


class Around(LinearOperator):
    """An operator around another, of images and measurements like that one's."""

    inner: LinearOperator

    @property
    def adjoint_is_exact(self) -> bool:
        return self.inner.adjoint_is_exact

    @property
    def image_channels(self) -> int:
        return self.inner.image_channels

    @property
    def takes_complex(self) -> bool:
        return self.inner.takes_complex

    @property
    def makes_complex(self) -> bool:
        return self.inner.makes_complex

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.inner.image_shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.inner.measurement_shape


@final
@dataclass(frozen=True, eq=False)
class Scaled(Around):
    """c A, written ``c * A``."""

    factor: float
    inner: LinearOperator

    def __post_init__(self) -> None:
        if self.factor == 0:
            raise ValueError("an operator scaled by 0 measures nothing")

    def apply(self, x: X) -> Y:
        return self.factor * self.inner.apply(x)

    def adjoint(self, y: Y) -> X:
        return self.factor * self.inner.adjoint(y)

    def normal(self, x: X) -> X:
        return self.factor**2 * self.inner.normal(x)

    def pinv(self, y: Y, *, max_steps: int = 100, rtol: float = 1e-6) -> X:
        x = self.inner.pinv(y, max_steps=max_steps, rtol=rtol)
        return x / self.factor

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 50,
        rtol: float = 1e-6,
    ) -> X:
        c = self.factor
        return self.inner.prox(v, y / c, rho / c**2, max_steps=max_steps, rtol=rtol)

    def norm(
        self, like: X | None = None, *, max_steps: int = 200, rtol: float = 1e-5
    ) -> float:
        return abs(self.factor) * self.inner.norm(like, max_steps=max_steps, rtol=rtol)


@final
@dataclass(frozen=True, eq=False)
class Compose(LinearOperator):
    """A = outer ∘ inner, written ``outer @ inner``.

    An operator that takes any shape keeps it, so that the other's shape holds for both.
    """

    outer: LinearOperator
    inner: LinearOperator

    def apply(self, x: X) -> Y:
        return self.outer.apply(self.inner.apply(x))

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        self.inner.check_image(x)

    def check_measurements(self, y: Tensor) -> None:
        super().check_measurements(y)
        self.outer.check_measurements(y)

    def adjoint(self, y: Y) -> X:
        return self.inner.adjoint(self.outer.adjoint(y))

    def normal(self, x: X) -> X:
        return self.inner.adjoint(self.outer.normal(self.inner.apply(x)))

    def pinv(self, y: Y, *, max_steps: int = 100, rtol: float = 1e-6) -> X:
        if self.inner.is_unitary:
            outer = self.outer.pinv(y, max_steps=max_steps, rtol=rtol)
            return self.inner.adjoint(outer)
        if self.outer.is_unitary:
            z = self.outer.adjoint(y)
            return self.inner.pinv(z, max_steps=max_steps, rtol=rtol)
        return super().pinv(y, max_steps=max_steps, rtol=rtol)

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 50,
        rtol: float = 1e-6,
    ) -> X:
        if self.inner.is_unitary:
            u = self.inner.apply(v)
            z = self.outer.prox(u, y, rho, max_steps=max_steps, rtol=rtol)
            return self.inner.adjoint(z)
        if self.outer.is_unitary:
            z = self.outer.adjoint(y)
            return self.inner.prox(v, z, rho, max_steps=max_steps, rtol=rtol)
        return super().prox(v, y, rho, max_steps=max_steps, rtol=rtol)

    @property
    def is_unitary(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.outer.is_unitary and self.inner.is_unitary

    @property
    def adjoint_is_exact(self) -> bool:
        return self.outer.adjoint_is_exact and self.inner.adjoint_is_exact

    @property
    def image_channels(self) -> int:
        return (
            self.inner.image_channels
            if self.inner.image_channels > 1
            else self.outer.image_channels
        )

    @property
    def takes_complex(self) -> bool:
        passed = self.outer.takes_complex and not self.inner.makes_complex
        return self.inner.takes_complex or passed

    @property
    def makes_complex(self) -> bool:
        return self.inner.makes_complex or self.outer.makes_complex

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.inner.image_shape or self.outer.image_shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.outer.measurement_shape or self.inner.measurement_shape


@final
@dataclass(frozen=True, eq=False)
class Chain(Operator):
    """A = outer ∘ inner where not both are linear, written ``outer @ inner``.

    J_A(x)ᴴ v = J_inner(x)ᴴ J_outer(z)ᴴ v with z = inner(x). As in `Compose`, an operator
    that takes any shape keeps it.
    """

    outer: Operator
    inner: Operator

    def apply(self, x: X) -> Y:
        return self.outer.apply(self.inner.apply(x))

    def vjp(self, x: X, v: Y) -> X:
        z, pull = self.inner.pullback(x)
        return pull(self.outer.vjp(z, v))

    def pullback(self, x: X) -> tuple[Y, Callable[[Y], X]]:
        z, pull = self.inner.pullback(x)
        y, pull_outer = self.outer.pullback(z)
        return y, lambda v: pull(pull_outer(v))

    def image_like(self, y: Y) -> X:
        return self.inner.image_like(self.outer.image_like(y))

    def guess(self, y: Y) -> X:
        return self.inner.guess(self.outer.guess(y))

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        self.inner.check_image(x)

    def check_measurements(self, y: Tensor) -> None:
        super().check_measurements(y)
        self.outer.check_measurements(y)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.inner.image_shape or self.outer.image_shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.outer.measurement_shape or self.inner.measurement_shape


@final
@dataclass(frozen=True, eq=False)
class Rescale(Operator):
    """y = scale·x + offset: from one range of values to another, such as [0, 1] to [−1, 1].

    ``Saturate() @ Rescale(2.0, -1.0)`` saturates images whose range is [0, 1].
    """

    scale: float
    offset: float

    def __post_init__(self) -> None:
        if not 0 < abs(self.scale) < math.inf or not math.isfinite(self.offset):
            raise ValueError(
                f"Rescale needs a finite scale other than 0 and a finite offset, got "
                f"{self.scale} and {self.offset}"
            )

    def apply(self, x: X) -> Y:
        return self.scale * x + self.offset

    def vjp(self, x: X, v: Y) -> X:
        return self.scale * v

    def guess(self, y: Y) -> X:
        """(y − offset)/scale."""
        return (y - self.offset) / self.scale


class WithAdjoint(torch.autograd.Function):
    """A linear map whose gradient is its adjoint, and the other way round.

    For maps that autodiff cannot see into, or would see into at a cost.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, there: Callable, back: Callable) -> Tensor:
        ctx.there, ctx.back = there, back
        return there(t)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return WithAdjoint.apply(grads[0], ctx.back, ctx.there), None, None


def dottest(A: LinearOperator, x: X, y: Y) -> float:
    """|⟨Ax, y⟩ − ⟨x, Aᴴy⟩| / (‖Ax‖‖y‖), which is 0 when the adjoint is exact.

    Args:
        A: the operator under test.
        x: an image, best of random numbers.
        y: measurements, best of random numbers.
    """
    Ax = A(x)
    difference = dot(Ax, y).sum() - dot(x, A.adjoint(y)).sum()
    return float(difference.abs() / (Ax.norm() * y.norm()))


def _check(t: Tensor, shape: tuple[int, ...], what: str, operator: str) -> None:
    fits = not shape or tuple(t.shape[-len(shape) :]) == shape
    if not fits or t.ndim < len(shape) + 1:
        expected = ", ".join(map(str, shape))
        raise ValueError(
            f"{operator} expects {what} of shape (batch, …, {expected}), "
            f"got {tuple(t.shape)}"
        )


def tensors(A: object) -> Iterator[Tensor]:
    """Every tensor among an operator's fields, and those of the operators in them."""
    if isinstance(A, Tensor):
        yield A
    elif isinstance(A, tuple):
        for part in A:
            yield from tensors(part)
    elif isinstance(A, Operator) and is_dataclass(A):
        for field in fields(A):
            yield from tensors(getattr(A, field.name))
