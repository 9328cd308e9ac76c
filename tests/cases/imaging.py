"""Photographs: blur, sampling, colour, and several measurements of one image."""

from .case import Case

IMAGING: dict[str, Case] = {}
