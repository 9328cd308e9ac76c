"""Solves that are cut, watched or sped up: the result must not know."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast, final

import jaxtyping
import pytest
import torch
from exact import PRIOR, PROBLEM, image_prior
from torch import Generator, Tensor

from invsolve import InverseProblem, Solution, bf16, samplers, solve
from invsolve.checkpoint import fingerprint
from invsolve.operators import GaussianNoise, Mask
from invsolve.priors import Affine, AffineMap, EDMPrior, Prior
from invsolve.samplers.solvers import DDIM, Multistep, Scheduler
from invsolve.shapes import Sigma, X
from invsolve.speed import accelerated

dds = partial(samplers.dds, steps=4)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def inpainting(seed: int = 0) -> tuple[InverseProblem, Prior]:
    generator = seeded(seed)
    prior = image_prior(generator)
    mask = (torch.rand(1, 4, 4, generator=generator) < 0.6).double()
    x = prior.sample(2, generator=generator)
    return InverseProblem(mask * x, Mask(mask), GaussianNoise(0.1)), prior


# --- checkpoints


class Cut(Exception):
    pass


def cut_after(steps: int) -> Callable[[Iterable], Iterator]:
    """A progress bar that fails after so many steps of the whole run."""
    seen = 0

    def progress(loop: Iterable) -> Iterator:
        nonlocal seen
        for item in loop:
            if seen == steps:
                raise Cut
            seen += 1
            yield item

    return progress


@pytest.mark.parametrize("steps", [0, 3, 4, 9, 12])
def test_a_solve_that_was_cut_goes_on(steps: int, tmp_path: Path) -> None:
    """Bit for bit, counts too: 8 samples by 2 are 4 chunks of 4 steps."""
    problem, prior = inpainting()
    whole = solve(problem, prior, dds, samples=4, chunk=2, generator=seeded())
    again = partial(
        solve, problem, prior, dds, samples=4, chunk=2, checkpoint=tmp_path / "c.pt"
    )
    with pytest.raises(Cut):
        again(generator=seeded(), progress=cut_after(steps))
    rest: list[object] = []
    result = again(generator=seeded(), progress=lambda loop: rest.append(0) or loop)
    assert torch.equal(result.samples, whole.samples)
    assert len(rest) == 4 - steps // 4
    for name in ("network_forwards", "operator_applies", "closed_forms"):
        assert getattr(result.stats, name) == getattr(whole.stats, name)


def test_a_finished_solve_asks_nothing_more(tmp_path: Path) -> None:
    problem, prior = inpainting()
    run = partial(solve, problem, prior, dds, checkpoint=tmp_path / "c.pt")
    first = run(generator=seeded())
    second = run(
        generator=seeded(), progress=lambda loop: pytest.fail("it began again")
    )
    assert torch.equal(first.samples, second.samples)
    assert second.stats.network_forwards == first.stats.network_forwards


def test_another_chunk_size_goes_on_too(tmp_path: Path) -> None:
    problem, prior = inpainting()
    run = partial(solve, problem, prior, dds, samples=4, checkpoint=tmp_path / "c.pt")
    with pytest.raises(Cut):
        run(generator=seeded(), chunk=3, progress=cut_after(5))
    result = run(generator=seeded(), chunk=4)
    whole = solve(problem, prior, dds, samples=4, generator=seeded())
    torch.testing.assert_close(result.samples, whole.samples, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "other",
    ["seed", "data", "mask", "noise", "prior", "sampler", "option", "samples"],
)
def test_a_checkpoint_of_another_run_is_refused(other: str, tmp_path: Path) -> None:
    problem, prior = inpainting()
    path = tmp_path / "c.pt"
    solve(problem, prior, dds, generator=seeded(), checkpoint=path)
    before = path.read_bytes()
    y, noise = problem.y, problem.noise
    sampler = dds
    match other:
        case "data":
            problem = InverseProblem(y + 1e-9, problem.operator, noise)
        case "mask":
            problem = InverseProblem(y, Mask(torch.ones(1, 4, 4).double()), noise)
        case "noise":
            problem = InverseProblem(y, problem.operator, GaussianNoise(0.11))
        case "prior":
            prior = Affine(prior, AffineMap(1.0, 0.1))
        case "sampler":
            sampler = partial(samplers.diffpir, steps=4)
        case "option":
            sampler = partial(samplers.dds, steps=4, eta=0.7)
    with pytest.raises(ValueError, match="of another run"):
        solve(
            problem,
            prior,
            sampler,
            samples=2 if other == "samples" else 1,
            generator=seeded(1 if other == "seed" else 0),
            checkpoint=path,
        )
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_refused(damage: bytes | None, tmp_path: Path) -> None:
    problem, prior = inpainting()
    path = tmp_path / "c.pt"
    solve(problem, prior, dds, generator=seeded(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-50] if damage is None else damage)
    with pytest.raises(ValueError, match="no checkpoint of a solve"):
        solve(problem, prior, dds, generator=seeded(), checkpoint=path)


SCRIPT = """
import sys, time
import torch
from invsolve import InverseProblem, samplers, solve
from invsolve.operators import GaussianNoise, Identity
from invsolve.priors import GaussianPrior

