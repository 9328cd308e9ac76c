"""Photographs: blur, sampling, colour, and several measurements of one image."""

import torch
from torch import Generator

from invsolve import operators as ops
from invsolve.operators import LinearOperator
from invsolve.operators.blur import Crop, Edges, Pad, SpatialBlur
from invsolve.operators.colour import Bayer, Greyscale
from invsolve.operators.resample import Decimate, Separable
from invsolve.operators.sensing import CompressedSensing
from invsolve.operators.stack import OnChannels, Stack, on_channels

from .case import Case, H, W, rand
from .core import blur, mask, weights

MARGIN = ((2, 1), (0, 3))


def blur_at(edges: Edges) -> Case:
    return Case(
        lambda g, d: ops.Blur.from_kernel(rand(3, 4, g=g, dtype=d), (H, W), edges)
    )


def spatial(g: Generator, dtype: torch.dtype, edges: Edges) -> LinearOperator:
    return SpatialBlur.from_kernels(rand(2, 3, 3, 2, g=g, dtype=dtype), (H, W), edges)


def stack(g: Generator, dtype: torch.dtype) -> Stack:
    small = ops.Downsample(2, (H, W))
    return Stack([blur(g, dtype), mask(g, dtype), small], shape=(2, H, W))


# A Stack's measurements are (batch, total): a row less of them is an item less of the
# batch, so that the law of wrong shapes does not hold; test_imaging.py has its own.
IMAGING = {
    "blur of channels": Case(
        lambda g, d: ops.Blur.from_kernel(rand(2, 3, 2, g=g, dtype=d), (H, W)),
        (2, H, W),
    ),
    "blur of complex images": Case(blur, complex_image=True),
    "blur, reflect": blur_at("reflect"),
    "blur, replicate": blur_at("replicate"),
    "blur, constant": blur_at("constant"),
    "blur, valid": blur_at("valid"),
    "gaussian blur, reflect": Case(
        lambda g, d: ops.Blur.gaussian(0.8, (7, 8), "reflect"), (2, 7, 8)
    ),
    "pad, constant": Case(lambda g, d: Pad((4, 5), MARGIN), (2, 4, 5)),
    "pad, reflect": Case(lambda g, d: Pad((4, 5), MARGIN, "reflect"), (1, 4, 5)),
    "pad, replicate": Case(lambda g, d: Pad((4, 5), MARGIN, "replicate"), (1, 4, 5)),
    "pad, circular": Case(lambda g, d: Pad((4, 5), MARGIN, "circular"), (1, 4, 5)),
    "crop": Case(lambda g, d: Crop((H, W), MARGIN), (2, H, W)),
    "spatial blur": Case(lambda g, d: spatial(g, d, "circular"), (2, H, W)),
    "spatial blur, reflect": Case(lambda g, d: spatial(g, d, "reflect")),
    "bicubic": Case(lambda g, d: ops.Downsample.bicubic(2, (H, W)), (2, H, W)),
    "separable": Case(
        lambda g, d: Separable(rand(7, H, g=g, dtype=d), rand(3, W, g=g, dtype=d))
    ),
    "decimate": Case(
        lambda g, d: Decimate.from_kernel(rand(3, 3, g=g, dtype=d), 2, (H, W)),
        (2, H, W),
    ),
    "decimate by 3": Case(
        lambda g, d: Decimate.from_kernel(rand(1, 3, 2, g=g, dtype=d), 3, (6, 9)),
        (1, 6, 9),
    ),
    "greyscale": Case(lambda g, d: Greyscale(), (3, 4, 5), any_shape=True),
    "bayer": Case(lambda g, d: Bayer("GRBG"), (3, 5, 7), any_shape=True),
    "compressed sensing": Case(
        lambda g, d: CompressedSensing.random((2, 4, 8), 0.4, generator=g), (2, 4, 8)
    ),
    "stack": Case(stack, (2, H, W), any_shape=True),
    "stack of complex": Case(
        lambda g, d: Stack(
            [weights(g, d) @ ops.Fourier() @ ops.RealImage(), ops.RealImage()],
            shape=(1, H, W),
        ),
        any_shape=True,
    ),
    "weights @ stack": Case(
        lambda g, d: (
            ops.Mask(0.5 * rand(H * W * 5 // 4, g=g, dtype=d) + 0.25)
            @ Stack([blur(g, d), ops.Downsample(2, (H, W))])
        ),
        any_shape=True,
    ),
    "one channel of three": Case(lambda g, d: on_channels(blur(g, d), 1, 3), (3, H, W)),
    "channels in another order": Case(
        lambda g, d: OnChannels(
            ops.Blur.from_kernel(rand(2, 3, 3, g=g, dtype=d), (H, W), "reflect"),
            channels=(2, 0),
            of=3,
        ),
        (3, H, W),
    ),
}
