"""The report card's measures where their answers are known, and the page."""

import math
from pathlib import Path

import pytest
import torch
from torch import Generator
from torch.testing import assert_close

from invsolve import io
from invsolve.priors import GaussianPrior
from invsolve.report_card import (
    auroc,
    denoising,
    evaluate,
    nearest,
    power_spectrum,
    save_card,
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
    row = denoising(white(s), x, tuning, sigma, 2.0, generator)
    variance = s**2 * sigma**2 / (s**2 + sigma**2)
    assert row.prior == pytest.approx(10 * math.log10(4 / variance), abs=0.1)
    assert row.noisy == pytest.approx(10 * math.log10(4 / sigma**2), abs=0.1)
    assert row.tv < row.prior


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
