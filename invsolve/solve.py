"""From a problem, a prior and a sampler to a solution."""

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from .counting import CountedPrior, Tally, counted, peak_memory
from .priors import AffineMap, Prior
from .problem import InverseProblem
from .random import spawn
from .samplers import Kind


@final
@dataclass(frozen=True)
class Stats:
    """What a solution cost, in images through the network and through the operator.

    Attributes:
        network_forwards, network_backwards: a batch of 8 counts as 8.
        operator_applies, operator_adjoints: likewise, inside conjugate gradients too.
        closed_forms: uses of a ``pinv`` or ``prox`` that the operator has a formula for.
        seconds: of the wall clock.
        peak_bytes: of CUDA's allocator, or of the whole process on a CPU.
    """

    network_forwards: int
    network_backwards: int
    operator_applies: int
    operator_adjoints: int
    closed_forms: int
    seconds: float
    peak_bytes: int


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """Samples of x given y.

    Attributes:
        samples: (samples, batch, channels, *space), in the image's own unit.
        kind: what they are. Only the spread of a ``posterior_sample`` says anything of
            the uncertainty.
        sampler: its name.
        stats: what they cost.
    """

    samples: Float[Tensor, "samples batch *image"]
    kind: Kind
    sampler: str
    stats: Stats

    @property
    def mean(self) -> Tensor:
        """(batch, channels, *space): the mean over samples."""
        return self.samples.mean(0)

    @property
    def std(self) -> Tensor:
        """(batch, channels, *space): the spread over samples; NaN if there is but one."""
        if len(self.samples) == 1:
            return torch.full_like(self.samples[0], torch.nan)
        return self.samples.std(0)


def solve(
    problem: InverseProblem,
    prior: Prior | None,
    sampler: Callable[..., Tensor],
    *,
    samples: int = 1,
    generator: Generator,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
    **options: Any,
) -> Solution:
    """Draw ``samples`` images for each item of the measurements.

    The sampler works in the prior's range, where its step sizes and weights mean what
    they do in its paper; the solution is back in the image's unit. Each sample of each
    item has a random stream of its own, so that nothing depends on the chunks.

    Args:
        problem: what was measured, and how.
        prior: the denoiser; None for a method that needs none (``fbp``, ``tv``).
        sampler: one of `invsolve.samplers`, or any function like them.
        samples: how many for each item.
        generator: where every random number comes from.
        chunk: how many images go through the network at once. Unless given: 16 on a
            CPU, all on a GPU; halved whenever memory runs out.
        device: where to compute; where the measurements are unless given.
        progress: wraps the sampler's loop, as ``tqdm`` does.
        **options: the sampler's own; a misspelt one is a TypeError. An image as
            ``init`` is in the image's own unit, one for each item.

    Raises:
        ValueError: the prior cannot take the problem's images, ``init`` is not one
            image for each item, or the result is not finite.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    device = torch.device(device) if device is not None else problem.y.device
    tally, clock = Tally(), time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    local = problem.to(device)
    init = options.get("init")
    if isinstance(init, Tensor) and len(init) != len(problem.y):
        raise ValueError(
            f"init has {len(init)} images for {len(problem.y)} measurements: give one "
            "for each"
        )
    if prior is not None:
        given = isinstance(init, Tensor)
        like = init if given else local.operator.image_like(local.y[:1])
        prior.check(tuple(like.shape[1:]))
    map = AffineMap(1.0, 0.0)
    inner = prior
    if prior is not None:
        inner, map = CountedPrior(prior.to(device), tally).normalised
    local = InverseProblem(local.y, counted(local.operator, tally), local.noise)
    local = local.seen_through(map)

    items = torch.arange(len(problem.y)).repeat(samples)
    streams = spawn(generator, len(items))
    size = chunk or (len(items) if device.type == "cuda" else min(16, len(items)))
    done: list[Tensor] = []
    at = 0
    while at < len(items):
        now = slice(at, at + size)
        states = [g.get_state() for g in streams[now]]
        if isinstance(init, Tensor):
            options["init"] = map.inverse(init[items[now].to(init.device)].to(device))
        try:
            u = sampler(
                local.items(items[now]),
                inner,
                generator=streams[now],
                progress=progress or iter,
                **options,
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if size == 1 or not _out_of_memory(error):
                raise
            for g, state in zip(streams[now], states, strict=True):
                g.set_state(state)
            size = (size + 1) // 2
            continue
        done.append(map(u).to(problem.y.device))
        at += len(u)
    result = torch.cat(done)
    name, kind = _name_and_kind(sampler)
    if not result.isfinite().all():
        raise ValueError(
            f"{name} diverged (its result is not finite): lower its step size, or give "
            "more steps"
        )
    stats = Stats(
        tally.forwards,
        tally.backwards,
        tally.applies,
        tally.adjoints,
        tally.closed_forms,
        time.perf_counter() - clock,
        peak_memory(device),
    )
    stacked = result.reshape(samples, len(problem.y), *result.shape[1:])
    return Solution(stacked, kind, name, stats)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(
        error
    )


def _name_and_kind(sampler: Callable[..., Tensor]) -> tuple[str, Kind]:
    while isinstance(sampler, functools.partial):
        sampler = sampler.func
    name = getattr(sampler, "__name__", type(sampler).__name__)
    return name, getattr(sampler, "kind", "steered")
