"""Priors by name, and what they are for."""

from collections.abc import Mapping
from typing import Any

from invsolve import io, priors
from invsolve.forward_prior import ForwardPrior
from invsolve.priors.latent import LatentPrior
from invsolve.priors.weights import read_card

from .options import need


def load_prior(name: str) -> priors.Prior:
    """A prior by name or path; its network needs an extra."""
    need("diffusers")
    return priors.load(name)


def as_equivariant(name: str, prior: priors.Prior) -> priors.Prior:
    """A prior of images for which mirror images and shifts are as likely."""
    check_images("--equivariant", name, prior)
    return priors.Equivariant(prior)


def check_images(option: str, name: str, prior: priors.Prior) -> None:
    """Refuse an option that is of priors of images with any other, with a ValueError."""
    if isinstance(prior, LatentPrior | ForwardPrior):
        raise ValueError(
            f"{option} is for priors of images, which {name} is not: leave it out"
        )


def check_unit(prior: str, unit: io.Unit) -> None:
    """Refuse a prior of another unit than the measurements', with a ValueError."""
    theirs = read_card(prior)[0].get("unit", "")
    if theirs != unit:
        raise ValueError(
            f"the prior {prior} is of images in {theirs or 'no unit'}, these "
            f"measurements in {unit or 'no unit'}: give another --prior, or use tv"
        )


def prior_facts(card: Mapping[str, Any]) -> dict[str, str]:
    """What its card tells of a prior, for a report."""
    facts = {"prior": str(card.get("name", "?"))}
    named = {
        "data": "prior's data",
        "licence": "prior's licence",
        "citation": "prior's citation",
    }
    return facts | {
        text: str(card[key]) for key, text in named.items() if card.get(key)
    }
