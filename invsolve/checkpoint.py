"""Long solves that can be cut at any moment: what is done, and of which run it is."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from .io.files import replace


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
