"""Reconstruction without a learned prior: what a sampler has to beat."""

import torch
from torch import Tensor

from ..linalg import dot
from ..operators import LinearOperator
from ..operators.ct import ParallelBeam, Window
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import X, per_item
from .core import Progress, gives, image_like


@gives("point_estimate")
@torch.no_grad()
def fbp(
    problem: InverseProblem,
    prior: Prior | None = None,
    *,
    window: Window = "hann",
    generator: Randomness | None = None,
    progress: Progress = iter,
) -> X:
    """Filtered back-projection; see `ParallelBeam.fbp`.

    Args:
        problem: of a `ParallelBeam`, whose views cover 180° evenly.
        prior, generator, progress: not used; here so that `solve` takes it.
        window: on the ramp filter.
    """
    A, scale = _parallel_beam(problem.linear)
    return A.fbp(problem.y, window=window) / scale


def _parallel_beam(A: LinearOperator) -> tuple[ParallelBeam, float]:
    scale = 1.0
    while not isinstance(A, ParallelBeam):
        inner = getattr(A, "inner", None)
        if inner is None or hasattr(A, "outer"):
            raise ValueError(
                f"fbp needs a ParallelBeam, not {type(A).__name__}: use tv, or a prior"
            )
        scale, A = scale * getattr(A, "factor", 1.0), inner
    return A, scale


@gives("point_estimate")
@torch.no_grad()
def tv(
    problem: InverseProblem,
    prior: Prior | None = None,
    *,
    lam: float = 1.0,
    steps: int = 300,
    nonnegative: bool = False,
    generator: Randomness | None = None,
    progress: Progress = iter,
) -> X:
    """argmin ½‖Ax − y‖²_W + λ Σ ‖∇x‖₂, isotropic total variation.

    By the primal–dual method of Chambolle & Pock (2011, Algorithm 1) on (√W A, ∇), each
    scaled to norm one.

    Args:
        problem: linear; W is the noise's precision.
        prior, generator: not used; here so that `solve` takes it.
        lam: λ, in the inverse of the images' unit.
        steps: of the primal–dual method.
        nonnegative: ask for x ≥ 0.
        progress: wraps the loop, as ``tqdm`` does.
    """
    x = image_like(problem)
    A, y = problem.whitened()
    # Scaling both to norm one keeps one step size right for both duals.
    a, g = 1 / _norms(A, x), 1 / 8**0.5
    tau = sigma = 0.99 / 2**0.5
    x_bar, p, q = x, torch.zeros_like(y), torch.zeros_like(_gradient(x))
    a_y = per_item(a, y)
    a_x = per_item(a, x)
    for _ in progress(range(steps)):
        p = (p + sigma * a_y * (A.apply(x_bar) - y)) / (1 + sigma * a_y**2)
        q = q + sigma * g * _gradient(x_bar)
        q = q / (_length(q) / (lam / g)).clamp_min(1)
        x_old = x
        x = x - tau * (a_x * A.adjoint(p) + g * _divergence(q))
        if nonnegative:
            x = x.clamp_min(0)
        x_bar = 2 * x - x_old
    return x


def _norms(A: LinearOperator, like: X, steps: int = 30) -> Tensor:
    """‖A‖ of each item (its weights are its own), 5 % up, for power iteration is low."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape[1:], generator=generator).to(like).expand_as(like)
    for _ in range(steps):
        x = A.normal(x / per_item(dot(x, x).sqrt(), x))
    return 1.05 * dot(x, x).sqrt().sqrt()


def _gradient(x: X) -> Tensor:
    """Forward differences along the last two axes, zero past the border: (2, …)."""
    d = x.new_zeros(x.shape[0], 2, *x.shape[1:])
    d[:, 0, ..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    d[:, 1, ..., :, :-1] = x[..., :, 1:] - x[..., :, :-1]
    return d


def _divergence(q: Tensor) -> X:
    """The gradient's adjoint (minus the divergence)."""
    x = torch.zeros_like(q[:, 0])
    x[..., 1:, :] += q[:, 0, ..., :-1, :]
    x[..., :-1, :] -= q[:, 0, ..., :-1, :]
    x[..., :, 1:] += q[:, 1, ..., :, :-1]
    x[..., :, :-1] -= q[:, 1, ..., :, :-1]
    return x


def _length(q: Tensor) -> Tensor:
    return q.square().sum(1, keepdim=True).sqrt()
