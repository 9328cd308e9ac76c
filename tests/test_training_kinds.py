"""Training with positions, with classes, in three dimensions, and from DICOM."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from invsolve import io, priors
from invsolve.priors import EDMPrior, UNet, UNetConfig
from invsolve.priors.unet import Guided, folded, positions, unfolded
from invsolve.training import ENDS, TrainConfig, begun, in_the_middle, noised, train
from invsolve.training_data import Data, draw, load, load_classes
from invsolve.training_loop import Optimisation
from invsolve.units import MU_WATER

TINY = {"widths": [8, 16], "groups": 4}


def data_of(folder: Path, **options: Any) -> Data:
    given = {"train": folder, "val": folder, "pattern": "*.npy", **options}
    return Data.model_validate(given)


def config_of(data: Data, network: dict[str, Any], **opt: Any) -> TrainConfig:
    given = {"images": 8, "batch": 4, "warmup": 2, "bf16": False, **opt}
    return TrainConfig.model_validate(
        {
            "name": "tiny",
            "data": data,
            "network": {**TINY, **network},
            "optimisation": given,
        }
    )


def trained(card: Path) -> UNet:
    """The network that a run left, by its card and weights."""
    told = json.loads(card.read_text())
    net = UNet(UNetConfig.from_dict(told["network"]))
    state = load_file(card.with_suffix(".safetensors"))
    net.load_state_dict({k: v.float() for k, v in state.items()})
    return net.eval().requires_grad_(False)


def network(**options: Any) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(UNetConfig(widths=(8, 16), groups=4, **options)).eval()


# --- folding


def test_folding_is_the_known_one_and_undone(generator: Generator) -> None:
    x = torch.randn(2, 3, 4, 6, generator=generator)
    assert torch.equal(folded(x, 2), F.pixel_unshuffle(x, 2))
    for shape in ((2, 3, 4, 6), (2, 3, 4, 6, 8)):
        x = torch.randn(shape, generator=generator)
        y = folded(x, 2)
        assert y.shape == (2, 3 * 2 ** (x.ndim - 2), *(n // 2 for n in shape[2:]))
        assert torch.equal(unfolded(y, 2), x)
    corner = folded(x, 2)[:, :8, 0, 0, 0]  # the first channel's first cube
    assert torch.equal(corner, x[:, 0, :2, :2, :2].flatten(1))


# --- positions


def test_positions_are_centres_of_pixels_in_plus_minus_one() -> None:
    (y, x) = positions(torch.zeros(1, 2), (2, 4), (2, 4))[0]
    assert y.tolist() == [[-0.5] * 4, [0.5] * 4]
    assert x.tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2


def test_a_crop_s_positions_are_a_crop_of_the_image_s() -> None:
    sides = (6, 8, 10)
    whole = positions(torch.zeros(1, 3), sides, sides)[0]
    for corner in ((0, 0, 0), (2, 4, 6), (1, 3, 5)):
        (got,) = positions(torch.tensor([corner]), (4, 4, 4), sides)
        i, j, k = corner
        torch.testing.assert_close(got, whole[:, i : i + 4, j : j + 4, k : k + 4])


def test_an_image_is_whole_unless_told(generator: Generator) -> None:
    """And the network answers by the place: the same crop elsewhere is another."""
    net, level = network(positions=True), torch.zeros(2)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    corner = torch.zeros(2, 2)
    told = net(x, level, position=positions(corner, (8, 8), (8, 8)))
    assert torch.equal(net(x, level), told)
    elsewhere = net(x, level, position=positions(corner, (8, 8), (16, 16)))
    assert (told - elsewhere).abs().max() > 1e-3


def test_crops_are_told_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images whose values are their own positions: crops show what they are told."""
    x = positions(torch.zeros(1, 2), (16, 24), (16, 24))[0, 1].abs() + 0.3
    np.save(tmp_path / "a.npy", x[None].numpy())
    data = data_of(tmp_path, crop=8, flip=False, shift=0)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = UNet.forward

    def spy(net: UNet, x: Tensor, c_noise: Tensor, label=None, position=None):
        if position is not None:
            seen.append((x, position))
        return forward(net, x, c_noise, label, position)

    monkeypatch.setattr(UNet, "forward", spy)
    # Next to no noise, so that the network sees its images: c_in = 1/σ_data.
    opt = {"log_sigma_mean": -9.0, "log_sigma_std": 0.1, "sigma_data": 1.0}
    config = config_of(data, {"positions": True}, crop_batch=4, **opt)
    card = train(config, tmp_path / "out", seed=0)
    sides = {x.shape[-2:] for x, _ in seen}
    assert sides == {(8, 8), (16, 24)}
    for x, position in seen:
        torch.testing.assert_close(
            x[:, 0], position[:, 1].abs() + 0.3, atol=3e-3, rtol=0
        )
    told = json.loads(card.read_text())["network"]
    assert told["positions"] is True
    assert trained(card)(torch.zeros(1, 1, 32, 24), torch.zeros(1)).isfinite().all()


