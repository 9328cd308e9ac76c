"""Metrics of masks: closed forms, brute force, MONAI's and medpy's numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from invsolve.segmentation.metrics import (
    Empty,
    assd,
    dice,
    generalised_energy_distance,
    hd95,
    jaccard,
    lesion_f1,
    precision,
    recall,
    surface_dice,
    surface_distances,
    volume_error,
)

SPACING = (3.0, 1.0, 1.5)
SCORES = (dice, jaccard, precision, recall, lesion_f1)
NAN = float("nan")


@pytest.fixture
def monai() -> Any:
    return pytest.importorskip("monai.metrics", reason="needs invsolve[monai]")


def box(*sides: tuple[int, int], shape=(12, 14, 16)) -> Tensor:
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    mask[(0, *(slice(*side) for side in sides))] = True
    return mask


def blobs(generator: torch.Generator, n: int = 4) -> tuple[Tensor, Tensor]:
    """Pairs of overlapping, ragged masks, some of which touch the border."""
    z = torch.randn(2, n, 12, 14, 16, generator=generator)
    smooth = torch.nn.functional.avg_pool3d(z, 3, 1, 1)
    pred, common = smooth[0], smooth[1]
    return pred + common > 0.25, common > 0.15


def balls() -> tuple[Tensor, Tensor]:
    """Two offset balls, with a false speck beside the second."""
    z, y, x = torch.meshgrid(*3 * [torch.arange(40)], indexing="ij")
    a = (z - 18) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 < 81
    b = (z - 21) ** 2 + (y - 22) ** 2 + (x - 19) ** 2 < 100
    b[30:33, 5:8, 5:8] = True
    return a[None], b[None]


def brute_force(p: Tensor, t: Tensor, spacing: tuple) -> tuple[Tensor, Tensor]:
    """All distances of all pairs of surface voxels; a surface voxel has a face outside."""

    def surface(mask: Tensor) -> Tensor:
        padded = np.pad(mask.numpy(), 1)
        inner = padded.copy()
        for axis in range(mask.ndim):
            for step in (-1, 1):
                inner &= np.roll(padded, step, axis)
        points = np.argwhere(padded & ~inner) * np.array(spacing)
        return torch.from_numpy(points)

    d = torch.cdist(surface(p), surface(t), compute_mode="donot_use_mm_for_euclid_dist")
    return d.amin(1), d.amin(0)


def test_overlaps_are_their_counts():
    """P of 2·3·4 voxels and T of 2·3·5 share 2·3·2 of them."""
    p, t = box((2, 4), (3, 6), (4, 8)), box((2, 4), (3, 6), (6, 11))
    for metric, expected in (
        (dice, 2 * 12 / (24 + 30)),
        (jaccard, 12 / (24 + 30 - 12)),
        (precision, 12 / 24),
        (recall, 12 / 30),
        (volume_error, (24 - 30) / 30),
    ):
        assert float(metric(p, t)) == pytest.approx(expected)


def test_overlaps_are_monais(generator, monai):
    p, t = blobs(generator)
    channels = p[:, None].float(), t[:, None].float()
    options = {"include_background": True}
    torch.testing.assert_close(
        dice(p, t), monai.DiceMetric(**options)(*channels).flatten()
    )
    torch.testing.assert_close(
        jaccard(p, t), monai.compute_iou(*channels, **options).flatten()
    )


def test_each_item_is_its_own(generator):
    p, t = blobs(generator)
    for metric in (dice, volume_error, lesion_f1):
        alone = torch.cat([metric(p[i : i + 1], t[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(metric(p, t), alone)
    alone = torch.cat([hd95(p[i : i + 1], t[i : i + 1], SPACING) for i in range(4)])
    torch.testing.assert_close(hd95(p, t, SPACING), alone)


def test_surface_distances_are_all_pairs_nearest(generator):
    p, t = blobs(generator)
    for i, found in enumerate(surface_distances(p, t, SPACING)):
        for here, expected in zip(found, brute_force(p[i], t[i], SPACING), strict=True):
            torch.testing.assert_close(here.sort().values, expected.sort().values)


def test_distances_in_the_plane(generator):
    p, t = (m[:, 5] for m in blobs(generator))
    for i, found in enumerate(surface_distances(p, t, (2.0, 0.5))):
        for here, expected in zip(
            found, brute_force(p[i], t[i], (2.0, 0.5)), strict=True
        ):
            torch.testing.assert_close(here.sort().values, expected.sort().values)


@pytest.mark.parametrize("axis", range(3))
def test_parallel_plates(axis):
    """One voxel thick and k apart along an axis: every distance is k voxels there."""
    planes = [[(2, 9), (2, 9), (2, 9)] for _ in range(2)]
    planes[0][axis], planes[1][axis] = (3, 4), (7, 8)
    p, t = (box(*sides) for sides in planes)
    apart = 4 * SPACING[axis]
    for metric in (hd95, assd):
        assert float(metric(p, t, SPACING)) == pytest.approx(apart)
    assert float(hd95(p, t, SPACING, "pooled")) == pytest.approx(apart)
    assert float(surface_dice(p, t, SPACING, apart + 0.01)) == 1
    assert float(surface_dice(p, t, SPACING, apart - 0.01)) == 0


def test_a_voxel_in_the_middle_of_a_box():
    """The far corners of 5³ are √(2²+2²+2²) voxels away, and a face 2."""
    p, t = box((4, 9), (4, 9), (4, 9)), box((6, 7), (6, 7), (6, 7))
    ((forth, back),) = surface_distances(p, t, (1.0, 1.0, 1.0))
    assert len(forth) == 5**3 - 3**3
    assert float(forth.max()) == pytest.approx(math.sqrt(12))
    assert back.tolist() == [2.0]


def test_hd95_is_monais_or_medpys_as_asked():
    """On one pair of masks the definitions are two millimetres apart."""
    p, t = balls()
    spacing = (3.0, 1.0, 1.0)
    both = torch.cat(brute_force(p[0], t[0], spacing))
    medpy = np.percentile(both.numpy(), 95)
    assert float(hd95(p, t, spacing, "pooled")) == pytest.approx(medpy, rel=1e-6)
    assert round(float(hd95(p, t, spacing, "pooled")), 2) == 9.95
    assert round(float(hd95(p, t, spacing, "max")), 2) == 12.04


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_distances_are_monais(generator, monai):
    p, t = blobs(generator)
    channels = {"y_pred": p[:, None].float(), "y": t[:, None].float()}
    options = {"include_background": True, "spacing": SPACING}
    expected = monai.compute_hausdorff_distance(**channels, **options, percentile=95)
    torch.testing.assert_close(hd95(p, t, SPACING), expected.flatten())
    expected = monai.compute_average_surface_distance(
        **channels, **options, symmetric=True
    )
    torch.testing.assert_close(assd(p, t, SPACING), expected.flatten())
    expected = monai.compute_surface_dice(**channels, **options, class_thresholds=[1.5])
    torch.testing.assert_close(surface_dice(p, t, SPACING, 1.5), expected.flatten())


def test_a_metric_is_symmetric_where_it_should_be(generator):
    p, t = blobs(generator)
    for metric in (dice, jaccard, lesion_f1):
        torch.testing.assert_close(metric(p, t), metric(t, p))
    torch.testing.assert_close(precision(p, t), recall(t, p))
    torch.testing.assert_close(hd95(p, t, SPACING), hd95(t, p, SPACING))
    torch.testing.assert_close(assd(p, t, SPACING), assd(t, p, SPACING))


def test_the_truth_is_perfect(generator):
    _, t = blobs(generator)
    for metric in SCORES:
        torch.testing.assert_close(metric(t, t), torch.ones(4))
    torch.testing.assert_close(surface_dice(t, t, SPACING, 0.0), torch.ones(4))
    for metric in (hd95, assd):
        assert not metric(t, t, SPACING).any()
    assert not volume_error(t, t).any()


def test_lesions_are_counted_and_not_their_voxels():
    """Of two true lesions the small one is found, of three predicted one is right."""
    t = box((0, 1), (0, 1), (0, 2)) | box((6, 11), (6, 11), (6, 11))
    p = box((0, 1), (0, 1), (1, 3))  # half of it in a lesion, half of which it covers
    p |= box((0, 1), (10, 11), (14, 15)) | box((11, 12), (0, 1), (14, 15))
    assert float(lesion_f1(p, t)) == pytest.approx(
        2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)
    )
    assert float(lesion_f1(p, t, overlap=0.49)) > 0
    assert float(lesion_f1(p, t, overlap=0.5)) == 0


def test_one_lesion_may_find_two():
    """A bar through both true lesions, and two specks: 1 of 3 right, 2 of 2 found."""
    t = box((2, 4), (2, 4), (2, 5)) | box((2, 4), (2, 4), (7, 10))
    p = box((2, 4), (2, 4), (2, 10))
    p |= box((11, 12), (0, 1), (0, 1)) | box((11, 12), (0, 1), (14, 15))
    assert float(lesion_f1(p, t)) == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert float(lesion_f1(t, p)) == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))


def test_assd_is_of_both_surfaces_together():
    """5³ − 3³ voxels of a box around one: the mean is theirs, not that of two means."""
    p, t = box((4, 9), (4, 9), (4, 9)), box((6, 7), (6, 7), (6, 7))
    ((forth, back),) = surface_distances(p, t, (1.0, 1.0, 1.0))
    expected = (float(forth.sum()) + 2.0) / (98 + 1)
    assert float(back.sum()) == 2.0
    assert float(assd(p, t, (1.0, 1.0, 1.0))) == pytest.approx(expected)


def test_painting_everything_finds_every_lesion_but_is_not_right():
    t = box((2, 4), (2, 4), (2, 4)) | box((8, 10), (8, 10), (8, 10))
    everything = torch.ones_like(t)
    assert float(recall(everything, t)) == 1
    assert float(lesion_f1(everything, t)) == 0


def test_voxels_that_touch_by_a_corner_are_one_lesion():
    t = box((2, 3), (2, 3), (2, 3)) | box((3, 4), (3, 4), (3, 4))
    apart = box((2, 3), (2, 3), (2, 3)) | box((3, 4), (3, 4), (5, 6))
    half = box((2, 3), (2, 3), (2, 3))
    assert float(lesion_f1(half, t)) == 1
    assert float(lesion_f1(half, apart)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("metric", "empty", "expected"),
    # Both empty; only P empty; only T empty.
    [
        (dice, "nan", (NAN, 0, 0)),
        (dice, "zero", (0, 0, 0)),
        (dice, "penalty", (1, 0, 0)),
        (jaccard, "nan", (NAN, 0, 0)),
        (jaccard, "zero", (0, 0, 0)),
        (jaccard, "penalty", (1, 0, 0)),
        (precision, "nan", (NAN, NAN, 0)),
        (precision, "zero", (0, 0, 0)),
        (precision, "penalty", (1, 0, 0)),
        (recall, "nan", (NAN, 0, NAN)),
        (recall, "zero", (0, 0, 0)),
        (recall, "penalty", (1, 0, 0)),
        (lesion_f1, "nan", (NAN, 0, 0)),
        (lesion_f1, "zero", (0, 0, 0)),
        (lesion_f1, "penalty", (1, 0, 0)),
        (volume_error, "nan", (NAN, -1, NAN)),
        (volume_error, "penalty", (0, -1, 1)),
    ],
)
def test_empty_masks(metric, empty, expected):
    some = box((2, 4), (2, 4), (2, 4))
    none = torch.zeros_like(some)
    p, t = torch.cat([none, none, some]), torch.cat([none, some, none])
    found = metric(p, t, empty=empty)
    torch.testing.assert_close(found, torch.tensor(expected).float(), equal_nan=True)


def test_distances_of_empty_masks():
    some = box((2, 4), (2, 4), (2, 4))
    none = torch.zeros_like(some)
    p, t = torch.cat([none, none, some]), torch.cat([none, some, none])
    diagonal = math.hypot(12 * 3.0, 14 * 1.0, 16 * 1.5)
    worst = torch.tensor([0.0, diagonal, diagonal])
    for metric in (hd95, assd):
        assert metric(p, t, SPACING).isnan().all()
        torch.testing.assert_close(metric(p, t, SPACING, empty="penalty"), worst)
    policies: tuple[tuple[Empty, float], ...] = (
        ("nan", NAN),
        ("zero", 0),
        ("penalty", 1),
    )
    for empty, expected in policies:
        found = surface_dice(p, t, SPACING, 2.0, empty)
        torch.testing.assert_close(
            found, torch.tensor([expected, 0, 0]).float(), equal_nan=True
        )
    ((forth, back),) = surface_distances(some, none, SPACING)
    assert len(forth) == 8 and forth.isinf().all() and len(back) == 0


def test_ged_is_its_definition(generator):
    a, b = torch.rand(2, 5, 6, 6, generator=generator) < 0.5
    b = b[:3]

    def mean(x: Tensor, y: Tensor) -> float:
        pairs = [(1 - jaccard(m[None], g[None]).item()) for m in x for g in y]
        return sum(pairs) / len(pairs)

    expected = 2 * mean(a, b) - mean(a, a) - mean(b, b)
    found = float(generalised_energy_distance(a, b))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found > 0
    assert float(generalised_energy_distance(b, a)) == pytest.approx(found, abs=1e-6)


def test_ged_of_the_same_masks_is_nothing(generator):
    a = torch.rand(5, 6, 6, generator=generator) < 0.3
    again = torch.cat([a, a])[torch.randperm(10, generator=generator)]
    assert float(generalised_energy_distance(a, again)) == pytest.approx(0, abs=1e-6)


def test_ged_in_closed_form():
    """Disjoint masks are 1 apart: two against one of them, 2·½ − ½ − 0."""
    p, q = box((0, 2), (0, 2), (0, 2)), box((4, 6), (4, 6), (4, 6))
    both = torch.cat([p, q])
    assert float(generalised_energy_distance(p, q)) == 2
    assert float(generalised_energy_distance(both, p)) == 0.5
    none = torch.zeros_like(p)
    assert float(generalised_energy_distance(none, none)) == 0
    assert float(generalised_energy_distance(none, p)) == 2


def test_what_cannot_be_compared_is_refused():
    p = box((2, 4), (2, 4), (2, 4))
    with pytest.raises(ValueError, match="3 lengths > 0"):
        hd95(p, p, (1.0, 1.0))
    with pytest.raises(ValueError, match="3 lengths > 0"):
        assd(p, p, (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 1\)"):
        lesion_f1(p, p, overlap=1.0)
