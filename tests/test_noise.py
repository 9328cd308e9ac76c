"""The noise models: their draws, densities and gradients."""

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, operators as ops
from invsolve.operators import GaussianNoise, Noise, PoissonNoise, TransmissionNoise

float64 = torch.float64
N, K = 40_000, 4
"""Draws, and how many standard errors their moments may be off."""

NOISE: dict[str, Noise] = {
    "gaussian": GaussianNoise(0.3),
    "poisson": PoissonNoise(0.5),
    "transmission": TransmissionNoise(1e4),
    "transmission with a floor": TransmissionNoise(1e4, floor=0.02),
}


@pytest.fixture(params=NOISE.values(), ids=list(NOISE))
def noise(request: pytest.FixtureRequest) -> Noise:
    return request.param


def near(mean: Tensor, expected: float, variance: float) -> bool:
    return bool(abs(float(mean) - expected) < K * (variance / N) ** 0.5)


def draws(noise: Noise, z: float, g: Generator) -> Tensor:
    return noise.sample(torch.full((N, 1), z, dtype=float64), generator=g)


def test_gaussian_moments(generator: Generator) -> None:
    z, var = 1.5, 0.3**2
    y = draws(GaussianNoise(0.3), z, generator)
    assert near(y.mean(), z, var)
    assert near(((y - z) ** 2).mean(), var, 2 * var**2)


@pytest.mark.parametrize("z", [0.4, 3.0, 50.0])
def test_poisson_moments(z: float, generator: Generator) -> None:
    gain = 0.5
    y, var = draws(PoissonNoise(gain), z, generator), gain * z
    assert near(y.mean(), z, var)
    assert near(((y - z) ** 2).mean(), var, 2 * var**2 + gain**2 * var)
    assert torch.equal((y / gain).round(), y / gain)


@pytest.mark.parametrize(("counts", "z"), [(1e4, 1.0), (1e3, 3.0), (100.0, 0.0)])
def test_transmission_counts_photons(
    counts: float, z: float, generator: Generator
) -> None:
    y = draws(TransmissionNoise(counts), z, generator)
    n, rate = counts * torch.exp(-y), counts * torch.exp(torch.tensor(-z)).item()
    assert near(n.mean(), rate, rate)
    assert near(((n - rate) ** 2).mean(), rate, 2 * rate**2 + rate)
    assert_close(n, n.round())


def test_transmission_noise_grows_with_the_path(generator: Generator) -> None:
    counts, z = 1e5, 2.0
    y = draws(TransmissionNoise(counts), z, generator)
    rate = counts * torch.exp(torch.tensor(-z)).item()
    assert near(y.mean(), z + 1 / (2 * rate), 1 / rate)  # the delta method
    assert float(y.var()) == pytest.approx(1 / rate, rel=K * (2 / N) ** 0.5)


def test_no_count_is_read_as_one(generator: Generator) -> None:
    noise = TransmissionNoise(100.0)
    dark = torch.full((2, 5), 60.0, dtype=float64)
    expected = torch.full_like(dark, 100.0).log()
    assert_close(noise.sample(dark, generator=generator), expected)
    counts = torch.tensor([0.0, 1.0, 100.0])[None]
    expected = torch.tensor([100.0, 100.0, 1.0]).log()[None]
    assert_close(noise.post_log(counts), expected)


def typical(noise: Noise, g: Generator) -> tuple[Tensor, Tensor]:
    """Measurements, and a z that did not make them."""
    z = 1 + torch.rand(3, 2, 7, dtype=float64, generator=g)
    return noise.sample(z, generator=g), z.flip(0)


def test_the_gradient_is_the_gradient(noise: Noise, generator: Generator) -> None:
    y, z = typical(noise, generator)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(noise.nll(y, z).sum(), z)
    assert_close(noise.nll_grad(y, z), grad)


def test_the_gaussian_gradient_is_that_of_both_parts(generator: Generator) -> None:
    noise = GaussianNoise(0.3)
    y, z = torch.randn(2, 3, 5, dtype=torch.complex128, generator=generator)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(noise.nll(y, z).sum(), z)
    assert_close(noise.nll_grad(y, z), grad)


def test_densities_are_normal_or_poisson(generator: Generator) -> None:
    def law(noise: Noise, log_prob: Tensor, y: Tensor, z: Tensor) -> None:
        constant = noise.nll(y, z) + log_prob.sum(1)
        assert_close(constant, noise.nll(y, z + 1) + shifted.sum(1))

    z = 1 + torch.rand(3, 7, dtype=float64, generator=generator)
    gaussian, poisson = GaussianNoise(0.3), PoissonNoise(0.5)
    ct = TransmissionNoise(50.0)
    y = gaussian.sample(z, generator=generator)
    normal = torch.distributions.Normal
    shifted = normal(z + 1, 0.3).log_prob(y)
    law(gaussian, normal(z, 0.3).log_prob(y), y, z)
    y = poisson.sample(z, generator=generator)
    count = torch.distributions.Poisson
    shifted = count((z + 1) / 0.5).log_prob(y / 0.5)
    law(poisson, count(z / 0.5).log_prob(y / 0.5), y, z)
    y = ct.sample(z, generator=generator)
    n = 50 * torch.exp(-y)
    shifted = count(50 * torch.exp(-z - 1), validate_args=False).log_prob(n)
    law(ct, count(50 * torch.exp(-z), validate_args=False).log_prob(n), y, z)


