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


def gives(kind: Kind) -> Callable[[F], F]:
    """Mark what a sampler gives; the function itself stays as it is."""

    def mark(function: F) -> F:
        function.kind = kind  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return mark


def default_sigmas(
    prior: Prior, steps: int, like: X, sigma_range: tuple[float, float] | None = None
) -> Tensor:
    """Levels spaced as Karras et al., between the prior's or a given range's ends."""
    low, high = sigma_range or (prior.sigma_min, prior.sigma_max)
    return karras_sigmas(steps, low, high).to(like.device, like.real.dtype)


def transitions(sigmas: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(σ, σ′) for each step, the last one going to σ′ = 0."""
    return list(pairwise([*sigmas, torch.zeros_like(sigmas[0])]))


def start(like: X, sigma: Tensor, generator: Randomness) -> X:
    """x_T: noise alone, √(1+σ²) n, which is N(0, I) for the variance-preserving state."""
    return (1 + sigma**2).sqrt() * randn_like(like, generator)


def image_like(problem: InverseProblem) -> X:
    """A tensor of the images' shape, dtype and device."""
    return torch.zeros_like(problem.linear.adjoint(problem.y))
