"""Simulated PET: what the simulation promises, measured."""

import json

import numpy as np
import pytest
import torch
from torch import Generator

from invsolve import io
from invsolve.segmentation.cases import (
    MODALITIES,
    body_grid,
    modalities_of,
    openkbp_case,
)
from invsolve.segmentation.pet import (
    blurred,
    brain,
    draw_tumour,
    field,
    scan,
    simulate_pet,
)

MM = 4.0


def ball(shape, centre, mm) -> torch.Tensor:
    axes = [torch.arange(n, dtype=torch.float32) for n in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return (grid - torch.tensor(centre)).square().sum(-1).sqrt() * MM <= mm


@pytest.fixture
def neck():
    """A cylinder of water in air with a target in it."""
    hu = torch.full((20, 40, 40), -1000.0)
    _, y, x = torch.meshgrid(*[torch.arange(n) for n in hu.shape], indexing="ij")
    hu[((y - 19.5) ** 2 + (x - 19.5) ** 2).sqrt() < 16] = 0.0
    return hu, {"PTV70": ball(hu.shape, (10.0, 20.0, 20.0), 28.0)}


def test_the_scan_of_even_uptake_is_even_and_right(neck):
    hu, _ = neck
    x = 3.0 * (hu > -500).float()
    seen = scan(x, hu, MM, Generator().manual_seed(0))
    inside = ball(hu.shape, (10.0, 19.5, 19.5), 36.0)
    assert float(seen[inside].mean()) == pytest.approx(3.0, rel=0.03)
    assert float(seen[hu < -500].mean()) < 0.25
    assert 0.01 < float(seen[inside].std()) / 3.0 < 0.2  # noisy, as PET is


def test_attenuation_is_corrected_and_costs_counts(neck):
    hu, _ = neck
    x = (hu > -500).float()
    inside = ball(hu.shape, (10.0, 19.5, 19.5), 24.0)
    dense = torch.where(hu > -500, 1000.0, hu)
    for h in (hu, dense):
        seen = scan(x, h, MM, Generator().manual_seed(0))
        assert float(seen[inside].mean()) == pytest.approx(1.0, rel=0.04)


def test_small_lesions_are_dimmed_and_large_ones_are_not(neck):
    hu, _ = neck
    peaks = []
    for mm in (5.0, 30.0):
        x = 1.0 * (hu > -500) + 7.0 * ball(hu.shape, (10.0, 20.0, 20.0), mm)
        seen = scan(x, hu, MM, Generator().manual_seed(1))
        peaks.append(float(seen[9:12, 19:22, 19:22].mean()))
    assert peaks[0] < 0.6 * 8 and peaks[1] == pytest.approx(8.0, rel=0.08)


def test_a_tumour_lies_within_the_eroded_target(neck):
    from scipy import ndimage

    hu, structures = neck
    target = structures["PTV70"]
    depth = torch.from_numpy(ndimage.distance_transform_edt(target.numpy())) * MM
    for seed in range(8):
        tumour = draw_tumour(hu, structures, MM, Generator().manual_seed(seed))
        ml = float(tumour.sum()) * MM**3 / 1000
        assert bool((depth[tumour] > 5.0).all())
        assert 1.0 < ml < 80.0
        assert 1 <= ndimage.label(tumour.numpy())[1] <= 2  # pyright: ignore


def test_the_highest_dose_that_is_large_enough_is_the_target(neck):
    hu, structures = neck
    small = ball(hu.shape, (10.0, 10.0, 10.0), 6.0)
    both = {"PTV70": small, "PTV63": structures["PTV70"]}
    tumour = draw_tumour(hu, both, MM, Generator().manual_seed(0))
    assert not (tumour & ~structures["PTV70"]).any()
    with pytest.raises(ValueError, match="no target holds 3 ml"):
        draw_tumour(hu, {"PTV70": small}, MM, Generator().manual_seed(0))


def test_a_seed_is_a_patient(neck):
    hu, structures = neck

    def drawn(seed: int):
        return simulate_pet(hu, structures, MM, Generator().manual_seed(seed))

    a, b, c = drawn(0), drawn(0), drawn(1)
    assert torch.equal(a.pet, b.pet) and torch.equal(a.tumour, b.tumour)
    assert not torch.equal(a.tumour, c.tumour)
    assert float(a.uptake[a.tumour].mean()) > 1.5  # hotter than what is around


def test_the_brain_is_what_the_skull_encloses():
    hu = torch.full((60, 56, 56), -1000.0)
    outer = ball(hu.shape, (30.0, 28.0, 28.0), 80.0)
    inner = ball(hu.shape, (30.0, 28.0, 28.0), 68.0)
    hu[outer], hu[inner] = 900.0, 30.0
    found = brain(hu, MM)
    assert float((found & inner).sum() / inner.sum()) > 0.8
    assert not (found & ~inner).any()
    hu[outer & ~inner] = 30.0  # the same without its skull
    assert not brain(hu, MM).any()


def test_a_field_is_smooth_and_of_unit_variance(generator):
    f = field(torch.Size((40, 40, 40)), 10.0, generator)
    assert float(f.std()) == pytest.approx(1.0, abs=1e-4)
    assert float((f[1:] - f[:-1]).std()) < 0.4


def test_a_blur_keeps_the_amount_and_has_its_width():
    x = torch.zeros(33, 33, 33)
    x[16, 16, 16] = 1.0
    y = blurred(x, 6.0)
    assert float(y.sum()) == pytest.approx(1.0, rel=1e-3)
    assert float(y[16, 16, 19] / y[16, 16, 16]) == pytest.approx(0.5, rel=1e-3)


# --- cases


def test_what_networks_see():
    hu = torch.tensor([-1000.0, -200.0, 25.0, 250.0, 3000.0])
    ct, pet = MODALITIES["ct"], MODALITIES["pet"]
    torch.testing.assert_close(ct.seen(hu), torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]))
    suv = torch.tensor([-0.1, 0.0, float(np.e) - 1])
    torch.testing.assert_close(pet.seen(suv), torch.tensor([0.0, 0.0, 1.0]))


