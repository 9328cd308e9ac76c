"""Masks as a prior: exact where the mask's posterior is known."""

from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from invsolve import InverseProblem, operators as ops, samplers, solve
from invsolve.grids import Grid
from invsolve.samplers import unconditional
from invsolve.samplers.solvers import DDIM
from invsolve.segmentation.cases import Case
from invsolve.segmentation.masks import RARE, MaskPrior, bell, windows
from invsolve.segmentation.segmenter import Segmenter, Unaware, segment_case


def known(probability: Tensor) -> Unaware:
    """A network that says each voxel's probability, whatever the mask around is."""
    return Unaware(lambda images: probability.logit().expand_as(images) - RARE)


class Templates:
    """The exact F of p(m) = Σ w_k δ(m − t_k): the logit of a voxel given all others."""

    def __init__(self, templates: Tensor, weights: Tensor) -> None:
        self.templates, self.weights = templates, weights

    def __call__(self, x: Tensor, c_noise: Tensor, condition: Tensor) -> Tensor:
        sigma = (4 * c_noise).exp().reshape(-1, *(1,) * (x.ndim - 1))
        m = x * (1 + sigma**2).sqrt()
        t = self.templates.flatten(1).double()
        m_flat, s = m.flatten(1).double(), sigma.reshape(-1, 1).double()
        distance = (m_flat[:, None] - t[None]).square()  # (batch, k, voxels)
        every = distance.sum(2, keepdim=True)
        log_w = self.weights.double().log()[None, :, None]
        others = log_w - (every - distance) / (2 * s[:, :, None] ** 2)
        inside = t[None] > 0
        of = torch.where(inside, others, -torch.inf).logsumexp(1)
        out = torch.where(inside, -torch.inf, others).logsumexp(1)
        return (of - out - RARE).clamp(-60, 60).reshape(x.shape).float()


@pytest.fixture
def templates() -> Tensor:
    t = -torch.ones(4, 1, 6, 6)
    for k in range(4):
        t[k, :, :, : 1 + k] = 1  # nested: voxels of the last column are never inside
    return t


WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])


def of_templates(templates: Tensor, **options) -> MaskPrior:
    images = torch.zeros(1, 6, 6)
    return MaskPrior(
        Templates(templates, WEIGHTS), images, sigma_min=0.3, sigma_max=40.0, **options
    )


def test_denoiser_is_bayes_rule_for_independent_voxels(generator):
    p = torch.rand(1, 1, 4, 5, generator=generator)
    prior = MaskPrior(known(p), torch.zeros(1, 4, 5), sigma_min=0.1, sigma_max=10.0)
    for sigma in (0.5, 1.0, 7.0):
        x = torch.randn(3, 1, 4, 5, generator=generator)
        up = p * torch.exp(-((x - 1) ** 2) / (2 * sigma**2))
        down = (1 - p) * torch.exp(-((x + 1) ** 2) / (2 * sigma**2))
        expected = (up - down) / (up + down)
        found = prior.denoise(x, torch.tensor(sigma))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_denoiser_of_templates_is_their_posterior_mean(templates, generator):
    prior = of_templates(templates)
    for sigma in (0.7, 2.0, 6.0):
        x = templates[1:2] + sigma * torch.randn(1, 1, 6, 6, generator=generator)
        d = (x - templates).flatten(1).square().sum(1)
        w = (WEIGHTS.log() - d / (2 * sigma**2)).softmax(0)
        expected = (w[:, None, None, None] * templates).sum(0, keepdim=True)
        found = prior.denoise(x, torch.tensor(sigma))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_draws_have_the_modes_frequencies(templates):
    # 20 steps of DDIM: the spec's total variation is 0.013, and a sample's of 600
    # draws from the truth about 0.03.
    like = torch.zeros(600, 1, 6, 6)
    m = unconditional(
        of_templates(templates),
        like,
        steps=20,
        solver=DDIM(),
        generator=Generator().manual_seed(0),
    )
    gap = (m[:, None] - templates[None]).abs().flatten(2).amax(2)
    # Every draw is one of the masks, whole; one in some hundreds stops between two.
    assert (gap.min(1).values < 0.01).float().mean() > 0.99
    frequency = torch.bincount(gap.argmin(1), minlength=4) / len(m)
    assert 0.5 * (frequency - WEIGHTS).abs().sum() < 0.07


