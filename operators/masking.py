"""Masks: inpainting, and every sampling pattern on a grid."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from invsolve.shapes import X, Y

from . import kernels
from .base import LinearOperator

Lines = Literal["rows", "columns"]


@final
@dataclass(frozen=True, eq=False)
class Mask(LinearOperator):
    """y = m ⊙ x.

    Args:
        mask: m, of an image's shape or one that broadcasts to it, or (batch, channels,
            *space) with one for each item. Unitless; 0 hides a pixel and 1 shows it,
            and values between them weight it.

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
        if self.mask.isinf().any():
            raise ValueError("a mask's weights must be finite")

    @classmethod
    def random(
        cls, shape: tuple[int, ...], keep: float, *, generator: Generator
    ) -> "Mask":
        """Each pixel of ``shape`` seen with probability ``keep``."""
        if not 0 < keep <= 1:
            raise ValueError(f"keep is a fraction between 0 and 1, got {keep}")
        return cls(torch.rand(shape, generator=generator) < keep)

    @classmethod
    def box(
        cls,
        shape: tuple[int, int],
        size: tuple[int, int],
        corner: tuple[int, int] | None = None,
        *,
        generator: Generator | None = None,
    ) -> "Mask":
        """A rectangle is hidden, all of it inside the image.

        Args:
            shape: (h, w) of the images.
            size: (height, width) of the rectangle.
            corner: (row, column) of its upper left pixel; or
            generator: of its place, where every one is as likely; with neither of the
                two it lies in the middle.
        """
        if corner is not None and generator is not None:
            raise ValueError("give a box its corner or a generator of it, not both")
        room = [n - m for n, m in zip(shape, size, strict=True)]
        if min(*room, *(m - 1 for m in size)) < 0:
            raise ValueError(f"a box of {size} does not fit into an image of {shape}")
        if generator is not None:
            top, left = (_below(most + 1, generator) for most in room)
        else:
            top, left = corner or (room[0] // 2, room[1] // 2)
        if not (0 <= top <= room[0] and 0 <= left <= room[1]):
            raise ValueError(
                f"a box of {size} at {corner} reaches out of the image: its corner is "
                f"at most {tuple(room)}"
            )
        mask = torch.ones(shape)
        mask[top : top + size[0], left : left + size[1]] = 0
        return cls(mask)

    @classmethod
    def freeform(
        cls,
        shape: tuple[int, int],
        hide: float,
        strokes: int = 4,
        *,
        generator: Generator,
    ) -> "Mask":
        """Strokes of a round brush hide exactly round(hide·h·w) pixels: the nearest.

        Every stroke is a path with a direction that wanders, as `kernels.motion` has
        it, as long as the longer side and about a random pixel; all have one width.

        Args:
            shape: (h, w) of the images.
            hide: the fraction of pixels hidden.
            strokes: their number.
            generator: of the strokes.
        """
        h, w = shape
        if not 0 < hide < 1 or strokes < 1:
            raise ValueError(
                "hide is a fraction between 0 and 1, of at least one stroke, "
                f"got {hide} and {strokes}"
            )
        pixels = torch.cartesian_prod(torch.arange(h), torch.arange(w)).double()
        distance = torch.full((h * w,), torch.inf, dtype=torch.float64)
        for _ in range(strokes):
            theta = kernels.headings(max(shape), 3.0, generator)
            middle = torch.tensor([_below(n, generator) for n in shape])
            points = kernels.path(float(max(shape)), theta) + middle
            distance = distance.minimum(torch.cdist(pixels, points).amin(1))
        mask = torch.ones(h * w)
        mask[distance.argsort(stable=True)[: round(hide * h * w)]] = 0
        return cls(mask.reshape(shape))

    @classmethod
    def lines(
        cls,
        shape: tuple[int, int],
        keep: float,
        of: Lines = "rows",
        *,
        generator: Generator,
    ) -> "Mask":
        """Whole rows or columns are missing: exactly round(keep·n) of n are seen.

        Args:
            shape: (h, w) of the images.
            keep: the fraction seen.
            of: whether rows or columns.
            generator: of the random choice.
        """
        if of not in get_args(Lines):
            raise ValueError(f"lines are rows or columns, got {of!r}")
        n = shape[get_args(Lines).index(of)]
        if not 0 < keep <= 1 or round(keep * n) == 0:
            raise ValueError(f"keep is a fraction between 1/{n} and 1, got {keep}")
        order = torch.randperm(n, generator=generator, device=generator.device)
        line = torch.zeros(n)
        line[order[: round(keep * n)].cpu()] = 1
        return cls((line[:, None] if of == "rows" else line).expand(shape).clone())

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

    def check_measurements(self, y: Tensor) -> None:
        super().check_measurements(y)
        if self._each_has_its_own(y.ndim) and len(y) != len(self.mask):
            raise ValueError(
                f"a Mask of {len(self.mask)} items was given measurements of {len(y)}: "
                "give a mask for each item, or one for all"
            )

    def items(self, index: Tensor, ndim: int) -> "Mask":
        if not self._each_has_its_own(ndim):
            return self
        return Mask(self.mask[index.to(self.mask.device)])

    def _each_has_its_own(self, ndim: int) -> bool:
        return self.mask.ndim == ndim and len(self.mask) > 1

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

    def norm(
        self, like: X | None = None, *, max_steps: int = 0, rtol: float = 0.0
    ) -> float:
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


def _below(n: int, generator: Generator) -> int:
    """A random number from 0 to n − 1."""
    return int(torch.randint(n, (1,), generator=generator, device=generator.device))
