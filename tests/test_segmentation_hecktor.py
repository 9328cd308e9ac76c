"""HECKTOR's layouts, on files that these tests write."""

from pathlib import Path

import pytest

from invsolve.segmentation.hecktor import CaseFiles, hecktor_cases

NAMES = ("CHUM-001", "CHUP-010", "MDA-002")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def of_2022(tmp_path: Path) -> Path:
    for name in NAMES:
        for kind in ("CT", "PT"):
            touch(tmp_path / "imagesTr" / f"{name}__{kind}.nii.gz")
        touch(tmp_path / "labelsTr" / f"{name}.nii.gz")
    return tmp_path


@pytest.fixture
def of_2020(tmp_path: Path) -> Path:
    for name in NAMES:
        touch(*(tmp_path / f"{name}_{k}.nii.gz" for k in ("ct", "pt", "gtvt")))
    return tmp_path


def test_the_layout_of_2022(of_2022: Path) -> None:
    touch(of_2022 / "imagesTr" / "notes.txt")
    images = of_2022 / "imagesTr"
    assert hecktor_cases(of_2022) == [
        CaseFiles(
            name,
            {
                "ct": images / f"{name}__CT.nii.gz",
                "pet": images / f"{name}__PT.nii.gz",
            },
            of_2022 / "labelsTr" / f"{name}.nii.gz",
        )
        for name in NAMES
    ]


def test_the_layout_of_2020(of_2020: Path) -> None:
    assert hecktor_cases(of_2020) == [
        CaseFiles(
            name,
            {
                "ct": of_2020 / f"{name}_ct.nii.gz",
                "pet": of_2020 / f"{name}_pt.nii.gz",
            },
            of_2020 / f"{name}_gtvt.nii.gz",
        )
        for name in NAMES
    ]


def test_other_scans_in_the_same_layout(tmp_path: Path) -> None:
    image = tmp_path / "imagesTr" / "head_01__MR.nii.gz"
    label = tmp_path / "labelsTr" / "head_01.nii.gz"
    touch(image, label)
    found = hecktor_cases(tmp_path, scans=["mr"])
    assert found == [CaseFiles("head_01", {"mr": image}, label)]
    with pytest.raises(ValueError, match=r"no images\w+/CASE__CT"):
        hecktor_cases(tmp_path)


def test_test_images_have_no_labels(of_2022: Path, tmp_path: Path) -> None:
    for kind in ("CT", "PT"):
        touch(tmp_path / "imagesTs" / f"CHB-003__{kind}.nii.gz")
    [case] = hecktor_cases(of_2022, "Ts")
    assert (case.name, case.label) == ("CHB-003", None)
    assert len(hecktor_cases(of_2022)) == 3


def test_old_images_without_labels(of_2020: Path) -> None:
    for path in of_2020.glob("*_gtvt.nii.gz"):
        path.unlink()
    assert [case.label for case in hecktor_cases(of_2020)] == [None] * 3


@pytest.mark.parametrize(
    ("missing", "lonely", "kind"),
    [
        ("imagesTr/CHUP-010__CT", "imagesTr/CHUP-010__PT", "CT"),
        ("imagesTr/CHUP-010__PT", "imagesTr/CHUP-010__CT", "PET"),
        ("labelsTr/CHUP-010", "imagesTr/CHUP-010__CT", "label"),
    ],
)
def test_what_has_no_partner_is_named(
    missing: str, lonely: str, kind: str, of_2022: Path
) -> None:
    (of_2022 / f"{missing}.nii.gz").unlink()
    with pytest.raises(ValueError, match=f"{lonely}.nii.gz has no {kind} of") as error:
        hecktor_cases(of_2022)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["ct", "pt", "gtvt"])
def test_so_are_the_old_ones(missing: str, of_2020: Path) -> None:
    (of_2020 / f"CHUP-010_{missing}.nii.gz").unlink()
    kind = {"ct": "CT", "pt": "PET", "gtvt": "label"}[missing]
    with pytest.raises(ValueError, match=f"CHUP-010_.* has no {kind} of"):
        hecktor_cases(of_2020)


def test_a_label_of_nobody_is_named(of_2022: Path) -> None:
    touch(of_2022 / "labelsTr" / "CHUS-100.nii.gz")
    with pytest.raises(ValueError, match=r"labelsTr/CHUS-100.nii.gz has no CT"):
        hecktor_cases(of_2022)


def test_folders_of_another_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        hecktor_cases(tmp_path / "none")
    with pytest.raises(ValueError, match="give a folder of HECKTOR's layout"):
        hecktor_cases(tmp_path)
    touch(tmp_path / "CHUM-001.nii.gz")
    with pytest.raises(ValueError, match="give a folder of HECKTOR's layout"):
        hecktor_cases(tmp_path)
