"""invsolve train: a prior, a segmenter or dfm from a configuration."""

import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .files import check_writable
from .options import Device, Seed, data_home, device_of

EXAMPLE = "Example: invsolve train configs/ct-headneck-128.toml --out prior"


def train(
    config: Annotated[Path, typer.Argument(help="What to train, on what (TOML).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder.")],
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so long; run again to go on.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Train a prior on images, a segmenter on scans and masks, or dfm on exams alone.

    Paths in the configuration are relative to $INVSOLVE_DATA, or to the configuration's
    own folder where that is not set. A second run goes on where the first left off.
    Several GPUs train together under torchrun: see docs/training.md.
    """
    from tqdm import tqdm

    from invsolve import training, training_dfm
    from invsolve.segmentation import training as segmenters

    first = os.environ.get("RANK", "0") == "0"  # of the processes that train together
    where = device_of(device)
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes must be > 0, got {minutes}")
    check_writable(out / "checkpoint.pt")
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    home = data_home(config)
    how: dict[str, Any] = {
        "seed": seed,
        "device": where,
        "progress": lambda steps: tqdm(
            steps, "train", unit="batch", delay=1, smoothing=0, disable=not first
        ),
        "stop": lambda: time.monotonic() > end,
    }
    kind = training.ConfigFile.kind_of(config)
    if kind == "segmenter":
        masks = segmenters.SegmenterConfig.read(config)
        cases = _at(home, masks.cases)
        _, card = segmenters.train_segmenter(
            masks.model_copy(update={"cases": cases}), out, **how
        )
        use = f"invsolve segment --model {card}"
    elif kind == "dfm":
        exams = training_dfm.DFMConfig.read(config)
        data = _at(home, exams.data)
        card = training_dfm.train_dfm(
            exams.model_copy(update={"data": data}),
            out,
            warn=lambda line: typer.echo(f"warning: {line}", err=True),
            **how,
        )
        use = f"--sampler dfm --prior {card}"
    else:
        settings = training.TrainConfig.read(config)
        data = _at(home, settings.data)
        card = training.train(settings.model_copy(update={"data": data}), out, **how)
        use = f"--prior {card}"
    if first:
        typer.echo(f"wrote {card}; use it with {use}")


def _at(home: Path, section: Any) -> Any:
    """A section of a configuration, its folders under a home."""
    folders = {k: home / getattr(section, k).expanduser() for k in ("train", "val")}
    return section.model_copy(update=folders)
