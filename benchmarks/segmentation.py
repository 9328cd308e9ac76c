"""The segmenters of head-and-neck tumours, and what they are compared with.

    python benchmarks/segmentation.py train --data $INVSOLVE_DATA --model petct
    python benchmarks/segmentation.py run   --data $INVSOLVE_DATA
    python benchmarks/segmentation.py docs

``train`` trains one model, all alike: the same cases (real CT, simulated tumours and PET),
windows, steps and learning rate; ``run`` measures each on OpenKBP's validation patients,
whom nothing was trained on; ``docs`` writes docs/segmentation.md. Each goes on where it
was stopped.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ct_headneck import machine, put
from torch import Generator, Tensor, nn
from tqdm import tqdm

from invsolve import io
from invsolve.priors.families.family import filled
from invsolve.priors.reading import read_checkpoint
from invsolve.priors.unet import folded, unfolded
from invsolve.segmentation import metrics, uncertainty
from invsolve.segmentation.cases import Case, modalities_of
from invsolve.segmentation.segmenter import (
    Segmenter,
    Unaware,
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

RESULTS = Path(__file__).parent / "results" / "segmentation.json"
PAGE = Path("docs/segmentation.md")
CONFIG = Path("configs/petct-headneck.toml")
DRAWS, STEPS = 4, 20
BEGIN, END = "<!-- segmentation: begin -->", "<!-- segmentation: end -->"


def residual_unet(scans: int = 2, labels: int = 1) -> nn.Module:
    """MONAI's residual U-Net, on the same folded voxels as ours."""
    from monai.networks.nets.unet import UNet

    folds = 8 * scans, 8 * labels
    return Unaware(Folded(UNet(3, *folds, (32, 64, 128), (2, 2), num_res_units=2)))


def unetr() -> nn.Module:
    """MONAI's UNETR (Hatamizadeh et al., WACV 2022): 27 tokens of 16³ voxels each.

    Of a width that takes about as long as the others do. Only windows of 48³ fit it.
    """
    from monai.networks.nets.unetr import UNETR

    return Unaware(
        UNETR(2, 1, (48, 48, 48), 8, hidden_size=96, mlp_dim=384, num_heads=6)
    )


class Folded(nn.Module):
    """A network of 2×2×2 voxels a position, as ours are, for the same speed."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return unfolded(self.net(folded(images, 2)), 2)


@dataclass(frozen=True)
class Model:
    """What is trained, as it differs from the bundled segmenter.

    Attributes:
        title: in words.
        cases, network, optimisation: entries of the configuration that differ.
        dice: the weight of the Dice loss, which the references are trained with.
        make: another network.
        side: what it needs a side to be divisible by.
    """

    title: str
    cases: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    optimisation: dict[str, Any] = field(default_factory=dict)
    dice: float = 0.0
    make: Callable[[], nn.Module] | None = None
    side: int | None = None


MODELS = {
    "petct": Model("3D diffusion, PET and CT"),
    "slices": Model("2D diffusion, PET and CT", network={"dims": 2}),
    "pet": Model(
        "3D diffusion, PET alone", cases={"modalities": modalities_of(["pet"])}
    ),
    "ct": Model("3D diffusion, CT alone", cases={"modalities": modalities_of(["ct"])}),
    "unet": Model("3D U-Net (MONAI), PET and CT", dice=1.0, make=residual_unet, side=8),
    "unetr": Model(
        "3D transformer (MONAI's UNETR), PET and CT",
        cases={"crop": 48},
        optimisation={"crop_part": 0.0},  # as many voxels, all in whole windows
        dice=1.0,
        make=unetr,
        side=48,
    ),
}


def main() -> None:
    """Train, measure, or write down."""
    parser = argparse.ArgumentParser(description="Segmenters, all trained alike.")
    parser.add_argument("what", choices=["train", "run", "docs"])
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--runs", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--model", choices=list(MODELS), action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    every = "of how many patients one is drawn for; those drawn before stay"
    parser.add_argument("--draws-every", type=int, default=3, help=every)
    args = parser.parse_args()
    if args.what == "docs":
        write_page(json.loads(RESULTS.read_text()))
        return
    until = time.monotonic() + 60 * args.minutes
    for name in args.model or MODELS:
        (train if args.what == "train" else run)(name, args, until)


def config_of(name: str, data: Path) -> SegmenterConfig:
    """The bundled segmenter's configuration, with what the model changes."""
    config, model = SegmenterConfig.read(CONFIG), MODELS[name]
    folders = {part: data / getattr(config.cases, part) for part in ("train", "val")}
    return config.model_copy(
        update={
            "name": "petct-headneck" if name == "petct" else f"petct-{name}",
            "cases": config.cases.model_copy(update={**folders, **model.cases}),
            "network": {**config.network, **model.network},
            "optimisation": config.optimisation.model_copy(update=model.optimisation),
            "dice": model.dice,
        }
    )


