"""Sparse-view, low-dose CT of held-out patients: the README's table.

    python benchmarks/ct_headneck.py --data $INVSOLVE_DATA --plain
    python benchmarks/ct_headneck.py --data $INVSOLVE_DATA --counts 5e3
    python benchmarks/ct_headneck.py --data $INVSOLVE_DATA --readme README.md
    python benchmarks/ct_headneck.py --data $INVSOLVE_DATA --part tune --oversample 1
    python benchmarks/ct_headneck.py --data $INVSOLVE_DATA --part tune --readme README.md

The last two are about the operator alone, and go to docs/operators.md.

Data: real CT slices of OpenKBP's validation patients, of whom no bundled prior saw any.
The first nine (by number) are for tuning and the rest for reporting, so that no number
in the table was tuned on. Measurements are simulated (see `invsolve.simulate`): 30 views,
Poisson counts, on a grid three times finer than the reconstruction's.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Generator
from tqdm import tqdm

import invsolve as iv
from invsolve import io
from invsolve.demo import COUNTS, OVERSAMPLE, VIEWS, Comparison, compare
from invsolve.priors.weights import read_card

TUNING_PATIENTS = 9
HEIGHTS = (0.3, 0.7)
"""Where in a body, from its lowest slice to its highest, slices are taken."""

LESS = 5e3
"""Photons of the README's second column, beside the demo's."""

BEGIN, END = "<!-- ct-headneck: begin -->", "<!-- ct-headneck: end -->"
BESIDE = ("<!-- equivariant: begin -->", "<!-- equivariant: end -->")
PIXELS = ("<!-- ct-pixels: begin -->", "<!-- ct-pixels: end -->")


def slices(data: Path, part: str, heights: Sequence[float] = HEIGHTS) -> list[io.Image]:
    """One image for each patient of a part, with a slice at each of the heights."""
    files = sorted((data / "openkbp" / "val").glob("*_ct.nii.gz"))
    if not files:
        raise SystemExit(f"no patients in {data}/openkbp/val: set INVSOLVE_DATA")
    tune = part == "tune"
    chosen = files[:TUNING_PATIENTS] if tune else files[TUNING_PATIENTS:]
    images = []
    for path in chosen:
        volume = io.read(path, "HU", axes="PLI")  # the affines say RAS, wrongly
        filled = (volume.values > -500).flatten(1).float().mean(1) > 0.02
        body = filled.nonzero().flatten()
        picked = torch.stack([body[int(h * (len(body) - 1))] for h in heights])
        images.append(io.Image(volume.values[picked], volume.affine, "HU"))
    return images


def summary(
    comparisons: Sequence[Comparison], part: str, counts: float, seed: int
) -> dict:
    """Mean and spread over slices for each method, and what was run where."""
    rows = []
    for i, first in enumerate(comparisons[0].results):
        same = [c.results[i] for c in comparisons]
        psnr = torch.cat([r.psnr for r in same if r.psnr is not None])
        ssim = torch.cat([r.ssim for r in same if r.ssim is not None])
        rows.append(
            {
                "method": first.name,
                "kind": first.kind,
                "samples": first.samples,
                "settings": {k: str(v) for k, v in first.settings.items()},
                "psnr_mean": float(psnr.mean()),
                "psnr_sd": float(psnr.std()),
                "ssim_mean": float(ssim.mean()),
                "seconds": sum(r.stats.seconds for r in same) / len(psnr),
                "forwards": sum(r.stats.network_forwards for r in same) / len(psnr),
                "psnr": [round(float(p), 3) for p in psnr],
                "stats": [asdict(r.stats) for r in same],
            }
        )
    return {
        "part": part,
        "patients": len(comparisons),
        "slices": sum(len(c.truth) for c in comparisons),
        "views": VIEWS,
        "counts": counts,
        "seed": seed,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "torch": torch.__version__,
        "rows": rows,
    }


def machine() -> str:
    """The processor, or the GPU beside it, in a few words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            x for x in info.read_text().splitlines() if x.startswith("model name")
        ]
        name = models[0].split(":")[1].strip() if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {name}{gpu}"


def table(results: Sequence[dict]) -> str:
    """Summaries of the same slices in Markdown, a column of PSNR for each dose."""
    doses = " | ".join(f"{r['counts']:,.0f} photons" for r in results)
    lines = [
        f"| method | gives | {doses} | SSIM | network passes | seconds |",
        f"| --- | --- | {'--- | ' * len(results)}--- | --- | --- |",
    ]
    for rows in zip(*(r["rows"] for r in results), strict=True):
        row = rows[0]
        mean = f", mean of {row['samples']}" if row["samples"] > 1 else ""
        kind = row["kind"].replace("_", " ") + mean
        psnr = " | ".join(f"{r['psnr_mean']:.2f} ± {r['psnr_sd']:.2f}" for r in rows)
        lines.append(
            f"| {row['method']} | {kind} | {psnr} | {row['ssim_mean']:.3f} | "
            f"{row['forwards']:.0f} | {row['seconds']:.1f} |"
        )
    first = results[0]
    busy = ", which did other work as well"
    told = [f"{r['date']}, {r['machine']}{busy * r['busy']}" for r in results]
    made = " and ".join(f"`{r['command']}`" for r in results)
    first_of = "" if len(results) == 1 else " of the first dose"
    whom = "whom neither training nor tuning saw"
    if first["part"] != "report":
        whom = "whom training did not see, for tuning"
    lines += [
        "",
        f"{first['slices']} slices of {first['patients']} patients {whom} (OpenKBP, real "
        f"CT); simulated measurements: {first['views']} views, so many photons a ray, on a "
        "grid three times finer. PSNR in dB (data range 2000 HU) and SSIM over the body, "
        "mean ± standard deviation over slices; SSIM, passes and seconds for one slice"
        f"{first_of}. {'; '.join(dict.fromkeys(told))}, seed {first['seed']}, weights "
        f"{first['weights']}. Made by {made}.",
    ]
    return "\n".join(lines)


