"""Files: what is read lies where the file says, and nothing is half-written."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from invsolve import io
from invsolve.units import MU_WATER, hu_to_mu, mu_to_hu

nib = pytest.importorskip("nibabel")
skimage_io = pytest.importorskip("skimage.io")

SHAPE = (3, 4, 5)
DIRECTION = {"R": (1, 0, 0), "A": (0, 1, 0), "S": (0, 0, 1)}
DIRECTION |= {
    opposite: tuple(-c for c in DIRECTION[axis])
    for opposite, axis in (("L", "R"), ("P", "A"), ("I", "S"))
}


def affine(codes: str, degrees: float = 0.0) -> np.ndarray:
    """The array's axes run along ``codes``, turned a little about the head's axis."""
    spacing, angle = (0.9, 1.3, 2.5), np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    out = np.eye(4)
    for axis, code in enumerate(codes):
        out[:3, axis] = spacing[axis] * turn @ DIRECTION[code]
    out[:3, 3] = (-30, 12, 100)
    return out


def numbered(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Every voxel has a value of its own."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def world(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Where the voxels of value 0, 1, 2, … lie, in millimetres."""
    index = np.stack(np.unravel_index(np.argsort(array, axis=None), array.shape), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def world_of(image: io.Image) -> np.ndarray:
    return world(image.values.numpy().transpose(2, 1, 0), image.affine)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "PIR", "SAL", "ASR", "ILP"])
@pytest.mark.parametrize("degrees", [0.0, 12.0])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_every_voxel_stays_in_its_place(
    codes: str, degrees: float, ending: str, tmp_path: Path
) -> None:
    array, there = numbered(), affine(codes, degrees)
    image = io.read(save_nifti(tmp_path / f"a{ending}", array, there))
    assert image.values.dtype == torch.float32
    assert sorted(image.values.flatten().tolist()) == list(range(array.size))
    np.testing.assert_allclose(world_of(image), world(array, there), atol=1e-4)
    x, y, z = image.affine[:3, :3].T
    assert np.argmax(np.abs(x)) == 0 and x[0] < 0  # to the patient's left
    assert np.argmax(np.abs(y)) == 1 and y[1] < 0  # to the back
    assert np.argmax(np.abs(z)) == 2 and z[2] > 0  # to the head
    np.testing.assert_allclose(
        sorted(image.spacing), sorted(np.linalg.norm(there[:3, :3], axis=0)), rtol=1e-6
    )


def test_a_slice_is_axial_nose_up_and_left_to_the_right(tmp_path: Path) -> None:
    head = np.zeros((9, 11, 7), np.float32)  # runs right, anterior, superior
    head[4, 10, 5] = 1  # the nose
    head[0, 5, 5] = 2  # the left ear
    head[4, 5, 6] = 3  # the vertex
    image = io.read(save_nifti(tmp_path / "head.nii", head, affine("RAS")))
    assert image.values.shape == (7, 11, 9)
    assert image.values[5, 0, 4] == 1
    assert image.values[5, 5, 8] == 2
    assert image.values[6, 5, 4] == 3
    assert image.spacing == pytest.approx((2.5, 1.3, 0.9), rel=1e-6)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "new/folder/a.nii.gz"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    values = torch.from_numpy(numbered()) - 20
    image = io.Image(values, affine("LPS", 12.0), "1/mm")
    io.write(tmp_path / name, image)
    again = io.read(tmp_path / name, unit="1/mm")
    assert torch.equal(again.values, values)
    assert again.unit == "1/mm"
    np.testing.assert_allclose(again.affine, image.affine, atol=1e-5)
    assert nib.load(tmp_path / name).header.get_xyzt_units()[0] == "mm"


def test_numpy_round_trip(tmp_path: Path) -> None:
    image = io.Image.from_array(torch.from_numpy(numbered()))
    io.write(tmp_path / "a.npy", image)
    again = io.read(tmp_path / "a.npy")
    assert torch.equal(again.values, image.values)
    assert np.array_equal(again.affine, image.affine)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)], ids=str)
def test_numbers_of_any_kind_are_read(
    dtype: type, shape: tuple[int, ...], tmp_path: Path
) -> None:
    array = (numbered(shape) % 2).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    image = io.read(tmp_path / "a.npy")
    assert image.values.shape == (SHAPE if shape == SHAPE else (1, *shape))
    assert np.array_equal(image.values.reshape(shape).numpy(), array)
    assert image.spacing == (1, 1, 1)


