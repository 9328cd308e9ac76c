"""DDRM: each singular direction by its own noise, against its formulas and by its laws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from exact import (
    COV,
    MEAN,
    POSTERIOR_COV,
    PRIOR,
    PROBLEM,
    SIGMA_MAX,
    SIGMA_MIN,
    Matrix,
    chain,
    ddpm_grid,
    eigen_ratios,
    image_prior,
    real,
    with_noise,
)
from torch import Generator, Tensor

from invsolve import InverseProblem, solve
from invsolve.operators import (
    Blur,
    ComplexChannels,
    Downsample,
    Fourier,
    GaussianNoise,
    Identity,
    LinearOperator,
    Mask,
    PoissonNoise,
    RealImage,
)
from invsolve.priors import Affine, AffineMap, GaussianPrior, StationaryPrior
from invsolve.samplers.ddrm import basis, ddrm


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def normal(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- the update


@pytest.mark.parametrize(
    ("steps", "mean", "ratios"),
    [
        (20, (1.3734, -0.0203), (0.6220, 1.1593)),
        (100, (1.4520, 0.1673), (0.3468, 0.7991)),
        (1000, (1.4823, 0.2565), (0.126, 0.784)),
    ],
)
def test_mean_and_covariance_on_the_toy(
    steps: int, mean: tuple[float, float], ratios: tuple[float, float]
) -> None:
    """Against an independent calculation; (1.4615, 0.2692) and (1, 1) are exact."""
    sigmas = ddpm_grid(steps)
    got = chain(ddrm, PROBLEM, PRIOR, len(sigmas) + 1, sigmas=sigmas)
    close(got.mean, real(mean), 6e-5)
    close(eigen_ratios(got.cov, POSTERIOR_COV), real(ratios), 6e-4)
    assert (got.factors[-1] == 0).all()  # the last step adds no noise


@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (1.0, 0.6), (0.0, 0.3)])
def test_it_is_the_published_update(
    eta: float, eta_b: float, generator: Generator
) -> None:
    """One singular value below the noise, one above, one 0, each by its own line."""
    U = torch.linalg.qr(normal(2, 2, generator=generator))[0]
    V = torch.linalg.qr(normal(3, 3, generator=generator))[0]
    values, sigma_y = [2.0, 0.1, 0.0], 0.2
    H = U @ torch.cat([real(values[:2]).diag(), real([[0.0], [0.0]])], 1) @ V.T
    factor = normal(3, 3, generator=generator)
    mean, cov = normal(3, generator=generator), factor @ factor.T
    prior = GaussianPrior(mean, cov, SIGMA_MIN, SIGMA_MAX)
    y, n = normal(2, generator=generator), normal(4, 1, 3, generator=generator)
    problem = InverseProblem(y[None], Matrix(H), GaussianNoise(sigma_y))
    levels = [3.0, 1.0, 0.4, 0.0]  # σ_y/s is 0.1, 2 and infinite
    got = with_noise(
        n, ddrm, problem, prior, sigmas=real(levels[:3]), eta=eta, eta_b=eta_b
    )
    y_bar = U.T @ y
    x = (1 + levels[0] ** 2) ** 0.5 * n[0, 0]
    for k in range(3):
        s, r = levels[k], levels[k + 1]
        D = mean + cov @ torch.linalg.solve(cov + s**2 * torch.eye(3), x - mean)
        D_bar, x_bar, n_bar = V.T @ D, V.T @ x, V.T @ n[k + 1, 0]
        new = torch.zeros(3, dtype=torch.float64)
        for i, value in enumerate(values):
            if value == 0:
                kept = (1 - eta**2) ** 0.5 * r * (x_bar[i] - D_bar[i]) / s
                new[i] = D_bar[i] + kept + eta * r * n_bar[i]
            elif r < sigma_y / value:
                gap = (y_bar[i] / value - D_bar[i]) / (sigma_y / value)
                new[i] = D_bar[i] + (1 - eta**2) ** 0.5 * r * gap + eta * r * n_bar[i]
            else:
                room = (r**2 - eta_b**2 * sigma_y**2 / value**2) ** 0.5
                blend = (1 - eta_b) * D_bar[i] + eta_b * y_bar[i] / value
                new[i] = blend + room * n_bar[i]
        x = V @ new
    close(got[0], x, 1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.85, 1.0])
def test_what_is_not_measured_is_cooled(eta: float) -> None:
    """The covariance tends to (1 + κ)/2 of the prior's, κ = √(1 − η²)."""
    hidden = InverseProblem(
        real([[0.0]]), Matrix(real([[0.0, 0.0]])), GaussianNoise(1.0)
    )
    prior = GaussianPrior(MEAN, COV)
    steps = 800
    sigmas = real(np.geomspace(100.0, 1e-3, steps))
    got = chain(ddrm, hidden, prior, steps + 1, sigmas=sigmas, eta=eta)
    kappa = (1 - eta**2) ** 0.5
    expected = torch.full((2,), (1 + kappa) / 2, dtype=torch.float64)
    close(eigen_ratios(got.cov, COV), expected, 0.015)


