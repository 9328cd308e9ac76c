"""The latent samplers on held-out photographs: the tables of docs/latent.md.

    python benchmarks/latent.py run
    python benchmarks/latent.py fit
    python benchmarks/latent.py docs

Squares of 64² pixels of scikit-image's photographs, which no bundled prior was trained
on, reduced eightfold, blurred by a Gaussian and by a motion, or with a box missing; noise
of σ = 0.02. Each method's step length, and total variation's strength, is searched by
factors of three on squares of other photographs ($INVSOLVE_DATA/photos/val), until the
best is not at an end. Encoding and decoding the truth is about what a latent sampler can
reach. Methods of many steps run on the first few squares only, on which the others are
scored too. ``fit`` tells how near some come to the data. Each result is kept as it comes;
the same call goes on.
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
from invsolve.priors.weights import read_card
from invsolve.samplers import ldps, psld, reddiff, resample, stsl, tv

BEGIN, END = "<!-- latent: begin -->", "<!-- latent: end -->"
SIGMA_Y = 0.02
PRIOR = "latent-photos-64"
RESULTS = Path(__file__).parent / "results" / "latent.json"
BEFORE = " ¹"
"""What marks a row of earlier weights."""


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
    """A sampler at some length, and what is searched on other photographs.

    Attributes:
        options: of the number that is searched.
        values: what is tried of it first.
    """

    sampler: Callable[..., Tensor]
    steps: int
    options: Callable[[float], dict[str, float]]
    values: tuple[float, ...] = (1.0, 3.0, 10.0)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tuned_at: int = 0
    """Of so many steps; 0 for the same, and for all the images."""
    begun: str = ""
    """The method whose images it begins with, with its own options."""
    squares: int = 2
    """On how many other squares its number is searched: the fast ones' on more."""


def lam(value: float) -> dict[str, float]:
    """The weight of the misfit, or of total variation."""
    return {"lam": value}


def zeta(value: float) -> dict[str, float]:
    """LDPS's step."""
    return {"zeta": value}


def omega(value: float) -> dict[str, float]:
    """PSLD's step, and a tenth of it for the gluing, as published."""
    return {"omega": value, "gamma": value / 10}


FIRST: Mapping[str, Any] = {"trace": "off"}
NEAR: Mapping[str, Any] = {
    "sigma_range": (0.1, 1.0),
    "weight": "calibrated",
    "normalize": "bayes",
    "antithetic": True,
}
FROM_TV: Mapping[str, Any] = {
    "values": (0.1, 0.3, 1.0),
    "begun": "total variation",
    "squares": 8,
}
METHODS: Mapping[str, Method] = {
    "total variation": Method(tv, 200, lam, squares=8),
    "STSL, K = 2": Method(stsl, 50, lam, fixed={"averages": 2}),
    "STSL, K = 2, no trace": Method(stsl, 50, lam, fixed={**FIRST, "averages": 2}),
    "STSL, K = 2, no trace, squared": Method(
        stsl,
        50,
        lam,
        (0.1, 0.3, 1.0),
        {**FIRST, "averages": 2, "loss": "squared"},
        tuned_at=50,
    ),
    "PSLD, 1000": Method(psld, 1000, omega, tuned_at=100),
    "PSLD, 100": Method(psld, 100, omega),
    "ReSample": Method(resample, 100, lam, (3.0, 10.0, 30.0)),
    "LDPS, 100": Method(ldps, 100, zeta),
    "RED-diff, from TV": Method(
        reddiff, 50, lam, **FROM_TV, fixed={**NEAR, "lr": 0.03}
    ),
    "RED-diff, from TV, short steps": Method(
        reddiff, 50, lam, **FROM_TV, fixed={**NEAR, "lr": 0.01}
    ),
    "STSL, K = 5, no trace": Method(stsl, 50, lam, fixed=FIRST),
    "LDPS, 1000": Method(ldps, 1000, zeta, tuned_at=100),
}
MOST = 6
"""How many values are tried."""


def measured(name: str, x: Tensor) -> iv.InverseProblem:
    """The task's measurements of the images."""
    A, noise, g = OPERATORS[name](), GaussianNoise(SIGMA_Y), Generator().manual_seed(1)
    return iv.InverseProblem(noise.sample(A(x), generator=g), A, noise)


