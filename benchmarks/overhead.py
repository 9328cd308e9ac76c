"""What samplers cost beyond network passes and operator calls: ours, and deepinv's.

    python benchmarks/overhead.py --docs docs/head_to_head.md

Every call of the network and of the operator is timed from inside the run, the outermost
only; a backward pass counts as the network's. What is left is the sampler's own, the
algebra of conjugate gradients and all of `solve` included. Two priors: one of three
operations, under which everything else shows, and the bundled one. Best of several runs,
by the wall clock and by the processor's, since a shared machine disturbs the first.
Data: random images; no number depends on them. Rows already in the results file are
kept unless ``--fresh`` is given.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from ct_headneck import machine, put
from torch import Generator

import invsolve as iv
from invsolve import io, operators as ops, samplers
from invsolve.priors import Prior
from invsolve.samplers.ddrm import ddrm
from invsolve.shapes import Sigma, X, per_item

BEGIN, END = "<!-- overhead: begin -->", "<!-- overhead: end -->"
NOISE = 0.05
TASKS = ("inpainting", "blur", "CT")
GRADIENT_FREE = ("reddiff", "diffpir", "dds", "ddnm", "tmpd", "daps")
OURS: dict[str, dict[str, Any]] = {
    "reddiff": {},
    "dps": {},
    "pigdm": {},
    "mmps": {},
    "tmpd": {},
    "diffpir": {},
    "dds": {},
    "ddnm": {},
    "daps": {"ode_steps": 1},
    "ddrm": {},
}
BOTH = {
    "diffpir": "DiffPIR",
    "dps": "DPS",
    "pigdm": "ΠGDM",
    "mmps": "MomentMatching",
    "ddrm": "DDRM",
}
"""Ours, and deepinv's name of the same method."""


