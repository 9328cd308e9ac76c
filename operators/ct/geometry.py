"""The geometries of computed tomography, in mm and radians.

Coordinates: x runs along a row, y up the columns and z with the slices, from the
image's centre. In view θ the rays run along (−sin θ, cos θ), and the detector's
coordinate s grows along (cos θ, sin θ), as in ASTRA: a parallel ray has s = x cos θ +
y sin θ. The source of a fan or a cone lies at R (sin θ, −cos θ), R from the axis, so
that a fan whose R grows tends to the parallel beam of the same angles.
"""

from dataclasses import MISSING, dataclass, fields
from math import asin, ceil, hypot, isfinite, pi, tan
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from invsolve.shapes import X, Y

from .filtering import Window, fbp_fan, fbp_parallel, fdk
from .rays import Scan
from .transform import Backend, RayTransform


@final
@dataclass(frozen=True, eq=False, repr=False)
class ParallelBeam(RayTransform):
    """y(θ, s) = ∫ x dl along parallel rays: a 2D sinogram.

    x is attenuation in 1/mm on square pixels, y has no unit. Images are (batch,
    channels, h, w), sinograms (batch, channels, views, detectors). The rays follow
    Joseph's model (1982); `RayTransform` tells of the backends.

    Args:
        shape: (h, w) of the images, in pixels.
        angles: θ of each view, in radians.
        pixel_mm: a pixel's side.
        detectors: elements of the detector; enough for the diagonal unless given.
        detector_mm: their pitch; a pixel's side unless given.
        offset_mm: where the detector's centre lies on s.
        backend: auto, matrix, matrix-free or astra.
        truncated: whether the detector may be too narrow for the image's inscribed
            circle, as in region-of-interest tomography; else that is refused.
        oversample: take pixels for what they are, the means of something smooth: the rays
            go through pixels so many times finer, of the values that `finer_pixels` gives
            them. Where pixels are as wide as the details in them, Joseph's model of a ray,
            for which they are points, errs by as much as low-dose noise.
        rays: of an element, whose mean is measured, since elements are no points either.

    >>> A = ParallelBeam((2, 2), torch.tensor([0.0]), pixel_mm=2.0, detectors=2)
    >>> A
    ParallelBeam((2, 2), torch.tensor([0.0]), pixel_mm=2.0, detectors=2, detector_mm=2.0)
    >>> A(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    tensor([[[[ 8., 12.]]]])
    """

    shape: tuple[int, int]
    angles: Float[Tensor, " views"]
    pixel_mm: float = 1.0
    detectors: int = 0
    detector_mm: float = 0.0
    offset_mm: float = 0.0
    backend: Backend = "auto"
    truncated: bool = False
    oversample: int = 1
    rays: int = 1

    def __post_init__(self) -> None:
        _check_numbers(self, positive=("shape", "pixel_mm", "oversample", "rays"))
        _check_angles(self.angles)
        radius = hypot(*self.shape) / 2 * self.pixel_mm
        pitch = self.detector_mm or self.pixel_mm
        count = self.detectors or _enough(radius, pitch, self.offset_mm)
        _set(self, detectors=count, detector_mm=pitch)
        if not self.truncated:
            radius = min(self.shape) / 2 * self.pixel_mm
            _check_width(radius, count, pitch, self.offset_mm)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return (len(self.angles), self.detectors)

    def fbp(self, y: Y, *, window: Window = "ram-lak") -> X:
        """Filtered back-projection; see `fbp_parallel`."""
        return fbp_parallel(
            y,
            self.angles,
            self.shape,
            pixel_mm=self.pixel_mm,
            detector_mm=self.detector_mm,
            offset_mm=self.offset_mm,
            window=window,
        )

    def __repr__(self) -> str:
        return _code(self)

    def _scan(self) -> Scan:
        return Scan(
            shape=self.shape,
            spacing=_floats(self.pixel_mm, self.pixel_mm),
            angles=_floats(*self.angles.tolist()),
            detectors=(self.detectors,),
            pitch=_floats(self.detector_mm),
            offset=_floats(self.offset_mm),
            oversample=self.oversample,
            rays=self.rays,
        )


