"""One data set, four parameterisations, side by side: a table of docs/priors.md.

    python benchmarks/parity.py --docs docs/priors.md

The priors of photographs that predict EDM's mixture, the image, the noise and a flow are
measured on the same held-out squares, with the same noise: PSNR of the denoised beside
the best linear filter's, bits per dimension, how far the spectrum of what they draw is
from the training squares', and MMPS's PSNR on the photographs of `quality_tasks`, with
settings tuned for none of them. x₀ and flow go on from EDM's network by Muon; ε is
smaller, by AdamW. Each prior's results are kept, and made again when its weights change.
"""

import argparse
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from ct_headneck import machine, put
from quality import psnr_of, read
from quality_tasks import TASKS
from torch import Generator
from tqdm import tqdm

import invsolve as iv
from invsolve import io
from invsolve.likelihood import bits_per_dimension, log_likelihood
from invsolve.priors.weights import read_card
from invsolve.report_card import LEVELS, denoising, power_spectrum, wiener
from invsolve.samplers import mmps, tv, unconditional
from invsolve.training import TrainConfig
from invsolve.training_data import load

HOME = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "parity.json"
QUALITY = RESULTS.parent / "quality"
CONFIG = HOME / "configs" / "natural-64-x0.toml"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"

PRIORS: Mapping[str, str] = {
    "natural-64": "EDM",
    "natural-64-x0": "x₀",
    "natural-64-eps": "ε",
    "natural-64-flow": "flow",
}
POSTERIOR = ("sr-4", "deblur", "inpaint")
SQUARES, SAMPLES, DRAWS, STEPS = 32, 32, 4, 25
MMPS: Mapping[str, Any] = {"steps": 20, "sigma_range": (0.02, 3.0), "cg_steps": 1}


def measure(name: str, data: Path, images: int) -> dict[str, Any]:
    """All that is told of one prior, every random number the same for each."""
    config = TrainConfig.read(CONFIG).data
    config = config.model_copy(update={"photo_crops": SQUARES})
    cutting = Generator().manual_seed(0)
    train = load(data / config.train, config, cutting).float()
    held_out = load(data / config.val, config, cutting).float()[:images]
    prior = iv.priors.load(name)
    inner, rival = prior.normalised[0], wiener(train)
    data_range = float(held_out.max() - held_out.min())
    rows = [
        denoising(inner, rival, held_out, s, data_range, Generator().manual_seed(1))
        for s in tqdm(LEVELS, desc=f"{name}: denoising")
    ]
    drawn = unconditional(
        inner,
        torch.zeros(min(SAMPLES, images), *held_out.shape[1:]),
        steps=STEPS,
        generator=Generator().manual_seed(2),
    )
    ratio = power_spectrum(drawn)[1:] / power_spectrum(train)[1:]
    log_p = log_likelihood(
        inner, held_out, steps=STEPS, generator=Generator().manual_seed(3)
    )
    return {
        "denoising": {f"{row.sigma:g}": row.prior for row in rows},
        "linear": {f"{row.sigma:g}": row.rival for row in rows},
        "bits": float(bits_per_dimension(log_p, held_out[0].numel()).mean()),
        "spectrum_db": float((10 * ratio.log10()).abs().mean()),
        "posterior": {key: posterior(key, prior, data, images) for key in POSTERIOR},
    }


