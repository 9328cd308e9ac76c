"""``invsolve segment``, with a small network that nobody trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dicom_files import write_series

from invsolve import io
from invsolve.cli import main
from invsolve.grids import Grid, resampled
from invsolve.priors import UNetConfig
from invsolve.segmentation.masks import RARE
from invsolve.segmentation.segmenter import build, save

nib = pytest.importorskip("nibabel")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

AFFINE = np.array(
    [[-3.0, 0, 0, 70.0], [0, -3.0, 0, 60.0], [0, 0, 5.0, -40.0], [0, 0, 0, 1.0]]
)
FILES = {
    "index.html",
    "mask.nii.gz",
    "planes.png",
    "probability.nii.gz",
    "std.nii.gz",
    "volume.png",
    "volumes.json",
    "whole.png",
}


def make_model(
    folder: Path,
    labels: tuple[str, ...] = ("tumour",),
    widths: tuple[int, ...] = (8, 16),
    **said: Any,
) -> Path:
    """A network of slices that knows next to nothing: half of all voxels are drawn."""
    given = {
        "labels": list(labels),
        "modalities": ["ct", "pet"],
        "sigma_min": 0.4,
        "sigma_max": 40.0,
        "data": "nothing, simulated PET",
        **said,
    }
    network = UNetConfig(
        channels=len(labels),
        widths=widths,
        groups=4,
        patch=2,
        condition=len(given["modalities"]),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(network)
        *inner, last = net.parameters()
        for weights in inner:
            torch.nn.init.normal_(weights, std=0.03)
        torch.nn.init.constant_(last, -RARE)
    return save(net, network, folder, "tiny", **given)


def body() -> torch.Tensor:
    """HU of a cylinder of water with a bone in it: 20 slices of 40×44."""
    hu = torch.full((20, 40, 44), -1000.0)
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(44.0), indexing="ij")
    hu[:, (y - 20) ** 2 + (x - 22) ** 2 < 15**2] = 20.0
    hu[:, 28:32, 20:24] = 900.0
    return hu


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ct.nii.gz, and pet.nii.gz and truth.nii.gz on another grid in the same place."""
    folder = tmp_path_factory.mktemp("scans")
    ct = io.Image(body(), AFFINE, "HU")
    io.write(folder / "ct.nii.gz", ct)
    there = Grid.of(ct).spaced(4.0)
    inside = resampled(ct, there, outside=-1000.0).values > -300
    suv = torch.where(inside, 1.0, 0.0)
    suv[10:14, 12:16, 10:14] = 8.0
    io.write(folder / "pet.nii.gz", io.Image(suv, there.affine))
    truth = io.Image((suv > 4).float(), there.affine)
    io.write(folder / "truth.nii.gz", truth, labels=True)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the figures takes longer than all else."""
    names = ("planes.png", "whole.png", "volume.png")
    monkeypatch.setattr(
        "invsolve.segmentation.report.figures", lambda report: dict.fromkeys(names, b"")
    )


def words(scans: Path, model: Path, out: Path, *more: object) -> list[str]:
    given = ("segment", scans / "ct.nii.gz", scans / "pet.nii.gz", "-o", out)
    return [str(w) for w in (*given, "--model", model, "--steps", 10, *more)]


def test_a_segmentation_and_its_page(
    scans: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    truth = scans / "truth.nii.gz"
    assert (
        main(words(scans, model, out, "--samples", 3, "--seed", 5, "--truth", truth))
        == 0
    )
    assert {p.name for p in out.iterdir()} == FILES
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    told = capsys.readouterr().out
    assert told.startswith("tumour: ") and "Dice" in told

    maps = {n: io.read(out / f"{n}.nii.gz") for n in ("probability", "std", "mask")}
    for image in maps.values():
        assert image.values.shape == (20, 40, 44)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)
    prob, std, mask = (maps[n].values for n in ("probability", "std", "mask"))
    assert 0 <= prob.min() and prob.max() <= 1 and std.max() <= 0.5
    assert torch.equal(mask > 0, prob >= 0.5) and 0 < mask.mean() < 1
    assert nib.load(out / "mask.nii.gz").get_data_dtype() == np.uint8

    record = json.loads((out / "volumes.json").read_text())
    [label] = record["labels"]
    assert len(label["draws_ml"]) == 3
    assert label["mean_ml"] == pytest.approx(np.mean(label["draws_ml"]))
    assert label["mask_ml"] == pytest.approx(float(mask.sum()) * 3 * 3 * 5 / 1000)
    true = resampled(
        io.read(truth), Grid.of(io.read(scans / "ct.nii.gz")), nearest=True
    )
    both = float(((mask > 0) & (true.values > 0)).sum())
    dice = 2 * both / float(mask.sum() + (true.values > 0).sum())
    assert label["scores"]["Dice"] == pytest.approx(dice, rel=1e-5)
    assert record["seed"] == 5 and record["kind"] == "posterior_sample"
    assert record["stats"]["network_forwards"] == 1 + 3 * 10
    assert {len(file["sha256"]) for file in record["input"].values()} == {64}
    page = (out / "index.html").read_text()
    assert "simulated PET" in page and "not a medical device" in page
    assert record["input"]["CT"]["sha256"] in page


@pytest.mark.usefixtures("undrawn")
def test_the_same_seed_draws_the_same(scans: Path, model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        more = ("--samples", 1, "--seed", seed)
        assert main(words(scans, model, tmp_path / name, *more)) == 0
    a, b, c = (io.read(tmp_path / n / "probability.nii.gz").values for n in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.usefixtures("undrawn")
def test_the_threshold_bounds_the_mask(
    scans: Path, model: Path, tmp_path: Path
) -> None:
    more = ("--samples", 3, "--threshold", 0.8)
    assert main(words(scans, model, tmp_path / "a", *more)) == 0
    prob, mask = (
        io.read(tmp_path / "a" / f"{n}.nii.gz").values for n in ("probability", "mask")
    )
    assert torch.equal(mask > 0, prob >= 0.8)


@pytest.mark.usefixtures("undrawn")
def test_several_labels_have_maps_of_their_own(scans: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", ("GTVp", "GTVn/a"))
    out = tmp_path / "out"
    assert main(words(scans, model, out, "--samples", 2)) == 0
    maps = [io.read(out / f"probability-{n}.nii.gz").values for n in ("GTVp", "GTVn-a")]
    mask = io.read(out / "mask.nii.gz").values
    likeliest = torch.stack(maps).argmax(0) + 1.0
    expected = torch.where(torch.stack(maps).amax(0) >= 0.5, likeliest, 0.0)
    assert torch.equal(mask, expected) and set(mask.unique().tolist()) == {0, 1, 2}
    # A run with one label leaves nothing of one with two.
    other = make_model(tmp_path / "other")
    assert main(words(scans, other, out, "--samples", 1, "--force")) == 0
    assert {p.name for p in out.iterdir()} == FILES


@pytest.mark.usefixtures("undrawn")
def test_one_mr_and_its_tissues(scans: Path, tmp_path: Path) -> None:
    """Labels that exclude one another do so in every map that is written."""
    mr = {"modalities": ["mr"], "spacing_mm": 4.0, "exclusive": True}
    model = make_model(tmp_path / "model", ("white", "grey"), **mr)
    head = io.Image((body() + 1000.0) / 7, AFFINE)
    io.write(tmp_path / "mr.nii.gz", head)
    given = ("segment", tmp_path / "mr.nii.gz", "-o", tmp_path / "out")
    more = ("--model", model, "--steps", 10, "--samples", 2)
    assert main([str(w) for w in (*given, *more)]) == 0
    maps = [
        io.read(tmp_path / "out" / f"probability-{n}.nii.gz").values
        for n in ("white", "grey")
    ]
    assert (
        float(torch.stack(maps).sum(0).max()) <= 1 + 1e-5
        and min(m.max() for m in maps) > 0
    )
    record = json.loads((tmp_path / "out" / "volumes.json").read_text())
    assert list(record["input"]) == ["MR"] and record["labels"][0]["suv_max"] is None
    assert "the MR&#39;s voxels" in (tmp_path / "out" / "index.html").read_text()


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scans as DICOM series, the PET in Bq/ml."""
    pytest.importorskip("pydicom")
    folder = tmp_path_factory.mktemp("dicom")
    place = {"origin": (-70.0, -60.0, -40.0), "spacing": (3.0, 3.0)}
    hu = body().numpy().astype(int)
    step = (0.0, 0.0, 5.0)
    write_series(folder / "ct", hu, step=step, **place)
    bq = np.where(hu > -300, 3000, 0)
    bq[8:12, 12:16, 10:14] = 24000
    write_series(folder / "pet", bq, step=step, pet=True, **place)
    return folder


