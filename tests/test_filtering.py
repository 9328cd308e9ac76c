"""Filtered back-projection: absolute values of discs and balls whose chords are exact."""

import warnings
from math import asin, atan, cos, pi, sin

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve.operators.ct.filtering import (
    Window,
    fbp_fan,
    fbp_parallel,
    fdk,
    parker,
    ramp_filter,
    shares,
)

float64 = torch.float64
MU, RADIUS, X0, Y0 = 0.02, 20.0, 11.0, -7.0
R, D = 150.0, 260.0
N, PIXEL, COLUMNS, PITCH = 64, 1.3, 130, 1.4
HALF_FAN = asin(0.5 * 2**0.5 * N * PIXEL / R)
WINDOWS: list[Window] = ["ram-lak", "shepp-logan", "cosine", "hann"]


def turn(views: int, arc: float = 2 * pi, start: float = 0.3) -> Tensor:
    return start + torch.arange(views, dtype=float64) * (arc / views)


def elements(count: int, pitch: float) -> Tensor:
    return (torch.arange(count, dtype=float64) - (count - 1) / 2) * pitch


def centres() -> tuple[Tensor, Tensor]:
    along = elements(N, PIXEL)
    return along.expand(N, N), -along[:, None].expand(N, N)


def inside() -> Tensor:
    x, y = centres()
    return (x - X0) ** 2 + (y - Y0) ** 2 < (0.75 * RADIUS) ** 2


def outside() -> Tensor:
    x, y = centres()
    return (x - X0) ** 2 + (y - Y0) ** 2 > (1.3 * RADIUS) ** 2


def chords(theta: Tensor, s: Tensor) -> Tensor:
    """The disc's: 2√(r² − (s − s₀)²) μ on the parallel ray (θ, s)."""
    s0 = X0 * theta.cos() + Y0 * theta.sin()
    return 2 * MU * (RADIUS**2 - (s - s0) ** 2).clamp_min(0).sqrt()


def parallel(angles: Tensor, offset: float = 0.0) -> Tensor:
    return chords(angles[:, None], elements(COLUMNS, PITCH) + offset)[None, None]


def fan(angles: Tensor, curved: bool, offset: float = 0.0) -> Tensor:
    u = elements(COLUMNS, PITCH) + offset
    gamma = u / D if curved else (u / D).atan()
    return chords(angles[:, None] - gamma, R * gamma.sin())[None, None]


def from_fan(angles: Tensor, curved: bool, offset: float = 0.0) -> Tensor:
    y = fan(angles, curved, offset)
    return fbp_fan(y, angles, (N, N), R, D, PIXEL, PITCH, curved, offset)[0, 0]


def check_disc(x: Tensor) -> None:
    assert float(x[inside()].mean()) == pytest.approx(MU, rel=0.005)
    assert float((x[inside()] - MU).abs().max()) < 0.03 * MU
    assert float(x[outside()].mean().abs()) < 0.01 * MU
    ox, oy = centres()
    near = x.where(~outside(), 0)
    assert float((near * ox).sum() / near.sum()) == pytest.approx(X0, abs=0.03)
    assert float((near * oy).sum() / near.sum()) == pytest.approx(Y0, abs=0.03)


# --- parallel rays

HALVES = {
    "180°": turn(180, pi),
    "180° backwards": turn(180, pi).flip(0),
    "with both ends": torch.linspace(0, pi, 181, dtype=float64),
    "360°": turn(360),
    "odd 360°": turn(181),
    "200°": turn(400, 200 / 180 * pi),
    "twice as dense in one half": torch.cat(
        [turn(180, pi / 2, 0.0), turn(90, pi / 2, pi / 2)]
    ),
}


@pytest.mark.parametrize("angles", HALVES.values(), ids=HALVES.keys())
def test_parallel_rays_give_the_disc_again(angles: Tensor) -> None:
    check_disc(fbp_parallel(parallel(angles), angles, (N, N), PIXEL, PITCH)[0, 0])


def test_an_offset_detector_sees_the_same_disc() -> None:
    angles = turn(180, pi)
    for offset in (-3.3, 0.35):
        y = parallel(angles, offset)
        check_disc(fbp_parallel(y, angles, (N, N), PIXEL, PITCH, offset)[0, 0])
        check_disc(from_fan(turn(360), True, offset))
        check_disc(from_fan(turn(360), False, offset))


