"""Stacks of slices as one volume: its prior, its memory, its processes."""

import dataclasses
import os
from collections.abc import Sequence

import torch
import typer

from invsolve import operators as ops, priors
from invsolve.planes import PLANES
from invsolve.priors.slices import OfSlices
from invsolve.priors.weights import read_card
from invsolve.problem import InverseProblem
from invsolve.shards import Shard
from invsolve.solve import Solution
from invsolve.volumes import free_memory, memory_plan

from .loading import as_equivariant, load_prior

AS_VOLUMES = ("pnp", "red")
"""Samplers of slices that solve a volume in the memory that `memory_plan` tells of."""


def of_volumes(
    name: str, where: torch.device, *, equivariant: bool
) -> tuple[priors.Prior, list[OfSlices]]:
    """The prior of volumes that a prior of slices makes, as its card says, and its parts.

    Args:
        name: of the prior of slices, of so many neighbours, or of a slice among them.
        where: to compute.
        equivariant: whether mirror images and shifts are as likely.

    Raises:
        ValueError: the prior, or the one that its card names, cannot be used.
    """
    inner, card = load_prior(name), read_card(name)[0]
    inner = as_equivariant(name, inner) if equivariant else inner
    together, axis = int(card.get("neighbours", 1)), PLANES[card.get("plane", "axial")]
    if together == 1:
        slices: OfSlices = priors.Slices(inner, axis, device=where)
    elif card.get("network", {}).get("condition"):
        slices = priors.Sliding(inner, together, axis, device=where)
    else:
        slices = priors.Groups(inner, together, axis=axis, device=where)
    if (below := card.get("below")) is None:
        return slices, [slices]
    low = load_prior(below["prior"])
    low = as_equivariant(below["prior"], low) if equivariant else low
    alone = priors.Slices(low, axis, device=where)
    at = below["sigma"] * slices.normalised[1].scale
    return priors.Experts(alone, slices, at), [alone, slices]


def as_volume(
    problem: InverseProblem,
    prior: priors.Prior,
    parts: Sequence[OfSlices],
    where: torch.device,
    shard: Shard,
    *,
    begun: bool,
) -> tuple[InverseProblem, torch.device]:
    """The stack as one volume, and where to hold it: with the network if it fits there.

    Args:
        problem: of slices.
        prior: of volumes.
        parts: all that it is made of.
        where: to compute.
        shard: which of the slices this process holds.
        begun: whether the solve begins with a volume that is given.

    Raises:
        ValueError: it fits nowhere, there are too few slices, or processes that hold
            some each cannot ask the prior.
    """
    A = ops.SliceWise(problem.linear, shard.size)
    volume = InverseProblem(shard.cut(problem.y[None], dim=1), A, problem.noise)
    shard.check(prior)
    plan, cpu = memory_plan(volume, *parts, begun=begun), torch.device("cpu")
    home = where
    if where.type == "cpu":
        plan.check(free_memory(cpu))
    elif plan.host + plan.network > free_memory(where):
        plan.check(free_memory(cpu), free_memory(where))
        home = cpu
    if shard.rank == 0:
        each = f" in each of {shard.count} processes" if shard.count > 1 else ""
        typer.echo(f"memory: {plan}{each}", err=True)
    return volume, home


def meet(where: torch.device, depth: int) -> tuple[torch.device, Shard]:
    """Meet the other processes of ``torchrun``: this one's device, and its slices."""
    backend = "gloo"
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    rank, count = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    shard = Shard(depth, rank, count)  # refused before anyone waits for anyone
    torch.distributed.init_process_group(backend)
    return where, shard


def slice_by_slice(solution: Solution) -> Solution:
    """A volume's samples as those of its slices, which is how images are shown."""
    samples = solution.samples[:, 0].movedim(2, 1)
    s, depth = solution.stats, samples.shape[1]
    stats = dataclasses.replace(
        s,
        network_forwards=depth * s.network_forwards,
        operator_applies=depth * s.operator_applies,
        operator_adjoints=depth * s.operator_adjoints,
    )
    return dataclasses.replace(solution, samples=samples, stats=stats)