@pytest.mark.usefixtures("undrawn")
def test_dicom_in_and_out(dicom: Path, model: Path, tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    out = tmp_path / "out"
    given = ("segment", dicom / "ct", dicom / "pet", "-o", out, "--model", model)
    more = ("--steps", 10, "--samples", 1, "--dicom-seg")
    assert main([str(w) for w in (*given, *more)]) == 0
    assert {p.name for p in out.iterdir()} == FILES | {"mask.dcm"}
    seg = highdicom.seg.segread(out / "mask.dcm")
    assert seg.get_segment_description(1).segment_label == "tumour"
    mask = io.read(out / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, AFFINE, atol=1e-4)
    assert seg.pixel_array.sum() == mask.values.sum() > 0
    [label] = json.loads((out / "volumes.json").read_text())["labels"]
    factor = 70e3 / (350e6 * 2 ** (-3600 / 6586.2))
    assert label["suv_max"] == pytest.approx(24000 * factor, rel=1e-4)


# --- bad input: one line, and nothing is written


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path):
    def check(ct: Path, pet: Path | None, *more: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        given = ("segment", ct, *([] if pet is None else [pet]), "-o", tmp_path / "o")
        steps = () if "--steps" in more else ("--steps", 10)
        named = () if "--model" in more else ("--model", model)
        assert main([str(w) for w in (*given, *named, *steps, *more)]) == 2
        out, err = capsys.readouterr()
        err = err.rsplit("\r", 1)[-1]  # what stays of a progress bar, if one was shown
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return check


def changed(path: Path, to: Path, scale: float = 1.0, shift: float = 0.0) -> Path:
    """A scan whose values are scaled and which lies elsewhere along x."""
    image = io.read(path, "")
    affine = image.affine.copy()
    affine[0, 3] += shift
    io.write(to, io.Image(scale * image.values, affine))
    return to


def test_scans_that_do_not_meet(scans: Path, refused, tmp_path: Path) -> None:
    away = changed(scans / "pet.nii.gz", tmp_path / "away.nii.gz", shift=500.0)
    assert "do not overlap" in refused(scans / "ct.nii.gz", away)
    truth = changed(scans / "truth.nii.gz", tmp_path / "t.nii.gz", shift=500.0)
    given = (scans / "ct.nii.gz", scans / "pet.nii.gz")
    assert "lies outside of the scan" in refused(*given, "--truth", truth)


@pytest.mark.parametrize("which", ["ct", "pet"])
def test_scans_without_a_place(
    which: str, scans: Path, refused, tmp_path: Path
) -> None:
    volume = nib.load(scans / f"{which}.nii.gz")
    volume.set_sform(None, 0)
    volume.set_qform(None, 0)
    nib.save(volume, tmp_path / f"{which}.nii.gz")
    paths = {w: scans / f"{w}.nii.gz" for w in ("ct", "pet")}
    paths[which] = tmp_path / f"{which}.nii.gz"
    message = refused(paths["ct"], paths["pet"])
    assert "does not say where it lies" in message and str(paths[which]) in message


def test_pet_that_is_not_in_suv(scans: Path, refused, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    ct = scans / "ct.nii.gz"
    bq = changed(scans / "pet.nii.gz", tmp_path / "bq.nii.gz", scale=3000.0)
    message = refused(ct, bq)
    assert "cannot be SUV" in message and "Bq/ml" in message
    negative = changed(scans / "pet.nii.gz", tmp_path / "neg.nii.gz", scale=-10.0)
    assert "cannot be SUV" in refused(ct, negative)
    stored = np.ones((4, 5, 6), int)
    tags = {"PatientWeight": None}
    series = write_series(tmp_path / "pet", stored, pet=True, tags=tags)
    assert "SUV needs PatientWeight" in refused(ct, series)
    assert "no PET in SUV" in refused(ct, write_series(tmp_path / "ct", stored))


def test_scans_in_the_wrong_order(scans: Path, refused) -> None:
    ct, pet = scans / "ct.nii.gz", scans / "pet.nii.gz"
    assert "give the CT first" in refused(pet, ct)
    assert "give the CT first" in refused(ct, ct)
    assert "the model was made for MR" in refused(
        ct, None, "--model", make_model(ct.parent / "mr", modalities=["mr"])
    )
    assert "needs 2 scans, CT and PET in this order, got 1" in refused(ct, None)


def test_a_volume_smaller_than_the_network_s_patch(
    scans: Path, refused, tmp_path: Path
) -> None:
    deep = make_model(tmp_path / "model", widths=(8, 8, 8))  # of sides that 8 divides
    thin = io.Image(body()[:5], AFFINE, "HU")  # 25 mm, 7 voxels of the model
    io.write(tmp_path / "ct.nii.gz", thin)
    given = (tmp_path / "ct.nii.gz", scans / "pet.nii.gz", "--model", deep)
    message = refused(*given)
    assert "give a larger part" in message


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--model", "unknown"), "unknown segmenter"),
        (("--threshold", 0), "--threshold is a probability"),
        (("--steps", 5), "steps must be at least 10"),
        (("--samples", 0), "samples"),
        (("--dicom-seg",), "is no folder of one"),
        (("--device", "tpu"), "device"),
        (("--truth", "nothing.nii.gz"), "there is no file"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(more, why: str, scans: Path, refused) -> None:
    if more == ("--dicom-seg",):
        pytest.importorskip("highdicom")
    assert why in refused(scans / "ct.nii.gz", scans / "pet.nii.gz", *more)


def test_a_folder_that_is_not_empty(scans: Path, refused, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("mine")
    message = refused(scans / "ct.nii.gz", scans / "pet.nii.gz")
    assert "is not empty" in message


def test_a_failure_half_way_leaves_nothing(
    scans: Path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_):
        raise ValueError("no ink")

    monkeypatch.setattr("invsolve.segmentation.report.save_report", fail)
    assert "no ink" in refused(scans / "ct.nii.gz", scans / "pet.nii.gz")


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segment", "--help"]) == 0
    assert "Example: invsolve segment" in capsys.readouterr().out
