"""Priors and operators of slices on volumes."""

from collections.abc import Callable
from typing import Any, final

import numpy as np
import pytest
import torch
from exact import PRIOR
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, samplers, solve
from invsolve.operators import (
    Blur,
    ConeBeam,
    GaussianNoise,
    LinearOperator,
    Mask,
    MultiCoil,
    ParallelBeam,
    RealImage,
    SliceWise,
    dottest,
    simulated_maps,
)
from invsolve.priors import (
    Affine,
    AffineMap,
    EDMPrior,
    GaussianPrior,
    Groups,
    Prior,
    Slices,
    Sliding,
    TwoPlanes,
)
from invsolve.priors.networks.conditional import InTheMiddle
from invsolve.shapes import Sigma, X

D, H, W = 5, 4, 6
SIGMA = torch.tensor(0.7, dtype=torch.float64)
CUT = {0: (H, W), 1: (D, W), 2: (D, H)}
"""The sizes of the slices across each axis."""


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def field(a: int, b: int, seed: int = 0) -> GaussianPrior:
    """A prior of slices (1, a, b) whose pixels are correlated."""
    g = seeded(seed)
    factor = torch.randn(a * b, 3, generator=g, dtype=torch.float64) / 2
    mean = torch.randn(1, a, b, generator=g, dtype=torch.float64)
    cov = torch.eye(a * b).double() / 2 + factor @ factor.T
    return GaussianPrior(mean, cov, 0.01, 20.0)


