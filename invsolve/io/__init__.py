"""Files in and out: images and measurements."""

from .ctpd import read_ctpd as read_ctpd
from .dicom import read_dicom as read_dicom
from .dicom_seg import write_dicom_seg as write_dicom_seg
from .files import read as read, replace as replace, write as write
from .geometry import read_geometry as read_geometry, write_geometry as write_geometry
from .image import Image as Image, Unit as Unit
from .measurements import (
    Measurements as Measurements,
    load_measurements as load_measurements,
    save_measurements as save_measurements,
)
