"""The problems of the quality tables, on images that neither training nor tuning saw.

CT: OpenKBP's validation patients (real CT; the first nine for tuning). Brain MR: images
of random contrast from label maps of the heads that the prior never saw (simulated; the
first of the four for tuning). Photographs: scikit-image's (real), tuned on one of Lomiri's
that is not of the training set. All measurements are simulated: CT's on a grid three
times finer, the others by the operator that is solved with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ct_headneck import slices
from torch import Generator, Tensor
from torch.nn.functional import interpolate

import invsolve as iv
from invsolve import io, samplers
from invsolve.demo import FLOOR, even_angles
from invsolve.metrics import body_mask
from invsolve.operators import (
    Blur,
    Downsample,
    Fourier,
    GaussianNoise,
    Mask,
    ParallelBeam,
    RealImage,
    TransmissionNoise,
)
from invsolve.operators.patterns import random_columns
from invsolve.simulate import measure
from invsolve.units import MU_WATER, hu_to_mu

TUNE, TEST = 8, 32
"""How many images."""


@dataclass(frozen=True)
class Task:
    """One problem on one kind of image.

    Attributes:
        title: in words.
        prior: the bundled prior's name.
        data_range: of PSNR and SSIM.
        images: (folder, part, n) to (n, c, h, w), part being ``tune`` or ``test``.
        problem: (images, generator) to what was measured of them.
        tuned_as: the task whose settings are used; itself unless given.
        classical: methods without a prior, and the values tried for their settings.
        masked: whether only the body counts.
        few: how many of the test images the draws and the few-step curve are for.
    """

    title: str
    prior: str
    data_range: float
    images: Callable[[Path, str, int], Tensor]
    problem: Callable[[Tensor, Generator], iv.InverseProblem]
    classical: Mapping[str, tuple[Callable, Mapping[str, list[Any]]]]
    tuned_as: str | None = None
    masked: bool = False
    few: int = 4

    def region(self, x: Tensor) -> Tensor | None:
        """The pixels that count."""
        return body_mask(x) if self.masked else None


# --- CT


def ct_images(data: Path, part: str, n: int) -> Tensor:
    """Slices in 1/mm: one of each tuning patient, two of each other."""
    heights = (0.5,) if part == "tune" else (0.3, 0.7)
    images = slices(data, "tune" if part == "tune" else "report", heights)
    values = torch.cat([image.values for image in images[: -(-n // len(heights))]])
    return hu_to_mu(values[:n, None]).clamp_min(0)


def ct(views: int, x: Tensor, generator: Generator) -> iv.InverseProblem:
    """Parallel beams over 180°, Poisson counts, made on a finer grid."""
    A = ParallelBeam((x.shape[-2], x.shape[-1]), even_angles(views), PIXEL_MM)
    noise = TransmissionNoise(COUNTS, FLOOR)
    return iv.InverseProblem(measure(x, A, noise, generator=generator), A, noise)


PIXEL_MM, COUNTS = 3.906, 5e3
CT_CLASSICAL = {
    "FBP": (samplers.fbp, {"window": ["ram-lak", "shepp-logan", "cosine", "hann"]}),
    "TV": (
        samplers.tv,
        {
            "lam": [k / MU_WATER for k in (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)],
            "steps": [200],
            "nonnegative": [True],
        },
    ),
}


# --- brain MR


def mr_images(data: Path, part: str, n: int) -> Tensor:
    """Axial slices of the validation heads, two contrasts of each, spread evenly."""
    files = sorted((data / "mr-brain" / "val").glob("*.nii"))
    if len(files) != 8:
        raise SystemExit(
            "no brain images: python benchmarks/make_mr_population.py --draws 0 --out "
            f"{data}/mr-brain"
        )
    chosen = files[:2] if part == "tune" else files[2:]
    picked = []
    for path in chosen:
        volume = io.read(path).values
        filled = (volume > 0.1).flatten(1).float().mean(1) > 0.1
        inside = filled.nonzero().flatten()
        at = torch.linspace(0.2, 0.9, -(-n // len(chosen)))
        picked.append(volume[inside[(at * (len(inside) - 1)).long()]])
    return torch.stack(picked, 1).flatten(0, 1)[:n, None]


def mr(acceleration: int, x: Tensor, generator: Generator) -> iv.InverseProblem:
    """One coil, random columns of k-space with a full centre, σ = 0.01 of the range."""
    centre = 0.32 / acceleration
    pattern = random_columns(
        (x.shape[-2], x.shape[-1]),
        acceleration,
        centre,
        generator=Generator().manual_seed(7),
    )
    A = pattern @ Fourier() @ RealImage()
    noise = GaussianNoise(0.01)
    return iv.InverseProblem(noise.sample(A(x), generator=generator), A, noise)


# --- photographs

PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
)
"""Of scikit-image's package: photographs, the last three through instruments."""


