"""DDNM: what is measured from the data, what is not from the prior.

Wang, Yu, Zhang, "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space
Model", ICLR 2023, Algorithm 1; with ``noisy``, its DDNM+ (§3.3).
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
def ddnm(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 100,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    eta: float = 0.85,
    noisy: bool = False,
    cg_steps: int = 50,
    rtol: float = 1e-6,
    solver: Solver | None = None,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """x̂₀ = D + A⁺(y − A D), then noise again to σ′.

    With ε̂ = (x − D)/σ and ν = √(1−η²) ε̂ + η n: x ← x̂₀ + σ′ν. The result fits the data
    exactly, their noise too: it is for measurements that hardly have any. In the null
    space of A its spread is that of `dds`.

    With ``noisy`` no more of the data's noise is let in than σ′ has room for. Where
    AAᴴ = ‖A‖²I (masks of 0 and 1, averaging, colour) and τ = σ_y/‖A‖,

        x ← D + κ A⁺(y − A D) + σ′(I − A⁺A)ν + √(σ′² − κ²τ²) A⁺A ν,  κ = min(1, σ′/τ)

    and in the end x = D. For other operators the singular values that are smaller than
    the largest let in more noise than that.

    Args:
        problem: linear; ``noisy`` needs `GaussianNoise` of one σ. Without, no noise is
            looked at.
        prior: the denoiser.
        steps: how many, spaced as Karras et al. between the prior's levels.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's.
        eta: η, the fraction of the noise's amplitude that is fresh. It is not DDIM's η.
        noisy: DDNM+.
        cg_steps, rtol: of conjugate gradients for A⁺, where it has no closed form.
        solver: one of `samplers.solvers`, which is given x̂₀ and takes ε̂ from it, instead
            of the paper's step; not with ``noisy``.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y.

    Raises:
        ValueError: ``noisy`` without a single σ, or with a solver.
    """
    if noisy and solver is not None:
        raise ValueError(
            "ddnm(noisy=True) shapes the noise it adds, which a solver does not: leave "
            "one of them out"
        )
    A, y = problem.linear, problem.y
    like = image_like(problem)
    tau = like.new_zeros(())
    if noisy:
        weight = torch.as_tensor(problem.noise.precision(y), dtype=torch.float64)
        if weight.numel() > 1:
            raise ValueError(
                "ddnm(noisy=True) needs noise of one standard deviation, GaussianNoise "
                "with a number for sigma: use dds or diffpir"
            )
        tau = (weight**-0.5 / A.norm(like)).to(like)
    sigmas = levels(prior, like, steps, sigmas, sigma_range)
    x = start(like, sigmas[0], generator)

    def project(denoised: X) -> X:
        return A.pinv(y - A.apply(denoised), max_steps=cg_steps, rtol=rtol)

    if solver is not None:

        def posterior_mean(x: X, sigma: Sigma) -> X:
            denoised = prior.denoise(x, sigma)
            return denoised + project(denoised)

        return solver(
            posterior_mean, x, path(sigmas), generator=generator, progress=progress
        )
    for sigma, sigma_next in progress(transitions(sigmas)):
        denoised = prior.denoise(x, sigma)
        kappa = torch.where(tau > sigma_next, sigma_next / tau, 1)
        seen = project(denoised)
        nu = (1 - eta**2) ** 0.5 * (x - denoised) / sigma + eta * randn_like(
            x, generator
        )
        x = denoised + kappa * seen + sigma_next * nu
        if noisy:
            room = (sigma_next**2 - (kappa * tau) ** 2).clamp_min(0).sqrt()
            x = x - (sigma_next - room) * A.pinv(
                A.apply(nu), max_steps=cg_steps, rtol=rtol
            )
    return x
