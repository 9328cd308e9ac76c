"""What the samplers share: the mark of what they give, and how they step.

The state is x = x₀ + σn throughout. A variance-preserving state is x/√(1+σ²), so the
published update rules hold here after division by √ᾱ; each sampler says which it is.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ..priors import Prior
from ..priors.schedules import karras_sigmas
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import X

Kind = Literal["posterior_sample", "point_estimate", "steered"]
Progress = Callable[[Iterable], Iterable]

Init = X | Literal["pinv", "adjoint", "zeros"] | Callable[[InverseProblem], X]
"""Where a descent starts: see `initial`."""


class Sampler(Protocol):
    """From a problem and a prior to one image for each item of the batch.

    ``kind`` says what the image is: a draw that approximates the posterior, the best
    single answer, or a draw steered towards the data without being their posterior's.
    """

    kind: Kind
    __name__: str

    def __call__(
        self,
        problem: InverseProblem,
        prior: Prior,
        *,
        generator: Randomness,
        progress: Progress = ...,
    ) -> X: ...


F = TypeVar("F", bound=Callable)


def gives(kind: Kind, *, codes: bool = False) -> Callable[[F], F]:
    """Mark what a sampler gives; the function itself stays as it is.

    Args:
        kind: what its images are.
        codes: whether it encodes and decodes itself, where a prior is of latents.
    """

    def mark(function: F) -> F:
        function.kind = kind  # pyright: ignore[reportFunctionMemberAccess]
        function.codes = codes  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


def initial(problem: InverseProblem, init: Init) -> X:
    """Where a descent starts, for the samplers that take an ``init``.

    Args:
        init: A⁺y, for a nonlinear operator its ``guess`` (``pinv``); Aᴴy (``adjoint``);
            zero (``zeros``); an image, one for each item; or what another method makes
            of the problem, such as ``partial(tv, lam=20.0)``. A sampler called by
            itself takes these in the unit of its ``prior``; `solve` takes images, and
            asks other methods for them, in the image's own.
    """
    if isinstance(init, Tensor):
        return init
    if callable(init):
        return init(problem)
    match init:
        case "pinv":
            return problem.operator.guess(problem.y)
        case "adjoint":
            return problem.linear.adjoint(problem.y)
        case "zeros":
            return problem.image_like()
    raise ValueError(
        f"unknown init {init!r}: pinv, adjoint, zeros, an image, or another method"
    )


def levels(
    prior: Prior,
    like: X,
    steps: int,
    sigmas: Tensor | None,
    sigma_range: tuple[float, float] | None,
) -> Tensor:
    """The given levels, or those of Karras et al. in a range, the prior's by default."""
    if sigmas is None:
        low, high = sigma_range or (prior.sigma_min, prior.sigma_max)
        sigmas = karras_sigmas(steps, low, high)
    return sigmas.to(like)


def ddim(
    x: X, x0: X, sigma: Tensor, sigma_next: Tensor, eta: float, generator: Randomness
) -> X:
    """x₀ + √(σ′² − f²) ε̂ + f n, with ε̂ = (x − x₀)/σ and fresh noise f = ησ′√(1 − σ′²/σ²).

    Song et al. 2021, eq. 12; η = 1 is ancestral sampling.
    """
    if eta == 0:
        return x0 + sigma_next * (x - x0) / sigma
    fresh = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
    kept = (sigma_next**2 - fresh**2).clamp_min(0).sqrt()
    return x0 + kept * (x - x0) / sigma + fresh * randn_like(x, generator)


def transitions(sigmas: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(σ, σ′) for each step, the last one going to σ′ = 0."""
    return list(pairwise(path(sigmas)))


def path(sigmas: Tensor) -> Tensor:
    """The levels with 0 after the lowest, as solvers take them."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def start(like: X, sigma: Tensor, generator: Randomness) -> X:
    """x_T: noise alone, √(1+σ²) n, which is N(0, I) for the variance-preserving state."""
    return (1 + sigma**2).sqrt() * randn_like(like, generator)


def image_like(problem: InverseProblem) -> X:
    """Zeros of the images' shape, dtype and device, of a problem that must be linear."""
    return problem.linear.image_like(problem.y)
