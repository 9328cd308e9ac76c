"""invsolve demo: the main job on real slices."""

import math
from pathlib import Path
from typing import Annotated

import typer
from torch import Generator

from invsolve import demo as demonstration, io
from invsolve.priors.weights import read_card, sha256
from invsolve.report import Report, table

from .facts import measured_facts, progress_bar, record_of, run_facts
from .files import at_once, check_folder, write_json, write_report
from .images import middle_of
from .loading import check_unit, load_prior, prior_facts
from .options import Device, PriorName, Seed, device_of, need

EXAMPLE = "Example: invsolve demo --quick"


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="One slice, and fewer steps.")
    ] = False,
    prior: PriorName = demonstration.PRIOR,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Reconstruct low-dose CT of real slices by six methods.

    Simulates the measurements of the bundled slices, solves them, prints how far each
    method is from the truth, and writes report.png, report.html and result.json.
    """
    need("nibabel", "matplotlib", "jinja2", "skimage")
    where = device_of(device)
    check_folder(out, force=True)
    loaded = load_prior(prior)
    check_unit(prior, "1/mm")
    path = demonstration.bundled(demonstration.SLICES)
    image = io.read(path, "HU")
    if quick:
        image = image.slices(middle_of(image), middle_of(image) + 1)
    found = demonstration.compare(
        image,
        loaded,
        methods=demonstration.quick() if quick else demonstration.METHODS,
        generator=Generator().manual_seed(seed),
        device=where,
        bar=lambda what, images: progress_bar(what, math.ceil(images / 16), where),
    )
    n = len(image.values)
    views, counts = demonstration.VIEWS, demonstration.COUNTS
    card, _ = read_card(prior)
    report = Report(
        title="Sparse-view, low-dose CT with a diffusion prior",
        summary=f"{n} axial slice{'s' if n > 1 else ''} of real head-and-neck CT, "
        f"measured by {views} views with {counts:,.0f} photons for each detector "
        "element, and reconstructed by six methods.",
        results=found.results,
        unit="HU",
        truth=found.truth,
        facts={
            "Measurements": measured_facts(found.problem, simulated=True),
            "Data": {
                "image": path.name,
                "sha256": sha256(path),
                **demonstration.PROVENANCE,
                **prior_facts(card),
            },
            "Run": run_facts(seed, where),
        },
        measured=f"{views} views over 180°\n{counts:,.0f} photons\n"
        "per detector element",
    )
    with at_once(out) as folder:
        write_report(folder, report)
        settings = {"command": "demo", "quick": quick, "prior": prior}
        write_json(
            folder / "result.json", record_of(report, settings, seed, where, path)
        )
    typer.echo(table(found.results))
    typer.echo(f"wrote {out / 'report.png'} and {out / 'report.html'}")
