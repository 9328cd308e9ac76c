"""Score-SDE: a predictor, Langevin correctors, and projection onto the data.

Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling
through Stochastic Differential Equations", ICLR 2021, Algorithms 2 and 4 and §I.2; for
linear measurements Song, Shen, Xing, Ermon, "Solving Inverse Problems in Medical Imaging
with Score-Based Generative Models", ICLR 2022, eq. 9.
"""

import torch
from torch import Tensor

from ..linalg import dot
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import X, per_item
from .core import Progress, gives, image_like, levels, start, transitions


@gives("posterior_sample")
@torch.no_grad()
def score_sde(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 1000,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    correctors: int = 1,
    snr: float = 0.16,
    lam: float = 1.0,
    cg_steps: int = 50,
    rtol: float = 1e-4,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """Reverse diffusion, Langevin, and x ← x + λ A⁺(y + σ′An − Ax) after each of them.

    With the score s = (D − x)/σ²:

        predictor:  x ← x + (σ² − σ′²) s(x; σ) + √(σ² − σ′²) n
        corrector:  x ← x + h s(x; σ′) + √(2h) n,   h = 2 (r ‖n‖/‖s‖)²

    The norms are each item's own (the authors' code takes the batch's mean). The data's
    noise is not known of: with λ = 1 the result fits it. Without measurements the
    correctors sample from p_σ, but that h depends on x biases them.

    Args:
        problem: linear.
        prior: the denoiser.
        steps: how many, spaced as Karras et al. between the prior's levels; the paper
            has 1000, evenly in ln σ.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's.
        correctors: Langevin steps at each level but the last, 0.
        snr: r, the signal-to-noise ratio of a corrector.
        lam: λ in (0, 1]: how much of the way to the data a projection goes.
        cg_steps, rtol: of conjugate gradients for A⁺, where it has no closed form.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y, after 1 + correctors passes a step, and one at the
        last.
    """
    A, y = problem.linear, problem.y
    like = image_like(problem)
    sigmas = levels(prior, like, steps, sigmas, sigma_range)

    def project(x: X, sigma: Tensor) -> X:
        target = y
        if sigma > 0:
            target = y + sigma * A.apply(randn_like(x, generator))
        gap = target - A.apply(x)
        return x + lam * A.pinv(gap, max_steps=cg_steps, rtol=rtol)

    x = start(like, sigmas[0], generator)
    for sigma, sigma_next in progress(transitions(sigmas)):
        x0 = prior.denoise(x, sigma)
        if not sigma_next:
            return project(x0, sigma_next)
        room = sigma**2 - sigma_next**2
        n = randn_like(x, generator)
        x = project(x + room * (x0 - x) / sigma**2 + room.sqrt() * n, sigma_next)
        for _ in range(correctors):
            score = (prior.denoise(x, sigma_next) - x) / sigma_next**2
            n = randn_like(x, generator)
            h = 2 * snr**2 * per_item(dot(n, n) / dot(score, score), x)
            x = project(x + h * score + (2 * h).sqrt() * n, sigma_next)
    return x
