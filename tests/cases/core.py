"""Masks, blur, sampling, and how operators combine."""

import torch
from torch import Generator

from invsolve import operators as ops
from invsolve.operators import LinearOperator

from .case import Case, H, W, rand


def mask(g: Generator, dtype: torch.dtype) -> LinearOperator:
    return ops.Mask(rand(H, W, g=g, dtype=dtype) > 0.4)


def weights(g: Generator, dtype: torch.dtype) -> LinearOperator:
    w = rand(H, W, g=g, dtype=dtype) + 0.5
    return ops.Mask(torch.where(rand(H, W, g=g, dtype=dtype) > 0.3, w, 0))


def blur(g: Generator, dtype: torch.dtype) -> LinearOperator:
    return ops.Blur.from_kernel(rand(3, 4, g=g, dtype=dtype), (H, W))


CORE = {
    "identity": Case(lambda g, d: ops.Identity(), any_shape=True),
    "mask": Case(mask),
    "weights": Case(weights),
    "weights of channels": Case(
        lambda g, d: ops.Mask(rand(2, H, W, g=g, dtype=d)), (2, H, W)
    ),
    "weights, broadcast": Case(
        lambda g, d: ops.Mask(rand(1, H, W, g=g, dtype=d)), (2, H, W)
    ),
    "random mask": Case(lambda g, d: ops.Mask.random((H, W), 0.5, generator=g)),
    "blur": Case(blur),
    "gaussian blur": Case(lambda g, d: ops.Blur.gaussian(0.8, (7, 8)), (2, 7, 8)),
    "downsample": Case(lambda g, d: ops.Downsample(2, (H, W)), (2, H, W)),
    "scaled blur": Case(lambda g, d: 2.5 * blur(g, d)),
    "mask @ blur": Case(lambda g, d: mask(g, d) @ blur(g, d)),
    "blur @ weights": Case(lambda g, d: blur(g, d) @ weights(g, d)),
    "downsample @ blur": Case(lambda g, d: ops.Downsample(2, (H, W)) @ blur(g, d)),
}
