"""The probability flow's likelihood against densities that are known."""

import pytest
import torch
from torch import Generator
from torch.testing import assert_close

from invsolve.likelihood import bits_per_dimension, log_likelihood
from invsolve.priors import Affine, AffineMap, GaussianMixturePrior, GaussianPrior
from invsolve.random import rademacher

real = torch.float64
MEAN = torch.tensor([0.5, -0.5, 0.1], dtype=real)
LOW, HIGH = 0.01, 500.0


def diagonal() -> GaussianPrior:
    return GaussianPrior(MEAN, torch.tensor([1.0, 0.3, 2.0]).to(real).diag(), LOW, HIGH)


def exact(prior: GaussianPrior, x: torch.Tensor) -> torch.Tensor:
    cov = prior.cov + LOW**2 * torch.eye(3, dtype=real)
    return torch.distributions.MultivariateNormal(prior.mean, cov).log_prob(x)


def test_independent_pixels(generator: Generator) -> None:
    """Their Jacobian is diagonal, so that one probe tells the trace without error."""
    prior = diagonal()
    x = prior.sample(5, generator=generator)
    got = log_likelihood(prior, x, steps=800, generator=generator)
    assert_close(got, exact(prior, x), rtol=0, atol=5e-3)


def test_it_is_of_second_order(generator: Generator) -> None:
    prior = diagonal()
    x = prior.sample(5, generator=generator)

    def error(steps: int) -> float:
        got = log_likelihood(prior, x, steps=steps, generator=generator)
        return float((got - exact(prior, x)).abs().max())

    assert 3.4 < error(50) / error(100) < 4.6


def test_probes_agree_in_the_mean(generator: Generator) -> None:
    cov = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.2], [0.0, 0.2, 0.5]]).to(real)
    prior = GaussianPrior(MEAN, cov, LOW, HIGH)
    x = prior.sample(1, generator=generator)
    many = log_likelihood(
        prior, x.expand(4000, -1), steps=300, probes=1, generator=generator
    )
    assert_close(many.mean(0, keepdim=True), exact(prior, x), rtol=0, atol=0.06)
    two = log_likelihood(
        prior, x.expand(4000, -1), steps=300, probes=2, generator=generator
    )
    assert 1.8 < float(many.var() / two.var()) < 2.2


def test_a_mixture_in_another_unit(generator: Generator) -> None:
    """p_x(x) = p_u(u)/scale^d, and two modes."""
    weights = torch.tensor([0.3, 0.7], dtype=real)
    means = torch.tensor([[-2.0], [1.0]], dtype=real)
    covs = torch.tensor([[[0.2]], [[0.5]]], dtype=real)
    prior = Affine(
        GaussianMixturePrior(weights, means, covs, LOW, HIGH), AffineMap(3.0, 1.0)
    )
    x = torch.linspace(-8, 8, 9, dtype=real)[:, None]
    u = (x - 1.0) / 3.0
    parts = torch.distributions.Normal(means.T, (covs[:, 0, 0] + LOW**2).sqrt())
    density = (weights * parts.log_prob(u).exp()).sum(1) / 3.0
    got = log_likelihood(prior, x, steps=1500, generator=generator)
    assert_close(got, density.log(), rtol=0, atol=5e-3)


def test_bits() -> None:
    """A uniform density of 1/8 on each of two pixels is three bits for each."""
    log_p = torch.tensor([2.0 * -torch.log(torch.tensor(8.0))])
    assert float(bits_per_dimension(log_p, 2)) == pytest.approx(3.0)


def test_signs(generator: Generator) -> None:
    v = rademacher(torch.zeros(4, 1000, dtype=real), generator)
    assert v.dtype == real and bool((v.abs() == 1).all())
    assert abs(float(v.mean())) < 0.1
