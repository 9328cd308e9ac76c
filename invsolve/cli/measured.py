"""Measurements: operators and noise by name, files that hold them, bare sinograms."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from invsolve import demo as demonstration, io, operators as ops
from invsolve.operators import LinearOperator, Noise
from invsolve.units import MU_WATER

from .options import lookup

NOISES: Mapping[str, Callable[..., Noise]] = {
    "gaussian": ops.GaussianNoise,
    "poisson": ops.PoissonNoise,
    "transmission": ops.TransmissionNoise,
    "rician": ops.RicianNoise,
}


def _ct(
    shape: Sequence[int], angles: np.ndarray, pixel_mm: float, **rest: Any
) -> LinearOperator:
    return ops.ParallelBeam(_size(shape), _angles(angles), pixel_mm, **rest)


def _fan(shape: Sequence[int], angles: np.ndarray, **rest: Any) -> LinearOperator:
    return ops.FanBeam(_size(shape), _angles(angles), **rest)


def _angles(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _inpaint(mask: np.ndarray) -> LinearOperator:
    return ops.Mask(torch.from_numpy(np.asarray(mask, dtype=np.float32)))


def _blur(shape: Sequence[int], width: float) -> LinearOperator:
    return ops.Blur.gaussian(width, _size(shape))


def _superres(shape: Sequence[int], factor: int) -> LinearOperator:
    return ops.Downsample(factor, _size(shape))


def _mri(mask: np.ndarray) -> LinearOperator:
    return _inpaint(mask) @ ops.Fourier() @ ops.RealImage()


def _size(shape: Sequence[int]) -> tuple[int, int]:
    h, w = shape
    return int(h), int(w)


OPERATORS: Mapping[str, Callable[..., LinearOperator]] = {
    "ct": _ct,
    "fan": _fan,
    "inpaint": _inpaint,
    "blur": _blur,
    "superres": _superres,
    "mri": _mri,
}

TOMOGRAPHY = ("ct", "fan")

FACTOR = 3
"""How many times finer the grid is on which CT is measured."""


def describe(
    operator: str,
    image: io.Image,
    unit: io.Unit,
    generator: Generator,
    *,
    views: int,
    geometry: Path | None,
    counts: float,
    sigma: float | None,
    keep: float,
    width: float,
    factor: int,
    acceleration: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The operator and the noise in words and numbers, as the file will hold them."""
    h, w = image.values.shape[-2:]
    shape = [h, w]
    if geometry is not None and operator != "ct":
        raise ValueError(f"--geometry is for ct, not for {operator}")
    if operator == "ct":
        if unit != "1/mm":
            raise ValueError("ct needs an image of attenuation: give --unit HU or 1/mm")
        pixel = demonstration.square_pixel(image)
        if geometry is None:
            A = ops.ParallelBeam(
                (h, w),
                demonstration.even_angles(views),
                pixel,
                oversample=demonstration.OVERSAMPLE,
            )
        else:
            A = _read_geometry(geometry)
            if A.shape != (h, w) or abs(A.pixel_mm / pixel - 1) > 1e-3:
                raise ValueError(
                    f"{geometry} is for {A.shape} pixels of {A.pixel_mm:.4g} mm, the "
                    f"image has {(h, w)} of {pixel:.4g} mm: make them agree"
                )
        described = _in_words(A)
        return described, {
            "name": "transmission",
            "counts": counts,
            "floor": demonstration.FLOOR,
        }
    # σ is given in the image's own unit; for CT that is HU, and solved for is 1/mm.
    if sigma is None:
        sigma = 0.02 * MU_WATER if unit == "1/mm" else 0.02
    elif image.unit == "HU":
        sigma = sigma * MU_WATER / 1000
    noise = {"name": "gaussian", "sigma": sigma}
    match operator:
        case "inpaint":
            mask = ops.Mask.random((h, w), keep, generator=generator).mask
            return {"name": operator, "mask": mask.numpy()}, noise
        case "mri":
            mask = ops.Mask.cartesian((h, w), acceleration, generator=generator).mask
            return {"name": operator, "mask": mask.numpy()}, noise
        case "blur":
            return {"name": operator, "shape": shape, "width": width}, noise
        case _:
            return {"name": operator, "shape": shape, "factor": factor}, noise


def _read_geometry(path: Path) -> ops.ParallelBeam | ops.FanBeam:
    A = io.read_geometry(path)
    if isinstance(A, ops.ConeBeam):
        raise ValueError(
            f"{path} is a ConeBeam, but slices are solved here: solve volumes from Python"
        )
    return A


