"""What the bundled priors are worth, in one table: of docs/priors.md.

    python benchmarks/cards.py --evaluate latent-photos-64 --docs docs/priors.md

Of each prior's report card (docs/cards) the denoising beside tuned total variation, or in
latents beside the best linear filter, how near its samples come to training images and how
well its likelihood tells other images apart; and of benchmarks/results/quality the best
sampler with it beside total variation on the tasks it is for. ``--evaluate`` makes a
prior's card again (``invsolve priors evaluate``, with $INVSOLVE_DATA); without it nothing
is measured. A prior whose card is not there yet has no line.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ct_headneck import put
from volumes import TASKS as VOLUME_TASKS, methods

from invsolve.priors.weights import read_card

HOME = Path(__file__).parent.parent
CARDS = HOME / "docs" / "cards"
QUALITY = Path(__file__).parent / "results" / "quality"
LATENT = QUALITY.parent / "latent.json"
VOLUMES = QUALITY.parent / "volumes.json"
JOINT = QUALITY.parent / "joint.json"
BEGIN, END = "<!-- cards: begin -->", "<!-- cards: end -->"


@dataclass(frozen=True)
class Bundled:
    """What a bundled prior is measured on.

    Attributes:
        other: the configuration whose validation images are of another kind.
        tasks: of benchmarks/results/quality, and their titles; none for a latent prior.
        folder: of these results, where they are not the table's own.
        page: of docs, that tells of its tasks instead.
        method: of benchmarks/results/volumes.json, that asks it.
    """

    other: str
    tasks: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    page: str = ""
    method: str = ""


CT, MR = "ct-headneck-128", "mr-brain-128"
PHOTOS = {"sr-4": "SR ×4", "deblur": "deblurring", "inpaint": "inpainting"}
PRIORS: Mapping[str, Bundled] = {
    CT: Bundled(MR, {"ct-30": "CT, 30 views", "ct-15": "CT, 15 views"}),
    "ct-neighbours-128": Bundled(MR, page="volumes.md", method="groups"),
    "ct-between-128": Bundled(MR, page="volumes.md", method="pnp-between"),
    "ct-coronal-128": Bundled(MR, page="volumes.md", method="planes"),
    "ct-organs-128": Bundled(MR, page="joint.md"),
    MR: Bundled(CT, {"mr-4": "MR ×4", "mr-8": "MR ×8"}),
    "natural-64": Bundled(CT, PHOTOS),
    "natural-64-x0": Bundled(CT, PHOTOS, "natural-64-x0"),
    "natural-64-eps": Bundled(CT, PHOTOS, "natural-64-eps"),
    "natural-64-flow": Bundled(CT, PHOTOS, "natural-64-flow"),
    "latent-photos-64": Bundled(CT),
}
CLASSICAL = ("TV", "FBP", "total variation")


def evaluate(name: str) -> None:
    """Write a prior's card, as a user would."""
    page, config = CARDS / f"{name}.html", HOME / "configs" / f"{name}.toml"
    other = HOME / "configs" / f"{PRIORS[name].other}.toml"
    words = ["priors", "evaluate", name, config, "-o", page, "--other", other]
    subprocess.run([sys.executable, "-m", "invsolve.cli", *words], check=True)


def gains(card: Mapping[str, Any]) -> str:
    """PSNR over the rival's at the least noise, and at every other level above it."""
    rows = card["denoising"]
    rival = "linear" if "reconstruction" in card else "tv"
    told = ", ".join(
        f"{row['prior'] - row[rival]:+.1f} (σ = {row['sigma']:g})" for row in rows[::2]
    )
    return f"{told}, of latents, over linear" if rival == "linear" else told


def told_apart(card: Mapping[str, Any]) -> str:
    """The AUROC of images of another kind, by likelihood and by denoising."""
    rows = [r for r in card["likelihood"] if r["images"] == "of another kind"]
    if not rows:
        return "–"
    found = (rows[0]["auroc"], rows[0]["auroc_denoising"])
    return " / ".join("–" if value is None else f"{value:.2f}" for value in found)


def tasks(name: str) -> str:
    """Of each task: the best of one draw, and of the mean of eight, over TV."""
    if page := PRIORS[name].page:
        elsewhere = (
            in_volumes(PRIORS[name].method) if page == "volumes.md" else in_joint()
        )
        return "; ".join([f"[{page}]({page})", *elsewhere])
    if not PRIORS[name].tasks:
        return in_latents()
    told = []
    for key, title in PRIORS[name].tasks.items():
        path = QUALITY / PRIORS[name].folder / f"{key}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        text = [title]
        for part, what, words in (
            ("table", "psnr", "one draw"),
            ("spread", "psnr_of_mean", "mean of 8"),
        ):
            rows = {m: r[what] for m, r in found.get(part, {}).items() if what in r}
            text += over(rows, "TV", words)
        told.append(" ".join(text))
    return "; ".join(told) or "–"


