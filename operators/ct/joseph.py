"""Joseph's matrix (1982), for any rays in two or three dimensions.

A ray steps through the image from one plane of voxels to the next, along the axis that
it crosses most of, and interpolates linearly between the voxels of a plane; a step
weighs as much as it is long in mm. Of a scan that oversamples the planes are those of
finer pixels, and what gives them their values is multiplied into the matrix; so is the
mean over the rays of an element.
"""

import warnings
from collections.abc import Iterator
from functools import lru_cache
from math import ceil
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..resample import finer_pixels
from . import cache
from .rays import Scan

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Some rays' rows of A: entries of each row, then all their columns and values."""

CROSSINGS = 2**18
"""Interpolations computed at once: about what a CPU's cache holds."""

ENTRIES = 2**24
"""Entries of A that the matrix-free path holds at once, 128 MiB."""

CHUNK_BYTES = 2**23
"""Images that are projected at once: about what a CPU's cache holds; 8 to 16."""


SMOOTH = 7
"""Pixels of a plane, at most, that a ray through finer pixels depends on.

A plane has a say in the finer ones of its neighbours, too. Within three planes a ray is
interpolated between five pixels across, and one on each side has a say in theirs.
"""


def matrix_bytes(scan: Scan) -> int:
    """What A and Aᵀ take in float32, at most, known before they are built."""
    rows, voxels = scan.size
    per_plane = 2 ** (len(scan.shape) - 1) if scan.oversample == 1 else SMOOTH
    if scan.rays > 1:  # the outermost rays of an element lie less than its pitch apart
        per_plane += ceil(scan.pitch[-1] / min(scan.spacing[-2:]) * 2**0.5)
    entries = rows * max(scan.shape) * per_plane
    return 2 * (8 * entries) + 4 * (rows + voxels + 2)


def joseph(
    point: np.ndarray,
    direction: np.ndarray,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    dtype: type[np.floating],
) -> Part:
    """The rows of A of some rays, each given by a point on it and its direction."""
    n, stride = np.array(shape), np.array([*np.cumprod(shape[:0:-1])[::-1], 1])
    p, d = point / spacing + (n - 1) / 2, direction / np.array(spacing)
    ray = np.arange(len(p))
    axis = np.abs(d).argmax(1)
    step = np.linalg.norm(direction, axis=1) / np.abs(d[ray, axis])
    plane = np.arange(n.max(), dtype=np.int32)
    t = (plane - p[ray, axis, None]) / d[ray, axis, None]
    column = plane * stride.astype(np.int32)[axis, None]
    inside = plane < n[axis, None]
    corners = [(column, step.astype(dtype)[:, None], inside)]
    for turn in range(1, len(n)):
        other = (axis + turn) % len(n)
        u = p[ray, other, None] + t * d[ray, other, None]
        low = np.floor(u)
        high_weight = (u - low).astype(dtype)
        low = low.astype(np.int32)
        many, far = n[other, None], stride.astype(np.int32)[other, None]
        neighbours = [(low, 1 - high_weight), (low + 1, high_weight)]
        corners = [
            (
                column + index * far,
                value * weight,
                inside & (index >= 0) & (index < many) & (weight > 1e-9),
            )
            for column, value, inside in corners
            for index, weight in neighbours
        ]
    columns, values, insides = (
        np.stack(part, -1) for part in zip(*corners, strict=True)
    )
    return insides.sum((1, 2)), columns[insides], values[insides]


