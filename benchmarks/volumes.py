"""Volumes from few views by a prior of slices: docs/volumes.md.

    python benchmarks/volumes.py experts --data $INVSOLVE_DATA
    python benchmarks/volumes.py tune  --data $INVSOLVE_DATA
    python benchmarks/volumes.py run   --data $INVSOLVE_DATA --volumes 2
    python benchmarks/volumes.py depth --data $INVSOLVE_DATA
    python benchmarks/volumes.py whole --data $INVSOLVE_DATA
    python benchmarks/volumes.py docs

CT: stacks of neighbouring slices of OpenKBP's validation patients (real CT), on their own
grid; measurements are simulated (parallel rays, Poisson counts, on a grid three times
finer). Brain MR: T1-like volumes simulated from the label maps of heads that the prior
never saw; the same Poisson-disc samples of k-space in each slice. ``tune`` searches each
method's settings for a task on a patient (a head) apart, in as many trials for each; a
task that is not searched takes another's. Each result is kept as it comes, so that a run
which was stopped goes on.
"""

import argparse
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from ct_headneck import TUNING_PATIENTS, machine, put
from make_mr_population import heads
from torch import Generator, Tensor

import invsolve as iv
from invsolve import io, samplers
from invsolve.demo import FLOOR
from invsolve.metrics import body_mask
from invsolve.operators import (
    Fourier,
    GaussianNoise,
    ParallelBeam,
    RealImage,
    SliceWise,
    TransmissionNoise,
    poisson_disc,
)
from invsolve.planes import PLANES, plane_scores, planes_figure
from invsolve.population import brain_mr, read_tissues
from invsolve.priors import Equivariant, Groups, Slices, Sliding, TwoPlanes
from invsolve.samplers import dds3d, mbir
from invsolve.simulate import measure
from invsolve.units import MU_WATER, hu_to_mu, mu_to_hu
from invsolve.volumes import peak_bytes

RESULTS = Path(__file__).parent / "results" / "volumes.json"
KEPT = Path("runs/volumes")
"""Where reconstructions are kept for the picture."""

SIGMA_K = 0.005
"""Of the noise in k-space, in each part."""

BEGIN, END = "<!-- volumes: begin -->", "<!-- volumes: end -->"


@dataclass(frozen=True)
class Task:
    """A way of measuring, by name."""

    title: str
    prior: str
    views: int = 0
    arc: float = 180.0
    counts: float = 1e5
    """Photons a ray."""
    tuned_on: str = ""
    """The task whose settings it takes, if not its own."""

    @property
    def kind(self) -> str:
        """Of the data."""
        return "ct" if self.views else "mr"


TASKS: Mapping[str, Task] = {
    "ct-8": Task("CT, 8 views", "ct-headneck-128", 8),
    "ct-4": Task("CT, 4 views", "ct-headneck-128", 4, tuned_on="ct-8"),
    "ct-2": Task("CT, 2 views", "ct-headneck-128", 2, tuned_on="ct-8"),
    "ct-90": Task(
        "CT, 45 views over 90°", "ct-headneck-128", 45, 90.0, tuned_on="ct-8"
    ),
    "ct-low": Task("CT, 60 views, 2,000 photons", "ct-headneck-128", 60, counts=2e3),
    "mr-8": Task("brain MR, Poisson disc ×8", "mr-brain-128"),
}
FEW = ("ct-8", "ct-4", "ct-2", "ct-90")
LOW = ("ct-low",)
MR = ("mr-8",)


@dataclass(frozen=True)
class Method:
    """A sampler, and what of it is searched: name → (least, most, first tried)."""

    name: str
    sampler: Callable[..., Tensor]
    space: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    coupled: bool = False
    tasks: tuple[str, ...] = tuple(TASKS)
    by: str = "slices"
    """Which prior of volumes it asks: one of `volume_priors`."""
    begun: tuple[str, ...] = ()
    """The methods, by their keys, the mean of whose volumes it begins with."""
    like: str = ""
    """The method, by its key, whose settings it takes, if it is not searched."""
    first: bool = False
    """Whether it is so slow that it is run for the first volume alone."""


