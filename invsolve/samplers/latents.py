"""What the samplers in latents share: the way to images and back, and the misfit there.

A prior of images is its own latents: encoder and decoder are then the identity, so that
each of these samplers works in pixels too.
"""

from typing import Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from ..linalg import dot
from ..priors import Affine, Prior
from ..priors.latent import LatentPrior
from ..priors.schedules import ddpm_sigmas
from ..problem import InverseProblem
from ..shapes import PerItem, X, per_item

Loss = Literal["norm", "squared"]


@runtime_checkable
class Codec(Protocol):
    """Between images and what the diffusion sees."""

    def encode(self, x: X) -> Tensor: ...
    def decode(self, z: X) -> Tensor: ...
    def latent_like(self, x: X) -> Tensor: ...


@final
class Pixels:
    """Images that are their own latents."""

    def encode(self, x: X) -> Tensor:
        return x

    def decode(self, z: X) -> Tensor:
        return z

    def latent_like(self, x: X) -> Tensor:
        return torch.zeros_like(x)


def codec(prior: Prior) -> Codec:
    """The autoencoder of a latent prior, whatever counts or records it; or the identity.

    Raises:
        ValueError: a latent prior lies inside a change of unit.
    """
    inner: Prior | None = prior
    while inner is not None and not isinstance(inner, LatentPrior | Affine):
        inner = vars(inner).get("inner")
    if isinstance(inner, LatentPrior):
        return inner
    if inner is not None and isinstance(codec(inner.inner), LatentPrior):
        raise ValueError(
            "a latent prior in another unit must be given through invsolve.solve, or as "
            "prior.normalised[0]"
        )
    return Pixels()


def ddpm_levels(prior: Prior, like: X, steps: int, sigmas: Tensor | None) -> Tensor:
    """The given levels, or so many evenly spaced in the DDPM's t, in the prior's range."""
    if sigmas is None:
        table = ddpm_sigmas(1000)
        trusted = (table >= prior.sigma_min) & (table <= prior.sigma_max)
        log = table[trusted].log()
        at = torch.linspace(0, len(log) - 1, steps, dtype=log.dtype)
        low = at.long().clamp_max(len(log) - 2)
        sigmas = torch.lerp(log[low], log[low + 1], at - low).exp()
    return sigmas.to(like)


def misfit_pull(
    problem: InverseProblem, x: X, loss: Loss = "norm"
) -> tuple[X, PerItem]:
    """∇_x ‖y − A(x)‖, or of its square, and ‖y − A(x)‖, item by item.

    The gradient of the norm is 0 where the norm is.
    """
    residual = problem.operator.apply(x) - problem.y
    norm = dot(residual, residual).sqrt()
    if loss == "squared":
        return problem.operator.vjp(x, 2 * residual), norm
    unit = residual / per_item(floor(norm), residual)
    return problem.operator.vjp(x, unit), norm


def floor(norm: PerItem) -> PerItem:
    """The norm, or the smallest number in its place: what can be divided by."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def vp_step(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """What a step length for the variance-preserving state is worth here.

    It goes along the gradient with respect to √ᾱ z and moves √ᾱ′ z′.
    """
    return ((1 + sigma**2) * (1 + sigma_next**2)).sqrt()
