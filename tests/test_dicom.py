"""DICOM: voxels lie where the tags say, and SUV is what its definition says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dicom_files import AXIAL, INJECTION, SUV_TAGS, write_series

from invsolve import io

pytest.importorskip("pydicom")
pytest.importorskip("nibabel")

SHAPE = (4, 5, 6)


def numbered() -> np.ndarray:
    """Every voxel has a value of its own: (slices, rows, columns)."""
    return np.arange(np.prod(SHAPE)).reshape(SHAPE)


def turned(degrees: float) -> tuple[float, ...]:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return (c, s, 0.0, -0.8 * s, 0.8 * c, 0.6)


CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
PRONE = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


@pytest.mark.parametrize(
    ("axes", "step"),
    [
        (AXIAL, (0.0, 0.0, 3.0)),
        (AXIAL, (0.0, 0.0, -3.0)),
        (AXIAL, (0.0, 0.9, 3.0)),  # a tilted gantry
        (PRONE, (0.0, 0.0, 3.0)),
        (CORONAL, (0.0, 3.0, 0.0)),
        (SAGITTAL, (3.0, 0.0, 0.0)),
        (turned(12.0), tuple(3 * np.cross(turned(12.0)[:3], turned(12.0)[3:]))),
    ],
    ids=["axial", "to the feet", "tilted", "prone", "coronal", "sagittal", "oblique"],
)
def test_every_voxel_lies_where_its_tags_say(axes, step, tmp_path: Path) -> None:
    """P = S + Δj Y j + Δi X i of the standard, C.7.6.2.1.1, x and y turned for NIfTI."""
    origin, spacing = (-10.0, -20.0, -40.0), (1.5, 0.5)
    folder = write_series(tmp_path / "ct", numbered(), axes=axes, step=step)
    image = io.read(folder)
    assert image.unit == "HU"

    k, j, i = (n.ravel()[:, None] for n in np.indices(SHAPE))
    along, down = np.array(axes[:3]), np.array(axes[3:])
    lps = origin + i * spacing[1] * along + j * spacing[0] * down + k * np.array(step)
    expected = lps * (-1, -1, 1)

    order = image.values.numpy().transpose(2, 1, 0)
    index = np.stack(np.unravel_index(np.argsort(order, axis=None), order.shape), -1)
    there = index @ image.affine[:3, :3].T + image.affine[:3, 3]
    np.testing.assert_allclose(there, expected, atol=1e-4)
    assert sorted(image.values.flatten().tolist()) == list(range(120))
    x, y, z = image.affine[:3, :3].T
    assert np.argmax(np.abs(x)) == 0 and x[0] < 0
    assert np.argmax(np.abs(y)) == 1 and y[1] < 0
    assert np.argmax(np.abs(z)) == 2 and z[2] > 0


def test_a_place_is_the_one_that_highdicom_finds(tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    axes = turned(-20.0)
    step = tuple(2.5 * np.cross(axes[:3], axes[3:]))
    folder = write_series(tmp_path / "ct", numbered(), axes=axes, step=step)
    theirs = highdicom.get_volume_from_series(io.dicom.read_series(folder))
    image = io.read(folder)
    ours = np.diag([-1, -1, 1, 1]) @ image.affine
    for value in (0, 7, 119):
        k, j, i = np.argwhere(image.values.numpy() == value)[0]
        index = np.argwhere(theirs.array == value)[0]
        np.testing.assert_allclose(
            (ours @ (i, j, k, 1))[:3], (theirs.affine @ (*index, 1))[:3], atol=1e-4
        )


def test_values_are_rescaled_slice_by_slice(tmp_path: Path) -> None:
    slope = lambda k: 1.0 + 0.5 * k  # noqa: E731
    folder = write_series(tmp_path / "ct", numbered(), slope=slope, intercept=-1024)
    scale = torch.tensor([1.0, 1.5, 2.0, 2.5])[:, None, None]
    expected = torch.from_numpy(numbered()).float() * scale - 1024
    assert torch.equal(io.read(folder).values, expected)


def test_one_slice_is_as_thick_as_it_says(tmp_path: Path) -> None:
    image = io.read(write_series(tmp_path / "ct", numbered()[:1]))
    assert image.spacing == pytest.approx((3.0, 1.5, 0.5))


def test_hidden_files_are_left(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", numbered())
    (folder / ".DS_Store").write_bytes(b"nothing")
    assert io.read(folder).values.shape == SHAPE


# --- SUV


def suv(folder: Path, **changes: Any) -> float:
    """Of a voxel of 1000 Bq/ml."""
    image = io.read(write_series(folder, np.full(SHAPE, 1000), pet=True, **changes))
    assert image.unit == "SUV"
    assert image.values.min() == image.values.max()
    return float(image.values[0, 0, 0])


HOUR = 3600 / INJECTION["RadionuclideHalfLife"]


def test_suv_is_its_definition(tmp_path: Path) -> None:
    """Activity · weight / dose, the dose decayed from injection to the scan."""
    expected = 1000 * 70e3 / (350e6 * 2**-HOUR)
    assert suv(tmp_path / "a") == pytest.approx(expected, rel=1e-5)
    assert suv(tmp_path / "b", slope=0.25) == pytest.approx(expected / 4, rel=1e-5)


def test_a_dose_spread_evenly_has_suv_1(tmp_path: Path) -> None:
    """In a patient of 1 g/ml, whatever the weight, the dose and the wait."""
    weight, dose = 50.0, 200e6
    decayed = dose * 2 ** -(2.5 * HOUR)
    found = suv(
        tmp_path / "a",
        slope=decayed / (1000 * weight) / 1000,
        tags={"PatientWeight": weight},
        injection={
            "RadionuclideTotalDose": dose,
            "RadiopharmaceuticalStartTime": "093000",
        },
    )
    assert found == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("tags", "injection", "hours"),
    [
        ({"DecayCorrection": "ADMIN"}, {}, 0.0),
        ({}, {"RadiopharmaceuticalStartTime": "1145"}, 0.25),
        ({}, {"RadiopharmaceuticalStartTime": "233000.000000"}, 12.5),  # yesterday
        ({}, {"RadiopharmaceuticalStartDateTime": "20240102103000.00+0100"}, 1.5),
        ({}, {"RadiopharmaceuticalStartDateTime": "20240101230000"}, 13.0),
        # A series that was made afterwards: the first acquisition counts.
        ({"AcquisitionTime": lambda k: f"11{40 - 10 * k:02}00"}, {}, 1 / 6),
        ({"AcquisitionTime": "121500"}, {}, 1.0),
    ],
)
def test_the_dose_decays_from_injection_to_scan(
    tags: Any, injection: Any, hours: float, tmp_path: Path
) -> None:
    expected = 1000 * 70e3 / (350e6 * 2 ** (-hours * HOUR))
    found = suv(tmp_path / "a", tags=tags, injection=injection)
    assert found == pytest.approx(expected, rel=1e-5)


def test_values_in_g_per_ml_are_suv_already(tmp_path: Path) -> None:
    assert suv(tmp_path / "a", tags={"Units": "GML", "PatientWeight": None}) == 1000
    assert suv(tmp_path / "b", tags={"Units": "GML", "SUVType": "BW"}) == 1000


@pytest.mark.parametrize("tag", [*SUV_TAGS, *INJECTION])
def test_the_tag_that_suv_lacks_is_named(tag: str, tmp_path: Path) -> None:
    part: Any = {"injection" if tag in INJECTION else "tags": {tag: None}}
    folder = write_series(tmp_path / "pet", numbered(), pet=True, **part)
    if tag == "CorrectedImage":  # what is not said is not held against it
        io.read(folder)
        return
    with pytest.raises(
        ValueError, match=f"cannot read .*pet: SUV needs {tag}"
    ) as error:
        io.read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ({"tags": {"Units": "CNTS"}}, "SUV needs Units BQML, and this PET's are CNTS:"),
        ({"tags": {"Units": "GML", "SUVType": "LBM"}}, "are GML LBM:"),
        ({"tags": {"CorrectedImage": ["DECY", "SCAT"]}}, "corrected for attenuation"),
        ({"tags": {"DecayCorrection": "NONE"}}, "DecayCorrection START or ADMIN"),
        ({"tags": {"PatientWeight": 0}}, "SUV needs PatientWeight > 0"),
        ({"tags": {"SeriesTime": "noon"}}, "SUV needs dates and times"),
        (
            {"tags": {"RadiopharmaceuticalInformationSequence": None}},
            "needs Radiopharma",
        ),
        (
            {"injection": {"RadiopharmaceuticalStartDateTime": "20240102130000"}},
            "-1.0 h before",
        ),
        (
            {"injection": {"RadiopharmaceuticalStartDateTime": "20231231110000"}},
            "49.0 h before",
        ),
    ],
)
def test_what_gives_no_suv_is_refused(part: Any, why: str, tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of what we write wrongly
        folder = write_series(tmp_path / "pet", numbered(), pet=True, **part)
        with pytest.raises(ValueError, match=why) as error:
            io.read(folder)
    assert "\n" not in str(error.value)


# --- what is no volume


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        io.read(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_slice_is_told_by_its_gap(missing: int, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", numbered(), skip=(missing,))
    z = -40 + 3 * missing
    message = refused(folder)
    assert f"between {z - 3} and {z + 3} mm" in message and "6 mm" in message


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (lambda k: [0, 0, 3.0 * (k % 2)], "several slices lie at"),
        (lambda k: [0, 0, 3.0 * k + 0.5 * (k == 1)], r"3\.?\d* mm apart, but"),
        (lambda k: [0.5 * (k == 1), 0, 3.0 * k], "0.5 mm off"),
    ],
    ids=["two volumes", "uneven", "not straight"],
)
def test_uneven_slices_are_refused(place: Any, why: str, tmp_path: Path) -> None:
    tags = {"ImagePositionPatient": place}
    folder = write_series(tmp_path / "ct", numbered(), tags=tags)
    with pytest.raises(ValueError, match=why):
        io.read(folder)


def test_rounded_places_are_even_enough(tmp_path: Path) -> None:
    """A step of 0.625 mm, its places rounded to 0.1 mm, is what scanners write."""
    tags = {"ImagePositionPatient": lambda k: [0, 0, round(1.25 * k, 1)]}
    image = io.read(write_series(tmp_path / "ct", numbered(), tags=tags))
    assert image.spacing[0] == pytest.approx(1.25, abs=0.05)


@pytest.mark.parametrize(
    "tags",
    [
        {"ImageOrientationPatient": lambda k: list(AXIAL if k else CORONAL)},
        {"PixelSpacing": lambda k: [1, 1 + k]},
        {"SeriesInstanceUID": lambda k: f"1.2.{k % 2 + 3}"},
    ],
    ids=lambda tags: next(iter(tags)),
)
def test_mixed_series_are_refused(tags: Any, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", numbered(), tags=tags)
    assert "keep one series in each folder" in refused(folder)


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "ImageOrientationPatient"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
        ({"PixelSpacing": [0, 1]}, "PixelSpacing"),
    ],
)
def test_tags_that_place_nothing_are_refused(
    tags: Any, why: str, tmp_path: Path
) -> None:
    assert why in refused(write_series(tmp_path / "ct", numbered(), tags=tags))


def test_a_volume_without_a_place(tmp_path: Path) -> None:
    """Is taken as it is, and refused where its place is asked for."""
    import nibabel as nib

    volume = nib.Nifti1Image(numbered().astype(np.float32), np.eye(4))
    nib.save(volume, tmp_path / "a.nii")
    assert io.read(tmp_path / "a.nii", placed=True).values.numel() == 120
    volume.set_sform(None, 0)
    volume.set_qform(None, 0)
    nib.save(volume, tmp_path / "b.nii")
    assert io.read(tmp_path / "b.nii").values.numel() == 120
    with pytest.raises(ValueError, match="does not say where it lies"):
        io.read(tmp_path / "b.nii", placed=True)
    np.save(tmp_path / "c.npy", numbered())
    with pytest.raises(ValueError, match="give NIfTI or DICOM"):
        io.read(tmp_path / "c.npy", placed=True)


# --- segmentations


@pytest.mark.parametrize(
    ("axes", "step"),
    [(AXIAL, (0.0, 0.0, 3.0)), (CORONAL, (0.0, 3.0, 0.0)), (PRONE, (0.0, 0.0, -3.0))],
    ids=["axial", "coronal", "prone"],
)
def test_masks_are_read_back_where_they_were(axes, step, tmp_path: Path) -> None:
    """By highdicom, which finds every voxel of the masks at its place in the world."""
    highdicom = pytest.importorskip("highdicom")
    folder = write_series(tmp_path / "ct", numbered(), axes=axes, step=step)
    image = io.read(folder)
    shape = (2, *image.values.shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.7
    io.write_dicom_seg(tmp_path / "seg.dcm", mask, ("GTVp", "cord"), folder)

    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [s.segment_label for s in map(seg.get_segment_description, (1, 2))] == [
        "GTVp",
        "cord",
    ]
    source = io.dicom.read_series(folder)[0]
    assert seg.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert seg.PatientID == "p" and seg.SegmentationType == "BINARY"
    volume = seg.get_volume()
    lps_to_ras = np.diag([-1, -1, 1, 1])
    for label in range(2):
        theirs = np.argwhere(volume.array[..., label])
        there = theirs @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        z, y, x = mask[label].nonzero().T.numpy()
        ours = np.stack([x, y, z], 1) @ image.affine[:3, :3].T + image.affine[:3, 3]
        ours = ours @ lps_to_ras[:3, :3]
        order = [np.lexsort(points.round(3).T) for points in (there, ours)]
        np.testing.assert_allclose(there[order[0]], ours[order[1]], atol=1e-3)


def test_an_empty_mask_is_written(tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    folder = write_series(tmp_path / "ct", numbered())
    mask = torch.zeros(1, *SHAPE, dtype=torch.bool)
    io.write_dicom_seg(tmp_path / "seg.dcm", mask, ("tumour",), folder)
    assert not highdicom.seg.segread(tmp_path / "seg.dcm").pixel_array.any()


def test_masks_of_another_grid_are_not_written(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    folder = write_series(tmp_path / "ct", numbered())
    mask = torch.zeros(1, 4, 5, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="bring it to the CT's grid"):
        io.write_dicom_seg(tmp_path / "seg.dcm", mask, ("tumour",), folder)
    bare = write_series(tmp_path / "b", numbered(), tags={"FrameOfReferenceUID": None})
    with pytest.raises(ValueError, match=r"cannot write .*Frame Of Reference"):
        io.write_dicom_seg(tmp_path / "seg.dcm", mask[..., :6], ("tumour",), bare)
    assert not (tmp_path / "seg.dcm").exists()
