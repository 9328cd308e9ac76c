"""Total variation on callables: it knows no operator, prior or file."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from invsolve.linalg import cg
from invsolve.shapes import X, per_item


def total_variation(
    normal: Callable[[X], X],
    b: X,
    lam: float,
    *,
    steps: int,
    cg_steps: int,
    nonnegative: bool = False,
    aspect: float = 1.0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> X:
    """argmin ½⟨x, Mx⟩ − ⟨b, x⟩ + λ Σ ‖∇x‖₂, item by item: least squares if M = AᴴA.

    By the alternating direction method of multipliers (Boyd et al. 2011, §6.4.1) on
    z = ∇x: x by conjugate gradients from where it was, z by soft thresholding, and the
    scaled dual u ← u + ∇x − z.

    Args:
        normal: x ↦ Mx, Hermitian and positive semi-definite.
        b: the right-hand side.
        lam: λ.
        steps: of the outer method.
        cg_steps: of the inner one.
        nonnegative: ask for x ≥ 0, by a second splitting.
        aspect: a voxel's height over its width, by which a volume's jumps along z are
            divided.
        progress: wraps the loop, as ``tqdm`` does.
    """
    x = cg(normal, b, None, max_steps=cg_steps, rtol=0.0)
    # The threshold λ/ρ is a tenth of the image's own spread: neither so small that z
    # hardly moves nor so large that it forgets the edges.
    spread = x.flatten(1).std(1).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    rho = per_item(lam / (0.1 * spread), x)
    z = gradient(x, aspect)
    u = torch.zeros_like(z)
    w, v = x, torch.zeros_like(x)

    def split(t: X) -> X:
        rough = divergence(gradient(t, aspect), aspect)
        return normal(t) + rho * (rough + nonnegative * t)

    for _ in progress(range(steps)):
        right = b + rho * (divergence(z - u, aspect) + nonnegative * (w - v))
        x = cg(split, right, x, max_steps=cg_steps, rtol=0.0)
        d = gradient(x, aspect)
        length = _length(d + u).clamp_min(torch.finfo(x.dtype).tiny)
        z = (d + u) * (1 - lam / rho.unsqueeze(1) / length).clamp_min(0)
        u = u + d - z
        w = (x + v).clamp_min(0)
        v = v + x - w
    return w if nonnegative else x


def gradient(x: X, aspect: float = 1.0) -> Tensor:
    """Differences to the next voxel along each axis of space, zero at the border.

    They come in a new second dimension: (batch, axes, …). Those along a volume's z are
    divided by ``aspect``.
    """
    axes = max(2, x.ndim - 2)
    d = x.new_zeros(x.shape[0], axes, *x.shape[1:])
    for i, axis in enumerate(range(x.ndim - axes, x.ndim)):
        d[:, i].narrow(axis, 0, x.shape[axis] - 1).copy_(x.diff(dim=axis))
    if axes == 3:
        d[:, 0] /= aspect
    return d


def divergence(q: Tensor, aspect: float = 1.0) -> X:
    """The gradient's adjoint (minus the divergence)."""
    x = torch.zeros_like(q[:, 0])
    axes = q.shape[1]
    for i, axis in enumerate(range(x.ndim - axes, x.ndim)):
        d = q[:, i].narrow(axis, 0, x.shape[axis] - 1)
        d = d / aspect if axes == 3 and i == 0 else d
        x.narrow(axis, 1, d.shape[axis]).add_(d)
        x.narrow(axis, 0, d.shape[axis]).sub_(d)
    return x


def _length(q: Tensor) -> Tensor:
    return q.square().sum(1, keepdim=True).sqrt()
