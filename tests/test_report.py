import dataclasses
import re
from functools import partial

import pytest
import torch

from invsolve.report import (
    KINDS,
    Report,
    Result,
    figure,
    save_figure,
    save_page,
    table,
    told,
    versions,
)
from invsolve.samplers import tv
from invsolve.samplers.solvers import DDIM
from invsolve.solve import Solution, Stats
from invsolve.units import MU_WATER, hu_to_mu

STATS = Stats(24, 0, 12, 13, 2, 1.0, 0.2, 1.25, 10**6)


@pytest.fixture
def truth():
    hu = torch.full((3, 32, 32), -1000.0)
    hu[:, 6:26, 9:24] = 40.0
    hu[:, 12:16, 12:16] = 700.0
    return hu


@pytest.fixture
def results(truth, generator):
    mu = hu_to_mu(truth)[None, :, None]
    noise = torch.randn(4, *mu.shape[1:], generator=generator) * 0.05 * MU_WATER
    one = Solution(mu, "point_estimate", "tv", STATS)
    many = Solution(mu + noise, "posterior_sample", "dds", STATS)
    steered = Solution(mu + noise[:1], "steered", "dps", STATS)
    named = {"TV": one, "DDS <b>": many, "DPS": steered}
    return [Result.of(n, s, "1/mm", truth, {"lam": 1 / 3}) for n, s in named.items()]


def test_options_are_told_by_name():
    given = {"init": partial(tv, lam=1 / 3, steps=2), "solver": DDIM(0.5), "lam": 0.1}
    expected = {
        "init": "tv(lam=0.3333, steps=2)",
        "solver": "DDIM(eta=0.5)",
        "lam": 0.1,
    }
    assert told(given) == expected
    assert told({"init": tv, "start": "pinv"}) == {"init": "tv", "start": "pinv"}


@pytest.fixture
def report(results, truth):
    return Report(
        "Sparse & low dose",
        "A test.",
        results,
        "HU",
        truth,
        facts={"Run": {"seed": "0", **versions()}},
        measured="30 views",
    )


def test_attenuation_is_shown_in_hounsfield_units(results, truth):
    tv, dds, dps = results
    torch.testing.assert_close(tv.image, truth, atol=0.01, rtol=0)
    assert tv.std is None and dps.std is None and tv.sample is None
    assert float(dds.std.mean()) == pytest.approx(50, rel=0.1)
    assert float(dds.psnr.mean()) == pytest.approx(38, abs=1)  # 2000 HU over 25 HU
    assert len(dds.ssim) == 3


def test_the_figure_is_cropped_to_the_body_and_the_rest_is_not(report):
    rows, columns = report.crop(1)
    assert rows.start <= 6 and rows.stop >= 26 and rows.stop - rows.start < 32
    assert columns.start <= 9 and columns.stop >= 24
    picture = dataclasses.replace(report, unit="")
    assert picture.crop(1) == (slice(0, 32), slice(0, 32))


def test_the_window_is_the_one_asked_for(report):
    assert report.limits == (-160, 240)
    assert dataclasses.replace(report, window=(0.0, 1.0)).limits == (0, 1)
    low, high = dataclasses.replace(report, unit="").limits
    assert low == -1000 and high == 700


@pytest.mark.parametrize("methods", [1, 3])
@pytest.mark.parametrize("known", [True, False])
def test_every_figure_is_a_picture(report, methods, known, tmp_path):
    from skimage.io import imread

    path = tmp_path / "report.png"
    some = dataclasses.replace(
        report, results=report.results[1:2] if methods == 1 else report.results
    )
    if not known:
        some = dataclasses.replace(some, truth=None)
    save_figure(path, some)
    image = imread(path)
    rows = 1 if methods == 1 else 3 if known else 2
    assert image.ndim == 3 and image.shape[0] > 250 * rows
    assert image[..., :3].std() > 20
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_is_the_same_twice(report):
    assert figure(report, 0) == figure(report, 0)


def test_the_page_holds_everything_and_asks_for_nothing(report, tmp_path):
    path = tmp_path / "report.html"
    save_page(path, report)
    html = path.read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 3
    sources = re.findall(r'(?:src|href)="([^"]{0,5})', html)
    assert set(sources) == {"data:"} and "url(" not in html
    assert "Sparse &amp; low dose" in html and "DDS &lt;b&gt;" in html
    assert "lam=0.3333" in html and "1.2" in html and versions()["torch"] in html
    for text in KINDS.values():
        assert text.split(". ")[-1][:40] in html.replace("&#39;", "'")
    assert html.count('class="best"') == 2
    assert "prefers-color-scheme: dark" in html


def test_the_page_without_a_truth_scores_nothing(report, tmp_path):
    bare = [dataclasses.replace(r, psnr=None, ssim=None) for r in report.results]
    save_page(
        tmp_path / "r.html", dataclasses.replace(report, results=bare, truth=None)
    )
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "PSNR" not in html and "Errors are" not in html


def test_the_table_has_a_line_for_each_method(results):
    lines = table(results).split("\n")
    assert len(lines) == 4
    assert lines[0].split()[:3] == ["method", "PSNR", "SSIM"]
    assert lines[3].startswith("DPS") and lines[3].endswith("24        1")
