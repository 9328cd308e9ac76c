"""What commands write: all of it or nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from invsolve import io
from invsolve.priors.weights import sha256
from invsolve.report import Report, save_figure, save_page, shown_unit

OUTPUTS = (
    "mean.nii.gz",
    "mean.png",
    "std.nii.gz",
    "samples.npy",
    "report.png",
    "report.html",
    "result.json",
    "mask.nii.gz",
    "mask.dcm",
    "probability*.nii.gz",
    "std-*.nii.gz",
    "planes.png",
    "whole.png",
    "volume.png",
    "index.html",
    "volumes.json",
)
"""What commands write into their folders: a later one leaves none of it."""


def check_folder(out: Path, *, force: bool) -> None:
    """Refuse now what could not be written, or what would be overwritten, later."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give -o the name of a folder")
    if not force and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give another folder, or --force")
    check_writable(out / "report.html")


def check_writable(path: Path) -> None:
    """Refuse now what could not be written later, with a ValueError."""
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write {path}: {parent} is not a folder to write in")


@contextmanager
def at_once(out: Path) -> Iterator[Path]:
    """A folder to write in, whose files go to ``out`` when all of them are whole."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.part"
    partial.mkdir()
    try:
        yield partial
        if not out.exists():
            partial.rename(out)
            return
        written = {file.name for file in partial.iterdir()}
        for file in partial.iterdir():
            file.replace(out / file.name)
        for pattern in OUTPUTS:
            for stale in out.glob(pattern):
                if stale.name not in written:
                    stale.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_image(
    path: Path, values: Tensor, m: io.Measurements, *, spread: bool = False
) -> None:
    """An image in the unit that is shown, or its spread, where the measurements lie."""
    unit = "" if spread else shown_unit(m.unit)
    io.write(path, io.Image(values.float().cpu(), m.affine, unit))


def write_report(folder: Path, report: Report) -> None:
    """A report as a picture and as a page."""
    save_figure(folder / "report.png", report)
    save_page(folder / "report.html", report)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """A record, whole or not at all."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    io.replace(path, lambda p: Path(p).write_text(text, encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """Of a file; of a folder, of its files' in the order of their names."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
