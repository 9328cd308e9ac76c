"""How far an image is from the truth: one number for each item of a batch."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .shapes import PerItem
from .units import mu_to_hu

Slices = Float[Tensor, "batch 1 h w"]
Region = Bool[Tensor, "batch 1 h w"]

BODY_HU = -500.0
"""What attenuates more than this belongs to the body, not to the air around it."""


def psnr(
    x: Slices, truth: Slices, data_range: float, mask: Region | None = None
) -> PerItem:
    """10 log₁₀(R² / mean (x − truth)²) in dB, the mean being over the mask.

    Args:
        x: the images.
        truth: what they should be.
        data_range: R, in the images' unit.
        mask: the pixels that count; all of them unless given.
    """
    _check(x, truth, data_range, mask)
    square = (x - truth).square()
    mse = square.flatten(1).mean(1) if mask is None else _mean_over(square, mask)
    return 10 * (data_range**2 / mse).log10()


def ssim(
    x: Slices, truth: Slices, data_range: float, mask: Region | None = None
) -> PerItem:
    """The structural similarity of Wang et al. (2004), averaged over the mask.

    As scikit-image computes it: in windows of 7×7 pixels, evenly weighted, with
    K₁ = 0.01 and K₂ = 0.03. A window is placed on every pixel of the mask; without one,
    on those where it lies wholly inside the image.

    Args:
        x: the images.
        truth: what they should be.
        data_range: in the images' unit.
        mask: the pixels that count.
    """
    from skimage.metrics import structural_similarity

    _check(x, truth, data_range, mask)
    if min(x.shape[-2:]) < 7:
        size = "×".join(map(str, x.shape[-2:]))
        raise ValueError(f"ssim needs images of at least 7×7 pixels, got {size}")
    means, maps = [], []
    for a, b in zip(x, truth, strict=True):
        pair = [t[0].detach().cpu().double().numpy() for t in (a, b)]
        scored: Any = structural_similarity(*pair, data_range=data_range, full=True)
        mean, full = scored
        means.append(float(mean))
        maps.append(torch.from_numpy(full))
    if mask is None:
        return torch.tensor(means, dtype=x.dtype, device=x.device)
    similarity = torch.stack(maps)[:, None].to(x.device)
    return _mean_over(similarity, mask).to(x.dtype)


def body_mask(mu: Slices) -> Region:
    """The body in each slice: the largest connected part above −500 HU, holes filled.

    So that neither the air around the patient nor the couch counts, but lungs and
    airways do. A slice without any such part counts as a whole.

    Args:
        mu: attenuation in 1/mm.
    """
    from scipy import ndimage

    regions = []
    for hu in mu_to_hu(mu[:, 0]).cpu().numpy():
        labelled: Any = ndimage.label(hu > BODY_HU)
        parts, count = labelled
        if count == 0:
            regions.append(torch.ones(hu.shape, dtype=torch.bool))
            continue
        sizes = ndimage.sum_labels(parts > 0, parts, range(1, count + 1))
        largest = parts == 1 + int(sizes.argmax())
        regions.append(torch.from_numpy(ndimage.binary_fill_holes(largest)))
    return torch.stack(regions)[:, None].to(mu.device)


def _mean_over(value: Tensor, mask: Tensor) -> Tensor:
    return (value * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


def _check(x: Tensor, truth: Tensor, data_range: float, mask: Tensor | None) -> None:
    for name, other in (("truth", truth), ("mask", mask)):
        if other is not None and other.shape != x.shape:
            raise ValueError(
                f"the {name} is of shape {tuple(other.shape)}, the images of "
                f"{tuple(x.shape)}: compare images on one grid"
            )
    if not data_range > 0:
        raise ValueError(f"data_range must be > 0, got {data_range}")
    if mask is not None and not mask.flatten(1).any(1).all():
        raise ValueError("a mask is empty: there is nothing to compare")
