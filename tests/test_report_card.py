"""The report card's measures where their answers are known, and the page."""

import base64
import json
import math
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from typer.testing import CliRunner

from invsolve import io
from invsolve.cli import app
from invsolve.priors import AffineMap, EDMPrior, GaussianPrior, UNetConfig
from invsolve.priors.latent import (
    Autoencoder,
    AutoencoderConfig,
    LatentPrior,
    latent_card,
)
from invsolve.priors.networks.conditional import InTheMiddle
from invsolve.priors.unet import UNet
from invsolve.report_card import (
    _side_by_side,
    auroc,
    denoising,
    evaluate,
    nearest,
    power_spectrum,
    reconstruction,
    save_card,
    sheet,
    tuned_tv,
    wiener,
)
from invsolve.training_data import Data

SIDE = 8


def white(spread: float = 0.5) -> GaussianPrior:
    mean = torch.zeros(1, SIDE, SIDE)
    return GaussianPrior(mean, torch.full_like(mean, spread**2), 0.01, 50.0)


def test_white_noise_has_a_flat_spectrum(generator: Generator) -> None:
    x = 2 * torch.randn(200, 1, 32, 32, generator=generator)
    assert_close(power_spectrum(x), torch.full((16,), 4.0), rtol=0.1, atol=0)


def test_a_wave_is_seen_at_its_frequency() -> None:
    t = torch.arange(32) / 32
    wave = torch.cos(2 * torch.pi * 5 * t).expand(1, 1, 32, 32)
    power = power_spectrum(wave)
    assert int(power.argmax()) == 5
    assert float(power.sum() - power[5]) < 1e-4


def test_the_nearest_may_be_mirrored(generator: Generator) -> None:
    train = torch.randn(700, 1, SIDE, SIDE, generator=generator)
    x = torch.stack([train[3], train[650].flip(-1), train[9] + 0.1])
    distance, index = nearest(x, train.half())
    assert index.tolist() == [3, 650, 9]
    assert_close(distance, torch.tensor([0.0, 0.0, 0.1]), rtol=0, atol=2e-3)


def test_denoising_white_pixels(generator: Generator) -> None:
    """MMSE: the error's variance is s²σ²/(s² + σ²), and TV cannot do better."""
    s, sigma = 0.5, 0.4
    x, tuning = s * torch.randn(2, 200, 1, SIDE, SIDE, generator=generator)
    row = denoising(white(s), tuned_tv(tuning), x, sigma, 2.0, generator)
    variance = s**2 * sigma**2 / (s**2 + sigma**2)
    assert row.prior == pytest.approx(10 * math.log10(4 / variance), abs=0.1)
    assert row.noisy == pytest.approx(10 * math.log10(4 / sigma**2), abs=0.1)
    assert row.rival < row.prior


def test_wiener_is_the_gaussian_s_denoiser(generator: Generator) -> None:
    """Images and all their cyclic shifts have a covariance that is alike everywhere."""
    mixing = torch.tensor([[1.0, 0.0], [0.8, 0.3]], dtype=torch.float64)
    x = torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64)
    x = torch.einsum("cd,ndhw->nchw", mixing, x + x.roll(1, -1)) + 0.7
    shifts = [(i, j) for i in range(4) for j in range(5)]
    train = torch.cat([x.roll(s, (-2, -1)) for s in shifts])
    mean = train.mean(0)
    centred = (train - mean).flatten(1)
    dense = GaussianPrior(mean, centred.T @ centred / len(train))
    for sigma in (0.1, 1.0):
        y = x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        expected = dense.denoise(y, torch.tensor(sigma, dtype=x.dtype))
        assert_close(wiener(train)(sigma, generator)(y), expected)


