"""AdamW beside Muon: the same network, batches and noise, each at its best learning rate.

    python benchmarks/optimizers.py run --data $INVSOLVE_DATA
    python benchmarks/optimizers.py docs

Trains the small network of configs/natural-64-eps.toml, predicting EDM's mixture, from
random weights; what is told is the averaged network's denoising of photographs that were
not trained on. Each result is kept as it comes, so that a run which was stopped goes on.
"""

import argparse
import csv
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ct_headneck import machine, put
from tqdm import tqdm

from invsolve import io
from invsolve.training import LEVELS, TrainConfig, train

HOME = Path(__file__).parent.parent
CONFIG = HOME / "configs" / "natural-64-eps.toml"
RESULTS = HOME / "benchmarks" / "results" / "optimizers.json"
PAGE = HOME / "docs" / "training.md"
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BEGIN, END = "<!-- optimizers: begin -->", "<!-- optimizers: end -->"


def run(args: argparse.Namespace) -> None:
    """Every optimizer at every learning rate."""
    results: dict[str, Any] = {"rows": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    config = TrainConfig.read(CONFIG)
    data = config.data.model_copy(
        update={"train": args.data / "photos/train", "val": args.data / "photos/val"}
    )
    for optimizer in ("adamw", "muon"):
        for lr in RATES:
            name = f"{optimizer} {lr:g}"
            if name in results["rows"]:
                continue
            changes: dict[str, Any] = {
                "optimizer": optimizer,
                "lr": lr,
                "images": args.images,
                "predicts": "edm",
                "warmup": 50,
                "ema": 0.99,
            }
            told = config.model_copy(
                update={
                    "data": data,
                    "optimisation": config.optimisation.model_copy(update=changes),
                    "checkpoints": 4,
                }
            )
            with TemporaryDirectory() as folder:
                began = time.process_time()
                train(told, Path(folder), seed=0, progress=tqdm)
                seconds = time.process_time() - began
                with (Path(folder) / "losses.csv").open() as file:
                    last = [float(v) for v in list(csv.reader(file))[-1]]
            results["rows"][name] = {
                "optimizer": optimizer,
                "lr": lr,
                "loss": last[1],
                "psnr": last[2:],
                "seconds": seconds,
            }
            results |= {
                "images": args.images,
                "batch": config.optimisation.batch,
                "threads": torch.get_num_threads(),
                "date": datetime.now(UTC).date().isoformat(),
                "machine": machine(),
            }
            text = json.dumps(results, indent=1) + "\n"
            io.replace(RESULTS, lambda p, text=text: Path(p).write_text(text))
            print(name, results["rows"][name], flush=True)


def table(results: dict[str, Any]) -> str:
    """Every row, and how it was made."""
    levels = " | ".join(f"σ = {level}" for level in LEVELS)
    lines = [
        f"| optimizer | learning rate | loss | {levels} | CPU seconds |",
        "| --- | --- | --- |" + " --- |" * len(LEVELS) + " --- |",
    ]
    for row in results["rows"].values():
        psnr = " | ".join(f"{v:.2f}" for v in row["psnr"])
        lines.append(
            f"| `{row['optimizer']}` | {row['lr']:g} | {row['loss']:.4f} | {psnr} | "
            f"{row['seconds']:.0f} |"
        )
    steps = results["images"] // results["batch"]
    lines += [
        "",
        f"{steps} steps of {results['batch']} squares of photographs (64²) from random "
        "weights, the same batches and noise in each row; loss: the mean of the last "
        "quarter; PSNR in dB of denoising squares held out; CPU seconds of the whole run, "
        f"beside other work. {results['date']}, {results['threads']} thread(s) of "
        f"{results['machine']}, seed 0. Made by `python benchmarks/optimizers.py run`.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run, or write."""
    parser = argparse.ArgumentParser(description="AdamW beside Muon.")
    parser.add_argument("part", choices=["run", "docs"])
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--images", type=int, default=4800)
    args = parser.parse_args()
    if args.part == "run":
        run(args)
    else:
        put(PAGE, table(json.loads(RESULTS.read_text())), BEGIN, END)


if __name__ == "__main__":
    main()
