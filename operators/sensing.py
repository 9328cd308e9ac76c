"""Compressed sensing: a few incoherent projections of the image."""

from dataclasses import dataclass
from math import prod
from typing import final

import torch
from jaxtyping import Float, Inexact, Int
from torch import Generator, Tensor

from invsolve.shapes import X, Y

from .rows import OrthogonalRows


@final
@dataclass(frozen=True, eq=False)
class CompressedSensing(OrthogonalRows):
    """y = S H (d ⊙ x): m rows of a randomised Walsh–Hadamard transform. A Aᴴ = I.

    H is orthonormal, of each channel's n = h·w pixels in the order of memory; a
    single-pixel camera with patterns of ±1 measures √n y. See Do et al. 2012.

    Args:
        signs: d, ±1 for each pixel, of an image's shape (channels, h, w); n is a power
            of two.
        rows: S, the indices of the rows of H that are kept, the same for all channels.
    """

    signs: Float[Tensor, "*c h w"]
    rows: Int[Tensor, " m"]

    def __post_init__(self) -> None:
        _check_power_of_two(tuple(self.signs.shape))
        if not (self.signs.abs() == 1).all():
            raise ValueError("signs are +1 or −1, one for each pixel")
        n = self.signs.shape[-2] * self.signs.shape[-1]
        distinct = len(self.rows.unique()) == len(self.rows) > 0
        if not distinct or self.rows.min() < 0 or self.rows.max() >= n:
            raise ValueError(
                f"rows are distinct indices from 0 to {n - 1}, at least one"
            )

    @classmethod
    def random(
        cls, shape: tuple[int, ...], keep: float, *, generator: Generator
    ) -> "CompressedSensing":
        """Random signs, and exactly round(keep·h·w) random rows.

        Args:
            shape: (channels, h, w) of the images.
            keep: measurements as a fraction of the pixels.
            generator: of both.
        """
        _check_power_of_two(shape)
        n = prod(shape[-2:])
        m = round(keep * n) if 0 < keep <= 1 else 0
        if m < 1:
            raise ValueError(f"keep is a fraction between 1/{n} and 1, got {keep}")
        device = generator.device
        coins = torch.randint(2, shape, generator=generator, device=device)
        rows = torch.randperm(n, generator=generator, device=device)[:m]
        return cls(2.0 * coins - 1, rows)

    @property
    def energy(self) -> float:
        return 1.0

    def apply(self, x: X) -> Y:
        z = (self.signs.to(x.real.dtype) * x).flatten(-2)
        return walsh_hadamard(z).index_select(-1, self.rows)

    def adjoint(self, y: Y) -> X:
        size = self.signs.shape[-2:]
        z = y.new_zeros(*y.shape[:-1], size.numel()).index_copy(-1, self.rows, y)
        return self.signs.to(y.real.dtype) * walsh_hadamard(z).unflatten(-1, size)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.signs.shape)

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return *self.signs.shape[:-2], len(self.rows)


def walsh_hadamard(x: Inexact[Tensor, "*batch n"]) -> Inexact[Tensor, "*batch n"]:
    """H x along the last dimension, H_ij = (−1)^⟨i, j⟩/√n with the bits' inner product.

    Its own inverse, in n log₂ n additions.

    >>> walsh_hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    n, half = x.shape[-1], 1
    z = x
    while half < n:
        a, b = z.reshape(*x.shape[:-1], n // (2 * half), 2, half).unbind(-2)
        z = torch.stack((a + b, a - b), -2)
        half *= 2
    return z.reshape(x.shape) / n**0.5


def _check_power_of_two(shape: tuple[int, ...]) -> None:
    n = prod(shape[-2:])
    if len(shape) < 2 or n < 1 or n & (n - 1):
        raise ValueError(
            f"a Walsh–Hadamard transform needs h·w to be a power of two, got {shape}: "
            "crop or pad the image"
        )