def volume(batch: int = 2, seed: int = 3) -> Tensor:
    shape = (batch, 1, D, H, W)
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# --- the prior


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("each", [False, True])
def test_every_slice_is_denoised_alone(axis: int, each: bool) -> None:
    prior, x = field(*CUT[axis]), volume()
    sigma = torch.tensor([0.3, 2.0]).double() if each else SIGMA
    made = Slices(prior, axis).denoise(x, sigma)
    assert made.shape == x.shape
    for i in range(2):
        for k in range(x.shape[2 + axis]):
            slice = x[i].select(1 + axis, k)[None]
            expected = prior.denoise(slice, sigma[i] if each else sigma)
            assert_close(made[i].select(1 + axis, k)[None], expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_nothing_depends_on_the_chunk(axis: int, chunk: int) -> None:
    prior, x = field(*CUT[axis]), volume()
    whole = Slices(prior, axis).denoise(x, SIGMA)
    parts = Slices(prior, axis, chunk).denoise(x, SIGMA)
    assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_no_more_slices_than_a_chunk_are_seen() -> None:
    seen = Seeing()
    Slices(seen, 1, chunk=3).denoise(volume(), SIGMA)
    assert seen.batches == [3, 3, 2]


@final
class Seeing(Prior):
    """Notes how many images it is given at once."""

    sigma_min, sigma_max = 0.01, 20.0

    def __init__(self) -> None:
        self.batches: list[int] = []

    def denoise(self, x: X, sigma: Sigma) -> X:
        self.batches.append(len(x))
        return x / 2


def test_a_gradient_goes_through() -> None:
    prior, x = Slices(field(H, W), 0, 2), volume(1)
    made = torch.func.vjp(lambda x: prior.denoise(x, SIGMA), x)[1](x)[0]
    x.requires_grad_()
    [expected] = torch.autograd.grad((prior.denoise(x, SIGMA) * x.detach()).sum(), x)
    one = prior.inner.denoise(x[0].detach().movedim(0, 1), SIGMA)
    zero = prior.inner.denoise(torch.zeros_like(one), SIGMA)
    # D is affine with a symmetric matrix, so that its pull-back of x is D(x) − D(0).
    assert_close(expected[0].movedim(0, 1), one - zero)
    assert_close(made, expected)


def test_units_are_the_inner_prior_s() -> None:
    map = AffineMap(0.02, 0.1)
    prior = Slices(Affine(field(H, W), map), 0, 3)
    inner, found = prior.normalised
    x = volume()
    assert found == map
    assert isinstance(inner, Slices) and inner.chunk == 3
    assert prior.sigma_max == pytest.approx(0.02 * inner.sigma_max)
    assert_close(prior.denoise(map(x), 0.02 * SIGMA), map(inner.denoise(x, SIGMA)))


def test_a_network_may_lie_elsewhere() -> None:
    net = torch.nn.Conv2d(1, 1, 1)
    meta = torch.device("meta")
    here = Slices(EDMPrior(lambda x, c: net(x), 0.5))
    assert here.to(meta) is not here
    placed = Slices(EDMPrior(net, 0.5), device="cpu").to(meta)
    assert isinstance(placed, Slices) and isinstance(placed.inner, EDMPrior)
    moved = Slices(EDMPrior(net, 0.5)).to(meta)
    assert isinstance(moved, Slices) and isinstance(moved.inner, EDMPrior)
    kept, gone = placed.inner.net, moved.inner.net
    assert isinstance(kept, torch.nn.Conv2d) and kept.weight.device.type == "cpu"
    assert isinstance(gone, torch.nn.Conv2d) and gone.weight.device == meta


def test_what_is_no_volume_is_refused() -> None:
    prior = Slices(EDMPrior(lambda x, c: x, 0.5, multiple_of=2, channels=1))
    prior.check((1, 5, 4, 6))  # the depth need not be divisible
    with pytest.raises(ValueError, match="prior of volumes"):
        prior.check((1, 4, 6))
    with pytest.raises(ValueError, match=r"slices across d: .*divisible by 2, got 3×6"):
        prior.check((1, 4, 3, 6))
    with pytest.raises(ValueError, match=r"slices across h: .*divisible by 2, got 5×6"):
        Slices(prior.inner, 1).check((1, 5, 4, 6))
    with pytest.raises(ValueError, match="1 channel"):
        prior.check((2, 4, 4, 6))
    with pytest.raises(ValueError, match="axis is 0, 1 or 2"):
        Slices(PRIOR, 3)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        Slices(PRIOR, 0, 0)


# --- groups of slices

LEVELS = torch.linspace(3, -4, 300).exp().double()


def correlated(depth: int, mean: Tensor) -> GaussianPrior:
    """Slices of 4×6 of which neighbours have a correlation of 0.9."""
    at = torch.arange(depth)
    along = 0.9 ** (at[:, None] - at).abs().double()
    cov = torch.kron(along, field(H, W).cov)
    return GaussianPrior(mean.expand(depth, H, W).clone(), cov, 0.01, 20.0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("size", "spacing"), [(3, 1), (2, 2), (1, 1)])
def test_groups_are_denoised_together(axis: int, size: int, spacing: int) -> None:
    x = volume()
    shape = (size, *CUT[axis])
    g, d = seeded(5), size * CUT[axis][0] * CUT[axis][1]
    factor = torch.randn(d, 4, generator=g, dtype=torch.float64)
    mean = torch.randn(shape, generator=g, dtype=torch.float64)
    inner = GaussianPrior(mean, torch.eye(d).double() + factor @ factor.T)
    prior = Groups(inner, size, spacing, axis)
    for sigma in LEVELS[::20]:
        groups = prior.groups(x.shape[2 + axis], sigma)
        assert (groups.diff(dim=1) == spacing).all()
        times = groups.flatten().bincount(minlength=x.shape[2 + axis])
        assert 1 <= times.min() and times.max() <= 3
        total = torch.zeros_like(x)
        for group in groups:
            together = x.index_select(2 + axis, group)[:, 0].movedim(1 + axis, 1)
            done = inner.denoise(together, sigma).movedim(1, 1 + axis)[:, None]
            total.index_add_(2 + axis, group, done)
        view = [1] * 5
        view[2 + axis] = -1
        expected = total / times.reshape(view)
        assert_close(prior.denoise(x, sigma), expected)
        one = Groups(inner, size, spacing, axis, chunk=1)
        assert_close(one.denoise(x, sigma), expected, rtol=1e-12, atol=1e-12)


def test_every_offset_is_drawn_and_known_again() -> None:
    prior = Groups(field(H, W), 3)
    second = [int(prior.groups(60, s)[1, 0]) for s in LEVELS]
    assert second == [int(prior.groups(60, s)[1, 0]) for s in LEVELS]
    counts = torch.tensor(second).bincount(minlength=4)[1:4]
    assert (counts - 100).abs().max() < 4 * (300 * 2 / 9) ** 0.5


def test_slices_that_do_not_depend_on_each_other_need_no_groups() -> None:
    alone, x = field(H, W), volume()
    cov = torch.block_diag(*[alone.cov] * 3)
    together = GaussianPrior(alone.mean.expand(3, H, W).clone(), cov, 0.01, 20.0)
    for sigma in (SIGMA, torch.tensor([0.1, 3.0]).double()):
        expected = Slices(alone).denoise(x, sigma)
        assert_close(Groups(together).denoise(x, sigma), expected)


def test_groups_are_nearer_to_the_volume_s_own_prior_than_slices() -> None:
    depth, mean = 9, field(H, W).mean[0]
    whole, three = correlated(depth, mean), correlated(3, mean)
    x = whole.sample(50, generator=seeded(2))
    for sigma in (0.2, 1.0, 3.0):
        level = torch.tensor(sigma).double()
        noisy = x + sigma * torch.randn(x.shape, generator=seeded(3)).double()
        best = whole.denoise(noisy, level)

        def far(prior: Prior, noisy: Tensor = noisy, best: Tensor = best) -> float:
            made = prior.denoise(noisy[:, None], level)[:, 0]  # noqa: B023
            return float((made - best).square().mean())

        assert far(Groups(three)) < 0.5 * far(Slices(field(H, W)))


def test_groups_keep_their_unit_and_say_what_they_need() -> None:
    map = AffineMap(0.02, 0.1)
    prior = Groups(Affine(correlated(3, field(H, W).mean[0]), map))
    inner, found = prior.normalised
    assert found == map and isinstance(inner, Groups)
    assert prior.sigma_max == pytest.approx(0.02 * inner.sigma_max)
    x, level = volume()[:, :, :3], 0.02 * SIGMA  # one group, wherever it begins
    assert_close(prior.denoise(map(x), level), map(inner.denoise(x, SIGMA)))
    net = Groups(EDMPrior(lambda x, c: x, 0.5, multiple_of=2, channels=3))
    net.check((1, 5, 4, 6))
    with pytest.raises(ValueError, match="prior of volumes"):
        net.check((1, 4, 6))
    with pytest.raises(ValueError, match=r"groups across d: .*divisible by 2"):
        net.check((1, 5, 3, 6))
    with pytest.raises(ValueError, match="need 9 slices, the volume has 5"):
        Groups(net.inner, 3, 3).check((1, 5, 4, 6))
    with pytest.raises(ValueError, match="1 channel"):
        Groups(EDMPrior(lambda x, c: x, 0.5, channels=1)).check((1, 5, 4, 6))
    bad = {"axis": 3, "size": 0, "spacing": 0, "chunk": 0}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=r"axis is|must be at least 1"):
            Groups(PRIOR, **{name: value})  # pyright: ignore[reportArgumentType]