TRIALS = 12
LINEAR = ("eta", "zeta")
"""What is searched evenly; all else evenly in its logarithm."""

NEAR = {"low": (0.01, 0.05, 0.02), "high": (0.05, 0.5, 0.1), "lam": (0.03, 1.0, 0.2)}
"""Of a method that begins near the volume."""

COUPLED = {
    "sigma": (0.3, 5.0, 1.0),
    "zeta": (0.0, 1.0, 0.5),
    "kappa": (0.03, 1.0, 0.1),
    "rho": (0.001, 0.03, 0.008),
    "threshold": (0.005, 0.1, 0.04),
}


def methods(steps: int) -> dict[str, Method]:
    """Every method, at so many passes of the network a slice."""
    passes = {"steps": steps, "cg_steps": 10}
    z_tv = {**passes, "eta": 1.0}
    positive = {"nonnegative": True}
    return {
        "fbp": Method("FBP", samplers.fbp, tasks=FEW + LOW),
        "sirt": Method("SIRT", samplers.sirt, fixed=positive, tasks=FEW),
        "zero-filled": Method("zero-filled", zero_filled, tasks=MR),
        "tv": Method(
            "ADMM-TV 3D",
            samplers.tv,
            {"lam": (1.0, 100.0, 10.0)},
            {"steps": 200, **positive},
            coupled=True,
        ),
        "dds": Method(
            "DDS, slice by slice",
            samplers.dds,
            {
                "sigma": (0.3, 5.0, 1.0),
                "eta": (0.3, 1.0, 0.85),
                "lam": (0.03, 3.0, 1.0),
            },
            passes,
            tasks=FEW + MR,
        ),
        "pnp": Method(
            "PnP, slice by slice",
            samplers.pnp,
            {"sigma": (0.3, 5.0, 2.4), "lam": (0.01, 1.0, 0.07)},
            {"steps": steps},
            tasks=FEW + MR,
        ),
        "dds3d": Method(
            "DDS, z-TV", dds3d, COUPLED, z_tv, coupled=True, tasks=FEW + MR
        ),
        "dds3d-half": Method(
            "DDS, z-TV, half the passes",
            dds3d,
            fixed={**z_tv, "steps": steps // 2},
            coupled=True,
            tasks=("ct-8",),
            like="dds3d",
        ),
        "dds3d-slerp": Method(
            "DDS, z-TV, slerp noise",
            dds3d,
            COUPLED,
            {**z_tv, "noise": "slerp"},
            coupled=True,
            tasks=FEW,
        ),
        "groups": Method(
            "DDS, z-TV, neighbours together",
            dds3d,
            COUPLED,
            z_tv,
            coupled=True,
            tasks=FEW,
            by="groups",
        ),
        "planes": Method(
            "DDS, z-TV, axial and coronal",
            dds3d,
            COUPLED,
            z_tv,
            coupled=True,
            tasks=FEW,
            by="planes",
        ),
        "both": Method(
            "DDS, z-TV, slices and neighbours",
            dds3d,
            COUPLED,
            z_tv,
            coupled=True,
            tasks=FEW,
            by="both",
        ),
        "pnp-both": Method(
            "slices and neighbours, then PnP",
            samplers.pnp,
            NEAR,
            {"steps": steps},
            tasks=FEW,
            by="both",
            begun=("both",),
        ),
        "pnp-mean": Method(
            "the mean of two, then PnP",
            samplers.pnp,
            NEAR,
            {"steps": steps},
            tasks=("ct-8", "ct-4"),
            by="both",
            begun=("dds3d", "both"),
        ),
        "pnp-tv": Method(
            "ADMM-TV 3D, then PnP",
            samplers.pnp,
            NEAR,
            {"steps": steps},
            tasks=LOW + MR,
            begun=("tv",),
        ),
        "pnp-between": Method(
            "ADMM-TV 3D, then PnP among neighbours",
            samplers.pnp,
            NEAR,
            {"steps": steps},
            tasks=LOW,
            by="between",
            begun=("tv",),
        ),
        "mbir": Method(
            "DiffusionMBIR",
            mbir,
            {
                "sigma": (1.0, 30.0, 10.0),
                "snr": (0.02, 0.2, 0.16),
                "rho": (0.001, 0.03, 0.0257),
                "threshold": (0.005, 0.1, 0.004 / 0.5),
            },
            {"steps": 3 * steps, "final": False},
            coupled=True,
            tasks=FEW,
            first=True,
        ),
    }


def prior_of(task: Task, method: Method) -> iv.priors.Prior:
    """The prior of volumes that a method takes for a task."""
    return volume_priors(task)[method.by]()


def volume_priors(task: Task) -> Mapping[str, Callable[[], iv.priors.Prior]]:
    """All of them, made when they are called for."""

    def axial() -> iv.priors.Prior:
        return Slices(Equivariant(loaded(task.prior)))

    def coronal() -> iv.priors.Prior:
        # Shifted, a stack's last slice would come to lie beside its first.
        return Slices(Equivariant(loaded("ct-coronal-128"), shift=0), axis=1)

    def groups() -> iv.priors.Prior:
        return Groups(Equivariant(loaded("ct-neighbours-128")))

    return {
        "slices": axial,
        "groups": groups,
        "between": lambda: Sliding(Equivariant(loaded("ct-between-128"))),
        "both": lambda: TwoPlanes(axial(), groups(), drawn=True),
        # The share is TPDM's for CT.
        "planes": lambda: TwoPlanes(axial(), coronal(), share=1 / 2.7, drawn=True),
    }


loaded = cache(iv.priors.load)


def experts(args: argparse.Namespace) -> None:
    """How each prior of slices denoises volumes that no table has, level by level."""
    results, task = load(), TASKS["ct-8"]
    asked = {name: volume_priors(task)[name]() for name in EXPERTS}
    scale = asked["slices"].normalised[1].scale
    generator = Generator().manual_seed(0)
    found = ct_volumes(args.data, "tune", args.volumes, args.depth)
    rows = []
    for level in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0):
        sigma, errors = torch.tensor(level * scale), []
        for _, x, _ in found:
            noisy = x + sigma * torch.randn(x.shape, generator=generator)
            region = body_mask(x[0].movedim(0, 1))[:, 0]
            with torch.no_grad():
                gaps = [(p.denoise(noisy, sigma) - x)[0, 0] for p in asked.values()]
            errors.append([float(gap[region].square().mean()) for gap in gaps])
        mean = torch.tensor(errors).mean(0)
        psnrs = (10 * ((2 * MU_WATER) ** 2 / mean).log10()).tolist()
        rows.append({"sigma": level, **dict(zip(asked, psnrs, strict=True))})
        print(rows[-1], flush=True)
    told = {"date": today(), "machine": machine()}
    results["experts"] = {"volumes": len(found), "rows": rows, **told}
    keep(results)


