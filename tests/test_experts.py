"""Two priors, each at the noise levels where it knows more."""

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, samplers, solve
from invsolve.operators import GaussianNoise, Identity
from invsolve.priors import Affine, AffineMap, Experts, GaussianPrior, Prior

SHAPE = (1, 3, 3)


def white(variance: float, low: float, high: float, scale: float = 1.0) -> Prior:
    prior = GaussianPrior(torch.zeros(SHAPE), variance * torch.eye(9), low, high)
    return Affine(prior, AffineMap(scale, 0.0))


def images(n: int) -> Tensor:
    return torch.randn(n, *SHAPE, generator=Generator().manual_seed(0))


def test_each_is_asked_at_its_own_levels() -> None:
    """D = v/(v + σ²) x, with v = 1 below σ = 0.5 and v = 4 from there on."""
    both = Experts(white(1.0, 0.01, 2.0), white(4.0, 0.1, 20.0), at=0.5)
    assert (both.sigma_min, both.sigma_max) == (0.01, 20.0)
    x, sigmas = images(4), torch.tensor([0.2, 0.5, 3.0, 0.4])
    v = torch.tensor([1.0, 4.0, 4.0, 1.0])
    expected = (v / (v + sigmas**2))[:, None, None, None] * x
    assert_close(both.denoise(x, sigmas), expected)
    for i in range(4):
        assert_close(both.denoise(x[i : i + 1], sigmas[i]), expected[i : i + 1])


def test_the_level_between_them_has_a_unit() -> None:
    """In the prior's range σ is smaller by the scale, and so is the level."""
    both = Experts(white(1.0, 0.01, 2.0, 0.02), white(4.0, 0.1, 20.0, 0.02), at=0.01)
    inner, map = both.normalised
    assert isinstance(inner, Experts) and map.scale == 0.02
    assert inner.at == pytest.approx(0.5) and inner.sigma_max == 20.0
    x = images(1)
    for level in (0.3, 0.7):
        sigma = torch.tensor(level)
        assert_close(
            map(inner.denoise(x, sigma)), both.denoise(map(x), map.scale * sigma)
        )


def test_two_that_are_one_give_its_solution() -> None:
    """And a solve's levels fall through both."""
    prior = white(2.0, 0.01, 20.0)
    problem = InverseProblem(images(2), Identity(), GaussianNoise(0.5))

    def run(given: Prior) -> Tensor:
        g = Generator().manual_seed(1)
        return solve(problem, given, samplers.dds, steps=8, generator=g).samples

    assert torch.equal(run(Experts(prior, prior, at=0.5)), run(prior))
    other = Experts(prior, white(0.1, 0.01, 20.0), at=0.5)
    assert not torch.allclose(run(other), run(prior), atol=1e-3)


def test_what_cannot_go_together() -> None:
    with pytest.raises(ValueError, match="different ranges"):
        Experts(white(1.0, 0.01, 2.0), white(1.0, 0.01, 2.0, 0.02), at=0.5)
    for at in (0.005, 30.0):
        with pytest.raises(ValueError, match="would never be asked"):
            Experts(white(1.0, 0.01, 2.0), white(4.0, 0.1, 20.0), at=at)
    both = Experts(white(1.0, 0.01, 2.0), white(4.0, 0.1, 20.0), at=0.5)
    both.check(SHAPE)
