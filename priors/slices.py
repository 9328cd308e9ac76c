"""Volumes by priors of slices: what lets every sampler see one more dimension.

A volume is (batch, channels, d, h, w), d slices of (h, w). Each slice goes through the
network alone, so that neighbours agree only as far as the data make them: what couples
them is `Sliding`, `Groups`, `TwoPlanes`, or the data step of `invsolve.samplers.dds3d` and
``mbir``.
"""

import copy
import math
from abc import abstractmethod
from itertools import pairwise
from typing import final

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from invsolve.shapes import Sigma, X

from .base import AffineMap, Prior
from .experts import same_range
from .info import Info

AXES = ("d", "h", "w")


class OfSlices(Prior):
    """What priors of volumes made of priors of slices share.

    Attributes:
        inner: the prior of slices.
        axis: which of (d, h, w) is cut across: 0 gives slices (h, w), 1 (d, w) and
            2 (d, h); axial, coronal and sagittal ones where d runs along the body.
        chunk: how many images go through the network at once. The memory that the
            network takes depends on it and not on the volume.
        device: where the network computes; with the volume unless given. Volumes too
            large for a GPU stay on the host, and their slices come and go.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, inner: Prior, axis: int, chunk: int, device: torch.device | str | None
    ) -> None:
        if axis not in (0, 1, 2):
            raise ValueError(f"axis is 0, 1 or 2 of a volume's (d, h, w), got {axis}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.device = None if device is None else torch.device(device)
        self.inner = inner if self.device is None else inner.to(self.device)
        self.axis, self.chunk = axis, chunk
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    @abstractmethod
    def slice_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What the network sees of a volume (channels, d, h, w) at once."""

    def through(self, slices: Tensor, sigma: Tensor) -> Tensor:
        """The network's answer, where it computes."""
        if self.device is None:
            return self.inner.denoise(slices, sigma)
        return self.inner.denoise(slices.to(self.device), sigma.to(self.device))

    @property
    def info(self) -> Info:
        return self.inner.info

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        made = copy.copy(self)
        made.inner, map = self.inner.normalised
        made.sigma_min, made.sigma_max = made.inner.sigma_min, made.inner.sigma_max
        return made, map

    def to(self, device: torch.device) -> Prior:
        return self if self.device is not None else super().to(device)


