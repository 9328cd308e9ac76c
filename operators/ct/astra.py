"""Projections by ASTRA (van Aarle et al. 2016), the only place that imports it.

ASTRA's rows count downwards against its y in two dimensions, and upwards with its y in
three: each has vectors of its own here.
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from .rays import Scan


def has_cuda() -> bool:
    """Whether ASTRA is there and finds a GPU at run time.

    Without a driver its CUDA calls end the process, or leave their output as it was, so
    that none may be made unless this is true.
    """
    try:
        import astra
    except ImportError:
        return False
    return bool(astra.use_cuda())


def project(scan: Scan, items: Tensor, *, forward: bool) -> Tensor:
    """A, or Aᵀ up to ASTRA's model, of each item where it lies, in float32.

    Args:
        scan: its detector must be flat.
        items: (items, *image) or (items, *measurements), contiguous or not.
        forward: whether A.
    """
    on_gpu = items.is_cuda and has_cuda()
    if len(scan.shape) == 3 and not on_gpu:
        raise ValueError(
            "ASTRA projects cone beams on a GPU only: use backend='auto' or 'matrix'"
        )
    given = items.to(torch.float32)
    if on_gpu and scan.is_parallel:  # all slices are one volume, all rows one detector
        return _run(scan, given[None].contiguous(), len(items), forward)[0]
    if len(scan.shape) == 3:  # ASTRA has the detector's rows first, then the views
        given = (given if forward else given.transpose(1, 2)).contiguous()
        out = _run(scan, given, 0, forward)
        return out.transpose(1, 2) if forward else out
    return _run(scan, given.contiguous(), 0, forward)


def _run(scan: Scan, given: Tensor, slices: int, forward: bool) -> Tensor:
    """Each item by one call; on a GPU neither given nor made leaves it."""
    device = given.device
    if len(scan.shape) == 3:
        views, (rows, columns) = len(scan.angles), scan.detectors
        shape = (rows, views, columns) if forward else scan.shape
    else:
        shape = (len(scan.angles), *scan.detectors) if forward else scan.shape
        shape = (slices, *shape) if slices else shape
    # What a failed call leaves behind shall be seen.
    out = torch.full((len(given), *shape), torch.nan, device=device)
    with torch.cuda.device(device) if given.is_cuda else nullcontext():
        if given.is_cuda:
            _import_astra().set_gpu_index(device.index)
            # ASTRA works in a stream of its own, and waits for it before it returns.
            torch.cuda.current_stream(device).synchronize()
        projector = _projector(scan, slices, device.index)
        module = projector.module
        call = module.direct_FP if forward else module.direct_BP
        for source, target in zip(given, out, strict=True):
            if given.is_cuda:
                call(projector.id, source, out=target)
            else:
                call(projector.id, source.numpy(), out=target.numpy())
    return out


class _Projector:
    """An ASTRA projector that is deleted with the last reference to it."""

    def __init__(
        self, module: Any, kind: str, volume: dict[str, Any], beams: dict[str, Any]
    ) -> None:
        self.module = module
        self.id = module.create(
            {"type": kind, "VolumeGeometry": volume, "ProjectionGeometry": beams}
        )
        finalize(self, module.delete, self.id)


@lru_cache(maxsize=16)
def _projector(scan: Scan, slices: int, gpu: int | None) -> _Projector:
    """On a GPU, or by the model nearest to Joseph's that ASTRA has on a CPU.

    Args:
        scan: its detector is flat.
        slices: of a stack that is projected as one volume; 0 if it is not.
        gpu: the number of the device; None for the CPU.
    """
    astra = _import_astra()
    (h, w), (y, x), columns = scan.shape[-2:], scan.spacing[-2:], scan.detectors[-1]
    if len(scan.shape) == 2 and not slices:
        volume = astra.create_vol_geom(h, w, *_box((x, w), (y, h)))
        beam = "parallel_vec" if scan.is_parallel else "fanflat_vec"
        beams = astra.create_proj_geom(beam, columns, vectors_2d(scan))
        on_cpu = "linear" if scan.is_parallel else "line_fanflat"
        kind = on_cpu if gpu is None else "cuda"
        return _Projector(astra.projector, kind, volume, beams)
    d, z, rows = slices, 1.0, slices
    if not slices:
        d, z, rows = scan.shape[0], scan.spacing[0], scan.detectors[0]
    volume = astra.create_vol_geom(h, w, d, *_box((x, w), (y, h), (z, d)))
    beam = "parallel3d_vec" if scan.is_parallel else "cone_vec"
    beams = astra.create_proj_geom(beam, rows, columns, vectors_3d(scan))
    return _Projector(astra.projector3d, "cuda3d", volume, beams)


def _box(*sides: tuple[float, int]) -> list[float]:
    """From where to where an image around 0 reaches, for each (spacing, count)."""
    return [half * mm * n / 2 for mm, n in sides for half in (-1, 1)]


def vectors_2d(scan: Scan) -> np.ndarray:
    """(views, 6): the ray or the source, the detector's centre, and a step along it.

    In (x, y), with y up.
    """
    parts = _in_plane(scan)
    return np.concatenate([part[:, ::-1] * [1, -1] for part in parts], axis=1)


def vectors_3d(scan: Scan) -> np.ndarray:
    """(views, 12): as in 2D, then a step along the detector's rows.

    In (x, y, z), with y down, so that rows count upwards with it. A slice of a 2D scan
    is 1 mm thick.
    """
    heights = np.zeros((len(scan.angles), 3, 1))
    step = 1.0
    if len(scan.shape) == 3:
        z, step = scan.heights(), scan.pitch[0]
        heights[:, 0, 0], heights[:, 1, 0] = z, z + scan.offset[0]
    parts = np.stack([part[:, ::-1] for part in _in_plane(scan)], axis=1)
    table = np.concatenate([parts, heights], axis=2).reshape(-1, 9)
    upwards = np.broadcast_to([0, 0, step], (len(table), 3))
    return np.concatenate([table, upwards], axis=1)


def _in_plane(scan: Scan) -> list[np.ndarray]:
    along, across = scan.frames()
    centre, step = scan.offset[-1] * across, scan.pitch[-1] * across
    if scan.is_parallel:
        return [along, centre, step]
    source = -scan.source_to_axis * along
    return [source, source + scan.source_to_detector * along + centre, step]


def _import_astra() -> Any:
    try:
        import astra
    except ImportError as error:
        raise ModuleNotFoundError(
            "backend='astra' needs ASTRA: pip install 'invsolve[ct]'"
        ) from error
    return astra