def test_data_without_noise_are_fitted(generator: Generator) -> None:
    prior = image_prior(generator)
    A = Downsample(2, (4, 4))
    y = A(prior.sample(3, generator=generator))
    problem = InverseProblem(y, A, GaussianNoise(1e-9))
    x = ddrm(problem, prior, sigma_range=(1e-7, 50.0), generator=generator)
    close(A(x), y, 1e-6)


# --- the singular basis


def gaussian_blur() -> LinearOperator:
    blur = Blur.gaussian(0.7, (4, 4))
    assert isinstance(blur, Blur)
    return Blur(blur.otf.to(torch.complex128))


WEIGHTS = real([[1.0, 0.0, 2.0, 1.0]]).expand(4, 4)
KNOWN: list[tuple[str, int, Callable[[], LinearOperator]]] = [
    ("identity", 1, Identity),
    ("mask", 1, lambda: Mask(WEIGHTS)),
    ("scaled", 1, lambda: -3.0 * Mask(WEIGHTS)),
    ("blur", 1, gaussian_blur),
    ("blocks", 2, lambda: Downsample(2, (4, 4))),
    ("bicubic", 1, lambda: Downsample.bicubic(2, (4, 4))),
    ("scaled bicubic", 1, lambda: 0.5 * Downsample.bicubic(2, (4, 4))),
    ("mri", 2, lambda: Mask(WEIGHTS) @ Fourier() @ ComplexChannels()),
    ("dense, of real images", 1, lambda: Mask(WEIGHTS) @ Fourier() @ RealImage()),
    ("dense", 1, lambda: Downsample(2, (4, 4)) @ gaussian_blur()),
]
bases = pytest.mark.parametrize(
    ("channels", "make"), [c[1:] for c in KNOWN], ids=[c[0] for c in KNOWN]
)


@bases
def test_the_basis_is_the_operator_s(
    channels: int, make: Callable[[], LinearOperator], generator: Generator
) -> None:
    """V S² Vᴴ = AᴴA and V Vᴴ = I, on random images."""
    A, x = make(), normal(3, channels, 4, 4, generator=generator)
    V = basis(A, x)
    close(V.back(V.to(x)), x, 1e-7)
    close(V.back(V.values.double() ** 2 * V.to(x)), A.adjoint(A(x)), 1e-6)