@final
class Slices(OfSlices):
    """D(x; σ)_k = D₂(x_k; σ), with x_k the slices of a volume across one axis.

    Args:
        inner: the prior of slices, (channels, a, b).
        axis, chunk, device: of `OfSlices`.
        spread: share the slices among the processes of `torch.distributed`, each of
            which calls `solve` alike, say under ``torchrun``. The network's passes, which
            are nearly all of the time, go side by side; each process holds the volume and
            takes the data's steps itself, so that nothing else need be exchanged and the
            result is one process's.

    Raises:
        ValueError: a number is out of range, or no process group was made.
    """

    def __init__(
        self,
        inner: Prior,
        axis: int = 0,
        chunk: int = 16,
        device: torch.device | str | None = None,
        *,
        spread: bool = False,
    ) -> None:
        super().__init__(inner, axis, chunk, device)
        if spread and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "spread needs a process group: start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self.spread = spread

    def denoise(self, x: X, sigma: Sigma) -> X:
        cut = 2 + self.axis
        levels = sigma.expand(len(x)).repeat_interleave(x.shape[cut])
        flat = x.movedim(cut, 1).flatten(0, 1)  # a view for one volume cut across d
        out = torch.empty_like(flat, memory_format=torch.contiguous_format)
        count, mine = (
            (dist.get_world_size(), dist.get_rank()) if self.spread else (1, 0)
        )
        shares = [len(flat) * k // count for k in range(count + 1)]
        first, last = shares[mine : mine + 2]
        for at in range(first, last, self.chunk):
            now = slice(at, min(at + self.chunk, last))
            out[now] = self.through(flat[now], levels[now]).to(x.device)
        if count > 1:
            for owner, (first, last) in enumerate(pairwise(shares)):
                dist.broadcast(out[first:last], owner)
        return out.unflatten(0, (len(x), -1)).movedim(1, cut)

    def slice_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, *space = shape
        del space[self.axis]
        return (channels, *space)

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4:
            raise ValueError(
                f"Slices is a prior of volumes (channels, d, h, w), got images of "
                f"{tuple(shape)}: give the prior of slices itself"
            )
        try:
            self.inner.check(self.slice_shape(shape))
        except ValueError as error:
            raise ValueError(f"slices across {AXES[self.axis]}: {error}") from error


class OfNeighbours(OfSlices):
    """What priors of volumes share whose inner prior sees ``size`` slices as channels."""

    size: int
    seen: str = "slices"
    """What it cuts a volume into, as its errors call it."""

    def slice_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        space = list(shape[1:])
        del space[self.axis]
        return (self.size, *space)

    def check_depth(self, shape: tuple[int, ...], least: int, needs: str) -> None:
        """Refuse what is no volume, has too few slices, or the inner prior cannot take."""
        name = type(self).__name__
        if len(shape) != 4 or shape[0] != 1:
            raise ValueError(
                f"{name} is a prior of volumes (1, d, h, w), got images of {tuple(shape)}"
            )
        if (depth := shape[1 + self.axis]) < least:
            raise ValueError(
                f"{needs}, the volume has {depth}: use Slices, or more of them"
            )
        try:
            self.inner.check(self.slice_shape(shape))
        except ValueError as error:
            raise ValueError(
                f"{self.seen} across {AXES[self.axis]}: {error}"
            ) from error


@final
class Groups(OfNeighbours):
    """D(x; σ)_G = D_k(x_G; σ), with G the groups of k slices that a volume is divided into.

    Song, Hu, Luo, Fessler, Shen, "DiffusionBlend: Learning 3D Image Prior through
    Position-aware Diffusion Score Blending for 3D Computed Tomography Reconstruction",
    NeurIPS 2024. Every noise level divides the volume anew, by its own offset, so that
    over a solve each slice is denoised with all of its neighbours. The offset follows
    from σ alone, so that a solve that was cut goes on as it would have. Where groups do
    not fill the volume, one more at that end overlaps its neighbour; they are averaged.

    Args:
        inner: the prior of k slices as the channels of an image, (k, a, b), such as
            ``[data] neighbours = 3`` trains.
        size: k.
        spacing: of the slices of a group. `TwoPlanes` of ``Groups(near, spacing=1)`` and
            ``Groups(far, spacing=3)``, ``drawn``, is DiffusionBlend++.
        axis, chunk, device: of `OfSlices`; a chunk is of so many groups.

    Raises:
        ValueError: a number is out of range.
    """

    seen = "groups"

    def __init__(
        self,
        inner: Prior,
        size: int = 3,
        spacing: int = 1,
        axis: int = 0,
        chunk: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(inner, axis, chunk, device)
        for name, value in (("size", size), ("spacing", spacing)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.size, self.spacing = size, spacing

    def denoise(self, x: X, sigma: Sigma) -> X:
        if sigma.ndim:
            items = zip(x.split(1), sigma, strict=True)
            return torch.cat([self.denoise(item, level) for item, level in items])
        cut = 2 + self.axis
        stack = x[:, 0].movedim(cut - 1, 1)  # (batch, slices, a, b)
        groups = self.groups(stack.shape[1], sigma).to(x.device)
        out, times = torch.zeros_like(stack), stack.new_zeros(stack.shape[1])
        for some in groups.split(self.chunk):
            shown = stack[:, some].flatten(0, 1)
            done = self.through(shown, sigma).to(x.device).unflatten(0, (len(x), -1))
            out = out.index_add(1, some.flatten(), done.flatten(1, 2))
            times.index_add_(0, some.flatten(), times.new_ones(some.numel()))
        return (out / times[:, None, None]).movedim(1, cut - 1)[:, None]

    def groups(self, depth: int, sigma: Sigma) -> Int[Tensor, "groups size"]:
        """Which slices go together at a level: all of them, each once but at the ends."""
        block = self.size * self.spacing
        # As `TwoPlanes` draws, by other digits.
        offset = int(3777 * abs(math.log(float(sigma))) % 1 * block)
        starts = list(range(offset, depth - block + 1, block))
        last = starts[-1] + block if starts else 0
        starts += [0] * (offset > 0) + [depth - block] * (last < depth)
        within = torch.arange(block).reshape(self.size, self.spacing).T
        return (torch.tensor(sorted(set(starts)))[:, None, None] + within).flatten(0, 1)

    def check(self, shape: tuple[int, ...]) -> None:
        block = self.size * self.spacing
        self.check_depth(
            shape,
            block,
            f"groups of {self.size} slices, {self.spacing} apart, need {block} slices",
        )


@final
class Sliding(OfNeighbours):
    """D(x; σ)_k = D_n(x_{k−m} … x_{k+m}; σ)_m, with n = 2m + 1: each slice among its own.

    E[x_k | slices k−m … k+m of x], where `Slices` has E[x_k | slice k]: nearer to the
    volume's own mean, in as many passes. (It is the answer for windows of a volume, and not
    of one density of volumes; `Groups`, in an n-th of the passes, is of one, but leaves
    each slice but one of a group at its edge.) At both ends the window is mirrored.

    Args:
        inner: a prior of n slices as the channels of an image, (n, a, b), of which the
            middle one is asked: one of all of them, as `Groups` takes, or one that knows
            of the middle alone (``[network] condition`` of ``[data] neighbours``).
        size: n, odd.
        axis, chunk, device: of `OfSlices`.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        inner: Prior,
        size: int = 3,
        axis: int = 0,
        chunk: int = 16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(inner, axis, chunk, device)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd, for there to be a middle, got {size}")
        self.size = size

    def denoise(self, x: X, sigma: Sigma) -> X:
        cut = 2 + self.axis
        stack = x[:, 0].movedim(cut - 1, 1)  # (batch, slices, a, b)
        windows, out = self.windows(stack.shape[1]).to(x.device), []
        for item, level in zip(stack, sigma.expand(len(x)), strict=True):
            seen = (self.through(item[w], level) for w in windows.split(self.chunk))
            out.append(torch.cat([s[:, self.size // 2].to(x.device) for s in seen]))
        return torch.stack(out).movedim(1, cut - 1)[:, None]

    def windows(self, depth: int) -> Int[Tensor, "slices size"]:
        """Which slices are seen beside each."""
        reach = torch.arange(self.size) - self.size // 2
        seen = (torch.arange(depth)[:, None] + reach).abs()
        return depth - 1 - (depth - 1 - seen).abs()

    def check(self, shape: tuple[int, ...]) -> None:
        least = self.size // 2 + 1
        self.check_depth(
            shape, least, f"windows of {self.size} slices need at least {least}"
        )


@final
class TwoPlanes(Prior):
    """p(x) ∝ p₁(x)^(1−β) p₂(x)^β, of priors of slices in two perpendicular planes.

    Its score is (1−β) s₁ + β s₂, and so D = (1−β) D₁ + β D₂: two passes. With ``drawn``
    each noise level asks one of the two only, the second with probability β, as Lee et
    al. do with a non-integer K = 1/β ("Improving 3D Imaging with Pre-Trained
    Perpendicular 2D Diffusion Models", ICCV 2023): one pass. Which it is follows from σ
    alone, so that a solve that was cut goes on as it would have.

    Args:
        first, second: priors of volumes in one unit, such as `Slices` across two axes.
        share: β.
        drawn: ask one of the two at each level.
    """

    def __init__(
        self, first: Prior, second: Prior, share: float = 0.5, *, drawn: bool = False
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {share}")
        same_range(first, second)
        self.first, self.second = first, second
        self.share, self.drawn = share, drawn
        self.sigma_min = max(first.sigma_min, second.sigma_min)
        self.sigma_max = min(first.sigma_max, second.sigma_max)

    def denoise(self, x: X, sigma: Sigma) -> X:
        if not self.drawn:
            D1, D2 = self.first.denoise(x, sigma), self.second.denoise(x, sigma)
            return D1.lerp(D2, self.share)
        if sigma.ndim:
            items = zip(x.split(1), sigma, strict=True)
            return torch.cat([self.denoise(item, level) for item, level in items])
        # Digits of ln σ that no schedule arranges: as good as drawn, and known again.
        uniform = 1e4 * abs(math.log(float(sigma))) % 1
        chosen = self.second if uniform < self.share else self.first
        return chosen.denoise(x, sigma)

    @property
    def info(self) -> Info:
        return self.first.info

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        made = copy.copy(self)
        made.first, map = self.first.normalised
        made.second, _ = self.second.normalised
        made.sigma_min, made.sigma_max = (
            level / map.scale for level in (self.sigma_min, self.sigma_max)
        )
        return made, map

    def check(self, shape: tuple[int, ...]) -> None:
        self.first.check(shape)
        self.second.check(shape)
