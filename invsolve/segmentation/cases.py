"""Cases to train and to measure on: scans and masks on one grid.

All scans of a case are brought to cubic voxels within the body's bounding box, and
networks see them as numbers of order one, as their `Modality` says.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from invsolve import io
from invsolve.grids import Grid, covered, resampled
from invsolve.io import Image, Unit
from invsolve.training_data import Section

from .pet import simulate_pet, slicewise_filled

SPACING_MM = 4.0
"""The side of a voxel that networks see, unless their card says another."""
AIR_HU = -1024.0


@final
class Modality(Section):
    """How networks see a kind of scan: 2 (x − low)/(high − low) − 1, or log(1 + x)."""

    unit: Unit = ""
    window: tuple[float, float]
    """[low, high], in the unit, to which x is cut."""
    log: bool = False
    """log(1 + x) instead."""
    percentile: float | None = None
    """Where there is no unit, values are parts of this percentile of those that are above
    their mean."""
    air: float = 0.0
    """The value where there is no scan."""
    body: float | None = None
    """What is larger is of the body; None of a kind that does not show all of it."""

    def seen(self, x: Tensor) -> Tensor:
        """As networks see it."""
        low, high = self.window
        x = x.clamp(low, high)
        return x.log1p() if self.log else 2 * (x - low) / (high - low) - 1

    @property
    def outside(self) -> float:
        """Air, as networks see it."""
        return float(self.seen(torch.tensor(self.air)))

    def varied(self, seen: Tensor, amount: Tensor) -> Tensor:
        """What networks see, as another scanner might show it: by some 1.5 %, or 10 %."""
        return seen * (0.1 * amount).exp() if self.log else seen + 0.03 * amount

    def scaled(self, values: Tensor) -> Tensor:
        """In parts of the percentile, if there is one to take.

        Raises:
            ValueError: nothing is brighter than nought.
        """
        if self.percentile is None:
            return values
        bright = values[values > values.mean()].numpy()
        top = float(np.percentile(bright, self.percentile)) if len(bright) else 0.0
        if not top > 0:
            raise ValueError("the scan is empty: all of its values are alike")
        return values / top


MODALITIES: Mapping[str, Modality] = {
    "ct": Modality(unit="HU", window=(-200.0, 250.0), air=AIR_HU, body=-500.0),
    "pet": Modality(unit="SUV", window=(0.0, 50.0), log=True),
    "mr": Modality(window=(0.0, 1.0), percentile=99.0, body=0.1),
}
"""Those that need not be told in full: soft tissue of a CT, and an MR's own brightness."""


def modalities_of(told: Sequence[str] | Mapping[str, Any]) -> dict[str, Modality]:
    """Those of a card or configuration: names of `MODALITIES`, or a table of each."""
    if isinstance(told, Mapping):
        return {name: Modality.model_validate(how) for name, how in told.items()}
    if unknown := [name for name in told if name not in MODALITIES]:
        raise ValueError(
            f"unknown modality {unknown[0]!r}: one of {', '.join(MODALITIES)}, or tell its "
            "window in a table"
        )
    return {name: MODALITIES[name] for name in told}


def needed(modalities: Mapping[str, Modality]) -> dict[str, Modality]:
    """Which scans must be given: a CT beside what does not tell where the body is."""
    if any(how.body is not None for how in modalities.values()):
        return dict(modalities)
    return {"ct": MODALITIES["ct"], **modalities}


@final
@dataclass(frozen=True, eq=False)
class Case:
    """A patient on a network's grid.

    Attributes:
        name: of the patient.
        scans: by modality, in its unit, on ``grid``.
        masks: the truth of each label, if it is known.
        grid: where the voxels lie.
    """

    name: str
    scans: Mapping[str, Float[Tensor, "z y x"]]
    masks: Bool[Tensor, "labels z y x"] | None
    grid: Grid

    def shown(
        self, modalities: Mapping[str, Modality]
    ) -> Float[Tensor, "modalities z y x"]:
        """What networks see."""
        return torch.stack([how.seen(self.scans[k]) for k, how in modalities.items()])


def prepared(
    scans: Mapping[str, Image],
    modalities: Mapping[str, Modality],
    spacing_mm: float = SPACING_MM,
    name: str = "",
) -> Case:
    """Scans on a network's grid, over the body that the first that shows it tells.

    Args:
        scans: by modality.
        modalities: how each is to be seen, and maybe others.
        spacing_mm: the side of a voxel.
        name: of the patient.

    Raises:
        ValueError: there is no body to be found, the scans do not lie in one place, or one
            is in another unit than its modality's.
    """
    first = next(k for k, how in modalities.items() if how.body is not None)
    told = {k: _scaled(k, image, modalities[k]) for k, image in scans.items()}
    grid = body_grid(told[first], modalities[first], spacing_mm)
    moved = {}
    for kind, image in told.items():
        if kind != first and (part := covered(image, grid)) < 0.5:
            a, b = first.upper(), kind.upper()
            raise ValueError(
                f"{a} and {b} do not overlap in space: the {b} covers {part:.0%} of the "
                f"{a}'s body; check that they are of one patient and both affines are right"
            )
        values = resampled(image, grid, outside=modalities[kind].air).values
        moved[kind] = values.clamp_min(0) if modalities[kind].unit == "SUV" else values
    return Case(name, moved, None, grid)


def _scaled(kind: str, image: Image, how: Modality) -> Image:
    low, high = float(image.values.min()), float(image.values.max())
    if how.unit == "SUV" and (high > 1000 or low < -1):
        raise ValueError(
            f"the PET's values go from {low:.4g} to {high:.4g}, which cannot be SUV: "
            "divide Bq/ml by the injected dose per gram"
        )
    try:
        return replace(image, values=how.scaled(image.values))
    except ValueError as error:
        raise ValueError(f"{kind.upper()}: {error}") from error


def body_grid(
    scan: Image, how: Modality = MODALITIES["ct"], spacing_mm: float = SPACING_MM
) -> Grid:
    """Cubic voxels over the bounding box of the body, of what is large above a value.

    Raises:
        ValueError: nothing in the image is as dense, or as bright, as a body.
    """
    from scipy import ndimage

    assert how.body is not None
    coarse = Grid.of(scan).spaced(spacing_mm)
    body = resampled(scan, coarse, outside=how.air).values.numpy() > how.body
    # Airways would part the body, and a couch touches it: fill the former, thin out
    # the latter.
    solid = slicewise_filled(body)
    found: Any = ndimage.label(ndimage.binary_erosion(solid, iterations=2))
    parts, count = found
    if not count:
        raise ValueError(
            "no body is to be found in the CT (nothing large above -500 HU): is it in "
            "Hounsfield units?"
            if how.unit == "HU"
            else "no body is to be found in the scan (nothing large that is bright)"
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
    return Case(name, {"ct": hu, "pet": drawn.pet}, drawn.tumour[None], grid)
