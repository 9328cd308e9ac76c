"""Magnetic resonance against its definitions: what the algebraic laws cannot tell."""

import sys
from collections.abc import Callable
from functools import partial
from math import pi, sqrt

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, operators as ops, samplers, solve
from invsolve.operators.coils import (
    Method,
    coil_maps,
    compress_coils,
    simulated_maps,
)
from invsolve.operators.mri import Coils, MultiCoil
from invsolve.operators.nufft import (
    NonCartesian,
    density_compensation,
    radial,
    spiral,
)
from invsolve.operators.patterns import (
    _darts,
    equispaced_columns,
    gaussian_columns,
    gaussian_points,
    poisson_disc,
    random_columns,
)
from invsolve.priors import GaussianPrior

complex128, float64 = torch.complex128, torch.float64
Pattern = Callable[..., ops.Mask]


def noise(*shape: int, g: Generator) -> Tensor:
    return torch.randn(*shape, dtype=complex128, generator=g)


# --- the Fourier transform


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (5, 8)], ids=str)
class TestFourier:
    def test_a_constant_goes_to_the_middle(self, shape: tuple[int, int]) -> None:
        h, w = shape
        expected = torch.zeros(1, 1, h, w, dtype=torch.complex128)
        expected[0, 0, h // 2, w // 2] = (h * w) ** 0.5
        assert_close(ops.Fourier()(torch.ones_like(expected)), expected)
        assert_close(ops.Fourier().adjoint(torch.ones_like(expected)), expected)

    def test_a_plane_wave_goes_to_its_frequency(self, shape: tuple[int, int]) -> None:
        h, w = shape
        row = torch.arange(h)[:, None] - h // 2
        column = torch.arange(w)[None, :] - w // 2
        phase = 2 * pi * (2 * row.double() / h - column.double() / w)
        wave = torch.polar(torch.ones_like(phase), phase)[None, None]
        expected = torch.zeros_like(wave)
        expected[0, 0, h // 2 + 2, w // 2 - 1] = (h * w) ** 0.5
        assert_close(ops.Fourier()(wave), expected)

    def test_energy_is_kept(self, shape: tuple[int, int], generator: Generator) -> None:
        x = torch.randn(1, 1, *shape, dtype=torch.complex128, generator=generator)
        y = ops.Fourier()(x)
        assert_close(y.norm(), x.norm())
        assert_close(ops.Fourier().adjoint(y), x)


def test_a_plane_wave_in_a_volume_goes_to_its_frequency() -> None:
    d, h, w = 4, 5, 6
    z, y, x = torch.meshgrid(
        *(torch.arange(n).double() - n // 2 for n in (d, h, w)), indexing="ij"
    )
    phase = 2 * pi * (z / d - 2 * y / h + x / w)
    wave = torch.polar(torch.ones_like(phase), phase)[None, None]
    expected = torch.zeros_like(wave)
    expected[0, 0, d // 2 + 1, h // 2 - 2, w // 2 + 1] = sqrt(d * h * w)
    assert_close(ops.Fourier(dims=3)(wave), expected)


def test_a_transform_first_made_in_inference_mode_has_gradients() -> None:
    x = torch.ones(1, 1, 22, 26, dtype=complex128)
    with torch.inference_mode():
        ops.Fourier()(x)
    leaf = x.clone().requires_grad_()
    ops.Fourier()(leaf).abs().sum().backward()
    assert leaf.grad is not None


def test_a_transform_of_no_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="over 1, 2 or 3 axes"):
        ops.Fourier(dims=0)


def test_two_channels_are_real_and_imaginary_part(generator: Generator) -> None:
    x = torch.randn(2, 2, 3, 4, generator=generator)
    y = ops.ComplexChannels()(x)
    assert torch.equal(y.real, x[:, :1])
    assert torch.equal(y.imag, x[:, 1:])
    assert torch.equal(ops.RealImage()(x), x + 0j)


# --- coils


def test_every_coil_sees_the_image_through_its_map(generator: Generator) -> None:
    S, x = noise(3, 4, 5, g=generator), noise(2, 1, 4, 5, g=generator)
    y = Coils(S)(x)
    assert y.shape == (2, 3, 4, 5)
    assert_close(y[1, 2, 3, 0], S[2, 3, 0] * x[1, 0, 3, 0])
    back = Coils(S).adjoint(y)
    assert back.shape == x.shape
    assert_close(back[1, 0, 2, 1], (S[:, 2, 1].abs() ** 2).sum() * x[1, 0, 2, 1])


def test_what_no_coil_sees_stays_zero(generator: Generator) -> None:
    S, x = noise(2, 3, 4, g=generator), noise(1, 1, 3, 4, g=generator)
    S[:, 1, 2] = 0
    got = Coils(S).pinv(Coils(S)(x))
    expected = x.clone()
    expected[..., 1, 2] = 0
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.zeros(2, 3, 3, dtype=complex128), "all zero"),
        (torch.full((2, 3, 3), torch.nan + 0j), "NaN or infinite"),
        (torch.ones(3, dtype=complex128), r"coil maps are \(coils, \*space\)"),
        (torch.ones(0, 3, 3, dtype=complex128), r"coil maps are \(coils, \*space\)"),
    ],
)
def test_maps_that_make_no_sense_are_refused(maps: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Coils(maps)


@pytest.mark.parametrize("make", [Coils, lambda S: MultiCoil(S, torch.ones(4, 4))])
def test_coils_refuse_what_is_no_complex_image(make: Callable) -> None:
    A = make(torch.ones(2, 4, 4, dtype=complex128))
    with pytest.raises(ValueError, match="takes complex images"):
        A(torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="one channel, got 2"):
        A(torch.ones(1, 2, 4, 4, dtype=complex128))


@pytest.mark.parametrize("shape", [(8, 6), (2, 4), (5, 6), (7, 3)], ids=str)
def test_multicoil_is_mask_fourier_coils(
    shape: tuple[int, int], generator: Generator
) -> None:
    S, x = noise(3, *shape, g=generator), noise(2, 1, *shape, g=generator)
    y = noise(2, 3, *shape, g=generator)
    mask = torch.rand(shape, generator=generator, dtype=float64)
    A, B = MultiCoil(S, mask), ops.Mask(mask) @ ops.Fourier() @ Coils(S)
    for got, expected in (
        (A(x), B(x)),
        (A.adjoint(y), B.adjoint(y)),
        (A.normal(x), B.normal(x)),
    ):
        assert_close(got, expected)


def test_multicoil_refuses_a_mask_of_another_image() -> None:
    with pytest.raises(ValueError, match="of different images"):
        MultiCoil(torch.ones(2, 4, 6, dtype=complex128), torch.ones(4, 4))


def test_simulated_maps_follow_their_formula() -> None:
    S = simulated_maps(4, (6, 8), radius=2.0)
    assert_close(S.abs().square().sum(0), torch.ones(6, 8))
    r = torch.tensor(complex((1 - 3.5) / 4, (5 - 2.5) / 3))  # column 1, row 5
    to_coils = r - 2.0 * torch.tensor([1, 1j, -1, -1j])
    expected = torch.polar(1 / to_coils.abs(), to_coils.angle())
    assert_close(S[:, 5, 1], expected / expected.norm(), rtol=1e-5, atol=1e-6)
    for arguments in ((0, (4, 4)), (3, (4, 4))):
        with pytest.raises(ValueError, match="outside of the image"):
            simulated_maps(*arguments, radius=1.4)


def ellipse(h: int, w: int) -> Tensor:
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)
    inside = x**2 / 0.6 + y**2 / 0.4 < 1
    return torch.polar(inside.float(), 2 * x + y)


