"""Volumes from few views by a prior of slices: docs/volumes.md.

    python benchmarks/volumes.py tune  --data $INVSOLVE_DATA
    python benchmarks/volumes.py run   --data $INVSOLVE_DATA --volumes 2
    python benchmarks/volumes.py depth --data $INVSOLVE_DATA
    python benchmarks/volumes.py docs

CT: stacks of neighbouring slices of OpenKBP's validation patients (real CT), on their own
grid; measurements are simulated (parallel rays, Poisson counts, on a grid three times
finer). Brain MR: T1-like volumes simulated from the label maps of heads that the prior
never saw; the same Poisson-disc samples of k-space in each slice. ``tune`` goes over each
method's settings on a patient (a head) apart. Each result is kept as it comes, so that a
run which was stopped goes on.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from ct_headneck import TUNING_PATIENTS, machine, put
from make_mr_population import heads
from torch import Generator, Tensor

import invsolve as iv
from invsolve import io, samplers
from invsolve.demo import FLOOR
from invsolve.metrics import body_mask, psnr, ssim
from invsolve.operators import (
    Fourier,
    GaussianNoise,
    ParallelBeam,
    RealImage,
    SliceWise,
    TransmissionNoise,
    poisson_disc,
)
from invsolve.population import brain_mr, read_tissues
from invsolve.priors import Slices
from invsolve.samplers import dds3d, mbir
from invsolve.simulate import measure
from invsolve.units import MU_WATER, hu_to_mu
from invsolve.volumes import peak_bytes

RESULTS = Path(__file__).parent / "results" / "volumes.json"
KEPT = Path("runs/volumes")
"""Where reconstructions are kept for the picture."""

COUNTS = 1e5
SIGMA_K = 0.005
"""Of the noise in k-space, in each part."""

PLANES = {"axial": 2, "coronal": 3, "sagittal": 4}
BEGIN, END = "<!-- volumes: begin -->", "<!-- volumes: end -->"


@dataclass(frozen=True)
class Task:
    """A way of measuring, by name."""

    title: str
    prior: str
    views: int = 0
    arc: float = 180.0

    @property
    def kind(self) -> str:
        """Of the data, whose settings are tuned together."""
        return "ct" if self.views else "mr"


TASKS: Mapping[str, Task] = {
    "ct-8": Task("CT, 8 views", "ct-headneck-128", 8),
    "ct-4": Task("CT, 4 views", "ct-headneck-128", 4),
    "ct-2": Task("CT, 2 views", "ct-headneck-128", 2),
    "ct-90": Task("CT, 45 views over 90°", "ct-headneck-128", 45, 90.0),
    "mr-8": Task("brain MR, Poisson disc ×8", "mr-brain-128"),
}
TUNED_ON = {"ct": "ct-8", "mr": "mr-8"}


@dataclass(frozen=True)
class Method:
    """A sampler, and the settings that are tried."""

    name: str
    sampler: Callable[..., Tensor]
    grid: Mapping[str, Mapping[str, list[Any]]]
    fixed: Mapping[str, Any]
    coupled: bool = False
    tasks: tuple[str, ...] = tuple(TASKS)


LEVELS: dict[str, list[Any]] = {
    "sigma_range": [(0.02, 0.5), (0.02, 1.0), (0.02, 4.0)],
    "eta": [0.5, 0.85, 1.0],
}
COUPLED: dict[str, list[Any]] = {
    "rho": [0.0257, 0.257],
    "threshold": [0.004, 0.04, 0.1],
}


def both(grid: Mapping[str, list[Any]]) -> dict[str, Mapping[str, list[Any]]]:
    """The same settings are tried for CT and for MR."""
    return {"ct": grid, "mr": grid}


def methods(steps: int) -> dict[str, Method]:
    """Every method, at so many passes of the network a slice."""
    passes = {"steps": steps, "cg_steps": 10}
    return {
        "fbp": Method("FBP", samplers.fbp, both({}), {}, tasks=tuple(TASKS)[:4]),
        "zero-filled": Method(
            "zero-filled", zero_filled, both({}), {}, tasks=("mr-8",)
        ),
        "tv": Method(
            "ADMM-TV 3D",
            samplers.tv,
            {
                "ct": {"lam": [1.0, 3.0, 10.0, 30.0, 100.0]},
                "mr": {"lam": [10.0, 30.0, 100.0]},
            },
            {"steps": 60},
        ),
        "dds": Method("DDS, slice by slice", samplers.dds, both(LEVELS), passes),
        "dds3d": Method("DDS, z-TV", dds3d, both({**COUPLED}), passes, coupled=True),
        "dds3d-slerp": Method(
            "DDS, z-TV, slerp noise",
            dds3d,
            both({**COUPLED}),
            {**passes, "noise": "slerp"},
            coupled=True,
            tasks=("ct-8",),
        ),
        "mbir": Method(
            "DiffusionMBIR",
            mbir,
            both({"threshold": [0.004, 0.04]}),
            {"steps": 3 * steps, "rho": 0.0257, "final": False},
            coupled=True,
            tasks=("ct-8",),
        ),
    }


def zero_filled(problem: iv.InverseProblem, prior: Any = None, **_: Any) -> Tensor:
    """Aᴴy, of what is not measured 0."""
    return problem.linear.adjoint(problem.y)


# --- data


def ct_volumes(
    data: Path, part: str, n: int, depth: int
) -> list[tuple[str, Tensor, Any]]:
    """(patient, (1, 1, depth, h, w) in 1/mm, spacing): slices from a body's middle."""
    files = sorted((data / "openkbp" / "val").glob("*_ct.nii.gz"))
    if not files:
        raise SystemExit(f"no patients in {data}/openkbp/val: set INVSOLVE_DATA")
    tune = part == "tune"
    found = []
    for path in files[1:TUNING_PATIENTS] if tune else files[TUNING_PATIENTS:]:
        image = io.read(path, "HU", axes="PLI")  # the affines say RAS, wrongly
        filled = (image.values > -500).flatten(1).float().mean(1) > 0.02
        body = filled.nonzero().flatten()
        first = int(body[0]) + (len(body) - depth) // 2
        if len(body) >= depth and len(found) < n:
            cut = hu_to_mu(image.values[first : first + depth])[None, None]
            found.append((path.name.split("_")[0], cut, image.spacing))
    return found


