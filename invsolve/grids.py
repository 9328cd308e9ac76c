"""Where voxels lie, and images brought from one grid to another by millimetres."""

from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any, cast, final

import numpy as np
import torch

from .io import Image


@final
@dataclass(frozen=True, eq=False)
class Grid:
    """Voxels (z, y, x), and where they lie.

    Args:
        shape: voxels along (z, y, x).
        affine: 4×4, from the index (x, y, z) to millimetres, as an `Image`'s.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @classmethod
    def of(cls, image: Image) -> "Grid":
        """The grid that an image is on."""
        z, y, x = image.values.shape
        return cls((z, y, x), image.affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel along (z, y, x)."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def voxel_ml(self) -> float:
        """A voxel's volume in millilitres."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    def spaced(self, mm: float) -> "Grid":
        """The grid of the same extent and directions with cubic voxels of a side.

        The outer faces of the first voxels stay where they are.
        """
        ratio = mm / np.array(self.spacing)[::-1]
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] * ratio
        affine[:3, 3] += self.affine[:3, :3] @ ((ratio - 1) / 2)
        counts = np.array(self.shape) * self.spacing / mm
        z, y, x = (max(1, ceil(round(float(n), 6))) for n in counts)
        return Grid((z, y, x), affine)

    def part(self, start: tuple[int, int, int], shape: tuple[int, int, int]) -> "Grid":
        """The voxels from ``start`` on, in their place; either may reach outside."""
        affine = self.affine.copy()
        affine[:3, 3] += self.affine[:3, :3] @ np.array(start[::-1], dtype=float)
        return Grid(shape, affine)


def resampled(
    image: Image, grid: Grid, *, nearest: bool = False, outside: float = 0.0
) -> Image:
    """The image at the grid's voxels, by where both lie in millimetres.

    Linear interpolation; where the grid is coarser the image is first blurred by a
    Gaussian, so that a coarse voxel holds about the mean of what it covers.

    Args:
        image: on its own grid.
        grid: that of the result.
        nearest: take the nearest voxel's value: for labels.
        outside: the value where the image has none.
    """
    from scipy import ndimage

    # Index to index, both (z, y, x): world coordinates drop out.
    into, scale = _reversed(image.affine), _reversed(grid.affine)
    matrix = np.linalg.inv(into) @ scale
    values = image.values.numpy().astype(np.float32)
    if not nearest:
        ratio = np.array(grid.spacing) / image.spacing
        sigmas = [sqrt(max(r**2 - 1, 0)) / 2 for r in ratio]
        if max(sigmas) > 0.3:
            values = ndimage.gaussian_filter(values, sigmas, mode="nearest")
    moved = ndimage.affine_transform(
        values,
        matrix[:3, :3],
        cast(Any, matrix[:3, 3]),  # SciPy's stubs know of numbers alone
        output_shape=grid.shape,
        order=0 if nearest else 1,
        cval=outside,
        mode="grid-constant",
    )
    return replace(image, values=torch.from_numpy(moved), affine=grid.affine)


def covered(image: Image, grid: Grid) -> float:
    """The part of a grid's voxels that lie inside an image, 0 … 1."""
    inside = replace(image, values=torch.ones_like(image.values))
    return float((resampled(inside, grid, nearest=True).values > 0).float().mean())


def _reversed(affine: np.ndarray) -> np.ndarray:
    """From the index (z, y, x) instead of (x, y, z)."""
    return affine[:, [2, 1, 0, 3]]
