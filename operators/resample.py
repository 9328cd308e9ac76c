"""Fewer pixels: super-resolution."""

from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from invsolve.shapes import X, Y

from .base import LinearOperator


@final
@dataclass(frozen=True, eq=False)
class Downsample(LinearOperator):
    """y = the mean of each f×f block of x, as a detector with larger pixels sees it.

    A Aᴴ = I/f², so that pinv and prox are closed forms.

    Args:
        factor: f, pixels a side.
        shape: (h, w) of the images, both divisible by f.
    """

    factor: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        if self.factor < 1 or any(n % self.factor for n in self.shape):
            raise ValueError(
                f"a factor of {self.factor} does not divide images of {self.shape}: "
                "crop or pad the image to a multiple of the factor"
            )

    def apply(self, x: X) -> Y:
        return avg_pool2d(x, self.factor)

    def adjoint(self, y: Y) -> X:
        return interpolate(y, scale_factor=self.factor, mode="nearest") / self.factor**2

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 0.0) -> X:
        """f² Aᴴ y: every pixel of a block has its mean."""
        return self.factor**2 * self.adjoint(y)

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 0,
        rtol: float = 0.0,
    ) -> X:
        """v + Aᴴ(y − A v)/(1/f² + ρ), by the Woodbury identity."""
        return v + self.adjoint(y - self.apply(v)) / (1 / self.factor**2 + rho)

    def norm(self, like: X, *, max_steps: int = 0, rtol: float = 0.0) -> float:
        return 1 / self.factor

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return tuple(n // self.factor for n in self.shape)
