"""Filtered back-projection of parallel, fan and cone beams, as functions of plain numbers.

Coordinates: x runs along a row and y up the columns, from the image's centre, in mm.
View θ looks along (−sin θ, cos θ), and its detector's coordinate u grows along
(cos θ, sin θ). A source lies at −R (−sin θ, cos θ), its detector at the distance D from
it, and slices and detector rows grow along the same axis. So the ray of a fan at the
angle γ from its centre is the parallel ray of angle θ − γ at s = R sin γ, and it is
measured again at (θ + π − 2γ, −γ).
"""

from math import asin, ceil, degrees, hypot, log2, pi, prod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

Window = Literal["ram-lak", "shepp-logan", "cosine", "hann"]
Angles = Float[Tensor, " views"]
Sinogram = Float[Tensor, "*batch views columns"]
Projections = Float[Tensor, "*batch views rows columns"]

SAMPLES = 2**20
"""Values interpolated at once, which bounds the memory of a back-projection."""

MISSING = 3
"""A gap between views so many times the usual one is an arc that was not scanned."""


def fbp_parallel(
    y: Sinogram,
    angles: Angles,
    shape: tuple[int, int],
    pixel_mm: float,
    detector_mm: float,
    offset_mm: float = 0.0,
    window: Window = "ram-lak",
) -> Float[Tensor, "*batch h w"]:
    """x = Σ_θ Δθ (h ∗ y_θ)(x cos θ + y sin θ), from Kak & Slaney 1988, §3.3.

    h is the band-limited ramp with a window on it, Δθ each view's share of 180°: angles
    may be uneven, come in any order and repeat, and 360° count every ray twice. An arc
    that was not scanned stays empty.

    Args:
        y: line integrals, (…, views, columns).
        angles: θ, in radians.
        shape: (h, w) of the image, in pixels.
        pixel_mm: a pixel's side.
        detector_mm: the detector's pitch.
        offset_mm: of the detector's centre.
        window: on the ramp.
    """
    share, _, _ = shares(angles, pi)
    filtered = ramp_filter(y, detector_mm, window) * share.to(y)[:, None]
    ys, xs = -_elements(shape[0], pixel_mm, y), _elements(shape[1], pixel_mm, y)
    theta = angles.to(y)[:, None, None]
    u = xs * theta.cos() + ys[:, None] * theta.sin()
    index = (u - offset_mm) / detector_mm + (y.shape[-1] - 1) / 2
    one = torch.ones_like(theta)[:, None]
    return _sum_views(filtered[..., None, :], None, index[:, None], one)[..., 0, :, :]


def fbp_fan(
    y: Sinogram,
    angles: Angles,
    shape: tuple[int, int],
    source_to_axis_mm: float,
    source_to_detector_mm: float,
    pixel_mm: float,
    detector_mm: float,
    curved: bool = False,
    offset_mm: float = 0.0,
    window: Window = "ram-lak",
) -> Float[Tensor, "*batch h w"]:
    """The reconstruction of a fan beam, from Kak & Slaney 1988, §3.4: `fdk` of one row.

    Args:
        y: line integrals, (…, views, columns).
        angles: θ of each view, in radians: a full turn, or at least 180° and the fan.
        shape: (h, w) of the image, in pixels.
        source_to_axis_mm: R.
        source_to_detector_mm: D.
        pixel_mm: a pixel's side.
        detector_mm: the detector's pitch; along the arc if it is curved.
        curved: whether the detector is an arc around the source.
        offset_mm: of the detector's centre.
        window: on the ramp.

    Raises:
        ValueError: the views cover too little.
    """
    volume = fdk(
        y[..., None, :],
        angles,
        (1, *shape),
        source_to_axis_mm=source_to_axis_mm,
        source_to_detector_mm=source_to_detector_mm,
        voxel_mm=(pixel_mm, pixel_mm, pixel_mm),
        detector_mm=(detector_mm, detector_mm),
        curved=curved,
        offset_mm=(0.0, offset_mm),
        window=window,
    )
    return volume[..., 0, :, :]


