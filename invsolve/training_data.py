"""What a prior is trained on: slices of volumes, volumes, or squares of photographs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor
from torch.nn.functional import interpolate, pad

from invsolve import io
from invsolve.operators import Greyscale
from invsolve.planes import PLANES
from invsolve.priors import AffineMap
from invsolve.shapes import per_item
from invsolve.units import hu_to_mu


class Section(BaseModel):
    """A part of a configuration file; a name that it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Labels(Section):
    """Contours that are channels beside the image: 0 outside, ``value`` inside.

    An image whose contours lack one of the bits altogether is left out: what was not
    drawn may well be there.
    """

    bits: dict[str, list[int]] = Field(min_length=1)
    """Each label's name, and the bits of the contours' files, any of which it is."""
    suffixes: tuple[str, str] = ("_ct", "_structures")
    """What ends the name of an image's file, and what that of its contours' instead."""
    value: float = Field(default=0.5, gt=0)
    """In the prior's range. What is smaller is made out later, when more of the image
    is seen."""


class Data(Section):
    """Which images: every slice of every file in a folder, or parts of photographs."""

    train: Path
    val: Path
    pattern: str = "*.nii.gz"
    """Of the files, or of the folders that each hold a DICOM series: ``"*"``."""
    classes: bool = False
    """Whether the files lie in subfolders, one for each class of images."""
    dims: Literal[2, 3] = 2
    """2 for slices, 3 for whole volumes, all of one shape, or crops of them."""
    unit: Literal["HU", ""] = ""
    axes: str | None = None
    """Where the arrays' axes point, if their affines are wrong; see `invsolve.io.read`."""
    window: tuple[float, float] | None = None
    """The values, in the file's unit, to which darker and brighter ones are cut."""
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
    fade: float = Field(default=0.0, ge=0, le=1)
    """The part of them that is shown with less contrast: see `faded`."""
    flip: bool = True
    """Random left–right mirroring."""
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    """Which slices of a volume (z, y, x): across z, y or x. For `invsolve.priors.Slices`
    across the same axis."""
    neighbours: int = Field(default=1, gt=0)
    """How many slices of a file that follow one another are the channels of one image,
    for `invsolve.priors.Groups`."""
    labels: Labels | None = None
    """Contours of what the slices show, as more channels; none unless given."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Data":
        if self.photo_crops and (self.crop or self.unit or self.dims == 3):
            raise ValueError("crop, unit and dims are for slices: leave them out")
        if self.window and (self.photo_crops or self.window[0] >= self.window[1]):
            raise ValueError("window is [low, high], of slices")
        for name in ("grey", "fade"):
            if getattr(self, name) and not self.photo_crops:
                raise ValueError(f"{name} is for photographs: set photo_crops")
        if self.labels and (self.photo_crops or self.dims == 3):
            raise ValueError("labels are of slices: leave photo_crops and dims out")
        if self.plane != "axial" and (
            self.labels or self.photo_crops or self.dims == 3
        ):
            raise ValueError("plane is of slices: labels and dims are not for them")
        if self.neighbours > 1 and (self.labels or self.photo_crops or self.dims == 3):
            raise ValueError("neighbours are slices: labels and dims are not for them")
        return self


FOREGROUND = 0.25
"""What is above it in the prior's range is not background."""

FAINTEST = 0.03
"""The least contrast of a faded image, of its own."""


class Images(NamedTuple):
    """All images of a folder, in the prior's range as float16, and their classes."""

    values: Float[Tensor, "n channels *space"]
    labels: Int[Tensor, " n"]
    classes: list[str]


def load(
    folder: Path, data: Data, generator: Generator
) -> Float[Tensor, "n channels *space"]:
    """All images of a folder in the prior's range, (u − offset)/scale, as float16.

    Args:
        folder: where the files are that match ``data.pattern``.
        data: what they are, and what is wanted of them.
        generator: of the squares' places and scales; slices draw nothing.

    Raises:
        ValueError: no file matches, one cannot be used, or nothing is left of them.
    """
    return load_classes(folder, data, generator).values


def load_classes(folder: Path, data: Data, generator: Generator) -> Images:
    """The images that `load` gives, and the subfolder that each is from."""
    pattern = f"*/{data.pattern}" if data.classes else data.pattern
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"no file matches {folder / pattern}: check its name")
    if data.photo_crops:
        values = _squares(files, data, generator)
        counts = [data.photo_crops] * len(files)
    else:
        values, counts = _slices(files, data)
    of_file = [file.relative_to(folder).parts[0] for file in files]
    classes = sorted(set(of_file)) if data.classes else []
    numbers = [classes.index(name) if classes else 0 for name in of_file]
    labels = torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
    return Images(values, labels, classes)


