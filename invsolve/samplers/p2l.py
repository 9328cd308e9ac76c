"""P2L: the prompt's embedding is tuned to the data while the latents are sampled.

Chung, Ye, Milanfar, Delbracio, "Prompt-tuning Latent Diffusion Models for Inverse
Problems", ICML 2024.
"""

import torch
from torch import Tensor

from ..priors import Prior
from ..priors.latent import Conditioned, LatentPrior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import X
from .core import Progress, ddim, gives, start, transitions
from .latents import codec, ddpm_levels, misfit_pull, vp_step


@gives("steered", codes=True)
@torch.no_grad()
def p2l(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 1000,
    sigmas: Tensor | None = None,
    tunings: int = 1,
    lr: float = 1e-4,
    every: int = 8,
    lam: float = 1.0,
    rho: float = 0.05,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """Tune the embedding, project now and then, step, and step down the misfit.

        c ← Adam(c, ∇_c ‖y − A(Dec(D(z; σ, c)))‖), K times
        ẑ₀ = D(z; σ, c); at every so manieth step instead
            Enc(argmin_x ‖y − A x‖² + λ‖A‖² ‖x − Dec(ẑ₀)‖²)
        z ← DDIM(0)(z, ẑ₀) − ρ ∇_z ‖y − A(Dec(D(z; σ, c)))‖

    for the variance-preserving state; the image is Dec(z). Each item has an embedding c of
    its own, which begins as the prior's and is carried from level to level; the prior
    keeps its own. With guidance it is the condition that is tuned, not ∅. Norms, not their
    squares. It is no posterior. Each step costs K + 1 forward and backward passes of
    network and decoder.

    Args:
        problem: linear.
        prior: of latents, whose network is told an embedding (``encoder_hidden_states``).
        steps: how many, evenly spaced in the DDPM's t between the prior's levels.
        sigmas: the noise levels instead, highest first.
        tunings: K, steps of Adam at each level; 0 for the prior's own embedding.
        lr: of Adam (β = 0.9, 0.999).
        every: how many steps from one projection to the next.
        lam: λ.
        rho: ρ.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One image for each item of y.

    Raises:
        ValueError: the prior is told no embedding or has no encoder, or the operator is
            not linear.
    """
    images, net = codec(prior), listener(prior)
    like = problem.image_like()
    problem = problem.without_hidden(like)
    A = problem.linear
    weight = lam * A.norm(like) ** 2
    sigmas = ddpm_levels(prior, like, steps, sigmas)
    z = start(images.latent_like(like), sigmas[0], generator)
    c = net.condition["encoder_hidden_states"].detach()
    c = c.expand(len(z), *c.shape).to(z).clone().requires_grad_()
    adam = torch.optim.Adam([c], lr)
    with net.telling(c):
        for i, (sigma, sigma_next) in enumerate(progress(transitions(sigmas))):
            for _ in range(tunings):
                with torch.enable_grad():
                    x = images.decode(prior.denoise(z, sigma))
                pull, _ = misfit_pull(problem, x.detach())
                (c.grad,) = torch.autograd.grad(x, c, pull)
                adam.step()
            with torch.enable_grad():
                state = z.detach().requires_grad_()
                z0 = prior.denoise(state, sigma)
                x = images.decode(z0)
            pull, _ = misfit_pull(problem, x.detach())
            (grad,) = torch.autograd.grad(x, state, pull)
            z0 = z0.detach()
            if (i + 1) % every == 0:
                fit = A.prox(x.detach(), problem.y, weight, max_steps=50, rtol=1e-6)
                z0 = images.encode(fit)
            z = ddim(z, z0, sigma, sigma_next, 0.0, generator)
            z = z - rho * vp_step(sigma, sigma_next) * grad
    return images.decode(z)


def listener(prior: Prior) -> Conditioned:
    """The network of a latent prior that is told an embedding.

    Raises:
        ValueError: it is told none.
    """
    latent = codec(prior)
    net = vars(latent.prior).get("net") if isinstance(latent, LatentPrior) else None
    if isinstance(net, Conditioned) and "encoder_hidden_states" in net.condition:
        return net
    raise ValueError(
        "p2l tunes a prompt's embedding, and this prior is told none: load a latent model "
        "with cross-attention, or use psld or ldps"
    )
