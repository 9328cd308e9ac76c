"""PET of head-and-neck tumours, simulated from a real CT and its structures.

y ~ Poisson(g (a ⊙ A(h ∗ x) + b)) with the tracer's uptake x in SUV, the scanner's blur h,
line integrals A of each slice, attenuation a = exp(−A μ₅₁₁) from the CT, and randoms and
scatter b; x̂ is OSEM's, blurred once more. No real PET may be shipped: every number made
with these images must be said to be of simulated PET.

Uptakes are typical of FDG in the neck, drawn anew for each patient. What else is bright,
brain, salivary glands, larynx, teeth and reactive nodes, is so at places that the CT
tells, so that neither modality suffices. The brain is found as what the skull encloses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import log, pi, sqrt
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn.functional import interpolate, pad

from invsolve.operators import ParallelBeam
from invsolve.random import poisson

Volume = Float[Tensor, "z y x"]
Region = Bool[Tensor, "z y x"]

WATER_511 = 0.0096
"""Attenuation of water at 511 keV, in 1/mm."""
VIEWS, SUBSETS, ROUNDS = 60, 6, 3
"""Of a slice's sinogram, and of OSEM's sweep through it."""
TARGETS = ("PTV70", "PTV63", "PTV56")
"""The planning targets, highest dose first: gross tumour lies in the first there is."""


@final
@dataclass(frozen=True, eq=False)
class SimulatedPet:
    """One draw of tumour and scan.

    Attributes:
        pet: what the scanner shows, in SUV.
        tumour: the gross tumour, necrotic core included.
        uptake: the truth behind the scan, in SUV.
    """

    pet: Volume
    tumour: Region
    uptake: Volume


def simulate_pet(
    hu: Volume,
    structures: Mapping[str, Region],
    spacing_mm: float,
    generator: Generator,
) -> SimulatedPet:
    """A tumour inside the high-dose target, the patient's uptake, and a scan of it.

    Args:
        hu: the CT, on cubic voxels, slices first.
        structures: OpenKBP's organs and targets by name; organs may be missing.
        spacing_mm: a voxel's side.
        generator: of tumour, uptake and counts.

    Raises:
        ValueError: there is no target, or too little of it inside the body.
    """
    tumour = draw_tumour(hu, structures, spacing_mm, generator)
    uptake = draw_uptake(hu, structures, tumour, spacing_mm, generator)
    return SimulatedPet(scan(uptake, hu, spacing_mm, generator), tumour, uptake)


# --- tumour


def draw_tumour(
    hu: Volume,
    structures: Mapping[str, Region],
    spacing_mm: float,
    generator: Generator,
) -> Region:
    """One or two connected parts of the eroded target, of 3 to 40 ml, irregular.

    Each grows around a random voxel: those nearest to it, by a distance that a smooth
    random field stretches, until the volume is reached.
    """
    inside = hu > -150
    for name in TARGETS:
        target = structures.get(name)
        if target is None:
            continue
        core = _eroded(target & inside, 5.0 / spacing_mm)
        if core.sum() * spacing_mm**3 / 1000 >= 3:
            break
    else:
        raise ValueError(
            "no target holds 3 ml inside its margin: a tumour needs one of "
            + ", ".join(TARGETS)
        )
    tumour = torch.zeros_like(core)
    for _ in range(1 + int(_uniform(generator) < 0.4)):
        room = core & ~_dilated(tumour, 8.0 / spacing_mm)
        voxels = room.nonzero()
        if len(voxels) * spacing_mm**3 / 1000 < 3:
            break
        seed = voxels[int(torch.randint(len(voxels), (), generator=generator))]
        distance = (_coordinates(hu) - seed).square().sum(-1).sqrt()
        stretched = (
            distance * (0.35 * field(hu.shape, 30 / spacing_mm, generator)).exp()
        )
        ml = 3 * (40 / 3) ** _uniform(generator)
        most = round(min(ml * 1000 / spacing_mm**3, 0.6 * len(voxels)))
        reach = stretched[room].kthvalue(max(1, most)).values
        tumour |= _part_of(room & (stretched <= reach), seed)
    return tumour


def draw_uptake(
    hu: Volume,
    structures: Mapping[str, Region],
    tumour: Region,
    spacing_mm: float,
    generator: Generator,
) -> Volume:
    """SUV of every voxel: tissues, organs, what is inflamed, and the tumour."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * _uniform(generator)

    def textured(strength: float, mm: float) -> Volume:
        return (strength * field(hu.shape, mm / spacing_mm, generator)).exp()

    x = torch.zeros_like(hu)
    x[hu > -950] = 0.3  # lungs, by their density
    x[hu > -200] = between(0.25, 0.4)  # fat
    x[hu > -20] = between(0.8, 1.2)  # muscle and soft tissue
    x[hu > 200] = between(0.6, 1.1)  # bone, by its marrow
    x[brain(hu, spacing_mm)] = between(5.0, 9.0)
    for name, low, high in (
        ("Brainstem", 3.5, 6.0),
        ("SpinalCord", 1.2, 1.9),
        ("Esophagus", 1.2, 2.4),
        ("Larynx", 1.2, 4.5),
        ("Mandible", 0.5, 1.0),
    ):
        if (organ := structures.get(name)) is not None:
            x[organ & (hu > -200)] = between(low, high)
    glands = between(1.2, 4.5)
    for name in ("LeftParotid", "RightParotid"):
        if (organ := structures.get(name)) is not None:
            x[organ] = glands * between(0.8, 1.2)
    x *= textured(0.12, 16.0)
    targets = torch.stack([structures[t] for t in TARGETS if t in structures]).any(0)
    away = (hu > -20) & (hu < 150) & ~_dilated(targets | tumour, 8.0 / spacing_mm)
    jaw = structures.get("Mandible", torch.zeros_like(tumour))
    for where, most in ((away, 3), (jaw & (hu > 150), 2)):  # reactive nodes; teeth
        for _ in range(int(torch.randint(most + 1, (), generator=generator))):
            if len(voxels := where.nonzero()):
                at = voxels[int(torch.randint(len(voxels), (), generator=generator))]
                near = (_coordinates(hu) - at).square().sum(-1).sqrt() * spacing_mm
                x[(near < between(5.0, 10.0)) & (hu > -200)] = between(2.5, 7.0)
    uptake = max(2.5, min(20.0, 7.5 * float(torch.exp(0.45 * _normal(generator)))))
    x[tumour] = (uptake * textured(0.25, 12.0))[tumour]
    depth = _depth(tumour)
    if tumour.sum() * spacing_mm**3 > 12_000 and _uniform(generator) < 0.4:
        x[depth > 0.55 * depth.max()] = 0.25 * uptake  # necrosis
    return x


