"""DDS of volumes: ADMM with total variation along z on the denoised volume, then DDIM.

Chung, Lee, Ye, "Decomposed Diffusion Sampler for Accelerating Large-Scale Inverse
Problems", ICLR 2024, §4.2 and the authors' code for volumes; noise that neighbouring
slices share is of Du et al., "Inter-Slice Consistent Stochasticity", ICLR 2026.
"""

import torch
from torch import Tensor

from ..checkpoint import Keep, State, straight
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import X
from ..shards import Shard
from .core import Progress, gives, image_like, levels, transitions
from .ztv import SPARSE_VIEW, DataStep, SliceNoise, slice_noise


@gives("steered")
@torch.no_grad()
def dds3d(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 50,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    rho: float = SPARSE_VIEW["rho"],
    lam: float = SPARSE_VIEW["lam"],
    kappa: float = 1.0,
    eta: float = 0.85,
    cg_steps: int = 5,
    zeta: float = 1.0,
    noise: SliceNoise = "independent",
    init: X | None = None,
    aspect: float = 1.0,
    periodic: bool = False,
    shard: Shard | None = None,
    keep: Keep = straight,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """x̂₀ = argmin ½‖Ax − y‖²_W + κ/2σ² ‖x − D‖² + λ Σ|x_{k+1} − x_k|, then noise again.

    One step of ADMM from D = D(x; σ), whose splitting and dual are kept from level to
    level (see `DataStep`); then, with ε̂ = (x − D)/σ,

        x ← x̂₀ + ζσ′(√(1−η²) ε̂ + η n).

    ρ and λ are in units of ‖√W A‖², so that one choice serves every operator. Total
    variation couples the slices, and is no part of any posterior: the spread of many
    draws is not to be read as uncertainty.

    Args:
        problem: linear, of volumes (batch, channels, d, h, w).
        prior: of volumes, such as ``Slices`` of a prior of slices.
        steps: how many, spaced as Karras et al. between the prior's levels; each is one
            pass of the network for each slice.
        sigmas: the noise levels instead, highest first: the paper has ``ddpm_sigmas``.
        sigma_range: the lowest and the highest, where they are not the prior's.
        rho, lam: ρ and λ: one of the presets of `samplers.ztv`, or 0 and 0, which leaves
            DDS slice by slice.
        kappa: κ: 1 is what Bayes asks for when D is the mean of a Gaussian of variance
            σ², 0 the published code, where stopping early is all that ties x̂₀ to D.
        eta: η, the fraction of the noise's amplitude that is fresh.
        cg_steps: of conjugate gradients at each level.
        zeta: ζ, how much of the noise comes back: 1 in the paper; with 0 this is
            plug-and-play, whose answer is one and smooth.
        noise: n is ``independent`` from slice to slice, ``shared`` by them all, or
            ``slerp``, in between (see `slice_noise`).
        init: a volume near the truth, such as another method's: x begins there, with ζσ
            of noise on it, and from a level that is not the prior's highest (Chung, Sim,
            Ye, "Come-Closer-Diffuse-Faster", CVPR 2022); noise alone unless given.
        aspect: a voxel's height over its width.
        periodic: whether the first slice follows the last, as in the published code.
        shard: which of a larger volume's slices the problem's are, where several
            processes hold some each.
        keep: where what is carried is kept (`invsolve.checkpoint`).
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One volume for each item of y.
    """
    step = DataStep.of(
        problem, rho=rho, lam=lam, aspect=aspect, periodic=periodic, shard=shard
    )
    step.shard.check(prior)
    like = image_like(problem)
    sigmas = levels(prior, like, steps, sigmas, sigma_range)
    x = slice_noise(like, noise, generator, shard)
    x = x * (1 + sigmas[0] ** 2).sqrt() if init is None else init + zeta * sigmas[0] * x
    state: State = {"x": x, "q": step.jumps(like)}
    del like, x
    for sigma, sigma_next in progress(keep(state, generator, transitions(sigmas))):
        # No more than six volumes at once: what is not needed again is overwritten.
        x0 = prior.denoise(state["x"], sigma)
        eps = state["x"].sub_(x0).div_(sigma)
        step(x0, state["q"], cg_steps=cg_steps, kappa=kappa / sigma**2)
        left = zeta * float(sigma_next)
        eps.mul_(left * (1 - eta**2) ** 0.5).add_(x0)
        del x0
        n = slice_noise(eps, noise, generator, shard)
        eps.add_(n, alpha=left * eta)
        del n
    return state["x"]
