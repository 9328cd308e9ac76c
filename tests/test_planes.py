"""A volume's scores, figure and film, on volumes whose planes are known."""

import base64
import math
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from invsolve.metrics import psnr
from invsolve.planes import MOST_FILMED, film, plane_scores, planes_figure
from invsolve.report import Report, Result, save_page
from invsolve.solve import Solution, Stats

STATS = Stats(24, 0, 12, 13, 2, 1.0, 0.2, 1.25, 10**6)


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)))


def test_a_plane_s_score_is_the_mean_over_its_planes() -> None:
    """An error in one slice alone leaves all others of that orientation perfect."""
    truth = torch.rand(8, 9, 10, generator=torch.Generator().manual_seed(0))
    error = torch.linspace(0.1, 0.8, 8)[:, None, None].expand(8, 9, 10)
    scores = plane_scores(truth + error, truth, 1.0)
    axial = [-20 * math.log10(float(e)) for e in torch.linspace(0.1, 0.8, 8)]
    assert scores["axial"][0] == pytest.approx(sum(axial) / 8, rel=1e-5)
    side = -10 * math.log10(float(error.square().mean()))
    assert scores["coronal"][0] == pytest.approx(side, rel=1e-5)
    assert scores["sagittal"][0] == pytest.approx(side, rel=1e-5)


def test_each_plane_is_cut_across_its_own_axis() -> None:
    truth = torch.zeros(8, 9, 10)
    truth[2, 3, 4] = 1.0
    x = truth.clone()
    x[2, 3, 4] = 0.5
    region = truth > 2
    region[2] = True  # one axial plane
    only = plane_scores(x, truth, 1.0, region)
    exact = float(psnr(x[2][None, None], truth[2][None, None], 1.0)[0])
    assert only["axial"][0] == pytest.approx(exact, rel=1e-5)
    assert 0 < only["axial"][1] < 1


def test_planes_with_nothing_in_them_and_small_ones_are_left_out() -> None:
    x = torch.rand(5, 9, 9, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(5, 9, 9, dtype=torch.bool)
    region[1:3] = True
    scores = plane_scores(x, x + 0.1, 1.0, region)
    assert set(scores) == {"axial"}  # of five slices the sides are too low for SSIM
    assert scores["axial"][0] == pytest.approx(20, rel=1e-4)
    assert plane_scores(x, x, 1.0, torch.zeros_like(region)) == {}


def test_the_figure_is_true_to_scale_and_z_points_up() -> None:
    volume = torch.zeros(6, 20, 30)
    volume[-1] = 1.0  # the head's end
    image = decoded(planes_figure({"one": volume}, (5.0, 2.0, 1.0), (0.0, 1.0)))
    dark = image[..., :3].max(2) < 20
    white = image[..., :3].min(2) > 235
    # y is 40 mm and x 30: wide is 2.6 inches for 40 mm, at 120 dots an inch.
    per_mm = 2.6 * 120 / 40
    rows = np.flatnonzero(dark[:, 120])
    axial = rows[rows < rows[0] + 45 * per_mm]
    assert len(axial) == pytest.approx(40 * per_mm, rel=0.03)
    below = rows[len(axial) :]
    coronal = below[: round(25 * per_mm)]
    assert np.diff(coronal).max() < 3
    above = coronal[0] - round(
        2.5 * per_mm
    )  # the brightest slice lies above the others
    assert white[above, 120]
    assert not white[coronal[len(coronal) // 2], 120]


def test_the_film_holds_every_slice_beside_its_peers() -> None:
    one = torch.arange(5.0)[:, None, None].expand(5, 4, 3)
    reel = film({"a": one, "b": 4 - one}, (0.0, 4.0))
    made = decoded(base64.b64decode(reel["image"]))
    assert made.shape == (20, 6) and (reel["width"], reel["height"]) == (6, 4)
    levels = np.round(255 * np.arange(5) / 4)
    assert np.abs(made[::4, 0] - levels).max() <= 1
    assert np.abs(made[::4, 5] - levels[::-1]).max() <= 1
    assert reel["slices"] == [0, 1, 2, 3, 4]
    long = film({"a": torch.zeros(1000, 2, 2)}, (0.0, 1.0))
    assert len(long["slices"]) == MOST_FILMED
    assert (long["slices"][0], long["slices"][-1]) == (0, 999)


def report_of(truth: torch.Tensor | None, spacing: Any) -> Report:
    hu = torch.full((9, 24, 24), -1000.0)
    hu[:, 6:20, 5:21] = 40.0
    x = hu + 10
    solution = Solution(x[None, :, None], "steered", "dds3d", STATS)
    given: dict[str, Any] = {"spacing": spacing} if spacing else {}
    known = None if truth is None else hu
    made = [Result.of("dds3d", solution, "HU", known)]
    return Report("A volume", "A test.", made, "HU", known, **given)


def test_the_page_shows_a_volume_from_three_sides(tmp_path) -> None:
    save_page(tmp_path / "v.html", report_of(torch.ones(1), (3.0, 2.0, 2.0)))
    page = (tmp_path / "v.html").read_text()
    assert "The volume" in page and 'type="range"' in page
    assert '<th scope="col">sagittal</th>' in page
    # 10 HU off, of 2000: 46.02 dB from every side.
    assert page.count("46.02 dB") >= 4
    save_page(tmp_path / "s.html", report_of(torch.ones(1), None))
    assert "The volume" not in (tmp_path / "s.html").read_text()
    save_page(tmp_path / "n.html", report_of(None, (3.0, 2.0, 2.0)))
    assert "The volume" in (tmp_path / "n.html").read_text()


def test_the_film_is_cropped_to_the_body(tmp_path) -> None:
    save_page(tmp_path / "v.html", report_of(torch.ones(1), (3.0, 2.0, 2.0)))
    page = (tmp_path / "v.html").read_text()
    # 14 rows and 16 columns and three on each side; truth and result side by side.
    assert "aspect-ratio: 44 / 20" in page