def test_first_pass_is_the_marginal_probability(templates):
    prior = of_templates(templates)
    marginal = ((templates + 1) / 2 * WEIGHTS[:, None, None, None]).sum(0)
    sigma = torch.tensor(4000.0)
    n = sigma * torch.randn(1, 1, 6, 6, generator=Generator().manual_seed(0))
    found = (1 + prior.denoise(n, sigma)[0]) / 2
    torch.testing.assert_close(found, marginal, rtol=0, atol=5e-3)


def test_scribbles_are_measurements(templates):
    # One voxel of the third column is marked as inside: the two narrower masks are out,
    # and the two others are left at 2 : 1.
    seen = torch.zeros(1, 6, 6)
    seen[0, 2, 2] = 1
    A = ops.Mask(seen)
    y = A(torch.ones(1, 1, 6, 6))
    problem = InverseProblem(y, A, ops.GaussianNoise(0.05))
    solution = solve(
        problem,
        of_templates(templates),
        samplers.mmps,
        samples=100,
        steps=16,
        generator=Generator().manual_seed(0),
    )
    masks = solution.samples[:, 0]
    gap = (masks[:, None] - templates[None]).abs().flatten(2).mean(2)
    frequency = torch.bincount(gap.argmin(1), minlength=4) / 100
    assert frequency[:2].sum() == 0
    # 100 draws of a fair 2 : 1 are within 0.15 of it but one time in six hundred.
    assert float(frequency[2]) == pytest.approx(2 / 3, abs=0.15)


def test_windows_cover_every_voxel_and_overlap():
    for n in (8, 24, 25, 40, 41, 100):
        boxes = [b[0] for b in windows((n,), 24, 8)]
        covered = torch.zeros(n + 24)
        for box in boxes:
            covered[box] += 1
            assert (box.stop - box.start) % 8 == 0 and box.stop - box.start <= 24
        assert (covered[:n] > 0).all()
        for a, b in pairwise(boxes):
            assert a.stop - b.start >= 6


def test_windows_give_what_the_whole_gives_where_the_network_is_local(generator):
    # Logits of the voxel's own image value: no window can change them.
    net = Unaware(lambda images: 3 * images)
    images = torch.randn(1, 30, 17, 9, generator=generator)
    options = {"sigma_min": 0.3, "sigma_max": 10.0, "multiple_of": 4}
    whole = MaskPrior(net, images, **options)
    parts = MaskPrior(net, images, window=12, **options)
    x = torch.randn(2, 1, 30, 17, 9, generator=generator)
    sigma = torch.tensor([0.7, 3.0])
    torch.testing.assert_close(parts.denoise(x, sigma), whole.denoise(x, sigma))


def test_windows_that_share_a_draw_agree_more_than_alone():
    # Two masks of a strip of 12, all inside or all outside, of which a window sees 8.
    # Windows drawn one by one would agree half of the time; fused at every level they
    # share noise and mask in their overlap. Nothing forces them to agree.
    both = torch.stack([torch.ones(1, 12), -torch.ones(1, 12)])
    half = torch.tensor([0.5, 0.5])

    def strip(x: Tensor, c_noise: Tensor, condition: Tensor) -> Tensor:
        return Templates(both[..., : x.shape[-1]], half)(x, c_noise, condition)

    prior = MaskPrior(
        strip, torch.zeros(1, 12), sigma_min=0.3, sigma_max=20.0, window=8
    )
    m = unconditional(
        prior,
        torch.zeros(400, 1, 12),
        steps=20,
        solver=DDIM(),
        generator=Generator().manual_seed(0),
    )
    agree = (m[..., 0].sign() == m[..., -1].sign()).float().mean()
    assert 0.7 < agree < 0.95
    assert 0.4 < (m[..., 0] > 0).float().mean() < 0.6


def test_bell_is_symmetric_and_positive():
    w = bell([6, 8])
    torch.testing.assert_close(w, w.flip(0, 1))
    assert w.min() > 0 and w.argmax() in (2 * 8 + 3, 2 * 8 + 4, 3 * 8 + 3, 3 * 8 + 4)


# --- labels of which a voxel has one at most


