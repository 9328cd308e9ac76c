"""Nonlinear measurements: phaseless, saturated, quantised, or a network's."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Complex, Float
from torch import Generator, Tensor, nn

from invsolve.linalg import dot
from invsolve.random import randn_like
from invsolve.shapes import X, Y, per_item

from .base import Operator, autodiff
from .mri import Fourier


@final
@dataclass(frozen=True, eq=False)
class PhaseRetrieval(Operator):
    """y = |F P (c ⊙ x)|: the magnitude of a Fourier transform, its phase lost.

    P pads with zeros around the image and F is `Fourier`; both keep lengths. Images are
    (batch, channels, h, w), real or complex; y is (batch, channels, h′, w′), and with
    k codes c (batch, channels, k, h′, w′), zero frequency in the middle. Without codes
    −x, and x turned by 180° about the image's middle, give the same y as x, as do
    shifts that keep the object within the image; with them only a global phase (for
    real images, the sign) remains open.

    Args:
        shape: (h, w) of the images.
        oversampling: h′/h and w′/w, of each axis, rounded up to whole pixels. Twice
            is what a real image asks for without codes. (The scripts of DPS and
            RED-diff call 1.5 of each axis "oversample 2".)
        codes: c, masks of modulus about 1 in the image's plane; none unless given.
        complex_image: whether images are complex, as in ``PhaseRetrieval(…,
            complex_image=True) @ ComplexChannels()``. y does not tell.

    Raises:
        ValueError: the oversampling is less than 1, or the codes are not finite or not
            of the image's shape.
    """

    shape: tuple[int, int]
    oversampling: float = 2.0
    codes: Float[Tensor, "..."] | Complex[Tensor, "..."] | None = None
    complex_image: bool = False

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"an image has at least one pixel, got shape {self.shape}")
        if not 1 <= self.oversampling < math.inf:
            raise ValueError(
                f"oversampling must be ≥ 1, got {self.oversampling}: 2 for an image "
                "known by its Fourier magnitude alone, 1 with several codes"
            )
        if self.codes is None:
            return
        if self.codes.ndim != 3 or tuple(self.codes.shape[1:]) != tuple(self.shape):
            raise ValueError(
                f"codes must be (k, {self.shape[0]}, {self.shape[1]}), one mask of the "
                f"image's shape for each measurement, got {tuple(self.codes.shape)}"
            )
        if not self.codes.isfinite().all():
            raise ValueError("codes must be finite, but some are NaN or infinite")

    @classmethod
    def coded(
        cls,
        shape: tuple[int, int],
        count: int,
        *,
        kind: Literal["signs", "phases"] = "signs",
        oversampling: float = 1.0,
        complex_image: bool = False,
        generator: Generator,
    ) -> "PhaseRetrieval":
        """Coded diffraction patterns (Candès, Li, Soltanolkotabi 2015).

        Args:
            shape: (h, w) of the images.
            count: how many masks; four or more for an image to be found again.
            kind: of masks: random ``signs`` ±1, or ``phases`` uniform on the circle.
            oversampling: of each axis.
            complex_image: whether images are complex.
            generator: of the masks.
        """
        if count < 1:
            raise ValueError(f"at least one code is needed, got count={count}")
        u = torch.rand(count, *shape, generator=generator, device=generator.device)
        match kind:
            case "signs":
                codes = torch.where(u < 0.5, -1.0, 1.0)
            case "phases":
                codes = torch.polar(torch.ones_like(u), 2 * torch.pi * u)
            case _:
                raise ValueError(f"unknown kind {kind!r} of codes: signs or phases")
        return cls(shape, oversampling, codes, complex_image)

    def apply(self, x: X) -> Y:
        return self._field(x).abs()

    def vjp(self, x: X, v: Y) -> X:
        """Re of c̄ ⊙ PᴴFᴴ(v z/|z|) with z = FP(c ⊙ x), for real x; 0 where z = 0."""
        return self.pullback(x)[1](v)

    def pullback(self, x: X) -> tuple[Y, Callable[[Y], X]]:
        z = self._field(x)

        def pull(v: Y) -> X:
            pulled = self._field_adjoint(z.sgn() * v)
            return pulled if x.is_complex() else pulled.real

        return z.abs(), pull

    def image_like(self, y: Y) -> X:
        zeros = super().image_like(y)
        return zeros.to(y.dtype.to_complex()) if self.complex_image else zeros

    def guess(self, y: Y) -> X:
        """|PᴴFᴴy|, as the authors of RED-diff start; with codes the spectral start.

        That is the leading eigenvector of AᴴD(y²)A, A = FP(c ⊙ ·), by fifty steps of
        power iteration, of the length that y has.
        """
        if self.codes is None:
            return self._field_adjoint(y + 0j).abs().to(self.image_like(y).dtype)
        x = randn_like(self.image_like(y), Generator().manual_seed(0))
        x = x[:1].expand_as(x)  # one start for all, so that no item's depends on others
        for _ in range(50):
            z = self._field_adjoint(y.square() * self._field(x))
            z = z if self.complex_image else z.real
            x = z / per_item(dot(z, z).sqrt().clamp_min(torch.finfo(y.dtype).tiny), z)
        gain = self._lengths(self.apply(x)).clamp_min(torch.finfo(y.dtype).tiny)
        return x * per_item(self._lengths(y) / gain, x)

    def check_measurements(self, y: Tensor) -> None:
        super().check_measurements(y)
        _check_real(y, self)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.shape)

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        count = () if self.codes is None else (len(self.codes),)
        return (*count, *self._padded)

    @property
    def _padded(self) -> tuple[int, int]:
        # Half a rounding error must not ask for a pixel more: 1.1 · 10 is 11.
        h, w = (math.ceil(self.oversampling * n - 1e-9) for n in self.shape)
        return h, w

    @property
    def _window(self) -> tuple[slice, slice]:
        rows, columns = (
            slice(N // 2 - n // 2, N // 2 - n // 2 + n)
            for n, N in zip(self.shape, self._padded, strict=True)
        )
        return rows, columns

    def _field(self, x: Tensor) -> Tensor:
        """z = F P (c ⊙ x)."""
        if self.codes is not None:
            x = _cast(self.codes, x) * x.unsqueeze(-3)
        (H, W), (rows, columns) = self._padded, self._window
        margins = (columns.start, W - columns.stop, rows.start, H - rows.stop)
        return Fourier().apply(torch.nn.functional.pad(x, margins))

    def _field_adjoint(self, z: Tensor) -> Tensor:
        rows, columns = self._window
        x = Fourier().adjoint(z)[..., rows, columns]
        return x if self.codes is None else (_cast(self.codes, x).conj() * x).sum(-3)

    def _lengths(self, y: Y) -> Tensor:
        return y.square().flatten(1).sum(1).sqrt()


@final
@dataclass(frozen=True, eq=False)
class Saturate(Operator):
    """y = clip(c x, low, high): a detector that overflows (HDR).

    As it stands, for images in [−1, 1], it is the setting of RED-diff and DAPS. The
    derivative is 0 where c x overflows: also where y does not, so that an estimate that
    strays there is left to the prior. Images are real, of any shape.

    Args:
        factor: c > 0, the exposure.
        low, high: the least and the largest reading, in y's unit; either may be
            infinite.
    """

    factor: float = 2.0
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"an exposure must be > 0 and finite, got {self.factor}")
        if not self.low < self.high:
            raise ValueError(
                f"the least reading must be below the largest, got low={self.low} and "
                f"high={self.high}"
            )

    def apply(self, x: X) -> Y:
        return (self.factor * x).clamp(self.low, self.high)

    def vjp(self, x: X, v: Y) -> X:
        """c v where low < c x < high, else 0: what overflowed tells nothing."""
        z = self.factor * x
        return torch.where((self.low < z) & (z < self.high), self.factor * v, 0)

    def guess(self, y: Y) -> X:
        """y/c."""
        return y / self.factor

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        _check_real(x, self)

    def check_measurements(self, y: Tensor) -> None:
        super().check_measurements(y)
        _check_real(y, self)


class _Round(torch.autograd.Function):
    """To the nearest whole number, with the derivative of x ↦ x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _round(x: Tensor) -> Tensor:
    rounded = _Round.apply(x)
    assert isinstance(rounded, Tensor)
    return rounded