EXPERTS = {
    "slices": "ct-headneck-128",
    "groups": "ct-neighbours-128",
    "between": "ct-between-128",
}
"""Priors of slices by whose kind a volume is asked, and their names."""


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
    noise = TransmissionNoise(task.counts, FLOOR)
    y = measure(x[0].movedim(0, 1), slices, noise, generator=generator)
    return iv.InverseProblem(y[None], SliceWise(slices, depth), noise)


# --- one run


def solve(
    method: Method,
    settings: Mapping[str, Any],
    given: iv.InverseProblem,
    prior: iv.priors.Prior,
    spacing: tuple[float, float, float],
    begin: Tensor | None = None,
) -> iv.Solution:
    """A method's volume, from another's if it is one that begins so."""
    options = {**method.fixed, **settings}
    if begin is not None:
        options["init"] = begin
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


def beginning(
    method: Method,
    results: dict[str, Any],
    given: iv.InverseProblem,
    task_name: str,
    spacing: tuple[float, float, float],
    steps: int,
    done: Mapping[str, iv.Solution] = MappingProxyType({}),
) -> list[iv.Solution]:
    """What a method begins with: others' volumes, done already or by their settings."""
    found = []
    for key in method.begun:
        other, settings = methods(steps)[key], best(results, key, task_name)
        prior = prior_of(TASKS[task_name], other)
        found.append(done.get(key) or solve(other, settings, given, prior, spacing))
    return found


