"""Magnetic resonance."""

import torch
from torch import Generator, Tensor

from invsolve import operators as ops
from invsolve.operators import LinearOperator
from invsolve.operators.mri import Coils, MultiCoil
from invsolve.operators.nufft import NonCartesian

from .case import Case, H, W, rand
from .core import weights


def columns(g: Generator, dtype: torch.dtype) -> LinearOperator:
    return ops.Mask.cartesian((5, 7), 2.0, 0.3, generator=g)


def maps(coils: int, *space: int, g: Generator, dtype: torch.dtype) -> Tensor:
    """Random sensitivities, and a corner that no coil sees."""
    S = torch.randn(coils, *space, dtype=dtype.to_complex(), generator=g)
    S[..., 0, 0] = 0
    return S


def coils(g: Generator, dtype: torch.dtype) -> LinearOperator:
    return Coils(maps(3, 5, 4, g=g, dtype=dtype))


def multicoil(h: int, w: int, g: Generator, dtype: torch.dtype) -> LinearOperator:
    mask = rand(h, w, g=g, dtype=dtype) + 0.5
    return MultiCoil(maps(2, h, w, g=g, dtype=dtype), mask)


def sense(g: Generator, dtype: torch.dtype) -> LinearOperator:
    mask = ops.Mask.cartesian((4, 6), 2.0, 0.3, generator=g)
    return mask @ ops.Fourier() @ Coils(maps(2, 4, 6, g=g, dtype=dtype))


def trajectory(h: int, w: int, g: Generator, dtype: torch.dtype) -> LinearOperator:
    k = (2 * rand(4, 5, 2, g=g, dtype=dtype) - 1) * torch.pi
    return NonCartesian((h, w), k, 1e-12)


MRI = {
    "fourier": Case(
        lambda g, d: ops.Fourier(), (1, 5, 7), complex_image=True, any_shape=True
    ),
    "fourier, even and odd": Case(
        lambda g, d: ops.Fourier(), (2, 6, 5), complex_image=True, any_shape=True
    ),
    "fourier of volumes": Case(
        lambda g, d: ops.Fourier(dims=3),
        (1, 4, 3, 6),
        complex_image=True,
        any_shape=True,
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
    "coils": Case(coils, (1, 5, 4), complex_image=True),
    "coils of volumes": Case(
        lambda g, d: Coils(maps(2, 2, 3, 4, g=g, dtype=d)),
        (1, 2, 3, 4),
        complex_image=True,
    ),
    "fourier @ coils": Case(
        lambda g, d: ops.Fourier() @ coils(g, d), (1, 5, 4), complex_image=True
    ),
    "sense": Case(sense, (1, 4, 6), complex_image=True),
    "sense of two channels": Case(
        lambda g, d: sense(g, d) @ ops.ComplexChannels(), (2, 4, 6)
    ),
    "multi-coil": Case(
        lambda g, d: multicoil(4, 6, g, d), (1, 4, 6), complex_image=True
    ),
    "multi-coil, odd": Case(
        lambda g, d: multicoil(4, 5, g, d), (1, 4, 5), complex_image=True
    ),
    "multi-coil of two channels": Case(
        lambda g, d: multicoil(6, 4, g, d) @ ops.ComplexChannels(), (2, 6, 4)
    ),
    "non-cartesian": Case(
        lambda g, d: trajectory(4, 5, g, d), (2, 4, 5), complex_image=True
    ),
    "non-cartesian multi-coil": Case(
        lambda g, d: trajectory(5, 4, g, d) @ coils(g, d), (1, 5, 4), complex_image=True
    ),
    "non-cartesian of real images": Case(
        lambda g, d: trajectory(4, 4, g, d) @ ops.RealImage(), (1, 4, 4)
    ),
}
