"""Noise models: p(y | z) for z = A(x). The operator is deterministic; noise is not."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.special import i0e, i1e

from invsolve.random import Randomness, poisson, randn_like
from invsolve.shapes import PerItem, Y

Same = TypeVar("Same", bound="Noise")


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
        around z = y. It is what samplers with proximal steps know of the noise.
        """

    def check(self, y: Y) -> None:  # noqa: B027
        """Refuse, with a ValueError that says why, what it cannot have given."""

    def to(self: Same, device: torch.device) -> Same:
        """The same noise with its tensors on a device."""
        if not is_dataclass(self):
            return self
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if f.init and isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved) if moved else self


@final
@dataclass(frozen=True)
class GaussianNoise(Noise):
    """y = z + σn with n ~ N(0, I); σ is in the measurements' unit.

    For complex measurements, such as k-space, σ is that of the real and of the
    imaginary part, each.

    Args:
        sigma: σ, one for all; or a tensor that broadcasts against one item's
            measurements: (channels, 1, 1) for one a channel, or one for every
            measurement. Every item has the same.

    Raises:
        ValueError: a σ is not positive, or there is one for other measurements.
    """

    sigma: float | Float[Tensor, "..."]

    def __post_init__(self) -> None:
        sigma = torch.as_tensor(self.sigma)
        if not (sigma > 0).all():
            least = float(sigma.min()) if sigma.numel() else math.nan
            raise ValueError(
                f"sigma must be > 0, got {least}: for noiseless measurements give "
                "a small one, such as a thousandth of the measurements' range"
            )
        if not sigma.isfinite().all():
            raise ValueError(
                "sigma must be finite: drop measurements that say nothing by a Mask"
            )
        if isinstance(self.sigma, Tensor) and self.sigma.numel() == 1:
            object.__setattr__(self, "sigma", float(self.sigma))

    def sample(self, z: Y, *, generator: Randomness) -> Y:
        unit = 2**0.5 if z.is_complex() else 1.0  # randn_like halves Var between parts
        return z + self._sigma(z) * unit * randn_like(z, generator)

    def nll(self, y: Y, z: Y) -> PerItem:
        """‖(y − z)/σ‖² / 2."""
        return ((y - z) / self._sigma(y)).abs().square().flatten(1).sum(1) / 2

    def nll_grad(self, y: Y, z: Y) -> Tensor:
        """(z − y) / σ²."""
        return (z - y) / self._sigma(y) ** 2

    def precision(self, y: Y) -> float | Tensor:
        return 1 / self._sigma(y) ** 2

    def check(self, y: Y) -> None:
        if not isinstance(self.sigma, Tensor):
            return
        given, item = tuple(self.sigma.shape), tuple(y.shape[1:])
        sizes = zip(reversed(given), reversed(item), strict=False)
        if len(given) > len(item) or any(s not in (1, n) for s, n in sizes):
            raise ValueError(
                f"sigma of shape {given} does not broadcast against one item's "
                f"measurements, {item}: one a channel is (channels, 1, 1)"
            )

    def _sigma(self, like: Tensor) -> float | Tensor:
        if isinstance(self.sigma, Tensor):
            return self.sigma.to(like.real.dtype)
        return self.sigma


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
    """Low-dose CT: y = −ln(N/I₀) with N ~ Poisson(I₀ exp(−z)) + N(0, σ_e²).

    z is a line integral of attenuation (no unit), y its noisy estimate. N < 1 is read
    as 1. By the delta method Var(y) ≈ 1/N + σ_e²/N², so that thick paths are noisy and
    thin ones are not.

    With counts alone ``nll`` is Poisson's, exactly but for N < 1. With electronic noise
    or a floor it is penalised weighted least squares: the quadratic approximation
    around z = y. Its weights come from y itself and so believe the brighter of two
    draws: the least is at a z too low, by (a − ½) Var(y) with a between 1 (counts
    alone) and 2 (electronic noise alone). Where N comes near σ_e or to a few photons
    (photon starvation) it does not hold.

    Args:
        counts: I₀, photons that reach a detector element through air.
        floor: what the model itself is wrong by (finite pixels, scatter), as a standard
            deviation of y. It keeps rays through air, of which the counts alone are
            nearly certain, from outweighing all others. It is part of what is believed,
            not of what is drawn: ``sample`` leaves it out.
        electronic: σ_e, the detector's own noise, in photons.
    """

    counts: float
    floor: float = 0.0
    electronic: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.counts < math.inf:
            raise ValueError(f"counts must be ≥ 1 photon, got {self.counts}")
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"floor must be ≥ 0, got {self.floor}")
        if not 0 <= self.electronic < math.inf:
            raise ValueError(f"electronic must be ≥ 0 photons, got {self.electronic}")

    def sample(self, z: Y, *, generator: Randomness) -> Y:
        n = poisson(self.counts * torch.exp(-z), generator)
        if self.electronic:
            n = n + self.electronic * randn_like(n, generator)
        return self.post_log(n)

    def post_log(self, n: Y) -> Y:
        """y = −ln(max(N, 1)/I₀)."""
        return -(n.clamp_min(1) / self.counts).log()

    def nll(self, y: Y, z: Y) -> PerItem:
        """Σ I₀e⁻ᶻ + N z with N = I₀e⁻ʸ, for counts alone; else Σ W (z − y)²/2."""
        if self._quadratic:
            return (self.precision(y) * (z - y).square() / 2).flatten(1).sum(1)
        n = self.counts * torch.exp(-y)
        return (self.counts * torch.exp(-z) + n * z).flatten(1).sum(1)

    def nll_grad(self, y: Y, z: Y) -> Tensor:
        """N − I₀e⁻ᶻ with N = I₀e⁻ʸ, for counts alone; else W (z − y)."""
        if self._quadratic:
            return self.precision(y) * (z - y)
        return self.counts * (torch.exp(-y) - torch.exp(-z))

    def precision(self, y: Y) -> Tensor:
        """W = 1/((N + σ_e²)/N² + floor²) with N = I₀e⁻ʸ."""
        per_photon = torch.exp(y) / self.counts
        electronic = self.electronic**2 * per_photon**2
        return 1 / (per_photon + electronic + self.floor**2)

    @property
    def _quadratic(self) -> bool:
        return self.floor > 0 or self.electronic > 0


