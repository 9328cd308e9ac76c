"""Files in and out: read a file to an `Image`, write one back."""

from .files import read as read, replace as replace, write as write
from .image import Image as Image
