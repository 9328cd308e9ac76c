"""The mean of several methods, and the demo that solves nothing twice."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import invsolve as iv
from invsolve import InverseProblem, io, samplers
from invsolve.demo import Method, compare, quick
from invsolve.operators import GaussianNoise, Mask
from invsolve.priors import Affine, AffineMap, GaussianPrior, Prior
from invsolve.samplers import ensemble, pnp, reddiff
from invsolve.shapes import Sigma, X
from invsolve.solve import Stats

PNP = partial(pnp, steps=4)
RED = partial(reddiff, steps=4, init="zeros")


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def inpainting(generator: Generator, batch: int = 1) -> tuple[InverseProblem, Prior]:
    root = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    mean = torch.zeros(1, 4, 4, dtype=torch.float64)
    prior = GaussianPrior(mean, root @ root.T / 16 + 0.1 * torch.eye(16))
    mask = (torch.rand(1, 4, 4, generator=generator) < 0.6).double()
    x = prior.sample(batch, generator=generator)
    return InverseProblem(mask * x, Mask(mask), GaussianNoise(0.1)), prior


def test_it_is_the_mean_and_errs_less_by_the_members_scatter(
    generator: Generator,
) -> None:
    """‖x̂ − x‖² = 1/K Σ‖x̂ₖ − x‖² − 1/K Σ‖x̂ₖ − x̂‖², whatever x is."""
    problem, prior = inpainting(generator, batch=2)
    got = ensemble(problem, prior, methods=(PNP, RED), generator=seeded(5))
    members = torch.stack(
        [PNP(problem, prior), RED(problem, prior, generator=seeded(5))]
    )
    close(got, members.mean(0))
    x = torch.randn(got.shape, generator=generator, dtype=got.dtype)
    theirs = (members - x).square().sum((1, 2, 3, 4)).mean()
    scatter = (members - got).square().sum((1, 2, 3, 4)).mean()
    assert scatter > 0
    close((got - x).square().sum(), theirs - scatter)


def test_members_draw_one_after_another(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    got = ensemble(problem, prior, methods=(RED, RED), generator=seeded(5))
    stream = seeded(5)
    one, two = (RED(problem, prior, generator=stream) for _ in range(2))
    assert not torch.equal(one, two)
    close(got, (one + two) / 2)


def test_those_begin_where_it_says_that_do_not_say_so_themselves(
    generator: Generator,
) -> None:
    problem, prior = inpainting(generator)
    at = torch.randn(1, 1, 4, 4, generator=generator, dtype=torch.float64)
    begun: dict[str, Any] = {}

    def told(name: str, init: Any) -> X:
        begun[name] = init
        return problem.y

    def takes(
        problem: InverseProblem, prior: Prior, *, init: Any = "pinv", **_: Any
    ) -> X:
        return told("takes", init)

    def says(
        problem: InverseProblem, prior: Prior, *, init: Any = "pinv", **_: Any
    ) -> X:
        return told("says", init)

    def cannot(problem: InverseProblem, prior: Prior, **more: Any) -> X:
        return told("cannot", more.get("init"))

    methods = (partial(takes), partial(partial(says, init="zeros")), cannot)
    ensemble(problem, prior, methods=methods, init=at, generator=generator)
    assert begun["takes"] is at
    assert begun["says"] == "zeros"
    assert begun["cannot"] is None
    ensemble(problem, prior, methods=methods, generator=generator)
    assert begun["takes"] == "pinv"


def test_through_solve_it_begins_in_the_image_s_own_unit(generator: Generator) -> None:
    """The mean of what its members give, solved each by itself from the same image."""
    problem, prior = inpainting(generator)
    prior = Affine(prior, AffineMap(0.02, 0.1))
    first = partial(samplers.tv, lam=3.0, steps=10)
    got = iv.solve(
        problem,
        prior,
        ensemble,
        methods=(PNP, RED),
        init=first,
        generator=seeded(5),
    )
    one = iv.solve(problem, prior, PNP, init=first, generator=seeded(5))
    two = iv.solve(problem, prior, RED, generator=seeded(5))
    close(got.mean, (one.mean + two.mean) / 2)
    assert not torch.equal(one.mean, two.mean)
    assert got.kind == "point_estimate"
    assert got.stats.network_forwards == 4 + 4


def test_nothing_is_no_ensemble(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    with pytest.raises(ValueError, match="give one or more"):
        ensemble(problem, prior, methods=(), generator=generator)


# --- the demo


class Shrink(Prior):
    """x/(1 + σ²), the mean of a standard Gaussian."""

    sigma_min, sigma_max = 0.01, 10.0

    def denoise(self, x: X, sigma: Sigma) -> X:
        return x / (1 + torch.as_tensor(sigma).reshape(-1, 1, 1, 1) ** 2)


TV = {"lam": 100.0, "steps": 20}
METHODS = (
    Method("TV", samplers.tv, TV),
    Method("PnP", pnp, {"steps": 3, "init": partial(samplers.tv, **TV)}),
    Method(
        "mean of both",
        ensemble,
        {
            "methods": (partial(pnp, steps=3), partial(reddiff, steps=6)),
            "init": partial(samplers.tv, **TV),
        },
    ),
)


def compared(methods: tuple[Method, ...]) -> dict[str, Any]:
    hu = torch.full((1, 16, 16), -1000.0)
    hu[:, 4:12, 5:11] = 40.0
    affine = torch.diag(torch.tensor([8.0, 8.0, 3.0, 1.0])).numpy()
    found = compare(
        io.Image(hu, affine, "HU"),
        Shrink(),
        methods=methods,
        views=6,
        generator=seeded(0),
        device=torch.device("cpu"),
    )
    return {result.name: result for result in found.results}


def test_what_a_method_begins_with_is_solved_once_and_counted_each_time() -> None:
    """The same image and the same cost as when it is solved anew."""
    found = compared(METHODS)
    # No TV before it: PnP solves it itself, from the same measurements.
    alone = compared(METHODS[1:2])["PnP"]
    torch.testing.assert_close(found["PnP"].image, alone.image)
    for name in ("network_forwards", "operator_applies", "operator_adjoints"):
        assert getattr(found["PnP"].stats, name) == getattr(alone.stats, name), name
    assert alone.stats.operator_applies > found["TV"].stats.operator_applies > 0
    assert found["PnP"].stats.seconds > found["TV"].stats.seconds
    assert found["mean of both"].stats.network_forwards == 3 + 6
    told = found["mean of both"].settings
    assert told["methods"] == "pnp(steps=3), reddiff(steps=6)"
    assert told["init"].startswith("tv(lam=100")


def test_costs_add_up() -> None:
    one = Stats(1, 2, 3, 4, 5, 0.5, 0.25, 1.0, 100)
    two = replace(one, network_forwards=10, seconds=2.0, peak_bytes=70)
    both = one + two
    assert both == Stats(11, 4, 6, 8, 10, 1.0, 0.5, 3.0, 100)
    assert both.overhead == 0.5


def test_quick_has_a_third_of_the_steps_within_an_ensemble_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("invsolve.demo.METHODS", METHODS)
    tv, pnp, mean = quick()
    assert tv.options["steps"] == 6
    assert pnp.options["init"].keywords == tv.options
    assert [m.keywords["steps"] for m in mean.options["methods"]] == [1, 2]