def test_the_body_is_found_without_its_couch_and_its_airway():
    hu = torch.full((30, 60, 60), -1000.0)
    hu[:, 10:40, 15:45] = 0.0
    hu[:, 20:26, 15:45] = -1000.0  # air from side to side parts the slices in two
    hu[:, 50:52, 5:55] = 0.0  # the couch
    affine = np.diag([-4.0, -4.0, 4.0, 1.0])
    grid = body_grid(io.Image(hu, affine, "HU"))
    top = grid.affine[:3, 3] / [-4, -4, 4]
    assert grid.shape[1] < 45 and tuple(top[:2]) == pytest.approx((14, 9), abs=1.01)
    with pytest.raises(ValueError, match="no body is to be found"):
        body_grid(io.Image(torch.full((9, 9, 9), -1000.0), affine, "HU"))


def test_a_patient_of_openkbp(tmp_path, neck):
    hu, structures = neck
    folder = tmp_path / "part"
    affine = np.diag([MM, MM, MM, 1.0])  # RAS, as the files say
    names = {"Larynx": 5, "PTV70": 9}
    (tmp_path / "structures.json").write_text(json.dumps(names))
    bits = structures["PTV70"].float() * 2**9
    for name, values in (("ct", hu), ("structures", bits)):
        # PLI: the array's x runs to the back, y to the left and z to the feet.
        array = values.flip(0).transpose(1, 2)
        io.write(folder / f"pt001_{name}.nii.gz", io.Image(array, affine))
    case = openkbp_case(folder / "pt001_ct.nii.gz", Generator().manual_seed(0))
    assert case.name == "pt001" and case.masks is not None
    ct, pet = case.scans["ct"], case.scans["pet"]
    assert ct.shape == pet.shape == case.masks[0].shape
    # The tumour is hot, and where it is the CT is tissue.
    assert float(pet[case.masks[0]].mean()) > 2 * float(pet.mean())
    assert float(ct[case.masks[0]].mean()) == pytest.approx(0.0, abs=30)
    assert case.shown(modalities_of(["ct", "pet"])).shape == (2, *ct.shape)
