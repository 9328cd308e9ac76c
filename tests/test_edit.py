"""The editing example, on a tiny conditional model."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_latent import folder_of
from torch import Generator, Tensor

import invsolve as iv
from invsolve import io
from invsolve.operators import Downsample, GaussianNoise
from invsolve.priors.latent import load_latent
from invsolve.samplers.latents import ddpm_levels

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import edit as example  # pyright: ignore[reportMissingImports]
from edit import carried, edit  # pyright: ignore[reportMissingImports]

CAT, DOG = (
    {"encoder_hidden_states": torch.randn(2, 6, generator=Generator().manual_seed(n))}
    for n in (1, 2)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    folder_of(folder)
    return folder


def problem() -> iv.InverseProblem:
    y = torch.rand(1, 3, 4, 4, generator=Generator().manual_seed(0))
    return iv.InverseProblem(y, Downsample(4, (16, 16)), GaussianNoise(0.05))


def run(model: Path, target: dict[str, Tensor], **more: float) -> tuple[Tensor, Tensor]:
    options = {"steps": 4, "lam": 0.1, **more}
    seed = Generator().manual_seed(0)
    return edit(problem(), model, CAT, target, generator=seed, **options)


def test_the_target_is_heard_and_the_restored_image_does_not_know_it(
    model: Path,
) -> None:
    x, dog = run(model, DOG)
    again, cat = run(model, CAT)
    assert x.shape == dog.shape == (1, 3, 16, 16)
    assert torch.equal(x, again)
    assert float((dog - cat).abs().max()) > 1e-4
    _, more = run(model, DOG, guidance=6.0)
    assert float((dog - more).abs().max()) > 1e-4


def test_up_and_down_by_the_same_prompt_comes_back(model: Path) -> None:
    """The ODE is undone, the closer the finer its levels."""
    prior = load_latent(model, condition=CAT)
    z = torch.randn(1, 3, 8, 8, generator=Generator().manual_seed(3))
    errors = []
    for steps in (10, 40, 160):
        levels = ddpm_levels(prior, z, steps, None)[-steps // 4 :]
        up = carried(prior, z, levels.flip(0), Generator())
        down = carried(prior, up, levels, Generator())
        errors.append(float((down - z).norm() / z.norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_the_command_puts_both_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "small.png"
    values = torch.rand(3, 4, 4, generator=Generator().manual_seed(0))
    io.write(picture, io.Image(values, np.eye(4), "", colour=True))

    def fake(given: iv.InverseProblem, *_: object, **__: object) -> tuple[Tensor, ...]:
        x = given.linear.pinv(given.y)
        return x, 1 - x

    monkeypatch.setattr(example, "edit", fake)
    out = tmp_path / "edited.png"
    command = ["edit.py", "model", str(picture), "--factor", "2", "--target", "a dog"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    example.main()
    x = io.read(picture, colour=True).values.repeat_interleave(2, 1)
    x = x.repeat_interleave(2, 2)
    got = io.read(out, colour=True).values
    torch.testing.assert_close(got, torch.cat([x, 1 - x], -1), atol=0.003, rtol=0)


def test_refusals(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"strength must be in \(0, 1\], got 2"):
        run(model, DOG, strength=2.0)
    folder_of(tmp_path, conditional=False)
    with pytest.raises(ValueError, match="is unconditional"):
        run(tmp_path, DOG)
