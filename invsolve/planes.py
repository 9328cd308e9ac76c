"""A volume seen from three sides: scores in each plane, a figure, and all its slices."""

import base64
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .metrics import psnr, ssim

Volume = Float[Tensor, "d h w"]

PLANES: Mapping[str, int] = {"axial": 0, "coronal": 1, "sagittal": 2}
"""Which of a volume's axes (z, y, x) each plane is cut across."""

LEAST = 0.04
"""A plane of which the region fills less is not scored."""

MOST_FILMED = 256


def plane_scores(
    x: Volume,
    truth: Volume,
    data_range: float,
    region: Bool[Tensor, "d h w"] | None = None,
) -> dict[str, tuple[float, float]]:
    """PSNR and SSIM in each orientation: the mean over its planes.

    A volume's PSNR as one number is the same from every side; the mean over planes is
    not, since a plane with little in it, or one that is hard, counts as any other. So do
    the papers on volumes by priors of slices tell theirs.

    Args:
        x, truth: the volumes.
        data_range: R of `metrics.psnr`, in their unit.
        region: the voxels that count. A plane which it fills by less than 4 % does not.

    Returns:
        plane → (PSNR in dB, SSIM); a plane of fewer than 7 pixels a side has none.
    """
    result = {}
    whole = torch.ones_like(x, dtype=torch.bool) if region is None else region
    for name, axis in PLANES.items():
        a, b, inside = (t.movedim(axis, 0)[:, None] for t in (x, truth, whole))
        keep = inside.flatten(1).float().mean(1) >= LEAST
        if min(a.shape[-2:]) < 7 or not keep.any():
            continue
        now = (a[keep], b[keep], data_range, inside[keep])
        result[name] = float(psnr(*now).mean()), float(ssim(*now).mean())
    return result


def planes_figure(
    volumes: Mapping[str, Volume],
    spacing: tuple[float, float, float],
    limits: tuple[float, float],
) -> bytes:
    """The three planes through the middle of each volume, as PNG, true to scale.

    z points up in coronal and sagittal planes, as a radiologist has them.

    Args:
        volumes: by name, one column each, all of one shape.
        spacing: millimetres from voxel to voxel along (z, y, x).
        limits: what is black and what is white.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(volumes.values()))
    sides = [n * mm for n, mm in zip(first.shape, spacing, strict=True)]
    z, y, x = (side / max(sides[1:]) for side in sides)
    wide, edge, top = 2.6, 0.75, 0.3
    heights = [wide * y, wide * z, wide * z]
    size = (edge + wide * len(volumes), top + sum(heights) + 0.1 * len(heights))
    figure = Figure(figsize=size, dpi=120, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for column, (name, volume) in enumerate(volumes.items()):
        down = top
        for (plane, axis), tall in zip(PLANES.items(), heights, strict=True):
            image = volume.movedim(axis, 0)[volume.shape[axis] // 2].float().cpu()
            across = wide * (y if plane == "sagittal" else x)
            box = (edge + column * wide, size[1] - down - tall, across * 0.98, tall)
            axes: Any = figure.add_axes(
                (
                    box[0] / size[0],
                    box[1] / size[1],
                    box[2] / size[0],
                    box[3] / size[1],
                )
            )
            axes.imshow(
                (image if plane == "axial" else image.flip(0)).numpy(),
                cmap="gray",
                vmin=limits[0],
                vmax=limits[1],
                aspect="auto",
                interpolation="nearest",
            )
            axes.set_axis_off()
            if plane == "axial":
                axes.set_title(name, fontsize=10, fontweight="bold", pad=4)
            if column == 0:
                axes.text(
                    -0.04,
                    0.5,
                    plane,
                    transform=axes.transAxes,
                    ha="right",
                    va="center",
                    fontsize=9,
                )
            down += tall + 0.1
    file = BytesIO()
    canvas.print_png(file)
    return file.getvalue()


def film(volumes: Mapping[str, Volume], limits: tuple[float, float]) -> dict[str, Any]:
    """All slices of some volumes side by side, one below the other, for a slider.

    Of more than 256 slices as many are taken, evenly.

    Returns:
        ``image``: a PNG in base64; ``slices``: the numbers of those in it; ``width`` and
        ``height``: of one, in pixels.
    """
    from PIL import Image

    depth = len(next(iter(volumes.values())))
    count = min(depth, MOST_FILMED)
    chosen = torch.linspace(0, depth - 1, count).round().long()
    low, high = limits
    strips = [
        ((v[chosen].float() - low) / (high - low)).clamp(0, 1) for v in volumes.values()
    ]
    beside = torch.cat(strips, 2)
    _, height, width = beside.shape
    grey = (255 * beside).round().to(torch.uint8).flatten(0, 1).cpu().numpy()
    file = BytesIO()
    Image.fromarray(grey).save(file, "PNG", optimize=True)
    return {
        "image": base64.b64encode(file.getvalue()).decode("ascii"),
        "slices": chosen.tolist(),
        "width": width,
        "height": height,
        "names": list(volumes),
    }
