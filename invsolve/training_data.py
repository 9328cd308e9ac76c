"""What a prior is trained on: slices of volumes, or squares of photographs."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor
from torch.nn.functional import interpolate, pad

from invsolve import io
from invsolve.operators import Greyscale
from invsolve.priors import AffineMap
from invsolve.units import hu_to_mu


class Section(BaseModel):
    """A part of a configuration file; a name that it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Which images: every slice of every file in a folder, or parts of photographs."""

    train: Path
    val: Path
    pattern: str = "*.nii.gz"
    unit: Literal["HU", ""] = ""
    axes: str | None = None
    """Where the arrays' axes point, if their affines are wrong; see `invsolve.io.read`."""
    scale: float = Field(default=1.0, gt=0)
    offset: float = 0.0
    min_foreground: float = Field(default=0.005, ge=0, le=1)
    """Leave out slices with fewer pixels than this above 0.25 in the prior's range."""
    shift: int = Field(default=8, ge=0)
    """Random translation of slices by up to so many pixels, the background coming in."""
    crop: int = Field(default=0, ge=0)
    """Side of the crops around the foreground that the first part of a run sees; 0 for
    whole images throughout. Where most of an image is background, crops show the
    network more for the same work; the last part lets it get used to whole images."""
    photo_crops: int = Field(default=0, ge=0)
    """Cut so many squares out of each file, a photograph in colour; 0 for slices."""
    size: int = Field(default=64, gt=0)
    """Side of those squares in pixels, after scaling."""
    zoom: float = Field(default=8.0, ge=1)
    """They are scaled down by up to so much, evenly in its logarithm."""
    grey: float = Field(default=0.0, ge=0, le=1)
    """The part of them that is shown without its colours."""
    flip: bool = True
    """Random left–right mirroring."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Data":
        if self.photo_crops and (self.crop or self.unit):
            raise ValueError("crop and unit are for slices: leave them out")
        if self.grey and not self.photo_crops:
            raise ValueError("grey is for photographs: set photo_crops")
        return self


FOREGROUND = 0.25
"""What is above it in the prior's range is not background."""


def load(
    folder: Path, data: Data, generator: Generator
) -> Float[Tensor, "n channels y x"]:
    """All images of a folder in the prior's range, (u − offset)/scale, as float16.

    Args:
        folder: where the files are that match ``data.pattern``.
        data: what they are, and what is wanted of them.
        generator: of the squares' places and scales; slices draw nothing.

    Raises:
        ValueError: no file matches, one cannot be used, or nothing is left of them.
    """
    files = sorted(folder.glob(data.pattern))
    if not files:
        raise ValueError(f"no file matches {folder / data.pattern}: check its name")
    if data.photo_crops:
        return _squares(files, data, generator)
    return _slices(files, data)


def _slices(files: list[Path], data: Data) -> Tensor:
    """Every slice with something in it: (n, 1, y, x)."""
    to_prior = AffineMap(data.scale, data.offset).inverse
    kept = []
    for path in files:
        values = io.read(path, axes=data.axes).values
        u = to_prior(hu_to_mu(values) if data.unit == "HU" else values)
        foreground = (u > FOREGROUND).flatten(1).float().mean(1)
        kept.append(u[foreground >= data.min_foreground].half())
    slices = torch.cat(kept)[:, None]
    if not len(slices):
        raise ValueError(
            f"every slice in {files[0].parent} is background: check data.scale, "
            "data.unit and data.min_foreground"
        )
    return slices


def _squares(files: list[Path], data: Data, generator: Generator) -> Tensor:
    """Squares at random places and scales, by area averaging: (n, 3, size, size)."""
    to_prior = AffineMap(data.scale, data.offset).inverse
    n, size = data.photo_crops, data.size
    squares = torch.empty(len(files) * n, 3, size, size, dtype=torch.half)
    for path, rows in zip(files, squares.split(n), strict=True):
        photo = torch.from_numpy(_read_photo(path)).permute(2, 0, 1)[None]
        height, width = photo.shape[2:]
        if min(height, width) < size:
            raise ValueError(f"{path} is smaller than data.size: leave it out")
        most = min(data.zoom, min(height, width) / size)
        draws = torch.rand(n, 3, generator=generator).tolist()
        for row, (z, down, right) in zip(rows, draws, strict=True):
            side = round(size * most**z)
            i, j = int(down * (height - side + 1)), int(right * (width - side + 1))
            square = photo[..., i : i + side, j : j + side].float() / 255
            row.copy_(to_prior(interpolate(square, [size] * 2, mode="area")[0]))
    return squares


def _read_photo(path: Path) -> np.ndarray:
    """A photograph in colour: (y, x, 3), uint8."""
    from skimage.io import imread

    try:
        with path.open("rb") as file:  # given a name, it leaves a damaged picture open
            array = np.asarray(imread(file))
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot read {path}: {first_line}") from error
    if array.ndim != 3 or array.shape[2] < 3 or array.dtype != np.uint8:
        raise ValueError(f"{path} has no colours of 8 bits each: leave it out")
    return np.ascontiguousarray(array[..., :3])


def draw(
    images: Float[Tensor, "all c y x"],
    data: Data,
    n: int,
    crop: int,
    generator: Generator,
) -> Float[Tensor, "n c side_y side_x"]:
    """A batch of n images at random, each mirrored, shifted or turned grey at random.

    Args:
        images: what `load` gave.
        data: how they may be changed.
        n: how many.
        crop: the side of squares around the foreground; 0 for whole images.
        generator: of all of it.
    """
    index = torch.randint(len(images), (n,), generator=generator)
    x = images[index].float()
    if data.flip:
        flip = torch.rand(n, generator=generator) < 0.5
        x[flip] = x[flip].flip(-1)
    if data.grey:
        grey = torch.rand(n, generator=generator) < data.grey
        x[grey] = Greyscale()(x[grey]).expand_as(x[grey])
    if data.photo_crops:  # cut at random places already
        return x
    if crop:
        return torch.stack([_crop(image, crop, generator) for image in x])
    if data.shift:
        h, w = x.shape[-2:]
        padded = pad(x, [data.shift] * 4)
        corners = torch.randint(2 * data.shift + 1, (n, 2), generator=generator)
        return torch.stack(
            [
                p[:, i : i + h, j : j + w]
                for p, (i, j) in zip(padded, corners.tolist(), strict=True)
            ]
        )
    return x


def _crop(image: Tensor, side: int, generator: Generator) -> Tensor:
    """A square around a pixel of the foreground, inside the image."""
    where = (image[0] > FOREGROUND).nonzero()
    pick = int(torch.randint(len(where), (), generator=generator))
    jitter = torch.randint(-side // 2, side // 2 + 1, (2,), generator=generator)
    limit = torch.tensor(image.shape[-2:]) - side
    i, j = (where[pick] + jitter - side // 2).clamp_min(0).minimum(limit).tolist()
    return image[:, i : i + side, j : j + side]
