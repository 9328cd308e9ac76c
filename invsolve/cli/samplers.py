"""Samplers and their options, by name."""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor

from invsolve import demo as demonstration, samplers
from invsolve.samplers.solvers import (
    DDIM,
    SDE,
    Heun,
    Momentum,
    Multistep,
    Singlestep,
    Solver,
)

from .options import choices, lookup

SAMPLERS: Mapping[str, Callable[..., Tensor]] = {
    "reddiff": samplers.reddiff,
    "dds": samplers.dds,
    "dds3d": samplers.dds3d,
    "mbir": samplers.mbir,
    "dfm": samplers.dfm,
    "diffpir": samplers.diffpir,
    "dps": samplers.dps,
    "tmpd": samplers.tmpd,
    "pigdm": samplers.pigdm,
    "mmps": samplers.mmps,
    "ddnm": samplers.ddnm,
    "ddrm": samplers.ddrm,
    "daps": samplers.daps,
    "score_sde": samplers.score_sde,
    "pnp": samplers.pnp,
    "red": samplers.red,
    "ensemble": samplers.ensemble,
    "stsl": samplers.stsl,
    "psld": samplers.psld,
    "ldps": samplers.ldps,
    "resample": samplers.resample,
    "tv": samplers.tv,
    "sirt": samplers.sirt,
    "cgls": samplers.cgls,
    "fbp": samplers.fbp,
}

SOLVERS: Mapping[str, Solver] = {
    "ddim": DDIM(),
    "ancestral": DDIM(1.0),
    "heun": Heun(),
    "dpm2": Singlestep(2),
    "dpm3": Singlestep(3),
    "dpm++2m": Multistep(2),
    "dpm++3m": Multistep(3),
    "deis3": Multistep(3, "eps"),
    "sde2": SDE(2),
    "plms4": Momentum(4),
}
"""What ``--set solver=…`` can be, for the samplers that take one."""


def options_of(
    name: str,
    sampler: Callable[..., Tensor],
    given: Sequence[str],
    steps: int | None,
    *,
    tuned: bool,
) -> dict[str, Any]:
    """The sampler's options: those the demo has tuned for CT, then the user's."""
    known = _settable(sampler)
    options: dict[str, Any] = {}
    if tuned:
        for method in demonstration.METHODS:
            if method.sampler is sampler:
                options |= method.options
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: write it as --set KEY=VALUE")
        if key not in known:
            instead = choices(key, known) if known else "it has none, leave it out"
            raise ValueError(f"{name} has no option {key!r}: {instead}")
        if key == "solver":
            options[key] = lookup(SOLVERS, value, "solver")
            continue
        options[key] = _value(key, value, known[key])
    if steps is not None:
        if "steps" not in known:
            raise ValueError(f"{name} takes no --steps: leave it out")
        options["steps"] = steps
    if options.get("steps", 1) < 1:
        raise ValueError(f"steps must be at least 1, got {options['steps']}")
    return options


def _settable(sampler: Callable[..., Tensor]) -> dict[str, Any]:
    """A sampler's options that words can give: each with a value of its kind."""
    taken = ("prior", "problem", "generator", "progress", "sigmas", "keep", "methods")
    hints, found = get_type_hints(sampler), {}
    for key, parameter in inspect.signature(sampler).parameters.items():
        kinds = [get_origin(hint) or hint for hint in get_args(hints[key])]
        if key in taken:
            continue
        if parameter.default is not None:
            found[key] = parameter.default
        elif key == "solver" or float in kinds:
            found[key] = None
        elif tuple in kinds:
            found[key] = (0.0, 1.0)
    return found


def _value(key: str, text: str, default: Any) -> Any:
    """An option's value, of the kind of its default."""
    try:
        value = json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        value = text
    match default:
        case bool():
            fits, kind = isinstance(value, bool), "true or false"
        case int():
            fits, kind = type(value) is int, "a whole number"
        case float() | None:
            kind = "a finite number"
            number: Any = value if type(value) in (int, float) else math.nan
            fits, value = math.isfinite(number), float(number)
        case tuple():
            fits = isinstance(value, list) and len(value) == len(default)
            fits = fits and all(type(v) in (int, float) for v in value)
            value, kind = (tuple(value), "") if fits else (value, "a list of numbers")
        case _:
            fits, kind = isinstance(value, str), "a word"
    if not fits:
        raise ValueError(f"--set {key}={text}: {key} must be {kind}")
    return value
