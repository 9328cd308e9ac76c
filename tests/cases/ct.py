"""Computed tomography."""

import torch
from torch import Generator

from invsolve import operators as ops
from invsolve.operators import LinearOperator

from .case import Case, H, W, rand

ANGLES = torch.tensor([0.0, 0.4, 0.9, 1.3, torch.pi / 2, 2.1, 2.8])


def beam(g: Generator, dtype: torch.dtype) -> LinearOperator:
    return ops.ParallelBeam((H, W), ANGLES, pixel_mm=0.7, detectors=13, detector_mm=0.6)


CT = {
    "parallel beam": Case(beam, (2, H, W)),
    "negative beam": Case(lambda g, d: -0.5 * beam(g, d)),
    "weights @ scaled beam": Case(
        lambda g, d: (
            ops.Mask(rand(len(ANGLES), 13, g=g, dtype=d) + 0.5) @ (2.0 * beam(g, d))
        )
    ),
}
