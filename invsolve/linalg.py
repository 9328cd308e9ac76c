"""Iterative linear algebra on callables: it knows no operator, prior or file."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from invsolve.shapes import PerItem, X, per_item


def dot(a: X, b: X) -> PerItem:
    """Re⟨a, b⟩ for each item: the inner product that makes ℂⁿ a real space of 2n."""
    return (a.conj() * b).real.flatten(1).sum(1)


def cg(
    apply: Callable[[Tensor], Tensor],
    b: X,
    x: X | None,
    *,
    max_steps: int,
    rtol: float,
) -> X:
    """Solve M x = b by conjugate gradients (Hestenes & Stiefel 1952), item by item.

    Every item has step lengths of its own, so that no item's answer depends on the
    others'; an item that has converged stays where it is.

    Args:
        apply: x ↦ M x, with M Hermitian and positive semi-definite.
        b: the right-hand side.
        x: where to start; None for zero, which spares the first application of M.
        max_steps: at most so many applications of M beside that for the first residual.
        rtol: stop when ‖b − M x‖ ≤ rtol ‖b‖ for every item; what lies below the
            rounding of b counts as nothing.
    """
    eps = torch.finfo(b.dtype).eps
    r = b if x is None else b - apply(x)
    x = torch.zeros_like(b) if x is None else x
    p, rr = r, dot(r, r)
    enough = max(rtol, 4 * eps) ** 2 * dot(b, b)
    for _ in range(max_steps):
        active = rr > enough
        if not active.any():
            break
        Mp = apply(p)
        pMp = dot(p, Mp)
        # A direction almost in M's null space, ⊥ to M p, is rounding that no step mends.
        # Roots before products: in single precision the latter overflow at M ~ 1e8.
        lengths = dot(p, p).sqrt() * dot(Mp, Mp).sqrt()
        active = active & (pMp > eps**0.5 * lengths)
        alpha = torch.where(active, rr / pMp.where(active, torch.ones_like(pMp)), 0)
        x = x + per_item(alpha, x) * p
        r = r - per_item(alpha, x) * Mp
        rr, rr_old = dot(r, r), rr
        beta = torch.where(active, rr / rr_old.where(active, torch.ones_like(rr)), 0)
        p = r + per_item(beta, x) * p
    return x


def largest_eigenvalue(
    apply: Callable[[Tensor], Tensor], x: X, *, max_steps: int, rtol: float
) -> Float[Tensor, ""]:
    """The largest eigenvalue of a Hermitian M ⪰ 0, by power iteration from x.

    The Rayleigh quotient of a power iteration approaches it from below.
    """
    value = torch.zeros((), dtype=x.abs().dtype, device=x.device)
    for _ in range(max_steps):
        norm = dot(x, x).sum().sqrt()
        if norm == 0:
            return norm
        x = x / norm
        y = apply(x)
        value_old, value = value, dot(x, y).sum()
        if (value - value_old).abs() <= rtol * value:
            break
        x = y
    return value