def alike(a: Tensor, b: Tensor) -> Tensor:
    """|cos| of the angle between two sets of maps, whatever their phases."""
    return (a.conj() * b).sum(0).abs() / (a.norm(dim=0) * b.norm(dim=0))


def test_espirit_is_exact_for_maps_of_few_frequencies(generator: Generator) -> None:
    h, w, coils = 30, 33, 4
    y, x = torch.arange(h).double()[:, None], torch.arange(w).double()
    S = torch.zeros(coils, h, w, dtype=complex128)
    for p in (-1, 0, 1):
        for q in (-1, 0, 1):
            phase = 2 * pi * (p * y / h + q * x / w)
            c = noise(coils, g=generator)[:, None, None]
            S += c * torch.polar(torch.ones_like(phase), phase)
    kspace = (ops.Fourier() @ Coils(S))(noise(1, 1, h, w, g=generator))[0]
    got = coil_maps(kspace, threshold=1e-7, crop=0.999)
    assert_close(alike(got, S), torch.ones(h, w, dtype=float64))
    assert_close(got.norm(dim=0), torch.ones(h, w, dtype=float64))


@pytest.mark.parametrize("shape", [(48, 48), (40, 51)], ids=str)
@pytest.mark.parametrize(("method", "bound"), [("espirit", 1e-3), ("low-res", 1e-2)])
def test_coil_maps_are_found_again(
    method: Method, bound: float, shape: tuple[int, int], generator: Generator
) -> None:
    S, image = simulated_maps(6, shape), ellipse(*shape)
    seen = S * image
    kspace = ops.Fourier()(seen[None])[0]
    kspace += 1e-3 * kspace.abs().mean() * noise(*kspace.shape, g=generator)
    got = coil_maps(kspace, method)
    inside = image.abs() > 0
    assert float((1 - alike(got, S))[inside].max()) < bound
    assert_close(got.norm(dim=0)[inside], torch.ones(int(inside.sum())))
    outside = seen - got * (got.conj() * seen).sum(0)
    assert float(outside.norm() / seen.norm()) < sqrt(bound)


