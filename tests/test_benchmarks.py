"""What the benchmarks against other code rest on: same noise, same network, fair clocks."""

import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Generator
from torch.testing import assert_close

from invsolve.priors import GaussianPrior
from invsolve.priors.schedules import ddpm_alphas_cumprod
from invsolve.random import randn_like

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def originals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("originals")


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("overhead")


def test_their_draws_are_ours_and_unused_ones_take_none(originals: ModuleType) -> None:
    like = torch.zeros(2, 3)
    with originals.noise(Generator().manual_seed(7), lambda k: k % 2 == 1):
        _, first, _, second = (torch.randn_like(like) for _ in range(4))
    g = Generator().manual_seed(7)
    assert_close(first, randn_like(like, g), rtol=0, atol=0)
    assert_close(second, randn_like(like, g), rtol=0, atol=0)
    assert torch.randn_like.__module__ != originals.__name__


def test_a_network_at_their_steps_is_the_prior_at_ours(originals: ModuleType) -> None:
    mean = torch.tensor([[[0.5, -0.5]]], dtype=torch.float64)
    cov = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    abar = ddpm_alphas_cumprod()
    net = originals.EpsNet(GaussianPrior(mean, cov), abar)
    g = Generator().manual_seed(0)
    x_t = torch.randn(3, 1, 1, 2, generator=g, dtype=torch.float64)
    t = torch.tensor([0, 400, 999])
    # For a Gaussian prior n̂ = s P⁻¹ (x_t − a m), with P = a²C + s²I.
    for i, step in enumerate(t):
        a, s = abar[step].sqrt(), (1 - abar[step]).sqrt()
        P = a**2 * cov + s**2 * torch.eye(2, dtype=torch.float64)
        expected = s * torch.linalg.solve(P, (x_t[i] - a * mean).flatten())
        assert_close(net(x_t, t)[i].flatten(), expected, rtol=1e-9, atol=1e-9)


def test_channels_are_denoised_like_a_batch(originals: ModuleType) -> None:
    prior = GaussianPrior(torch.zeros(1, 2, 2), torch.rand(1, 2, 2) + 0.5)
    x = torch.randn(2, 3, 2, 2, generator=Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 2.0])
    out = originals.PerChannel(prior).denoise(x, sigma)
    for c in range(3):
        assert_close(out[:, c : c + 1], prior.denoise(x[:, c : c + 1], sigma))


def test_a_checkout_is_forgotten(originals: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text(
        "import hydra.utils\nimport lpips\nANSWER = 42\n"
    )
    before, path = set(sys.modules), list(sys.path)
    with originals.checkout(tmp_path) as load:
        assert load("utils").ANSWER == 42
        assert "hydra" in sys.modules
    assert not {"utils", "hydra", "hydra.utils", "lpips"} & (set(sys.modules) - before)
    assert sys.path == path


def test_a_missing_checkout_is_refused(originals: ModuleType, tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match="give the folder of a git clone"),
        originals.checkout(tmp_path / "none"),
    ):
        pass


def test_the_outermost_call_is_timed(overhead: ModuleType) -> None:
    watch = overhead.Stopwatch()
    inner = watch.mark("inner", time.sleep)
    outer = watch.mark("outer", lambda: (inner(0.001), inner(0.001)))
    outer()
    assert watch.calls == {"outer": 1}
    inner(0.0)
    assert watch.calls == {"outer": 1, "inner": 1}
    assert set(watch.wall) == {"outer", "inner"}


def test_a_failed_call_stops_the_watch(overhead: ModuleType) -> None:
    watch = overhead.Stopwatch()
    with pytest.raises(ZeroDivisionError):
        watch.mark("failing", lambda: 1 / 0)()
    assert not watch.busy