@cache
def cases_in(folder: Path) -> list[Case]:
    """All patients of a folder: every model has the same."""
    return read_cases(folder, SegmenterConfig.read(CONFIG).cases)


def train(name: str, args: argparse.Namespace, until: float) -> None:
    """Train a model, or go on where its run was stopped."""
    model, config = MODELS[name], config_of(name, args.data)
    started = time.process_time()
    train_segmenter(
        config,
        args.runs / name,
        seed=0,
        device=torch.device(args.device),
        checkpoint_every=config.optimisation.images // 10,
        progress=partial(tqdm, desc=name, mininterval=5),
        stop=lambda: time.monotonic() > until,
        make=model.make,
        cases=(cases_in(config.cases.train), cases_in(config.cases.val)),
    )
    print(f"{name}: {time.process_time() - started:.0f} s of CPU in this call")


def trained(name: str, args: argparse.Namespace) -> Segmenter:
    """The model as its run left it."""
    model = MODELS[name]
    card = args.runs / name / f"{config_of(name, args.data).name}.json"
    if model.make is None:
        return load(card)
    state, _ = read_checkpoint(card.with_suffix(".safetensors"))
    net = filled(model.make, state)
    return Segmenter(net, json.loads(card.read_text()), model.side or 1)


def run(name: str, args: argparse.Namespace, until: float) -> None:
    """Every validation patient that is not measured yet, or not drawn for."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = found.setdefault("rows", {}).setdefault(name, {})
    config = config_of(name, args.data)
    cases = cases_in(config.cases.val)
    drawn = {case.name for case in cases[:: args.draws_every] if name == "petct"}
    left = [
        case
        for case in cases
        if case.name not in rows
        or (case.name in drawn and "draws" not in rows[case.name])
    ]
    if not left:
        return
    segmenter = trained(name, args)
    for case in tqdm(left, desc=f"measure {name}"):
        if time.monotonic() > until:
            break
        rows[case.name] = measured(case, segmenter, DRAWS * (case.name in drawn))
        found |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine()}
        keep(found)
    if name == "petct" and all(case.name in rows for case in cases):
        maps = [
            first_pass(case, segmenter).float() for case in tqdm(cases, "conformal")
        ]
        found["conformal"] = [conformal(cases, maps, a) for a in (0.1, 0.2)]
        keep(found)


def keep(found: dict[str, Any]) -> None:
    """All that is known so far."""
    text = json.dumps(found, indent=1) + "\n"
    io.replace(RESULTS, lambda path: Path(path).write_text(text))


def first_pass(case: Case, segmenter: Segmenter) -> Tensor:
    """P(tumour | scans)."""
    like = torch.zeros(1, len(segmenter.labels), *case.grid.shape)
    prior = accelerated(segmenter.given(case), "bf16", compile=False)
    return probability(prior, like, Generator().manual_seed(1))[0]


def measured(case: Case, segmenter: Segmenter, draws: int) -> dict[str, Any]:
    """What one patient's probabilities, and draws if there are any, are worth."""
    assert case.masks is not None
    generator, truth = Generator().manual_seed(1), case.masks
    start = time.perf_counter()
    p = first_pass(case, segmenter)
    row: dict[str, Any] = {"volume_ml": float(truth.sum() * case.grid.voxel_ml)}
    row["expected"] = {"seconds": time.perf_counter() - start} | scores(p, case)
    if not draws:
        return row
    result = segment_case(
        case,
        segmenter,
        samples=draws,
        steps=STEPS,
        generator=generator,
        precision="bf16",
    )
    each = metrics.dice(result.samples, truth.expand_as(result.samples))
    row["draws"] = {"seconds": result.seconds} | scores(result.prob, case)
    row["volumes_ml"] = [float(v) for v in result.volumes_ml[:, 0]]
    row["dice_of_each"] = each.tolist()
    return row


