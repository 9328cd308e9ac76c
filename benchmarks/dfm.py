"""Posterior samples learnt from measurements alone: the tables of docs/dfm.md.

    python benchmarks/dfm.py run --kind ct --prior runs/dfm-ct/dfm-ct-32.json --out runs/dfm
    python benchmarks/dfm.py exact
    python benchmarks/dfm.py operator
    python benchmarks/dfm.py docs

``exact``: a Gaussian of six coordinates, two measured, where all is known.
CT: slices of OpenKBP's validation patients (real CT, the first nine for tuning, the rest
reported), each from 8 of 48 views: random ones, as in an exam, or with ``--even`` evenly
spread; measured on a finer grid. Brain MR: simulated heads that no prior saw, 8 of 64
columns of k-space with the middle four. Nothing but the oracle was trained on images. Each
result is kept as it comes; the same call goes on.
"""

import argparse
import json
import os
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import torch
from ct_headneck import machine, put
from dfm_baselines import Ambient, Oracle, Setting, setting, trained
from make_exams import (
    CT_SIGMA,
    MODEL,
    MR_SIGMA,
    SLICES,
    VIEWS,
    ct_beam,
    ct_sinograms,
    families,
    parts,
)
from quality import read
from torch import Generator, Tensor
from tqdm import tqdm

import invsolve as iv
from invsolve import io, samplers
from invsolve.forward_prior import GaussianForwardPrior, NetworkForwardPrior
from invsolve.linalg import cg
from invsolve.metrics import body_mask, psnr, ssim
from invsolve.operators import GaussianNoise
from invsolve.operators.ct import Window
from invsolve.operators.parametric import Parametric, Rows
from invsolve.priors.weights import read_card
from invsolve.samplers.solvers import Multistep
from invsolve.units import MU_WATER

RESULTS = Path(__file__).parent / "results" / "dfm.json"
IMAGES, TUNE, DRAWS, STEPS = 32, 8, 16, 30
SEEN = 8
"""Views that are given."""
RANGE = {"ct": 2 * MU_WATER, "mr": 1.0}
NONE = {"ct": "FBP", "mr": "zero-filled"}
LAMS = {
    "ct": [k / MU_WATER for k in (0.5, 1.0, 2.0, 4.0, 8.0)],
    "mr": [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0],
}


@dataclass(frozen=True, eq=False)
class Test:
    """Images, what was measured of them, and where they count.

    Attributes:
        family: of the operators.
        x: the images.
        rows: which were acquired, of each image or of all.
        y: the measurements, with noise of ``sigma``.
        region: where pixels are scored.
    """

    family: Parametric
    x: Tensor
    rows: Rows
    y: Tensor
    sigma: float
    region: Tensor

    @property
    def problem(self) -> iv.InverseProblem:
        """All images at once."""
        return iv.InverseProblem(
            self.y, self.family(self.rows), GaussianNoise(self.sigma)
        )


