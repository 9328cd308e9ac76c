"""The page of a segmentation: its numbers by their definitions, its pictures in place."""

import dataclasses
import io as streams
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from invsolve.grids import Grid
from invsolve.io import Image
from invsolve.segmentation.report import (
    COLOURS,
    LEAST_MM,
    NOTICE,
    SIMULATED,
    SegmentationReport,
    figures,
    numbers,
    page,
    save_report,
)
from invsolve.segmentation.result import Segmentation

skimage_io = pytest.importorskip("skimage.io")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

SPACING = (5.0, 2.0, 2.0)
SHAPE = (30, 70, 80)
CENTRE = (15, 35, 40)
AFFINE = np.array(
    [[-2.0, 0, 0, 80.0], [0, -2.0, 0, 70.0], [0, 0, 5.0, -75.0], [0, 0, 0, 1.0]]
)
GRID = Grid(SHAPE, AFFINE)


def box(centre: tuple[int, int, int], half: tuple[int, int, int]) -> Tensor:
    """1 in a box of 2·half + 1 voxels a side."""
    mask = torch.zeros(SHAPE)
    mask[tuple(slice(c - h, c + h + 1) for c, h in zip(centre, half, strict=True))] = 1
    return mask


def segmentation(*draws: Tensor, **said: str) -> Segmentation:
    """Draws of one label; or of several, (labels, z, y, x) each."""
    stack = torch.stack([d if d.ndim == 4 else d[None] for d in draws])
    labels = ("tumour",) if stack.shape[1] == 1 else ("GTVp", "GTVn")
    card = {"name": "tiny", **said}
    return Segmentation(stack, stack.mean(0), GRID, labels, card, 81, 2.5)


@pytest.fixture
def report() -> SegmentationReport:
    """Four draws that nest, on a CT of air, with a PET of its own coarser grid."""
    halves = ((1, 2, 2), (1, 3, 3), (1, 4, 4), (1, 6, 6))
    pet_grid = GRID.spaced(4.0)
    pet = torch.zeros(pet_grid.shape) + 0.5
    z, y, x = _index(pet_grid, CENTRE)
    pet[z - 3 : z + 4, y - 3 : y + 4, x - 3 : x + 4] = 4.0
    pet[z, y, x] = 9.0
    return SegmentationReport(
        segmentation(*(box(CENTRE, half) for half in halves)),
        Image(torch.full(SHAPE, -1000.0), AFFINE, "HU"),
        Image(pet, pet_grid.affine, "SUV"),
    )


def _index(grid: Grid, voxel: tuple[int, int, int]) -> tuple[int, int, int]:
    """The voxel of another grid that holds the middle of one of `GRID`."""
    there = np.linalg.inv(grid.affine) @ AFFINE @ (*voxel[::-1], 1)
    x, y, z = np.rint(there[:3]).astype(int)
    return int(z), int(y), int(x)


def test_volumes_are_voxels_times_their_size(report: SegmentationReport) -> None:
    [row] = report.findings
    ml = [3 * n * n * 0.02 for n in (5, 7, 9, 13)]
    assert row.draws_ml == pytest.approx(ml)
    assert row.mean_ml == pytest.approx(np.mean(ml))
    assert row.interval_ml == pytest.approx((ml[0], ml[-1]))
    assert row.mask_ml == pytest.approx(ml[2])  # two of four draws hold it: ½
    assert dataclasses.replace(report, threshold=0.8).findings[
        0
    ].mask_ml == pytest.approx(ml[0])


def test_the_interval_says_what_it_is() -> None:
    """Of n draws the range holds a further one with (n − 1)/(n + 1)."""
    ct = Image(torch.full(SHAPE, -1000.0), AFFINE, "HU")
    draw = box(CENTRE, (1, 2, 2))

    def name(n: int) -> str:
        return SegmentationReport(segmentation(*[draw] * n), ct).interval_name

    assert name(4) == "range of the draws (60% interval)"
    assert "(89% interval)" in name(18)
    assert name(19) == name(40) == "90% interval"


def test_uptake_is_of_the_pet_s_own_voxels(report: SegmentationReport) -> None:
    """9 in one voxel of 0.064 ml and 4 in the others, whatever the CT's grid."""
    [row] = report.findings
    assert row.suv_max == 9
    assert row.suv_mean is not None and row.tlg_ml is not None
    n = 5 / (row.suv_mean - 4)  # (9 + 4(n − 1))/n = 4 + 5/n
    assert n == pytest.approx(round(n), abs=1e-3)
    assert n * 0.064 == pytest.approx(row.mask_ml, rel=0.2)
    assert row.tlg_ml == pytest.approx((4 * n + 5) * 0.064, rel=1e-4)


