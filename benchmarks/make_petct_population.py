"""PET/CT of head-and-neck tumours: real CT and targets, simulated tumours and PET.

    python benchmarks/make_petct_population.py --out $INVSOLVE_DATA/petct

Writes OpenKBP's patients in HECKTOR's layout (``imagesTr``, ``labelsTr``), the networks'
grid already: see `invsolve.segmentation.pet`. What exists already is left as it is.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Generator
from tqdm import tqdm

from invsolve import io
from invsolve.segmentation.cases import openkbp_case


def main() -> None:
    """Write CT, PET and label of each patient and draw."""
    parser = argparse.ArgumentParser(description="Simulated PET beside real CT.")
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=2, help="of each training patient")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part, draws in (("val", 1), ("train", args.draws)):
        files = sorted((args.data / "openkbp" / part).glob("*_ct.nii.gz"))
        if not files:
            raise SystemExit(f"no patients in {args.data}/openkbp: set INVSOLVE_DATA")
        folder = args.out / part
        for draw in range(draws):
            for number, file in enumerate(tqdm(files, desc=f"{part}, draw {draw}")):
                name = f"{file.name.split('_')[0]}-{draw}"
                label = folder / "labelsTr" / f"{name}.nii.gz"
                if label.exists():
                    continue
                seed = args.seed * 10**6 + number * 10**3 + draw
                generator = Generator().manual_seed(seed + 10**9 * (part == "val"))
                case = openkbp_case(file, generator)
                assert case.masks is not None
                affine = case.grid.affine
                images = folder / "imagesTr"
                for path, values in (
                    (images / f"{name}__CT.nii.gz", case.scans["ct"].round()),
                    (
                        images / f"{name}__PT.nii.gz",
                        (1000 * case.scans["pet"]).round() / 1000,
                    ),
                    (label, case.masks[0].to(torch.float32)),
                ):
                    io.write(path, io.Image(values, affine, ""))


if __name__ == "__main__":
    main()
