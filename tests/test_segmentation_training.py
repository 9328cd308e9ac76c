"""Training a segmenter: the loss is proper, the cubes are right, a run gives a model."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from invsolve import io
from invsolve.grids import Grid
from invsolve.segmentation.cases import MODALITIES, Case, modalities_of, needed
from invsolve.segmentation.masks import RARE
from invsolve.segmentation.segmenter import AcrossSlices, Unaware, load, segment
from invsolve.segmentation.training import (
    Cases,
    SegmenterConfig,
    cubes,
    cut,
    mask_loss,
    noisy,
    read_cases,
    train_segmenter,
)
from invsolve.training_loop import Optimisation

AFFINE = np.diag([-4.0, -4.0, 4.0, 1.0])


def write_case(folder, name: str, seed: int, empty: bool = False) -> None:
    """A body with a hot spot, its mask, in HECKTOR's layout."""
    g = Generator().manual_seed(seed)
    ct = torch.full((28, 28, 28), -1000.0)
    ct[2:26, 3:25, 3:25] = 20.0
    z, y, x = torch.randint(8, 18, (3,), generator=g).tolist()
    mask = torch.zeros(28, 28, 28)
    if not empty:
        mask[z : z + 4, y : y + 4, x : x + 4] = 1
    pet = (ct > -500) * 1.0 + 8.0 * mask
    for part, values in (
        (f"imagesTr/{name}__CT", ct),
        (f"imagesTr/{name}__PT", pet),
        (f"labelsTr/{name}", mask),
    ):
        io.write(folder / f"{part}.nii.gz", io.Image(values, AFFINE))


@pytest.fixture
def folder(tmp_path):
    for k in range(3):
        write_case(tmp_path / "cases", f"p{k}", k)
    return tmp_path / "cases"


def config_for(folder, **optimisation) -> SegmenterConfig:
    return SegmenterConfig(
        kind="segmenter",
        name="toy",
        cases=Cases(train=folder, val=folder, crop=8, window=16),
        network={"widths": (16, 16), "layers": 1},
        optimisation=Optimisation(
            **{"images": 8, "batch": 2, "crop_batch": 2, "bf16": False, **optimisation}
        ),
    )


def test_the_loss_is_least_at_the_posterior(generator):
    # Voxels independent, each inside with probability 0.2: F = logit 0.2.
    mask = 2.0 * (torch.rand(4000, 1, 4, 1, 1, generator=generator) < 0.2) - 1
    opt = Optimisation(log_sigma_mean=0.7, log_sigma_std=1.0)
    rows = {**noisy(mask, opt, generator), "images": mask.new_zeros(4000, 1, 4, 1, 1)}

    def loss_at(logit: Tensor) -> Tensor:
        net = Unaware(lambda images: (logit - RARE).expand_as(images))
        return mask_loss(net, **rows, dice=0.0, bf16=False, exclusive=False)

    exact = torch.tensor(0.2).logit()
    at = exact.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(loss_at(at), at)
    assert abs(float(slope)) < 0.01  # against 0.1 and more one unit of logit away
    assert loss_at(exact) < loss_at(exact - 0.5)
    assert loss_at(exact) < loss_at(exact + 0.5)


def test_the_loss_of_exclusive_labels_is_least_at_the_posterior(generator):
    # Voxels independent: none of two labels with 0.5, the first with 0.3, the other 0.2.
    code = torch.multinomial(
        torch.tensor([0.5, 0.3, 0.2]), 8000, replacement=True, generator=generator
    ).reshape(2000, 1, 4, 1, 1)
    mask = 2.0 * (code == torch.tensor([1, 2])[:, None, None, None]) - 1
    opt = Optimisation(log_sigma_mean=0.7, log_sigma_std=1.0)
    rows = {**noisy(mask, opt, generator), "images": mask.new_zeros(2000, 1, 4, 1, 1)}
    at = torch.tensor([0.6, 0.4]).log().requires_grad_(True)  # against none

    def loss_at(logits: Tensor) -> Tensor:
        F = (logits - RARE)[:, None, None, None]
        net = Unaware(lambda images: F.expand(len(images), -1, *images.shape[2:]))
        return mask_loss(net, **rows, dice=0.0, bf16=False, exclusive=True)

    (slope,) = torch.autograd.grad(loss_at(at), at)
    assert float(slope.abs().max()) < 0.01
    for shift in ([0.5, 0.0], [0.0, -0.5], [0.3, 0.3]):
        assert loss_at(at) < loss_at(at + torch.tensor(shift))


def test_a_dice_term_moves_that_optimum(generator):
    mask = 2.0 * (torch.rand(4000, 1, 4, 1, 1, generator=generator) < 0.2) - 1
    opt = Optimisation(log_sigma_mean=3.0, log_sigma_std=0.1)
    rows = {**noisy(mask, opt, generator), "images": mask.new_zeros(4000, 1, 4, 1, 1)}
    at = torch.tensor(0.2).logit().requires_grad_(True)
    net = Unaware(lambda images: (at - RARE).expand_as(images))
    loss = mask_loss(net, **rows, dice=1.0, bf16=False, exclusive=False)
    (slope,) = torch.autograd.grad(loss, at)
    assert abs(float(slope)) > 0.03


