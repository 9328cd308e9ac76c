"""When the data are fitted as well as their noise allows, and no better."""

from typing import final

import torch
from torch import Tensor

from ..linalg import dot
from ..problem import InverseProblem
from ..shapes import PerItem, X


@final
class Discrepancy:
    """Morozov's principle: stop an item at ‖y − A(x)‖²_W ≤ τ m.

    W is the noise's precision and m how many numbers were measured, so that the true
    image has about 1 for τ. Complex measurements count twice, and those that no image
    reaches (of masked pixels, of rays past the image) do not count.

    Args:
        problem: what was measured, and how.
        like: any image of the problem.
        tau: τ; None never stops.
    """

    def __init__(self, problem: InverseProblem, like: X, tau: float | None) -> None:
        if tau is not None and not tau > 0:
            raise ValueError(f"discrepancy must be > 0, got {tau}")
        self.tau = tau
        self.stopped = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        if tau is not None:  # else no application of the operator is spent
            self.problem = problem.without_hidden(like)
            self.numbers = _numbers(problem, like)

    def keep(self, x: X, new: X) -> X:
        """The new images, but those of items that stopped before; and who stops now."""
        if self.tau is None:
            return new
        shape = (-1, *(1,) * (x.ndim - 1))
        new = torch.where(self.stopped.reshape(shape), x, new)
        self.stopped = self.stopped | (self.ratio(new) <= self.tau)
        return new

    def ratio(self, x: X) -> PerItem:
        """‖y − A(x)‖²_W / m."""
        y, noise = self.problem.y, self.problem.noise
        residual = y - self.problem.operator.apply(x)
        weighted = noise.precision(y) * residual
        return dot(residual, weighted) / self.numbers

    @property
    def all(self) -> bool:
        """Whether every item has stopped."""
        return self.tau is not None and bool(self.stopped.all())


def _numbers(problem: InverseProblem, like: X) -> Tensor:
    ones = torch.ones_like(problem.y)
    seen = InverseProblem(ones, problem.operator, problem.noise).without_hidden(like).y
    count = (seen != 0).flatten(1).sum(1)
    return count * (2 if problem.y.is_complex() else 1)
