"""Registration with a sampler that never saw a displacement: the table of docs/dfm.md.

    python benchmarks/registration.py exams
    invsolve train configs/dfm-warp-64.toml --out runs/dfm-warp
    python benchmarks/registration.py run --prior runs/dfm-warp/dfm-warp-64.json
    python benchmarks/registration.py docs

The signal is a smooth field of displacements S, a row is one of eight contrasts of a slice
(the label map of a real head, SynthSeg; each tissue's value in each contrast at random)
seen through it. Every exam has five of them, and is written without its field. From two
contrasts the field is asked for, beside total-variation optical flow (scikit-image),
smooth registration, and the same with the law that the fields were in fact drawn from.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ct_headneck import machine
from dfm import Choice, between, held
from make_exams import HELD_OUT
from quality import read
from torch import Generator, Tensor
from tqdm import tqdm

import invsolve as iv
from invsolve import io, samplers
from invsolve.exams import acquire, save_exams
from invsolve.operators import GaussianNoise
from invsolve.operators.parametric import Parametric, Rows
from invsolve.population import read_tissues
from invsolve.priors.weights import read_card
from invsolve.samplers.solvers import Multistep

RESULTS = Path(__file__).parent / "results" / "registration.json"
HEAD, SLICE, SIDE, POOL = "head_17.nii.gz", 130, 64, 4
CONTRASTS, ACQUIRED, GIVEN = 8, 5, (1, 6)
SIGMA = 0.1
CELLS, SPREAD = 6, 1.5
"""Of the fields: independent values to a side, and their standard deviation in pixels."""
EXAMS = 3000
FIELDS, TUNE, DRAWS, STEPS = 16, 8, 16, 30
ATTACHMENTS = [5, 10, 20, 40, 80]
LAMS = [0.3, 1.0, 3.0, 10.0, 30.0]
FLOW = "TV-L1 optical flow"
SMOOTH, BOTH = "the flow, then smooth registration", "DFM, then smooth registration"


# --- what is measured


def labels(data: Path) -> Tensor:
    """The slice's labels, at 1 mm."""
    path = data / "synthseg" / HEAD
    if not path.exists():
        raise SystemExit(f"no {path}: set INVSOLVE_DATA")
    return io.read(path).values[SLICE].long()


@cache
def tissues(data: Path) -> Tensor:
    """The part of each pixel that each tissue class fills, (classes, 64, 64)."""
    table = read_tissues(data / "synthseg" / "t1_intensity_priors.csv")
    here = labels(data)
    of_label = torch.zeros(int(here.max()) + 1, dtype=torch.long)
    for label in here.unique().tolist():
        of_label[label] = table[label][0]
    parts = F.one_hot(of_label[here]).movedim(-1, 0).float()
    return F.avg_pool2d(parts[parts.flatten(1).any(1)], POOL)


def family(data: Path) -> Parametric:
    """All contrasts of the slice; the background, the first class, is 0."""
    parts = tissues(data)
    generator = Generator().manual_seed(0)
    values = torch.rand(CONTRASTS, len(parts), generator=generator)
    values[:, 0] = 0
    return Parametric.warps(torch.einsum("kc,chw->khw", values, parts))


def basis() -> Tensor:
    """B of S = B c, (64², cells²): a smooth bump for each cell."""
    unit = torch.eye(CELLS**2).reshape(-1, 1, CELLS, CELLS)
    bumps = F.interpolate(unit, (SIDE, SIDE), mode="bicubic", align_corners=True)
    return bumps.flatten(1).T


def fields(n: int, generator: Generator) -> Tensor:
    """S, (n, 2, 64, 64) in pixels: bicubic between independent Gaussian values."""
    c = SPREAD * torch.randn(n, 2, CELLS**2, generator=generator)
    return (c @ basis().T).reshape(n, 2, SIDE, SIDE)


