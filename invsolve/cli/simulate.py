"""invsolve simulate: measurements of a known image."""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Generator

from invsolve import demo as demonstration, io, operators as ops
from invsolve.priors.weights import sha256
from invsolve.simulate import measure

from .facts import progress_bar
from .files import check_writable
from .images import chosen_range, read_image, to_solve
from .measured import (
    FACTOR,
    OPERATORS,
    TOMOGRAPHY,
    build_noise,
    build_operator,
    describe,
    noise_in_words,
)
from .options import Device, Seed, UnitName, device_of, lookup

EXAMPLE = "Example: invsolve simulate ct.nii.gz -o y.npz --slice 64 --counts 2e4"


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
    check_writable(out)
    where = device_of(device)
    lookup(OPERATORS, operator, "operator")
    whole = read_image(image, unit, pixel_mm)
    if whole.colour and (slice_ is not None or slices is not None):
        raise ValueError(f"{image} is one picture: leave out --slice and --slices")
    if whole.colour and operator in (*TOMOGRAPHY, "mri"):
        raise ValueError(f"{operator} is of grey images: convert {image} to grey first")
    first, last = (0, 3) if whole.colour else chosen_range(whole, slice_, slices)
    chosen = whole.slices(first, last)
    x, kind = to_solve(chosen)
    generator = Generator().manual_seed(seed)
    described, noise = describe(
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
    A, model = build_operator(described), build_noise(noise)
    x, A = x.to(where), A.to(where)
    with progress_bar("simulate", math.ceil(len(x) / 16), where) as progress:
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
    typer.echo(f"wrote {out}: {operator}, {shape}, {noise_in_words(noise)}")
