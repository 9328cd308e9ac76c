"""Every sampler on every task, all tuned alike: docs/quality.md.

    python benchmarks/quality.py tune  --data $INVSOLVE_DATA --task ct-30
    python benchmarks/quality.py run   --data $INVSOLVE_DATA --task ct-30
    python benchmarks/quality.py reference --data $INVSOLVE_DATA --task ct-30
    python benchmarks/quality.py docs

``tune`` searches each method's settings on 8 images apart (Optuna's TPE, 20 passes of the
network a draw); ``run`` makes one draw for each of 32 others at the same cost, several
for a few of them, which tell how well the spread is calibrated, and the few-step
curve; ``reference`` is DPS with 1000 steps. Each result is kept as it comes, so that a
run which was stopped goes on.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from ct_headneck import machine, put
from quality_tasks import TASKS, TEST, TUNE, Task
from torch import Generator, Tensor
from tqdm import tqdm

import invsolve as iv
from invsolve import io, samplers
from invsolve.metrics import psnr, ssim
from invsolve.samplers.ddrm import ddrm
from invsolve.samplers.solvers import Multistep

RESULTS = Path(__file__).parent / "results" / "quality"
PASSES = 20
"""Of the network for one draw, in tuning and in the tables."""

CURVE = (5, 10, 20, 50, 100)
LONG = 1000
"""Of DPS as it was published."""
TRIALS = 12
DRAWS = 8


@dataclass(frozen=True)
class Method:
    """A sampler, and what is searched of its settings.

    Attributes:
        sampler: the function.
        space: from a trial to the settings that it tries.
        first: what is tried first, in the space's names: what the theory says.
        fixed: the settings that are not searched.
        passes: of the network in a step.
        begun: the classical method whose image it begins with.
    """

    sampler: Callable[..., Tensor]
    space: Callable[[Any], dict[str, Any]]
    first: Mapping[str, Any]
    fixed: Mapping[str, Any]
    passes: int = 1
    begun: str = ""


def levels(trial: Any) -> tuple[float, float]:
    """The lowest and the highest level of a trial."""
    low = trial.suggest_float("low", 0.01, 0.1, log=True)
    return low, trial.suggest_float("high", 0.3, 10.0, log=True)


def low_levels(trial: Any) -> tuple[float, float]:
    """Those of a method that begins near the image."""
    low = trial.suggest_float("low", 0.005, 0.05, log=True)
    return low, trial.suggest_float("high", 0.05, 0.5, log=True)


def weight(trial: Any) -> float:
    """λ, which is 1 by Bayes' rule."""
    return trial.suggest_float("lam", 0.05, 2.0, log=True)


