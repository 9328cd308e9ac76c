"""A DICOM series of CT or PET as one volume: where its voxels lie, in HU or SUV."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from .image import Image, Unit, upright

UNEVEN = 0.1
"""The part of the distance between two slices by which one may lie astray."""

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From DICOM's world (left, posterior, superior) to NIfTI's."""


def read_dicom(folder: str | Path) -> Image:
    """One series, each slice its own file: values, rescaled, where their tags say.

    Voxel (column i, row j, slice k) lies at p₀ + i Δx r + j Δy d + k s in millimetres:
    p₀ is the first ImagePositionPatient, r and d the two halves of
    ImageOrientationPatient, (Δy, Δx) PixelSpacing and s the step from slice to slice,
    which a tilted gantry makes oblique. Files are ordered by their places, not by their
    names; names that begin with a dot are left.

    CT is in Hounsfield units. PET is in standardised uptake values by body weight; see
    `suv_factor`. Others have no unit.

    Raises:
        ValueError: a file is damaged, or no grey image; there are several series, or
            none; slices are missing or unevenly spaced; or SUV lacks a tag.
        ModuleNotFoundError: pydicom is not installed.
    """
    folder = Path(folder)
    slices = read_series(folder)
    try:
        affine = affine_of(slices)
        unit: Unit = "HU" if slices[0].get("Modality") == "CT" else ""
        factor = 1.0
        if slices[0].get("Modality") == "PT":
            unit, factor = "SUV", suv_factor(slices)
    except ValueError as error:
        raise ValueError(f"cannot read {folder}: {error}") from error
    stack = np.stack([_values(s) * np.float32(factor) for s in slices])
    return upright(stack.transpose(2, 1, 0), affine, unit)


def read_series(folder: str | Path) -> list[Any]:
    """The datasets of a folder's one series, ordered along the normal r × d of its slices.

    Raises:
        ValueError: as `read_dicom` says, of files.
        ModuleNotFoundError: pydicom is not installed.
    """
    try:
        from pydicom import dcmread
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading DICOM needs pydicom: pip install 'invsolve[io]'"
        ) from error
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: check the name")
    slices: list[tuple[float, Any]] = []
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        try:
            dataset: Any = dcmread(file)
            if dataset.PhotometricInterpretation != "MONOCHROME2":
                raise ValueError("it is no grey image in which larger is brighter")
            if dataset.pixel_array.ndim != 2:
                raise ValueError("it holds several frames: save each as a file")
            if len(dataset.PixelSpacing) != 2 or min(dataset.PixelSpacing) <= 0:
                raise ValueError(f"its PixelSpacing is {dataset.PixelSpacing}")
            normal = np.cross(*_axes(dataset))
            slices.append((float(normal @ _place(dataset)), dataset))
        # What a damaged file makes pydicom raise can be anything at all.
        except Exception as error:
            first_line = str(error).strip().split("\n")[0]
            raise ValueError(f"cannot read {file}: {first_line}") from error
    series = {str(dataset.SeriesInstanceUID) for _, dataset in slices}
    grids = {_grid(dataset) for _, dataset in slices}
    if len(series) != 1 or len(grids) != 1:
        raise ValueError(
            f"{folder} holds {len(series)} DICOM series or slices of several sizes or "
            "directions: keep one series in each folder"
        )
    slices.sort(key=lambda one: one[0])
    return [dataset for _, dataset in slices]


