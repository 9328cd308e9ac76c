"""What a solve of volumes will take, told before it begins."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .priors import Prior
from .priors.slices import OfSlices
from .problem import InverseProblem

VOLUMES = 6
"""What `samplers.dds3d` and ``mbir`` hold at once: the iterate, the splitting, the clean
volume, and three of conjugate gradients."""

MEASUREMENTS = 6
"""The measurements, their weights, and what is computed of them."""


@final
@dataclass(frozen=True)
class MemoryPlan:
    """Memory that a solve of volumes takes, in bytes.

    Attributes:
        host: where the volume lies: 6 volumes, one more where a solve begins with one,
            and 6 sets of measurements.
        network: where the network computes: its weights, and so much for each slice of
            a chunk; the same for any depth.
        slice: of that for one slice.
        chunk: how many slices go through the network at once.
    """

    host: int
    network: int
    slice: int
    chunk: int

    def __str__(self) -> str:
        return (
            f"{_size(self.host)} for the volume, {_size(self.network)} for the network "
            f"({self.chunk} slices at once)"
        )

    def check(self, host_free: int, network_free: int | None = None) -> None:
        """Refuse what does not fit, with the remedy.

        Args:
            host_free: bytes free where the volume lies.
            network_free: bytes free where the network computes, if that is elsewhere.

        Raises:
            ValueError: it does not fit.
        """
        here = self.network if network_free is None else 0
        room = host_free - self.host if network_free is None else network_free
        if self.host > host_free:
            raise ValueError(
                f"the volume needs {_size(self.host)}, but {_size(host_free)} are free: "
                "solve for fewer slices at a time, or on a coarser grid"
            )
        if self.network > room:
            fits = self.chunk - -(-(self.network - room) // self.slice)
            remedy = (
                f"give Slices(…, chunk={fits})" if fits > 0 else "use a smaller network"
            )
            raise ValueError(
                f"{self.chunk} slices at once need {_size(self.host + here)} with the "
                f"network, but {_size(host_free)} are free: {remedy}"
                if network_free is None
                else f"{self.chunk} slices at once need {_size(self.network)} for the "
                f"network, but {_size(network_free)} are free: {remedy}"
            )


def memory_plan(
    problem: InverseProblem, *parts: OfSlices, begun: bool = False
) -> MemoryPlan:
    """What a volume takes by `dds3d`, ``mbir``, ``pnp`` or ``red``; slices are denoised.

    What the operator holds for itself (a matrix, the slices that it works on) is not in
    it: `RayTransform.matrix_bytes` tells of the matrix.

    Args:
        problem: of volumes.
        parts: of the prior, each asked in its chunks, one at a time.
        begun: whether it begins with a volume that is given.
    """
    one = problem.items(torch.tensor([0]))
    like, y = one.linear.image_like(one.y), one.y
    each = [one_slice(part, like) for part in parts]
    most = max(range(len(parts)), key=lambda k: parts[k].chunk * each[k])
    weights = sum(
        t.numel() * t.element_size() for part in parts for t in _held(part.inner)
    )
    return MemoryPlan(
        host=(VOLUMES + begun) * _bytes(like) + MEASUREMENTS * _bytes(y),
        network=weights + parts[most].chunk * each[most],
        slice=each[most],
        chunk=parts[most].chunk,
    )


def one_slice(part: OfSlices, like: Tensor) -> int:
    """Bytes that the network takes for one image of its chunk, of a volume like this."""
    part.check(tuple(like.shape[1:]))
    seen = part.slice_shape(tuple(like.shape[1:]))
    one = torch.zeros(1, *seen, dtype=like.dtype, device=part.device or like.device)
    level = one.new_tensor(part.inner.sigma_max)
    with torch.no_grad():
        return peak_bytes(lambda: part.inner.denoise(one, level))


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; for a CPU what Linux says is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    raise ValueError("this system does not tell how much memory is free")


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made during a call hold at once, on any device."""
    with _Live() as live:
        run()
    return live.peak


@final
class _Live(TorchDispatchMode):
    """Follows the storages that operations make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {s for t in tree_leaves((args, kwargs)) for s in _storage(t)}
        out = func(*args, **kwargs)
        self.held = {k: v for k, v in self.held.items() if not v[0].expired()}
        for tensor in tree_leaves(out):
            for key in _storage(tensor) - given - set(self.held):
                storage = tensor.untyped_storage()
                self.held[key] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


def _storage(value: Any) -> set[int]:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return set()
    return {value.untyped_storage()._cdata}


def _bytes(t: Tensor) -> int:
    return prod(t.shape) * t.element_size()


def _held(prior: Prior) -> list[Tensor]:
    """The weights of a prior's network, and of the priors in it."""
    found: list[Tensor] = []
    for value in vars(prior).values():
        if isinstance(value, torch.nn.Module):
            found += [*value.parameters(), *value.buffers()]
        elif isinstance(value, Prior):
            found += _held(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def _size(size: int) -> str:
    if size < 2**30:
        return f"{size / 2**20:.3g} MiB"
    return f"{size / 2**30:.3g} GiB"
