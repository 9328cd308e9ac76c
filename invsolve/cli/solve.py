"""invsolve solve: images from measurements."""

import dataclasses
import inspect
import math
import os
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import numpy as np
import torch
import typer
from torch import Generator

from invsolve import demo as demonstration, io, priors
from invsolve.preview import Preview
from invsolve.priors.weights import read_card, sha256
from invsolve.problem import InverseProblem
from invsolve.report import Report, Result, shown, shown_unit, table, told
from invsolve.samplers.ztv import MRI, SPARSE_VIEW
from invsolve.shards import Shard
from invsolve.solve import solve as run_solve
from invsolve.speed import Precision

from .facts import measured_facts, progress_bar, record_of, run_facts
from .files import (
    at_once,
    check_folder,
    check_writable,
    write_image,
    write_json,
    write_report,
)
from .images import beginning, read_slices
from .loading import as_equivariant, check_images, check_unit, load_prior, prior_facts
from .measured import (
    TOMOGRAPHY,
    build_noise,
    build_operator,
    has_colours,
    read_measurements,
)
from .options import Device, PriorName, Seed, device_of, lookup, need
from .samplers import SAMPLERS, options_of
from .stacks import AS_VOLUMES, as_volume, meet, of_volumes, slice_by_slice

EXAMPLE = "\n\n".join(
    (
        "Example: invsolve solve y.npz -o out --sampler dds --samples 8 --truth ct.nii.gz",
        "Example: invsolve solve y.npz -o out --sampler tv --set lam=30",
        "Example: invsolve solve y.npy -o out --pixel-mm 3.9 --size 128 --counts 2e4",
    )
)