def affine_of(slices: Sequence[Any]) -> np.ndarray:
    """4×4, from (column, row, slice) to millimetres in the world of NIfTI.

    A single slice is as thick as its SliceThickness says, or 1 mm.

    Args:
        slices: of one series, in order, as `read_series` gives them.

    Raises:
        ValueError: the slices are not evenly spaced on a straight line.
    """
    first = slices[0]
    right, down = _axes(first)
    places = np.stack([_place(dataset) for dataset in slices])
    if len(slices) > 1:
        _check_even(places, places @ np.cross(right, down))
        step = (places[-1] - places[0]) / (len(places) - 1)
    else:
        thickness = first.get("SliceThickness")
        step = np.cross(right, down) * (float(thickness) if thickness else 1.0)
    rows_mm, columns_mm = (float(mm) for mm in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.stack([columns_mm * right, rows_mm * down, step, places[0]], 1)
    return LPS_TO_RAS @ affine


def suv_factor(slices: Sequence[Any]) -> float:
    """w / (D · 2^(−Δt/T½)), which turns Bq/ml into SUV by body weight.

    w is PatientWeight in g, D RadionuclideTotalDose in Bq and T½ RadionuclideHalfLife.
    Δt is the time from injection to what the values are corrected to: with
    DecayCorrection ADMIN none; with START until SeriesTime or, where the series was made
    afterwards, until the earliest AcquisitionTime (the profile of the Quantitative
    Imaging Biomarkers Alliance). An injection given without its date is at most a day
    before. Of Units GML the values are SUV already.

    Args:
        slices: of one PET series, their values in Units once rescaled.

    Raises:
        ValueError: a tag is missing or makes no sense; the line names it.
    """
    first = slices[0]
    units = str(_needed(first, "Units"))
    if units == "GML" and first.get("SUVType", "BW") in ("BW", "", None):
        return 1.0
    if units != "BQML":
        raise ValueError(
            f"SUV needs Units BQML, and this PET's are {units} "
            f"{first.get('SUVType') or ''}".rstrip()
            + ": export activity in Bq/ml, or give SUV as NIfTI"
        )
    corrected = first.get("CorrectedImage")
    if corrected and "ATTN" not in corrected:
        raise ValueError(
            "SUV needs a PET corrected for attenuation, and its CorrectedImage does not "
            "name ATTN: take the corrected series"
        )
    weight = _positive(first, "PatientWeight")
    if not first.get("RadiopharmaceuticalInformationSequence"):
        raise ValueError(_lacks("RadiopharmaceuticalInformationSequence"))
    injected = first.RadiopharmaceuticalInformationSequence[0]
    dose = _positive(injected, "RadionuclideTotalDose")
    correction = str(_needed(first, "DecayCorrection"))
    if correction == "ADMIN":
        return 1000 * weight / dose
    if correction != "START":
        raise ValueError(
            f"SUV needs DecayCorrection START or ADMIN, and this PET's is {correction}: "
            "export it corrected for decay"
        )
    half_life = _positive(injected, "RadionuclideHalfLife")
    waited = (_start(slices) - _injection(injected, _start(slices))).total_seconds()
    if not 0 <= waited <= 86400:
        raise ValueError(
            "SUV needs an injection in the day before the scan, and "
            f"RadiopharmaceuticalStartDateTime says {waited / 3600:.1f} h before it: "
            "correct the tag"
        )
    return 1000 * weight / (dose * 2 ** (-waited / half_life))


# --- parts


def _axes(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors along a row (columns count up) and along a column."""
    axes = np.asarray(dataset.ImageOrientationPatient, dtype=float).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-2:
        raise ValueError(
            f"its ImageOrientationPatient {axes.ravel().tolist()} is wrong"
        )
    right, down = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    return right, down


def _place(dataset: Any) -> np.ndarray:
    place = np.asarray(dataset.ImagePositionPatient, dtype=float)
    if place.shape != (3,):
        raise ValueError(f"its ImagePositionPatient is of {place.size} numbers")
    return place


def _grid(dataset: Any) -> tuple:
    """What all slices of one volume have in common."""
    spacing = np.asarray(dataset.PixelSpacing, dtype=float).round(3)
    axes = np.concatenate(_axes(dataset)).round(2) + 0.0  # no −0
    return dataset.Rows, dataset.Columns, *spacing.tolist(), *axes.tolist()


def _check_even(places: np.ndarray, heights: np.ndarray) -> None:
    gaps = np.diff(heights)
    usual = float(np.sort(gaps)[(len(gaps) - 1) // 2])
    worst = int(np.abs(gaps - usual).argmax())
    where = f"between {heights[worst]:.4g} and {heights[worst + 1]:.4g} mm"
    if gaps.min() < 1e-3:
        at = heights[int(gaps.argmin())]
        raise ValueError(
            f"several slices lie at {at:.4g} mm: keep one volume in each folder"
        )
    if abs(gaps[worst] - usual) > UNEVEN * usual:
        raise ValueError(
            f"its slices are {usual:.4g} mm apart, but {gaps[worst]:.4g} mm {where} along "
            "their normal: is a file missing?"
        )
    line = np.linspace(places[0], places[-1], len(places))
    astray = np.linalg.norm(places - line, axis=1)
    if astray.max() > UNEVEN * usual:
        k = int(astray.argmax())
        raise ValueError(
            f"its slices do not lie on a straight line: the one at {heights[k]:.4g} mm is "
            f"{astray[k]:.3g} mm off"
        )


def _values(dataset: Any) -> np.ndarray:
    from pydicom.pixels.processing import apply_modality_lut

    values = apply_modality_lut(dataset.pixel_array, dataset)
    return np.asarray(values, dtype=np.float32)


def _lacks(name: str) -> str:
    return f"SUV needs {name}, which the PET's files lack: add it, or give SUV as NIfTI"


def _needed(dataset: Any, name: str) -> Any:
    value = dataset.get(name)
    if value is None or value == "":
        raise ValueError(_lacks(name))
    return value


def _positive(dataset: Any, name: str) -> float:
    value = float(_needed(dataset, name))
    if not 0 < value < np.inf:
        raise ValueError(f"SUV needs {name} > 0, and the PET's files say {value:g}")
    return value


def _start(slices: Sequence[Any]) -> datetime:
    """When the scan began: the series' time, unless acquisition began before it."""
    first = slices[0]
    day = _needed(first, "SeriesDate")
    series = _moment(day, _needed(first, "SeriesTime"))
    acquired = [
        _moment(dataset.get("AcquisitionDate") or day, dataset.AcquisitionTime)
        for dataset in slices
        if dataset.get("AcquisitionTime")
    ]
    return min([series, *acquired])


def _injection(injected: Any, start: datetime) -> datetime:
    exact = injected.get("RadiopharmaceuticalStartDateTime")
    if exact:
        return _moment(str(exact)[:8], str(exact)[8:])
    name = "RadiopharmaceuticalStartTime"
    if not injected.get(name):
        raise ValueError(_lacks(name))
    at = _moment(f"{start:%Y%m%d}", injected.get(name))
    return at if at <= start else at - timedelta(days=1)


def _moment(day: str, time: str) -> datetime:
    """YYYYMMDD and HH[MM[SS[.FFFFFF]]]; an offset from UTC that follows is left out."""
    digits = str(time).split("+")[0].split("-")[0].replace(":", "")
    whole, _, fraction = digits.partition(".")
    text = f"{str(day).replace('.', '')}{whole.ljust(6, '0')}.{fraction or '0'}"
    try:
        return datetime.strptime(text, "%Y%m%d%H%M%S.%f")
    except ValueError as error:
        raise ValueError(f"SUV needs dates and times, and {text!r} is none") from error
