"""Computed tomography against its definition: chords of discs and balls, and identities.

The rays here are written out in (x, y, z), apart from the code under test.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from math import asin, cos, pi, sin, tan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import operators as ops
from invsolve.operators import ct
from invsolve.operators.ct import (
    ConeBeam,
    FanBeam,
    ParallelBeam,
    RayTransform,
    astra,
    cache,
    joseph,
    transform,
)

float64 = torch.float64
ANGLES = torch.linspace(0, pi, 13, dtype=float64)[:-1]
TURN = torch.linspace(0, 2 * pi, 13, dtype=float64)[:-1]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVSOLVE_CACHE", "")


def pixel_centres(n: int, pixel: float) -> tuple[Tensor, Tensor]:
    """x to the right and y up, from the middle of n × n pixels."""
    t = (torch.arange(n, dtype=float64) - (n - 1) / 2) * pixel
    return t[None, :], -t[:, None]


def disc(n: int, pixel: float, radius: float, x0: float = 0, y0: float = 0) -> Tensor:
    """A disc's mean over every pixel, by 8 × 8 points."""
    x, y = pixel_centres(8 * n, pixel / 8)
    inside = (x - x0) ** 2 + (y - y0) ** 2 <= radius**2
    return inside.double().reshape(n, 8, n, 8).mean((1, 3))[None, None]


def blob(n: int, x0: float, y0: float, width: float = 3.0) -> Tensor:
    """A Gaussian, smooth enough for every model of a ray."""
    x, y = pixel_centres(n, 1.0)
    square = (x - x0) ** 2 + (y - y0) ** 2
    return torch.exp(-square / (2 * width**2))[None, None]


def ball(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    radius: float,
    centre: tuple[float, float, float],
) -> Tensor:
    """A ball's mean over every voxel, by 4 × 4 × 4 points; its centre is (x, y, z)."""
    axes = [
        (torch.arange(4 * n, dtype=float64) - (4 * n - 1) / 2) * mm / 4
        for n, mm in zip(shape, spacing, strict=True)
    ]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    x0, y0, z0 = centre
    inside = (x - x0) ** 2 + (-y - y0) ** 2 + (z - z0) ** 2 <= radius**2
    d, h, w = shape
    fine = inside.double().reshape(d, 4, h, 4, w, 4)
    return fine.mean((1, 3, 5))[None, None]


def elements(count: int, pitch: float, offset: float = 0.0) -> Tensor:
    return (torch.arange(count, dtype=float64) - (count - 1) / 2) * pitch + offset


def detector(A: ParallelBeam | FanBeam) -> Tensor:
    return elements(A.detectors, A.detector_mm, A.offset_mm)


def fan_angles(A: FanBeam) -> Tensor:
    ratio = detector(A) / A.source_to_detector_mm
    return ratio if A.curved else ratio.atan()


def chords(
    A: ParallelBeam | FanBeam, radius: float, x0: float = 0, y0: float = 0
) -> Tensor:
    """A disc's sinogram: 2√(r² − (s − s₀)²), with s₀ = x₀ cos θ + y₀ sin θ."""
    theta, s = A.angles.double()[:, None], detector(A)
    if isinstance(A, FanBeam):
        gamma = fan_angles(A)
        theta, s = theta - gamma, A.source_to_axis_mm * gamma.sin()
    s = s - x0 * theta.cos() - y0 * theta.sin()
    return 2 * (radius**2 - s**2).clamp_min(0).sqrt()


def ball_chords(
    A: ConeBeam, radius: float, centre: tuple[float, float, float]
) -> Tensor:
    """2√(r² − d²), with d the distance of a ray from the ball's centre."""
    theta = A.angles.double()[:, None, None]
    rows, columns = A.detectors
    v = elements(rows, A.detector_mm[0], A.offset_mm[0])[:, None]
    u = elements(columns, A.detector_mm[1], A.offset_mm[1])
    R, D = A.source_to_axis_mm, A.source_to_detector_mm
    z = A.pitch_mm * theta / (2 * pi)
    source = torch.stack(
        torch.broadcast_tensors(R * theta.sin(), -R * theta.cos(), z), -1
    )
    far, side = (D * (u / D).cos(), D * (u / D).sin()) if A.curved else (D + 0 * u, u)
    ray = torch.stack(
        torch.broadcast_tensors(
            -far * theta.sin() + side * theta.cos(),
            far * theta.cos() + side * theta.sin(),
            v + 0 * theta,
        ),
        -1,
    )
    ray = ray / ray.norm(dim=-1, keepdim=True)
    to_centre = torch.tensor(centre, dtype=float64) - source
    square = to_centre.square().sum(-1) - (to_centre * ray).sum(-1).square()
    return 2 * (radius**2 - square).clamp_min(0).sqrt()


# --- Chords ---------------------------------------------------------------------------


def parallel(n: int, pixel: float) -> ParallelBeam:
    return ParallelBeam((n, n), ANGLES, pixel, detectors=n)


def fan(n: int, pixel: float, curved: bool = False) -> FanBeam:
    return FanBeam((n, n), TURN, 80.0, 130.0, pixel, curved=curved, offset_mm=0.4)


