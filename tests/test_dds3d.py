"""DDS of volumes on a prior known exactly: what couples the slices, and what it costs."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import DEPTH, SIDE, Toy, cut_after, roughness, seeded, stack
from torch import Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, samplers, solve
from invsolve.operators import GaussianNoise, Mask, ParallelBeam, SliceWise
from invsolve.priors import Slices, ddpm_sigmas
from invsolve.samplers import dds3d, mbir, pnp, red
from invsolve.samplers.ztv import slice_noise
from invsolve.volumes import MEASUREMENTS, VOLUMES, MemoryPlan, memory_plan, peak_bytes

Z_TV = {"rho": 0.0257, "lam": 0.0257 * 0.004}


def close(a: Tensor, b: Tensor) -> None:
    assert_close(a, b, rtol=1e-9, atol=1e-9)


def run(toy: Toy, **options: Any) -> Tensor:
    sigmas = ddpm_sigmas(25)
    return dds3d(toy.problem, toy.prior, sigmas=sigmas, generator=seeded(1), **options)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.make()


# --- against what is known


def holes() -> InverseProblem:
    """Two volumes of five slices, of which the same pixels are missing."""
    g = seeded()
    A = SliceWise(Mask((torch.rand(4, 4, generator=g) < 0.6).double()), 5)
    y = torch.randn(2, 5, 1, 4, 4, generator=g, dtype=torch.float64)
    return InverseProblem(A(A.adjoint(y)), A, GaussianNoise(0.3))


def test_uncoupled_it_is_dds() -> None:
    prior, given = stack(4, 4), holes()
    both = (
        partial(samplers.dds, lam=0.7, eta=0.6, cg_steps=40),
        partial(dds3d, rho=0.0, lam=0.0, kappa=0.7, eta=0.6, cg_steps=40),
    )
    one, other = (
        s(given, prior, steps=4, generator=[seeded(1), seeded(2)]) for s in both
    )
    assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("zeta", [0.0, 0.6])
def test_it_begins_with_a_volume_and_noise_of_its_first_level(zeta: float) -> None:
    """One step at σ from v + ζσn: the least squares of D(v + ζσn)."""
    prior, given = stack(4, 4), holes()
    sigma, like = torch.tensor([0.4], dtype=torch.float64), given.image_like()
    v = torch.randn(like.shape, generator=seeded(), dtype=like.dtype)
    uncoupled: dict[str, Any] = {"rho": 0.0, "lam": 0.0, "cg_steps": 40}
    x = dds3d(
        given,
        prior,
        sigmas=sigma,
        zeta=zeta,
        init=v,
        generator=seeded(1),
        **uncoupled,
    )
    n = slice_noise(like, "independent", seeded(1))
    denoised = prior.denoise(v + zeta * sigma * n, sigma[0])
    fused = given.prox(denoised, float(sigma**-2), max_steps=60, rtol=0.0)
    assert_close(x, fused, rtol=1e-6, atol=1e-6)


def test_coupled_slices_are_nearer_to_the_truth(toy: Toy) -> None:
    """The specification's oracle: z-TV gains where slices are alike; so it is rough."""
    alone = run(toy, rho=0.0, lam=0.0)
    coupled = run(toy, **Z_TV)
    assert toy.psnr(coupled) > toy.psnr(alone) + 0.5
    truth = roughness(toy.truth)
    assert roughness(alone) > 1.6 * truth
    assert roughness(coupled) == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize("noise", ["slerp", "shared"])
def test_noise_that_slices_share_leaves_no_roughness(toy: Toy, noise: Any) -> None:
    made = run(toy, rho=0.0, lam=0.0, noise=noise)
    assert roughness(made) == pytest.approx(roughness(toy.truth), rel=0.2)


def test_a_clean_volume_bears_many_conjugate_gradients(toy: Toy) -> None:
    """Unlike the noisy one of mbir: five are better than one."""
    one, five = (run(toy, cg_steps=n, kappa=0.0, **Z_TV) for n in (1, 5))
    assert toy.psnr(five) > toy.psnr(one) + 0.5


def test_the_first_slice_follows_the_last_if_asked(toy: Toy) -> None:
    open_, closed = (
        run(toy, rho=0.257, lam=0.257 * 0.1, periodic=flag) for flag in (False, True)
    )

    def gap(x: Tensor) -> float:
        return float((x[:, :, 0] - x[:, :, -1]).abs().mean())

    assert gap(closed) < 0.7 * gap(open_)


# --- the noise


@pytest.mark.parametrize("kind", ["independent", "shared", "slerp"])
def test_each_voxel_s_noise_is_standard_normal(kind: Any) -> None:
    n = slice_noise(torch.zeros(40, 1, 5, 16, 16), kind, seeded())
    assert n.shape == (40, 1, 5, 16, 16)
    flat = n.movedim(2, 0).flatten(1)
    assert_close(flat.mean(1), torch.zeros(5), rtol=0, atol=0.05)
    assert_close(flat.var(1), torch.ones(5), rtol=0, atol=0.06)


