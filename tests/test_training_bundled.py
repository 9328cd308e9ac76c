"""The small bundled priors of photographs: one data set, three parameterisations."""

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from invsolve import priors

LEVELS = (0.05, 0.2, 0.8)
NAMES = [f"natural-64-{kind}" for kind in ("flow", "x0", "eps")]
SIGMA = (
    0.5  # of the unit 0 … 1 that files hold, for the range −1 … 1 that levels are of
)


def photographs() -> Tensor:
    """Twelve squares of a photograph that none was trained on, in 0 … 1."""
    data = pytest.importorskip("skimage.data")
    photo = np.asarray(data.astronaut())[:384, :512] / 255
    x = torch.from_numpy(photo).float().permute(2, 0, 1)
    squares = x.unfold(1, 128, 128).unfold(2, 128, 128).flatten(1, 2).movedim(1, 0)
    return torch.nn.functional.avg_pool2d(squares, 2)


def psnr(x: Tensor, truth: Tensor) -> float:
    return float(-10 * (x - truth).square().mean().log10())


def denoised(name: str, generator: Generator) -> tuple[list[float], list[float]]:
    """PSNR in dB at each level, of the noisy squares and of the prior's."""
    x0, prior = photographs(), priors.load(name)
    before, after = [], []
    for level in LEVELS:
        x = x0 + SIGMA * level * torch.randn(x0.shape, generator=generator)
        before.append(psnr(x, x0))
        with torch.no_grad():
            after.append(psnr(prior.denoise(x, torch.tensor(SIGMA * level)), x0))
    return before, after


@pytest.mark.parametrize("name", [name for name in NAMES if name in priors.available()])
def test_a_small_prior_takes_noise_away(name: str, generator: Generator) -> None:
    """At every level, and more where there is more; it says what it predicts.

    What predicts the image errs by as much however little noise there is: at the least
    level it takes away nothing.
    """
    assert priors.load(name).info.parameterisation == name.rsplit("-", 1)[1]
    before, after = denoised(name, generator)
    gains = [b - a for a, b in zip(before, after, strict=True)]
    assert gains[0] > 1 or name.endswith("x0")
    assert gains[0] < gains[1] < gains[2]
    assert gains[1] > 1