@pytest.mark.parametrize(("x0", "y0"), [(0.0, 0.0), (9.0, 6.0), (-4.0, 11.0)])
@pytest.mark.parametrize(
    "beam",
    [parallel, fan, lambda n, pixel: fan(n, pixel, curved=True)],
    ids=["parallel", "flat fan", "curved fan"],
)
def test_the_sinogram_of_a_disc_is_its_chords(
    beam: Callable[[int, float], ParallelBeam | FanBeam], x0: float, y0: float
) -> None:
    radius, mu = 16.0, 0.02

    def error(n: int) -> float:
        A = beam(n, 64 / n)
        expected = mu * chords(A, radius, x0, y0)
        got = A(mu * disc(n, 64 / n, radius, x0, y0))[0, 0]
        return float((got - expected).norm() / expected.norm())

    coarse, fine = error(32), error(128)
    assert coarse < 0.05
    assert fine < coarse / 3


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"curved": True, "offset_mm": (0.5, -1.1)},
        {"angles": 4 * TURN - 4 * pi, "pitch_mm": 9.0},
        {"angles": 4 * TURN - 4 * pi, "pitch_mm": -9.0, "curved": True},
    ],
    ids=["circle", "curved, offset", "helix", "helix downwards, curved"],
)
def test_the_projection_of_a_ball_is_its_chords(change: dict) -> None:
    radius, centre, mu = 8.0, (2.5, -1.5, 3.0), 0.02

    def errors(refine: int) -> tuple[float, float, float]:
        d, h, w = shape = (20 * refine, 28 * refine, 32 * refine)
        spacing = (26 / d, 25.2 / h, 25.6 / w)
        geometry: dict[str, Any] = {
            "shape": shape,
            "angles": TURN[::2],
            "source_to_axis_mm": 60.0,
            "source_to_detector_mm": 100.0,
            "voxel_mm": spacing,
            "detectors": (45, 40),
            "detector_mm": (1.5, 1.4),
        }
        A = ConeBeam(**(geometry | change))
        expected = mu * ball_chords(A, radius, centre)
        error = A(mu * ball(shape, spacing, radius, centre))[0, 0] - expected
        assert float(expected.max()) > 1.9 * mu * radius
        return (
            float(error.norm() / expected.norm()),
            float(error.abs().max()) / mu,
            float(error.sum() / expected.sum()),
        )

    coarse, most, mean = errors(1)
    assert coarse < 0.07
    assert most < (8 * radius * 1.3) ** 0.5 / 2  # half a rim's chord within a voxel
    assert abs(mean) < 3e-3
    assert errors(2)[0] < coarse / 1.7


def test_a_disc_lies_at_x_cos_plus_y_sin() -> None:
    x0, y0 = 10.0, 5.0
    A = ParallelBeam((64, 64), ANGLES, detectors=181, detector_mm=0.5, offset_mm=-2.0)
    x = disc(64, 1.0, 6.0, x0, y0)
    assert x[0, 0, :32].sum() > x[0, 0, 32:].sum()  # y is up: towards the first row
    y = A(x)[0, 0]
    centre = (y * detector(A)).sum(1) / y.sum(1)
    assert_close(centre, x0 * ANGLES.cos() + y0 * ANGLES.sin(), rtol=0, atol=0.02)


@pytest.mark.parametrize("detectors", [140, 141, 200])
@pytest.mark.parametrize("pixel", [1.0, 2.5])
def test_every_view_has_the_mass_of_the_image(detectors: int, pixel: float) -> None:
    x, pitch = blob(48, 3.0, -5.0), 0.5 * pixel
    A = ParallelBeam((48, 48), ANGLES, pixel, detectors, pitch)
    mass = A(x)[0, 0].sum(-1) * pitch
    expected = x.sum() * pixel**2
    assert_close(mass, expected.expand_as(mass), rtol=1e-4, atol=0)


def test_a_ray_through_a_single_pixel_has_its_length() -> None:
    theta = 0.3
    angles = torch.tensor([0.0, theta], dtype=float64)
    A = ParallelBeam((1, 1), angles, 2.0, detectors=1)
    y = A(torch.ones(1, 1, 1, 1, dtype=float64))[0, 0, :, 0]
    expected = torch.tensor([2.0, 2 / cos(theta)], dtype=float64)
    assert_close(y, expected, rtol=1e-14, atol=0)


def test_a_linear_image_is_integrated_exactly() -> None:
    # Along y from edge to edge: the length, times the value halfway, where y = 0.
    angles = torch.tensor([-0.2, 0.0, 0.15], dtype=float64)
    A = ConeBeam(
        (30, 6, 40),
        angles,
        30.0,
        50.0,
        (0.7, 1.1, 0.9),
        (5, 7),
        (0.9, 0.8),
        offset_mm=(0.3, -0.2),
        truncated=True,
    )
    z, _, x = torch.meshgrid(
        *(elements(n, mm) for n, mm in zip(A.shape, A.spacing, strict=True)),
        indexing="ij",
    )
    theta, v, u = torch.meshgrid(
        angles, elements(5, 0.9, 0.3), elements(7, 0.8, -0.2), indexing="ij"
    )
    right = -50 * theta.sin() + u * theta.cos()
    up = 50 * theta.cos() + u * theta.sin()
    t = 30 * theta.cos() / up  # where the ray has come from y = −30 cos θ to 0
    length = 6 * 1.1 * (right**2 + up**2 + v**2).sqrt() / up
    expected = length * (2 + 0.3 * t * v + 0.1 * (30 * theta.sin() + t * right))
    got = A((2 + 0.3 * z + 0.1 * x)[None, None])[0, 0]
    assert_close(got, expected, rtol=1e-12, atol=0)


def test_pixel_mm_scales_line_integrals(generator: Generator) -> None:
    x = torch.rand(1, 1, 12, 16, dtype=float64, generator=generator)
    one, three = (ParallelBeam((12, 16), ANGLES, mm) for mm in (1.0, 3.0))
    assert_close(three(x), 3 * one(x))


# --- Identities -----------------------------------------------------------------------


@pytest.mark.parametrize("curved", [None, False, True])
def test_turning_the_angles_turns_the_image(
    curved: bool | None, generator: Generator
) -> None:
    def beam(angles: Tensor) -> RayTransform:
        if curved is None:
            return ParallelBeam((20, 20), angles, offset_mm=0.3)
        return FanBeam((20, 20), angles, 30.0, 50.0, curved=curved, offset_mm=0.3)

    x = torch.rand(1, 2, 20, 20, dtype=float64, generator=generator)
    # A quarter turn to the left takes the point at angle φ to φ + π/2.
    quarter = torch.rot90(x, 1, (-2, -1))
    assert_close(beam(ANGLES + pi / 2)(quarter), beam(ANGLES)(x))


def test_turning_a_cone_turns_the_volume(generator: Generator) -> None:
    def cone(angles: Tensor) -> ConeBeam:
        return ConeBeam((5, 8, 8), angles, 20.0, 30.0, offset_mm=(0.2, 0.3))

    x = torch.rand(1, 1, 5, 8, 8, dtype=float64, generator=generator)
    quarter = torch.rot90(x, 1, (-2, -1))
    assert_close(cone(ANGLES + pi / 2)(quarter), cone(ANGLES)(x))