def solved(
    name: str,
    method: Method,
    more: Mapping[str, Any],
    prior: LatentPrior,
    x: Tensor,
    steps: int = 0,
) -> iv.Solution | None:
    """A method's images, with some options; None if it diverged."""
    try:
        return iv.solve(
            measured(name, x),
            None if method.sampler is tv else prior,
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


def row_of(x: Tensor, truth: Tensor) -> dict[str, list[Any]]:
    """The scores of images, one by one."""
    x = x.clamp(0, 1)
    pairs = list(zip(x.split(1), truth.split(1), strict=True))
    return {
        "psnr": [psnr(*pair) for pair in pairs],
        "ssim": [float(ssim_of(*pair, 1.0, None).mean()) for pair in pairs],
        "lpips": [perceptual(*pair, 1.0) for pair in pairs],
    }


def beginning(
    name: str, method: Method, rows: Mapping[str, Any], prior: LatentPrior, x: Tensor
) -> dict[str, Tensor]:
    """What a method begins with: another's images, made with what that was given."""
    if not method.begun:
        return {}
    options = rows[method.begun]["options"]
    first = solved(name, METHODS[method.begun], options, prior, x)
    assert first is not None
    return {"init": first.samples[0]}


def tried(
    name: str,
    method: Method,
    prior: LatentPrior,
    tune: Tensor,
    begun: Mapping[str, Tensor],
) -> dict[float, float]:
    """The PSNR of each value on other photographs; −∞ where it diverged.

    Values are added, by factors of three, while the best is at an end.
    """
    steps = method.tuned_at or method.steps
    trials: dict[float, float] = {}
    waiting = list(method.values)
    while waiting and len(trials) < MOST:
        value = waiting.pop(0)
        options = {**method.options(value), **begun}
        got = solved(name, method, options, prior, tune, steps)
        trials[value] = float("-inf") if got is None else psnr(got.samples[0], tune)
        if not waiting:
            best = max(trials, key=lambda v: trials[v])
            if best == min(trials):
                waiting = [round(best / 3, 3)]
            elif best == max(trials):
                waiting = [round(best * 3, 3)]
    return dict(sorted(trials.items()))


def run(args: argparse.Namespace) -> None:
    """Make what is not there yet."""
    found: dict[str, Any] = read(args.results)
    sizes = {"images": args.images, "few": args.few}
    if any(found.get(k, n) != n for k, n in sizes.items()):
        raise SystemExit(
            f"{args.results} is of other sizes: delete it, or give its own"
        )
    prior = latent_prior()
    test = photos(args.data, "test", args.images)
    now = weights()
    if now not in found.setdefault("coded", {}):
        with torch.no_grad():
            coded = torch.cat([prior.decode(prior.encode(v)) for v in test.split(8)])
        found["coded"][now] = row_of(coded, test)
        found |= sizes
        save(found, args.results)
    pairs = [(m, t) for m in args.methods for t in OPERATORS]
    for label, name in tqdm(pairs, desc="latent samplers"):
        rows, method = found.setdefault(name, {}), METHODS[label]
        asked = "" if method.sampler is tv else now
        there = rows.get(label, {"weights": None})
        if there["weights"] == asked and there["squares"] == method.squares:
            continue
        tune = photos(args.data, "tune", method.squares)
        begun = beginning(name, method, rows, prior, tune)
        trials = tried(name, method, prior, tune, begun)
        best = method.options(max(trials, key=lambda v: trials[v]))
        images = test[: args.few] if method.tuned_at else test
        begun = beginning(name, method, rows, prior, images)
        got = solved(name, method, {**best, **begun}, prior, images)
        if got is None:
            continue
        stats, n = got.stats, len(images)
        rows[label] = {
            **row_of(got.samples[0], images),
            "levels": method.steps,
            "forwards": stats.network_forwards / n,
            "backwards": stats.network_backwards / n,
            "seconds": stats.seconds / n,
            "options": best,
            "trials": {str(k): v for k, v in trials.items()},
            "squares": method.squares,
            "date": today(),
            "machine": machine(),
            "weights": asked,
        }
        save(found, args.results)


def weights() -> str:
    """The first digits of the bundled weights' sum."""
    return read_card(PRIOR)[0]["sha256"][:8]


def today() -> str:
    """A result's date."""
    return datetime.now(UTC).date().isoformat()


FITTED = ("STSL, K = 2, no trace", "PSLD, 100", "ReSample")
FEW = 4


def fit(args: argparse.Namespace) -> None:
    """⟨(y − Ax)²⟩/σ² of the truth, of its code, and of methods with their options."""
    found = read(args.results)
    prior = latent_prior()
    x = photos(args.data, "test", args.images)[:FEW]
    with torch.no_grad():
        coded = prior.decode(prior.encode(x))
    for name in OPERATORS:
        problem = measured(name, x)
        images = {"truth": x, "coded truth": coded}
        for label in FITTED:
            if label in found[name]:
                options = found[name][label]["options"]
                got = solved(name, METHODS[label], options, prior, x)
                assert got is not None
                images[label] = got.samples[0]
        found.setdefault("fit", {})[name] = {
            label: float((problem.y - problem.operator(v)).square().mean() / SIGMA_Y**2)
            for label, v in images.items()
        }
        found["fit of"] = weights()
        save(found, args.results)


def latent_prior() -> LatentPrior:
    """The bundled one, its autoencoder in bfloat16."""
    prior = iv.priors.load(PRIOR)
    assert isinstance(prior, LatentPrior)
    return LatentPrior(prior.prior, prior.autoencoder, prior.map, bf16_coding=True)


def save(found: Mapping[str, Any], path: Path) -> None:
    """All that is known so far."""
    text = json.dumps(found, indent=1) + "\n"
    io.replace(path, lambda p: Path(p).write_text(text))


def mean(row: Mapping[str, Any], key: str, n: int, digits: int) -> str:
    """Of the first so many images; a dash where there are fewer, or no scores."""
    values = row[key][:n]
    if len(values) < n or None in values:
        return "–"
    return f"{sum(values) / n:.{digits}f}"


def docs(args: argparse.Namespace) -> None:
    """Put the table between the page's marks."""
    found = read(args.results)
    n, few = found["images"], found["few"]
    scores = (("psnr", "PSNR", 2), ("ssim", "SSIM", 3), ("lpips", "LPIPS-type", 3))
    columns = [(key, k, digits) for k in (n, few) for key, _, digits in scores]
    heads = [f"{word}, {k}" for k in (n, few) for _, word, _ in scores]
    head = ["task", "method", *heads, "forward", "backward", "seconds", "chosen"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in OPERATORS:
        for label in METHODS:
            row = found.get(name, {}).get(label)
            if row is None:
                continue
            mark = "" if row["weights"] in ("", weights()) else BEFORE
            options = ", ".join(f"{k} = {v:g}" for k, v in row["options"].items())
            cells = [name, label + mark, *(mean(row, *column) for column in columns)]
            cells += [f"{row[k]:.0f}" for k in ("forwards", "backwards")]
            lines.append(f"| {' | '.join(cells)} | {row['seconds']:.1f} | {options} |")
    for made_by, row in found["coded"].items():
        whole = " | ".join(mean(row, *column) for column in columns)
        lines.append(
            f"| all | *coded and decoded truth, {made_by}* | {whole} | | | | |"
        )
    lines += [
        "",
        f"PSNR in dB; mean scores of {n} squares, and of the first {few} of them, to which "
        "the methods of 1000 steps were put alone; one draw each. STSL has 50 levels. "
        f"Options were searched by factors of three on {searched()}, those of methods of "
        "1000 steps with 100. Passes of the latent network and seconds are for one image, "
        "network and autoencoder in bf16, on a machine that did other work as well, which "
        "has no bf16 if it is AMD's; what *from TV* begins with is not counted; "
        f"{made(found)}, seed 0. Made by `python benchmarks/latent.py run --images {n} "
        f"--few {few}`. ¹ With earlier weights.",
    ]
    lines += beside(found)
    if "fit" in found:
        names = ["truth", "coded truth", *FITTED]
        mark = "" if found["fit of"] == weights() else BEFORE
        head = f"⟨(y − Ax)²⟩/σ², first {FEW} squares{mark}"
        lines += ["", f"| {head} | {' | '.join(names)} |"]
        lines += ["|" + " --- |" * (1 + len(names))]
        for task, row in found["fit"].items():
            cells = [f"{row[k]:.2f}" if k in row else "–" for k in names]
            lines.append(f"| {task} | {' | '.join(cells)} |")
    put(args.docs, "\n".join(lines), BEGIN, END)


def searched() -> str:
    """On how many squares, in words."""
    least = min(method.squares for method in METHODS.values())
    more = [f"{k} on {m.squares}" for k, m in METHODS.items() if m.squares > least]
    return f"{least} other squares ({', '.join(more)})"


def beside(found: Mapping[str, Any]) -> list[str]:
    """Of methods that begin with another's images: by how much they lead these."""
    lines = []
    for label, method in METHODS.items():
        for name in OPERATORS:
            row = found[name].get(label) if method.begun else None
            if row is None:
                continue
            pairs = zip(row["psnr"], found[name][method.begun]["psnr"], strict=True)
            gaps = torch.tensor([a - b for a, b in pairs])
            parts = gaps.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
            cells = " | ".join(f"{v:+.2f}" for v in parts.tolist())
            lines.append(
                f"| {label}, {name} | {int((gaps > 0).sum())} of {len(gaps)} | {cells} |"
            )
    head = "PSNR over what it begins with, in dB"
    parts = "least | first quarter | median | third quarter | most"
    return ["", f"| {head} | squares ahead | {parts} |", "| --- " * 7 + "|", *lines]


def made(found: Mapping[str, Any]) -> str:
    """When, where and with which weights the methods ran."""
    runs: dict[tuple[str, str, str], list[str]] = {}
    for name in OPERATORS:
        for label, row in found.get(name, {}).items():
            of = f"weights {row['weights']}" if row["weights"] else "no weights"
            names = runs.setdefault((row["date"], row["machine"], of), [])
            names += [] if label in names else [label]
    return "; ".join(f"{', '.join(names)}: {', '.join(r)}" for r, names in runs.items())


def main() -> None:
    """Run, or write the page's table."""
    parser = argparse.ArgumentParser(description="Latent samplers on photographs.")
    parser.add_argument("what", choices=["run", "fit", "docs"])
    data = Path(os.environ.get("INVSOLVE_DATA", "."))
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=list(METHODS)
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=Path("docs/latent.md"))
    args = parser.parse_args()
    {"run": run, "fit": fit, "docs": docs}[args.what](args)


if __name__ == "__main__":
    main()
