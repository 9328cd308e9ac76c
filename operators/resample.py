"""Fewer pixels: super-resolution."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from invsolve.shapes import X, Y

from .base import LinearOperator
from .blur import Blur, fourier_filter
from .rows import OrthogonalRows


@final
@dataclass(frozen=True, eq=False)
class Downsample(OrthogonalRows):
    """y = the mean of each f×f block of x, as a detector with larger pixels sees it.

    A Aᴴ = I/f², so that pinv and prox are closed forms.

    Args:
        factor: f, pixels a side.
        shape: (h, w) of the images, both divisible by f.
    """

    factor: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        _check_factor(self.factor, self.shape)

    @staticmethod
    def bicubic(factor: int, shape: tuple[int, int]) -> "Separable":
        """Antialiased bicubic resizing: what PIL, and torch with antialias, make.

        y_i = Σⱼ κ((j + ½)/f − (i + ½)) xⱼ along each axis: Keys' (1981) cubic κ with
        a = −½, wider by the factor f. At the ends the kernel is cut off and the
        rest of it normalised, so that a constant stays what it is.
        """
        _check_factor(factor, shape)
        rows, columns = (_bicubic(n, factor) for n in shape)
        return Separable(rows, columns)

    @property
    def energy(self) -> float:
        return 1 / self.factor**2

    def apply(self, x: X) -> Y:
        return avg_pool2d(x, self.factor)

    def adjoint(self, y: Y) -> X:
        return interpolate(y, scale_factor=self.factor, mode="nearest") / self.factor**2

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return tuple(n // self.factor for n in self.shape)


@final
@dataclass(frozen=True, eq=False)
class Separable(LinearOperator):
    """y = R x Cᵀ: one matrix for the columns of x and one for its rows.

    With R = U diag(s) Vᵀ and C = P diag(t) Qᵀ the singular values of A are sᵢtⱼ, so
    that pinv and prox are closed forms of small matrices.

    Args:
        rows: R, (h′, h): the rows of y from those of x.
        columns: C, (w′, w): the columns of y from those of x.
    """

    rows: Float[Tensor, "hy h"]
    columns: Float[Tensor, "wy w"]

    def __post_init__(self) -> None:
        for matrix in (self.rows, self.columns):
            if not matrix.isfinite().all():
                raise ValueError("a matrix has NaN or infinite values: repair it first")
            if not matrix.any():
                raise ValueError("a matrix of zeros measures nothing")

    def apply(self, x: X) -> Y:
        return self.rows.to(x) @ x @ self.columns.to(x).mT

    def adjoint(self, y: Y) -> X:
        return self.rows.to(y).mT @ y @ self.columns.to(y)

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 1e-6) -> X:
        """R⁺ y (C⁺)ᵀ; singular values below rtol of the largest are left out."""
        rows, columns = (
            torch.linalg.pinv(matrix.double(), rtol=rtol).to(y)
            for matrix in (self.rows, self.columns)
        )
        return rows @ y @ columns.mT

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 0,
        rtol: float = 0.0,
    ) -> X:
        """v + Aᴴ U (Uᵀ (y − A v) P / (s²tᵀ² + ρ)) Pᵀ, by the Woodbury identity."""
        (U, s), (P, t) = self._left
        U, P = U.to(v), P.to(v)
        energy = torch.outer(s, t).square().to(v)
        residual = U.mT @ (y - self.apply(v)) @ P / (energy + rho)
        return v + self.adjoint(U @ residual @ P.mT)

    def norm(
        self, like: X | None = None, *, max_steps: int = 0, rtol: float = 0.0
    ) -> float:
        (_, s), (_, t) = self._left
        return float(s.max() * t.max())

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.rows.shape[1], self.columns.shape[1]

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.rows.shape[0], self.columns.shape[0]

    @cached_property
    def _left(self) -> list[tuple[Tensor, Tensor]]:
        """Left singular vectors, complete, and values, 0 for what has none."""

        def left(matrix: Tensor) -> tuple[Tensor, Tensor]:
            U, s, _ = torch.linalg.svd(matrix.double())
            return U, torch.nn.functional.pad(s, (0, len(U) - len(s)))

        return [left(self.rows), left(self.columns)]


def finer_pixels(shape: tuple[int, int], factor: int) -> Separable:
    """The means over pixels ``factor`` times finer of an image that is smooth in them.

    Along each axis, of the parabola whose means over a pixel and its two neighbours are
    theirs (that of the piecewise parabolic method, Colella, Woodward 1984, without its
    limits): with t from −½ to ½ across a pixel of value b between a and c,

        p(t) = b + (c − a)/2 t + (a − 2b + c)/2 (t² − 1/12).

    Means over the pixels of ``shape`` stay what they are; outside lies nothing.

    Args:
        shape: (h, w) of the images.
        factor: how many finer pixels a side become of one.
    """
    _check_factor(factor, (factor, factor))
    edges = torch.linspace(-0.5, 0.5, factor + 1, dtype=torch.float64)
    low, high = edges[:-1], edges[1:]
    slope = (low + high) / 2
    bend = (low**2 + low * high + high**2) / 3 - 1 / 12
    taps = (bend - slope) / 2, 1 - bend, (bend + slope) / 2  # of a, b and c

    def along(n: int) -> Tensor:
        matrix = torch.zeros(n, factor, n, dtype=torch.float64)
        for offset, tap in zip((-1, 0, 1), taps, strict=True):
            at = torch.arange(max(0, -offset), min(n, n - offset))
            matrix[at, :, at + offset] = tap
        return matrix.reshape(n * factor, n)

    return Separable(along(shape[0]), along(shape[1]))


@final
@dataclass(frozen=True, eq=False)
class Decimate(LinearOperator):
    """y = (k ⊛ x) at every f-th pixel: a point-spread function, then the detector.

    A Aᴴ is a circular filter of the small image: its response is the mean of |k̂|²
    over the f² frequencies that fold onto one (Zhao et al. 2016), which gives pinv and
    prox their closed forms.

    Args:
        blur: k ⊛, circular.
        factor: f; it divides the image's h and w.
    """

    blur: Blur
    factor: int

    def __post_init__(self) -> None:
        _check_factor(self.factor, self._size)

    @classmethod
    def from_kernel(
        cls, kernel: Float[Tensor, "*c kh kw"], factor: int, shape: tuple[int, int]
    ) -> "Decimate":
        """The kernel's centre is its middle pixel; ``shape`` is (h, w) of the images."""
        blur = Blur.from_kernel(kernel, shape)
        assert isinstance(blur, Blur)
        return cls(blur, factor)

    def apply(self, x: X) -> Y:
        return self.blur.apply(x)[..., :: self.factor, :: self.factor]

    def adjoint(self, y: Y) -> X:
        x = y.new_zeros(*y.shape[:-2], *self._size)
        x[..., :: self.factor, :: self.factor] = y
        return self.blur.adjoint(x)

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 1e-6) -> X:
        """Aᴴ (A Aᴴ)⁺ y."""
        energy = self._energy.to(y.real.dtype)
        seen = energy > rtol**2 * energy.max()
        inverse = torch.where(seen, 1 / torch.where(seen, energy, 1), 0)
        return self.adjoint(fourier_filter(inverse, y))

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 0,
        rtol: float = 0.0,
    ) -> X:
        """v + Aᴴ (A Aᴴ + ρ)⁻¹ (y − A v), by the Woodbury identity."""
        residual, energy = y - self.apply(v), self._energy.to(v.real.dtype)
        return v + self.adjoint(fourier_filter(1 / (energy + rho), residual))

    def norm(
        self, like: X | None = None, *, max_steps: int = 0, rtol: float = 0.0
    ) -> float:
        return float(self._energy.max()) ** 0.5

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.blur.image_shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        h, w = self._size
        return *self.image_shape[:-2], h // self.factor, w // self.factor

    @property
    def _size(self) -> tuple[int, int]:
        h, w = self.blur.otf.shape[-2:]
        return h, w

    @property
    def _energy(self) -> Float[Tensor, "*c hy wy"]:
        """The response of A Aᴴ."""
        f, (h, w) = self.factor, self._size
        energy = self.blur.otf.abs().square().unflatten(-1, (f, w // f))
        return energy.unflatten(-3, (f, h // f)).mean((-4, -2))


def _bicubic(n: int, factor: int) -> Float[Tensor, "m n"]:
    a = -0.5
    centre = torch.arange(n // factor, dtype=torch.float64)[:, None] + 0.5
    t = ((torch.arange(n, dtype=torch.float64) + 0.5) / factor - centre).abs()
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


def _check_factor(factor: int, shape: tuple[int, int]) -> None:
    if factor < 1 or any(n % factor for n in shape):
        raise ValueError(
            f"a factor of {factor} does not divide images of {shape}: "
            "crop or pad the image to a multiple of the factor"
        )
