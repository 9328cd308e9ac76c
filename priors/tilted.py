"""A prior that leans: towards images of which some number is large, or small."""

from collections.abc import Callable
from typing import final

import torch

from invsolve.shapes import PerItem, Sigma, X, per_item

from .base import AffineMap, Prior

Functional = Callable[[X], PerItem]


@final
class Tilted(Prior):
    """p(x₀) exp(s f(x₀)), normalised: D(x; σ) + s σ² ∇ₓ f(D(x; σ)).

    By Tweedie's formula its denoiser is D + σ² ∇ₓ ln E[exp(s f(x₀)) | x], of which
    s f(D) is the first order: exact for a Gaussian prior and a linear f, as in DPS else.
    It costs one backward pass.

    A posterior under it is tilted by the same factor, so that s and −s bound a quantity
    from above and below, with the data kept: the largest and the smallest plausible
    organ, say, of a prior of images and labels. There f = Σ (label channel)/value counts
    pixels, and s is what one more pixel gains in log-odds. Larger s leave the data:
    look at χ². (Morshuis, Hein and Baumgartner, "Segmentation-guided MRI reconstruction
    for meaningfully diverse reconstructions", 2024, steer by such a gradient.)

    Args:
        inner: p.
        functional: f, of images in their own unit: one number for each.
        strength: s, in the inverse of f's unit.
    """

    def __init__(self, inner: Prior, functional: Functional, strength: float) -> None:
        self.inner, self.functional, self.strength = inner, functional, strength
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        followed = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            at = x if followed else x.detach().requires_grad_()
            denoised = self.inner.denoise(at, sigma)
            f = self.functional(denoised).sum()
            (slope,) = torch.autograd.grad(f, at, create_graph=followed)
        tilted = denoised + self.strength * per_item(sigma, x) ** 2 * slope
        return tilted if followed else tilted.detach()

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        inner, map = self.inner.normalised
        return Tilted(inner, lambda u: self.functional(map(u)), self.strength), map

    def check(self, shape: tuple[int, ...]) -> None:
        self.inner.check(shape)
