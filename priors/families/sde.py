"""The networks of the continuous SDEs, as denoisers (Karras et al. 2022, Table 1)."""

import math
from typing import final

from torch import Tensor

from invsolve.shapes import Sigma, X, per_item

from ..base import Prior
from ..parameterisation import Network, check_image


@final
class VEPrior(Prior):
    """D(x; σ) = x + σ F(x, c_noise): a variance-exploding SDE's scaled score F = σ∇ log p.

    Args:
        net: F: (x, c_noise) ↦ image, with c_noise one number for each item.
        sigma_min, sigma_max: the levels it was trained on.
        gain: c_noise = ln(gain·σ).
        steps: of a network that is told a step 0 … steps−1 instead, along which ln σ
            falls evenly from σ_max to σ_min.
        multiple_of, channels: as for `EDMPrior`.
    """

    def __init__(
        self,
        net: Network,
        sigma_min: float,
        sigma_max: float,
        *,
        gain: float = 0.5,
        steps: int | None = None,
        multiple_of: int = 1,
        channels: int | None = None,
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"noise levels must rise from above 0, got {sigma_min:g} to {sigma_max:g}"
            )
        self.net, self.gain, self.steps = net, gain, steps
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.multiple_of, self.channels = multiple_of, channels

    def c_noise(self, sigma: Tensor) -> Tensor:
        """What the network is told of σ."""
        if self.steps is None:
            return (self.gain * sigma).log()
        span = math.log(self.sigma_max / self.sigma_min)
        part = (self.sigma_max / sigma).log() / span
        return (self.steps - 1) * part.clamp(0, 1)

    def denoise(self, x: X, sigma: Sigma) -> X:
        score = self.net(x, self.c_noise(sigma).expand(len(x)))
        return x + per_item(sigma, x) * score

    def check(self, shape: tuple[int, ...]) -> None:
        check_image(shape, self.channels, self.multiple_of)


@final
class VPPrior(Prior):
    """D(x; σ) = x − σ F(x/√(1+σ²), (T−1) t): a variance-preserving SDE's noise F.

    1 + σ² = exp(½ β_d t² + β_min t) for t in [0, 1], β_d = β_max − β_min.

    Args:
        net: F: (x_t, (T−1) t) ↦ noise, the time one number for each item.
        beta_min, beta_max: the rates at which noise is added, at t = 0 and 1.
        t_min: the least t it was trained on.
        steps: T.
        multiple_of, channels: as for `EDMPrior`.
    """

    def __init__(
        self,
        net: Network,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        *,
        t_min: float = 1e-5,
        steps: int = 1000,
        multiple_of: int = 1,
        channels: int | None = None,
    ) -> None:
        if not (0 < beta_min < beta_max and 0 < t_min < 1):
            raise ValueError(
                f"the rates must rise from above 0, got {beta_min:g} to {beta_max:g}, "
                f"and t_min lie between 0 and 1, got {t_min:g}"
            )
        self.net, self.steps = net, steps
        self.beta_min, self.beta_d = beta_min, beta_max - beta_min
        self.sigma_min, self.sigma_max = (
            math.sqrt(math.expm1((self.beta_d * t / 2 + beta_min) * t))
            for t in (t_min, 1.0)
        )
        self.multiple_of, self.channels = multiple_of, channels

    def time(self, sigma: Tensor) -> Tensor:
        """t at which the level is σ: the positive root of ½ β_d t² + β_min t = ln(1+σ²)."""
        growth = (sigma.double() ** 2).log1p()
        root = (self.beta_min**2 + 2 * self.beta_d * growth).sqrt()
        return (2 * growth / (root + self.beta_min)).to(sigma.dtype)

    def denoise(self, x: X, sigma: Sigma) -> X:
        s = per_item(sigma, x)
        t = (self.steps - 1) * self.time(sigma)
        return x - s * self.net(x / (1 + s**2) ** 0.5, t.expand(len(x)))

    def check(self, shape: tuple[int, ...]) -> None:
        check_image(shape, self.channels, self.multiple_of)