def mean_of(found: Sequence[iv.Solution]) -> Tensor | None:
    """Of their volumes; of none, none."""
    return torch.stack([s.mean for s in found]).mean(0) if found else None


def scores(x: Tensor, truth: Tensor, task: Task) -> dict[str, float]:
    """PSNR of the volume; in each orientation, and SSIM; and how much x jumps along z."""
    if task.kind == "ct":
        span, region = 2 * MU_WATER, body_mask(truth[0].movedim(0, 1))[:, 0]
    else:
        span, region = 1.0, truth[0, 0] > 0.05
    square = (x - truth)[0, 0][region].square().mean()
    result = {"volume PSNR": float(10 * (span**2 / square).log10())}
    for plane, (p, s) in plane_scores(x[0, 0], truth[0, 0], span, region).items():
        result |= {f"{plane} PSNR": p, f"{plane} SSIM": s}
    rough = x.diff(dim=2).abs().mean() / truth.diff(dim=2).abs().mean()
    return {**result, "roughness": float(rough)}


# --- results that grow


def load() -> dict[str, Any]:
    """What there is so far."""
    empty = {"tune": {}, "run": {}, "depth": {}}
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else empty


def keep(results: dict[str, Any]) -> None:
    """Write it, whole or not at all."""
    text = json.dumps(results, indent=1) + "\n"
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    io.replace(RESULTS, lambda p: Path(p).write_text(text))


def today() -> str:
    """A result's date."""
    return datetime.now(UTC).date().isoformat()