def mr_volumes(
    data: Path, part: str, n: int, depth: int
) -> list[tuple[str, Tensor, Any]]:
    """(head, (1, 1, depth, h, w), spacing): T1-like, from a head's upper half."""
    tissues = read_tissues(data / "synthseg" / "t1_intensity_priors.csv")
    chosen = heads(data, "val")[:1] if part == "tune" else heads(data, "val")[1 : 1 + n]
    found = []
    for number, path in enumerate(chosen):
        generator = Generator().manual_seed(7 * 10**9 + number + 100 * (part == "tune"))
        labels = io.read(path).values.long()
        volume = brain_mr(labels, tissues, generator, contrast="t1").float()
        filled = (volume > 0.1).flatten(1).float().mean(1) > 0.1
        inside = filled.nonzero().flatten()
        first = int(inside[int(0.6 * len(inside))]) - depth // 2
        cut = volume[first : first + depth][None, None].clamp_min(0)
        found.append((path.name.split(".")[0], cut, (2.0, 2.0, 2.0)))
    return found


def problem(
    task: Task, x: Tensor, spacing: tuple[float, float, float], seed: int
) -> iv.InverseProblem:
    """What was measured of a volume."""
    generator = Generator().manual_seed(seed)
    depth, h, w = x.shape[2:]
    if task.kind == "mr":
        mask = poisson_disc((h, w), 8, generator=Generator().manual_seed(0))
        A = mask @ Fourier() @ RealImage()
        noise = GaussianNoise(SIGMA_K)
        return iv.InverseProblem(
            noise.sample(A(x), generator=generator) * mask.mask, A, noise
        )
    arc = torch.deg2rad(torch.tensor(task.arc))
    angles = torch.linspace(0, float(arc), task.views + 1)[:-1]
    slices = ParallelBeam((h, w), angles, pixel_mm=spacing[1])
    noise = TransmissionNoise(COUNTS, FLOOR)
    y = measure(x[0].movedim(0, 1), slices, noise, generator=generator)
    return iv.InverseProblem(y[None], SliceWise(slices, depth), noise)