@bases
def test_every_basis_gives_one_answer(
    channels: int, make: Callable[[], LinearOperator], generator: Generator
) -> None:
    """As the operator's matrix does, with the same noise."""
    A, d = make(), channels * 16
    prior = GaussianPrior(
        torch.zeros(channels, 4, 4).double(), torch.eye(d).double() + 0.5
    )
    flat = GaussianPrior(torch.zeros(d).double(), prior.cov)
    columns = A(torch.eye(d, dtype=torch.float64).reshape(d, channels, 4, 4))
    y = A(prior.sample(1, generator=generator))
    if y.is_complex():
        matrix = torch.view_as_real(columns).flatten(1).T
        y_flat = torch.view_as_real(y).flatten(1)
    else:
        matrix, y_flat = columns.flatten(1).T, y.flatten(1)
    noise = GaussianNoise(0.3)
    n = normal(6, 1, channels, 4, 4, generator=generator)
    sigmas = real(np.geomspace(5.0, 0.05, 5))
    got = with_noise(n, ddrm, InverseProblem(y, A, noise), prior, sigmas=sigmas)
    problem = InverseProblem(y_flat, Matrix(matrix), noise)
    expected = with_noise(n.flatten(2), ddrm, problem, flat, sigmas=sigmas)
    close(got.flatten(1), expected, 1e-5)


def test_the_basis_is_found_inside_solve(generator: Generator) -> None:
    """`solve` counts the operator's uses and scales it: too large to go by a matrix."""
    prior = StationaryPrior.matern((80, 80), 3.0)
    mask = (torch.rand(1, 80, 80, generator=generator) < 0.6).double()
    y = mask * prior.sample(2, generator=generator)
    problem = InverseProblem(y, Mask(mask), GaussianNoise(1e-4))
    scaled = Affine(prior, AffineMap(0.5, 0.0))
    solution = solve(problem, scaled, ddrm, samples=2, generator=generator, steps=5)
    assert solution.stats.network_forwards == 2 * 2 * 5
    assert solution.kind == "posterior_sample"
    close(mask * solution.samples, y.expand(2, -1, -1, -1, -1), 0.02)


# --- refusals


@pytest.mark.parametrize(
    "noise", [PoissonNoise(0.1), GaussianNoise(real([[0.1, 0.2]]))], ids=str
)
def test_noise_of_one_sigma_is_needed(noise, generator: Generator) -> None:
    problem = InverseProblem(real([[[[1.0, 2.0]]]]), Identity(), noise)
    with pytest.raises(ValueError, match="noise of one standard deviation"):
        ddrm(problem, PRIOR, generator=generator)


def test_large_operators_without_a_basis_are_refused(generator: Generator) -> None:
    A = Blur.gaussian(2.0, (80, 80), edges="reflect")
    problem = InverseProblem(torch.ones(1, 1, 80, 80), A, GaussianNoise(0.1))
    with pytest.raises(ValueError, match=r"singular vectors of Compose.*use dds"):
        ddrm(problem, PRIOR, generator=generator)


def test_complex_images_are_refused(generator: Generator) -> None:
    y = torch.ones(1, 1, 4, 4, dtype=torch.complex64)
    problem = InverseProblem(y, Fourier(), GaussianNoise(0.1))
    with pytest.raises(ValueError, match="real images: write A @ ComplexChannels"):
        ddrm(problem, PRIOR, generator=generator)


# --- laws


def inpainting(generator: Generator) -> tuple[InverseProblem, GaussianPrior]:
    prior = image_prior(generator)
    mask = (torch.rand(1, 4, 4, generator=generator) < 0.6).double()
    y = mask * prior.sample(2, generator=generator)
    return InverseProblem(y, Mask(mask), GaussianNoise(0.1)), prior


def seeded(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def test_a_batch_of_two_is_two_singles(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    both = ddrm(problem, prior, generator=seeded(3, 4))
    second = problem.items(torch.tensor([1]))
    close(both[1:], ddrm(second, prior, generator=seeded(4)))
    assert torch.equal(both, ddrm(problem, prior, generator=seeded(3, 4)))
    assert not torch.equal(both, ddrm(problem, prior, generator=seeded(3, 5)))


def test_what_the_mask_hides_does_not_matter(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    assert isinstance(problem.operator, Mask)
    y = torch.where(problem.operator.mask == 0, 9.0, problem.y)
    other = InverseProblem(y, problem.operator, problem.noise)
    a, b = (ddrm(p, prior, generator=seeded(0, 1)) for p in (problem, other))
    assert torch.equal(a, b)
