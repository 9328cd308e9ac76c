"""A prior that takes mirror images and shifted ones for as likely as they are."""

import copy
import math
from typing import final

import torch
from torch import Generator, Tensor

from invsolve.shapes import Sigma, X

from .base import AffineMap, Prior
from .info import Info


@final
class Equivariant(Prior):
    """g⁻¹ D(g x; σ), with g a mirror image and a shift, another one at each noise level.

    Terris, Moreau, Pustelnik, Tachella, "Equivariant plug-and-play image
    reconstruction", CVPR 2024. Where an image's mirror image and its shifts are as
    likely, E[x₀ | x] is turned by g as x is; a network's is so but roughly. Over the
    levels of a solve, errors that depend on where things lie then average out, and at no
    further pass. g follows from σ alone, so that a solve that was cut goes on as it would
    have, and all samples of a level have the same.

    Args:
        inner: of images (channels, h, w): wrap the prior of slices, not of volumes.
        mirror: whether left and right are alike.
        shift: of so many pixels at most along each axis; what leaves the image comes in
            across it, so that its border should be background.

    Raises:
        ValueError: ``shift`` is negative, or neither is asked for.
    """

    def __init__(self, inner: Prior, *, mirror: bool = True, shift: int = 15) -> None:
        if shift < 0 or not (mirror or shift):
            raise ValueError(
                f"shift must be at least 0 (got {shift}), and more without mirror"
            )
        self.inner, self.mirror, self.shift = inner, mirror, shift
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        turns = [self.drawn(s) for s in sigma.expand(len(x)).tolist()]
        seen = [_turned(item, *g) for item, g in zip(x, turns, strict=True)]
        answers = self.inner.denoise(torch.stack(seen), sigma)
        back = [_back(item, *g) for item, g in zip(answers, turns, strict=True)]
        return torch.stack(back)

    def drawn(self, sigma: float) -> tuple[bool, int, int]:
        """g of a level: whether it mirrors, and how far it shifts down and right."""
        digits = round(1e6 * abs(math.log(sigma)))
        generator = Generator().manual_seed(digits)
        reach = self.shift
        down, right = torch.randint(
            -reach, reach + 1, (2,), generator=generator
        ).tolist()
        flip = bool(torch.randint(2, (), generator=generator)) and self.mirror
        return flip, down, right

    @property
    def info(self) -> Info:
        return self.inner.info

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        made = copy.copy(self)
        made.inner, map = self.inner.normalised
        made.sigma_min, made.sigma_max = made.inner.sigma_min, made.inner.sigma_max
        return made, map

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise ValueError(
                f"Equivariant is a prior of images (channels, h, w), got {tuple(shape)}: "
                "wrap the prior of slices, Slices(Equivariant(prior))"
            )
        self.inner.check(shape)


def _turned(item: Tensor, flip: bool, down: int, right: int) -> Tensor:
    shifted = item.roll((down, right), (-2, -1))
    return shifted.flip(-1) if flip else shifted


def _back(item: Tensor, flip: bool, down: int, right: int) -> Tensor:
    shifted = item.flip(-1) if flip else item
    return shifted.roll((-down, -right), (-2, -1))