def test_scores_are_of_the_mask_against_the_truth(report: SegmentationReport) -> None:
    truth = box(CENTRE, (1, 4, 3))[None] > 0
    scored = dataclasses.replace(report, truth=truth)
    [row] = scored.findings
    assert row.scores is not None
    assert row.scores["Dice"] == pytest.approx(2 * 7 / (9 + 7))
    assert row.scores["Jaccard"] == pytest.approx(7 / 9)
    assert row.scores["precision"] == pytest.approx(7 / 9)
    assert row.scores["recall"] == 1
    assert row.scores["HD95"] == pytest.approx(2.0)  # one voxel in x
    assert row.scores["volume error"] == pytest.approx(2 / 7)
    assert row.truth_ml == pytest.approx(3 * 9 * 7 * 0.02)


def test_maps_lie_on_the_ct_s_grid(report: SegmentationReport) -> None:
    coarse = GRID.spaced(4.0)
    half = torch.zeros(coarse.shape)
    z, y, x = _index(coarse, CENTRE)
    half[z - 2 : z + 3, y - 2 : y + 3, x - 2 : x + 3] = 1
    other = dataclasses.replace(
        report.segmentation,
        probabilities=torch.stack([half, 0 * half])[:, None],
        expected=half[None] / 2,
        grid=coarse,
    )
    moved = dataclasses.replace(report, segmentation=other)
    assert moved.prob.shape == moved.std.shape == (1, *SHAPE)
    for maps in (moved.prob, moved.std):
        assert float(maps[0, *CENTRE]) == pytest.approx(0.5)
    assert moved.prob[0, 0, 0, 0] == 0
    centroid = (moved.prob[0] > 0.25).nonzero().float().mean(0)
    assert centroid.tolist() == pytest.approx(CENTRE, abs=1.0)


def test_the_planes_cut_the_largest_tumour(report: SegmentationReport) -> None:
    small, large = box((5, 20, 20), (1, 1, 1)), box((20, 50, 60), (2, 3, 4))
    both = dataclasses.replace(report, segmentation=segmentation(small + large))
    z, y, x = both.centre
    assert large[z, y, x] == 1
    nothing = dataclasses.replace(report, segmentation=segmentation(0 * small))
    assert nothing.centre == CENTRE
    unsure = dataclasses.replace(
        report, segmentation=segmentation(0.3 * small + 0.1 * large)
    )
    z, y, x = unsure.centre
    assert (small + large)[z, y, x] > 0


# --- pictures

DPI, LEFT, TOP, WIDE, GAP = 150, 0.36, 0.62, 2.5, 0.08


def panels(png: bytes, row: int, column: int) -> np.ndarray:
    """One picture of the figure from near, whose panels are squares: 0 … 255."""
    whole = skimage_io.imread(streams.BytesIO(png))[..., :3].astype(float)
    x = round(DPI * (LEFT + column * (WIDE + GAP)))
    y = round(DPI * (TOP + row * (WIDE + GAP)))
    side = round(DPI * WIDE)
    return whole[y : y + side, x : x + side]


def middle(where: np.ndarray) -> tuple[float, float]:
    """Of the pixels that are true: (right, down) from the panel's middle, in mm."""
    rows, columns = where.nonzero()
    mm = LEAST_MM / len(where)
    half = LEAST_MM / 2
    return columns.mean() * mm - half, rows.mean() * mm - half


def like(panel: np.ndarray, colour: str) -> np.ndarray:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(panel - rgb).max(-1) < 40


