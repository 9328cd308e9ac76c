"""Files in and out: images and measurements."""

from .files import read as read, replace as replace, write as write
from .image import Image as Image, Unit as Unit
from .measurements import (
    Measurements as Measurements,
    load_measurements as load_measurements,
    save_measurements as save_measurements,
)
