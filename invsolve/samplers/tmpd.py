"""TMPD: the data enter through the denoiser's own uncertainty.

After Boys, Girolami, Pidstrigach, Reich, Mosca, Akyildiz, "Tweedie Moment Projected
Diffusions for Inverse Problems", TMLR 2024.
"""

import torch
from torch import Tensor

from ..linalg import cg
from ..operators import Mask
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import Sigma, X
from .core import Progress, gives, image_like, levels, path, start
from .solvers import DDIM, Solver


@gives("posterior_sample")
@torch.no_grad()
def tmpd(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 30,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    lam: float = 1.0,
    eta: float = 1.0,
    solver: Solver | None = None,
    cg_steps: int = 10,
    rtol: float = 1e-3,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """E[x₀ | x, y] under x₀ | x ~ N(D, C), C = σ² diag(J1)/λ, then a DDIM step.

    By Tweedie's second formula Cov[x₀ | x] = σ² J with J = ∂D/∂x. Its row sums J1 stand
    for its diagonal: near 0 where the prior is certain (the air around a body), near 1
    where it follows the data. With R = C^½,

        x̂₀ = D + R (R AᴴWA R + I)⁻¹ R AᴴW (y − A D).

    J1 is the derivative of D along a constant, so it costs a second forward pass and no
    backward one. On a Gaussian prior with diagonal covariance C is exact, and so is the
    posterior in the limit of many steps. Where pixels go together, J1 is more than the
    diagonal, and the data are trusted too much; λ > 1 makes up for it.

    Args:
        problem: linear; noise other than Gaussian enters by its precision.
        prior: the denoiser.
        steps: how many, spaced as Karras et al. between the prior's levels.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's.
        lam: λ.
        eta: η of DDIM: 1 for ancestral sampling, 0 for none but the first noise.
        solver: one of `samplers.solvers` instead of DDIM.
        cg_steps, rtol: of conjugate gradients at each level.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y.
    """
    like = image_like(problem)
    sigmas = levels(prior, like, steps, sigmas, sigma_range)
    A, y = problem.whitened()

    def posterior_mean(x: X, sigma: Sigma) -> X:
        denoised, row_sums = denoise_and_row_sums(prior, x, sigma)
        R = Mask(sigma * (row_sums.clamp(0, 1) / lam).sqrt())
        AR = A @ R
        b = AR.adjoint(y - A.apply(denoised))
        u = cg(
            lambda u: AR.normal(u) + u,
            b,
            None,
            max_steps=cg_steps,
            rtol=rtol,
        )
        return denoised + R.apply(u)

    return (solver or DDIM(eta))(
        posterior_mean,
        start(like, sigmas[0], generator),
        path(sigmas),
        generator=generator,
        progress=progress,
    )


def denoise_and_row_sums(prior: Prior, x: X, sigma: Tensor) -> tuple[X, X]:
    """D(x; σ) and J1, the derivative of D as a constant is added to x."""
    step = 0.1 * sigma
    both = prior.denoise(torch.cat([x, x + step]), sigma)
    denoised, moved = both.chunk(2)
    return denoised, (moved - denoised) / step
