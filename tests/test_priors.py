"""Priors: closed forms, parameterisations, schedules, and what is on disk."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jaxtyping
import pytest
import torch
from exact import (
    MIXTURE,
    MIXTURE_A,
    MIXTURE_SIGMA_Y,
    MIXTURE_Y,
    POSTERIOR_COV,
    POSTERIOR_MEAN,
    PRIOR,
    SIGMA_Y,
    Y_SEEN,
    A,
    image_prior,
    real,
)
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from invsolve import priors
from invsolve.priors import (
    Affine,
    AffineMap,
    DiscretePrior,
    EDMPrior,
    FlowPrior,
    GaussianMixturePrior,
    GaussianPrior,
    Prior,
    UNet,
    UNetConfig,
    ddpm_alphas_cumprod,
    ddpm_sigmas,
    karras_sigmas,
)
from invsolve.priors.latent import LatentPrior
from invsolve.priors.weights import card_of, sha256

SIGMAS = (0.01, 0.3, 1.0, 7.0)
CPU = torch.device("cpu")


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- closed forms


@pytest.mark.parametrize("prior", [PRIOR, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_score_is_the_gradient_of_the_log_density(
    prior: GaussianPrior | GaussianMixturePrior, sigma: float, generator: Generator
) -> None:
    x = torch.randn(5, 2, generator=generator, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_density(x, real(sigma)).sum(), x)
    score = prior.score(x, real(sigma)).detach()
    close(score, gradient, 1e-8)
    close(prior.eps(x, real(sigma)).detach(), -sigma * gradient, 1e-8)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_gaussian_denoises_by_its_formula(sigma: float, generator: Generator) -> None:
    prior = image_prior(generator)
    x = torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    gain = prior.cov @ torch.linalg.inv(prior.cov + sigma**2 * torch.eye(16).double())
    expected = prior.mean + ((x - prior.mean).flatten(1) @ gain.T).reshape(x.shape)
    close(prior.denoise(x, real(sigma)), expected)


def test_gaussian_log_density_is_the_normal_law(generator: Generator) -> None:
    x = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    cov = PRIOR.cov + 0.49 * torch.eye(2).double()
    law = torch.distributions.MultivariateNormal(PRIOR.mean, cov)
    close(PRIOR.log_density(x, real(0.7)), law.log_prob(x))


def test_a_diagonal_is_a_covariance(generator: Generator) -> None:
    variances = torch.rand(1, 2, 3, generator=generator, dtype=torch.float64) + 0.1
    mean, x = torch.zeros_like(variances), torch.ones(2, 1, 2, 3).double()
    diagonal = GaussianPrior(mean, variances)
    full = GaussianPrior(mean, variances.flatten().diag())
    close(diagonal.denoise(x, real(0.5)), full.denoise(x, real(0.5)))


def test_a_mixture_of_one_is_a_gaussian(generator: Generator) -> None:
    one = GaussianMixturePrior(real([3.0]), PRIOR.mean[None], PRIOR.cov[None])
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    close(one.denoise(x, real(0.6)), PRIOR.denoise(x, real(0.6)))
    close(one.log_density(x, real(0.6)), PRIOR.log_density(x, real(0.6)))


def test_a_mixture_of_equals_is_their_gaussian(generator: Generator) -> None:
    means, covs = PRIOR.mean.expand(3, 2), PRIOR.cov.expand(3, 2, 2)
    three = GaussianMixturePrior(real([0.2, 0.3, 0.5]), means, covs)
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    close(three.denoise(x, real(0.6)), PRIOR.denoise(x, real(0.6)))


@pytest.mark.parametrize("prior", [PRIOR, MIXTURE], ids=["gaussian", "mixture"])
def test_a_level_for_each_item_is_one_item_at_a_time(
    prior: GaussianPrior | GaussianMixturePrior, generator: Generator
) -> None:
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    sigma = real(SIGMAS)
    for view in (prior.denoise, prior.eps, prior.score):
        singly = torch.cat([view(x[i : i + 1], sigma[i]) for i in range(4)])
        close(view(x, sigma), singly)


def test_gaussian_posterior_is_the_dense_formula() -> None:
    posterior = PRIOR.posterior(A, Y_SEEN, SIGMA_Y)
    close(posterior.mean, POSTERIOR_MEAN)
    close(posterior.cov, POSTERIOR_COV)
    close(posterior.mean, real([1.461538, 0.269231]), 1e-6)
    close(posterior.cov, real([[0.038462, 0.030769], [0.030769, 0.384615]]), 1e-6)


def test_mixture_posterior_is_bayes_on_a_grid() -> None:
    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    residual = (x @ MIXTURE_A.T - MIXTURE_Y).squeeze(1)
    log_joint = MIXTURE.log_density(x, real(0.0)) - residual**2 / (
        2 * MIXTURE_SIGMA_Y**2
    )
    cell = float(axis[1] - axis[0]) ** 2
    log_evidence = (log_joint.logsumexp(0).exp() * cell).log()
    posterior = MIXTURE.posterior(MIXTURE_A, MIXTURE_Y, MIXTURE_SIGMA_Y)
    # The trapezium rule is exact here but for rounding: all is smooth and decays.
    close(posterior.log_density(x, real(0.0)), log_joint - log_evidence, 1e-8)
    close(posterior.weights, real([0.0, 0.504, 0.496]), 2e-3)


def test_evidence_is_the_normal_law_of_the_data() -> None:
    variance = PRIOR.cov[0, 0] + SIGMA_Y**2
    law = torch.distributions.Normal(PRIOR.mean[0], variance.sqrt())
    close(PRIOR.evidence(A, Y_SEEN, SIGMA_Y), law.log_prob(Y_SEEN[0]))


@pytest.mark.parametrize("prior", [PRIOR, MIXTURE], ids=["gaussian", "mixture"])
def test_draws_have_the_prior_s_moments(
    prior: GaussianPrior | GaussianMixturePrior, generator: Generator
) -> None:
    n = 20_000
    if isinstance(prior, GaussianPrior):
        mean, cov = prior.mean, prior.cov
    else:
        w, m = prior.weights, torch.stack([c.mean for c in prior.components])
        inside = torch.stack([c.cov for c in prior.components])
        mean = w @ m
        between = (m - mean)[:, :, None] * (m - mean)[:, None]
        cov = (w[:, None, None] * (inside + between)).sum(0)
    x = prior.sample(n, generator=generator)
    assert ((x.mean(0) - mean).abs() <= 5 * (cov.diagonal() / n).sqrt()).all()
    v = cov.diagonal()
    error = ((v[:, None] * v + cov**2) / n).sqrt()
    assert ((x.T.cov() - cov).abs() <= 5 * error).all()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: GaussianPrior(torch.zeros(2), torch.ones(3)), "cov must be"),
        (lambda: GaussianPrior(torch.zeros(2), -torch.eye(2)), "semi-definite"),
        (
            lambda: GaussianMixturePrior(real([0.0]), torch.zeros(1, 2), torch.eye(2)),
            "positive",
        ),
        (
            lambda: GaussianMixturePrior(
                real([0.5, 0.5]), torch.zeros(2, 2), torch.eye(2)[None]
            ),
            "one mean",
        ),
        (lambda: AffineMap(0.0, 1.0), "scale"),
        (lambda: DiscretePrior(torch.mul, real([0.5, 0.9]), "eps"), "fall"),
        (lambda: DiscretePrior(torch.mul, real([0.5, 0.0]), "eps"), "terminal SNR"),
    ],
)
def test_what_is_no_prior_is_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make()


# --- what the network predicts

ABAR = ddpm_alphas_cumprod()


def ideal(x_t: Tensor, a: Tensor, s: Tensor, prior: GaussianPrior) -> Tensor:
    """E[x₀ | x_t] for x_t = a x₀ + s n: m + aC (a²C + s²I)⁻¹ (x_t − am), by item."""
    a, s = a[:, None, None], s[:, None, None]
    P = a**2 * prior.cov + s**2 * torch.eye(len(prior.cov)).to(prior.cov)
    centred = x_t.flatten(1) - a[:, 0] * prior.mean.flatten()
    gain = a * prior.cov @ torch.linalg.inv(P)
    x0 = prior.mean.flatten() + (gain @ centred[..., None])[..., 0]
    return x0.reshape(x_t.shape)


def four(value: Tensor) -> Tensor:
    return value[:, None, None, None]


def ddpm_level(t: Tensor) -> tuple[Tensor, Tensor]:
    """(√ᾱ, √(1−ᾱ)) at a real-valued step, ln σ running straight between the whole."""
    table = (1 / ABAR - 1).sqrt().log()
    low = t.floor().long().clamp(0, len(ABAR) - 2)
    sigma = torch.lerp(table[low], table[low + 1], t - low).exp()
    a = 1 / (1 + sigma**2).sqrt()
    return a, a * sigma


def edm(prior: GaussianPrior) -> Prior:
    d = 0.7

    def net(u: Tensor, c_noise: Tensor) -> Tensor:
        sigma = (4 * c_noise).exp()
        total = (sigma**2 + d**2).sqrt()
        x = u * four(total)
        x0 = ideal(x, torch.ones_like(sigma), sigma, prior)
        c_skip, c_out = d**2 / total**2, sigma * d / total
        return (x0 - four(c_skip) * x) / four(c_out)

    return EDMPrior(net, sigma_data=d)


def test_a_gaussian_of_each_channel_s_variance_needs_no_network(
    generator: Generator,
) -> None:
    """σ_d² the variances: D = c_skip x is the conditional mean, F = 0."""
    data, shape = (0.4, 0.02), (2, 3, 4)
    variances = torch.tensor(data).square().reshape(-1, 1, 1).expand(shape)
    exact = GaussianPrior(torch.zeros(shape), variances)
    edm = EDMPrior(lambda x, _: torch.zeros_like(x), data, channels=2)
    x = torch.randn(5, *shape, generator=generator)
    for sigma in (torch.tensor(0.3), torch.logspace(-2, 1, 5)):
        torch.testing.assert_close(edm.denoise(x, sigma), exact.denoise(x, sigma))


def eps(prior: GaussianPrior) -> Prior:
    def net(x_t: Tensor, t: Tensor) -> Tensor:
        a, s = ddpm_level(t)
        return (x_t - four(a) * ideal(x_t, a, s, prior)) / four(s)

    return DiscretePrior(net, ABAR, "eps")


def eps_and_variance(prior: GaussianPrior) -> Prior:
    plain = eps(prior)
    assert isinstance(plain, DiscretePrior)

    def net(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat([plain.net(x_t, t), torch.full_like(x_t, 99.0)], dim=1)

    return DiscretePrior(net, ABAR, "eps")


def v(prior: GaussianPrior) -> Prior:
    def net(x_t: Tensor, t: Tensor) -> Tensor:
        a, s = ddpm_level(t)
        x0 = ideal(x_t, a, s, prior)
        n = (x_t - four(a) * x0) / four(s)
        return four(a) * n - four(s) * x0

    return DiscretePrior(net, ABAR, "v")


def x0(prior: GaussianPrior) -> Prior:
    def net(x_t: Tensor, t: Tensor) -> Tensor:
        return ideal(x_t, *ddpm_level(t), prior)

    return DiscretePrior(net, ABAR, "x0")


def flow(prior: GaussianPrior) -> Prior:
    def net(x_t: Tensor, t: Tensor) -> Tensor:
        x0 = ideal(x_t, 1 - t, t, prior)
        return (x_t - x0) / four(t)  # n − x₀, as x_t = (1 − t) x₀ + t n

    return FlowPrior(net)


def continuous_eps(prior: GaussianPrior) -> Prior:
    def net(u: Tensor, c_noise: Tensor) -> Tensor:
        sigma = (4 * c_noise).exp()
        x = u * four((sigma**2 + 0.7**2).sqrt())
        return (x - ideal(x, torch.ones_like(sigma), sigma, prior)) / four(sigma)

    return EDMPrior(net, 0.7, predicts="eps")


def continuous_x0(prior: GaussianPrior) -> Prior:
    def net(u: Tensor, c_noise: Tensor) -> Tensor:
        sigma = (4 * c_noise).exp()
        x = u * four((sigma**2 + 0.7**2).sqrt())
        return ideal(x, torch.ones_like(sigma), sigma, prior)

    return EDMPrior(net, 0.7, predicts="x0")


def continuous_flow(prior: GaussianPrior) -> Prior:
    external = flow(prior)
    assert isinstance(external, FlowPrior)
    return EDMPrior(external.net, 0.7, predicts="flow")


PARAMETERISATIONS = [
    *(edm, eps, eps_and_variance, v, x0, flow),
    *(continuous_eps, continuous_x0, continuous_flow),
]


@pytest.mark.parametrize("parameterise", PARAMETERISATIONS)
def test_the_ideal_network_denoises_through_any_parameterisation(
    parameterise: Callable[[GaussianPrior], Prior], generator: Generator
) -> None:
    gaussian = image_prior(generator)
    prior = parameterise(gaussian)
    noise = torch.randn(4, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigma = real([0.02, 0.3, 1.7, 40.0])  # none of them a step of the schedule
    x = gaussian.mean + four((1 + sigma**2).sqrt()) * noise
    close(prior.denoise(x, sigma), gaussian.denoise(x, sigma))
    close(prior.denoise(x, sigma[1]), gaussian.denoise(x, sigma[1]))
    close(prior.eps(x, sigma), gaussian.eps(x, sigma), 1e-8)


@pytest.mark.parametrize("level", [(0.6, 0.8), (1.0, 1.3), (0.25, 0.75)])
def test_the_level_is_the_ratio_s_over_a(
    level: tuple[float, float], generator: Generator
) -> None:
    """Variance-preserving, variance-exploding and flow states have one denoiser."""
    prior = image_prior(generator)
    a, s = real([level[0]]), real([level[1]])
    x_t = torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    close(ideal(x_t, a, s, prior), prior.denoise(x_t / a, s / a))


def test_an_unknown_prediction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="edm, eps, x0 or flow, got 'score'"):
        EDMPrior(torch.mul, predicts=cast(Any, "score"))


def test_steps_and_levels_are_inverse() -> None:
    prior = DiscretePrior(torch.mul, ABAR, "eps")
    sigma = (1 / ABAR - 1).sqrt()
    close(prior.step(sigma), torch.arange(1000).double(), 1e-9)
    between = (sigma[10] * sigma[11]).sqrt()
    close(prior.step(between), real(10.5), 1e-9)
    close(prior.step(real([1e-9, 1e9])), real([0.0, 999.0]))
    assert (prior.sigma_min, prior.sigma_max) == pytest.approx(
        (float(sigma[0]), float(sigma[-1]))
    )


@pytest.mark.parametrize("parameterise", [edm, eps, flow])
def test_denoising_can_be_differentiated(
    parameterise: Callable[[GaussianPrior], Prior], generator: Generator
) -> None:
    gaussian = image_prior(generator)
    prior, sigma = parameterise(gaussian), real(0.8)
    x = torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda x: prior.denoise(x, sigma), x)
    P = gaussian.cov + sigma**2 * torch.eye(16).double()
    assert isinstance(J, Tensor)
    close(J.reshape(16, 16), gaussian.cov @ torch.linalg.inv(P))


# --- ranges


@pytest.mark.parametrize("sigma", SIGMAS)
def test_affine_is_the_prior_of_the_transformed_image(
    sigma: float, generator: Generator
) -> None:
    """u ~ N(m, C) makes x = cu + b of law N(cm + b, c²C)."""
    map = AffineMap(0.25, 3.0)
    expected = GaussianPrior(map(PRIOR.mean), 0.25**2 * PRIOR.cov)
    prior = Affine(PRIOR, map)
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    close(prior.denoise(x, real(sigma)), expected.denoise(x, real(sigma)))
    each = real(SIGMAS)
    close(prior.score(x, each), expected.score(x, each))


def test_affine_scales_the_trusted_levels() -> None:
    prior = Affine(PRIOR, AffineMap(0.25, 3.0))
    assert prior.sigma_min == 0.25 * PRIOR.sigma_min
    assert prior.sigma_max == 0.25 * PRIOR.sigma_max


def test_nested_ranges_compose() -> None:
    inner, outer = AffineMap(2.0, -1.0), AffineMap(0.5, 7.0)
    core, map = Affine(Affine(PRIOR, inner), outer).normalised
    u = real([-3.0, 0.0, 0.4])
    assert core is PRIOR
    close(map(u), outer(inner(u)))
    close(map.inverse(map(u)), u)


# --- moving and checking


def network_prior() -> Prior:
    return Affine(EDMPrior(tiny_net()), AffineMap(0.5, 0.25))


@pytest.mark.parametrize(
    "make", [lambda: PRIOR, lambda: MIXTURE, network_prior], ids=["one", "mix", "net"]
)
def test_a_moved_prior_is_a_copy_that_works(make: Callable[[], Prior]) -> None:
    prior = make()
    flat = isinstance(prior, GaussianPrior | GaussianMixturePrior)
    x = torch.ones(2, 2).double() if flat else torch.ones(2, 1, 8, 8)
    sigma = torch.tensor(0.5, dtype=x.dtype)
    before = prior.denoise(x, sigma)
    moved = prior.to(CPU)
    assert moved is not prior
    assert torch.equal(moved.denoise(x, sigma), before)
    away = prior.to(torch.device("meta"))
    assert away.denoise(x.to("meta"), sigma.to("meta")).device.type == "meta"
    assert torch.equal(prior.denoise(x, sigma), before)  # it stayed where it was


@pytest.mark.parametrize("kind", [EDMPrior, FlowPrior])
def test_images_that_do_not_fit_are_refused(kind: type[EDMPrior | FlowPrior]) -> None:
    bare = kind(torch.mul, multiple_of=8, channels=2)
    discrete = DiscretePrior(torch.mul, ABAR, "eps", multiple_of=8, channels=2)
    for prior in (bare, discrete, Affine(bare, AffineMap(2.0, 0.0))):
        prior.check((2, 16, 24))
        with pytest.raises(ValueError, match="2 channel"):
            prior.check((1, 16, 16))
        with pytest.raises(ValueError, match="divisible by 8, got 16×20"):
            prior.check((2, 16, 20))


# --- schedules


def test_karras_levels_fall_from_the_largest_to_the_smallest() -> None:
    sigmas = karras_sigmas(20, 0.01, 50.0)
    close(sigmas[[0, -1]], torch.tensor([50.0, 0.01]), 1e-6)
    assert (sigmas.diff() < 0).all()
    roots = sigmas.double() ** (1 / 7)
    close(roots.diff(), roots.diff().mean().expand(19), 1e-5)


def test_ddpm_alphas_are_a_product() -> None:
    product, alphas = 1.0, []
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        alphas.append(product)
    close(ddpm_alphas_cumprod(), real(alphas), 1e-12)


def test_ddpm_levels_are_those_of_its_steps() -> None:
    close(1 / (1 + ddpm_sigmas(1000) ** 2), ABAR.flip(0), 1e-12)
    assert torch.equal(ddpm_sigmas(100), ddpm_sigmas(1000)[9::10])  # t = 990 … 0


@pytest.mark.parametrize("n", [0, 1001])
def test_ddpm_has_so_many_steps_and_no_more(n: int) -> None:
    with pytest.raises(ValueError, match="1 to 1000"):
        ddpm_sigmas(n)


# --- on disk

TINY = UNetConfig(channels=1, widths=(8, 16), layers=1, patch=2, groups=4)


def tiny_net() -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(TINY).eval().requires_grad_(False)


def save(folder: Path, **more: Any) -> Path:
    """A tiny prior's two files, the card's entries replaced by ``more``."""
    net, card = tiny_net(), folder / "tiny.json"
    weights = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    save_file(weights, card.with_suffix(".safetensors"))
    entries = card_of(
        "tiny",
        TINY,
        sigma_data=0.4,
        map=AffineMap(0.02, 0.1),
        unit="1/mm",
        training={},
        sha256=sha256(card.with_suffix(".safetensors")),
    )
    card.write_text(json.dumps({**entries, **more}))
    return card


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (12, 4)])
def test_the_network_takes_any_size_it_can_halve(shape: tuple[int, int]) -> None:
    x = torch.zeros(2, 1, *shape)
    assert tiny_net()(x, torch.zeros(2)).shape == x.shape
    assert TINY.multiple_of == 4
    assert UNetConfig.from_dict(TINY.to_dict()) == TINY


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_folded_at_the_door_is_unfolded_there(
    channels: int, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing between, the network is the identity, in colour as in grey."""
    net = UNet(UNetConfig(channels=channels, widths=(8, 16), groups=4))
    seen: dict[str, Tensor] = {}

    def nothing(x: Tensor, t: Tensor) -> SimpleNamespace:
        seen.update(x=x, t=t)
        return SimpleNamespace(sample=x)

    monkeypatch.setattr(net.unet, "forward", nothing)
    x = torch.randn(2, channels, 8, 12, generator=generator)
    c_noise = torch.tensor([0.1, -0.2])
    assert torch.equal(net(x, c_noise), x)
    assert seen["x"].shape == (2, 4 * channels, 4, 6)
    close(seen["t"], torch.tensor([100.0, -200.0]), 1e-3)


