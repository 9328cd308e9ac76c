"""The settings of `invsolve.demo.METHODS`: every method tuned alike, on patients apart.

    python benchmarks/tune_ct.py --data $INVSOLVE_DATA --method tv

Runs a method over its grid on the tuning patients of ``ct_headneck.py`` and prints the
mean PSNR over the body, best first. FBP has one free setting, TV one, the samplers those
that matter most; the others stay at the sampler's defaults.
"""

import argparse
import itertools
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ct_headneck import slices
from torch import Generator

import invsolve as iv
from invsolve import samplers
from invsolve.demo import COUNTS, FROM_TV, PNP, Method, compare
from invsolve.samplers.reddiff import PRESETS
from invsolve.units import MU_WATER

PNP_RUN = partial(samplers.pnp, **PNP)
RED_RUN = partial(samplers.reddiff, **PRESETS["ct"])

GRIDS: Mapping[str, tuple[Any, int, Mapping[str, Sequence[Any]]]] = {
    "fbp": (
        samplers.fbp,
        1,
        {"window": ["ram-lak", "shepp-logan", "cosine", "hann"]},
    ),
    "tv": (
        samplers.tv,
        1,
        {
            "lam": [k / MU_WATER for k in (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)],
            "steps": [200],
            "nonnegative": [True],
        },
    ),
    "reddiff": (
        samplers.reddiff,
        1,
        {
            "steps": [40],
            "sigma_range": [(0.02, 0.3), (0.03, 0.5)],
            "lam": [0.15, 0.3],
            "lr": [0.5, 0.8],
            "normalize": ["bayes"],
            "weight": ["calibrated"],
            "optimizer": ["prox"],
            "init": ["zeros"],
        },
    ),
    "pnp": (
        samplers.pnp,
        1,
        {
            "init": [FROM_TV],
            "method": ["hqs", "admm"],
            "steps": [20],
            "sigma_range": [(0.01, 0.1), (0.03, 0.1)],
            "lam": [0.2, 0.4, 0.6, 0.8, 1.2],
            "cg_steps": [15],
        },
    ),
    "ensemble": (
        samplers.ensemble,
        1,
        {
            "methods": [(PNP_RUN,), (PNP_RUN, RED_RUN)],
            "init": [FROM_TV],
        },
    ),
    "dds": (
        samplers.dds,
        4,
        {
            "steps": [20],
            "sigma_range": [(0.03, 2.0)],
            "lam": [0.3, 0.6, 1.0],
            "eta": [0.85, 1.0],
            "cg_steps": [10, 20],
        },
    ),
    "diffpir": (
        samplers.diffpir,
        4,
        {
            "steps": [20],
            "sigma_range": [(0.03, 2.0)],
            "lam": [0.3, 0.6, 1.0],
            "zeta": [0.5, 1.0],
            "cg_steps": [15],
        },
    ),
}
"""Sampler, samples, and the values tried for each of its settings."""


def main() -> None:
    """Try every point of a grid, and print them best first."""
    parser = argparse.ArgumentParser(description="Tune one method on patients apart.")
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--method", choices=sorted(GRIDS), required=True)
    parser.add_argument("--patients", type=int, default=5)
    parser.add_argument("--counts", type=float, default=COUNTS)
    parser.add_argument("--prior", default="ct-headneck-128")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    prior = iv.priors.load(args.prior)
    images = slices(args.data, "tune")[: args.patients]
    sampler, samples, grid = GRIDS[args.method]
    rows = []
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        generator = Generator().manual_seed(0)
        scores = []
        for image in images:
            found = compare(
                image,
                prior,
                methods=[Method(args.method, sampler, options, samples)],
                counts=args.counts,
                generator=generator,
                device=torch.device(args.device),
            )
            scores.append(found.results[0].psnr)
        rows.append((float(torch.cat(scores).mean()), options))
        print(f"{rows[-1][0]:.2f} dB  {options}", flush=True)
    best, options = max(rows, key=lambda row: row[0])
    print(f"best: {best:.2f} dB  {options}")


if __name__ == "__main__":
    main()