@final
@dataclass(frozen=True)
class RicianNoise(Noise):
    """y = |z + σ(n₁ + i n₂)| with n₁, n₂ ~ N(0, 1) and z ≥ 0: MRI magnitudes.

    p(y | z) = y/σ² exp(−(y² + z²)/2σ²) I₀(yz/σ²). Where z comes out negative the density
    is continued evenly: the magnitude cannot tell.

    Its Gaussian approximation, y ≈ z + σn, is what ``precision`` stands for. It holds
    for SNR z/σ > 3: there y is too large by σ²/2z in the mean (to a few per cent of
    that), and its variance at least 0.93 σ². Below, dark regions come out too bright,
    at z = 0 by 1.25 σ: use a method that asks for ``nll_grad``.

    Args:
        sigma: σ, of the real and of the imaginary part, each, in the measurements'
            unit.
    """

    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be > 0, got {self.sigma}")

    def sample(self, z: Y, *, generator: Randomness) -> Y:
        n = randn_like(z.to(z.dtype.to_complex()), generator)
        return (z + self.sigma * 2**0.5 * n).abs()

    def nll(self, y: Y, z: Y) -> PerItem:
        """Σ z²/2σ² − ln I₀(yz/σ²) + y²/2σ²; the last term is for the sake of rounding."""
        t = y * z / self.sigma**2
        return (
            (((z.abs() - y) / self.sigma).square() / 2 - i0e(t).log()).flatten(1).sum(1)
        )

    def nll_grad(self, y: Y, z: Y) -> Tensor:
        """(z − y I₁(t)/I₀(t))/σ² with t = yz/σ²."""
        t = y * z / self.sigma**2
        return (z - y * i1e(t) / i0e(t)) / self.sigma**2

    def precision(self, y: Y) -> float:
        return 1 / self.sigma**2

    def check(self, y: Y) -> None:
        if y.is_complex():
            raise ValueError(
                "Rician measurements are magnitudes, got complex numbers: these have "
                "GaussianNoise"
            )
        if (y < 0).any():
            raise ValueError(
                f"magnitudes cannot be negative, but the least is {float(y.min()):.3g}"
            )