def exams(args: argparse.Namespace) -> None:
    """Write the exams to train on, and those that training is measured by."""
    of = family(args.data)
    for seed, (part, n) in enumerate({"train": EXAMS, "val": HELD_OUT}.items()):
        generator = Generator().manual_seed(2 * args.seed + seed)
        x = fields(n, generator)
        made = acquire(x, of, ACQUIRED, SIGMA, generator=generator)
        save_exams(args.data / "exams" / f"warp-{part}.npz", made)


@dataclass(frozen=True, eq=False)
class Test:
    """Fields, and what two contrasts told of them."""

    x: Tensor
    rows: Rows
    problem: iv.InverseProblem


def tests(data: Path, part: str, n: int) -> Test:
    """``tune`` or ``test``: fields of other seeds than the exams'."""
    generator = Generator().manual_seed({"tune": 1001, "test": 1002}[part])
    x, of = fields(n, generator), family(data)
    rows = torch.zeros(1, *of.grid, dtype=torch.bool)
    rows[:, list(GIVEN)] = True
    noise = GaussianNoise(SIGMA)
    y = of.restrict_data(noise.sample(of.full.apply(x), generator=generator), rows)
    return Test(x, rows, iv.InverseProblem(y, of(rows), noise))


# --- methods: a test to draws of its fields