# --- slices among their neighbours


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_each_slice_is_denoised_among_its_own(axis: int, size: int) -> None:
    """The middle of an independent loop's windows, mirrored where the volume ends."""
    x, (a, b) = volume(), CUT[axis]
    d = size * a * b
    factor = torch.randn(d, 4, generator=seeded(5), dtype=torch.float64)
    mean = torch.randn(size, a, b, generator=seeded(6), dtype=torch.float64)
    inner = GaussianPrior(mean, torch.eye(d).double() + factor @ factor.T)
    depth, m = x.shape[2 + axis], size // 2
    first = x[:, 0].movedim(1 + axis, 1).numpy()
    sides = [(0, 0), (m, m), (0, 0), (0, 0)]
    padded = torch.from_numpy(np.pad(first, sides, mode="reflect"))
    for sigma in (SIGMA, torch.tensor([0.1, 3.0]).double()):
        expected = torch.stack(
            [inner.denoise(padded[:, k : k + size], sigma)[:, m] for k in range(depth)],
            1 + axis,
        )[:, None]
        for chunk in (1, 2, 16):
            made = Sliding(inner, size, axis, chunk).denoise(x, sigma)
            assert_close(made, expected, rtol=1e-12, atol=1e-12)


def test_a_window_is_nearer_to_the_volume_s_own_prior_than_groups() -> None:
    """Where the volume does not end, for a group's outer slices know one neighbour."""
    depth, mean = 9, field(H, W).mean[0]
    whole, three = correlated(depth, mean), correlated(3, mean)
    x = whole.sample(50, generator=seeded(2))
    for sigma in (0.2, 1.0, 3.0):
        level = torch.tensor(sigma).double()
        noisy = x + sigma * torch.randn(x.shape, generator=seeded(3)).double()
        best = whole.denoise(noisy, level)[:, 1:-1]

        def far(prior: Prior, noisy: Tensor = noisy, best: Tensor = best) -> float:
            made = prior.denoise(noisy[:, None], level)[:, 0, 1:-1]  # noqa: B023
            return float((made - best).square().mean())

        slices, groups = far(Slices(field(H, W))), far(Groups(three))
        assert far(Sliding(three)) < groups < 0.5 * slices
        assert far(Sliding(correlated(5, mean), 5)) < 0.8 * far(Sliding(three))