LEVELS = {"low": 0.02, "high": 3.0}
METHODS: Mapping[str, Method] = {
    "reddiff": Method(
        samplers.reddiff,
        lambda t: {
            "sigma_range": levels(t),
            "lam": weight(t),
            "lr": t.suggest_float("lr", 0.2, 1.0),
        },
        {"low": 0.03, "high": 0.5, "lam": 0.5, "lr": 0.5},
        {
            "optimizer": "prox",
            "normalize": "bayes",
            "weight": "calibrated",
            "antithetic": True,
            "init": "zeros",
        },
        passes=2,
    ),
    "pnp": Method(
        samplers.pnp,
        lambda t: {"sigma_range": levels(t), "lam": weight(t)},
        {"low": 0.05, "high": 0.4, "lam": 0.23},
        {"cg_steps": 15, "init": "adjoint"},
    ),
    "red": Method(
        samplers.red,
        lambda t: {"sigma_range": levels(t), "lam": weight(t)},
        {"low": 0.05, "high": 0.4, "lam": 0.5},
        {"cg_steps": 15, "init": "adjoint"},
    ),
    "pnp, from TV": Method(
        samplers.pnp,
        lambda t: {"sigma_range": low_levels(t), "lam": weight(t)},
        {"low": 0.02, "high": 0.1, "lam": 0.23},
        {"cg_steps": 15},
        begun="TV",
    ),
    "red, from TV": Method(
        samplers.red,
        lambda t: {"sigma_range": low_levels(t), "lam": weight(t)},
        {"low": 0.02, "high": 0.1, "lam": 0.5},
        {"cg_steps": 15},
        begun="TV",
    ),
    "dds": Method(
        samplers.dds,
        lambda t: {
            "sigma_range": levels(t),
            "lam": weight(t),
            "eta": t.suggest_float("eta", 0.0, 1.0),
        },
        {**LEVELS, "lam": 1.0, "eta": 0.85},
        {"cg_steps": 10},
    ),
    "diffpir": Method(
        samplers.diffpir,
        lambda t: {
            "sigma_range": levels(t),
            "lam": weight(t),
            "zeta": t.suggest_float("zeta", 0.0, 1.0),
        },
        {**LEVELS, "lam": 1.0, "zeta": 0.5},
        {"cg_steps": 15},
    ),
    "diffpir, dpm++ 2m": Method(
        samplers.diffpir,
        lambda t: {"sigma_range": levels(t), "lam": weight(t)},
        {**LEVELS, "lam": 1.0},
        {"cg_steps": 15, "solver": Multistep(2)},
    ),
    "ddnm": Method(
        samplers.ddnm,
        lambda t: {
            "sigma_range": levels(t),
            "eta": t.suggest_float("eta", 0.0, 1.0),
        },
        {**LEVELS, "eta": 0.85},
        {"cg_steps": 15},
    ),
    "ddrm": Method(
        ddrm,
        lambda t: {
            "sigma_range": levels(t),
            "eta": t.suggest_float("eta", 0.0, 1.0),
            "eta_b": t.suggest_float("eta_b", 0.0, 1.0),
        },
        {**LEVELS, "eta": 0.85, "eta_b": 1.0},
        {},
    ),
    "daps": Method(
        samplers.daps,
        lambda t: {
            "sigma_range": levels(t),
            "spread": t.suggest_float("spread", 0.02, 0.5, log=True),
        },
        {**LEVELS, "spread": 0.1},
        {"ode_steps": 2, "cg_steps": 15},
        passes=2,
    ),
    "tmpd": Method(
        samplers.tmpd,
        lambda t: {
            "sigma_range": levels(t),
            "lam": t.suggest_float("lam", 0.5, 8.0, log=True),
            "eta": t.suggest_float("eta", 0.0, 1.0),
        },
        {**LEVELS, "lam": 1.0, "eta": 1.0},
        {},
        passes=2,
    ),
    "pigdm": Method(
        samplers.pigdm,
        lambda t: {
            "sigma_range": levels(t),
            "spread": t.suggest_float("spread", 0.05, 1.0, log=True),
            "eta": t.suggest_float("eta", 0.0, 1.0),
        },
        {**LEVELS, "spread": 0.3, "eta": 1.0},
        {"cg_steps": 15},
    ),
    "mmps": Method(
        samplers.mmps,
        lambda t: {
            "sigma_range": levels(t),
            "cg_steps": t.suggest_int("cg", 1, 2),
            "eta": t.suggest_float("eta", 0.0, 1.0),
        },
        {**LEVELS, "cg": 1, "eta": 1.0},
        {},
    ),
    "dps": Method(
        samplers.dps,
        lambda t: {
            "zeta": t.suggest_float("zeta", 0.1, 10.0, log=True),
            "eta": t.suggest_float("eta", 0.0, 1.0),
        },
        {"zeta": 1.0, "eta": 1.0},
        {},
    ),
    "score_sde": Method(
        samplers.score_sde,
        lambda t: {
            "sigma_range": levels(t),
            "snr": t.suggest_float("snr", 0.02, 0.3, log=True),
            "lam": t.suggest_float("lam", 0.2, 1.0),
        },
        {**LEVELS, "snr": 0.16, "lam": 1.0},
        {"cg_steps": 10},
        passes=2,
    ),
}
"""In the prior's range, where images are of order one."""


