"""What a sampler needs of a prior, whatever network is behind it."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from invsolve.shapes import Sigma, X, per_item

from .info import Info, describe


class Prior(ABC):
    """A diffusion prior as its denoiser D(x; σ) = E[x₀ | x₀ + σn = x], n ~ N(0, I).

    Every prior speaks in the noise level σ of x = x₀ + σn, in the image's own unit.
    A level (a, s) of another convention, x_t = a x₀ + s n, is the level σ = s/a of
    x = x_t / a, so that one method serves variance-preserving, variance-exploding and
    flow-matching samplers alike. Whether the network predicts n, v or x₀ is its
    adapter's affair.

    Attributes:
        sigma_min, sigma_max: the levels between which the denoiser is trusted.
        decisions: what was inferred or assumed when it was loaded, line by line.
        told: what its files say of it, of the facts in `Info`.
    """

    sigma_min: float
    sigma_max: float
    decisions: Sequence[str] = ()
    told: Mapping[str, Any] = MappingProxyType({})

    @property
    def info(self) -> Info:
        """Its family, unit, range, channels, size rule, noise levels and licence."""
        return describe(self)

    @abstractmethod
    def denoise(self, x: X, sigma: Sigma) -> X:
        """D(x; σ), differentiable in x. σ is a scalar or one value for each item."""

    def eps(self, x: X, sigma: Sigma) -> X:
        """The noise in x: (x − D(x; σ)) / σ."""
        return (x - self.denoise(x, sigma)) / per_item(sigma, x)

    def score(self, x: X, sigma: Sigma) -> X:
        """∇ log p_σ(x) = (D(x; σ) − x) / σ², by Tweedie's formula."""
        return (self.denoise(x, sigma) - x) / per_item(sigma, x) ** 2

    @property
    def normalised(self) -> tuple["Prior", "AffineMap"]:
        """The prior of u, and the map x = scale·u + offset from u to the image's unit.

        u is of order one: what step sizes and weights of the published presets assume.
        """
        return self, AffineMap(1.0, 0.0)

    def to(self, device: torch.device) -> "Prior":
        """The same prior with its network or tensors on a device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, nn.Module):
                setattr(moved, name, _module_to(value, device))
            elif isinstance(value, Tensor | Prior):
                setattr(moved, name, value.to(device))
        return moved

    def check(self, shape: tuple[int, ...]) -> None:  # noqa: B027 (any will do)
        """Refuse, with a ValueError that says why, images this prior cannot take.

        Args:
            shape: an image's shape without its batch, (channels, *space).
        """


def _module_to(module: nn.Module, device: torch.device) -> nn.Module:
    # A module's own `to` moves the module itself, which others may hold.
    parts = (*module.parameters(), *module.buffers())
    if all(part.device == device for part in parts):
        return module
    return copy.deepcopy(module).to(device)


@final
@dataclass(frozen=True)
class AffineMap:
    """x = scale·u + offset: from the prior's range to the image's unit.

    >>> import torch
    >>> AffineMap(0.5, 0.5)(torch.tensor([-1.0, 1.0]))
    tensor([0., 1.])
    """

    scale: float
    offset: float

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"an affine map's scale must be > 0, got {self.scale}")

    def __call__(self, u: Tensor) -> Tensor:
        return self.scale * u + self.offset

    def inverse(self, x: Tensor) -> Tensor:
        """u = (x − offset) / scale."""
        return (x - self.offset) / self.scale


@final
class Affine(Prior):
    """The prior of x = scale·u + offset, given the prior of u.

    D_x(x; σ) = scale · D_u((x − offset)/scale; σ/scale) + offset.

    Args:
        inner: the prior of u.
        map: from u to x.
    """

    def __init__(self, inner: Prior, map: AffineMap) -> None:
        self.inner, self.map = inner, map
        self.sigma_min = inner.sigma_min * map.scale
        self.sigma_max = inner.sigma_max * map.scale

    def denoise(self, x: X, sigma: Sigma) -> X:
        u = self.inner.denoise(self.map.inverse(x), sigma / self.map.scale)
        return self.map(u)

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        inner, map = self.inner.normalised
        scale = self.map.scale
        return inner, AffineMap(scale * map.scale, scale * map.offset + self.map.offset)

    def check(self, shape: tuple[int, ...]) -> None:
        self.inner.check(shape)
