"""Which format a file is in, and its reader and writer."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace as replaced
from pathlib import Path
from typing import IO

import numpy as np
import torch

from .dicom import read_dicom
from .image import Image, Unit, upright

READABLE = ".nii, .nii.gz, .npy, .png, .tif, .jpg or a folder of DICOM"


def read(
    path: str | Path,
    unit: Unit | None = None,
    *,
    axes: str | None = None,
    colour: bool = False,
    placed: bool = False,
) -> Image:
    """The image in a file: NIfTI, NumPy or a picture, told by the name's ending.

    A folder is one DICOM series; see `read_dicom`. Volumes are reoriented to slices
    first, nose up (see `Image`) and carry their affine; NumPy and pictures lie at the
    origin. Nothing in a file is ever executed.

    Args:
        path: the file or folder.
        unit: what the values are in. Unless given, a DICOM CT is in Hounsfield units and
            a PET in SUV, NIfTI whose least value is below −100 is taken for Hounsfield
            units, and everything else has none.
        axes: where a NIfTI array's axes point, such as ``"RAS"``, for a file whose
            affine is known to be wrong; voxel sizes are still taken from it.
        colour: take pictures with colours, too; see `Image`.
        placed: refuse what does not say where it lies in the world.

    Raises:
        ValueError: the file is missing, truncated, not an image, or not finite.
    """
    path = Path(path)
    image = (
        read_dicom(path) if path.is_dir() else _read_file(path, axes, colour, placed)
    )
    if image.values.numel() == 0:
        raise ValueError(f"{path} holds no numbers")
    if not image.values.isfinite().all():
        raise ValueError(
            f"{path} holds NaN or infinite values: repair or mask them first"
        )
    if unit is None:
        nifti = path.name.lower().endswith((".nii", ".nii.gz")) and path.is_file()
        unit = "HU" if nifti and image.values.min() < -100 else image.unit
    return replaced(image, unit=unit)


def _read_file(path: Path, axes: str | None, colour: bool, placed: bool) -> Image:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the name")
    name = path.name.lower()
    try:
        if name.endswith((".nii", ".nii.gz")):
            return _read_nifti(path, axes, placed)
        if placed:
            raise ValueError("it does not say where it lies: give NIfTI or DICOM")
        if name.endswith(".npy"):
            array = np.load(path, allow_pickle=False)
            return Image.from_array(_stack(array))
        if name.endswith((".png", ".tif", ".tiff", ".jpg", ".jpeg")):
            image = Image.from_array(_stack(_read_picture(path, colour)))
            return replaced(image, colour=len(image.values) == 3)
        raise ValueError(f"unknown kind of file; it can be {READABLE}")
    except ModuleNotFoundError:
        raise
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot read {path}: {first_line}") from error


def write(path: str | Path, image: Image, *, labels: bool = False) -> None:
    """Write an image, all of it or nothing.

    NIfTI (with its affine) and NumPy keep the numbers; a picture (.png) has 256 levels
    from 0 to 1, and is of one slice or in colours.

    Args:
        path: the file.
        image: what to write.
        labels: whether the values are whole numbers from 0 to 255, to be kept as such.
    """
    path = Path(path)
    array = image.values.detach().cpu().numpy()
    array = array.astype(np.uint8) if labels else array
    if path.name.endswith((".nii", ".nii.gz")):
        import nibabel as nib

        volume = nib.Nifti1Image(array.transpose(2, 1, 0), image.affine)
        volume.header.set_xyzt_units("mm")
        ending = ".nii.gz" if path.name.endswith(".gz") else ".nii"
        replace(path, lambda partial: nib.save(volume, partial), ending)
    elif path.suffix == ".npy":
        replace(path, lambda partial: np.save(partial, array), ".npy")
    elif path.suffix == ".png":
        if not (image.colour or len(array) == 1):
            raise ValueError(f"cannot write {path}: a picture is of one slice")
        _write_picture(path, array if image.colour else array[0])
    else:
        raise ValueError(
            f"cannot write {path}: the name must end in .nii.gz, .npy or .png"
        )


def replace(path: Path, save: Callable[[str], object], ending: str = "") -> None:
    """Let ``save`` write a file beside ``path``; only when it is whole move it there.

    Whatever happens meanwhile, ``path`` holds either what it held or all of the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle: IO[bytes]
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=".", suffix=".part" + ending, delete=False
    ) as handle:
        partial = Path(handle.name)
    try:
        save(str(partial))
        partial.chmod(0o666 & ~_umask())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _stack(array: np.ndarray) -> torch.Tensor:
    if array.ndim not in (2, 3) or array.dtype.kind not in "fiub":
        raise ValueError(
            f"expected real numbers in 2 or 3 dimensions, got {array.dtype} "
            f"of shape {array.shape}"
        )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _write_picture(path: Path, array: np.ndarray) -> None:
    from skimage.io import imsave

    levels = np.round(255 * array.clip(0, 1)).astype(np.uint8)
    pixels = levels.transpose(1, 2, 0) if levels.ndim == 3 else levels
    replace(path, lambda partial: imsave(partial, pixels, check_contrast=False), ".png")


def _read_picture(path: Path, colour: bool) -> np.ndarray:
    from skimage.io import imread

    with path.open("rb") as file:  # given a name, it leaves a damaged picture open
        tiff = path.suffix.lower() in (".tif", ".tiff")
        array = np.asarray(imread(path if tiff else file))
    if array.ndim == 3 and not colour:
        raise ValueError("it has colours: convert it to grey first")
    if array.ndim == 3:
        if array.shape[-1] != 3:
            raise ValueError(f"expected 3 colours, got {array.shape[-1]} channels")
        array = array.transpose(2, 0, 1)
    return array / np.iinfo(array.dtype).max if array.dtype.kind == "u" else array


def _read_nifti(path: Path, axes: str | None, placed: bool) -> Image:
    from nibabel.nifti1 import load

    file = load(path)
    if len(file.shape) not in (2, 3):
        raise ValueError(f"expected a volume, got an array of shape {file.shape}")
    if placed and not (file.header["sform_code"] or file.header["qform_code"]):
        raise ValueError(
            "it does not say where it lies (its sform_code and qform_code are 0): write "
            "its affine with a code, such as 1 for the scanner's coordinates"
        )
    given = np.asarray(file.affine)
    if axes is not None:
        given = _affine(axes, np.linalg.norm(given[:3, :3], axis=0))
    shape = (*file.shape, 1)[:3]
    return upright(file.get_fdata(dtype=np.float32).reshape(shape), given)


def _affine(axes: str, sizes: np.ndarray) -> np.ndarray:
    """The affine of an array whose axes point to ``axes``, its first voxel at 0."""
    from nibabel.orientations import axcodes2ornt

    try:
        orientation = axcodes2ornt(tuple(axes.upper()))
    except (ValueError, IndexError) as error:
        raise ValueError(f"axes must be like 'RAS', got {axes!r}") from error
    if sorted(orientation[:, 0]) != [0, 1, 2]:
        raise ValueError(f"axes must name each direction once, got {axes!r}")
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for array_axis, (world_axis, sign) in enumerate(orientation):
        affine[int(world_axis), array_axis] = sign * sizes[array_axis]
    return affine