def error(views: int, columns: int, where: Tensor) -> float:
    angles, pitch = turn(views, pi), COLUMNS * PITCH / columns
    y = chords(angles[:, None], elements(columns, pitch))[None, None]
    x = fbp_parallel(y, angles, (N, N), PIXEL, pitch)[0, 0]
    truth = torch.where(inside(), MU, 0)
    return float((x - truth)[where].square().mean().sqrt() / MU)


def test_finer_detectors_are_of_second_order_more_accurate() -> None:
    coarse, middle, fine = (error(720, n, inside()) for n in (65, 130, 260))
    assert middle < coarse / 3
    assert fine < middle / 3


def test_more_views_leave_fewer_streaks() -> None:
    few, more, many = (error(views, 130, outside()) for views in (12, 24, 96))
    assert more < 0.6 * few
    assert many < 0.3 * more


def test_an_arc_that_was_not_scanned_stays_empty() -> None:
    angles = turn(60, pi / 3)
    share, _, arc = shares(angles, pi)
    assert_close(share, torch.full_like(share, pi / 180))
    assert arc == pytest.approx(pi / 3)


def test_shares_are_of_the_whole_period(generator: Generator) -> None:
    angles = 9 * torch.rand(50, generator=generator, dtype=float64)
    for period in (pi, 2 * pi):
        share, _, arc = shares(angles, period)
        if arc == period:
            assert float(share.sum()) == pytest.approx(period)
        turned, _, _ = shares(angles - 3 * period, period)
        assert_close(turned, share)
    assert float(shares(angles[:1], pi)[0]) == pytest.approx(pi)


def test_one_part_of_the_angles_has_its_share() -> None:
    share, _, arc = shares(torch.tensor([0.2, 0.0, 0.1, 0.5, 0.8], dtype=float64), 1.0)
    assert_close(share, torch.tensor([0.2, 0.15, 0.1, 0.3, 0.25], dtype=float64))
    assert arc == 1.0


# --- fans

FANS = {
    "full turn": turn(360),
    "two turns": turn(720, 4 * pi),
    "both ends": torch.linspace(0, 2 * pi, 361, dtype=float64),
    "short scan": turn(300, pi + 2 * HALF_FAN),
    "short scan backwards": -turn(300, pi + 2 * HALF_FAN),
    "longer short scan": turn(360, 1.6 * pi, start=4.0),
}


@pytest.mark.parametrize("curved", [False, True], ids=["flat", "curved"])
@pytest.mark.parametrize("angles", FANS.values(), ids=FANS.keys())
def test_a_fan_gives_the_disc_again(angles: Tensor, curved: bool) -> None:
    check_disc(from_fan(angles, curved))


@pytest.mark.parametrize("curved", [False, True], ids=["flat", "curved"])
def test_a_far_fan_is_a_parallel_beam(curved: bool, generator: Generator) -> None:
    """Though the fan's rays of a view are filtered as they are."""
    angles, far = turn(40), 1e6
    y = torch.randn(1, 1, 40, 50, generator=generator, dtype=float64)
    expected = fbp_parallel(y, angles, (24, 20), 1.0, 0.9, 0.2)
    got = fbp_fan(y, angles, (24, 20), far, 2 * far, 1.0, 1.8, curved, 0.4)
    assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_fan_of_too_few_views_is_refused() -> None:
    angles = turn(180, pi)
    with pytest.raises(ValueError, match=r"fan, 218°; these cover 180°: use cgls") as e:
        from_fan(angles, False)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("extra", [0.0, 0.1, 0.6])
def test_parker_weights_share_every_ray(extra: float, generator: Generator) -> None:
    half = 0.35
    arc = pi + 2 * (half + extra)
    beta = arc * torch.rand(4000, generator=generator, dtype=float64)
    gamma = half * (2 * torch.rand(4000, generator=generator, dtype=float64) - 1)
    weight = parker(beta, gamma, arc)
    assert float(weight.min()) >= 0 and float(weight.max()) <= 1
    others = []
    for other in (beta + pi - 2 * gamma, beta - pi - 2 * gamma):
        seen = (other >= 0) & (other <= arc)
        others.append(torch.where(seen, parker(other, -gamma, arc), 0))
    assert_close(weight + sum(others), torch.ones_like(weight))
    edges = torch.tensor([0.0, arc], dtype=float64)[:, None]
    assert_close(parker(edges, gamma * 0.99, arc), torch.zeros(2, 4000, dtype=float64))


def test_parker_weights_have_no_kinks() -> None:
    beta = torch.linspace(0, pi + 0.8, 100_001, dtype=float64)
    weight = parker(beta, torch.tensor(0.2, dtype=float64), pi + 0.8)
    slope = weight.diff() / beta.diff()
    assert float(slope.diff().abs().max()) < 3e-3 * float(slope.max())