def descent(start: Tensor, objective: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The minimum near to the start, by L-BFGS, one item after another."""
    found = []
    for k in range(len(start)):
        v = start[k : k + 1].clone().requires_grad_(True)
        search = torch.optim.LBFGS(
            [v], max_iter=200, history_size=20, line_search_fn="strong_wolfe"
        )

        def closure(v: Tensor = v, k: int = k, search: Any = search) -> Tensor:
            search.zero_grad()
            value = objective(v, k)
            value.backward()
            return value

        search.step(closure)
        found.append(v.detach())
    return torch.cat(found)


def misfit(test: Test, S: Tensor, k: int) -> Tensor:
    """‖A S − y‖²/2σ² of an item."""
    error = test.problem.operator.apply(S) - test.problem.y[k : k + 1]
    return error.square().sum() / (2 * SIGMA**2)


@torch.enable_grad()
def smooth(test: Test, lam: float, start: Tensor) -> Tensor:
    """argmin ‖A S − y‖²/2σ² + λ/2 ‖∇S‖², near to the start."""

    def objective(S: Tensor, k: int) -> Tensor:
        rough = sum(S.diff(dim=d).square().sum() for d in (2, 3))
        return misfit(test, S, k) + lam / 2 * rough

    return descent(start, objective)


@torch.enable_grad()
def with_law(test: Test) -> Tensor:
    """The most likely field, told of the law that fields are drawn from."""
    B = basis()

    def field(c: Tensor) -> Tensor:
        return SPREAD * (c @ B.T).reshape(len(c), 2, SIDE, SIDE)

    def objective(c: Tensor, k: int) -> Tensor:
        return misfit(test, field(c), k) + c.square().sum() / 2

    return field(descent(torch.zeros(len(test.x), 2, CELLS**2), objective))


def flow(test: Test, attachment: int, data: Path) -> Tensor:
    """TV-L1 optical flow of each contrast (Zach, Pock, Bischof 2007), their mean."""
    from skimage.registration import optical_flow_tvl1

    pictures, y = family(data).words["pictures"].numpy(), test.problem.y[:, 0].numpy()
    found = []
    for seen in y:
        each = [
            optical_flow_tvl1(seen[c], pictures[c], attachment=attachment)
            for c in GIVEN
        ]
        found.append(torch.stack([torch.from_numpy(v) for v in each]).mean(0))
    return torch.stack(found).to(test.x)


def run(args: argparse.Namespace) -> None:
    """Make what is not there yet, and keep each as it comes."""
    found: dict[str, Any] = read(args.results) or {"rows": {}, "chosen": {}}
    test, tune = (
        tests(args.data, part, n) for part, n in (("test", FIELDS), ("tune", TUNE))
    )
    prior = iv.priors.load(args.prior)

    choice = Choice(found["chosen"])

    def chosen(name: str, grid: list[Any], make: Callable[..., Tensor]) -> Any:
        """The value of the smallest error on other fields."""
        return choice(
            name, grid, lambda v: -float(endpoint(make(tune, v), tune, args.data))
        )

    def by_flow(test: Test) -> Tensor:
        make = partial(flow, data=args.data)
        return make(test, chosen(FLOW, ATTACHMENTS, make))

    def dfm(test: Test, draws: int = DRAWS, **more: Any) -> Tensor:
        return iv.solve(
            test.problem,
            prior,
            samplers.dfm,
            samples=draws,
            steps=STEPS,
            solver=Multistep(2),
            generator=Generator().manual_seed(args.seed),
            **more,
        ).samples

    def by_dfm(test: Test) -> Tensor:
        return dfm(test, draws=4).mean(0)

    def then_smooth(name: str, start: Callable[[Test], Tensor]) -> Tensor:
        first = cache(start)
        lam = chosen(name, LAMS, lambda test, lam: smooth(test, lam, first(test)))
        return smooth(test, lam, start(test))[None]

    methods: dict[str, Callable[[], Tensor]] = {
        "no displacement": lambda: torch.zeros_like(test.x)[None],
        FLOW: lambda: by_flow(test)[None],
        SMOOTH: lambda: then_smooth(SMOOTH, by_flow),
        "DFM, one target": lambda: dfm(test),
        "DFM, three targets": lambda: dfm(test, targets=3),
        BOTH: lambda: then_smooth(BOTH, by_dfm),
        "the fields' own law (oracle)": lambda: with_law(test)[None],
    }
    for name, make in tqdm(methods.items(), desc="registration"):
        if name in found["rows"]:
            continue
        clock, aside = time.process_time(), choice.seconds
        with torch.no_grad():
            draws = make()
        spent = time.process_time() - clock - (choice.seconds - aside)
        seconds = spent / (len(draws) * FIELDS)
        found["rows"][name] = {**scores(draws, test, args.data), "seconds": seconds}
        found |= {
            "rows": {k: found["rows"][k] for k in methods if k in found["rows"]},
            "training": read_card(args.prior)[0]["training"],
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
        }
        text = json.dumps(found, indent=1) + "\n"
        io.replace(args.results, lambda p: Path(p).write_text(text))  # noqa: B023
        args.out.mkdir(parents=True, exist_ok=True)
        keep = args.out / "registration.pt"
        old = torch.load(keep, weights_only=True) if keep.exists() else {}
        torch.save({**old, name: draws[:, ::4].half(), "truth": test.x[::4]}, keep)


# --- scores


def inside(test: Test, data: Path) -> Tensor:
    """Where the moved head is, (n, 1, 64, 64)."""
    head = (1 - tissues(data)[:1]).clamp(0, 1)
    return Parametric.warps(head).full.apply(test.x)[:, 0] > 0.5


def endpoint(S: Tensor, test: Test, data: Path) -> Tensor:
    """Mean |S − S*| within the head, in pixels."""
    off = (S - test.x).norm(dim=1, keepdim=True)
    return off[inside(test, data)].mean()


def dice(S: Tensor, test: Test, data: Path) -> float:
    """Of what a field and the true one carry over, in each tissue that fills pixels."""
    parts = Parametric.warps(tissues(data)[1:]).full
    a, b = (parts.apply(v)[:, 0] > 0.5 for v in (S, test.x))
    both, each = (v.sum((0, 2, 3)) for v in (a & b, a.int() + b.int()))
    here = b.any(0).flatten(1).any(1)
    return float((2 * both / each.clamp_min(1))[here].mean())


def scores(draws: Tensor, test: Test, data: Path) -> dict[str, float]:
    """Of the mean, of a draw, and of the spread."""
    mean, of = draws.mean(0), family(data).full
    # What the field says of contrasts that were not acquired, over what it could.
    others = [c for c in range(CONTRASTS) if c not in GIVEN]
    error, most = (
        (of.apply(v) - of.apply(test.x))[:, :, others].square().mean()
        for v in (mean, torch.zeros_like(mean))
    )
    row = {
        "error": float(endpoint(mean, test, data)),
        "error_of_draw": float(endpoint(draws[0], test, data)),
        "dice": dice(mean, test, data),
        "unseen": float(10 * (most / error.clamp_min(1e-12)).log10()),
    }
    if len(draws) > 1:
        head = inside(test, data).expand_as(test.x)
        row["coverage"] = float(held(draws, test.x)[head].float().mean())
    return row


def docs(args: argparse.Namespace) -> None:
    """Put the table and the picture on the page."""
    found = read(args.results)
    lines = [
        "| method | error of the mean | of a draw | Dice | other contrasts | inside 90 % "
        "| seconds |",
        "|" + " --- |" * 7,
    ]
    for name, row in found["rows"].items():
        within = f"{100 * row['coverage']:.0f} %" if "coverage" in row else ""
        draw = f"{row['error_of_draw']:.2f}" if "coverage" in row else ""
        lines.append(
            f"| {name} | {row['error']:.2f} | {draw} | {row['dice']:.3f} | "
            f"{row['unseen']:+.1f} dB | {within} | {row['seconds']:.2f} |"
        )
    chosen = {k: v["value"] for k, v in found["chosen"].items()}
    lines += [
        "",
        f"{FIELDS} simulated fields from {len(GIVEN)} contrasts of {CONTRASTS}. Error: "
        f"mean distance to the true displacement within the head, in pixels of {POOL} mm. "
        f"Dice: mean over tissues that the fields carry over. Other contrasts: their mean "
        f"square error without displacement, over that with the mean field. *Inside 90 %*: "
        f"components within the interval of {DRAWS} draws. Seconds of a core for a draw. "
        f"The network saw {found['training']['exams_seen']} exams of "
        f"{found['training']['exams']}. Chosen on {TUNE} other fields: {chosen}. "
        f"{found['date']}, {found['machine']}, seed {args.seed}. Made by "
        f"`python benchmarks/registration.py run`.",
    ]
    between(args, "registration", lines)
    picture(args)


def picture(args: argparse.Namespace) -> None:
    """A contrast that was not acquired: what was to be seen, and what fields make of it."""
    from matplotlib.figure import Figure

    saved = torch.load(args.out / "registration.pt", weights_only=True)
    truth, of = saved.pop("truth"), family(args.data).full
    shown = {"the atlas": torch.zeros_like(truth), "truth": truth}
    for name in read(args.results)["rows"]:
        if name != "no displacement":
            shown[name] = saved[name].float().mean(0)
    other, items = min(set(range(CONTRASTS)) - set(GIVEN)), 2
    figure = Figure(figsize=(1.7 * len(shown), 3.6 * items), layout="constrained")
    axes = figure.subplots(2 * items, len(shown))
    for i in range(items):
        for j, (name, S) in enumerate(shown.items()):
            top, low = axes[2 * i, j], axes[2 * i + 1, j]
            seen = of.apply(S[i : i + 1])[0, 0, other]
            top.imshow(seen, cmap="gray", vmin=0, vmax=1)
            low.imshow((S[i] - truth[i]).norm(dim=0), cmap="magma", vmin=0, vmax=4)
            for axis in (top, low):
                axis.set_axis_off()
            if i == 0:
                top.set_title(name, fontsize=7)
    figure.savefig(args.docs.parent / "registration.png", dpi=110)


PARTS = {"exams": exams, "run": run, "docs": docs}


def main() -> None:
    """Make exams, run the methods, or write the page."""
    parser = argparse.ArgumentParser(description="Registration by DFM.")
    parser.add_argument("what", choices=list(PARTS))
    data = Path(os.environ.get("INVSOLVE_DATA", "."))
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--prior", default="runs/dfm-warp/dfm-warp-64.json")
    parser.add_argument("--out", type=Path, default=Path("runs/dfm"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=Path("docs/dfm.md"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    PARTS[args.what](args)


if __name__ == "__main__":
    main()
