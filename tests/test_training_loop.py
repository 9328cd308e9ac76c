"""The training loop: runs that are killed, batches that are divided."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from invsolve.training_loop import Batch, Optimisation, Plan, Task, fit, parts

NAMES = ("weight",)


def task() -> Task:
    """A small convolutional network that learns to scale noise down by half."""

    def batch(step: int, generator: Generator) -> Batch:
        return {"x": torch.randn(8, 2, 6, 6, generator=generator)}

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return (net(x) - x / 2).square().mean()

    def make() -> nn.Module:
        first, last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        return nn.Sequential(first, nn.Conv2d(4, 4, 1), last)

    def measure(net: nn.Sequential) -> list[float]:
        return [float(next(net.parameters()).detach().sum())]

    def sheet(net: nn.Sequential) -> Tensor:
        return measure(net)[0] * torch.ones(3, 1, 4, 4) % 1

    return Task(make, batch, loss, measure, NAMES, sheet)


def run(
    out: Path, seed: int = 0, progress=iter, board: Path | None = None, **changes
) -> dict[str, Tensor]:
    """The averaged weights after 20 steps of 8, with a checkpoint after each third."""
    opt = Optimisation.model_validate(
        {"images": 160, "batch": 8, "warmup": 5, "lr": 1e-2, "ema": 0.9} | changes
    )
    net, done = fit(
        task(),
        Plan(opt),
        out / "net.pt",
        out / "net.csv",
        told={"kind": "test"},
        seed=seed,
        every=24,
        progress=progress,
        board=board,
    )
    assert done
    return net.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


# Its own death: when step 7 begins, or with half of the third checkpoint written.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads({threads})
sys.path.insert(0, {tests!r})
import test_training_loop as here
from invsolve import io

def die(): os.kill(os.getpid(), signal.SIGKILL)

def dying(steps):
    for step in steps:
        if step == 7:
            die()
        yield step

saved = 0
def torn(state, path):
    global saved
    saved += 1
    if saved == 3:
        Path(path).write_bytes(b"half of it")
        die()
    save(state, path)

if {where!r} == "step":
    here.run(Path({out!r}), progress=dying)
else:
    save, torch.save = torch.save, torn
    here.run(Path({out!r}), board=Path({out!r}) / "board")
"""


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, where: str) -> None:
    pytest.importorskip("tensorboard")
    whole = run(tmp_path / "whole")
    cut = tmp_path / "cut"
    told = {"tests": str(Path(__file__).parent), "threads": torch.get_num_threads()}
    code = KILLED.format(out=str(cut), where=where, **told)
    died = subprocess.run([sys.executable, "-c", code], timeout=300)
    assert died.returncode == -signal.SIGKILL
    kept = torch.load(cut / "net.pt", weights_only=True)["step"]
    assert kept == 6  # the last whole checkpoint
    for file in cut.glob("board/*"):  # a run of the same second may be read before it
        file.rename(file.with_name("events.out.tfevents.0"))
    assert same(whole, run(cut, board=cut / "board"))
    tables = [(folder / "net.csv").read_bytes() for folder in (tmp_path / "whole", cut)]
    assert tables[0] == tables[1]
    assert not same(whole, run(tmp_path / "other", seed=1))
    if where == "checkpoint":  # what was told of it before it was whole is told once
        rows = np.loadtxt(cut / "net.csv", delimiter=",", skiprows=1)
        curve_is(events(cut / "board"), "loss", rows[:, 0].tolist(), rows[:, 1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("steps", [3, 4])
def test_a_stopped_run_loses_nothing(
    tmp_path: Path, steps: int, optimizer: str
) -> None:
    """Stopped at a checkpoint or between two, the table's means too are the same."""
    whole = run(tmp_path / "whole", optimizer=optimizer)
    asked = iter(range(1, 100))
    opt = Optimisation.model_validate(
        {"images": 160, "batch": 8, "warmup": 5, "lr": 1e-2, "ema": 0.9}
        | {"optimizer": optimizer}
    )
    cut = tmp_path / "cut"
    _, done = fit(
        task(),
        Plan(opt),
        cut / "net.pt",
        cut / "net.csv",
        told={"kind": "test"},
        seed=0,
        every=24,
        stop=lambda: next(asked) >= steps,
    )
    assert not done
    assert torch.load(cut / "net.pt", weights_only=True)["step"] == steps
    assert same(whole, run(cut, optimizer=optimizer))
    tables = [(folder / "net.csv").read_bytes() for folder in (tmp_path / "whole", cut)]
    assert tables[0] == tables[1]


def close(a: dict[str, Tensor], b: dict[str, Tensor], bound: float) -> bool:
    return all((a[k] - b[k]).abs().max() < bound for k in a)


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulated_gradients_are_the_batch_s(tmp_path: Path, accumulate: int) -> None:
    whole = run(tmp_path / "whole")
    divided = run(tmp_path / "divided", accumulate=accumulate)
    assert close(whole, divided, 1e-5)
    assert not close(whole, run(tmp_path / "start", lr=1e-4), 1e-3)
    losses = [
        np.loadtxt(tmp_path / name / "net.csv", delimiter=",", skiprows=1)
        for name in ("whole", "divided")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_parts_are_all_of_a_batch() -> None:
    rows = {"a": torch.arange(12), "b": 2 * torch.arange(12)}
    got = parts(rows, 3)
    assert torch.equal(torch.cat([part["a"] for part in got]).sort()[0], rows["a"])
    assert all(torch.equal(part["b"], 2 * part["a"]) for part in got)
    assert [len(part["a"]) for part in got] == [4, 4, 4]


def test_parts_cannot_be_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch of 8 cannot be divided into 9 parts"):
        run(tmp_path, accumulate=9)
    assert not (tmp_path / "net.pt").exists()


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_layout_is_the_chosen(tmp_path: Path, channels_last: bool) -> None:
    """It changes where numbers lie, and the result by rounding."""
    run(tmp_path, channels_last=channels_last)
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    weight = state["net"]["0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    plain = run(tmp_path / "plain", channels_last=not channels_last)
    assert close(plain, run(tmp_path / "again", channels_last=channels_last), 1e-5)


# In a process of its own: what checks types in tests is not for a compiler to trace.
COMPILED = """
import sys
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads({threads})
sys.path.insert(0, {tests!r})
import test_training_loop as here

graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward

compile = nn.Module.compile
nn.Module.compile = lambda net: compile(net, backend=backend)
out = Path({out!r})
plain = here.run(out / "plain")
assert not graphs
assert here.close(plain, here.run(out / "compiled", compile=True), 1e-6)
assert graphs
"""


def test_compiled_is_the_same(tmp_path: Path) -> None:
    """The whole objective goes to the compiler, here one that only records the graph."""
    told = {"tests": str(Path(__file__).parent), "threads": torch.get_num_threads()}
    code = COMPILED.format(out=str(tmp_path), **told)
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)


def events(folder: Path) -> Any:
    name = "tensorboard.backend.event_processing.event_accumulator"
    return importlib.import_module(name).EventAccumulator(str(folder)).Reload()


def curve_is(told: Any, name: str, steps: list[int], values: Any) -> None:
    points = told.Scalars(name)
    assert [point.step for point in points] == steps
    np.testing.assert_allclose([p.value for p in points], values, rtol=1e-6)


def test_the_curves_are_the_table_s(tmp_path: Path) -> None:
    """And showing them changes nothing."""
    pytest.importorskip("tensorboard")
    plain = run(tmp_path / "plain")
    assert same(plain, run(tmp_path, board=tmp_path / "board"))
    told, steps = events(tmp_path / "board"), [24 * k for k in range(1, 7)]
    rows = np.loadtxt(tmp_path / "net.csv", delimiter=",", skiprows=1)
    assert rows[:, 0].tolist() == steps
    curve_is(told, "loss", steps, rows[:, 1])
    curve_is(told, "weight", steps, rows[:, 2])
    plan = Plan(Optimisation(images=160, batch=8, warmup=5))
    rates = [1e-2 * plan.rate(3 * k - 1) for k in range(1, 7)]
    curve_is(told, "learning_rate", steps, rates)


def test_the_sheets_are_of_the_averaged_network(tmp_path: Path) -> None:
    """Here a plain grey that is the first weights' sum."""
    pytest.importorskip("tensorboard")
    imageio = pytest.importorskip("imageio.v3")
    run(tmp_path, board=tmp_path / "board")
    sheets = events(tmp_path / "board").Images("samples")
    rows = np.loadtxt(tmp_path / "net.csv", delimiter=",", skiprows=1)
    expected = {int(seen): 255 * (total % 1) for seen, _, total in rows}
    for sheet in sheets:  # the reader keeps some of them
        grey = imageio.imread(sheet.encoded_image_string).flat[20]
        assert abs(grey - expected[sheet.step]) <= 1
    assert len(sheets) > 1


def test_without_tensorboard_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"invsolve\[train\]"):
        run(tmp_path, board=tmp_path / "board")
    assert not (tmp_path / "net.pt").exists()
