"""What the laws' tables are made of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from invsolve.operators import LinearOperator

float64 = torch.float64
H, W = 6, 8


@dataclass(frozen=True)
class Case:
    """An operator and the images it takes."""

    make: Callable[[Generator, torch.dtype], LinearOperator]
    shape: tuple[int, ...] = (1, H, W)
    complex_image: bool = False
    any_shape: bool = False
    """It takes images of any shape, so that none is wrong."""

    def image(self, g: Generator, dtype: torch.dtype = float64) -> Tensor:
        kind = dtype.to_complex() if self.complex_image else dtype
        return torch.randn(3, *self.shape, dtype=kind, generator=g)


def rand(*shape: int, g: Generator, dtype: torch.dtype) -> Tensor:
    """Uniform on [0, 1)."""
    return torch.rand(*shape, dtype=dtype, generator=g)
