"""A volume that several processes hold: its solve is one process's."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import DEPTH, Toy, seeded
from torch import Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, solve
from invsolve.priors import Groups, Slices
from invsolve.samplers import dds3d, mbir
from invsolve.shards import Shard

Z_TV = {"rho": 0.03, "lam": 0.003}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "independent noise": (dds3d, {"steps": 5, **Z_TV}),
    "slerp noise": (dds3d, {"steps": 3, "noise": "slerp", **Z_TV}),
    "shared noise, slice by slice": (
        dds3d,
        {"steps": 3, "noise": "shared", "rho": 0.0, "lam": 0.0},
    ),
    "a ring": (dds3d, {"steps": 3, "periodic": True, **Z_TV}),
    "mbir": (mbir, {"steps": 6, "cg_steps": 2, "final": False, **Z_TV}),
    "mbir, a step of SIRT last": (mbir, {"steps": 3, "final": True, **Z_TV}),
}

PROCESS = """
import sys
import torch
import torch.distributed as dist
store, rank, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
sys.path[:0] = [folder]
dist.init_process_group(
    "gloo", init_method="file://" + store, rank=rank, world_size=count
)
from test_shards import of_each
made = of_each()
if rank == count - 1:
    torch.save(made, store + ".made")
dist.destroy_process_group()
"""


def of_each() -> dict[str, Tensor]:
    """Every case's whole volume, by the processes that there are."""
    toy, shard = Toy.make(), Shard.here(DEPTH)
    y = shard.cut(toy.problem.y, dim=2)
    mine = InverseProblem(y, toy.problem.operator, toy.problem.noise)
    result = {}
    for name, (sampler, options) in CASES.items():
        g = seeded(3)
        done = solve(mine, toy.prior, sampler, generator=g, shard=shard, **options)
        assert done.samples.shape[3] == shard.size
        result[name] = shard.gather(done.samples[0])
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """By three processes, of five and six slices."""
    store, count = tmp_path_factory.mktemp("shards") / "store", 3
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(store)]
    folder = str(Path(__file__).parent)
    all_ = [
        subprocess.Popen([*command, str(rank), str(count), folder])
        for rank in range(count)
    ]
    assert [p.wait(timeout=600) for p in all_] == [0] * count
    return torch.load(f"{store}.made", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_three_processes_are_one(case: str, made: dict[str, Tensor]) -> None:
    """To 1e-5 of its largest value; and what couples the slices was needed."""
    sampler, options = CASES[case]
    toy = Toy.make()
    alone = solve(toy.problem, toy.prior, sampler, generator=seeded(3), **options)
    x = alone.samples[0]
    assert_close(made[case], x, rtol=0, atol=1e-5 * float(x.abs().max()))


def test_a_shard_is_of_slices_that_follow_one_another() -> None:
    shards = [Shard(16, rank, 3) for rank in range(3)]
    assert [(s.first, s.last, s.size) for s in shards] == [
        (0, 5, 5),
        (5, 10, 5),
        (10, 16, 6),
    ]
    x = torch.arange(16.0).reshape(1, 1, 16, 1, 1)
    assert_close(torch.cat([s.cut(x) for s in shards], 2), x)
    alone = Shard(16)
    assert alone.cut(x).shape == x.shape
    assert torch.equal(alone.gather(x), x)
    assert alone.passed(x, 1, ring=False) is None
    itself = alone.passed(x, -1, ring=True)
    assert itself is not None and torch.equal(itself, x)


def test_what_a_shard_refuses() -> None:
    with pytest.raises(ValueError, match="3 processes cannot share 2 slices"):
        Shard(2, 2, 3)
    with pytest.raises(ValueError, match="rank must be 0 to 2, got 3"):
        Shard(8, 3, 3)
    with pytest.raises(ValueError, match="start with torchrun"):
        Shard.here(8)
    with pytest.raises(ValueError, match="of 16 slices expected along dim 2"):
        Shard(16, 0, 2).cut(torch.zeros(1, 1, 8, 4, 4))
    toy, shard = Toy.make(), Shard(DEPTH, 0, 2)
    with pytest.raises(ValueError, match="give it its own"):
        dds3d(toy.problem, toy.prior, generator=seeded(), shard=shard)
    for other in (Slices(toy.prior.inner, axis=1), Groups(toy.prior.inner)):
        with pytest.raises(ValueError, match="one at a time"):
            shard.check(other)
    shard.check(toy.prior)
    Shard(DEPTH).check(Groups(toy.prior.inner))
