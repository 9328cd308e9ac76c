"""From a problem, a prior and a sampler to a solution."""

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from . import checkpoint as checkpoints
from .checkpoint import Keeper, fingerprint
from .counting import CountedPrior, Tally, counted, peak_memory
from .priors import AffineMap, Prior
from .priors.latent import LatentPrior
from .problem import InverseProblem
from .random import spawn
from .samplers import Kind
from .samplers.latents import codec, in_latents
from .speed import Precision, accelerated
from .trajectory import RecordedPrior, Recorder, Step, Watch, WatchedPrior


@final
@dataclass(frozen=True)
class Stats:
    """What a solution cost, in images through the network and through the operator.

    Attributes:
        network_forwards, network_backwards: a batch of 8 counts as 8.
        operator_applies, operator_adjoints: likewise, inside conjugate gradients too.
        closed_forms: uses of a ``pinv`` or ``prox`` that the operator has a formula for.
        network_seconds, operator_seconds: of the wall clock, in passes (backward ones
            too) and in the operator's own routines; on a GPU, until they are launched.
        seconds: of the wall clock, altogether.
        peak_bytes: of CUDA's allocator, or of the whole process on a CPU.
    """

    network_forwards: int
    network_backwards: int
    operator_applies: int
    operator_adjoints: int
    closed_forms: int
    network_seconds: float
    operator_seconds: float
    seconds: float
    peak_bytes: int

    @property
    def overhead(self) -> float:
        """The part of the time that is neither the network's nor the operator's."""
        return 1 - (self.network_seconds + self.operator_seconds) / self.seconds

    def __add__(self, other: "Stats") -> "Stats":
        """Of one solve after another."""
        fields = vars(self) | {k: vars(self)[k] + v for k, v in vars(other).items()}
        peak = max(self.peak_bytes, other.peak_bytes)
        return Stats(**{**fields, "peak_bytes": peak})


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
        trajectory: what the network was shown and answered, if it was recorded.
    """

    samples: Float[Tensor, "samples batch *image"]
    kind: Kind
    sampler: str
    stats: Stats
    trajectory: Sequence[Step] = ()

    def __repr__(self) -> str:
        n, batch, *shape = self.samples.shape
        kind = self.kind.replace("_", " ") + ("s" if n > 1 else "")
        size = "×".join(map(str, shape))
        passes = self.stats.network_forwards / (n * batch)
        return (
            f"<{self.sampler}: {n} {kind} of {batch} image{'s' if batch > 1 else ''} "
            f"({size}), {passes:g} passes of the network each, "
            f"{self.stats.seconds:.1f} s>"
        )

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
    precision: Precision = "float32",
    compile: bool = False,
    record: int | None = None,
    watch: Watch | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
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
            CPU, all on a GPU, and volumes one by one; halved whenever memory runs out.
        device: where to compute; where the measurements are unless given.
        precision: ``bf16`` runs the network in bfloat16 where that is safe, on a device
            that computes in it; on others in float32, which is faster there. The state,
            the operator and the data's steps stay as they are.
        compile: let torch compile the network: minutes at first, faster after, on GPUs.
        record: keep every so manieth pass of the network for the first sample of each
            item, as ``trajectory``.
        watch: told each answer of the network, in the prior's range, and the map to the
            image's unit: ``Preview("now.png")`` shows how far a solve has come.
        checkpoint: a file in which what is done is kept, chunk by chunk. The same call
            goes on from it, whatever stopped the last, and gives the same result.
        checkpoint_every: keep the sampler's own state too, each so many steps, where it
            takes a ``keep`` (those of volumes do): a cut then costs no more than these.
        progress: wraps the sampler's loop, as ``tqdm`` does.
        **options: the sampler's own; a misspelt one is a TypeError. An image as
            ``init`` is in the image's own unit, one for each item; so is what another
            method makes of the problem, ``init=partial(samplers.tv, lam=20.0)``, which
            is asked once, whatever ``samples``.

    Raises:
        ValueError: the prior cannot take the problem's images, ``init`` is not one
            image for each item, ``checkpoint`` is of another run, or the result is not
            finite.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    counts = {"chunk": chunk, "record": record, "checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
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
    volumes = False
    if prior is not None:
        given = isinstance(init, Tensor)
        like = init if given else local.items(torch.tensor([0])).image_like()
        prior.check(tuple(like.shape[1:]))
        volumes = like.ndim == 5
        del like  # which would be one volume more until the end
    local = InverseProblem(local.y, counted(local.operator, tally), local.noise)
    if callable(init):
        init = options["init"] = init(local)
    map, inner, recorder = AffineMap(1.0, 0.0), None, None
    if prior is not None:
        inner, map = prior.to(device).normalised
        inner = CountedPrior(accelerated(inner, precision, compile), tally)
    if inner is not None and record:
        recorder = Recorder(record, map)
        inner = RecordedPrior(inner, recorder)
    if inner is not None and watch is not None:
        inner = WatchedPrior(inner, watch, map)
    local = local.seen_through(map)
    run_one = sampler
    if inner is not None and isinstance(codec(inner), LatentPrior):
        # A user's own may code by itself, and then is as it is.
        codes = getattr(_function(sampler), "codes", True)
        run_one = sampler if codes else in_latents(sampler)

    items = torch.arange(len(problem.y)).repeat(samples)
    streams = spawn(generator, len(items))
    most = 1 if volumes else len(items) if device.type == "cuda" else 16
    size = chunk or min(most, len(items))
    done: list[Tensor] = []
    at, spent, run, within = 0, 0.0, "", None
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        if recorder is not None:
            raise ValueError("a checkpoint keeps no trajectory: leave record out")
        run = fingerprint(problem, prior, _plain(sampler), options, precision, streams)
        saved = checkpoints.load(file, run)
        if saved is not None:
            at, spent = len(saved["done"]), saved["seconds"]
            done = [saved["done"]] if at else []
            tally.__dict__.update(saved["tally"])
            within = saved.get("within")

    def keep(file: Path, within: Mapping[str, Any] | None = None) -> None:
        seconds = spent + time.perf_counter() - clock
        ready = torch.cat(done).cpu() if done else torch.empty(0)
        now = {"done": ready, "tally": vars(tally), "seconds": seconds}
        checkpoints.save(file, run, {**now, "within": within})

    while at < len(items):
        now = slice(at, at + size)
        states = [g.get_state() for g in streams[now]]
        if isinstance(init, Tensor):
            options["init"] = map.inverse(init[items[now].to(init.device)].to(device))
        own: dict[str, Any] = {}
        if file is not None and "keep" in inspect.signature(sampler).parameters:
            same = within is not None and len(within["streams"]) == len(streams[now])
            write = functools.partial(keep, file)
            own["keep"] = Keeper(checkpoint_every, write, within if same else None)
        within = None
        if recorder is not None:
            recorder.begin(max(0, min(size, len(problem.y) - at)))
        try:
            u = run_one(
                local.items(items[now]),
                inner,
                generator=streams[now],
                progress=progress or iter,
                **own,
                **options,
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if size == 1 or not _out_of_memory(error):
                raise
            for g, state in zip(streams[now], states, strict=True):
                g.set_state(state)
            size = (size + 1) // 2
            if recorder is not None:
                recorder.chunks.pop()
            continue
        done.append(map(u).to(problem.y.device))
        at += len(u)
        if file is not None:
            keep(file)
    result = torch.cat(done).to(problem.y.device)
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
        tally.network_seconds,
        tally.operator_seconds,
        spent + time.perf_counter() - clock,
        peak_memory(device),
    )
    stacked = result.reshape(samples, len(problem.y), *result.shape[1:])
    trajectory = recorder.steps() if recorder is not None else ()
    return Solution(stacked, kind, name, stats, trajectory)


def _plain(sampler: Callable[..., Tensor]) -> tuple[str, dict[str, Any]]:
    """A sampler's name and what a ``partial`` of it has fixed."""
    fixed: dict[str, Any] = {}
    while isinstance(sampler, functools.partial):
        fixed = {**sampler.keywords, **fixed}
        sampler = sampler.func
    return getattr(sampler, "__qualname__", type(sampler).__qualname__), fixed


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(
        error
    )


def _function(sampler: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What a ``partial`` is of."""
    while isinstance(sampler, functools.partial):
        sampler = sampler.func
    return sampler


def _name_and_kind(sampler: Callable[..., Tensor]) -> tuple[str, Kind]:
    sampler = _function(sampler)
    name = getattr(sampler, "__name__", type(sampler).__name__)
    return name, getattr(sampler, "kind", "steered")
