"""Operators with orthogonal rows of one length: their inverses are closed forms."""

from abc import abstractmethod

from torch import Tensor

from invsolve.shapes import X, Y

from .base import LinearOperator


class OrthogonalRows(LinearOperator):
    """A Aᴴ = c I, so that pinv, prox and norm cost one A and one Aᴴ."""

    @property
    @abstractmethod
    def energy(self) -> float:
        """c, the squared length of every row."""

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = 0.0) -> X:
        """Aᴴ y / c."""
        return self.adjoint(y) / self.energy

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 0,
        rtol: float = 0.0,
    ) -> X:
        """v + Aᴴ(y − A v)/(c + ρ), by the Woodbury identity."""
        return v + self.adjoint(y - self.apply(v)) / (self.energy + rho)

    def norm(
        self, like: X | None = None, *, max_steps: int = 0, rtol: float = 0.0
    ) -> float:
        """√c."""
        return self.energy**0.5
