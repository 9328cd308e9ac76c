"""Registration: pictures seen through a field of displacements, which is the signal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

from invsolve.shapes import X, Y

from .base import Operator, autodiff


@final
@dataclass(frozen=True, eq=False)
class Warp(Operator):
    """y_c(p) = I_c(p + S(p)): each picture, its points moved by S.

    S is (batch, 2, h, w) in pixels, down and right; y is (batch, 1, pictures, h, w).
    Bilinear between pixels; beyond the border a picture goes on as it ends.

    Args:
        pictures: I, (pictures, h, w), real.

    >>> A = Warp(torch.arange(4.0).reshape(1, 1, 4))
    >>> right = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 4)
    >>> A(right).flatten()
    tensor([1., 2., 3., 3.])
    """

    pictures: Float[Tensor, "pictures h w"]

    def __post_init__(self) -> None:
        if not self.pictures.isfinite().all():
            raise ValueError("pictures must be finite, but some are NaN or infinite")

    @property
    def image_shape(self) -> tuple[int, ...]:
        return (2, *self.pictures.shape[1:])

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return (1, *self.pictures.shape)

    def apply(self, x: X) -> Y:
        h, w = self.pictures.shape[1:]
        down = torch.arange(h).to(x)[:, None] + x[:, 0]
        right = torch.arange(w).to(x) + x[:, 1]
        # 2 (i + ½)/n − 1, as the sampler counts: pixels are areas, not points.
        at = [(2 * right + 1) / w - 1, (2 * down + 1) / h - 1]
        seen = grid_sample(
            self.pictures.to(x)[None].expand(len(x), -1, -1, -1),
            torch.stack(at, -1),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return seen[:, None]

    def pullback(self, x: X) -> tuple[Y, Callable[[Y], X]]:
        return autodiff(self.apply, x)