def fdk(
    y: Projections,
    angles: Angles,
    shape: tuple[int, int, int],
    source_to_axis_mm: float,
    source_to_detector_mm: float,
    voxel_mm: tuple[float, float, float],
    detector_mm: tuple[float, float],
    offset_mm: tuple[float, float] = (0.0, 0.0),
    window: Window = "ram-lak",
    curved: bool = False,
    pitch_mm: float = 0.0,
) -> Float[Tensor, "*batch d h w"]:
    """x = Σ_θ Δθ (R/U)² (h ∗ w cos ∠ y_θ)(u, v) of a circular cone beam.

    Feldkamp, Davis & Kress 1984. ∠ is a ray's angle with the central one, w what Parker
    gives it, U the distance from the source, along the central ray, to the plane of the
    voxel that is seen at (u, v). On a curved detector U is the distance to the voxel,
    ∠ is as before and h is (γ/sin γ)² times as large at γ. It is exact in the plane of
    the source for infinitely many views, and approximate away from it.

    Args:
        y: line integrals, (…, views, rows, columns).
        angles: θ of each view, in radians: a full turn, or at least 180° and the fan.
        shape: (d, h, w) of the volume, in voxels.
        source_to_axis_mm: R.
        source_to_detector_mm: D.
        voxel_mm: a voxel's sides along (z, y, x).
        detector_mm: the detector's pitches along (rows' axis v, columns' axis u).
        offset_mm: of its centre, along (v, u).
        window: on the ramp.
        curved: whether its rows are arcs around the source.
        pitch_mm: how far the source advances in a turn, which must be 0.

    Raises:
        ValueError: the scan is helical, or its views cover too little.
    """
    if pitch_mm != 0:
        raise ValueError(
            f"filtered back-projection is for a circular scan, and this one advances "
            f"{pitch_mm:g} mm a turn: use cgls, sirt, tv or a prior"
        )
    R, D = source_to_axis_mm, source_to_detector_mm
    (rows, columns), (dv, du) = y.shape[-2:], detector_mm
    v = _elements(rows, dv, y)[:, None] + offset_mm[0]
    u = _elements(columns, du, y) + offset_mm[1]
    gamma = u / D if curved else (u / D).atan()

    share, beta, arc = shares(angles, 2 * pi)
    weight = share[:, None] / 2
    if arc < 2 * pi:
        corner = hypot(shape[1] * voxel_mm[1], shape[2] * voxel_mm[2]) / 2
        widest = min(float(gamma.abs().max()), asin(min(corner / R, 1.0)))
        if arc < pi + 2 * widest - 1e-3:
            raise ValueError(
                f"filtered back-projection needs views over a full turn, or over 180° "
                f"and the fan, {degrees(pi + 2 * widest):.0f}°; these cover "
                f"{degrees(arc):.0f}°: use cgls, sirt, tv or a prior"
            )
        weight = share[:, None] * parker(beta[:, None], gamma.to(share), arc)
    side = v * gamma.cos() if not curved else v
    cosine = gamma.cos() / (1 + (side / D) ** 2).sqrt()
    weighted = y * cosine * weight.to(y)[:, None, :]
    # The flat detector is filtered as if it stood at the axis, the curved one in angle.
    pitch = du / D if curved else du * R / D
    filtered = ramp_filter(weighted, pitch, window, curved=curved)

    zs, xs = (_elements(shape[i], voxel_mm[i], y) for i in (0, 2))
    ys = -_elements(shape[1], voxel_mm[1], y)[:, None]
    theta = angles.to(y)[:, None, None]
    across = xs * theta.cos() + ys * theta.sin()
    depth = R + ys * theta.cos() - xs * theta.sin()
    distance = (across**2 + depth**2).sqrt() if curved else depth
    seen_u = torch.atan2(across, depth) * D if curved else D * across / depth
    seen_v = D * zs[:, None, None] / distance[:, None]
    index_u = (seen_u - offset_mm[1]) / du + (columns - 1) / 2
    index_v = (seen_v - offset_mm[0]) / dv + (rows - 1) / 2
    factor = R * distance**-2 if curved else (R / depth) ** 2
    flat = rows == shape[0] == 1 and offset_mm[0] == 0
    return _sum_views(
        filtered, None if flat else index_v, index_u[:, None], factor[:, None]
    )


def shares(angles: Angles, period: float) -> tuple[Angles, Angles, float]:
    """Each view's share Δθ of the period, its angle from the arc's start, the arc.

    A view stands for half of the gap to either neighbour. One gap that is far larger
    than the others is an arc that was not scanned: what is left is the arc, and its
    outer views stand for as much as those within. Else the arc is the period.
    """
    sorted_, order = (angles.double() % period).sort()
    gaps = torch.diff(sorted_, append=sorted_[:1] + period)
    typical = float(gaps[gaps > 1e-6 * period].median())
    largest, last = gaps.max(0)
    arc, start = period, 0.0
    if largest > MISSING * typical:
        arc = period - float(largest) + typical
        start = float(sorted_[(last + 1) % len(sorted_)]) - typical / 2
        gaps[last] = typical
    share = torch.empty_like(gaps)
    share[order] = (gaps + gaps.roll(1)) / 2
    return share, (angles.double() - start) % period, arc