def over(rows: Mapping[str, float], rival: str, words: str) -> list[str]:
    """By how much the best with a prior leads the rival; nothing if one is not there."""
    learnt = {m: p for m, p in rows.items() if m not in CLASSICAL}
    if rival not in rows or not learnt:
        return []
    best = max(learnt, key=learnt.__getitem__)
    return [f"{learnt[best] - rows[rival]:+.2f} ({best}, {words})"]


def in_volumes(method: str) -> list[str]:
    """Of each task of `volumes.py` how far a method leads TV, the mean over volumes."""
    runs = json.loads(VOLUMES.read_text())["run"].values()
    psnr = {(r["task"], r["volume"], r["method"]): r["volume PSNR"] for r in runs}
    leads: dict[str, list[float]] = {}
    for (task, volume, asked), value in psnr.items():
        if asked == method:
            gap = value - psnr[task, volume, "tv"]
            leads.setdefault(VOLUME_TASKS[task].title, []).append(gap)
    name = methods(1)[method].name
    return [f"{title} {sum(g) / len(g):+.2f} ({name})" for title, g in leads.items()]


def in_joint() -> list[str]:
    """How far the images of the prior of images and labels lead TV's, in `joint.py`."""
    rows = json.loads(JOINT.read_text())["rows"] if JOINT.exists() else {}
    own = {k: r for k, r in rows.items() if k.startswith(("joint", "TV"))}
    psnr = {k.split(",")[0]: sum(r["psnr"]) / len(r["psnr"]) for k, r in own.items()}
    return [f"CT, 15 views {text}" for text in over(psnr, "TV", "the image")]


def in_latents() -> str:
    """The same of `latent.py`'s results, which docs/latent.md tells in full."""
    found = json.loads(LATENT.read_text()) if LATENT.exists() else {}
    told = []
    for task, rows in found.items():
        if not isinstance(rows, dict) or task in ("coded", "fit"):
            continue
        n, now = found["images"], read_card("latent-photos-64")[0]["sha256"][:8]
        asked = {m: r["psnr"] for m, r in rows.items() if r["weights"] in ("", now)}
        means = {m: sum(p) / n for m, p in asked.items() if len(p) == n}
        told += [
            f"{task} {text}" for text in over(means, "total variation", "one draw")
        ]
    return "; ".join(["[latent.md](latent.md)", *told])


def table() -> str:
    """One line for each prior."""
    lines = [
        "| prior | denoising, dB over TV | tasks, dB over TV | distance to the nearest "
        "training image: samples / held out | other images told apart |",
        "| --- " * 5 + "|",
    ]
    for name in PRIORS:
        path = CARDS / f"{name}.json"
        if not path.exists():
            continue
        card = json.loads(path.read_text())
        near = card["memory"]
        lines.append(
            f"| [`{name}`](cards/{name}.html) | {gains(card)} | {tasks(name)} | "
            f"{near['samples']:.2f} / {near['held_out']:.2f} | {told_apart(card)} |"
        )
    lines += [
        "",
        "σ in the network's range; distances are root mean squares in it, of a latent "
        "prior's samples and held-out images once they are decoded. Told apart: the AUROC "
        "of images of another kind against held-out ones, by likelihood / denoising (1 is "
        "always, 0.5 by chance). Made by `python benchmarks/cards.py` of the cards "
        "(`invsolve priors evaluate`) and of the results of `benchmarks/quality.py`, "
        "`latent.py`, `joint.py` and `volumes.py` (there over ADMM-TV 3D); for x₀, ε and "
        "flow `red` and `pnp` alone were tuned (and `mmps` for x₀ at inpainting), as "
        "for the others (`quality.py tune` and `run` with `--prior natural-64-x0 --out "
        "benchmarks/results/quality/natural-64-x0`, and so on).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Make cards, if any, and print the table or put it between the page's marks."""
    parser = argparse.ArgumentParser(description="What the bundled priors are worth.")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--evaluate", nargs="+", choices=list(PRIORS), default=[])
    args = parser.parse_args()
    for name in args.evaluate:
        evaluate(name)
    if args.docs is None:
        print(table())
    else:
        put(args.docs, table(), BEGIN, END)


if __name__ == "__main__":
    main()
