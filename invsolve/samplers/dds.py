"""DDS: a few conjugate-gradient steps on the denoised image, then DDIM.

Chung, Lee, Ye, "Decomposed Diffusion Sampler for Accelerating Large-Scale Inverse
Problems", ICLR 2024, Algorithm 1.
"""

import torch
from torch import Tensor

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import Sigma, X
from .core import Progress, gives, image_like, levels, path, start, transitions
from .solvers import Solver


@gives("posterior_sample")
@torch.no_grad()
def dds(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 50,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    gamma: float | None = None,
    lam: float = 1.0,
    eta: float = 0.85,
    cg_steps: int = 5,
    solver: Solver | None = None,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """(I + γ AᴴA) x̂₀ = D(x; σ) + γ Aᴴy by a few CG steps from D, then noise again.

    With ε̂ = (x − D)/σ: x ← x̂₀ + √(1−η²) σ′ ε̂ + η σ′ n. Stopping CG early is part of
    the method. On a Gaussian prior the covariance comes out too small: for noiseless
    data (1 + √(1−η²))/2 of it in the null space of A in the limit of many steps.

    Args:
        problem: linear; noise other than Gaussian enters by its precision.
        prior: the denoiser.
        steps: how many, spaced as Karras et al. between the prior's levels.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's.
        gamma: γ, as published, in units of 1/‖A‖² for y without weights. Unless given
            it is σ²/σ_y² (σ² W for other noise): what Bayes asks for when D is the
            mean of a Gaussian of variance σ². That is not of the paper.
        lam: λ, by which that default γ is divided.
        eta: η, the published code's: the fraction of the noise's amplitude that is
            fresh. It is not DDIM's η.
        cg_steps: M, at each level.
        solver: one of `samplers.solvers`, which is given x̂₀ and takes ε̂ from it, instead
            of the paper's step.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y.
    """
    like = image_like(problem)
    sigmas = levels(prior, like, steps, sigmas, sigma_range)
    x = start(like, sigmas[0], generator)

    def data_step(denoised: X, sigma: Sigma) -> X:
        if gamma is None:
            return problem.prox(denoised, lam / sigma**2, max_steps=cg_steps, rtol=0.0)
        A, y = problem.linear, problem.y
        return A.prox(denoised, y, 1 / gamma, max_steps=cg_steps, rtol=0.0)

    if solver is not None:
        return solver(
            lambda x, sigma: data_step(prior.denoise(x, sigma), sigma),
            x,
            path(sigmas),
            generator=generator,
            progress=progress,
        )
    for sigma, sigma_next in progress(transitions(sigmas)):
        denoised = prior.denoise(x, sigma)
        x0 = data_step(denoised, sigma)
        eps = (x - denoised) / sigma
        n = randn_like(x, generator)
        x = x0 + sigma_next * ((1 - eta**2) ** 0.5 * eps + eta * n)
    return x
