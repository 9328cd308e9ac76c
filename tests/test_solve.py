"""Solving: what the samples depend on, what is counted, and what is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import pytest
import torch
from exact import PRIOR, PROBLEM, Matrix, image_prior, real
from torch import Generator, Tensor, nn

from invsolve import InverseProblem, Solution, samplers, solve
from invsolve.operators import (
    Blur,
    ComplexChannels,
    GaussianNoise,
    Mask,
    Operator,
    ParallelBeam,
)
from invsolve.operators.base import Rescale
from invsolve.operators.nonlinear import PhaseRetrieval, Saturate
from invsolve.priors import Affine, AffineMap, EDMPrior, GaussianPrior, Prior
from invsolve.shapes import Sigma, X, Y

STEPS = 4


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def inpainting(generator: Generator, batch: int = 2) -> tuple[InverseProblem, Prior]:
    prior = image_prior(generator)
    mask = (torch.rand(1, 4, 4, generator=generator) < 0.6).double()
    x = prior.sample(batch, generator=generator)
    return InverseProblem(mask * x, Mask(mask), GaussianNoise(0.1)), prior


SAMPLERS = [
    pytest.param(partial(samplers.dps, steps=STEPS), id="dps"),
    pytest.param(partial(samplers.diffpir, steps=STEPS), id="diffpir"),
    pytest.param(partial(samplers.dds, steps=STEPS), id="dds"),
    pytest.param(partial(samplers.tmpd, steps=STEPS), id="tmpd"),
    pytest.param(partial(samplers.reddiff, steps=STEPS), id="reddiff"),
    pytest.param(
        partial(samplers.reddiff, steps=STEPS, order="random"), id="reddiff-random"
    ),
]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


# --- what the samples depend on


@every_sampler
def test_each_item_may_have_a_mask_of_its_own(
    sampler: Callable[..., Tensor], generator: Generator
) -> None:
    """Of more items than go through the network at once."""
    prior = image_prior(generator)
    x = prior.sample(20, generator=generator)
    masks = (torch.rand(x.shape, generator=generator) < 0.6).double()
    noise = GaussianNoise(0.1)
    problem = InverseProblem(masks * x, Mask(masks), noise)
    found = solve(problem, prior, sampler, samples=2, generator=seeded()).samples
    for i in (3, 17):
        one = InverseProblem(problem.y[i][None].expand_as(x), Mask(masks[i]), noise)
        alone = solve(one, prior, sampler, samples=2, generator=seeded()).samples
        close(found[:, i], alone[:, i])


@every_sampler
def test_nothing_depends_on_the_chunks(
    sampler: Callable[..., Tensor], generator: Generator
) -> None:
    problem, prior = inpainting(generator)
    whole, *others = (
        solve(problem, prior, sampler, samples=3, generator=seeded(), chunk=chunk)
        for chunk in (None, 1, 2, 4, 5)
    )
    assert whole.samples.shape == (3, 2, 1, 4, 4)
    for other in others:
        close(other.samples, whole.samples)
        assert other.stats.network_forwards == whole.stats.network_forwards
    assert len(whole.samples.flatten(0, 1).unique(dim=0)) == 6  # no stream used twice


@every_sampler
def test_a_sample_does_not_depend_on_how_many_there_are(
    sampler: Callable[..., Tensor], generator: Generator
) -> None:
    problem, prior = inpainting(generator)
    few, many = (
        solve(problem, prior, sampler, samples=n, generator=seeded()) for n in (2, 5)
    )
    close(few.samples, many.samples[:2])


def test_the_seed_decides_and_the_global_state_is_left_alone(
    generator: Generator,
) -> None:
    problem, prior = inpainting(generator)
    run = partial(solve, problem, prior, samplers.diffpir, steps=STEPS)
    before = torch.get_rng_state()
    first = run(generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.samples, run(generator=seeded(0)).samples)
    assert not torch.equal(first.samples, run(generator=seeded(1)).samples)


@final
class Cramped(Prior):
    """A prior whose memory holds so many images at once."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, inner: Prior, holds: int, after: int = 0) -> None:
        self.inner, self.holds, self.after = inner, holds, after
        self.sizes: list[int] = []

    def denoise(self, x: X, sigma: Sigma) -> X:
        self.sizes.append(len(x))
        if len(x) > self.holds and len(self.sizes) > self.after:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner.denoise(x, sigma)