# --- one run


def solve(
    method: Method,
    settings: Mapping[str, Any],
    given: iv.InverseProblem,
    prior: iv.priors.Prior,
    spacing: tuple[float, float, float],
) -> iv.Solution:
    """A method's volume."""
    options = {**method.fixed, **settings}
    if "threshold" in options:
        options["lam"] = options.pop("threshold") * options["rho"]
    if method.coupled:
        options["aspect"] = spacing[0] / spacing[1]
    if method.name == "FBP":
        assert isinstance(given.operator, SliceWise)
        flat = iv.InverseProblem(
            given.y.movedim(2, 1), given.operator.operator, given.noise
        )
        given = flat
    return iv.solve(
        given,
        None if method.name in ("FBP", "zero-filled") else prior,
        method.sampler,
        generator=Generator().manual_seed(0),
        precision="bf16",
        **options,
    )


def scores(x: Tensor, truth: Tensor, task: Task) -> dict[str, float]:
    """PSNR and SSIM in each orientation, the mean over its planes that hold anything."""
    span = 2 * MU_WATER if task.kind == "ct" else 1.0
    region = (
        body_mask(truth[0].movedim(0, 1)).movedim(1, 0)[None]
        if task.kind == "ct"
        else truth > 0.05
    )
    result = {}
    for plane, axis in PLANES.items():
        planes = [t.movedim(axis, 1)[0] for t in (x, truth, region)]
        a, b, inside = (p.reshape(-1, 1, *p.shape[-2:]) for p in planes)
        keep = inside.flatten(1).float().mean(1) > 0.04
        a, b, inside = a[keep], b[keep], inside[keep]
        result[f"{plane} PSNR"] = float(psnr(a, b, span, inside).mean())
        result[f"{plane} SSIM"] = float(ssim(a, b, span, inside).mean())
    result["roughness"] = float(
        x.diff(dim=2).abs().mean() / truth.diff(dim=2).abs().mean()
    )
    return result


# --- results that grow


def load() -> dict[str, Any]:
    """What there is so far."""
    empty = {"tune": {}, "run": {}, "depth": {}}
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else empty


def keep(results: dict[str, Any]) -> None:
    """Write it, whole or not at all."""
    results["machine"], results["date"] = (
        machine(),
        datetime.now(UTC).date().isoformat(),
    )
    text = json.dumps(results, indent=1) + "\n"
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    io.replace(RESULTS, lambda p: Path(p).write_text(text))


def best(results: dict[str, Any], method: str, kind: str) -> dict[str, Any]:
    """The settings with the best sum of axial and sagittal PSNR on the tuning volume."""
    tried = [t for t in results["tune"].values() if t["key"] == [method, kind]]
    if not tried:
        return {}
    found = max(tried, key=lambda t: t["axial PSNR"] + t["sagittal PSNR"])
    return found["settings"]


def volumes(task: Task, data: Path, part: str, n: int, depth: int) -> list:
    """The volumes of a task's kind."""
    make = ct_volumes if task.kind == "ct" else mr_volumes
    return make(data, part, n, depth)


def tune(args: argparse.Namespace) -> None:
    """Try every setting on one volume of each kind."""
    results = load()
    for kind, task_name in TUNED_ON.items():
        if kind not in args.kinds:
            continue
        task = TASKS[task_name]
        [(_, x, spacing)] = volumes(task, args.data, "tune", 1, args.depth)
        given = problem(task, x, spacing, seed=1)
        prior = Slices(iv.priors.load(task.prior))
        for key, method in methods(args.steps).items():
            if key not in args.methods or task_name not in method.tasks:
                continue
            grid = method.grid[kind]
            inherited = best(results, "dds", kind) if key.startswith("dds3d") else {}
            if key == "mbir":
                inherited = {"sigma_range": best(results, "dds", kind)["sigma_range"]}
            for values in product(*grid.values()) if grid else ():
                settings = {**inherited, **dict(zip(grid, values, strict=True))}
                name = f"{kind} {key} {json.dumps(settings)}"
                if name in results["tune"]:
                    continue
                run = solve(method, settings, given, prior, spacing)
                row = scores(run.mean, x, task)
                results["tune"][name] = {
                    "key": [key, kind],
                    "settings": settings,
                    "depth": args.depth,
                    "seconds": run.stats.seconds,
                    **row,
                }
                print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
                keep(results)