def test_a_saved_prior_denoises_as_its_network(
    tmp_path: Path, generator: Generator
) -> None:
    card = save(tmp_path)
    net = tiny_net()
    net.load_state_dict({k: v.half().float() for k, v in net.state_dict().items()})
    expected = Affine(EDMPrior(net, 0.4, 0.002, 20.0), AffineMap(0.02, 0.1))
    x = 0.1 + 0.02 * torch.randn(2, 1, 8, 12, generator=generator)
    sigma = torch.tensor([0.001, 0.02])
    for path in (card, card.with_suffix(".safetensors"), tmp_path):
        prior = priors.load(path)
        close(prior.denoise(x, sigma), expected.denoise(x, sigma), 1e-6)
        assert (prior.sigma_min, prior.sigma_max) == (
            expected.sigma_min,
            expected.sigma_max,
        )
        with pytest.raises(ValueError, match="divisible by 4"):
            prior.check((1, 8, 10))


def damage(card: Path, how: str) -> None:
    weights = card.with_suffix(".safetensors")
    match how:
        case "weights missing":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "truncated header":
            weights.write_bytes(weights.read_bytes()[:20])
        case "empty":
            weights.write_bytes(b"")
        case "nan":
            state = load_file(weights)
            state[next(iter(state))].view(-1)[0] = torch.nan
            save_file(state, weights)
        case "a tensor missing":
            state = load_file(weights)
            del state[next(iter(state))]
            save_file(state, weights)
        case "not JSON":
            card.write_text("{'name': ")
        case "not an object":
            card.write_text("[1, 2]")
        case "not text":
            card.write_bytes(b"\xff\xfe\x00")
        case "lacks a key":
            entries = json.loads(card.read_text())
            del entries["sigma_data"]
            card.write_text(json.dumps(entries))
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("weights missing", "weights are missing"),
        ("truncated", "cannot load"),
        ("truncated header", "cannot load"),
        ("empty", "cannot load"),
        ("nan", "not finite"),
        ("a tensor missing", "cannot load"),
        ("not JSON", "cannot read the prior's card"),
        ("not an object", "not an object"),
        ("not text", "cannot read the prior's card"),
        ("lacks a key", "lacks 'sigma_data'"),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    tmp_path: Path, how: str, why: str
) -> None:
    card = save(tmp_path)
    entries = json.loads(card.read_text())
    del entries["sha256"]
    card.write_text(json.dumps(entries))
    priors.load(card)  # it can be read before
    damage(card, how)
    with pytest.raises(ValueError, match=why) as refused:
        priors.load(card)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"family": "gan"}, "family 'gan'"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"network": {"widths": [8, 16], "depth": 3}}, "depth"),
        ({"network": {**TINY.to_dict(), "widths": [8, 8]}}, "cannot load"),
        ({"network": {**TINY.to_dict(), "groups": 3}}, "cannot load"),
        ({"network": None}, "cannot load"),
        ({"sigma_data": "half"}, "half"),
        ({"scale": -1.0}, "scale"),
        ({"scale": [1.0]}, "cannot load"),
    ],
)
def test_cards_of_something_else_are_refused_in_one_line(
    tmp_path: Path, entry: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        priors.load(save(tmp_path, **entry))
    assert "\n" not in str(refused.value)


def test_unknown_names_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown prior 'no-such'") as refused:
        priors.load("no-such")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="holds 0 cards"):
        priors.load(tmp_path)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_nothing_in_the_files_is_executed(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    poison = pickle.dumps({"weight": Payload(ran)})
    card = save(tmp_path)
    file = card.with_suffix(".safetensors")
    file.write_bytes(poison)
    card.write_text(
        json.dumps({**json.loads(card.read_text()), "sha256": sha256(file)})
    )
    with pytest.raises(ValueError, match="cannot load"):
        priors.load(card)
    card.write_bytes(poison)
    with pytest.raises(ValueError, match="cannot read"):
        priors.load(card)
    assert not ran.exists()
    pickle.loads(poison)
    assert ran.exists()  # it would have


@pytest.mark.parametrize("name", priors.available() or [None])
def test_every_bundled_prior_loads(name: str | None) -> None:
    if name is None:
        pytest.skip("no prior is bundled")
    prior = priors.load(name)
    x = torch.zeros(1, prior.info.channels or 1, 32, 32)
    if isinstance(prior, LatentPrior):
        x = prior.encode(x).detach()
    assert prior.denoise(x, torch.tensor(prior.sigma_min)).isfinite().all()
