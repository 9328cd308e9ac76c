"""Solvers: from noise to an image along falling levels, whatever the denoiser.

All integrate dx/dσ = (x − D(x; σ))/σ, the probability-flow ODE of Song et al. 2021 for
x = x₀ + σn, or an SDE with the same marginals. Fed with a prior's D(x; σ) = E[x₀ | x]
they draw from the prior; fed with a posterior's, E[x₀ | x, y] or a sampler's
approximation of it, they draw from that. With λ = −ln σ and h = λ′ − λ between two
levels σ > σ′, the exact solution is

    x′ = (σ′/σ) x + σ′ ∫ e^λ D(λ) dλ = x − ∫ e^−λ ε̂(λ) dλ,   ε̂ = (x − D)/σ.

A level (a, s) of another convention, x_t = a x₀ + s n, is σ = s/a of x = x_t/a, and the
formulas are the same: variance-preserving and flow-matching samplers are these.
A last step to σ′ = 0 returns D.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from ..random import Randomness, randn_like
from ..shapes import Sigma, X
from .core import Progress, ddim

Denoise = Callable[[X, Sigma], X]
"""(x, σ) ↦ the clean image that is expected there."""


@runtime_checkable
class Solver(Protocol):
    """Carries x from the level sigmas[0] to sigmas[-1], highest first."""

    def __call__(
        self,
        denoise: Denoise,
        x: X,
        sigmas: Tensor,
        *,
        generator: Randomness,
        progress: Progress = iter,
    ) -> X: ...


@final
@dataclass(frozen=True)
class DDIM:
    """x′ = D + √(σ′² − f²) ε̂ + f n, with fresh noise f = ησ′√(1 − σ′²/σ²).

    Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, eq. 12.

    Args:
        eta: 0 for the ODE's first-order solver, 1 for ancestral sampling.
    """

    eta: float = 0.0

    def __call__(
        self,
        denoise: Denoise,
        x: X,
        sigmas: Tensor,
        *,
        generator: Randomness,
        progress: Progress = iter,
    ) -> X:
        for sigma, sigma_next in progress(_pairs(sigmas)):
            x = ddim(x, denoise(x, sigma), sigma, sigma_next, self.eta, generator)
        return x


@final
@dataclass(frozen=True)
class Renoise:
    """x′ = D + σ′(√(1−ζ) ε̂ + √ζ n): the clean image, noised anew.

    The step of DiffPIR. Its spread is too small: see `diffpir`.

    Args:
        zeta: ζ, the fraction of the noise that is fresh.
    """

    zeta: float = 1.0

    def __call__(
        self,
        denoise: Denoise,
        x: X,
        sigmas: Tensor,
        *,
        generator: Randomness,
        progress: Progress = iter,
    ) -> X:
        for sigma, sigma_next in progress(_pairs(sigmas)):
            x0 = denoise(x, sigma)
            eps = (x - x0) / sigma
            n = randn_like(x, generator)
            x = x0 + sigma_next * ((1 - self.zeta) ** 0.5 * eps + self.zeta**0.5 * n)
        return x


@final
@dataclass(frozen=True)
class Multistep:
    """The exact solution with the last outputs' polynomial in λ for D, or for ε̂.

    Of D, orders 2 and 3 are DPM-Solver++(2M, 3M) (Lu et al. 2022), of ε̂ DEIS (Zhang,
    Chen 2023) in λ; order 1 is DDIM either way. One pass a step.

    Args:
        order: how many outputs are remembered, 1 to 4.
        of: what is interpolated: ``x0`` or ``eps``.
        lower_final: let the order fall to 1 towards the end; unless given, where there
            are fewer than 15 steps. The step to 0 is of order 1 anyhow.
    """

    order: int = 2
    of: Literal["x0", "eps"] = "x0"
    lower_final: bool | None = None

    def __post_init__(self) -> None:
        _check_order(self.order, 1, 4)

    def __call__(
        self,
        denoise: Denoise,
        x: X,
        sigmas: Tensor,
        *,
        generator: Randomness,
        progress: Progress = iter,
    ) -> X:
        lams = (-sigmas.double().log()).tolist()
        steps, history = len(lams) - 1, []
        lower = steps < 15 if self.lower_final is None else self.lower_final
        for i, (sigma, sigma_next) in enumerate(progress(_pairs(sigmas))):
            x0 = denoise(x, sigma)
            if sigma_next == 0:
                return x0
            output = x0 if self.of == "x0" else (x - x0) / sigma
            history = [output, *history[: self.order - 1]]
            k = min(len(history), steps - i) if lower else len(history)
            weights = _weights(self.of, lams[i + 1], lams[i::-1][:k])
            change = sum(w * f for w, f in zip(weights, history, strict=False))
            x = (sigma_next / sigma) * x + change if self.of == "x0" else x + change
        return x


def _weights(of: str, lam_next: float, lams: Sequence[float]) -> list[float]:
    """What each output weighs in the exact integral of their polynomial.

    With τ = λ − λ_c and h = λ′ − λ_c: σ′ ∫ e^λ τʲ dλ for D, −∫ e^−λ τʲ dλ for ε̂, from
    λ_c to λ′, by parts from j = 0.
    """
    h = lam_next - lams[0]
    sign = 1 if of == "x0" else -1
    moments = [sign * math.expm1(sign * h)]
    for j in range(1, len(lams)):
        moments.append(sign * (h**j * math.exp(sign * h) - j * moments[-1]))
    nodes = torch.tensor([lam - lams[0] for lam in lams], dtype=torch.float64)
    powers = nodes[:, None] ** torch.arange(len(nodes))
    scale = math.exp(-h) if of == "x0" else -math.exp(-lams[0])
    integral = scale * torch.tensor(moments, dtype=torch.float64)
    return torch.linalg.solve(powers.T, integral).tolist()


@final
@dataclass(frozen=True)
class Singlestep:
    """DPM-Solver-2 and -3: intermediate levels in place of memory (Lu et al. 2022).

    As many passes a step as the order is; the levels between are evenly spaced in λ.

    Args:
        order: 2 or 3.
    """

    order: int = 2

    def __post_init__(self) -> None:
        _check_order(self.order, 2, 3)

    def __call__(
        self,
        denoise: Denoise,
        x: X,
        sigmas: Tensor,
        *,
        generator: Randomness,
        progress: Progress = iter,
    ) -> X:
        def eps(x: X, sigma: Tensor) -> X:
            return (x - denoise(x, sigma)) / sigma

        for sigma, sigma_next in progress(_pairs(sigmas)):
            if sigma_next == 0:
                return denoise(x, sigma)
            h = float(sigma.double().log() - sigma_next.double().log())
            first = eps(x, sigma)
            if self.order == 2:
                middle = sigma * math.exp(-h / 2)
                x_middle = x - middle * math.expm1(h / 2) * first
                x = x - sigma_next * math.expm1(h) * eps(x_middle, middle)
                continue
            one, two = sigma * math.exp(-h / 3), sigma * math.exp(-2 * h / 3)
            slope = eps(x - one * math.expm1(h / 3) * first, one) - first
            bend = math.expm1(2 * h / 3) / (2 * h / 3) - 1
            x_two = x - two * (math.expm1(2 * h / 3) * first + 2 * bend * slope)
            slope = eps(x_two, two) - first
            bend = math.expm1(h) / h - 1
            x = x - sigma_next * (math.expm1(h) * first + 1.5 * bend * slope)
        return x


@final
@dataclass(frozen=True)
class Heun:
    """x′ = x + (σ′ − σ)(ε̂ + ε̂′)/2, with ε̂′ where Euler's step would lead.

    Karras et al. 2022, Algorithm 1. Two passes a step, and one at a last one to 0.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: X,
        sigmas: Tensor,
        *,
        generator: Randomness,
        progress: Progress = iter,
    ) -> X:
        for sigma, sigma_next in progress(_pairs(sigmas)):
            x0 = denoise(x, sigma)
            if sigma_next == 0:
                return x0
            slope = (x - x0) / sigma
            euler = x + (sigma_next - sigma) * slope
            slope_next = (euler - denoise(euler, sigma_next)) / sigma_next
            x = x + (sigma_next - sigma) * (slope + slope_next) / 2
        return x


