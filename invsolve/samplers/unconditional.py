"""Draws from the prior alone: what it thinks an image looks like."""

import torch
from torch import Tensor

from ..priors import Prior
from ..random import Randomness
from ..shapes import X
from .core import Progress, levels, path, start
from .solvers import Heun, Solver


@torch.no_grad()
def unconditional(
    prior: Prior,
    like: X,
    *,
    steps: int = 50,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    solver: Solver | None = None,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """x₀ ~ p(x₀): from noise of the highest level to an image.

    Args:
        prior: the denoiser.
        like: images of which the shape, dtype and device are used.
        steps: how many, spaced as Karras et al. between the prior's levels.
        sigmas: the noise levels instead, highest first, in the prior's range.
        sigma_range: the lowest and the highest, where they are not the prior's.
        solver: `Heun` on the probability-flow ODE (two passes a step) unless given;
            ``DDIM(1.0)`` is ancestral sampling.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        As many draws as ``like`` has images, in their own unit.
    """
    inner, map = prior.normalised
    sigmas = levels(inner, like, steps, sigmas, sigma_range)
    u = (solver or Heun())(
        inner.denoise,
        start(like, sigmas[0], generator),
        path(sigmas),
        generator=generator,
        progress=progress,
    )
    return map(u)