@final
@dataclass(frozen=True, eq=False, repr=False)
class FanBeam(RayTransform):
    """y(θ, s) = ∫ x dl along rays from one point: a 2D sinogram.

    x is attenuation in 1/mm on square pixels, y has no unit. Images are (batch,
    channels, h, w), sinograms (batch, channels, views, detectors). The rays follow
    Joseph's model (1982); `RayTransform` tells of the backends.

    The source lies at R (sin θ, −cos θ), and s is measured on the detector: the ray to s
    leaves the central one at the angle γ = atan(s/D), or γ = s/D if the detector is an
    arc around the source. It is the parallel ray of angle θ − γ at R sin γ. A short
    scan is one whose angles cover less than 2π.

    Args:
        shape: (h, w) of the images, in pixels.
        angles: θ of each view, in radians.
        source_to_axis_mm: R; the source lies outside the image.
        source_to_detector_mm: D > R.
        pixel_mm: a pixel's side.
        detectors: elements of the detector; enough for the diagonal unless given.
        detector_mm: their pitch on the detector; a pixel's side times D/R unless given.
        curved: whether the detector is an arc around the source (equiangular).
        offset_mm: where the detector's centre lies on s.
        backend: auto, matrix, matrix-free or astra (flat detectors only).
        truncated: whether the detector may be too narrow for the image's inscribed
            circle, as in region-of-interest tomography; else that is refused.
        oversample: take pixels for what they are, the means of something smooth: the rays
            go through pixels so many times finer, of the values that `finer_pixels` gives
            them. Where pixels are as wide as the details in them, Joseph's model of a ray,
            for which they are points, errs by as much as low-dose noise.
        rays: of an element, whose mean is measured, since elements are no points either.

    >>> FanBeam((2, 2), torch.tensor([0.0]), 10.0, 20.0, detectors=3)
    FanBeam((2, 2), torch.tensor([0.0]), 10.0, 20.0, detectors=3, detector_mm=2.0)
    """

    shape: tuple[int, int]
    angles: Float[Tensor, " views"]
    source_to_axis_mm: float
    source_to_detector_mm: float
    pixel_mm: float = 1.0
    detectors: int = 0
    detector_mm: float = 0.0
    curved: bool = False
    offset_mm: float = 0.0
    backend: Backend = "auto"
    truncated: bool = False
    oversample: int = 1
    rays: int = 1

    def __post_init__(self) -> None:
        _check_numbers(
            self,
            positive=(
                "shape",
                "pixel_mm",
                "source_to_axis_mm",
                "source_to_detector_mm",
                "oversample",
                "rays",
            ),
        )
        _check_angles(self.angles)
        radius = hypot(*self.shape) / 2 * self.pixel_mm
        _check_source(self, radius)
        pitch = self.detector_mm or self.pixel_mm * _magnification(self)
        half = _shadow(self, radius)
        count = self.detectors or _enough(half, pitch, self.offset_mm)
        _set(self, detectors=count, detector_mm=pitch)
        if not self.truncated:
            half = _shadow(self, min(self.shape) / 2 * self.pixel_mm)
            _check_width(half, count, pitch, self.offset_mm)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return (len(self.angles), self.detectors)

    def fbp(self, y: Y, *, window: Window = "ram-lak") -> X:
        """Filtered back-projection, of a full or a short scan; see `fbp_fan`."""
        return fbp_fan(
            y,
            self.angles,
            self.shape,
            source_to_axis_mm=self.source_to_axis_mm,
            source_to_detector_mm=self.source_to_detector_mm,
            pixel_mm=self.pixel_mm,
            detector_mm=self.detector_mm,
            curved=self.curved,
            offset_mm=self.offset_mm,
            window=window,
        )

    def __repr__(self) -> str:
        return _code(self)

    def _scan(self) -> Scan:
        return Scan(
            shape=self.shape,
            spacing=_floats(self.pixel_mm, self.pixel_mm),
            angles=_floats(*self.angles.tolist()),
            detectors=(self.detectors,),
            pitch=_floats(self.detector_mm),
            offset=_floats(self.offset_mm),
            source_to_axis=float(self.source_to_axis_mm),
            source_to_detector=float(self.source_to_detector_mm),
            curved=self.curved,
            oversample=self.oversample,
            rays=self.rays,
        )