def test_half_a_turn_mirrors_a_parallel_view(generator: Generator) -> None:
    x = torch.rand(1, 1, 15, 22, dtype=float64, generator=generator)
    there = ParallelBeam((15, 22), ANGLES, offset_mm=0.7)
    back = ParallelBeam((15, 22), ANGLES + pi, offset_mm=-0.7)
    assert_close(back(x), there(x).flip(-1))


@pytest.mark.parametrize(("right", "up"), [(3, 0), (0, 4), (-2, 5)])
def test_a_shifted_object_shifts_each_view(
    right: int, up: int, generator: Generator
) -> None:
    x = torch.zeros(1, 1, 30, 30, dtype=float64)
    x[..., 10:20, 10:20] = torch.rand(10, 10, dtype=float64, generator=generator)
    moved = x.roll((-up, right), (-2, -1))
    for theta in ANGLES.tolist():
        angle = torch.tensor([theta], dtype=float64)
        shift = right * cos(theta) + up * sin(theta)
        still = ParallelBeam((30, 30), angle, detectors=60)
        follows = ParallelBeam((30, 30), angle, detectors=60, offset_mm=shift)
        assert_close(follows(moved), still(x))


@pytest.mark.parametrize("curved", [False, True])
def test_a_fan_from_afar_is_a_parallel_beam(curved: bool, generator: Generator) -> None:
    x = torch.rand(1, 1, 18, 24, dtype=float64, generator=generator)
    parallel = ParallelBeam((18, 24), TURN, detectors=33, offset_mm=0.4)
    far = FanBeam(
        (18, 24), TURN, 1e9, 1e9 + 1e3, detectors=33, curved=curved, offset_mm=0.4
    )
    assert_close(far(x), parallel(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("curved", [False, True])
def test_each_ray_of_a_fan_is_a_parallel_ray(
    curved: bool, generator: Generator
) -> None:
    x = torch.rand(1, 1, 9, 12, dtype=float64, generator=generator)
    A = FanBeam((9, 12), TURN, 14.0, 25.0, detectors=19, curved=curved, offset_mm=0.6)
    gamma = fan_angles(A)
    for j, g in enumerate(gamma.tolist()):
        ray = ParallelBeam(
            (9, 12),
            (TURN - g).clamp_max(2 * pi),
            detectors=1,
            offset_mm=A.source_to_axis_mm * sin(g),
            truncated=True,
        )
        assert_close(ray(x)[..., 0], A(x)[..., j])


@pytest.mark.parametrize("curved", [False, True])
def test_the_middle_row_of_a_cone_is_a_fan(curved: bool, generator: Generator) -> None:
    x = torch.rand(1, 2, 5, 9, 12, dtype=float64, generator=generator)
    cone = ConeBeam(
        (5, 9, 12),
        TURN,
        14.0,
        25.0,
        curved=curved,
        detectors=(11, 20),
        offset_mm=(0.0, 1.0),
    )
    fan = FanBeam((9, 12), TURN, 14.0, 25.0, curved=curved, detectors=20, offset_mm=1.0)
    assert_close(cone(x)[..., 5, :], fan(x[:, :, 2]))


def test_each_ray_to_a_cylinder_is_one_to_a_plane(generator: Generator) -> None:
    x = torch.rand(1, 1, 6, 8, 8, dtype=float64, generator=generator)
    y = ConeBeam(
        (6, 8, 8),
        TURN,
        14.0,
        25.0,
        1.0,
        (5, 4),
        (3.0, 5.5),
        curved=True,
        truncated=True,
    )(x)
    for row, v in enumerate(elements(5, 3.0).tolist()):
        for column, u in enumerate(elements(4, 5.5).tolist()):
            flat = (v / cos(u / 25), 25 * tan(u / 25))
            A = ConeBeam(
                (6, 8, 8), TURN, 14.0, 25.0, 1.0, (1, 1), offset_mm=flat, truncated=True
            )
            assert_close(A(x)[..., 0, 0], y[..., row, column])


def test_a_turn_of_a_helix_moves_the_volume(generator: Generator) -> None:
    x = torch.zeros(1, 1, 12, 6, 6, dtype=float64)
    x[:, :, 4:7] = torch.rand(1, 1, 3, 6, 6, dtype=float64, generator=generator)

    def helix(angles: Tensor) -> ConeBeam:
        return ConeBeam((12, 6, 6), angles, 12.0, 20.0, (1.5, 1.0, 1.0), pitch_mm=3.0)

    # The source climbs by two slices, which is as if the object came down by them.
    assert_close(helix(TURN + 2 * pi)(x.roll(2, 2)), helix(TURN)(x))


# --- Defaults, printing, refusals -----------------------------------------------------


def test_the_detector_covers_the_diagonal_unless_given() -> None:
    A = ParallelBeam((30, 40), ANGLES, pixel_mm=2.0)
    assert (A.detectors, A.detector_mm) == (50, 2.0)
    assert ParallelBeam((30, 40), ANGLES, 2.0, detector_mm=0.5).detectors == 200
    assert ParallelBeam((30, 40), ANGLES, 2.0, offset_mm=-3.0).detectors == 53


@pytest.mark.parametrize(
    "beam",
    [
        lambda angle: FanBeam((12, 16), angle, 20.0, 30.0),
        lambda angle: FanBeam((12, 16), angle, 20.0, 30.0, curved=True, offset_mm=2.0),
        lambda angle: ConeBeam((4, 6, 8), angle, 20.0, 30.0, (2.0, 1.0, 1.0)),
    ],
    ids=["flat fan", "curved fan", "cone"],
)
def test_every_view_sees_every_pixel_unless_told_otherwise(
    beam: Callable[[Tensor], RayTransform],
) -> None:
    for theta in TURN:
        A = beam(theta[None])
        assert (A.adjoint(torch.ones(1, 1, *A.measurement_shape)) > 0).all()


def test_a_helix_sees_every_voxel_over_half_a_turn_unless_told_otherwise() -> None:
    n, radius, R = 60, 2.0 * 2**0.5, 20.0
    angles = torch.arange(-n, n + 1) * (2 * pi / n)
    shape, fine = (40, 4, 4), (0.2, 1.0, 1.0)
    A = ConeBeam(shape, angles, R, 30.0, fine, detector_mm=(0.1, 1.0), pitch_mm=3.0)
    tall = ConeBeam(shape, torch.zeros(1), R, 30.0, fine, detector_mm=(0.1, 1.0))
    assert A.detectors[0] < tall.detectors[0] / 3
    seen = torch.zeros(shape)
    for angle in angles:
        view = replace(A, angles=angle[None])
        seen += view.adjoint(torch.ones(1, 1, *view.measurement_shape))[0, 0] > 0
    least = (pi - 2 * asin(radius / R)) / (2 * pi) * n
    assert float(seen[15:25].min()) >= least - 1
    assert float(seen[15:25].max()) < n


def test_default_pitches_are_a_pixel_on_the_axis() -> None:
    fan = FanBeam((8, 8), TURN, 20.0, 30.0, 0.4)
    cone = ConeBeam((8, 8, 8), TURN, 20.0, 30.0, (2.0, 0.5, 0.4))
    assert fan.detector_mm == pytest.approx(0.6)
    assert cone.detector_mm == pytest.approx((3.0, 0.6))


@pytest.mark.parametrize(
    "A",
    [
        ParallelBeam((3, 4), torch.linspace(0, torch.pi, 31)[:-1], pixel_mm=0.1),
        ParallelBeam((3, 4), torch.tensor([0.1, 0.7, -1.3]), offset_mm=0.2),
        ParallelBeam((3, 4), torch.linspace(0.1, 2, 7, dtype=float64), detectors=9),
        FanBeam((3, 4), ANGLES + 0.1, 10.0, 15.0, curved=True, backend="matrix"),
        FanBeam((3, 4), torch.linspace(0, 2 * pi, 9)[:-1], 10.0, 15.0, 0.3),
        ParallelBeam((3, 4), ANGLES, oversample=2, rays=3),
        ConeBeam((3, 4, 5), 3 * TURN, 10.0, 15.0, (1.0, 0.3, 0.2), pitch_mm=-1.0),
        ConeBeam((3, 4, 5), TURN, 10.0, 15.0, detectors=(1, 2), truncated=True),
    ],
    ids=lambda A: type(A).__name__,
)
def test_what_is_printed_makes_the_operator_again(A: RayTransform) -> None:
    names = {"torch": torch, **{k: getattr(ct, k) for k in dir(ct) if "Beam" in k}}
    again = eval(repr(A), names)
    assert again.scan == A.scan
    assert again.angles.dtype == A.angles.dtype
    assert repr(again) == repr(A)


def test_even_angles_are_printed_in_short() -> None:
    A = ParallelBeam((3, 4), torch.linspace(0, torch.pi, 1001)[:-1])
    assert "torch.linspace(0.0, 3.141592653589793, 1001)[:-1]" in repr(A)


PARALLEL: dict[str, Any] = {"shape": (8, 8), "angles": ANGLES}
FAN: dict[str, Any] = PARALLEL | {
    "source_to_axis_mm": 20.0,
    "source_to_detector_mm": 30.0,
}
CONE: dict[str, Any] = FAN | {"shape": (4, 8, 8)}


@pytest.mark.parametrize(
    ("kind", "geometry"),
    [(ParallelBeam, PARALLEL), (FanBeam, FAN), (ConeBeam, CONE)],
    ids=["parallel", "fan", "cone"],
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"angles": torch.tensor([0.0, 90.0])}, "largest one is 90.*torch.deg2rad"),
        ({"angles": torch.zeros(0)}, "at least one angle"),
        ({"angles": torch.tensor([0.0, torch.nan])}, "angles must be finite"),
        ({"shape": (4, 0, 8)}, "shape must be positive"),
        ({"pixel_mm": 0.0, "voxel_mm": (1.0, 0.0, 1.0)}, "_mm must be positive"),
        ({"pixel_mm": -1.0, "voxel_mm": -1.0}, "_mm must be positive"),
        ({"pixel_mm": float("nan"), "voxel_mm": float("nan")}, "_mm must be finite"),
        ({"detectors": (9, -1)}, "detectors must be positive, or 0"),
        ({"detector_mm": (1.0, -1.0)}, "detector_mm must be positive, or 0"),
        ({"offset_mm": (0.0, float("inf"))}, "offset_mm must be finite"),
        (
            {"detectors": (9, 5), "detector_mm": (3.0, 1.0)},
            "5 detectors of 1 mm are too",
        ),
        ({"detectors": (9, 9), "offset_mm": (0.0, 20.0)}, "too narrow"),
        ({"oversample": 0}, "oversample must be positive"),
        ({"rays": 0}, "rays must be positive"),
        ({"source_to_axis_mm": 5.0}, "corners are 5.657 mm from it"),
        ({"source_to_axis_mm": float("inf")}, "source_to_axis_mm must be finite"),
        ({"source_to_detector_mm": 20.0}, r"must exceed source_to_axis_mm \(20\)"),
        ({"source_to_detector_mm": -1.0}, "source_to_detector_mm must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_geometries_are_refused(
    kind: type, geometry: dict, change: dict, message: str
) -> None:
    if kind is not ConeBeam:  # the last of a cone's numbers is about its columns
        change = {
            k: v[-1] if isinstance(v, tuple) and k != "shape" else v
            for k, v in change.items()
        } | ({"shape": (0, 8)} if "shape" in change else {})
    change = {k: v for k, v in change.items() if k in kind.__dataclass_fields__}
    if not change:
        return
    with pytest.raises(ValueError, match=message) as error:
        kind(**(geometry | change))
    assert "\n" not in str(error.value)


def test_a_narrow_detector_is_taken_if_it_is_meant() -> None:
    for kind, geometry in ((ParallelBeam, PARALLEL), (FanBeam, FAN)):
        with pytest.raises(ValueError, match=r"too narrow .* or truncated=True"):
            kind(**geometry, detectors=3)
        assert kind(**geometry, detectors=3, truncated=True).detectors == 3
    with pytest.raises(ValueError, match="3 rows of 1 mm are too narrow"):
        ConeBeam(**CONE, detectors=(3, 0), detector_mm=(1.0, 0.0))
    low = ConeBeam(**CONE, detectors=(3, 0), detector_mm=(1.0, 0.0), truncated=True)
    assert low.detectors[0] == 3


def test_the_width_that_is_asked_for_is_enough() -> None:
    with pytest.raises(ValueError, match="give 10,"):
        FanBeam((8, 8), ANGLES, 20.0, 30.0, detectors=6, offset_mm=1.0)
    FanBeam((8, 8), ANGLES, 20.0, 30.0, detectors=10, offset_mm=1.0)


def test_an_offset_detector_has_to_reach_the_axis() -> None:
    ParallelBeam((8, 8), ANGLES, detectors=8, offset_mm=3.9)
    with pytest.raises(ValueError, match="too narrow"):
        ParallelBeam((8, 8), ANGLES, detectors=8, offset_mm=4.1)


def test_a_helix_may_turn_often_but_not_in_degrees() -> None:
    def helix(angles: Tensor, pitch_mm: float) -> ConeBeam:
        return ConeBeam((4, 8, 8), angles, 20.0, 30.0, pitch_mm=pitch_mm)

    degrees = torch.arange(0.0, 3600.0, 10.0)
    assert len(helix(torch.deg2rad(degrees), 2.0).angles) == 360
    with pytest.raises(ValueError, match=r"largest step is 10; .*torch.deg2rad"):
        helix(degrees, 2.0)
    with pytest.raises(ValueError, match=r"largest one is 62\.6"):
        helix(torch.deg2rad(degrees), 0.0)


# --- The matrix: blocks, precision, memory, disk --------------------------------------


def geometries(**more: Any) -> list[RayTransform]:
    return [
        ParallelBeam((9, 14), ANGLES, offset_mm=0.3, **more),
        FanBeam((9, 14), ANGLES, 20.0, 30.0, curved=True, **more),
        ConeBeam((4, 6, 5), ANGLES, 20.0, 30.0, (1.0, 2.0, 1.0), **more),
        ParallelBeam((9, 14), ANGLES, offset_mm=0.3, oversample=2, **more),
        FanBeam((9, 14), ANGLES, 20.0, 30.0, curved=True, oversample=3, **more),
        ParallelBeam((9, 14), ANGLES, detector_mm=3.0, oversample=2, rays=5, **more),
        FanBeam((9, 14), ANGLES, 20.0, 30.0, rays=2, **more),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, float64], ids=str)
