import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from invsolve import io

ANGLES = np.linspace(0, np.pi, 6, dtype=np.float32)[:-1]


@pytest.fixture
def measured(generator):
    return io.Measurements(
        torch.randn(2, 1, 5, 12, generator=generator),
        {"name": "ct", "shape": [8, 8], "angles": ANGLES, "pixel_mm": 3.9},
        {"name": "gaussian", "sigma": 0.1},
        np.diag([-3.9, -3.9, 2.5, 1.0]),
        "1/mm",
        {"simulated": True, "image": "Jürgen.nii.gz"},
    )


@pytest.fixture
def file(measured, tmp_path):
    path = tmp_path / "y.npz"
    io.save_measurements(path, measured)
    return path


def test_what_is_written_is_read(measured, file):
    again = io.load_measurements(file)
    torch.testing.assert_close(again.y, measured.y)
    np.testing.assert_array_equal(again.affine, measured.affine)
    np.testing.assert_array_equal(again.operator.pop("angles"), ANGLES)
    assert again.operator == {"name": "ct", "shape": [8, 8], "pixel_mm": 3.9}
    assert (again.noise, again.unit) == (measured.noise, "1/mm")
    assert again.note == measured.note


def test_complex_measurements_stay_complex(measured, tmp_path):
    kspace = replace(measured, y=torch.complex(measured.y, -measured.y))
    io.save_measurements(tmp_path / "k.npz", kspace)
    torch.testing.assert_close(io.load_measurements(tmp_path / "k.npz").y, kspace.y)


def test_nothing_in_the_file_is_pickled(file):
    with np.load(file, allow_pickle=False) as stored:
        assert {name: stored[name].dtype.kind for name in stored.files} == {
            "y": "f",
            "affine": "f",
            "angles": "f",
            "meta": "U",
        }


def rewrite(path, **changes):
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


def meta(**changes):
    base = {
        "format": 1,
        "operator": {"name": "ct"},
        "noise": {"name": "gaussian"},
        "unit": "",
    }
    return np.asarray(json.dumps(base | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"meta": None}, "not a measurement file"),
        ({"meta": np.asarray("{")}, "not a measurement file"),
        ({"meta": np.asarray("[1]")}, "not of format 1"),
        ({"meta": meta(format=2)}, "not of format 1"),
        ({"meta": meta(unit="furlong")}, "unit 'furlong' is unknown"),
        ({"meta": meta(operator=[1])}, "not objects"),
        ({"meta": meta(noise={})}, "the noise has no name"),
        ({"y": None}, "lacks 'y'"),
        ({"y": np.full((1, 1, 5, 12), np.nan)}, "60 of 60 measurements are NaN"),
        ({"y": np.zeros(3)}, "shape"),
        ({"y": np.zeros((1, 1, 3), dtype=int)}, "y is int64"),
        ({"affine": np.eye(3)}, "4×4"),
        ({"evil": np.zeros(1)}, "unknown array 'evil'"),
        ({"y": np.array([{}], dtype=object)}, "not a measurement file"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(file, changes, reason):
    rewrite(file, **changes)
    with pytest.raises(ValueError, match=reason) as error:
        io.load_measurements(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 10, 400, -30])
def test_a_truncated_file_is_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged"):
        io.load_measurements(file)


def test_garbage_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "y.npz"
    with pytest.raises(ValueError, match="there is no file"):
        io.load_measurements(path)
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="damaged"):
        io.load_measurements(path)


def test_a_failed_write_leaves_what_was_there(measured, file, monkeypatch):
    before = file.read_bytes()

    def fail(*args, **arrays):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="no space left"):
        io.save_measurements(file, measured)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_name_must_say_what_it_is(measured, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        io.save_measurements(tmp_path / "y.dat", measured)
