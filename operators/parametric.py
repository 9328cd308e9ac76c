"""Families of operators: one measurement of which every exam acquires other rows.

A_φ = m_φ ⊙ A: A measures everything that the device could, and φ says what of it one exam
acquired. What is left out is zero, so that exams of different φ make one batch.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Generator, Tensor

from invsolve.random import randn_like
from invsolve.shapes import Y

from .base import Identity, LinearOperator, Operator, tensors
from .ct import ParallelBeam
from .masking import Mask
from .mri import Coils, ComplexChannels, Fourier, RealImage
from .warp import Warp

Rows = Bool[Tensor, "_ *grid"]
"""What each exam acquired, of all that can be; one exam's may hold for a whole batch."""
PerRow = Float[Tensor, "_ *grid"]
PerPixel = Float[Tensor, "_ *space"]
PROBED = 256
"""Images that go through the operator together where it is probed."""
MODELS = [{"oversample": k, "rays": m} for k in (1, 2) for m in (1, 2)]
"""How beams of one geometry are likely to model it."""


class Acquired(NamedTuple):
    """Measurements as a family has them: A_φ x + noise, with zeros elsewhere."""

    rows: Rows
    y: Y


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
        words: what `from_words` makes it of again.

    >>> family = Parametric.pixels((1, 1, 3))
    >>> family(torch.tensor([[[True, False, True]]]))(torch.ones(1, 1, 1, 3))
    tensor([[[[1., 0., 1.]]]])
    """

    full: Operator
    image: tuple[int, ...]
    measured: tuple[int, ...]
    axes: tuple[int, ...]
    words: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def pixels(cls, image: tuple[int, int, int]) -> "Parametric":
        """Inpainting: A = I, and a row is a pixel (with all its channels)."""
        words = {"rows": "pixels", "image": list(image)}
        return cls(Identity(), image, image[1:], (-2, -1), words)

    @classmethod
    def lines(
        cls,
        shape: tuple[int, int],
        maps: Complex[Tensor, "coils h w"] | None = None,
        *,
        real: bool = False,
    ) -> "Parametric":
        """Cartesian MRI: a row is a column of k-space, of all coils together.

        Args:
            shape: (h, w) of the images.
            maps: the coils' sensitivities, as `Coils` takes them; one coil unless given.
            real: whether images are known to be real, and have one channel; otherwise
                their two are real and imaginary part.
        """
        full: LinearOperator = RealImage() if real else ComplexChannels()
        if maps is not None:
            full = Coils(maps) @ full
        words: dict[str, Any] = {"rows": "lines", "shape": list(shape), "real": real}
        if maps is not None:
            words["maps"] = maps
        channels = 1 if real else 2
        return cls(Fourier() @ full, (channels, *shape), shape, (-1,), words)

    @classmethod
    def views(cls, beam: ParallelBeam) -> "Parametric":
        """CT: a row is a view, of all those of ``beam``."""
        words: dict[str, Any] = {
            "rows": "views",
            "shape": list(beam.shape),
            "angles": beam.angles,
            "pixel_mm": beam.pixel_mm,
            "detectors": beam.detectors,
            "detector_mm": beam.detector_mm,
            "oversample": beam.oversample,
            "rays": beam.rays,
        }
        return cls(beam, (1, *beam.shape), beam.measurement_shape, (-2,), words)

    @classmethod
    def warps(cls, pictures: Float[Tensor, "pictures h w"]) -> "Parametric":
        """Registration: the signal is a field of displacements, and a row is a picture."""
        words = {"rows": "warps", "pictures": pictures}
        shape = tuple(pictures.shape)
        return cls(Warp(pictures), (2, *shape[1:]), shape, (-3,), words)

    @classmethod
    def from_words(cls, words: Mapping[str, Any]) -> "Parametric":
        """The family that ``words`` tells of: ``rows``, and what its maker is given.

        Raises:
            ValueError: it tells of none.
        """
        told = dict(words)
        kind = told.pop("rows", None)
        try:
            if kind == "pixels":
                return cls.pixels(tuple(told.pop("image")))
            if kind == "warps":
                return cls.warps(told.pop("pictures"))
            shape = tuple(told.pop("shape"))
            if kind == "lines":
                return cls.lines(shape, told.pop("maps", None), **told)
            if kind == "views":
                return cls.views(ParallelBeam(shape, **told))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a family of operators lacks {error}") from error
        raise ValueError(f"unknown rows {kind!r}: pixels, lines, views or warps")

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of φ."""
        return tuple(self.measured[axis] for axis in self.axes)

    @property
    def linear(self) -> LinearOperator:
        """A, if it is linear; else a ValueError."""
        if not isinstance(self.full, LinearOperator):
            raise ValueError(f"{type(self.full).__name__} is not linear")
        return self.full

    def __call__(self, rows: Rows) -> Operator:
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
        pixels = math.prod(self.image[1:])
        columns = []
        for some in torch.arange(pixels).split(PROBED):
            x = torch.zeros(len(some), *self.image)
            x[:, 0].flatten(1)[torch.arange(len(some)), some] = 1
            columns.append(self.gather(self.full.apply(x.to(self.device))).flatten(1))
        return torch.cat(columns).T.reshape(-1, *self.image[1:])

    def turned(self, y: Y) -> Y:
        """Views by their cosine transforms, orthonormal; what else there is stays.

        Within a row, so that masks of rows and white noise are what they were; and in
        it what is seen of an image has variances that differ by frequency alone.
        """
        return y if self._cosines is None else y @ self._cosines.to(y).T

    def unturned(self, v: Y) -> Y:
        """The inverse of `turned`, and its adjoint."""
        return v if self._cosines is None else v @ self._cosines.to(v)

    @cached_property
    def density(self) -> Float[Tensor, "*measured"]:
        """Of turned measurements: AᴴdA is near to a multiple of the identity.

        Of views the ramp of filtered backprojection; else 1.
        """
        if self.words.get("rows") != "views":
            return torch.ones(self.measured)
        return torch.arange(self.measured[-1]).clamp_min(0.5).expand(self.measured)

    def whitening(self, y: Y, rows: Rows) -> Float[Tensor, "*measured"]:
        """1/√(mean v²) of turned measurements over the exams that acquired them.

        Of complex measurements v is the real and the imaginary part, each. Those are
        pooled that must be alike: one frequency of all views; k-space columns of one
        |k|; pixels. What was never acquired has the value of the next that was.

        Raises:
            ValueError: no exam acquired anything but zeros.
        """
        self.check(rows)
        v = self.turned(y)
        mask = self.spread(rows)
        energy = torch.where(mask, (v.conj() * v).real, 0).sum((0, 1)).flatten()
        times = mask.expand(v.shape).sum((0, 1)).flatten() * (1 + v.is_complex())
        groups = self._alike().to(energy.device).flatten()
        nothing = energy.new_zeros(int(groups.max()) + 1)
        total = nothing.index_add(0, groups, energy)
        count = nothing.index_add(0, groups, times.to(energy))
        known = (total > 0).nonzero().flatten()
        if not len(known):
            raise ValueError("no row was acquired, or all are 0: check the exams")
        at = torch.arange(len(total), device=energy.device)
        nearest = known[(at[:, None] - known).abs().argmin(1)]
        return (count / total).sqrt()[nearest][groups].reshape(self.measured)

    def _alike(self) -> Int[Tensor, "*measured"]:
        kind, n = self.words.get("rows"), self.measured[-1]
        if kind == "warps":
            return torch.arange(self.measured[0])[:, None, None].expand(self.measured)
        at = torch.arange(n)
        if kind == "lines":
            return (at - n // 2).abs().expand(self.measured)
        return at.expand(self.measured) * (kind == "views")

    @cached_property
    def _cosines(self) -> Float[Tensor, "n n"] | None:
        """The orthonormal DCT-II over detector elements."""
        if self.words.get("rows") != "views":
            return None
        n = self.measured[-1]
        at = torch.arange(n, dtype=torch.float64)
        basis = (torch.pi / n * (at + 0.5) * at[:, None]).cos() * (2 / n) ** 0.5
        basis[0] /= 2**0.5
        return basis.to(self.device)

    def acquired(self, A: Operator, y: Y, gain: float = 1.0) -> "Acquired":
        """What an operator's measurements are in this family.

        One φ holds for all items, unless the operator has one for each.

        Args:
            A: u ↦ A_φ(gain u), or its rows alone (a beam of these views), in any order,
                whatever is wrapped around it. A beam may take pixels and elements for
                points or not, as the family does or not: they are of the same data.
            y: its measurements.
            gain: an image in its own unit over u.

        Raises:
            ValueError: it is of another geometry, or another unit.
        """
        try:
            return self._acquired(A, y, gain)
        except ValueError:
            for family in self._otherwise_modelled():
                with suppress(ValueError):
                    return family._acquired(A, y, gain)
            raise

    def _otherwise_modelled(self) -> Iterator["Parametric"]:
        """Families of views whose pixels, or elements, are points where these are not."""
        if self.words.get("rows") != "views":
            return
        for model in MODELS:
            if any(self.words[key] != value for key, value in model.items()):
                yield self.from_words({**self.words, **model}).to(self.device)

    def _acquired(self, A: Operator, y: Y, gain: float) -> "Acquired":
        real = y.real if y.is_complex() else y
        x = randn_like(real.new_zeros(1, *self.image), Generator().manual_seed(0))
        told = ValueError(
            "the operator is not one of those that were trained for: it has another "
            "geometry; its rows must be among prior.family's"
        )
        each = A.items(torch.tensor([0]), y.ndim) is not A
        try:
            seen = A.apply(x.expand(len(y), *x.shape[1:]) if each else x)
            all_ = self.full.apply(gain * x)
        except (ValueError, RuntimeError) as error:
            raise told from error
        if seen.shape[1:] != all_.shape[1:]:
            at = self._places(seen, all_)
            if at is None:
                raise told
            seen, y = (self._scattered(v, at) for v in (seen, y))
        rows = self.gather(seen) > 0
        expected = torch.where(self.spread(rows), all_, 0)
        if not rows.flatten(1).any(1).all():
            raise ValueError("the operator acquires no row: there is no context")
        far = (seen - expected).abs().max() / all_.abs().max()
        if far > 1e-4:
            c = float(
                (expected.conj() * seen).real.sum() / expected.abs().square().sum()
            )
            if (seen - c * expected).abs().max() > 1e-4 * abs(c) * all_.abs().max():
                raise told
            raise ValueError(
                f"the operator is {c:.4g} times the one that was trained for: call the "
                "sampler through invsolve.solve, in the prior's unit"
            )
        return Acquired(rows, self.restrict_data(y, rows))

    def _places(self, seen: Tensor, all_: Tensor) -> Tensor | None:
        """Which row each of fewer rows is, by what they see of one image."""
        if len(self.axes) != 1 or seen.ndim != all_.ndim:
            return None
        axis = self.axes[0]
        few, many = seen.movedim(axis, 0), all_.movedim(axis, 0)
        if few.shape[1:] != many.shape[1:] or len(few) > len(many):
            return None
        few, many = few.flatten(1), many.flatten(1)
        few, many = (v / v.norm(dim=1, keepdim=True) for v in (few, many))
        likeness, at = (few.conj() @ many.T).real.max(1)
        unlike = (likeness < 1 - 1e-4).any() or len(at.unique()) < len(at)
        return None if unlike else at

    def _scattered(self, y: Tensor, at: Tensor) -> Tensor:
        axis = self.axes[0]
        whole = y.new_zeros(*y.shape[:2], *self.measured)
        whole.movedim(axis, 0)[at] = y.movedim(axis, 0)
        return whole

    @property
    def device(self) -> torch.device:
        """Where the operator's tensors are; the CPU where it has none."""
        return next((t.device for t in tensors(self.full)), torch.device("cpu"))

    def to(self, device: torch.device) -> "Parametric":
        """The same family on a device."""
        return replace(self, full=self.full.to(device))
