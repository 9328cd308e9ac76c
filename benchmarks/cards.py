"""What the bundled priors are worth, in one table: of docs/priors.md.

    python benchmarks/cards.py --docs docs/priors.md

Of each prior's report card (docs/cards, by ``invsolve priors evaluate``) the denoising
beside tuned total variation, how near its samples come to training images and how well its
likelihood tells other images apart; and of benchmarks/results/quality the best sampler
with it beside total variation on the tasks it is for. Nothing is measured here.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ct_headneck import put

CARDS = Path(__file__).parent.parent / "docs" / "cards"
QUALITY = Path(__file__).parent / "results" / "quality"
BEGIN, END = "<!-- cards: begin -->", "<!-- cards: end -->"

TASKS: Mapping[str, Mapping[str, str]] = {
    "ct-headneck-128": {"ct-30": "CT, 30 views", "ct-15": "CT, 15 views"},
    "mr-brain-128": {"mr-4": "MR ×4", "mr-8": "MR ×8"},
    "natural-64": {"sr-4": "SR ×4", "deblur": "deblurring", "inpaint": "inpainting"},
    "natural-64-flow": {},
}
CLASSICAL = ("TV", "FBP")


def gains(card: Mapping[str, Any]) -> str:
    """PSNR over TV's at the least and the greatest noise, and how many between."""
    return ", ".join(
        f"{row['prior'] - row['tv']:+.1f} (σ = {row['sigma']:g})"
        for row in card["denoising"][::2]
    )


def told_apart(card: Mapping[str, Any]) -> str:
    """The AUROC of images of another kind, by likelihood and by denoising."""
    rows = [r for r in card["likelihood"] if r["images"] == "of another kind"]
    if not rows:
        return "–"
    return f"{rows[0]['auroc']:.2f} / {rows[0]['auroc_denoising']:.2f}"


def tasks(name: str) -> str:
    """Of each task: the best of one draw, and of the mean of eight, over TV."""
    told = []
    for key, title in TASKS[name].items():
        path = QUALITY / f"{key}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        text = [title]
        for part, what, words in (
            ("table", "psnr", "one draw"),
            ("spread", "psnr_of_mean", "mean of 8"),
        ):
            rows = {m: r[what] for m, r in found.get(part, {}).items() if what in r}
            learnt = {m: p for m, p in rows.items() if m not in CLASSICAL}
            if "TV" in rows and learnt:
                best = max(learnt, key=learnt.__getitem__)
                text.append(f"{learnt[best] - rows['TV']:+.2f} ({best}, {words})")
        told.append(" ".join(text))
    return "; ".join(told) or "–"


def table() -> str:
    """One line for each prior."""
    lines = [
        "| prior | denoising, dB over TV | tasks, dB over TV | distance to the nearest "
        "training image: samples / held out | other images told apart |",
        "| --- " * 5 + "|",
    ]
    for name in TASKS:
        card = json.loads((CARDS / f"{name}.json").read_text())
        near = card["memory"]
        lines.append(
            f"| [`{name}`](cards/{name}.html) | {gains(card)} | {tasks(name)} | "
            f"{near['samples']:.2f} / {near['held_out']:.2f} | {told_apart(card)} |"
        )
    lines += [
        "",
        "σ in the network's range; distances are root mean squares in it. Told apart: the "
        "AUROC of images of another kind against held-out ones, by likelihood / denoising "
        "(1 is always, 0.5 by chance). Made by `python benchmarks/cards.py` of the cards "
        "(`invsolve priors evaluate`) and of `benchmarks/quality.py`'s results.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it between the page's marks."""
    parser = argparse.ArgumentParser(description="What the bundled priors are worth.")
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    if args.docs is None:
        print(table())
    else:
        put(args.docs, table(), BEGIN, END)


if __name__ == "__main__":
    main()