def scores(prob: Tensor, case: Case) -> dict[str, Any]:
    """Of a probability map, and of its mask at one half."""
    assert case.masks is not None
    truth, spacing, near = case.masks, case.grid.spacing, _near(case.masks[0])
    mask, p, seen = prob >= 0.5, prob[near], truth[near]
    curve = uncertainty.reliability(p, seen)
    return {
        "dice": float(metrics.dice(mask, truth)),
        "jaccard": float(metrics.jaccard(mask, truth)),
        "precision": float(metrics.precision(mask, truth, empty="zero")),
        "recall": float(metrics.recall(mask, truth)),
        "hd95": float(metrics.hd95(mask, truth, spacing, empty="penalty")),
        "assd": float(metrics.assd(mask, truth, spacing, empty="penalty")),
        "lesion_f1": float(metrics.lesion_f1(mask, truth)),
        "volume_error": float(metrics.volume_error(mask, truth)),
        "brier": float((p - seen.float()).square().mean()),
        "reliability": [part.nan_to_num().tolist() for part in curve],
    }


def calibration_error(rows: list[dict[str, Any]]) -> float:
    """Expected calibration error over all patients' voxels together."""
    predicted, observed, voxels = (
        np.array([row["reliability"][k] for row in rows]) for k in range(3)
    )
    gap = np.abs(((observed - predicted) * voxels).sum(0))
    return float(gap.sum() / voxels.sum())


def conformal(cases: list[Case], maps: list[Tensor], alpha: float) -> dict[str, Any]:
    """The threshold by every second patient, and what the others miss at it."""
    masks = [case.masks for case in cases]
    half = [(m, t) for m, t in zip(maps, masks, strict=True) if t is not None]
    fit, test = half[::2], half[1::2]
    level = uncertainty.conformal_threshold(
        [m for m, _ in fit], [t for _, t in fit], alpha
    )
    missed = [float((t & (m < level)).sum() / t.sum()) for m, t in test]
    extra = [float((~t & (m >= level)).sum() / t.sum()) for m, t in test]
    return {
        "alpha": alpha,
        "threshold": float(level),
        "missed": float(np.mean(missed)),
        "extra": float(np.mean(extra)),
        "patients": [len(fit), len(test)],
    }


def _near(truth: Tensor) -> Tensor:
    """Voxels within 20 mm of the tumour: where calibration is not a matter of air."""
    from scipy import ndimage

    distance: Any = ndimage.distance_transform_edt(~truth.numpy())
    return torch.from_numpy(distance * 4.0 <= 20.0)[None]


# --- the page


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean, and its 95 % interval over patients drawn again."""
    rng = np.random.default_rng(seed)
    draws = rng.choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def write_page(found: dict[str, Any]) -> None:
    """The table of all models, by first pass and by draws."""
    lines = [
        "| model | mask from | patients | Dice | HD95 (mm) | ASSD (mm) | lesion F1 "
        "| precision | recall | Brier | ECE | seconds |",
        "| --- |" + " --- |" * 11,
    ]
    for name, model in MODELS.items():
        every = list(found["rows"].get(name, {}).values())
        if not every:
            continue
        kinds = [k for k in ("expected", "draws") if any(k in row for row in every)]
        for kind in kinds:
            rows = [row for row in every if kind in row]

            def mean(key: str, kind: str = kind, rows: Any = rows) -> float:
                return float(np.nanmean([row[kind][key] for row in rows]))

            dice, low, high = bootstrap(np.array([row[kind]["dice"] for row in rows]))
            ece = calibration_error([row[kind] for row in rows])
            label = "one pass" if kind == "expected" else f"{DRAWS} draws' mean"
            lines.append(
                f"| {model.title} | {label} | {len(rows)} "
                f"| {dice:.3f} ({low:.3f} … {high:.3f}) "
                f"| {mean('hd95'):.1f} | {mean('assd'):.1f} | {mean('lesion_f1'):.2f} "
                f"| {mean('precision'):.2f} | {mean('recall'):.2f} "
                f"| {mean('brier'):.4f} | {ece:.3f} | {mean('seconds'):.1f} |"
            )
    for found_at in found.get("conformal", []):
        lines += [
            "",
            f"Conformal threshold for at most {found_at['alpha']:.0%} of the tumour missed "
            f"on average, by {found_at['patients'][0]} of these patients: "
            f"P ≥ {found_at['threshold']:.3f}; the {found_at['patients'][1]} others miss "
            f"{found_at['missed']:.1%}, at {found_at['extra']:.2f} tumour volumes marked "
            "beside.",
        ]
    count = max(len(rows) for rows in found["rows"].values())
    lines += [
        "",
        f"{count} validation patients of OpenKBP (real CT), on whom nothing was trained; "
        "**tumours and PET are simulated**. Dice with the bootstrap's 95 % interval "
        "over patients; HD95 is the larger of both directed 95th percentiles; Brier and "
        "ECE within 20 mm of the tumour. Network in bf16. "
        f"{found['date']}, {found['machine']}, seed 1.",
    ]
    put(PAGE, "\n".join(lines), BEGIN, END)


if __name__ == "__main__":
    main()
