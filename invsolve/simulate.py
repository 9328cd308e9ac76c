"""Measurements of a known image, made on a finer grid than they will be solved on.

Solving with the very matrix that made the data is the "inverse crime": the model then
has no error, and every method looks better than it is.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from .operators import FanBeam, Noise, ParallelBeam
from .random import Randomness
from .shapes import X, Y


def refine(x: X, factor: int, *, steps: int = 20) -> Tensor:
    """A smooth image on pixels ``factor`` times finer, whose block means are x.

    Bicubic interpolation, then x_fine ← x_fine + ↑(x − block means), which keeps the
    amount of matter in every pixel while there is structure inside it.

    Args:
        x: (batch, channels, h, w).
        factor: pixels a side that each becomes.
        steps: of the correction; what it leaves is far below any noise.
    """
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    fine = torch.zeros_like(interpolate(x, scale_factor=factor))
    for _ in range(steps + 1):
        rest = x - avg_pool2d(fine, factor)
        fine = fine + interpolate(rest, scale_factor=factor, mode="bicubic")
    return fine


def measure(
    x: X,
    A: ParallelBeam | FanBeam,
    noise: Noise,
    *,
    factor: int = 3,
    generator: Randomness,
) -> Y:
    """A sinogram of x as a scanner would see it, with noise.

    The image is refined (see `refine`), each detector element integrates the intensity
    of ``factor`` rays, exp(−z), not z, and the counts are drawn for the element.

    Args:
        x: attenuation in 1/mm, (batch, channels, h, w).
        A: the geometry that will be solved with.
        noise: of the measurements.
        factor: how many times finer the pixels and the rays are.
        generator: of the noise.
    """
    return noise.sample(line_integrals(x, A, factor), generator=generator)


def line_integrals(x: X, A: ParallelBeam | FanBeam, factor: int) -> Tensor:
    """What the detector elements see without noise: −ln of their mean intensity."""
    h, w = A.shape
    fine = replace(
        A,
        shape=(h * factor, w * factor),
        pixel_mm=A.pixel_mm / factor,
        detectors=A.detectors * factor,
        detector_mm=A.detector_mm / factor,
        oversample=1,
        rays=1,
    )
    intensity = torch.exp(-fine(refine(x, factor)))
    return -intensity.unflatten(-1, (A.detectors, factor)).mean(-1).log()
