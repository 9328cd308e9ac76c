"""Randomness comes from generators that are passed in, never from the global state."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from invsolve.shapes import X

Randomness = Generator | Sequence[Generator]
"""One generator for the whole batch, or one for each of its items.

With one for each item a result does not depend on what else is in the batch.
"""


def randn_like(x: X, generator: Randomness) -> X:
    """N(0, I) of x's shape, dtype and device; complex numbers have unit variance.

    Drawn on the generator's own device, so that a CPU generator gives one and the same
    noise whichever device computes.
    """

    def normal(like: Tensor, g: Generator) -> Tensor:
        return torch.randn(like.shape, dtype=x.dtype, device=g.device, generator=g)

    return draw(normal, x, generator)


def poisson(rate: X, generator: Randomness) -> X:
    """Counts with the given expectation."""

    def counts(rate: Tensor, g: Generator) -> Tensor:
        return torch.poisson(rate.to(g.device), generator=g)

    return draw(counts, rate, generator)


def draw(
    one: Callable[[Tensor, Generator], Tensor], like: X, generator: Randomness
) -> X:
    """``one(like, generator)`` for the batch, or for each item from its generator."""
    if isinstance(generator, Generator):
        return one(like, generator).to(like.device)
    if len(generator) != len(like):
        raise ValueError(
            f"{len(generator)} generators were given for a batch of {len(like)}: "
            "give one for each item, or a single one"
        )
    items = [one(item, g) for item, g in zip(like, generator, strict=True)]
    return torch.stack([item.to(like.device) for item in items])


def spawn(generator: Generator, n: int) -> list[Generator]:
    """n independent generators, seeded from this one: one stream for each sample.

    The i-th stream does not depend on n, nor on how much the others are drawn from.
    """
    seeds = torch.randint(2**62, (n,), generator=generator, device=generator.device)
    return [Generator(generator.device).manual_seed(int(s)) for s in seeds]


def rademacher(x: X, generator: Randomness) -> X:
    """−1 or 1, each as often, of x's shape, dtype and device."""

    def signs(like: Tensor, g: Generator) -> Tensor:
        bits = torch.randint(2, like.shape, device=g.device, generator=g)
        return (2 * bits - 1).to(x.dtype)

    return draw(signs, x, generator)
