"""How good the bundled prior is: denoising against TV, and what it draws unasked.

    python benchmarks/prior.py --data $INVSOLVE_DATA

Writes ``prior.json`` beside the other results, and the table and the sheet of the
docs. TV's λ is tuned at
every noise level on the tuning patients; the numbers are of the reporting ones.
"""

import argparse
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import torch
from ct_headneck import machine, put, slices
from torch import Generator, Tensor
from tqdm import tqdm

import invsolve as iv
from invsolve import io, operators as ops, samplers
from invsolve.metrics import body_mask, psnr
from invsolve.priors import Prior
from invsolve.random import randn_like
from invsolve.units import MU_WATER, hu_to_mu, mu_to_hu

SIGMAS_HU = (20, 50, 100, 200, 400)
TV_LAMBDAS = (0.3, 0.5, 0.8, 1.2, 2.0)
"""λ in units of 1/σ: what TV denoising needs grows with the noise."""

BEGIN, END = "<!-- denoising: begin -->", "<!-- denoising: end -->"


def tv_denoise(x: Tensor, sigma: float, lam: float) -> Tensor:
    """TV denoising of x = x₀ + σn."""
    problem = iv.InverseProblem(x, ops.Identity(), ops.GaussianNoise(sigma))
    return samplers.tv(problem, lam=lam / sigma)


def main() -> None:
    """Measure, print, and write down."""
    parser = argparse.ArgumentParser(description="How good the bundled prior is.")
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--prior", default="ct-headneck-128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--doc", type=Path, default=Path("docs/prior.md"))
    args = parser.parse_args()
    prior = iv.priors.load(args.prior)
    generator = Generator().manual_seed(args.seed)
    tune = hu_to_mu(torch.cat([i.values for i in slices(args.data, "tune")]))[:, None]
    x0 = hu_to_mu(torch.cat([i.values for i in slices(args.data, "report")]))[:, None]
    rows = []
    for hu in tqdm(SIGMAS_HU):
        sigma = hu / 1000 * MU_WATER
        noisy = tune + sigma * randn_like(tune, generator)
        scores = [quality(tv_denoise(noisy, sigma, lam), tune) for lam in TV_LAMBDAS]
        lam = TV_LAMBDAS[scores.index(max(scores))]
        noisy = x0 + sigma * randn_like(x0, generator)
        with torch.no_grad():
            denoised = prior.denoise(noisy, torch.tensor(sigma))
        rows.append(
            {
                "sigma_hu": hu,
                "noisy": quality(noisy, x0),
                "tv": quality(tv_denoise(noisy, sigma, lam), x0),
                "tv_lambda_sigma": lam,
                "prior": quality(denoised, x0),
            }
        )
    lines = ["| σ (HU) | noisy | TV | ct-headneck-128 |", "| --- | --- | --- | --- |"]
    for r in rows:
        numbers = " | ".join(f"{r[k]:.2f}" for k in ("noisy", "tv", "prior"))
        lines.append(f"| {r['sigma_hu']} | {numbers} |")
    lines += [
        "",
        f"PSNR in dB over the body (data range 2000 HU), mean over {len(x0)} slices; λ "
        f"tuned for TV at each σ on {len(tune)} others. "
        f"{datetime.now(UTC).date().isoformat()}, {machine()}, seed {args.seed}. Made by "
        "`python benchmarks/prior.py`.",
    ]
    print("\n".join(lines))
    put(args.doc, "\n".join(lines), BEGIN, END)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "slices": len(x0),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "seed": args.seed,
        "psnr_in_dB_over_the_body_data_range_2000_HU": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    io.replace(args.out / "prior.json", lambda p: Path(p).write_text(text))
    drawn = draw(prior, args.samples, args.steps, x0.shape[1:], generator)
    save_sheet(mu_to_hu(drawn), args.doc.parent / "prior-samples.png")


def quality(x: Tensor, truth: Tensor) -> float:
    """Mean PSNR in dB over the body."""
    mask, data_range = body_mask(truth), 2000 / 1000 * MU_WATER
    return float(psnr(x, truth, data_range, mask).mean())


def draw(
    prior: Prior, n: int, steps: int, shape: torch.Size, generator: Generator
) -> Tensor:
    """Unconditional samples by the probability flow."""
    like = torch.zeros(n, *shape)
    return samplers.unconditional(
        prior, like, steps=steps, generator=generator, progress=tqdm
    )


def save_sheet(hu: Tensor, path: Path) -> None:
    """Unconditional samples in a soft-tissue window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(hu) // 2, figsize=(len(hu), 4.4))
    for axis, image in zip(axes.flat, hu[:, 0], strict=False):
        axis.imshow(image, cmap="gray", vmin=-160, vmax=240)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110, facecolor="black")


if __name__ == "__main__":
    main()
