"""A picture of a running solve: what it shows, and that it changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, samplers, solve
from invsolve.operators import GaussianNoise, Identity, SliceWise
from invsolve.preview import Preview
from invsolve.priors import AffineMap, GaussianPrior, Slices
from invsolve.units import hu_to_mu


def levels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image).copy())


def test_a_slice_of_ct_in_its_window(tmp_path: Path) -> None:
    """g = 255 (HU − low)/(high − low), cut off at black and white."""
    hu = torch.linspace(-400, 500, 48).reshape(1, 1, 6, 8)
    map = AffineMap(0.0193, -0.01)
    show = Preview(tmp_path / "a.png", unit="1/mm", window=(-200.0, 300.0))
    show(map.inverse(hu_to_mu(hu)), map)
    expected = (255 * (hu[0, 0] + 200) / 500).clamp(0, 255)
    assert_close(levels(tmp_path / "a.png").float(), expected, rtol=0, atol=0.51)


def test_colours_and_numbers_of_no_unit(tmp_path: Path) -> None:
    one = AffineMap(1.0, 0.0)
    x = torch.rand(2, 3, 5, 4, generator=Generator().manual_seed(0))
    Preview(tmp_path / "a.png")(x, one)
    shown = levels(tmp_path / "a.png").movedim(-1, 0) / 255
    assert_close(shown, x[0], rtol=0, atol=0.002)
    # Otherwise from the darkest to the brightest but for half a per cent of each.
    Preview(tmp_path / "b.png")(1e3 * x[:, :1] - 7, one)
    grey = levels(tmp_path / "b.png")
    assert int(grey.min()) == 0 and int(grey.max()) == 255
    assert int(grey.argmax()) == int(x[0, 0].argmax())


def test_a_volume_s_planes(tmp_path: Path) -> None:
    """A bright slab across z is a bright axial plane, and a bar in the two others."""
    x = torch.zeros(1, 1, 9, 12, 12)
    x[:, :, 4] = 1.0
    Preview(tmp_path / "a.png", window=(0.0, 1.0))(x, AffineMap(1.0, 0.0))
    shown = levels(tmp_path / "a.png")[..., :3].float().mean(-1) / 255
    rows, columns = shown.shape
    middle = shown[:, columns // 2 : -columns // 4].median(1).values
    axial, below = middle[: int(0.4 * rows)], middle[int(0.45 * rows) :]
    assert float((axial > 0.9).float().mean()) > 0.9
    bright = (below[2:-2] > 0.9).float().mean()
    assert 2 / 9 / 2 < float(bright) < 0.5


def test_it_is_made_again_after_a_while(tmp_path: Path) -> None:
    one = AffineMap(1.0, 0.0)
    often, rarely = (
        Preview(tmp_path / f"{every}.png", window=(0.0, 1.0), every=every)
        for every in (0.0, 1e6)
    )
    for value in (0.2, 0.8):
        x = torch.full((1, 1, 4, 4), value)
        often(x, one)
        rarely(x, one)
    assert int(levels(tmp_path / "0.0.png")[0, 0]) == 204
    assert int(levels(tmp_path / "1000000.0.png")[0, 0]) == 51
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.0.png", "1000000.0.png"]


def test_a_solve_is_not_changed_by_being_watched(tmp_path: Path) -> None:
    """It is told each answer, in the prior's range, of which the map makes images."""
    prior = GaussianPrior(torch.full((1, 6, 6), 3.0), 4 * torch.eye(36))
    A = SliceWise(Identity(), 4)
    y = torch.randn(1, 4, 1, 6, 6, generator=Generator().manual_seed(0))
    problem = InverseProblem(y, A, GaussianNoise(0.5))
    seen: list[Tensor] = []

    def run(**more: Any) -> Tensor:
        g = Generator().manual_seed(1)
        solution = solve(
            problem, Slices(prior), samplers.dds3d, steps=5, generator=g, **more
        )
        return solution.samples

    told = run(watch=lambda answer, map: seen.append(map(answer).clone()))
    assert torch.equal(told, run())
    assert torch.equal(told, run(watch=Preview(tmp_path / "a.png", every=0.0)))
    assert len(seen) == 5 and seen[0].shape == (1, 1, 4, 6, 6)
    # At the highest noise the answer is the prior's mean.
    assert_close(seen[0].mean(), torch.tensor(3.0), rtol=0, atol=0.1)
    assert (tmp_path / "a.png").is_file()