def test_a_network_of_the_middle_slice_alone() -> None:
    """F of the middle, shown the others in their order; of these, Gaussian noise."""
    told: list[Tensor] = []

    @final
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, c: Tensor, condition: Tensor) -> Tensor:
            told.extend([x, condition])
            return x + condition[:, :1] - 2 * condition[:, 1:]

    x = torch.randn(2, 3, H, W, generator=seeded()).double()
    into = 1 / (SIGMA**2 + 0.25).sqrt()
    prior = EDMPrior(InTheMiddle(Net()), 0.5, channels=3)
    made = prior.denoise(x, SIGMA)
    assert_close(told[0], into * x[:, 1:2])
    assert_close(told[1], into * x[:, ::2])
    skip, out = 0.25 * into**2, 0.5 * SIGMA * into
    assert_close(made[:, ::2], skip * x[:, ::2])
    middle = into * (x[:, 1] + x[:, 0] - 2 * x[:, 2])
    assert_close(made[:, 1], skip * x[:, 1] + out * middle)


def test_windows_keep_their_unit_and_say_what_they_need() -> None:
    map = AffineMap(0.02, 0.1)
    prior = Sliding(Affine(correlated(3, field(H, W).mean[0]), map))
    inner, found = prior.normalised
    assert found == map and isinstance(inner, Sliding)
    x, level = volume(), 0.02 * SIGMA
    assert_close(prior.denoise(map(x), level), map(inner.denoise(x, SIGMA)))
    net = Sliding(EDMPrior(lambda x, c: x, 0.5, multiple_of=2, channels=3))
    net.check((1, 2, 4, 6))
    with pytest.raises(ValueError, match="prior of volumes"):
        net.check((2, 5, 4, 6))
    with pytest.raises(ValueError, match=r"slices across d: .*divisible by 2"):
        net.check((1, 5, 3, 6))
    with pytest.raises(ValueError, match="need at least 2, the volume has 1"):
        net.check((1, 1, 4, 6))
    with pytest.raises(ValueError, match="1 channel"):
        Sliding(EDMPrior(lambda x, c: x, 0.5, channels=1)).check((1, 5, 4, 6))
    with pytest.raises(ValueError, match="size must be odd"):
        Sliding(net.inner, 2)


# --- two planes


