"""What several commands take, and how the words that they are given are looked up."""

import difflib
import importlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

Seed = Annotated[int, typer.Option(min=0, help="Of every random number.")]

Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; cuda where there is one by default.")
]

PriorName = Annotated[
    str, typer.Option("--prior", help="A name, or the path of a card, file or folder.")
]

UnitName = Annotated[
    str | None,
    typer.Option("--unit", help="Of the image's values: HU, 1/mm or none."),
]

CONTEXT: Mapping[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 88,
}
"""Of the command line and of its groups."""


def need(*modules: str) -> None:
    """Refuse at once what would fail for want of a module when all is computed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


def device_of(name: str | None) -> torch.device:
    """The device of a name; a GPU where there is one, unless named."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name!r} here: give --device cpu")
    return device


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """What a name stands for, or a ValueError that says what there is."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} {name!r}: {choices(name, table)}")


def choices(name: str, known: Iterable[str]) -> str:
    """All names there are, and the nearest to one that there is not."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"choose from {', '.join(names)}{hint}"


def data_home(config: Path) -> Path:
    """What the paths in a configuration are relative to."""
    return Path(os.environ.get("INVSOLVE_DATA") or config.resolve().parent)
