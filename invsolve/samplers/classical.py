"""Reconstruction without a learned prior: what a sampler has to beat."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..linalg import dot
from ..operators import LinearOperator
from ..operators.base import INEXACT_STEPS
from ..operators.ct.filtering import Window
from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import PerItem, X, per_item
from ..variation import total_variation
from .core import Progress, gives


@runtime_checkable
class Filtered(Protocol):
    """An operator with a filtered back-projection of its own."""

    def fbp(self, y: Tensor, *, window: Window) -> Tensor: ...


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
    """Filtered back-projection of parallel rays, a fan, or a circular cone beam.

    See `ParallelBeam.fbp`, `FanBeam.fbp` and `ConeBeam.fbp`.

    Args:
        problem: of one of these geometries.
        prior, generator, progress: not used; here so that `solve` takes it.
        window: on the ramp filter.
    """
    A, scale = _filtered(problem.linear)
    return A.fbp(problem.y, window=window) / scale


def _filtered(A: LinearOperator) -> tuple[Filtered, float]:
    scale = 1.0
    while not isinstance(A, Filtered):
        inner = getattr(A, "inner", None)
        if inner is None or hasattr(A, "outer"):
            raise ValueError(
                f"fbp needs a ParallelBeam, not {type(A).__name__} (or a FanBeam or a "
                "ConeBeam): use tv, or a prior"
            )
        scale, A = scale * getattr(A, "factor", 1.0), inner
    return A, scale


@gives("point_estimate")
@torch.no_grad()
def sirt(
    problem: InverseProblem,
    prior: Prior | None = None,
    *,
    steps: int = 100,
    relaxation: float = 1.0,
    nonnegative: bool = False,
    generator: Randomness | None = None,
    progress: Progress = iter,
) -> X:
    """x ← x + ω C Aᵀ R (y − A x) from 0, with R = 1/(A1) and C = 1/(Aᵀ1).

    The simultaneous iterative reconstruction technique (Gilbert 1972; van der Sluis &
    van der Vorst 1990). It tends to the minimum of ‖Ax − y‖²_R; few steps leave x
    smooth, and so the number of steps is what regularises. Measurements and voxels that
    no ray connects (A1 = 0, Aᵀ1 = 0) are left out.

    Args:
        problem: linear, with A ≥ 0, as line integrals are; its noise is not used.
        prior, generator: not used; here so that `solve` takes it.
        steps: how many.
        relaxation: ω, between 0 and 2.
        nonnegative: project on x ≥ 0 after each step.
        progress: wraps the loop, as ``tqdm`` does.

    Raises:
        ValueError: A has negative entries, or ω is out of range.
    """
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation must lie between 0 and 2, got {relaxation}")
    A, y = problem.linear, problem.y
    x = torch.zeros_like(A.adjoint(y))
    R, C = A.apply(torch.ones_like(x)), A.adjoint(torch.ones_like(y))
    if y.is_complex() or R.min() < 0 or C.min() < 0:
        raise ValueError(
            "sirt needs an operator without negative entries, such as ParallelBeam: "
            "use cgls, or tv"
        )
    R, C = (torch.where(s > 0, 1 / s, 0) for s in (R, C))
    for _ in progress(range(steps)):
        x = x + relaxation * C * A.adjoint(R * (y - A.apply(x)))
        if nonnegative:
            x = x.clamp_min(0)
    return x


@gives("point_estimate")
@torch.no_grad()
def cgls(
    problem: InverseProblem,
    prior: Prior | None = None,
    *,
    steps: int = 50,
    discrepancy: float = 1.0,
    generator: Randomness | None = None,
    progress: Progress = iter,
) -> X:
    """argmin ‖Ax − y‖²_W over the k-th Krylov space, by conjugate gradients from 0.

    Hestenes & Stiefel 1952, for AᴴWA x = AᴴWy. The first steps find what the data tell
    well, the later ones their noise: so it stops, item by item, as soon as ‖Ax − y‖²_W
    ≤ τ² m, with m the number of real measurements, which is what the true image leaves
    on average (Morozov's discrepancy principle).

    Args:
        problem: linear; W is the noise's precision.
        prior, generator: not used; here so that `solve` takes it.
        steps: at most so many; fewer where the operator's adjoint is not exact.
        discrepancy: τ; 0 to run all steps.
        progress: wraps the loop, as ``tqdm`` does.
    """
    A, y = problem.whitened()
    if not A.adjoint_is_exact:
        steps = min(steps, INEXACT_STEPS)
    enough = discrepancy**2 * _measurements(problem)
    r, s = y, A.adjoint(y)
    x, p, ss = torch.zeros_like(s), s, dot(s, s)
    for _ in progress(range(steps)):
        q = A.apply(p)
        qq = dot(q, q)
        active = (dot(r, r) > enough) & (qq > 0)
        if not active.any():
            break
        alpha = torch.where(active, ss / qq.where(active, torch.ones_like(qq)), 0)
        x = x + per_item(alpha, x) * p
        r = r - per_item(alpha, r) * q
        s = A.adjoint(r)
        ss, ss_old = dot(s, s), ss
        beta = torch.where(active, ss / ss_old.where(active, torch.ones_like(ss)), 0)
        p = s + per_item(beta, s) * p
    return x


def _measurements(problem: InverseProblem) -> PerItem:
    """How many real measurements that have any weight each item has."""
    y = problem.y
    weight = problem.noise.precision(y)
    seen = torch.as_tensor(weight, device=y.device) > 0
    count = seen.broadcast_to(y.shape).flatten(1).sum(1)
    return count.to(y.abs().dtype) * (2 if y.is_complex() else 1)


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
    aspect: float = 1.0,
    generator: Randomness | None = None,
    progress: Progress = iter,
) -> X:
    """argmin ½‖Ax − y‖²_W + λ Σ ‖∇x‖₂, isotropic total variation in 2D or 3D.

    ∇x holds the differences between a voxel and its next neighbours, (2, h, w) for an
    image and (3, d, h, w) for a volume, there over the voxels' sides; the length ‖·‖₂ is
    over these two or three, so that no direction is preferred, and channels are apart.

    By the alternating direction method of multipliers: `invsolve.variation`.

    Args:
        problem: linear; W is the noise's precision.
        prior, generator: not used; here so that `solve` takes it.
        lam: λ, in the inverse of the images' unit: the strength, per unit of jump and
            voxel of edge, against a misfit that is −log p(y | x).
        steps: of the outer method.
        cg_steps: of the inner one.
        nonnegative: ask for x ≥ 0, by a second splitting.
        aspect: of a volume, a voxel's height over its width.
        progress: wraps the loop, as ``tqdm`` does.

    Raises:
        ValueError: ``aspect`` is not positive.
    """
    if not aspect > 0:
        raise ValueError(f"aspect must be > 0, got {aspect}")
    A, y = problem.whitened()
    return total_variation(
        A.normal,
        A.adjoint(y),
        lam,
        steps=steps,
        cg_steps=cg_steps,
        nonnegative=nonnegative,
        aspect=aspect,
        progress=progress,
    )
