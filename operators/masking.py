"""Masks: inpainting, and every sampling pattern on a grid."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from invsolve.shapes import X, Y

from .base import LinearOperator


@final
@dataclass(frozen=True, eq=False)
class Mask(LinearOperator):
    """y = m ⊙ x.

    Args:
        mask: m, of an image's shape or one that broadcasts to it. Unitless; 0 hides
            a pixel and 1 shows it, and values between them weight it.

    >>> A = Mask(torch.tensor([1.0, 0.0, 2.0]))
    >>> A(torch.ones(1, 3))
    tensor([[1., 0., 2.]])
    >>> A.pinv(torch.ones(1, 3))
    tensor([[1.0000, 0.0000, 0.5000]])
    """

    mask: Float[Tensor, "*m"] | Bool[Tensor, "*m"]

    def __post_init__(self) -> None:
        if self.mask.dtype == torch.bool:
            object.__setattr__(self, "mask", self.mask.to(torch.float32))
        if not (self.mask >= 0).all():
            raise ValueError(
                f"a mask's weights must be ≥ 0, but the least is {self.mask.min():.3g}"
            )

    @classmethod
    def random(
        cls, shape: tuple[int, ...], keep: float, *, generator: Generator
    ) -> "Mask":
        """Each pixel of ``shape`` seen with probability ``keep``."""
        if not 0 < keep <= 1:
            raise ValueError(f"keep is a fraction between 0 and 1, got {keep}")
        return cls(torch.rand(shape, generator=generator) < keep)

    @classmethod
    def cartesian(
        cls,
        shape: tuple[int, int],
        acceleration: float,
        centre: float = 0.08,
        *,
        generator: Generator,
    ) -> "Mask":
        """Whole k-space columns: a full centre, and a random choice of the others.

        Exactly round(w / acceleration) of the w columns are kept.

        Args:
            shape: (h, w) of k-space, zero frequency in the middle.
            acceleration: how many times fewer columns than w.
            centre: the fraction of columns kept around zero frequency.
            generator: of the random choice.
        """
        h, w = shape
        kept, middle = round(w / acceleration), round(w * centre)
        if not middle <= kept <= w:
            raise ValueError(
                f"acceleration {acceleration} keeps {kept} of {w} columns, but the "
                f"centre alone is {middle}: lower the acceleration or the centre"
            )
        start = (w - middle + 1) // 2
        columns = torch.zeros(w, dtype=torch.bool)
        columns[start : start + middle] = True
        others = (~columns).nonzero().flatten()
        order = torch.randperm(len(others), generator=generator)
        columns[others[order[: kept - middle]]] = True
        return cls(columns.expand(h, w).clone())

    def apply(self, x: X) -> Y:
        return self._mask(x) * x

    def adjoint(self, y: Y) -> X:
        return self._mask(y) * y

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 0.0) -> X:
        """y / m where m > 0, else 0: the closed form."""
        return torch.where(self.mask > 0, y / self._mask(y), 0)

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 0,
        rtol: float = 0.0,
    ) -> X:
        """(m y + ρ v) / (m² + ρ): the closed form."""
        m = self._mask(v)
        return (m * y + rho * v) / (m**2 + rho)

    def norm(self, like: X, *, max_steps: int = 0, rtol: float = 0.0) -> float:
        return float(self.mask.max())

    @property
    def image_shape(self) -> tuple[int, ...]:
        # What broadcasts says nothing of an image, and four dimensions name the batch.
        shape = tuple(self.mask.shape[-3:])
        while 1 in shape:
            shape = shape[1:]
        return shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.image_shape

    def _mask(self, like: Tensor) -> Tensor:
        return self.mask.to(like.real.dtype)