@pytest.mark.parametrize(
    ("row", "away", "seen"),
    [
        (0, (0, -15, 15), (30.0, -30.0)),  # front and left: right above in axial planes
        (1, (6, 0, 15), (30.0, -30.0)),  # head and left: right above in coronal ones
        (2, (6, -15, 0), (-30.0, -30.0)),  # head and front: left above in sagittal ones
    ],
    ids=["axial", "coronal", "sagittal"],
)
def test_pictures_are_true_to_place_and_scale(
    row: int, away: tuple[int, int, int], seen: tuple[float, float]
) -> None:
    """A bone 30 mm away is seen there, and the tumour's contour in the middle."""
    z, y, x = (c + d for c, d in zip(CENTRE, away, strict=True))
    hu = torch.where(box((z, y, x), (1, 3, 3)) > 0, 1000.0, -1000.0)
    draw = box(CENTRE, (1, 4, 4))
    suv = Image(6 * draw, AFFINE, "SUV")
    png = figures(SegmentationReport(segmentation(draw), Image(hu, AFFINE, "HU"), suv))[
        "planes.png"
    ]

    ct, pet = panels(png, row, 0), panels(png, row, 1)
    grey = (np.ptp(ct, axis=-1) < 10) & (ct[..., 0] > 200)
    label = np.zeros_like(grey)  # of the sides, at the edges
    label[30:-30, 30:-30] = True
    assert middle(grey & label) == pytest.approx(seen, abs=1.5)
    for panel in (ct, pet):
        contour = like(panel, COLOURS[0])
        assert middle(contour) == pytest.approx((0, 0), abs=1.5)
    rows, columns = like(ct, COLOURS[0]).nonzero()
    mm = LEAST_MM / len(ct)
    across = (18.0, 18.0) if row == 0 else (18.0, 15.0)
    size = np.ptp(columns) * mm, np.ptp(rows) * mm
    assert size == pytest.approx(across, abs=2.0)
    dark = (pet.max(-1) < 60) & label
    assert middle(dark) == pytest.approx((0, 0), abs=1.5)


def test_figures_of_many_draws_labels_and_of_none(report: SegmentationReport) -> None:
    """None of them warns, and all are PNG files."""
    two = torch.stack([box(CENTRE, (1, 2, 2)), box((8, 20, 20), (1, 2, 2))])
    many = segmentation(*[two] * 20, 0 * two)
    empty = segmentation(0 * two[0])
    truth = two > 0
    for made in (
        dataclasses.replace(report, segmentation=many, truth=truth),
        dataclasses.replace(report, segmentation=many, pet=None),
        dataclasses.replace(report, segmentation=empty, truth=0 * truth[:1] > 0),
    ):
        drawn = figures(made)
        assert set(drawn) == {"planes.png", "whole.png", "volume.png"}
        assert all(png.startswith(b"\x89PNG") for png in drawn.values())


# --- the page

PNG = {"planes.png": b"p", "whole.png": b"w", "volume.png": b"v"}


def test_the_page_tells_all(report: SegmentationReport) -> None:
    facts = {"Run": {"seed": "17", "a <b>": "x & y"}}
    told = page(dataclasses.replace(report, facts=facts), PNG)
    assert NOTICE in told.replace("&#39;", "'") and SIMULATED not in told
    assert "4 draws of tumour by the model tiny." in told
    assert "4.9 ml" in told and "9.0" in told and "60% interval" in told
    assert "<dt>seed</dt><dd>17</dd>" in told
    assert "a &lt;b&gt;" in told and "x &amp; y" in told and "<b>" not in told
    assert "Against the truth" not in told and "Posterior samples" in told
    assert set(re.findall(r'(?:src|href)="([^"]{0,5})', told)) == {"data:"}
    assert told.count("data:image/png;base64,") == 3


def test_what_was_simulated_is_said(report: SegmentationReport) -> None:
    card = {"name": "<i>tiny</i>", "data": "OpenKBP, Simulated PET"}
    drawn = dataclasses.replace(report.segmentation, model=card)
    told = page(dataclasses.replace(report, segmentation=drawn), PNG)
    assert SIMULATED in told and "OpenKBP, Simulated PET" in told
    assert "<i>" not in told and "&lt;i&gt;tiny" in told


def test_scores_are_on_the_page(report: SegmentationReport) -> None:
    truth = box(CENTRE, (1, 4, 3))[None] > 0
    told = page(dataclasses.replace(report, truth=truth), PNG)
    assert "<td>0.875</td>" in told and "2.0 mm" in told and "+29 %" in told


def test_empty_masks_are_told(report: SegmentationReport) -> None:
    nothing = dataclasses.replace(
        report,
        segmentation=segmentation(torch.zeros(SHAPE)),
        truth=torch.zeros(1, *SHAPE, dtype=torch.bool),
    )
    told = page(nothing, PNG)
    assert "Nothing of tumour reaches the probability 0.5" in told
    assert not re.search(r"\bnan\b", told)
    [row] = numbers(nothing)
    assert row["suv_max"] is None and row["scores"]["Dice"] is None
    json.dumps(row, allow_nan=False)
    assert math.isnan((nothing.findings[0].scores or {})["Dice"])


def test_the_report_is_four_files(report: SegmentationReport, tmp_path: Path) -> None:
    save_report(tmp_path, report)
    names = {"planes.png", "whole.png", "volume.png", "index.html"}
    assert {p.name for p in tmp_path.iterdir()} == names
