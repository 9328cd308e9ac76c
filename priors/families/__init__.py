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
