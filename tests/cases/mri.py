"""Magnetic resonance."""

import torch
from torch import Generator

from invsolve import operators as ops
from invsolve.operators import LinearOperator

from .case import Case, H, W
from .core import weights


def columns(g: Generator, dtype: torch.dtype) -> LinearOperator:
    return ops.Mask.cartesian((5, 7), 2.0, 0.3, generator=g)


MRI = {
    "fourier": Case(
        lambda g, d: ops.Fourier(), (1, 5, 7), complex_image=True, any_shape=True
    ),
    "real image": Case(lambda g, d: ops.RealImage(), any_shape=True),
    "complex channels": Case(
        lambda g, d: ops.ComplexChannels(), (2, H, W), any_shape=True
    ),
    "mri": Case(
        lambda g, d: columns(g, d) @ ops.Fourier(), (1, 5, 7), complex_image=True
    ),
    "mri of real images": Case(
        lambda g, d: columns(g, d) @ ops.Fourier() @ ops.RealImage(), (1, 5, 7)
    ),
    "mri of two channels": Case(
        lambda g, d: columns(g, d) @ ops.Fourier() @ ops.ComplexChannels(), (2, 5, 7)
    ),
    "fourier of two channels": Case(
        lambda g, d: ops.Fourier() @ ops.ComplexChannels(), (2, 5, 7), any_shape=True
    ),
    "fourier @ mask": Case(
        lambda g, d: ops.Fourier() @ weights(g, d), complex_image=True
    ),
}