class Stopwatch:
    """Seconds inside marked calls, by the wall and by the processor, outermost first."""

    def __init__(self) -> None:
        self.busy = False
        self.calls: dict[str, float] = {}
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def mark(self, kind: str, function: Callable) -> Callable:
        """The function, timed as one of a kind."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.busy:
                return function(*args, **kwargs)
            self.busy = True
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.busy = False
                for sums, spent in (
                    (self.wall, time.perf_counter() - wall),
                    (self.cpu, time.process_time() - cpu),
                    (self.calls, 1),
                ):
                    sums[kind] = sums.get(kind, 0) + spent

        return timed


class Timed(Prior):
    """A prior whose passes a stopwatch sees."""

    def __init__(self, inner: Prior, watch: Stopwatch) -> None:
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max
        self._denoise = watch.mark("network", inner.denoise)

    def denoise(self, x: X, sigma: Sigma) -> X:
        return self._denoise(x, sigma)


class ThreeOperations(Prior):
    """N(½, ¼²), pixel by pixel: g x + (1 − g)/2."""

    sigma_min, sigma_max = 0.002, 80.0

    def denoise(self, x: X, sigma: Sigma) -> X:
        gain = 0.0625 / (0.0625 + per_item(sigma, x) ** 2)
        return gain * x + (1 - gain) * 0.5


@contextlib.contextmanager
def timed_calls(watch: Stopwatch, cls: type, names: tuple[str, ...]) -> Iterator[None]:
    """The class' own methods, and autograd's backward passes, under the stopwatch."""
    with contextlib.ExitStack() as stack:
        for name in names:
            if hasattr(cls, name):
                timed = watch.mark("operator", getattr(cls, name))
                stack.enter_context(patch.object(cls, name, timed))
        grad = watch.mark("backward", torch.autograd.grad)
        stack.enter_context(patch.object(torch.autograd, "grad", grad))
        yield


def spent(
    run: Callable[[Prior], Any],
    prior: Prior,
    cls: type,
    names: tuple[str, ...],
    repetitions: int,
) -> dict[str, Any]:
    """Of several runs the best, by each clock: milliseconds a network call.

    A call is a forward or a backward pass.

    Args:
        run: one run, given the prior whose passes are seen.
        prior: the prior itself.
        cls, names: the operator's class and which of its methods are its calls.
        repetitions: how many, after one to warm up.
    """
    best: dict[str, dict[str, float]] = {}
    forwards = calls = 0
    for k in range(repetitions + 1):
        watch = Stopwatch()
        with timed_calls(watch, cls, names):
            wall, cpu = time.perf_counter(), time.process_time()
            run(Timed(prior, watch))
            total = {
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
            }
        forwards = int(watch.calls["network"])
        calls = forwards + int(watch.calls.get("backward", 0))
        for clock, inside in (("wall", watch.wall), ("cpu", watch.cpu)):
            network = inside.get("network", 0.0) + inside.get("backward", 0.0)
            operator = inside.get("operator", 0.0)
            row = {
                "total": total[clock],
                "network": network,
                "operator": operator,
                "beyond": total[clock] - network - operator,
            }
            row = {name: 1e3 * value / calls for name, value in row.items()}
            if k and (clock not in best or row["beyond"] < best[clock]["beyond"]):
                best[clock] = row
    return {"forwards": forwards, "backwards": calls - forwards, **best}


def problem(task: str, size: int) -> iv.InverseProblem:
    """Random measurements of one of the three tasks."""
    g = Generator().manual_seed(0)
    x = torch.rand(1, 1, size, size, generator=g)
    if task == "inpainting":
        A = ops.Mask.random((size, size), 0.5, generator=g)
    elif task == "blur":
        A = ops.Blur.gaussian(1.5, (size, size))
    else:
        angles = torch.linspace(0, torch.pi, 61)[:-1]
        A = ops.ParallelBeam((size, size), angles, pixel_mm=1.0 / size)
    noise = ops.GaussianNoise(NOISE)
    return iv.InverseProblem(noise.sample(A(x), generator=g), A, noise)


def sampler_called(name: str) -> Callable:
    """One of our samplers."""
    return ddrm if name == "ddrm" else getattr(samplers, name)


def ours(name: str, task: str, size: int, steps: int) -> tuple[Callable, type, tuple]:
    """A run of one of our samplers by `solve`, and what counts as operator calls."""
    given, sampler = problem(task, size), sampler_called(name)

    def run(prior: Prior) -> Any:
        g = Generator().manual_seed(0)
        options = {"steps": steps, **OURS[name]}
        return iv.solve(given, prior, sampler, generator=g, **options)

    cls = type(given.operator)
    closed = tuple(n for n in ("prox", "pinv") if n in vars(cls))
    return run, cls, ("apply", "adjoint", "normal", "vjp", *closed)


def theirs(name: str, task: str, size: int, steps: int) -> tuple[Callable, type, tuple]:
    """A run of one of deepinv's, on a physics of its own."""
    import deepinv as dinv
    from originals.deepinv import denoiser

    noise = dinv.physics.GaussianNoise(NOISE)
    shape: Any = (1, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if task == "inpainting":
            P = dinv.physics.Inpainting(shape, mask=0.5, noise_model=noise)
        elif task == "blur":
            kernel = dinv.physics.blur.gaussian_blur(sigma=1.5)
            P = dinv.physics.BlurFFT(shape, filter=kernel, noise_model=noise)
        else:
            P = dinv.physics.Tomography(
                angles=60, img_width=size, normalize=True, noise_model=noise
            )
        y = P(torch.rand(1, *shape, generator=Generator().manual_seed(0)))
    s = dinv.sampling
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def posterior(term: Any, D: Any) -> Any:
        return s.PosteriorDiffusion(
            data_fidelity=term(D),
            denoiser=D,
            sde=s.VariancePreservingDiffusion(alpha=1.0),
            solver=s.DDPMSolver(timesteps=times, rng=Generator().manual_seed(0)),
        )

    def run(prior: Prior) -> Any:
        D = denoiser(prior)
        if name == "DiffPIR":
            L2 = dinv.optim.data_fidelity.L2()
            return s.DiffPIR(D, L2, sigma=NOISE, max_iter=steps)(y, P)
        if name == "DDRM":
            return s.DDRM(D, sigmas=torch.linspace(1, 0, steps).numpy())(y.clone(), P)
        if name == "DPS":
            rng = Generator().manual_seed(0)
            return s.DPS(D, num_steps=steps + 1, rng=rng)(y, P, x_init=y_shape)
        terms = {
            "ΠGDM": s.PiGDMDataFidelity,
            "MomentMatching": s.MomentMatchingDataFidelity,
        }
        return posterior(terms[name], D)(y, P, x_init=y_shape)

    y_shape = (1, *shape)
    closed = ()
    if isinstance(P, dinv.physics.DecomposablePhysics):
        closed = ("prox_l2", "A_dagger", "U", "U_adjoint", "V", "V_adjoint")
    names = ("A", "A_adjoint", "A_adjoint_A", "A_A_adjoint", *closed)
    return run, type(P), names


def measure(prior: str, size: int, steps: int, threads: int, repetitions: int) -> list:
    """What to measure: a key and a function that does it, one for each row."""
    jobs = []

    def add(of: str, name: str, task: str, how: Callable, steps: int) -> None:
        key = f"{of} {name} | {task} | {prior} {size} | {threads}"
        net = ThreeOperations() if prior == "analytic" else bundled()

        def job() -> dict[str, Any]:
            torch.set_num_threads(threads)
            run, cls, names = how(name, task, size, steps)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = spent(run, net, cls, names, repetitions)
            about = {"of": of, "sampler": name, "task": task, "prior": prior}
            return {**about, "size": size, "threads": threads, **row}

        jobs.append((key, job))

    for task in TASKS:
        for name in OURS:
            if name == "ddrm" and task == "CT":
                continue  # CT's singular vectors are not at hand
            few = steps // 5 if task == "CT" and size == 64 else steps
            add("invsolve", name, task, ours, few)
            if name in BOTH:
                slow = task == "CT" and size > 64
                if slow and name != "diffpir":
                    continue  # its projector takes minutes there
                add("deepinv", BOTH[name], task, theirs, 3 if slow else few)
    return jobs


def bundled() -> Prior:
    """The bundled prior, in its own range."""
    return iv.priors.load("ct-headneck-128").normalised[0]


def memory(name: str, size: int = 256) -> dict[int, float]:
    """MiB that a run of 10, 100 and 1000 steps adds at its peak, one after the other."""
    torch.set_num_threads(1)
    given, sampler = problem("inpainting", size), sampler_called(name)
    peaks = {}
    for steps in (10, 10, 100, 1000):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = resident("VmRSS")
        options = {"steps": steps, **OURS[name]}
        g = Generator().manual_seed(0)
        iv.solve(given, ThreeOperations(), sampler, generator=g, **options)
        peaks[steps] = resident("VmHWM") - before
    return peaks


def resident(entry: str) -> float:
    """MiB of this process in memory, now (VmRSS) or at its peak (VmHWM). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith(entry))
    return int(kib) / 1024


def summary(rows: list[dict]) -> list[str]:
    """The extremes, by the processor's clock, and deepinv's over ours."""
    lines = []
    for prior, scale, unit in (("analytic", 1.0, "ms a call"), ("bundled", 100.0, "%")):
        for tasks in (("inpainting", "blur"), ("CT",)):
            chosen = [
                r
                for r in rows
                if r["prior"] == prior and r["task"] in tasks and r["threads"] == 1
            ]

            def cost(r: dict, prior: str = prior, scale: float = scale) -> float:
                c = r["cpu"]
                part = c["beyond"] / (1 if prior == "analytic" else c["total"])
                return scale * part

            mine = {r["sampler"]: cost(r) for r in chosen if r["of"] == "invsolve"}
            if not mine:
                continue
            worst = max(mine, key=lambda name: mine[name])
            text = (
                f"- {chosen[0]['size']}², {' and '.join(tasks)}: beyond network and "
                f"operator at most {mine[worst]:.2f} {unit} (`{worst}`)"
            )
            pairs = [
                (r, cost(r) / cost(o))
                for r in chosen
                for o in chosen
                if r["of"] == "deepinv"
                and o["of"] == "invsolve"
                and (BOTH.get(o["sampler"]), o["task"]) == (r["sampler"], r["task"])
            ]
            if pairs:
                low, high = min(q for _, q in pairs), max(q for _, q in pairs)
                text += f"; deepinv's is {low:.1f} to {high:.1f} times ours"
            lines.append(text + ".")
    return lines


def table(result: dict) -> str:
    """Markdown: by task, ours beside deepinv's, then memory."""
    rows = result["rows"].values()
    lines: list[str] = []
    for prior, size, threads in sorted(
        {(r["prior"], r["size"], r["threads"]) for r in rows}
    ):
        named = "prior of three operations" if prior == "analytic" else "bundled prior"
        lines += [
            "",
            f"**{size}², {named}, {threads} thread{'s' if threads > 1 else ''}**",
            "",
            "| sampler | task | forward + backward | network, ms a call | "
            "beyond, ms a call | beyond, % | with the operator's calls, % |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for r in rows:
            if (r["prior"], r["size"], r["threads"]) != (prior, size, threads):
                continue
            w, c = r["wall"], r["cpu"]
            share = [100 * k["beyond"] / k["total"] for k in (w, c)]
            both = [100 * (k["beyond"] + k["operator"]) / k["total"] for k in (w, c)]
            name = f"`{r['sampler']}`" if r["of"] == "invsolve" else r["sampler"]
            whose = "" if r["of"] == "invsolve" else " (deepinv)"
            lines.append(
                f"| {name}{whose} | {r['task']} | {r['forwards']} + {r['backwards']} | "
                f"{w['network']:.2f} / {c['network']:.2f} | "
                f"{w['beyond']:.3f} / {c['beyond']:.3f} | "
                f"{share[0]:.1f} / {share[1]:.1f} | {both[0]:.1f} / {both[1]:.1f} |"
            )
    lines += ["", *summary(list(rows)), ""]
    lines += [
        "",
        "**Peak memory by the number of steps**, MiB beyond what the process held before "
        "(one image of 256², prior of three operations, 1 thread)",
        "",
        "| sampler | 10 steps | 100 | 1000 |",
        "| --- | --- | --- | --- |",
    ]
    for name, peaks in result["memory"].items():
        cells = " | ".join(f"{peaks[n]:.1f}" for n in ("10", "100", "1000"))
        lines.append(f"| `{name}` | {cells} |")
    lines += [
        "",
        "Wall clock / processor's clock; a call of the network is a forward or a backward "
        f"pass. {result['date']}, {result['machine']}, torch "
        f"{result['torch']}, deepinv {result['deepinv']}; seed 0, random images. Made by "
        "`python benchmarks/overhead.py --docs docs/head_to_head.md`.",
    ]
    return "\n".join(lines).strip()


def main() -> None:
    """Measure what is missing, write it down, and make the table."""
    parser = argparse.ArgumentParser(description="What samplers cost of their own.")
    parser.add_argument("--docs", type=Path, help="the page whose table to replace")
    out = Path("benchmarks/results/overhead.json")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory)))
        return
    kept = args.out.exists() and not args.fresh
    result: dict[str, Any] = {"rows": {}, "memory": {}}
    if kept:
        result |= json.loads(args.out.read_text())
    import deepinv

    result |= {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "torch": torch.__version__,
        "deepinv": deepinv.__version__,
    }

    def save() -> None:
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        io.replace(args.out, lambda p: Path(p).write_text(text, "utf-8"))

    jobs = measure("analytic", 64, 50, 1, 2)
    jobs += measure("bundled", 128, 8, 1, 2)
    for key, job in jobs:
        if args.only in key and key not in result["rows"]:
            row = result["rows"][key] = job()
            w = row["wall"]
            print(f"{key}: {w['beyond']:.3f} ms of {w['total']:.3f}", flush=True)
            save()
    for name in GRADIENT_FREE:
        if args.only in name and name not in result["memory"]:
            command = [sys.executable, __file__, "--memory", name]
            done = subprocess.run(
                command, capture_output=True, check=True, text=True, env=os.environ
            )
            result["memory"][name] = json.loads(done.stdout)
            print(name, result["memory"][name], flush=True)
            save()
    order = {key: i for i, (key, _) in enumerate(jobs)}
    known = sorted(result["rows"].items(), key=lambda kv: order.get(kv[0], 999))
    result["rows"] = dict(known)
    save()
    if args.docs:
        put(args.docs, table(result), BEGIN, END)


if __name__ == "__main__":
    main()
