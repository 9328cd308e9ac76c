"""Measurements on disk: numbers and a description, and nothing that is executed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final, get_args

import numpy as np
import torch
from torch import Tensor

from .files import replace
from .image import Unit

FORMAT = 1
ARRAYS = ("angles", "mask")
"""What of an operator is kept as an array of the file; all else of it is JSON."""


@final
@dataclass(frozen=True, eq=False)
class Measurements:
    """y, and what must be known to solve for x: the operator, the noise, the place.

    Args:
        y: (slices, channels, …), real or complex.
        operator: its ``name`` and parameters; ``angles`` and ``mask`` are arrays.
        noise: its ``name`` and parameters.
        affine: 4×4, of the image that was measured; see `Image`.
        unit: of that image, as it is solved for.
        note: where the measurements are from: ``simulated``, ``image`` and the like.
    """

    y: Tensor
    operator: dict[str, Any]
    noise: dict[str, Any]
    affine: np.ndarray
    unit: Unit = ""
    note: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.y.is_floating_point() or self.y.is_complex()):
            raise ValueError(f"measurements are {self.y.dtype}, not real or complex")
        if self.y.ndim < 3 or self.y.numel() == 0:
            raise ValueError(
                f"measurements are of shape {tuple(self.y.shape)}, not (slices, "
                "channels, …)"
            )
        bad = int((~self.y.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{bad} of {self.y.numel()} measurements are NaN or infinite: repair "
                "them or leave them out"
            )
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise ValueError("the affine is not 4×4 finite numbers")
        for what, described in (("operator", self.operator), ("noise", self.noise)):
            if not isinstance(described.get("name"), str):
                raise ValueError(f"the {what} has no name")

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel of the image along (z, y, x)."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)


def save_measurements(path: str | Path, m: Measurements) -> None:
    """Write measurements as ``.npz``, all of them or nothing.

    The file holds ``y``, ``affine``, the operator's arrays and ``meta``, a JSON text.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"cannot write {path}: the name must end in .npz")
    arrays = {k: np.asarray(v) for k, v in m.operator.items() if k in ARRAYS}
    meta = {
        "format": FORMAT,
        "operator": {k: v for k, v in m.operator.items() if k not in ARRAYS},
        "noise": m.noise,
        "unit": m.unit,
        **m.note,
    }
    arrays["y"], arrays["affine"] = m.y.detach().cpu().numpy(), m.affine
    arrays["meta"] = np.asarray(json.dumps(meta, ensure_ascii=False))

    def save(partial: str) -> None:
        np.savez_compressed(partial, allow_pickle=False, **arrays)

    replace(path, save, ".npz")


def load_measurements(path: str | Path) -> Measurements:
    """Read what `save_measurements` wrote.

    Raises:
        ValueError: the file is missing, damaged, of another kind, or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the name")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")[()]))
    except Exception as error:  # zipfile, zlib, struct and NumPy each raise their own
        raise ValueError(
            f"cannot read {path}: it is damaged, or not a measurement file as "
            "'invsolve simulate' writes it"
        ) from error
    try:
        return _from_parts(arrays, meta)
    except KeyError as error:
        raise ValueError(f"cannot read {path}: it lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _from_parts(arrays: dict[str, np.ndarray], meta: Any) -> Measurements:
    if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    operator, noise, unit = (meta.pop(key) for key in ("operator", "noise", "unit"))
    if unit not in get_args(Unit):
        raise ValueError(f"its unit {unit!r} is unknown")
    if not isinstance(operator, dict) or not isinstance(noise, dict):
        raise ValueError("its operator and noise are not objects")
    y, affine = arrays.pop("y"), arrays.pop("affine")
    unknown = set(arrays) - set(ARRAYS)
    if unknown:
        raise ValueError(f"it holds an unknown array {min(unknown)!r}")
    if y.dtype.kind not in "fc" or affine.dtype.kind != "f":
        raise ValueError(f"y is {y.dtype} and the affine {affine.dtype}")
    kind = np.complex64 if y.dtype.kind == "c" else np.float32
    return Measurements(
        torch.from_numpy(np.ascontiguousarray(y, dtype=kind)),
        operator | arrays,
        noise,
        affine,
        unit,
        meta,
    )
