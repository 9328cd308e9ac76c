from typing import Any

import numpy as np
import pytest
import torch

from invsolve.metrics import body_mask, psnr, ssim
from invsolve.units import hu_to_mu


def structural_similarity(*args, **options) -> Any:
    from skimage.metrics import structural_similarity

    return structural_similarity(*args, **options)


@pytest.fixture
def pair(generator):
    truth = torch.rand(3, 1, 16, 20, generator=generator)
    return truth + 0.1 * torch.randn(truth.shape, generator=generator), truth


def test_psnr_is_its_definition(pair):
    x, truth = pair
    expected = [
        10 * np.log10(4.0 / np.mean((a - b) ** 2))
        for a, b in zip(x.numpy(), truth.numpy(), strict=True)
    ]
    np.testing.assert_allclose(psnr(x, truth, 2.0).numpy(), expected, rtol=1e-5)


def test_psnr_of_a_constant_error():
    truth = torch.zeros(1, 1, 8, 8)
    torch.testing.assert_close(psnr(truth + 0.1, truth, 1.0), torch.tensor([20.0]))


def test_psnr_sees_only_the_mask(pair):
    x, truth = pair
    mask = torch.zeros(truth.shape, dtype=torch.bool)
    mask[..., :5] = True
    spoiled = torch.where(mask, x, x + 100)
    torch.testing.assert_close(
        psnr(spoiled, truth, 1.0, mask), psnr(x[..., :5], truth[..., :5], 1.0)
    )


def test_ssim_is_scikit_images(pair):
    x, truth = pair
    expected = [
        structural_similarity(a[0], b[0], data_range=1.5)
        for a, b in zip(x.double().numpy(), truth.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ssim(x, truth, 1.5).numpy(), expected, rtol=1e-5)


def test_ssim_averages_its_map_over_the_mask(pair):
    x, truth = pair
    mask = torch.zeros(truth.shape, dtype=torch.bool)
    mask[..., 4:9, 3:7] = True
    _, full = structural_similarity(
        x[1, 0].double().numpy(), truth[1, 0].double().numpy(), data_range=1, full=True
    )
    found = float(ssim(x, truth, 1.0, mask)[1])
    assert found == pytest.approx(full[4:9, 3:7].mean(), rel=1e-5)


def test_ssim_of_the_truth_is_one(pair):
    _, truth = pair
    torch.testing.assert_close(ssim(truth, truth, 1.0), torch.ones(3))


def test_the_body_is_the_largest_part_with_its_holes_filled():
    hu = torch.full((1, 1, 20, 20), -1000.0)
    hu[..., 3:12, 3:12] = 0.0
    hu[..., 6:8, 6:8] = -900.0  # an airway
    hu[..., 16:18, 2:18] = 100.0  # the couch
    expected = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    expected[..., 3:12, 3:12] = True
    assert torch.equal(body_mask(hu_to_mu(hu)), expected)


def test_without_a_body_all_counts():
    assert body_mask(torch.zeros(2, 1, 8, 8)).all()


def test_what_cannot_be_compared_is_refused(pair):
    x, truth = pair
    with pytest.raises(ValueError, match="data_range must be > 0"):
        psnr(x, truth, 0.0)
    with pytest.raises(ValueError, match="mask is empty"):
        psnr(x, truth, 1.0, torch.zeros(truth.shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least 7×7"):
        ssim(x[..., :6], truth[..., :6], 1.0)
