"""STSL: guidance by the misfit and by the trace of the score's Jacobian.

Rout, Chen, Kumar, Caramanis, Shakkottai, Chu, "Beyond First-Order Tweedie: Solving Inverse
Problems using Latent Diffusion", CVPR 2024, Algorithm 1. There is no code of the authors':
this follows the paper's description, and what it leaves open is an option here.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..linalg import dot
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import PerItem, Sigma, X, per_item
from .core import Progress, ddim, gives, start, transitions
from .jacobian import denoise_with_vjp
from .latents import Codec, Loss, codec, ddpm_levels, floor, misfit_pull

Trace = Literal["paper", "scaled", "bound", "off"]
Vjp = Callable[[Tensor], Tensor]


@gives("steered", codes=True)
@torch.no_grad()
def stsl(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 50,
    sigmas: Tensor | None = None,
    averages: int = 5,
    lam: float = 1.0,
    loss: Loss = "norm",
    trace: Trace = "scaled",
    eta: float = 0.02,
    init: Literal["adjoint", "pinv", "gaussian"] | X = "adjoint",
    inversion: Literal["noise", "ddim"] = "noise",
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """At each level several steps down misfit and trace, then one of DDIM.

        z ← Enc(Aᴴy/‖A‖²) + σ_T n
        at each of T levels:
            K times: z ← z − λ ∇‖y − A(Dec(D(z; σ)))‖ − (η_t/d) ∇ τ(z),  n ~ N(0, I)
            z ← DDIM(0)(z, D(z; σ))
        x = Dec(z)

    for the variance-preserving state, of which s = σ/√(1+σ²) is the noise level, d the
    dimension and s̃ the score; τ(z) = nᵀ(s̃(z + δn) − s̃(z))/δ, whose mean over n is the
    Laplacian ∇²log p_t smoothed with bandwidth δ (Stein's identity; it is unbiased for
    that, not for the Laplacian itself). ∇τ is exactly 0 for a Gaussian prior.

    What the paper leaves open: the misfit's norm or its square (here the norm, as in PSLD
    and DPS); how DDIM's "forward" begins (here one draw of noise, which is what 250 NFE
    leave room for); whether δ and η scale with the noise. The literal η and δ = 1 make
    the steps at low noise unstable with a prior of images, since ∇τ grows like s⁻³ there:
    hence ``scaled``. It fits the data closer than their noise: no posterior.

    The paper counts T·K network evaluations. In full it is T(2K+1) forward and 3TK
    backward passes, of network and of these TK of the decoder; without the trace T(K+1)
    and TK.

    Args:
        problem: linear, unless ``init`` is an image or ``gaussian``.
        prior: of latents or of images, differentiable.
        steps: T, evenly spaced in the DDPM's t between the prior's levels.
        sigmas: the noise levels instead, highest first.
        averages: K, the steps of "stochastic averaging" at each level.
        lam: λ.
        loss: ``norm``, or ``squared`` for its square.
        trace: how η_t and δ are chosen:

            - ``paper``: η_t = η, δ = 1
            - ``scaled``: η_t = ηs², δ = s
            - ``bound``: δ = s and η_t/d = λ‖A‖² s⁴(1+σ²), which makes the step that of the
              lower bound of log p(y | z) by Jensen's inequality where Dec is linear;
              never longer than the misfit's step. η is not used.
            - ``off``: first order
        eta: η.
        init: what is encoded: the adjoint, divided by ‖A‖² (the paper's operators have
            norm 1), the pseudo-inverse, or images; ``gaussian`` begins from noise alone.
        inversion: ``ddim`` carries the encoding up by the probability-flow ODE, T forward
            passes more, instead of adding noise.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One image for each item of y.

    Raises:
        ValueError: the prior has no encoder, or the operator is not linear, where that is
            needed.
    """
    images = codec(prior)
    like = problem.image_like()
    problem = problem.without_hidden(like)
    sigmas = ddpm_levels(prior, like, steps, sigmas)
    norm = problem.linear.norm(like) if trace == "bound" else 0.0
    z = begin(problem, prior, images, init, inversion, sigmas, generator)
    d = z[0].numel()
    for sigma, sigma_next in progress(transitions(sigmas)):
        s2 = sigma**2 / (1 + sigma**2)
        for _ in range(averages):
            z0, vjp = denoise_with_vjp(prior, z, sigma)
            x, decoder_vjp = decode_with_vjp(images, z0)
            pull, misfit = misfit_pull(problem, x, loss)
            step = lam * vjp(decoder_vjp(pull))
            if trace != "off":
                n = randn_like(z, generator)
                bandwidth = (1 + sigma**2).sqrt() if trace == "paper" else sigma
                grad = trace_grad(prior, z, sigma, n, bandwidth, vjp)
                if trace == "bound":
                    slope = 2 * misfit if loss == "norm" else torch.ones_like(misfit)
                    gamma = lam / floor(slope) * norm**2 * s2 * sigma**2
                    grad = shorter(per_item(gamma, grad) * grad, step)
                else:
                    grad = eta / d * (s2 if trace == "scaled" else 1) * grad
                step = step + grad
            # λ and η are meant for the variance-preserving state z/√(1+σ²).
            z = z - (1 + sigma**2) * step
        z = ddim(z, prior.denoise(z, sigma), sigma, sigma_next, 0.0, generator)
    return images.decode(z)


def begin(
    problem: InverseProblem,
    prior: Prior,
    images: Codec,
    init: Literal["adjoint", "pinv", "gaussian"] | X,
    inversion: Literal["noise", "ddim"],
    sigmas: Tensor,
    generator: Randomness,
) -> Tensor:
    """The state at the highest level."""
    like = problem.image_like()
    if isinstance(init, str) and init == "gaussian":
        return start(images.latent_like(like), sigmas[0], generator)
    if isinstance(init, Tensor):
        x = init
    elif init == "pinv":
        x = problem.linear.pinv(problem.y)
    else:
        A = problem.linear
        x = A.adjoint(problem.y) / A.norm(like) ** 2
    z = images.encode(x)
    if inversion == "noise":
        return z + sigmas[0] * randn_like(z, generator)
    rising = sigmas.flip(0)
    for sigma, sigma_next in pairwise(rising):
        z = ddim(z, prior.denoise(z, sigma), sigma, sigma_next, 0.0, generator)
    return z


def trace_grad(prior: Prior, z: X, sigma: Sigma, n: X, bandwidth: Sigma, vjp: Vjp) -> X:
    """∇_z nᵀ(s̃(z̃ + δn) − s̃(z̃))/δ for the score s̃ of z̃ = z/√(1+σ²), δ in z's unit.

    With s̃ = √(1+σ²)(D − z)/σ² it is (1+σ²)/(σ²δ) (J(z + δn) − J(z))ᵀ n, where the scores'
    linear parts have cancelled; J is the Jacobian of D, and vjp that at z. The two are
    taken apart, so that where J is constant the difference is exactly 0.
    """
    _, shifted = denoise_with_vjp(prior, z + per_item(bandwidth, z) * n, sigma)
    factor = (1 + sigma**2) / (sigma**2 * bandwidth)
    return per_item(factor, z) * (shifted(n) - vjp(n))


def decode_with_vjp(images: Codec, z: X) -> tuple[Tensor, Vjp]:
    """Dec(z), and v ↦ Jᵀv with J = ∂Dec/∂z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x = images.decode(z)
    return x.detach(), lambda v: torch.autograd.grad(x, z, v, retain_graph=True)[0]


def shorter(step: X, than: X) -> X:
    """The step, shortened item by item to at most another's length."""
    length, most = (dot(v, v).sqrt() for v in (step, than))
    return per_item((most / floor(length)).clamp_max(1), step) * step


def laplacian_estimate(
    prior: Prior, z: X, sigma: Sigma, n: X, bandwidth: Sigma
) -> PerItem:
    """nᵀ(s(z + δn) − s(z))/δ for the score s of z itself; its mean is that of ∇²log p."""
    moved = z + per_item(bandwidth, z) * n
    return dot(n, prior.score(moved, sigma) - prior.score(z, sigma)) / bandwidth
