"""DAPS: draw an image that fits prior and data, noise it anew, less each time.

Zhang, Chu, Berner, Meng, Anandkumar, Song, "Improving Diffusion Inverse Problem Solving
with Decoupled Noise Annealing", CVPR 2025, Algorithm 1.
"""

from math import inf
from typing import Literal

import torch
from torch import Tensor

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import X
from .core import Progress, gives, levels, start, transitions


@gives("posterior_sample")
@torch.no_grad()
def daps(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 50,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    ode_steps: int = 5,
    ode_sigma_min: float = 0.01,
    spread: float = inf,
    inner: Literal["exact", "langevin"] = "exact",
    langevin_steps: int = 100,
    lr: float = 1e-4,
    cg_steps: int = 50,
    rtol: float = 1e-4,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """x₀ ~ p(y | x₀) N(x₀; x̂₀, r²I), and x ← x₀ + σ′n; the last x₀ is the draw.

    x̂₀ is where the probability-flow ODE carries x in a few Euler steps, and r = σ in the
    paper. Since each x is noised from scratch, early errors are forgotten. That
    N(x̂₀, σ²I) stands for p(x₀ | x) makes the draws too wide (up to 1.7 times the
    variance on the tests' toy), and with few levels far too wide: ``spread``.

    Args:
        problem: linear for ``exact``, any for ``langevin``.
        prior: the denoiser.
        steps: how many, spaced as Karras et al. between the prior's levels.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's; the
            paper has 0.1 … 100 and 200 steps for images in [−1, 1].
        ode_steps: passes of the network at each level.
        ode_sigma_min: the ODE's last level before 0, if it is lower than σ.
        spread: s in r² = σ²s²/(σ² + s²), the standard deviation of the images' pixels in
            the prior's range; not of the paper, where it is infinite. With one ODE step
            it is exact for a prior N(m, s²I).
        inner: how x₀ is drawn. ``exact``, not of the paper, perturbs and solves:
            x̂₀ + rn and y + noise through the data's proximal map, which for Gaussian
            noise is the inner law itself. ``langevin`` is the paper's.
        langevin_steps: of x₀ ← x₀ − h∇U + √(2h) n.
        lr: h at the first level, falling linearly to a hundredth at the last. In the
            prior's range squared: it must stay below 2/(‖A‖²/σ_y² + 1/r²).
        cg_steps, rtol: of conjugate gradients, where there is no closed form.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y.
    """
    like = problem.image_like()
    sigmas = levels(prior, like, steps, sigmas, sigma_range)
    x = start(like, sigmas[0], generator)
    x0 = x
    for k, (sigma, sigma_next) in enumerate(progress(transitions(sigmas))):
        guess = flow(prior, x, sigma, ode_steps, ode_sigma_min)
        r = sigma / (1 + (sigma / spread) ** 2).sqrt()
        if inner == "exact":
            A, y = problem.whitened()
            v = guess + r * randn_like(x, generator)
            z = y + _unit_noise(y, generator)
            x0 = A.prox(v, z, 1 / r**2, max_steps=cg_steps, rtol=rtol)
        elif inner == "langevin":
            h = lr * (1 - 0.99 * k / max(1, len(sigmas) - 1))
            x0 = guess
            for _ in range(langevin_steps):
                down = problem.misfit_grad(x0) + (x0 - guess) / r**2
                x0 = x0 - h * down + (2 * h) ** 0.5 * randn_like(x, generator)
        else:
            raise ValueError(f"unknown inner {inner!r}: exact or langevin")
        x = x0 + sigma_next * randn_like(x, generator) if sigma_next > 0 else x0
    return x0


def flow(prior: Prior, x: X, sigma: Tensor, steps: int, low: float) -> X:
    """Where the probability-flow ODE carries x from σ to 0, by Euler's method.

    The levels are spaced as Karras et al. from σ to ``low``, and the last step goes to 0.
    """
    ramp = torch.linspace(0, 1, steps).to(x)
    high, low = sigma ** (1 / 7), min(low, float(sigma)) ** (1 / 7)
    for level, level_next in transitions((high + ramp * (low - high)) ** 7):
        x0 = prior.denoise(x, level)
        x = x0 + level_next / level * (x - x0)
    return x


def _unit_noise(y: Tensor, generator: Randomness) -> Tensor:
    """Of variance 1, for complex y in the real and in the imaginary part, each."""
    return (2**0.5 if y.is_complex() else 1.0) * randn_like(y, generator)