def test_colours_are_read_and_written_where_they_are_asked_for(tmp_path: Path) -> None:
    levels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    skimage_io.imsave(tmp_path / "a.png", levels, check_contrast=False)
    image = io.read(tmp_path / "a.png", colour=True)
    assert image.colour and image.values.shape == (3, 4, 5)
    assert_close(image.values[2, 1, 0], torch.tensor(float(levels[1, 0, 2]) / 255))
    io.write(tmp_path / "b.png", image)
    assert np.array_equal(skimage_io.imread(tmp_path / "b.png"), levels)
    grey = io.Image.from_array(torch.tensor([[-1.0, 0.0], [0.5, 2.0]]))
    io.write(tmp_path / "c.png", grey)
    assert skimage_io.imread(tmp_path / "c.png").tolist() == [[0, 0], [128, 255]]
    assert not io.read(tmp_path / "c.png", colour=True).colour


def test_what_is_no_picture_is_not_written_as_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a picture is of one slice"):
        io.write(tmp_path / "a.png", io.Image.from_array(torch.zeros(2, 4, 4)))
    clear = np.zeros((4, 4, 4), np.uint8)
    skimage_io.imsave(tmp_path / "clear.png", clear, check_contrast=False)
    with pytest.raises(ValueError, match="expected 3 colours, got 4"):
        io.read(tmp_path / "clear.png", colour=True)


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_run_from_zero_to_one(
    dtype: type, ending: str, tmp_path: Path
) -> None:
    top = np.iinfo(dtype).max
    picture = np.array([[0, 1, top // 2], [top, 7, 100]], dtype)
    skimage_io.imsave(tmp_path / f"a{ending}", picture, check_contrast=False)
    image = io.read(tmp_path / f"a{ending}")
    assert image.values.shape == (1, 2, 3)
    assert_close(image.values[0], torch.from_numpy(picture / top).float())


def test_volumes_below_air_are_hounsfield_units(tmp_path: Path) -> None:
    ct, other = numbered() - 1000, numbered() - 50
    assert io.read(save_nifti(tmp_path / "a.nii", ct, np.eye(4))).unit == "HU"
    assert io.read(save_nifti(tmp_path / "b.nii", other, np.eye(4))).unit == ""
    assert io.read(tmp_path / "a.nii", unit="").unit == ""
    np.save(tmp_path / "a.npy", ct)
    assert io.read(tmp_path / "a.npy").unit == ""


def test_a_flat_nifti_is_one_slice(tmp_path: Path) -> None:
    image = io.read(save_nifti(tmp_path / "a.nii", numbered((4, 5)), affine("LPS")))
    assert image.values.shape == (1, 5, 4)


@pytest.mark.parametrize("codes", ["RAS", "PIR", "lps"])
def test_axes_that_are_given_replace_a_wrong_affine(codes: str, tmp_path: Path) -> None:
    array, right = numbered(), affine(codes.upper())
    right[:3, 3] = 0
    wrong = np.diag([0.9, -1.3, 2.5, 1.0])
    image = io.read(save_nifti(tmp_path / "a.nii", array, wrong), axes=codes)
    np.testing.assert_allclose(world_of(image), world(array, right), atol=1e-4)
    flat = save_nifti(tmp_path / "flat.nii", numbered((4, 5)), wrong)
    assert io.read(flat, axes=codes).values.numel() == 20


@pytest.mark.parametrize("axes", ["RA", "RAX", "RRS", "RLS", "RASS", ""])
def test_axes_that_make_no_sense_are_refused(axes: str, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", numbered(), np.eye(4))
    with pytest.raises(ValueError, match=r"cannot read .*a\.nii: axes must") as error:
        io.read(path, axes=axes)
    assert "\n" not in str(error.value)


def missing(path: Path) -> Path:
    return path / "missing.nii.gz"


def truncated_nifti(path: Path) -> Path:
    noise = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    file = save_nifti(path / "truncated.nii.gz", noise, np.eye(4))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def garbage(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / name).write_bytes(b"not an image\nbut two lines\n" * 50)
        return path / name

    make.__name__ = f"garbage {name}"
    return make


def empty(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / name).touch()
        return path / name

    make.__name__ = f"empty {name}"
    return make


def not_finite(path: Path) -> Path:
    array = numbered()
    array[1, 2, 3] = np.nan
    np.save(path / "nan.npy", array)
    return path / "nan.npy"


def colours(path: Path) -> Path:
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    skimage_io.imsave(path / "colour.png", picture)
    return path / "colour.png"


def complex_numbers(path: Path) -> Path:
    np.save(path / "complex.npy", 1j * numbered())
    return path / "complex.npy"


def four_dimensions(path: Path) -> Path:
    return save_nifti(path / "time.nii", numbered((2, 3, 4, 5)), np.eye(4))


def no_numbers(path: Path) -> Path:
    np.save(path / "none.npy", np.zeros((0, 4)))
    return path / "none.npy"


def a_folder(path: Path) -> Path:
    (path / "folder.nii").mkdir()
    return path / "folder.nii"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "there is no file"),
        (a_folder, "holds 0 DICOM series"),
        (truncated_nifti, "cannot read"),
        (garbage("a.npy"), "cannot read"),
        (garbage("a.nii"), "cannot read"),
        (garbage("a.nii.gz"), "cannot read"),
        (garbage("a.png"), "cannot read"),
        (empty("a.npy"), "cannot read"),
        (empty("a.nii"), "cannot read"),
        (empty("a.png"), "cannot read"),
        (garbage("a.docx"), "unknown kind of file"),
        (not_finite, "NaN or infinite"),
        (colours, "convert it to grey"),
        (complex_numbers, "expected real numbers"),
        (four_dimensions, "expected a volume"),
        (no_numbers, "holds no numbers"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_cannot_be_read_is_refused_in_one_line(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        io.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Trap:
    """An object that touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "trap.npy"
    np.save(path, np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"cannot read .*trap\.npy"):
        io.read(path)
    assert not sprung.exists()
    np.load(path, allow_pickle=True)
    assert sprung.exists()  # the trap does work


def test_only_known_endings_are_written(tmp_path: Path) -> None:
    image = io.Image.from_array(torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"must end in \.nii\.gz, \.npy or \.png"):
        io.write(tmp_path / "a.jpg", image)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [True, False], ids=["over", "new"])
def test_writing_is_all_or_nothing(old: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    if old:
        path.write_bytes(b"old")

    def fail(partial: str) -> None:
        Path(partial).write_bytes(b"ha")
        raise OSError("disk full")

    before = list(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        io.replace(path, fail, ".bin")
    assert list(tmp_path.iterdir()) == before
    assert not old or path.read_bytes() == b"old"

    def succeed(partial: str) -> None:
        assert Path(partial).name.endswith(".part.bin")
        assert not old or path.read_bytes() == b"old"
        Path(partial).write_bytes(b"new")

    io.replace(path, succeed, ".bin")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"new"


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    io.replace(tmp_path / "a.bin", lambda partial: Path(partial).write_bytes(b""))
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 3), (2, 3)])
def test_slices_stay_in_their_place(start: int, stop: int) -> None:
    values = torch.from_numpy(numbered((4, 5, 3)))
    image = io.Image(values, affine("LPS", 12.0), "HU")
    some = image.slices(start, stop)
    assert torch.equal(some.values, values[start:stop])
    assert some.unit == "HU"
    for z, y, x in product(range(stop - start), range(5), range(3)):
        there = image.affine @ (x, y, z + start, 1)
        np.testing.assert_allclose(some.affine @ (x, y, z, 1), there)


def test_a_picture_is_a_stack_of_one() -> None:
    image = io.Image.from_array(torch.ones(4, 5, dtype=torch.float64), "1/mm")
    assert image.values.shape == (1, 4, 5)
    assert image.values.dtype == torch.float32
    assert (image.spacing, image.unit) == ((1.0, 1.0, 1.0), "1/mm")
    x, y, z = image.affine[:3, :3].T
    assert (x[0], y[1], z[2]) == (-1, -1, 1)


def test_hounsfield_units_and_attenuation_are_inverse() -> None:
    hu = torch.linspace(-1000, 3000, 41, dtype=torch.float64)
    assert_close(mu_to_hu(hu_to_mu(hu)), hu)
    assert hu_to_mu(torch.tensor(0.0)) == pytest.approx(MU_WATER)
    assert hu_to_mu(torch.tensor(-1024.0)) == 0
    assert mu_to_hu(torch.tensor(2 * MU_WATER)) == pytest.approx(1000)
