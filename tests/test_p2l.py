"""P2L: what it tunes, and what it is without tuning."""

from typing import Any

import pytest
import torch
from exact import with_noise
from test_latent import LATENT, PIXELS, ROTATION, problem, randomised
from torch import Generator, Tensor

import invsolve as iv
from invsolve import InverseProblem
from invsolve.operators import GaussianNoise, Mask, PhaseRetrieval
from invsolve.priors import DiscretePrior, ddpm_alphas_cumprod
from invsolve.priors.latent import Conditioned, LatentPrior
from invsolve.samplers.latents import misfit_pull
from invsolve.samplers.ldps import ldps
from invsolve.samplers.p2l import p2l

SIGMAS = torch.tensor([5.0, 1.0, 0.2], dtype=torch.float64)


@pytest.fixture(scope="module")
def prior() -> LatentPrior:
    """A tiny network of 4×2×2 latents that hears two tokens of six numbers."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(8,),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=6,
            attention_head_dim=2,
        )
    c = torch.randn(2, 6, generator=Generator().manual_seed(4))
    net = Conditioned(randomised(unet), {"encoder_hidden_states": c}).double()
    net.requires_grad_(False)
    discrete = DiscretePrior(net, ddpm_alphas_cumprod(1000), "eps")
    return LatentPrior(discrete, ROTATION)


def draws(n: int, items: int = 3) -> Tensor:
    g = Generator().manual_seed(6)
    return torch.randn(n, items, 4, 2, 2, generator=g, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def run(given: InverseProblem, prior: Any, noise: Tensor, **more: Any) -> Tensor:
    return with_noise(noise, p2l, given, prior, **{"sigmas": SIGMAS, **more})


def test_without_tuning_and_projection_it_is_ldps(prior: LatentPrior) -> None:
    given, noise = problem(), draws(1)
    more = {"sigmas": SIGMAS, "zeta": 0.3, "eta": 0.0}
    expected = with_noise(noise, ldps, given, prior, **more)
    plain = {"rho": 0.3, "every": 9}
    close(run(given, prior, noise, tunings=0, **plain), expected)
    close(run(given, prior, noise, tunings=2, lr=0.0, **plain), expected)
    tuned = run(given, prior, noise, tunings=2, lr=0.1, **plain)
    assert float((tuned - expected).abs().max()) > 1e-6


def test_the_first_tuning_is_one_sign_step_of_adam(prior: LatentPrior) -> None:
    """c − lr ∇/(|∇| + 1e-8) for each number of it, by the gradient of the misfit."""
    given, noise = problem(), draws(1)
    sigma, lr = SIGMAS[1:2], 0.05
    net = vars(prior.prior)["net"]
    z = (1 + sigma**2).sqrt() * noise[0]
    own = net.condition["encoder_hidden_states"].detach()
    c = own.expand(3, 2, 6).clone().requires_grad_()

    def misfit(c: Tensor) -> Tensor:
        with net.telling(c):
            x = prior.decode(prior.denoise(z, sigma[0]))
        return (given.operator.apply(x) - given.y).flatten(1).norm(dim=1)

    (grad,) = torch.autograd.grad(misfit(c).sum(), c)
    v = torch.randn(c.shape, generator=Generator().manual_seed(1)).double()
    slope = (misfit(c + 1e-5 * v) - misfit(c - 1e-5 * v)) / 2e-5
    close(slope.detach(), (grad * v).flatten(1).sum(1), 1e-6)
    tuned = (c - lr * grad / (grad.abs() + 1e-8)).detach()
    with net.telling(tuned):
        expected = prior.decode(prior.denoise(z, sigma[0]))
    got = run(given, prior, noise, sigmas=sigma, lr=lr, rho=0.0, every=9)
    close(got, expected, 1e-7)


def test_tuning_lowers_the_misfit(prior: LatentPrior) -> None:
    given, noise = problem(), draws(1)

    def misfit(tunings: int) -> Tensor:
        more = {"sigmas": SIGMAS[1:2], "rho": 0.0, "every": 9}
        x = run(given, prior, noise, tunings=tunings, lr=0.02, **more)
        return misfit_pull(given, x)[1]

    assert (misfit(20) < misfit(0)).all()


def test_the_projection_is_the_data_where_they_allow_one_image(
    prior: LatentPrior,
) -> None:
    """And with λ it lies between: (AᵀA + λ‖A‖²)x = Aᵀy + λ‖A‖² Dec(ẑ₀)."""
    g = Generator().manual_seed(2)
    A = Mask(torch.full((1, 4, 4), 2.0, dtype=torch.float64))
    truth = PIXELS.sample(3, generator=g)
    given = InverseProblem(A(truth), A, GaussianNoise(0.1))
    more = {"tunings": 0, "rho": 0.0}
    close(run(given, prior, draws(1), lam=1e-12, every=1, **more), truth, 1e-8)
    one = {**more, "sigmas": SIGMAS[:1]}
    plain = run(given, prior, draws(1), every=9, **one)
    got = run(given, prior, draws(1), every=1, lam=3.0, **one)
    close(got, (truth + 3 * plain) / 4, 1e-5)


def test_items_and_what_it_costs(prior: LatentPrior) -> None:
    """An item's embedding is its own, and the prior keeps its own."""
    given, noise = problem(), draws(1)
    more = {"tunings": 2, "lr": 0.1, "every": 2}
    whole = run(given, prior, noise, **more)
    second = InverseProblem(given.y[1:2], given.operator, given.noise)
    close(run(second, prior, noise[:, 1:2], **more), whole[1:2], 1e-8)
    close(run(given, prior, noise, **more), whole, 0)
    g = Generator().manual_seed(0)
    got = iv.solve(given, prior, p2l, steps=2, tunings=2, generator=g)
    assert got.kind == "steered"
    assert got.stats.network_forwards == got.stats.network_backwards == 3 * 2 * 3


def test_a_broken_run_leaves_the_prior_as_it_was(prior: LatentPrior) -> None:
    def stop(_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        p2l(problem(), prior, generator=Generator(), progress=stop)
    assert vars(prior.prior)["net"].embedding is None


def test_refusals(prior: LatentPrior) -> None:
    def says(match: str, given: Any, prior: Any) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            iv.solve(given, prior, p2l, steps=1, generator=Generator())
        assert "\n" not in str(caught.value)

    says("this prior is told none", problem(), LATENT)
    says("this prior is told none", problem(), PIXELS)
    y = torch.ones(1, 1, 8, 8).double()
    nonlinear = InverseProblem(y, PhaseRetrieval((4, 4)), GaussianNoise(0.1))
    says("needs a linear operator", nonlinear, prior)