def dates(rows: Iterable[Mapping[str, Any]]) -> str:
    """When these were measured: from the first to the last."""
    days = sorted({row["date"] for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def best(results: dict[str, Any], key: str, task_name: str) -> dict[str, Any]:
    """What the search found on the tuning volume of a task, or of the one it follows."""
    task_name = TASKS[task_name].tuned_on or task_name
    key = methods(1)[key].like or key
    return results["tune"].get(f"{task_name} {key}", {}).get("settings", {})


def volumes(task: Task, data: Path, part: str, n: int, depth: int) -> list:
    """The volumes of a task's kind."""
    make = ct_volumes if task.kind == "ct" else mr_volumes
    return make(data, part, n, depth)


def tune(args: argparse.Namespace) -> None:
    """Search each method's settings for a task on one volume, in as many trials."""
    results = load()
    for task_name in args.tasks:
        task = TASKS[task_name]
        if task.tuned_on:
            continue
        [(_, x, spacing)] = volumes(task, args.data, "tune", 1, args.depth)
        given = problem(task, x, spacing, seed=1)
        for key, method in methods(args.steps).items():
            name = f"{task_name} {key}"
            wanted = key in args.methods and task_name in method.tasks and method.space
            if not wanted or name in results["tune"]:
                continue
            prior = prior_of(task, method)
            started = beginning(method, results, given, task_name, spacing, args.steps)
            begin = mean_of(started)
            score = partial(trial_score, method, given, prior, x, spacing, task, begin)
            found = search(method, score)
            results["tune"][name] = {**found, "depth": args.depth}
            print(name, found, flush=True)
            keep(results)


def trial_score(
    method: Method,
    given: iv.InverseProblem,
    prior: iv.priors.Prior,
    x: Tensor,
    spacing: tuple[float, float, float],
    task: Task,
    begin: Tensor | None,
    settings: Mapping[str, Any],
) -> float:
    """The mean PSNR over the three orientations; of what diverges, -100."""
    try:
        made = solve(method, settings, given, prior, spacing, begin).mean
    except ValueError:
        return -100.0
    row = scores(made.reshape(x.shape), x, task)
    return sum(row[f"{plane} PSNR"] for plane in PLANES) / len(PLANES)


def search(method: Method, score: Callable[[Mapping[str, Any]], float]) -> dict:
    """The best of so many trials by Optuna's TPE, with a seed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: Any) -> float:
        settings = drawn(trial, method)
        trial.set_user_attr("settings", settings)
        return score(settings)

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=TRIALS // 2),
    )
    study.enqueue_trial({k: first for k, (_, _, first) in method.space.items()})
    study.optimize(objective, n_trials=TRIALS)
    best = study.best_trial
    return {"settings": best.user_attrs["settings"], "psnr": study.best_value}


def drawn(trial: Any, method: Method) -> dict[str, Any]:
    """A trial's settings, to three digits."""
    found: dict[str, Any] = {
        name: float(
            f"{trial.suggest_float(name, low, high, log=name not in LINEAR):.3g}"
        )
        for name, (low, high, _) in method.space.items()
    }
    if "sigma" in found:
        found["sigma_range"] = (0.02, found.pop("sigma"))
    if "low" in found:
        found["sigma_range"] = (found.pop("low"), found.pop("high"))
    return found


def run(args: argparse.Namespace) -> None:
    """Every method on every task, with the settings that were found."""
    results = load()
    for number in range(args.volumes):
        for task_name, task in TASKS.items():
            if task_name not in args.tasks:
                continue
            found = volumes(task, args.data, "test", args.volumes, args.depth)
            if number >= len(found):
                continue
            name, x, spacing = found[number]
            given = problem(task, x, spacing, seed=2 + number)
            done: dict[str, iv.Solution] = {}
            for key, method in methods(args.steps).items():
                label = f"{task_name} {name} {key}"
                if task_name not in method.tasks or key not in args.methods:
                    continue
                if method.first and number:
                    continue
                if label in results["run"]:
                    continue
                settings = best(results, key, task_name)
                begun = beginning(
                    method, results, given, task_name, spacing, args.steps, done
                )
                prior, begin = prior_of(task, method), mean_of(begun)
                solution = solve(method, settings, given, prior, spacing, begin)
                done[key] = solution
                parts = [s.stats for s in (*begun, solution)]
                made = solution.mean.reshape(x.shape)
                row = scores(made, x, task)
                results["run"][label] = {
                    "task": task_name,
                    "volume": name,
                    "method": key,
                    "depth": args.depth,
                    "passes": sum(stats.network_forwards for stats in parts),
                    "seconds": sum(stats.seconds for stats in parts),
                    "settings": settings,
                    "date": today(),
                    "machine": machine(),
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
            "date": today(),
            "machine": machine(),
        }
        print(name, results["depth"][name], flush=True)
        keep(results)


WHOLE = ("tv", "dds3d", "groups")


def whole(args: argparse.Namespace) -> None:
    """A patient's whole volume from 8 views: how long it takes, and how good it is."""
    results, task_name = load(), "ct-8"
    task = TASKS[task_name]
    path = sorted((args.data / "openkbp" / "val").glob("*_ct.nii.gz"))[TUNING_PATIENTS]
    image = io.read(path, "HU", axes="PLI")  # the affines say RAS, wrongly
    x = hu_to_mu(image.values)[None, None]
    given = problem(task, x, image.spacing, seed=2)
    for key in WHOLE:
        if key not in args.methods or key in results.setdefault("whole", {}):
            continue
        method = methods(args.steps)[key]
        prior, settings = prior_of(task, method), best(results, key, task_name)
        solution = solve(method, settings, given, prior, image.spacing)
        made = solution.mean.reshape(x.shape)
        row = scores(made, x, task)
        results["whole"][key] = {
            "depth": x.shape[2],
            "passes": solution.stats.network_forwards,
            "seconds": solution.stats.seconds,
            "threads": torch.get_num_threads(),
            "date": today(),
            "machine": machine(),
            **row,
        }
        print(key, results["whole"][key], flush=True)
        keep(results)


# --- the page


def complete(results: dict[str, Any], names: Collection[str]) -> list[dict[str, Any]]:
    """The runs of as many volumes of a kind as are done by all methods for its tasks."""
    done: dict[str, list[str]] = {}
    for task in TASKS:
        every = {k: methods(1)[k] for k in names}
        wanted = {k for k, m in every.items() if task in m.tasks and not m.first}
        runs = [r for r in results["run"].values() if r["task"] == task]
        seen = dict.fromkeys(r["volume"] for r in runs)
        done[task] = [
            v for v in seen if wanted <= {r["method"] for r in runs if r["volume"] == v}
        ]
    counts = {
        kind: min(len(done[k]) for k, t in TASKS.items() if t.kind == kind and done[k])
        for kind in ("ct", "mr")
    }
    chosen = {name: done[name][: counts[task.kind]] for name, task in TASKS.items()}
    return [r for r in results["run"].values() if r["volume"] in chosen[r["task"]]]


def table(results: dict[str, Any]) -> str:
    """Every task's methods, the mean over its volumes."""
    lines = [
        "| task | method | volume | axial | coronal | sagittal | jumps along z | passes | "
        "seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = {k: m.name for k, m in methods(20).items()}
    runs = complete(results, names)
    for task_name, task in TASKS.items():
        for key, name in names.items():
            rows = [r for r in runs if r["task"] == task_name and r["method"] == key]
            if not rows:
                continue

            def mean(what: str, rows: list = rows) -> float:
                return sum(r[what] for r in rows) / len(rows)

            planes = " | ".join(
                f"{mean(f'{p} PSNR'):.2f} / {mean(f'{p} SSIM'):.3f}" for p in PLANES
            )
            alone = " ¹" if methods(1)[key].first else ""
            lines.append(
                f"| {task.title} | {name}{alone} | {mean('volume PSNR'):.2f} | {planes} | "
                f"{mean('roughness'):.2f} | "
                f"{mean('passes'):.0f} | {mean('seconds'):.0f} |"
            )
    some = runs[0]
    ct, mr = (
        len({r["volume"] for r in runs if r["task"] == t}) for t in ("ct-8", "mr-8")
    )
    lines += [
        "",
        f"Stacks of {some['depth']} slices of 128×128: {ct} of patients (OpenKBP, real CT) "
        f"and {mr} of heads (simulated brain MR) whom neither training nor tuning saw; "
        f"simulated measurements: {TASKS['ct-8'].counts:,.0f} photons a ray unless the "
        f"task says another number, or complex noise of σ = {SIGMA_K} in k-space. PSNR "
        "(data range 2000 HU, or 1) over the body of the whole volume, and PSNR / SSIM as "
        "means over the planes of each orientation; jumps along z: mean |x_{k+1} − x_k| "
        "over the truth's; passes of the network for each slice, and seconds for a volume, "
        "in bf16 (float32 on AMD's), on machines that did other work as well. One draw "
        "each; settings searched in as many trials for each method (but half the passes, "
        "which takes those of all), on a patient (a head) "
        f"apart, for each task but {searched()}. "
        "¹ Of the first volume alone. "
        f"{dates(runs)}, {where(runs)}, seed 0. Made by "
        "`python benchmarks/volumes.py run`.",
    ]
    return "\n".join(lines)


def searched() -> str:
    """The tasks that take another's settings, in words."""
    takes = [(t.title, TASKS[t.tuned_on].title) for t in TASKS.values() if t.tuned_on]
    return ", ".join(f"{title} (of {other})" for title, other in takes)


def where(rows: Iterable[Mapping[str, Any]]) -> str:
    """The machines that these were measured on."""
    return " and ".join(dict.fromkeys(row["machine"] for row in rows))


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
        f"`dds3d`, 8 views, float32. {dates(results['depth'].values())}, "
        f"{where(results['depth'].values())}, doing other "
        "work as well. Made by `python benchmarks/volumes.py depth`.",
    ]
    return "\n".join(lines)


def as_a_whole(results: dict[str, Any]) -> str:
    """A whole volume's row for each method."""
    lines = [
        "| a whole volume, 8 views | axial | coronal | sagittal | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = results["whole"]
    for key, row in rows.items():
        planes = " | ".join(
            f"{row[f'{p} PSNR']:.2f} / {row[f'{p} SSIM']:.3f}" for p in PLANES
        )
        name = methods(1)[key].name
        lines.append(f"| {name} | {planes} | {row['seconds']:.0f} |")
    some = next(iter(rows.values()))
    lines += [
        "",
        f"{some['depth']} slices of 128×128 of one held-out patient, PSNR / SSIM as above; "
        f"seconds with {some['threads']} thread(s), beside other work. "
        f"{dates(rows.values())}, {some['machine']}. "
        "Made by `python benchmarks/volumes.py whole`.",
    ]
    return "\n".join(lines)


def by_level(results: dict[str, Any]) -> str:
    """What each prior makes of white noise."""
    rows = results["experts"]["rows"]
    lines = [
        "| σ | " + " | ".join(f"{r['sigma']:g}" for r in rows) + " |",
        "| --- |" + " --- |" * len(rows),
    ]
    for key, name in EXPERTS.items():
        lines.append(
            f"| `{name}` | " + " | ".join(f"{r[key]:.1f}" for r in rows) + " |"
        )
    lines += [
        "",
        f"PSNR in dB of denoising {results['experts']['volumes']} stacks of patients for "
        f"tuning, σ in the network's range (1 is water). {results['experts']['date']}, "
        f"{results['experts']['machine']}. "
        "Made by `python benchmarks/volumes.py experts`.",
    ]
    return "\n".join(lines)


SHOWN = ("fbp", "tv", "pnp", "dds3d", "pnp-both", "pnp-mean")
"""The methods of the picture."""


def picture(path: Path, args: argparse.Namespace, task_name: str = "ct-8") -> None:
    """Three planes of the first volume by some methods, in HU."""
    task = TASKS[task_name]
    [(first, truth, spacing)] = volumes(task, args.data, "test", 1, args.depth)
    body = (mu_to_hu(truth[0, 0]) > -500).any(0)
    rows, columns = (body.any(k).nonzero().flatten() for k in (1, 0))
    cut = (
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1])),
    )
    shown = {"truth": truth}
    for key in SHOWN:
        file = KEPT / f"{task_name} {first} {key}.pt"
        if not file.exists():
            print(f"{path} stays as it is: {file} is not there")
            return
        name = methods(args.steps)[key].name
        shown[name] = torch.load(file, weights_only=True)["x"].float()
    planes = {name: mu_to_hu(x[0, 0])[:, *cut] for name, x in shown.items()}
    png = planes_figure(planes, spacing, (-160.0, 240.0))
    io.replace(path, lambda p: Path(p).write_bytes(png))


