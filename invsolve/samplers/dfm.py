"""DFM: a posterior sampler that was trained on measurements alone.

Tewari, Yin, Cazenavette, Rezchikov, Tenenbaum, Durand, Freeman, Sitzmann, "Diffusion with
Forward Models: Solving Stochastic Inverse Problems Without Direct Supervision", NeurIPS
2023. Theirs are one-shot and autoregressive sampling; the correction for the data's noise
and the closing draw are ours.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Generator, Tensor

from ..counting import CountedPrior, Tally
from ..forward_prior import ForwardPrior, parts, whole
from ..operators import GaussianNoise
from ..operators.parametric import Parametric
from ..priors import Prior
from ..priors.schedules import karras_sigmas
from ..problem import InverseProblem
from ..random import Randomness, draw, randn_like
from ..shapes import Sigma, X
from .core import Progress, gives, path
from .solvers import DDIM, Solver

Closing = Literal["none", "gaussian"]


@gives("posterior_sample")
@torch.no_grad()
def dfm(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 50,
    sigmas: Tensor | None = None,
    eta: float = 0.0,
    solver: Solver | None = None,
    targets: int | Literal["all"] | Sequence[Bool[Tensor, "*grid"]] = 1,
    guidance: float = 1.0,
    closing: Closing = "none",
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """For each target T: u from s_max n to y_T ~ p(y_T | y_C), then C ← C ∪ T.

        Ŝ = E[S | y_C, u],   ŷ = A_T Ŝ + κ (u − A_T Ŝ),   u ← DDIM(u, ŷ, s, s′)

    with κ = σ_y²/(σ_y² + s²). Returned is the last Ŝ. Its mean is E[S | y_C]; its
    covariance is Cov(S | C) − E Cov(S | C, T): too little by what C and T together leave
    open. More targets leave less open, and the closing draw adds N(0, what is left). With
    the exact Ŝ of a Gaussian both are exact but for the steps (docs/dfm.md).

    Args:
        problem: of an operator whose rows are among the prior's ``family``, in its noise.
        prior: a `ForwardPrior`.
        steps: how many for each target; with DDIM 100 or more where the spread counts.
        sigmas: the noise levels instead, in whitened units, highest first.
        eta: η of DDIM: 0 for none but the first noise.
        solver: one of `samplers.solvers` instead of DDIM; one of second order needs few
            steps.
        targets: how many targets of the size that was trained with, drawn from the rows
            that were not acquired (of an item with fewer, those); ``all`` until every row
            is; or the targets themselves.
            Contexts larger than those of the training are extrapolated to.
        guidance: w of ŷ = ŷ₀ + w (ŷ_C − ŷ₀), where ŷ₀ is without context; 1 is none.
        closing: ``gaussian`` adds the draw.
        generator: where every random number comes from.
        progress: wraps the loop over levels, as ``tqdm`` does.

    Raises:
        ValueError: the prior is of another kind, was trained for another geometry or
            another noise or always with its context, or knows no closing draw.
    """
    model, tally = forward_prior(prior)
    if guidance != 1 and not model.blind:
        raise ValueError(
            "this prior was never trained without context: leave guidance out, or train "
            "with split.dropout above 0"
        )
    family, y = model.family, problem.y
    context, y = family.acquired(problem.operator, y, model.gain)
    _check_noise(problem, model)
    y = model.whitened(y)
    plan = _targets(targets, family, context, model.target_rows, y, generator)
    if sigmas is None:
        sigmas = karras_sigmas(steps, model.sigma_min, model.sigma_max)
    real = y.real if y.is_complex() else y
    levels = path(sigmas.to(real))
    solver = solver or DDIM(eta)
    lowest, nothing = levels[-2], torch.zeros_like(context)

    def guessed(y: Tensor, C: Tensor) -> Tensor:
        tally.forwards += len(y)
        return model.guess(y, C)

    def signal(y: Tensor, C: Tensor, u: Tensor, T: Tensor, s: Tensor, at: X) -> X:
        tally.forwards += len(y)
        return model.signal(y, C, u, T, s, at)

    blind = torch.zeros_like(y)
    free = guessed(blind, nothing) if guidance != 1 else blind

    def drawn(y: Tensor, C: Tensor, T: Tensor, guess: X) -> Tensor:
        """u → y_T, as real numbers all along."""

        def denoise(v: Tensor, s: Sigma) -> Tensor:
            u = whole(v, y)
            o = model.corrected(model.measure(signal(y, C, u, T, s, guess)), u, s)
            if guidance != 1:
                S0 = signal(blind, nothing, u, T, s, free)
                o0 = model.corrected(model.measure(S0), u, s)
                o = o0 + guidance * (o - o0)
            return parts(o)

        n = randn_like(parts(y), generator)
        v = parts(model.measure(guess)) + levels[0] * n
        return whole(
            solver(denoise, v, levels, generator=generator, progress=progress), y
        )

    S = guess = guessed(y, context)
    for k, T in enumerate(plan):
        if k > 0:
            guess = guessed(y, context)
        u = drawn(y, context, T, guess)
        if k == len(plan) - 1:
            S = signal(y, context, u, T, lowest, guess)
        y = family.join(y, context, family.restrict_data(u, T))
        context = family.union(context, T)
    if closing == "gaussian":
        tally.forwards += len(y)
        S = S + model.residual(y, context, S, generator)
    return S


def forward_prior(prior: Prior) -> tuple[ForwardPrior, Tally]:
    """The prior behind whatever counts or records it, and the count.

    Raises:
        ValueError: it is one of images.
    """
    inner: object = prior
    tally, bf16 = Tally(), False
    while inner is not None and not isinstance(inner, ForwardPrior):
        tally = inner.tally if isinstance(inner, CountedPrior) else tally
        bf16 = bf16 or vars(inner).get("bf16", False)
        inner = vars(inner).get("inner")
    if inner is None:
        raise ValueError(
            "dfm needs a prior that was trained on measurements: see docs/dfm.md"
        )
    return inner.in_bf16() if bf16 else inner, tally


def _check_noise(problem: InverseProblem, model: ForwardPrior) -> None:
    noise = problem.noise
    if not isinstance(noise, GaussianNoise) or not isinstance(noise.sigma, float):
        raise ValueError(
            "dfm needs GaussianNoise with one sigma, as it was trained for"
        )
    if not math.isclose(noise.sigma, model.sigma, rel_tol=0.05):
        raise ValueError(
            f"this prior was trained for noise of sigma {model.sigma:.4g}, the problem's "
            f"is {noise.sigma:.4g}: train for it, or add noise to the measurements"
        )


def _targets(
    targets: int | str | Sequence[Tensor],
    family: Parametric,
    acquired: Tensor,
    size: int,
    y: Tensor,
    generator: Randomness,
) -> list[Tensor]:
    missing = ~acquired.flatten(1)
    left = missing.sum(1, keepdim=True)
    if not isinstance(targets, int | str):
        given = [T[None] for T in targets]
        for T in given:
            family.check(T)
            if (T & acquired).any():
                raise ValueError("a target has rows that were acquired: leave them out")
        return given
    most = -(-int(left.max()) // size)
    count = most if targets == "all" else int(targets)
    if count < 0:
        raise ValueError(f"targets must be 0 or more, got {targets}")
    if most == 0 or count == 0:
        return []

    def chance(like: Tensor, g: Generator) -> Tensor:
        return torch.rand(like.shape, generator=g, device=g.device)

    # Drawn for each item, as they were in training.
    order = draw(chance, torch.zeros(len(y), missing.shape[1]), generator).to(y.device)
    order = order.masked_fill(~missing, 2.0).argsort(1).argsort(1)
    groups = [
        (order >= k * size) & (order < left.clamp_max((k + 1) * size))
        for k in range(min(count, most))
    ]
    return [group.reshape(len(y), *family.grid) for group in groups]
