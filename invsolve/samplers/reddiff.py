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
from .core import Progress, gives

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

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "inpainting": {"lam": 0.25, "lr": 0.25, "sigma_x0": 1e-4},
        "inpainting-noisy": {"lam": 1.0, "lr": 0.25},
        "super-resolution-x4": {"lam": 0.25, "lr": 0.1},
        "deblurring": {"lam": 0.25, "lr": 0.5},
        "nonlinear-deblurring": {"lam": 0.25, "lr": 0.5},
        "phase-retrieval": {"lam": 0.25, "lr": 0.5},
        "hdr": {"lam": 0.25, "lr": 0.5},
        "jpeg": {"lam": 0.25, "lr": 0.5},
        "ct": {
            "steps": 25,
            "sigma_range": (0.03, 0.5),
            "lam": 0.15,
            "lr": 0.5,
            "normalize": "bayes",
            "weight": "calibrated",
            "optimizer": "prox",
            "antithetic": True,
            "init": "zeros",
        },
    }
)
"""The settings of the authors' scripts, for images in [−1, 1]; ``ct`` is ours."""


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
    init: X | Literal["pinv", "adjoint", "zeros"] = "pinv",
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """The mean μ of q(x₀ | y), by stochastic descent on its KL to the posterior.

    At each level σ, with x₀ = μ + σ_x₀ e₀ and fresh n,

        ∇ = v · ∇_μ misfit(x₀) + λ h(σ) (ε̂(x₀ + σn; σ) − n),

    one step of Adam. No gradient passes through the network. The spread of μ over
    seeds is the optimiser's noise, not the posterior's spread: use it for no
    uncertainty.

    Differs from the authors' code in that μ is returned after the last step, and that
    losses are per item, so that nothing depends on the batch.

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
        init: where to start: A⁺y (for a nonlinear operator its ``guess``), Aᴴy, zero,
            or an image, one for each item, in the unit that ``prior`` speaks
            (`solve` takes it in the image's own unit).
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        μ, one for each item of y.
    """
    A, y = problem.operator, problem.y
    mu = _start(problem, init)
    if optimizer == "prox" and normalize != "bayes":
        raise ValueError('optimizer="prox" needs normalize="bayes"')
    if sigmas is None and sigma_range is not None:
        low, high = sigma_range
        sigmas = torch.logspace(math.log10(high), math.log10(low), steps)
    elif sigmas is None:
        sigmas = ddpm_sigmas(steps).clamp(prior.sigma_min, prior.sigma_max)
    levels = _ordered(sigmas.to(mu.device, mu.dtype), order, generator)
    n_y, n_x = y[0].numel(), mu[0].numel()
    mu = mu.clone().requires_grad_()
    descent = _optimizer(optimizer, mu, lr, betas)
    for sigma in progress(levels):
        with torch.no_grad():
            x0 = mu + sigma_x0 * randn_like(mu, generator) if sigma_x0 else mu.detach()
            n = randn_like(mu, generator)
            s = per_item(sigma, n)
            reg = prior.eps(x0 + s * n, sigma) - n
            if antithetic:
                reg = (reg + prior.eps(x0 - s * n, sigma) + n) / 2
            if descent is None:
                rho = lam * weigh(s, weight) / (obs_weight * lr * s)
                v = mu - lr * s * reg
                mu = problem.prox(v, rho, max_steps=cg_steps, rtol=1e-4)
                continue
            if normalize == "bayes":
                data = problem.misfit_grad(x0)
            else:
                data = A.vjp(x0, A.apply(x0) - y)
            total = obs_weight * data + lam * weigh(s, weight) * reg
            if normalize == "mean":
                total = obs_weight * data / n_y + lam * weigh(s, weight) * reg / n_x
            mu.grad = total
        descent.step()
    return mu.detach()


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


def _start(problem: InverseProblem, init: X | str) -> X:
    if isinstance(init, Tensor):
        return init
    match init:
        case "pinv":
            return problem.operator.guess(problem.y)
        case "adjoint":
            return problem.linear.adjoint(problem.y)
        case "zeros":
            return problem.image_like()
    raise ValueError(f"unknown init {init!r}: pinv, adjoint, zeros, or an image")


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
