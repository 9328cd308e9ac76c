"""The segmenter of brain tissues in MR, and what it is compared with.

    python benchmarks/make_brain_population.py --out $INVSOLVE_DATA/brain-tissues
    python benchmarks/brain_tissues.py train --data $INVSOLVE_DATA
    python benchmarks/brain_tissues.py run   --data $INVSOLVE_DATA
    python benchmarks/brain_tissues.py docs

As `segmentation.py` does for PET/CT: ``train`` trains both models alike, ``run`` measures
them on the heads that nothing was trained on, ``docs`` writes docs/segmentation.md. Each
goes on where it was stopped.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ct_headneck import machine, put
from segmentation import residual_unet
from torch import Generator, Tensor, nn
from tqdm import tqdm

from invsolve import io
from invsolve.priors.families.family import filled
from invsolve.priors.reading import read_checkpoint
from invsolve.segmentation import metrics, uncertainty
from invsolve.segmentation.cases import Case
from invsolve.segmentation.segmenter import (
    Segmenter,
    load,
    probability,
    segment_case,
)
from invsolve.segmentation.training import (
    SegmenterConfig,
    read_cases,
    train_segmenter,
)
from invsolve.speed import accelerated

RESULTS = Path(__file__).parent / "results" / "brain_tissues.json"
PAGE, PICTURE = Path("docs/segmentation.md"), Path("docs/brain-tissues.png")
CONFIG = Path("configs/brain-tissues.toml")
DRAWS, STEPS = 4, 20
BEGIN, END = "<!-- brain-tissues: begin -->", "<!-- brain-tissues: end -->"


def reference() -> nn.Module:
    """MONAI's residual U-Net, of one scan and all tissues."""
    return residual_unet(1, len(SegmenterConfig.read(CONFIG).cases.labels))


@dataclass(frozen=True)
class Model:
    """What is trained: its title, another network, and the weight of the Dice loss."""

    title: str
    make: Any = None
    dice: float = 0.0


MODELS = {
    "diffusion": Model("3D diffusion"),
    "unet": Model("3D U-Net (MONAI)", reference, 1.0),
}


