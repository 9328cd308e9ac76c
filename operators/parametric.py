"""Families of operators: one measurement of which every exam acquires other rows.

A_φ = m_φ ⊙ A: A measures everything that the device could, and φ says what of it one exam
acquired. What is left out is zero, so that exams of different φ make one batch.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Generator, Tensor

from invsolve.random import randn_like
from invsolve.shapes import Y

from .base import Compose, Identity, LinearOperator, tensors
from .ct import ParallelBeam
from .masking import Mask
from .mri import Coils, ComplexChannels, Fourier

Rows = Bool[Tensor, "_ *grid"]
"""What each exam acquired, of all that can be; one exam's may hold for a whole batch."""
PerRow = Float[Tensor, "_ *grid"]
PerPixel = Float[Tensor, "_ *space"]
PROBED = 256
"""Images that go through the operator together where it is probed."""


@final
@dataclass(frozen=True, eq=False)
class Parametric:
    """φ ↦ A_φ = m_φ ⊙ A. A row is what is acquired together: a pixel, a line, a view.

    φ is (batch, *grid), true where acquired; measurements are of the whole device's
    shape, (batch, channels, *measured), with zeros elsewhere.

    Args:
        full: A, everything that can be acquired.
        image: (channels, *space) of the images.
        measured: the shape of A's measurements without batch and channels.
        axes: of ``measured``, counted from the end: those that tell rows apart.

    >>> family = Parametric.pixels((1, 1, 3))
    >>> family(torch.tensor([[[True, False, True]]]))(torch.ones(1, 1, 1, 3))
    tensor([[[[1., 0., 1.]]]])
    """

    full: LinearOperator
    image: tuple[int, ...]
    measured: tuple[int, ...]
    axes: tuple[int, ...]

    @classmethod
    def pixels(cls, image: tuple[int, int, int]) -> "Parametric":
        """Inpainting: A = I, and a row is a pixel (with all its channels)."""
        return cls(Identity(), image, image[1:], (-2, -1))

    @classmethod
    def lines(
        cls,
        shape: tuple[int, int],
        maps: Complex[Tensor, "coils h w"] | None = None,
    ) -> "Parametric":
        """Cartesian MRI: a row is a column of k-space, of all coils together.

        Args:
            shape: (h, w) of the images, whose two channels are real and imaginary part.
            maps: the coils' sensitivities, as `Coils` takes them; one coil unless given.
        """
        full: LinearOperator = Fourier() @ ComplexChannels()
        if maps is not None:
            full = Fourier() @ Coils(maps) @ ComplexChannels()
        return cls(full, (2, *shape), shape, (-1,))

    @classmethod
    def views(cls, beam: ParallelBeam) -> "Parametric":
        """CT: a row is a view, of all those of ``beam``."""
        return cls(beam, (1, *beam.shape), beam.measurement_shape, (-2,))

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of φ."""
        return tuple(self.measured[axis] for axis in self.axes)

    def __call__(self, rows: Rows) -> Compose:
        """A_φ, of one φ for each item of the batch, or of one for all."""
        self.check(rows)
        return Mask(self.spread(rows)) @ self.full

    def check(self, rows: Rows) -> None:
        """Refuse what is no φ of this family, with a ValueError."""
        if tuple(rows.shape[1:]) != self.grid:
            raise ValueError(
                f"rows of shape (batch, {', '.join(map(str, self.grid))}) are needed, "
                f"got {tuple(rows.shape)}: they are of another geometry"
            )

    def spread(self, values: Tensor) -> Tensor:
        """(batch, *grid) to (batch, 1, *measured): each row's value where it lies."""
        ends = {
            a % len(self.measured): n for a, n in zip(self.axes, self.grid, strict=True)
        }
        shape = [ends.get(i, 1) for i in range(len(self.measured))]
        return values.reshape(-1, 1, *shape).expand(-1, 1, *self.measured)

    def gather(self, y: Y) -> PerRow:
        """Σ|y|² over all that belongs to a row."""
        others = [a for a in range(-len(self.measured), 0) if a not in self.axes]
        energy = (y.conj() * y).real.sum(1, keepdim=True)
        energy = energy.sum(others, keepdim=True) if others else energy
        return energy.reshape(len(y), *self.grid)

    def restrict(self, rows: Rows, subset: Rows) -> Rows:
        """The subset as a φ of its own.

        Raises:
            ValueError: some of it was not acquired.
        """
        self.check(subset)
        if (subset & ~rows).any():
            missing = int((subset & ~rows).sum())
            raise ValueError(f"{missing} of the rows asked for were not acquired")
        return subset

    def restrict_data(self, y: Y, subset: Rows) -> Y:
        """The measurements of the subset's rows, and 0 elsewhere."""
        return torch.where(self.spread(subset), y, 0)

    def union(self, first: Rows, second: Rows) -> Rows:
        """All rows of either."""
        return first | second

    def join(self, y: Y, rows: Rows, more: Y) -> Y:
        """The measurements y of the rows, and ``more`` elsewhere."""
        return torch.where(self.spread(rows), y, more)

    def split(
        self,
        rows: Rows,
        sizes: Int[Tensor, "batch parts"],
        *,
        generator: Generator,
        kept: Bool[Tensor, "*grid"] | None = None,
    ) -> list[Rows]:
        """Disjoint random subsets of each item's rows; what no size names is in none.

        Args:
            rows: what was acquired.
            sizes: how many rows each part gets, for each item; −1 in the last takes all
                that are left.
            generator: of the choice.
            kept: rows that belong to the first part wherever they were acquired (the
                centre of k-space); they count.

        Raises:
            ValueError: an item has too few rows.
        """
        flat = rows.flatten(1)
        chance = torch.rand(flat.shape, generator=generator).to(flat.device)
        chance = chance.masked_fill(~flat, 2.0)
        if kept is not None:
            chance = chance.masked_fill(flat & kept.flatten(), -1.0)
        rank = chance.argsort(dim=1, stable=True).argsort(dim=1)
        total = flat.sum(1)
        sizes = sizes.clone()
        left = sizes[:, -1] < 0
        sizes[left, -1] = total[left] - sizes[left, :-1].sum(1)
        parts, first = [], torch.zeros_like(total)
        for size in sizes.unbind(1):
            last = first + size
            if (size < 0).any() or (last > total).any():
                worst = int((last - total).argmax())
                raise ValueError(
                    f"an exam of {int(total[worst])} rows cannot be split into parts of "
                    f"{sizes[worst].tolist()}: make them smaller"
                )
            inside = (rank >= first[:, None]) & (rank < last[:, None])
            parts.append(inside.reshape(rows.shape))
            first = last
        return parts

    def coverage(self, rows: Rows) -> Float[Tensor, "batch one *space"]:
        """diag(A_φᴴ A_φ) / max diag(AᴴA): how well each pixel is seen, 0 … 1."""
        if isinstance(self.full, Identity):
            return self.spread(rows).float()
        weight = rows.flatten(1).float()
        energy = self.energies.to(weight)
        seen = (weight @ energy.flatten(1)) / energy.sum(0).max()
        return seen.reshape(len(rows), 1, *self.image[1:])

    @cached_property
    def energies(self) -> PerPixel:
        """Σ|A_ij|² over i of each row, for each pixel j of the first channel; exact."""
        pixels = torch.Size(self.image[1:]).numel()
        columns = []
        for some in torch.arange(pixels).split(PROBED):
            x = torch.zeros(len(some), *self.image)
            x[:, 0].flatten(1)[torch.arange(len(some)), some] = 1
            columns.append(self.gather(self.full.apply(x.to(self.device))).flatten(1))
        return torch.cat(columns).T.reshape(-1, *self.image[1:])

    def whitening(self, y: Y, rows: Rows) -> Float[Tensor, "*grid"]:
        """1/√(mean y²) of each row over the exams that acquired it.

        Of complex measurements y is the real and the imaginary part, each.

        Rows are pooled where theirs must be alike: all views; k-space columns of one
        |k|; pixels.

        Raises:
            ValueError: no exam acquired a row, nor one that is pooled with it.
        """
        self.check(rows)
        flat = rows.flatten(1)
        energy = (self.gather(y).flatten(1) * flat).sum(0)
        each = y[0].numel() * (1 + y.is_complex()) / flat.shape[1]
        groups = self._alike().to(flat.device)
        count = torch.zeros(int(groups.max()) + 1, device=flat.device)
        total = count.index_add(0, groups, energy)
        count = count.index_add(0, groups, each * flat.sum(0))
        if not (total > 0).all():
            raise ValueError(
                "some rows were never acquired, or are always 0: leave them out of the "
                "geometry"
            )
        return (count / total).sqrt()[groups].reshape(self.grid)

    def _alike(self) -> Int[Tensor, " rows"]:
        n = torch.Size(self.grid).numel()
        if self.axes == (-1,):
            return (torch.arange(n) - n // 2).abs()
        return torch.zeros(n, dtype=torch.long)

    def acquired(self, A: LinearOperator, y: Y) -> tuple[Rows, float]:
        """(φ, c) with A = c A_φ, read off the operator; one φ for all items.

        Args:
            A: an operator of this family, whatever is wrapped around it.
            y: its measurements, of which the shape, dtype and device are used.

        Raises:
            ValueError: it is of another geometry.
        """
        real = y.real if y.is_complex() else y
        x = randn_like(real.new_zeros(1, *self.image), Generator().manual_seed(0))
        told = ValueError(
            "the operator is not one of those that were trained for: it has another "
            "geometry; make it as prior.family(rows)"
        )
        try:
            seen, all_ = A.apply(x), self.full.apply(x)
        except (ValueError, RuntimeError) as error:
            raise told from error
        if seen.shape != all_.shape:
            raise told
        rows = self.gather(seen) > 0
        mask = self.spread(rows)
        expected = torch.where(mask, all_, 0)
        energy = self.gather(expected).sum()
        if not energy > 0:
            raise ValueError("the operator acquires no row: there is no context")
        c = float((expected.conj() * seen).real.sum() / energy)
        if (seen - c * expected).abs().max() > 1e-4 * abs(c) * all_.abs().max():
            raise told
        return rows, c

    @property
    def device(self) -> torch.device:
        """Where the operator's tensors are; the CPU where it has none."""
        return next((t.device for t in tensors(self.full)), torch.device("cpu"))

    def to(self, device: torch.device) -> "Parametric":
        """The same family on a device."""
        return replace(self, full=self.full.to(device))
