"""The command line: files and names become objects here, and only here."""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
import typer
import typer.core
from torch import Generator, Tensor

from invsolve import demo as demonstration, io, operators as ops, priors, samplers
from invsolve.forward_prior import ForwardPrior
from invsolve.operators import LinearOperator, Noise
from invsolve.planes import PLANES
from invsolve.preview import Preview
from invsolve.priors.latent import LatentPrior
from invsolve.priors.slices import OfSlices
from invsolve.priors.weights import read_card, sha256
from invsolve.problem import InverseProblem
from invsolve.report import (
    Report,
    Result,
    machine,
    save_figure,
    save_page,
    shown,
    shown_unit,
    table,
    told,
    versions,
)
from invsolve.samplers.solvers import (
    DDIM,
    SDE,
    Heun,
    Momentum,
    Multistep,
    Singlestep,
    Solver,
)
from invsolve.samplers.ztv import MRI, SPARSE_VIEW
from invsolve.shards import Shard
from invsolve.simulate import measure
from invsolve.solve import Solution, solve as run_solve
from invsolve.speed import Precision
from invsolve.units import MU_WATER, hu_to_mu
from invsolve.volumes import free_memory, memory_plan

SAMPLERS: Mapping[str, Callable[..., Tensor]] = {
    "reddiff": samplers.reddiff,
    "dds": samplers.dds,
    "dds3d": samplers.dds3d,
    "mbir": samplers.mbir,
    "dfm": samplers.dfm,
    "diffpir": samplers.diffpir,
    "dps": samplers.dps,
    "tmpd": samplers.tmpd,
    "pigdm": samplers.pigdm,
    "mmps": samplers.mmps,
    "ddnm": samplers.ddnm,
    "ddrm": samplers.ddrm,
    "daps": samplers.daps,
    "score_sde": samplers.score_sde,
    "pnp": samplers.pnp,
    "red": samplers.red,
    "stsl": samplers.stsl,
    "psld": samplers.psld,
    "ldps": samplers.ldps,
    "resample": samplers.resample,
    "tv": samplers.tv,
    "sirt": samplers.sirt,
    "cgls": samplers.cgls,
    "fbp": samplers.fbp,
}

SOLVERS: Mapping[str, Solver] = {
    "ddim": DDIM(),
    "ancestral": DDIM(1.0),
    "heun": Heun(),
    "dpm2": Singlestep(2),
    "dpm3": Singlestep(3),
    "dpm++2m": Multistep(2),
    "dpm++3m": Multistep(3),
    "deis3": Multistep(3, "eps"),
    "sde2": SDE(2),
    "plms4": Momentum(4),
}
"""What ``--set solver=…`` can be, for the samplers that take one."""

NOISES: Mapping[str, Callable[..., Noise]] = {
    "gaussian": ops.GaussianNoise,
    "poisson": ops.PoissonNoise,
    "transmission": ops.TransmissionNoise,
    "rician": ops.RicianNoise,
}


def _ct(
    shape: Sequence[int], angles: np.ndarray, pixel_mm: float, **rest: Any
) -> LinearOperator:
    return ops.ParallelBeam(_size(shape), _angles(angles), pixel_mm, **rest)


def _fan(shape: Sequence[int], angles: np.ndarray, **rest: Any) -> LinearOperator:
    return ops.FanBeam(_size(shape), _angles(angles), **rest)


