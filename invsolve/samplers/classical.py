"""Reconstruction without a learned prior: what a sampler has to beat."""

import torch
from torch import Tensor

from ..linalg import cg
from ..operators import LinearOperator
from ..operators.ct import ParallelBeam, Window
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import X, per_item
from .core import Progress, gives


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
    steps: int = 60,
    cg_steps: int = 10,
    nonnegative: bool = False,
    generator: Randomness | None = None,
    progress: Progress = iter,
) -> X:
    """argmin ½‖Ax − y‖²_W + λ Σ ‖∇x‖₂, isotropic total variation.

    By the alternating direction method of multipliers (Boyd et al. 2011, §6.4.1) on
    z = ∇x: x by conjugate gradients from where it was, z by soft thresholding, and the
    scaled dual u ← u + ∇x − z.

    Args:
        problem: linear; W is the noise's precision.
        prior, generator: not used; here so that `solve` takes it.
        lam: λ, in the inverse of the images' unit.
        steps: of the outer method.
        cg_steps: of the inner one.
        nonnegative: ask for x ≥ 0, by a second splitting.
        progress: wraps the loop, as ``tqdm`` does.
    """
    A, y = problem.whitened()
    b = A.adjoint(y)
    x = cg(A.normal, b, torch.zeros_like(b), max_steps=cg_steps, rtol=0.0)
    # The threshold λ/ρ is a tenth of the image's own spread: neither so small that z
    # hardly moves nor so large that it forgets the edges.
    spread = x.flatten(1).std(1).clamp_min(torch.finfo(x.dtype).tiny)
    rho = per_item(lam / (0.1 * spread), x)
    z, u = _gradient(x), torch.zeros_like(_gradient(x))
    w, v = x, torch.zeros_like(x)

    def normal(t: X) -> X:
        return A.normal(t) + rho * (_divergence(_gradient(t)) + nonnegative * t)

    for _ in progress(range(steps)):
        right = b + rho * (_divergence(z - u) + nonnegative * (w - v))
        x = cg(normal, right, x, max_steps=cg_steps, rtol=0.0)
        d = _gradient(x)
        length = _length(d + u).clamp_min(torch.finfo(x.dtype).tiny)
        z = (d + u) * (1 - lam / rho.unsqueeze(1) / length).clamp_min(0)
        u = u + d - z
        w = (x + v).clamp_min(0)
        v = v + x - w
    return w if nonnegative else x


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