def test_espirit_sees_nothing_where_nothing_is() -> None:
    S, image = simulated_maps(6, (64, 64)), ellipse(64, 64)
    got = coil_maps(ops.Fourier()((S * image)[None])[0])
    for corner in (got[:, :8, :8], got[:, :8, -8:], got[:, -8:, :8], got[:, -8:, -8:]):
        assert not corner.any()


def test_coil_maps_need_only_the_middle(generator: Generator) -> None:
    kspace = noise(3, 40, 40, g=generator)
    middle = torch.zeros(40, 40)
    middle[8:32, 8:32] = 1
    methods: tuple[Method, ...] = ("espirit", "low-res")
    for method in methods:
        got = coil_maps(kspace, method, crop=0.0)
        assert_close(coil_maps(middle * kspace, method, crop=0.0), got)


@pytest.mark.parametrize("method", ["espirit", "low-res"])
def test_the_principal_component_of_coil_maps_is_real(method: Method) -> None:
    S, image = simulated_maps(6, (48, 48)), ellipse(48, 48)
    kspace = ops.Fourier()((S * image)[None])[0]
    samples = kspace[:, 12:36, 12:36].flatten(1)
    principal = torch.linalg.svd(samples)[0][:, 0]
    got = torch.einsum("c,chw->hw", principal.conj(), coil_maps(kspace, method))
    got = got[image.abs() > 0]
    assert_close(got / got[0].sgn(), got.abs() + 0j, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": 25}, "does not fit"),
        ({"calibration": 30}, r"180 of the middle 30×30 .* lower calibration"),
    ],
)
def test_coil_maps_refuse(change: dict, message: str, generator: Generator) -> None:
    kspace = noise(3, 32, 32, g=generator)
    kspace[..., :4], kspace[..., -4:] = 0, 0
    with pytest.raises(ValueError, match=message):
        coil_maps(kspace, **change)


