"""Computed tomography."""

import torch
from torch import Generator

from invsolve import operators as ops
from invsolve.operators import LinearOperator
from invsolve.operators.ct import Backend, ConeBeam, FanBeam

from .case import Case, H, W, rand

ANGLES = torch.tensor([0.0, 0.4, 0.9, 1.3, torch.pi / 2, 2.1, 2.8])
TURN = 2 * torch.pi * torch.arange(7) / 7


def beam(g: Generator, dtype: torch.dtype) -> LinearOperator:
    # Not "auto", which is ASTRA on a GPU, whose adjoint is not exact.
    return ops.ParallelBeam(
        (H, W), ANGLES, 0.7, detectors=13, detector_mm=0.6, backend="matrix"
    )


def fan(curved: bool, backend: Backend = "matrix") -> Case:
    A = FanBeam(
        (H, W),
        TURN,
        source_to_axis_mm=9.0,
        source_to_detector_mm=15.0,
        pixel_mm=0.7,
        detectors=13,
        detector_mm=1.1,
        curved=curved,
        offset_mm=0.2,
        backend=backend,
    )
    return Case(lambda g, d: A, (2, H, W))


def cone(angles: torch.Tensor, curved: bool, pitch_mm: float) -> Case:
    A = ConeBeam(
        (3, 4, 5),
        angles,
        source_to_axis_mm=8.0,
        source_to_detector_mm=12.0,
        voxel_mm=(1.2, 0.9, 1.0),
        detectors=(5, 7),
        detector_mm=(1.3, 1.4),
        curved=curved,
        offset_mm=(0.1, -0.2),
        pitch_mm=pitch_mm,
        backend="matrix",
    )
    return Case(lambda g, d: A, (1, 3, 4, 5))


CT = {
    "parallel beam": Case(beam, (2, H, W)),
    "negative beam": Case(lambda g, d: -0.5 * beam(g, d)),
    "weights @ scaled beam": Case(
        lambda g, d: (
            ops.Mask(rand(len(ANGLES), 13, g=g, dtype=d) + 0.5) @ (2.0 * beam(g, d))
        )
    ),
    "fan beam": fan(curved=False),
    "curved fan beam, matrix-free": fan(curved=True, backend="matrix-free"),
    "cone beam": cone(TURN, curved=False, pitch_mm=0.0),
    "helical cone beam": cone(2 * TURN - 6, curved=True, pitch_mm=1.5),
}