def run(args: argparse.Namespace) -> None:
    """Every method on every task, with the settings that were found."""
    results = load()
    for number in range(args.volumes):
        for task_name, task in TASKS.items():
            if task_name not in args.tasks:
                continue
            found = volumes(task, args.data, "test", args.volumes, args.depth)
            name, x, spacing = found[number]
            given = problem(task, x, spacing, seed=2 + number)
            prior = Slices(iv.priors.load(task.prior))
            for key, method in methods(args.steps).items():
                label = f"{task_name} {name} {key}"
                if task_name not in method.tasks or key not in args.methods:
                    continue
                if label in results["run"]:
                    continue
                settings = best(results, key, task.kind)
                solution = solve(method, settings, given, prior, spacing)
                made = solution.mean.reshape(x.shape)
                row = scores(made, x, task)
                results["run"][label] = {
                    "task": task_name,
                    "volume": name,
                    "method": key,
                    "depth": args.depth,
                    "passes": solution.stats.network_forwards,
                    "seconds": solution.stats.seconds,
                    "settings": settings,
                    **row,
                }
                KEPT.mkdir(parents=True, exist_ok=True)
                torch.save({"x": made.half(), "truth": x}, KEPT / f"{label}.pt")
                print(label, {k: round(v, 3) for k, v in row.items()}, flush=True)
                keep(results)


def depth(args: argparse.Namespace) -> None:
    """Memory and time of dds3d against depth and chunk."""
    results = load()
    prior = iv.priors.load("ct-headneck-128")
    for d, chunk in ((8, 8), (16, 8), (32, 8), (32, 4), (32, 16)):
        name = f"{d} by {chunk}"
        if name in results["depth"]:
            continue
        _, x, spacing = ct_volumes(args.data, "tune", 1, d)[0]
        given = problem(TASKS["ct-8"], x, spacing, seed=1)
        options: dict[str, Any] = {"steps": 2, "cg_steps": 5}
        problem_bytes = x.numel() * 4
        held: list[iv.Solution] = []

        def go(given=given, options=options, chunk=chunk, held=held) -> None:
            g = Generator().manual_seed(0)
            held.append(
                iv.solve(given, Slices(prior, 0, chunk), dds3d, generator=g, **options)
            )

        peak = peak_bytes(go)
        go()
        results["depth"][name] = {
            "depth": d,
            "chunk": chunk,
            "volume": problem_bytes,
            "peak": peak,
            "seconds": held[-1].stats.seconds / 2,
            "overhead": held[-1].stats.overhead,
        }
        print(name, results["depth"][name], flush=True)
        keep(results)


# --- the page