def beside(plain: dict, result: dict, heads: tuple[str, str], of: str) -> str:
    """What one thing changes, of the methods that it concerns."""
    lines = [f"| method | {heads[0]} | {heads[1]} |", "| --- | --- | --- |"]
    for one, other in zip(plain["rows"], result["rows"], strict=True):
        if one["psnr"] != other["psnr"]:
            scores = " | ".join(f"{r['psnr_mean']:.2f}" for r in (one, other))
            lines.append(f"| {one['method']} | {scores} |")
    told = [f"{r['date']}, {r['machine']}" for r in (plain, result)]
    lines += [
        "",
        f"PSNR in dB of {result['slices']} slices of {of}, {result['views']} views and "
        f"{result['counts']:,.0f} photons, with the same seed and the same passes, weights "
        f"{result['weights']}. {'; '.join(dict.fromkeys(told))}. Made by "
        f"`{plain['command']}` and `{result['command']}`.",
    ]
    return "\n".join(lines)


def put(path: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between two marks of a page."""
    before, rest = path.read_text().split(begin)
    new = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    io.replace(path, lambda p: Path(p).write_text(new))


def main() -> None:
    """Run, print the table, and write it down."""
    parser = argparse.ArgumentParser(
        description="Sparse-view, low-dose CT of held-out patients."
    )
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--part", choices=["tune", "report"], default="report")
    parser.add_argument(
        "--patients", type=int, default=None, help="only the first so many"
    )
    parser.add_argument("--prior", default="ct-headneck-128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts", type=float, default=COUNTS, help="photons a ray")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--plain", action="store_true", help="the prior as it is, not `Equivariant`"
    )
    parser.add_argument("--oversample", type=int, default=OVERSAMPLE, choices=[1, 2])
    parser.add_argument(
        "--busy",
        action="store_true",
        help="say that the machine did other work as well",
    )
    parser.add_argument("--readme", type=Path, help="put the table between its marks")
    args = parser.parse_args()
    prior = iv.priors.load(args.prior)
    images = slices(args.data, args.part)[: args.patients]
    generator = Generator().manual_seed(args.seed)
    comparisons = [
        compare(
            image,
            prior,
            counts=args.counts,
            oversample=args.oversample,
            equivariant=not args.plain,
            generator=generator,
            device=torch.device(args.device),
        )
        for image in tqdm(images, unit="patient")
    ]
    result = summary(comparisons, args.part, args.counts, args.seed)
    points = args.oversample != OVERSAMPLE
    told = f" --part {args.part}" * (args.part != "report")
    told += f" --patients {args.patients}" if args.patients else ""
    told += " --plain" * args.plain + f" --oversample {args.oversample}" * points
    told += f" --counts {args.counts:g}" * (args.counts != COUNTS)
    told += " --readme README.md" * bool(args.readme) + " --busy" * args.busy
    result["busy"] = args.busy
    result["weights"] = read_card(args.prior)[0]["sha256"][:8]
    result["command"] = f"python benchmarks/ct_headneck.py{told}"
    print(table([result]))
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"ct_headneck-{args.part}-{torch.device(args.device).type}"
    other = f"-{args.counts:g}" * (args.counts != COUNTS) + "-points" * points
    path = args.out / f"{stem}{'-plain' * args.plain}{other}.json"
    text = json.dumps(result, indent=1) + "\n"
    io.replace(path, lambda p: Path(p).write_text(text))
    if not args.readme:
        return
    ends = ("", f"-{LESS:g}", "-plain", "-points")
    usual, less, plain, pointed = (
        alike(args.out / f"{stem}{end}.json", result) for end in ends
    )
    docs = args.readme.parent / "docs"
    if args.part == "report":
        put(args.readme, table([r for r in (usual, less) if r]), BEGIN, END)
        if plain and usual:
            heads = "as the network is", "equivariant"
            text = beside(plain, usual, heads, "the README's patients")
            put(docs / "priors.md", text, *BESIDE)
    elif pointed and usual:
        heads = "pixels as points", "as means"
        text = beside(pointed, usual, heads, "the tuning patients")
        put(docs / "operators.md", text, *PIXELS)


def alike(path: Path, result: dict) -> dict:
    """What a file holds, if it is there and of the same slices and weights."""
    other = json.loads(path.read_text()) if path.exists() else {}
    if all(other.get(key) == result[key] for key in ("slices", "seed", "weights")):
        return other
    print(f"{path} is of other slices or weights, or not there: left out")
    return {}


if __name__ == "__main__":
    main()