def test_two_planes_are_the_product_of_their_densities() -> None:
    """Its score is the mean of the scores, weighted by the exponents."""
    one, other = Slices(field(H, W), 0), Slices(field(D, W, 1), 1)
    x, share = volume(), 0.3
    made = TwoPlanes(one, other, share).score(x, SIGMA)
    expected = (1 - share) * one.score(x, SIGMA) + share * other.score(x, SIGMA)
    assert_close(made, expected)


def test_a_plane_is_drawn_with_its_probability_and_known_again() -> None:
    one, other = Slices(field(H, W), 0), Slices(field(D, W, 1), 1)
    both, x = TwoPlanes(one, other, 0.3, drawn=True), volume(1)
    answers = [one.denoise(x, SIGMA), other.denoise(x, SIGMA)]
    assert any(torch.equal(both.denoise(x, SIGMA), a) for a in answers)
    sigmas = torch.linspace(3, -4, 400).exp().double()
    asked = [torch.equal(both.denoise(x, s), other.denoise(x, s)) for s in sigmas]
    again = [torch.equal(both.denoise(x, s), other.denoise(x, s)) for s in sigmas]
    assert asked == again
    assert sum(asked) / 400 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 400) ** 0.5)
    levels = sigmas[:2]
    pair = torch.cat([x, x])
    alone = torch.cat([both.denoise(x, s) for s in levels])
    assert_close(both.denoise(pair, levels), alone)


def test_two_planes_are_of_one_unit() -> None:
    one, other = Slices(field(H, W), 0), Slices(field(D, W, 1), 1)
    map = AffineMap(2.0, 0.5)
    inner, found = TwoPlanes(
        Slices(Affine(one.inner, map)), Slices(Affine(other.inner, map), 1)
    ).normalised
    x = volume()
    assert found == map
    assert_close(inner.denoise(x, SIGMA), TwoPlanes(one, other).denoise(x, SIGMA))
    assert inner.sigma_max == pytest.approx(one.sigma_max)
    with pytest.raises(ValueError, match="different ranges"):
        TwoPlanes(one, Slices(Affine(other.inner, map), 1))
    with pytest.raises(ValueError, match="share must lie between"):
        TwoPlanes(one, other, 1.0)
    with pytest.raises(ValueError, match="needs image sizes"):
        plain = EDMPrior(lambda x, c: x, 0.5, multiple_of=2)
        TwoPlanes(Slices(plain), Slices(plain, 1)).check((1, 5, 4, 4))


# --- every sampler, slice by slice


