"""DFM where everything is known: Gaussian signals, measured a few coordinates at a time."""

import math
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Generator, Tensor

import invsolve as iv
from invsolve import operators as ops
from invsolve.forward_prior import GaussianForwardPrior
from invsolve.identifiability import identifiability
from invsolve.operators.parametric import Parametric
from invsolve.samplers import dfm

module = sys.modules[dfm.__module__]
D = 6
FAMILY = Parametric.pixels((1, 1, D))


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def rows(*at: int) -> Tensor:
    chosen = torch.zeros(1, 1, D, dtype=torch.bool)
    chosen[0, 0, list(at)] = True
    return chosen


def gaussian(sigma: float, target_rows: int = 2) -> GaussianForwardPrior:
    L = torch.randn(D, D, dtype=torch.float64, generator=seeded(3))
    cov = L @ L.T / D + 0.1 * torch.eye(D)
    mean = torch.randn(1, 1, D, dtype=torch.float64, generator=seeded(4))
    return GaussianForwardPrior(FAMILY, mean, cov, sigma=sigma, target_rows=target_rows)


def posterior_cov(prior: GaussianForwardPrior, seen: Tensor) -> Tensor:
    A = torch.eye(D, dtype=torch.float64)[seen.flatten()]
    return torch.linalg.inv(torch.linalg.inv(prior.cov) + A.T @ A / prior.sigma**2)


def posterior_mean(prior: GaussianForwardPrior, y: Tensor, seen: Tensor) -> Tensor:
    A = torch.eye(D, dtype=torch.float64)[seen.flatten()]
    b = torch.linalg.solve(prior.cov, prior.mean.flatten())
    b = b + A.T @ y.flatten()[seen.flatten()] / prior.sigma**2
    return posterior_cov(prior, seen) @ b


