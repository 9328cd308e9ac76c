"""How far a mask is from the true one: one number for each item of a batch.

P is the predicted set of voxels, T the true one. Scores run from 0 (nothing right) to 1;
distances are in mm. What a quotient 0/0 or the distance to nothing is worth, ``empty``
says, since averages of published tables hang on it:

=============  =========================  ====================================
``empty``      P and T empty              one of them empty
=============  =========================  ====================================
``"nan"``      nan                        the formula's value; nan if undefined
``"zero"``     0 (scores only)            the formula's value; 0 if undefined
``"penalty"``  perfect: 1, or 0 mm        worst: 0, or the grid's diagonal in mm
=============  =========================  ====================================

Dice and Jaccard are 0 by their formula where one is empty. (MONAI's ``DiceMetric`` says
nan wherever T is, and with ``ignore_empty=False`` what ``"penalty"`` says here.)
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..shapes import PerItem

Masks = Bool[Tensor, "batch *space"]
Others = Bool[Tensor, "others *space"]
Spacing = tuple[float, ...]
Empty = Literal["nan", "zero", "penalty"]
EmptyDistance = Literal["nan", "penalty"]


def dice(pred: Masks, truth: Masks, empty: Empty = "nan") -> PerItem:
    """2|P ∩ T| / (|P| + |T|)."""
    both = _count(pred & truth)
    return _score(2 * both, _count(pred) + _count(truth), pred, truth, empty)


def jaccard(pred: Masks, truth: Masks, empty: Empty = "nan") -> PerItem:
    """|P ∩ T| / |P ∪ T|."""
    return _score(_count(pred & truth), _count(pred | truth), pred, truth, empty)


def precision(pred: Masks, truth: Masks, empty: Empty = "nan") -> PerItem:
    """|P ∩ T| / |P|; undefined where nothing was predicted."""
    return _score(_count(pred & truth), _count(pred), pred, truth, empty)


def recall(pred: Masks, truth: Masks, empty: Empty = "nan") -> PerItem:
    """|P ∩ T| / |T|; undefined where there is nothing to find."""
    return _score(_count(pred & truth), _count(truth), pred, truth, empty)


def volume_error(pred: Masks, truth: Masks, empty: EmptyDistance = "nan") -> PerItem:
    """(|P| − |T|) / |T|: −1 where all is missed, 0.1 where 10 % too much was drawn.

    Where T is empty: nan, or with ``"penalty"`` 0 if P is too, else 1.
    """
    _check(pred, truth)
    size, true = _count(pred), _count(truth)
    error = (size - true) / true
    instead = torch.nan if empty == "nan" else (size > 0).to(error)
    return torch.where(true > 0, error, instead)


def surface_distances(
    pred: Masks, truth: Masks, spacing: Spacing
) -> list[tuple[Float[Tensor, " p"], Float[Tensor, " t"]]]:
    """How far each surface voxel of P lies from T's surface, and the reverse, in mm.

    A mask's surface is what its erosion by the face neighbours takes away (as in MONAI
    and medpy); what lies on the image's border is surface. Every voxel counts alike,
    whatever the area of the surface within it. With nothing to measure to: infinity.

    Args:
        pred: the predicted masks.
        truth: the true ones.
        spacing: of the voxels along each axis, in mm: (z, y, x) or (y, x).
    """
    from scipy import ndimage

    _check(pred, truth)
    if len(spacing) != pred.ndim - 1 or not min(spacing) > 0:
        raise ValueError(
            f"spacing must be {pred.ndim - 1} lengths > 0 in mm, one for each axis of "
            f"the masks, got {spacing}"
        )
    found = []
    for p, t in zip(pred.cpu().numpy(), truth.cpu().numpy(), strict=True):
        boxes = ndimage.find_objects((p | t).astype("int8"))
        box = boxes[0] if boxes else ...  # no distance depends on what lies outside
        edges = [_surface(m[box]) for m in (p, t)]
        pair = []
        for here, there in (edges, edges[::-1]):
            if there.any():
                far: Any = ndimage.distance_transform_edt(~there, sampling=spacing)
                pair.append(torch.from_numpy(far[here]))
            else:
                n = int(here.sum())
                pair.append(torch.full((n,), torch.inf, dtype=torch.float64))
        found.append((pair[0], pair[1]))
    return found


def hd95(
    pred: Masks,
    truth: Masks,
    spacing: Spacing,
    definition: Literal["max", "pooled"] = "max",
    empty: EmptyDistance = "nan",
) -> PerItem:
    """The 95th percentile of the surface distances, in mm, by one of two definitions.

    They are not the same number: tables made by one cannot be compared with the other.

    Args:
        definition: ``"max"``, the larger of the two directed percentiles (MONAI), or
            ``"pooled"``, the percentile of both directions' distances together (medpy).
    """

    def percentile(forth: Tensor, back: Tensor) -> Tensor:
        if definition == "pooled":
            return torch.cat([forth, back]).quantile(0.95)
        return torch.maximum(forth.quantile(0.95), back.quantile(0.95))

    return _distance(percentile, pred, truth, spacing, empty)


def assd(
    pred: Masks, truth: Masks, spacing: Spacing, empty: EmptyDistance = "nan"
) -> PerItem:
    """The mean of both directions' surface distances together, in mm (as MONAI's).

    (medpy's is the mean of the two directed means.)
    """

    def mean(forth: Tensor, back: Tensor) -> Tensor:
        return torch.cat([forth, back]).mean()

    return _distance(mean, pred, truth, spacing, empty)


def surface_dice(
    pred: Masks,
    truth: Masks,
    spacing: Spacing,
    tolerance_mm: float,
    empty: Empty = "nan",
) -> PerItem:
    """The share of both surfaces' voxels that lie within the tolerance of the other."""
    pairs = surface_distances(pred, truth, spacing)
    near = [sum(int((d <= tolerance_mm).sum()) for d in pair) for pair in pairs]
    total = [sum(len(d) for d in pair) for pair in pairs]
    return _score(_ints(near, pred), _ints(total, pred), pred, truth, empty)


def lesion_f1(
    pred: Masks, truth: Masks, overlap: float = 0.1, empty: Empty = "nan"
) -> PerItem:
    """2PR/(P + R) of lesions: P the share of the predicted ones that are right, R found.

    A lesion is a connected component (through faces, edges or corners). A predicted one
    is right when more than the share ``overlap`` of its voxels lies in T, a true one is
    found when more than that share of its own lies in P; so one lesion may find two, and
    two may find one. 0 where none is right or none is found.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be in [0, 1), got {overlap}")
    hits = [
        (*_hits(p, t, overlap), *_hits(t, p, overlap))
        for p, t in zip(pred.cpu().numpy(), truth.cpu().numpy(), strict=True)
    ]
    right, drawn, met, real = _ints(hits, pred).reshape(-1, 4).T
    # 2PR/(P + R) with P = right/drawn and R = met/real, brought to one quotient.
    below = right * real + met * drawn
    below = torch.where(below > 0, below, drawn + real)
    return _score(2 * right * met, below, pred, truth, empty)


def generalised_energy_distance(a: Masks, b: Others) -> Float[Tensor, ""]:
    """GED² = 2E d(a, b) − E d(a, a′) − E d(b, b′), with d = 1 − IoU: of two sets of masks.

    The squared distance of two distributions over masks (Kohl et al., NeurIPS 2018): a
    segmenter's draws, say, and several experts' contours. The means are over all pairs,
    of a mask with itself too, so it is ≥ 0, and 0 for sets of the same masks. Two empty
    masks agree: d = 0.
    """

    def distance(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.flatten(1).double(), y.flatten(1).double()
        both = x @ y.T
        either = x.sum(1)[:, None] + y.sum(1) - both
        return torch.where(either > 0, 1 - both / either, 0).mean()

    squared = 2 * distance(a, b) - distance(a, a) - distance(b, b)
    return squared.to(torch.get_default_dtype())


def _check(pred: Tensor, truth: Tensor) -> None:
    if pred.shape != truth.shape:
        raise ValueError(
            f"the truth is of shape {tuple(truth.shape)}, the prediction of "
            f"{tuple(pred.shape)}: compare masks on one grid"
        )


def _count(mask: Tensor) -> Tensor:
    return mask.flatten(1).sum(1)


def _surface(mask: Any) -> Any:
    from scipy import ndimage

    inner: Any = ndimage.binary_erosion(mask)
    return mask & ~inner


def _ints(values: list, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=like.device)


def _hits(a: Any, b: Any, overlap: float) -> tuple[int, int]:
    """Of a's lesions: how many lie in b by more than the share, and how many there are."""
    from scipy import ndimage

    full = ndimage.generate_binary_structure(a.ndim, a.ndim)
    labelled: Any = ndimage.label(a, full)
    parts, n = labelled
    shares = ndimage.mean(b, parts, range(1, n + 1))
    return sum(bool(share > overlap) for share in shares), n


def _score(
    above: Tensor, below: Tensor, pred: Tensor, truth: Tensor, empty: Empty
) -> Tensor:
    """The quotient; where it is 0/0, what ``empty`` says."""
    _check(pred, truth)
    score = above / below
    if empty == "nan":
        return score
    nothing = ((_count(pred) + _count(truth)) == 0) & (empty == "penalty")
    return torch.where(below > 0, score, nothing.to(score))


def _distance(
    summary: Callable[[Tensor, Tensor], Tensor],
    pred: Tensor,
    truth: Tensor,
    spacing: Spacing,
    empty: EmptyDistance,
) -> Tensor:
    """The summary of each item's distances; with an empty mask, what ``empty`` says."""
    sides = zip(pred.shape[1:], spacing, strict=False)
    diagonal = math.hypot(*(n * side for n, side in sides))
    values = []
    for forth, back in surface_distances(pred, truth, spacing):
        if len(forth) and len(back):
            values.append(float(summary(forth, back)))
        elif empty == "nan":
            values.append(math.nan)
        else:
            values.append(diagonal if len(forth) or len(back) else 0.0)
    return torch.tensor(values, device=pred.device)