def _in_words(A: ops.ParallelBeam | ops.FanBeam) -> dict[str, Any]:
    """A geometry as a measurement file holds it; the backend is the solver's choice."""
    name = "fan" if isinstance(A, ops.FanBeam) else "ct"
    values = {f.name: getattr(A, f.name) for f in fields(A) if f.name != "backend"}
    values["angles"] = A.angles.numpy()
    return {"name": name, **values, "shape": list(A.shape)}


def noise_in_words(noise: Mapping[str, Any]) -> str:
    """Its name and numbers."""
    return ", ".join(v if k == "name" else f"{k} {v:g}" for k, v in noise.items())


def build_operator(described: Mapping[str, Any]) -> LinearOperator:
    """The operator that a file describes."""
    return _build(OPERATORS, described, "operator")


def build_noise(described: Mapping[str, Any]) -> Noise:
    """The noise that a file describes."""
    return _build(NOISES, described, "noise")


def _build(
    table: Mapping[str, Callable], described: Mapping[str, Any], what: str
) -> Any:
    name = described["name"]
    make = lookup(table, name, what)
    try:
        return make(**{k: v for k, v in described.items() if k != "name"})
    except TypeError as error:
        raise ValueError(f"the {what} {name!r} is ill described: {error}") from error


def read_measurements(path: Path, raw: Mapping[str, Any]) -> io.Measurements:
    """A measurement file, or a bare array by what the options say of it."""
    if path.suffix != ".npy":
        for option, value in raw.items():
            if value is not None:
                name = "--" + option.replace("_", "-")
                raise ValueError(f"{name} is for a sinogram (.npy), not for {path}")
        return io.load_measurements(path)
    return _sinogram(path, **raw)


def _sinogram(
    path: Path,
    *,
    pixel_mm: float | None,
    size: int | None,
    detector_mm: float | None,
    angles: Path | None,
    geometry: Path | None,
    sigma: float | None,
    counts: float | None,
) -> io.Measurements:
    """Measurements from a bare array, by what the command line says of it."""
    array = _load_array(path)
    sized = pixel_mm is not None and size is not None
    if not (sized or geometry) or (sigma is None) == (counts is None):
        raise ValueError(
            f"{path} is a bare sinogram: give --pixel-mm and --size, or --geometry, and "
            "--sigma or --counts"
        )
    if geometry and any((pixel_mm, size, detector_mm, angles)):
        raise ValueError(
            "--geometry says all of --pixel-mm, --size, --detector-mm and --angles: "
            "leave them out"
        )
    for name, value in (("--pixel-mm", pixel_mm), ("--detector-mm", detector_mm)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be > 0, got {value}")
    if array.ndim not in (2, 3):
        raise ValueError(
            f"{path} is of shape {array.shape}: a sinogram is (views, detectors) or "
            "(slices, views, detectors)"
        )
    y = torch.from_numpy(array.reshape(-1, 1, *array.shape[-2:]))
    if geometry:
        A = _read_geometry(geometry)
    else:
        assert pixel_mm is not None and size is not None
        views, detectors = array.shape[-2:]
        theta = demonstration.even_angles(views)
        if angles is not None:
            theta = torch.from_numpy(_load_array(angles))
            if theta.shape != (views,):
                raise ValueError(
                    f"{angles} is of shape {tuple(theta.shape)}, but the sinogram has "
                    f"{views} views: give one angle for each"
                )
        try:
            A = ops.ParallelBeam(
                (size, size),
                theta,
                pixel_mm,
                detectors,
                detector_mm or pixel_mm,
                oversample=demonstration.OVERSAMPLE,
            )
        except ValueError as error:
            raise ValueError(f"cannot solve {path}: {error}") from error
    noise: dict[str, Any] = {"name": "gaussian", "sigma": sigma}
    if counts is not None:
        floor = demonstration.FLOOR
        noise = {"name": "transmission", "counts": counts, "floor": floor}
    operator = _in_words(A)
    affine = np.diag([-A.pixel_mm, -A.pixel_mm, 1.0, 1.0])
    try:
        return io.Measurements(y, operator, noise, affine, "1/mm", {"simulated": False})
    except ValueError as error:
        raise ValueError(f"cannot solve {path}: {error}") from error


def _load_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the name")
    try:
        with path.open("rb") as stream:
            array = np.load(stream, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise ValueError("it is not an array of real numbers")
    except Exception as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return np.ascontiguousarray(array, dtype=np.float32)


def has_colours(m: io.Measurements) -> bool:
    """Whether they are of one picture in colour."""
    return m.note.get("colour") is True
