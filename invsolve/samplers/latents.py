"""What the samplers in latents share: the way to images and back, and the misfit there.

A prior of images is its own latents: encoder and decoder are then the identity, so that
each of these samplers works in pixels too. The other samplers know nothing of latents,
and need not: `in_latents` shows them a problem whose images are the latents.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from ..linalg import dot
from ..operators import Operator
from ..priors import Affine, Prior
from ..priors.latent import LatentPrior
from ..priors.schedules import ddpm_sigmas
from ..problem import InverseProblem
from ..shapes import PerItem, X, Y, per_item

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


@final
@dataclass(frozen=True, eq=False)
class Decoded(Operator):
    """A(Dec(z) + r): what is measured of latents, nonlinear even if A is linear.

    Attributes:
        operator: A.
        images: Dec, and Enc where one is asked for.
        lost: r, one for each item, or none.
    """

    not_linear = "of latents, through a decoder, none is"

    operator: Operator
    images: Codec
    lost: Tensor | None = None

    def decode(self, z: Tensor) -> X:
        """Dec(z) + r."""
        x = self.images.decode(z)
        return x if self.lost is None else x + self.lost

    def apply(self, x: X) -> Y:
        return self.operator.apply(self.decode(x))

    def vjp(self, x: X, v: Y) -> X:
        return self.pullback(x)[1](v)

    def pullback(self, x: X) -> tuple[Y, Callable[[Y], X]]:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            image = self.decode(z)
        y, pull = self.operator.pullback(image.detach())

        def pull_latents(v: Y) -> X:
            (grad,) = torch.autograd.grad(image, z, pull(v), retain_graph=True)
            return grad

        return y, pull_latents

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.operator.measurement_shape

    def image_like(self, y: Y) -> X:
        return self.images.latent_like(self.operator.image_like(y))

    def guess(self, y: Y) -> X:
        """The code of A's own guess."""
        with torch.no_grad():
            return self.images.encode(self.operator.guess(y))


def in_latents(sampler: Callable[..., X]) -> Callable[..., X]:
    """A sampler of images as one of latents: of z given y = A(Dec(z) + r) + noise.

    For samplers that take nonlinear operators; `invsolve.solve` does so by itself where a
    prior is of latents. An image to begin with, x, is encoded, and what the autoencoder
    loses of it is kept, r = x − Dec(Enc(x)): the descent begins at x itself and changes
    of it what latents can say, so that an image which was nearly right is not blurred to
    the autoencoder's best. Its noise would be kept, too. Without one r is 0. The images
    are Dec(z) + r.
    """

    @functools.wraps(sampler)
    def decoded(problem: InverseProblem, prior: Prior, **options: Any) -> X:
        images, lost = codec(prior), None
        if isinstance(init := options.get("init"), Tensor):
            with torch.no_grad():
                options["init"] = images.encode(init)
                lost = init - images.decode(options["init"])
        # Later they could not be told: of a nonlinear operator nothing is hidden.
        seen = problem.without_hidden(problem.image_like())
        A = Decoded(seen.operator, images, lost)
        z = sampler(InverseProblem(seen.y, A, seen.noise), prior, **options)
        with torch.no_grad():
            return A.decode(z)

    return decoded


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
    y, pull = problem.operator.pullback(x)
    residual = y - problem.y
    norm = dot(residual, residual).sqrt()
    if loss == "squared":
        return pull(2 * residual), norm
    return pull(residual / per_item(floor(norm), residual)), norm


def floor(norm: PerItem) -> PerItem:
    """The norm, or the smallest number in its place: what can be divided by."""
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)


def vp_step(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """What a step length for the variance-preserving state is worth here.

    It goes along the gradient with respect to √ᾱ z and moves √ᾱ′ z′.
    """
    return ((1 + sigma**2) * (1 + sigma_next**2)).sqrt()
