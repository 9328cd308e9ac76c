"""Families of operators: every φ is the full operator's rows, and nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from invsolve import operators as ops
from invsolve.operators.base import Rescale
from invsolve.operators.parametric import Parametric

H, W = 6, 8


def families() -> dict[str, Parametric]:
    angles = torch.linspace(0, torch.pi, 8)[:-1]
    maps = torch.randn(3, H, W, dtype=torch.complex64, generator=seeded(5))
    return {
        "pixels": Parametric.pixels((1, H, W)),
        "lines": Parametric.lines((H, W)),
        "coils": Parametric.lines((H, W), maps),
        "views": Parametric.views(ops.ParallelBeam((H, W), angles)),
        "finer": Parametric.views(ops.ParallelBeam((H, W), angles, oversample=2)),
    }


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def images(family: Parametric, n: int = 4) -> Tensor:
    return torch.randn(n, *family.image, generator=seeded(1))


def some(family: Parametric, n: int = 4) -> Tensor:
    rows = torch.rand(n, *family.grid, generator=seeded(2)) < 0.6
    rows[(slice(None), *(0,) * len(family.grid))] = True
    return rows


@pytest.fixture(params=["pixels", "lines", "coils", "views", "finer"])
def family(request: pytest.FixtureRequest) -> Parametric:
    return families()[request.param]


def test_the_adjoint_is_exact_with_another_phi_for_each_item(
    family: Parametric,
) -> None:
    x = images(family).double()
    A = family(some(family))
    assert isinstance(A, ops.LinearOperator)
    y = A.apply(x)
    v = torch.randn(y.shape, dtype=y.dtype, generator=seeded(3))
    assert ops.dottest(A, x, v) < 1e-10


def test_each_item_has_its_own_rows(family: Parametric) -> None:
    x, rows = images(family), some(family)
    together = family(rows).apply(x)
    for i in range(len(x)):
        alone = family(rows[i : i + 1]).apply(x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_restricting_keeps_rows_of_operator_and_data_alike(family: Parametric) -> None:
    x, rows = images(family), some(family)
    subset = rows & (torch.rand(rows.shape, generator=seeded(4)) < 0.5)
    y = family(rows).apply(x)
    kept = family.restrict(rows, subset)
    torch.testing.assert_close(
        family(kept).apply(x), family.restrict_data(y, kept), rtol=0, atol=0
    )
    rest = rows & ~subset
    back = family.join(family.restrict_data(y, kept), kept, family(rest).apply(x))
    torch.testing.assert_close(back, y)
    assert (family.union(kept, rest) == rows).all()


def test_views_are_those_of_a_beam_with_fewer_angles() -> None:
    family = families()["views"]
    rows = torch.tensor([[True, False, True, True, False, False, False]])
    assert isinstance(family.full, ops.ParallelBeam)
    fewer = ops.ParallelBeam((H, W), family.full.angles[rows[0]])
    x = images(family)
    torch.testing.assert_close(family(rows).apply(x)[:, :, rows[0]], fewer(x))


def test_lines_are_masked_multicoil() -> None:
    maps = torch.randn(3, H, W, dtype=torch.complex64, generator=seeded(5))
    family = Parametric.lines((H, W), maps)
    rows = some(family, 1)
    A = ops.MultiCoil(maps, rows.expand(H, W)) @ ops.ComplexChannels()
    x = images(family)
    torch.testing.assert_close(family(rows).apply(x), A.apply(x))


def test_a_split_is_disjoint_of_the_sizes_asked_and_keeps_what_must_be() -> None:
    family = Parametric.lines((H, W))
    rows = torch.ones(50, W, dtype=torch.bool)
    rows[::2, 0] = False
    kept = torch.zeros(W, dtype=torch.bool)
    kept[3:5] = True
    sizes = torch.tensor([[3, 2, -1]]).expand(50, 3)
    C, T, N = family.split(rows, sizes, generator=seeded(0), kept=kept)
    assert (C.int() + T.int() + N.int() == rows.int()).all()
    assert C[:, 3:5].all()
    assert (C.sum(1) == 3).all()
    assert (T.sum(1) == 2).all()
    assert (T.float().mean(0) > 0).sum() == W - 2
    again = family.split(rows, sizes, generator=seeded(0), kept=kept)
    assert (again[1] == T).all()


def test_coverage_is_the_diagonal_of_the_normal_operator(family: Parametric) -> None:
    rows = some(family)
    pixels = H * W
    basis = torch.zeros(pixels, *family.image)
    basis[:, 0].flatten(1)[torch.arange(pixels), torch.arange(pixels)] = 1

    def diagonal(of: Tensor) -> Tensor:
        y = family(of).apply(basis)
        return (y.conj() * y).real.flatten(1).sum(1).reshape(H, W)

    largest = diagonal(torch.ones(1, *family.grid, dtype=torch.bool)).max()
    for i in range(2):
        expected = diagonal(rows[i : i + 1]) / largest
        torch.testing.assert_close(family.coverage(rows)[i, 0], expected)


def test_whitened_measurements_have_unit_variance(family: Parametric) -> None:
    x, rows = 7 * images(family, 64), some(family, 64)
    y = family(rows).apply(x)
    white = family.whitening(y, rows) * family.turned(y)
    numbers = family.spread(rows).expand(y.shape).sum() * (1 + y.is_complex())
    torch.testing.assert_close(white.abs().square().sum() / numbers, torch.tensor(1.0))


def test_turning_keeps_lengths_and_rows(family: Parametric) -> None:
    rows = some(family)
    y = family.full.apply(images(family))
    torch.testing.assert_close(family.unturned(family.turned(y)), y)
    torch.testing.assert_close(family.turned(y).norm(), y.norm())
    torch.testing.assert_close(
        family.turned(family.restrict_data(y, rows)),
        family.restrict_data(family.turned(y), rows),
    )


def test_with_its_density_a_whole_scan_is_nearly_an_isometry() -> None:
    angles = torch.arange(96) * torch.pi / 96
    family = Parametric.views(ops.ParallelBeam((32, 32), angles))
    x = torch.randn(1, 1, 32, 32, generator=seeded(1))
    x = torch.nn.functional.avg_pool2d(x, 3, 1, 1)  # what rays between pixels can see
    x = x * (torch.arange(32).sub(15.5).square() < 120).outer(
        torch.arange(32).sub(15.5).square() < 120
    )
    y = family.turned(family.full.apply(x))
    back = family.linear.adjoint(family.unturned(family.density * y))
    flat = family.linear.adjoint(family.unturned(y))

    def likeness(a: Tensor) -> float:
        return float((a * x).sum() / a.norm() / x.norm())

    assert likeness(back) > 0.95
    assert likeness(flat) < 0.8


@pytest.mark.parametrize("sets", [1, 4])
def test_what_was_acquired_is_read_off_the_operator(
    family: Parametric, sets: int
) -> None:
    rows = some(family, sets)
    y = family(rows).apply(images(family))
    A = family(rows)
    assert isinstance(A, ops.LinearOperator)
    found, same = family.acquired(2.5 * A, y, 2.5)
    assert (found == rows).all()
    torch.testing.assert_close(same, y)
    with pytest.raises(ValueError, match=r"is 2\.5 times the one"):
        family.acquired(2.5 * A, y)


def test_a_beam_of_some_views_is_found_in_whatever_order() -> None:
    family = families()["views"]
    assert isinstance(family.full, ops.ParallelBeam)
    fewer = ops.ParallelBeam((H, W), family.full.angles[[4, 1, 2]])
    x = images(family)
    rows, y = family.acquired(2.5 * fewer, fewer(x), 2.5)
    assert rows.tolist() == [[False, True, True, False, True, False, False]]
    torch.testing.assert_close(y, family(rows).apply(x))
    twice = ops.ParallelBeam((H, W), family.full.angles[[4, 4]])
    with pytest.raises(ValueError, match="another geometry"):
        family.acquired(twice, twice(x))


def test_words_make_the_family_again(family: Parametric) -> None:
    x = images(family)
    again = Parametric.from_words(family.words)
    assert again.image == family.image
    torch.testing.assert_close(again.full.apply(x), family.full.apply(x))


def test_pictures_of_a_warp_are_its_rows() -> None:
    pictures = torch.rand(3, H, W, generator=seeded(1))
    family = Parametric.warps(pictures)
    S = torch.randn(2, 2, H, W, generator=seeded(2))
    rows = torch.tensor([[True, False, True]])
    y = family(rows).apply(0.5 * S)
    assert (y[:, :, 1] == 0).all()
    torch.testing.assert_close(y[:, :, [0, 2]], ops.Warp(pictures[[0, 2]])(0.5 * S))
    found, same = family.acquired(family(rows) @ Rescale(0.5, 0.0), y, 0.5)
    assert (found == rows).all()
    torch.testing.assert_close(same, y)
    with pytest.raises(ValueError, match="not linear"):
        _ = family.linear


def test_real_images_have_one_channel() -> None:
    family = Parametric.lines((H, W), real=True)
    x, v = torch.randn(2, 1, H, W), torch.randn(2, 1, H, W, dtype=torch.complex64)
    both = torch.cat([x, torch.zeros_like(x)], 1)
    torch.testing.assert_close(
        family.full.apply(x), Parametric.lines((H, W)).full.apply(both)
    )
    A = family(some(family, 2))
    assert isinstance(A, ops.LinearOperator)
    assert ops.dottest(A, x.double(), v.to(torch.complex128)) < 1e-10


def test_bad_input_is_refused() -> None:
    family = families()["views"]
    rows = some(family)
    y = family(rows).apply(images(family))
    other = ops.ParallelBeam((H, W), torch.linspace(0.1, 3, 7))
    with pytest.raises(ValueError, match="another geometry"):
        family.acquired(other, y)
    with pytest.raises(ValueError, match="another geometry"):
        family.acquired(ops.Identity(), y)
    with pytest.raises(ValueError, match="another geometry"):
        Parametric(ops.Identity(), (1, H, W), (H, W), (-1,)).acquired(other, y)
    with pytest.raises(ValueError, match="another geometry"):
        family(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="lacks 'shape'"):
        Parametric.from_words({"rows": "lines"})
    with pytest.raises(ValueError, match="unknown rows"):
        Parametric.from_words({"rows": "spokes", "shape": [4, 4]})
    with pytest.raises(ValueError, match="not acquired"):
        family.restrict(rows & False, rows)
    with pytest.raises(ValueError, match="cannot be split"):
        family.split(rows, torch.tensor([[6, 6]]).expand(4, 2), generator=seeded(0))
    with pytest.raises(ValueError, match="no row was acquired"):
        families()["lines"].whitening(
            torch.zeros(2, 1, H, W), torch.zeros(2, W, dtype=torch.bool)
        )


# --- pixels that are means of something smooth


def test_finer_pixels_keep_means_and_know_parabolas() -> None:
    """Of x² and of x: exact but at the border, beyond which nothing is told."""
    n, k = 7, 3
    A = ops.finer_pixels((n, n), k)
    x = torch.randn(2, 1, n, n, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(A(x), k), x)

    def means(m: int) -> Tensor:  # of 1 + t + 2t² over m pixels of [0, 1], exactly
        edge = torch.linspace(0, 1, m + 1, dtype=torch.float64)
        whole = edge + edge**2 / 2 + 2 * edge**3 / 3
        return whole.diff() * m

    field = torch.outer(means(n), means(n))[None, None]
    fine = torch.outer(means(n * k), means(n * k))[None, None]
    inner = slice(k, -k)
    torch.testing.assert_close(A(field)[..., inner, inner], fine[..., inner, inner])
    with pytest.raises(ValueError, match="a factor of 0"):
        ops.finer_pixels((4, 4), 0)


def test_a_smooth_image_is_projected_nearer_to_the_truth() -> None:
    """A Gaussian blob of 1.2 pixels: √(2π) s exp(−d²/2s²) of a ray at the distance d."""
    n, s, at = 24, 1.2, torch.tensor([1.3, -2.2], dtype=torch.float64)  # (x, y)
    angles = torch.linspace(0, torch.pi, 25, dtype=torch.float64)[:-1]
    beam = ops.ParallelBeam((n, n), angles)
    edge = torch.arange(n + 1, dtype=torch.float64) - n / 2
    across, down = (torch.erf((edge - c) / (2**0.5 * s)).diff() for c in at.tolist())
    x = (torch.pi / 2) ** 0.5 * s * down.flip(0)[:, None] * across
    x = x * (torch.pi / 2) ** 0.5 * s
    where = torch.arange(beam.detectors, dtype=torch.float64)
    where = where - (beam.detectors - 1) / 2

    centre = at[0] * angles.cos() + at[1] * angles.sin()
    d = where - centre[:, None]
    true = (2 * torch.pi) ** 0.5 * s * (-(d**2) / (2 * s**2)).exp()

    def error(A: ops.LinearOperator) -> float:
        return float((A(x[None, None])[0, 0] - true).square().mean().sqrt())

    plain, finer = (error(replace(beam, oversample=k)) for k in (1, 2))
    assert finer < plain / 2


def test_an_element_is_as_wide_as_it_is() -> None:
    """The mean of √(2π) s exp(−d²/2s²) over an element of 1.5 s."""
    n, s = 24, 2.0
    angles = torch.linspace(0, torch.pi, 25, dtype=torch.float64)[:-1]
    beam = ops.ParallelBeam((n, n), angles, detector_mm=3.0, oversample=2)
    edge = torch.arange(n + 1, dtype=torch.float64) - n / 2
    across = torch.erf(edge / (2**0.5 * s)).diff() * (torch.pi / 2) ** 0.5 * s
    ends = (torch.arange(beam.detectors + 1) - beam.detectors / 2) * 3.0
    true = torch.pi * s**2 * torch.erf(ends.double() / (2**0.5 * s)).diff() / 3.0

    def error(rays: int) -> float:
        seen = replace(beam, rays=rays)(torch.outer(across, across)[None, None])
        return float((seen[0, 0] - true).square().mean().sqrt())

    assert error(3) < error(1) / 5


@pytest.mark.parametrize(
    "own, other",
    [((2, 1), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (2, 2)), ((2, 2), (1, 2))],
)
def test_another_model_of_the_beam_is_of_the_same_data(
    own: tuple[int, int], other: tuple[int, int]
) -> None:
    angles = torch.linspace(0, torch.pi, 9)[:-1]

    def views(angles: Tensor, model: tuple[int, int]) -> ops.ParallelBeam:
        oversample, rays = model
        return ops.ParallelBeam((8, 8), angles, oversample=oversample, rays=rays)

    family = Parametric.views(views(angles, own))
    some = torch.tensor([5, 1, 6])
    y = torch.randn(2, 1, 3, family.measured[-1], generator=seeded(1))
    beam = views(angles[some], other)
    rows, same = family.acquired(beam, y)
    assert rows.nonzero()[:, 1].tolist() == [1, 5, 6]
    torch.testing.assert_close(same[:, :, some], y)
    again = Parametric.from_words(family.words)
    x = torch.randn(2, 1, 8, 8, generator=seeded(2))
    torch.testing.assert_close(again.full.apply(x), family.full.apply(x))
