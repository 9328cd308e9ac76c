"""Volumes slice by slice, through an operator of slices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from invsolve.shapes import X, Y

from .base import LinearOperator


@final
@dataclass(frozen=True, eq=False)
class SliceWise(LinearOperator):
    """y_k = A x_k: each slice of a volume is measured alone.

    Volumes are (batch, channels, d, h, w), measurements (batch, d, …) with one slice's
    measurements each. `ParallelBeam`, `FanBeam` and single-coil Fourier operators take
    volumes as they are; this is for operators that do not, such as `MultiCoil`, and for
    those whose own memory should depend on a few slices and not on the volume. Here
    ``pinv`` and ``prox`` go slice by slice, each with step lengths of its own.

    Args:
        operator: A, of slices (batch, channels, h, w).
        depth: d.
        chunk: how many slices A is given at once.
    """

    operator: LinearOperator
    depth: int
    chunk: int = 16

    def __post_init__(self) -> None:
        for name in ("depth", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )

    def apply(self, x: X) -> Y:
        return self._each(self.operator.apply, _slices(x)).unflatten(0, (len(x), -1))

    def adjoint(self, y: Y) -> X:
        return self._volume(self._each(self.operator.adjoint, y.flatten(0, 1)))

    def normal(self, x: X) -> X:
        return self._volume(self._each(self.operator.normal, _slices(x)))

    def pinv(self, y: Y, *, max_steps: int = 100, rtol: float = 1e-6) -> X:
        def part(y: Tensor) -> Tensor:
            return self.operator.pinv(y, max_steps=max_steps, rtol=rtol)

        return self._volume(self._each(part, y.flatten(0, 1)))

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 50,
        rtol: float = 1e-6,
    ) -> X:
        def part(v: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
            return self.operator.prox(v, y, rho, max_steps=max_steps, rtol=rtol)

        slices = (_slices(v), y.flatten(0, 1))
        if isinstance(rho, Tensor) and rho.ndim:
            weights = _slices(rho.expand_as(v))
            return self._volume(self._each(part, *slices, weights))
        return self._volume(self._each(lambda v, y: part(v, y, rho), *slices))

    def norm(
        self, like: X | None = None, *, max_steps: int = 200, rtol: float = 1e-5
    ) -> float:
        one = None if like is None else like[:1, :, 0]
        return self.operator.norm(one, max_steps=max_steps, rtol=rtol)

    def image_like(self, y: Y) -> X:
        slices = self.operator.image_like(y.flatten(0, 1))
        return self._volume(slices)

    def check_image(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[2] != self.depth:
            raise ValueError(
                f"SliceWise expects volumes (batch, channels, {self.depth}, h, w), got "
                f"{tuple(x.shape)}"
            )
        self.operator.check_image(_slices(x[:, :, :1]))

    def check_measurements(self, y: Tensor) -> None:
        if y.ndim < 3 or y.shape[1] != self.depth:
            raise ValueError(
                f"SliceWise expects measurements (batch, {self.depth}, …), one set for "
                f"each slice, got {tuple(y.shape)}: are slices missing?"
            )
        self.operator.check_measurements(y[:, 0])

    @property
    def adjoint_is_exact(self) -> bool:
        return self.operator.adjoint_is_exact

    @property
    def image_channels(self) -> int:
        return self.operator.image_channels

    @property
    def takes_complex(self) -> bool:
        return self.operator.takes_complex

    @property
    def makes_complex(self) -> bool:
        return self.operator.makes_complex

    @property
    def is_unitary(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operator.is_unitary

    @property
    def image_shape(self) -> tuple[int, ...]:
        shape = self.operator.image_shape
        return (self.depth, *shape[-2:]) if shape else ()

    def _each(self, part: Callable[..., Tensor], *slices: Tensor) -> Tensor:
        total, out = len(slices[0]), None
        for at in range(0, total, self.chunk):
            now = slice(at, at + self.chunk)
            made = part(*(s[now] for s in slices))
            if out is None:
                out = made.new_empty(total, *made.shape[1:])
            out[now] = made
        assert out is not None
        return out

    def _volume(self, slices: Tensor) -> Tensor:
        return slices.unflatten(0, (-1, self.depth)).movedim(1, 2)


def _slices(x: Tensor) -> Tensor:
    """(batch · d, channels, h, w)."""
    return x.movedim(2, 1).flatten(0, 1)