@final
@dataclass(frozen=True, eq=False, repr=False)
class ConeBeam(RayTransform):
    """y(θ, v, s) = ∫ x dl along rays from one point, through a volume.

    x is attenuation in 1/mm, y has no unit. Volumes are (batch, channels, d, h, w),
    measurements (batch, channels, views, rows, columns). The rays follow Joseph's model
    (1982); `RayTransform` tells of the backends.

    In each slice the geometry is that of `FanBeam`. The detector's rows lie along v, which
    grows with z as the slices do; a curved detector is a cylinder around the source.
    On a helix source and detector lie at z = pitch_mm θ/2π, so that θ = 0 is the
    volume's middle, and angles go beyond 2π.

    Args:
        shape: (d, h, w) of the volumes, in voxels.
        angles: θ of each view, in radians.
        source_to_axis_mm: R; the source lies outside the volume.
        source_to_detector_mm: D > R.
        voxel_mm: a voxel's side, or its (z, y, x) sides.
        detectors: (rows, columns); enough for the volume unless given, on a helix enough
            rows for the Tam–Danielsson window (1995, 1997) if that is less.
        detector_mm: their pitches on the detector; a voxel's sides times D/R unless given.
        curved: whether the detector's rows are arcs around the source.
        offset_mm: where the detector's centre lies on (v, s).
        pitch_mm: the table's travel in a turn; 0 for a circle.
        backend: auto, matrix (for small volumes), matrix-free, or astra (with CUDA, flat
            detectors only).
        truncated: whether the detector may be too small for the volume's inscribed
            cylinder; else that is refused.

    >>> ConeBeam((2, 2, 2), torch.tensor([0.0]), 10.0, 20.0, detectors=(2, 3))
    ConeBeam((2, 2, 2), torch.tensor([0.0]), 10.0, 20.0, detectors=(2, 3), \
detector_mm=(2.0, 2.0))
    """

    shape: tuple[int, int, int]
    angles: Float[Tensor, " views"]
    source_to_axis_mm: float
    source_to_detector_mm: float
    voxel_mm: float | tuple[float, float, float] = 1.0
    detectors: tuple[int, int] = (0, 0)
    detector_mm: tuple[float, float] = (0.0, 0.0)
    curved: bool = False
    offset_mm: tuple[float, float] = (0.0, 0.0)
    pitch_mm: float = 0.0
    backend: Backend = "auto"
    truncated: bool = False

    def __post_init__(self) -> None:
        _check_numbers(
            self,
            positive=(
                "shape",
                "voxel_mm",
                "source_to_axis_mm",
                "source_to_detector_mm",
            ),
        )
        _check_angles(self.angles, helical=self.pitch_mm != 0)
        z, y, x = self.spacing
        d, h, w = self.shape
        radius = hypot(h * y, w * x) / 2
        _check_source(self, radius)
        magnification = _magnification(self)
        row_mm = self.detector_mm[0] or z * magnification
        column_mm = self.detector_mm[1] or x * magnification
        row_offset, column_offset = self.offset_mm
        half = _shadow(self, radius)
        columns = self.detectors[1] or _enough(half, column_mm, column_offset)
        # The near edge of the volume throws the highest shadow.
        D, R = self.source_to_detector_mm, self.source_to_axis_mm
        height = d * z / 2 * D / (R - radius)
        if self.pitch_mm:
            fan = asin(radius / R)
            turned = abs(self.pitch_mm) * (pi / 2 + fan) / (2 * pi)
            height = min(height, turned * D / R * (1 + tan(fan) ** 2))
        rows = self.detectors[0] or _enough(height, row_mm, row_offset)
        _set(self, detectors=(rows, columns), detector_mm=(row_mm, column_mm))
        if not self.truncated:
            half = _shadow(self, min(h * y, w * x) / 2)
            _check_width(half, columns, column_mm, column_offset)
            if not self.pitch_mm:
                height = d * z / 2 * magnification + abs(row_offset)
                _check_width(height, rows, row_mm, 0.0, "rows")

    @property
    def spacing(self) -> tuple[float, float, float]:
        """A voxel's (z, y, x) sides in mm."""
        if isinstance(self.voxel_mm, tuple):
            return self.voxel_mm
        return (self.voxel_mm, self.voxel_mm, self.voxel_mm)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return (len(self.angles), *self.detectors)

    def fbp(self, y: Y, *, window: Window = "ram-lak") -> X:
        """Feldkamp, Davis and Kress's reconstruction of a circular scan; see `fdk`."""
        return fdk(
            y,
            self.angles,
            self.shape,
            source_to_axis_mm=self.source_to_axis_mm,
            source_to_detector_mm=self.source_to_detector_mm,
            voxel_mm=self.spacing,
            detector_mm=self.detector_mm,
            offset_mm=self.offset_mm,
            window=window,
            curved=self.curved,
            pitch_mm=self.pitch_mm,
        )

    def __repr__(self) -> str:
        return _code(self)

    def _scan(self) -> Scan:
        return Scan(
            shape=self.shape,
            spacing=_floats(*self.spacing),
            angles=_floats(*self.angles.tolist()),
            detectors=self.detectors,
            pitch=_floats(*self.detector_mm),
            offset=_floats(*self.offset_mm),
            source_to_axis=float(self.source_to_axis_mm),
            source_to_detector=float(self.source_to_detector_mm),
            curved=self.curved,
            travel=float(self.pitch_mm),
        )


Diverging = FanBeam | ConeBeam


def _floats(*values: float) -> tuple[float, ...]:
    return tuple(map(float, values))


