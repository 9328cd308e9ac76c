"""Gaussian fields: image-sized priors whose posteriors are known."""

import pytest
import torch
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.operators import Blur, GaussianNoise
from invsolve.priors import GaussianPrior, StationaryPrior
from invsolve.samplers import mmps
from invsolve.samplers.solvers import Multistep

SHAPE = (6, 8)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def field(generator: Generator) -> StationaryPrior:
    power = StationaryPrior.matern(SHAPE, 1.5).spectrum
    mean = torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64)
    return StationaryPrior(mean, power)


def dense(prior: StationaryPrior) -> GaussianPrior:
    """The same prior by its covariance matrix, column by column."""
    d = prior.mean.numel()
    unit = torch.eye(d, dtype=torch.float64).reshape(d, *prior.mean.shape)
    columns = torch.fft.ifft2(prior.spectrum * torch.fft.fft2(unit)).real
    return GaussianPrior(prior.mean, columns.reshape(d, d))


def blur() -> Blur:
    made = Blur.gaussian(0.8, SHAPE)
    assert isinstance(made, Blur)
    return Blur(made.otf.to(torch.complex128))


def test_it_is_the_gaussian_prior_of_its_matrix(generator: Generator) -> None:
    prior = field(generator)
    other = dense(prior)
    x = torch.randn(3, *prior.mean.shape, generator=generator, dtype=torch.float64)
    for sigma in (torch.tensor(0.3).double(), torch.tensor([0.1, 1.0, 5.0]).double()):
        close(prior.denoise(x, sigma), other.denoise(x, sigma))
        close(prior.log_density(x, sigma), other.log_density(x, sigma), 1e-8)


def test_its_posterior_is_that_of_its_matrix(generator: Generator) -> None:
    prior, A = field(generator), blur()
    y = torch.randn(1, 1, *SHAPE, generator=generator, dtype=torch.float64)
    matrix = A(torch.eye(48, dtype=torch.float64).reshape(48, 1, *SHAPE)).flatten(1).T
    expected = dense(prior).posterior(matrix, y.flatten(), 0.2)
    got = prior.posterior(A.otf, y[0], 0.2)
    close(got.mean, expected.mean, 1e-7)
    close(dense(got).cov, expected.cov, 1e-7)
    evidence = dense(prior).evidence(matrix, y.flatten(), 0.2)
    close(prior.evidence(A.otf, y[0], 0.2), evidence, 1e-8)


def test_its_draws_have_its_covariance(generator: Generator) -> None:
    prior = field(generator)
    n = 20_000
    x = (prior.sample(n, generator=generator) - prior.mean).flatten(1)
    cov = dense(prior).cov
    v = cov.diagonal()
    error = ((v[:, None] * v + cov**2) / n).sqrt()
    assert ((x.T @ x / n - cov).abs() <= 5.5 * error).all()


def test_pixels_have_the_asked_spread() -> None:
    prior = StationaryPrior.matern((32, 32), 4.0, std=0.7)
    assert float(prior.spectrum.mean()) == pytest.approx(0.49)


def test_image_sized_deblurring_is_exact() -> None:
    """128² pixels: a draw is as far from the posterior's mean as its spread says."""
    shape = (128, 128)
    prior = StationaryPrior.matern(shape, 5.0)
    g = Generator().manual_seed(0)
    A = Blur.gaussian(2.0, shape)
    assert isinstance(A, Blur)
    A = Blur(A.otf.to(torch.complex128))
    truth = prior.sample(1, generator=g)
    noise = 0.1 * torch.randn(truth.shape, generator=g, dtype=torch.float64)
    problem = InverseProblem(A(truth) + noise, A, GaussianNoise(0.1))
    posterior = prior.posterior(A.otf, problem.y[0], 0.1)
    sigmas = torch.logspace(2, -3, 40, dtype=torch.float64)
    x = mmps(
        problem,
        prior,
        sigmas=sigmas,
        solver=Multistep(2),
        cg_steps=60,
        rtol=1e-10,
        generator=g,
    )
    spread = (x - posterior.mean).square().mean().sqrt()
    expected = posterior.spectrum.mean().sqrt()
    assert float(spread / expected) == pytest.approx(1.0, abs=0.05)
    seen = prior.mean + torch.fft.ifft2(A.otf * torch.fft.fft2(x)).real
    ratio = float((seen - problem.y).square().mean() / 0.1**2)
    assert ratio == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("spectrum", "says"),
    [
        (-torch.ones(4, 4), "at least 0"),
        (torch.arange(16.0).reshape(4, 4), "the same at −f"),
    ],
)
def test_what_is_no_spectrum_is_refused(spectrum: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StationaryPrior(torch.zeros(1, 4, 4), spectrum)