@final
@dataclass(frozen=True)
class SDE:
    """x′ = (σ′/σ)² x + (1−e^−2h) D + (1 − (1−e^−2h)/2h) D₁ + σ′√(1−e^−2h) n.

    SDE-DPM-Solver++ (Lu et al. 2022) with D₁ = (D − D₋₁) h/h₋₁ at order 2, and 0 at
    order 1, which is `DDIM` with η = 1. One pass a step.

    Args:
        order: 1 or 2.
    """

    order: int = 2

    def __post_init__(self) -> None:
        _check_order(self.order, 1, 2)

    def __call__(
        self,
        denoise: Denoise,
        x: X,
        sigmas: Tensor,
        *,
        generator: Randomness,
        progress: Progress = iter,
    ) -> X:
        before: tuple[X, float] | None = None
        for sigma, sigma_next in progress(_pairs(sigmas)):
            x0 = denoise(x, sigma)
            if sigma_next == 0:
                return x0
            h = float(sigma.double().log() - sigma_next.double().log())
            gain = -math.expm1(-2 * h)
            change = gain * x0
            if before is not None and self.order == 2:
                slope = (x0 - before[0]) * (h / before[1])
                change = change + (1 - gain / (2 * h)) * slope
            n = randn_like(x, generator)
            x = (1 - gain) * x + change + sigma_next * math.sqrt(gain) * n
            before = x0, h
        return x