def table(results: dict[str, Any]) -> str:
    """Every task's methods, the mean over its volumes."""
    lines = [
        "| task | method | axial | coronal | sagittal | jumps along z | passes | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = {k: m.name for k, m in methods(20).items()}
    for task_name, task in TASKS.items():
        for key, name in names.items():
            rows = [
                r
                for r in results["run"].values()
                if r["task"] == task_name and r["method"] == key
            ]
            if not rows:
                continue

            def mean(what: str, rows: list = rows) -> float:
                return sum(r[what] for r in rows) / len(rows)

            planes = " | ".join(
                f"{mean(f'{p} PSNR'):.2f} / {mean(f'{p} SSIM'):.3f}" for p in PLANES
            )
            lines.append(
                f"| {task.title} | {name} | {planes} | {mean('roughness'):.2f} | "
                f"{mean('passes'):.0f} | {mean('seconds'):.0f} |"
            )
    some = next(iter(results["run"].values()))
    count = len({r["volume"] for r in results["run"].values() if r["task"] == "ct-8"})
    lines += [
        "",
        f"{count} volumes of {some['depth']} slices of 128×128 for each kind of data, of "
        "patients (OpenKBP, real CT) and heads (simulated brain MR) whom neither training "
        f"nor tuning saw; simulated measurements: {COUNTS:,.0f} photons a ray, or complex "
        f"noise of σ = {SIGMA_K} in k-space. PSNR (data range 2000 HU, or 1) / SSIM over "
        "the body, mean over the planes of each orientation; jumps along z: mean "
        "|x_{k+1} − x_k| over the truth's; passes of the network for each slice, and "
        "seconds for a volume, in bf16, on a machine that did other work as well. One draw "
        "each. "
        f"{results['date']}, {results['machine']}, seed 0. Made by "
        "`python benchmarks/volumes.py run`.",
    ]
    return "\n".join(lines)


def memory(results: dict[str, Any]) -> str:
    """What dds3d takes, by depth and by chunk."""
    lines = [
        "| depth | slices at once | one volume | peak of all tensors | seconds a step | "
        "neither network nor operator |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["depth"].values():
        mib = [f"{row[k] / 2**20:.1f} MiB" for k in ("volume", "peak")]
        lines.append(
            f"| {row['depth']} | {row['chunk']} | {mib[0]} | {mib[1]} | "
            f"{row['seconds']:.1f} | {100 * row['overhead']:.1f} % |"
        )
    lines += [
        "",
        f"`dds3d`, 8 views, float32. {results['date']}, {results['machine']}, doing other "
        "work as well. Made by `python benchmarks/volumes.py depth`.",
    ]
    return "\n".join(lines)


def picture(path: Path, task_name: str = "ct-8") -> None:
    """Three planes of the first volume by every method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = load()["run"]
    first = next(r["volume"] for r in found.values() if r["task"] == task_name)
    shown: list[tuple[str, Tensor]] = []
    for key, method in methods(20).items():
        file = KEPT / f"{task_name} {first} {key}.pt"
        if file.exists():
            kept = torch.load(file, weights_only=True)
            shown.append((method.name, kept["x"].float()))
            truth = kept["truth"]
    if not shown:
        return
    shown = [("truth", truth), *shown]
    depth, h, w = truth.shape[2:]
    figure, axes = plt.subplots(
        3,
        len(shown),
        figsize=(2.0 * len(shown), 2.0 * (1 + 2 * depth / h) + 0.5),
        height_ratios=[h, depth, depth],
        squeeze=False,
    )
    for column, (name, x) in zip(axes.T, shown, strict=True):
        planes = (x[0, 0, depth // 2], x[0, 0, :, h // 2], x[0, 0, :, :, w // 2])
        for ax, plane in zip(column, planes, strict=True):
            ax.imshow(plane, cmap="gray", vmin=0.7 * MU_WATER, vmax=1.4 * MU_WATER)
            ax.axis("off")
        column[0].set_title(name, fontsize=8)
    figure.tight_layout(pad=0.3)
    io.replace(path, lambda p: figure.savefig(p, dpi=110, format="png"))


def docs(args: argparse.Namespace) -> None:
    """Put the tables between the page's marks, and make its picture."""
    results = load()
    text = table(results)
    if results["depth"]:
        text += "\n\n" + memory(results)
    put(args.docs, text, BEGIN, END)
    picture(args.docs.with_suffix(".png"))


def main() -> None:
    """Tune, run, measure or write."""
    parser = argparse.ArgumentParser(description="Volumes by a prior of slices.")
    parser.add_argument("what", choices=["tune", "run", "depth", "docs"])
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--volumes", type=int, default=2, help="of each kind of data")
    parser.add_argument("--depth", type=int, default=24, help="slices of a volume")
    parser.add_argument("--steps", type=int, default=20, help="passes for each slice")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(methods(1)))
    parser.add_argument("--kinds", nargs="+", default=["ct", "mr"])
    parser.add_argument("--docs", type=Path, default=Path("docs/volumes.md"))
    args = parser.parse_args()
    {"tune": tune, "run": run, "depth": depth, "docs": docs}[args.what](args)


if __name__ == "__main__":
    main()