def _slices(files: list[Path], data: Data) -> tuple[Tensor, list[int]]:
    """Every slice or volume with something in it, (n, c, *space); how many of each file."""
    to_prior = AffineMap(data.scale, data.offset).inverse
    kept: list[Tensor] = []
    counts: list[int] = []
    for path in files:
        inside = None if data.labels is None else contours(path, data.axes, data.labels)
        if data.labels and inside is None:
            counts.append(0)
            continue
        values = io.read(path, axes=data.axes).values
        if data.window:
            values = values.clamp(*data.window)
        u = to_prior(hu_to_mu(values) if data.unit == "HU" else values)
        u = u[None] if data.dims == 3 else u.movedim(PLANES[data.plane], 0)
        if len(u) < data.neighbours:
            raise ValueError(f"{path} has fewer slices than data.neighbours")
        u = u.unfold(0, data.neighbours, 1).movedim(-1, 1)
        foreground = (u > FOREGROUND).flatten(2).float().mean(2).amin(1)
        if data.labels and inside is not None:
            if len(inside) != len(u) or inside.shape[2:] != u.shape[2:]:
                raise ValueError(f"{path} and its contours are not of one size")
            u = torch.cat([u, data.labels.value * inside], 1)
        kept.append(u[foreground >= data.min_foreground].half())
        counts.append(len(kept[-1]))
        if kept[-1].shape[1:] != kept[0].shape[1:]:
            raise ValueError(
                f"{path} has images of {tuple(kept[-1].shape[1:])}, {files[0]} of "
                f"{tuple(kept[0].shape[1:])}: resample them to one size"
            )
    if not kept:
        raise ValueError(
            f"no file in {files[0].parent} has contours of all labels: check "
            "data.labels.bits"
        )
    images = torch.cat(kept)
    if not len(images):
        raise ValueError(
            f"every slice in {files[0].parent} is background: check data.scale, "
            "data.unit and data.min_foreground"
        )
    return images, counts


def contours(
    path: Path, axes: str | None, labels: Labels
) -> Bool[Tensor, "slices labels rows columns"] | None:
    """What of a volume lies inside each label; None if a bit of one is set nowhere.

    Args:
        path: the image's file, whose name tells that of its contours.
        axes: as for the image.
        labels: which.

    Raises:
        ValueError: there are no contours beside the image, or they are no whole numbers.
    """
    before, _, after = path.name.rpartition(labels.suffixes[0])
    beside = path.with_name(before + labels.suffixes[1] + after)
    if not beside.is_file():
        raise ValueError(
            f"{path} has no contours beside it, no {beside.name}: check data.pattern "
            "and data.labels.suffixes"
        )
    values = io.read(beside, axes=axes).values
    bits = values.int()
    if not torch.equal(bits.to(values), values):
        raise ValueError(f"{beside} holds no bits: its values are not whole numbers")
    parts = [[bits >> b & 1 > 0 for b in chosen] for chosen in labels.bits.values()]
    if not all(part.any() for label in parts for part in label):
        return None
    return torch.stack([torch.stack(label).any(0) for label in parts], 1)


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


class Drawn(NamedTuple):
    """A batch: its images, their first pixels in those they are cut from, and which."""

    x: Float[Tensor, "n c *space"]
    corners: Int[Tensor, "n dims"]
    which: Int[Tensor, " n"]


def draw(
    images: Float[Tensor, "all c *space"],
    data: Data,
    n: int,
    crop: int,
    generator: Generator,
) -> Drawn:
    """A batch of n images at random, each mirrored, shifted, grey or faded at random.

    Args:
        images: what `load` gave.
        data: how they may be changed.
        n: how many.
        crop: the side of squares (cubes) around the foreground; 0 for whole images.
        generator: of all of it.
    """
    index = torch.randint(len(images), (n,), generator=generator)
    x, sides = images[index].float(), images.shape[2:]
    corners = torch.zeros(n, len(sides), dtype=torch.long)
    if data.flip:
        flip = torch.rand(n, generator=generator) < 0.5
        x[flip] = x[flip].flip(-1)
    if data.grey:
        grey = torch.rand(n, generator=generator) < data.grey
        x[grey] = Greyscale()(x[grey]).expand_as(x[grey])
    if data.fade:
        x = faded(x, data.fade, generator)
    if crop:
        corners = torch.stack([_corner(image, crop, generator) for image in x])
        x = _windows(x, corners, [crop] * len(sides))
    elif data.shift and not data.photo_crops:  # those are cut at random places already
        padded = pad(x, [data.shift] * 2 * len(sides))
        most = 2 * data.shift + 1
        moved = torch.randint(most, (n, len(sides)), generator=generator)
        x = _windows(padded, moved, sides)
    return Drawn(x, corners, index)


def faded(
    x: Float[Tensor, "n channels *space"], part: float, generator: Generator
) -> Float[Tensor, "n channels *space"]:
    """Some of the images with less contrast: x̄ + u (x − x̄), x̄ each channel's mean.

    Squares of photographs are seldom nearly flat, so that a network that saw few such
    draws them towards textures. Fading makes the same scene's fog or poor light.

    Args:
        x: the images.
        part: the probability of each to be one of them.
        generator: of which they are, and of u, even in its logarithm from `FAINTEST` to 1.
    """
    chosen = torch.rand(len(x), generator=generator) < part
    u = FAINTEST ** (chosen * torch.rand(len(x), generator=generator))
    mean = x.mean(tuple(range(2, x.ndim)), keepdim=True)
    return mean.lerp(x, per_item(u, x))


def _windows(x: Tensor, corners: Tensor, sides: Sequence[int]) -> Tensor:
    """A part of each image that begins at its corner."""
    parts = []
    for image, corner in zip(x, corners.tolist(), strict=True):
        for axis, (at, side) in enumerate(zip(corner, sides, strict=True), 1):
            image = image.narrow(axis, at, side)
        parts.append(image)
    return torch.stack(parts)


def _corner(image: Tensor, side: int, generator: Generator) -> Tensor:
    """Of a square that holds a pixel of the foreground, inside the image."""
    where = (image[0] > FOREGROUND).nonzero()
    pick = int(torch.randint(len(where), (), generator=generator))
    back = torch.randint(side, (image.ndim - 1,), generator=generator)
    limit = torch.tensor(image.shape[1:]) - side
    return (where[pick] - back).clamp_min(0).minimum(limit)
