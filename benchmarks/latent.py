"""The latent samplers on held-out photographs: the tables of docs/latent.md.

    python benchmarks/latent.py run
    python benchmarks/latent.py docs

Squares of 64² pixels of scikit-image's photographs, which no bundled prior was trained
on, reduced eightfold, blurred by a Gaussian and by a motion, or with a box missing; noise
of σ = 0.02. Each method's step length is chosen among four on squares of other
photographs ($INVSOLVE_DATA/photos/val). Encoding and decoding the truth is about what a
latent sampler can reach. Each result is kept as it comes; the same call goes on.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from ct_headneck import machine, put
from quality import perceptual, psnr_of, read, ssim_of
from quality_tasks import photos
from torch import Generator, Tensor
from tqdm import tqdm

import invsolve as iv
from invsolve import io
from invsolve.operators import Blur, Downsample, GaussianNoise, LinearOperator, Mask
from invsolve.priors.latent import LatentPrior
from invsolve.samplers import ldps, psld, resample, stsl

BEGIN, END = "<!-- latent: begin -->", "<!-- latent: end -->"
SIGMA_Y = 0.02
PRIOR = "latent-photos-64"
RESULTS = Path(__file__).parent / "results" / "latent.json"


def motion(length: int) -> Tensor:
    """A diagonal streak of so many pixels."""
    return torch.eye(length) / length


def box() -> Tensor:
    """A quarter of the image missing, in its middle."""
    seen = torch.ones(1, 64, 64)
    seen[:, 16:48, 16:48] = 0
    return seen


OPERATORS: Mapping[str, Callable[[], LinearOperator]] = {
    "SR ×8": lambda: Downsample(8, (64, 64)),
    "Gaussian blur": lambda: Blur.gaussian(1.5, (64, 64)),
    "motion blur": lambda: Blur.from_kernel(motion(9), (64, 64)),
    "box": lambda: Mask(box()),
}


@dataclass(frozen=True)
class Method:
    """A sampler at some length, and the options that are tried on other photographs."""

    sampler: Callable[..., Tensor]
    steps: int
    grid: tuple[Mapping[str, Any], ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tuned_at: int = 0
    """Of so many steps; 0 for the same."""


LAMS = tuple({"lam": v} for v in (1.0, 3.0, 10.0, 30.0))
OMEGAS = tuple({"omega": v, "gamma": v / 10} for v in (1.0, 3.0, 10.0, 30.0))
ZETAS = tuple({"zeta": v} for v in (1.0, 3.0, 10.0, 30.0))
WEIGHTS = tuple({"lam": v} for v in (3.0, 10.0, 30.0, 100.0))
FIRST: Mapping[str, Any] = {"trace": "off"}
METHODS: Mapping[str, Method] = {
    "STSL, K = 2": Method(stsl, 50, LAMS, {"averages": 2}),
    "STSL, K = 2, no trace": Method(stsl, 50, LAMS, {**FIRST, "averages": 2}),
    "STSL, K = 5, no trace": Method(stsl, 50, LAMS, FIRST),
    "PSLD, 100": Method(psld, 100, OMEGAS),
    "LDPS, 100": Method(ldps, 100, ZETAS),
    "ReSample": Method(resample, 100, WEIGHTS),
    "PSLD, 1000": Method(psld, 1000, OMEGAS, tuned_at=250),
}


def measured(name: str, x: Tensor) -> iv.InverseProblem:
    """The task's measurements of the images."""
    A, noise, g = OPERATORS[name](), GaussianNoise(SIGMA_Y), Generator().manual_seed(1)
    return iv.InverseProblem(noise.sample(A(x), generator=g), A, noise)


def solved(
    name: str, method: Method, more: Any, prior: LatentPrior, x: Tensor, steps: int = 0
) -> iv.Solution | None:
    """A method's images, with some options; None if it diverged."""
    try:
        return iv.solve(
            measured(name, x),
            prior,
            method.sampler,
            steps=steps or method.steps,
            generator=Generator().manual_seed(0),
            precision="bf16",
            **method.fixed,
            **more,
        )
    except ValueError:
        return None


def psnr(x: Tensor, truth: Tensor) -> float:
    """The mean over images in [0, 1], all channels of one as one."""
    return float(psnr_of(x.clamp(0, 1), truth, 1.0, None).mean())


