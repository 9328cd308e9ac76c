"""Computed tomography: line integrals of attenuation."""

from .geometry import (
    ConeBeam as ConeBeam,
    FanBeam as FanBeam,
    ParallelBeam as ParallelBeam,
    Window as Window,
)
from .transform import Backend as Backend, RayTransform as RayTransform
