"""A prior of images that are as likely mirrored and shifted."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, samplers, solve
from invsolve.operators import GaussianNoise, Identity
from invsolve.priors import (
    Affine,
    AffineMap,
    Equivariant,
    GaussianPrior,
    Prior,
    Slices,
    StationaryPrior,
)

N = 5
LEVELS = torch.linspace(-3, 3, 4000, dtype=torch.float64).exp()


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def field() -> GaussianPrior:
    """Of which no two pixels are alike."""
    factor = random(N * N, 3, seed=1)
    return GaussianPrior(
        random(1, N, N), torch.eye(N * N).double() / 2 + factor @ factor.T
    )


def test_what_knows_no_place_stays_as_it_is() -> None:
    """A stationary field with a symmetric covariance is turned into itself."""
    prior = StationaryPrior.matern((8, 8), scale=2.0)
    x = random(3, 1, 8, 8)
    for sigma in LEVELS[::400]:
        assert_close(Equivariant(prior).denoise(x, sigma), prior.denoise(x, sigma))


def test_each_answer_is_of_a_turned_image() -> None:
    """g⁻¹ D(g x; σ) for one of the mirrorings and shifts, and in turn for all of them."""
    prior, x = field(), random(1, 1, N, N, seed=2)
    sigma = torch.tensor(0.7).double()
    group = [
        (f, a, b) for f in (False, True) for a in range(-2, 3) for b in range(-2, 3)
    ]

    def by(flip: bool, down: int, right: int) -> Tensor:
        across = [-1] if flip else []
        gx = x.roll((down, right), (-2, -1)).flip(across)
        return prior.denoise(gx, sigma).flip(across).roll((-down, -right), (-2, -1))

    wrapped = Equivariant(prior, shift=2)
    drawn = wrapped.drawn(float(sigma))
    assert drawn in group
    assert_close(wrapped.denoise(x, sigma), by(*drawn))
    seen = Counter(wrapped.drawn(s) for s in LEVELS.tolist())
    counts = [seen[g] for g in group]
    # Multinomial: each of 50 has 80 ± 9 of 4000.
    assert min(counts) > 80 - 45 and max(counts) < 80 + 45
    assert {Equivariant(prior, mirror=False).drawn(s)[0] for s in (0.1, 0.7, 2.0)} == {
        False
    }
    assert {Equivariant(prior, shift=0).drawn(s)[1:] for s in (0.1, 0.7, 2.0)} == {
        (0, 0)
    }


def test_over_many_levels_no_place_is_special() -> None:
    """A prior of one image only, D = m, answers with m's mean on average."""
    m = random(1, N, N)
    prior = GaussianPrior(m, torch.zeros(N * N, N * N).double())
    wrapped, x = Equivariant(prior, shift=N // 2), random(1, 1, N, N)
    answers = wrapped.denoise(x.expand(len(LEVELS), -1, -1, -1), LEVELS)
    error = (answers.mean(0) - m.mean()).abs().max()
    assert float(error) < 5 * float(m.std()) / len(LEVELS) ** 0.5


def test_levels_of_each_item_and_units() -> None:
    prior, x = field(), random(3, 1, N, N, seed=4)
    sigmas = torch.tensor([0.3, 1.0, 2.5]).double()
    wrapped = Equivariant(prior)
    one_by_one = [wrapped.denoise(x[i : i + 1], sigmas[i]) for i in range(3)]
    assert_close(wrapped.denoise(x, sigmas), torch.cat(one_by_one))
    inner, map = Equivariant(Affine(prior, AffineMap(3.0, 0.5))).normalised
    assert map == AffineMap(3.0, 0.5) and isinstance(inner, Equivariant)
    assert inner.sigma_max == prior.sigma_max
    assert_close(inner.denoise(x, sigmas), wrapped.denoise(x, sigmas))


def test_it_is_differentiable() -> None:
    wrapped = Equivariant(field())
    x = random(2, 1, N, N).requires_grad_()
    sigma = torch.tensor(0.6).double()
    assert torch.autograd.gradcheck(lambda v: wrapped.denoise(v, sigma), (x,))


def test_a_solve_by_an_equivariant_prior_is_unchanged() -> None:
    """White images: every turn of them is as likely. And a solve can be repeated."""
    prior = GaussianPrior(torch.ones(1, 4, 4), 0.5 * torch.eye(16), 0.01, 20.0)
    problem = InverseProblem(random(1, 1, 4, 4).float(), Identity(), GaussianNoise(0.5))

    def run(prior: Prior) -> Tensor:
        more: dict[str, Any] = {"steps": 12, "samples": 4, "generator": seeded(1)}
        return solve(problem, prior, samplers.dds, **more).samples

    assert_close(run(Equivariant(prior)), run(prior), rtol=1e-4, atol=1e-4)
    uneven = GaussianPrior(random(1, 4, 4).float(), 0.5 * torch.eye(16), 0.01, 20.0)
    assert torch.equal(run(Equivariant(uneven)), run(Equivariant(uneven)))
    assert not torch.allclose(run(Equivariant(uneven)), run(uneven), atol=0.01)


def test_it_is_of_images() -> None:
    with pytest.raises(ValueError, match=r"Slices\(Equivariant\(prior\)\)"):
        Equivariant(Slices(field())).check((1, 4, N, N))
    with pytest.raises(ValueError, match="shift must be at least 0"):
        Equivariant(field(), shift=-1)
    with pytest.raises(ValueError, match="more without mirror"):
        Equivariant(field(), mirror=False, shift=0)
