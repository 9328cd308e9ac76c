"""DiffPIR: denoise, fit the data by a proximal step, noise again.

Zhu, Zhang, Liang, Cao, Wen, Timofte, Van Gool, "Denoising Diffusion Models for
Plug-and-Play Image Restoration", CVPRW 2023, Algorithm 1.
"""

import torch
from torch import Tensor

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import Sigma, X
from .core import Progress, gives, image_like, levels, path, start
from .solvers import Renoise, Solver


@gives("posterior_sample")
@torch.no_grad()
def diffpir(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 100,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    lam: float = 1.0,
    zeta: float = 0.1,
    solver: Solver | None = None,
    cg_steps: int = 50,
    rtol: float = 1e-4,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """x̂₀ = argmin −log p(y | x) + λ/2σ² ‖x − D(x; σ)‖², then noise again to σ′.

    With ε̂ = (x − x̂₀)/σ: x ← x̂₀ + √(1−ζ) σ′ ε̂ + √ζ σ′ n. On a Gaussian prior the mean
    is right for λ = 1, but in the limit of many steps the covariance is (1 + √(1−ζ))/2
    times what it should be: 0.97 for ζ = 0.1 and half for ζ = 1.

    Args:
        problem: linear; noise other than Gaussian enters by its precision.
        prior: the denoiser.
        steps: how many, spaced as Karras et al. between the prior's levels.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's.
        lam: λ, the prior's weight; 1 is what Bayes asks for.
        zeta: ζ, the fraction of the noise that is fresh at each step.
        solver: one of `samplers.solvers` instead of `Renoise`, whose spread is too
            small; the proximal step's bias stays.
        cg_steps, rtol: of conjugate gradients, where there is no closed form.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y.
    """
    like = image_like(problem)
    sigmas = levels(prior, like, steps, sigmas, sigma_range)

    def posterior_mean(x: X, sigma: Sigma) -> X:
        denoised = prior.denoise(x, sigma)
        return problem.prox(denoised, lam / sigma**2, max_steps=cg_steps, rtol=rtol)

    return (solver or Renoise(zeta))(
        posterior_mean,
        start(like, sigmas[0], generator),
        path(sigmas),
        generator=generator,
        progress=progress,
    )
