"""The training loop: runs that are killed, batches that are divided."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from invsolve.training_loop import Batch, Optimisation, Plan, Task, fit

NAMES = ("weight",)


def task() -> Task:
    """A small convolutional network that learns to scale noise down by half."""

    def batch(step: int, generator: Generator) -> Batch:
        return {"x": torch.randn(8, 2, 6, 6, generator=generator)}

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return (net(x) - x / 2).square().mean()

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1))

    def measure(net: nn.Sequential) -> list[float]:
        return [float(next(net.parameters()).detach().sum())]

    return Task(make, batch, loss, measure, NAMES)


def run(out: Path, seed: int = 0, progress=iter, **changes) -> dict[str, Tensor]:
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
    here.run(Path({out!r}))
"""


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, where: str) -> None:
    whole = run(tmp_path / "whole")
    cut = tmp_path / "cut"
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(cut), where=where)
    died = subprocess.run([sys.executable, "-c", code], timeout=300)
    assert died.returncode == -signal.SIGKILL
    kept = torch.load(cut / "net.pt", weights_only=True)["step"]
    assert kept == 6  # the last whole checkpoint
    assert same(whole, run(cut))
    tables = [(folder / "net.csv").read_bytes() for folder in (tmp_path / "whole", cut)]
    assert tables[0] == tables[1]
    assert not same(whole, run(tmp_path / "other", seed=1))


@pytest.mark.parametrize("steps", [3, 4])
def test_a_stopped_run_loses_nothing(tmp_path: Path, steps: int) -> None:
    """Stopped at a checkpoint or between two, the table's means too are the same."""
    whole = run(tmp_path / "whole")
    asked = iter(range(1, 100))
    opt = Optimisation.model_validate(
        {"images": 160, "batch": 8, "warmup": 5, "lr": 1e-2, "ema": 0.9}
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
    assert same(whole, run(cut))
    tables = [(folder / "net.csv").read_bytes() for folder in (tmp_path / "whole", cut)]
    assert tables[0] == tables[1]
