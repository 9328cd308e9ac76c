"""DiffPIR: denoise, fit the data by a proximal step, noise again.

Zhu, Zhang, Liang, Cao, Wen, Timofte, Van Gool, "Denoising Diffusion Models for
Plug-and-Play Image Restoration", CVPRW 2023, Algorithm 1.
"""

import torch
from torch import Tensor

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import X
from .core import Progress, gives, image_like, levels, start, transitions


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
        cg_steps, rtol: of conjugate gradients, where there is no closed form.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y.
    """
    like = image_like(problem)
    sigmas = levels(prior, like, steps, sigmas, sigma_range)
    x = start(like, sigmas[0], generator)
    for sigma, sigma_next in progress(transitions(sigmas)):
        denoised = prior.denoise(x, sigma)
        x0 = problem.prox(denoised, lam / sigma**2, max_steps=cg_steps, rtol=rtol)
        eps = (x - x0) / sigma
        n = randn_like(x, generator)
        x = x0 + sigma_next * ((1 - zeta) ** 0.5 * eps + zeta**0.5 * n)
    return x
