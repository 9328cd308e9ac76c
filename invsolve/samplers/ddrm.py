"""DDRM: diffusion in the operator's singular basis, each direction by its own noise.

Kawar, Elad, Ermon, Song, "Denoising Diffusion Restoration Models", NeurIPS 2022, eqs. 7
and 8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor

from ..counting import CountedLinear
from ..operators import LinearOperator, Scaled
from ..operators.bridge.deepinv import SMALLEST, svd
from ..operators.resample import Separable
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import X
from .core import Progress, gives, image_like, levels, start, transitions

DENSE = 4096
"""Images of at most so many numbers have their operator's matrix decomposed."""


@gives("posterior_sample")
@torch.no_grad()
def ddrm(
    problem: InverseProblem,
    prior: Prior,
    *,
    steps: int = 20,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] | None = None,
    eta: float = 0.85,
    eta_b: float = 1.0,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """x ← V x̄, each x̄ by its singular value s of A = U S Vᴴ, with τ = σ_y/s.

        s = 0:   x̄ = D̄ + √(1−η²) σ′ (x̄ − D̄)/σ + ησ′ n
        σ′ < τ:  x̄ = D̄ + √(1−η²) σ′ (ȳ − D̄)/τ + ησ′ n
        σ′ ≥ τ:  x̄ = (1 − η_b) D̄ + η_b ȳ + √(σ′² − η_b²τ²) n

    where D̄ = Vᴴ D(x; σ) and ȳ = S⁺Uᴴy. What is measured well follows y until σ′ falls
    below its noise, so that with η_b = 1 it fits the data closer than their noise and
    its spread is too small; in the null space the covariance tends to (1 + √(1−η²))/2
    of what it should be, as with `dds`. It starts from noise alone, the paper from noise
    about ȳ: the first step forgets which.

    The basis is known for masks, circular blurs, block means, matrices along rows and
    columns (`Separable`), and each of them after a unitary operator such as `Fourier`
    (single-coil MRI); that of any other operator is computed from its matrix for images
    of at most 4096 numbers.

    Args:
        problem: linear with such a basis, and `GaussianNoise` of one σ.
        prior: the denoiser.
        steps: how many, spaced as Karras et al. between the prior's levels.
        sigmas: the noise levels instead, highest first.
        sigma_range: the lowest and the highest, where they are not the prior's.
        eta: η, the fraction of the noise's amplitude that is fresh. It is not DDIM's η.
        eta_b: η_b, how far a measured direction follows y.
        generator: where every random number comes from.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        One draw for each item of y.

    Raises:
        ValueError: no such basis, complex images, or noise that is not of one σ.
    """
    like = image_like(problem)
    if like.is_complex():
        raise ValueError("ddrm takes real images: write A @ ComplexChannels()")
    precision = torch.as_tensor(problem.noise.precision(problem.y))
    if precision.numel() > 1:
        raise ValueError(
            "ddrm needs noise of one standard deviation, GaussianNoise with a number "
            "for sigma: use dds or diffpir"
        )
    V = basis(problem.linear, like)
    s = V.values.to(like.real)
    seen = s > SMALLEST * s.max()
    safe = torch.where(seen, s, 1)
    tau = float(precision) ** -0.5 / safe
    y_bar = torch.where(seen, V.to(problem.linear.adjoint(problem.y)) / safe**2, 0)
    kept = (1 - eta**2) ** 0.5
    sigmas = levels(prior, like, steps, sigmas, sigma_range)
    x = start(like, sigmas[0], generator)
    for sigma, sigma_next in progress(transitions(sigmas)):
        x_bar, D = V.to(x), V.to(prior.denoise(x, sigma))
        clear = seen & (sigma_next >= tau)
        pull = torch.where(clear, eta_b, kept * sigma_next / tau) * (y_bar - D)
        drift = torch.where(seen, pull, kept * sigma_next / sigma * (x_bar - D))
        room = (sigma_next**2 - (eta_b * tau) ** 2).clamp_min(0).sqrt()
        spread = torch.where(clear, room, eta * sigma_next)
        x = V.back(D + drift + spread * V.to(randn_like(x, generator)))
    return x


@final
@dataclass(frozen=True, eq=False)
class Basis:
    """V of A = U S Vᴴ, complete: it does not drop what A does not see.

    Attributes:
        values: S, which broadcasts against coordinates.
        to: x ↦ Vᴴx, of a batch of images.
        back: the inverse.
    """

    values: Tensor
    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def basis(A: LinearOperator, like: X) -> Basis:
    """The right singular basis of A, or a ValueError where none is at hand."""
    A = _uncounted(A)
    if known := svd(A, tuple(like.shape[1:])):
        s = known.s.to(like.device)
        return Basis(s, known.V_adjoint, known.V)
    if isinstance(A, Scaled):
        inner = basis(A.inner, like)
        return Basis(abs(A.factor) * inner.values, inner.to, inner.back)
    if isinstance(A, Separable):
        (s, R), (t, C) = (_right(m.to(like)) for m in (A.rows, A.columns))
        return Basis(torch.outer(s, t), lambda x: R.mT @ x @ C, lambda c: R @ c @ C.mT)
    shape = like.shape[1:]
    d = prod(shape)
    if d > DENSE:
        raise ValueError(
            f"ddrm needs the singular vectors of {type(A).__name__}, which are known "
            "for masks, circular blurs, block means and single-coil MRI: use dds or "
            "diffpir"
        )
    unit = torch.eye(d, dtype=like.dtype, device=like.device)
    matrix = A.apply(unit.reshape(d, *shape)).flatten(1).mT
    if matrix.is_complex():
        matrix = torch.cat([matrix.real, matrix.imag])
    s, V = _right(matrix)
    return Basis(
        s, lambda x: x.flatten(1) @ V, lambda c: (c @ V.mT).reshape(-1, *shape)
    )


def _right(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The singular values of a matrix, one for each column, and V."""
    wide = matrix.double()
    energy, V = torch.linalg.eigh(wide.mT @ wide)
    return energy.clamp_min(0).sqrt().to(matrix), V.to(matrix)


def _uncounted(A: LinearOperator) -> LinearOperator:
    """Whose basis is asked for, without what counts its uses."""
    if isinstance(A, CountedLinear):
        return _uncounted(A.inner)
    return Scaled(A.factor, _uncounted(A.inner)) if isinstance(A, Scaled) else A
