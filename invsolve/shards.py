"""A volume divided among processes: what couples its slices passes between neighbours.

`torch.distributed` carries it: start with ``torchrun``, and make its process group.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from .priors import Prior
from .priors.slices import OfSlices, Slices


@final
@dataclass(frozen=True)
class Shard:
    """One of several processes' slices of a volume: ``first`` … ``last`` − 1.

    Args:
        depth: of the whole volume.
        rank: which process; the first holds the first slices.
        count: how many processes there are.

    Raises:
        ValueError: there are more processes than slices, or no such process.
    """

    depth: int
    rank: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise ValueError(f"rank must be 0 to {self.count - 1}, got {self.rank}")
        if self.count > self.depth:
            raise ValueError(
                f"{self.count} processes cannot share {self.depth} slices: start fewer"
            )

    @classmethod
    def here(cls, depth: int) -> "Shard":
        """This process's, or a ValueError where no process group was made."""
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "a shard is one process's of several: start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        return cls(depth, dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> int:
        """Of its slices."""
        return self.depth * self.rank // self.count

    @property
    def last(self) -> int:
        """One after the last of its slices."""
        return self.depth * (self.rank + 1) // self.count

    @property
    def size(self) -> int:
        """How many slices it holds."""
        return self.last - self.first

    def cut(self, whole: Tensor, dim: int = 2) -> Tensor:
        """Its part of a volume, or of what has a row for each slice along ``dim``."""
        if whole.shape[dim] != self.depth:
            raise ValueError(
                f"of {self.depth} slices expected along dim {dim}, got "
                f"{tuple(whole.shape)}"
            )
        return whole.narrow(dim, self.first, self.size)

    def gather(self, part: Tensor, dim: int = 2) -> Tensor:
        """The whole, in every process, of the parts that they hold."""
        shape = list(part.shape)
        shape[dim] = self.depth
        whole = part.new_zeros(shape)
        self.cut(whole, dim).copy_(part)
        return self.sum(whole)

    def sum(self, value: Tensor) -> Tensor:
        """Over all processes, in each."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def most(self, value: Tensor) -> Tensor:
        """The largest of all processes', in each."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def passed(self, value: Tensor, by: int, ring: bool) -> Tensor | None:
        """What the process ``by`` ranks before this one gave as ``value``.

        Args:
            value: of one shape in all of them.
            by: 1 hands on to the next process, −1 back to the one before.
            ring: whether the first process follows the last.

        Returns:
            None where there is no such process.
        """
        to, source = self.rank + by, self.rank - by
        if ring:
            to, source = to % self.count, source % self.count
        if to == source == self.rank:
            return value
        value = value.contiguous()
        came = torch.empty_like(value)
        both = [(dist.isend, value, to), (dist.irecv, came, source)]
        ops = [
            dist.P2POp(op, tensor, peer)
            for op, tensor, peer in both
            if 0 <= peer < self.count
        ]
        for request in dist.batch_isend_irecv(ops) if ops else []:
            request.wait()
        return came if 0 <= source < self.count else None

    def check(self, prior: Prior) -> None:
        """Refuse a prior whose answer for a slice asks others, which may lie elsewhere.

        Raises:
            ValueError: it is not ``Slices`` across the first axis.
        """
        if self.count == 1:
            return
        while not isinstance(prior, OfSlices) and hasattr(prior, "inner"):
            prior = vars(prior)["inner"]
        if not (isinstance(prior, Slices) and prior.axis == 0 and not prior.spread):
            raise ValueError(
                f"{self.count} processes each hold some slices, of which the prior must "
                "ask one at a time: give priors.Slices(prior), across axis 0 and not spread"
            )

    def _reduced(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.count > 1:
            dist.all_reduce(value := value.clone(), how)
        return value