def test_slices_are_as_far_apart_as_they_are_told() -> None:
    """cos Ω(j − i)/(d − 1) with Ω near π/2: 0 from end to end, cos π/8 for neighbours."""
    n = slice_noise(torch.zeros(1, 1, 5, 256, 256), "slerp", seeded())
    first, others = n[0, 0, 0].flatten(), n[0, 0].flatten(1)
    made = others @ first / first.norm() / others.norm(dim=1)
    assert_close(made, torch.cos(torch.arange(5) * torch.pi / 8), rtol=0, atol=0.02)
    shared = slice_noise(torch.zeros(1, 1, 3, 8, 8), "shared", seeded())
    assert torch.equal(shared[:, :, 0], shared[:, :, 2])
    independent = slice_noise(torch.zeros(1, 1, 2, 256, 256), "independent", seeded())
    assert abs(float((independent[0, 0, 0] * independent[0, 0, 1]).mean())) < 0.02


def test_noise_is_each_volume_s_own() -> None:
    x = torch.zeros(2, 1, 4, 8, 8)
    both = slice_noise(x, "slerp", [seeded(1), seeded(2)])
    close(both[1:], slice_noise(x[:1], "slerp", [seeded(2)]))


def test_one_slice_has_one_noise() -> None:
    n = slice_noise(torch.zeros(1, 1, 1, 8, 8), "slerp", seeded())
    assert n.isfinite().all() and n.std() > 0.5


# --- chunks, cuts and memory


def test_nothing_depends_on_chunks(toy: Toy) -> None:
    whole = run(toy, **Z_TV)
    for chunk in (1, 5):
        parts = Toy(toy.truth, Slices(toy.prior.inner, 0, chunk), toy.problem)
        assert_close(run(parts, **Z_TV), whole, rtol=1e-4, atol=1e-6 * 10)


