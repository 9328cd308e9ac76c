"""Magnetic resonance: k-space is the image's Fourier transform, seen by several coils."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor
from torch.fft import fft2, fftn, fftshift, ifft2, ifftn, ifftshift

from invsolve.shapes import X, Y

from .base import Compose, LinearOperator, WithAdjoint
from .masking import Mask


@final
@dataclass(frozen=True, eq=False)
class Fourier(LinearOperator):
    """y = F x, the orthonormal DFT of the last axes with zero frequency in the middle.

    Pixel n of N lies at n − ⌊N/2⌋, and so does frequency k: fastMRI's convention.
    Single-coil Cartesian MRI is ``Mask(m) @ Fourier()`` on complex images; put
    `RealImage` or `ComplexChannels` before it for a prior of real numbers, and `Coils`
    for several coils.

    Args:
        dims: 2 for slices (…, h, w), 3 for volumes (…, d, h, w) with two phase encodes.
    """

    dims: int = 2

    is_unitary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dims not in (1, 2, 3):
            raise ValueError(f"Fourier is over 1, 2 or 3 axes, got dims={self.dims}")

    @property
    def takes_complex(self) -> bool:
        return True

    def apply(self, x: X) -> Y:
        return self._centred(fftn, x)

    def adjoint(self, y: Y) -> X:
        return self._centred(ifftn, y)

    def _centred(self, transform: Callable[..., Tensor], x: Tensor) -> Tensor:
        # Along an even axis a shift by half before the transform is a change of every
        # second sign after it, and multiplying is cheaper than moving.
        axes = tuple(range(-self.dims, 0))
        odd = tuple(a for a in axes if x.shape[a] % 2)
        before, after = _signs(
            tuple(x.shape[-self.dims :]), x.dtype.to_complex(), x.device
        )
        x = before * x
        y = transform(ifftshift(x, odd) if odd else x, dim=axes, norm="ortho")
        return (fftshift(y, odd) if odd else y).mul_(after)


@final
@dataclass(frozen=True, eq=False)
class Coils(LinearOperator):
    """y_c = S_c ⊙ x: the image as every receive coil sees it.

    x is (batch, 1, *space), y (batch, coils, *space), both complex. Multi-coil MRI is
    ``Mask(m) @ Fourier() @ Coils(maps)`` (SENSE: Pruessmann et al. 1999), and
    `MultiCoil` the same in one piece.

    Args:
        maps: S, the complex sensitivities, (coils, *space), without a unit. Zero for
            all coils where nothing is seen. `coil_maps` estimates them.

    >>> A = Coils(torch.tensor([[1.0, 1j], [1j, 2.0]]))
    >>> A(torch.tensor([[[3.0 + 0j, 1.0]]]))
    tensor([[[3.+0.j, 0.+1.j],
             [0.+3.j, 2.+0.j]]])
    """

    maps: Complex[Tensor, "coils ..."]
    conjugate: Tensor = field(init=False, repr=False)
    energy: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_maps(self.maps)
        object.__setattr__(self, "conjugate", self.maps.conj().resolve_conj())
        object.__setattr__(self, "energy", self.maps.abs().square().sum(0))

    @property
    def takes_complex(self) -> bool:
        return True

    def apply(self, x: X) -> Y:
        _check_seen(x)
        return self.maps.to(x.dtype) * x

    def adjoint(self, y: Y) -> X:
        """Σ_c conj(S_c) y_c."""
        x = torch.zeros_like(y[:, 0])
        for conjugate, seen in zip(
            self.conjugate.to(y.dtype), y.unbind(1), strict=True
        ):
            x = torch.addcmul(x, conjugate, seen)
        return x.unsqueeze(1)

    def normal(self, x: X) -> X:
        return self.energy.to(x.real.dtype) * x

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 0.0) -> X:
        """Σ conj(S_c) y_c / Σ|S_c|² where it is seen, else 0: the closed form."""
        energy = self.energy.to(y.real.dtype)
        return torch.where(energy > 0, self.adjoint(y) / energy, 0)

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 0,
        rtol: float = 0.0,
    ) -> X:
        """(Σ conj(S_c) y_c + ρ v) / (Σ|S_c|² + ρ): the closed form."""
        return (self.adjoint(y) + rho * v) / (self.energy.to(v.real.dtype) + rho)

    def norm(
        self, like: X | None = None, *, max_steps: int = 0, rtol: float = 0.0
    ) -> float:
        return float(self.energy.max()) ** 0.5

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.maps.shape[1:])

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return tuple(self.maps.shape)


@final
@dataclass(frozen=True, eq=False)
class MultiCoil(LinearOperator):
    """y_c = m ⊙ F (S_c ⊙ x): ``Mask(mask) @ Fourier() @ Coils(maps)`` in one piece.

    On a CPU it goes coil by coil, so that what lies between image and k-space never
    leaves the processor's cache: it costs hardly more than the Fourier transforms,
    where the composition costs more than twice as much. AᴴA keeps no k-space at all.

    Args:
        maps: S, (coils, h, w), as in `Coils`.
        mask: m, (h, w), zero frequency in the middle, as in `Mask`.
    """

    maps: Complex[Tensor, "coils h w"]
    mask: Float[Tensor, "_ _"] | Bool[Tensor, "_ _"]
    composed: Compose = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.maps.shape[1:] != self.mask.shape:
            raise ValueError(
                f"maps {tuple(self.maps.shape)} and mask {tuple(self.mask.shape)} are "
                "of different images"
            )
        mask = Mask(self.mask)
        object.__setattr__(self, "mask", mask.mask)
        object.__setattr__(self, "composed", mask @ Fourier() @ Coils(self.maps))

    @property
    def takes_complex(self) -> bool:
        return True

    def apply(self, x: X) -> Y:
        _check_seen(x)
        if self._at_once(x):
            return self.composed.apply(x)
        return WithAdjoint.apply(x, self._forward, self._backward)

    def adjoint(self, y: Y) -> X:
        if self._at_once(y):
            return self.composed.adjoint(y)
        return WithAdjoint.apply(y, self._backward, self._forward)

    def normal(self, x: X) -> X:
        if self._at_once(x):
            return self.composed.adjoint(self.composed.apply(x))
        return WithAdjoint.apply(x, self._normal, self._normal)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return tuple(self.maps.shape)

    def _at_once(self, t: Tensor) -> bool:
        return t.device.type != "cpu" or any(n % 2 for n in self.mask.shape)

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        coils = self.composed.inner
        assert isinstance(coils, Coils)
        before, after = _signs(tuple(self.mask.shape), like.dtype, like.device)
        maps, conjugate = coils.maps.to(like.dtype), coils.conjugate.to(like.dtype)
        # F's signs before the transform are one for all coils; those after it go with m.
        return maps, conjugate, before, self.mask.to(like.dtype) * after

    def _forward(self, x: Tensor) -> Tensor:
        maps, _, sign, mask = self._tensors(x)
        y = x.new_empty(len(x), *maps.shape)
        seen = torch.empty_like(mask)
        for item, kspace in zip(sign * x[:, 0], y, strict=True):
            for S, k in zip(maps, kspace, strict=True):
                torch.mul(S, item, out=seen)
                torch.mul(fft2(seen, norm="ortho"), mask, out=k)
        return y

    def _backward(self, y: Tensor) -> Tensor:
        _, conjugate, sign, mask = self._tensors(y)
        x = y.new_zeros(len(y), *mask.shape)
        seen = torch.empty_like(mask)
        for item, kspace in zip(x, y, strict=True):
            for S, k in zip(conjugate, kspace, strict=True):
                torch.mul(k, mask, out=seen)
                item.addcmul_(S, ifft2(seen, norm="ortho"))
        return (sign * x).unsqueeze(1)

    def _normal(self, x: Tensor) -> Tensor:
        maps, conjugate, sign, mask = self._tensors(x)
        weight = mask * mask
        out = torch.zeros_like(x[:, 0])
        seen = torch.empty_like(mask)
        for item, image in zip(sign * x[:, 0], out, strict=True):
            for S, Sc in zip(maps, conjugate, strict=True):
                torch.mul(S, item, out=seen)
                k = fft2(seen, norm="ortho").mul_(weight)
                image.addcmul_(Sc, ifft2(k, norm="ortho"))
        return (sign * out).unsqueeze(1)


@final
@dataclass(frozen=True, eq=False)
class RealImage(LinearOperator):
    """y = x + 0i: the image is known to be real. Its adjoint is the real part."""

    @property
    def makes_complex(self) -> bool:
        return True

    def apply(self, x: X) -> Y:
        return torch.complex(x, torch.zeros_like(x))

    def adjoint(self, y: Y) -> X:
        return y.real

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 0.0) -> X:
        return y.real

    def norm(
        self, like: X | None = None, *, max_steps: int = 0, rtol: float = 0.0
    ) -> float:
        return 1.0


@final
@dataclass(frozen=True, eq=False)
class ComplexChannels(LinearOperator):
    """y = x₁ + i x₂: two real channels are one complex image. Unitary over ℝ."""

    is_unitary: ClassVar[bool] = True

    @property
    def image_channels(self) -> int:
        return 2

    @property
    def makes_complex(self) -> bool:
        return True

    def apply(self, x: X) -> Y:
        if x.shape[1] != 2:
            raise ValueError(f"a complex image is two channels, got {x.shape[1]}")
        return torch.complex(x[:, 0:1].contiguous(), x[:, 1:2].contiguous())

    def adjoint(self, y: Y) -> X:
        return torch.cat([y.real, y.imag], dim=1)


def _check_maps(maps: Tensor) -> None:
    if not maps.is_complex():
        raise ValueError(
            f"coil maps are complex, got {maps.dtype}: give maps.to(torch.complex64)"
        )
    if maps.ndim < 2 or 0 in maps.shape:
        raise ValueError(
            f"coil maps are (coils, *space), got {tuple(maps.shape)}: a batch shares "
            "one set of maps"
        )
    if not maps.isfinite().all():
        raise ValueError("the coil maps have NaN or infinite values: set those to 0")
    if not maps.any():
        raise ValueError("the coil maps are all zero: no coil sees anything")


def _check_seen(x: Tensor) -> None:
    if x.shape[1] != 1:
        raise ValueError(
            f"coils see images of one channel, got {x.shape[1]}: (batch, 1, *space)"
        )


@lru_cache(maxsize=8)
def _signs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """±1 before and after an uncentred DFT; 1 along odd axes, which are shifted."""
    # Made in inference mode they could never again be part of a gradient.
    with torch.inference_mode(False):
        before = torch.ones(shape, dtype=dtype, device=device)
        for axis, n in enumerate(shape):
            if n % 2 == 0:
                alternating = 1 - 2 * (torch.arange(n, device=device) % 2)
                before *= alternating.reshape(-1, *(1,) * (len(shape) - 1 - axis))
        halves = sum(n // 2 for n in shape if n % 2 == 0)
        return before, before * (-1) ** halves