@every_sampler
@pytest.mark.parametrize("after", [0, 2])
def test_running_out_of_memory_changes_nothing(
    sampler: Callable[..., Tensor], after: int, generator: Generator
) -> None:
    """Even in the midst of a run, when much noise has already been drawn."""
    problem, prior = inpainting(generator)
    expected = solve(problem, prior, sampler, samples=5, generator=seeded())
    cramped = Cramped(prior, holds=3, after=after)  # of ten, or twice ten
    got = solve(problem, cramped, sampler, samples=5, generator=seeded())
    close(got.samples, expected.samples)
    assert max(cramped.sizes) > 3 and min(cramped.sizes) <= 3


def test_memory_that_holds_nothing_is_an_error(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    with pytest.raises(torch.OutOfMemoryError):
        solve(problem, Cramped(prior, 0), samplers.diffpir, generator=seeded())


def test_other_errors_are_not_taken_for_memory(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    asked: list[int] = []

    def failing(problem: InverseProblem, prior: Prior, **_: Any) -> Tensor:
        asked.append(len(problem.y))
        raise RuntimeError("a matrix is singular")

    with pytest.raises(RuntimeError, match="singular"):
        solve(problem, prior, failing, samples=4, generator=seeded())
    assert asked == [8]


# --- ranges


@pytest.mark.parametrize("offset", [0.0, 0.7])
@every_sampler
def test_the_sampler_works_in_the_prior_s_range(
    sampler: Callable[..., Tensor], offset: float, generator: Generator
) -> None:
    """x = cu + b solved in x is y − Ab = (cA) u solved in u."""
    inner = image_prior(generator)
    map = AffineMap(0.02, offset)
    mask = (torch.rand(1, 4, 4, generator=generator) < 0.6).double()
    y = mask * map(inner.sample(2, generator=generator))
    noise = GaussianNoise(0.001)
    in_x = solve(
        InverseProblem(y, Mask(mask), noise),
        Affine(inner, map),
        sampler,
        generator=seeded(),
    )
    shifted = InverseProblem(y - offset * mask, 0.02 * Mask(mask), noise)
    in_u = solve(shifted, inner, sampler, generator=seeded())
    torch.testing.assert_close(
        in_x.samples, map(in_u.samples), rtol=1e-6, atol=1e-6 * map.scale
    )


def test_the_range_does_not_change_a_gaussian_posterior(generator: Generator) -> None:
    """x in millimetres or metres: the same law, moved."""
    map = AffineMap(3.0, -2.0)
    rescaled = Affine(
        GaussianPrior(map.inverse(PRIOR.mean), PRIOR.cov / map.scale**2), map
    )
    x = real([[0.3, -0.1], [2.0, 1.0]])
    sigma = real(0.4)
    close(rescaled.denoise(x, sigma), PRIOR.denoise(x, sigma))
    assert rescaled.normalised[0] is rescaled.inner


# --- what is counted


def test_costs_of_diffpir_are_exact(generator: Generator) -> None:
    """A step is a forward and a prox; a closed form applies no operator."""
    problem, prior = inpainting(generator)
    stats = solve(
        problem, prior, samplers.diffpir, samples=3, steps=STEPS, generator=seeded()
    ).stats
    images = 3 * 2
    assert stats.network_forwards == images * STEPS
    assert stats.network_backwards == 0
    assert stats.operator_applies == 0
    assert stats.closed_forms == images * STEPS
    assert stats.operator_adjoints == images  # the images' shape is asked for once
    assert stats.peak_bytes > 0 and stats.seconds > 0


def test_costs_of_conjugate_gradients_are_exact() -> None:
    """M steps from a start cost M + 1 applications of AᴴA, and one of Aᴴ."""
    stats = solve(
        PROBLEM,
        PRIOR,
        partial(samplers.dds, steps=STEPS, gamma=5.0, cg_steps=1),
        generator=seeded(),
    ).stats
    assert stats.network_forwards == STEPS
    assert stats.closed_forms == 0
    assert stats.operator_applies == 2 * STEPS
    assert stats.operator_adjoints == 1 + 3 * STEPS


def test_costs_of_dps_and_reddiff_are_exact(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    for samples, chunk in ((1, None), (3, 2)):
        images = 2 * samples
        run = partial(
            solve, problem, prior, samples=samples, chunk=chunk, generator=seeded()
        )
        stats = run(samplers.dps, steps=STEPS).stats
        assert stats.network_forwards == stats.network_backwards == images * STEPS
        # One more of either, before the first step: what images are, what is hidden.
        assert stats.operator_applies == images * (STEPS + 1)
        assert stats.operator_adjoints == images * (STEPS + 1)
        stats = run(samplers.reddiff, steps=STEPS, antithetic=True).stats
        assert stats.network_forwards == 2 * images * STEPS
        assert stats.network_backwards == 0
        assert stats.operator_applies == stats.operator_adjoints == images * STEPS
        assert stats.closed_forms == images  # A⁺y, where it starts
        # A product with J for the step of conjugate gradients, and one for the guidance.
        stats = run(samplers.mmps, steps=STEPS, cg_steps=1).stats
        assert stats.network_forwards == images * STEPS
        assert stats.network_backwards == 2 * images * STEPS


@final
@dataclass(frozen=True, eq=False)
class Square(Operator):
    """y = x², pixel by pixel."""

    def apply(self, x: X) -> Y:
        return x**2


def test_nonlinear_operators_are_counted(generator: Generator) -> None:
    """A descent's step costs an application and an adjoint, a vjp by itself as much."""
    prior = image_prior(generator)
    y = prior.sample(2, generator=generator) ** 2
    problem = InverseProblem(y, Square(), GaussianNoise(0.1))
    init = torch.ones_like(y)
    solution = solve(
        problem, prior, samplers.reddiff, steps=STEPS, init=init, generator=seeded()
    )
    assert solution.stats.operator_applies == 2 * STEPS
    assert solution.stats.operator_adjoints == 2 * STEPS
    with pytest.raises(ValueError, match="needs a linear operator"):
        solve(problem, prior, samplers.diffpir, generator=seeded())


# --- the solution


def test_mean_and_spread_are_over_samples(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    solution = solve(
        problem, prior, samplers.diffpir, samples=6, steps=STEPS, generator=seeded()
    )
    x = solution.samples
    mean = sum(x) / 6
    close(solution.mean, torch.as_tensor(mean))
    close(solution.std, ((x - mean).square().sum(0) / 5).sqrt())
    assert solution.mean.shape == solution.std.shape == (2, 1, 4, 4)


def test_one_sample_has_no_spread(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    solution = solve(problem, prior, samplers.dds, steps=STEPS, generator=seeded())
    assert solution.std.isnan().all()
    assert torch.equal(solution.mean, solution.samples[0])


def test_the_solution_names_its_sampler_and_kind(generator: Generator) -> None:
    problem, prior = inpainting(generator)

    def told(sampler: Callable[..., Tensor]) -> tuple[str, str]:
        solution: Solution = solve(problem, prior, sampler, generator=seeded())
        return solution.sampler, solution.kind

    def mine(problem: InverseProblem, prior: Prior, **_: Any) -> Tensor:
        return problem.y

    fixed = partial(samplers.diffpir, steps=STEPS)
    assert told(fixed) == ("diffpir", "posterior_sample")
    assert told(partial(fixed, zeta=0.3)) == ("diffpir", "posterior_sample")
    assert told(partial(samplers.dps, steps=STEPS)) == ("dps", "steered")
    assert told(partial(samplers.reddiff, steps=STEPS)) == ("reddiff", "point_estimate")
    assert told(mine) == ("mine", "steered")  # of which nothing is known


def test_a_method_without_a_prior_needs_none(generator: Generator) -> None:
    A = ParallelBeam((8, 8), torch.linspace(0, torch.pi, 7)[:-1])
    y = torch.rand(2, 1, 6, A.detectors, generator=generator, dtype=torch.float64)
    problem = InverseProblem(y, A, GaussianNoise(0.1))
    solution = solve(problem, None, samplers.tv, steps=5, generator=seeded())
    close(solution.samples[0], samplers.tv(problem, steps=5))
    assert solution.stats.network_forwards == 0
    assert solution.stats.operator_applies > 0
    fbp = solve(problem, None, samplers.fbp, generator=seeded())
    close(fbp.samples[0], samplers.fbp(problem))


# --- what is refused


def test_a_misspelt_option_is_a_type_error(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    with pytest.raises(TypeError, match="stpes"):
        solve(problem, prior, samplers.diffpir, stpes=3, generator=seeded())


def test_a_prior_of_other_images_is_refused_before_anything_runs(
    generator: Generator,
) -> None:
    problem, _ = inpainting(generator)

    def net(x: Tensor, c_noise: Tensor) -> Tensor:
        raise AssertionError("the network was asked")

    for prior, why in (
        (EDMPrior(net, channels=2), "2 channel"),
        (Affine(EDMPrior(net, multiple_of=8), AffineMap(2.0, 0.0)), "divisible by 8"),
    ):
        with pytest.raises(ValueError, match=why):
            solve(problem, prior, samplers.diffpir, generator=seeded())


def test_a_diverging_sampler_is_refused() -> None:
    A = Matrix(real([[1e3, 0.0]]))
    large = InverseProblem(real([[1.5]]), A, GaussianNoise(0.1))
    descent = partial(samplers.reddiff, optimizer="sgd", lr=10.0, steps=200)
    with pytest.raises(ValueError, match="reddiff diverged"):
        solve(large, PRIOR, descent, generator=seeded())


@pytest.mark.parametrize(("samples", "chunk"), [(0, None), (1, 0)])
def test_less_than_one_is_refused(
    samples: int, chunk: int | None, generator: Generator
) -> None:
    problem, prior = inpainting(generator)
    run = partial(solve, problem, prior, samplers.diffpir, generator=seeded())
    with pytest.raises(ValueError, match="at least 1"):
        run(samples=samples, chunk=chunk)


def test_progress_wraps_the_sampler_s_loop(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    wrapped: list[int] = []

    def watch(loop: Any) -> Any:
        wrapped.append(len(loop))
        return iter(loop)

    solve(problem, prior, samplers.dds, steps=STEPS, generator=seeded(), progress=watch)
    assert wrapped == [STEPS]


# --- nonlinear operators


def phaseless(generator: Generator) -> Operator:
    return PhaseRetrieval.coded((4, 4), 4, generator=generator)


def saturated(generator: Generator) -> Operator:
    return Saturate() @ Blur.gaussian(0.5, (4, 4))


NONLINEAR = [
    pytest.param(partial(samplers.dps, steps=STEPS), id="dps"),
    pytest.param(partial(samplers.reddiff, steps=STEPS), id="reddiff"),
    pytest.param(
        partial(samplers.reddiff, steps=STEPS, init="zeros", normalize="bayes"),
        id="reddiff-zeros",
    ),
]
nonlinear_samplers = pytest.mark.parametrize("sampler", NONLINEAR)
measured = pytest.mark.parametrize("measure", [phaseless, saturated])
Measure = Callable[[Generator], Operator]


@nonlinear_samplers
@measured
def test_nonlinear_problems_need_no_init_and_know_no_chunks(
    sampler: Callable[..., Tensor], measure: Measure, generator: Generator
) -> None:
    prior, A = image_prior(generator), measure(generator)
    y = A(prior.sample(2, generator=generator))
    problem = InverseProblem(y, A, GaussianNoise(0.1))
    whole, *others = (
        solve(problem, prior, sampler, samples=3, generator=seeded(), chunk=chunk)
        for chunk in (None, 1, 4)
    )
    assert whole.samples.shape == (3, 2, 1, 4, 4)
    assert whole.samples.dtype == torch.float64
    for other in others:
        close(other.samples, whole.samples)


@nonlinear_samplers
@measured
def test_nonlinear_problems_are_solved_in_the_prior_s_range(
    sampler: Callable[..., Tensor], measure: Measure, generator: Generator
) -> None:
    """A(x) with x = cu + b is a problem of u, and a step in u is a step in u."""
    inner, A, map = image_prior(generator), measure(generator), AffineMap(0.3, 0.4)
    y = A(map(inner.sample(2, generator=generator)))
    noise = GaussianNoise(0.1)
    in_x = solve(
        InverseProblem(y, A, noise), Affine(inner, map), sampler, generator=seeded()
    )
    of_u = InverseProblem(y, A @ Rescale(0.3, 0.4), noise)
    in_u = solve(of_u, inner, sampler, generator=seeded())
    torch.testing.assert_close(
        in_x.samples, map(in_u.samples), rtol=1e-6, atol=1e-6 * map.scale
    )


@pytest.mark.parametrize(
    ("sampler", "options", "bound"),
    [
        (samplers.reddiff, {"steps": 100, "lr": 0.1, "lam": 0.05}, 1e-3),
        (samplers.dps, {"steps": 400, "zeta": 0.1}, 0.01),
    ],
)
def test_what_overflowed_is_filled_in(
    sampler: Callable[..., Tensor],
    options: dict[str, Any],
    bound: float,
    generator: Generator,
) -> None:
    """Better than by y/c; most of what did not overflow stays close to it.

    Not all: an estimate that overflows where y does not has no gradient back.
    """
    prior, A = image_prior(generator), Saturate()
    x = prior.sample(8, generator=generator)
    y = A(x)
    clipped = y.abs() == 1
    assert 0.2 < clipped.double().mean() < 0.9
    problem = InverseProblem(y, A, GaussianNoise(0.01))
    got = solve(problem, prior, sampler, generator=seeded(), **options).samples[0]
    error = (got - x).square()
    naive = (y / 2 - x).square()
    assert error[clipped].mean() < 0.75 * naive[clipped].mean()
    assert error[~clipped].median() < bound


def test_costs_of_nonlinear_problems_are_exact(generator: Generator) -> None:
    """A guess counts as a closed form; a step of DPS applies A, pulls back through A."""
    prior, A = image_prior(generator), phaseless(generator)
    y = A(prior.sample(2, generator=generator))
    rescaled = Affine(prior, AffineMap(0.5, 0.1))
    problem = InverseProblem(y, A, GaussianNoise(0.1))
    run = partial(solve, problem, rescaled, steps=STEPS, generator=seeded())
    stats = run(samplers.reddiff).stats
    assert (stats.closed_forms, stats.operator_adjoints) == (2, 2 * STEPS)
    stats = run(samplers.dps).stats
    assert stats.closed_forms == 0
    assert stats.operator_applies == 2 * STEPS
    assert stats.operator_adjoints == 2 * STEPS
    for sampler in (samplers.diffpir, samplers.dds, samplers.tmpd):
        with pytest.raises(ValueError, match=r"needs a linear operator.*reddiff.*dps"):
            solve(problem, Cramped(rescaled, 0), sampler, generator=seeded())


# --- an image to start from


def test_an_init_is_split_by_chunks_and_is_in_the_image_s_unit(
    generator: Generator,
) -> None:
    problem, inner = inpainting(generator, batch=3)
    map = AffineMap(0.3, 0.4)
    init = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=generator)
    prior = Affine(inner, map)
    run = partial(solve, problem, prior, samplers.reddiff, samples=2, init=init)
    still = run(generator=seeded(), steps=STEPS, lr=0.0)
    for sample in still.samples:
        close(sample, init)
    whole, *others = (
        run(generator=seeded(), steps=STEPS, chunk=chunk) for chunk in (None, 1, 2, 4)
    )
    for other in others:
        close(other.samples, whole.samples)


@pytest.mark.parametrize("sampler", [samplers.reddiff, samplers.pnp, samplers.red])
def test_an_init_may_be_what_another_method_makes_of_it(
    sampler: Any, generator: Generator
) -> None:
    """Of the problem in the image's own unit, once, and counted."""
    problem, inner = inpainting(generator, batch=3)
    prior = Affine(inner, AffineMap(0.3, 0.4))
    first = partial(samplers.tv, lam=2.0, steps=7)
    run = partial(solve, problem, prior, sampler, samples=2, steps=STEPS)
    image = solve(problem, None, first, generator=seeded())
    given = run(generator=seeded(), init=image.mean)
    made = run(generator=seeded(), init=first, chunk=2)
    close(made.samples, given.samples)
    for what in ("operator_applies", "operator_adjoints"):
        of = [getattr(s.stats, what) for s in (given, image, made)]
        assert of[0] + of[1] == of[2] and of[1] > 0


def test_a_prior_is_refused_before_another_method_is_asked(
    generator: Generator,
) -> None:
    def never(problem: InverseProblem) -> Tensor:
        raise AssertionError("asked")

    problem, _ = inpainting(generator)
    prior = EDMPrior(nn.Identity(), multiple_of=8)
    with pytest.raises(ValueError, match="divisible by 8"):
        solve(problem, prior, samplers.reddiff, init=never, generator=seeded())


def test_an_init_is_one_image_for_each_item(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    run = partial(solve, problem, prior, samplers.reddiff, generator=seeded())
    with pytest.raises(ValueError, match="init has 3 images for 2 measurements"):
        run(init=torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match="divisible by 8"):
        solve(
            problem,
            EDMPrior(nn.Identity(), multiple_of=8),
            samplers.reddiff,
            init=torch.zeros(2, 1, 4, 4),
            generator=seeded(),
        )
    with pytest.raises(ValueError, match="1 channel"):
        solve(
            problem,
            EDMPrior(nn.Identity(), channels=1),
            samplers.reddiff,
            init=torch.zeros(2, 2, 4, 4),
            generator=seeded(),
        )


def test_a_counted_operator_knows_its_images_still(generator: Generator) -> None:
    """Two channels, of which y has one."""
    A = PhaseRetrieval((4, 4), complex_image=True) @ ComplexChannels()
    y = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=generator)
    prior = GaussianPrior(torch.zeros(2, 4, 4).double(), torch.eye(32).double())
    problem = InverseProblem(y, A, GaussianNoise(0.1))
    for sampler in (samplers.dps, samplers.reddiff):
        solution = solve(problem, prior, sampler, steps=STEPS, generator=seeded())
        assert solution.samples.shape == (1, 3, 2, 4, 4)


def test_dps_does_not_count_what_the_mask_hides(generator: Generator) -> None:
    problem, prior = inpainting(generator)
    assert isinstance(problem.operator, Mask)
    noisy = problem.y + 9 * (problem.operator.mask == 0)
    hidden = InverseProblem(noisy, problem.operator, problem.noise)
    one, other = (
        solve(p, prior, samplers.dps, steps=STEPS, generator=seeded())
        for p in (problem, hidden)
    )
    assert torch.equal(one.samples, other.samples)
