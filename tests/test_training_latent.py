"""Training a latent prior: the loss in closed form, runs that are cut, what they leave."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from invsolve.priors.latent import AutoencoderConfig, load_card
from invsolve.training_latent import LatentConfig, autoencoder_loss, train_latent

pytest.importorskip("skimage")


def test_the_autoencoder_s_loss(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With q(z | x) = N(x/2, e⁻²) and Dec(z) = 2z only the noise goes wrong.

    E|2e⁻¹n| = 2e⁻¹√(2/π), and KL = (μ² + e⁻² − 1 + 2)/2, as means.
    """

    def posterior(x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(mean=x / 2, logvar=torch.full_like(x, -2.0))

    net = AutoencoderConfig(widths=(8, 8), groups=4).build()
    monkeypatch.setattr(net, "posterior", posterior)
    monkeypatch.setattr(net, "decode", lambda z: 2 * z)
    x = 0.8 * torch.randn(16, 3, 32, 32, generator=generator)
    kl = (x.square().mean() / 4 + math.exp(-2) + 1) / 2
    error = 2 * math.exp(-1) * math.sqrt(2 / math.pi)
    for w in (0.0, 0.5):
        noise = torch.randn(x.shape, generator=generator)
        loss = autoencoder_loss(net, x, noise, w, False)
        torch.testing.assert_close(loss, error + w * kl, rtol=0.01, atol=0)


def config(folder: Path, **more: Any) -> LatentConfig:
    opt = {"batch": 4, "warmup": 2, "bf16": False}
    return LatentConfig.model_validate(
        {
            "name": "tiny",
            "data": {
                "train": folder / "train",
                "val": folder / "val",
                "pattern": "*.png",
                "scale": 0.5,
                "offset": 0.5,
                "photo_crops": 24,
                "size": 16,
            },
            "autoencoder": {"widths": [8, 8], "groups": 4},
            "encoding": {"images": 48, **opt},
            "network": {"channels": 4, "widths": [8, 8], "patch": 1, "groups": 4},
            "optimisation": {"images": 40, "sigma_data": 1.0, **opt},
            "card": {"licence": "CC0-1.0"},
            **more,
        }
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    from skimage.io import imsave

    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        g = Generator().manual_seed(len(part))
        for i in range(2):
            coarse = torch.rand(1, 3, 8, 8, generator=g)
            photo = F.interpolate(coarse, [64, 64], mode="bilinear")[0]
            pixels = (255 * photo).byte().permute(1, 2, 0).numpy()
            imsave(tmp_path / part / f"{i}.png", pixels, check_contrast=False)
    return tmp_path


def test_a_run_that_is_cut_goes_on_to_the_same_weights(photos: Path) -> None:
    """Cut in either part, or between them: the same files, bit by bit."""
    whole = train_latent(config(photos), photos / "whole", seed=0)
    assert whole is not None
    steps = 0

    def every_seventh() -> bool:
        nonlocal steps
        steps += 1
        return steps % 7 == 0

    calls, cut = 0, None
    while cut is None or calls < 4:
        cut = train_latent(config(photos), photos / "cut", seed=0, stop=every_seventh)
        calls += 1
    for suffix in (".safetensors", ".json"):
        a, b = (path.with_suffix(suffix).read_bytes() for path in (whole, cut))
        assert a == b
    for name in ("autoencoder.csv", "unet.csv"):
        assert (photos / "cut" / name).exists()
    other = train_latent(config(photos), photos / "other", seed=1)
    assert other is not None
    weights = [p.with_suffix(".safetensors").read_bytes() for p in (whole, other)]
    assert weights[0] != weights[1]


def test_what_a_run_leaves(photos: Path, generator: Generator) -> None:
    """A prior whose latents of the training data have mean 0 and variance 1."""
    pytest.importorskip("tensorboard")
    card = train_latent(config(photos, tensorboard=True), photos / "out", seed=0)
    assert card is not None
    for part in ("autoencoder", "unet"):
        assert list((photos / "out" / "tensorboard" / part).iterdir())
    told = json.loads(card.read_text())
    assert told["licence"] == "CC0-1.0"
    assert set(told["held_out"]) == {"reconstruction_psnr", "latent_denoising_db"}
    prior = load_card(card)
    prior.check((3, 16, 16))
    latents = torch.load(photos / "out" / "latents.pt", weights_only=True).float()
    net: Any = prior.autoencoder
    z = (latents - net.shift) * net.scale
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.01, rtol=0)


def test_latents_of_faded_squares(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each square and its mirror image may be faded: here to one picture, all of them."""
    parts = []

    def to_grey(x: Tensor, part: float, generator: Generator) -> Tensor:
        parts.append(part)
        return torch.zeros_like(x)

    monkeypatch.setattr("invsolve.training_latent.faded", to_grey)
    given = config(photos, encoding={"images": 4, "batch": 4, "bf16": False})
    data = given.data.model_copy(update={"fade": 0.3})
    given = given.model_copy(update={"data": data})
    train_latent(given, photos / "out", seed=0)
    kept = torch.load(photos / "out" / "latents.pt", weights_only=True).float()
    assert len(kept) == 2 * 48 and set(parts) == {0.3}
    assert torch.equal(kept, kept[:1].expand_as(kept))


def test_the_network_must_take_the_latents(photos: Path) -> None:
    bad = config(photos, network={"channels": 3, "widths": [8, 8], "patch": 1})
    with pytest.raises(ValueError, match=r"set network\.channels = 4"):
        train_latent(bad, photos / "out", seed=0)
    assert not (photos / "out").exists()


def test_a_latent_network_predicts_edm_s_mixture(photos: Path) -> None:
    opt = {"images": 40, "batch": 4, "predicts": "flow"}
    bad = config(photos, optimisation=opt)
    with pytest.raises(ValueError, match=r"leave optimisation\.predicts out"):
        train_latent(bad, photos / "out", seed=0)
