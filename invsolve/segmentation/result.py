"""What a segmentation gives: draws of the mask, and what they say together."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from invsolve.grids import Grid, resampled
from invsolve.io import Image
from invsolve.samplers.core import Kind

from . import uncertainty
from .fusion import FUSIONS


@final
@dataclass(frozen=True, eq=False)
class Segmentation:
    """Draws of masks given scans, on one grid.

    Attributes:
        probabilities: of each draw, label and voxel, 0 … 1: the clean mask that the
            last step of the draw expects. The draws themselves are at 0 or 1.
        expected: P(label | scans) by the network's first pass, from noise alone: what
            the draws' mean tends to if the model is consistent, without their scatter.
        grid: where the voxels lie.
        labels: what each is a mask of.
        model: the card of the model that drew them.
        passes: of the network.
        seconds: that it took.
    """

    probabilities: Float[Tensor, "draws labels z y x"]
    expected: Float[Tensor, "labels z y x"]
    grid: Grid
    labels: tuple[str, ...]
    model: dict[str, Any]
    passes: int
    seconds: float
    kind: ClassVar[Kind] = "posterior_sample"

    @property
    def samples(self) -> Bool[Tensor, "draws labels z y x"]:
        """Each draw's mask."""
        return self.probabilities > 0.5

    @cached_property
    def prob(self) -> Float[Tensor, "labels z y x"]:
        """P(label | scans): the draws' mean."""
        return self.probabilities.mean(0)

    @property
    def std(self) -> Float[Tensor, "labels z y x"]:
        """The draws' standard deviation; 0 of a single draw."""
        return self.probabilities.std(0, correction=0)

    @property
    def entropy(self) -> Float[Tensor, "labels z y x"]:
        """Of the mean, in nats."""
        return uncertainty.entropy(self.prob)

    @property
    def mutual_information(self) -> Float[Tensor, "labels z y x"]:
        """The entropy of the mean less the draws' mean entropy, in nats."""
        return uncertainty.mutual_information(self.probabilities)

    def mask(self, threshold: float = 0.5) -> Bool[Tensor, "labels z y x"]:
        """Where the probability is at least a threshold."""
        return self.prob >= threshold

    def fuse(self, how: str = "mean") -> Tensor:
        """One map of all draws: see `invsolve.segmentation.fusion`."""
        if how not in FUSIONS:
            raise ValueError(f"unknown fusion {how!r}: one of {', '.join(FUSIONS)}")
        return FUSIONS[how](self.probabilities)

    @property
    def volumes_ml(self) -> Float[Tensor, "draws labels"]:
        """Of each draw's mask: the posterior of the volume."""
        return self.samples.flatten(2).sum(2) * self.grid.voxel_ml

    def on(self, image: Image) -> "Segmentation":
        """The same on an image's grid."""
        grid = Grid.of(image)

        def moved(maps: Tensor) -> Tensor:
            each = [
                resampled(Image(one, self.grid.affine), grid).values
                for one in maps.flatten(0, -4)
            ]
            return torch.stack(each).reshape(*maps.shape[:-3], *grid.shape)

        return replace(
            self,
            probabilities=moved(self.probabilities),
            expected=moved(self.expected),
            grid=grid,
        )
