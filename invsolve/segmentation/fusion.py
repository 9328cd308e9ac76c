"""One mask of many: what several draws, models or experts agree on.

Each function takes the probabilities or masks of every draw (more than ½ is inside) and
gives a value from 0 to 1 for each label and voxel, of which more than ½ is inside again.
Draws of one posterior are exchangeable, all equally good, and their mean is the
probability of the label; the others are for raters that differ, or for bounds.

Step-uncertainty fusion (Diff-UNet) is not among them: it weights the denoised images of
intermediate steps, which a segmentation does not keep.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Draws = Float[Tensor, "draws labels *space"] | Bool[Tensor, "draws labels *space"]
Fused = Float[Tensor, "labels *space"]

FIRST = 0.99999
"""Sensitivity and specificity that STAPLE begins with."""
MARGIN = 1e-7
"""STAPLE's sensitivities and specificities stay this far from 0 and from 1."""
TOLERANCE, ROUNDS = 1e-8, 1000
"""STAPLE ends when no probability moves by more, or after so many rounds."""


def mean(draws: Draws) -> Fused:
    """(1/n) Σ p_j: the probability of the label, where the draws are a posterior's."""
    return _float(draws).mean(0)


def majority(draws: Draws) -> Fused:
    """1 where more than half of the draws are inside; a tie is outside."""
    return _float(_float(_masks(draws)).mean(0) > 0.5)


def union(draws: Draws) -> Fused:
    """1 where any draw is inside."""
    return _float(_masks(draws).any(0))


def intersection(draws: Draws) -> Fused:
    """1 where all draws are inside."""
    return _float(_masks(draws).all(0))


def staple(draws: Draws) -> Fused:
    """W = P(true | all raters), each rater's quality estimated along with it.

    Warfield, Zou and Wells, "Simultaneous truth and performance level estimation", IEEE
    TMI 2004: rater j has a sensitivity p_j and a specificity q_j, the prior g is the mean
    of all ratings, and expectation maximisation alternates

        W = g Π p^D (1−p)^(1−D) / (that + (1−g) Π q^(1−D) (1−q)^D)
        p_j = Σ W D_j / Σ W,    q_j = Σ (1−W)(1−D_j) / Σ (1−W).

    Each label is a problem of its own. The answer depends on the field of view, through
    g. Where all agree on a whole label, that is the answer.

    Raises:
        ValueError: more than 62 raters.
    """
    if len(draws) > 62:
        raise ValueError(
            f"staple takes at most 62 draws, got {len(draws)}: use the mean"
        )
    masks = _masks(draws).flatten(2)
    fused = torch.stack([_staple(masks[:, label]) for label in range(masks.shape[1])])
    return fused.reshape(draws.shape[1:]).to(torch.get_default_dtype())


FUSIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (mean, majority, staple, union, intersection)
}
"""The functions by name."""


def _staple(masks: Tensor) -> Tensor:
    """W of each voxel. Those that all raters rated alike have the same W: one for each."""
    g = masks.double().mean()
    if g == 0 or g == 1:
        return g.expand(masks.shape[1])
    bits = torch.arange(len(masks), device=masks.device)[:, None]
    code = (masks.long() << bits).sum(0)
    codes, which, counts = code.unique(return_inverse=True, return_counts=True)
    d, counts = (codes >> bits & 1).double(), counts.double()
    p = q = torch.full_like(d[:, :1], FIRST)
    w = torch.zeros_like(counts)
    for _ in range(ROUNDS):
        inside = g.log() + (d * p.log() + (1 - d) * (1 - p).log()).sum(0)
        outside = (1 - g).log() + ((1 - d) * q.log() + d * (1 - q).log()).sum(0)
        before, w = w, (inside - outside).sigmoid()
        if (w - before).abs().max() < TOLERANCE:
            break
        p, q = _share(d, counts * w), _share(1 - d, counts * (1 - w))
    return w[which]


def _share(d: Tensor, weight: Tensor) -> Tensor:
    share = (d * weight).sum(1, keepdim=True) / weight.sum()
    return share.clamp(MARGIN, 1 - MARGIN)


def _masks(draws: Tensor) -> Tensor:
    return draws if draws.dtype == torch.bool else draws > 0.5


def _float(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())