def test_what_is_left_of_images(generator: Generator) -> None:
    """Means over the images, as scikit-image tells of each."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    x = torch.rand(3, 3, 16, 16, generator=generator)
    back = x + torch.tensor([0.01, 0.1, 0.3])[:, None, None, None] * torch.randn(
        x.shape, generator=generator
    )
    told = reconstruction(x, back)
    data_range = float(x.max() - x.min())
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(x, back, strict=True)]
    ratios: list[Any] = [
        peak_signal_noise_ratio(a, b, data_range=data_range) for a, b in pairs
    ]
    likeness: list[Any] = [
        structural_similarity(a, b, data_range=data_range, channel_axis=0)
        for a, b in pairs
    ]
    assert told.psnr == pytest.approx(sum(ratios) / 3, rel=1e-5)
    assert told.ssim == pytest.approx(sum(likeness) / 3, rel=1e-5)


def test_auroc() -> None:
    a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert auroc(a, b) == 1 and auroc(b, a) == 0 and auroc(a, a) == 0.5


@pytest.fixture
def data(tmp_path: Path, generator: Generator) -> Data:
    """Volumes of white slices, and others of a larger spread."""
    for part, spread in (("train", 0.5), ("val", 0.5), ("other", 1.5)):
        height = SIDE + 2 * (part == "other")
        x = spread * torch.randn(12, height, SIDE, generator=generator)
        (tmp_path / part).mkdir()
        affine = torch.eye(4, dtype=torch.float64).numpy()
        io.write(tmp_path / part / "a.nii", io.Image(x, affine, ""))
    return Data(train=Path("train"), val=Path("val"), pattern="*.nii", min_foreground=0)


def test_a_card_of_a_known_prior(tmp_path: Path, data: Data) -> None:
    other = data.model_copy(update={"val": Path("other")})
    card = evaluate(
        "white <noise>",
        white(),
        data,
        tmp_path,
        other=other,
        images=12,
        samples=6,
        steps=60,
        generator=Generator().manual_seed(0),
    )
    held_out, seen, strange = card.likelihood
    # −log₂ N(0, s²): the entropy of a Gaussian, ½ log₂ 2πe s².
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 0.25)
    assert held_out.bits == pytest.approx(entropy, abs=0.1)
    assert seen.bits == pytest.approx(entropy, abs=0.1)
    assert strange.auroc == 1 and strange.auroc_denoising == 1
    assert 0.2 < (seen.auroc or 0) < 0.8
    assert card.memory.samples == pytest.approx(card.memory.held_out, rel=0.2)
    save_card(tmp_path / "card.html", card)
    page = (tmp_path / "card.html").read_text("utf-8")
    assert "white &lt;noise&gt;" in page and "http" not in page
    assert page.count("data:image/png;base64,") == 4


@final
class Nothing(nn.Module):
    """F = 0, with which D is that of white noise of σ_d."""

    def forward(self, x: Tensor, c: Tensor, condition: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_a_card_of_the_middle_slice_of_three(tmp_path: Path, data: Data) -> None:
    """It is measured where it denoises, draws a volume's slices, and has no likelihood."""
    three = data.model_copy(update={"neighbours": 3})
    net = InTheMiddle(Nothing())
    card = evaluate(
        "middle",
        EDMPrior(net, 0.5, 0.01, 50.0, channels=3),
        three,
        tmp_path,
        other=three.model_copy(update={"val": Path("other")}),
        images=10,
        samples=6,
        steps=60,
        generator=Generator().manual_seed(0),
    )
    for row in card.denoising:
        variance = 0.25 * row.sigma**2 / (0.25 + row.sigma**2)
        ideal = 10 * math.log10(card.data_range**2 / variance)
        assert row.prior == pytest.approx(ideal, abs=1.0)  # of 640 pixels: 4 errors
    held_out, _, strange = card.likelihood
    assert held_out.bits is None and strange.auroc is None
    assert strange.auroc_denoising == 1
    assert card.memory.samples == pytest.approx(card.memory.held_out, rel=0.2)
    save_card(tmp_path / "card.html", card)
    assert "no density of images" in (tmp_path / "card.html").read_text("utf-8")


