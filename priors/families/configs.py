"""JSON configurations, read as what they say and no more."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST = 4 * 2**20  # bytes; real ones have thousands


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is missing, too large, damaged, or no object.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is too large for one")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = str(error).split("\n")[0]
        raise ValueError(f"cannot read the configuration {path}: {why}") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot read the configuration {path}: it is not an object")
    return content


def joined(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """The upper over the lower, entry by entry, and within entries that both hold."""
    both = dict(lower)
    for name, value in upper.items():
        below = both.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = {**below, **value}
        both[name] = value
    return both
