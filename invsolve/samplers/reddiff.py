"""RED-diff: a variational posterior mean, regularised by denoising.

Mardani, Song, Kautz, Vahdat, "A Variational Perspective on Solving Inverse Problems
with Diffusion Models", ICLR 2024, Algorithm 1.
"""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from ..priors import Prior
from ..priors.schedules import ddpm_sigmas
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import X, per_item
from .core import Init, Progress, gives, initial
from .stopping import Discrepancy

Weight = Literal[
    "linear",
    "sqrt",
    "square",
    "log",
    "trunc_linear",
    "power2over3",
    "const",
    "calibrated",
]
Order = Literal["descending", "random", "ascending"]

Preset = Mapping[str, Any]
"""Options of `reddiff` for images in [−1, 1]; the authors take 100 or 1000 steps."""

INPAINTING: Preset = MappingProxyType({"lam": 0.25, "lr": 0.25, "sigma_x0": 1e-4})
"""A fifth of the pixels hidden by strokes, without noise; of the authors' scripts."""

INPAINTING_NOISY: Preset = MappingProxyType({"lam": 1.0, "lr": 0.25})
"""The same with noise of σ_y = 0.2; of the authors' scripts."""

SUPER_RESOLUTION: Preset = MappingProxyType({"lam": 0.25, "lr": 0.1})
"""Means of 4×4 blocks; of the authors' scripts."""

DEBLURRING: Preset = MappingProxyType({"lam": 0.25, "lr": 0.5})
"""A Gaussian blur; of the authors' scripts, which have these for ``nonlinear-deblurring``
(from y), ``hdr`` (from y/2), ``phase-retrieval`` (from the inverse transform of y) and
``jpeg`` (from y) too: each operator's ``guess``."""

CT: Preset = MappingProxyType(
    {
        "steps": 40,
        "sigma_range": (0.02, 0.3),
        "lam": 0.15,
        "lr": 0.8,
        "normalize": "bayes",
        "weight": "calibrated",
        "optimizer": "prox",
        "antithetic": True,
        "init": "zeros",
    }
)
"""Few views and few photons; ours."""

MRI: Preset = MappingProxyType(
    {**CT, "steps": 10, "sigma_range": (0.026, 0.61), "lam": 0.23, "lr": 0.92}
)
"""Undersampled k-space. The paper's settings are not published: this is the form of
`CT` with what the search of benchmarks/quality.py found on simulated brain MR, ×4."""

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "inpainting": INPAINTING,
        "inpainting-noisy": INPAINTING_NOISY,
        "super-resolution-x4": SUPER_RESOLUTION,
        "deblurring": DEBLURRING,
        "nonlinear-deblurring": DEBLURRING,
        "phase-retrieval": DEBLURRING,
        "hdr": DEBLURRING,
        "jpeg": DEBLURRING,
        "ct": CT,
        "mri": MRI,
    }
)
"""All of them by the task's name."""


