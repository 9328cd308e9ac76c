"""Denoisers that are at hand as functions: deepinv's, and any other."""

from collections.abc import Callable
from typing import Any, Literal, final

from torch import Tensor, nn

from invsolve.shapes import Sigma, X, per_item

from ..base import Prior
from ..info import tell
from ..parameterisation import check_image

PREDICTS = ("x0", "eps", "score")

# The noise levels of deepinv's denoisers, on images in [0, 1].
LEVELS = {"DRUNet": (1 / 255, 50 / 255), "DiffUNet": (0.005, 78.0)}
DEFAULT_LEVELS = (0.002, 40.0)  # EDM's, at half the contrast


@final
class CallablePrior(Prior):
    """D(x; σ) of a function f(x, σ), told the noise's standard deviation in x's own unit.

    - ``x0``: D = f
    - ``eps``: D = x − σ f
    - ``score``: D = x + σ² f

    Args:
        net: f: (x, σ) ↦ prediction, with σ one number for each item.
        sigma_min, sigma_max: the levels between which it is trusted; beyond them it is
            asked at the nearest.
        predicts: what f gives.
        channels: how many channels an image has; None if any number will do.
        multiple_of: what an image's sizes must be divisible by.
    """

    def __init__(
        self,
        net: Callable[[Tensor, Tensor], Tensor],
        sigma_min: float,
        sigma_max: float,
        predicts: Literal["x0", "eps", "score"] = "x0",
        *,
        channels: int | None = None,
        multiple_of: int = 1,
    ) -> None:
        if predicts not in PREDICTS:
            raise ValueError(f"predicts must be one of {PREDICTS}, got {predicts!r}")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"noise levels must rise from above 0, got {sigma_min:g} to {sigma_max:g}"
            )
        self.net, self.predicts = net, predicts
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.channels, self.multiple_of = channels, multiple_of

    def denoise(self, x: X, sigma: Sigma) -> X:
        out = self.net(x, sigma.clamp(self.sigma_min, self.sigma_max).expand(len(x)))
        match self.predicts:
            case "x0":
                return out
            case "eps":
                return x - per_item(sigma, x) * out
            case _:
                return x + per_item(sigma, x) ** 2 * out

    def check(self, shape: tuple[int, ...]) -> None:
        check_image(shape, self.channels, self.multiple_of)


def from_callable(
    f: Callable[[Tensor, Tensor], Tensor],
    sigma_min: float,
    sigma_max: float,
    *,
    predicts: Literal["x0", "eps", "score"] = "x0",
    channels: int | None = None,
    multiple_of: int = 1,
    unit: str = "",
    licence: str = "",
) -> Prior:
    """A prior around any function f(x, σ) of images x = x₀ + σn in their own unit.

    A network that is told a step or a time has an adapter of its own: `DiscretePrior`,
    `EDMPrior`, `FlowPrior`. Images in another unit: wrap the prior in `Affine`.

    Args:
        f: (x, σ) ↦ its prediction, with σ of shape (batch,).
        sigma_min, sigma_max: the levels between which it is trusted.
        predicts: "x0" (a denoiser), "eps" (the noise, of variance 1) or "score".
        channels, multiple_of: as for `EDMPrior`.
        unit, licence: for its `Info`.

    Raises:
        ValueError: the levels do not rise from above 0, or ``predicts`` is unknown.
    """
    prior = CallablePrior(
        f, sigma_min, sigma_max, predicts, channels=channels, multiple_of=multiple_of
    )
    tell(prior, family="callable", unit=unit, licence=licence)
    return prior


def from_deepinv(
    denoiser: Any,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    *,
    channels: int | None = None,
    licence: str = "",
) -> Prior:
    """The prior of a deepinv denoiser (DRUNet, DiffUNet, NCSNpp …) on images in [0, 1].

    ``denoiser(x, sigma)`` takes the noise's standard deviation in that unit, one for each
    item, and gives E[x₀ | x]. The weights are used as they are.

    Args:
        denoiser: a `deepinv.models.Denoiser`, or what is called like one.
        sigma_min, sigma_max: the levels it was trained on. Unless given, 1/255 … 50/255
            for DRUNet, the DDPM's for DiffUNet, and EDM's for the others.
        channels: how many channels an image has; None if any number will do.
        licence: of its weights.

    Raises:
        ValueError: it cannot be called, or the levels do not rise from above 0.
    """
    if not callable(denoiser):
        raise ValueError(
            f"a deepinv denoiser is called as denoiser(x, sigma), and a "
            f"{type(denoiser).__name__} cannot be"
        )
    net: Any = denoiser.eval() if isinstance(denoiser, nn.Module) else denoiser
    kind = type(denoiser).__name__
    low, high = LEVELS.get(kind, DEFAULT_LEVELS)
    whence = "given" if sigma_min is not None and sigma_max is not None else "assumed"
    low = low if sigma_min is None else sigma_min
    high = high if sigma_max is None else sigma_max
    prior = CallablePrior(net, low, high, channels=channels)
    prior.decisions = [
        f"deepinv's {kind}, on images in [0, 1]",
        f"noise levels {low:.4g} … {high:.4g} ({whence})",
    ]
    tell(prior, family="deepinv", range=(0.0, 1.0), licence=licence)
    return prior
