"""What a family of checkpoints is, and what all of them share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..base import Affine, AffineMap, Prior
from ..parameterisation import SigmaData

State = Mapping[str, Tensor]
Card = Mapping[str, Any]


@final
@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind: how to know them, and how to make a prior of them.

    Args:
        name: as a card's ``family`` calls it.
        sniff: (state, card) ↦ whether these weights are the family's, by their names.
        load: (state, card) ↦ the prior, its architecture inferred from the tensors'
            shapes and overridden by the card's ``network``. What was decided is told
            line by line in the prior's ``decisions``.

    The card is the user's JSON over what the file says of itself
    (`invsolve.priors.reading.read_checkpoint`); both may be empty.
    """

    name: str
    sniff: Callable[[State, Card], bool]
    load: Callable[[State, Card], Prior]


def filled(make: Callable[[], nn.Module], state: State) -> nn.Module:
    """The network that ``make`` makes, with these weights in single precision.

    Raises:
        ValueError: a weight is missing, of another shape, or not the network's.
    """
    with torch.device("meta"):  # no memory, and no random numbers drawn
        net = make()
    wanted = {k: v.shape for k, v in net.state_dict().items()}
    missing = sorted(wanted.keys() - state.keys())
    unknown = sorted(state.keys() - wanted.keys())
    if missing or unknown:
        what, names = ("lack", missing) if missing else ("also hold", unknown)
        raise ValueError(
            f"the weights do not fit the network inferred from them: they {what} "
            f"{names[0]!r}" + (f" and {len(names) - 1} more" if names[1:] else "")
        )
    for name, shape in wanted.items():
        if state[name].shape != shape:
            raise ValueError(
                f"the weights do not fit the network inferred from them: {name!r} is "
                f"{tuple(state[name].shape)}, not {tuple(shape)}"
            )
    net.load_state_dict({k: state[k].float() for k in wanted}, assign=True)
    return net.eval().requires_grad_(False)


def finished(prior: Prior, card: Card, decisions: Sequence[str]) -> Prior:
    """The prior in the card's unit (``scale``, ``offset``), with its decisions."""
    decisions = list(decisions)
    if "scale" in card or "offset" in card:
        map = AffineMap(float(card.get("scale", 1)), float(card.get("offset", 0)))
        decisions.append(f"images x = {map.scale:g}·u + {map.offset:g} (card)")
        prior = Affine(prior, map)
    vars(prior)["decisions"] = decisions
    return prior


def sigma_data_of(card: Card) -> SigmaData:
    """The card's σ_d, a number or a list with one for each channel."""
    data = card["sigma_data"]
    return tuple(map(float, data)) if isinstance(data, list) else float(data)


def overridden(card: Card, inferred: Mapping[str, Any]) -> dict[str, Any]:
    """What was inferred, with the card's ``network`` over it.

    Raises:
        ValueError: the card names something that the family does not know, or gives it
            a value of another kind.
    """
    given = card.get("network", {})
    if unknown := sorted(set(given) - set(inferred)):
        raise ValueError(
            f"the card's network entry {unknown[0]!r} is unknown: this family knows "
            + ", ".join(inferred)
        )
    for name, value in given.items():
        allowed = _kinds(inferred[name])
        if not isinstance(value, allowed):
            raise ValueError(f"the card's network entry {name!r} cannot be {value!r}")
    return {**inferred, **given}


def _kinds(inferred: Any) -> tuple[type, ...]:
    if isinstance(inferred, tuple):
        return (tuple, list)
    if (
        inferred is None or type(inferred) is int
    ):  # numbers of what there may be none of
        return (int, type(None))
    return (type(inferred),)