@gives("point_estimate")
def reddiff(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 100,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    lam: float = 0.25,
    lr: float = 0.1,
    obs_weight: float = 1.0,
    weight: Weight = "linear",
    order: Order = "descending",
    optimizer: Literal["adam", "sgd", "prox"] = "adam",
    betas: tuple[float, float] = (0.9, 0.99),
    cg_steps: int = 20,
    normalize: Literal["mean", "sum", "bayes"] = "mean",
    sigma_x0: float = 0.0,
    antithetic: bool = False,
    init: Init = "pinv",
    discrepancy: float | None = None,
    returns: Literal["mu", "x0"] = "mu",
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """The mean μ of q(x₀ | y), by stochastic descent on its KL to the posterior.

    At each level σ, with x₀ = μ + σ_x₀ e₀ and fresh n,

        ∇ = v · ∇_μ misfit(x₀) + λ h(σ) (ε̂(x₀ + σn; σ) − n),

    one step of Adam. No gradient passes through the network. The spread of μ over
    seeds is the optimiser's noise, not the posterior's spread: use it for no
    uncertainty.

    Differs from the authors' code in that μ is returned after the last step (see
    ``returns``), and that losses are per item, so that nothing depends on the batch.

    Args:
        problem: what was measured, and how; the operator may be nonlinear.
        prior: the denoiser.
        steps: how many, at evenly spaced steps of the DDPM schedule.
        sigmas: the noise levels instead, one step each, highest first.
        sigma_range: or the lowest and the highest, the others evenly between in ln σ.
        lam: λ, the prior's weight.
        lr: the step size, in the prior's range.
        obs_weight: v, the data's weight.
        weight: h(σ): ``linear`` σ, ``sqrt`` σ^½, ``square`` σ², ``log`` ln(1+σ),
            ``trunc_linear`` min(σ, 1), ``power2over3`` σ^⅔, ``const`` 1; and, not of
            the paper, ``calibrated`` 1/σ, whose gradient tends to −∇ log p as σ → 0.
        order: in which the levels are visited; ``random`` is what the theory's
            expectation asks for, ``descending`` what the paper runs.
        optimizer: Adam as in the paper, plain descent, or ``prox``, which is not of
            the paper: a step on the prior's term and the data's proximal map,

                μ ← argmin −log p(y | x) + λ h(σ)/2τσ ‖x − (μ − τσ(ε̂ − n))‖²

            with τ = lr ≤ 1. It has the same fixed points, and CT's bad conditioning
            does not slow it down. It takes linear operators and ``bayes`` only.
        cg_steps: of ``prox``, where it has no closed form.
        betas: Adam's.
        normalize: the data term: ``mean`` of (y − Ax)²/2 over y, against the mean over
            x for the prior's, as in the authors' code; ``sum`` likewise, by sums;
            ``bayes``: −log p(y | x), which knows the noise, against sums.
        sigma_x0: σ_x₀, the spread of q.
        antithetic: average over n and −n: two passes of the network, half the noise.
        init: where to start: A⁺y, Aᴴy, zero, an image, or another method; see
            `core.initial`.
        discrepancy: τ: stop an item once ‖y − A(μ)‖²_W ≤ τ m; see `Discrepancy`.
        returns: μ, or the x₀ that the last step was taken from, which is what the
            authors' code scores.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        μ, one for each item of y.
    """
    mu = initial(problem, init)
    if optimizer == "prox" and normalize != "bayes":
        raise ValueError('optimizer="prox" needs normalize="bayes"')
    if sigmas is None and sigma_range is not None:
        low, high = sigma_range
        sigmas = torch.logspace(math.log10(high), math.log10(low), steps)
    elif sigmas is None:
        sigmas = ddpm_sigmas(steps).clamp(prior.sigma_min, prior.sigma_max)
    if returns not in ("mu", "x0"):
        raise ValueError(f"unknown returns {returns!r}: mu or x0")
    levels = _ordered(sigmas.to(mu.device, mu.dtype), order, generator)
    stop = Discrepancy(problem, mu, discrepancy)
    n_y, n_x = problem.y[0].numel(), mu[0].numel()
    mu = mu.clone().requires_grad_()
    descent = _optimizer(optimizer, mu, lr, betas)
    x0 = mu.detach()
    for sigma in progress(levels):
        with torch.no_grad():
            x0 = mu.detach().clone()
            if sigma_x0:
                x0 = x0 + sigma_x0 * randn_like(mu, generator)
            n = randn_like(mu, generator)
            s = per_item(sigma, n)
            reg = prior.eps(x0 + s * n, sigma) - n
            if antithetic:
                reg = (reg + prior.eps(x0 - s * n, sigma) + n) / 2
            if descent is None:
                rho = lam * weigh(s, weight) / (obs_weight * lr * s)
                v = mu - lr * s * reg
                new = problem.prox(v, rho, max_steps=cg_steps, rtol=1e-4)
                mu = stop.keep(mu, new)
                if stop.all:
                    break
                continue
            if normalize == "bayes":
                data = problem.misfit_grad(x0)
            else:
                data = problem.residual_grad(x0)
            total = obs_weight * data + lam * weigh(s, weight) * reg
            if normalize == "mean":
                total = obs_weight * data / n_y + lam * weigh(s, weight) * reg / n_x
            mu.grad = total
            before = mu.detach().clone()
        descent.step()
        with torch.no_grad():
            mu.copy_(stop.keep(before, mu.detach()))
        if stop.all:
            break
    return x0 if returns == "x0" else mu.detach()


def _optimizer(
    name: str, mu: Tensor, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer | None:
    match name:
        case "adam":
            return torch.optim.Adam([mu], lr=lr, betas=betas)
        case "sgd":
            return torch.optim.SGD([mu], lr=lr)
        case "prox":
            return None
    raise ValueError(f"unknown optimizer {name!r}: adam, sgd or prox")


def weigh(z: Tensor, weight: Weight) -> Tensor:
    """h(z) for z = σ, the square root of the inverse signal-to-noise ratio."""
    match weight:
        case "linear":
            return z
        case "sqrt":
            return z.sqrt()
        case "square":
            return z.square()
        case "log":
            return z.log1p()
        case "trunc_linear":
            return z.clamp_max(1)
        case "power2over3":
            return z ** (2 / 3)
        case "const":
            return torch.ones_like(z)
        case "calibrated":
            return 1 / z
    raise ValueError(f"unknown weight {weight!r}")


def _ordered(sigmas: Tensor, order: Order, generator: Randomness) -> Iterable[Tensor]:
    match order:
        case "descending":
            return sigmas
        case "ascending":
            return sigmas.flip(0)
        case "random":

            def shuffled(g: torch.Generator) -> Tensor:
                n = len(sigmas)
                index = torch.randint(n, (n,), generator=g, device=g.device)
                return sigmas[index.to(sigmas.device)]

            # An item with a generator of its own has an order of its own.
            if isinstance(generator, torch.Generator):
                return shuffled(generator)
            return torch.stack([shuffled(g) for g in generator], dim=1)
    raise ValueError(f"unknown order {order!r}: descending, random or ascending")