def moments(
    prior: GaussianForwardPrior, y: Tensor, context: Tensor, draws: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Mean and covariance, read off the affine map from the draws to the result."""
    units = torch.cat([torch.zeros(1, draws * D), torch.eye(draws * D)]).double()
    noise = iter(units.reshape(-1, draws, 1, 1, D).unbind(1))
    items = y.expand(len(units), -1, -1, -1)
    problem = iv.InverseProblem(items, FAMILY(context), ops.GaussianNoise(prior.sigma))

    def given(x: Tensor, generator: object) -> Tensor:
        return next(noise)

    with (
        patch.object(module, "randn_like", given),
        patch("invsolve.forward_prior.randn_like", given),
    ):
        x = dfm(problem, prior, generator=seeded(), **options).flatten(1)
    assert next(noise, None) is None
    factors = x[1:] - x[0]
    return x[0], factors.T @ factors


def off(cov: Tensor, of: Tensor) -> float:
    return float((cov - of).norm() / of.norm())


Y = torch.randn(1, 1, 1, D, dtype=torch.float64, generator=seeded(8))
C, T1, T2 = rows(0, 1), rows(2, 3), rows(4, 5)
SIGMAS = (0.02, 0.3)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_one_target_lacks_just_what_context_and_target_leave_open(
    sigma: float,
) -> None:
    prior = gaussian(sigma)
    mean, cov = moments(prior, Y, C, 1, targets=[T1[0]], steps=400)
    seen = posterior_cov(prior, C)
    assert off(cov, seen - posterior_cov(prior, C | T1)) < 0.02
    assert off(cov, seen) > 0.2
    torch.testing.assert_close(mean, posterior_mean(prior, Y, C), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_all_targets_and_the_closing_draw_give_the_posterior(sigma: float) -> None:
    prior = gaussian(sigma)
    two = [T1[0], T2[0]]
    exact = posterior_cov(prior, C)
    _, closed = moments(prior, Y, C, 3, targets=two, steps=400, closing="gaussian")
    assert off(closed, exact) < 0.02
    _, without = moments(prior, Y, C, 2, targets=two, steps=400)
    assert off(without, exact - posterior_cov(prior, C | T1 | T2)) < 0.02


def test_without_the_noise_correction_the_target_is_too_narrow() -> None:
    prior = gaussian(0.3)
    seen = posterior_cov(prior, C)
    expected = seen - posterior_cov(prior, C | T1)
    with patch.object(GaussianForwardPrior, "corrected", lambda self, o, u, s: o):
        _, cov = moments(prior, Y, C, 1, targets=[T1[0]], steps=400)
    assert off(cov, expected) > 0.05


def test_more_steps_err_less() -> None:
    prior = gaussian(0.1)
    expected = posterior_cov(prior, C) - posterior_cov(prior, C | T1)
    errors = [
        off(moments(prior, Y, C, 1, targets=[T1[0]], steps=n)[1], expected)
        for n in (10, 20, 50, 100, 200)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[2]


def test_ancestral_steps_have_the_same_mean_and_covariance() -> None:
    prior = gaussian(0.3)
    problem = iv.InverseProblem(
        Y.expand(5_000, -1, -1, -1), FAMILY(C), ops.GaussianNoise(0.3)
    )
    x = dfm(
        problem, prior, targets=[T1[0]], steps=300, eta=1.0, generator=seeded()
    ).flatten(1)
    expected = posterior_cov(prior, C) - posterior_cov(prior, C | T1)
    assert off(x.T.cov(), expected) < 0.1


def test_drawn_targets_are_those_not_acquired_and_all_of_them_are_the_posterior() -> (
    None
):
    prior = gaussian(0.3)
    problem = iv.InverseProblem(
        Y.expand(5_000, -1, -1, -1), FAMILY(C), ops.GaussianNoise(0.3)
    )
    x = dfm(
        problem,
        prior,
        targets="all",
        steps=100,
        closing="gaussian",
        generator=seeded(),
    ).flatten(1)
    assert off(x.T.cov(), posterior_cov(prior, C)) < 0.1


def test_guidance_of_the_exact_unconditional_and_conditional_is_affine() -> None:
    prior = gaussian(0.3)
    y, u = Y, torch.randn(1, 1, 1, D, dtype=torch.float64, generator=seeded(1))
    s = torch.tensor(2.0, dtype=torch.float64)
    none = rows() & False
    at = prior.guess(y, C)
    conditional = prior.corrected(prior.signal(y, C, u, T1, s, at), u, s)
    free = prior.corrected(prior.signal(y, none, u, T1, s, at), u, s)
    problem = iv.InverseProblem(y, FAMILY(C), ops.GaussianNoise(0.3))
    answers = []

    def once(denoise: Any, x: Tensor, levels: Tensor, **rest: object) -> Tensor:
        answers.append(denoise(u, levels[0]))
        return x

    how: dict[str, Any] = {"targets": [T1[0]], "sigmas": s[None], "solver": once}
    dfm(problem, prior, guidance=2.5, generator=seeded(), **how)
    torch.testing.assert_close(answers[0], free + 2.5 * (conditional - free))


def test_a_second_order_solver_needs_few_steps() -> None:
    prior = gaussian(0.1)
    expected = posterior_cov(prior, C) - posterior_cov(prior, C | T1)

    def error(**how: Any) -> float:
        cov = moments(prior, Y, C, 1, targets=[T1[0]], steps=40, **how)[1]
        return off(cov, expected)

    assert error(solver=iv.samplers.solvers.Multistep(2)) < 0.03 < 0.08 < error()


def test_solve_gives_each_sample_its_own_stream_and_counts() -> None:
    prior = gaussian(0.3)
    problem = iv.InverseProblem(Y, FAMILY(C), ops.GaussianNoise(0.3))

    def solved(n: int, chunk: int) -> iv.Solution:
        return iv.solve(
            problem, prior, dfm, samples=n, chunk=chunk, generator=seeded(), steps=20
        )

    four, two = solved(4, 3), solved(2, 1)
    torch.testing.assert_close(four.samples[:2], two.samples)
    assert four.kind == "posterior_sample"
    assert four.stats.network_forwards == 4 * (20 + 2)
    assert (four.samples[0] != four.samples[1]).any()


def test_each_item_may_have_rows_of_its_own() -> None:
    """Three acquired two, three or five of six rows; of the last one is left to aim at."""
    prior = gaussian(0.3)
    seen = torch.cat([C, rows(1, 3, 4), rows(0, 1, 2, 4, 5)])
    y = FAMILY.restrict_data(Y.expand(3, -1, -1, -1), seen)

    def drawn(items: slice) -> Tensor:
        A, noise = FAMILY(seen[items]), ops.GaussianNoise(0.3)
        streams = [seeded(i) for i in range(3)][items]
        problem = iv.InverseProblem(y[items], A, noise)
        return dfm(problem, prior, steps=20, closing="gaussian", generator=streams)

    alone = [drawn(slice(i, i + 1)) for i in range(3)]
    torch.testing.assert_close(drawn(slice(None)), torch.cat(alone))
    problem = iv.InverseProblem(y, FAMILY(seen), ops.GaussianNoise(0.3))
    means = iv.solve(problem, prior, dfm, targets=0, generator=seeded()).mean
    for mean, own, acquired in zip(means, y, seen, strict=True):
        exact = posterior_mean(prior, own, acquired)
        torch.testing.assert_close(mean.flatten(), exact, rtol=1e-6, atol=1e-6)


def test_k_space_lines_and_views_give_their_posterior() -> None:
    angles = torch.linspace(0, math.pi, 7)[:-1]
    for family in (
        Parametric.lines((4, 4)),
        Parametric.views(ops.ParallelBeam((4, 4), angles)),
    ):
        d = math.prod(family.image)
        L = torch.randn(d, d, dtype=torch.float64, generator=seeded(3)) / d**0.5
        cov = L @ L.T + 0.1 * torch.eye(d)
        mean = torch.zeros(family.image, dtype=torch.float64)
        prior = GaussianForwardPrior(family, mean, cov, sigma=0.2, target_rows=2)
        acquired = torch.zeros(1, *family.grid, dtype=torch.bool)
        acquired[0, :2] = True
        x = mean.expand(1, *mean.shape)
        y = family(acquired).apply(x).expand(5_000, -1, -1, -1)
        problem = iv.InverseProblem(y, family(acquired), ops.GaussianNoise(0.2))
        S = dfm(
            problem,
            prior,
            targets=[~acquired[0]],
            steps=60,
            closing="gaussian",
            generator=seeded(),
        )
        none = torch.zeros_like(acquired)
        information = prior._information(y[:1], acquired, none, torch.ones(()))[1]
        exact = torch.linalg.inv(information[0])
        assert off(S.flatten(1).T.cov(), exact) < 0.15


def test_identifiability_tells_what_no_exam_can() -> None:
    g = seeded()
    seen = torch.rand(200, 1, D, generator=g) < 0.5
    fine = identifiability(FAMILY, seen)
    assert fine.warnings == []
    assert fine.unpaired == 0
    apart = seen.clone()
    apart[:, 0, 1] &= ~apart[:, 0, 0]
    told = identifiability(FAMILY, apart)
    assert told.unpaired == 1
    assert "never acquired together" in told.warnings[0]
    hidden = seen.clone()
    hidden[:, 0, 4] = False
    told = identifiability(FAMILY, hidden)
    assert told.never.tolist() == [[0, 4]]
    assert told.null is not None
    torch.testing.assert_close(told.null.abs().flatten(), torch.eye(D)[4])
    assert len(told.warnings) == 2


def test_few_views_leave_null_directions() -> None:
    family = Parametric.views(ops.ParallelBeam((6, 6), torch.tensor([0.0, 1.0])))
    told = identifiability(family, torch.ones(10, 2, dtype=torch.bool))
    assert told.null is not None
    assert len(told.null) >= 36 - 2 * family.measured[1]
    y = family.full.apply(told.null)
    assert y.abs().max() < 1e-2


def test_bad_input_is_refused() -> None:
    prior = gaussian(0.3)
    other = Parametric.pixels((1, 2, 3))
    acquired = torch.ones(1, 2, 3, dtype=torch.bool)

    def solved(problem: iv.InverseProblem, prior: Any = prior, **options: Any) -> None:
        iv.solve(problem, prior, dfm, generator=seeded(), **options)

    good = iv.InverseProblem(Y, FAMILY(C), ops.GaussianNoise(0.3))
    with pytest.raises(ValueError, match="trained for images"):
        solved(
            iv.InverseProblem(
                Y.reshape(1, 1, 2, 3), other(acquired), ops.GaussianNoise(0.3)
            )
        )
    with pytest.raises(ValueError, match="trained for noise of"):
        solved(iv.InverseProblem(Y, FAMILY(C), ops.GaussianNoise(0.5)))
    with pytest.raises(ValueError, match="another geometry"):
        weights = ops.Mask(torch.arange(1.0, D + 1))
        solved(iv.InverseProblem(Y, weights, ops.GaussianNoise(0.3)))
    with pytest.raises(ValueError, match="trained on measurements"):
        solved(good, iv.priors.GaussianPrior(prior.mean, prior.cov))
    with pytest.raises(ValueError, match="that were acquired"):
        solved(good, targets=[rows(0)[0]])
    with pytest.raises(ValueError, match=r"samplers\.dfm"):
        prior.denoise(Y, torch.tensor(1.0))
