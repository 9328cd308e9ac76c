"""Magnetic resonance: k-space is the image's Fourier transform."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch.fft import fft2, fftshift, ifft2, ifftshift

from invsolve.shapes import X, Y

from .base import LinearOperator


@final
@dataclass(frozen=True, eq=False)
class Fourier(LinearOperator):
    """y = F x, the orthonormal 2D DFT with zero frequency in the middle.

    Single-coil Cartesian MRI is ``Mask(m) @ Fourier()`` on complex images; put
    `RealImage` or `ComplexChannels` before it for a prior of real numbers.
    """

    is_unitary: ClassVar[bool] = True

    def apply(self, x: X) -> Y:
        axes = (-2, -1)
        return fftshift(fft2(ifftshift(x, axes), norm="ortho"), axes)

    def adjoint(self, y: Y) -> X:
        axes = (-2, -1)
        return fftshift(ifft2(ifftshift(y, axes), norm="ortho"), axes)


@final
@dataclass(frozen=True, eq=False)
class RealImage(LinearOperator):
    """y = x + 0i: the image is known to be real. Its adjoint is the real part."""

    def apply(self, x: X) -> Y:
        return torch.complex(x, torch.zeros_like(x))

    def adjoint(self, y: Y) -> X:
        return y.real

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 0.0) -> X:
        return y.real

    def norm(self, like: X, *, max_steps: int = 0, rtol: float = 0.0) -> float:
        return 1.0


@final
@dataclass(frozen=True, eq=False)
class ComplexChannels(LinearOperator):
    """y = x₁ + i x₂: two real channels are one complex image. Unitary over ℝ."""

    is_unitary: ClassVar[bool] = True

    def apply(self, x: X) -> Y:
        if x.shape[1] != 2:
            raise ValueError(f"a complex image is two channels, got {x.shape[1]}")
        return torch.complex(x[:, 0:1].contiguous(), x[:, 1:2].contiguous())

    def adjoint(self, y: Y) -> X:
        return torch.cat([y.real, y.imag], dim=1)