@pytest.mark.parametrize("cut", [1, 4, 5, 6])
def test_a_cut_solve_goes_on_bit_for_bit(cut: int, tmp_path: Path) -> None:
    """Within a volume, its splitting and its noise included."""
    A = SliceWise(Mask(torch.eye(4).double()), 5)
    given = InverseProblem(A(torch.ones(1, 1, 5, 4, 4).double()), A, GaussianNoise(0.3))
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "checkpoint_every": 2}
    go = partial(solve, given, stack(4, 4), dds3d, steps=6, samples=2, rho=0.3, lam=0.1)
    whole = go(generator=seeded())
    with pytest.raises(InterruptedError):
        go(generator=seeded(), progress=cut_after(cut), **kept)
    left: list[int] = []

    def told(loop: Any) -> Any:
        left.append(len(loop))
        return loop

    again = go(generator=seeded(), progress=told, **kept)
    assert torch.equal(again.samples, whole.samples)
    assert left == ([6 - cut // 2 * 2, 6] if cut < 6 else [6])
    assert again.stats.network_forwards == whole.stats.network_forwards
    with pytest.raises(ValueError, match="of another run"):
        go(generator=seeded(1), **kept)


def test_other_volumes_at_once_begin_the_volume_again(tmp_path: Path) -> None:
    A = SliceWise(Mask(torch.eye(4).double()), 5)
    given = InverseProblem(A(torch.ones(1, 1, 5, 4, 4).double()), A, GaussianNoise(0.3))
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "checkpoint_every": 1}
    go = partial(solve, given, stack(4, 4), dds3d, steps=4, samples=2)
    with pytest.raises(InterruptedError):
        go(generator=seeded(), progress=cut_after(3), **kept)
    again = go(generator=seeded(), chunk=2, **kept)
    close(again.samples, go(generator=seeded()).samples)


SCRIPT = """
import sys, time
import torch
from invsolve import InverseProblem, solve
from invsolve.operators import GaussianNoise, Mask
from invsolve.priors import GaussianPrior, Slices
from invsolve.samplers import dds3d

def slowly(loop):
    for item in loop:
        time.sleep(float(sys.argv[2]))
        yield item

prior = Slices(GaussianPrior(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)))
y = torch.ones(1, 1, 3, 2, 2)
result = solve(
    InverseProblem(y, Mask(torch.eye(2)), GaussianNoise(0.1)), prior, dds3d,
    steps=40, generator=torch.Generator().manual_seed(0),
    checkpoint=sys.argv[1], checkpoint_every=3, progress=slowly,
)
torch.save(result.samples, sys.argv[1] + ".result")
"""


def test_a_killed_process_goes_on_within_the_volume(tmp_path: Path) -> None:
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
    kept = torch.load(path, weights_only=True)
    assert len(kept["done"]) == 0 and kept["within"]["step"] >= 3
    subprocess.run([*command, "0"], check=True)
    other = tmp_path / "other.pt"
    subprocess.run([*command[:-1], str(other), "0"], check=True)
    results = [torch.load(f"{p}.result", weights_only=True) for p in (path, other)]
    assert torch.equal(*results)


PROCESS = """
import sys
import torch
import torch.distributed as dist
sys.path[:0] = [sys.argv[3]]
from stacks import Toy
from invsolve import solve
from invsolve.priors import Prior, Slices
from invsolve.samplers import dds3d

class Seen(Prior):
    def __init__(self, inner):
        self.inner, self.slices = inner, []  # copies share it
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max
    def denoise(self, x, sigma):
        self.slices.append(len(x))
        return self.inner.denoise(x, sigma)

store, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
toy = Toy.make()
inner = Seen(toy.prior.inner)
prior = Slices(inner, 0, 3, spread=True)
result = solve(
    toy.problem, prior, dds3d, steps=5, generator=torch.Generator().manual_seed(0)
)
torch.save({"x": result.samples, "slices": sum(inner.slices)}, f"{store}.{rank}")
dist.destroy_process_group()
"""


def test_two_processes_are_one(toy: Toy, tmp_path: Path) -> None:
    """Each denoises half of the slices, and both end with the whole volume."""
    store = tmp_path / "store"
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(store)]
    both = [subprocess.Popen([*command, str(rank), folder]) for rank in (0, 1)]
    assert [p.wait(timeout=300) for p in both] == [0, 0]
    alone = solve(toy.problem, toy.prior, dds3d, steps=5, generator=seeded()).samples
    for rank in (0, 1):
        made = torch.load(f"{store}.{rank}", weights_only=True)
        assert made["slices"] == 5 * DEPTH // 2
        assert_close(made["x"], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


def test_spreading_needs_processes(toy: Toy) -> None:
    with pytest.raises(ValueError, match="start with torchrun"):
        Slices(toy.prior.inner, spread=True)


@pytest.mark.parametrize(
    ("sampler", "begun"),
    [
        (dds3d, False),
        (dds3d, True),
        (mbir, False),
        (pnp, False),
        (pnp, True),
        (red, True),
    ],
)
@pytest.mark.parametrize("depth", [8, 24])
def test_no_more_memory_than_planned(sampler: Any, begun: bool, depth: int) -> None:
    """Of every tensor that is made in a solve, at once, at any depth."""
    slices = ParallelBeam((SIDE, SIDE), torch.tensor([0.0, 1.0]))
    A = SliceWise(slices, depth, 2)
    y = torch.rand(1, depth, 1, 2, slices.detectors, generator=seeded())
    given = InverseProblem(y, A, GaussianNoise(0.1))
    inner = Toy.make().prior.inner
    prior = Slices(inner, 0, 2)
    plan = memory_plan(given, prior, begun=begun)
    volume = 4 * depth * SIDE**2
    assert plan.host == (VOLUMES + begun) * volume + MEASUREMENTS * 4 * y.numel()
    first: dict[str, Any] = {"init": given.image_like()} if begun else {}

    def go() -> None:
        solve(given, prior, sampler, steps=3, generator=seeded(), **first)

    go()  # the matrices are built once and kept
    # What the operator works on: two slices, in and out, and their products.
    allowed = plan.host + plan.network + 8 * 4 * SIDE**2
    assert 3 * volume < peak_bytes(go) <= allowed


def test_the_network_s_memory_is_of_the_chunk_alone() -> None:
    A = Mask(torch.ones(8, 8))
    inner = stack(8, 8).inner

    def planned(depth: int, chunk: int) -> MemoryPlan:
        y = torch.zeros(1, 1, depth, 8, 8, dtype=torch.float64)
        given = InverseProblem(y, A, GaussianNoise(0.1))
        return memory_plan(given, Slices(inner, 0, chunk))

    assert planned(4, 2).network == planned(40, 2).network
    assert planned(40, 2).host == 10 * planned(4, 2).host
    four, two = planned(4, 4), planned(4, 2)
    assert four.network - two.network == 2 * two.slice > 0


def test_the_network_s_memory_is_of_the_largest_of_a_prior_s_parts() -> None:
    """Whose weights are all held, and one of which is asked at a time."""
    y = torch.zeros(1, 1, 4, 8, 8, dtype=torch.float64)
    given = InverseProblem(y, Mask(torch.ones(8, 8)), GaussianNoise(0.1))
    small, large = (Slices(stack(8, 8).inner, 0, chunk) for chunk in (1, 4))
    alone = [memory_plan(given, part) for part in (small, large)]
    both = memory_plan(given, small, large)
    weights = alone[0].network - alone[0].slice
    assert weights > 0
    assert both.network == alone[1].network + weights
    assert (both.host, both.chunk) == (alone[1].host, 4)


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    plan = MemoryPlan(host=6000, network=1500, slice=100, chunk=10)
    plan.check(7500)
    plan.check(6000, 1500)
    with pytest.raises(ValueError, match="solve for fewer slices"):
        plan.check(5999)
    with pytest.raises(ValueError, match=r"chunk=7\)"):
        plan.check(7200)
    with pytest.raises(ValueError, match=r"chunk=5\)"):
        plan.check(10**9, 1000)
    with pytest.raises(ValueError, match="smaller network"):
        plan.check(10**9, 400)
    assert "10 slices at once" in str(plan)
