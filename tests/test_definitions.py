"""Every operator against its definition: what the algebraic laws cannot tell."""

import sys
from math import cos, pi

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import operators as ops
from invsolve.operators import ct

float64 = torch.float64
ANGLES = torch.linspace(0, pi, 13, dtype=float64)[:-1]


def pixel_centres(n: int, pixel: float) -> tuple[Tensor, Tensor]:
    """x to the right and y up, from the middle of n × n pixels."""
    t = (torch.arange(n, dtype=float64) - (n - 1) / 2) * pixel
    return t[None, :], -t[:, None]


def disc(n: int, pixel: float, radius: float, x0: float = 0, y0: float = 0) -> Tensor:
    """A disc's mean over every pixel, by 8 × 8 points."""
    x, y = pixel_centres(8 * n, pixel / 8)
    inside = (x - x0) ** 2 + (y - y0) ** 2 <= radius**2
    return inside.double().reshape(n, 8, n, 8).mean((1, 3))[None, None]


def detector(A: ops.ParallelBeam) -> Tensor:
    count = A.detectors
    return (torch.arange(count, dtype=float64) - (count - 1) / 2) * A.detector_mm


def chords(A: ops.ParallelBeam, radius: float, x0: float = 0, y0: float = 0) -> Tensor:
    """A disc's sinogram: 2√(r² − (s − s₀)²), with s₀ = x₀ cos θ + y₀ sin θ."""
    theta = A.angles.double()[:, None]
    s = detector(A) - x0 * theta.cos() - y0 * theta.sin()
    return 2 * (radius**2 - s**2).clamp_min(0).sqrt()


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


def test_two_channels_are_real_and_imaginary_part(generator: Generator) -> None:
    x = torch.randn(2, 2, 3, 4, generator=generator)
    y = ops.ComplexChannels()(x)
    assert torch.equal(y.real, x[:, :1])
    assert torch.equal(y.imag, x[:, 1:])
    assert torch.equal(ops.RealImage()(x), x + 0j)


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


@pytest.mark.parametrize(("x0", "y0"), [(0.0, 0.0), (9.0, 6.0), (-4.0, 11.0)])
def test_the_sinogram_of_a_disc_is_its_chords(x0: float, y0: float) -> None:
    radius, mu = 16.0, 0.02

    def error(n: int) -> float:
        pixel = 64 / n
        A = ops.ParallelBeam((n, n), ANGLES, pixel_mm=pixel, detectors=n)
        expected = mu * chords(A, radius, x0, y0)
        got = A(mu * disc(n, pixel, radius, x0, y0))[0, 0]
        return float((got - expected).norm() / expected.norm())

    coarse, fine = error(32), error(128)
    assert coarse < 0.05
    assert fine < coarse / 3


def test_a_disc_lies_at_x_cos_plus_y_sin() -> None:
    x0, y0 = 10.0, 5.0
    A = ops.ParallelBeam((64, 64), ANGLES, detectors=181, detector_mm=0.5)
    x = disc(64, 1.0, 6.0, x0, y0)
    assert x[0, 0, :32].sum() > x[0, 0, 32:].sum()  # y is up: towards the first row
    y = A(x)[0, 0]
    centre = (y * detector(A)).sum(1) / y.sum(1)
    assert_close(centre, x0 * ANGLES.cos() + y0 * ANGLES.sin(), rtol=0, atol=0.02)


@pytest.mark.parametrize("detectors", [140, 141, 200])
@pytest.mark.parametrize("pixel", [1.0, 2.5])
def test_every_view_has_the_mass_of_the_image(detectors: int, pixel: float) -> None:
    x, y = pixel_centres(48, pixel)
    blob = torch.exp(-((x / pixel - 3) ** 2 + (y / pixel + 5) ** 2) / 18)[None, None]
    pitch = 0.5 * pixel
    A = ops.ParallelBeam((48, 48), ANGLES, pixel, detectors, pitch)
    mass = A(blob)[0, 0].sum(-1) * pitch
    expected = blob.sum() * pixel**2
    assert_close(mass, expected.expand_as(mass), rtol=1e-4, atol=0)


def test_the_detector_covers_the_diagonal_unless_given(generator: Generator) -> None:
    A = ops.ParallelBeam((30, 40), ANGLES, pixel_mm=2.0)
    assert (A.detectors, A.detector_mm) == (50, 2.0)
    assert ops.ParallelBeam((30, 40), ANGLES, 2.0, detector_mm=0.5).detectors == 200


def test_pixel_mm_scales_line_integrals(generator: Generator) -> None:
    x = torch.rand(1, 1, 12, 16, dtype=float64, generator=generator)
    one, three = (ops.ParallelBeam((12, 16), ANGLES, mm) for mm in (1.0, 3.0))
    assert_close(three(x), 3 * one(x))