def main() -> None:
    """Train, measure, or write down."""
    parser = argparse.ArgumentParser(description="Segmenters of brain tissues.")
    parser.add_argument("what", choices=["train", "run", "docs"])
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--runs", type=Path, default=Path("runs/brain-tissues"))
    parser.add_argument("--model", choices=list(MODELS), action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    every = "of how many images of each head one is drawn for"
    parser.add_argument("--draws-every", type=int, default=4, help=every)
    args = parser.parse_args()
    if args.what == "docs":
        write_page(json.loads(RESULTS.read_text()))
        return
    until = time.monotonic() + 60 * args.minutes
    for name in args.model or MODELS:
        (train if args.what == "train" else run)(name, args, until)


def config_of(name: str, data: Path) -> SegmenterConfig:
    """The bundled segmenter's configuration, with what the model changes."""
    config = SegmenterConfig.read(CONFIG)
    folders = {part: data / getattr(config.cases, part) for part in ("train", "val")}
    return config.model_copy(
        update={
            "name": config.name if name == "diffusion" else f"{config.name}-{name}",
            "cases": config.cases.model_copy(update=folders),
            "dice": MODELS[name].dice,
        }
    )


@cache
def cases_in(folder: Path) -> list[Case]:
    """All images of a folder: every model has the same."""
    return read_cases(folder, SegmenterConfig.read(CONFIG).cases)


def train(name: str, args: argparse.Namespace, until: float) -> None:
    """Train a model, or go on where its run was stopped."""
    config = config_of(name, args.data)
    started = time.process_time()
    train_segmenter(
        config,
        args.runs / name,
        seed=0,
        device=torch.device(args.device),
        checkpoint_every=config.optimisation.images // 10,
        progress=partial(tqdm, desc=name, mininterval=5),
        stop=lambda: time.monotonic() > until,
        make=MODELS[name].make,
        cases=(cases_in(config.cases.train), cases_in(config.cases.val)),
    )
    print(f"{name}: {time.process_time() - started:.0f} s of CPU in this call")


def trained(name: str, args: argparse.Namespace) -> Segmenter:
    """The model as its run left it."""
    make = MODELS[name].make
    card = args.runs / name / f"{config_of(name, args.data).name}.json"
    if make is None:
        return load(card)
    state, _ = read_checkpoint(card.with_suffix(".safetensors"))
    return Segmenter(filled(make, state), json.loads(card.read_text()), 8)


def run(name: str, args: argparse.Namespace, until: float) -> None:
    """Every validation image that is not measured yet, or not drawn for."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = found.setdefault("rows", {}).setdefault(name, {})
    cases = cases_in(config_of(name, args.data).cases.val)
    drawn = {
        case.name
        for case in cases
        if name == "diffusion" and number_of(case.name) % args.draws_every == 0
    }
    left = [
        case
        for case in cases
        if case.name not in rows
        or (case.name in drawn and "draws" not in rows[case.name])
    ]
    segmenter = trained(name, args)
    for case in tqdm(left, desc=f"measure {name}"):
        if time.monotonic() > until:
            return
        rows[case.name] = measured(case, segmenter, DRAWS * (case.name in drawn))
        found |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine()}
        found["labels"] = list(segmenter.labels)
        text = json.dumps(found, indent=1) + "\n"
        io.replace(RESULTS, lambda path, text=text: Path(path).write_text(text))
    if name == "diffusion":
        draw_picture(cases, segmenter)


def head_of(name: str) -> str:
    """Whose image a case is: ``head_17`` of ``head_17-t1-0``."""
    return name.split("-")[0]


def contrast_of(name: str) -> str:
    """``t1``, ``t2`` or ``random``."""
    return name.split("-")[1]


def number_of(name: str) -> int:
    """Which of the head's images a case is."""
    return int(name.split("-")[2])


def first_pass(case: Case, segmenter: Segmenter) -> Tensor:
    """P(tissue | MR)."""
    like = torch.zeros(1, len(segmenter.labels), *case.grid.shape)
    prior = accelerated(segmenter.given(case), "bf16", compile=False)
    return probability(prior, like, Generator().manual_seed(1))[0].float()


def measured(case: Case, segmenter: Segmenter, draws: int) -> dict[str, Any]:
    """What one image's probabilities, and draws if there are any, are worth."""
    start = time.perf_counter()
    p = first_pass(case, segmenter)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {"expected": {"seconds": seconds} | scores(p, case)}
    if not draws:
        return row
    result = segment_case(
        case,
        segmenter,
        samples=draws,
        steps=STEPS,
        generator=Generator().manual_seed(1),
        precision="bf16",
    )
    row["draws"] = {"seconds": result.seconds} | scores(result.prob, case)
    row["volumes_ml"] = result.volumes_ml.tolist()
    return row


def likeliest(prob: Tensor) -> Tensor:
    """The mask of each label where it is likelier than every other, and than none."""
    none = 1 - prob.sum(0, keepdim=True)
    best = torch.cat([none, prob]).argmax(0)
    return best == torch.arange(1, len(prob) + 1)[:, None, None, None]


def scores(prob: Tensor, case: Case) -> dict[str, Any]:
    """Of a probability map of each tissue, and of the likeliest's mask: lists by tissue."""
    assert case.masks is not None
    truth, spacing, near = case.masks, case.grid.spacing, _near(case)
    mask = likeliest(prob)
    curves = [
        uncertainty.reliability(p[near], t[near])
        for p, t in zip(prob, truth, strict=True)
    ]
    pairs = prob[:, near], truth[:, near].float()
    return {
        "dice": metrics.dice(mask, truth).tolist(),
        "hd95": metrics.hd95(mask, truth, spacing, empty="penalty").tolist(),
        "volume_error": metrics.volume_error(mask, truth).tolist(),
        "brier": (pairs[0] - pairs[1]).square().mean(1).tolist(),
        "reliability": [
            [part.nan_to_num().tolist() for part in curve] for curve in curves
        ],
    }


def _near(case: Case) -> Tensor:
    """Voxels within 10 mm of the brain: where calibration is not a matter of air."""
    from scipy import ndimage

    assert case.masks is not None
    outside = ~case.masks.any(0).numpy()
    distance: Any = ndimage.distance_transform_edt(outside, case.grid.spacing)
    return torch.from_numpy(distance <= 10.0)


# --- the page


def of_heads(rows: dict[str, dict[str, Any]], kind: str, key: str) -> np.ndarray:
    """(heads, tissues): the mean over each head's images."""
    heads: dict[str, list[Any]] = {}
    for name, row in rows.items():
        heads.setdefault(head_of(name), []).append(row[kind][key])
    return np.array([np.nanmean(np.array(values), 0) for values in heads.values()])


def calibration_error(rows: dict[str, dict[str, Any]], kind: str) -> np.ndarray:
    """Of each tissue, over all images' voxels together."""
    curves = np.array([row[kind]["reliability"] for row in rows.values()])
    predicted, observed, voxels = curves.transpose(2, 0, 1, 3)
    gap = np.abs(((observed - predicted) * voxels).sum(0))
    return gap.sum(-1) / voxels.sum((0, 2))


def interval(heads: np.ndarray, seed: int = 0) -> str:
    """Mean of (heads,), and its 95 % interval over heads drawn again."""
    rng = np.random.default_rng(seed)
    means = rng.choice(heads, (2000, len(heads))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{heads.mean():.3f} ({low:.3f} … {high:.3f})"


def write_page(found: dict[str, Any]) -> None:
    """A table of both models by tissue, and one by contrast."""
    labels, every = found["labels"], found["rows"]
    shown = []
    for name, model in MODELS.items():
        rows = every.get(name, {})
        for kind, how in (("expected", "one pass"), ("draws", f"{DRAWS} draws' mean")):
            some = {k: row for k, row in rows.items() if kind in row}
            if some:
                shown.append((f"{model.title}, {how}", kind, some))
    lines = [
        "| tissue | model | images | Dice | HD95 (mm) | volume error | Brier | ECE |",
        "| --- |" + " --- |" * 7,
    ]
    for k, label in [*enumerate(labels), (slice(None), "**mean**")]:
        for title, kind, rows in shown:
            dice, hd95, volume, brier = (
                of_heads(rows, kind, key)[:, k]
                for key in ("dice", "hd95", "volume_error", "brier")
            )
            each = dice if dice.ndim == 1 else dice.mean(1)
            ece = np.mean(calibration_error(rows, kind)[k])
            off = f"{np.mean(volume):+.1%}" if dice.ndim == 1 else ""
            lines.append(
                f"| {label} | {title} | {len(rows)} | {interval(each)} "
                f"| {np.mean(hd95):.1f} | {off} | {np.mean(brier):.4f} | {ece:.3f} |"
            )
    contrasts = ["t1", "t2", "random"]
    lines += [
        "",
        "| mean Dice | "
        + " | ".join(c.replace("t", "T", c != "random") for c in contrasts)
        + " | seconds |",
        "| --- |" + " --- |" * 4,
    ]
    for title, kind, rows in shown:
        cells = []
        for contrast in contrasts:
            some = {k: r for k, r in rows.items() if contrast_of(k) == contrast}
            cells.append(
                interval(of_heads(some, kind, "dice").mean(1)) if some else "–"
            )
        seconds = np.mean([row[kind]["seconds"] for row in rows.values()])
        lines.append(f"| {title} | {' | '.join(cells)} | {seconds:.1f} |")
    n = {head_of(name) for rows in every.values() for name in rows}
    lines += [
        "",
        f"{len(n)} heads on whose label maps nothing was trained, four images of each "
        "(T1, T2 and two of random contrast), **all simulated**. A voxel (2 mm) is of the "
        "likeliest tissue, or of none. In parentheses: the bootstrap's 95 % interval over "
        "heads, which are few; HD95 is the larger of both directed 95th percentiles; Brier "
        "and ECE within 10 mm of the brain. Network in bf16. "
        f"{found['date']}, {found['machine']}, seed 1.",
    ]
    if PICTURE.exists():
        told = "Simulated MR, true tissues, found tissues and their entropy"
        lines += [
            "",
            f"![{told}]({PICTURE.name})",
            "",
            "*An axial slice of the first of these heads in each contrast, by the "
            "diffusion model's first pass.*",
        ]
    put(PAGE, "\n".join(lines), BEGIN, END)


COLOURS = ("#e8e2d0", "#8f8f8f", "#f2a900", "#c33bd6", "#1f8fff", "#3fc6b8")


def draw_picture(cases: list[Case], segmenter: Segmenter) -> None:
    """One slice of the first head in each contrast: MR, truth, found, and doubt."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first = [case for case in cases if head_of(case.name) == head_of(cases[0].name)]
    chosen = {contrast_of(case.name): case for case in reversed(first)}
    figure = Figure(figsize=(9, 2.6 * len(chosen) + 0.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(chosen), 4, squeeze=False)
    tissues = ListedColormap(["black", *COLOURS])
    top = len(segmenter.labels)
    for row, contrast in zip(axes, sorted(chosen), strict=True):
        case = chosen[contrast]
        assert case.masks is not None
        p = first_pass(case, segmenter)
        # The slice with most of the smallest tissues: the ventricles and deep nuclei.
        z = int(case.masks[[2, 4]].flatten(2).sum((0, 2)).argmax())
        number = torch.arange(1, top + 1)[:, None, None]
        codes = [(m[:, z] * number).sum(0) for m in (case.masks, likeliest(p))]
        none = (1 - p[:, z].sum(0, keepdim=True)).clamp(0, 1)
        doubt = torch.special.entr(torch.cat([none, p[:, z]])).sum(0)
        row[0].imshow(case.scans["mr"][z], cmap="gray", vmin=0, vmax=1)
        for ax, code in zip(row[1:3], codes, strict=True):
            ax.imshow(
                code, cmap=tissues, vmin=-0.5, vmax=top + 0.5, interpolation="nearest"
            )
        row[3].imshow(doubt, cmap="inferno", vmin=0, vmax=1.1)
        row[0].set_ylabel(contrast if contrast == "random" else contrast.upper())
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
    titles = ("simulated MR", "truth", "likeliest tissue", "entropy (nats, 0 … 1.1)")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    patches = [
        Patch(color=colour, label=label)
        for colour, label in zip(COLOURS, segmenter.labels, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=top, fontsize=8)
    canvas.print_figure(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    main()
