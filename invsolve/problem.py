"""The inverse problem itself: find x given y = A(x) + noise."""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Generator, Tensor

from .operators import (
    GaussianNoise,
    LinearOperator,
    Mask,
    Noise,
    Operator,
)
from .operators.base import Rescale
from .operators.bridge import as_operator
from .priors import AffineMap
from .random import randn_like
from .shapes import PerItem, X


@final
@dataclass(frozen=True, eq=False, init=False)
class InverseProblem:
    """Measurements y with the operator and the noise that made them.

    Args:
        y: (batch, …), as ``operator`` gives them.
        operator: A: one of ours, a physics of deepinv's, or any object with ``A(x)`` and
            ``A_adjoint(y)``, which becomes one of ours. The same for every item, or
            with a `Mask` for each.
        noise: p(y | A(x)), in the measurements' unit.

    Raises:
        TypeError: ``operator`` is none of these.
        ValueError: y is not finite, or not what the operator or the noise can give.
    """

    y: Tensor
    operator: Operator
    noise: Noise

    def __init__(self, y: Tensor, operator: object, noise: Noise) -> None:
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "operator", as_operator(operator))
        object.__setattr__(self, "noise", noise)
        if not (self.y.is_floating_point() or self.y.is_complex()):
            raise ValueError(f"measurements must be floating point, got {self.y.dtype}")
        bad = int((~self.y.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{bad} of {self.y.numel()} measurements are NaN or infinite: drop "
                "them with a Mask, or repair them"
            )
        self.operator.check_measurements(self.y)
        self.noise.check(self.y)

    @property
    def linear(self) -> LinearOperator:
        """The operator, if it is linear; else a ValueError that names a way out."""
        if not isinstance(self.operator, LinearOperator):
            raise ValueError(
                f"this needs a linear operator, and {self.operator.not_linear}: use "
                "reddiff (by adam or sgd), daps (inner='langevin') or dps"
            )
        return self.operator

    def image_like(self) -> X:
        """Zeros of the shape, dtype and device of the images."""
        return self.operator.image_like(self.y)

    def misfit(self, x: X) -> PerItem:
        """−log p(y | x), up to a constant."""
        return self.noise.nll(self.y, self.operator.apply(x))

    def misfit_grad(self, x: X) -> X:
        """−∇_x log p(y | x)."""
        y, pull = self.operator.pullback(x)
        return pull(self.noise.nll_grad(self.y, y))

    def residual_grad(self, x: X) -> X:
        """∇_x ½‖y − A(x)‖² = J_A(x)ᴴ (A(x) − y)."""
        y, pull = self.operator.pullback(x)
        return pull(y - self.y)

    def whitened(self) -> tuple[LinearOperator, Tensor]:
        """(√W A, √W y), with W the noise's precision: least squares with unit noise."""
        weight = self.noise.precision(self.y)
        if isinstance(weight, Tensor):
            root = weight.sqrt()
            return Mask(root) @ self.linear, root * self.y
        return weight**0.5 * self.linear, weight**0.5 * self.y

    def prox(self, v: X, rho: float | Tensor, *, max_steps: int, rtol: float) -> X:
        """argmin_x ½‖Ax − y‖²_W + ρ/2 ‖x − v‖², with W the noise's precision.

        For Gaussian noise ½‖·‖²_W is −log p(y | x); for counts it is its quadratic
        approximation.
        """
        A, y = self.whitened()
        return A.prox(v, y, rho, max_steps=max_steps, rtol=rtol)

    def seen_through(self, map: AffineMap) -> "InverseProblem":
        """The problem of u, where x = scale·u + offset: y − A(offset) = scale·A u.

        The measurements' unit, and so the noise, stay as they are. A nonlinear A
        becomes u ↦ A(scale·u + offset), and y stays too.
        """
        if map.scale == 1 and map.offset == 0:
            return self
        if not isinstance(self.operator, LinearOperator):
            return replace(
                self, operator=self.operator @ Rescale(map.scale, map.offset)
            )
        A = self.operator
        like = A.adjoint(self.y)
        if map.offset == 0:
            return InverseProblem(self.y, map.scale * A, self.noise)
        if not isinstance(self.noise, GaussianNoise):
            raise ValueError(
                f"a prior whose range has an offset needs GaussianNoise, not "
                f"{type(self.noise).__name__}: choose the range so that 0 is background"
            )
        shifted = self.y - A.apply(torch.full_like(like, map.offset))
        return InverseProblem(shifted, map.scale * A, self.noise)

    def without_hidden(self, like: X) -> "InverseProblem":
        """The problem with 0 for what was measured of nothing, if A is linear.

        Such measurements (of masked pixels, of rays past the image) are noise alone,
        which a norm of the residual should not count.

        Args:
            like: any image, of which the shape, dtype and device are used.
        """
        if not isinstance(self.operator, LinearOperator):
            return self
        # Of a random image, nothing but an empty row of A makes exactly 0.
        Ax = self.operator.apply(randn_like(like, Generator().manual_seed(0)))
        return replace(self, y=torch.where(Ax == 0, 0, self.y))

    def items(self, index: Tensor) -> "InverseProblem":
        """The problem of some of the batch's items; an item may be named repeatedly."""
        some = self.y[index.to(self.y.device)]
        return replace(self, y=some, operator=self.operator.items(index, some.ndim))

    def to(self, device: torch.device) -> "InverseProblem":
        """The same problem on a device."""
        return InverseProblem(
            self.y.to(device), self.operator.to(device), self.noise.to(device)
        )
