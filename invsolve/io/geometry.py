"""The geometry of a scan as a JSON file that a person can write."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import torch

from ..operators.ct import Backend, ConeBeam, FanBeam, ParallelBeam
from .files import replace

Geometry = ParallelBeam | FanBeam | ConeBeam
KINDS: dict[str, type[Geometry]] = {
    kind.__name__: kind for kind in (ParallelBeam, FanBeam, ConeBeam)
}
SPACING = {"start", "stop", "count", "endpoint"}


def read_geometry(path: str | Path) -> Geometry:
    """The operator that a JSON file describes.

    The file is one object. ``geometry`` is ParallelBeam, FanBeam or ConeBeam, and every
    other key is a keyword of that class, in mm and radians; tuples are lists. ``angles``
    is a list, or ``{"start": …, "stop": …, "count": …, "endpoint": false}`` for so many
    evenly spaced ones, without the last unless ``endpoint`` is true.

    Raises:
        ValueError: the file is missing, is not such an object, has an unknown key, lacks
            one, or describes what cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the name")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: it is not JSON ({error})") from error
    try:
        return _operator(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def write_geometry(path: str | Path, operator: Geometry) -> None:
    """Write what `read_geometry` reads, all of it or nothing; numbers keep all digits.

    Only what differs from the defaults is written.
    """
    path = Path(path)
    described: dict[str, Any] = {"geometry": type(operator).__name__}
    for field in fields(operator):
        value = getattr(operator, field.name)
        if field.name == "angles":
            described["angles"] = value.double().tolist()
        elif field.default is MISSING or value != field.default:
            described[field.name] = list(value) if isinstance(value, tuple) else value
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    replace(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def _operator(given: Any) -> Geometry:
    if not isinstance(given, dict):
        raise ValueError("it is not one JSON object of keys and values")
    name = given.pop("geometry", None)
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"its geometry is {name!r}, not one of {', '.join(KINDS)}")
    kind = KINDS[name]
    known = {field.name: field for field in fields(kind)}
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key {key!r}: {name} knows {', '.join(known)}")
    for key, field in known.items():
        if field.default is MISSING and key not in given:
            raise ValueError(f"the key {key!r} is missing")
    return kind(**{key: _value(kind, key, value) for key, value in given.items()})


def _value(kind: type[Geometry], key: str, value: Any) -> Any:
    """What a key's JSON value is to the class, whose defaults tell the types."""
    if key == "angles":
        return _angles(value)
    lengths = {"ParallelBeam": (2, 0), "FanBeam": (2, 0), "ConeBeam": (3, 2)}
    space, detector = lengths[kind.__name__]
    match key:
        case "shape":
            return _numbers(key, value, space, int)
        case "detectors" if detector:
            return _numbers(key, value, detector, int)
        case "detector_mm" | "offset_mm" if detector:
            return _numbers(key, value, detector, float)
        case "voxel_mm" if isinstance(value, list):
            return _numbers(key, value, space, float)
        case "detectors" | "oversample" | "rays":
            return _number(key, value, int)
        case "curved" | "truncated":
            if not isinstance(value, bool):
                raise ValueError(f"{key!r} must be true or false, not {value!r}")
            return value
        case "backend":
            if value not in get_args(Backend):
                known = ", ".join(get_args(Backend))
                raise ValueError(f"{key!r} must be one of {known}, not {value!r}")
            return value
        case _:
            return _number(key, value, float)


def _angles(value: Any) -> torch.Tensor:
    if isinstance(value, dict):
        unknown = set(value) - SPACING
        if unknown:
            raise ValueError(f"unknown key {min(unknown)!r} in 'angles'")
        for key in ("start", "stop", "count"):
            if key not in value:
                raise ValueError(f"the key {key!r} is missing in 'angles'")
        start, stop = (
            _number(f"angles.{key}", value[key], float) for key in ("start", "stop")
        )
        count = _number("angles.count", value["count"], int)
        endpoint = value.get("endpoint", False)
        if not isinstance(endpoint, bool):
            raise ValueError(
                f"'angles.endpoint' must be true or false, not {endpoint!r}"
            )
        if count < 1:
            raise ValueError(f"'angles.count' must be at least 1, not {count}")
        if endpoint:
            return torch.linspace(start, stop, count, dtype=torch.float64)
        return torch.linspace(start, stop, count + 1, dtype=torch.float64)[:-1]
    if not isinstance(value, list):
        raise ValueError(
            "'angles' must be a list of numbers, or an object of start, stop and count"
        )
    numbers = [_number("angles", angle, float) for angle in value]
    return torch.tensor(numbers, dtype=torch.float64)


def _number(key: str, value: Any, kind: type) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key!r} must be {what}, not {value!r}")
    return kind(value)


def _numbers(key: str, value: Any, count: int, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{key!r} must be a list of {count} numbers, not {value!r}")
    return tuple(_number(key, number, kind) for number in value)
