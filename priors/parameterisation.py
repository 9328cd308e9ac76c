"""From what a network predicts to the denoiser D(x; σ).

A network trained on x_t = a_t x₀ + s_t n serves any convention: x of level σ is seen by
it as x_t = a_t x at the step t where s_t / a_t = σ. (Kingma et al. 2021, §3.1; Karras et
al. 2022, Table 1.)
"""

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from invsolve.shapes import Sigma, X, per_item

from .base import Prior

Network = Callable[[Tensor, Tensor], Tensor]
SigmaData = float | tuple[float, ...]
"""σ_d, the data's standard deviation, or that of each channel."""


Predicts = Literal["edm", "eps", "x0", "flow"]
"""What a network of continuous levels predicts, see `preconditioning`."""


def preconditioning(
    predicts: Predicts, sigma: Tensor, sigma_data: float | Tensor
) -> tuple[Tensor | float, Tensor | float, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of D = c_skip x + c_out F(c_in x, c_noise).

    With σ_d the data's standard deviation, or that of `each_channel`:

    - ``edm``: σ_d²/(σ² + σ_d²), σσ_d/√(σ² + σ_d²), 1/√(σ² + σ_d²), ¼ ln σ (Karras et
      al. 2022, Table 1): F is a mixture of noise and image, of unit variance;
    - ``eps``: 1, −σ and the same c_in and c_noise: F = n̂;
    - ``x0``: 0, 1 and the same: F = x̂₀;
    - ``flow``: F = n̂ − x̂₀ at x_t = (1 − t)x₀ + t n, t = σ/(1 + σ), which it is told
      (Liu et al. 2023): 1 − t, −t, 1 − t, t.
    """
    if predicts == "flow":
        t = sigma / (1 + sigma)
        return 1 - t, -t, 1 - t, t
    total = (sigma**2 + sigma_data**2) ** 0.5
    if predicts == "eps":
        return 1.0, -sigma, 1 / total, sigma.log() / 4
    if predicts == "x0":
        return 0.0, 1.0, 1 / total, sigma.log() / 4
    if predicts == "edm":
        skip, out = (sigma_data / total) ** 2, sigma * sigma_data / total
        return skip, out, 1 / total, sigma.log() / 4
    raise ValueError(f"predicts must be edm, eps, x0 or flow, got {predicts!r}")


def each_channel(sigma_data: SigmaData, like: X) -> float | Tensor:
    """σ_d, shaped to broadcast against images if it is each channel's own.

    Channels that vary little, such as the labels beside an image, then weigh as much as
    the others in the loss, whose weight is 1/c_out².
    """
    if not isinstance(sigma_data, tuple):
        return sigma_data
    return like.new_tensor(sigma_data).reshape(-1, *(1,) * (like.ndim - 2))


@final
class EDMPrior(Prior):
    """D(x; σ) = c_skip x + c_out F(c_in x, c_noise), Karras et al. 2022, eq. 7.

    Args:
        net: F: (c_in x, c_noise) ↦ image, with c_noise one number for each item.
        sigma_data: σ_d, the data's standard deviation, or that of each channel.
        sigma_min, sigma_max: the levels it was trained on.
        predicts: what F is, by which the coefficients are chosen: `preconditioning`.
        multiple_of: what an image's height and width must be divisible by.
        channels: how many channels an image has; None if any number will do.
    """

    def __init__(
        self,
        net: Network,
        sigma_data: SigmaData = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        *,
        predicts: Predicts = "edm",
        multiple_of: int = 1,
        channels: int | None = None,
    ) -> None:
        preconditioning(predicts, torch.ones(()), 1.0)  # refuses what is unknown
        if isinstance(sigma_data, tuple) and channels not in (None, len(sigma_data)):
            raise ValueError(
                f"sigma_data is one number, or one for each of {channels} channels, got "
                f"{len(sigma_data)}"
            )
        self.net, self.sigma_data, self.predicts = net, sigma_data, predicts
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.multiple_of, self.channels = multiple_of, channels

    def denoise(self, x: X, sigma: Sigma) -> X:
        skip, out, into, noise = preconditioning(
            self.predicts, per_item(sigma, x), each_channel(self.sigma_data, x)
        )
        return skip * x + out * self.net(into * x, noise.flatten().expand(len(x)))

    def check(self, shape: tuple[int, ...]) -> None:
        check_image(shape, self.channels, self.multiple_of)


@final
class DiscretePrior(Prior):
    """A network trained on T discrete steps of x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) n.

    With σ_t = √(1/ᾱ_t − 1) and x = x_t/√ᾱ_t:

    - ``eps``: D = x − σ n̂
    - ``v`` = √ᾱ n − √(1 − ᾱ) x₀: D = √ᾱ x_t − √(1 − ᾱ) v̂
    - ``x0``: D = x̂₀

    Between two steps t is interpolated in ln σ; outside them it is the nearest.
    For zero-terminal-SNR schedules give only the steps with ᾱ > 0.

    Args:
        net: (x_t, t) ↦ prediction, with t one number for each item.
        alphas_cumprod: ᾱ_t for t = 0 … T−1, falling, as the network was trained with.
        predicts: what the network's output is.
        multiple_of, channels: as for `EDMPrior`.
    """

    def __init__(
        self,
        net: Network,
        alphas_cumprod: Float[Tensor, " T"],
        predicts: Literal["eps", "v", "x0"],
        *,
        multiple_of: int = 1,
        channels: int | None = None,
    ) -> None:
        abar = alphas_cumprod.double()
        if not ((abar > 0) & (abar < 1)).all() or (abar.diff() >= 0).any():
            raise ValueError(
                "alphas_cumprod must fall strictly and lie between 0 and 1 (a schedule "
                "with zero terminal SNR: leave out its last step)"
            )
        if predicts not in ("eps", "v", "x0"):
            raise ValueError(f"predicts must be 'eps', 'v' or 'x0', got {predicts!r}")
        self.net, self.predicts = net, predicts
        self.log_sigmas = (1 / abar - 1).sqrt().log()
        self.sigma_min = float(self.log_sigmas[0].exp())
        self.sigma_max = float(self.log_sigmas[-1].exp())
        self.multiple_of, self.channels = multiple_of, channels

    def step(self, sigma: Tensor) -> Tensor:
        """The (real-valued) step t whose level is σ."""
        table = self.log_sigmas.to(sigma.device)
        log_sigma = sigma.double().log().clamp(table[0], table[-1])
        hi = torch.searchsorted(table, log_sigma).clamp(1, len(table) - 1)
        frac = (log_sigma - table[hi - 1]) / (table[hi] - table[hi - 1])
        return (hi - 1 + frac).to(sigma.dtype)

    def denoise(self, x: X, sigma: Sigma) -> X:
        s = per_item(sigma, x)
        a = 1 / (1 + s**2) ** 0.5  # √ᾱ, so that √(1 − ᾱ) = a σ
        x_t = a * x
        out = self.net(x_t, self.step(sigma).expand(len(x)))
        out = out[:, : x.shape[1]]  # a learned variance comes in further channels
        match self.predicts:
            case "eps":
                return x - s * out
            case "v":
                return a * x_t - a * s * out
            case "x0":
                return out

    def check(self, shape: tuple[int, ...]) -> None:
        check_image(shape, self.channels, self.multiple_of)


@final
class FlowPrior(Prior):
    """A rectified flow u = n − x₀ on x_t = (1 − t) x₀ + t n, t in [0, 1].

    σ = t/(1 − t) and x = x_t/(1 − t), so that D = x_t − t û.

    Args:
        net: (x_t, t) ↦ û, with t one number for each item (1 is pure noise).
        sigma_min, sigma_max: the levels between which it is trusted.
        multiple_of, channels: as for `EDMPrior`.
    """

    def __init__(
        self,
        net: Network,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        *,
        multiple_of: int = 1,
        channels: int | None = None,
    ) -> None:
        self.net, self.sigma_min, self.sigma_max = net, sigma_min, sigma_max
        self.multiple_of, self.channels = multiple_of, channels

    def denoise(self, x: X, sigma: Sigma) -> X:
        t = sigma / (1 + sigma)
        x_t = x / (1 + per_item(sigma, x))
        return x_t - per_item(t, x) * self.net(x_t, t.expand(len(x)))

    def check(self, shape: tuple[int, ...]) -> None:
        check_image(shape, self.channels, self.multiple_of)


def check_image(shape: tuple[int, ...], channels: int | None, multiple: int) -> None:
    """Refuse an image of the wrong channels, or whose size the network cannot halve."""
    if channels is not None and shape[0] != channels:
        raise ValueError(
            f"the prior's images have {channels} channel(s), but this problem's have "
            f"{shape[0]}: use another prior, or one channel at a time"
        )
    if any(n % multiple for n in shape[1:]):
        size = "×".join(map(str, shape[1:]))
        raise ValueError(
            f"the prior needs image sizes divisible by {multiple}, got {size}: pad "
            "the image, or build the operator for a padded shape"
        )