def slowly(loop):
    for item in loop:
        time.sleep(float(sys.argv[2]))
        yield item

prior = GaussianPrior(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))
y = torch.ones(1, 1, 2, 2)
result = solve(
    InverseProblem(y, Identity(), GaussianNoise(0.1)), prior, samplers.dds,
    samples=6, chunk=1, steps=5, generator=torch.Generator().manual_seed(0),
    checkpoint=sys.argv[1], progress=slowly,
)
torch.save(result.samples, sys.argv[1] + ".result")
"""


def test_a_killed_process_loses_no_finished_chunk(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(path)]
    process = subprocess.Popen([*command, "0.05"])
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 1 <= len(torch.load(path, weights_only=True)["done"]) < 6
    subprocess.run([*command, "0"], check=True)
    other = tmp_path / "other.pt"
    subprocess.run([*command[:-1], str(other), "0"], check=True)
    results = [torch.load(f"{p}.result", weights_only=True) for p in (path, other)]
    assert torch.equal(*results)


def test_fingerprints_tell_what_matters() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    def scheduler(steps: int) -> Scheduler:
        return Scheduler(
            DDIMScheduler(steps, prediction_type="sample", clip_sample=False)
        )

    makers = [
        lambda: torch.ones(3),
        lambda: torch.ones(3, dtype=torch.float64),
        lambda: torch.ones(1, 3),
        lambda: torch.ones(3, dtype=torch.complex64),
        lambda: torch.ones(3, dtype=torch.bfloat16),
        lambda: torch.arange(12.0).reshape(3, 4).T[None],  # of odd strides
        lambda: [1, 2],
        lambda: [12],
        lambda: {"a": 1},
        lambda: None,
        lambda: 0,
        lambda: 0.0,
        lambda: seeded(0),
        lambda: seeded(1),
        lambda: DDIM(),
        lambda: DDIM(0.5),
        lambda: Multistep(2),
        lambda: scheduler(1000),
        lambda: scheduler(500),
        lambda: torch.nn.Linear(2, 2, bias=False),
        lambda: samplers.dds,
        lambda: samplers.ddnm,
        lambda: partial(samplers.ddnm, steps=3),
        lambda: partial(samplers.ddnm, steps=4),
        lambda: partial(samplers.dds, steps=3),
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = [fingerprint(make()) for make in makers]
        torch.manual_seed(0)
        two = [fingerprint(make()) for make in makers]
    assert one == two
    assert len(set(one)) == len(makers)


# --- trajectories


def test_a_trajectory_is_what_the_network_saw() -> None:
    problem, prior = inpainting()
    watched = Affine(prior, AffineMap(0.5, 0.0))
    plain, kept = (
        solve(problem, watched, dds, samples=3, generator=seeded(), record=k)
        for k in (None, 1)
    )
    assert torch.equal(plain.samples, kept.samples)
    assert plain.trajectory == ()
    steps = kept.trajectory
    assert [s.passes for s in steps] == [0, 1, 2, 3]
    sigmas = [float(s.sigma) for s in steps]
    assert sigmas == sorted(sigmas, reverse=True)
    for step in steps:
        assert step.x.shape == (2, 1, 4, 4)  # the first sample of both items
        expected = watched.denoise(step.x, 0.5 * step.sigma)
        torch.testing.assert_close(step.denoised, expected)


def test_a_trajectory_does_not_depend_on_the_chunks() -> None:
    problem, prior = inpainting()
    runs = [
        solve(problem, prior, dds, samples=3, generator=seeded(), record=2, chunk=chunk)
        for chunk in (6, 1, 4)
    ]
    for run in runs:
        assert [s.passes for s in run.trajectory] == [0, 2]
        for one, other in zip(run.trajectory, runs[0].trajectory, strict=True):
            torch.testing.assert_close(one.x, other.x, rtol=1e-12, atol=1e-12)


# --- speed


@final
class Seeing(torch.nn.Module):
    """F of an EDM prior that notes in which dtype it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        out = self.layer(x)
        self.seen.append(out.dtype)
        return out


