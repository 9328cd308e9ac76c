"""An image as it is in a file: values, where they lie, and in what unit."""

from dataclasses import dataclass, replace
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Unit = Literal["HU", "1/mm", "SUV", ""]


@final
@dataclass(frozen=True, eq=False)
class Image:
    """Values on a grid, slices first: (z, y, x).

    A medical volume is laid out as a radiologist sees it: x runs to the patient's left,
    y to the back and z to the head, so that ``values[k]`` is an axial slice, nose up.

    Args:
        values: (z, y, x); a single picture has z = 1.
        affine: 4×4, from the index (x, y, z) to millimetres in the world of NIfTI (x to
            the patient's right, y to the front, z to the head).
        unit: of the values: Hounsfield units, attenuation in 1/mm, standardised uptake (by
            body weight, g/ml), or none.
        colour: whether the three "slices" are the red, green and blue of one picture.
    """

    values: Float[Tensor, "z y x"]
    affine: np.ndarray
    unit: Unit = ""
    colour: bool = False

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel along (z, y, x)."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @classmethod
    def from_array(cls, values: Tensor, unit: Unit = "") -> "Image":
        """A picture (y, x) or a stack (z, y, x) with no place: 1 mm, at the origin."""
        stack = values if values.ndim == 3 else values[None]
        return cls(stack.to(torch.float32), np.diag([-1.0, -1.0, 1.0, 1.0]), unit)

    def slices(self, start: int, stop: int) -> "Image":
        """The slices start … stop−1, in their place in the world."""
        affine = self.affine.copy()
        affine[:3, 3] += start * affine[:3, 2]
        return replace(self, values=self.values[start:stop], affine=affine)


def upright(array: np.ndarray, affine: np.ndarray, unit: Unit = "") -> Image:
    """The image of an array (i, j, k), its axes permuted and flipped as `Image` has them.

    Args:
        array: in any of the 48 orders in which a volume can be stored.
        affine: 4×4, from the index (i, j, k) to millimetres in the world of NIfTI.
        unit: of the values.
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff

    turn = turn_of(affine)
    turned = apply_orientation(array, turn)
    values = np.ascontiguousarray(turned.transpose(2, 1, 0), dtype=np.float32)
    moved = affine @ inv_ornt_aff(turn, array.shape)
    return Image(torch.from_numpy(values), moved, unit)


def turn_of(affine: np.ndarray) -> np.ndarray:
    """What nibabel has to do to an array for its axes to run Left, Posterior, Superior."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    return ornt_transform(io_orientation(affine), axcodes2ornt(("L", "P", "S")))
