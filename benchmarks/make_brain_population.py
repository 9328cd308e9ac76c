"""Brain MR and its tissues, to train segmenters on and to measure them.

    python benchmarks/make_brain_population.py --out $INVSOLVE_DATA/brain-tissues

Simulated images of real heads' label maps (see `invsolve.population`), and the tissue
that most of each voxel is of, in the layout that `invsolve train` reads (``imagesTr``,
``labelsTr``). The heads are parted as the brain MR prior's: the last four are for
validation alone. What exists already is left as it is.
"""

import argparse
import os
from pathlib import Path

import torch
from make_mr_population import heads
from torch import Generator
from tqdm import tqdm

from invsolve import io
from invsolve.grids import Grid
from invsolve.population import (
    BRAIN_TISSUES,
    labelled_brain_mr,
    read_tissues,
    tissue_codes,
)

CONTRASTS = ("t1", "random", "t2", "random")
"""Of the draws in turn: half of the images are of no contrast that a scanner has."""


def main() -> None:
    """Write image and tissues of each head and draw."""
    parser = argparse.ArgumentParser(description="Brain MR images and their tissues.")
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=6, help="for each training head")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tissues = read_tissues(args.data / "synthseg" / "t1_intensity_priors.csv")
    for part, draws in (("val", len(CONTRASTS)), ("train", args.draws)):
        folder = args.out / part
        for number, path in enumerate(tqdm(heads(args.data, part), desc=part)):
            head = io.read(path)
            grid = Grid.of(head).spaced(2.0)
            for draw in range(draws):
                contrast = CONTRASTS[draw % len(CONTRASTS)]
                name = f"{path.name.split('.')[0]}-{contrast}-{draw}"
                label = folder / "labelsTr" / f"{name}.nii.gz"
                if label.exists():
                    continue
                # None of the seeds of the prior's population.
                seed = args.seed * 10**6 + 5 * 10**5 + number * 10**3 + draw
                generator = Generator().manual_seed(seed + 10**9 * (part == "val"))
                image, turned = labelled_brain_mr(
                    head.values.long(), tissues, generator, contrast=contrast
                )
                codes = tissue_codes(turned, BRAIN_TISSUES).to(torch.float32)
                stored = (1000 * image).round() / 1000
                scan = folder / "imagesTr" / f"{name}__MR.nii.gz"
                io.write(scan, io.Image(stored.to(torch.float32), grid.affine, ""))
                io.write(label, io.Image(codes, grid.affine, ""), labels=True)


if __name__ == "__main__":
    main()