def test_exclusive_labels_are_bayes_rule_for_independent_voxels(generator):
    """Of none and of each label: the likelihood of all of the voxel's noisy values."""
    p = torch.rand(1, 4, 3, 5, generator=generator)
    p = p / p.sum(1, keepdim=True)  # none, and three labels
    F = (p[:, 1:] / p[:, :1]).log()
    net = Unaware(lambda images: F - RARE)
    images = torch.zeros(1, 3, 5)
    prior = MaskPrior(net, images, sigma_min=0.1, sigma_max=10.0, exclusive=True)
    corners = 2 * torch.cat([torch.zeros(1, 3), torch.eye(3)]) - 1
    for sigma in (0.5, 1.0, 7.0):
        x = torch.randn(1, 3, 3, 5, generator=generator)
        gap = (x - corners[:, :, None, None]).square().sum(1)  # (1 + labels, *space)
        posterior = (p[0].log() - gap / (2 * sigma**2)).softmax(0)
        expected = 2 * posterior[1:] - 1
        found = prior.denoise(x, torch.tensor(sigma))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_exclusive_label_is_one_label(generator):
    images = torch.randn(1, 6, 6, generator=generator)
    x = torch.randn(1, 1, 6, 6, generator=generator)
    one, other = (
        MaskPrior(
            Unaware(lambda seen: 3 * seen),
            images,
            sigma_min=0.1,
            sigma_max=10.0,
            exclusive=exclusive,
        ).denoise(x, torch.tensor(2.0))
        for exclusive in (False, True)
    )
    torch.testing.assert_close(one, other)


def test_draws_of_exclusive_labels_do_not_overlap():
    # Three labels of a third each: drawn one by one, two would meet in 26 % of voxels.
    net = Unaware(lambda images: (20.0 - RARE) + 0 * images.expand(-1, 3, -1, -1, -1))
    card = {
        "labels": ["a", "b", "c"],
        "modalities": ["pet"],
        "exclusive": True,
        "sigma_min": 0.3,
        "sigma_max": 20.0,
    }
    drawn = segment_case(
        toy_case(),
        Segmenter(net, card, 4),
        samples=2,
        generator=Generator().manual_seed(0),
    )
    assert int(drawn.samples.sum(1).max()) == 1
    torch.testing.assert_close(
        drawn.samples.float().mean((0, 2, 3, 4)),
        torch.full((3,), 1 / 3),
        rtol=0,
        atol=0.05,
    )


# --- segment


def toy_segmenter(logit: float = 3.0) -> Segmenter:
    card = {
        "labels": ["tumour"],
        "modalities": ["pet"],
        "sigma_min": 0.3,
        "sigma_max": 20.0,
    }
    return Segmenter(Unaware(lambda images: logit * (images - 1) - RARE), card, 4)


def toy_case() -> Case:
    pet = torch.zeros(10, 9, 8)
    pet[3:7, 2:6, 2:6] = 30.0
    grid = Grid((10, 9, 8), np.diag([-4.0, -4.0, 4.0, 1.0]))
    return Case("toy", {"ct": torch.zeros(10, 9, 8), "pet": pet}, None, grid)


def test_segment_draws_what_the_network_says():
    result = segment_case(
        toy_case(), toy_segmenter(), samples=40, generator=Generator().manual_seed(0)
    )
    inside = 1 / (1 + torch.exp(torch.tensor(-3.0 * (log(31) - 1))))
    outside = 1 / (1 + torch.exp(torch.tensor(3.0)))
    assert result.expected[0, 4, 4, 4] == pytest.approx(float(inside), abs=5e-3)
    # 576 of 720 voxels are outside, each 40 times: their mean is known to 0.002.
    hot = toy_case().scans["pet"] > 1
    assert float(result.prob[0][~hot].mean()) == pytest.approx(float(outside), abs=0.01)
    assert result.volumes_ml.shape == (40, 1)
    assert result.grid.voxel_ml == pytest.approx(0.064)
    assert result.passes == 1 + 40 * 20


def test_draws_do_not_depend_on_the_chunk_nor_on_how_many_there_are():
    few = [
        segment_case(
            toy_case(),
            toy_segmenter(),
            samples=samples,
            chunk=chunk,
            generator=Generator().manual_seed(3),
        ).probabilities
        for samples, chunk in ((2, 1), (2, 2), (3, 2))
    ]
    torch.testing.assert_close(few[0], few[1])
    torch.testing.assert_close(few[0], few[2][:2])


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be at least 10"):
        segment_case(
            toy_case(), toy_segmenter(), steps=5, generator=Generator().manual_seed(0)
        )