# --- scanner


def scan(uptake: Volume, hu: Volume, spacing_mm: float, generator: Generator) -> Volume:
    """What a scanner with 6 mm of blur shows of an uptake after OSEM, in SUV.

    Slices are measured on their own, but for the blur. Of the expected counts 35 % more
    are randoms and scatter, known to the reconstruction. A slice through the neck has
    between 2·10⁵ and 8·10⁵ true counts.
    """
    d, h, w = uptake.shape
    side = -(-max(h, w) // 16) * 16  # few sizes, so that matrices serve many patients
    room = (0, side - w, 0, side - h)
    mu = WATER_511 * (1 + torch.where(hu < 0, hu, 0.5 * hu) / 1000).clamp_min(0)
    x = blurred(uptake, 6.0 / spacing_mm)
    beams = _beams(side, spacing_mm)
    seen, through = (pad(v, room)[:, None] for v in (x, mu))
    gains = [torch.exp(-A(through)) for A in beams]
    trues = [a * A(seen) for A, a in zip(beams, gains, strict=True)]
    total = sum(float(t.sum()) for t in trues) / d
    counts = 2e5 * 4 ** _uniform(generator) / max(total, 1e-9)
    spread = 0.35 * total / sum(t.numel() / d for t in trues)
    y = [poisson(counts * (t + spread), generator) / counts for t in trues]

    found = torch.ones_like(seen)
    whole = [A.adjoint(a).clamp_min(1e-6) for A, a in zip(beams, gains, strict=True)]
    for _ in range(ROUNDS):
        for A, a, data, norm in zip(beams, gains, y, whole, strict=True):
            ratio = data / (a * A(found) + spread)
            found = found * A.adjoint(a * ratio) / norm
    return blurred(found[:, 0, :h, :w], 5.0 / spacing_mm)


@cache
def _beams(side: int, spacing_mm: float) -> list[ParallelBeam]:
    """OSEM's subsets: every so many-th view each."""
    angles = torch.arange(VIEWS) * (pi / VIEWS)
    order = [0, 3, 1, 4, 2, 5]  # neighbours in time far apart in angle
    return [ParallelBeam((side, side), angles[k::SUBSETS], spacing_mm) for k in order]


def brain(hu: Volume, spacing_mm: float) -> Region:
    """The largest soft part that bone encloses in axial slices; empty if there is none.

    Bone is closed over 8 mm, so that sutures and the base's openings do not leak.
    """
    bone = _dilated(hu > 200, 8 / spacing_mm)
    soft = (
        torch.from_numpy(slicewise_filled(bone.numpy()))
        & (hu > -20)
        & (hu < 120)
        & ~(hu > 200)
    )
    opened = _dilated(_eroded(soft & ~bone, 6 / spacing_mm), 12 / spacing_mm) & soft
    if opened.sum() * spacing_mm**3 < 50_000:
        return torch.zeros_like(opened)
    return _largest(opened)


# --- geometry


def blurred(x: Volume, fwhm: float) -> Volume:
    """x ∗ a Gaussian of the given width at half its height, in voxels."""
    from scipy import ndimage

    sigma = fwhm / sqrt(8 * log(2))
    return torch.from_numpy(
        ndimage.gaussian_filter(x.numpy(), sigma, mode="constant")
    ).to(x.dtype)


def slicewise_filled(region: np.ndarray) -> np.ndarray:
    """A region (z, y, x) with the holes of its axial slices filled."""
    from scipy import ndimage

    slices: list[Any] = [ndimage.binary_fill_holes(s) for s in region]
    return np.stack(slices)


def field(shape: torch.Size, voxels: float, generator: Generator) -> Volume:
    """A smooth Gaussian field of about unit variance, correlated over some voxels."""
    cells = [max(2, round(n / voxels) + 1) for n in shape]
    coarse = torch.randn(1, 1, *cells, generator=generator)
    fine = interpolate(coarse, list(shape), mode="trilinear", align_corners=True)[0, 0]
    return fine / fine.std().clamp_min(1e-6)


def _coordinates(like: Volume) -> Tensor:
    axes = [torch.arange(n, dtype=torch.float32) for n in like.shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def _depth(region: Region) -> Volume:
    """Voxels to the region's outside."""
    from scipy import ndimage

    depth: Any = ndimage.distance_transform_edt(region.numpy())
    return torch.from_numpy(depth).float()


def _eroded(region: Region, voxels: float) -> Region:
    return _depth(region) > voxels


def _dilated(region: Region, voxels: float) -> Region:
    return region if not region.any() else _depth(~region) <= voxels


def _largest(region: Region) -> Region:
    from scipy import ndimage

    found: Any = ndimage.label(region.numpy())
    parts, count = found
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    return torch.from_numpy(parts == 1 + int(sizes[1:].argmax()))


def _part_of(region: Region, seed: Tensor) -> Region:
    """The connected part of a region that holds a voxel."""
    from scipy import ndimage

    found: Any = ndimage.label(region.numpy())
    parts, _ = found
    return torch.from_numpy(parts == parts[tuple(seed.tolist())])


def _uniform(generator: Generator) -> float:
    return float(torch.rand((), generator=generator))


def _normal(generator: Generator) -> Tensor:
    return torch.randn((), generator=generator)