def posterior(
    key: str, prior: iv.priors.Prior, data: Path, images: int
) -> dict[str, float]:
    """PSNR in dB of a draw and of the mean of `DRAWS`, means over the photographs."""
    task = TASKS[key]
    truth = task.images(data, "test", images // 2)
    solution = iv.solve(
        task.problem(truth, Generator().manual_seed(0)),
        prior,
        mmps,
        samples=DRAWS,
        generator=Generator().manual_seed(1),
        **MMPS,
    )
    return {
        "draw": float(
            psnr_of(solution.samples[0], truth, task.data_range, None).mean()
        ),
        "mean": float(psnr_of(solution.mean, truth, task.data_range, None).mean()),
    }


def variation(key: str, data: Path, images: int) -> float:
    """PSNR in dB of total variation as `quality.py` tuned it, on the same photographs."""
    task = TASKS[key]
    truth = task.images(data, "test", images // 2)
    tuned = read(QUALITY / f"{key}.json")["settings"]["TV"]["options"]
    solution = iv.solve(
        task.problem(truth, Generator().manual_seed(0)),
        None,
        tv,
        generator=Generator(),
        **tuned,
    )
    return float(psnr_of(solution.samples[0], truth, task.data_range, None).mean())


def table(results: Mapping[str, Any]) -> str:
    """Denoising beside a filter; then what is drawn, unasked and of measurements."""
    found = {
        name: results["priors"][name] for name in PRIORS if name in results["priors"]
    }
    first = next(iter(found.values()))
    lines = [
        "What networks of photographs predict, on the same images:",
        "",
        "| denoising, dB | "
        + " | ".join(f"σ = {s}" for s in first["denoising"])
        + " |",
        "| --- " * (1 + len(first["denoising"])) + "|",
        "| linear | " + " | ".join(f"{v:.2f}" for v in first["linear"].values()) + " |",
    ]
    for name, row in found.items():
        values = " | ".join(f"{v:.2f}" for v in row["denoising"].values())
        lines.append(f"| {PRIORS[name]}, `{name}` | {values} |")
    titles = " | ".join(f"{TASKS[key].title}, dB" for key in POSTERIOR)
    lines += [
        "",
        "| predicts | network, images seen | bits per dimension | spectrum, dB | "
        f"{titles} |",
        "| --- " * (4 + len(POSTERIOR)) + "|",
    ]
    beside = " | ".join(f"{results['tv'][key]:.2f}" for key in POSTERIOR)
    lines.append(f"| total variation | | | | {beside} |")
    for name, row in found.items():
        card, _ = read_card(name)
        widths = ", ".join(map(str, card["network"]["widths"]))
        training = card["training"]
        start = f" after `{training['start']}`" if "start" in training else ""
        seen = f"{training['images']}{start}"
        draws = " | ".join(
            f"{row['posterior'][key]['draw']:.2f} / {row['posterior'][key]['mean']:.2f}"
            for key in POSTERIOR
        )
        lines.append(
            f"| {PRIORS[name]} | {widths}; {seen} | {row['bits']:.2f} | "
            f"{row['spectrum_db']:.1f} | {draws} |"
        )
    n = results["images"]
    lines += [
        "",
        f"Denoising and likelihood: the same {n} squares of a photograph that training did "
        "not see, and the same noise; linear is the best filter that is alike everywhere, "
        "by the training squares' spectra. Spectrum: how far that of unconditional samples "
        "is from the training squares', the mean over frequencies. Tasks: MMPS, "
        f"{MMPS['steps']} steps, {n // 2} squares of scikit-image's photographs; a draw / "
        f"the mean of {DRAWS}. Made by `python benchmarks/parity.py --images {n}` on "
        f"{results['date']}, {results['machine']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet, and print the table or put it into the page."""
    parser = argparse.ArgumentParser(description="Four parameterisations of one thing.")
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument(
        "--prior", nargs="+", choices=list(PRIORS), default=list(PRIORS)
    )
    parser.add_argument("--images", type=int, default=SQUARES, help="at most 32, even")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    if missing := sorted(set(args.prior) - set(iv.priors.available())):
        raise SystemExit(
            f"not bundled: {', '.join(missing)}; train each with invsolve train "
            f"configs/NAME.toml, or give others with --prior"
        )
    found = read(args.out)
    if found.get("images") != args.images:
        found = {"images": args.images, "priors": {}}
    if "tv" not in found:
        found["tv"] = {key: variation(key, args.data, args.images) for key in POSTERIOR}
    for name in args.prior:
        weights = read_card(name)[0]["sha256"]
        if found["priors"].get(name, {}).get("sha256") == weights:
            continue
        row = measure(name, args.data, args.images)
        found["priors"][name] = {"sha256": weights, **row}
        found |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine()}
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        args.out.parent.mkdir(parents=True, exist_ok=True)
        io.replace(args.out, lambda p, t=text: Path(p).write_text(t, "utf-8"))
    if args.docs is None:
        print(table(found))
    else:
        put(args.docs, table(found), BEGIN, END)


if __name__ == "__main__":
    main()