# --- cones

BALL = 14.0


def cone(angles: Tensor, rows: Tensor, columns: Tensor, curved: bool) -> Tensor:
    """A ball's chords, by its centre's distance from each ray."""
    along = torch.stack([-angles.sin(), angles.cos(), 0 * angles], -1)[:, None, None]
    across = torch.stack([angles.cos(), angles.sin(), 0 * angles], -1)[:, None, None]
    up = torch.tensor([0.0, 0.0, 1.0], dtype=float64)
    u, v = columns[:, None], rows[:, None, None]
    depth, side = (D * (u / D).cos(), D * (u / D).sin()) if curved else (D, u)
    direction = depth * along + side * across + v * up
    direction = direction / direction.norm(dim=-1, keepdim=True)
    to_ball = torch.tensor([5.0, -4.0, 3.0], dtype=float64) + R * along
    far = to_ball.square().sum(-1) - (to_ball * direction).sum(-1) ** 2
    return 2 * MU * (BALL**2 - far).clamp_min(0).sqrt()[None, None]


@pytest.mark.parametrize("curved", [False, True], ids=["flat", "curved"])
@pytest.mark.parametrize("arc", [2 * pi, pi + 2 * HALF_FAN], ids=["full", "short"])
def test_a_cone_gives_the_ball_again(arc: float, curved: bool) -> None:
    angles, offset = turn(200, arc), (1.7, -0.9)
    rows, columns = elements(40, 2.0) + offset[0], elements(90, 1.9) + offset[1]
    y = cone(angles, rows, columns, curved)
    shape, voxel = (9, 44, 48), (2.5, 1.5, 1.3)
    x = fdk(y, angles, shape, R, D, voxel, (2.0, 1.9), offset, "ram-lak", curved)[0, 0]
    z, ys, xs = (elements(n, side) for n, side in zip(shape, voxel, strict=True))
    away = (xs - 5) ** 2 + (-ys - -4)[:, None] ** 2 + (z - 3)[:, None, None] ** 2
    near = away < (0.7 * BALL) ** 2
    plane = near & (z.abs() < 1)[:, None, None]
    assert float(x[plane].mean()) == pytest.approx(MU, rel=0.01)
    assert float((x[plane] - MU).abs().max()) < 0.04 * MU
    assert float(x[near].mean()) == pytest.approx(MU, rel=0.02)
    mass = x.where(away < (1.2 * BALL) ** 2, 0)
    assert float((mass * xs).sum() / mass.sum()) == pytest.approx(5, abs=0.1)
    assert float((mass * -ys[:, None]).sum() / mass.sum()) == pytest.approx(-4, abs=0.1)