def parker(
    beta: Float[Tensor, "*#shape"], gamma: Float[Tensor, "*#shape"], arc: float
) -> Float[Tensor, "*shape"]:
    """How much of a ray's two measurements the one at (β, γ) counts; Parker 1982.

    The ray of view β at γ is measured again at (β + π − 2γ, −γ). The two weights sum to
    1; a ray measured once has weight 1; and the weight is smooth in β, with a fan of
    half-angle (arc − π)/2, which must not be less than |γ|.

    Args:
        beta: from the start of the arc, in radians.
        gamma: from the central ray, in radians.
        arc: that was scanned, at least π and less than 2π.
    """
    half = (arc - pi) / 2
    tiny = 1e-9
    rising = beta / (2 * (half + gamma)).clamp_min(tiny)
    falling = (arc - beta) / (2 * (half - gamma)).clamp_min(tiny)
    return (pi / 2 * torch.minimum(rising, falling).clamp(0, 1)).sin().square()


def ramp_filter(
    y: Float[Tensor, "*batch columns"],
    pitch: float,
    window: Window = "ram-lak",
    *,
    curved: bool = False,
) -> Float[Tensor, "*batch columns"]:
    """y ∗ h along the last axis; h is the ramp sampled in space (Kak & Slaney, eq. 61).

    h(0) = 1/4p², h(kp) = −1/(πkp)² for odd k and 0 for even, at the pitch p; if curved,
    (γ/sin γ)² times that at γ = kp. With f in cycles per element, the windows are
    1, sinc f (Shepp–Logan), cos πf and cos² πf (Hann).
    """
    n = y.shape[-1]
    size = 2 ** ceil(log2(max(2 * n, 2)))
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    odd = k.remainder(2) == 1
    root = pi * k.where(odd, torch.ones_like(k))
    if curved:
        odd = odd & (k.abs() < n)  # γ/sin γ has poles beyond the detector
        root = pi * torch.where(odd, (pitch * k).sin() / pitch, 1)
    h = torch.where(odd, -1 / root**2, 0)
    h[0] = 1 / 4
    ramp = torch.fft.fft(h).real / pitch
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    match window:
        case "ram-lak":
            apodise = torch.ones_like(f)
        case "shepp-logan":
            apodise = torch.sinc(f)
        case "cosine":
            apodise = torch.cos(pi * f)
        case "hann":
            apodise = torch.cos(pi * f).square()
        case _:
            raise ValueError(
                f"unknown window {window!r}: ram-lak, shepp-logan, cosine or hann"
            )
    response = (ramp * apodise).to(y)[: size // 2 + 1]
    return torch.fft.irfft(torch.fft.rfft(y, size) * response, size)[..., :n]


def _elements(count: int, pitch: float, like: Tensor) -> Tensor:
    return (torch.arange(count).to(like) - (count - 1) / 2) * pitch


def _sum_views(
    filtered: Projections, index_v: Tensor | None, index_u: Tensor, factor: Tensor
) -> Float[Tensor, "*batch d h w"]:
    """Σ over views of factor × the projection, interpolated linearly at the indices.

    Indices and factor are (views, d or 1, h or 1, w or 1). Beyond its border a
    projection falls to 0 within one element. A single row needs no index v.
    """
    *batch, views, rows, columns = filtered.shape
    border = (1, 1) if index_v is None else (1, 1, 1, 1)
    images = pad(filtered, border)
    stride = columns + 2
    size = images.shape[-2] * stride
    images = images.reshape(-1, views, size)
    shape = torch.broadcast_shapes(index_u.shape, factor.shape)
    if index_v is not None:
        shape = torch.broadcast_shapes(shape, index_v.shape)
    voxels = prod(shape[1:])
    total = images.new_zeros(voxels, len(images))
    step = max(1, SAMPLES // (4 * voxels))
    for start in range(0, views, step):
        some = slice(start, start + step)
        # A copy even of a single column: embedding_bag is slow unless its stride is 1.
        table = (
            images[:, some].flatten(1).T.clone(memory_format=torch.contiguous_format)
        )
        # A voxel is a bag of two or four elements in each view; all images share it.
        low, part = _between(index_u[some], columns)
        first = torch.arange(len(low), dtype=torch.int32, device=low.device) * size
        low = low + first.reshape(-1, 1, 1, 1)
        bag = [(low, factor[some] * (1 - part)), (low + 1, factor[some] * part)]
        if index_v is not None:
            low, part = _between(index_v[some], rows)
            bag = [(i + low * stride, w * (1 - part)) for i, w in bag] + [
                (i + (low + 1) * stride, w * part) for i, w in bag
            ]
        full = (len(bag), len(first), *shape[1:])
        index, weight = (
            torch.stack(torch.broadcast_tensors(*parts)).expand(full)
            for parts in zip(*bag, strict=True)
        )
        total = total + embedding_bag(
            index.reshape(-1, voxels).T.contiguous(),
            table,
            per_sample_weights=weight.reshape(-1, voxels).T.contiguous(),
            mode="sum",
        )
    return total.T.reshape(*batch, *shape[1:])


def _between(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The element below, of a row with a 0 at either end, and how far above it is."""
    place = (index + 1).clamp(0, count + 1)
    low = place.floor().clamp_max(count)
    return low.int(), place - low
