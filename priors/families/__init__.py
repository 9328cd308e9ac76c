"""Families of checkpoints: one file each, known by the names of their weights."""

from . import adm, song
from .family import Family as Family

FAMILIES: tuple[Family, ...] = (adm.FAMILY, *song.FAMILIES)