def test_compressed_coils_keep_the_energy(generator: Generator) -> None:
    mix = torch.linalg.qr(noise(6, 6, g=generator))[0]
    sources = noise(2, 6, 5, 7, g=generator)
    sources *= torch.tensor([5.0, 3.0, 2.0, 0.5, 0, 0])[:, None, None]
    kspace = torch.einsum("ij,bjhw->bihw", mix, sources)
    for n in (1, 3, 4):
        few, M, energy = compress_coils(kspace, n)
        assert few.shape == (2, n, 5, 7)
        assert_close(M @ M.mH, torch.eye(n, dtype=complex128))
        assert energy == pytest.approx(float((few.norm() / kspace.norm()) ** 2))
        assert_close(few, torch.einsum("nc,bchw->bnhw", M, kspace))
    all_there_is = compress_coils(kspace, 4)
    assert all_there_is.energy == pytest.approx(1)
    again = torch.einsum(
        "nc,bnhw->bchw", all_there_is.matrix.conj(), all_there_is.kspace
    )
    assert_close(again, kspace)
    best = torch.linalg.svdvals(kspace.transpose(0, 1).flatten(1)) ** 2
    kept = [compress_coils(kspace, n).energy for n in range(1, 7)]
    assert_close(torch.tensor(kept, dtype=float64), best.cumsum(0) / best.sum())
    for n in (0, 7):
        with pytest.raises(ValueError, match="between 1 and 6 can be kept"):
            compress_coils(kspace, n)


# --- Cartesian patterns


