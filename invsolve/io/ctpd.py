"""Projections of clinical scanners in DICOM-CT-PD, as the TCIA's low-dose CT library.

Chen, Yu, Leng et al., "Development and validation of an open data format for CT
projection data", Medical Physics 42, 2015; Moen et al., "Low-dose CT image and
projection dataset", Medical Physics 48, 2021 (table IV lists the tags).
"""

import struct
from math import atan, ceil, pi, sin
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..operators.ct import ConeBeam

ROWS, COLUMNS = (0x7029, 0x1010), (0x7029, 0x1011)
COLUMN_MM, ROW_MM = (0x7029, 0x1002), (0x7029, 0x1006)
DETECTOR_SHAPE = (0x7029, 0x100B)
ANGLE, AXIAL, RADIAL = (0x7031, 0x1001), (0x7031, 0x1002), (0x7031, 0x1003)
SOURCE_TO_DETECTOR, CENTRE = (0x7031, 0x1031), (0x7031, 0x1033)
SHIFTS = ((0x7033, 0x100B), (0x7033, 0x100C), (0x7033, 0x100D))
FOCAL_SPOT = (0x7033, 0x100E)
NAMES = {
    ROWS: "NumberofDetectorRows",
    COLUMNS: "NumberofDetectorColumns",
    COLUMN_MM: "DetectorElementTransverseSpacing",
    ROW_MM: "DetectorElementAxialSpacing",
    DETECTOR_SHAPE: "DetectorShape",
    ANGLE: "DetectorFocalCenterAngularPosition",
    AXIAL: "DetectorFocalCenterAxialPosition",
    RADIAL: "DetectorFocalCenterRadialDistance",
    SOURCE_TO_DETECTOR: "ConstantRadialDistance",
    CENTRE: "DetectorCentralElement",
}
SHARED = (ROWS, COLUMNS, COLUMN_MM, ROW_MM, RADIAL, SOURCE_TO_DETECTOR)
"""Numbers that are the same in every file of a scan."""

SHAPES = {"CYLINDRICAL": True, "FLAT": False}
"""Whether a detector of that shape is curved; a spherical one has no operator."""


def read_ctpd(
    folder: str | Path,
    *,
    shape: tuple[int, int, int] | None = None,
    voxel_mm: float | tuple[float, float, float] | None = None,
) -> tuple[Float[Tensor, "1 1 views rows columns"], ConeBeam]:
    """Line integrals y and the scan's geometry, from a folder of one file a view.

    Files are taken in the order of their InstanceNumber. The operator's x runs to the
    patient's left, its y to the front and its z to the head, for a patient on the back,
    so that a reconstruction is laid out as `Image` is. In the plane its centre is the
    axis of rotation; along z the volume's middle is the source at θ = 0, less than half
    a turn's travel from the middle of the scan.

    Args:
        folder: of the files, all of one scan; those not ending in .dcm or .IMA are left.
        shape: (d, h, w) of the volume, in voxels; what the detector covers unless given.
        voxel_mm: its voxels' sides; a detector element's, seen at the axis, unless given.

    Raises:
        ValueError: there are no such files, a tag is missing, the scans are mixed, the
            focal spot flies, or the table moves unevenly.
        ModuleNotFoundError: pydicom is not installed.
    """
    folder = Path(folder)
    views = _read(folder)
    try:
        return _scan(views, shape, voxel_mm)
    except ValueError as error:
        raise ValueError(f"cannot read {folder}: {error}") from error


def _read(folder: Path) -> list[Any]:
    try:
        from pydicom import dcmread
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading DICOM-CT-PD needs pydicom: pip install 'invsolve[io]'"
        ) from error
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: check the name")
    paths = [
        p for p in sorted(folder.iterdir()) if p.suffix.lower() in (".dcm", ".ima")
    ]
    if not paths:
        raise ValueError(f"{folder} holds no .dcm or .IMA files")
    views = []
    for path in paths:
        try:
            view = dcmread(path)
            view.InstanceNumber = int(view.InstanceNumber)
        except Exception as error:  # pydicom raises many kinds on damaged files
            first_line = str(error).strip().split("\n")[0]
            raise ValueError(f"cannot read {path}: {first_line}") from error
        views.append(view)
    return sorted(views, key=lambda view: view.InstanceNumber)