@pytest.mark.parametrize("curved", [False, True], ids=["flat", "curved"])
def test_rays_count_by_the_cosine_of_their_angle(
    curved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def record(y: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(y)
        return y

    monkeypatch.setattr("invsolve.operators.ct.filtering.ramp_filter", record)
    y, near, wide = torch.ones(1, 1, 8, 5, 7, dtype=float64), 30.0, (20.0, 9.0)
    fdk(y, turn(8), (1, 4, 4), 20.0, near, (1.0, 1.0, 1.0), wide, curved=curved)
    v, u = elements(5, wide[0])[:, None], elements(7, wide[1])
    if curved:
        v, u = v / (u / near).cos(), near * (u / near).tan()
    cosine = near / (near**2 + u**2 + v**2).sqrt()
    expected = (pi / 8 * cosine).expand(1, 1, 8, 5, 7)
    assert_close(seen[0], expected)


def test_a_fan_is_the_middle_of_a_cone(generator: Generator) -> None:
    angles = turn(30)
    y = torch.randn(1, 1, 30, 5, 40, generator=generator, dtype=float64)
    whole = fdk(y, angles, (3, 16, 16), R, D, (1.0, 1.0, 1.0), (1.0, 1.1), (0.0, 0.4))
    middle = fbp_fan(y[..., 2, :], angles, (16, 16), R, D, 1.0, 1.1, False, 0.4)
    assert_close(whole[:, :, 1], middle)


def test_a_helix_is_refused() -> None:
    y = torch.zeros(1, 1, 8, 2, 9)
    with pytest.raises(ValueError, match="circular scan, and this one advances 12 mm"):
        fdk(
            y, turn(8), (2, 4, 4), R, D, (1.0, 1.0, 1.0), (1.0, 1.0), pitch_mm=12.0
        )  # fmt: skip


def test_the_volume_ends_where_the_detector_does() -> None:
    y = torch.ones(1, 1, 20, 3, 60, dtype=float64)
    x = fdk(y, turn(20), (31, 8, 8), R, D, (1.0, 1.0, 1.0), (1.0, 1.0))
    assert float(x[0, 0, 15].abs().min()) > 0
    assert float(x[0, 0, [0, -1]].abs().max()) == 0


# --- the filter


@pytest.mark.parametrize("window", WINDOWS)
def test_windows_are_what_they_are_called(window: Window) -> None:
    n, pitch = 256, 0.7
    point = torch.zeros(n, dtype=float64)
    point[n // 2] = 1
    f = torch.tensor([0.05, 0.2, 0.35, 0.45], dtype=float64)
    k = torch.arange(n, dtype=float64) - n // 2
    response = (
        ramp_filter(point, pitch, window) * (2 * pi * f[:, None] * k).cos()
    ).sum(1)
    shape = {
        "ram-lak": 1 + 0 * f,
        "shepp-logan": (pi * f).sin() / (pi * f),
        "cosine": (pi * f).cos(),
        "hann": (1 + (2 * pi * f).cos()) / 2,
    }[window]
    assert_close(response, f / pitch * shape, rtol=0.02, atol=0)


def test_the_kernel_is_the_ramp_sampled_in_space() -> None:
    point = torch.zeros(9, dtype=float64)
    point[4] = 1
    p = 0.5
    flat = [1 / 4, -1 / pi**2, 0, -1 / (3 * pi) ** 2, 0]
    expected = torch.tensor([*flat[:0:-1], *flat], dtype=float64) / p
    assert_close(ramp_filter(point, p), expected, rtol=0, atol=1e-12)
    curved = [1 / 4, -((p / (pi * sin(p))) ** 2), 0, -((p / (pi * sin(3 * p))) ** 2), 0]
    expected = torch.tensor([*curved[:0:-1], *curved], dtype=float64) / p
    assert_close(ramp_filter(point, p, curved=True), expected, rtol=0, atol=1e-12)


def test_windows_are_ever_smoother(generator: Generator) -> None:
    noise = torch.randn(4, 64, generator=generator, dtype=float64)
    norms = [float(ramp_filter(noise, 1.0, w).norm()) for w in WINDOWS]
    assert norms == sorted(norms, reverse=True)


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_narrow_detectors_are_filtered_too(columns: int) -> None:
    ones = torch.ones(2, columns, dtype=float64)
    outer = -1 / pi**2
    expected = {1: [1 / 4], 2: [1 / 4 + outer] * 2, 3: [1 / 4 + outer] * 3}[columns]
    if columns == 3:
        expected[1] += outer
    assert_close(ramp_filter(ones, 1.0), torch.tensor([expected] * 2, dtype=float64))


# --- laws


def reconstruct(y: Tensor) -> Tensor:
    return fdk(y, turn(12), (3, 6, 5), R, D, (1.0, 1.2, 1.1), (1.0, 1.0))


def test_it_is_linear_item_by_item_and_differentiable(generator: Generator) -> None:
    y = torch.randn(2, 3, 12, 4, 9, generator=generator, dtype=float64)
    x = reconstruct(y)
    assert x.shape == (2, 3, 3, 6, 5)
    assert_close(reconstruct(y[1:, 2:]), x[1:, 2:])
    assert_close(reconstruct(2 * y[:1] - y[1:]), 2 * x[:1] - x[1:])
    assert_close(reconstruct(y.float()), x.float(), rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(reconstruct, y[:1, :1].clone().requires_grad_())


def test_parts_of_the_views_add_up(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = torch.randn(1, 2, 12, 4, 9, generator=generator, dtype=float64)
    whole = reconstruct(y)
    monkeypatch.setattr("invsolve.operators.ct.filtering.SAMPLES", 1)
    assert_close(reconstruct(y), whole)


def test_a_fan_s_angle_is_what_the_module_says() -> None:
    """The ray of view θ at γ passes the axis at R sin γ on the side of (cos, sin)."""
    theta, u = 0.7, 20.0
    gamma = atan(u / D)
    foot = R * sin(gamma)
    lies = (foot * cos(theta - gamma), foot * sin(theta - gamma))
    source = (R * sin(theta), -R * cos(theta))
    element = (
        source[0] - D * sin(theta) + u * cos(theta),
        source[1] + D * cos(theta) + u * sin(theta),
    )
    cross = (element[0] - source[0]) * (lies[1] - source[1]) - (
        element[1] - source[1]
    ) * (lies[0] - source[0])
    assert cross == pytest.approx(0, abs=1e-9)