@final
@dataclass(frozen=True, eq=False)
class Quantise(Operator):
    """y = origin + step · round((x − origin)/step), a half going to the even side.

    Its true derivative is 0 almost everywhere and tells a descent nothing; ``vjp`` (and
    autodiff through ``apply``) is the straight-through one instead, that of y = x. So
    ‖y − A(x)‖² is no potential of it: a descent ends within about a step of y, and
    inside a cell it is blind. Images are real, of any shape.

    Args:
        step: the distance between two levels. n levels on [a, b] are
            ``Quantise((b − a)/(n − 1), origin=a)``; values beyond are not clipped, for
            which there is `Saturate`.
        origin: one of the levels.
    """

    step: float
    origin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.step < math.inf:
            raise ValueError(f"a step must be > 0 and finite, got {self.step}")
        if not math.isfinite(self.origin):
            raise ValueError(f"the origin must be finite, got {self.origin}")

    def apply(self, x: X) -> Y:
        return self.origin + self.step * _round((x - self.origin) / self.step)

    def vjp(self, x: X, v: Y) -> X:
        """v: the straight-through derivative."""
        return v

    def guess(self, y: Y) -> X:
        """y."""
        return y

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        _check_real(x, self)

    def check_measurements(self, y: Tensor) -> None:
        super().check_measurements(y)
        _check_real(y, self)


