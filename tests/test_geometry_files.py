"""Geometries from JSON files and from the projections of clinical scanners."""

import json
import struct
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from invsolve.io.ctpd import read_ctpd
from invsolve.io.geometry import Geometry, read_geometry, write_geometry
from invsolve.operators.ct import ConeBeam, FanBeam, ParallelBeam

float64 = torch.float64

# --- JSON

ANGLES = torch.tensor([0.1, 1 / 3, 2.0], dtype=float64)
GEOMETRIES: dict[str, Geometry] = {
    "parallel": ParallelBeam((6, 8), ANGLES, 0.7, 13, 0.6, offset_mm=-0.25),
    "parallel by default": ParallelBeam((6, 8), ANGLES),
    "parallel through finer pixels": ParallelBeam((6, 8), ANGLES, oversample=2, rays=3),
    "single precision": ParallelBeam((6, 8), ANGLES.float(), backend="matrix"),
    "fan": FanBeam((6, 8), ANGLES, 40.0, 70.0, 0.7, 20, 1.1, True, 0.1),
    "cone": ConeBeam((3, 4, 5), ANGLES, 40.0, 70.0, offset_mm=(0.5, 0.25)),
    "helix": ConeBeam(
        (3, 4, 5), ANGLES, 40.0, 70.0, (1.5, 0.9, 0.8), (4, 13), (2.0, 1.1), True,
        pitch_mm=-3.5, truncated=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("A", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_a_geometry_is_read_as_it_was_written(A: Geometry, tmp_path: Path) -> None:
    path = tmp_path / "scan.json"
    write_geometry(path, A)
    B = read_geometry(path)
    assert type(B) is type(A)
    assert B.scan == A.scan
    assert B.backend == A.backend
    assert B.truncated == A.truncated
    assert torch.equal(B.angles, A.angles.double())
    write_geometry(path, B)
    assert read_geometry(path).scan == A.scan


FAN: dict[str, Any] = {
    "geometry": "FanBeam",
    "shape": [6, 8],
    "angles": [0.0, 0.5],
    "source_to_axis_mm": 40,
    "source_to_detector_mm": 70.5,
}
CONE = FAN | {"geometry": "ConeBeam", "shape": [3, 4, 5]}


def read(given: Any, folder: Path) -> Geometry:
    path = folder / "scan.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return read_geometry(path)


def test_a_file_by_hand_is_short(tmp_path: Path) -> None:
    A = read(FAN, tmp_path)
    expected = FanBeam((6, 8), torch.tensor([0.0, 0.5]), 40.0, 70.5)
    assert isinstance(A, FanBeam)
    assert A.scan == expected.scan


def test_angles_may_be_evenly_spaced(tmp_path: Path) -> None:
    even = {"start": 0.0, "stop": 2, "count": 4}
    A = read(FAN | {"angles": even}, tmp_path)
    assert_close(A.angles, torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=float64))
    A = read(FAN | {"angles": even | {"endpoint": True}}, tmp_path)
    assert_close(A.angles, torch.linspace(0, 2, 4, dtype=float64))


WRONG = {
    "not JSON": ("{", "it is not JSON"),
    "a list": ([1, 2], "not one JSON object"),
    "no geometry": (
        {"shape": [2, 2]},
        "geometry is None, not one of ParallelBeam, Fan",
    ),
    "unknown geometry": (FAN | {"geometry": "Helix"}, "geometry is 'Helix'"),
    "odd geometry": (FAN | {"geometry": []}, r"geometry is \[\]"),
    "unknown key": (FAN | {"sod": 1}, "unknown key 'sod': FanBeam knows shape, angles"),
    "cone's key": (FAN | {"pitch_mm": 1.0}, "unknown key 'pitch_mm'"),
    "missing": (
        {k: FAN[k] for k in list(FAN)[:4]},
        "key 'source_to_detector_mm' is mis",
    ),
    "text": (FAN | {"pixel_mm": "1"}, "'pixel_mm' must be a number, not '1'"),
    "bool": (FAN | {"pixel_mm": True}, "'pixel_mm' must be a number, not True"),
    "null": (FAN | {"offset_mm": None}, "'offset_mm' must be a number, not None"),
    "fraction": (FAN | {"detectors": 3.5}, "'detectors' must be a whole number"),
    "not bool": (FAN | {"curved": 1}, "'curved' must be true or false, not 1"),
    "not text": (FAN | {"backend": 1}, "'backend' must be one of auto, .*, not 1"),
    "shape": (FAN | {"shape": [6, 8, 2]}, "'shape' must be a list of 2 numbers"),
    "half a pixel": (FAN | {"shape": [6, 8.5]}, "'shape' must be a whole number"),
    "cone": (CONE | {"detectors": 3}, "'detectors' must be a list of 2 numbers"),
    "pitches": (CONE | {"detector_mm": [1.0]}, "'detector_mm' must be a list of 2"),
    "voxels": (CONE | {"voxel_mm": [1, 1]}, "'voxel_mm' must be a list of 3 numbers"),
    "angles": (FAN | {"angles": 3}, "'angles' must be a list of numbers, or an object"),
    "an angle": (FAN | {"angles": [0, "1"]}, "'angles' must be a number, not '1'"),
    "step": (
        FAN | {"angles": {"start": 0, "step": 1}},
        "unknown key 'step' in 'angles'",
    ),
    "count": (
        FAN | {"angles": {"start": 0, "stop": 1}},
        "'count' is missing in 'angles'",
    ),
    "no angle": (
        FAN | {"angles": {"start": 0, "stop": 1, "count": 0}},
        "'angles.count' must be at least 1",
    ),
    "endpoint": (
        FAN | {"angles": {"start": 0, "stop": 1, "count": 2, "endpoint": 0}},
        "'angles.endpoint' must be true or false",
    ),
    "degrees": (FAN | {"angles": [0, 90]}, "in radians"),
    "not finite": (FAN | {"pixel_mm": float("nan")}, "pixel_mm"),
    "negative": (FAN | {"source_to_axis_mm": -40}, "source_to_axis_mm"),
    "backend": (
        FAN | {"backend": "gpu"},
        "'backend' must be one of auto, .*, not 'gpu'",
    ),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_refused_in_a_line(
    given: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(given, tmp_path)
    text = str(caught.value)
    assert text.startswith(f"cannot read {tmp_path / 'scan.json'}: ")
    assert "\n" not in text


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_geometry(tmp_path / "none.json")
    (tmp_path / "scan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not JSON"):
        read_geometry(tmp_path / "scan.json")


# --- DICOM-CT-PD

COLUMNS, ROWS, VIEWS, R, D = 10, 4, 24, 60.0, 110.0
COLUMN_MM, ROW_MM, FEED = 9.0, 3.0, 8.0
CENTRE = (5.75, 2.0)
SLOPE, INTERCEPT = 0.5**10, -0.25


def angle(view: int) -> float:
    """φ of a view, of 12 in a turn; the tag holds it between 0 and 2π."""
    return 0.7 + view * pi / 6


def height(view: int) -> float:
    return -150.0 + FEED * view / 12


def pixels(view: int) -> np.ndarray:
    return np.random.default_rng(view).integers(0, 60_000, (COLUMNS, ROWS), np.uint16)


def values(view: int) -> dict[tuple[int, int], Any]:
    return {
        (0x7029, 0x1002): COLUMN_MM,
        (0x7029, 0x1006): ROW_MM,
        (0x7029, 0x100B): "CYLINDRICAL",
        (0x7029, 0x1010): ROWS,
        (0x7029, 0x1011): COLUMNS,
        (0x7031, 0x1001): angle(view) % (2 * pi),
        (0x7031, 0x1002): height(view),
        (0x7031, 0x1003): R,
        (0x7031, 0x1031): D,
        (0x7031, 0x1033): list(CENTRE),
        (0x7033, 0x100B): 0.0,
        (0x7033, 0x100C): 0.0,
        (0x7033, 0x100D): 0.0,
        (0x7033, 0x100E): "FFSNONE",
    }


def write_view(
    folder: Path,
    view: int,
    *,
    as_bytes: bool = False,
    without: tuple[int, int] | None = None,
    change: dict[tuple[int, int], Any] | None = None,
    series: str = "1.2.3",
    number: int | None = None,
) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"{series}.{view + 1}")
    # Names run against the order of the views.
    path = folder / f"{VIEWS - view:03d}.dcm"
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID = meta.MediaStorageSOPClassUID
    file.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    file.SeriesInstanceUID = series
    file.InstanceNumber = view + 1 if number is None else number
    file.Rows, file.Columns = COLUMNS, ROWS
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    file.PixelRepresentation = 0
    file.RescaleSlope, file.RescaleIntercept = SLOPE, INTERCEPT
    file.PixelData = pixels(view).tobytes()
    for tag, value in (values(view) | (change or {})).items():
        if tag == without:
            continue
        if isinstance(value, str):
            kind, raw = "CS", (value + " " * (len(value) % 2)).encode()
        elif isinstance(value, int):
            kind, raw = "US", struct.pack("<H", value)
        else:
            numbers = value if isinstance(value, list) else [value]
            kind, raw = "FL", struct.pack(f"<{len(numbers)}f", *numbers)
        file.add_new(tag, "UN" if as_bytes else kind, raw if as_bytes else value)
    file.save_as(path, enforce_file_format=True)


def scan(folder: Path, **options: Any) -> Path:
    for view in range(VIEWS):
        write_view(folder, view, **options)
    return folder


@pytest.mark.parametrize("as_bytes", [False, True], ids=["typed", "unknown type"])
def test_a_helix_is_read_in_order(as_bytes: bool, tmp_path: Path) -> None:
    y, A = read_ctpd(scan(tmp_path, as_bytes=as_bytes), shape=(5, 8, 8), voxel_mm=2.0)
    assert y.shape == (1, 1, *A.measurement_shape) == (1, 1, VIEWS, ROWS, COLUMNS)
    assert y.dtype == torch.float32
    for view in range(VIEWS):
        expected = torch.from_numpy(pixels(view).T[::-1] * SLOPE + INTERCEPT)
        assert_close(y[0, 0, view].double(), expected.double(), rtol=1e-6, atol=1e-6)
    assert (A.shape, A.voxel_mm, A.curved) == ((5, 8, 8), 2.0, True)
    assert (A.source_to_axis_mm, A.source_to_detector_mm) == (R, D)
    assert A.detector_mm == (ROW_MM, COLUMN_MM)
    assert A.pitch_mm == pytest.approx(-FEED, rel=1e-4)


def test_sources_and_elements_are_where_the_tags_say(tmp_path: Path) -> None:
    """In the format's own coordinates: x to the left, y to the back, z to the head."""
    _, A = read_ctpd(scan(tmp_path), shape=(5, 8, 8), voxel_mm=2.0)
    rays = [part for part in A.scan.lines(10**9)]
    point, direction = (
        torch.from_numpy(np.concatenate([ray[i] for ray in rays])).reshape(
            VIEWS, ROWS, COLUMNS, 3
        )
        for i in (0, 1)
    )
    middle = None
    for view in range(VIEWS):
        phi = angle(view) - pi / 2
        z, y, x = point[view, 0, 0].tolist()  # y counts rows: to the back
        assert x == pytest.approx(R * np.cos(phi), abs=1e-3)
        assert y == pytest.approx(R * np.sin(phi), abs=1e-3)
        offset = height(view) - z
        middle = offset if middle is None else middle
        assert offset == pytest.approx(middle, abs=1e-3)
        for row, column in ((0, 0), (3, 9), (1, 4)):
            turned = phi + (column + 1 - CENTRE[0]) * COLUMN_MM / D
            # Rows are to the feet in the files, to the head here.
            dz = -((ROWS - row) - CENTRE[1]) * ROW_MM
            expected = torch.tensor(
                [dz, -D * np.sin(turned), -D * np.cos(turned)], dtype=float64
            )
            got = direction[view, row, column]
            assert_close(got, expected, rtol=0, atol=1e-3)
    assert middle is not None
    assert abs(middle - (height(0) + height(VIEWS - 1)) / 2) <= FEED / 2 + 1e-6


def test_the_volume_is_what_the_detector_covers(tmp_path: Path) -> None:
    _, A = read_ctpd(scan(tmp_path))
    z, y, x = A.spacing
    assert (z, y, x) == pytest.approx((ROW_MM * R / D, *(COLUMN_MM * R / D,) * 2))
    travel = height(VIEWS - 1) - height(0)
    assert travel <= A.shape[0] * z <= travel + FEED + ROWS * ROW_MM + z
    half = (min(CENTRE[0], COLUMNS + 1 - CENTRE[0]) - 0.5) * COLUMN_MM / D
    assert A.shape[2] * x / 2 == pytest.approx(R * np.sin(half), abs=x)


def test_a_flat_detector_and_a_circle(tmp_path: Path) -> None:
    circle = {(0x7029, 0x100B): "FLAT", (0x7031, 0x1002): 12.5}
    _, A = read_ctpd(scan(tmp_path, change=circle))
    assert not A.curved
    assert A.pitch_mm == 0
    expected = (pi - angle(0)) % (2 * pi)
    assert float(A.angles[0]) == pytest.approx(expected, abs=1e-6)


REFUSED = {
    "a missing tag": (
        {"without": (0x7031, 0x1003)},
        r"view 1 lacks DetectorFocalCenterRadialDistance \(7031,1003\)",
    ),
    "no angle": ({"without": (0x7031, 0x1001)}, "lacks DetectorFocalCenterAngularPosi"),
    "a shifted spot": ({"change": {(0x7033, 0x100C): 0.6}}, "flies .* FFSNONE"),
    "a flying spot": ({"change": {(0x7033, 0x100E): "FFSZ"}}, r"flies \(FFSZ\)"),
    "a sphere": ({"change": {(0x7029, 0x100B): "SPHERICAL"}}, "'SPHERICAL', not CYLIN"),
    "other pixels": ({"change": {(0x7029, 0x1011): 9}}, r"of \(10, 4\) pixels, not 9"),
    "one instance": ({"number": 7}, "same InstanceNumber"),
    "two numbers": ({"change": {(0x7031, 0x1003): [1.0, 2.0]}}, "not 1 numbers"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_refused_in_a_line(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_ctpd(scan(tmp_path, **options))
    assert str(caught.value).startswith(f"cannot read {tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_mixed_scans_are_refused(tmp_path: Path) -> None:
    scan(tmp_path)
    write_view(tmp_path, 5, series="1.2.4")
    with pytest.raises(ValueError, match="several scans: give each a folder"):
        read_ctpd(tmp_path)
    write_view(tmp_path, 5, change={(0x7031, 0x1003): R + 5})
    with pytest.raises(
        ValueError, match=r"RadialDistance .* differs from file to file"
    ):
        read_ctpd(tmp_path)


def test_an_uneven_helix_is_refused(tmp_path: Path) -> None:
    scan(tmp_path)
    write_view(tmp_path, 12, change={(0x7031, 0x1002): height(12) + 3})
    with pytest.raises(ValueError, match="the table moves unevenly"):
        read_ctpd(tmp_path)


def test_no_folder_no_files_and_no_dicom(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        read_ctpd(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no \.dcm or \.IMA files"):
        read_ctpd(tmp_path)
    (tmp_path / "1.dcm").write_bytes(b"none of it")
    with pytest.raises(ValueError, match=r"cannot read .*1\.dcm: "):
        read_ctpd(tmp_path)
