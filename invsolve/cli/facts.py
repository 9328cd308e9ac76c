"""What is told of a run, while it runs and afterwards."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from invsolve import operators as ops
from invsolve.priors.weights import sha256
from invsolve.problem import InverseProblem
from invsolve.report import Report, Result, machine, versions

from .measured import FACTOR


@contextmanager
def progress_bar(
    what: str, loops: int, device: torch.device, *, shown: bool = True
) -> Iterator[Callable[[Iterable], Iterable]]:
    """One progress bar on stderr over all passes of a loop, after a second's work."""
    from tqdm import tqdm

    passes = 1 if device.type == "cuda" else loops
    with tqdm(desc=what, unit="step", delay=1, leave=False, disable=not shown) as bar:

        def progress(loop: Iterable) -> Iterator[Any]:
            steps = list(loop)
            # A sampler may have several loops, one after another.
            bar.total = max(passes * len(steps), bar.n + len(steps))
            for step in steps:
                yield step
                bar.update()

        yield progress


def record_of(
    report: Report,
    settings: Mapping[str, Any],
    seed: int,
    device: torch.device,
    source: Path,
) -> dict[str, Any]:
    """What a script wants to know of a run."""
    from dataclasses import asdict

    def result(r: Result) -> dict[str, Any]:
        metrics = {}
        if r.psnr is not None and r.ssim is not None:
            # JSON has no infinity, which is what a perfect image scores.
            db = [v if math.isfinite(v) else None for v in r.psnr.tolist()]
            metrics = {"psnr_db": db, "ssim": r.ssim.tolist()}
        return {
            "method": r.name,
            "kind": r.kind,
            "samples": r.samples,
            "options": dict(r.settings),
            "metrics": metrics,
            "stats": asdict(r.stats),
        }

    return {
        "settings": dict(settings),
        "seed": seed,
        "unit": report.unit,
        "results": [result(r) for r in report.results],
        "input": {"name": source.name, "sha256": sha256(source)},
        "versions": versions(),
        "device": str(device),
        "machine": machine(device),
    }


def measured_facts(problem: InverseProblem, *, simulated: bool) -> dict[str, str]:
    """What was measured, and how, for a report."""
    A, noise = problem.operator, problem.noise
    facts = {"operator": type(A).__name__}
    if isinstance(A, ops.ParallelBeam):
        degrees = math.degrees(float(A.angles.max() - A.angles.min()))
        facts = {
            "operator": f"parallel beam, {len(A.angles)} views over "
            f"{degrees * len(A.angles) / max(1, len(A.angles) - 1):.0f}°",
            "detector": f"{A.detectors} elements of {A.detector_mm:.3g} mm",
            "image": f"{A.shape[1]}×{A.shape[0]} pixels of {A.pixel_mm:.3g} mm",
        }
        if A.oversample > 1:
            facts["image"] += f", for the rays {A.oversample} times finer"
        if A.rays > 1:
            facts["detector"] += f", {A.rays} rays each"
    facts["noise"] = str(noise)
    if isinstance(noise, ops.TransmissionNoise):
        facts["noise"] = f"Poisson, {noise.counts:,.0f} photons through air"
        if noise.floor:
            facts["noise"] += f"; the model itself is taken to err by {noise.floor:g}"
    if isinstance(noise, ops.GaussianNoise):
        facts["noise"] = f"Gaussian, σ = {noise.sigma:.3g}"
    facts["simulated"] = "yes" if simulated else "no"
    if simulated and isinstance(A, ops.ParallelBeam):
        facts["simulated"] = f"yes, on pixels and rays {FACTOR} times finer than solved"
    return facts


def run_facts(seed: int, device: torch.device) -> dict[str, str]:
    """Seed, machine and versions, for a report."""
    found = versions()
    return {
        "seed": str(seed),
        "machine": machine(device),
        "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
    }
