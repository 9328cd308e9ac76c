"""Uncertainty of masks: closed forms, unbiasedness, coverage on exchangeable cases."""

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from invsolve.segmentation.uncertainty import (
    brier,
    calibration_error,
    conformal_threshold,
    entropy,
    interval,
    mutual_information,
    nested_anova,
    nll,
    reliability,
)

LN2 = math.log(2)


def test_entropy():
    p = torch.tensor([0.0, 0.25, 0.5, 1.0])
    quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    torch.testing.assert_close(entropy(p), torch.tensor([0.0, quarter, LN2, 0.0]))


def test_draws_that_agree_say_nothing_of_each_other():
    """Columns: all unsure, sure and contrary, sure and alike."""
    draws = torch.tensor([[0.5, 0.0, 1.0], [0.5, 1.0, 1.0]])
    torch.testing.assert_close(mutual_information(draws), torch.tensor([0.0, LN2, 0.0]))


def test_mutual_information_is_never_negative(generator):
    draws = torch.rand(5, 1000, generator=generator)
    assert float(mutual_information(draws).min()) > 0


def test_nested_anova_is_unbiased(generator):
    """Probabilities 0.2 and 0.6: 0.04 between images and 0.2 within, by p(1 − p)."""
    p = torch.where(torch.rand(16, 1, 40000, generator=generator) < 0.5, 0.2, 0.6)
    masks = (torch.rand(16, 4, 40000, generator=generator) < p).float()
    parts = nested_anova(masks)
    assert float(parts.annotation.mean()) == pytest.approx(0.2, abs=1e-3)
    assert float(parts.acquisition.mean()) == pytest.approx(0.04, abs=1e-3)
    naive = masks.mean(1).var(0)
    assert float(naive.mean()) == pytest.approx(0.09, abs=1e-3)


