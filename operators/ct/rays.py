"""From a geometry in plain numbers to its rays.

Points are in mm along the image's axes, from its centre: (rows, columns) or (slices,
rows, columns). A row's number grows downwards, against y.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from math import inf, pi, prod

import numpy as np


@dataclass(frozen=True)
class Scan:
    """A scan as numbers that compare and hash: equal scans have equal rays.

    Args:
        shape: of the image, in voxels.
        spacing: of its voxels, in mm.
        angles: of the views, in radians.
        detectors: elements of the detector, (columns,) or (rows, columns).
        pitch: their distances, in mm.
        offset: of the detector's centre, in mm.
        source_to_axis: in mm; infinite for parallel rays.
        source_to_detector: in mm; infinite for parallel rays.
        curved: whether the detector's rows are arcs around the source.
        travel: of source and detector along the slices, in mm per turn.
        oversample: into how many pixels a side each is divided for the rays.
        rays: of an element of the detector, along its columns; their mean is measured.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    angles: tuple[float, ...]
    detectors: tuple[int, ...]
    pitch: tuple[float, ...]
    offset: tuple[float, ...]
    source_to_axis: float = inf
    source_to_detector: float = inf
    curved: bool = False
    travel: float = 0.0
    oversample: int = 1
    rays: int = 1

    @property
    def finer(self) -> "Scan":
        """Each ray an element of its own, through pixels ``oversample`` times finer."""
        k, m = self.oversample, self.rays
        return replace(
            self,
            shape=tuple(n * k for n in self.shape),
            spacing=tuple(mm / k for mm in self.spacing),
            detectors=(*self.detectors[:-1], self.detectors[-1] * m),
            pitch=(*self.pitch[:-1], self.pitch[-1] / m),
            oversample=1,
            rays=1,
        )

    @property
    def is_plain(self) -> bool:
        """Whether pixels are points and elements too."""
        return self.oversample == self.rays == 1

    @property
    def is_parallel(self) -> bool:
        return self.source_to_axis == inf

    @property
    def size(self) -> tuple[int, int]:
        """Rays and voxels: the shape of the matrix A."""
        return len(self.angles) * prod(self.detectors), prod(self.shape)

    @property
    def digest(self) -> str:
        """SHA-256 of all its numbers."""
        return sha256(repr(self).encode()).hexdigest()

    def elements(self, axis: int) -> np.ndarray:
        """Where the detector's elements lie along one of its axes, in mm."""
        count, pitch = self.detectors[axis], self.pitch[axis]
        return (np.arange(count) - (count - 1) / 2) * pitch + self.offset[axis]

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors from the source to the detector, and along its columns.

        With x to the right and y up they are (−sin θ, cos θ) and (cos θ, sin θ).
        """
        theta = np.array(self.angles)
        cos, sin = np.cos(theta), np.sin(theta)
        return np.stack([-cos, -sin], -1), np.stack([-sin, cos], -1)

    def heights(self) -> np.ndarray:
        """How far the table has travelled at each view, in mm."""
        return np.array(self.angles) * (self.travel / (2 * pi))

    def lines(self, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A point and a direction of every ray, at most so many rays at a time.

        In the order of the measurements: by views, then rows, then columns. Directions
        have any length.
        """
        u = self.elements(-1)[:, None]
        for along, across, z in zip(*self.frames(), self.heights(), strict=True):
            if self.is_parallel:
                point, direction = u * across, np.broadcast_to(along, (len(u), 2))
            else:
                depth, side = np.full_like(u, self.source_to_detector), u
                if self.curved:
                    angle = u / self.source_to_detector
                    depth, side = depth * np.cos(angle), depth * np.sin(angle)
                direction = depth * along + side * across
                point = np.broadcast_to(-self.source_to_axis * along, direction.shape)
            if len(self.shape) == 3:
                v = self.elements(0)
                direction = _lift(np.tile(direction, (len(v), 1)), v.repeat(len(u)))
                point = _lift(np.tile(point, (len(v), 1)), np.full(len(direction), z))
            for start in range(0, len(point), most):
                part = slice(start, start + most)
                yield point[part], direction[part]


def _lift(plane: np.ndarray, height: np.ndarray) -> np.ndarray:
    return np.concatenate([height[:, None], plane], axis=1)
