"""Images, scans and masks as commands read them."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from invsolve import io
from invsolve.report import shown, shown_unit
from invsolve.units import hu_to_mu

from .measured import has_colours
from .samplers import SAMPLERS


def read_image(path: Path, unit: str | None, pixel_mm: float | None) -> io.Image:
    """An image to measure, its unit and pixels as the file or the options say."""
    if unit not in (None, "none", *get_args(io.Unit)):
        raise ValueError(f"unknown unit {unit!r}: HU, 1/mm or none")
    given: Any = "" if unit == "none" else unit
    image = io.read(path, given, colour=True)
    if pixel_mm is not None:
        if not (pixel_mm > 0 and math.isfinite(pixel_mm)):
            raise ValueError(f"--pixel-mm must be > 0, got {pixel_mm}")
        affine = image.affine.copy()
        affine[:, 0] *= pixel_mm / image.spacing[2]
        affine[:, 1] *= pixel_mm / image.spacing[1]
        image = dataclasses.replace(image, affine=affine)
    if image.unit == "1/mm" and image.values.abs().max() > 1:
        raise ValueError(
            f"{path} reaches {float(image.values.abs().max()):.4g}, but attenuation is "
            "far below 1/mm: give --unit HU"
        )
    return image


def chosen_range(
    image: io.Image, index: int | None, slices: str | None
) -> tuple[int, int]:
    """From which slice up to which: one, some, or the middle one."""
    n = len(image.values)
    if index is not None and slices is not None:
        raise ValueError("give --slice or --slices, not both")
    if index is None and slices is None:
        start, stop = middle_of(image), middle_of(image) + 1
    elif slices is not None:
        first, colon, last = slices.partition(":")
        try:
            start, stop = int(first or 0), int(last or n)
        except ValueError as error:
            raise ValueError(f"--slices {slices}: write it as A:B") from error
        if not colon:
            raise ValueError(f"--slices {slices}: write it as A:B")
    else:
        start = index or 0
        stop = start + 1
    if not 0 <= start < stop <= n:
        raise ValueError(
            f"the image has slices 0 to {n - 1}, not {start} to {stop - 1}"
        )
    return start, stop


def middle_of(image: io.Image) -> int:
    """The number of an image's middle slice."""
    return len(image.values) // 2


def to_solve(image: io.Image) -> tuple[Tensor, io.Unit]:
    """What is measured and its unit, of HU 1/mm: (slices, 1, h, w) or (1, 3, h, w)."""
    if image.unit == "HU":
        return hu_to_mu(image.values[:, None]), "1/mm"
    return image.values[None] if image.colour else image.values[:, None], image.unit


def read_slices(path: Path, m: io.Measurements, what: str = "truth") -> Tensor:
    """The slices that were measured, of an image, in the unit that is shown."""
    unit = shown_unit(m.unit)
    image = io.read(path, colour=has_colours(m))
    if unit == "HU" and image.unit == "" and image.values.abs().max() <= 1:
        image = io.Image(image.values, image.affine, "1/mm")
    values = shown(image.values, image.unit)
    if unit == "HU":
        values = values.clamp_min(-1000)
    slices, n = m.note.get("slices"), 3 if has_colours(m) else len(m.y)
    if len(values) != n and isinstance(slices, list) and len(slices) == 2:
        values = values[int(slices[0]) : int(slices[1])]
    shape = m.operator.get("shape") or m.operator["mask"].shape[-2:]
    if tuple(values.shape) != (n, *shape):
        expected = "×".join(map(str, (n, *shape)))
        raise ValueError(
            f"the {what} {path} gives {'×'.join(map(str, values.shape))} voxels, the "
            f"measurements {expected}: give the image they are of"
        )
    return values


def beginning(
    paths: Sequence[Path],
    m: io.Measurements,
    name: str,
    sampler: Callable[..., Tensor],
) -> Tensor:
    """The image that a sampler begins with, or the mean of several, as it is solved for."""
    if "init" not in inspect.signature(sampler).parameters:
        able = [
            k for k, f in SAMPLERS.items() if "init" in inspect.signature(f).parameters
        ]
        raise ValueError(
            f"{name} takes no --init: choose from {', '.join(able)}, or leave it out"
        )
    values = torch.stack([read_slices(path, m, "image") for path in paths]).mean(0)
    if m.unit == "1/mm":
        values = hu_to_mu(values)
    return values[None] if has_colours(m) else values[:, None]


def read_scan(path: Path, unit: io.Unit) -> io.Image:
    """In its unit; that a file's values can be SUV is seen to where they are used."""
    image = io.read(path, placed=True)
    if unit == "HU" and image.unit != "HU":
        low, high = float(image.values.min()), float(image.values.max())
        raise ValueError(
            f"{path} goes from {low:.4g} to {high:.4g} {image.unit}".rstrip()
            + ", which is no CT in HU: give the CT first and the PET second"
        )
    if unit == "SUV" and (
        image.unit == "HU" or (path.is_dir() and image.unit != "SUV")
    ):
        raise ValueError(
            f"{path} is no PET in SUV: give the CT first and the PET second"
        )
    if not unit and image.unit:
        raise ValueError(f"{path} is in {image.unit}, and the model was made for MR")
    return dataclasses.replace(image, unit=unit)


def read_masks(path: Path, scan: io.Image, labels: int) -> Tensor:
    """The true masks on a scan's grid: (labels, z, y, x); of a single label, all > 0."""
    from invsolve.grids import Grid, resampled

    image = io.read(path, "", placed=True)
    values = resampled(image, Grid.of(scan), nearest=True).values.round()
    if image.values.any() and not values.any():
        raise ValueError(
            f"the truth {path} lies outside of the scan: give the mask of this patient"
        )
    if labels == 1:
        return values[None] > 0
    return values == torch.arange(1, labels + 1)[:, None, None, None]