def test_noisy_masks_are_as_noisy_as_they_say(generator):
    mask = torch.ones(200, 1, 5, 5, 5)
    rows = noisy(mask, Optimisation(log_sigma_mean=0.0, log_sigma_std=1.0), generator)
    z = (rows["x"] - mask) / rows["sigma"].reshape(-1, 1, 1, 1, 1)
    assert float(z.std()) == pytest.approx(1.0, abs=0.02)
    assert float(rows["sigma"].log().mean()) == pytest.approx(0.0, abs=0.02)
    assert float(rows["sigma"].log().std()) == pytest.approx(1.0, abs=0.05)


def test_a_cut_is_a_slice_with_air_around(generator):
    x = torch.randn(2, 5, 6, 7, generator=generator)
    whole = torch.full((2, 25, 26, 27), -9.0)
    whole[:, 10:15, 10:16, 10:17] = x
    for corner in ((-3, 2, 0), (1, -4, 5), (0, 0, 0), (4, 5, 6)):
        found = cut(x, torch.tensor(corner), 4, [-9.0, -9.0])
        a, b, c = (10 + k for k in corner)
        torch.testing.assert_close(found, whole[:, a : a + 4, b : b + 4, c : c + 4])


def test_cubes_show_the_patient_and_its_mask(generator):
    masks = torch.zeros(1, 30, 30, 30, dtype=torch.bool)
    masks[0, 20:24, 5:9, 12:16] = True
    pet = 9.0 * masks[0]
    scans = {"ct": torch.zeros(30, 30, 30), "pet": pet}
    case = Case("p", scans, masks, Grid((30, 30, 30), AFFINE))
    data = Cases(train="", val="", positive=1.0)  # pyright: ignore
    images, mask = cubes([case], data, 12, 16, generator)
    assert images.shape == (12, 2, 16, 16, 16) and mask.shape == (12, 1, 16, 16, 16)
    assert set(mask.unique().tolist()) == {-1.0, 1.0}
    assert ((mask > 0).flatten(1).sum(1) > 0).all()  # all around the tumour
    hot = images[:, 1:] > 1.0  # log(1 + SUV), wherever it was mirrored and moved to
    assert torch.equal(hot, mask > 0)


def test_a_run_gives_a_segmenter_that_finds_what_it_was_shown(folder, tmp_path):
    config = config_for(
        folder, images=160, batch=4, crop_part=0.0, lr=4e-3, warmup=5, ema=0.9
    )
    _, card = train_segmenter(config, tmp_path / "out", seed=0, checkpoint_every=1000)
    model = load(card)
    assert model.labels == ("tumour",) and list(model.modalities) == ["ct", "pet"]
    said = json.loads(card.read_text())
    assert said["family"] == "mask-diffusion" and said["spacing_mm"] == 4.0
    case = read_cases(folder, config.cases)[0]
    files = [folder / "imagesTr" / f"p0__{k}.nii.gz" for k in ("CT", "PT")]
    ct, pet = io.read(files[0], "HU"), io.read(files[1], "SUV")
    found = segment(
        ct, pet, model=model, samples=2, generator=Generator().manual_seed(0)
    )
    assert case.masks is not None
    both = (found.mask() & case.masks).sum() * 2
    assert float(both / (found.mask().sum() + case.masks.sum())) > 0.5


def test_a_damaged_segmenter_is_refused(folder, tmp_path):
    _, card = train_segmenter(config_for(folder, images=1), tmp_path / "out", seed=0)
    weights = card.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:-8] + b"01234567")
    with pytest.raises(ValueError, match="sha256"):
        load(card)
    card.write_text(json.dumps({"family": "edm-unet"}))
    with pytest.raises(ValueError, match="of the family 'edm-unet'"):
        load(card)
    with pytest.raises(ValueError, match="unknown segmenter 'nobody'"):
        load("nobody")


def test_an_empty_mask_is_refused(folder):
    write_case(folder, "p9", 9, empty=True)
    with pytest.raises(ValueError, match="the mask of p9 is empty"):
        read_cases(folder, Cases(train=folder, val=folder))


# --- an MR's tissues


def write_head(folder, name: str, scale: float, noise: float) -> None:
    """A bright head with two tissues in it, at 2 mm, of any brightness."""
    g = Generator().manual_seed(0)
    code = torch.zeros(20, 24, 24)
    code[8:12, 6:18, 6:18], code[12:15, 6:18, 6:18] = 1, 2
    mr = torch.zeros(20, 24, 24)
    mr[2:18, 3:21, 3:21] = 0.5
    mr[code == 1], mr[code == 2] = 0.25, 1.0
    mr = scale * (mr + noise * torch.rand(mr.shape, generator=g))
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    io.write(folder / f"imagesTr/{name}__MR.nii.gz", io.Image(mr, affine))
    io.write(folder / f"labelsTr/{name}.nii.gz", io.Image(code, affine), labels=True)