def test_precision_is_the_curvature_at_the_measurements(
    noise: Noise, generator: Generator
) -> None:
    y, _ = typical(noise, generator)
    if isinstance(noise, PoissonNoise):
        y = y.clamp_min(2 * noise.gain)
    z = y.clone().requires_grad_()
    (curvature,) = torch.autograd.grad(noise.nll_grad(y, z).sum(), z)
    precision = torch.as_tensor(noise.precision(y), dtype=float64).expand_as(y)
    assert_close(precision, curvature)


def test_a_floor_adds_to_the_variance(generator: Generator) -> None:
    counts, floor = 1e4, 0.02
    y, _ = typical(TransmissionNoise(counts), generator)
    variance = 1 / TransmissionNoise(counts, floor=floor).precision(y)
    assert_close(variance, torch.exp(y) / counts + floor**2)


@pytest.mark.parametrize("name", ["gaussian", "poisson", "transmission"])
def test_the_score_has_mean_zero_and_the_variance_of_fisher(
    name: str, generator: Generator
) -> None:
    noise, z0 = NOISE[name], 10.0 if name == "poisson" else 1.0
    z = torch.full((N, 1), z0, dtype=float64)
    score = noise.nll_grad(noise.sample(z, generator=generator), z)
    rate = {"poisson": z0 / 0.5, "transmission": 1e4 * torch.e**-z0}.get(name)
    fisher = {"gaussian": 1 / 0.3**2, "poisson": 1 / (0.5 * z0), "transmission": rate}
    expected = float(fisher[name] or 0)
    fourth = 2 + (1 / rate if rate else 0)  # Var(score²) / Fisher²
    assert near(score.mean(), 0, expected)
    assert near((score**2).mean(), expected, fourth * expected**2)


def test_the_complex_score_has_the_variance_of_fisher(generator: Generator) -> None:
    """σ is that of either part, in the draws as in the density."""
    z = torch.zeros(N, 1, dtype=torch.complex128)
    noise = GaussianNoise(0.3)
    score = noise.nll_grad(noise.sample(z, generator=generator), z)
    for part in (score.real, score.imag):
        assert near((part**2).mean(), 1 / 0.3**2, 2 / 0.3**4)


def test_poisson_gradient_is_bounded_below_one_photon() -> None:
    noise, y = PoissonNoise(0.5), torch.ones(1, 3)
    z = torch.tensor([[-1.0, 0.0, 0.5]])
    assert_close(noise.nll_grad(y, z), torch.full((1, 3), (1 - 1 / 0.5) / 0.5))
    assert_close(noise.precision(torch.zeros(1, 3)), torch.full((1, 3), 1 / 0.5**2))
    assert noise.nll(y[:, :2], z[:, :2]).isposinf().all()
    assert noise.nll(torch.zeros(1, 1), torch.zeros(1, 1)) == 0


def test_same_generator_same_draw(noise: Noise) -> None:
    z = torch.ones(3, 1, 8)
    one, two, other = (
        noise.sample(z, generator=Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_batch_of_two_is_two_singles(noise: Noise) -> None:
    def generators() -> list[Generator]:
        return [Generator().manual_seed(s) for s in (1, 2)]

    z = 1 + torch.arange(32.0).reshape(2, 1, 16) / 32
    a, b = generators()
    singles = [
        noise.sample(z[:1], generator=[a]),
        noise.sample(z[1:], generator=[b]),
    ]
    assert torch.equal(noise.sample(z, generator=generators()), torch.cat(singles))
    y = torch.cat(singles)
    each = [noise.nll(y[i : i + 1], z[i : i + 1]) for i in range(2)]
    assert_close(noise.nll(y, z), torch.cat(each))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_impossible_parameters_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="sigma must be > 0"):
        GaussianNoise(bad)
    with pytest.raises(ValueError, match="gain must be > 0"):
        PoissonNoise(bad)
    with pytest.raises(ValueError, match="counts must be ≥ 1"):
        TransmissionNoise(bad)


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_an_impossible_floor_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="floor must be ≥ 0"):
        TransmissionNoise(1e4, floor=bad)


def test_negative_counts_are_refused() -> None:
    y = torch.tensor([[[[1.0, -2.0]]]])
    with pytest.raises(ValueError, match=r"cannot be negative, but the least is -2"):
        InverseProblem(y, ops.Identity(), PoissonNoise(1.0))
    InverseProblem(y, ops.Identity(), TransmissionNoise(100.0))
