"""Folders of scans laid out as the HECKTOR challenges' (MICCAI 2020, 2021 and 2022).

None of their data come with the package, which was tested on files of that layout only:
get them from the organisers (hecktor.grand-challenge.org) under their terms. PET is in SUV
there, CT in HU, each on its own grid; a label is 0 (background), 1 (GTVp, the primary
tumour) or 2 (GTVn, the lymph nodes). Other kinds of scans have the same layout here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

ENDINGS = {"pet": "PT"}
"""What is not called by its modality's name."""


@final
@dataclass(frozen=True)
class CaseFiles:
    """One patient's files, by modality; without a label where none was published."""

    name: str
    scans: Mapping[str, Path]
    label: Path | None


def hecktor_cases(
    folder: str | Path,
    part: Literal["Tr", "Ts"] = "Tr",
    scans: Sequence[str] = ("ct", "pet"),
) -> list[CaseFiles]:
    """The patients of a folder, by name.

    In 2022 they are imagesTr/CASE__CT.nii.gz, imagesTr/CASE__PT.nii.gz and
    labelsTr/CASE.nii.gz; in 2020 and 2021 CASE_ct.nii.gz, CASE_pt.nii.gz and
    CASE_gtvt.nii.gz in one folder, with a primary tumour only. Other files are left.

    Args:
        folder: that holds imagesTr, or the files themselves.
        part: in the layout of 2022, of training or of test.
        scans: the modalities that there must be: ``mr`` is CASE__MR.nii.gz.

    Raises:
        ValueError: there are none, or a scan or label has no partner. Labels may be
            missing, but then of all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: check the name")
    images, labels = folder / f"images{part}", folder / f"labels{part}"
    modern = images.is_dir()
    ends = {
        kind: f"__{tag}.nii.gz" if modern else f"_{tag.lower()}.nii.gz"
        for kind, tag in ((k, ENDINGS.get(k, k.upper())) for k in scans)
    }
    found = {k: _ending(images if modern else folder, e) for k, e in ends.items()}
    if not any(found.values()):
        tag = scans[0]
        raise ValueError(
            f"{folder} holds no images{part}/CASE__{tag.upper()}.nii.gz and no "
            f"CASE_{tag}.nii.gz: give a folder of HECKTOR's layout"
        )
    if modern:
        masks = _ending(labels, ".nii.gz") if labels.is_dir() else {}
    else:
        masks = _ending(folder, "_gtvt.nii.gz")
    (first, ones), *others = found.items()
    beside = {kind.upper(): files for kind, files in others}
    _check_partners(first.upper(), ones, beside | ({"label": masks} if masks else {}))
    return [
        CaseFiles(name, {k: files[name] for k, files in found.items()}, masks.get(name))
        for name in ones
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