@pytest.mark.parametrize(
    "sampler",
    [samplers.dds, samplers.ddnm, samplers.diffpir, samplers.daps],
)
def test_a_sampler_of_volumes_is_that_of_slices(sampler: Callable[..., Tensor]) -> None:
    """The same numbers drawn give the same slices, in whatever shape they come."""
    prior, g = field(H, W), seeded()
    mask = (torch.rand(H, W, generator=g) < 0.6).double()
    y = mask * prior.sample(D, generator=g)
    flat = InverseProblem(y, Mask(mask), GaussianNoise(0.1))
    deep = InverseProblem(y.movedim(1, 0)[None], Mask(mask), GaussianNoise(0.1))
    slices = sampler(flat, prior, steps=4, generator=seeded(1))
    made = sampler(deep, Slices(prior, 0, 2), steps=4, generator=seeded(1))
    assert_close(made[0].movedim(0, 1), slices, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (samplers.reddiff, {"steps": 3}),
        (samplers.dps, {"steps": 3}),
        (samplers.pigdm, {"steps": 3}),
        (samplers.mmps, {"steps": 3}),
        (samplers.score_sde, {"steps": 3}),
        (samplers.tmpd, {"steps": 3}),
        (samplers.tv, {"steps": 3}),
    ],
)
def test_other_samplers_take_volumes_too(
    sampler: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    prior = Affine(field(8, 8), AffineMap(0.02, 0.0))
    A = ParallelBeam((8, 8), torch.tensor([0.0, 1.0], dtype=torch.float64))
    x = 0.02 * torch.randn(1, 1, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    given = InverseProblem(A(x), A, GaussianNoise(0.01))
    result = solve(given, Slices(prior), sampler, generator=seeded(), **options)
    assert result.samples.shape == (1, *x.shape)


def test_volumes_are_solved_one_by_one() -> None:
    """And one pass of a volume counts once, as many slices as it may have."""
    seen, y = Seeing(), volume(3)
    given = InverseProblem(y, Mask(torch.ones(H, W).double()), GaussianNoise(0.1))
    run = solve(given, Slices(seen), samplers.dds, steps=2, generator=seeded())
    assert seen.batches == [D] * 6
    assert run.stats.network_forwards == 6
    with pytest.raises(ValueError, match="prior of volumes"):
        flat = InverseProblem(y[:, :, 0], given.operator, given.noise)
        solve(flat, Slices(seen), samplers.dds, generator=seeded())


# --- the operator


def operators() -> dict[str, LinearOperator]:
    g = seeded()
    mask = (torch.rand(H, W, generator=g) < 0.5).double()
    maps = simulated_maps(3, (H, W)).to(torch.complex128)
    return {
        "mask": Mask(mask),
        "blur": Blur.from_kernel(torch.rand(3, 3, generator=g).double(), (H, W)),
        "coils": MultiCoil(maps, mask) @ RealImage(),
        "rays": ParallelBeam((H, W), torch.tensor([0.1, 1.2]).double()),
    }


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("chunk", [2, 16])
def test_slices_are_measured_alone(name: str, chunk: int) -> None:
    inner, x = operators()[name], volume()
    A = SliceWise(inner, D, chunk)
    y = A(x)
    for k in range(D):
        assert_close(y[:, k], inner(x[:, :, k]))
    noise = torch.randn(y.shape, generator=seeded(2), dtype=torch.float64).to(y.dtype)
    if not name == "coils":
        assert dottest(A, x, noise) < 1e-12
    assert_close(A.normal(x), A.adjoint(A(x)))
    assert A.norm(x) == pytest.approx(inner.norm(x[:, :, 0]), rel=1e-4)
    assert A.image_like(y).shape == x.shape


@pytest.mark.parametrize("name", operators())
def test_slices_are_inverted_alone(name: str) -> None:
    inner, x = operators()[name], volume()
    A = SliceWise(inner, D, 2)
    y = A(x)
    rho = torch.tensor([0.5, 2.0]).double().reshape(2, 1, 1, 1, 1)
    made, one, plain = A.pinv(y), A.prox(x, y, rho), A.prox(x, y, 0.5)
    for k in range(D):
        assert_close(made[:, :, k], inner.pinv(y[:, k]))
        assert_close(one[:, :, k], inner.prox(x[:, :, k], y[:, k], rho[:, :, 0]))
        assert_close(plain[:, :, k], inner.prox(x[:, :, k], y[:, k], 0.5))


def test_missing_slices_are_refused() -> None:
    A = SliceWise(operators()["rays"], D)
    x = volume()
    y = A(x)
    with pytest.raises(ValueError, match=r"expects volumes .*5, h, w"):
        A(x[:, :, :4])
    with pytest.raises(ValueError, match=r"are slices missing\?"):
        InverseProblem(y[:, :4], A, GaussianNoise(0.1))
    with pytest.raises(ValueError, match="ParallelBeam expects measurements"):
        InverseProblem(y[..., :-1], A, GaussianNoise(0.1))
    with pytest.raises(ValueError, match="depth must be at least 1"):
        SliceWise(operators()["rays"], 0)


def test_a_cone_beam_takes_a_prior_of_slices() -> None:
    A = ConeBeam((D, 8, 8), torch.tensor([0.0, 1.5]).double(), 30.0, 60.0)
    x = torch.rand(1, 1, D, 8, 8, generator=seeded(), dtype=torch.float64)
    given = InverseProblem(A(x), A, GaussianNoise(0.01))
    run = solve(given, Slices(field(8, 8)), samplers.dds, steps=2, generator=seeded())
    assert run.samples.shape == (1, *x.shape)