def _angles(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _inpaint(mask: np.ndarray) -> LinearOperator:
    return ops.Mask(torch.from_numpy(np.asarray(mask, dtype=np.float32)))


def _blur(shape: Sequence[int], width: float) -> LinearOperator:
    return ops.Blur.gaussian(width, _size(shape))


def _superres(shape: Sequence[int], factor: int) -> LinearOperator:
    return ops.Downsample(factor, _size(shape))


def _mri(mask: np.ndarray) -> LinearOperator:
    return _inpaint(mask) @ ops.Fourier() @ ops.RealImage()


def _size(shape: Sequence[int]) -> tuple[int, int]:
    h, w = shape
    return int(h), int(w)


OPERATORS: Mapping[str, Callable[..., LinearOperator]] = {
    "ct": _ct,
    "fan": _fan,
    "inpaint": _inpaint,
    "blur": _blur,
    "superres": _superres,
    "mri": _mri,
}

TOMOGRAPHY = ("ct", "fan")

EXTRAS = {
    "astra": "ct",
    "highdicom": "medical",
    "nibabel": "io",
    "pydicom": "io",
    "skimage": "io",
    "jinja2": "report",
    "matplotlib": "report",
    "monai": "monai",
    "pooch": "hub",
}
"""Which extra brings a module that may be missing."""

FACTOR = 3
"""How many times finer the grid is on which CT is measured."""

AS_VOLUMES = ("pnp", "red")
"""Samplers of slices that solve a volume in the memory that `memory_plan` tells of."""

SOLVE_EXAMPLES = (
    "Example: invsolve solve y.npz -o out --sampler dds --samples 8 --truth ct.nii.gz",
    "Example: invsolve solve y.npz -o out --sampler tv --set lam=30",
    "Example: invsolve solve y.npy -o out --pixel-mm 3.9 --size 128 --counts 5e3",
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)

Seed = Annotated[int, typer.Option(min=0, help="Of every random number.")]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; cuda where there is one by default.")
]
PriorName = Annotated[
    str, typer.Option("--prior", help="A name, or the path of a card, file or folder.")
]
UnitName = Annotated[
    str | None,
    typer.Option("--unit", help="Of the image's values: HU, 1/mm or none."),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    What the user can mend is one line on stderr and exit code 2; a fault of the program
    is one line and 1. ``--debug`` shows the traceback of either.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    try:
        code = app(
            [word for word in given if word != "--debug"],
            prog_name="invsolve",
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except Exception as error:
        if debug:
            raise
        message, code = _explain(error)
    except KeyboardInterrupt:
        if debug:
            raise
        message, code = "interrupted; nothing was written", 130
    typer.echo("error: " + " ".join(message.split()), err=True)
    return code


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, typer.Abort):
        return "interrupted", 130
    if hasattr(error, "format_message"):  # typer's own: it says what was misspelt
        ctx = getattr(error, "ctx", None)
        command = ctx.command_path if ctx is not None else "invsolve"
        message = error.format_message().rstrip(".")  # pyright: ignore
        return f"{message or 'nothing to do'}: see {command} --help", 2
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        extra = EXTRAS[error.name]
        return f"{error.name} is not installed: pip install 'invsolve[{extra}]'", 2
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory: give fewer slices, or --samples 1", 2
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: check the path and its permissions", 2
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return str(error) or type(error).__name__, 2
    return (
        f"{type(error).__name__}: {error}: this is a fault of invsolve; please report "
        "it with what --debug shows",
        1,
    )


def _show_version(value: bool) -> bool:
    if value:
        typer.echo(f"invsolve {versions()['invsolve']}")
        raise typer.Exit
    return value


@app.callback(
    epilog="Example: invsolve simulate ct.nii.gz -o y.npz; invsolve solve y.npz -o o"
)
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, help="Show it and leave."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Posterior sampling for inverse problems in imaging, with diffusion priors."""


@app.command(epilog="Example: invsolve demo --quick")
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="One slice, and fewer steps.")
    ] = False,
    prior: PriorName = demonstration.PRIOR,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Reconstruct low-dose CT of real slices by five methods.

    Simulates the measurements of the bundled slices, solves them, prints how far each
    method is from the truth, and writes report.png, report.html and result.json.
    """
    _need("nibabel", "matplotlib", "jinja2", "skimage")
    where = _device(device)
    _check_folder(out, force=True)
    loaded = _load_prior(prior)
    _check_unit(prior, "1/mm")
    path = demonstration.bundled(demonstration.SLICES)
    image = io.read(path, "HU")
    if quick:
        image = image.slices(_middle(image), _middle(image) + 1)
    found = demonstration.compare(
        image,
        loaded,
        methods=demonstration.quick() if quick else demonstration.METHODS,
        generator=Generator().manual_seed(seed),
        device=where,
        bar=lambda what, images: _bar(what, math.ceil(images / 16), where),
    )
    n = len(image.values)
    views, counts = demonstration.VIEWS, demonstration.COUNTS
    card, _ = read_card(prior)
    report = Report(
        title="Sparse-view, low-dose CT with a diffusion prior",
        summary=f"{n} axial slice{'s' if n > 1 else ''} of real head-and-neck CT, "
        f"measured by {views} views with {counts:,.0f} photons for each detector "
        "element, and reconstructed by five methods.",
        results=found.results,
        unit="HU",
        truth=found.truth,
        facts={
            "Measurements": _measured(found.problem, simulated=True),
            "Data": {
                "image": path.name,
                "sha256": sha256(path),
                **demonstration.PROVENANCE,
                **_prior_facts(card),
            },
            "Run": _run_facts(seed, where),
        },
        measured=f"{views} views over 180°\n{counts:,.0f} photons\n"
        "per detector element",
    )
    with _at_once(out) as folder:
        _write_report(folder, report)
        settings = {"command": "demo", "quick": quick, "prior": prior}
        _write_json(
            folder / "result.json", _record(report, settings, seed, where, path)
        )
    typer.echo(table(found.results))
    typer.echo(f"wrote {out / 'report.png'} and {out / 'report.html'}")


@app.command(
    epilog="Example: invsolve simulate ct.nii.gz -o y.npz --slice 64 --counts 5e3"
)
def simulate(
    image: Annotated[Path, typer.Argument(help="NIfTI, NumPy (.npy) or a picture.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write (.npz).")],
    operator: Annotated[
        str, typer.Option(help=f"One of {', '.join(set(OPERATORS) - {'fan'})}.")
    ] = "ct",
    slice_: Annotated[
        int | None, typer.Option("--slice", help="Which slice; the middle one.")
    ] = None,
    slices: Annotated[
        str | None, typer.Option(help="A range of slices, A:B, without B.")
    ] = None,
    views: Annotated[int, typer.Option(min=1, help="ct: evenly over 180°.")] = 30,
    geometry: Annotated[
        Path | None, typer.Option(help="ct: a scanner's geometry (.json) instead.")
    ] = None,
    counts: Annotated[
        float, typer.Option(help="ct: photons for a detector element through air.")
    ] = demonstration.COUNTS,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Others: the noise, in the image's unit. 0.02 by default; of CT 20 HU."
        ),
    ] = None,
    keep: Annotated[
        float, typer.Option(help="inpaint: the fraction of pixels that are seen.")
    ] = 0.5,
    width: Annotated[
        float, typer.Option(help="blur: standard deviation in pixels.")
    ] = 2.0,
    factor: Annotated[
        int, typer.Option(min=1, help="superres: pixels a side that are averaged.")
    ] = 4,
    acceleration: Annotated[
        float, typer.Option(min=1, help="mri: how many times fewer k-space columns.")
    ] = 4.0,
    pixel_mm: Annotated[
        float | None, typer.Option(help="A pixel's side; as the file says by default.")
    ] = None,
    unit: UnitName = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Measure a known image: A(x) + noise.

    CT is measured on a grid three times finer than it will be solved on, with photon
    noise; the other operators with Gaussian noise.
    """
    if out.suffix != ".npz":
        raise ValueError(f"cannot write {out}: the name must end in .npz")
    _check_writable(out)
    where = _device(device)
    _lookup(OPERATORS, operator, "operator")
    whole = _read_image(image, unit, pixel_mm)
    if whole.colour and (slice_ is not None or slices is not None):
        raise ValueError(f"{image} is one picture: leave out --slice and --slices")
    if whole.colour and operator in (*TOMOGRAPHY, "mri"):
        raise ValueError(f"{operator} is of grey images: convert {image} to grey first")
    first, last = (0, 3) if whole.colour else _range(whole, slice_, slices)
    chosen = whole.slices(first, last)
    x, kind = _to_solve(chosen)
    generator = Generator().manual_seed(seed)
    described, noise = _describe(
        operator,
        chosen,
        kind,
        generator,
        views=views,
        geometry=geometry,
        counts=counts,
        sigma=sigma,
        keep=keep,
        width=width,
        factor=factor,
        acceleration=acceleration,
    )
    A, model = _build_operator(described), _build_noise(noise)
    x, A = x.to(where), A.to(where)
    with _bar("simulate", math.ceil(len(x) / 16), where) as progress:
        if isinstance(A, ops.ParallelBeam | ops.FanBeam):
            parts = [
                measure(part, A, model, factor=FACTOR, generator=generator)
                for part in progress(x.split(1))
            ]
            y = torch.cat(parts)
        else:
            y = model.sample(A(x), generator=generator)
    measurements = io.Measurements(
        y.cpu(),
        described,
        noise,
        chosen.affine,
        kind,
        {
            "simulated": True,
            "image": image.name,
            "image_sha256": sha256(image),
            "slices": [first, last],
            "colour": whole.colour,
            "seed": seed,
        },
    )
    io.save_measurements(out, measurements)
    shape = "×".join(map(str, y.shape))
    typer.echo(f"wrote {out}: {operator}, {shape}, {_say_noise(noise)}")


@app.command(epilog="\n\n".join(SOLVE_EXAMPLES))
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
    _need("nibabel", "matplotlib", "jinja2", *(["skimage"] if truth else []))
    where = _device(device)
    method = _lookup(SAMPLERS, sampler, "sampler")
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
    _lookup(dict.fromkeys(get_args(Precision)), precision, "precision")
    limits = _window(window)
    _check_folder(out, force=force)
    if preview is not None:
        if preview.suffix.lower() != ".png":
            raise ValueError(f"--preview {preview}: name it with .png")
        _check_writable(preview)
    raw = {
        "pixel_mm": pixel_mm,
        "size": size,
        "detector_mm": detector_mm,
        "angles": angles,
        "geometry": geometry,
        "sigma": sigma,
        "counts": counts,
    }
    m = _read_measurements(measurements, raw)
    colour = _has_colours(m)
    if colour and whole:
        raise ValueError(
            f"{sampler} is for stacks of slices, not for a picture: use dds"
        )
    try:
        problem = InverseProblem(
            m.y, _build_operator(m.operator), _build_noise(m.noise)
        )
    except ValueError as error:
        raise ValueError(f"cannot solve {measurements}: {error}") from error
    is_ct = m.operator["name"] in TOMOGRAPHY
    options = _options(sampler, method, set_ or [], steps, tuned=is_ct and not whole)
    if init:
        begin = _begin(init, m, sampler, method)
        options["init"] = begin.movedim(0, 1)[None] if whole else begin
    loaded = None
    if demonstration.needs_prior(method):
        loaded = _load_prior(prior)
        _check_unit(prior, m.unit)
        if preview is not None:
            _check_images("--preview", prior, loaded)
        loaded = _equivariant(prior, loaded) if equivariant else loaded
    elif equivariant:
        raise ValueError(
            f"--equivariant is of priors, and {sampler} has none: leave it out"
        )
    elif preview is not None:
        raise ValueError(
            f"--preview shows a network's answers, and {sampler} asks none: leave it out"
        )
    true = _read_slices(truth, m) if truth is not None else None
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
        where, shard = _shared(where, len(m.y))
    if whole:
        assert loaded is not None
        if coupled:
            preset = SPARSE_VIEW if is_ct else MRI
            aspect = m.spacing[0] / m.spacing[1]
            options = {**preset, "aspect": aspect, **options}
        names = [prior] if beside is None else [prior, beside]
        if beside is not None:
            _check_unit(beside, m.unit)
        parts = [_of_volumes(n, where, equivariant=equivariant) for n in names]
        loaded = parts[0][0]
        if beside is not None:
            loaded = priors.TwoPlanes(loaded, parts[1][0], drawn=True)
        asked = [part for _, of_slices in parts for part in of_slices]
        if init:
            options["init"] = shard.cut(options["init"])
        problem, there = _as_volume(
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
    with _bar(sampler, loops, where, shown=shard.rank == 0) as progress:
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
        solution = _slice_by_slice(solution)
    if colour:  # shown and written as three slices
        as_slices = solution.samples.movedim(2, 1)
        solution = dataclasses.replace(solution, samples=as_slices)
    options = told(options)
    if init:
        files = [f"{path.name}, sha256 {sha256(path)}" for path in init]
        options["init"] = " and ".join(files)
    result = Result.of(sampler, solution, m.unit, true, options, colour=colour)
    simulated = bool(m.note.get("simulated", False))
    source = {"file": measurements.name, "sha256": sha256(measurements)}
    if "image" in m.note:
        source["simulated from"] = str(m.note["image"])
    if truth is not None:
        source |= {"truth": truth.name, "truth's sha256": sha256(truth)}
    facts = source if loaded is None else source | _prior_facts(read_card(prior)[0])
    if beside is not None:
        facts |= {"prior beside it": str(read_card(beside)[0].get("name", "?"))}
    report = Report(
        title=f"Reconstruction by {sampler}",
        summary=f"{len(m.y)} {'picture' if colour else 'slice'}"
        f"{'s' if len(m.y) > 1 else ''}"
        f"{' of one volume' if whole else ''}, "
        f"{each} sample{'s' if each > 1 else ''}{'' if whole else ' each'}. "
        + (
            "The measurements were simulated."
            if simulated
            else "The measurements are as given; nothing was simulated."
        ),
        results=[result],
        unit=shown_unit(m.unit),
        truth=true,
        window=limits,
        spacing=m.spacing if whole else None,
        colour=colour,
        facts={
            "Measurements": _measured(problem, simulated=simulated),
            "Data": facts,
            "Run": _run_facts(seed, where),
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
    with _at_once(out) as folder:
        _write_image(folder / "mean.nii.gz", result.image, m)
        if result.std is not None:
            _write_image(folder / "std.nii.gz", result.std, m, spread=True)
        if colour:
            picture = io.Image(result.image.float().cpu(), m.affine, colour=True)
            io.write(folder / "mean.png", picture)
        if save_samples:
            stack = shown(solution.samples[:, :, 0], m.unit).cpu().numpy()
            np.save(folder / "samples.npy", stack)
        _write_report(folder, report)
        record = _record(report, settings, seed, where, measurements)
        _write_json(folder / "result.json", record)
    typer.echo(table([result]))
    typer.echo(f"wrote {out}: mean.nii.gz, report.html and what belongs to them")


@app.command(
    epilog="Example: invsolve segment ct.nii.gz pet.nii.gz -o out --samples 8 --seed 1"
)
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
    _need(
        *("nibabel", "matplotlib", "jinja2"),
        *(["pydicom"] if folders else []),
        *(["highdicom"] if dicom_seg else []),
    )
    where = _device(device)
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold is a probability, > 0 and ≤ 1, got {threshold}")
    first = scans[0]
    if dicom_seg and not first.is_dir():
        raise ValueError(
            f"--dicom-seg writes on the slices of a DICOM series, and {first} is no folder "
            "of one: leave it out"
        )
    _check_folder(out, force=force)
    loaded = segmenters.load(model)
    segmenters.check_scans(len(scans), loaded)
    kinds = list(loaded.scans)
    read = {
        kind: _read_scan(path, how.unit)
        for path, (kind, how) in zip(scans, loaded.scans.items(), strict=True)
    }
    scan, uptake = read[kinds[0]], read.get("pet")
    true = None if truth is None else _read_masks(truth, scan, len(loaded.labels))
    with _bar("segment", 1, where) as progress:
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
        what: {"name": path.name, "sha256": _sha256(path)}
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
            "Run": {"steps": str(steps), **_run_facts(seed, where)},
        },
    )
    found = reports.numbers(report)
    with _at_once(out) as folder:
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
        _write_json(folder / "volumes.json", record)
    for row in report.findings:
        spread = ""
        if row.interval_ml is not None:
            low, high = row.interval_ml
            spread = f", {report.interval_name} {low:.1f} to {high:.1f}"
        score = "" if row.scores is None else f", Dice {row.scores['Dice']:.3f}"
        typer.echo(f"{row.label}: {row.mean_ml:.1f} ml{spread}{score}")
    typer.echo(f"wrote {out}: mask.nii.gz, index.html and what belongs to them")


@app.command(epilog="Example: invsolve train configs/ct-headneck-128.toml --out prior")
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
    where = _device(device)
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes must be > 0, got {minutes}")
    _check_writable(out / "checkpoint.pt")
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    home = _data_home(config)
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


def _data_home(config: Path) -> Path:
    """What the paths in a configuration are relative to."""
    return Path(os.environ.get("INVSOLVE_DATA") or config.resolve().parent)


class _Priors(typer.core.TyperGroup):
    """Takes `invsolve priors [NAME]` for `invsolve priors list [NAME]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["list"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["list", *args])


priors_app = typer.Typer(
    cls=_Priors,
    help="List, inspect and fetch priors.",
    epilog="Example: invsolve priors inspect model.pt",
    rich_markup_mode=None,
    context_settings=app.info.context_settings,
)
app.add_typer(priors_app, name="priors")


@priors_app.command("list", epilog="Example: invsolve priors list ct-headneck-128")
def list_priors(
    name: Annotated[
        str | None, typer.Argument(help="A name, or the path of a card.")
    ] = None,
) -> None:
    """List the priors that are bundled and those that can be fetched; or show a card."""
    if name is not None:
        card, path = read_card(name)
        typer.echo(
            json.dumps({"file": str(path), **card}, indent=2, ensure_ascii=False)
        )
        return
    names = priors.available()
    if not names:
        typer.echo("no prior is bundled; train one: invsolve train --help")
    for known in names:
        card, _ = read_card(known)
        about = card.get("data", "")
        typer.echo(f"{known}  unit {card.get('unit') or 'none'}  {about}")
    typer.echo("public, by invsolve priors fetch NAME:")
    for known, entry in priors.hub.NAMED.items():
        typer.echo(f"{known}  {entry.about}  {entry.licence}")


@priors_app.command(
    "inspect", epilog="Example: invsolve priors inspect model.pt --card card.json"
)
def inspect_prior(
    file: Annotated[str, typer.Argument(help="A name, a checkpoint or a folder.")],
    card: Annotated[
        Path | None, typer.Option(help="What overrides the file (.json).")
    ] = None,
) -> None:
    """Tell what a checkpoint is and what was decided of it; nothing of it is run."""
    prior = priors.load(file, card)
    for fact, value in prior.info:
        typer.echo(f"{fact:<16}  {value}")
    for decision in prior.decisions:
        typer.echo(f"{'decided':<16}  {decision}")


@priors_app.command(
    "fetch", epilog="Example: invsolve priors fetch google/ddpm-cifar10-32"
)
def fetch_prior(
    name: Annotated[str, typer.Argument(help="As invsolve priors list names it.")],
) -> None:
    """Download a public checkpoint; one that was interrupted goes on."""
    path = priors.fetch(name)
    entry = priors.hub.NAMED[name]
    for file in entry.files:
        kept = path / file.name if path.is_dir() else path
        known = "as published" if file.sha256 else "nobody published one to compare"
        typer.echo(f"{kept}  sha256 {sha256(kept)} ({known})")
    typer.echo(f"licence: {entry.licence}; use it with --prior {name}")


@priors_app.command(
    "evaluate",
    epilog="Example: invsolve priors evaluate mr-brain-128 configs/mr-brain-128.toml "
    "-o card.html --other configs/ct-headneck-128.toml",
)
def evaluate_prior(
    name: Annotated[str, typer.Argument(help="A name, a card or a checkpoint.")],
    config: Annotated[
        Path, typer.Argument(help="Its training configuration (TOML): which images.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page (.html).")],
    other: Annotated[
        Path | None, typer.Option(help="Another prior's: images of another kind.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Of each kind.")] = 16,
    samples: Annotated[int, typer.Option(min=2, help="Unconditional ones.")] = 16,
    seed: Seed = 0,
) -> None:
    """Measure a prior on images it never saw: one page, and its numbers beside it (.json).

    Denoising beside total variation, samples and the training images nearest to them,
    likelihoods, spectrum. A prior of latents is measured in them, beside the best linear
    denoiser, and its autoencoder by what it leaves of images.
    """
    from tqdm import tqdm

    from invsolve import report_card
    from invsolve.training_latent import LatentConfig

    if out.suffix != ".html":
        raise ValueError(f"--out is a page: {out} should end in .html")
    _check_writable(out)
    prior = priors.load(name)
    home = _data_home(config)
    card = report_card.evaluate(
        Path(name).name.removesuffix(".json"),
        prior,
        LatentConfig.read(config).data,
        home,
        other=None if other is None else LatentConfig.read(other).data,
        images=images,
        samples=samples,
        generator=Generator().manual_seed(seed),
        progress=lambda loop: tqdm(loop, "flow", unit="step", delay=1),
    )
    report_card.save_card(out, card)
    _write_json(out.with_suffix(".json"), card.numbers())
    typer.echo(f"wrote {out} and {out.with_suffix('.json')}")


@app.command(epilog="Example: invsolve doctor")
def doctor() -> None:
    """Tell what this machine can do."""
    checks: dict[str, Callable[[], str]] = {
        "invsolve": lambda: versions()["invsolve"],
        "python": lambda: versions()["python"],
        "machine": lambda: machine(torch.device("cpu")),
        "memory": _memory,
        "torch": lambda: f"{torch.__version__}, {torch.get_num_threads()} threads",
        "CUDA": _cuda,
        "ASTRA": _astra,
        "images": lambda: _extra("nibabel", "skimage", "pydicom"),
        "reports": lambda: _extra("jinja2", "matplotlib", "skimage"),
        "deepinv": lambda: _extra("deepinv"),
        "priors": lambda: ", ".join(priors.available()) or "none bundled",
        "demo data": lambda: demonstration.bundled(demonstration.SLICES).name,
    }
    for name, check in checks.items():
        try:
            answer = check()
        except Exception as error:
            answer = f"no: {' '.join(str(error).split()) or type(error).__name__}"
        typer.echo(f"{name:<10}  {answer}")


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.1f} GiB"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no"
    free, total = torch.cuda.mem_get_info()
    gib = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"{torch.cuda.get_device_name()}, {gib}"


def _astra() -> str:
    # In a process of its own, for a broken driver can end the one that asks.
    ask = "import astra; print(astra.__version__, astra.use_cuda())"
    answer = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=60
    )
    if answer.returncode:
        return "no: pip install 'invsolve[ct]' (GPL-3; not needed for small images)"
    number, cuda = answer.stdout.split()[-2:]
    return f"{number}, with{'' if cuda == 'True' else 'out'} CUDA"


def _extra(*modules: str) -> str:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"missing {', '.join(missing)}" if missing else f"yes ({', '.join(modules)})"


def _need(*modules: str) -> None:
    """Refuse at once what would fail for want of a module when all is computed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name!r} here: give --device cpu")
    return device


def _lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name in table:
        return table[name]
    raise ValueError(f"unknown {what} {name!r}: {_choices(name, table)}")


def _choices(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"choose from {', '.join(names)}{hint}"


def _options(
    name: str,
    sampler: Callable[..., Tensor],
    given: Sequence[str],
    steps: int | None,
    *,
    tuned: bool,
) -> dict[str, Any]:
    """The sampler's options: those the demo has tuned for CT, then the user's."""
    known = _settable(sampler)
    options: dict[str, Any] = {}
    if tuned:
        for method in demonstration.METHODS:
            if method.sampler is sampler:
                options |= method.options
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: write it as --set KEY=VALUE")
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}: {_choices(key, known)}")
        if key == "solver":
            options[key] = _lookup(SOLVERS, value, "solver")
            continue
        options[key] = _value(key, value, known[key])
    if steps is not None:
        if "steps" not in known:
            raise ValueError(f"{name} takes no --steps: leave it out")
        options["steps"] = steps
    if options.get("steps", 1) < 1:
        raise ValueError(f"steps must be at least 1, got {options['steps']}")
    return options


def _settable(sampler: Callable[..., Tensor]) -> dict[str, Any]:
    """A sampler's options that words can give: each with a value of its kind."""
    taken = ("prior", "problem", "generator", "progress", "sigmas", "keep")
    hints, found = get_type_hints(sampler), {}
    for key, parameter in inspect.signature(sampler).parameters.items():
        kinds = [get_origin(hint) or hint for hint in get_args(hints[key])]
        if key in taken:
            continue
        if parameter.default is not None:
            found[key] = parameter.default
        elif key == "solver" or float in kinds:
            found[key] = None
        elif tuple in kinds:
            found[key] = (0.0, 1.0)
    return found


def _value(key: str, text: str, default: Any) -> Any:
    """An option's value, of the kind of its default."""
    try:
        value = json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        value = text
    match default:
        case bool():
            fits, kind = isinstance(value, bool), "true or false"
        case int():
            fits, kind = type(value) is int, "a whole number"
        case float() | None:
            kind = "a finite number"
            number: Any = value if type(value) in (int, float) else math.nan
            fits, value = math.isfinite(number), float(number)
        case tuple():
            fits = isinstance(value, list) and len(value) == len(default)
            fits = fits and all(type(v) in (int, float) for v in value)
            value, kind = (tuple(value), "") if fits else (value, "a list of numbers")
        case _:
            fits, kind = isinstance(value, str), "a word"
    if not fits:
        raise ValueError(f"--set {key}={text}: {key} must be {kind}")
    return value


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


def _read_image(path: Path, unit: str | None, pixel_mm: float | None) -> io.Image:
    if unit not in (None, "none", *get_args(io.Unit)):
        raise ValueError(f"unknown unit {unit!r}: HU, 1/mm or none")
    given: Any = "" if unit == "none" else unit
    image = io.read(path, given, colour=True)
    if pixel_mm is not None:
        if not (pixel_mm > 0 and math.isfinite(pixel_mm)):
            raise ValueError(f"--pixel-mm must be > 0, got {pixel_mm}")
        affine = image.affine.copy()
        affine[:, 0] *= pixel_mm / image.spacing[2]
        affine[:, 1] *= pixel_mm / image.spacing[1]
        image = dataclasses.replace(image, affine=affine)
    if image.unit == "1/mm" and image.values.abs().max() > 1:
        raise ValueError(
            f"{path} reaches {float(image.values.abs().max()):.4g}, but attenuation is "
            "far below 1/mm: give --unit HU"
        )
    return image


def _range(image: io.Image, index: int | None, slices: str | None) -> tuple[int, int]:
    n = len(image.values)
    if index is not None and slices is not None:
        raise ValueError("give --slice or --slices, not both")
    if index is None and slices is None:
        start, stop = _middle(image), _middle(image) + 1
    elif slices is not None:
        first, colon, last = slices.partition(":")
        try:
            start, stop = int(first or 0), int(last or n)
        except ValueError as error:
            raise ValueError(f"--slices {slices}: write it as A:B") from error
        if not colon:
            raise ValueError(f"--slices {slices}: write it as A:B")
    else:
        start = index or 0
        stop = start + 1
    if not 0 <= start < stop <= n:
        raise ValueError(
            f"the image has slices 0 to {n - 1}, not {start} to {stop - 1}"
        )
    return start, stop


def _middle(image: io.Image) -> int:
    return len(image.values) // 2


def _to_solve(image: io.Image) -> tuple[Tensor, io.Unit]:
    """What is measured and its unit, of HU 1/mm: (slices, 1, h, w) or (1, 3, h, w)."""
    if image.unit == "HU":
        return hu_to_mu(image.values[:, None]), "1/mm"
    return image.values[None] if image.colour else image.values[:, None], image.unit


def _describe(
    operator: str,
    image: io.Image,
    unit: io.Unit,
    generator: Generator,
    *,
    views: int,
    geometry: Path | None,
    counts: float,
    sigma: float | None,
    keep: float,
    width: float,
    factor: int,
    acceleration: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The operator and the noise in words and numbers, as the file will hold them."""
    h, w = image.values.shape[-2:]
    shape = [h, w]
    if geometry is not None and operator != "ct":
        raise ValueError(f"--geometry is for ct, not for {operator}")
    if operator == "ct":
        if unit != "1/mm":
            raise ValueError("ct needs an image of attenuation: give --unit HU or 1/mm")
        pixel = demonstration.square_pixel(image)
        if geometry is None:
            A = ops.ParallelBeam((h, w), demonstration.even_angles(views), pixel)
        else:
            A = _read_geometry(geometry)
            if A.shape != (h, w) or abs(A.pixel_mm / pixel - 1) > 1e-3:
                raise ValueError(
                    f"{geometry} is for {A.shape} pixels of {A.pixel_mm:.4g} mm, the "
                    f"image has {(h, w)} of {pixel:.4g} mm: make them agree"
                )
        described = _in_words(A)
        return described, {
            "name": "transmission",
            "counts": counts,
            "floor": demonstration.FLOOR,
        }
    # σ is given in the image's own unit; for CT that is HU, and solved for is 1/mm.
    if sigma is None:
        sigma = 0.02 * MU_WATER if unit == "1/mm" else 0.02
    elif image.unit == "HU":
        sigma = sigma * MU_WATER / 1000
    noise = {"name": "gaussian", "sigma": sigma}
    match operator:
        case "inpaint":
            mask = ops.Mask.random((h, w), keep, generator=generator).mask
            return {"name": operator, "mask": mask.numpy()}, noise
        case "mri":
            mask = ops.Mask.cartesian((h, w), acceleration, generator=generator).mask
            return {"name": operator, "mask": mask.numpy()}, noise
        case "blur":
            return {"name": operator, "shape": shape, "width": width}, noise
        case _:
            return {"name": operator, "shape": shape, "factor": factor}, noise


def _read_geometry(path: Path) -> ops.ParallelBeam | ops.FanBeam:
    A = io.read_geometry(path)
    if isinstance(A, ops.ConeBeam):
        raise ValueError(
            f"{path} is a ConeBeam, but slices are solved here: solve volumes from Python"
        )
    return A


def _in_words(A: ops.ParallelBeam | ops.FanBeam) -> dict[str, Any]:
    """A geometry as a measurement file holds it; the backend is the solver's choice."""
    name = "fan" if isinstance(A, ops.FanBeam) else "ct"
    values = {f.name: getattr(A, f.name) for f in fields(A) if f.name != "backend"}
    values["angles"] = A.angles.numpy()
    return {"name": name, **values, "shape": list(A.shape)}


def _build_operator(described: Mapping[str, Any]) -> LinearOperator:
    return _build(OPERATORS, described, "operator")


def _build_noise(described: Mapping[str, Any]) -> Noise:
    return _build(NOISES, described, "noise")


def _build(
    table: Mapping[str, Callable], described: Mapping[str, Any], what: str
) -> Any:
    name = described["name"]
    make = _lookup(table, name, what)
    try:
        return make(**{k: v for k, v in described.items() if k != "name"})
    except TypeError as error:
        raise ValueError(f"the {what} {name!r} is ill described: {error}") from error


def _read_measurements(path: Path, raw: Mapping[str, Any]) -> io.Measurements:
    if path.suffix != ".npy":
        for option, value in raw.items():
            if value is not None:
                name = "--" + option.replace("_", "-")
                raise ValueError(f"{name} is for a sinogram (.npy), not for {path}")
        return io.load_measurements(path)
    return _sinogram(path, **raw)


def _sinogram(
    path: Path,
    *,
    pixel_mm: float | None,
    size: int | None,
    detector_mm: float | None,
    angles: Path | None,
    geometry: Path | None,
    sigma: float | None,
    counts: float | None,
) -> io.Measurements:
    """Measurements from a bare array, by what the command line says of it."""
    array = _load_array(path)
    sized = pixel_mm is not None and size is not None
    if not (sized or geometry) or (sigma is None) == (counts is None):
        raise ValueError(
            f"{path} is a bare sinogram: give --pixel-mm and --size, or --geometry, and "
            "--sigma or --counts"
        )
    if geometry and any((pixel_mm, size, detector_mm, angles)):
        raise ValueError(
            "--geometry says all of --pixel-mm, --size, --detector-mm and --angles: "
            "leave them out"
        )
    for name, value in (("--pixel-mm", pixel_mm), ("--detector-mm", detector_mm)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be > 0, got {value}")
    if array.ndim not in (2, 3):
        raise ValueError(
            f"{path} is of shape {array.shape}: a sinogram is (views, detectors) or "
            "(slices, views, detectors)"
        )
    y = torch.from_numpy(array.reshape(-1, 1, *array.shape[-2:]))
    if geometry:
        A = _read_geometry(geometry)
    else:
        assert pixel_mm is not None and size is not None
        views, detectors = array.shape[-2:]
        theta = demonstration.even_angles(views)
        if angles is not None:
            theta = torch.from_numpy(_load_array(angles))
            if theta.shape != (views,):
                raise ValueError(
                    f"{angles} is of shape {tuple(theta.shape)}, but the sinogram has "
                    f"{views} views: give one angle for each"
                )
        try:
            A = ops.ParallelBeam(
                (size, size), theta, pixel_mm, detectors, detector_mm or pixel_mm
            )
        except ValueError as error:
            raise ValueError(f"cannot solve {path}: {error}") from error
    noise: dict[str, Any] = {"name": "gaussian", "sigma": sigma}
    if counts is not None:
        floor = demonstration.FLOOR
        noise = {"name": "transmission", "counts": counts, "floor": floor}
    operator = _in_words(A)
    affine = np.diag([-A.pixel_mm, -A.pixel_mm, 1.0, 1.0])
    try:
        return io.Measurements(y, operator, noise, affine, "1/mm", {"simulated": False})
    except ValueError as error:
        raise ValueError(f"cannot solve {path}: {error}") from error


def _load_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the name")
    try:
        with path.open("rb") as stream:
            array = np.load(stream, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            raise ValueError("it is not an array of real numbers")
    except Exception as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return np.ascontiguousarray(array, dtype=np.float32)


def _has_colours(m: io.Measurements) -> bool:
    return m.note.get("colour") is True


def _read_slices(path: Path, m: io.Measurements, what: str = "truth") -> Tensor:
    """The slices that were measured, of an image, in the unit that is shown."""
    unit = shown_unit(m.unit)
    image = io.read(path, colour=_has_colours(m))
    if unit == "HU" and image.unit == "" and image.values.abs().max() <= 1:
        image = io.Image(image.values, image.affine, "1/mm")
    values = shown(image.values, image.unit)
    if unit == "HU":
        values = values.clamp_min(-1000)
    slices, n = m.note.get("slices"), 3 if _has_colours(m) else len(m.y)
    if len(values) != n and isinstance(slices, list) and len(slices) == 2:
        values = values[int(slices[0]) : int(slices[1])]
    shape = m.operator.get("shape") or m.operator["mask"].shape[-2:]
    if tuple(values.shape) != (n, *shape):
        expected = "×".join(map(str, (n, *shape)))
        raise ValueError(
            f"the {what} {path} gives {'×'.join(map(str, values.shape))} voxels, the "
            f"measurements {expected}: give the image they are of"
        )
    return values


def _begin(
    paths: Sequence[Path],
    m: io.Measurements,
    name: str,
    sampler: Callable[..., Tensor],
) -> Tensor:
    """The image that a sampler begins with, or the mean of several, as it is solved for."""
    if "init" not in inspect.signature(sampler).parameters:
        able = [
            k for k, f in SAMPLERS.items() if "init" in inspect.signature(f).parameters
        ]
        raise ValueError(
            f"{name} takes no --init: choose from {', '.join(able)}, or leave it out"
        )
    values = torch.stack([_read_slices(path, m, "image") for path in paths]).mean(0)
    if m.unit == "1/mm":
        values = hu_to_mu(values)
    return values[None] if _has_colours(m) else values[:, None]


def _read_scan(path: Path, unit: io.Unit) -> io.Image:
    """In its unit; that a file's values can be SUV is seen to where they are used."""
    image = io.read(path, placed=True)
    if unit == "HU" and image.unit != "HU":
        low, high = float(image.values.min()), float(image.values.max())
        raise ValueError(
            f"{path} goes from {low:.4g} to {high:.4g} {image.unit}".rstrip()
            + ", which is no CT in HU: give the CT first and the PET second"
        )
    if unit == "SUV" and (
        image.unit == "HU" or (path.is_dir() and image.unit != "SUV")
    ):
        raise ValueError(
            f"{path} is no PET in SUV: give the CT first and the PET second"
        )
    if not unit and image.unit:
        raise ValueError(f"{path} is in {image.unit}, and the model was made for MR")
    return dataclasses.replace(image, unit=unit)


def _read_masks(path: Path, scan: io.Image, labels: int) -> Tensor:
    """The true masks on a scan's grid: (labels, z, y, x); of a single label, all > 0."""
    from invsolve.grids import Grid, resampled

    image = io.read(path, "", placed=True)
    values = resampled(image, Grid.of(scan), nearest=True).values.round()
    if image.values.any() and not values.any():
        raise ValueError(
            f"the truth {path} lies outside of the scan: give the mask of this patient"
        )
    if labels == 1:
        return values[None] > 0
    return values == torch.arange(1, labels + 1)[:, None, None, None]


def _coded(prob: Tensor, mask: Tensor) -> Tensor:
    """0 outside, else the number of the label, the likeliest of those that hold."""
    best, which = torch.where(mask, prob, -1).max(0)
    return torch.where(best >= 0, which + 1.0, 0.0)


def _sha256(path: Path) -> str:
    """Of a file; of a folder, of its files' in the order of their names."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def _load_prior(name: str) -> priors.Prior:
    _need("diffusers")
    return priors.load(name)


def _equivariant(name: str, prior: priors.Prior) -> priors.Prior:
    _check_images("--equivariant", name, prior)
    return priors.Equivariant(prior)


def _check_images(option: str, name: str, prior: priors.Prior) -> None:
    if isinstance(prior, LatentPrior | ForwardPrior):
        raise ValueError(
            f"{option} is for priors of images, which {name} is not: leave it out"
        )


def _of_volumes(
    name: str, where: torch.device, *, equivariant: bool
) -> tuple[priors.Prior, list[OfSlices]]:
    """The prior of volumes that a prior of slices makes, as its card says, and its parts.

    Args:
        name: of the prior of slices, of so many neighbours, or of a slice among them.
        where: to compute.
        equivariant: whether mirror images and shifts are as likely.

    Raises:
        ValueError: the prior, or the one that its card names, cannot be used.
    """
    inner, card = _load_prior(name), read_card(name)[0]
    inner = _equivariant(name, inner) if equivariant else inner
    together, axis = int(card.get("neighbours", 1)), PLANES[card.get("plane", "axial")]
    if together == 1:
        slices: OfSlices = priors.Slices(inner, axis, device=where)
    elif card.get("network", {}).get("condition"):
        slices = priors.Sliding(inner, together, axis, device=where)
    else:
        slices = priors.Groups(inner, together, axis=axis, device=where)
    if (below := card.get("below")) is None:
        return slices, [slices]
    low = _load_prior(below["prior"])
    low = _equivariant(below["prior"], low) if equivariant else low
    alone = priors.Slices(low, axis, device=where)
    at = below["sigma"] * slices.normalised[1].scale
    return priors.Experts(alone, slices, at), [alone, slices]


def _as_volume(
    problem: InverseProblem,
    prior: priors.Prior,
    parts: Sequence[OfSlices],
    where: torch.device,
    shard: Shard,
    *,
    begun: bool,
) -> tuple[InverseProblem, torch.device]:
    """The stack as one volume, and where to hold it: with the network if it fits there.

    Args:
        problem: of slices.
        prior: of volumes.
        parts: all that it is made of.
        where: to compute.
        shard: which of the slices this process holds.
        begun: whether the solve begins with a volume that is given.

    Raises:
        ValueError: it fits nowhere, there are too few slices, or processes that hold
            some each cannot ask the prior.
    """
    A = ops.SliceWise(problem.linear, shard.size)
    volume = InverseProblem(shard.cut(problem.y[None], dim=1), A, problem.noise)
    shard.check(prior)
    plan, cpu = memory_plan(volume, *parts, begun=begun), torch.device("cpu")
    home = where
    if where.type == "cpu":
        plan.check(free_memory(cpu))
    elif plan.host + plan.network > free_memory(where):
        plan.check(free_memory(cpu), free_memory(where))
        home = cpu
    if shard.rank == 0:
        each = f" in each of {shard.count} processes" if shard.count > 1 else ""
        typer.echo(f"memory: {plan}{each}", err=True)
    return volume, home


def _shared(where: torch.device, depth: int) -> tuple[torch.device, Shard]:
    """Meet the other processes of ``torchrun``: this one's device, and its slices."""
    backend = "gloo"
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    rank, count = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    shard = Shard(depth, rank, count)  # refused before anyone waits for anyone
    torch.distributed.init_process_group(backend)
    return where, shard


def _slice_by_slice(solution: Solution) -> Solution:
    """A volume's samples as those of its slices, which is how images are shown."""
    samples = solution.samples[:, 0].movedim(2, 1)
    s, depth = solution.stats, samples.shape[1]
    stats = dataclasses.replace(
        s,
        network_forwards=depth * s.network_forwards,
        operator_applies=depth * s.operator_applies,
        operator_adjoints=depth * s.operator_adjoints,
    )
    return dataclasses.replace(solution, samples=samples, stats=stats)


def _check_unit(prior: str, unit: io.Unit) -> None:
    theirs = read_card(prior)[0].get("unit", "")
    if theirs != unit:
        raise ValueError(
            f"the prior {prior} is of images in {theirs or 'no unit'}, these "
            f"measurements in {unit or 'no unit'}: give another --prior, or use tv"
        )


@contextmanager
def _bar(
    what: str, loops: int, device: torch.device, *, shown: bool = True
) -> Iterator[Callable[[Iterable], Iterable]]:
    """One progress bar on stderr over all passes of a loop, after a second's work."""
    from tqdm import tqdm

    passes = 1 if device.type == "cuda" else loops
    with tqdm(desc=what, unit="step", delay=1, leave=False, disable=not shown) as bar:

        def progress(loop: Iterable) -> Iterator[Any]:
            steps = list(loop)
            bar.total = passes * len(steps)
            for step in steps:
                yield step
                bar.update()

        yield progress


def _check_folder(out: Path, *, force: bool) -> None:
    """Refuse now what could not be written, or what would be overwritten, later."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give -o the name of a folder")
    if not force and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give another folder, or --force")
    _check_writable(out / "report.html")


def _check_writable(path: Path) -> None:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write {path}: {parent} is not a folder to write in")


OUTPUTS = (
    "mean.nii.gz",
    "mean.png",
    "std.nii.gz",
    "samples.npy",
    "report.png",
    "report.html",
    "result.json",
    "mask.nii.gz",
    "mask.dcm",
    "probability*.nii.gz",
    "std-*.nii.gz",
    "planes.png",
    "whole.png",
    "volume.png",
    "index.html",
    "volumes.json",
)
"""What commands write into their folders: a later one leaves none of it."""


@contextmanager
def _at_once(out: Path) -> Iterator[Path]:
    """A folder to write in, whose files go to ``out`` when all of them are whole."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.part"
    partial.mkdir()
    try:
        yield partial
        if not out.exists():
            partial.rename(out)
            return
        written = {file.name for file in partial.iterdir()}
        for file in partial.iterdir():
            file.replace(out / file.name)
        for pattern in OUTPUTS:
            for stale in out.glob(pattern):
                if stale.name not in written:
                    stale.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_image(
    path: Path, values: Tensor, m: io.Measurements, *, spread: bool = False
) -> None:
    unit = "" if spread else shown_unit(m.unit)
    io.write(path, io.Image(values.float().cpu(), m.affine, unit))


def _write_report(folder: Path, report: Report) -> None:
    save_figure(folder / "report.png", report)
    save_page(folder / "report.html", report)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    io.replace(path, lambda p: Path(p).write_text(text, encoding="utf-8"))


def _record(
    report: Report,
    settings: Mapping[str, Any],
    seed: int,
    device: torch.device,
    source: Path,
) -> dict[str, Any]:
    """What a script wants to know of a run."""
    from dataclasses import asdict

    def result(r: Result) -> dict[str, Any]:
        metrics = {}
        if r.psnr is not None and r.ssim is not None:
            # JSON has no infinity, which is what a perfect image scores.
            db = [v if math.isfinite(v) else None for v in r.psnr.tolist()]
            metrics = {"psnr_db": db, "ssim": r.ssim.tolist()}
        return {
            "method": r.name,
            "kind": r.kind,
            "samples": r.samples,
            "options": dict(r.settings),
            "metrics": metrics,
            "stats": asdict(r.stats),
        }

    return {
        "settings": dict(settings),
        "seed": seed,
        "unit": report.unit,
        "results": [result(r) for r in report.results],
        "input": {"name": source.name, "sha256": sha256(source)},
        "versions": versions(),
        "device": str(device),
        "machine": machine(device),
    }


def _measured(problem: InverseProblem, *, simulated: bool) -> dict[str, str]:
    A, noise = problem.operator, problem.noise
    facts = {"operator": type(A).__name__}
    if isinstance(A, ops.ParallelBeam):
        degrees = math.degrees(float(A.angles.max() - A.angles.min()))
        facts = {
            "operator": f"parallel beam, {len(A.angles)} views over "
            f"{degrees * len(A.angles) / max(1, len(A.angles) - 1):.0f}°",
            "detector": f"{A.detectors} elements of {A.detector_mm:.3g} mm",
            "image": f"{A.shape[1]}×{A.shape[0]} pixels of {A.pixel_mm:.3g} mm",
        }
    facts["noise"] = str(noise)
    if isinstance(noise, ops.TransmissionNoise):
        facts["noise"] = f"Poisson, {noise.counts:,.0f} photons through air"
        if noise.floor:
            facts["noise"] += f"; the model itself is taken to err by {noise.floor:g}"
    if isinstance(noise, ops.GaussianNoise):
        facts["noise"] = f"Gaussian, σ = {noise.sigma:.3g}"
    facts["simulated"] = "yes" if simulated else "no"
    if simulated and isinstance(A, ops.ParallelBeam):
        facts["simulated"] = f"yes, on pixels and rays {FACTOR} times finer than solved"
    return facts


def _say_noise(noise: Mapping[str, Any]) -> str:
    return ", ".join(v if k == "name" else f"{k} {v:g}" for k, v in noise.items())


def _prior_facts(card: Mapping[str, Any]) -> dict[str, str]:
    facts = {"prior": str(card.get("name", "?"))}
    named = {
        "data": "prior's data",
        "licence": "prior's licence",
        "citation": "prior's citation",
    }
    return facts | {
        text: str(card[key]) for key, text in named.items() if card.get(key)
    }


def _run_facts(seed: int, device: torch.device) -> dict[str, str]:
    found = versions()
    return {
        "seed": str(seed),
        "machine": machine(device),
        "versions": ", ".join(f"{name} {number}" for name, number in found.items()),
    }


if __name__ == "__main__":
    sys.exit(main())