def tissues(folder) -> dict[str, Any]:
    return {
        "train": folder,
        "val": folder,
        "modalities": ["mr"],
        "spacing_mm": 2.0,
        "labels": ("dark", "bright"),
        "crop": 8,
        "window": 16,
    }


def test_an_mr_of_any_brightness_looks_the_same(tmp_path):
    for name, scale in (("a", 1.0), ("b", 700.0)):
        write_head(tmp_path, name, scale, 0.01)
    data = Cases(**tissues(tmp_path))
    one, other = read_cases(tmp_path, data)
    a, b = (case.shown(data.modalities)[0] for case in (one, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert one.masks is not None and one.masks.shape[0] == 2
    assert one.grid.spacing == pytest.approx((2.0, 2.0, 2.0))
    # Air is −1 and the brightest tissue about 1; their order is that of the file.
    dark, bright = (float(a[mask].mean()) for mask in one.masks)
    assert float(a.min()) == pytest.approx(-1, abs=0.02)
    assert bright == pytest.approx(1, abs=0.02) and dark == pytest.approx(-0.5, abs=0.1)
    assert int(one.masks.sum()) == 7 * 12 * 12 and not one.masks.all(0).any()


def test_a_run_of_exclusive_labels_tells_all_in_its_card(tmp_path):
    write_head(tmp_path / "cases", "a", 1.0, 0.05)
    config = SegmenterConfig(
        kind="segmenter",
        name="toy",
        exclusive=True,
        cases=Cases(**tissues(tmp_path / "cases")),
        network={"widths": (16, 16), "layers": 1},
        optimisation=Optimisation(
            images=96, batch=4, crop_part=0.0, lr=8e-3, warmup=5, ema=0.9, bf16=False
        ),
        card={"window": 32},
    )
    _, card = train_segmenter(config, tmp_path / "out", seed=0, checkpoint_every=1000)
    model = load(card)
    assert model.modalities == {"mr": MODALITIES["mr"]} and model.exclusive
    assert (model.spacing_mm, model.window) == (2.0, 32)
    [case] = read_cases(tmp_path / "cases", config.cases)
    mr = io.read(tmp_path / "cases" / "imagesTr" / "a__MR.nii.gz")
    found = segment(
        mr, model=model, samples=1, steps=10, generator=Generator().manual_seed(0)
    )
    assert case.masks is not None and int(found.samples.sum(1).max()) == 1
    both = (found.mask() & case.masks).flatten(1).sum(1) * 2
    each = both / (found.mask().flatten(1).sum(1) + case.masks.flatten(1).sum(1))
    assert float(each.min()) > 0.6
    with pytest.raises(ValueError, match="needs 1 scan, MR in this order, got 2"):
        segment(mr, mr, model=model, generator=Generator().manual_seed(0))


def test_a_pet_alone_needs_a_ct_to_lie_on(folder):
    pet = modalities_of(["pet"])
    assert list(needed(pet)) == ["ct", "pet"] and list(pet) == ["pet"]
    assert list(needed(modalities_of(["ct"]))) == ["ct"]
    case = read_cases(folder, Cases(train=folder, val=folder, modalities=pet))[0]
    assert case.shown(pet).shape[0] == 1 and list(case.scans) == ["ct", "pet"]


def test_modalities_are_names_or_tables(tmp_path):
    with pytest.raises(ValueError, match="unknown modality 'us': one of ct, pet, mr"):
        modalities_of(["us"])
    own = {"flair": {"window": [0, 2], "percentile": 95.0, "body": 0.2}}
    assert modalities_of(own)["flair"].outside == -1.0
    told = Cases(train=tmp_path, val=tmp_path, modalities=own).model_dump(mode="json")  # pyright: ignore
    assert modalities_of(told["modalities"]) == modalities_of(own)


def test_a_scan_of_nothing_is_refused(tmp_path):
    write_head(tmp_path, "a", 0.0, 0.0)
    with pytest.raises(ValueError, match="MR: the scan is empty"):
        read_cases(tmp_path, Cases(**tissues(tmp_path)))


def test_slices_are_seen_alone(generator):
    class Mean(nn.Module):
        def forward(self, x, c_noise, condition):
            return x.mean((1, 2, 3), keepdim=True).expand_as(x) + condition

    x = torch.randn(2, 1, 5, 4, 4, generator=generator)
    condition = torch.randn(2, 1, 5, 4, 4, generator=generator)
    found = AcrossSlices(Mean())(x, torch.zeros(2), condition)
    expected = x.mean((3, 4), keepdim=True) + condition
    torch.testing.assert_close(found, expected)