def test_channels_that_are_no_colours_are_shown_side_by_side() -> None:
    """Each in its own window: a rare label of 0.1 as bright as a slice of 1000."""
    x = torch.zeros(2, 3, 32, 32)
    x[:, 0] = torch.linspace(0, 1000, 32)
    x[1, 1, 0, 0] = 0.1
    made = _side_by_side(x, x)
    assert made.shape == (2, 1, 32, 96)
    slices, label, nothing = made[:, 0].split(32, -1)
    assert_close(slices[0, 0], torch.linspace(0, 1, 32), atol=0.01, rtol=0)
    assert float(label[1, 0, 0]) == 1 and float(label.sum()) == 1
    assert float(nothing.abs().max()) == 0


def test_a_sheet_is_eight_squares_wide_and_pairs_stand_together() -> None:
    """Five images of 128×384, above each its own other: two in a row, the last alone."""
    from matplotlib import image

    above, below = (
        torch.linspace(a, b, 5)[:, None, None, None].expand(-1, 1, 128, 384)
        for a, b in ((0.0, 0.4), (0.5, 0.9))
    )
    file = sheet(above, below, window=(0.0, 1.0))
    shown = image.imread(BytesIO(base64.b64decode(file)))[..., 0]
    assert shown.shape == (6 * 132, 2 * 388)
    middles = shown.reshape(6, 132, 2, 388)[:, 66, :, 194]
    expected = torch.tensor(
        [[0.0, 0.1], [0.5, 0.6], [0.2, 0.3], [0.7, 0.8], [0.4, 1.0], [0.9, 1.0]]
    )
    assert_close(torch.from_numpy(middles), expected, atol=0.01, rtol=0)
    one = sheet(above[:, :, :, :128], window=(0.0, 1.0))
    assert image.imread(BytesIO(base64.b64decode(one))).shape[:2] == (132, 5 * 132)


def test_another_number_of_channels_is_refused(tmp_path: Path, data: Data) -> None:
    from skimage.io import imsave

    (tmp_path / "photos").mkdir()
    photo = torch.zeros(40, 40, 3, dtype=torch.uint8).numpy()
    imsave(tmp_path / "photos" / "a.png", photo, check_contrast=False)
    photos = Data(
        train=Path("photos"),
        val=Path("photos"),
        pattern="*.png",
        photo_crops=2,
        size=SIDE,
    )
    with pytest.raises(ValueError, match=r"3 channel\(s\), the prior's 1"):
        evaluate("white", white(), data, tmp_path, other=photos, generator=Generator())


# --- latents


class Folded(Autoencoder):
    """z are the pixels, four at a time, over s; a tenth is lost on the way back."""

    def __init__(self, s: float) -> None:
        super().__init__()
        self.channels, self.latent_channels, self.factor, self.s = 1, 4, 2, s

    def encode(self, x: Tensor, generator: Any = None) -> Tensor:
        return F.pixel_unshuffle(x, 2) / self.s

    def decode(self, z: Tensor) -> Tensor:
        return 0.9 * F.pixel_shuffle(z * self.s, 2)


