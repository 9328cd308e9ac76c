"""Two priors of the same images, each where it knows more."""

import copy
import math
from typing import final

import torch

from invsolve.shapes import Sigma, X

from .base import AffineMap, Prior
from .info import Info


@final
class Experts(Prior):
    """D(x; σ) = D_low(x; σ) for σ < at, D_high(x; σ) from there on.

    Balaji et al., "eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert
    Denoisers", 2022. The prior that denoises better at a level is the one nearer to the
    true mean there: of volumes, say, `Groups` of neighbouring slices where the noise hides
    most of a slice, and the better trained prior of single slices below.

    Args:
        low, high: priors of images of one kind, in one unit.
        at: the level between them, in that unit.

    Raises:
        ValueError: they are of different ranges, or one of them would never be asked.
    """

    def __init__(self, low: Prior, high: Prior, at: float) -> None:
        same_range(low, high)
        if not low.sigma_min < at < high.sigma_max:
            raise ValueError(
                f"at must lie between {low.sigma_min:.4g} and {high.sigma_max:.4g}, got "
                f"{at}: one of the two would never be asked"
            )
        self.low, self.high, self.at = low, high, at
        self.sigma_min, self.sigma_max = low.sigma_min, high.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        lower = sigma < self.at
        if lower.all():
            return self.low.denoise(x, sigma)
        if not lower.any():
            return self.high.denoise(x, sigma)
        items = zip(x.split(1), sigma, strict=True)
        return torch.cat([self.denoise(item, level) for item, level in items])

    @property
    def info(self) -> Info:
        return self.low.info

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        made = copy.copy(self)
        made.low, map = self.low.normalised
        made.high, _ = self.high.normalised
        made.at = self.at / map.scale
        made.sigma_min, made.sigma_max = made.low.sigma_min, made.high.sigma_max
        return made, map

    def check(self, shape: tuple[int, ...]) -> None:
        self.low.check(shape)
        self.high.check(shape)


def same_range(first: Prior, second: Prior) -> None:
    """Refuse two priors whose images are not of one unit and range, with a ValueError."""
    one, other = first.normalised[1], second.normalised[1]
    if not (
        math.isclose(one.scale, other.scale, rel_tol=1e-6)
        and math.isclose(one.offset, other.offset, abs_tol=1e-6 * one.scale)
    ):
        raise ValueError(
            f"the two priors are of different ranges ({one} and {other}): give priors of "
            "one unit and range"
        )