@final
@dataclass(frozen=True)
class Momentum:
    """x′ = x + (σ′ − σ) d, with d an Adams–Bashforth mean that is damped by β.

    Wizadwongsa, Chinchuthakun, Khungurn, Raj, Suwajanakorn, "Diffusion Sampling with
    Momentum for Mitigating Divergence Artifacts", ICLR 2024. ``ghvb`` averages the
    slopes, v ← (1−β) v + β ε̂, and corrects the mean for it: its order is k in the limit
    of many steps. ``hb``, the heavy ball, averages the mean: more stable, of order 1.
    β = 1 is no damping: PLMS of order k. With few steps and k ≥ 3 a β of 0.8 keeps it
    from diverging. The weights are those of an even grid in σ.

    Args:
        order: k, how many slopes are remembered, 1 to 4.
        beta: β in (0, 1].
        kind: ``ghvb`` or ``hb``.
    """

    order: int = 2
    beta: float = 1.0
    kind: Literal["ghvb", "hb"] = "ghvb"

    def __post_init__(self) -> None:
        _check_order(self.order, 1, 4)
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {self.beta}")

    def __call__(
        self,
        denoise: Denoise,
        x: X,
        sigmas: Tensor,
        *,
        generator: Randomness,
        progress: Progress = iter,
    ) -> X:
        velocity, history, b = None, [], self.beta
        for sigma, sigma_next in progress(_pairs(sigmas)):
            x0 = denoise(x, sigma)
            if sigma_next == 0:
                return x0
            slope = (x - x0) / sigma
            velocity = slope if velocity is None else velocity
            if self.kind == "ghvb":
                velocity = (1 - b) * velocity + b * slope
                history = [velocity, *history[: self.order - 1]]
                d = _adams_bashforth(history, b) / b
            else:
                history = [slope, *history[: self.order - 1]]
                velocity = (1 - b) * velocity + b * _adams_bashforth(history, 1.0)
                d = velocity
            x = x + (sigma_next - sigma) * d
        return x


def _adams_bashforth(history: Sequence[X], beta: float) -> X:
    """The mean of the last slopes that is exact up to the order, damping undone."""
    b = beta
    numerators, denominator = {
        1: ([b], 1),
        2: ([2 + b, b - 2], 2),
        3: ([18 + 5 * b, 8 * b - 24, 6 - b], 12),
        4: ([46 + 9 * b, 19 * b - 78, 42 - 5 * b, b - 10], 24),
    }[len(history)]
    terms = [n / denominator * v for n, v in zip(numerators, history, strict=True)]
    return torch.stack(terms).sum(0)


@final
@dataclass(frozen=True, eq=False)
class Scheduler:
    """The steps of one of diffusers' schedulers, at levels of its own.

    Its state is x_t = a x₀ + s n, of which each step is given D(x_t/a; s/a), in the form
    that its ``prediction_type`` names. Of the levels only the number counts, and of x
    the noise, which is brought to the scheduler's first level.

    Args:
        scheduler: such as ``DPMSolverMultistepScheduler(prediction_type="sample")``;
            fresh copies of it are run, since it keeps a memory.

    Raises:
        ValueError: the scheduler clips the clean image, is one for flows, or cannot be
            fed a clean image.
    """

    scheduler: Any

    def __post_init__(self) -> None:
        config = self.scheduler.config
        name = type(self.scheduler).__name__
        for key in ("clip_sample", "thresholding"):
            if config.get(key):
                raise ValueError(
                    f"this {name} clips the clean image, whose range it cannot know: "
                    f"make it with {key}=False"
                )
        if config.get("use_flow_sigmas") or "prediction_type" not in config:
            raise ValueError(
                f"this {name} is for flows: use one with alphas and sigmas, such as "
                "DPMSolverMultistepScheduler"
            )

    def __call__(
        self,
        denoise: Denoise,
        x: X,
        sigmas: Tensor,
        *,
        generator: Randomness,
        progress: Progress = iter,
    ) -> X:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        takes = inspect.signature(scheduler.step).parameters
        noise = {"generator": generator} if "generator" in takes else {}
        scheduler.set_timesteps(len(sigmas) - int(sigmas[-1] == 0), device=x.device)
        x = x / (1 + sigmas[0] ** 2).sqrt() * scheduler.init_noise_sigma
        for t in progress(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t)
            a, s = _level(scheduler, t)
            x0 = denoise(seen / a, x.new_tensor(s / a))
            match scheduler.config.prediction_type:
                case "sample":
                    output = x0
                case "epsilon":
                    output = (seen - a * x0) / s
                case _:
                    output = a * (seen - a * x0) / s - s * x0
            x = scheduler.step(output, t, x, **noise).prev_sample
        return x


def _level(scheduler: Any, t: Tensor) -> tuple[float, float]:
    """(a, s) of what the scheduler shows the network at t: a² + s² = 1."""
    if not hasattr(scheduler, "sigmas"):
        a2 = float(scheduler.alphas_cumprod[int(t)])
        return math.sqrt(a2), math.sqrt(1 - a2)
    if scheduler.step_index is None:
        scheduler._init_step_index(t)
    sigma = float(scheduler.sigmas[scheduler.step_index])
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def _pairs(sigmas: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(pairwise(sigmas))


def _check_order(order: int, low: int, high: int) -> None:
    if not low <= order <= high:
        raise ValueError(f"order must be {low} to {high}, got {order}")
