"""What draws of masks say about themselves, and whether they are right to say it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..shapes import PerItem

Draws = Float[Tensor, "draws *any"]
One = Float[Tensor, "*any"]
Probability = Float[Tensor, "batch *space"]
Truth = Bool[Tensor, "batch *space"]

FLOOR = 1e-6
"""No probability is taken for less than this, nor for more than one minus it, by nll."""


class Variance(NamedTuple):
    """Of the label's indicator, in two parts, each unbiased."""

    acquisition: Tensor
    """Between images: what better measurements would take away. Below 0 by chance."""
    annotation: Tensor
    """Within one image: where its contour is open although the image is known."""


class Reliability(NamedTuple):
    """Of the voxels in each bin of predicted probability; nan in an empty bin."""

    predicted: Float[Tensor, " bins"]
    """Their mean predicted probability."""
    observed: Float[Tensor, " bins"]
    """The share of them that is truly inside."""
    voxels: Int[Tensor, " bins"]


def entropy(p: One) -> One:
    """H(p) = −p ln p − (1−p) ln(1−p), in nats: from 0 to ln 2."""
    return torch.special.entr(p) + torch.special.entr(1 - p)


def mutual_information(draws: Draws) -> One:
    """H(mean of p) − mean of H(p) over the draws, in nats: how far they contradict.

    0 where all draws say the same, be it ½; ln 2 where half are sure of it and half of the
    contrary.
    """
    return entropy(draws.mean(0)) - entropy(draws).mean(0)


def nested_anova(masks: Float[Tensor, "n k *any"]) -> Variance:
    """within = E_n var_k(m), between = var_n(mean_k m) − within/k.

    For k masks of each of n images from one measurement. The means of k masks vary by
    themselves, by within/k, which is no doubt about the image and is taken off.

    Args:
        masks: 0 or 1, or probabilities; of the n-th image the k-th.

    Raises:
        ValueError: fewer than two images, or than two masks of each.
    """
    n, k = masks.shape[:2]
    if n < 2 or k < 2:
        raise ValueError(
            f"nested_anova needs at least 2 images and 2 masks of each, got {n} and {k}"
        )
    within = masks.var(1).mean(0)
    return Variance(masks.mean(1).var(0) - within / k, within)


def brier(prob: Probability, truth: Truth) -> PerItem:
    """mean (p − m)² over an item's voxels: 0 is perfect, ¼ is p = ½ everywhere."""
    return (prob - truth.to(prob)).square().flatten(1).mean(1)


def nll(prob: Probability, truth: Truth) -> PerItem:
    """mean −ln P(m) over an item's voxels, in nats; p is kept within [10⁻⁶, 1 − 10⁻⁶]."""
    right = torch.where(truth, prob, 1 - prob).clamp(FLOOR, 1 - FLOOR)
    return -right.log().flatten(1).mean(1)


def reliability(prob: One, truth: Bool[Tensor, "*any"], bins: int = 15) -> Reliability:
    """The predicted and the observed frequency in ``bins`` equal parts of [0, 1].

    All voxels count together, those of several cases too. The curve of a calibrated
    predictor is the diagonal.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    p, m = prob.flatten().double(), truth.flatten().double()
    which = (p * bins).long().clamp(0, bins - 1)
    count = which.bincount(minlength=bins)
    predicted, observed = (which.bincount(v, bins) / count for v in (p, m))
    return Reliability(predicted.to(prob), observed.to(prob), count)


def calibration_error(
    prob: One,
    truth: Bool[Tensor, "*any"],
    bins: int = 15,
    kind: Literal["expected", "maximum"] = "expected",
) -> Float[Tensor, ""]:
    """|observed − predicted|, averaged over the voxels' bins, or of the worst bin.

    Of the label's own probability, not of the likelier answer's. Most voxels of a scan
    are certain background and make the average small: give those of a region around the
    structure where that is not meant.
    """
    curve = reliability(prob, truth, bins)
    filled = curve.voxels > 0
    gap = (curve.observed - curve.predicted).abs()[filled]
    if kind == "maximum":
        return gap.max()
    weight = curve.voxels[filled].to(gap)
    return (weight * gap).sum() / weight.sum()


def conformal_threshold(
    probs: Sequence[Float[Tensor, "..."]],
    truths: Sequence[Bool[Tensor, "..."]],
    alpha: float,
) -> float:
    """The largest λ with (n/(n+1)) R̂(λ) + 1/(n+1) ≤ α: then E[missed of a new case] ≤ α.

    R̂ is the mean over n calibration cases of the share of the true voxels that the mask
    {p ≥ λ} misses. Conformal risk control (Angelopoulos et al., ICLR 2024): it holds
    however bad the probabilities are, on average over calibration sets and new cases,
    as long as these are exchangeable; it says nothing of one case. Bad probabilities
    make the masks large.

    Args:
        probs: one structure's probabilities in each case; shapes may differ.
        truths: its true masks.
        alpha: the share that may be missed, in (0, 1).

    Raises:
        ValueError: fewer than 1/α − 1 cases, or a case without a true voxel.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    n = len(probs)
    budget = alpha * (n + 1) - 1  # of the cases' missed shares together
    if budget < -1e-9:
        raise ValueError(
            f"alpha = {alpha:g} needs at least 1/alpha - 1 = {1 / alpha - 1:.4g} cases, "
            f"got {n}: give more cases or a larger alpha"
        )
    values, shares = [], []
    for case, (prob, truth) in enumerate(zip(probs, truths, strict=True)):
        if prob.shape != truth.shape or not truth.any():
            what = "is empty" if prob.shape == truth.shape else "has another shape"
            raise ValueError(f"the true mask of case {case} {what}: leave the case out")
        inside = prob[truth]
        values.append(inside)
        shares.append(torch.full_like(inside, 1 / len(inside), dtype=torch.float64))
    value, order = torch.cat(values).sort()
    share = torch.cat(shares)[order]
    missed = share.cumsum(0) - share  # by λ = value: what lies below it
    return float(value[missed <= max(budget, 0.0) + 1e-9][-1])


def interval(values: Draws, level: float = 0.9) -> tuple[One, One]:
    """The central interval that a further draw falls into with probability ``level``.

    Of volumes, say, or diameters. Between the order statistics of ranks (n+1)(1±level)/2
    (interpolated), which is exact for exchangeable draws where the ranks are whole. Fewer
    than 2/(1−level) − 1 draws have no such ranks: then it is their range, which a further
    draw falls into with probability (n−1)/(n+1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    n = len(values)
    ordered = values.sort(0).values

    def at(share: float) -> Tensor:
        rank = min(max((n + 1) * share - 1, 0.0), n - 1.0)
        low = int(rank)
        return torch.lerp(ordered[low], ordered[min(low + 1, n - 1)], rank - low)

    return at((1 - level) / 2), at((1 + level) / 2)