def test_a_card_of_a_known_latent_prior(tmp_path: Path, data: Data) -> None:
    """White latents of variance 1: entropy, least error and loss are known."""
    mean = torch.zeros(4, SIDE // 2, SIDE // 2)
    latents = GaussianPrior(mean, torch.ones_like(mean), 0.01, 50.0)
    prior = LatentPrior(latents, Folded(0.5), AffineMap(1.0, 0.0))
    card = evaluate(
        "folded",
        prior,
        data,
        tmp_path,
        other=data.model_copy(update={"val": Path("other")}),
        images=12,
        samples=6,
        steps=60,
        generator=Generator().manual_seed(0),
    )
    assert card.reconstruction is not None
    x = io.read(tmp_path / "val" / "a.nii").values
    loss = 20 * torch.log10((x.max() - x.min()) / (0.1 * x.square().mean().sqrt()))
    assert card.reconstruction.psnr == pytest.approx(float(loss), abs=0.3)
    assert card.data_range == pytest.approx(1, abs=0.05)
    spread = 20 * math.log10(card.data_range)
    for row in card.denoising:
        noise = 20 * math.log10(row.sigma)
        assert row.noisy == pytest.approx(spread - noise, abs=0.8)
        least = 10 * math.log10(row.sigma**2 / (1 + row.sigma**2))
        assert row.prior == pytest.approx(spread - least, abs=0.8)
        assert row.rival < row.prior  # which knows what twelve images only hint at
    held_out, _, strange = card.likelihood
    entropy = 0.5 * math.log2(2 * math.pi * math.e)
    assert held_out.bits == pytest.approx(entropy, abs=0.1)
    assert strange.auroc == 1 and (strange.auroc_denoising or 0) > 0.9
    assert card.memory.samples == pytest.approx(card.memory.held_out, rel=0.2)
    assert "linear" in card.numbers()["denoising"][0]
    save_card(tmp_path / "card.html", card)
    page = (tmp_path / "card.html").read_text("utf-8")
    assert "Bits per latent dimension" in page and ">TV<" not in page
    assert page.count("data:image/png;base64,") == 5


def test_the_command_takes_a_latent_prior(
    tmp_path: Path, data: Data, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photographs and their configuration, beside slices in grey."""
    from skimage.io import imsave

    coding = AutoencoderConfig(3, 4, (8, 8), 1, 2, 4)
    network = UNetConfig(4, (8, 8), 1, 1, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = {"autoencoder": coding.build(), "network": UNet(network)}
    state = {
        f"{part}.{k}": v.contiguous()
        for part, net in nets.items()
        for k, v in net.state_dict().items()
    }
    save_file(state, tmp_path / "small.safetensors")
    told = latent_card(
        "small",
        coding,
        network,
        sigma_data=1.0,
        map=AffineMap(0.5, 0.5),
        unit="",
        training={},
    )
    (tmp_path / "small.json").write_text(json.dumps(told))
    photo = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
    imsave(tmp_path / "train" / "a.png", photo.numpy(), check_contrast=False)
    (tmp_path / "small.toml").write_text(
        'name = "small"\nkl = 1e-3\n[data]\ntrain = "train"\nval = "train"\n'
        'pattern = "*.png"\nphoto_crops = 3\nsize = 16\nscale = 0.5\noffset = 0.5\n'
        "[autoencoder]\nwidths = [8, 8]\n"
    )
    (tmp_path / "other.toml").write_text(
        'name = "other"\n[data]\ntrain = "train"\nval = "other"\npattern = "*.nii"\n'
        "min_foreground = 0\n"
    )
    monkeypatch.setenv("INVSOLVE_DATA", str(tmp_path))
    page, other = tmp_path / "card.html", tmp_path / "other.toml"
    words = ["priors", "evaluate", tmp_path / "small.json", tmp_path / "small.toml"]
    words += ["-o", page, "--other", other, "--images", 2, "--samples", 2]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert set(numbers["reconstruction"]) == {"psnr", "ssim", "data_range"}
    kinds = [row["images"] for row in numbers["likelihood"]]
    assert kinds == ["held out", "seen in training", "of another kind"]


def test_every_committed_card_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    cards = import_module("cards")
    lines = cards.table().splitlines()
    names = {path.stem for path in cards.CARDS.glob("*.json")}
    assert names and names == {line.split("`")[1] for line in lines if "`](" in line}
    card = json.loads((cards.CARDS / "latent-photos-64.json").read_text())
    row = card["denoising"][0]
    assert cards.gains(card).startswith(f"{row['prior'] - row['linear']:+.1f} ")
