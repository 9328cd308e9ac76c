"""Long solves that can be cut at any moment: what is done, and of which run it is."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Generator, Tensor, nn

from .io.files import replace
from .random import Randomness

State = dict[str, Tensor]
"""What a sampler carries from one step to the next, by name."""


Keep = Callable[[State, Randomness, Sequence[Any]], Iterable[Any]]
"""What a sampler's loop goes over, so that it can be cut between two steps.

``for step in progress(keep(state, generator, steps))`` gives the steps that are left,
after putting into ``state`` and ``generator`` what they were there. The loop leaves in
``state`` all that its next step needs.
"""


def straight(
    state: State, generator: Randomness, steps: Sequence[Any]
) -> Iterable[Any]:
    """Every step, and nothing is kept."""
    return steps


@final
class Keeper:
    """Keeps a sampler's state every so many steps, and goes on from one that was kept.

    Args:
        every: how many steps.
        write: takes what is to be kept, by which the sampler goes on.
        kept: what was kept of the same images, or None to begin.
    """

    def __init__(
        self, every: int, write: Callable[[Mapping[str, Any]], None], kept: Any = None
    ) -> None:
        self.every, self.write, self.kept = every, write, kept

    def __call__(
        self, state: State, generator: Randomness, steps: Sequence[Any]
    ) -> Iterable[Any]:
        streams = [generator] if isinstance(generator, Generator) else list(generator)
        done = 0
        if self.kept is not None:
            done = self.kept["step"]
            for name, value in self.kept["state"].items():
                state[name] = value.to(state[name].device)
            for stream, was in zip(streams, self.kept["streams"], strict=True):
                stream.set_state(was)
            self.kept = None

        def keep(step: int) -> None:
            if step % self.every == 0 and step < len(steps):
                now = {"state": state, "streams": [g.get_state() for g in streams]}
                self.write({"step": step, **now})

        return _Left(steps, done, keep)


@final
class _Left:
    """The steps from one on; after each of them its number is told."""

    def __init__(
        self, steps: Sequence[Any], done: int, told: Callable[[int], None]
    ) -> None:
        self.steps, self.done, self.told = steps, done, told

    def __len__(self) -> int:
        return len(self.steps) - self.done

    def __iter__(self) -> Iterator[Any]:
        for number, step in enumerate(self.steps[self.done :], self.done + 1):
            yield step
            self.told(number)


def fingerprint(*values: object) -> str:
    """A hash of values and all that they are made of, the same on every run.

    Tensors and networks count by their numbers, dataclasses by their fields, other
    objects by what they hold, functions by their names.
    """
    state = hashlib.sha256()
    for value in values:
        _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: object) -> None:
    state.update(type(value).__qualname__.encode() + b":")
    match value:
        case Tensor():
            array = value.detach().cpu()
            state.update(str((array.dtype, tuple(array.shape))).encode())
            # NumPy has no bfloat16, of which float32 holds every number.
            exact = array.float() if array.dtype == torch.bfloat16 else array
            state.update(exact.numpy().tobytes())
        case np.ndarray():
            state.update(str((value.dtype, value.shape)).encode() + value.tobytes())
        case Generator():
            state.update(value.get_state().numpy().tobytes())
        case nn.Module():
            _feed(state, dict(value.state_dict()))
        case Mapping():
            for key in sorted(value, key=str):
                _feed(state, key)
                _feed(state, value[key])
        case str() | bytes() | int() | float() | complex() | None:
            state.update(repr(value).encode())
        case Sequence() | set() | frozenset():
            for item in value:
                _feed(state, item)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                _feed(state, getattr(value, field.name))
        case functools.partial():
            _feed(state, (value.func, value.args, value.keywords))
        case _ if callable(value) and hasattr(value, "__qualname__"):
            state.update(value.__qualname__.encode())
        case _:
            config = getattr(value, "config", None)  # of diffusers' schedulers
            inside = (
                config
                if isinstance(config, Mapping)
                else getattr(value, "__dict__", {})
            )
            _feed(state, {k: v for k, v in inside.items() if not k.startswith("__")})
    state.update(b";")


def save(path: Path, run: str, done: Mapping[str, Any]) -> None:
    """Write what is done of a run, whole or not at all."""
    replace(path, lambda partial: torch.save({"run": run, **done}, partial))


def load(path: Path, run: str) -> dict[str, Any] | None:
    """What was done of this run, or None if there is no such file yet.

    Raises:
        ValueError: the file is of another run, or is none of ours.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        other = state["run"] != run
    except Exception as error:
        raise ValueError(
            f"{path} is no checkpoint of a solve: remove it, or name another file"
        ) from error
    if other:
        raise ValueError(
            f"{path} is a checkpoint of another run (its data, operator, prior, sampler, "
            "options or seed differ): remove it, or name another file"
        )
    return state
