"""Shift-invariant blur."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.fft import fft2, ifft2

from invsolve.shapes import X, Y

from .base import LinearOperator


@final
@dataclass(frozen=True, eq=False)
class Blur(LinearOperator):
    """y = k ⊛ x, circular at the edges, so that A = F⁻¹ diag(k̂) F.

    Args:
        otf: k̂, the optical transfer function (the kernel's DFT), zero frequency first.
    """

    otf: Complex[Tensor, "h w"]

    @classmethod
    def from_kernel(
        cls, kernel: Float[Tensor, "kh kw"], shape: tuple[int, int]
    ) -> "Blur":
        """The blur of ``shape`` images by a kernel whose centre is its middle pixel."""
        (kh, kw), (h, w) = kernel.shape, shape
        if kh > h or kw > w:
            raise ValueError(
                f"the kernel ({kh}×{kw}) is larger than the image ({h}×{w}); "
                "crop the kernel, or give the padded image's shape"
            )
        padded = torch.nn.functional.pad(kernel, (0, w - kw, 0, h - kh))
        return cls(fft2(padded.roll((-(kh // 2), -(kw // 2)), (0, 1))))

    @classmethod
    def gaussian(cls, width: float, shape: tuple[int, int]) -> "Blur":
        """exp(−r²/2w²), normalised to sum 1; w is the standard deviation in pixels."""
        if not width > 0:
            raise ValueError(f"a blur's width must be > 0 pixels, got {width}")
        r = min(int(4 * width + 1), (min(shape) - 1) // 2)
        t = torch.arange(-r, r + 1, dtype=torch.float64)
        g = torch.exp(-(t**2) / (2 * width**2))
        kernel = torch.outer(g, g) / g.sum() ** 2
        return cls.from_kernel(kernel.float(), shape)

    def apply(self, x: X) -> Y:
        return ifft2(self._otf(x) * fft2(x)).real

    def adjoint(self, y: Y) -> X:
        return ifft2(self._otf(y).conj() * fft2(y)).real

    def normal(self, x: X) -> X:
        return ifft2(self._otf(x).abs().square() * fft2(x)).real

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 1e-6) -> X:
        """F⁻¹ diag(1/k̂) F y, frequencies with |k̂| ≤ rtol·max|k̂| left out."""
        otf = self._otf(y)
        seen = otf.abs() > rtol * otf.abs().max()
        inverse = torch.where(seen, 1 / torch.where(seen, otf, 1), 0)
        return ifft2(inverse * fft2(y)).real

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
        otf = self._otf(v)
        b = otf.conj() * fft2(y) + rho * fft2(v)
        return ifft2(b / (otf.abs().square() + rho)).real

    def norm(self, like: X, *, max_steps: int = 0, rtol: float = 0.0) -> float:
        return float(self.otf.abs().max())

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.otf.shape)

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return tuple(self.otf.shape)

    def _otf(self, like: Tensor) -> Tensor:
        return self.otf.to(like.dtype.to_complex())