def main() -> None:
    """Tune, run, or write down."""
    parser = argparse.ArgumentParser(description="Every sampler on every task.")
    parser.add_argument("what", choices=["tune", "run", "reference", "docs"])
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--task", choices=list(TASKS), action="append")
    parser.add_argument("--method", action="append", help="only these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "float32"])
    parser.add_argument("--prior", help="a card instead of the task's bundled prior")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=Path("docs/quality.md"))
    parser.add_argument("--only", choices=["table", "spread", "curve"])
    parser.add_argument("--minutes", type=float, help="begin nothing after so many")
    args = parser.parse_args()
    if args.what == "docs":
        write_page(args.out, args.page)
        return
    until = time.monotonic() + 60 * (args.minutes or 1e9)
    for name in args.task or TASKS:
        bench = Bench(name, args)
        if args.what == "tune":
            bench.tune(until)
        elif args.what == "run":
            bench.run(until)
        else:
            bench.reference(until)


class Bench:
    """One task, its images and what is known of it so far."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.task, self.args = name, TASKS[name], args
        self.prior = iv.priors.load(args.prior or self.task.prior)
        self.path = args.out / f"{name}.json"
        self.found: dict[str, Any] = read(self.path)
        self.device = torch.device(args.device)
        chosen = args.method or [*self.task.classical, *METHODS]
        self.methods = [m for m in chosen if m in METHODS]
        self.classical = [m for m in chosen if m in self.task.classical]

    def measured(self, part: str, n: int) -> tuple[Tensor, iv.InverseProblem]:
        """Images and what was measured of them; the same for every method."""
        x = self.task.images(self.args.data, part, n)
        return x, self.task.problem(x, Generator().manual_seed(0))

    def solve(
        self,
        problem: iv.InverseProblem,
        sampler: Callable,
        samples: int,
        **options: Any,
    ) -> iv.Solution:
        """All items at once, in chunks."""
        classical = sampler in (samplers.fbp, samplers.tv)
        return iv.solve(
            problem,
            None if classical else self.prior,
            sampler,
            samples=samples,
            generator=Generator().manual_seed(1),
            device=self.device,
            precision=self.args.precision,
            **options,
        )

    def fixed(self, method: Method) -> dict[str, Any]:
        """What is not searched of a method; what it begins with is tuned already."""
        if not method.begun:
            return dict(method.fixed)
        sampler, _ = self.task.classical[method.begun]
        settings = read(self.args.out / f"{self.task.tuned_as or self.name}.json")
        options = settings["settings"][method.begun]["options"]
        return {**method.fixed, "init": partial(sampler, **options)}

    def score(self, x: Tensor, truth: Tensor) -> float:
        """Mean PSNR."""
        region = self.task.region(truth)
        return float(psnr_of(x, truth, self.task.data_range, region).mean())

    # --- tuning

    def tune(self, until: float) -> None:
        """Search what has not been searched yet."""
        if self.task.tuned_as:
            print(f"{self.name} has the settings of {self.task.tuned_as}")
            return
        truth, problem = self.measured("tune", TUNE)
        settings = self.found.setdefault("settings", {})
        for name in self.classical:
            if name not in settings:
                settings[name] = self.best_of_grid(name, truth, problem)
                self.save()
        for name in tqdm(self.methods, desc=f"tune {self.name}"):
            if name in settings or time.monotonic() > until:
                continue
            settings[name] = self.search(name, truth, problem)
            self.save()

    def best_of_grid(self, name: str, truth: Tensor, problem: Any) -> dict[str, Any]:
        """A classical method's few settings: all are tried."""
        import itertools

        sampler, grid = self.task.classical[name]
        tried = []
        for values in itertools.product(*grid.values()):
            options = dict(zip(grid, values, strict=True))
            x = self.solve(problem, sampler, 1, **options).mean
            tried.append((self.score(x, truth), options))
        psnr, options = max(tried, key=lambda t: t[0])
        return {"options": options, "psnr": psnr, "trials": len(tried)}

    def search(self, name: str, truth: Tensor, problem: Any) -> dict[str, Any]:
        """Optuna's TPE with a seed; a diverging trial counts as very bad."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        method = METHODS[name]
        fixed = self.fixed(method)
        if method.begun:  # the same in each trial
            fixed["init"] = fixed["init"](problem)

        def objective(trial: Any) -> float:
            options = method.space(trial)
            trial.set_user_attr("options", options)
            try:
                solution = self.solve(
                    problem,
                    method.sampler,
                    1,
                    steps=PASSES // method.passes,
                    **fixed,
                    **options,
                )
            except ValueError as error:  # it diverged, or is not for this problem
                trial.set_user_attr("refused", str(error))
                return -100.0
            return self.score(solution.mean, truth)

        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=TRIALS // 2),
        )
        study.enqueue_trial(dict(method.first))
        study.optimize(objective, n_trials=TRIALS)
        best = study.best_trial
        if "refused" in best.user_attrs:
            return {"refused": best.user_attrs["refused"]}
        return {
            "options": best.user_attrs["options"],
            "psnr": best.value,
            "trials": TRIALS,
        }

    # --- results

    def run(self, until: float) -> None:
        """Make what is not there yet: the table first, then spread, then curves."""
        source = self.task.tuned_as or self.name
        settings = read(self.args.out / f"{source}.json").get("settings", {})
        missing = [m for m in [*self.classical, *self.methods] if m not in settings]
        if missing:
            print(f"{self.name}: not tuned yet: {', '.join(missing)}")
        ready = [
            m
            for m in [*self.classical, *self.methods]
            if m in settings and "refused" not in settings[m]
        ]
        truth, problem = self.measured("test", TEST)
        for part in (self.table, self.spread, self.curve):
            if self.args.only not in (None, part.__name__):
                continue
            for name in tqdm(ready, desc=f"{part.__name__} {self.name}"):
                known = self.found.setdefault(part.__name__, {})
                if name not in known and time.monotonic() < until:
                    row = part(name, settings[name]["options"], truth, problem)
                    if row is not None:
                        known[name] = row
                        if part == self.table:
                            # Runs go on elsewhere; seconds are of one machine.
                            on = f"{torch.get_num_threads()} of {machine()}"
                            self.found.setdefault("timed_on", {})[name] = on
                        self.save()

    def reference(self, until: float) -> None:
        """DPS as published, 1000 steps with η = 1, its ζ chosen on two tuning images."""
        known = self.found.setdefault("reference", {"tried": {}})
        options = {"steps": LONG, "eta": 1.0}
        truth, problem = self.measured("tune", 2)
        for zeta in (0.3, 1.0, 3.0):
            if str(zeta) not in known["tried"] and time.monotonic() < until:
                x = self.solve(problem, samplers.dps, 1, zeta=zeta, **options).mean
                known["tried"][str(zeta)] = self.score(x, truth)
                self.save()
        if (
            len(known["tried"]) == 3
            and "psnr" not in known
            and time.monotonic() < until
        ):
            zeta = max(known["tried"], key=lambda z: known["tried"][z])
            few, some = self.some_of_them()
            x = self.solve(some, samplers.dps, 1, zeta=float(zeta), **options).mean
            known |= {"zeta": float(zeta), "psnr": self.score(x, few)}
            self.save()

    def some_of_them(self) -> tuple[Tensor, iv.InverseProblem]:
        """The test images of which more than one draw is made, evenly of all."""
        truth, problem = self.measured("test", TEST)
        chosen = torch.linspace(0, TEST - 1, self.task.few).long()
        return truth[chosen], problem.items(chosen)

    def draw(
        self, name: str, options: Mapping, problem: Any, passes: int, samples: int = 1
    ) -> iv.Solution:
        """A method's draws at a cost."""
        if name in self.task.classical:
            return self.solve(problem, self.task.classical[name][0], 1, **options)
        method = METHODS[name]
        steps = max(1, passes // method.passes)
        tuple_of = {
            k: tuple(v) if isinstance(v, list) else v for k, v in options.items()
        }
        fixed = self.fixed(method)
        return self.solve(
            problem, method.sampler, samples, steps=steps, **fixed, **tuple_of
        )

    def table(
        self, name: str, options: Mapping, truth: Tensor, problem: Any
    ) -> dict[str, Any]:
        """One draw for each image."""
        solution = self.draw(name, options, problem, PASSES)
        x, task = solution.mean, self.task
        region, stats = task.region(truth), solution.stats
        each = psnr_of(x, truth, task.data_range, region)
        residual = problem.y - problem.operator(x)
        weighted = problem.noise.precision(problem.y) * residual.abs() ** 2
        parts = 2 if problem.y.is_complex() else 1
        seen = problem.operator(truth).abs() > 0
        return {
            "kind": solution.kind.replace("_", " "),
            "psnr": float(each.mean()),
            "psnr_se": float(each.std() / len(each) ** 0.5),
            "ssim": float(ssim_of(x, truth, task.data_range, region).mean()),
            "lpips": perceptual(x, truth, task.data_range),
            "chi2": float(weighted[seen].sum() / seen.sum() / parts),
            "forwards": stats.network_forwards / len(x),
            "backwards": stats.network_backwards / len(x),
            "seconds": stats.seconds / len(x),
            "overhead": stats.overhead,
        }

    def spread(
        self, name: str, options: Mapping, truth: Tensor, problem: Any
    ) -> dict[str, Any] | None:
        """Several draws: how often the truth lies in their central intervals."""
        few, some = self.some_of_them()
        solution = self.draw(name, options, some, PASSES, DRAWS)
        region = self.task.region(few)
        mean = self.score(solution.mean, few)
        if solution.kind == "point_estimate":
            return {"psnr_of_mean": mean}
        rank = (solution.samples < few).sum(0)
        inside = torch.ones_like(few, dtype=torch.bool) if region is None else region
        inside = inside & (few > 0.02 * few.max())
        # Of n draws the truth falls between the k-th and the (n+1−k)-th with
        # probability (n + 1 − 2k)/(n + 1): 1/3, 5/9 and 7/9 of eight for k = 3, 2, 1.
        between = {
            k: float(((rank >= k) & (rank <= DRAWS - k))[inside].float().mean())
            for k in (1, 2, 3)
        }
        return {"psnr_of_mean": mean, "inside": between}

    def curve(
        self, name: str, options: Mapping, truth: Tensor, problem: Any
    ) -> dict[str, Any] | None:
        """PSNR of one draw against the passes it costs."""
        if name in self.task.classical:
            return None
        few, some = self.some_of_them()
        values = {}
        for passes in CURVE:
            try:
                x = self.draw(name, options, some, passes).mean
            except ValueError:
                continue  # diverged, which a gap in the curve says
            values[passes] = self.score(x, few)
        return values

    def save(self) -> None:
        """All that is known so far."""
        self.found |= {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "torch": torch.__version__,
            "precision": self.args.precision,
        }
        text = json.dumps(self.found, indent=1) + "\n"
        io.replace(self.path, lambda p: Path(p).write_text(text))


def read(path: Path) -> dict[str, Any]:
    """What a results file says; nothing if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


# --- metrics of images with channels


def psnr_of(
    x: Tensor, truth: Tensor, data_range: float, region: Tensor | None
) -> Tensor:
    """Over channels and pixels alike."""
    if region is not None:
        return psnr(x, truth, data_range, region)
    flat, true = (v.reshape(len(v), 1, -1, v.shape[-1]) for v in (x, truth))
    return psnr(flat, true, data_range)


def ssim_of(
    x: Tensor, truth: Tensor, data_range: float, region: Tensor | None
) -> Tensor:
    """The mean over channels."""
    each = [
        ssim(a, b, data_range, region)
        for a, b in zip(x.split(1, 1), truth.split(1, 1), strict=True)
    ]
    return torch.stack(each).mean(0)


def perceptual(x: Tensor, truth: Tensor, data_range: float) -> float | None:
    """Shift-tolerant LPIPS (AlexNet), if the package that holds its weights is here."""
    # It imports a debugger and a printer of networks that it does not use.
    for unused in ("IPython", "torchsummary"):
        stand_in = SimpleNamespace(embed=None, summary=None)
        sys.modules.setdefault(unused, cast(Any, stand_in))
    try:
        from stlpips_pytorch import stlpips  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return None
    net = perceptual.__dict__.setdefault(
        "net", stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    )
    pair = [
        (2 * v / data_range - 1).clamp(-1, 1).expand(-1, 3, -1, -1) for v in (x, truth)
    ]
    with torch.no_grad():
        return float(net(*pair).mean())


# --- the page


BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"


def write_page(folder: Path, page: Path) -> None:
    """The tables, and the curves beside the page."""
    results = {name: read(folder / f"{name}.json") for name in TASKS}
    results = {name: r for name, r in results.items() if r.get("table")}
    parts = [summary(results), *beside_tv(results), *beside_dps(results)]
    parts += ["![PSNR against network passes, a panel for each task](quality.png)"]
    parts += [section(name, r) for name, r in results.items()]
    put(page, "\n\n".join(parts), BEGIN, END)
    draw_curves(results, page.with_name("quality.png"))


def summary(results: Mapping[str, Any]) -> str:
    """PSNR of every method on every task."""
    names: list[str] = []
    for result in results.values():
        names += [n for n in result["table"] if n not in names]
    lines = [
        "| method | " + " | ".join(TASKS[n].title for n in results) + " |",
        "| --- |" + " --- |" * len(results),
    ]
    for name in names:
        cells = []
        for result in results.values():
            row = result["table"].get(name)
            best = max(r["psnr"] for r in result["table"].values())
            if row is None:
                cells.append("–")
                continue
            text = f"{row['psnr']:.2f}"
            cells.append(f"**{text}**" if row["psnr"] == best else text)
        lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beside_tv(results: Mapping[str, Any]) -> list[str]:
    """What several draws and more passes add, on the same images as TV."""
    lines = [
        f"| on some of these images | TV | one draw, {PASSES} passes | mean of 8 draws, "
        f"{PASSES} passes each | one draw, up to {max(CURVE)} passes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        spread, curve = result.get("spread", {}), result.get("curve", {})
        if "TV" not in spread or not curve:
            continue
        tv = spread["TV"]["psnr_of_mean"]
        one = {label(m): c[str(PASSES)] for m, c in curve.items() if str(PASSES) in c}
        mean = {
            label(m): r["psnr_of_mean"]
            for m, r in spread.items()
            if m not in TASKS[name].classical
        }
        more = {
            f"{label(m)} at {p}": value
            for m, c in curve.items()
            for p, value in c.items()
        }
        cells = [
            f"{found[best]:.2f} ({best}, {found[best] - tv:+.2f})"
            for found in (one, mean, more)
            for best in [max(found, key=found.__getitem__)]
        ]
        task = TASKS[name]
        lines.append(
            f"| {task.title}, {task.few} images | {tv:.2f} | {' | '.join(cells)} |"
        )
    return ["\n".join(lines)] if len(lines) > 2 else []


def beside_dps(results: Mapping[str, Any]) -> list[str]:
    """The best at few passes, and DPS at many, on the same images."""
    known = {n: r for n, r in results.items() if r.get("reference", {}).get("psnr")}
    if not known:
        return []
    lines = [
        f"| on some of these images | best at {PASSES} passes | DPS at {PASSES} | "
        f"DPS at {LONG} |",
        "| --- | --- | --- | --- |",
    ]
    for name, result in known.items():
        at = {
            m: c[str(PASSES)]
            for m, c in result.get("curve", {}).items()
            if str(PASSES) in c
        }
        if not at:
            continue
        best, task, long = max(at, key=at.__getitem__), TASKS[name], result["reference"]
        dps = f"{at['dps']:.2f}" if "dps" in at else "–"
        lines.append(
            f"| {task.title}, {task.few} images | {label(best)} {at[best]:.2f} | {dps} | "
            f"{long['psnr']:.2f} (ζ = {long['zeta']:g}) |"
        )
    return ["\n".join(lines)]


def label(name: str) -> str:
    """A method's name as a table shows it."""
    return f"`{name}`" if name in METHODS else name


def section(name: str, result: Mapping[str, Any]) -> str:
    """All numbers of one task."""
    task: Task = TASKS[name]
    lines = [
        f"### {task.title}",
        "",
        "| method | gives | PSNR (dB) | SSIM | LPIPS-type | χ² | mean of 8 (dB) | in 5/9 | "
        "in 7/9 | passes F + B | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ordered = sorted(result["table"].items(), key=lambda kv: -kv[1]["psnr"])
    for method, row in ordered:
        many = result.get("spread", {}).get(method, {})
        inside, mean = many.get("inside"), many.get("psnr_of_mean")
        cover = ["–", "–"] if inside is None else [f"{inside[k]:.2f}" for k in "21"]
        lpips = "–" if row["lpips"] is None else f"{row['lpips']:.3f}"
        lines.append(
            f"| {label(method)} | {row['kind']} | {row['psnr']:.2f} ± {row['psnr_se']:.2f} "
            f"| {row['ssim']:.3f} | {lpips} | {row['chi2']:.2f} "
            f"| {'–' if mean is None else f'{mean:.2f}'} | {cover[0]} | {cover[1]} "
            f"| {row['forwards']:.0f} + {row['backwards']:.0f} | {row['seconds']:.2f} |"
        )
    timed: dict[str, list[str]] = {}
    for method in result["table"]:
        timed.setdefault(result["timed_on"].get(method, ""), []).append(label(method))
    where = "; ".join(f"{', '.join(names)} on {on}" for on, names in timed.items())
    lines += [
        "",
        f"{TEST} images, one draw each, and {task.few} of them with 8 draws; "
        f"{result['date']}, network in {result['precision']}, seed 1. Seconds: {where}.",
    ]
    return "\n".join(lines)


def draw_curves(results: Mapping[str, Any], path: Path) -> None:
    """PSNR against passes, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = {n: r for n, r in results.items() if r.get("curve")}
    if not results:
        return
    figure, axes = plt.subplots(
        1, len(results), figsize=(3.2 * len(results), 3.2), squeeze=False
    )
    styles = {
        name: f"C{i % 10}{'-' if i < 10 else '--'}" for i, name in enumerate(METHODS)
    }
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        top = max(max(c.values()) for c in result["curve"].values() if c)
        for method, values in result["curve"].items():
            passes = [int(p) for p in values]
            axis.semilogx(
                passes, list(values.values()), styles[method], label=method, marker="."
            )
        tv = result.get("spread", {}).get("TV")  # of the same images
        if tv:
            axis.axhline(tv["psnr_of_mean"], color="0.6", lw=1, ls=":", label="TV")
        axis.set_title(TASKS[name].title, fontsize=9)
        axis.set_ylim(top - 9, top + 0.5)
        axis.set_xticks(CURVE, [str(p) for p in CURVE])
        axis.set_xlabel("passes of the network")
        axis.minorticks_off()
    axes[0, 0].set_ylabel("PSNR of one draw (dB)")
    handles = {}
    for axis in axes[0]:
        found, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncols=9,
        fontsize=8,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
