"""The same network, faster: in bfloat16, or compiled."""

from typing import Literal, final

import torch

from .bf16 import autocast
from .priors import Prior
from .shapes import Sigma, X

Precision = Literal["float32", "bf16"]


def accelerated(prior: Prior, precision: Precision, compile: bool) -> Prior:
    """The prior with its network run so.

    Raises:
        ValueError: the precision is unknown.
    """
    if precision not in ("float32", "bf16"):
        raise ValueError(f"unknown precision {precision!r}: float32 or bf16")
    if precision == "float32" and not compile:
        return prior
    return _Accelerated(prior, precision, compile)


@final
class _Accelerated(Prior):
    """D(x; σ) under autocast, compiled, or both; its result is of x's own dtype."""

    def __init__(self, inner: Prior, precision: Precision, compile: bool) -> None:
        self.inner, self.bf16 = inner, precision == "bf16"
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max
        self.run = torch.compile(inner.denoise) if compile else inner.denoise

    def denoise(self, x: X, sigma: Sigma) -> X:
        with autocast(x.device, self.bf16):
            return self.run(x, sigma).to(x.dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        self.inner.check(shape)
