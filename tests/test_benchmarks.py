"""What the benchmarks against other code rest on: same noise, same network, fair clocks."""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate
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


@pytest.fixture
def registration(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Of a disc of six tissues in a jumble, instead of a head."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("registration")
    at = torch.arange(module.SIDE) - module.SIDE / 2
    head = ((24 - (at[:, None] ** 2 + at**2).sqrt()) / 2).sigmoid()
    coarse = 8 * torch.randn(1, 6, 12, 12, generator=Generator().manual_seed(0))
    jumble = interpolate(coarse, (module.SIDE, module.SIDE), mode="bicubic")[0]
    parts = torch.cat([1 - head[None], head * jumble.softmax(0)])
    monkeypatch.setattr(module, "tissues", lambda data: parts)
    return module


def test_fields_pass_through_their_values_and_have_their_spread(
    registration: ModuleType,
) -> None:
    B = registration.basis().reshape(registration.SIDE, registration.SIDE, -1)
    corner = torch.zeros(registration.CELLS**2)
    corner[0] = 1
    assert_close(B[0, 0], corner, rtol=0, atol=1e-5)
    S = registration.fields(400, Generator().manual_seed(0))
    assert_close(S[:, :, 0, 0].std().item(), registration.SPREAD, rtol=0.1, atol=0)


def test_the_true_field_scores_best_and_none_scores_nothing(
    registration: ModuleType, tmp_path: Path
) -> None:
    test = registration.tests(tmp_path, "tune", 2)
    right = registration.scores(test.x[None], test, tmp_path)
    assert (right["error"], right["dice"]) == (0, 1)
    none = registration.scores(torch.zeros_like(test.x)[None], test, tmp_path)
    assert none["unseen"] == 0
    assert none["error"] > 0.5
    assert right["unseen"] > 60
    shifts = torch.randn(400, 1, 1, 1, 1, generator=Generator().manual_seed(1))
    # An interval of 90 % ends at 1.65 standard deviations: it holds 1 and not 2.
    for by, held in ((1.0, 1.0), (2.0, 0.0)):
        draws = test.x + by + shifts
        assert registration.scores(draws, test, tmp_path)["coverage"] == held


def test_a_field_of_the_law_is_found_again(
    registration: ModuleType, tmp_path: Path
) -> None:
    """By its law to a tenth of what there was; and no smooth one near it is likelier."""
    test = registration.tests(tmp_path, "tune", 2)
    found = registration.with_law(test)
    none = registration.endpoint(torch.zeros_like(test.x), test, tmp_path)
    assert registration.endpoint(found, test, tmp_path) < 0.1 * none

    def value(S: Tensor, k: int) -> Tensor:
        rough = sum((S.diff(dim=d)[k].square().sum() for d in (2, 3)), torch.zeros(()))
        return registration.misfit(test, S[k : k + 1], k) + 15 * rough

    near = registration.smooth(test, 30.0, found)
    for k in range(2):
        least = value(near, k)
        assert least < value(found, k)
        for other in (0.99 * near, near + 0.01):
            assert least < value(other, k)


# --- the README's table


def found(counts: float, psnr: float, **changes: object) -> dict:
    """What ct_headneck.py writes down of two methods, the second with a prior."""
    rows = [
        {
            "method": method,
            "kind": "point_estimate",
            "samples": 1,
            "psnr_mean": psnr + gain,
            "psnr_sd": 1.0,
            "ssim_mean": 0.9,
            "psnr": [psnr + gain],
            "forwards": passes,
            "seconds": 2.0,
        }
        for method, gain, passes in (("TV", 0.0, 0), ("PnP", 2.0, 20))
    ]
    told = {
        "part": "report",
        "slices": 2,
        "patients": 1,
        "views": 30,
        "seed": 0,
        "busy": False,
    }
    told |= {"date": "today", "machine": "a core", "weights": "abc", "command": "c"}
    return {"counts": counts, "rows": rows, **told, **changes}


def test_a_column_for_each_dose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    ct_headneck = import_module("ct_headneck")
    lines = ct_headneck.table([found(2e4, 25.0), found(5e3, 23.0)]).splitlines()
    assert "| 20,000 photons | 5,000 photons |" in lines[0]
    assert "| 27.00 ± 1.00 | 25.00 ± 1.00 | 0.900 | 20 |" in lines[3]
    assert len({line.count("|") for line in lines[:4]}) == 1

    other = found(2e4, 25.0)
    other["rows"][1] |= {"psnr_mean": 26.5, "psnr": [26.5]}
    lines = ct_headneck.beside(other, found(2e4, 25.0), ("a", "b"), "nobody")
    assert lines.splitlines()[2:4] == ["| PnP | 26.50 | 27.00 |", ""]

    path = tmp_path / "r.json"
    path.write_text(json.dumps(found(2e4, 25.0)))
    less = found(5e3, 23.0)
    assert ct_headneck.alike(path, less) == json.loads(path.read_text())
    assert ct_headneck.alike(path, less | {"weights": "abd"}) == {}
    assert ct_headneck.alike(path, less | {"slices": 32}) == {}
    assert ct_headneck.alike(tmp_path / "none", less) == {}
