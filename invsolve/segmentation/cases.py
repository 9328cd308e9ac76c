"""Cases to train and to measure on: CT, PET and tumour on one grid.

Both modalities are brought to cubic voxels of `SPACING_MM` within the body's bounding
box, and to numbers of order one: soft tissue of the CT, and log(1 + SUV).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from invsolve import io
from invsolve.grids import Grid, resampled
from invsolve.io import Image

from .pet import simulate_pet, slicewise_filled

SPACING_MM = 4.0
"""The side of a voxel that networks see."""
WINDOW_HU = (-200.0, 250.0)
"""What is dark and what is bright in the CT that networks see."""
AIR_HU = -1024.0


@final
@dataclass(frozen=True, eq=False)
class Case:
    """A patient on the networks' grid.

    Attributes:
        name: of the patient.
        ct, pet: in HU and SUV, on ``grid``.
        masks: the truth of each label, if it is known.
        grid: where the voxels lie.
    """

    name: str
    ct: Float[Tensor, "z y x"]
    pet: Float[Tensor, "z y x"]
    masks: Bool[Tensor, "labels z y x"] | None
    grid: Grid

    @property
    def images(self) -> Float[Tensor, "2 z y x"]:
        """What networks see: CT, and PET."""
        return torch.stack([ct_input(self.ct), pet_input(self.pet)])


def ct_input(hu: Tensor) -> Tensor:
    """−1 … 1 over soft tissue."""
    low, high = WINDOW_HU
    return 2 * (hu.clamp(low, high) - low) / (high - low) - 1


def pet_input(suv: Tensor) -> Tensor:
    """log(1 + SUV), of SUV up to 50."""
    return suv.clamp(0, 50).log1p()


def body_grid(ct: Image, spacing_mm: float = SPACING_MM) -> Grid:
    """Cubic voxels over the bounding box of the body, of what is large above −500 HU.

    Raises:
        ValueError: nothing in the image is as dense as a body.
    """
    from scipy import ndimage

    coarse = Grid.of(ct).spaced(spacing_mm)
    body = resampled(ct, coarse, outside=AIR_HU).values.numpy() > -500
    # Airways would part the body, and a couch touches it: fill the former, thin out
    # the latter.
    solid = slicewise_filled(body)
    found: Any = ndimage.label(ndimage.binary_erosion(solid, iterations=2))
    parts, count = found
    if not count:
        raise ValueError(
            "no body is to be found in the CT (nothing large above -500 HU): is it in "
            "Hounsfield units?"
        )
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept = np.isin(parts, (sizes > 0.1 * sizes.max()).nonzero()[0])
    box = ndimage.find_objects(kept.astype(int))[0]
    start = [max(0, s.start - 3) for s in box]
    stop = [min(n, s.stop + 3) for s, n in zip(box, coarse.shape, strict=True)]
    z, y, x = (b - a for a, b in zip(start, stop, strict=True))
    return coarse.part((start[0], start[1], start[2]), (z, y, x))


def openkbp_case(ct_file: Path, generator: Generator) -> Case:
    """A patient of OpenKBP (real CT and structures) with a simulated tumour and PET.

    Args:
        ct_file: ``ptNNN_ct.nii.gz``, its structures beside it and ``structures.json``
            one folder above.
        generator: of tumour and PET.
    """
    # The files' affines say RAS, but the anatomy lies PLI.
    ct = io.read(ct_file, axes="PLI")
    name = ct_file.name.removesuffix("_ct.nii.gz")
    bits = io.read(ct_file.with_name(f"{name}_structures.nii.gz"), "", axes="PLI")
    names = json.loads((ct_file.parents[1] / "structures.json").read_text())
    grid = body_grid(ct)
    hu = resampled(ct, grid, outside=AIR_HU).values
    code = resampled(bits, grid, nearest=True).values.int()
    structures = {name: (code >> bit) & 1 > 0 for name, bit in names.items()}
    present = {name: mask for name, mask in structures.items() if mask.any()}
    drawn = simulate_pet(hu, present, SPACING_MM, generator)
    return Case(name, hu, drawn.pet, drawn.tumour[None], grid)