def solve(
    measurements: Annotated[
        Path,
        typer.Argument(help="As simulate writes them (.npz), or a sinogram (.npy)."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder.")],
    sampler: Annotated[
        str, typer.Option(help=f"One of {', '.join(SAMPLERS)}.")
    ] = "dds",
    prior: PriorName = demonstration.PRIOR,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="For each slice; 8 of a posterior, else 1."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the sampler.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A sampler's option; repeat."),
    ] = None,
    init: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image to begin with, such as another run's mean.nii.gz; repeat for "
            "the mean of several."
        ),
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="The true image, to compare with.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(metavar="LO,HI", help="Grey scale of the report.")
    ] = None,
    save_samples: Annotated[
        bool, typer.Option("--save-samples", help="Write samples.npy, too.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that is not empty.")
    ] = False,
    pixel_mm: Annotated[
        float | None, typer.Option(help="Sinogram: a pixel's side.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Sinogram: pixels a side of the image.")
    ] = None,
    detector_mm: Annotated[
        float | None, typer.Option(help="Sinogram: the detector's pitch; as pixel-mm.")
    ] = None,
    angles: Annotated[
        Path | None,
        typer.Option(help="Sinogram: radians (.npy); evenly over 180° by default."),
    ] = None,
    geometry: Annotated[
        Path | None,
        typer.Option(help="Sinogram: all of that and fan beams, too, as a .json file."),
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Sinogram: Gaussian noise of so much.")
    ] = None,
    counts: Annotated[
        float | None,
        typer.Option(help="Sinogram: photon noise of so many through air."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of the network: bf16 where the device computes in it.")
    ] = "float32",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Keep what is done here; the same command goes on from it."),
    ] = None,
    equivariant: Annotated[
        bool,
        typer.Option(
            "--equivariant",
            help="Mirror images and shifts are as likely: better where it is so, at no "
            "cost.",
        ),
    ] = False,
    volume: Annotated[
        bool,
        typer.Option(
            "--volume",
            help=f"Solve the slices as one volume, by {' or '.join(AS_VOLUMES)}; dds3d and "
            "mbir always do.",
        ),
    ] = False,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A second prior of a volume, asked at half of its noise levels.",
        ),
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(help="A .png that shows, while it runs, how far it has come."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Reconstruct images from measurements.

    Writes mean.nii.gz (and mean.png, if it has colours), std.nii.gz (of posterior samples
    only), report.png, report.html and result.json. CT is in HU. A sinogram is (views,
    detectors) or (slices, views, detectors), line integrals of attenuation without a unit.
    Under torchrun several processes share a volume (dds3d, mbir): see docs/volumes.md.
    """
    need("nibabel", "matplotlib", "jinja2", *(["skimage"] if truth else []))
    where = device_of(device)
    method = lookup(SAMPLERS, sampler, "sampler")
    # The stack, as a volume: by a prior of slices, and not one by one.
    takes = inspect.signature(method).parameters
    coupled = "aspect" in takes and demonstration.needs_prior(method)
    if volume and not coupled and sampler not in AS_VOLUMES:
        raise ValueError(
            f"--volume is for {', '.join(AS_VOLUMES)}: {sampler} solves slice by slice, "
            "leave it out"
        )
    whole = coupled or volume
    if beside is not None and not whole:
        raise ValueError(
            "--beside is of volumes by two priors: give --sampler dds3d, or pnp --volume"
        )
    lookup(dict.fromkeys(get_args(Precision)), precision, "precision")
    limits = _window(window)
    check_folder(out, force=force)
    if preview is not None:
        if preview.suffix.lower() != ".png":
            raise ValueError(f"--preview {preview}: name it with .png")
        check_writable(preview)
    raw = {
        "pixel_mm": pixel_mm,
        "size": size,
        "detector_mm": detector_mm,
        "angles": angles,
        "geometry": geometry,
        "sigma": sigma,
        "counts": counts,
    }
    m = read_measurements(measurements, raw)
    colour = has_colours(m)
    if colour and whole:
        raise ValueError(
            f"{sampler} is for stacks of slices, not for a picture: use dds"
        )
    try:
        problem = InverseProblem(m.y, build_operator(m.operator), build_noise(m.noise))
    except ValueError as error:
        raise ValueError(f"cannot solve {measurements}: {error}") from error
    is_ct = m.operator["name"] in TOMOGRAPHY
    options = options_of(sampler, method, set_ or [], steps, tuned=is_ct and not whole)
    if init:
        begin = beginning(init, m, sampler, method)
        options["init"] = begin.movedim(0, 1)[None] if whole else begin
    loaded = None
    if demonstration.needs_prior(method):
        loaded = load_prior(prior)
        check_unit(prior, m.unit)
        if preview is not None:
            check_images("--preview", prior, loaded)
        loaded = as_equivariant(prior, loaded) if equivariant else loaded
    elif equivariant:
        raise ValueError(
            f"--equivariant is of priors, and {sampler} has none: leave it out"
        )
    elif preview is not None:
        raise ValueError(
            f"--preview shows a network's answers, and {sampler} asks none: leave it out"
        )
    true = read_slices(truth, m) if truth is not None else None
    kind = getattr(method, "kind", "steered")
    each = samples or (8 if kind == "posterior_sample" else 1)
    there, shard = where, Shard(len(m.y))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if "shard" not in takes:
            raise ValueError(
                f"several processes share a volume by dds3d or mbir, not by {sampler}: "
                "give --sampler dds3d, or start one process"
            )
        if preview is not None:
            raise ValueError("--preview is of one process: leave it out")
        where, shard = meet(where, len(m.y))
    if whole:
        assert loaded is not None
        if coupled:
            preset = SPARSE_VIEW if is_ct else MRI
            aspect = m.spacing[0] / m.spacing[1]
            options = {**preset, "aspect": aspect, **options}
        names = [prior] if beside is None else [prior, beside]
        if beside is not None:
            check_unit(beside, m.unit)
        parts = [of_volumes(n, where, equivariant=equivariant) for n in names]
        loaded = parts[0][0]
        if beside is not None:
            loaded = priors.TwoPlanes(loaded, parts[1][0], drawn=True)
        asked = [part for _, of_slices in parts for part in of_slices]
        if init:
            options["init"] = shard.cut(options["init"])
        problem, there = as_volume(
            problem, loaded, asked, where, shard, begun=bool(init)
        )
    mine: dict[str, Any] = {}
    if shard.count > 1:
        mine["shard"] = shard
        if checkpoint is not None:  # each keeps its own
            checkpoint = checkpoint.with_name(f"{checkpoint.name}.{shard.rank}")

    watch = None
    if preview is not None:
        watch = Preview(preview, unit=m.unit, window=limits, spacing=m.spacing)

    loops = each if whole else math.ceil(each * len(m.y) / 16)
    with progress_bar(sampler, loops, where, shown=shard.rank == 0) as progress:
        solution = run_solve(
            problem,
            loaded,
            method,
            samples=each,
            generator=Generator().manual_seed(seed),
            device=there,
            precision=cast(Precision, precision),
            checkpoint=checkpoint,
            watch=watch,
            progress=progress,
            **options,
            **mine,
        )
    if shard.count > 1:
        whole_volume = shard.gather(solution.samples, dim=3)
        solution = dataclasses.replace(solution, samples=whole_volume)
        torch.distributed.destroy_process_group()
        if shard.rank:
            return
    if watch is not None:
        watch.show(solution.samples[0], priors.AffineMap(1.0, 0.0))
    if whole:
        solution = slice_by_slice(solution)
    if colour:  # shown and written as three slices
        as_slices = solution.samples.movedim(2, 1)
        solution = dataclasses.replace(solution, samples=as_slices)
    options = told(options)
    if init:
        files = [f"{path.name}, sha256 {sha256(path)}" for path in init]
        options["init"] = " and ".join(files)
    result = Result.of(sampler, solution, m.unit, true, options, colour=colour)
    simulated = bool(m.note.get("simulated", False))
    facts = _sources(measurements, m, truth)
    if loaded is not None:
        facts |= prior_facts(read_card(prior)[0])
    if beside is not None:
        facts |= {"prior beside it": str(read_card(beside)[0].get("name", "?"))}
    report = Report(
        title=f"Reconstruction by {sampler}",
        summary=_summary(m, each, whole=whole),
        results=[result],
        unit=shown_unit(m.unit),
        truth=true,
        window=limits,
        spacing=m.spacing if whole else None,
        colour=colour,
        facts={
            "Measurements": measured_facts(problem, simulated=simulated),
            "Data": facts,
            "Run": run_facts(seed, where),
        },
    )
    settings = {
        "command": "solve",
        "sampler": sampler,
        "options": {**options},
        "samples": each,
        "precision": precision,
        "prior": None if loaded is None else prior,
        "beside": beside,
        "equivariant": equivariant,
        "processes": shard.count,
        "operator": {
            k: v for k, v in m.operator.items() if k not in ("angles", "mask")
        },
        "noise": m.noise,
        "simulated": simulated,
    }
    with at_once(out) as folder:
        write_image(folder / "mean.nii.gz", result.image, m)
        if result.std is not None:
            write_image(folder / "std.nii.gz", result.std, m, spread=True)
        if colour:
            picture = io.Image(result.image.float().cpu(), m.affine, colour=True)
            io.write(folder / "mean.png", picture)
        if save_samples:
            stack = shown(solution.samples[:, :, 0], m.unit).cpu().numpy()
            np.save(folder / "samples.npy", stack)
        write_report(folder, report)
        record = record_of(report, settings, seed, where, measurements)
        write_json(folder / "result.json", record)
    typer.echo(table([result]))
    typer.echo(f"wrote {out}: mean.nii.gz, report.html and what belongs to them")


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--window {text}: write it as LO,HI, such as -160,240"
        ) from error
    if not low < high:
        raise ValueError(f"--window {text}: the first number must be the smaller")
    return low, high


def _sources(
    measurements: Path, m: io.Measurements, truth: Path | None
) -> dict[str, str]:
    """The files that a reconstruction is of, for its report."""
    facts = {"file": measurements.name, "sha256": sha256(measurements)}
    if "image" in m.note:
        facts["simulated from"] = str(m.note["image"])
    if truth is not None:
        facts |= {"truth": truth.name, "truth's sha256": sha256(truth)}
    return facts


def _summary(m: io.Measurements, samples: int, *, whole: bool) -> str:
    """What was reconstructed, in two sentences."""
    what, n = "picture" if has_colours(m) else "slice", len(m.y)
    images = f"{n} {what}{'s' if n > 1 else ''}{' of one volume' if whole else ''}"
    draws = f"{samples} sample{'s' if samples > 1 else ''}{'' if whole else ' each'}"
    origin = "The measurements are as given; nothing was simulated."
    if m.note.get("simulated", False):
        origin = "The measurements were simulated."
    return f"{images}, {draws}. {origin}"
