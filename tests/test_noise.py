"""The noise models: their draws, densities and gradients."""

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, operators as ops
from invsolve.operators import GaussianNoise, Noise, PoissonNoise, TransmissionNoise
from invsolve.operators.noise import RicianNoise

float64 = torch.float64
N, K = 40_000, 4
"""Draws, and how many standard errors their moments may be off."""

NOISE: dict[str, Noise] = {
    "gaussian": GaussianNoise(0.3),
    "poisson": PoissonNoise(0.5),
    "transmission": TransmissionNoise(1e4),
    "transmission with a floor": TransmissionNoise(1e4, floor=0.02),
    "transmission with electronics": TransmissionNoise(1e4, electronic=30.0),
    "rician": RicianNoise(0.3),
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


@pytest.mark.parametrize("name", [name for name in NOISE if name != "rician"])
def test_precision_is_the_curvature_at_the_measurements(
    name: str, generator: Generator
) -> None:
    noise = NOISE[name]
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
    with pytest.raises(ValueError, match="sigma must be > 0"):
        RicianNoise(bad)


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_an_impossible_floor_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="floor must be ≥ 0"):
        TransmissionNoise(1e4, floor=bad)
    with pytest.raises(ValueError, match="electronic must be ≥ 0 photons"):
        TransmissionNoise(1e4, electronic=bad)


def test_negative_counts_are_refused() -> None:
    y = torch.tensor([[[[1.0, -2.0]]]])
    with pytest.raises(ValueError, match=r"cannot be negative, but the least is -2"):
        InverseProblem(y, ops.Identity(), PoissonNoise(1.0))
    InverseProblem(y, ops.Identity(), TransmissionNoise(100.0))


# --- a σ for each channel or measurement

EACH = [
    pytest.param(torch.tensor([0.1, 2.0])[:, None, None], id="channels"),
    pytest.param(torch.linspace(0.1, 2.0, 24).reshape(2, 3, 4), id="measurements"),
    pytest.param(torch.linspace(0.1, 2.0, 4), id="last axis"),
]


@pytest.mark.parametrize("sigma", EACH)
@pytest.mark.parametrize("dtype", [float64, torch.complex128], ids=str)
def test_each_sigma_is_a_scalar_s_law_in_its_place(
    sigma: Tensor, dtype: torch.dtype, generator: Generator
) -> None:
    y, z = torch.randn(2, 5, 2, 3, 4, dtype=dtype, generator=generator)
    noise, all_of_them = GaussianNoise(sigma), sigma.double().expand(2, 3, 4)
    nll = torch.zeros(5, dtype=float64)
    grad, precision = torch.zeros_like(z), torch.zeros(2, 3, 4, dtype=float64)
    for at in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))):
        i = (slice(None), *at)
        one = GaussianNoise(float(all_of_them[*at]))
        nll += one.nll(y[i][:, None], z[i][:, None])
        grad[i] = one.nll_grad(y[i][:, None], z[i][:, None])[:, 0]
        precision[*at] = torch.as_tensor(one.precision(y[i]))
    assert_close(noise.nll(y, z), nll, rtol=1e-6, atol=0)
    assert_close(noise.nll_grad(y, z), grad, rtol=1e-6, atol=0)
    got = torch.as_tensor(noise.precision(y)).expand(2, 3, 4)
    assert_close(got, precision, rtol=1e-6, atol=0)
    one_draw, unit = (
        n.sample(z, generator=Generator().manual_seed(1))
        for n in (noise, GaussianNoise(1.0))
    )
    assert_close(one_draw - z, all_of_them * (unit - z))
    InverseProblem(y, ops.Identity(), noise)


def test_one_sigma_in_a_tensor_is_that_number() -> None:
    assert GaussianNoise(torch.tensor(0.5)) == GaussianNoise(0.5)
    assert GaussianNoise(torch.tensor([[0.5]])) == GaussianNoise(0.5)


def test_a_float32_image_stays_one_whatever_sigma_is() -> None:
    noise = GaussianNoise(torch.ones(2, 1, dtype=float64))
    y = torch.zeros(3, 2, 4)
    assert noise.sample(y, generator=Generator()).dtype == torch.float32
    assert noise.nll_grad(y, y).dtype == noise.nll(y, y).dtype == torch.float32


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_one_impossible_sigma_is_enough(bad: float) -> None:
    with pytest.raises(ValueError, match="sigma must be > 0"):
        GaussianNoise(torch.tensor([1.0, bad]))


