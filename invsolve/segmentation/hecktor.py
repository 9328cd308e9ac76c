"""Folders of PET/CT laid out as the HECKTOR challenges' (MICCAI 2020, 2021 and 2022).

None of their data come with the package, which was tested on files of that layout only:
get them from the organisers (hecktor.grand-challenge.org) under their terms. PET is in SUV
there, CT in HU, each on its own grid; a label is 0 (background), 1 (GTVp, the primary
tumour) or 2 (GTVn, the lymph nodes).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final


@final
@dataclass(frozen=True)
class CaseFiles:
    """One patient's files; without a label where none was published."""

    name: str
    ct: Path
    pet: Path
    label: Path | None


def hecktor_cases(
    folder: str | Path, part: Literal["Tr", "Ts"] = "Tr"
) -> list[CaseFiles]:
    """The patients of a folder, by name.

    In 2022 they are imagesTr/CASE__CT.nii.gz, imagesTr/CASE__PT.nii.gz and
    labelsTr/CASE.nii.gz; in 2020 and 2021 CASE_ct.nii.gz, CASE_pt.nii.gz and
    CASE_gtvt.nii.gz in one folder, with a primary tumour only. Other files are left.

    Args:
        folder: that holds imagesTr, or the files themselves.
        part: in the layout of 2022, of training or of test.

    Raises:
        ValueError: there are none, or a CT, PET or label has no partner. Labels may be
            missing, but then of all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: check the name")
    images, labels = folder / f"images{part}", folder / f"labels{part}"
    if images.is_dir():
        cts, pets = _ending(images, "__CT.nii.gz"), _ending(images, "__PT.nii.gz")
        masks = _ending(labels, ".nii.gz") if labels.is_dir() else {}
    else:
        cts, pets = _ending(folder, "_ct.nii.gz"), _ending(folder, "_pt.nii.gz")
        masks = _ending(folder, "_gtvt.nii.gz")
    if not cts and not pets:
        raise ValueError(
            f"{folder} holds no images{part}/CASE__CT.nii.gz and no CASE_ct.nii.gz: give "
            "a folder of HECKTOR's layout"
        )
    _check_partners("CT", cts, {"PET": pets, **({"label": masks} if masks else {})})
    return [
        CaseFiles(name, ct, pets[name], masks.get(name)) for name, ct in cts.items()
    ]


def _ending(folder: Path, ending: str) -> dict[str, Path]:
    """Name → file, of those whose names end so."""
    found = sorted(folder.glob(f"*{ending}"))
    return {path.name.removesuffix(ending): path for path in found}


def _check_partners(
    what: str, ones: Mapping[str, Path], others: Mapping[str, Mapping[str, Path]]
) -> None:
    for other, files in others.items():
        for name in sorted(ones.keys() ^ files.keys()):
            path, kind = (ones[name], other) if name in ones else (files[name], what)
            raise ValueError(
                f"{path} has no {kind} of the same case beside it: add it, or take the "
                "file away"
            )
