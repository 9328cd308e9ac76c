"""Families of checkpoints: one file each, known by the names of their weights."""

from . import adm, hugging_face, monai, own, song
from .family import Family as Family

FAMILIES: tuple[Family, ...] = (
    own.FAMILY,
    adm.FAMILY,
    *song.FAMILIES,
    hugging_face.FAMILY,
    monai.FAMILY,
)

REGISTERED: list[Family] = list(FAMILIES)
"""These, and those that other parts of the package bring."""


def register(family: Family) -> None:
    """Let `invsolve.priors.load` know a family of checkpoints by its name and weights."""
    REGISTERED.append(family)
