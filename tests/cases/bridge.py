"""Operators of other libraries, and ours by way of them."""

from .case import Case

BRIDGE: dict[str, Case] = {}
