"""A population of brain MR images from anatomical label maps.

No multi-subject brain MR may be shipped, but label maps of real heads may. Billot et al.,
"SynthSeg: Segmentation of brain MRI scans of any contrast and resolution without
retraining", Medical Image Analysis 2023, draws images of random contrast from them; the
idea is theirs, the statistics of T1 are from their table.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

Contrast = Literal["t1", "t2", "random"]
Volume = Float[Tensor, "z y x"]
Labels = Int[Tensor, "Z Y X"]

FLUID = 1
"""The tissue class of cerebrospinal fluid in the table."""

BRAIN_TISSUES: Mapping[str, tuple[int, ...]] = {
    "white matter": (2, 41, 7, 46),
    "cortex": (3, 42, 8, 47),
    "deep grey matter": (10, 49, 11, 50, 12, 51, 13, 52, 26, 58, 17, 53, 18, 54),
    "brain stem": (16, 28, 60),
    "ventricles": (4, 43, 5, 44, 14, 15, 72),
    "outer CSF": (24,),
}
"""FreeSurfer's labels of what segmenters tell apart: of cerebrum and cerebellum alike;
hippocampus and amygdala are with the deep grey matter. Lesions, vessels and the choroid
plexus are of none."""


def brain_mr(
    labels: Labels,
    tissues: Mapping[int, tuple[int, float, float]],
    generator: Generator,
    *,
    contrast: Contrast = "random",
    pool: int = 2,
) -> Volume:
    """b · P(μ_l + σ_l t): a magnitude image of the head, sharper classes averaged.

    Each tissue class of the labels l has a mean μ and a spread σ of its own, t is a
    texture that is half fine and half coarse, P takes means over ``pool``³ voxels (so
    that a voxel may hold several tissues) and b is a smooth bias field within about
    20 %. The 99.5th percentile is 1 and the background 0.

    Args:
        labels: label of each voxel, at 1 mm; turned and scaled a little at random.
        tissues: of each label its class and the mean and spread it has in T1.
        generator: where every random number comes from.
        contrast: ``t1`` (the table's means, spread as heads differ), ``t2`` (its order
            reversed, fluid brightest) or ``random`` means for all classes.
        pool: voxels of the labels along each side of one of the image.

    Raises:
        ValueError: a label has no entry in ``tissues``, or the contrast is unknown.
    """
    return labelled_brain_mr(labels, tissues, generator, contrast=contrast, pool=pool)[
        0
    ]


def labelled_brain_mr(
    labels: Labels,
    tissues: Mapping[int, tuple[int, float, float]],
    generator: Generator,
    *,
    contrast: Contrast = "random",
    pool: int = 2,
) -> tuple[Volume, Labels]:
    """`brain_mr`, and the labels as they were turned, ``pool``³ to a voxel."""
    if contrast not in get_args(Contrast):
        raise ValueError(f"unknown contrast {contrast!r}: t1, t2 or random")
    found = set(labels.unique().tolist())
    if missing := sorted(found - set(tissues)):
        raise ValueError(f"no tissue for the labels {missing}: add them to the table")
    mean, spread = _contrast(tissues, contrast, generator)
    turned = _turn(labels, generator)
    texture = _field(turned.shape, 64, generator) + torch.randn(
        turned.shape, generator=generator
    )
    fine = mean[turned] + spread[turned] * texture / 2**0.5
    coarse = F.avg_pool3d(fine.clamp_min(0)[None], pool)[0]
    image = coarse * (0.2 * _field(coarse.shape, 4, generator)).exp()
    return image / image[::2, ::2, ::2].quantile(0.995), turned


def tissue_codes(
    labels: Labels, tissues: Mapping[str, Sequence[int]], pool: int = 2
) -> Int[Tensor, "z y x"]:
    """1, 2 … in each ``pool``³ voxels of which most are of one of the tissues, or 0.

    Args:
        labels: label of each voxel.
        tissues: the labels that each tissue has; all others are of none.
        pool: as of `brain_mr`.
    """
    codes = torch.zeros(int(labels.max()) + 1, dtype=torch.long)
    for code, members in enumerate(tissues.values(), 1):
        codes[[label for label in members if label < len(codes)]] = code
    fine = codes[labels]
    votes = [
        F.avg_pool3d((fine == code).float()[None], pool)[0]
        for code in range(len(tissues) + 1)
    ]
    return torch.stack(votes).argmax(0)


def read_tissues(table: Path) -> dict[int, tuple[int, float, float]]:
    """Of each label its class, and T1's mean and spread in it; the background's are 0."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tissues = {
        int(r["label"]): (
            int(r["tissue_class"]),
            float(r["t1_mean_of_means"]),
            float(r["t1_mean_of_stds"]),
        )
        for r in rows
    }
    return tissues | {0: (0, 0.0, 0.0)}


def _contrast(
    tissues: Mapping[int, tuple[int, float, float]],
    contrast: Contrast,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """μ and σ for each label, by its class: so left and right are alike."""
    classes = max(c for c, _, _ in tissues.values()) + 1
    highest = max(m for _, m, _ in tissues.values())
    t1 = torch.zeros(classes)
    spread_t1 = torch.zeros(classes)
    for k, m, s in tissues.values():
        t1[k], spread_t1[k] = m / highest, s / highest
    u = torch.rand(classes, generator=generator)
    if contrast == "random":
        mean = 0.05 + 0.95 * u
    elif contrast == "t1":
        mean = t1 * (0.85 + 0.3 * u)
    else:
        mean = (1.05 - t1).clamp_min(0.05) * (0.8 + 0.2 * u)
        mean[FLUID] = 1
    # A voxel's spread in the table holds anatomy too (vessels, marrow): half of it.
    spread = 0.5 * torch.minimum(spread_t1, 0.25 * mean)
    mean[0] = spread[0] = 0
    size = max(tissues) + 1
    of_label, spread_of_label = torch.zeros(size), torch.zeros(size)
    for label, (k, _, _) in tissues.items():
        of_label[label], spread_of_label[label] = mean[k], spread[k]
    return of_label, spread_of_label


def _turn(labels: Labels, generator: Generator) -> Labels:
    """The labels turned by up to some degrees and scaled by up to a tenth."""
    angles = 0.12 * (2 * torch.rand(3, generator=generator) - 1)
    scales = 1 + 0.1 * (2 * torch.rand(3, generator=generator) - 1)
    skew = torch.zeros(3, 3)
    skew[0, 1], skew[0, 2], skew[1, 2] = angles
    matrix = torch.matrix_exp(skew - skew.T) * scales
    grid = F.affine_grid(
        torch.cat([matrix, torch.zeros(3, 1)], dim=1)[None],
        [1, 1, *labels.shape],
        align_corners=False,
    )
    moved = F.grid_sample(
        labels[None, None].float(), grid, mode="nearest", align_corners=False
    )
    return moved[0, 0].long()


def _field(shape: torch.Size, cells: int, generator: Generator) -> Tensor:
    """A smooth Gaussian field of about unit variance, with so many cells a side."""
    coarse = torch.randn(1, 1, cells, cells, cells, generator=generator)
    return F.interpolate(coarse, list(shape), mode="trilinear")[0, 0]
