"""Exams on disk: what was measured of signals that nobody ever saw.

Each exam acquired some rows of one family of operators, y = A_φ x + n, φ another every
time. A file of them is what diffusion with forward models is trained on.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from . import io
from .operators import GaussianNoise
from .operators.parametric import Parametric, Rows
from .shapes import Y

FORMAT = 1


@final
@dataclass(frozen=True, eq=False)
class Exams:
    """Measurements of many signals, each of a few rows.

    Args:
        family: of the operators.
        rows: φ, (exams, *grid).
        y: (exams, channels, *measured), with zeros where nothing was acquired.
        sigma: the noise's, GaussianNoise, in the measurements' unit.
        note: where they are from.

    Raises:
        ValueError: shapes do not belong together, or a number is not finite.
    """

    family: Parametric
    rows: Rows
    y: Y
    sigma: float
    note: str = ""

    def __post_init__(self) -> None:
        self.family.check(self.rows)
        if len(self.rows) != len(self.y) or self.y.shape[2:] != self.family.measured:
            raise ValueError(
                f"measurements of {tuple(self.y.shape)} do not belong to "
                f"{len(self.rows)} exams of {self.family.measured}"
            )
        if not self.y.isfinite().all():
            raise ValueError("measurements are NaN or infinite: leave those exams out")
        if not self.sigma > 0:
            raise ValueError(f"the noise's sigma must be > 0, got {self.sigma}")

    def __len__(self) -> int:
        return len(self.rows)


def acquire(
    x: Float[Tensor, "exams channels *space"],
    family: Parametric,
    count: int,
    sigma: float,
    *,
    kept: Bool[Tensor, "*grid"] | None = None,
    z: Tensor | None = None,
    note: str = "simulated",
    generator: Generator,
) -> Exams:
    """Simulated exams: of each image, ``count`` rows at random, with noise.

    Args:
        x: images in the operators' unit.
        family: of which rows are acquired.
        count: how many rows each exam has, the kept ones with them.
        sigma: of the noise.
        kept: rows that every exam has, such as the centre of k-space.
        z: all that could be measured of the images without noise, if it is not A x (as
            on a finer grid).
        note: where the images are from.
        generator: of rows and noise.
    """
    everything = torch.ones(len(x), *family.grid, dtype=torch.bool)
    sizes = torch.full((len(x), 1), count)
    (rows,) = family.split(everything, sizes, generator=generator, kept=kept)
    z = family.full.apply(x) if z is None else z
    y = GaussianNoise(sigma).sample(z, generator=generator)
    return Exams(family, rows, family.restrict_data(y, rows), sigma, note)


def save_exams(path: str | Path, exams: Exams) -> None:
    """Write exams as ``.npz``, all of them or nothing; only what was acquired is kept."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"cannot write {path}: the name must end in .npz")
    words = exams.family.words
    if not words:
        raise ValueError("this family of operators cannot be written: it has no words")
    tensors = {k: v for k, v in words.items() if isinstance(v, Tensor)}
    seen = exams.family.spread(exams.rows).expand(exams.y.shape)
    arrays = {f"rows.{k}": v.cpu().numpy() for k, v in tensors.items()}
    arrays |= {"rows": exams.rows.cpu().numpy(), "y": exams.y[seen].cpu().numpy()}
    meta = {
        "format": FORMAT,
        "rows": {k: v for k, v in words.items() if k not in tensors},
        "channels": exams.y.shape[1],
        "sigma": exams.sigma,
        "note": exams.note,
    }
    arrays["meta"] = np.asarray(json.dumps(meta))

    def save(partial: str) -> None:
        np.savez_compressed(partial, allow_pickle=False, **arrays)

    path.parent.mkdir(parents=True, exist_ok=True)
    io.replace(path, save, ".npz")


def load_exams(path: str | Path) -> Exams:
    """Read what `save_exams` wrote.

    Raises:
        ValueError: the file is missing, damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of exams {path}: check the name")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {k: torch.from_numpy(file[k]) for k in file.files if k != "meta"}
            meta: dict[str, Any] = json.loads(str(file["meta"][()]))
        if meta["format"] != FORMAT:
            raise ValueError(f"its format is {meta['format']}, not {FORMAT}")
        words = {k[5:]: v for k, v in arrays.items() if k.startswith("rows.")}
        family = Parametric.from_words({**meta["rows"], **words})
        rows = arrays["rows"]
        y = arrays["y"].new_zeros(len(rows), meta["channels"], *family.measured)
        y[family.spread(rows).expand(y.shape)] = arrays["y"]
        return Exams(family, rows, y, float(meta["sigma"]), str(meta["note"]))
    # zipfile, zlib, struct, NumPy and torch each raise their own.
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(f"cannot read the exams {path}: {first_line}") from error