@pytest.mark.parametrize(
    ("w", "acceleration", "centre"),
    [(64, 4.0, 0.08), (65, 4.0, 0.08), (64, 2.0, 0.1), (30, 3.0, 0.1), (64, 1.0, 0.5)],
)
def test_cartesian_keeps_the_centre_and_so_many_columns(
    w: int, acceleration: float, centre: float, generator: Generator
) -> None:
    def columns() -> Tensor:
        A = ops.Mask.cartesian((8, w), acceleration, centre, generator=generator)
        mask = A.mask
        assert torch.equal(mask, mask[:1].expand_as(mask))
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        return mask[0]

    draws = torch.stack([columns() for _ in range(50)])
    middle = round(w * centre)
    below, above = middle // 2, (middle - 1) // 2
    assert (draws.sum(1) == round(w / acceleration)).all()
    assert (draws[:, w // 2 - below : w // 2 + above + 1] == 1).all()
    assert (draws.sum(0) > 0).all()  # every column has its chance


@pytest.mark.parametrize(("acceleration", "centre"), [(8.0, 0.5), (0.5, 0.1)])
def test_impossible_cartesian_masks_are_refused(
    acceleration: float, centre: float, generator: Generator
) -> None:
    with pytest.raises(ValueError, match="lower the acceleration or the centre"):
        ops.Mask.cartesian((8, 32), acceleration, centre, generator=generator)


def columns(
    pattern: Pattern, shape: tuple[int, int], *a: float, g: Generator
) -> Tensor:
    mask = pattern(shape, *a, generator=g).mask
    assert mask.shape == shape
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(mask, mask[:1].expand_as(mask))
    return mask[0] > 0


WHOLE_COLUMNS = [random_columns, equispaced_columns, gaussian_columns]
POINTS = [gaussian_points, poisson_disc]


@pytest.mark.parametrize("pattern", WHOLE_COLUMNS)
@pytest.mark.parametrize(
    ("w", "a", "c"), [(64, 4.0, 0.08), (65, 3.0, 0.1), (368, 8.0, 0.04)]
)
def test_columns_have_a_full_centre(
    pattern: Pattern, w: int, a: float, c: float, generator: Generator
) -> None:
    draws = torch.stack(
        [columns(pattern, (2, w), a, c, g=generator) for _ in range(50)]
    )
    low = round(w * c)
    start = (w - low + 1) // 2  # as fastMRI has it
    assert draws[:, start : start + low].all()
    assert draws[:, w // 2].all()
    assert not draws[:, [start - 1, start + low]].all()
    assert not torch.equal(draws[0], draws[1]) or not torch.equal(draws[0], draws[2])


def test_random_columns_are_independent_and_right_on_average(
    generator: Generator,
) -> None:
    w, a, c, n = 64, 4.0, 0.08, 2000
    draws = torch.stack(
        [columns(random_columns, (1, w), a, c, g=generator) for _ in range(n)]
    )
    p = (w / a - 5) / (w - 5)
    beside = draws.double().mean(0)[(torch.arange(w) < 30) | (torch.arange(w) > 34)]
    assert float((beside - p).abs().max()) < 4.5 * sqrt(p * (1 - p) / n)  # 59 columns
    assert float(draws.sum(1).double().mean()) == pytest.approx(w / a, abs=0.35)
    variance = (w - 5) * p * (1 - p)
    assert float(draws.sum(1).double().var()) == pytest.approx(variance, rel=0.15)


def test_equispaced_columns_are_a_rounded_comb(generator: Generator) -> None:
    w, a, c = 368, 4.0, 0.08
    low = round(w * c)
    distance = a * (low - w) / (low * a - w)
    firsts = set()
    for _ in range(100):
        got = columns(equispaced_columns, (1, w), a, c, g=generator)
        first = int(got.nonzero()[0])
        comb = [first + i * distance for i in range(w)]
        expected = torch.zeros(w, dtype=torch.bool)
        expected[[round(k) for k in comb if k < w - 1]] = True
        expected[(w - low + 1) // 2 :][:low] = True
        assert torch.equal(got, expected)
        assert int(got.sum()) == pytest.approx(w / a, abs=2)
        firsts.add(first)
    assert firsts == set(range(round(distance)))


@pytest.mark.parametrize("pattern", [gaussian_columns, *POINTS])
@pytest.mark.parametrize(("shape", "a"), [((32, 48), 4.0), ((31, 45), 2.5)])
def test_the_number_of_samples_is_exact(
    pattern: Pattern, shape: tuple[int, int], a: float, generator: Generator
) -> None:
    mask = pattern(shape, a, 0.15, generator=generator).mask
    h, w = shape
    if pattern in POINTS:
        assert int(mask.sum()) == round(h * w / a)
        rows, low = round(h * 0.15), round(w * 0.15)
        block = mask[(h - rows + 1) // 2 :, (w - low + 1) // 2 :][:rows, :low]
        assert block.all()
        assert int(mask.sum(0).bool().sum()) > w / a  # not whole columns
    else:
        assert int(mask[0].sum()) == round(w / a)


def test_gaussian_columns_fall_off_as_the_gaussian(generator: Generator) -> None:
    w, width, n = 200, 0.15, 4000
    # One column of 200 at a time: what is drawn first follows the density itself.
    draw = partial(columns, gaussian_columns, (1, w), w / 1, 0.0, g=generator)
    pattern = torch.stack([draw() for _ in range(n)]).double().mean(0)
    k = torch.arange(w).double() - w // 2
    assert float((pattern * k).sum()) == pytest.approx(0, abs=4 * width * w / sqrt(n))
    spread = float((pattern * k**2).sum().sqrt())
    assert spread == pytest.approx(width * w, rel=4 / sqrt(2 * n))


def test_gaussian_points_fall_off_alike_along_both_axes(generator: Generator) -> None:
    mask = gaussian_points((100, 200), 10.0, 0.0, width=0.1, generator=generator).mask
    y, x = mask.nonzero().double().T
    assert float(y.std()) / 100 == pytest.approx(float(x.std()) / 200, rel=0.1)
    assert float(y.std()) > 0.1 * 100  # without replacement it is wider than drawn


@pytest.mark.parametrize("growth", [0.0, 2.0])
def test_darts_keep_their_distance_and_leave_no_room(
    growth: float, generator: Generator
) -> None:
    h, w = 30, 40
    y, x = torch.meshgrid(torch.arange(h) - 15.0, torch.arange(w) - 20.0, indexing="ij")
    radius = 1.7 + growth * (x**2 + y**2).sqrt() / 20
    order = torch.randperm(h * w, generator=generator)[: h * w - 100]
    kept = _darts(order, radius)
    at = torch.stack([order // w, order % w], 1).double()
    chosen = torch.stack([kept // w, kept % w], 1).double()
    r = radius.flatten()[kept]
    rank = {int(k): i for i, k in enumerate(order)}
    position = torch.tensor([rank[int(k)] for k in kept])
    assert (position.diff() > 0).all()
    between = torch.cdist(chosen, chosen)
    earlier = position[:, None] < position
    assert (between >= r[:, None])[earlier].all()
    # Every dart that missed lies within the distance of an earlier one.
    near = torch.cdist(chosen, at) < r[:, None]
    before = position[:, None] <= torch.arange(len(order))
    assert (near & before).any(0).all()


def test_poisson_discs_are_far_apart_and_denser_inside(generator: Generator) -> None:
    even = poisson_disc((64, 64), 8.0, 0.0, growth=0.0, generator=generator).mask
    points = even.nonzero().double()
    apart = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert float(apart.min()) >= 0.8 * 0.7 * sqrt(8)  # by chance it would be 1
    dense = poisson_disc((64, 64), 8.0, 0.0, growth=3.0, generator=generator).mask
    quarter = dense[16:48, 16:48].mean() / dense.mean()
    assert float(quarter) > 1.4
    assert float(even[16:48, 16:48].mean() / even.mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("pattern", [*WHOLE_COLUMNS, *POINTS])
class TestPatterns:
    def test_only_the_generator_decides(self, pattern: Pattern) -> None:
        def draw(seed: int) -> Tensor:
            g = Generator().manual_seed(seed)
            return pattern((24, 48), 3.0, 0.1, generator=g).mask

        assert torch.equal(draw(0), draw(0))
        assert any(not torch.equal(draw(0), draw(seed)) for seed in range(1, 5))

    def test_impossible_ones_are_refused(
        self, pattern: Pattern, generator: Generator
    ) -> None:
        for a, c in (
            (8.0, 0.5),
            (100.0, 0.0) if pattern in WHOLE_COLUMNS else (8.0, 1.0),
        ):
            with pytest.raises(
                ValueError, match="lower the acceleration or the centre"
            ):
                pattern((16, 32), a, c, generator=generator)
        for a, c in ((0.5, 0.1), (2.0, -0.1), (2.0, 1.5)):
            with pytest.raises(ValueError, match="at least 1 and centre a fraction"):
                pattern((16, 32), a, c, generator=generator)


def test_densities_that_make_no_sense_are_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="width must be > 0"):
        gaussian_points((8, 8), 2.0, 0.0, width=0.0, generator=generator)
    with pytest.raises(ValueError, match="growth ≥ 0"):
        poisson_disc((8, 8), 2.0, 0.0, growth=-1.0, generator=generator)


# --- trajectories


def by_definition(x: Tensor, k: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    rows = (torch.arange(h) - h // 2).double()
    along = (torch.arange(w) - w // 2).double()
    phase = k[:, 0, None, None] * rows[:, None] + k[:, 1, None, None] * along
    wave = torch.polar(torch.ones_like(phase), -phase)
    return torch.einsum("bchw,jhw->bcj", x, wave) / sqrt(h * w)


def grid(h: int, w: int) -> Tensor:
    rows = 2 * pi * (torch.arange(h).double() - h // 2) / h
    along = 2 * pi * (torch.arange(w).double() - w // 2) / w
    return torch.stack(torch.meshgrid(rows, along, indexing="ij"), -1)


shapes = pytest.mark.parametrize("shape", [(6, 8), (5, 7), (9, 4)], ids=str)


class TestNonCartesian:
    @shapes
    def test_it_is_the_sum(self, shape: tuple[int, int], generator: Generator) -> None:
        x = noise(2, 3, *shape, g=generator)
        k = (2 * torch.rand(23, 2, dtype=float64, generator=generator) - 1) * pi
        expected = by_definition(x, k)
        assert_close(NonCartesian(shape, k, 1e-12)(x), expected, rtol=0, atol=1e-10)
        single = NonCartesian(shape, k)(x.to(torch.complex64))
        assert_close(single, expected.to(torch.complex64), rtol=0, atol=1e-5)

    @shapes
    def test_on_the_grid_it_is_fourier(
        self, shape: tuple[int, int], generator: Generator
    ) -> None:
        x, k = noise(2, 2, *shape, g=generator), grid(*shape)
        A, F = NonCartesian(shape, k, 1e-12), ops.Fourier()
        assert_close(A(x), F(x), rtol=0, atol=1e-10)
        assert_close(A.adjoint(x), F.adjoint(x), rtol=0, atol=1e-10)
        assert_close(A.normal(x), x, rtol=0, atol=1e-10)
        assert_close(density_compensation(k, shape), torch.ones(shape).double())

    def test_eps_is_the_accuracy(self, generator: Generator) -> None:
        x = noise(1, 1, 20, 20, g=generator)
        k = (2 * torch.rand(50, 2, dtype=float64, generator=generator) - 1) * pi
        expected = by_definition(x, k)
        for eps in (1e-2, 1e-5, 1e-9):
            error = (NonCartesian((20, 20), k, eps)(x) - expected).norm()
            assert 1e-4 * eps < float(error / expected.norm()) < 3 * eps

    @pytest.mark.parametrize(
        "k", [radial(9, 32), spiral(3, 100, 4.0)], ids=["radial", "spiral"]
    )
    @pytest.mark.parametrize(
        ("dtype", "bound"), [(torch.complex64, 1e-5), (complex128, 1e-10)], ids=str
    )
    def test_the_convolution_is_the_normal_operator(
        self, k: Tensor, dtype: torch.dtype, bound: float, generator: Generator
    ) -> None:
        A = NonCartesian((16, 12), k, 1e-12)
        x = noise(2, 3, 16, 12, g=generator).to(dtype)
        error = (A.normal(x) - A.adjoint(A(x))).norm() / A.normal(x).norm()
        assert float(error) < bound

    def test_gridding_is_nearly_the_image(self) -> None:
        n = 48
        y, x = torch.linspace(-1, 1, n)[:, None], torch.linspace(-1, 1, n)
        image = torch.exp(-((x - 0.2) ** 2 + (y + 0.1) ** 2) / 0.1).to(complex128)
        image = image[None, None]
        for k in (
            radial(76, 2 * n),
            radial(110, 2 * n, golden=True),
            spiral(8, 1500, 5.0),
        ):
            A = NonCartesian((n, n), k)
            got = A.gridding(A(image))
            assert float((got - image).norm() / image.norm()) < 0.03
            weights = density_compensation(k, (n, n))
            assert torch.equal(got, A.gridding(A(image), weights))

    def test_a_radial_density_is_the_ramp(self) -> None:
        n, spokes = 32, 51
        k = radial(spokes, 2 * n)
        weights = density_compensation(k, (n, n))
        kappa = k.norm(dim=-1)
        cell = (2 * pi / n) ** 2
        ramp = kappa * (pi / spokes) * (2 * pi / (2 * n)) / cell
        inner = (kappa > 0.3) & (kappa < 2.2)
        assert float((weights / ramp - 1)[inner].abs().max()) < 0.05
        assert (weights > 0).all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"trajectory": grid(8, 8) * 8 / 2 / pi},
                "multiply cycles per field of view",
            ),
            ({"trajectory": grid(8, 8) * torch.nan}, "NaN or infinite"),
            ({"trajectory": torch.zeros(0, 2)}, "needs pixels and samples"),
            ({"shape": (0, 8)}, "needs pixels and samples"),
            ({"eps": 0.0}, "eps is between"),
        ],
    )
    def test_impossible_ones_are_refused(self, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            NonCartesian(**({"shape": (8, 8), "trajectory": grid(8, 8)} | change))

    def test_real_images_are_refused(self) -> None:
        with pytest.raises(ValueError, match="takes complex images"):
            NonCartesian((8, 8), grid(8, 8))(torch.ones(1, 1, 8, 8))

    def test_where_finufft_is_missing_the_message_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "finufft", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'invsolve\[mri\]'"):
            NonCartesian((8, 8), grid(8, 8))(torch.ones(1, 1, 8, 8) + 0j)


def test_spokes_go_through_the_middle() -> None:
    k = radial(4, 6)
    assert k.shape == (4, 6, 2)
    assert_close(k[:, 3], torch.zeros(4, 2).double())
    assert_close(k[0, :, 1], 2 * pi * (torch.arange(6).double() - 3) / 6)
    angle = torch.atan2(k[:, 5, 0], k[:, 5, 1])
    assert_close(angle, torch.arange(4).double() * pi / 4)
    golden = radial(3, 6, golden=True)
    turned = torch.atan2(golden[1, 5, 0], golden[1, 5, 1])
    assert float(turned) == pytest.approx(111.246 * pi / 180, abs=1e-5)


def test_a_spiral_goes_round_from_the_middle_to_the_edge() -> None:
    k = spiral(3, 4000, 5.0)
    assert k.shape == (3, 4000, 2)
    assert not k[:, 0].any()
    r = k.norm(dim=-1)
    assert (r.diff(dim=-1) > 0).all()
    assert float(r.max()) == pytest.approx(pi, rel=1e-3)
    angle = torch.atan2(k[..., 0], k[..., 1])[:, 1:]
    assert int((angle[0].diff() < -pi).sum()) == 5
    step = k[0].diff(dim=0).norm(dim=-1)[1000:]
    assert float(step.max() / step.min()) < 1.1
    apart = (angle[1] - angle[0]).remainder(2 * pi)
    assert_close(apart, torch.full_like(apart, 2 * pi / 3))


@pytest.mark.parametrize("make", [lambda: radial(0, 8), lambda: spiral(2, 8, 0.0)])
def test_trajectories_of_nothing_are_refused(make: Callable) -> None:
    with pytest.raises(ValueError, match=r"has .*, got"):
        make()


# --- a prior of two channels


@pytest.mark.parametrize("kind", ["composed", "multi-coil", "radial"])
def test_complex_images_are_two_channels_of_the_prior(
    kind: str, generator: Generator
) -> None:
    n, g = 4, generator
    S = simulated_maps(3, (n, n)).to(complex128)
    factor = torch.randn(2 * n * n, 5, dtype=float64, generator=g)
    cov = 0.1 * torch.eye(2 * n * n).double() + factor @ factor.T
    prior = GaussianPrior(torch.zeros(2, n, n).double(), cov)
    encode = {
        "composed": ops.Mask(torch.ones(n, n)) @ ops.Fourier() @ Coils(S),
        "multi-coil": MultiCoil(S, torch.ones(n, n)),
        "radial": NonCartesian((n, n), radial(12, 12)) @ Coils(S),
    }[kind]
    A = encode @ ops.ComplexChannels()
    x = prior.sample(2, generator=g)
    sigma = ops.GaussianNoise(1e-2)
    problem = InverseProblem(sigma.sample(A(x), generator=g), A, sigma)
    solution = solve(problem, prior, samplers.diffpir, samples=2, generator=g)
    assert solution.samples.shape == (2, 2, 2, n, n)
    assert float((solution.samples - x).square().mean().sqrt()) < 0.05
