"""invsolve segment: masks from scans."""

import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Generator, Tensor

from invsolve import io
from invsolve.report import machine, versions
from invsolve.speed import Precision

from .facts import progress_bar, run_facts
from .files import at_once, check_folder, sha256_of, write_json
from .images import read_masks, read_scan
from .options import Device, Seed, device_of, need

EXAMPLE = "Example: invsolve segment ct.nii.gz pet.nii.gz -o out --samples 8 --seed 1"


def segment(
    scans: Annotated[
        list[Path],
        typer.Argument(
            help="What the model sees: CT in HU and PET in SUV, or MR. NIfTI, or a folder "
            "of one DICOM series each."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder.")],
    samples: Annotated[int, typer.Option(min=1, help="Draws of the mask.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Of each draw, 10 or more.")] = 20,
    model: Annotated[
        str, typer.Option(help="A bundled name, or the path of a card (.json).")
    ] = "petct-headneck",
    threshold: Annotated[
        float, typer.Option(help="A voxel of so much probability is of the mask.")
    ] = 0.5,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="The true mask (NIfTI), 0 and the labels' numbers, to score."
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="Of the network: bf16 where the device computes in it."),
    ] = "float32",
    dicom_seg: Annotated[
        bool,
        typer.Option("--dicom-seg", help="Write mask.dcm, too, of a DICOM series."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that is not empty.")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Draw masks of what the model knows, given CT and PET, or MR.

    Scans may lie on different grids: what counts is where they are in millimetres.
    Writes mask.nii.gz, probability.nii.gz and std.nii.gz on the first scan's grid,
    volumes.json, and a page, index.html, with its pictures. Research software, not a
    medical device.
    """
    from invsolve.segmentation import report as reports, segmenter as segmenters

    folders = [path for path in scans if path.is_dir()]
    need(
        *("nibabel", "matplotlib", "jinja2"),
        *(["pydicom"] if folders else []),
        *(["highdicom"] if dicom_seg else []),
    )
    where = device_of(device)
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold is a probability, > 0 and ≤ 1, got {threshold}")
    first = scans[0]
    if dicom_seg and not first.is_dir():
        raise ValueError(
            f"--dicom-seg writes on the slices of a DICOM series, and {first} is no folder "
            "of one: leave it out"
        )
    check_folder(out, force=force)
    loaded = segmenters.load(model)
    segmenters.check_scans(len(scans), loaded)
    kinds = list(loaded.scans)
    read = {
        kind: read_scan(path, how.unit)
        for path, (kind, how) in zip(scans, loaded.scans.items(), strict=True)
    }
    scan, uptake = read[kinds[0]], read.get("pet")
    true = None if truth is None else read_masks(truth, scan, len(loaded.labels))
    with progress_bar("segment", 1, where) as progress:
        drawn = segmenters.segment(
            *read.values(),
            model=loaded,
            samples=samples,
            steps=steps,
            generator=Generator().manual_seed(seed),
            device=where,
            precision=precision,
            progress=progress,
        )
    inputs = {
        what: {"name": path.name, "sha256": sha256_of(path)}
        for what, path in zip(
            [*(kind.upper() for kind in kinds), "truth"], [*scans, truth], strict=True
        )
        if path is not None
    }
    report = reports.SegmentationReport(
        drawn,
        scan,
        uptake,
        threshold,
        true,
        facts={
            "Data": {
                what: f"{file['name']}, sha256 {file['sha256']}"
                for what, file in inputs.items()
            },
            "Run": {"steps": str(steps), **run_facts(seed, where)},
        },
    )
    found = reports.numbers(report)
    with at_once(out) as folder:
        for name, maps in (("probability", report.prob), ("std", report.std)):
            for label, values in zip(drawn.labels, maps, strict=True):
                part = "-" + re.sub(r"\W+", "-", label) if len(maps) > 1 else ""
                image = io.Image(values, scan.affine)
                io.write(folder / f"{name}{part}.nii.gz", image)
        coded = io.Image(_coded(report.prob, report.mask), scan.affine)
        io.write(folder / "mask.nii.gz", coded, labels=True)
        if dicom_seg:
            name = str(loaded.card.get("name", "invsolve"))
            io.write_dicom_seg(
                folder / "mask.dcm", report.mask, drawn.labels, first, model=name
            )
        reports.save_report(folder, report)
        record = {
            "labels": found,
            "settings": {
                "command": "segment",
                "model": model,
                "samples": samples,
                "steps": steps,
                "threshold": threshold,
            },
            "seed": seed,
            "kind": drawn.kind,
            "input": inputs,
            "stats": {"network_forwards": drawn.passes, "seconds": drawn.seconds},
            "versions": versions(),
            "device": str(where),
            "machine": machine(where),
        }
        write_json(folder / "volumes.json", record)
    for row in report.findings:
        spread = ""
        if row.interval_ml is not None:
            low, high = row.interval_ml
            spread = f", {report.interval_name} {low:.1f} to {high:.1f}"
        score = "" if row.scores is None else f", Dice {row.scores['Dice']:.3f}"
        typer.echo(f"{row.label}: {row.mean_ml:.1f} ml{spread}{score}")
    typer.echo(f"wrote {out}: mask.nii.gz, index.html and what belongs to them")


def _coded(prob: Tensor, mask: Tensor) -> Tensor:
    """0 outside, else the number of the label, the likeliest of those that hold."""
    best, which = torch.where(mask, prob, -1).max(0)
    return torch.where(best >= 0, which + 1.0, 0.0)
