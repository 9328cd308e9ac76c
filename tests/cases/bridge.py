"""Operators of other libraries, and ours by way of them."""

import torch
from torch import Generator

from invsolve import operators as ops
from invsolve.operators import LinearOperator
from invsolve.operators.bridge import from_deepinv, from_scipy, to_deepinv

from .case import Case, H, W, rand
from .core import blur, mask


def linear(operator: ops.Operator) -> LinearOperator:
    assert isinstance(operator, LinearOperator)
    return operator


def their_blur(g: Generator, dtype: torch.dtype) -> LinearOperator:
    from deepinv.physics import Blur

    kernel = rand(1, 1, 3, 4, g=g, dtype=dtype)
    return linear(from_deepinv(Blur(kernel, padding="circular"), (2, H, W)))


def their_fft_blur(g: Generator, dtype: torch.dtype) -> LinearOperator:
    from deepinv.physics import BlurFFT

    kernel = rand(1, 1, 3, 4, g=g, dtype=dtype)
    return linear(from_deepinv(BlurFFT((1, H, W), kernel)))


def matrix(g: Generator, dtype: torch.dtype) -> LinearOperator:
    M = rand(5 * 3, H * W, g=g, dtype=dtype) - 0.5
    return from_scipy(M.numpy(), (1, H, W), (1, 5, 3))


def there_and_back(A: LinearOperator) -> LinearOperator:
    return linear(from_deepinv(to_deepinv(A)))


def their_mri(g: Generator, dtype: torch.dtype) -> LinearOperator:
    A = mask(g, dtype) @ ops.Fourier() @ ops.ComplexChannels()
    return linear(from_deepinv(to_deepinv(A, None, (2, H, W))))


BRIDGE = {
    "deepinv's blur": Case(their_blur, (2, H, W)),
    "deepinv's blur by FFT": Case(their_fft_blur),
    "scipy's matrix": Case(matrix),
    "blur by way of deepinv": Case(lambda g, d: there_and_back(blur(g, d))),
    "mask @ blur by way of deepinv": Case(
        lambda g, d: there_and_back(mask(g, d) @ blur(g, d))
    ),
    "downsampling by way of deepinv": Case(
        lambda g, d: there_and_back(-2.0 * ops.Downsample(2, (H, W)))
    ),
    "mri by way of deepinv": Case(their_mri, (2, H, W)),
}