_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


@final
@dataclass(frozen=True, eq=False)
class JPEG(Operator):
    """y = Dᵀ(q ⊙ round(D x / q)): what JPEG's rounding leaves, block by block.

    D is the orthonormal cosine transform of 8×8 blocks, of grey levels 0 … 255 less
    128, and q the luminance table of ITU-T T.81 (Annex K) scaled as the Independent
    JPEG Group's encoder does: by 50/quality below 50 and by 2 − quality/50 above, in
    whole numbers between 1 and 255. It is a projection: A(A(x)) = A(x).

    Differs from a JPEG file: every channel is taken for luminance, neither converted to
    YCbCr nor subsampled, and decoded pixels are neither clipped nor rounded. ``vjp`` is
    straight-through, with the limits told of in `Quantise`.

    Images are real, (batch, channels, h, w) with h and w multiples of 8.

    Args:
        quality: 1 to 100; above 95 nearly nothing is lost.
        low, high: the image's values that are grey levels 0 and 255.
    """

    quality: int
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is between 1 and 100, got {self.quality}")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"black must be below white, and both finite, got low={self.low} and "
                f"high={self.high}"
            )

    @property
    def table(self) -> Float[Tensor, "8 8"]:
        """q, in grey levels, for the quality."""
        q = self.quality
        percent = 5000 // q if q < 50 else 200 - 2 * q
        base = torch.tensor(_LUMINANCE)
        return ((base * percent + 50) // 100).clamp(1, 255).double()

    def apply(self, x: X) -> Y:
        unit = (self.high - self.low) / 255
        D, q = _cosines().to(x), self.table.to(x)
        blocks = _blocks((x - self.low) / unit - 128)
        kept = q * _round(D @ blocks @ D.T / q)
        return (_unblocks(D.T @ kept @ D) + 128) * unit + self.low

    def vjp(self, x: X, v: Y) -> X:
        """v: the straight-through derivative, D being orthonormal."""
        return v

    def guess(self, y: Y) -> X:
        """y."""
        return y

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        self._check(x)

    def check_measurements(self, y: Tensor) -> None:
        super().check_measurements(y)
        self._check(y)

    def _check(self, t: Tensor) -> None:
        _check_real(t, self)
        if t.ndim < 3 or t.shape[-2] % 8 or t.shape[-1] % 8:
            raise ValueError(
                "JPEG takes images (batch, …, h, w) with h and w multiples of 8, got "
                f"{tuple(t.shape)}: crop them, or repeat their edges"
            )


@final
@dataclass(frozen=True, eq=False)
class NetworkOperator(Operator):
    """y = f(x), a network that stays as it is: a learned blur, a decoder, a simulator.

    The module is copied, put into its evaluation mode, and its weights are fixed, so
    that y and A(x) are the same map's whatever happens to the original. Whatever it
    draws at random must be drawn beforehand and kept in a buffer: a kernel drawn anew
    at each call is another operator each time. It computes in its weights' precision.

    Args:
        module: f, on (batch, channels, *space), item by item.
        shape: an image's shape without its batch. Unless given, f is taken to keep the
            image's shape; given, f runs on one image to find the measurements' shape
            and that it answers the same twice.

    Raises:
        ValueError: the module takes no images of ``shape``, or is random.
    """

    module: nn.Module
    shape: tuple[int, ...] = ()
    _measured: tuple[int, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        module = copy.deepcopy(self.module).eval().requires_grad_(False)
        object.__setattr__(self, "module", module)
        if self.shape:
            object.__setattr__(self, "_measured", self._try())

    def _try(self) -> tuple[int, ...]:
        part = next(self._floats(), torch.zeros(()))
        x = torch.zeros(1, *self.shape, dtype=part.dtype, device=part.device)
        x = randn_like(x, Generator().manual_seed(0))
        with torch.no_grad():
            try:
                y, again = self.module(x), self.module(x)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                raise ValueError(
                    f"the network does not take images of shape {self.shape}: {why}"
                ) from error
        if not torch.equal(y, again):
            raise ValueError(
                "the network gives two answers to one image: draw what is random "
                "beforehand, and keep it in a buffer"
            )
        return tuple(y.shape[1:])

    def apply(self, x: X) -> Y:
        part = next(self._floats(), x)
        return self.module(x.to(part.dtype)).to(x.dtype)

    def pullback(self, x: X) -> tuple[Y, Callable[[Y], X]]:
        return autodiff(self.apply, x)

    def guess(self, y: Y) -> X:
        """y where f keeps the image's shape, else zeros."""
        return y if self.image_shape == self.measurement_shape else self.image_like(y)

    def to(self, device: torch.device) -> "NetworkOperator":
        if all(part.device == device for part in self.module.parameters()):
            return self
        return replace(self, module=copy.deepcopy(self.module).to(device))

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self._measured

    def _floats(self) -> Any:
        parts = (*self.module.parameters(), *self.module.buffers())
        return (part for part in parts if part.is_floating_point())


def _cast(codes: Tensor, like: Tensor) -> Tensor:
    dtype = like.dtype.to_complex() if codes.is_complex() else like.real.dtype
    return codes.to(dtype)


def _cosines() -> Float[Tensor, "8 8"]:
    """D, whose row k is √(2/8) cos(π k (2n + 1)/16), the first divided by √2."""
    k = torch.arange(8, dtype=torch.float64)
    D = torch.cos(torch.pi * k[:, None] * (2 * k + 1) / 16) / 2
    D[0] /= 2**0.5
    return D


def _blocks(x: Tensor) -> Tensor:
    """(…, h, w) to (…, h/8, w/8, 8, 8)."""
    return x.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)


def _unblocks(b: Tensor) -> Tensor:
    return b.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def _check_real(t: Tensor, operator: Operator) -> None:
    if t.is_complex():
        raise ValueError(
            f"{type(operator).__name__} is of real numbers, got {t.dtype}: take the "
            "real part or the magnitude before"
        )