def test_infinite_sigmas_are_refused() -> None:
    for bad in (float("inf"), torch.tensor([1.0, float("inf")])):
        with pytest.raises(ValueError, match="sigma must be finite"):
            GaussianNoise(bad)


@pytest.mark.parametrize("shape", [(3,), (2,), (5, 2, 3, 4), (3, 1, 1), (2, 3, 5)])
def test_sigmas_of_other_measurements_are_refused(shape: tuple[int, ...]) -> None:
    y = torch.zeros(5, 2, 3, 4)
    noise = GaussianNoise(1 + torch.rand(shape, generator=Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"one a channel is \(channels, 1, 1\)"):
        InverseProblem(y, ops.Identity(), noise)


def test_noise_moves_with_its_tensors(noise: Noise) -> None:
    cpu = torch.device("cpu")
    assert noise.to(cpu) == noise
    sigma = torch.linspace(1, 2, 3)
    moved = GaussianNoise(sigma).to(cpu)
    assert torch.equal(torch.as_tensor(moved.sigma), sigma)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_noise_moves_to_a_gpu(generator: Generator) -> None:
    sigma = torch.linspace(1, 2, 3)
    y, z = torch.randn(2, 5, 1, 3, generator=generator)
    p = InverseProblem(y, ops.Identity(), GaussianNoise(sigma))
    there = p.to(torch.device("cuda"))
    assert_close(there.misfit(z.cuda()).cpu(), p.misfit(z))


# --- electronic noise


@pytest.mark.parametrize("electronic", [0.0, 20.0, 100.0])
def test_photons_and_electronics_add(electronic: float, generator: Generator) -> None:
    counts, z = 1e4, 1.0
    noise = TransmissionNoise(counts, electronic=electronic)
    n = counts * torch.exp(-draws(noise, z, generator))
    rate, var = counts * torch.e**-z, counts * torch.e**-z + electronic**2
    assert near(n.mean(), rate, var)
    assert near(((n - rate) ** 2).mean(), var, 2 * var**2 + rate)


def test_the_weights_are_those_of_counts_and_electronics(generator: Generator) -> None:
    """W = N²/(N + σ_e²); with a floor the variances add."""
    y = 5 * torch.rand(3, 7, dtype=float64, generator=generator)
    n = 1e3 * torch.exp(-y)
    weight = n**2 / (n + 8.0**2)
    assert_close(TransmissionNoise(1e3, electronic=8.0).precision(y), weight)
    both = TransmissionNoise(1e3, floor=0.1, electronic=8.0)
    assert_close(1 / both.precision(y), 1 / weight + 0.1**2)


@pytest.mark.parametrize("electronic", [1.0, 20.0, 200.0])
def test_least_squares_believes_the_bright(
    electronic: float, generator: Generator
) -> None:
    """A known bias: W's own noise gives the score the mean a − ½, and so z too low.

    With s = σ_e²/N, a = (1 + 2s)/(1 + s) to leading order in 1/N.
    """
    counts, z0 = 1e5, 1.0
    noise = TransmissionNoise(counts, electronic=electronic)
    z = torch.full((N, 1), z0, dtype=float64)
    score = noise.nll_grad(noise.sample(z, generator=generator), z)
    rate = counts * torch.e**-z0
    fisher = rate**2 / (rate + electronic**2)
    s = electronic**2 / rate
    bias = (1 + 2 * s) / (1 + s) - 0.5
    assert near(score.mean(), bias, fisher)
    variance = float(score.var())
    assert variance == pytest.approx(fisher, rel=K * (2 / N) ** 0.5 + 20 / fisher)


# --- Rician noise


@pytest.mark.parametrize("z", [0.0, 0.2, 1.0, 5.0])
def test_rician_moments(z: float, generator: Generator) -> None:
    """E y² = z² + 2σ², Var y² = 4σ²(z² + σ²)."""
    sigma = 0.3
    y = draws(RicianNoise(sigma), z, generator)
    variance = 4 * sigma**2 * (z**2 + sigma**2)
    assert near((y**2).mean(), z**2 + 2 * sigma**2, variance)
    spread = ((y**2 - z**2 - 2 * sigma**2) ** 2).mean()
    a = z**2 / sigma**2  # y²/σ² is a non-central χ² of two degrees of freedom
    fourth = (48 * (2 + 4 * a) + 12 * (2 + 2 * a) ** 2) * sigma**8
    assert near(spread, variance, fourth - variance**2)
    assert (y >= 0).all()


def rician(z: float, sigma: float) -> tuple[Tensor, Tensor]:
    """The density at evenly spaced y, and y."""
    y = torch.linspace(1e-6, z + 12 * sigma, 200_001, dtype=float64)
    log = -(y**2 + z**2) / (2 * sigma**2) + torch.special.i0e(y * z / sigma**2).log()
    return y / sigma**2 * torch.exp(log + y * z / sigma**2), y


@pytest.mark.parametrize("z", [0.0, 0.2, 1.0, 5.0])
def test_rician_densities_sum_to_one(z: float) -> None:
    """So do those of ``nll``, with the part of it that depends on y alone."""
    sigma = 0.3
    density, y = rician(z, sigma)
    assert float(torch.trapezoid(density, y)) == pytest.approx(1, abs=1e-6)
    nll = RicianNoise(sigma).nll(y[:, None], torch.full_like(y, z)[:, None])
    ours = y / sigma**2 * torch.exp(-nll)
    assert_close(ours, density, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("z", [0.2, 1.0, 5.0])
def test_the_rician_score_has_mean_zero(z: float, generator: Generator) -> None:
    noise, sigma = RicianNoise(0.3), 0.3
    density, y = rician(z, sigma)
    at = torch.full_like(y, z)
    score = noise.nll_grad(y, at)
    assert abs(float(torch.trapezoid(density * score, y))) < 1e-6 / sigma
    fisher = float(torch.trapezoid(density * score**2, y))
    drawn = draws(noise, z, generator)
    assert near(noise.nll_grad(drawn, torch.full_like(drawn, z)).mean(), 0, fisher)


@pytest.mark.parametrize(("snr", "bias"), [(3.0, 0.06), (5.0, 0.03), (10.0, 0.01)])
def test_where_rician_noise_is_nearly_gaussian(snr: float, bias: float) -> None:
    density, y = rician(snr, 1.0)
    mean = float(torch.trapezoid(density * y, y))
    variance = float(torch.trapezoid(density * (y - mean) ** 2, y))
    assert mean - snr == pytest.approx(1 / (2 * snr), rel=bias)
    assert 0.93 < variance < 1


def test_the_rician_density_does_not_overflow() -> None:
    """At an SNR of a thousand I₀ is beyond any float; I₁/I₀ is 1 − 1/2t."""
    noise = RicianNoise(1e-3)
    y, z = torch.ones(1, 4), torch.tensor([[0.0, 0.999, 1.0, 2.0]])
    assert noise.nll(y, z).isfinite().all()
    assert noise.nll_grad(y, z).isfinite().all()
    y, z = y.double()[:, 1:], z.double()[:, 1:]
    assert_close(noise.nll_grad(y, z), (z - y) / 1e-6 + 1 / (2 * z), rtol=0, atol=1e-5)


def test_magnitudes_do_not_know_the_sign(generator: Generator) -> None:
    noise = RicianNoise(0.3)
    y, z = torch.rand(2, 3, 5, dtype=float64, generator=generator)
    assert_close(noise.nll(y, -z), noise.nll(y, z))
    assert_close(noise.nll_grad(y, -z), -noise.nll_grad(y, z))


def test_only_magnitudes_are_rician() -> None:
    noise = RicianNoise(1.0)
    with pytest.raises(ValueError, match="cannot be negative, but the least is -2"):
        InverseProblem(torch.tensor([[[1.0, -2.0]]]), ops.Identity(), noise)
    with pytest.raises(ValueError, match="are magnitudes, got complex numbers"):
        InverseProblem(torch.zeros(1, 1, 2) + 0j, ops.Identity(), noise)


# --- every noise


@pytest.mark.parametrize("name", ["gaussian", "poisson", "transmission", "rician"])
def test_the_nll_is_least_in_the_mean_at_the_truth(
    name: str, generator: Generator
) -> None:
    """By at least as much as its mean is known to, over one set of draws."""
    noise, z0 = NOISE[name], 1.5
    y = draws(noise, z0, generator)
    at_truth = noise.nll(y, torch.full_like(y, z0))
    for factor in (0.9, 1.1):
        excess = noise.nll(y, torch.full_like(y, factor * z0)) - at_truth
        assert float(excess.mean()) > K * float(excess.std()) / N**0.5


def test_finite_differences(noise: Noise, generator: Generator) -> None:
    y, z = typical(noise, generator)
    direction = torch.randn(z.shape, dtype=float64, generator=generator)
    step = 1e-5
    slope = (
        noise.nll(y, z + step * direction) - noise.nll(y, z - step * direction)
    ) / (2 * step)
    expected = (noise.nll_grad(y, z) * direction).flatten(1).sum(1)
    assert_close(slope, expected, rtol=1e-5, atol=1e-4)
