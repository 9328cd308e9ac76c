"""Noise models: p(y | z) for z = A(x). The operator is deterministic; noise is not."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from invsolve.random import Randomness, poisson, randn_like
from invsolve.shapes import PerItem, Y


class Noise(ABC):
    """A noise model p(y | z), independent from measurement to measurement."""

    @abstractmethod
    def sample(self, z: Y, *, generator: Randomness) -> Y:
        """A draw of y given z = A(x)."""

    @abstractmethod
    def nll(self, y: Y, z: Y) -> PerItem:
        """−log p(y | z), up to a constant that does not depend on z."""

    @abstractmethod
    def nll_grad(self, y: Y, z: Y) -> Tensor:
        """∇_z of ``nll``."""

    @abstractmethod
    def precision(self, y: Y) -> float | Tensor:
        """1/Var(y | z) as y itself tells it: the weights of weighted least squares.

        Exact for Gaussian noise; for counts, the quadratic approximation of ``nll``
        around z = y.
        """

    def check(self, y: Y) -> None:  # noqa: B027
        """Refuse, with a ValueError that says why, what it cannot have given."""


@final
@dataclass(frozen=True)
class GaussianNoise(Noise):
    """y = z + σn with n ~ N(0, I); σ is in the measurements' unit.

    For complex measurements σ is that of the real and of the imaginary part, each.
    """

    sigma: float

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(
                f"sigma must be > 0, got {self.sigma}: for noiseless measurements give "
                "a small one, such as a thousandth of the measurements' range"
            )

    def sample(self, z: Y, *, generator: Randomness) -> Y:
        unit = 2**0.5 if z.is_complex() else 1.0  # randn_like halves Var between parts
        return z + self.sigma * unit * randn_like(z, generator)

    def nll(self, y: Y, z: Y) -> PerItem:
        """‖y − z‖² / 2σ²."""
        return (y - z).abs().square().flatten(1).sum(1) / (2 * self.sigma**2)

    def nll_grad(self, y: Y, z: Y) -> Tensor:
        """(z − y) / σ²."""
        return (z - y) / self.sigma**2

    def precision(self, y: Y) -> float:
        return 1 / self.sigma**2


@final
@dataclass(frozen=True)
class PoissonNoise(Noise):
    """y = g·N with N ~ Poisson(z/g): photon counting with gain g, z ≥ 0."""

    gain: float

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise ValueError(f"gain must be > 0, got {self.gain}")

    def sample(self, z: Y, *, generator: Randomness) -> Y:
        return self.gain * poisson(z.clamp_min(0) / self.gain, generator)

    def nll(self, y: Y, z: Y) -> PerItem:
        """Σ (z − y ln z)/g, over z > 0; infinite where z ≤ 0 though y > 0."""
        return ((z - torch.xlogy(y, z.clamp_min(0))) / self.gain).flatten(1).sum(1)

    def nll_grad(self, y: Y, z: Y) -> Tensor:
        """(1 − y/z)/g; where z < g, z = g is put, so that the gradient is bounded."""
        return (1 - y / z.clamp_min(self.gain)) / self.gain

    def precision(self, y: Y) -> Tensor:
        """1/(g y), no count being taken for less than one photon."""
        return 1 / (self.gain * y.clamp_min(self.gain))

    def check(self, y: Y) -> None:
        if (y < 0).any():
            raise ValueError(
                f"Poisson measurements cannot be negative, but the least is "
                f"{float(y.min()):.3g}: subtract no background before"
            )


@final
@dataclass(frozen=True)
class TransmissionNoise(Noise):
    """Low-dose CT: y = −ln(N/I₀) with N ~ Poisson(I₀ exp(−z)), and N = 0 read as 1.

    z is a line integral of attenuation (no unit), y its noisy estimate. By the delta
    method Var(y) ≈ 1/N, so that thick paths are noisy and thin ones are not.

    Args:
        counts: I₀, photons that reach a detector element through air.
        floor: what the model itself is wrong by (finite pixels, scatter, electronics),
            as a standard deviation of y. It keeps rays through air, of which the counts
            alone are nearly certain, from outweighing all others. It is part of what is
            believed, not of what is drawn: ``sample`` leaves it out.
    """

    counts: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.counts >= 1:
            raise ValueError(f"counts must be ≥ 1 photon, got {self.counts}")
        if not self.floor >= 0:
            raise ValueError(f"floor must be ≥ 0, got {self.floor}")

    def sample(self, z: Y, *, generator: Randomness) -> Y:
        n = poisson(self.counts * torch.exp(-z), generator)
        return self.post_log(n)

    def post_log(self, n: Y) -> Y:
        """y = −ln(max(N, 1)/I₀)."""
        return -(n.clamp_min(1) / self.counts).log()

    def nll(self, y: Y, z: Y) -> PerItem:
        """Σ I₀e⁻ᶻ + N z with N = I₀e⁻ʸ; with a floor, Σ W (z − y)²/2."""
        n = self.counts * torch.exp(-y)
        if self.floor:
            return (self.precision(y) * (z - y).square() / 2).flatten(1).sum(1)
        return (self.counts * torch.exp(-z) + n * z).flatten(1).sum(1)

    def nll_grad(self, y: Y, z: Y) -> Tensor:
        """N − I₀e⁻ᶻ with N = I₀e⁻ʸ; with a floor, W (z − y)."""
        if self.floor:
            return self.precision(y) * (z - y)
        return self.counts * (torch.exp(-y) - torch.exp(-z))

    def precision(self, y: Y) -> Tensor:
        """W = 1/(1/N + floor²) with N = I₀e⁻ʸ."""
        return 1 / (torch.exp(y) / self.counts + self.floor**2)