def _scan(
    views: list[Any],
    shape: tuple[int, int, int] | None,
    voxel_mm: float | tuple[float, float, float] | None,
) -> tuple[Tensor, ConeBeam]:
    first = views[0]
    numbers = [view.InstanceNumber for view in views]
    if len({str(view.get("SeriesInstanceUID", "")) for view in views}) > 1:
        raise ValueError(
            "it holds files of several scans: give each a folder of its own"
        )
    if len(set(numbers)) < len(numbers):
        raise ValueError("several files have the same InstanceNumber")
    for tag in SHARED:
        values = [_number(view, tag) for view in views]
        if max(values) - min(values) > 1e-3 * abs(values[0]):
            raise ValueError(
                f"{_name(tag)} differs from file to file: is it of several scans?"
            )
    for view in views:
        _check_focal_spot(view)

    rows, columns = int(_number(first, ROWS)), int(_number(first, COLUMNS))
    column_mm, row_mm = _number(first, COLUMN_MM), _number(first, ROW_MM)
    R, D = _number(first, RADIAL), _number(first, SOURCE_TO_DETECTOR)
    kind = _text(first, DETECTOR_SHAPE)
    if kind not in SHAPES:
        raise ValueError(
            f"its {_name(DETECTOR_SHAPE)} is {kind!r}, not CYLINDRICAL or FLAT"
        )
    centre_column, centre_row = _numbers(first, CENTRE, 2)

    # The source is at R (sin φ, cos φ) with y to the front, and here at R (sin θ, −cos θ).
    phi = np.unwrap([_number(view, ANGLE) for view in views])
    z = np.array([_number(view, AXIAL) for view in views])
    theta, pitch = _helix(pi - phi, z)
    # Elements count from 1. Columns run along (cos θ, sin θ), rows to the feet.
    y = torch.empty(1, 1, len(views), rows, columns)
    for i, view in enumerate(views):
        projection = _line_integrals(view, columns, rows)
        y[0, 0, i] = torch.from_numpy(projection[::-1].copy())

    curved = SHAPES[kind]
    if voxel_mm is None:
        voxel_mm = (row_mm * R / D, column_mm * R / D, column_mm * R / D)
    if shape is None:
        half = (columns / 2 - abs(centre_column - (columns + 1) / 2)) * column_mm
        radius = R * sin(half / D if curved else atan(half / D))
        middle = float(np.mean(z - theta * pitch / (2 * pi)))
        height = 2 * float(np.abs(z - middle).max()) + rows * row_mm * R / D
        shape = _covered(height, min(radius, 0.7 * R), voxel_mm)
    operator = ConeBeam(
        shape,
        torch.from_numpy(theta),
        R,
        D,
        voxel_mm=voxel_mm,
        detectors=(rows, columns),
        detector_mm=(row_mm, column_mm),
        curved=curved,
        offset_mm=(
            (centre_row - (rows + 1) / 2) * row_mm,
            ((columns + 1) / 2 - centre_column) * column_mm,
        ),
        pitch_mm=pitch,
        truncated=True,
    )
    return y, operator


def _helix(theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, float]:
    """θ less whole turns, so that it is 0 near the scan's middle; the travel in a turn."""
    if np.ptp(z) < 1e-3:
        return theta % (2 * pi), 0.0
    slope, at_zero = np.polyfit(theta, z, 1)
    if np.abs(slope * theta + at_zero - z).max() > max(0.1, 0.01 * np.ptp(z)):
        raise ValueError("the table moves unevenly, and only an even helix is known")
    turns = np.round((theta.max() + theta.min()) / (4 * pi))
    return theta - 2 * pi * turns, float(2 * pi * slope)


def _covered(
    height: float, radius: float, voxel_mm: float | tuple[float, float, float]
) -> tuple[int, int, int]:
    """The voxels of a box around a cylinder."""
    z, y, x = voxel_mm if isinstance(voxel_mm, tuple) else (voxel_mm,) * 3
    return ceil(height / z), int(2 * radius / y), int(2 * radius / x)


def _line_integrals(view: Any, columns: int, rows: int) -> np.ndarray:
    """(rows, columns): the files' pixel arrays are (columns, rows)."""
    slope, intercept = view.get("RescaleSlope"), view.get("RescaleIntercept")
    if slope is None or intercept is None:
        raise ValueError(
            f"view {view.InstanceNumber} lacks RescaleSlope or RescaleIntercept"
        )
    pixels = view.pixel_array
    if pixels.shape != (columns, rows):
        raise ValueError(
            f"view {view.InstanceNumber} is of {pixels.shape} pixels, not "
            f"{columns} columns × {rows} rows"
        )
    return (pixels.T * float(slope) + float(intercept)).astype(np.float32)


def _check_focal_spot(view: Any) -> None:
    mode = _text(view, FOCAL_SPOT) if FOCAL_SPOT in view else "FFSNONE"
    shifts = [_number(view, tag) for tag in SHIFTS if tag in view]
    if mode != "FFSNONE" or any(abs(shift) > 1e-6 for shift in shifts):
        raise ValueError(
            f"the focal spot flies ({mode}) or is shifted, and no operator knows of it: "
            "take a scan of FlyingFocalSpotMode FFSNONE"
        )


def _name(tag: tuple[int, int]) -> str:
    return f"{NAMES.get(tag, 'the tag')} ({tag[0]:04x},{tag[1]:04x})"


def _raw(view: Any, tag: tuple[int, int]) -> Any:
    if tag not in view or view[tag].value is None:
        raise ValueError(f"view {view.InstanceNumber} lacks {_name(tag)}")
    return view[tag].value


def _numbers(view: Any, tag: tuple[int, int], count: int) -> list[float]:
    """A private tag's numbers; of an unknown type, they come as bytes."""
    raw = _raw(view, tag)
    if isinstance(raw, bytes):
        kind = {4: "f", 2: "H"}.get(len(raw) // count)
        if kind is None or len(raw) % count:
            raise ValueError(f"{_name(tag)} is of {len(raw)} bytes")
        values = struct.unpack(f"<{count}{kind}", raw)
    elif isinstance(raw, str | int | float):
        values = (raw,)
    else:
        values = tuple(raw)
    if len(values) != count:
        raise ValueError(f"{_name(tag)} is {raw}, not {count} numbers")
    return [float(value) for value in values]


def _number(view: Any, tag: tuple[int, int]) -> float:
    return _numbers(view, tag, 1)[0]


def _text(view: Any, tag: tuple[int, int]) -> str:
    raw = _raw(view, tag)
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else str(raw)
    return text.strip("\x00 ").upper()