@pytest.mark.parametrize("kind", range(7))
def test_without_the_matrix_the_numbers_are_the_same(
    kind: int,
    dtype: torch.dtype,
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    A, B = geometries(backend="matrix")[kind], geometries(backend="matrix-free")[kind]
    x = torch.rand(3, 2, *A.image_shape, dtype=dtype, generator=generator)
    y = torch.rand(3, 2, *A.measurement_shape, dtype=dtype, generator=generator)
    expected, back = A(x), A.adjoint(y)
    sizes: list[int] = []
    monkeypatch.setattr(joseph, "CROSSINGS", 100)
    monkeypatch.setattr(joseph, "ENTRIES", 500)
    monkeypatch.setattr(
        joseph,
        "_csr",
        lambda *args, csr=joseph._csr: sizes.append(csr(*args).nnz) or csr(*args),
    )
    assert_close(B(x), expected)
    assert_close(B.adjoint(y), back)
    assert len(sizes) > 4
    assert max(sizes) < 500 + 5 * 28 * 2  # and at most one element more
    joseph.matrices.cache_clear()
    assert_close(A(x), expected)  # built by other blocks too


@pytest.mark.parametrize(("oversample", "rays"), [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("backend", ["matrix", "matrix-free", "astra"])
def test_rays_go_through_finer_pixels_and_an_element_measures_their_mean(
    backend: ct.Backend, oversample: int, rays: int, generator: Generator
) -> None:
    if backend == "astra":
        pytest.importorskip("astra")
    k, m = oversample, rays
    A = ParallelBeam((9, 14), ANGLES, 1.5, backend=backend, oversample=k, rays=m)
    finer = ParallelBeam(
        (9 * k, 14 * k),
        ANGLES,
        1.5 / k,
        detectors=A.detectors * m,
        detector_mm=1.5 / m,
        backend=backend,
    )
    x = torch.rand(2, 3, 9, 14, generator=generator)
    y = torch.rand(2, 3, *A.measurement_shape, generator=generator)
    U = ops.finer_pixels((9, 14), k)
    seen = finer(U(x)).unflatten(-1, (-1, m)).mean(-1)
    back = U.adjoint(finer.adjoint(y.repeat_interleave(m, -1) / m))
    assert_close(A(x), seen, rtol=1e-5, atol=1e-5)
    assert_close(A.adjoint(y), back, rtol=1e-5, atol=1e-5)
    assert ops.dottest(A, x, y) < 1e-5


def test_oversampling_does_not_move_the_image() -> None:
    x = blob(48, 3.0, -5.0)
    A = ParallelBeam((48, 48), ANGLES, 2.0)
    finer = replace(A, oversample=3)
    y, z = A(x)[0, 0], finer(x)[0, 0]
    assert_close(z.sum(-1), y.sum(-1), rtol=1e-4, atol=0)
    at = detector(A)
    assert_close(
        (z * at).sum(-1), (y * at).sum(-1), rtol=0, atol=1e-3 * float(y.sum(-1).max())
    )


def test_columns_are_multiplied_a_few_at_a_time(generator: Generator) -> None:
    A = ParallelBeam((9, 14), ANGLES)
    x = torch.rand(19, 2, 9, 14, generator=generator)
    assert_close(A(x), torch.cat([A(item[None]) for item in x]))


def test_auto_leaves_the_matrix_where_it_is_too_large(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(1, 1, 9, 14, generator=generator)
    A, expected = ParallelBeam((9, 14), ANGLES), ParallelBeam((9, 14), ANGLES)(x)
    monkeypatch.setattr(transform, "MATRIX_BYTES", A.matrix_bytes - 1)
    joseph.matrices.cache_clear()
    assert_close(A(x), expected)
    assert joseph.matrices.cache_info().currsize == 0
    monkeypatch.setattr(transform, "MATRIX_BYTES", A.matrix_bytes)
    assert_close(A(x), expected)
    assert joseph.matrices.cache_info().currsize == 1


@pytest.mark.parametrize("kind", range(7))
def test_the_memory_is_told_before_the_matrix_is_built(kind: int) -> None:
    A = geometries()[kind]
    joseph.matrices.cache_clear()
    told = A.matrix_bytes
    assert joseph.matrices.cache_info().currsize == 0
    taken = sum(
        part.nbytes
        for m in joseph.matrices(A.scan, torch.float32, torch.device("cpu"))
        for part in (m.crow_indices(), m.col_indices(), m.values())
    )
    assert taken <= told <= 6 * taken


def test_a_matrix_beyond_32_bit_indices_is_refused() -> None:
    part = (np.array([2**31]), np.zeros(0, np.int32), np.zeros(0, np.float32))
    with pytest.raises(ValueError, match="use backend='matrix-free' or 'astra'"):
        joseph._csr([part], 4)


def test_so_is_one_of_finer_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    A = ParallelBeam((4, 4), ANGLES, oversample=2)
    blocks = [SimpleNamespace(nnz=2**30)] * 2
    monkeypatch.setattr(joseph, "_blocks", lambda scan, dtype: iter(blocks))
    joseph.matrices.cache_clear()
    with pytest.raises(ValueError, match="use backend='matrix-free' or 'astra'"):
        A(torch.ones(1, 1, 4, 4))


class TestCache:
    A = FanBeam((9, 14), ANGLES, 20.0, 30.0)

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "not yet" / "there"
        monkeypatch.setenv("INVSOLVE_CACHE", str(folder))
        monkeypatch.setattr(cache, "WORTH_SECONDS", 0.0)
        joseph.matrices.cache_clear()
        return folder

    def matrices(
        self, A: RayTransform = A, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        """A's matrices as another process would find them."""
        joseph.matrices.cache_clear()
        return [
            part
            for m in joseph.matrices(A.scan, dtype, torch.device("cpu"))
            for part in (m.crow_indices(), m.col_indices(), m.values())
        ]

    @pytest.fixture
    def built(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """One entry for each time that a matrix has been built."""
        builds: list[int] = []

        def parts(*args: object, original: Callable = joseph._parts) -> object:
            builds.append(1)
            return original(*args)

        monkeypatch.setattr(joseph, "_parts", parts)
        return builds

    def same(self, some: list[Tensor], others: list[Tensor]) -> bool:
        return all(
            torch.equal(a, b) and a.dtype == b.dtype
            for a, b in zip(some, others, strict=True)
        )

    def test_a_hit_gives_identical_matrices(
        self, folder: Path, built: list[int]
    ) -> None:
        first = self.matrices()
        assert len(list(folder.iterdir())) == 1
        assert self.same(self.matrices(), first)
        assert len(built) == 1

    def test_another_geometry_or_precision_is_another_file(
        self, folder: Path, built: list[int]
    ) -> None:
        others = [
            replace(self.A, source_to_axis_mm=20.0 + 1e-12),
            replace(self.A, angles=ANGLES + 1e-15),
            replace(self.A, curved=True),
            replace(self.A, offset_mm=0.1),
        ]
        for A in (self.A, *others):
            self.matrices(A)
        self.matrices(self.A, float64)
        assert len(built) == len(list(folder.iterdir())) == 6

    @pytest.mark.parametrize("at", [0.0, 0.002, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.9999])
    def test_a_damaged_file_is_built_again(
        self, at: float, folder: Path, built: list[int]
    ) -> None:
        first = self.matrices()
        (file,) = folder.iterdir()
        content = bytearray(file.read_bytes())
        content[int(at * len(content))] ^= 0x10
        file.unlink()  # the old one is still mapped
        file.write_bytes(content)
        assert self.same(self.matrices(), first)
        assert len(built) == 2
        assert self.same(self.matrices(), first)  # and written anew
        assert len(built) == 2

    def test_no_damage_to_its_header_is_believed(self, folder: Path) -> None:
        tensors = {"A.data": torch.rand(5), "A.indices": torch.arange(7)}
        cache.store("some", tensors, seconds=1.0)
        (file,) = folder.iterdir()
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        for at in range(header):
            damaged = bytearray(content)
            damaged[at] ^= 0x01
            file.unlink()
            file.write_bytes(damaged)
            loaded = cache.load("some")
            if loaded is not None:  # only spaces were hit
                assert loaded.keys() == tensors.keys()
                assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)

    @pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
    def test_a_truncated_file_is_built_again(
        self, keep: int, folder: Path, built: list[int]
    ) -> None:
        first = self.matrices()
        (file,) = folder.iterdir()
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content[:keep])
        assert self.same(self.matrices(), first)
        assert len(built) == 2

    def test_a_file_is_there_whole_or_not_at_all(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def breaks(tensors: object, path: Path, metadata: object) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("no space left on device")

        monkeypatch.setattr(cache, "save_file", breaks)
        self.matrices()
        assert list(folder.iterdir()) == []

    def test_what_cannot_be_written_is_only_built(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: list[int]
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("INVSOLVE_CACHE", str(tmp_path / "file"))
        assert self.same(self.matrices(), self.matrices())
        assert len(built) == 2

    def test_what_is_quickly_built_is_not_kept(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache, "WORTH_SECONDS", 1e9)
        self.matrices()
        assert not folder.exists()

    def test_the_least_recently_used_make_room(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        geometries = [replace(self.A, offset_mm=0.1 * i) for i in range(3)]
        files = []
        for age, A in zip((300, 200, 100), geometries, strict=True):
            self.matrices(A)
            (new,) = set(folder.iterdir()) - set(files)
            files.append(new)
            past = new.stat().st_mtime - age
            os.utime(new, (past, past))
        self.matrices(geometries[0])  # used again: now the second is the oldest
        size = files[0].stat().st_size
        monkeypatch.setattr(cache, "TOTAL_BYTES", int(3.5 * size))
        self.matrices(replace(self.A, offset_mm=0.9))
        left = set(folder.iterdir())
        assert files[1] not in left
        assert {files[0], files[2]} < left
        assert len(left) == 3
        monkeypatch.setattr(cache, "TOTAL_BYTES", size // 2)
        self.matrices(replace(self.A, offset_mm=0.7))
        assert set(folder.iterdir()) == left  # larger than all: not kept

    def test_where_it_lies(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert cache.folder() == tmp_path / "not yet" / "there"
        monkeypatch.setenv("INVSOLVE_CACHE", "")
        assert cache.folder() is None
        monkeypatch.delenv("INVSOLVE_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache.folder() == tmp_path / "invsolve"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache.folder() == Path.home() / ".cache" / "invsolve"


# --- ASTRA ----------------------------------------------------------------------------


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


class TestAstra:
    def parallel(self, backend: ct.Backend) -> ParallelBeam:
        return ParallelBeam((20, 28), ANGLES, 1.5, 40, 1.1, -0.4, backend=backend)

    def fan(self, backend: ct.Backend) -> FanBeam:
        return FanBeam((48, 56), TURN, 90.0, 150.0, offset_mm=0.6, backend=backend)

    def test_its_parallel_rays_are_joseph_s(self, generator: Generator) -> None:
        pytest.importorskip("astra")
        A, B = self.parallel("matrix"), self.parallel("astra")
        x = disc(28, 1.5, 12.0, 3.0, -1.0)[:, :, 4:24].expand(2, 3, -1, -1).float()
        y = A(x)
        assert relative(B(x), y) < 1e-5
        assert relative(B.adjoint(y), A.adjoint(y)) < 1e-5
        x = torch.rand(2, 3, 20, 28, generator=generator)
        assert relative(B(x), A(x)) < 1e-3
        assert ops.dottest(B, x, y) < 1e-5
        assert B.adjoint_is_exact

    def test_its_fans_are_lengths_within_pixels(self, generator: Generator) -> None:
        pytest.importorskip("astra")
        A, B = self.fan("matrix"), self.fan("astra")
        x = blob(56, 5.0, -3.0, width=7.0)[:, :, 4:52].float()
        y = A(x)
        assert relative(B(x), y) < 0.01
        y = torch.rand(1, 1, *A.measurement_shape, generator=generator)
        assert ops.dottest(B, x, y) < 1e-5

    def test_what_it_lacks_on_a_cpu_is_refused(self) -> None:
        pytest.importorskip("astra")
        cone = ConeBeam((2, 4, 4), ANGLES, 20.0, 30.0, backend="astra")
        with pytest.raises(ValueError, match="cone beams on a GPU only: use backend"):
            cone(torch.ones(1, 1, 2, 4, 4))
        with pytest.raises(ValueError, match="detectors are flat here: give backend"):
            FanBeam((4, 4), ANGLES, 20.0, 30.0, curved=True, backend="astra")

    def test_where_it_is_missing_the_message_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "astra", None)
        astra._projector.cache_clear()
        assert not astra.has_cuda()
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'invsolve\[ct\]'"):
            self.parallel("astra")(torch.ones(1, 1, 20, 28))

    def test_projectors_are_kept_and_deleted(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("astra")
        deleted: list[int] = []

        class Module:
            @staticmethod
            def create(config: object) -> int:
                return 7

            delete = staticmethod(deleted.append)

        projector = astra._Projector(Module, "linear", {}, {})
        assert not deleted
        del projector
        assert deleted == [7]
        astra._projector.cache_clear()
        A = self.fan("astra")
        for _ in range(3):
            A(torch.ones(1, 1, 48, 56))
        assert astra._projector.cache_info().misses == 1

    @pytest.mark.parametrize(
        "A",
        [
            ParallelBeam((4, 6), ANGLES, offset_mm=0.3),
            FanBeam((4, 6), ANGLES, 20.0, 30.0, offset_mm=0.3),
            ConeBeam((2, 4, 6), ANGLES, 20.0, 30.0, offset_mm=(0.2, 0.3), pitch_mm=5.0),
        ],
        ids=lambda A: type(A).__name__,
    )
    def test_its_vectors_are_the_same_rays(self, A: RayTransform) -> None:
        scan = A.scan
        rows = scan.detectors[0] if len(scan.detectors) == 2 else 1
        columns = scan.detectors[-1]
        table = astra.vectors_3d(scan).reshape(len(ANGLES), 4, 1, 1, 3)
        first, centre, u, v = table.swapaxes(0, 1)
        i = (np.arange(columns) - (columns - 1) / 2)[:, None]
        j = (np.arange(rows) - (rows - 1) / 2)[:, None, None]
        element = centre + i * u + j * v
        start = element if scan.is_parallel else first + 0 * element
        towards = first + 0 * element if scan.is_parallel else element - first
        point, direction = (
            np.concatenate(part) for part in zip(*scan.lines(7), strict=True)
        )
        axes = slice(None, None, -1) if len(scan.shape) == 3 else slice(-2, None, -1)
        flip = slice(1, None, -1) if len(scan.shape) == 2 else axes
        np.testing.assert_allclose(start.reshape(-1, 3)[:, flip], point, atol=1e-12)
        np.testing.assert_allclose(
            towards.reshape(-1, 3)[:, flip], direction, atol=1e-12
        )
        if len(scan.shape) == 2:
            flat = astra.vectors_2d(scan).reshape(-1, 3, 2) * [1, -1]
            np.testing.assert_allclose(flat, table[:, :3, 0, 0, :2], atol=1e-12)


class TestInexactAdjoint:
    """As on a GPU, with ASTRA's part played by the matrix."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        calls: list[bool] = []

        def project(scan: object, items: Tensor, *, forward: bool) -> Tensor:
            calls.append(forward)
            blocks = joseph.apply_in_blocks if forward else joseph.adjoint_in_blocks
            return blocks(scan, items.flatten(1))  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(astra, "project", project)
        monkeypatch.setattr(RayTransform, "_on_gpu", lambda self: True)
        return calls

    def test_which_adjoints_are_exact(self, calls: list[bool]) -> None:
        exact = {
            "auto": False,
            "astra": False,
            "matrix": True,
            "matrix-free": True,
        }
        for backend, expected in exact.items():
            A = ParallelBeam((8, 8), ANGLES, backend=backend)  # pyright: ignore
            assert A.adjoint_is_exact == expected
            assert (2.0 * A).adjoint_is_exact == expected
        assert FanBeam((8, 8), ANGLES, 20.0, 30.0, curved=True).adjoint_is_exact

    def test_it_limits_conjugate_gradients(
        self, calls: list[bool], generator: Generator
    ) -> None:
        A = ParallelBeam((8, 8), ANGLES)
        y = torch.rand(1, 1, *A.measurement_shape, dtype=float64, generator=generator)
        A.pinv(y, max_steps=500, rtol=0.0)
        assert ops.base.INEXACT_STEPS <= sum(calls) <= ops.base.INEXACT_STEPS + 1
        x = A.adjoint(y)
        calls.clear()
        A.prox(x, y, 1e-6, max_steps=500, rtol=0.0)
        assert ops.base.INEXACT_STEPS <= sum(calls) <= ops.base.INEXACT_STEPS + 1
        calls.clear()
        A.pinv(y, max_steps=5, rtol=0.0)
        assert sum(calls) <= 6


@pytest.mark.cuda
@pytest.mark.skipif(
    not (torch.cuda.is_available() and astra.has_cuda()),
    reason="no CUDA device, or no ASTRA that finds it",
)
class TestAstraOnAGpu:
    @pytest.mark.parametrize("kind", range(4))
    def test_it_is_near_the_matrix(self, kind: int, generator: Generator) -> None:
        A = (
            ParallelBeam((20, 28), ANGLES, 1.5, 40, 1.1, -0.4),
            FanBeam((20, 28), TURN, 60.0, 100.0, offset_mm=0.6),
            ConeBeam((8, 20, 28), TURN, 60.0, 100.0, (1.3, 1.0, 1.0)),
            ConeBeam((8, 20, 28), 2 * TURN - 6, 60.0, 100.0, pitch_mm=4.0),
        )[kind]
        B = A.to(torch.device("cuda"))
        assert A.adjoint_is_exact
        assert not B.adjoint_is_exact
        if kind < 2:
            x = disc(28, 1.0, 8.0, 3.0, -1.0)[:, :, 4:24]
        else:
            x = ball((8, 20, 28), (1.0, 1.0, 1.0), 3.5, (2.0, -1.0, 0.5))
        x = x.expand(2, 3, *A.image_shape) * torch.rand(
            2, 3, *(1 for _ in A.image_shape)
        )
        y = A(x.float())
        there = B(x.float().cuda())
        assert there.is_cuda
        assert relative(there.cpu(), y) < 1e-2
        assert relative(B.adjoint(y.cuda()).cpu(), A.adjoint(y)) < 0.1

    def test_slices_do_not_mix(self) -> None:
        A = ParallelBeam((16, 16), ANGLES.cuda())
        x = torch.zeros(1, 5, 16, 16, device="cuda")
        x[:, 2] = 1
        for out in (A(x), A.adjoint(A(x))):
            assert out[:, 2].abs().max() > 1
            assert float(out[:, [0, 1, 3, 4]].abs().max()) == 0

    def test_the_current_stream_is_waited_for(self) -> None:
        A = ParallelBeam((256, 256), ANGLES.cuda())
        x = torch.ones(1, 64, 256, 256, device="cuda")
        expected = A(x)
        with torch.cuda.stream(torch.cuda.Stream()):
            late = torch.zeros_like(x)
            for _ in range(200):
                late = late + 1 / 200
            got = A(late)
        torch.cuda.synchronize()
        assert relative(got, expected) < 1e-3


# --- Filtered back-projection ---------------------------------------------------------
@pytest.mark.parametrize("window", ["ram-lak", "shepp-logan", "cosine", "hann"])
@pytest.mark.parametrize(("pixel", "pitch"), [(1.0, 1.0), (0.5, 0.7)])
def test_fbp_gives_the_disc_again(
    window: ct.Window, pixel: float, pitch: float
) -> None:
    n, mu, x0, y0, radius = 96, 0.02, 12 * pixel, 8 * pixel, 24 * pixel
    views = torch.linspace(0, pi, 181, dtype=float64)[:-1]
    A = ParallelBeam((n, n), views, pixel, detector_mm=pitch)
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
    narrow, wide = (ParallelBeam((40, 40), ANGLES, detectors=n) for n in (64, 256))
    got, expected = (A.fbp(chords(A, 15.0)[None, None]) for A in (narrow, wide))
    assert_close(got, expected, rtol=0, atol=1e-9)


def test_windows_are_ever_smoother(generator: Generator) -> None:
    A = ParallelBeam((32, 32), ANGLES)
    noise = torch.randn(1, 1, *A.measurement_shape, dtype=float64, generator=generator)
    windows: list[ct.Window] = ["ram-lak", "shepp-logan", "cosine", "hann"]
    norms = [float(A.fbp(noise, window=w).norm()) for w in windows]
    assert norms == sorted(norms, reverse=True)


def test_fbp_is_linear_and_item_by_item(generator: Generator) -> None:
    A = ParallelBeam((16, 12), ANGLES)
    y = torch.randn(2, 3, *A.measurement_shape, dtype=float64, generator=generator)
    assert A.fbp(y).shape == (2, 3, 16, 12)
    assert_close(A.fbp(y)[1:, 2:], A.fbp(y[1:, 2:]))
    assert_close(A.fbp(2 * y[:1] - y[1:]), 2 * A.fbp(y[:1]) - A.fbp(y[1:]))