@lru_cache(maxsize=8)
def matrices(
    scan: Scan, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A and Aᵀ as CSR with 32-bit indices, shared by all equal scans.

    A matrix that takes long to build is kept on disk (`cache`) for the next process.
    """
    name = f"{scan.digest}-{str(dtype).removeprefix('torch.')}"
    rays, voxels = scan.size
    tensors = cache.load(name)
    if tensors is None:
        start = perf_counter()
        A = _matrix(scan, dtype)
        tensors = {
            f"{matrix}.{part}": torch.from_numpy(getattr(m, part))
            for matrix, m in (("A", A), ("At", A.T.tocsr()))
            for part in ("indptr", "indices", "data")
        }
        cache.store(name, tensors, seconds=perf_counter() - start)
    return (
        _to_torch(tensors, "A", (rays, voxels)).to(device),
        _to_torch(tensors, "At", (voxels, rays)).to(device),
    )


def multiply(M: Tensor, t: Tensor) -> Tensor:
    """M times each item of t, (items, columns of M), a few at once."""
    chunk = min(max(CHUNK_BYTES // (M.shape[1] * t.element_size()), 8), 16)
    parts = [M @ part.contiguous() for part in t.T.split(chunk, dim=1)]
    return torch.cat(parts, dim=1).T


def apply_in_blocks(scan: Scan, t: Tensor) -> Tensor:
    """A times each item of t, (items, voxels), from blocks built on the way."""
    columns = _columns(t)
    rows = [block @ columns for block in _blocks(scan, t.dtype)]
    return torch.from_numpy(np.concatenate(rows).T).to(t)


def adjoint_in_blocks(scan: Scan, t: Tensor) -> Tensor:
    """Aᵀ times each item of t, (items, rays), from blocks built on the way."""
    columns = _columns(t)
    total, start = np.zeros((scan.size[1], len(t)), columns.dtype), 0
    for block in _blocks(scan, t.dtype):
        end = start + block.shape[0]
        total += block.T @ columns[start:end]
        start = end
    return torch.from_numpy(total.T).to(t)


def _columns(t: Tensor) -> np.ndarray:
    return np.ascontiguousarray(t.detach().cpu().numpy().T)


def _matrix(scan: Scan, dtype: torch.dtype) -> Any:
    import scipy.sparse

    if scan.is_plain:
        return _csr(list(_parts(scan, dtype)), scan.size[1])
    # The product of all rays at once would first need their far larger matrix.
    blocks = list(_blocks(scan, dtype))
    _check_entries(sum(block.nnz for block in blocks))
    return scipy.sparse.vstack(blocks, "csr")


def _parts(scan: Scan, dtype: torch.dtype, together: int = 1) -> Iterator[Part]:
    """Rows of A in order, some at a time: multiples of ``together``."""
    kind = _kind(dtype)
    crossings = max(scan.shape) * 2 ** (len(scan.shape) - 1) * together
    for point, direction in scan.lines(together * max(1, CROSSINGS // crossings)):
        yield joseph(point, direction, scan.shape, scan.spacing, kind)


def _kind(dtype: torch.dtype) -> type[np.floating]:
    return np.float64 if dtype == torch.float64 else np.float32


def _blocks(scan: Scan, dtype: torch.dtype, together: int = 1) -> Iterator[Any]:
    """Rows of A in order, as many at a time as may be held: multiples of ``together``."""
    if not scan.is_plain:
        finer = _finer(scan, dtype) if scan.oversample > 1 else None
        for block in _blocks(scan.finer, dtype, scan.rays):
            rows = _means(block, scan.rays) if scan.rays > 1 else block
            yield rows if finer is None else rows @ finer
        return
    held: list[Part] = []
    entries = 0
    for part in _parts(scan, dtype, together):
        held.append(part)
        entries += len(part[1])
        if entries > ENTRIES:
            yield _csr(held, scan.size[1])
            held, entries = [], 0
    if held:
        yield _csr(held, scan.size[1])


def _means(rows: Any, together: int) -> Any:
    """Of neighbouring rows, so many each."""
    import scipy.sparse

    each = np.full((1, together), 1 / together, rows.dtype)
    elements = scipy.sparse.identity(rows.shape[0] // together, rows.dtype)
    return scipy.sparse.kron(elements, each, "csr") @ rows


def _finer(scan: Scan, dtype: torch.dtype) -> Any:
    """`finer_pixels` of a scan's image, as a sparse matrix."""
    import scipy.sparse

    h, w = scan.shape
    pixels = finer_pixels((h, w), scan.oversample)
    rows, columns = (
        scipy.sparse.csr_matrix(m.numpy().astype(_kind(dtype)))
        for m in (pixels.rows, pixels.columns)
    )
    return scipy.sparse.kron(rows, columns, "csr")


def _csr(parts: list[Part], voxels: int) -> Any:
    import scipy.sparse

    counts, columns, values = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    _check_entries(int(counts.sum()))
    indptr = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    return scipy.sparse.csr_matrix(
        (values, columns, indptr), shape=(len(counts), voxels)
    )


def _check_entries(total: int) -> None:
    if total >= 2**31:
        raise ValueError(
            f"the matrix has {total:.3g} entries, too many for its 32-bit indices: "
            "use backend='matrix-free' or 'astra'"
        )


def _to_torch(tensors: dict[str, Tensor], name: str, size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # torch calls its CSR layout a beta feature
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        return torch.sparse_csr_tensor(
            tensors[f"{name}.indptr"],
            tensors[f"{name}.indices"],
            tensors[f"{name}.data"],
            size=size,
            check_invariants=False,
        )
