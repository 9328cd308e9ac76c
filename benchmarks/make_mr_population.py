"""The training images of the brain MR prior, from label maps of real heads.

    python benchmarks/make_mr_population.py --out $INVSOLVE_DATA/mr-brain

Of the 18 heads the last four (by name) are for validation alone. Simulated images: see
`invsolve.population`. What exists already is left as it is.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Generator
from tqdm import tqdm

from invsolve import io
from invsolve.population import brain_mr, read_tissues

VALIDATION_HEADS = 4


def heads(data: Path, part: str) -> list[Path]:
    """The label maps of a part: ``train`` or ``val``, no head in both."""
    files = sorted((data / "synthseg").glob("head_*.nii.gz"))
    if not files:
        raise SystemExit(f"no label maps in {data}/synthseg: set INVSOLVE_DATA")
    train = part == "train"
    return files[:-VALIDATION_HEADS] if train else files[-VALIDATION_HEADS:]


def main() -> None:
    """Write one NIfTI volume for each head and draw."""
    parser = argparse.ArgumentParser(description="Brain MR images from label maps.")
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=10, help="for each training head")
    parser.add_argument("--heads", type=int, help="only the first so many to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tissues = read_tissues(args.data / "synthseg" / "t1_intensity_priors.csv")
    for part, draws in (("val", 2), ("train", args.draws)):
        most = args.heads if part == "train" else None
        for number, path in enumerate(tqdm(heads(args.data, part)[:most], desc=part)):
            labels = io.read(path)
            for draw in range(draws):
                out = args.out / part / f"{path.name.split('.')[0]}_{draw:02d}.nii"
                if out.exists():
                    continue
                # Half of the images are of no contrast that a scanner has.
                contrast = ("t1", "random", "t2", "random")[draw % 4]
                seed = args.seed * 10**6 + number * 10**3 + draw
                generator = Generator().manual_seed(seed + 10**9 * (part == "val"))
                image = brain_mr(
                    labels.values.long(), tissues, generator, contrast=contrast
                )
                affine = labels.affine.copy()
                affine[:3, :3] *= 2
                io.write(out, io.Image(image.to(torch.float32), affine, ""))


if __name__ == "__main__":
    main()
