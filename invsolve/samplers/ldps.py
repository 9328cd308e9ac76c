"""LDPS: DPS' guidance through the decoder as well as the network.

Chung, Kim, McCann, Klasky, Ye, "Diffusion Posterior Sampling for General Noisy Inverse
Problems", ICLR 2023, Algorithm 1, with A∘Dec for A: the baseline of Rout et al. 2023.
"""

import torch
from torch import Tensor

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import X
from .core import Progress, ddim, gives, start, transitions
from .latents import codec, ddpm_levels, misfit_pull, vp_step


@gives("steered", codes=True)
def ldps(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 1000,
    sigmas: Tensor | None = None,
    zeta: float = 1.0,
    eta: float = 1.0,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """A step of the latents' prior, then a step down ‖y − A(Dec(D(z; σ)))‖.

    z ← DDIM(η)(z, D) − ζ ∇_z ‖y − A(Dec(D(z; σ)))‖₂, for the variance-preserving state;
    the image is Dec(z). With a prior of images it is `dps`, whose docstring tells what it
    is not. Each step costs one forward and one backward pass of network and decoder.

    Args:
        problem: what was measured, and how; the operator may be nonlinear.
        prior: of latents or of images, differentiable.
        steps: how many, evenly spaced in the DDPM's t between the prior's levels.
        sigmas: the noise levels instead, highest first.
        zeta: ζ.
        eta: η, 1 for ancestral sampling and 0 for none but the first noise.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One image for each item of y.
    """
    images = codec(prior)
    like = problem.image_like()
    problem = problem.without_hidden(like)
    sigmas = ddpm_levels(prior, like, steps, sigmas)
    z = start(images.latent_like(like), sigmas[0], generator)
    for sigma, sigma_next in progress(transitions(sigmas)):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            z0 = prior.denoise(z, sigma)
            x = images.decode(z0)
            pull, _ = misfit_pull(problem, x.detach())
            (grad,) = torch.autograd.grad(x, z, pull)
        with torch.no_grad():
            z = ddim(z, z0, sigma, sigma_next, eta, generator)
            z = z - zeta * vp_step(sigma, sigma_next) * grad
    with torch.no_grad():
        return images.decode(z)