def test_nested_anova_of_one_sided_doubt():
    """Two images, sure of the contrary; and two that are alike, of contrary masks."""
    masks = torch.tensor([[[0.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]])
    acquisition, annotation = nested_anova(masks)
    assert acquisition.tolist() == [0.5, -0.25]
    assert annotation.tolist() == [0.0, 0.5]
    for n, k in ((1, 4), (4, 1)):
        with pytest.raises(ValueError, match="at least 2 images and 2 masks"):
            nested_anova(torch.ones(n, k, 3))


def test_brier_and_nll_in_closed_form():
    """Each item has its own; the truth is 1 in one of four voxels."""
    truth = torch.tensor([[True, False, False, False]]).expand(3, -1)
    p = torch.tensor([0.5, 0.25, 0.0])[:, None].expand(-1, 4)
    torch.testing.assert_close(brier(p, truth), torch.tensor([0.25, 0.1875, 0.25]))
    quarter = float(entropy(torch.tensor(0.25)))
    floored = (-math.log(1e-6) - 3 * math.log(1 - 1e-6)) / 4
    expected = torch.tensor([LN2, quarter, floored])
    torch.testing.assert_close(nll(p, truth), expected)


def test_both_scores_are_proper(generator):
    """On average nothing scores better than the true probability."""
    q = torch.rand(1, 200000, generator=generator)
    truth = torch.rand(q.shape, generator=generator) < q
    for score in (brier, nll):
        best = float(score(q, truth))
        for wrong in (q**1.3, (0.8 * q + 0.1), (1.2 * q - 0.1).clamp(0, 1)):
            assert float(score(wrong, truth)) > best


def test_a_calibrated_predictor_has_no_error(generator):
    q = torch.rand(400000, generator=generator)
    truth = torch.rand(q.shape, generator=generator) < q
    assert float(calibration_error(q, truth)) < 0.005
    assert float(calibration_error(q, truth, kind="maximum")) < 0.02


@pytest.mark.parametrize("offset", [0.1, -0.05])
def test_a_constant_offset_is_the_error(offset):
    """Exact frequencies 0.2, 0.4 and 0.8, of which each is told with an offset."""
    truth = torch.tensor([[i < k for i in range(5)] for k in (1, 2, 4)])
    told = truth.float().mean(1, keepdim=True).expand(-1, 5) + offset
    for kind in ("expected", "maximum"):
        found = float(calibration_error(told, truth, bins=20, kind=kind))
        assert found == pytest.approx(abs(offset), abs=1e-6)


def test_the_expected_error_weighs_bins_by_their_voxels():
    prob = torch.tensor([0.1, 0.1, 0.1, 0.7])
    truth = torch.tensor([False, False, False, False])
    assert float(calibration_error(prob, truth, 4)) == pytest.approx(0.25)
    assert float(calibration_error(prob, truth, 4, "maximum")) == pytest.approx(0.7)


def test_reliability_curve():
    prob = torch.tensor([0.0, 0.2, 0.6, 0.7, 1.0, 0.65])
    truth = torch.tensor([False, True, True, False, True, True])
    curve = reliability(prob, truth, 4)
    nan = float("nan")
    for found, expected in (
        (curve.predicted, [0.1, nan, 0.65, 1.0]),
        (curve.observed, [0.5, nan, 2 / 3, 1.0]),
    ):
        torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    assert curve.voxels.tolist() == [2, 0, 3, 1]
    with pytest.raises(ValueError, match="bins must be at least 1"):
        reliability(prob, truth, 0)


def test_calibration_is_monais(generator):
    calibration = pytest.importorskip(
        "monai.metrics.calibration", reason="needs invsolve[monai]"
    )
    prob = torch.rand(1, 1, 40, 40, generator=generator) ** 2
    truth = torch.rand(prob.shape, generator=generator) < 0.4
    expected = calibration.calibration_binning(prob, truth.float(), 12)
    for found, theirs in zip(reliability(prob, truth, 12), expected, strict=True):
        torch.testing.assert_close(found.to(theirs), theirs.flatten())
    for kind in ("expected", "maximum"):
        metric = calibration.CalibrationErrorMetric(12, calibration_reduction=kind)
        metric(prob, truth.float())
        found = calibration_error(prob, truth, 12, kind)
        torch.testing.assert_close(found, metric.aggregate().squeeze())


def cases(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Exchangeable cases of 12×12 whose probabilities are no good, each in its own way."""
    u = torch.rand(n, 2, 1, 1, generator=generator)
    size, quality = u[:, 0], u[:, 1]
    truth = torch.rand(n, 12, 12, generator=generator) < 0.1 + 0.3 * size
    truth[:, 6, 6] = True
    noise = torch.rand(n, 12, 12, generator=generator)
    return (0.6 * quality * truth.float() + noise) / 2, truth


def missed(prob: Tensor, truth: Tensor, threshold: float) -> Tensor:
    out = (truth & (prob < threshold)).flatten(1).sum(1)
    return out / truth.flatten(1).sum(1)


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.15), (20, 0.2), (40, 0.1)])
def test_no_more_than_alpha_is_missed_on_average(n, alpha, generator):
    """And no less than α − 2/(n+1): the masks are as small as the promise allows."""
    prob, truth = cases(4000, generator)
    losses, splits = [], 300
    for _ in range(splits):
        order = torch.randperm(len(prob), generator=generator)
        known, new = order[:n], order[n : n + 200]
        level = conformal_threshold(list(prob[known]), list(truth[known]), alpha)
        losses.append(float(missed(prob[new], truth[new], level).mean()))
    error = np.std(losses) / splits**0.5
    assert np.mean(losses) < alpha + 2 * error
    assert np.mean(losses) > alpha - 2 / (n + 1) - 2 * error


def test_the_threshold_is_the_largest_that_is_allowed(generator):
    prob, truth = cases(15, generator)
    n, alpha = 15, 0.15
    found = conformal_threshold(list(prob), list(truth), alpha)

    def allowed(threshold: float) -> bool:
        risk = float(missed(prob, truth, threshold).double().mean())
        return n / (n + 1) * risk + 1 / (n + 1) <= alpha

    assert allowed(found)
    every = prob[truth].double().unique()
    assert found == max(v for v in every.tolist() if allowed(v))
    assert not allowed(float(np.nextafter(np.float32(found), np.float32(1))))


def test_with_just_enough_cases_nothing_may_be_missed():
    """n = 1/α − 1: the budget is 0, and λ the lowest true voxel of all cases."""
    probs = [torch.tensor([0.9, 0.3 + k / 100, 0.1]) for k in range(9)]
    truths = [torch.tensor([True, True, False])] * 9
    assert conformal_threshold(probs, truths, 0.1) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="at least 1/alpha - 1 = 9 cases, got 8"):
        conformal_threshold(probs[1:], truths[1:], 0.1)


def test_ties_are_kept_or_missed_together():
    """Half of each case at 0.2, half at 0.8: to miss the former costs ½ of every case."""
    probs = [torch.tensor([0.2, 0.2, 0.8, 0.8])] * 9
    truths = [torch.ones(4, dtype=torch.bool)] * 9
    assert conformal_threshold(probs, truths, 0.54) == pytest.approx(0.2)
    assert conformal_threshold(probs, truths, 0.56) == pytest.approx(0.8)


def test_cases_of_several_sizes_count_alike():
    probs = [torch.rand(5, 5, 5), torch.full((2, 3), 0.4), torch.full((1,), 0.6)]
    truths = [p > 0.9 for p in probs]
    with pytest.raises(ValueError, match="true mask of case 1 is empty"):
        conformal_threshold(probs, truths, 0.5)
    with pytest.raises(ValueError, match="case 0 has another shape"):
        conformal_threshold(probs[:1], [torch.ones(2, dtype=torch.bool)], 0.5)
    truths = [p >= p for p in probs]
    level = conformal_threshold(probs[1:], truths[1:], 0.7)
    assert level == pytest.approx(0.6)  # 0.4 is one whole case of two: (1 + 1)/3 < 0.7
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\)"):
        conformal_threshold(probs, truths, 1.0)


def test_the_interval_is_numpys_weibull(generator):
    values = torch.randn(21, 2, 3, generator=generator)
    for level in (0.5, 0.8, 0.9):
        ends = [(1 - level) / 2, (1 + level) / 2]
        expected = np.quantile(values.numpy(), ends, axis=0, method="weibull")
        for found, want in zip(interval(values, level), expected, strict=True):
            np.testing.assert_allclose(found.numpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "level", "covers"), [(19, 0.9, 0.9), (4, 0.9, 0.6)])
def test_a_further_draw_falls_into_the_interval(n, level, covers, generator):
    """As often as told; into the range of four draws with probability 3/5."""
    draws = torch.randn(n + 1, 40000, generator=generator).exp()
    low, high = interval(draws[:n], level)
    inside = ((low <= draws[n]) & (draws[n] <= high)).float().mean()
    assert float(inside) == pytest.approx(covers, abs=0.01)


def test_the_level_is_a_probability():
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
        interval(torch.ones(3), 1.0)
