"""Colour: what a camera's sensor, or a grey photograph, keeps of it."""

from abc import abstractmethod
from dataclasses import dataclass
from math import isfinite
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from invsolve.shapes import X, Y

from .rows import OrthogonalRows

Pattern = Literal["RGGB", "BGGR", "GRBG", "GBRG"]


class _ChannelSum(OrthogonalRows):
    """y = Σ_c w_c ⊙ x_c: channels seen as one."""

    @abstractmethod
    def _weights(self, like: Tensor) -> Float[Tensor, "c _ _"]:
        """w, which broadcasts to the image."""

    def apply(self, x: X) -> Y:
        return (self._weights(x) * x).sum(1, keepdim=True)

    def adjoint(self, y: Y) -> X:
        return self._weights(y) * y

    def _check(self, t: Tensor, channels: int, what: str) -> None:
        if t.ndim != 4 or t.shape[1] != channels:
            raise ValueError(
                f"{type(self).__name__} expects {what} of shape "
                f"(batch, {channels}, h, w), got {tuple(t.shape)}"
            )

    def check_measurements(self, y: Tensor) -> None:
        self._check(y, 1, "measurements")


@final
@dataclass(frozen=True, eq=False)
class Greyscale(_ChannelSum):
    """y = Σ_c w_c x_c: colourisation. A Aᴴ = ‖w‖² I.

    Args:
        weights: w, one for each channel; those of ITU-R BT.601's luma unless given.

    >>> Greyscale()(torch.ones(1, 3, 1, 2))
    tensor([[[[1., 1.]]]])
    """

    weights: tuple[float, ...] = (0.299, 0.587, 0.114)

    def __post_init__(self) -> None:
        if not any(self.weights) or not all(map(isfinite, self.weights)):
            raise ValueError(
                f"a grey image needs finite weights, not all 0, got {self.weights}"
            )

    @property
    def image_channels(self) -> int:
        return len(self.weights)

    @property
    def energy(self) -> float:
        return sum(w**2 for w in self.weights)

    def check_image(self, x: Tensor) -> None:
        self._check(x, len(self.weights), "an image")

    def _weights(self, like: Tensor) -> Float[Tensor, "c _ _"]:
        w = torch.tensor(self.weights, dtype=like.real.dtype, device=like.device)
        return w[:, None, None]


@final
@dataclass(frozen=True, eq=False)
class Bayer(_ChannelSum):
    """y_ij = x_cij with c the filter before pixel (i, j): demosaicing. A Aᴴ = I.

    The pattern of 2 × 2 filters repeats from the upper left corner over (batch, 3, h, w)
    images, red, green and blue in this order.

    Args:
        pattern: the filters, row by row.

    >>> x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4)
    >>> Bayer("RGGB")(x)
    tensor([[[[1., 2., 1., 2.],
              [2., 3., 2., 3.]]]])
    """

    pattern: Pattern = "RGGB"

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(
                f"unknown pattern {self.pattern!r}: choose one of "
                f"{', '.join(get_args(Pattern))}"
            )

    @property
    def image_channels(self) -> int:
        return 3

    @property
    def energy(self) -> float:
        return 1.0

    def check_image(self, x: Tensor) -> None:
        self._check(x, 3, "an image")

    def _weights(self, like: Tensor) -> Float[Tensor, "c h w"]:
        h, w = like.shape[-2:]
        filters = torch.tensor(["RGB".index(c) for c in self.pattern]).reshape(2, 2)
        seen = (
            filters.repeat(h // 2 + 1, w // 2 + 1)[:h, :w]
            == torch.arange(3)[:, None, None]
        )
        return seen.to(like.device, like.real.dtype)
