"""Masks as a DICOM segmentation, which viewers lay over the series they were drawn on."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from .dicom import affine_of, read_series
from .files import replace
from .image import turn_of

NEOPLASMS = ("tumour", "gtvp", "gtvn")
"""Labels that are coded as a neoplasm; others are coded as tissue."""


def write_dicom_seg(
    path: str | Path,
    mask: Bool[Tensor, "labels z y x"],
    labels: Sequence[str],
    source: str | Path | Sequence[Any],
    *,
    model: str = "invsolve",
) -> None:
    """Write one binary segment for each label, in the series' frame of reference.

    Args:
        path: the file.
        mask: laid out as the `Image` that `read_dicom` makes of the series.
        labels: the segments' names.
        source: the series' folder, or its datasets as `read_series` gives them.
        model: what drew the masks, for the record.

    Raises:
        ValueError: the mask is not on the series' voxels, or the series lacks a tag that
            a segmentation must repeat.
        ModuleNotFoundError: highdicom is not installed.
    """
    try:
        import highdicom as hd
        from pydicom.sr.codedict import codes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing DICOM segmentations needs highdicom: pip install 'invsolve[medical]'"
        ) from error

    slices = read_series(source) if isinstance(source, str | Path) else list(source)
    frames = np.stack([_stored(one.numpy(), slices) for one in mask], -1)
    expected = (len(slices), slices[0].Rows, slices[0].Columns)
    if frames.shape[:-1] != expected:
        raise ValueError(
            f"the mask is of {frames.shape[:-1]} voxels, the series of {expected}: bring "
            "it to the CT's grid"
        )
    number = version("invsolve")
    algorithm = hd.AlgorithmIdentificationSequence(
        name=model, family=codes.DCM.ArtificialIntelligence, version=number
    )
    segments = []
    for k, label in enumerate(labels, 1):
        tumour = label.lower() in NEOPLASMS
        abnormal, tissue = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Tissue
        segments.append(
            hd.seg.SegmentDescription(
                segment_number=k,
                segment_label=label,
                segmented_property_category=abnormal if tumour else tissue,
                segmented_property_type=codes.SCT.Neoplasm if tumour else tissue,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
        )
    try:
        made = hd.seg.Segmentation(
            source_images=slices,
            pixel_array=frames,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=hd.UID(),
            series_number=int(slices[0].get("SeriesNumber") or 0) + 1000,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="invsolve",
            manufacturer_model_name=model,
            software_versions=number,
            device_serial_number="0",
            content_description="Research, not for clinical use",
            series_description=f"Segmentation by {model}"[:64],
            omit_empty_frames=bool(frames.any()),
        )
    except (AttributeError, ValueError) as error:  # of a tag that is missing
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot write a DICOM segmentation: {first_line}") from error
    replace(Path(path), lambda partial: made.save_as(partial), ".dcm")


def _stored(mask: np.ndarray, slices: Sequence[Any]) -> np.ndarray:
    """A mask (z, y, x) in the order in which the series is stored: (slice, row, column)."""
    from nibabel.orientations import apply_orientation

    turn = turn_of(affine_of(slices))
    back = np.empty_like(turn)
    for axis, (to, sign) in enumerate(turn):
        back[int(to)] = axis, sign
    return apply_orientation(mask.transpose(2, 1, 0), back).transpose(2, 1, 0)
