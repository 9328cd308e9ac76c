"""What was trained in other kinds loads by its card, as any prior does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from invsolve import priors
from invsolve.priors import AffineMap, EDMPrior, UNet, UNetConfig
from invsolve.priors.unet import Guided
from invsolve.priors.weights import card_of

SIGMA = torch.tensor(0.3)


def saved(folder: Path, **options: Any) -> tuple[UNet, Path]:
    """A network at random, and the card of its weights."""
    config = UNetConfig(widths=(8, 16), groups=4, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(config).eval().requires_grad_(False)
    save_file(
        {k: v.contiguous() for k, v in net.state_dict().items()},
        folder / "net.safetensors",
    )
    names = {"classes": ["cat", "dog"]} if config.classes else {}
    card = card_of(
        "net",
        config,
        sigma_data=0.5,
        map=AffineMap(1.0, 0.0),
        unit="",
        training={},
        **names,
    )
    (folder / "net.json").write_text(json.dumps(card))
    return net, folder / "net.json"


def test_a_class_is_held_by_number_or_name(
    tmp_path: Path, generator: Generator
) -> None:
    net, path = saved(tmp_path, classes=2)
    x = torch.randn(2, 1, 8, 8, generator=generator)

    def D(card: dict[str, Any]) -> Tensor:
        return priors.load(path, card).denoise(x, SIGMA)

    torch.testing.assert_close(D({}), EDMPrior(net).denoise(x, SIGMA))
    for weight in (1.0, 2.5):
        expected = EDMPrior(Guided(net, 1, weight)).denoise(x, SIGMA)
        for label in (1, "dog"):
            got = D({"class_label": label, "guidance": weight})
            torch.testing.assert_close(got, expected)
    for label in (2, -1, "cow", True):
        with pytest.raises(ValueError, match=r"number of 0 … 1 or one of cat, dog"):
            priors.load(path, {"class_label": label})
    assert priors.load(path, {"class_label": "dog"}).info.conditioning == "class 1"


def test_a_prior_of_volumes_loads(tmp_path: Path, generator: Generator) -> None:
    pytest.importorskip("monai")
    net, path = saved(tmp_path, dims=3, positions=True)
    prior = priors.load(path)
    assert prior.info.spatial_dims == 3
    assert any("where each pixel lies" in line for line in prior.decisions)
    x = torch.randn(1, 1, 4, 8, 12, generator=generator)
    torch.testing.assert_close(
        prior.denoise(x, SIGMA), EDMPrior(net).denoise(x, SIGMA), rtol=0, atol=1e-5
    )
