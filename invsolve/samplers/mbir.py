"""DiffusionMBIR: slices by reverse diffusion, their stack by total variation along z.

Chung, Ryu, McCann, Klasky, Ye, "Solving 3D Inverse Problems using Pre-trained 2D
Diffusion Models", CVPR 2023, Algorithm 2, and the authors' code. Of it differ here: the
norms in a corrector's step are a volume's and not a mini-batch's, so that nothing depends
on how slices are cut into chunks, and the last slice is no neighbour of the first.
"""

import math

import torch
from torch import Tensor

from ..checkpoint import Keep, State, straight
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import X, per_item
from ..shards import Shard
from .core import Progress, gives, image_like, transitions
from .ztv import SPARSE_VIEW, DataStep, slice_noise

MOST_CG_STEPS = 2
"""With more, the data step takes over the noise of the last levels and keeps it."""


@gives("steered")
@torch.no_grad()
def mbir(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 2000,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    rho: float = SPARSE_VIEW["rho"],
    lam: float = SPARSE_VIEW["lam"],
    correctors: int = 1,
    snr: float = 0.16,
    cg_steps: int = 1,
    final: bool = True,
    aspect: float = 1.0,
    periodic: bool = False,
    shard: Shard | None = None,
    keep: Keep = straight,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """Predictor, corrector, and one step of ADMM on the noisy volume, at each level.

    With the score s = (D − x)/σ²,

        predictor:  x ← x + (σ² − σ′²) s(x; σ) + √(σ² − σ′²) n
        corrector:  x ← x + h s(x; σ) + √(2h) n,   h = 2 (r ‖n‖/‖s‖)²
        data:       x ← ADMM towards argmin ½‖Ax − y‖²_W + λ Σ|x_{k+1} − x_k|

    whose splitting and dual are carried along (see `DataStep`), with ρ and λ in units of
    ‖√W A‖². The splitting remembers the noise of the levels before; one or two conjugate
    gradients at a time do not heed it, more do, and the noise then stays: they are
    refused. Last, one step of SIRT brings the result to the data. It needs many levels:
    `dds3d` reaches the same with far fewer.

    Args:
        problem: linear, of volumes (batch, channels, d, h, w).
        prior: of volumes, such as ``Slices`` of a prior of slices.
        steps: how many, evenly in ln σ between the prior's levels; each is 1 +
            ``correctors`` passes of the network for each slice. The paper's go from 378 to
            0.01.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's.
        rho, lam: ρ and λ: one of the presets of `samplers.ztv`.
        correctors: Langevin steps at each level, after the predictor.
        snr: r, the signal-to-noise ratio of a corrector.
        cg_steps: of conjugate gradients at each level, 1 or 2.
        final: the last step, x ← x + AᴴW(y − Ax)/(AᴴWA1), for operators without negative
            entries.
        aspect: a voxel's height over its width.
        periodic: whether the first slice follows the last, as in the published code.
        shard: which of a larger volume's slices the problem's are, where several
            processes hold some each.
        keep: where what is carried is kept (`invsolve.checkpoint`).
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One volume for each item of y.

    Raises:
        ValueError: ``cg_steps`` is out of range, or the problem has no volumes.
    """
    if not 1 <= cg_steps <= MOST_CG_STEPS:
        raise ValueError(
            f"cg_steps must be 1 to {MOST_CG_STEPS}, got {cg_steps}: more would lock the "
            "noise of the iterate in; dds3d takes more"
        )
    step = DataStep.of(
        problem, rho=rho, lam=lam, aspect=aspect, periodic=periodic, shard=shard
    )
    step.shard.check(prior)
    like = image_like(problem)
    if final:
        step.sensitivity(like)  # refused now rather than after hours
    if sigmas is None:
        low, high = sigma_range or (prior.sigma_min, prior.sigma_max)
        sigmas = torch.linspace(math.log(high), math.log(low), steps).exp()
    sigmas = sigmas.to(like)

    def drawn(like: X) -> X:
        return slice_noise(like, "independent", generator, shard)

    x = drawn(like) * (1 + sigmas[0] ** 2).sqrt()
    state: State = {"x": x, "q": step.jumps(like)}
    del like, x
    for sigma, sigma_next in progress(keep(state, generator, transitions(sigmas))):
        x = state["x"]
        room = sigma**2 - sigma_next**2
        x.lerp_(prior.denoise(x, sigma), float(room / sigma**2))
        x.add_(drawn(x), alpha=float(room.sqrt()))
        for _ in range(correctors):
            score = prior.denoise(x, sigma).sub_(x).div_(sigma**2)
            n = drawn(x)
            h = 2 * snr**2 * per_item(step.dot(n, n) / step.dot(score, score), x)
            x.addcmul_(score, h.to(x.dtype)).addcmul_(n, (2 * h).sqrt().to(x.dtype))
        step(x, state["q"], cg_steps=cg_steps)
    return step.sirt(state["x"]) if final else state["x"]
