"""Small DICOM series for the tests, written tag by tag as a scanner would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SUV_TAGS: dict[str, Any] = {
    "Units": "BQML",
    "DecayCorrection": "START",
    "CorrectedImage": ["DECY", "ATTN", "SCAT"],
    "PatientWeight": 70.0,
    "SeriesDate": "20240102",
    "SeriesTime": "120000",
}
INJECTION: dict[str, Any] = {
    "RadionuclideTotalDose": 350e6,
    "RadionuclideHalfLife": 6586.2,
    "RadiopharmaceuticalStartTime": "110000.00",
}


def write_series(
    folder: Path,
    stored: np.ndarray,
    *,
    axes: tuple[float, ...] = AXIAL,
    origin: tuple[float, float, float] = (-10.0, -20.0, -40.0),
    spacing: tuple[float, float] = (1.5, 0.5),
    step: tuple[float, float, float] = (0.0, 0.0, 3.0),
    pet: bool = False,
    slope: float | Callable[[int], float] = 1.0,
    intercept: float = 0.0,
    tags: dict[str, Any] | None = None,
    injection: dict[str, Any] | None = None,
    skip: tuple[int, ...] = (),
) -> Path:
    """A series of CT or PET, one file a slice, their names not in their order.

    Args:
        folder: made for it.
        stored: whole numbers (slices, rows, columns).
        axes: ImageOrientationPatient.
        origin: of the first slice.
        spacing: between rows and between columns.
        step: from slice to slice.
        pet: whether it is one, with the tags of SUV.
        slope: of all slices, or of each.
        intercept: of all.
        tags: what is changed in each file; None takes a tag away.
        injection: the same of what was injected.
        skip: slices that are not written.
    """
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.sequence import Sequence
    from pydicom.uid import (
        CTImageStorage,
        ExplicitVRLittleEndian,
        PositronEmissionTomographyImageStorage,
        generate_uid,
    )

    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for k, values in enumerate(stored):
        if k in skip:
            continue
        meta = FileMetaDataset()
        kind = PositronEmissionTomographyImageStorage if pet else CTImageStorage
        meta.MediaStorageSOPClassUID = kind
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        name = str(folder / f"{(7 * k + 3) % 101:03}.dcm")
        file = FileDataset(name, {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
        file.StudyInstanceUID, file.SeriesInstanceUID = study, series
        file.FrameOfReferenceUID = frame
        file.Modality = "PT" if pet else "CT"
        file.PatientID, file.PatientName, file.PatientSex = "p", "A^B", "O"
        file.PatientBirthDate, file.StudyDate, file.StudyTime = "", "20240102", "1100"
        file.StudyID, file.AccessionNumber, file.ReferringPhysicianName = "1", "", ""
        file.SeriesNumber, file.InstanceNumber = 1, k + 1
        file.Manufacturer, file.PositionReferenceIndicator = "", ""
        file.Rows, file.Columns = values.shape
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
        file.PixelRepresentation = 1
        file.RescaleSlope = slope(k) if callable(slope) else slope
        file.RescaleIntercept = intercept
        file.ImageOrientationPatient = list(axes)
        place = np.add(origin, k * np.asarray(step))
        file.ImagePositionPatient = [f"{mm:.6f}" for mm in place]
        file.PixelSpacing, file.SliceThickness = list(spacing), 3.0
        if pet:
            for tag, value in SUV_TAGS.items():
                setattr(file, tag, value)
            dose = Dataset()
            for tag, value in {**INJECTION, **(injection or {})}.items():
                if value is not None:
                    setattr(dose, tag, value)
            file.RadiopharmaceuticalInformationSequence = Sequence([dose])
        for tag, value in (tags or {}).items():
            if value is None:
                delattr(file, tag)
            else:
                setattr(file, tag, value(k) if callable(value) else value)
        file.PixelData = values.astype("<i2").tobytes()
        file.save_as(name, enforce_file_format=True)
    return folder
