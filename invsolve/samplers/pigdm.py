"""ΠGDM: guidance that knows how uncertain the denoised image is.

Song, Vahdat, Mardani, Kautz, "Pseudoinverse-Guided Diffusion Models for Inverse
Problems", ICLR 2023, Algorithm 1, for measurements with noise.
"""

import torch
from torch import Tensor

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import Sigma, X
from .core import Progress, gives, image_like, levels, path, start
from .jacobian import denoise_with_vjp
from .solvers import DDIM, Solver


@gives("posterior_sample")
@torch.no_grad()
def pigdm(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 100,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    spread: float = 1.0,
    eta: float = 1.0,
    solver: Solver | None = None,
    cg_steps: int = 50,
    rtol: float = 1e-4,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """E[x₀ | x, y] with Cov[x₀ | x] taken for r²I, then a DDIM step.

        x̂₀ = D + σ² Jᵀ Aᴴ (r² AAᴴ + W⁻¹)⁻¹ (y − A D),   r² = σ²s²/(σ² + s²)

    with J = ∂D/∂x and W the noise's precision. Exact, and the same as MMPS, for a prior
    N(m, s²I). For a correlated one the mean is off, and the spread too.

    Differs from the authors' code in its weight: that one is for noiseless data, and
    multiplies the guidance by a further ᾱ. One forward and one backward pass a step.

    Args:
        problem: linear; noise other than Gaussian enters by its precision.
        prior: a denoiser that can be differentiated.
        steps: how many, spaced as Karras et al. between the prior's levels.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's.
        spread: s, the standard deviation of the images' pixels in the prior's range.
        eta: η of DDIM: 1 for ancestral sampling, 0 for none but the first noise.
        solver: one of `samplers.solvers` instead of DDIM.
        cg_steps, rtol: of conjugate gradients, where there is no closed form.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y.
    """
    like = image_like(problem)
    sigmas = levels(prior, like, steps, sigmas, sigma_range)

    def posterior_mean(x: X, sigma: Sigma) -> X:
        denoised, vjp = denoise_with_vjp(prior, x, sigma)
        r2 = (sigma * spread) ** 2 / (sigma**2 + spread**2)
        # By the push-through identity Aᴴ(r²AAᴴ + W⁻¹)⁻¹(y − A D) is a proximal step.
        fitted = problem.prox(denoised, 1 / r2, max_steps=cg_steps, rtol=rtol)
        return denoised + sigma**2 * vjp((fitted - denoised) / r2)

    return (solver or DDIM(eta))(
        posterior_mean,
        start(like, sigmas[0], generator),
        path(sigmas),
        generator=generator,
        progress=progress,
    )