# --- classes


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    """Bright squares on the left, or on the right."""
    g = Generator().manual_seed(0)
    for name, columns in (("left", slice(0, 4)), ("right", slice(4, 8))):
        (tmp_path / name).mkdir()
        for i, n in enumerate((2, 3)):
            x = torch.zeros(n, 8, 8)
            x[:, 2:6, columns] = 0.5 + torch.rand(n, 4, 4, generator=g) / 2
            np.save(tmp_path / name / f"{i}.npy", x.numpy())
    return tmp_path


def test_neighbours_are_channels(tmp_path: Path) -> None:
    """Slices of a file that follow one another, all of them of one file."""
    g = Generator().manual_seed(0)
    for name, depth in (("a", 5), ("b", 3)):
        x = 0.5 + torch.rand(depth, 8, 8, generator=g)
        x[-1] = 0 if name == "a" else x[-1]  # background
        np.save(tmp_path / f"{name}.npy", x.numpy())
    data = data_of(tmp_path, neighbours=3)
    images = load(tmp_path, data, Generator()).float()
    a, b = (torch.from_numpy(np.load(tmp_path / f"{k}.npy")) for k in "ab")
    torch.testing.assert_close(
        images, torch.stack([a[0:3], a[1:4], b]), rtol=1e-3, atol=1e-3
    )
    card = train(config_of(data, {"channels": 3}), tmp_path / "out", seed=0)
    assert json.loads(card.read_text())["neighbours"] == 3
    priors.Groups(priors.load(card)).check((1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"b\.npy has fewer slices than .*neighbours"):
        load(tmp_path, data_of(tmp_path, neighbours=4), Generator())
    with pytest.raises(ValueError, match="neighbours are slices"):
        data_of(tmp_path, neighbours=3, dims=3)


def test_the_middle_slice_is_learnt_beside_its_neighbours(tmp_path: Path) -> None:
    """Batches are those of neighbours; F of the middle is asked, and the others shown."""
    x = 0.5 + torch.rand(6, 8, 8, generator=Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", x.numpy())
    data = data_of(tmp_path, neighbours=3)
    config = config_of(data, {"condition": 2}, images=40)
    card = train(config, tmp_path / "out", seed=0)
    made = json.loads(card.read_text())
    assert made["neighbours"] == 3 and made["network"]["condition"] == 2
    prior = priors.load(card)
    assert any("it denoises the middle one" in line for line in prior.decisions)
    assert prior.info.conditioning == "the slices around the middle one"
    assert prior.info.channels == 3
    priors.Sliding(prior).check((1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"data\.neighbours to one more, not 2"):
        train(
            config_of(data_of(tmp_path, neighbours=2), {"condition": 1}),
            tmp_path / "other",
            seed=0,
        )
    with pytest.raises(ValueError, match="the middle slice of 3, shown the others"):
        train(config_of(data_of(tmp_path), {"condition": 2}), tmp_path / "b", seed=0)


def test_rows_of_the_middle_slice() -> None:
    """Its target and noisy self, and its noisy neighbours; some mirrored, as at an end."""
    opt = Optimisation(batch=400)
    x0 = torch.randn(400, 5, 2, 2, generator=Generator().manual_seed(0))
    rows = noised(x0, opt, Generator().manual_seed(1))
    made = in_the_middle(rows, Generator().manual_seed(2))
    assert torch.equal(made["x"], rows["x"][:, 2:3])
    assert torch.equal(made["target"], rows["target"][:, 2:3])
    assert torch.equal(made["c_noise"], rows["c_noise"])
    below, above = made["condition"].split(2, 1)
    assert torch.equal(above, rows["x"][:, 3:])
    same = (below == rows["x"][:, :2]).flatten(1).all(1)
    assert torch.equal(below[~same], above[~same].flip(1))
    assert 400 - int(same.sum()) == pytest.approx(400 * ENDS, abs=4 * 6)


def test_a_network_begins_with_one_that_was_shown_no_neighbours(tmp_path: Path) -> None:
    """F does not see them at first; then it may go on from one that does."""
    x = 0.5 + torch.rand(6, 8, 8, generator=Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", x.numpy())
    alone = train(config_of(data_of(tmp_path), {}), tmp_path / "alone", seed=0)
    told = config_of(data_of(tmp_path, neighbours=3), {"condition": 2})
    told = told.model_copy(update={"start": str(alone)})
    net = begun(network(condition=2), told)
    x, c = torch.randn(2, 3, 8, 8), torch.rand(2)
    with torch.no_grad():
        made = net(x[:, 1:2], c, condition=x[:, ::2])
        torch.testing.assert_close(made, trained(alone)(x[:, 1:2], c))
    card = train(told, tmp_path / "beside", seed=0)
    told = told.model_copy(update={"start": str(card)})
    again = begun(network(condition=2), told).state_dict()
    for name, weight in trained(card).state_dict().items():
        torch.testing.assert_close(again[name], weight)


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_slices_of_another_plane(plane: Any, tmp_path: Path) -> None:
    """They are those that `Slices` across the same axis shows the network."""
    x = 0.5 + torch.rand(8, 16, 24, generator=Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", x.numpy())
    images = load(tmp_path, data_of(tmp_path, plane=plane), Generator()).float()
    axis = {"coronal": 1, "sagittal": 2}[plane]
    shown: list[Tensor] = []

    class Seen(priors.Prior):
        sigma_min, sigma_max = 0.01, 1.0

        def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
            shown.append(x)
            return x

    volume = priors.Slices(Seen(), axis, chunk=99)
    volume.denoise(x[None, None], torch.tensor(0.1))
    torch.testing.assert_close(images, shown[0], rtol=1e-3, atol=1e-3)
    config = config_of(data_of(tmp_path, plane=plane), {})
    card = train(config, tmp_path / "out", seed=0)
    assert json.loads(card.read_text())["plane"] == plane
    with pytest.raises(ValueError, match="plane is of slices"):
        data_of(tmp_path, plane=plane, dims=3)


def test_labels_are_the_subfolders(two_classes: Path) -> None:
    data = data_of(two_classes, classes=True)
    images, labels, classes = load_classes(two_classes, data, Generator())
    assert classes == ["left", "right"]
    bright = images.float().sum((1, 2))
    right = bright[:, 4:].sum(1) > bright[:, :4].sum(1)
    assert torch.equal(labels, right.long()) and labels.sum() == 5
    assert torch.equal(load(two_classes, data, Generator()), images)
    with pytest.raises(ValueError, match=r"no file matches .*/\*/\*\.npy"):
        load(two_classes / "left", data, Generator())


def test_some_images_have_no_class_told(
    two_classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others their own, and the network has one class more than the data."""
    seen: list[tuple[Tensor, Tensor]] = []
    forward = UNet.forward

    def spy(net: UNet, x: Tensor, c_noise: Tensor, label=None, position=None):
        if label is not None:
            seen.append((x, label))
        return forward(net, x, c_noise, label, position)

    monkeypatch.setattr(UNet, "forward", spy)
    opt = {"log_sigma_mean": -9.0, "log_sigma_std": 0.1, "class_dropout": 0.25}
    data = data_of(two_classes, classes=True, flip=False, shift=0)
    config = config_of(data, {}, images=160, batch=80, **opt)
    card = train(config, two_classes / "out", seed=0)
    x, label = (torch.cat(parts) for parts in zip(*seen, strict=True))
    right = (x[..., 4:].sum((1, 2, 3)) > x[..., :4].sum((1, 2, 3))).long()
    told = label != 2
    assert torch.equal(label[told], right[told])
    assert abs(int((~told).sum()) - 40) < 4 * (160 * 0.25 * 0.75) ** 0.5
    kept = json.loads(card.read_text())
    assert kept["classes"] == ["left", "right"] and kept["network"]["classes"] == 2
    assert trained(card).unet.get_parameter("class_embedding.weight").shape[0] == 3


def test_no_class_told_is_the_last(generator: Generator) -> None:
    net, level = network(classes=2), torch.zeros(2)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    assert torch.equal(net(x, level), net(x, level, torch.tensor([2, 2])))
    assert (net(x, level) - net(x, level, torch.tensor([0, 1]))).abs().max() > 1e-4


def test_guidance_goes_on_from_the_class(generator: Generator) -> None:
    """D_w = D + w (D_c − D), and w = 0, 1 are those without and with the class."""
    net = network(classes=2).requires_grad_(False)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    sigma = torch.tensor(0.3)

    def D(net: nn.Module) -> Tensor:
        return EDMPrior(net).denoise(x, sigma)

    plain = D(net)
    held = [D(Guided(net, 1, weight)) for weight in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(held[0], plain)
    torch.testing.assert_close(held[2], plain + 3 * (held[1] - plain))
    skip = 0.5**2 / (0.5**2 + 0.3**2)
    out = 0.3 * 0.5 / (0.5**2 + 0.3**2) ** 0.5
    into = (0.5**2 + 0.3**2) ** -0.5
    F_c = net(into * x, sigma.log().expand(2) / 4, torch.tensor([1, 1]))
    torch.testing.assert_close(held[1], skip * x + out * F_c)
    assert EDMPrior(Guided(net, 1, 3.0)).info.conditioning == "class 1"


def test_classes_must_be_the_folders(two_classes: Path) -> None:
    data = data_of(two_classes, classes=True)
    with pytest.raises(ValueError, match=r"set network\.classes = 2"):
        train(config_of(data, {"classes": 5}), two_classes / "out", seed=0)
    assert not (two_classes / "out").exists()


# --- volumes


def test_volumes_are_cropped_and_mirrored(tmp_path: Path) -> None:
    x = torch.zeros(8, 12, 10)
    x[2:6, 4:9, 1:7] = 0.5 + torch.rand(4, 5, 6, generator=Generator().manual_seed(0))
    np.save(tmp_path / "a.npy", x.numpy())
    data = data_of(tmp_path, dims=3)
    images = load(tmp_path, data, Generator())
    assert torch.equal(images, x[None, None].half())
    got = draw(images, data, 40, 4, Generator().manual_seed(0))
    both = images[0].float(), images[0].float().flip(-1)
    for crop, (i, j, k) in zip(got.x, got.corners.tolist(), strict=True):
        whole = [v[:, i : i + 4, j : j + 4, k : k + 4] for v in both]
        assert any(torch.equal(crop, part) for part in whole)
    assert (got.x > 0.25).flatten(1).any(1).all()
    shifted = draw(images, data.model_copy(update={"shift": 1}), 40, 0, Generator()).x
    torch.testing.assert_close(
        shifted.sum((1, 2, 3, 4)), images.float().sum().expand(40)
    )


def test_volumes_must_be_of_one_shape(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 8, 8)))
    np.save(tmp_path / "b.npy", np.ones((4, 8, 6)))
    for dims in (2, 3):
        with pytest.raises(ValueError, match=r"b\.npy .* resample them to one size"):
            load(tmp_path, data_of(tmp_path, dims=dims), Generator())


def test_a_prior_of_volumes(tmp_path: Path) -> None:
    """Trained on crops with their positions, killed between, asked on whole volumes."""
    pytest.importorskip("monai")
    pytest.importorskip("nibabel")
    from invsolve import io

    g = Generator().manual_seed(0)
    for name in "ab":
        x = torch.zeros(8, 16, 16)
        x[2:6, 4:12, 4:12] = 0.5 + torch.rand(4, 8, 8, generator=g)
        volume = io.Image(x, np.diag([-1.0, -1.0, 1.0, 1.0]))
        io.write(tmp_path / f"{name}.nii.gz", volume)
    data = data_of(tmp_path, dims=3, crop=8, pattern="*.nii.gz")
    told = {"positions": True, "patch": 2}
    config = config_of(data, told, images=4, batch=2, crop_batch=4, crop_part=0.5)
    steps = iter(range(10))
    train(config, tmp_path / "cut", seed=0, stop=lambda: next(steps) >= 1)
    cards = [train(config, tmp_path / name, seed=0) for name in ("cut", "whole")]
    nets = [trained(card) for card in cards]
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    prior = EDMPrior(nets[0], multiple_of=nets[0].config.multiple_of, channels=1)
    y = torch.randn(1, 1, 4, 12, 8, generator=g)
    assert prior.denoise(y, torch.tensor(0.3)).shape == y.shape
    assert prior.info.spatial_dims == 3
    with pytest.raises(ValueError, match="divisible by 4"):
        prior.check((1, 4, 12, 6))
    # Convolutions alone: what lies far off changes a voxel only through the groups.
    assert not any("attention" in name for name, _ in nets[0].named_parameters())


def test_without_monai_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "monai.networks.nets.diffusion_model_unet"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"invsolve\[monai\]"):
        UNet(UNetConfig(dims=3))


# --- DICOM


def dicom(path: Path, values: np.ndarray, z: float, **changes: Any) -> None:
    """One slice of a CT, stored as (HU + 1024)/2."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID = CTImageStorage
    file.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    file.SeriesInstanceUID = "1.2.3"
    file.Modality = "CT"
    file.Rows, file.Columns = values.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    file.PixelRepresentation = 0
    file.RescaleSlope, file.RescaleIntercept = 2, -1024
    file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    file.ImagePositionPatient = [0, 0, z]
    file.PixelSpacing = [1, 1]
    file.PixelData = ((values + 1024) / 2).astype("<u2").tobytes()
    for name, value in changes.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Four slices whose names are not in their order: HU −1000, −500, 0, 500 + columns."""
    pytest.importorskip("pydicom")
    folder = tmp_path / "patient"
    folder.mkdir()
    for name, k in zip("dbca", range(4), strict=True):
        values = np.full((6, 8), -1000.0 + 500 * k) + 2 * np.arange(8)
        dicom(folder / name, values, z=3.0 * k - 40)
    return folder


def test_a_series_is_read_in_order_and_rescaled(series: Path) -> None:
    expected = torch.arange(4.0)[:, None, None] * 500 - 1000 + 2 * torch.arange(8.0)
    assert torch.equal(io.read(series).values, expected.expand(4, 6, 8))


def test_windows_cut_before_the_prior_s_range(series: Path) -> None:
    options = {"pattern": "*", "unit": "HU", "scale": MU_WATER, "min_foreground": 0}
    data = data_of(series.parent, window=[-200, 300], **options)
    got = load(series.parent, data, Generator())
    hu = io.read(series).values.clamp(-200, 300)[:, None]
    torch.testing.assert_close(got, (hu / 1000 + 1).half())
    plain = data_of(series.parent, **options)
    assert load(series.parent, plain, Generator()).max() > got.max()


def test_dicom_is_trained_on(series: Path, tmp_path: Path) -> None:
    options = {"pattern": "*", "unit": "HU", "scale": MU_WATER, "window": [-1000, 300]}
    data = data_of(series.parent, **options, flip=True, shift=1)
    net = {"widths": [8], "patch": 2}
    card = train(config_of(data, net), tmp_path.parent / f"{tmp_path.name}-o", seed=0)
    assert json.loads(card.read_text())["unit"] == "1/mm"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"SeriesInstanceUID": "1.2.4"}, "holds 2 DICOM series"),
        ({"PhotometricInterpretation": "RGB"}, "no grey image"),
        ({"ImagePositionPatient": None}, "cannot read"),
    ],
)
def test_what_is_no_series_is_refused(
    series: Path, changes: dict[str, Any], why: str
) -> None:
    dicom(series / "e", np.zeros((6, 8)), z=90.0, **changes)
    with pytest.raises(ValueError, match=why) as refused:
        io.read(series)
    assert "\n" not in str(refused.value)


def test_damaged_or_missing_slices_are_refused(series: Path, tmp_path: Path) -> None:
    whole = (series / "a").read_bytes()
    for part in (b"", b"nothing", whole[:300], whole[:-20]):
        (series / "a").write_bytes(part)
        with pytest.raises(ValueError, match=r"cannot read .*patient/a") as refused:
            io.read(series)
        assert "\n" not in str(refused.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds 0 DICOM series"):
        io.read(tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"window": [1, 1]}, r"window is \[low, high\]"),
        ({"window": [0, 1], "photo_crops": 3}, "of slices"),
        ({"dims": 3, "photo_crops": 3}, "are for slices"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        data_of(tmp_path, **options)
