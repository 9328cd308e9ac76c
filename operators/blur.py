"""Blur by one kernel or by several, and what is assumed beyond the edges."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Complex, Float, Inexact, Int
from torch import Tensor
from torch.fft import fft2, ifft2, irfft2, rfft2

from invsolve.shapes import X, Y

from . import kernels
from .base import LinearOperator
from .rows import OrthogonalRows

Beyond = Literal["circular", "reflect", "replicate", "constant"]
"""abcd goes on as abcd|ab, abcd|cb, abcd|dd or abcd|00."""

Edges = Literal[Beyond, "valid"]
"""`Beyond`, or ``"valid"``: only the pixels that nothing beyond the edges reaches."""

Margin = tuple[tuple[int, int], tuple[int, int]]
"""((above, below), (left, right)), in pixels."""


@final
@dataclass(frozen=True, eq=False)
class Pad(LinearOperator):
    """y = x with a margin around it, which repeats x's pixels or is 0.

    The adjoint adds the margin back to the pixels that it repeats.

    Args:
        shape: (h, w) of the images.
        margin: the number of pixels on every side.
        edges: what the margin shows, as `Beyond` tells.
    """

    shape: tuple[int, int]
    margin: Margin
    edges: Beyond = "constant"

    def __post_init__(self) -> None:
        _check_margin(self.margin)
        if self.edges not in get_args(Beyond):
            raise ValueError(
                f"unknown edges {self.edges!r}: choose one of {', '.join(get_args(Beyond))}"
            )
        most = {"reflect": -1, "circular": 0}.get(self.edges)
        for n, sides in zip(self.shape, self.margin, strict=True):
            if most is not None and max(sides) > n + most:
                raise ValueError(
                    f"{n} pixels give a {self.edges} margin of at most {n + most}, got "
                    f"{max(sides)}: take a smaller margin, or replicate the edges"
                )

    def apply(self, x: X) -> Y:
        if self.edges == "constant":
            return torch.nn.functional.pad(x, [*self.margin[1], *self.margin[0]])
        rows, columns = self._sources(x.device)
        return x.index_select(-2, rows).index_select(-1, columns)

    def adjoint(self, y: Y) -> X:
        if self.edges == "constant":
            return _crop(y, self.margin)
        rows, columns = self._sources(y.device)
        (*batch, _, width), (h, w) = y.shape, self.shape
        x = y.new_zeros(*batch, h, width).index_add(-2, rows, y)
        return x.new_zeros(*batch, h, w).index_add(-1, columns, x)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return _grown(self.shape, self.margin)

    def _sources(self, device: torch.device) -> list[Int[Tensor, " n"]]:
        """For every row and column of y, the row and column of x that it shows."""

        def source(n: int, before: int, after: int) -> Tensor:
            i = torch.arange(-before, n + after, device=device)
            if self.edges == "circular":
                return i % n
            if self.edges == "replicate":
                return i.clamp(0, n - 1)
            return (n - 1) - ((n - 1) - i.abs()).abs()

        sides = zip(self.shape, self.margin, strict=True)
        return [source(n, before, after) for n, (before, after) in sides]


@final
@dataclass(frozen=True, eq=False)
class Crop(OrthogonalRows):
    """y = x without its margin. A Aᴴ = I.

    Args:
        shape: (h, w) of the images.
        margin: the number of pixels taken from every side.
    """

    shape: tuple[int, int]
    margin: Margin

    def __post_init__(self) -> None:
        _check_margin(self.margin)
        if min(self.measurement_shape) < 1:
            raise ValueError(
                f"a margin of {self.margin} leaves nothing of {self.shape}"
            )

    @property
    def energy(self) -> float:
        return 1.0

    def apply(self, x: X) -> Y:
        return _crop(x, self.margin)

    def adjoint(self, y: Y) -> X:
        return torch.nn.functional.pad(y, [*self.margin[1], *self.margin[0]])

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        (top, bottom), (left, right) = self.margin
        return _grown(self.shape, ((-top, -bottom), (-left, -right)))


@final
@dataclass(frozen=True, eq=False)
class Blur(LinearOperator):
    """y = k ⊛ x, circular at the edges, so that A = F⁻¹ diag(k̂) F.

    Args:
        otf: k̂, the optical transfer function (the DFT of a real kernel), zero frequency
            first; one for all channels, or (channels, h, w).
    """

    otf: Complex[Tensor, "*c h w"]

    def __post_init__(self) -> None:
        _check_otf(self.otf)

    @classmethod
    def from_kernel(
        cls,
        kernel: Float[Tensor, "*c kh kw"],
        shape: tuple[int, int],
        edges: Edges = "circular",
    ) -> LinearOperator:
        """The blur of ``shape`` images by a kernel whose centre is its middle pixel.

        Args:
            kernel: k; one for all channels, or (channels, kh, kw).
            shape: (h, w) of the images.
            edges: what is assumed beyond them. Other than ``"circular"``, the result
                is ``Crop @ Blur @ Pad``, without closed forms.
        """

        def circular(margin: Margin) -> "Blur":
            return cls(_otf(kernel, _grown(shape, margin)))

        return _at_edges(edges, kernel, shape, circular)

    @classmethod
    def gaussian(
        cls, width: float, shape: tuple[int, int], edges: Edges = "circular"
    ) -> LinearOperator:
        """exp(−r²/2w²), normalised to sum 1; w is the standard deviation in pixels."""
        kernels.check_positive(width, "a blur's width")
        r = min(int(4 * width + 1), (min(shape) - 1) // 2)
        return cls.from_kernel(kernels.gaussian(width, size=2 * r + 1), shape, edges)

    def apply(self, x: X) -> Y:
        return fourier_filter(self._otf(x), x)

    def adjoint(self, y: Y) -> X:
        return fourier_filter(self._otf(y).conj(), y)

    def normal(self, x: X) -> X:
        return fourier_filter(self._otf(x).abs().square(), x)

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 1e-6) -> X:
        """F⁻¹ diag(1/k̂) F y, frequencies with |k̂| ≤ rtol·max|k̂| left out."""
        otf = self._otf(y)
        seen = otf.abs() > rtol * otf.abs().max()
        inverse = torch.where(seen, 1 / torch.where(seen, otf, 1), 0)
        return fourier_filter(inverse, y)

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 0,
        rtol: float = 0.0,
    ) -> X:
        """F⁻¹ diag(1/(|k̂|² + ρ)) F (Aᴴy + ρ v): the closed form."""
        inverse = 1 / (self._otf(v).abs().square() + rho)
        return fourier_filter(inverse, self.adjoint(y) + rho * v)

    def norm(
        self, like: X | None = None, *, max_steps: int = 0, rtol: float = 0.0
    ) -> float:
        return float(self.otf.abs().max())

    @property
    def image_channels(self) -> int:
        return self.otf.shape[0] if self.otf.ndim == 3 else 1

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.otf.shape)

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return tuple(self.otf.shape)

    def _otf(self, like: Tensor) -> Tensor:
        return self.otf.to(like.dtype.to_complex())


@final
@dataclass(frozen=True, eq=False)
class SpatialBlur(LinearOperator):
    """y = Σₖ hₖ ⊛ (wₖ ⊙ x): a kernel that changes from place to place.

    With Σₖ wₖ = 1 a point at p spreads by Σₖ wₖ(p) hₖ, an interpolation of the kernels:
    product–convolution (Nagy & O'Leary 1998), the efficient filter flow of Hirsch et
    al. 2010. It costs one FFT for each kernel.

    Args:
        otf: ĥₖ, (kernels, h, w), zero frequency first, as in `Blur`.
        weights: wₖ ≥ 0, (kernels, h, w), of sum 1 at every pixel.
    """

    otf: Complex[Tensor, "k h w"]
    weights: Float[Tensor, "k h w"]

    def __post_init__(self) -> None:
        _check_otf(self.otf)
        if self.weights.shape != self.otf.shape:
            raise ValueError(
                f"give one weight map for each kernel: {tuple(self.otf.shape)}, "
                f"got {tuple(self.weights.shape)}"
            )
        total = self.weights.sum(0)
        one = torch.allclose(total, torch.ones_like(total), atol=1e-4)
        if not one or not (self.weights >= 0).all():
            raise ValueError(
                "the weights of a blur are ≥ 0 and sum to 1 at every pixel, but their "
                f"sum is {total.min():.3g} to {total.max():.3g}"
            )

    @classmethod
    def from_kernels(
        cls,
        kernels: Float[Tensor, "rows columns kh kw"],
        shape: tuple[int, int],
        edges: Edges = "circular",
    ) -> LinearOperator:
        """The kernels at the centres of rows × columns equal regions of the image.

        Between the centres the weights are bilinear, beyond the outermost constant.
        ``edges`` is as in `Blur.from_kernel`.
        """
        rows, columns = kernels.shape[:2]
        if rows > shape[0] or columns > shape[1]:
            raise ValueError(
                f"an image of {shape} has no {rows}×{columns} regions: give fewer kernels"
            )
        vertical, horizontal = _tents(rows, shape[0]), _tents(columns, shape[1])
        weights = vertical[:, None, :, None] * horizontal[:, None, :]

        def circular(margin: Margin) -> "SpatialBlur":
            w = Pad(shape, margin, "replicate").apply(weights.flatten(0, 1).to(kernels))
            return cls(_otf(kernels, _grown(shape, margin)).flatten(0, 1), w)

        return _at_edges(edges, kernels, shape, circular)

    def apply(self, x: X) -> Y:
        x = x[..., None, :, :] * self.weights.to(x.real.dtype)
        return fourier_filter(self._otf(x), x, summed=True)

    def adjoint(self, y: Y) -> X:
        x = fourier_filter(self._otf(y).conj(), y[..., None, :, :])
        return (self.weights.to(y.real.dtype) * x).sum(-3)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.otf.shape[-2:])

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.image_shape

    def _otf(self, like: Tensor) -> Tensor:
        return self.otf.to(like.dtype.to_complex())


def fourier_filter(
    response: Inexact[Tensor, "*r h w"],
    x: Inexact[Tensor, "*x h w"],
    *,
    summed: bool = False,
) -> Tensor:
    """F⁻¹ diag(response) F x, or its sum over the third dimension from the last.

    The response is that of a real filter, so that half of a real x's frequencies are
    enough.
    """

    def respond(response: Tensor, spectrum: Tensor) -> Tensor:
        out = response * spectrum
        return out.sum(-3) if summed else out

    if x.is_complex():
        return ifft2(respond(response, fft2(x)))
    h, w = x.shape[-2:]
    return irfft2(respond(response[..., : w // 2 + 1], rfft2(x)), s=(h, w))


def _otf(kernel: Float[Tensor, "*k kh kw"], shape: tuple[int, int]) -> Tensor:
    """The DFT of the kernel with its middle pixel at (0, 0)."""
    (kh, kw), (h, w) = kernel.shape[-2:], shape
    padded = torch.nn.functional.pad(kernel, (0, w - kw, 0, h - kh))
    return fft2(padded.roll((-(kh // 2), -(kw // 2)), (-2, -1)))


def _at_edges(
    edges: Edges,
    kernel: Tensor,
    shape: tuple[int, int],
    circular: Callable[[Margin], LinearOperator],
) -> LinearOperator:
    """The circular blur of the image with a margin, which is then cut off."""
    if edges not in (*get_args(Beyond), "valid"):
        raise ValueError(
            f"unknown edges {edges!r}: choose one of {', '.join(get_args(Beyond))}, valid"
        )
    (kh, kw), (h, w) = kernel.shape[-2:], shape
    if kh > h or kw > w:
        raise ValueError(
            f"the kernel ({kh}×{kw}) is larger than the image ({h}×{w}); "
            "crop the kernel, or give the padded image's shape"
        )
    none: Margin = ((0, 0), (0, 0))
    if edges == "circular":
        return circular(none)
    reach: Margin = (((kh - 1) // 2, kh // 2), ((kw - 1) // 2, kw // 2))
    if edges == "valid":
        return Crop(shape, reach) @ circular(none)
    return (
        Crop(_grown(shape, reach), reach) @ circular(reach) @ Pad(shape, reach, edges)
    )


def _tents(parts: int, n: int) -> Float[Tensor, "parts n"]:
    """Linear interpolation between the centres of equal parts of n pixels."""
    place = (torch.arange(n, dtype=torch.float64) + 0.5) * parts / n - 0.5
    distance = place.clamp(0, parts - 1) - torch.arange(parts)[:, None]
    return (1 - distance.abs()).clamp_min(0)


def _grown(shape: tuple[int, int], margin: Margin) -> tuple[int, int]:
    (top, bottom), (left, right) = margin
    return shape[0] + top + bottom, shape[1] + left + right


def _crop(x: Tensor, margin: Margin) -> Tensor:
    (top, bottom), (left, right) = margin
    h, w = x.shape[-2:]
    return x[..., top : h - bottom, left : w - right]


def _check_margin(margin: Margin) -> None:
    if min(*margin[0], *margin[1]) < 0:
        raise ValueError(f"a margin is ≥ 0 pixels on every side, got {margin}")


def _check_otf(otf: Tensor) -> None:
    if not otf.isfinite().all():
        raise ValueError("a blur's kernel has NaN or infinite values: repair it first")
    if not otf.any():
        raise ValueError("a blur by a kernel of zeros measures nothing")
    kernel = ifft2(otf)
    if kernel.imag.abs().max() > 1e-4 * kernel.abs().max():
        raise ValueError(
            "a blur's otf is the DFT of a real kernel: make it by Blur.from_kernel"
        )