@pytest.mark.parametrize("native", [True, False])
def test_only_the_network_is_in_bf16_and_only_where_it_is_native(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "CPU", native)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Seeing()
    problem = InverseProblem(
        torch.ones(1, 1, 4, 4), Mask(torch.ones(1, 4, 4)), GaussianNoise(0.1)
    )
    prior = EDMPrior(net, 0.5)
    one, other = (
        solve(problem, prior, dds, generator=seeded(), precision=precision)
        for precision in ("float32", "bf16")
    )
    assert set(net.seen[:4]) == {torch.float32}
    assert set(net.seen[4:]) == {torch.bfloat16 if native else torch.float32}
    assert one.samples.dtype == other.samples.dtype == torch.float32
    gap = float((one.samples - other.samples).abs().max())
    assert 0 < gap < 0.1 if native else gap == 0


def test_an_unknown_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="unknown precision"):
        accelerated(PRIOR, cast(Any, "int3"), compile=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_gives_the_same() -> None:
    problem, prior = inpainting()
    one, other = (
        solve(problem, prior, dds, generator=seeded(), compile=flag)
        for flag in (False, True)
    )
    torch.testing.assert_close(one.samples, other.samples, rtol=1e-9, atol=1e-9)


# --- what it cost, and in words


@final
class Slow(Prior):
    sigma_min, sigma_max = 0.01, 10.0

    def denoise(self, x: X, sigma: Sigma) -> X:
        time.sleep(0.01)
        return PRIOR.denoise(x, sigma)


def test_time_is_told_apart() -> None:
    run = solve(PROBLEM, Slow(), dds, generator=seeded())
    assert 0.04 <= run.stats.network_seconds < run.stats.seconds
    assert 0 < run.stats.operator_seconds < run.stats.seconds
    parts = run.stats.network_seconds + run.stats.operator_seconds
    assert run.stats.overhead == pytest.approx(1 - parts / run.stats.seconds)


@final
class SlowBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 0.5 * x

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        time.sleep(0.01)
        return 0.5 * grad_outputs[0]


@final
class Backwards(Prior):
    sigma_min, sigma_max = 0.01, 10.0

    def denoise(self, x: X, sigma: Sigma) -> X:
        return SlowBackwards.apply(x)  # pyright: ignore[reportReturnType]


def test_backward_passes_are_the_network_s_time() -> None:
    run = solve(PROBLEM, Backwards(), samplers.dps, steps=4, generator=seeded())
    assert run.stats.network_backwards == 4
    assert run.stats.network_seconds >= 0.04


def test_a_solution_says_what_it_is() -> None:
    problem, prior = inpainting()
    run = solve(problem, prior, dds, samples=3, generator=seeded())
    assert repr(run).startswith(
        "<dds: 3 posterior samples of 2 images (1×4×4), 4 passes of the network each,"
    )
    assert isinstance(run, Solution)
