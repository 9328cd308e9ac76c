"""Simulated measurements: finer than the model, and without its errors."""

from dataclasses import replace
from math import exp, pi

import pytest
import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d
from torch.testing import assert_close

from invsolve import operators as ops
from invsolve.simulate import line_integrals, measure, refine

float64 = torch.float64
ANGLES = torch.linspace(0, pi, 9, dtype=float64)[:-1]


def blob(n: int, pixel: float, width: float) -> Tensor:
    t = (torch.arange(n, dtype=float64) - (n - 1) / 2) * pixel
    return torch.exp(-(t[:, None] ** 2 + t[None] ** 2) / (2 * width**2))[None, None]


def disc(n: int, radius: float) -> Tensor:
    t = (torch.arange(8 * n, dtype=float64) - (8 * n - 1) / 2) / 8
    inside = (t[:, None] ** 2 + t[None] ** 2 <= radius**2).double()
    return avg_pool2d(inside[None, None], 8)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_block_means_are_the_image(factor: int, generator: Generator) -> None:
    x = torch.rand(2, 1, 12, 10, dtype=float64, generator=generator)
    fine = refine(x, factor)
    assert fine.shape == (2, 1, 12 * factor, 10 * factor)
    assert_close(avg_pool2d(fine, factor), x, rtol=0, atol=1e-4)
    assert_close(fine[1:], refine(x[1:], factor))


def test_a_smooth_image_stays_smooth() -> None:
    x = blob(24, 1.0, 4.0)
    expected = blob(72, 1 / 3, 4.0)
    steps = x.repeat_interleave(3, -1).repeat_interleave(3, -2)
    error = (refine(x, 3) - expected).norm()
    assert float(error) < 0.2 * float((steps - expected).norm())


def test_a_constant_stays_constant() -> None:
    x = torch.full((1, 1, 5, 6), 3.0, dtype=float64)
    assert_close(refine(x, 3), torch.full((1, 1, 15, 18), 3.0, dtype=float64))


def test_a_factor_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        refine(torch.ones(1, 1, 4, 4), 0)


def test_factor_one_is_the_model(generator: Generator) -> None:
    A = ops.ParallelBeam((12, 10), ANGLES)
    x = torch.rand(2, 1, 12, 10, dtype=float64, generator=generator)
    assert_close(line_integrals(x, A, 1), A(x))


@pytest.mark.parametrize("factor", [2, 3])
def test_line_integrals_of_a_disc_are_its_chords(factor: int) -> None:
    n, radius, mu = 48, 16.0, 0.02
    A = ops.ParallelBeam((n, n), ANGLES)
    s = torch.arange(A.detectors, dtype=float64) - (A.detectors - 1) / 2
    expected = 2 * mu * (radius**2 - s**2).clamp_min(0).sqrt().expand(len(ANGLES), -1)
    x = mu * disc(n, radius)
    simulated, model = line_integrals(x, A, factor)[0, 0], A(x)[0, 0]
    assert float((simulated - expected).norm() / expected.norm()) < 0.02
    difference = float((simulated - model).norm() / model.norm())
    assert 1e-3 < difference < 0.05  # near the model, but not the model: no crime


def test_what_is_measured_is_not_what_the_solver_thinks_of_it(
    generator: Generator,
) -> None:
    A = ops.ParallelBeam((12, 10), ANGLES)
    x = torch.rand(2, 1, 12, 10, dtype=float64, generator=generator)
    expected = line_integrals(x, A, 3)
    assert_close(line_integrals(x, replace(A, oversample=2, rays=2), 3), expected)


def test_an_element_averages_intensity_not_attenuation() -> None:
    """Half an element behind lead sees half the light."""
    x = torch.tensor([[[[50.0, 0.0]]]], dtype=float64)
    A = ops.ParallelBeam((1, 2), torch.zeros(1), detectors=1, detector_mm=2.0)
    seen = torch.exp(-line_integrals(x, A, 2)).item()
    assert exp(-25.0) * 1e6 < seen < 0.6


def test_the_same_generator_measures_the_same() -> None:
    A, noise = ops.ParallelBeam((12, 12), ANGLES), ops.TransmissionNoise(1e4)
    x = 0.02 * disc(12, 4.0)

    def draw(seed: int) -> Tensor:
        return measure(x, A, noise, generator=Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    z = line_integrals(x, A, 3)
    assert_close(draw(1), noise.sample(z, generator=Generator().manual_seed(1)))
