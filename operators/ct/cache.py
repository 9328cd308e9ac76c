"""Matrices kept on disk, so that the next process need not build them again.

They lie in ``~/.cache/invsolve`` (in ``$XDG_CACHE_HOME/invsolve`` where that is set), or
in the folder that ``INVSOLVE_CACHE`` names; ``INVSOLVE_CACHE=""`` keeps nothing. A file is
written whole or not at all, is believed only if its checksum is right, and the
files used least recently go when all of them exceed `TOTAL_BYTES`. The cache only ever
saves time: whatever goes wrong with it, the matrix is built.
"""

import os
import zlib
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "1"
"""To be raised when the same geometry gets another matrix, or the file another form."""

WORTH_SECONDS = 0.5
"""What took less is built again rather than kept."""

TOTAL_BYTES = 4 * 2**30


def folder() -> Path | None:
    """Where matrices are kept; None if nowhere."""
    named = os.environ.get("INVSOLVE_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "invsolve"


def load(name: str) -> dict[str, Tensor] | None:
    """The tensors kept under a name, mapped into memory; None if none can be trusted."""
    where = folder()
    if where is None:
        return None
    path = _path(where, name)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            kept = (file.metadata() or {}).get("checksum")
        if kept != _checksum(tensors):
            return None
        path.touch()
    except (OSError, SafetensorError, ValueError):
        return None
    return tensors


def store(name: str, tensors: dict[str, Tensor], *, seconds: float) -> None:
    """Keep tensors that took so many seconds to build, if that is worth it."""
    where, size = folder(), sum(t.nbytes for t in tensors.values())
    if where is None or seconds < WORTH_SECONDS or size > TOTAL_BYTES:
        return
    with suppress(OSError, SafetensorError):
        where.mkdir(parents=True, exist_ok=True)
        _make_room(where, size)
        with NamedTemporaryFile(dir=where, prefix="matrix-", delete=False) as file:
            pass
        unfinished = Path(file.name)
        try:
            save_file(tensors, unfinished, {"checksum": _checksum(tensors)})
            os.replace(unfinished, _path(where, name))
        finally:
            unfinished.unlink(missing_ok=True)


def _path(where: Path, name: str) -> Path:
    return where / f"matrix-{name}-v{FORMAT}.safetensors"


def _make_room(where: Path, size: int) -> None:
    files = [(p.stat().st_mtime, p.stat().st_size, p) for p in where.glob("matrix-*")]
    total = size + sum(held for _, held, _ in files)
    for _, held, path in sorted(files):
        if total <= TOTAL_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= held


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 1
    for name, t in sorted(tensors.items()):
        value = zlib.adler32(f"{name} {t.dtype} {tuple(t.shape)}".encode(), value)
        value = zlib.adler32(t.numpy().data, value)
    return str(value)
