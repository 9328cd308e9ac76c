"""Draws from the prior alone: what it thinks an image looks like.

Heun's method on the probability-flow ODE dx/dσ = (x − D(x; σ))/σ (Karras et al. 2022,
Algorithm 1).
"""

import torch
from torch import Tensor

from ..priors import Prior
from ..shapes import X
from .core import Progress, transitions


@torch.no_grad()
def heun(prior: Prior, sigmas: Tensor, x: X, *, progress: Progress = iter) -> X:
    """Carry x from the level sigmas[0] to 0, by two passes a step and one at the last.

    Args:
        prior: the denoiser.
        sigmas: noise levels, highest first.
        x: a state of level sigmas[0]: σ₀n, far above the images' own spread.
        progress: wraps the loop, as ``tqdm`` does.
    """
    for sigma, sigma_next in progress(transitions(sigmas)):
        d = prior.eps(x, sigma)
        x_euler = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            d_next = prior.eps(x_euler, sigma_next)
            x = x + (sigma_next - sigma) * (d + d_next) / 2
        else:
            x = x_euler
    return x