def curves(path: Path, results: dict[str, Any]) -> None:
    """Memory and time against depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(results["depth"].values(), key=lambda r: r["depth"])
    rows = [r for r in rows if r["chunk"] == 8]
    depths = [r["depth"] for r in rows]
    drawn, axes = plt.subplots(1, 2, figsize=(8, 3))
    for what, label in (("peak", "all tensors"), ("volume", "one volume")):
        axes[0].plot(depths, [r[what] / 2**20 for r in rows], "o-", label=label)
    axes[0].set(xlabel="slices", ylabel="MiB", ylim=(0, None))
    axes[0].legend(frameon=False)
    axes[1].plot(depths, [r["seconds"] for r in rows], "o-")
    axes[1].set(xlabel="slices", ylabel="seconds a step", ylim=(0, None))
    drawn.tight_layout()
    io.replace(path, lambda p: drawn.savefig(p, dpi=110, format="png"))


def docs(args: argparse.Namespace) -> None:
    """Put the tables between the page's marks, and make its picture."""
    results = load()
    text = table(results)
    if results["depth"]:
        curves(args.docs.with_name(args.docs.stem + "-memory.png"), results)
        text += "\n\n" + memory(results)
        text += "\n\n![Memory and time against depth](volumes-memory.png)"
    if results.get("experts"):
        text += "\n\n" + by_level(results)
    if results.get("whole"):
        text += "\n\n" + as_a_whole(results)
    put(args.docs, text, BEGIN, END)
    picture(args.docs.with_suffix(".png"), args)


PARTS = {
    "experts": experts,
    "tune": tune,
    "run": run,
    "depth": depth,
    "whole": whole,
    "docs": docs,
}


def main() -> None:
    """Tune, run, measure or write."""
    parser = argparse.ArgumentParser(description="Volumes by a prior of slices.")
    parser.add_argument("what", choices=list(PARTS))
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--volumes", type=int, default=2, help="of each kind of data")
    parser.add_argument("--depth", type=int, default=24, help="slices of a volume")
    parser.add_argument("--steps", type=int, default=20, help="passes for each slice")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(methods(1)))
    parser.add_argument("--docs", type=Path, default=Path("docs/volumes.md"))
    args = parser.parse_args()
    PARTS[args.what](args)


if __name__ == "__main__":
    main()
