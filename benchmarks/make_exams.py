"""Exams to learn from without ever seeing an image: configs/dfm-*.toml are trained on them.

    python benchmarks/make_exams.py --out $INVSOLVE_DATA/exams

CT: slices of OpenKBP's training patients (real CT) that fit into 64² of its pixels, as
means of 2×2, 16 random views of 48 each, measured on a grid three times finer by detector
elements a third as wide, whose line integrals are then averaged by threes. Brain MR:
slices of simulated heads (benchmarks/make_mr_population.py) at 64², 16 random columns of
k-space each, the middle four among them. An image is measured once, and is not written.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from ct_headneck import TUNING_PATIENTS
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

from invsolve import io
from invsolve.demo import even_angles
from invsolve.exams import Exams, acquire, save_exams
from invsolve.operators import ParallelBeam
from invsolve.operators.parametric import Parametric
from invsolve.simulate import line_integrals
from invsolve.training_dfm import Split
from invsolve.units import hu_to_mu

SIDE, ROWS = 64, 16
CT_SIDE, PIXEL_MM = 32, 7.812
VIEWS, CT_SIGMA = 48, 0.03
FINER = 3
"""How many detector elements are averaged to one, and how much finer pixels are where
measurements are simulated."""
MODEL = {"oversample": 2, "rays": 2}
"""Pixels and elements of 8 mm are no points: what the operator that is trained with makes
of them."""
CENTRE, MR_SIGMA = 4, 0.01
HELD_OUT = 64
"""Exams of a file by which training is measured."""


def ct_beam() -> ParallelBeam:
    """All 48 views."""
    return ParallelBeam((CT_SIDE, CT_SIDE), even_angles(VIEWS), PIXEL_MM)


def ct_sinograms(x: Tensor) -> Tensor:
    """What all views see, without noise."""
    beam = ct_beam()
    narrow = replace(
        beam, detectors=FINER * beam.detectors, detector_mm=beam.detector_mm / FINER
    )
    z = torch.cat([line_integrals(some, narrow, FINER) for some in x.split(64)])
    return z.unflatten(-1, (-1, FINER)).mean(-1)


def families() -> dict[str, Parametric]:
    """All that can be measured."""
    return {
        "ct": Parametric.views(replace(ct_beam(), **MODEL)),
        "mr": Parametric.lines((SIDE, SIDE), real=True),
    }


def ct_slices(files: list[Path]) -> Tensor:
    """In 1/mm, (n, 1, 32, 32): slices whose body fits, around its middle."""
    windows = torch.cat([window for path in files for window in _windows(path)])
    return avg_pool2d(windows, SIDE // CT_SIDE)


def _windows(path: Path) -> Iterator[Tensor]:
    volume = io.read(path, "HU", axes="PLI").values
    for hu in volume:
        body = hu > -500
        if body.float().mean() < 0.02:
            continue
        rows, columns = (body.any(axis).nonzero().flatten() for axis in (1, 0))
        if max(rows[-1] - rows[0], columns[-1] - columns[0]) >= SIDE - 1:
            continue
        corner = [
            min(max(0, int(v[0] + v[-1] + 1 - SIDE) // 2), n - SIDE)
            for v, n in zip((rows, columns), hu.shape, strict=True)
        ]
        top, left = corner
        window = hu[top : top + SIDE, left : left + SIDE]
        yield hu_to_mu(window).clamp_min(0)[None, None]


def mr_slices(files: list[Path]) -> Tensor:
    """(n, 1, 64, 64): axial slices with something in them, means of 2×2 pixels."""
    kept = []
    for path in files:
        volume = io.read(path).values
        filled = (volume > 0.1).flatten(1).float().mean(1) > 0.1
        kept.append(avg_pool2d(volume[filled][:, None], 2))
    return torch.cat(kept)


def parts(data: Path, what: str) -> dict[str, list[Path]]:
    """Files to train on, to watch training by (and tune on), and to report on."""
    if what == "ct":
        train = sorted((data / "openkbp" / "train").glob("*_ct.nii.gz"))
        val = sorted((data / "openkbp" / "val").glob("*_ct.nii.gz"))
        n, hint = TUNING_PATIENTS, "set INVSOLVE_DATA"
    else:
        train = sorted((data / "mr-brain" / "train").glob("*.nii"))
        val = sorted((data / "mr-brain" / "val").glob("*.nii"))
        n, hint = 2, f"benchmarks/make_mr_population.py --out {data}/mr-brain"
    if not train or not val:
        raise SystemExit(f"no images for {what} in {data}: {hint}")
    return {"train": train, "val": val[:n], "test": val[n:]}


SLICES = {"ct": ct_slices, "mr": mr_slices}


def measured(what: str, x: Tensor, count: int, generator: Generator) -> Exams:
    """Exams of so many rows each."""
    family = families()[what]
    if what == "mr":
        kept = Split(context=(CENTRE + 1, ROWS), target=1, centre=CENTRE).kept(
            family.grid
        )
        return acquire(x, family, count, MR_SIGMA, kept=kept, generator=generator)
    z = ct_sinograms(x)
    return acquire(x, family, count, CT_SIGMA, z=z, generator=generator)


def main() -> None:
    """Write one file of exams for each kind and part; what exists is left as it is."""
    parser = argparse.ArgumentParser(description="Exams without their images.")
    data = Path(os.environ.get("INVSOLVE_DATA", "data"))
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--out", type=Path, default=data / "exams")
    parser.add_argument("--kinds", nargs="+", default=["ct", "mr"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    jobs = [(what, part) for what in args.kinds for part in ("train", "val")]
    for what, part in tqdm(jobs, desc="exams"):
        path = args.out / f"{what}-{part}.npz"
        if path.exists():
            continue
        x = SLICES[what](parts(args.data, what)[part])
        if part == "val":
            x = x[torch.linspace(0, len(x) - 1, HELD_OUT).long()]
        generator = Generator().manual_seed(2 * args.seed + (part == "val"))
        save_exams(path, measured(what, x, ROWS, generator))


if __name__ == "__main__":
    main()