def _set(A: RayTransform, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(A, name, value)


def _check_numbers(A: ParallelBeam | Diverging, positive: tuple[str, ...]) -> None:
    """Refuse what is not a number, and sizes that are none."""
    for field in fields(A):
        value = getattr(A, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if isinstance(value, Tensor | str):
            continue
        if not all(map(isfinite, numbers)):
            raise ValueError(f"{field.name} must be finite, got {value}")
        if field.name in positive and min(numbers) <= 0:
            raise ValueError(f"{field.name} must be positive, got {value}")
        if field.name in ("detectors", "detector_mm") and min(numbers) < 0:
            raise ValueError(
                f"{field.name} must be positive, or 0 to be chosen, got {value}"
            )
    if A.backend not in ("auto", "matrix", "matrix-free", "astra"):
        raise ValueError(
            f"unknown backend {A.backend!r}: auto, matrix, matrix-free or astra"
        )


def _check_angles(angles: Tensor, *, helical: bool = False) -> None:
    if angles.ndim != 1 or len(angles) == 0:
        raise ValueError(
            f"angles must be a vector of at least one angle, got {tuple(angles.shape)}"
        )
    if not angles.isfinite().all():
        raise ValueError("angles must be finite, but some are NaN or infinite")
    steps = angles.diff(prepend=angles[:1])
    what, tested, most = ("step", steps, pi) if helical else ("one", angles, 2 * pi)
    largest = float(tested.abs().max())
    if largest > most + 1e-3:
        raise ValueError(
            f"angles are in radians, but the largest {what} is {largest:.4g}; if they "
            "are degrees, give torch.deg2rad(angles)"
        )


def _check_source(A: Diverging, radius: float) -> None:
    """Refuse a source within the image, a detector before the axis, an arc of ASTRA's."""
    if A.curved and A.backend == "astra":
        raise ValueError("ASTRA's detectors are flat here: give backend='auto'")
    if A.source_to_axis_mm <= radius:
        raise ValueError(
            f"the source, source_to_axis_mm = {A.source_to_axis_mm:g} from the axis, lies "
            f"in the image, whose corners are {radius:.4g} mm from it"
        )
    if A.source_to_detector_mm <= A.source_to_axis_mm:
        raise ValueError(
            f"source_to_detector_mm ({A.source_to_detector_mm:g}) must exceed "
            f"source_to_axis_mm ({A.source_to_axis_mm:g}): it is measured from the source"
        )


def _check_width(
    half: float, count: int, pitch: float, offset: float, what: str = "detectors"
) -> None:
    """Refuse a detector that sees less than from the axis to one edge of a circle.

    So much is enough with an offset detector, over a full turn.
    """
    if count * pitch / 2 + 1e-6 * half < max(half - abs(offset), abs(offset)):
        raise ValueError(
            f"{count} {what} of {pitch:.4g} mm are too narrow for the image's circle: "
            f"give {_enough(half, pitch, offset)}, or truncated=True if it is meant"
        )


def _magnification(A: Diverging) -> float:
    return A.source_to_detector_mm / A.source_to_axis_mm


def _shadow(A: Diverging, radius: float) -> float:
    """Half the width on the detector of a disc around the axis."""
    fan = asin(radius / A.source_to_axis_mm)
    return A.source_to_detector_mm * (fan if A.curved else tan(fan))


def _enough(half: float, pitch: float, offset: float) -> int:
    return ceil(2 * (half + abs(offset)) / pitch)


def _code(A: ParallelBeam | Diverging) -> str:
    """Code that makes the operator again."""
    arguments = []
    for field in fields(A):
        value = getattr(A, field.name)
        text = _angles_code(value) if isinstance(value, Tensor) else repr(value)
        if field.default is MISSING:
            arguments.append(text)
        elif value != field.default:
            arguments.append(f"{field.name}={text}")
    return f"{type(A).__name__}({', '.join(arguments)})"


def _angles_code(angles: Tensor) -> str:
    """As a linspace if that is exactly what they are, else one by one."""
    angles = angles.detach().cpu()
    n, dtype = len(angles), angles.dtype
    last = f", dtype={dtype}" if dtype != torch.get_default_dtype() else ""
    values = angles.numpy()
    first = float(str(values[0]))
    whole = [("", float(str(values[-1])), n)]
    open_ended = [("[:-1]", first + turn * pi, n + 1) for turn in (1, 2, -1, -2)]
    for cut, end, count in whole + open_ended:
        made = torch.linspace(first, end, count, dtype=dtype)
        if n > 2 and torch.equal(made[:n], angles):
            return f"torch.linspace({first}, {end}, {count}{last}){cut}"
    return f"torch.tensor([{', '.join(map(str, values))}]{last})"