@pytest.mark.parametrize("window", ["ram-lak", "shepp-logan", "cosine", "hann"])
@pytest.mark.parametrize(("pixel", "pitch"), [(1.0, 1.0), (0.5, 0.7)])
def test_fbp_gives_the_disc_again(
    window: ct.Window, pixel: float, pitch: float
) -> None:
    n, mu, x0, y0, radius = 96, 0.02, 12 * pixel, 8 * pixel, 24 * pixel
    views = torch.linspace(0, pi, 181, dtype=float64)[:-1]
    A = ops.ParallelBeam((n, n), views, pixel, detector_mm=pitch)
    got = A.fbp(mu * chords(A, radius, x0, y0)[None, None], window=window)[0, 0]
    x, y = pixel_centres(n, pixel)
    r = ((x - x0) ** 2 + (y - y0) ** 2).sqrt()
    assert float(got[r < 0.8 * radius].mean()) == pytest.approx(mu, rel=0.01)
    assert float(got[r < 0.8 * radius].sub(mu).abs().max()) < 0.03 * mu
    assert float(got[r > 1.2 * radius].mean().abs()) < 0.01 * mu
    near = got.where(r < 1.2 * radius, 0)
    assert float((near * x).sum() / near.sum()) == pytest.approx(x0, abs=0.02 * pixel)
    assert float((near * y).sum() / near.sum()) == pytest.approx(y0, abs=0.02 * pixel)


def test_fbp_does_not_wrap_around_the_detector() -> None:
    narrow, wide = (ops.ParallelBeam((40, 40), ANGLES, detectors=n) for n in (64, 256))
    got, expected = (A.fbp(chords(A, 15.0)[None, None]) for A in (narrow, wide))
    assert_close(got, expected, rtol=0, atol=1e-9)


def test_windows_are_ever_smoother(generator: Generator) -> None:
    A = ops.ParallelBeam((32, 32), ANGLES)
    noise = torch.randn(1, 1, *A.measurement_shape, dtype=float64, generator=generator)
    windows: list[ct.Window] = ["ram-lak", "shepp-logan", "cosine", "hann"]
    norms = [float(A.fbp(noise, window=w).norm()) for w in windows]
    assert norms == sorted(norms, reverse=True)


def test_fbp_is_linear_and_item_by_item(generator: Generator) -> None:
    A = ops.ParallelBeam((16, 12), ANGLES)
    y = torch.randn(2, 3, *A.measurement_shape, dtype=float64, generator=generator)
    assert A.fbp(y).shape == (2, 3, 16, 12)
    assert_close(A.fbp(y)[1:, 2:], A.fbp(y[1:, 2:]))
    assert_close(A.fbp(2 * y[:1] - y[1:]), 2 * A.fbp(y[:1]) - A.fbp(y[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"angles": torch.tensor([0.0, 90.0])}, "give torch.deg2rad"),
        ({"angles": torch.zeros(0)}, "at least one angle"),
        ({"pixel_mm": 0.0}, "must be positive"),
        ({"detectors": -1}, "must be positive"),
        ({"detector_mm": -1.0}, "must be positive"),
    ],
)
def test_impossible_geometries_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.ParallelBeam(**({"shape": (8, 8), "angles": ANGLES} | change))


class TestAstra:
    shape, geometry = (20, 28), (1.5, 40, 1.1)

    def beam(self, backend: ct.Backend) -> ops.ParallelBeam:
        return ops.ParallelBeam(self.shape, ANGLES, *self.geometry, backend=backend)

    def test_it_agrees_with_the_matrix(self, generator: Generator) -> None:
        pytest.importorskip("astra")
        A, B = self.beam("matrix"), self.beam("astra")
        x = torch.rand(2, 3, *self.shape, generator=generator)
        y = torch.rand(2, 3, *A.measurement_shape, generator=generator)
        for got, expected in ((B(x), A(x)), (B.adjoint(y), A.adjoint(y))):
            assert float((got - expected).norm() / expected.norm()) < 1e-3
        assert ops.dottest(B, x, y) < 1e-5

    def test_auto_takes_it_where_the_matrix_is_too_large(
        self, generator: Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("astra")
        x = torch.rand(1, 1, *self.shape, generator=generator)
        auto, matrix, astra = (self.beam(b)(x) for b in ("auto", "matrix", "astra"))
        assert torch.equal(auto, matrix)
        assert not torch.equal(auto, astra)
        monkeypatch.setattr(ct, "MATRIX_BYTES", 0)
        assert torch.equal(self.beam("auto")(x), astra)

    def test_where_it_is_missing_the_message_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "astra", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'invsolve\[ct\]'"):
            self.beam("astra")(torch.ones(1, 1, *self.shape))


def test_a_ray_through_a_single_pixel_has_its_length() -> None:
    theta = 0.3
    A = ops.ParallelBeam((1, 1), torch.tensor([0.0, theta]), 2.0, detectors=1)
    y = A(torch.ones(1, 1, 1, 1, dtype=float64))[0, 0, :, 0]
    assert_close(y, torch.tensor([2.0, 2 / cos(theta)], dtype=float64))