def photos(data: Path, part: str, n: int) -> Tensor:
    """Squares of 64² pixels, of photographs that are 320 on their shorter side."""
    import skimage
    from skimage.io import imread

    if part == "tune":
        files = sorted((data / "photos" / "val").glob("*.png"))
    else:
        files = [Path(skimage.__file__).parent / "data" / name for name in PHOTOS]
    if not files:
        raise SystemExit(
            f"no photographs: benchmarks/fetch_photos.py --out {data}/photos"
        )
    each, squares = -(-n // len(files)), []
    for path in files:
        x = torch.from_numpy(imread(path)[..., :3].copy()).permute(2, 0, 1)[None] / 255
        scale = 320 / min(x.shape[-2:])
        x = interpolate(x, scale_factor=scale, mode="bilinear", antialias=True)
        tiles = x.unfold(2, 64, 64).unfold(3, 64, 64)[0].permute(1, 2, 0, 3, 4)
        tiles = tiles.flatten(0, 1)
        squares.append(tiles[torch.linspace(1, len(tiles) - 2, each).long()])
    return torch.stack(squares, 1).flatten(0, 1)[:n].clamp(0, 1)


def super_resolution(x: Tensor, generator: Generator) -> iv.InverseProblem:
    """Means of 4×4 pixels, σ = 0.02."""
    A, noise = Downsample(4, (64, 64)), GaussianNoise(0.02)
    return iv.InverseProblem(noise.sample(A(x), generator=generator), A, noise)


def deblurring(x: Tensor, generator: Generator) -> iv.InverseProblem:
    """A Gaussian blur of 1.5 pixels, circular, σ = 0.02."""
    A, noise = Blur.gaussian(1.5, (64, 64)), GaussianNoise(0.02)
    return iv.InverseProblem(noise.sample(A(x), generator=generator), A, noise)


def inpainting(x: Tensor, generator: Generator) -> iv.InverseProblem:
    """70 % of the pixels missing at random, σ = 0.02."""
    seen = torch.rand(1, 64, 64, generator=Generator().manual_seed(7)) < 0.3
    A, noise = Mask(seen.float()), GaussianNoise(0.02)
    return iv.InverseProblem(noise.sample(A(x), generator=generator), A, noise)


def tv_grid(
    *lams: float, nonnegative: bool = False
) -> Mapping[str, tuple[Callable, Mapping[str, list[Any]]]]:
    """Total variation over a grid of strengths.

    Of undersampled MR much of the background is not measured: that x ≥ 0 counts there,
    and hardly on photographs.
    """
    grid = {"lam": list(lams), "steps": [200], "nonnegative": [nonnegative]}
    return {"TV": (samplers.tv, grid)}


TASKS: Mapping[str, Task] = {
    "ct-30": Task(
        "CT, 30 views",
        "ct-headneck-128",
        2000 / 1000 * MU_WATER,
        ct_images,
        partial(ct, 30),
        CT_CLASSICAL,
        masked=True,
    ),
    "ct-15": Task(
        "CT, 15 views",
        "ct-headneck-128",
        2000 / 1000 * MU_WATER,
        ct_images,
        partial(ct, 15),
        CT_CLASSICAL,
        tuned_as="ct-30",
        masked=True,
    ),
    "mr-4": Task(
        "brain MR, ×4",
        "mr-brain-128",
        1.0,
        mr_images,
        partial(mr, 4),
        tv_grid(2.5, 5, 10, 20, 40, 80, nonnegative=True),
    ),
    "mr-8": Task(
        "brain MR, ×8",
        "mr-brain-128",
        1.0,
        mr_images,
        partial(mr, 8),
        tv_grid(2.5, 5, 10, 20, 40, 80, nonnegative=True),
        tuned_as="mr-4",
    ),
    "sr-4": Task(
        "super-resolution ×4",
        "natural-64",
        1.0,
        photos,
        super_resolution,
        tv_grid(1, 2, 4, 8, 16, 32),
        few=8,
    ),
    "deblur": Task(
        "deblurring",
        "natural-64",
        1.0,
        photos,
        deblurring,
        tv_grid(1, 2, 4, 8, 16, 32, 64),
        few=8,
    ),
    "inpaint": Task(
        "inpainting 70 %",
        "natural-64",
        1.0,
        photos,
        inpainting,
        tv_grid(2, 4, 8, 16, 32, 64),
        few=8,
    ),
}
