"""Fusion of masks: counting, and STAPLE against ITK's and against its own equations."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from invsolve.segmentation.fusion import (
    FUSIONS,
    intersection,
    majority,
    mean,
    staple,
    union,
)
from invsolve.segmentation.metrics import dice

SENSITIVITY = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
SPECIFICITY = (0.99, 0.97, 0.95, 0.98, 0.9, 0.99)


def ratings(generator: Generator) -> tuple[Tensor, Tensor]:
    """Six raters of known quality, one label, and what is true."""
    truth = torch.zeros(32, 32, dtype=torch.bool)
    truth[8:22, 10:25] = True
    u = torch.rand(6, 1, 32, 32, generator=generator)
    p, q = (torch.tensor(v)[:, None, None, None] for v in (SENSITIVITY, SPECIFICITY))
    return torch.where(truth, u < p, u > q), truth


def test_counting():
    """Columns: none, one, two, three and four of four draws are inside."""
    masks = torch.tensor(
        [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    )
    draws = masks[:, None].bool()
    for fuse, expected in (
        (mean, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (majority, [0.0, 0.0, 0.0, 1.0, 1.0]),
        (union, [0.0, 1.0, 1.0, 1.0, 1.0]),
        (intersection, [0.0, 0.0, 0.0, 0.0, 1.0]),
    ):
        assert fuse(draws).tolist() == [expected]


def test_probabilities_are_inside_above_a_half():
    p = torch.tensor([0.9, 0.5, 0.2])[:, None, None]
    assert float(mean(p)) == pytest.approx(1.6 / 3)
    assert float(majority(p)) == 0  # ½ is not inside: one of three
    assert float(union(p)) == 1
    assert float(intersection(p)) == 0


def test_every_fusion_lies_between_intersection_and_union(generator):
    draws = torch.rand(5, 2, 6, 7, 8, generator=generator)
    low, high = intersection(draws), union(draws)
    assert set(FUSIONS) == {"mean", "majority", "staple", "union", "intersection"}
    for name in ("majority", "staple"):
        fused = FUSIONS[name](draws)
        assert fused.shape == draws.shape[1:]
        assert ((low <= fused.round()) & (fused.round() <= high)).all()


def test_draws_that_agree_are_the_answer(generator):
    one = torch.rand(1, 2, 8, 8, generator=generator) < 0.3
    for fuse in FUSIONS.values():
        torch.testing.assert_close(
            fuse(one.expand(4, -1, -1, -1)), one[0].float(), atol=1e-6, rtol=0
        )


def test_all_or_nothing():
    for value in (False, True):
        draws = torch.full((3, 1, 4, 4), value)
        for fuse in FUSIONS.values():
            assert (fuse(draws) == float(value)).all()


def test_staple_is_itks(generator):
    itk: Any = pytest.importorskip("SimpleITK", reason="SimpleITK is a test dependency")
    draws, _ = ratings(generator)
    reference = itk.STAPLEImageFilter()
    reference.SetForegroundValue(1.0)
    images = [itk.GetImageFromArray(d[0].numpy().astype("uint8")) for d in draws]
    expected = torch.from_numpy(itk.GetArrayFromImage(reference.Execute(images)))
    torch.testing.assert_close(staple(draws)[0].double(), expected, atol=1e-6, rtol=0)


def test_staple_is_a_fixed_point_of_its_equations(generator):
    """And not the trivial one of the mean: written out voxel by voxel, in no logarithms."""
    draws, _ = ratings(generator)
    d, w = draws.flatten(1).double(), staple(draws).flatten().double()
    g = d.mean()
    p = ((d * w).sum(1) / w.sum())[:, None]
    q = (((1 - d) * (1 - w)).sum(1) / (1 - w).sum())[:, None]
    inside = g * (p**d * (1 - p) ** (1 - d)).prod(0)
    outside = (1 - g) * (q ** (1 - d) * (1 - q) ** d).prod(0)
    torch.testing.assert_close(inside / (inside + outside), w, atol=1e-6, rtol=0)
    assert (w - d.mean(0)).abs().max() > 0.3


def test_staple_knows_good_raters_from_bad_ones(generator):
    draws, truth = ratings(generator)
    scores = [float(dice(fuse(draws) > 0.5, truth[None])) for fuse in (mean, staple)]
    assert scores[1] > scores[0] + 0.01


def test_staple_takes_each_label_alone(generator):
    draws, _ = ratings(generator)
    both = torch.cat([draws, ~draws[:, :, 4:12].repeat(1, 1, 4, 1)], 1)
    torch.testing.assert_close(staple(both)[:1], staple(draws))
    torch.testing.assert_close(staple(both)[1:], staple(both[:, 1:]))


def test_staple_has_a_limit():
    with pytest.raises(ValueError, match="at most 62 draws, got 63"):
        staple(torch.ones(63, 1, 2, 2))
    half = torch.arange(4).reshape(1, 1, 2, 2).expand(62, -1, -1, -1) < 2
    torch.testing.assert_close(staple(half), half[0].float(), atol=1e-6, rtol=0)