def row_of(x: Tensor, truth: Tensor) -> dict[str, Any]:
    """The scores of images."""
    x = x.clamp(0, 1)
    return {
        "psnr": psnr(x, truth),
        "ssim": float(ssim_of(x, truth, 1.0, None).mean()),
        "lpips": perceptual(x, truth, 1.0),
    }


def chosen(name: str, method: Method, prior: LatentPrior, tune: Tensor) -> Any:
    """The options that give the best PSNR on other photographs."""
    steps = method.tuned_at or method.steps
    trials = []
    for more in method.grid:
        got = solved(name, method, more, prior, tune, steps)
        trials.append(float("-inf") if got is None else psnr(got.samples[0], tune))
    return method.grid[max(range(len(trials)), key=trials.__getitem__)]


def run(args: argparse.Namespace) -> None:
    """Make what is not there yet."""
    found: dict[str, Any] = read(RESULTS)
    prior = iv.priors.load(PRIOR)
    assert isinstance(prior, LatentPrior)
    test = photos(args.data, "test", args.images)
    tune = photos(args.data, "tune", args.tune)
    pairs = [(m, t) for t in OPERATORS for m in METHODS]
    for label, name in tqdm(pairs, desc="latent samplers"):
        rows, method = found.setdefault(name, {}), METHODS[label]
        if label in rows:
            continue
        best = chosen(name, method, prior, tune)
        got = solved(name, method, best, prior, test)
        if got is None:
            continue
        stats, n = got.stats, len(test)
        rows[label] = {
            **row_of(got.samples[0], test),
            "levels": method.steps,
            "forwards": stats.network_forwards / n,
            "backwards": stats.network_backwards / n,
            "seconds": stats.seconds / n,
            "options": dict(best),
        }
        found |= {"machine": machine(), "images": n, "tune": len(tune)}
        found["date"] = datetime.now(UTC).date().isoformat()
        save(found)
    if "coded" not in found:
        with torch.no_grad():
            coded = torch.cat([prior.decode(prior.encode(v)) for v in test.split(8)])
        save({**found, "coded": row_of(coded, test)})


def save(found: Mapping[str, Any]) -> None:
    """All that is known so far."""
    text = json.dumps(found, indent=1) + "\n"
    io.replace(RESULTS, lambda p: Path(p).write_text(text))


def docs(args: argparse.Namespace) -> None:
    """Put the table between the page's marks."""
    found = read(RESULTS)
    head = (
        "| task | method | levels | PSNR (dB) | SSIM | LPIPS-type | forward passes | "
        "backward | seconds | chosen |"
    )
    lines = [head, "| --- " * 10 + "|"]
    for name in OPERATORS:
        for label in METHODS:
            row = found.get(name, {}).get(label)
            if row is None:
                continue
            options = ", ".join(f"{k} = {v:g}" for k, v in row["options"].items())
            lpips = "–" if row["lpips"] is None else f"{row['lpips']:.3f}"
            lines.append(
                f"| {name} | {label} | {row['levels']} | {row['psnr']:.2f} | "
                f"{row['ssim']:.3f} | {lpips} | {row['forwards']:.0f} | "
                f"{row['backwards']:.0f} | {row['seconds']:.1f} | {options} |"
            )
    coded = found["coded"]
    lines += [
        "",
        f"{found['images']} squares, one draw each; the autoencoder alone: "
        f"{coded['psnr']:.2f} dB, SSIM {coded['ssim']:.3f}. Options were chosen among four "
        f"on {found['tune']} others (of PSLD with 1000 steps, with 250). Passes of the "
        "latent network and seconds for one image, network in bf16, on a machine that "
        f"did other work as well; {found['date']}, {found['machine']}, seed 0. Made by "
        "`python benchmarks/latent.py run`.",
    ]
    put(args.docs, "\n".join(lines), BEGIN, END)


def main() -> None:
    """Run, or write the page's table."""
    parser = argparse.ArgumentParser(description="Latent samplers on photographs.")
    parser.add_argument("what", choices=["run", "docs"])
    data = Path(os.environ.get("INVSOLVE_DATA", "."))
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--tune", type=int, default=2)
    parser.add_argument("--docs", type=Path, default=Path("docs/latent.md"))
    args = parser.parse_args()
    {"run": run, "docs": docs}[args.what](args)


if __name__ == "__main__":
    main()
