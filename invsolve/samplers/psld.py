"""PSLD: latents whose image fits the data and which their image encodes to.

Rout, Raoof, Daras, Caramanis, Dimakis, Shakkottai, "Solving Linear Inverse Problems
Provably via Posterior Sampling with Latent Diffusion Models", NeurIPS 2023, Algorithm 2.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..linalg import dot
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import PerItem, X, Y, per_item
from .core import Progress, ddim, gives, start, transitions
from .latents import Codec, codec, ddpm_levels, floor, misfit_pull, vp_step


@gives("steered", codes=True)
def psld(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 1000,
    sigmas: Tensor | None = None,
    omega: float = 1.0,
    gamma: float = 0.1,
    eta: float = 0.0,
    glue: Literal["adjoint", "pinv"] = "adjoint",
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """A step of the latents' prior, then down the misfit and the gluing term.

        z ← DDIM(η)(z, ẑ₀) − ∇_z (ω ‖y − A x̂‖ + γ ‖Enc(x̂ + Aᴴ(y − A x̂)) − ẑ₀‖)

    with ẑ₀ = D(z; σ) and x̂ = Dec(ẑ₀), for the variance-preserving state; the image is
    Dec(z). Norms, not their squares, each item's own. The argument of Enc is x̂ with what
    was measured put in, if AᴴA is a projection; so that it nearly is, A is divided by its
    norm there (the paper's operators have norm 1). The authors' code takes other maps for
    Aᴴ (for blurs none) and adds fresh noise to A x̂; neither is done here. It is no
    posterior. Each step costs a forward and a backward pass of network, decoder and
    encoder. With a prior of images the gluing term is ‖A⁺(y − A x̂)‖ of a projection.

    Args:
        problem: linear.
        prior: of latents or of images, differentiable.
        steps: how many, evenly spaced in the DDPM's t between the prior's levels.
        sigmas: the noise levels instead, highest first.
        omega: ω; the paper's 1 is for Stable Diffusion.
        gamma: γ; "slightly less than ω" say the authors.
        eta: η of DDIM.
        glue: ``pinv`` for A⁺ in the place of Aᴴ, which makes it the projection for any A.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One image for each item of y.

    Raises:
        ValueError: the operator is not linear, or the prior has no encoder.
    """
    images = codec(prior)
    like = problem.image_like()
    problem = problem.without_hidden(like)
    A = problem.linear
    scale = A.norm(like) ** -2 if glue == "adjoint" else 1.0

    def back(r: Y) -> X:
        return scale * A.adjoint(r) if glue == "adjoint" else A.pinv(r)

    sigmas = ddpm_levels(prior, like, steps, sigmas)
    z = start(images.latent_like(like), sigmas[0], generator)
    for sigma, sigma_next in progress(transitions(sigmas)):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            z0 = prior.denoise(z, sigma)
            x = images.decode(z0)
            misfit, _ = misfit_pull(problem, x.detach())
            to_x, to_z0, _ = gluing_pull(problem, images, x.detach(), z0.detach(), back)
            pulls = [omega * misfit + gamma * to_x, gamma * to_z0]
            (grad,) = torch.autograd.grad([x, z0], z, pulls)
        with torch.no_grad():
            z = ddim(z, z0, sigma, sigma_next, eta, generator)
            z = z - vp_step(sigma, sigma_next) * grad
    with torch.no_grad():
        return images.decode(z)


def gluing_pull(
    problem: InverseProblem,
    images: Codec,
    x: X,
    z0: Tensor,
    back: Callable[[Tensor], X],
) -> tuple[X, Tensor, PerItem]:
    """The gradients of ‖Enc(x + B(y − A x)) − z₀‖ in x and in z₀, and the norm itself.

    B is such that BA is self-adjoint; where the norm is 0 so are the gradients.
    """
    A = problem.linear
    with torch.enable_grad():
        glued = (x + back(problem.y - A.apply(x))).requires_grad_()
        gap = images.encode(glued) - z0
        norm = dot(gap, gap).sqrt()
        unit = (gap / per_item(floor(norm), gap)).detach()
        (v,) = torch.autograd.grad(gap, glued, unit)
    return v - back(A.apply(v)), -unit, norm.detach()
