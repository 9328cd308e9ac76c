"""MMPS: guidance with the covariance that the denoiser's Jacobian tells.

Rozet, Andry, Lanusse, Louppe, "Learning Diffusion Priors from Observations by
Expectation Maximization", NeurIPS 2024, §4 (moment-matching posterior sampling).
"""

import torch
from torch import Tensor

from ..linalg import cg
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import Sigma, X, Y
from .core import Progress, gives, image_like, levels, path, start
from .jacobian import denoise_with_vjp
from .solvers import DDIM, Solver


@gives("posterior_sample")
@torch.no_grad()
def mmps(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 100,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    eta: float = 1.0,
    solver: Solver | None = None,
    cg_steps: int = 3,
    rtol: float = 1e-3,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """E[x₀ | x, y] with Cov[x₀ | x] = σ²J by Tweedie's second formula, then DDIM.

        x̂₀ = D + σ² Jᵀ Aᴴ u,   (A σ²J Aᴴ + W⁻¹) u = y − A D

    with J = ∂D/∂x and W the noise's precision. Exact for every Gaussian prior at every
    number of steps but for the start; only the spread needs many steps. Each step costs
    one forward pass and cg_steps + 1 backward ones.

    Args:
        problem: linear; noise other than Gaussian enters by its precision.
        prior: a denoiser that can be differentiated.
        steps: how many, spaced as Karras et al. between the prior's levels.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's.
        eta: η of DDIM: 1 for ancestral sampling, 0 for none but the first noise.
        solver: one of `samplers.solvers` instead of DDIM.
        cg_steps, rtol: of conjugate gradients for u. A network's J is not quite
            symmetric, so that few steps are the safer choice.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y.
    """
    like = image_like(problem)
    sigmas = levels(prior, like, steps, sigmas, sigma_range)
    # Conjugate gradients go by the whole residual, which no hidden part should sway.
    A, y = problem.without_hidden(like).whitened()

    def posterior_mean(x: X, sigma: Sigma) -> X:
        denoised, vjp = denoise_with_vjp(prior, x, sigma)

        def covariance(u: Y) -> Y:
            return A.apply(sigma**2 * vjp(A.adjoint(u))) + u

        residual = y - A.apply(denoised)
        u = cg(
            covariance,
            residual,
            None,
            max_steps=cg_steps,
            rtol=rtol,
        )
        return denoised + sigma**2 * vjp(A.adjoint(u))

    return (solver or DDIM(eta))(
        posterior_mean,
        start(like, sigmas[0], generator),
        path(sigmas),
        generator=generator,
        progress=progress,
    )
