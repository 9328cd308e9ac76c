"""Operators of other libraries as ours, and ours as theirs.

None of those libraries is imported before one of its operators is asked for.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from invsolve.operators.base import LinearOperator, Operator
from invsolve.shapes import X, Y

from .deepinv import from_deepinv as from_deepinv, to_deepinv as to_deepinv
from .scipy import from_scipy as from_scipy, to_scipy as to_scipy


@runtime_checkable
class HasAdjoint(Protocol):
    """Anything linear with ``A(x)`` and ``A_adjoint(y)`` on batches of tensors."""

    def A(self, x: Tensor, /) -> Tensor:
        """A x."""
        ...

    def A_adjoint(self, y: Tensor, /) -> Tensor:
        """Aᴴ y."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Adapted(LinearOperator):
    """y = ``inner.A(x)``, with ``inner.A_adjoint``: whatever `HasAdjoint`."""

    inner: HasAdjoint

    def apply(self, x: X) -> Y:
        return self.inner.A(x)

    def adjoint(self, y: Y) -> X:
        return self.inner.A_adjoint(y)

    def to(self, device: torch.device) -> "Adapted":
        if not isinstance(self.inner, torch.nn.Module):
            return self
        return replace(self, inner=deepcopy(self.inner).to(device))


def as_operator(A: object) -> Operator:
    """Whatever measures, as an operator.

    Args:
        A: an operator of ours (which is given back), a physics of deepinv's (see
            `from_deepinv`), or any object with ``A`` and ``A_adjoint``.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(A, Operator):
        return A
    if any(base.__module__.startswith("deepinv.physics") for base in type(A).__mro__):
        return from_deepinv(A)
    if isinstance(A, HasAdjoint):
        return Adapted(A)
    raise TypeError(
        f"{type(A).__name__} is no operator: give one of invsolve.operators, an object "
        "with A(x) and A_adjoint(y), or ops.from_scipy(A, image_shape)"
    )