def tests(kind: str, data: Path, part: str, n: int, *, even: bool = False) -> Test:
    """Of patients of a part, evenly chosen."""
    x = SLICES[kind](parts(data, kind)[part])
    x = x[torch.linspace(0, len(x) - 1, n).long()]
    family = families()[kind]
    rows = torch.zeros(1, *family.grid, dtype=torch.bool)
    generator = Generator().manual_seed(3)
    if kind == "ct":
        if even:
            rows[:, :: VIEWS // SEEN] = True
        else:
            all_ = torch.ones(n, *family.grid, dtype=torch.bool)
            (rows,) = family.split(all_, torch.full((n, 1), SEEN), generator=generator)
        sigma, z = CT_SIGMA, ct_sinograms(x)
        region = body_mask(x)
    else:
        rows[:, 30:34] = True
        others = torch.randperm(60, generator=generator)[:4]
        rows[:, others + 4 * (others >= 30)] = True
        sigma, z, region = MR_SIGMA, family.full.apply(x), x > 0.05
    y = family.restrict_data(GaussianNoise(sigma).sample(z, generator=generator), rows)
    return Test(family, x, rows, y, sigma, region)


# --- methods: (test, generator) to draws, and how many passes of a network each took


@dataclass(frozen=True, eq=False)
class Method:
    """How draws are made; a point estimate is one draw."""

    make: Callable[[Test, Generator, int], tuple[Tensor, float]]
    draws: int = 1


def solved(
    test: Test, prior: Any, sampler: Any, g: Generator, n: int, **more: Any
) -> Any:
    """By the package's own call."""
    out = iv.solve(test.problem, prior, sampler, samples=n, generator=g, **more)
    return out.samples, out.stats.network_forwards / (n * len(test.x))


@dataclass
class Choice:
    """Settings by the best score on other data.

    Args:
        kept: what was found, by name, among the results.
        seconds: of the processor that it took, which are no method's own.
    """

    kept: dict[str, Any]
    seconds: float = 0.0

    def __call__(
        self, name: str, grid: Sequence[Any], score: Callable[[Any], float]
    ) -> Any:
        """The value of the best score, found now or before."""
        if name not in self.kept:
            before, clock = self.seconds, time.process_time()
            scores = [score(v) for v in grid]
            best = max(range(len(grid)), key=scores.__getitem__)
            self.kept[name] = {"value": grid[best], "grid": grid, "scores": scores}
            self.seconds = before + time.process_time() - clock
        return self.kept[name]["value"]


def methods(
    kind: str,
    data: Path,
    prior: NetworkForwardPrior,
    out: Path,
    choice: Choice,
    *,
    even: bool = False,
) -> Mapping[str, Method]:
    """All that are compared, by name."""
    at = setting(kind, data)
    tuning = cache(partial(tests, kind, data, "val", TUNE, even=even))

    def tuned(name: str, grid: list[Any], run: Callable[[Test, Any], Tensor]) -> Any:
        """The setting of the best PSNR on other patients."""
        return choice(
            name, grid, lambda v: float(_psnr(kind, run(tuning(), v), tuning()).mean())
        )

    def classical(test: Test, g: Generator, n: int) -> tuple[Tensor, float]:
        if kind == "mr":
            return test.family.linear.adjoint(test.y)[None], 0

        def by(test: Test, window: Window) -> Tensor:
            found, noise = [], GaussianNoise(test.sigma)
            for y, seen in zip(test.y, test.rows.expand(len(test.y), -1), strict=True):
                beam = replace(ct_beam(), angles=ct_beam().angles[seen])
                problem = iv.InverseProblem(y[None, :, seen], beam, noise)
                found.append(samplers.fbp(problem, window=window))
            return torch.cat(found)

        return by(test, tuned("FBP", list(get_args(Window)), by))[None], 0

    def tv(test: Test, g: Generator, n: int) -> tuple[Tensor, float]:
        def by(test: Test, lam: float) -> Tensor:
            more = {"steps": 300, "nonnegative": True, "lam": lam}
            return iv.solve(
                test.problem, None, samplers.tv, generator=g, **more
            ).samples[0]

        return by(test, tuned("TV", LAMS[kind], by))[None], 0

    def point(name: str) -> Method:
        def make(test: Test, g: Generator, n: int) -> tuple[Tensor, float]:
            model, _ = trained(name, kind, at, out)
            return guess(model, test)[None], 1

        return Method(make)

    def oracle(test: Test, g: Generator, n: int) -> tuple[Tensor, float]:
        model, spread = trained("supervised", kind, at, out)
        y = model.whitened(test.y)
        rows = test.rows.expand(len(y), *test.rows.shape[1:])
        some = list(zip(y.split(16), rows.split(16), strict=True))
        draws = [
            torch.cat([Oracle(model, spread).sample(*v, STEPS, g) for v in some])
            for _ in range(n)
        ]
        return model.gain * torch.stack(draws), STEPS + 1

    def ambient(test: Test, g: Generator, n: int) -> tuple[Tensor, float]:
        prior = ambient_prior(trained("ambient", kind, at, out)[0], at)

        def by(test: Test, zeta: float, n: int = 1) -> Any:
            more = {"steps": STEPS, "lam": zeta}
            return solved(test, prior, samplers.diffpir, g, n, **more)

        grid = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
        lam = tuned("Ambient", grid, lambda test, v: by(test, v)[0][0])
        return by(test, lam, n)

    def dfm(**more: Any) -> Method:
        def make(test: Test, g: Generator, n: int) -> tuple[Tensor, float]:
            how = {"steps": STEPS, "solver": Multistep(2), "precision": "bf16", **more}
            return solved(test, prior, samplers.dfm, g, n, **how)

        return Method(make, DRAWS)

    def own(test: Test, g: Generator, n: int) -> tuple[Tensor, float]:
        return guess(prior, test)[None], 1

    return {
        NONE[kind]: Method(classical),
        "TV": Method(tv),
        "SSDU": point("ssdu"),
        "equivariant imaging": point("ei"),
        "DFM's guess": Method(own),
        "supervised mean (oracle)": point("supervised"),
        "Ambient prior, DiffPIR": Method(ambient, DRAWS),
        "DFM, one target": dfm(),
        "DFM, one target, closing draw": dfm(closing="gaussian"),
        "DFM, three targets": dfm(targets=3),
        "DFM, three targets, closing draw": dfm(targets=3, closing="gaussian"),
        "supervised sampler (oracle)": Method(oracle, DRAWS),
    }


def ambient_prior(model: NetworkForwardPrior, at: Setting) -> iv.priors.Prior:
    """The Ambient prior with rows spread evenly, as many as it was trained with."""
    family, split = model.family, at.config.split
    n = split.context[1] + split.target
    rows = torch.zeros(1, *family.grid, dtype=torch.bool)
    if split.centre:
        kept = split.kept(family.grid)
        assert kept is not None
        rows[:, kept] = True
    free = (~rows[0]).nonzero().flatten()
    rows[:, free[torch.linspace(0, len(free) - 1, n - int(rows.sum())).long()]] = True
    return Ambient(model, rows)


@torch.no_grad()
def guess(model: NetworkForwardPrior, test: Test) -> Tensor:
    """The mean that a network gives, in the image's unit."""
    return model.gain * model.guess(model.whitened(test.y), test.rows)


# --- scores


def _psnr(kind: str, x: Tensor, test: Test) -> Tensor:
    return psnr(x, test.x, RANGE[kind], test.region)


def held(draws: Tensor, x: Tensor) -> Tensor:
    """Where x lies within the interval of 90 % for one more draw.

    Were draws Gaussian it is mean ± t s √(1 + 1/n).
    """
    from scipy.stats import t

    n = len(draws)
    wide = float(t.ppf(0.95, n - 1)) * draws.std(0) * (1 + 1 / n) ** 0.5
    return (x - draws.mean(0)).abs() <= wide


def scores(kind: str, draws: Tensor, test: Test) -> dict[str, Any]:
    """Of one draw and of the mean; and whether the truth is as likely as a draw."""
    one, mean, n = draws[0], draws.mean(0), len(draws)
    seen = test.family.spread(test.rows).expand(test.y.shape)
    misfit = ((test.problem.linear.apply(one) - test.y)[seen]).abs().square().mean()
    row: dict[str, Any] = {
        "psnr": _psnr(kind, one, test).tolist(),
        "ssim": ssim(one, test.x, RANGE[kind], test.region).tolist(),
        "psnr_of_mean": _psnr(kind, mean, test).tolist(),
        "misfit": float(misfit) / (test.sigma**2 * (1 + test.y.is_complex())),
    }
    if n > 1:
        inside = held(draws, test.x)[test.region]
        row["coverage"] = float(inside.float().mean())
        # The energy form of the continuous ranked probability score, without its bias.
        ranked = draws.sort(0).values
        at = torch.arange(n).reshape(-1, *(1,) * (draws.ndim - 1))
        among = (2 * at - n + 1).mul(ranked).sum(0) / (n * (n - 1))
        crps = (draws - test.x).abs().mean(0) - among
        row["crps"] = float(crps[test.region].mean()) / RANGE[kind]
    else:
        row["crps"] = float((one - test.x).abs()[test.region].mean()) / RANGE[kind]
    return row


def run(args: argparse.Namespace) -> None:
    """Make what is not there yet."""
    everything: dict[str, Any] = read(args.results)
    found = everything.setdefault(table_of(args), {"rows": {}})
    prior = iv.priors.load(args.prior)
    assert isinstance(prior, NetworkForwardPrior)
    test = tests(args.kind, args.data, "test", args.images, even=args.even)
    choice = Choice(found.setdefault("chosen", {}))
    todo = methods(args.kind, args.data, prior, args.out, choice, even=args.even)
    names = args.names or list(todo)
    if unknown := set(names) - set(todo):
        raise SystemExit(f"no method {unknown}: choose from {list(todo)}")
    pictures: dict[str, Tensor] = {}
    for name, method in tqdm(todo.items(), desc=table_of(args)):
        if name in found["rows"] or name not in names:
            continue
        clock, aside = time.process_time(), choice.seconds
        try:
            with torch.no_grad():
                draws, passes = method.make(
                    test, Generator().manual_seed(args.seed), method.draws
                )
        except FileNotFoundError as error:
            tqdm.write(f"{name} is left out: {error}")
            continue
        spent = time.process_time() - clock - (choice.seconds - aside)
        seconds = spent / (method.draws * len(test.x))
        found["rows"][name] = {
            **scores(args.kind, draws, test),
            "draws": method.draws,
            "passes": passes,
            "seconds": seconds,
        }
        pictures[name] = draws[:, ::8].half()
        keep = args.out / f"pictures-{table_of(args)}.pt"
        old = torch.load(keep, weights_only=True) if keep.exists() else {}
        torch.save({**old, **pictures, "truth": test.x[::8]}, keep)
        card = read_card(args.prior)[0]
        found |= {
            "rows": {k: found["rows"][k] for k in todo if k in found["rows"]},
            "images": args.images,
            "exams_seen": card["training"]["exams_seen"],
            "exams": card["training"]["exams"],
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
        }
        text = json.dumps(everything, indent=1) + "\n"
        io.replace(args.results, lambda p: Path(p).write_text(text))  # noqa: B023


def table_of(args: argparse.Namespace) -> str:
    """The name of its results, and of its table."""
    return args.kind + "-even" * args.even


EXACT = (10, 20, 50, 100, 250)
"""Steps for each target."""
MANY = 40_000


def exact(args: argparse.Namespace) -> None:
    """The relative error of the draws' covariance, by steps and by what is drawn."""
    family = Parametric.pixels((1, 1, 6))
    L = torch.randn(6, 6, generator=Generator().manual_seed(3), dtype=torch.float64)
    cov = L @ L.T / 6 + 0.1 * torch.eye(6)
    mean = torch.zeros(1, 1, 6, dtype=torch.float64)

    def rows(*at: int) -> Rows:
        chosen = torch.zeros(1, 1, 6, dtype=torch.bool)
        chosen[..., list(at)] = True
        return chosen

    C, T1, T2 = rows(0, 1), rows(2, 3), rows(4, 5)
    lines = []
    for sigma in (0.02, 0.3):
        prior = GaussianForwardPrior(family, mean, cov, sigma=sigma, target_rows=2)

        def given(seen: Rows, sigma: float = sigma) -> Tensor:
            A = torch.eye(6, dtype=torch.float64)[seen.flatten()]
            return torch.linalg.inv(torch.linalg.inv(cov) + A.T @ A / sigma**2)

        y = family.restrict_data(torch.ones(1, 1, 1, 6, dtype=torch.float64), C)
        noise = GaussianNoise(sigma)
        problem = iv.InverseProblem(y.expand(MANY, -1, -1, -1), family(C), noise)
        one = {"targets": [T1[0]]}
        two = {"targets": [T1[0], T2[0]], "closing": "gaussian"}
        cases = [
            ("one target against Cov(S given C)", one, given(C)),
            ("one target against its law", one, given(C) - given(C | T1)),
            (
                "the same by DPM-Solver++(2M)",
                {**one, "solver": Multistep(2)},
                given(C) - given(C | T1),
            ),
            ("two targets and the closing draw against Cov(S given C)", two, given(C)),
        ]
        for name, how, law in cases:
            errors = []
            for steps in EXACT:
                g = Generator().manual_seed(args.seed)
                x = samplers.dfm(problem, prior, steps=steps, generator=g, **how)
                off = x.flatten(1).T.cov() - law
                errors.append(f"{100 * float(off.norm() / law.norm()):.1f} %")
            lines.append(f"| {sigma:g} | {name} | {' | '.join(errors)} |")
    steps = " | ".join(f"{n} steps" for n in EXACT)
    head = [f"| σ_y | draws | {steps} |", "|" + " --- |" * (2 + len(EXACT))]
    tail = [
        "",
        f"Relative Frobenius errors of the covariance of {MANY} draws, seed {args.seed}; "
        f"{made('exact')}",
    ]
    between(args, "exact", [*head, *lines, *tail])


CG_STEPS = (20, 50, 100)


def operator(args: argparse.Namespace) -> None:
    """How far an image is from what its own noise-free data say it is, by model."""
    x = tests("ct", args.data, "test", args.images)
    z, lines = ct_sinograms(x.x), []
    for model, name in (
        ({}, "Joseph's, pixels and elements as points"),
        ({"oversample": MODEL["oversample"]}, "finer pixels"),
        (MODEL, "finer pixels, two rays an element"),
    ):
        A = replace(ct_beam(), **model)
        off = float((A.apply(x.x) - z).square().mean().sqrt())
        nothing = torch.zeros_like(x.x)
        scores = [
            float(_psnr("ct", cg(A.normal, A.adjoint(z), nothing, **how), x).mean())
            for how in ({"max_steps": n, "rtol": 0.0} for n in CG_STEPS)
        ]
        told = " | ".join(f"{v:.1f}" for v in scores)
        lines.append(f"| {name} | {off / CT_SIGMA:.2f} | {told} |")
    steps = " | ".join(f"{n} steps" for n in CG_STEPS)
    head = [f"| operator | errs by | {steps} |", "|" + " --- |" * (2 + len(CG_STEPS))]
    tail = [
        "",
        f"Root mean square of A x − z over the noise's σ, z noise-free; and PSNR in dB of "
        f"least squares from all {ct_beam().measurement_shape[0]} views of z by so many "
        f"steps of conjugate gradients. {len(x.x)} images, {made('operator')}",
    ]
    between(args, "operator", [*head, *lines, *tail])


def made(part: str) -> str:
    """When, where and by what."""
    today = datetime.now(UTC).date().isoformat()
    return f"{today}, {machine()}. Made by `python benchmarks/dfm.py {part}`."


def between(args: argparse.Namespace, name: str, lines: list[str]) -> None:
    """Put lines between a table's marks."""
    marks = (f"<!-- dfm-{name}: {k} -->" for k in ("begin", "end"))
    put(args.docs, "\n".join(lines), *marks)


def docs(args: argparse.Namespace) -> None:
    """Put the tables between the page's marks."""
    for kind, found in read(args.results).items():
        rows = found["rows"]
        lines = [
            "| method | network passes | PSNR of a draw | SSIM | PSNR of the mean | CRPS | "
            "inside 90 % | misfit | seconds |",
            "|" + " --- |" * 9,
        ]
        for name, row in rows.items():
            many = row["draws"] > 1
            mean = f"{_mean(row['psnr_of_mean']):.2f}" if many else ""
            inside = f"{100 * row['coverage']:.0f} %" if many else ""
            lines.append(
                f"| {name} | {row['passes']:.0f} | {_mean(row['psnr']):.2f} | "
                f"{_mean(row['ssim']):.3f} | {mean} | {100 * row['crps']:.2f} % | "
                f"{inside} | {row['misfit']:.2f} | {row['seconds']:.2f} |"
            )
        best = {k: v["value"] for k, v in found["chosen"].items()}
        lines += [
            "",
            f"{found['images']} images. PSNR in dB; point estimates stand under *a draw*. "
            f"CRPS as a part of the range. *Inside 90 %*: pixels within the interval of "
            f"{DRAWS} draws. *Misfit*: ⟨|A x − y|²⟩/σ² of a draw, 1 for the truth. Seconds "
            f"of a core for a draw. Every network saw {found['exams_seen']} exams of "
            f"{found['exams']}. Chosen on other patients: {best}. {found['date']}, "
            f"{found['machine']}, seed 0.",
        ]
        between(args, kind, lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def picture(args: argparse.Namespace) -> None:
    """Truth, reconstructions and draws, side by side."""
    from matplotlib.figure import Figure

    table = table_of(args)
    saved = torch.load(args.out / f"pictures-{table}.pt", weights_only=True)
    truth = saved.pop("truth")
    shown: dict[str, Tensor] = {"truth": truth}
    for name in read(args.results)[table]["rows"]:
        if name in saved:
            shown[name] = saved[name][0].float()
    for name in ("DFM, three targets, closing draw", "supervised sampler (oracle)"):
        if name in saved and len(saved[name]) > 1:
            shown[f"{name}: spread"] = 4 * saved[name].float().std(0)
    figure = Figure(figsize=(1.5 * len(shown), 1.7 * len(truth)), layout="constrained")
    axes = figure.subplots(len(truth), len(shown))
    for i in range(len(truth)):
        for j, (name, x) in enumerate(shown.items()):
            high = 1.6 * MU_WATER if args.kind == "ct" else 1.0
            axes[i, j].imshow(x[i, 0].float(), cmap="gray", vmin=0, vmax=high)
            axes[i, j].set_axis_off()
            if i == 0:
                axes[i, j].set_title(textwrap.fill(name, 20), fontsize=6)
    figure.savefig(args.docs.parent / f"dfm-{table}.png", dpi=110)


PARTS = {
    "run": run,
    "exact": exact,
    "operator": operator,
    "docs": docs,
    "picture": picture,
}


def main() -> None:
    """Run, or write the page's tables and pictures."""
    parser = argparse.ArgumentParser(description="Samples learnt from measurements.")
    parser.add_argument("what", choices=list(PARTS))
    data = Path(os.environ.get("INVSOLVE_DATA", "."))
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--kind", choices=["ct", "mr"], default="ct")
    parser.add_argument("--even", action="store_true", help="views of CT evenly spread")
    parser.add_argument("--names", nargs="+", help="methods; all unless given")
    parser.add_argument("--prior", default="runs/dfm-ct/dfm-ct-32.json")
    parser.add_argument("--out", type=Path, default=Path("runs/dfm"))
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=Path("docs/dfm.md"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    PARTS[args.what](args)


if __name__ == "__main__":
    main()
