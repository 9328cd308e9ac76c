"""ReSample: hard consistency with the data, then back to the right noise level.

Song, Kwon, Zhang, Hu, Qu, Shen, "Solving Inverse Problems with Latent Diffusion Models
via Hard Data Consistency", ICLR 2024, Algorithm 1.
"""

from typing import Literal

import torch
from torch import Tensor

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import X
from .core import Progress, ddim, gives, start, transitions
from .latents import Codec, codec, ddpm_levels, misfit_pull


@gives("steered", codes=True)
@torch.no_grad()
def resample(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 100,
    sigmas: Tensor | None = None,
    every: int = 5,
    gamma: float = 40.0,
    consistency: Literal["pixel", "latent"] = "pixel",
    lam: float = 100.0,
    descent_steps: int = 50,
    lr: float = 0.01,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """DDIM; at every so manieth step ẑ₀ = D(z; σ) is moved to the data and noised anew.

        ẑ₀(y) = Enc(argmin_x ½‖y − A x‖²_W + λ/2 ‖x − Dec(ẑ₀)‖²)     (``pixel``)
              ≈ argmin_z ‖y − A(Dec(z))‖², by Adam from ẑ₀           (``latent``)
        z ~ N((τ² ẑ₀(y) + σ′² z′)/(τ² + σ′²), τ²σ′²/(τ² + σ′²) I)

    with z′ DDIM's state and τ² = γσ′²(1 − σ′²/σ²): γ times ancestral sampling's fresh
    noise, as in the authors' code. The last step moves too, and gives Dec(ẑ₀(y)). No
    gradient goes through the network, and ``pixel`` needs none at all. (The authors begin
    with the first move, by λ = 0 and gradient descent, and end with the second.) It is no
    posterior. Each step costs one pass of the network.

    Args:
        problem: linear for ``pixel``.
        prior: of latents or of images.
        steps: how many, evenly spaced in the DDPM's t between the prior's levels.
        sigmas: the noise levels instead, highest first.
        every: how many steps from one move to the next.
        gamma: γ; the larger, the more of ẑ₀(y).
        consistency: how ẑ₀ is moved.
        lam: λ, about the inverse variance of the autoencoder's errors in its range.
        descent_steps, lr: of Adam, for ``latent``.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One image for each item of y.

    Raises:
        ValueError: for ``pixel``, the operator is not linear or the prior has no encoder.
    """
    images = codec(prior)
    like = problem.image_like()
    problem = problem.without_hidden(like)

    def moved(z0: X) -> X:
        if consistency == "latent":
            return descended(problem, images, z0, descent_steps, lr)
        x = problem.prox(images.decode(z0), lam, max_steps=50, rtol=1e-6)
        return images.encode(x)

    sigmas = ddpm_levels(prior, like, steps, sigmas)
    z = start(images.latent_like(like), sigmas[0], generator)
    z0 = z
    for i, (sigma, sigma_next) in enumerate(progress(transitions(sigmas))):
        z0 = prior.denoise(z, sigma)
        z = ddim(z, z0, sigma, sigma_next, 0.0, generator)
        if sigma_next > 0 and (i + 1) % every == 0:
            tau2 = gamma * sigma_next**2 * (1 - (sigma_next / sigma) ** 2)
            total = tau2 + sigma_next**2
            noise = sigma_next * (tau2 / total).sqrt() * randn_like(z, generator)
            z = (tau2 * moved(z0) + sigma_next**2 * z) / total + noise
    return images.decode(moved(z0))


def descended(problem: InverseProblem, images: Codec, z: X, steps: int, lr: float) -> X:
    """Adam's steps down ‖y − A(Dec(z))‖²."""
    z = z.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr)
    for _ in range(steps):
        with torch.enable_grad():
            x = images.decode(z)
        pull, _ = misfit_pull(problem, x.detach(), "squared")
        (z.grad,) = torch.autograd.grad(x, z, pull)
        adam.step()
    return z.detach()
