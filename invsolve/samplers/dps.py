"""DPS: guidance by the gradient of the data misfit through the network.

Chung, Kim, McCann, Klasky, Ye, "Diffusion Posterior Sampling for General Noisy Inverse
Problems", ICLR 2023, Algorithm 1.
"""

from typing import Literal

import torch
from torch import Tensor

from ..linalg import dot
from ..priors import Prior
from ..priors.schedules import ddpm_sigmas
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import Sigma, X, per_item
from .core import Progress, ddim, gives, path, start, transitions
from .jacobian import denoise_with_vjp
from .solvers import DDIM, Solver


@gives("steered")
def dps(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 1000,
    sigmas: Tensor | None = None,
    zeta: float = 1.0,
    eta: float = 1.0,
    loss: Literal["norm", "likelihood"] = "norm",
    solver: Solver | None = None,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """An ancestral step of the prior, then a step down ‖y − A(D(x; σ))‖.

    x ← DDIM(η)(x, D) − ζ ∇_x ‖y − A(D(x; σ))‖₂, for the variance-preserving state. The
    norm is each item's own (the authors' code takes the batch's, so that its results
    depend on what else is in the batch), and D is not clipped. Measurements that no
    image reaches (of masked pixels, of rays past the image) are not part of it. It
    depends on the noise only through ζ, and fits the data closer than their noise: no
    posterior.

    Args:
        problem: what was measured, and how; the operator may be nonlinear.
        prior: a denoiser that can be differentiated.
        steps: how many, at evenly spaced steps of the DDPM schedule.
        sigmas: the noise levels instead, highest first.
        zeta: ζ; 0.3 for super-resolution and blur, 0.5 for random inpainting, 1.0 for
            phase retrieval in the paper, for images in [−1, 1].
        eta: η, 1 for ancestral sampling and 0 for none but the first noise.
        loss: ``norm`` as in the paper's experiments, or ``likelihood``, its equation:

                x̂₀ = D + ζσ² ∇_x log p(y | D(x; σ)),   x ← DDIM(η)(x, x̂₀)

            which takes D for certain. With few steps or little noise it diverges.
        solver: one of `samplers.solvers` instead of DDIM, with ``likelihood``.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One image for each item of y.

    Raises:
        ValueError: a solver with ``norm``.
    """
    like = problem.image_like()
    problem = problem.without_hidden(like)
    if sigmas is None:
        sigmas = ddpm_sigmas(steps).clamp(prior.sigma_min, prior.sigma_max)
    sigmas = sigmas.to(like.device, like.dtype)
    x = start(like, sigmas[0], generator)
    if loss == "likelihood":

        def guided(x: X, sigma: Sigma) -> X:
            x0, vjp = denoise_with_vjp(prior, x, sigma)
            return x0 - zeta * sigma**2 * vjp(problem.misfit_grad(x0))

        return (solver or DDIM(eta))(
            guided, x, path(sigmas), generator=generator, progress=progress
        )
    if solver is not None:
        raise ValueError(
            "dps steps back from the norm after each DDIM step, which no solver does: "
            "add loss='likelihood', or leave the solver out"
        )
    for sigma, sigma_next in progress(transitions(sigmas)):
        x0, grad = misfit_norm_grad(problem, prior, x, sigma)
        with torch.no_grad():
            x = ddim(x, x0, sigma, sigma_next, eta, generator)
            # ζ is meant for the variance-preserving state √ᾱ x, both before and after.
            x = x - zeta * (1 + sigma**2).sqrt() * (1 + sigma_next**2).sqrt() * grad
    return x


def misfit_norm_grad(
    problem: InverseProblem, prior: Prior, x: X, sigma: Tensor
) -> tuple[X, X]:
    """D(x; σ) and ∇_x ‖y − A(D(x; σ))‖₂, item by item."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = prior.denoise(x, sigma)
        y, pull = problem.operator.pullback(x0.detach())
        residual = y - problem.y
        norm = dot(residual, residual).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        unit = residual / per_item(norm, residual)
        (grad,) = torch.autograd.grad(x0, x, pull(unit))
    return x0.detach(), grad
