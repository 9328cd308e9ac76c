"""What a reader should see of a segmentation: figures, and one page with everything."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from invsolve.grids import Grid, resampled
from invsolve.io import Image, replace
from invsolve.report import FAINT, INK, SOFT_TISSUE, render

from . import metrics
from .result import Segmentation
from .uncertainty import interval

Maps = Float[Tensor, "labels z y x"]
Masks = Bool[Tensor, "labels z y x"]

LEVEL = 0.9
"""Of the intervals of volumes."""

NOTICE = (
    "Research software, not a medical device: nothing here may decide on a patient's "
    "care."
)
SIMULATED = (
    "The model was trained on simulated scans: what it finds in real ones was not "
    "measured."
)
KIND = (
    "Masks drawn as often as the scans and the model together make them likely. The "
    "probability of a voxel is the share of the draws that hold it, and the spread of "
    "the draws says where the contour is open; both are as good as the model is."
)

COLOURS = ("#ff4d2e", "#1f8fff", "#c33bd6", "#f2a900", "#00c2d1", "#ff8fb0")
"""Of the labels' contours, in turn."""
TRUTH = "#19b35a"
SCORES = ("Dice", "Jaccard", "precision", "recall", "HD95", "ASSD", "volume error")


class Findings(NamedTuple):
    """What is told of one label; the numbers that nothing is known of are None.

    Volumes and intervals are of the draws; ``mask_ml`` and the uptake are of the mask at
    the threshold, the uptake by the PET's own voxels. Total lesion glycolysis is SUVmean
    times volume, in ml.
    """

    label: str
    draws_ml: list[float]
    mean_ml: float
    interval_ml: tuple[float, float] | None
    mask_ml: float
    suv_max: float | None
    suv_mean: float | None
    tlg_ml: float | None
    scores: Mapping[str, float] | None
    truth_ml: float | None


@final
@dataclass(frozen=True, eq=False)
class SegmentationReport:
    """All that the figures and the page tell; maps are on the first scan's grid.

    Args:
        segmentation: the draws, on the model's grid.
        scan: the first that the model saw: a CT in HU, or an MR.
        pet: in SUV, on its own grid; None if the model saw none.
        threshold: a voxel of so much probability is of the mask.
        truth: the true masks, on the scan's grid, if they are known.
        facts: tables of the page: heading → (what → value).
    """

    segmentation: Segmentation
    scan: Image
    pet: Image | None = None
    threshold: float = 0.5
    truth: Masks | None = None
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the scan's kind."""
        return "CT" if self.scan.unit == "HU" else "MR"

    @property
    def title(self) -> str:
        """Of the page."""
        return f"Segmentation of {self.name if self.pet is None else 'PET/CT'}"

    @cached_property
    def window(self) -> tuple[float, float]:
        """The scan's values that are drawn black and white."""
        if self.scan.unit == "HU":
            return SOFT_TISSUE
        low, high = np.percentile(self.scan.values.numpy(), (0.5, 99.5))
        return float(low), float(max(high, low + 1e-6))

    @cached_property
    def prob(self) -> Maps:
        """P(label | scans)."""
        return self._here(self.segmentation.prob)

    @cached_property
    def std(self) -> Maps:
        """The draws' standard deviation."""
        return self._here(self.segmentation.std)

    @property
    def mask(self) -> Masks:
        """Where the probability is at least the threshold."""
        return self.prob >= self.threshold

    @cached_property
    def pet_here(self) -> Float[Tensor, "z y x"] | None:
        """The PET at the scan's voxels, linearly interpolated."""
        if self.pet is None:
            return None
        return resampled(self.pet, Grid.of(self.scan)).values

    @cached_property
    def centre(self) -> tuple[int, int, int]:
        """(z, y, x): the largest slices, along each axis, of the largest region.

        Where no voxel reaches the threshold, of the probability; where that is nought,
        the middle.
        """
        from scipy import ndimage

        mask = self.mask.any(0).numpy()
        weight = self.prob.amax(0).numpy()
        if mask.any():
            found: Any = ndimage.label(mask)
            parts = found[0]
            weight = parts == np.bincount(parts.ravel())[1:].argmax() + 1
        if not weight.any():
            z, y, x = (n // 2 for n in weight.shape)
            return z, y, x
        others = ((1, 2), (0, 2), (0, 1))
        lines = [weight.sum(axes) for axes in others]
        largest = [np.flatnonzero(line == line.max()) for line in lines]
        z, y, x = (int(at[len(at) // 2]) for at in largest)
        return z, y, x

    @cached_property
    def findings(self) -> list[Findings]:
        """The numbers, label by label."""
        volumes = self.segmentation.volumes_ml
        voxel = Grid.of(self.scan).voxel_ml
        rows = []
        for k, label in enumerate(self.segmentation.labels):
            draws = volumes[:, k]
            low, high = (float(v) for v in interval(draws, LEVEL))
            rows.append(
                Findings(
                    label,
                    draws.tolist(),
                    float(draws.mean()),
                    (low, high) if len(draws) > 1 else None,
                    float(self.mask[k].sum()) * voxel,
                    *self._uptake(k),
                    None if self.truth is None else self._scores(k, self.truth),
                    None if self.truth is None else float(self.truth[k].sum()) * voxel,
                )
            )
        return rows

    @property
    def simulated(self) -> bool:
        """Whether the model's card says that it learnt from simulated scans."""
        return "simulated" in str(self.segmentation.model.get("data", "")).lower()

    @property
    def interval_name(self) -> str:
        """What `interval` gives of so many draws."""
        n = len(self.segmentation.probabilities)
        if n == 1 or n >= 2 / (1 - LEVEL) - 1 - 1e-9:
            return f"{LEVEL:.0%} interval"
        return f"range of the draws ({(n - 1) / (n + 1):.0%} interval)"

    def _here(self, maps: Tensor) -> Tensor:
        grid, affine = Grid.of(self.scan), self.segmentation.grid.affine
        return torch.stack([resampled(Image(m, affine), grid).values for m in maps])

    def _uptake(self, k: int) -> tuple[float | None, float | None, float | None]:
        """SUVmax, SUVmean and TLG in the mask, by the PET's own voxels."""
        if self.pet is None:
            return None, None, None
        grid = Grid.of(self.pet)
        one = Image(self.mask[k].float(), self.scan.affine)
        suv = self.pet.values[resampled(one, grid, nearest=True).values > 0]
        if not len(suv):
            return None, None, None
        return float(suv.max()), float(suv.mean()), float(suv.sum()) * grid.voxel_ml

    def _scores(self, k: int, truth: Masks) -> dict[str, float]:
        pair = self.mask[k : k + 1], truth[k : k + 1]
        spacing = self.scan.spacing
        values = (
            metrics.dice(*pair),
            metrics.jaccard(*pair),
            metrics.precision(*pair),
            metrics.recall(*pair),
            metrics.hd95(*pair, spacing),
            metrics.assd(*pair, spacing),
            metrics.volume_error(*pair),
        )
        return {name: float(value) for name, value in zip(SCORES, values, strict=True)}


def save_report(folder: Path, report: SegmentationReport) -> None:
    """Write planes.png, whole.png, volume.png, and index.html, which needs none of them."""
    drawn = figures(report)
    for name, png in drawn.items():
        replace(folder / name, lambda p, png=png: Path(p).write_bytes(png), ".png")
    html = page(report, drawn)
    path = folder / "index.html"
    replace(path, lambda p: Path(p).write_text(html, encoding="utf-8"), ".html")


def page(report: SegmentationReport, drawn: Mapping[str, bytes]) -> str:
    """The page with its figures in it, as HTML."""
    s, n = report.segmentation, len(report.segmentation.probabilities)
    found = [row.label for row in report.findings if row.mask_ml > 0]
    missed = [row.label for row in report.findings if not row.mask_ml > 0]
    summary = (
        f"{n} draw{'s' if n > 1 else ''} of {' and '.join(s.labels)} by the model "
        f"{s.model.get('name', '?')}."
    )
    if missed:
        summary += (
            f" Nothing of {' and '.join(missed)} reaches the probability "
            f"{report.threshold:g}."
        )
    return render(
        "segmentation/report.html.j2",
        title=report.title,
        summary=summary,
        notices=[NOTICE, *([SIMULATED] if report.simulated else [])],
        report=report,
        found=found,
        kind=KIND,
        scores=SCORES,
        figures={
            name: base64.b64encode(png).decode("ascii") for name, png in drawn.items()
        },
        facts={"Segmentation": _facts(report), **report.facts},
        number=_number,
    )


def numbers(report: SegmentationReport) -> list[dict[str, Any]]:
    """The findings for a JSON file, which has no nan."""
    rows = []
    for row in report.findings:
        told = {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in row._asdict().items()
        }
        if row.scores is not None:
            told["scores"] = {
                k: None if math.isnan(v) else v for k, v in row.scores.items()
            }
        told["interval_is"] = report.interval_name
        rows.append(told)
    return rows


def _facts(report: SegmentationReport) -> dict[str, str]:
    s = report.segmentation
    named = {"data": "trained on", "licence": "licence", "citation": "citation"}
    z, y, x = s.grid.spacing
    return {
        "kind": "posterior samples",
        "model": str(s.model.get("name", "?")),
        **{text: str(s.model[k]) for k, text in named.items() if s.model.get(k)},
        "draws": str(len(s.probabilities)),
        "network passes": str(s.passes),
        "seconds": f"{s.seconds:.1f}",
        "drawn on": f"voxels of {x:.3g} × {y:.3g} × {z:.3g} mm",
        "shown on": "the {}'s voxels, {:.3g} × {:.3g} × {:.3g} mm".format(
            report.name, *report.scan.spacing[::-1]
        ),
        "threshold": f"{report.threshold:g}",
    }


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def figures(report: SegmentationReport) -> dict[str, bytes]:
    """The figures as PNG, by the names of their files."""
    import matplotlib

    style: Any = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}
    with matplotlib.rc_context(style):
        return {
            "planes.png": _planes(report, _around(report)),
            "whole.png": _planes(report, _body(report)),
            "volume.png": _volumes(report),
        }


# --- planes

Range = tuple[float, float]

MARGIN_MM, LEAST_MM, MOST_MM = 25.0, 110.0, 220.0
"""Around a region that is shown from near, and the sides that its picture may have."""
PLANES = (("axial", 0), ("coronal", 1), ("sagittal", 2))
SIDES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
"""What lies left, right, above and below in each plane."""


def _around(report: SegmentationReport) -> list[Range]:
    """A cube around the region that is shown, in mm along the scan's (z, y, x)."""
    spacing, mask = report.scan.spacing, report.mask.any(0)
    if report.truth is not None:
        mask = mask | report.truth.any(0)
    half = LEAST_MM / 2
    for axis, (mm, at) in enumerate(zip(spacing, report.centre, strict=True)):
        # Of the region's own slices, so that another far away does not count.
        others = [slice(None) if a == axis else c for a, c in enumerate(report.centre)]
        line = mask[tuple(others)].nonzero()
        for k in line.flatten().tolist():
            half = max(half, abs(k - at) * mm + MARGIN_MM)
    half = min(half, MOST_MM / 2)
    return [
        (at * mm - half, at * mm + half)
        for at, mm in zip(report.centre, spacing, strict=True)
    ]


def _body(report: SegmentationReport) -> list[Range]:
    """What the model saw of the scan, in mm along the scan's (z, y, x)."""
    grid = report.segmentation.grid
    first, last = np.zeros(3), np.array(grid.shape[::-1]) - 1.0
    corners = np.array([grid.affine @ (*corner, 1) for corner in (first, last)])
    index = corners @ np.linalg.inv(report.scan.affine).T
    sides = np.sort(index[:, :3], axis=0)[:, ::-1]
    limits = []
    for (low, high), n, mm in zip(
        sides.T, report.scan.values.shape, report.scan.spacing, strict=True
    ):
        limits.append((max(low, -0.5) * mm, min(high, n - 0.5) * mm))
    return limits


class _Panel(NamedTuple):
    """A column of the figure."""

    name: str
    below: str
    under: tuple[Tensor, str, Range]
    over: tuple[Tensor, str, Range] | None
    unit: str


def _planes(report: SegmentationReport, view: Sequence[Range]) -> bytes:
    """Axial, coronal and sagittal planes through the region, true to scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scan, name = (report.scan.values, "gray", report.window), report.name
    panels = [_Panel(name, "contour of the mask", scan, None, report.scan.unit)]
    if report.pet_here is not None:
        top = max([5.0, *(row.suv_max or 0.0 for row in report.findings)])
        pet = (report.pet_here, "gray_r", (0.0, min(20.0, float(math.ceil(top)))))
        panels.append(_Panel("PET", "contours of the draws", pet, None, "SUV"))
    prob, std = report.prob.amax(0), report.std.amax(0)
    panels += [
        _Panel(
            "Probability", f"over the {name}", scan, (prob, "inferno", (0.0, 1.0)), ""
        ),
        _Panel(
            "Std. deviation", "of the draws", scan, (std, "viridis", (0.0, 0.5)), ""
        ),
    ]
    wide, gap, left, top, bar = 2.5, 0.08, 0.36, 0.62, 0.6
    spans = [high - low for low, high in view]
    across = {"axial": (2, 1), "coronal": (2, 0), "sagittal": (1, 0)}
    tall = [wide * spans[v] / spans[u] for u, v in across.values()]
    size = (
        left + len(panels) * (wide + gap) + 0.1,
        top + sum(tall) + gap * len(tall) + bar,
    )
    figure = Figure(figsize=size, dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def box(x: float, y: float, w: float, h: float) -> Any:
        """Axes, (x, y) inches from the figure's upper left corner."""
        bottom = size[1] - y - h
        return figure.add_axes(
            (x / size[0], bottom / size[1], w / size[0], h / size[1])
        )

    y = top
    for row, ((plane, axis), high) in enumerate(zip(PLANES, tall, strict=True)):
        for column, panel in enumerate(panels):
            x = left + column * (wide + gap)
            axes = box(x, y, wide, high)
            drawn = _plane(axes, report, panel, plane, axis, across[plane], view)
            if row == 0:
                for up, text, points, weight, colour in (
                    (0.3, panel.name, 12, "bold", INK),
                    (0.1, panel.below, 9, "normal", FAINT),
                ):
                    axes.text(
                        0.5,
                        1 + up / high,
                        text,
                        transform=axes.transAxes,
                        ha="center",
                        fontsize=points,
                        fontweight=weight,
                        color=colour,
                    )
            if row == 2:
                scale = figure.colorbar(
                    drawn,
                    cax=box(x + 0.1 * wide, y + high + 0.12, 0.8 * wide, 0.12),
                    orientation="horizontal",
                    extend="neither" if panel.over else "both",
                )
                scale.ax.tick_params(labelsize=8.5, length=2.5, color=FAINT)
                if panel.unit:
                    scale.set_label(panel.unit, fontsize=9, labelpad=1, color=FAINT)
        figure.text(
            0.16 / size[0],
            1 - (y + high / 2) / size[1],
            plane,
            rotation=90,
            ha="center",
            va="center",
            fontsize=10,
            color=FAINT,
        )
        y += high + gap
    return _png(canvas)


def _plane(
    axes: Any,
    report: SegmentationReport,
    panel: _Panel,
    plane: str,
    axis: int,
    across: tuple[int, int],
    view: Sequence[Range],
) -> Any:
    """One picture with its contours; what its scale is to be of."""
    from matplotlib.patheffects import withStroke

    at, spacing = report.centre[axis], report.scan.spacing
    (u, du), (v, dv) = ((a, spacing[a]) for a in across)
    parts, starts = [], []
    for a in (v, u):  # rows, columns
        n, (low, high) = report.scan.values.shape[a], view[a]
        first = max(0, math.floor(low / spacing[a]))
        parts.append(slice(first, min(n, math.ceil(high / spacing[a]) + 1)))
        starts.append(first)

    def cut(volume: Tensor) -> np.ndarray:
        return volume.select(axis, at)[parts[0], parts[1]].numpy()

    rows, columns = cut(report.scan.values).shape
    x = (starts[1] + np.arange(columns)) * du
    y = (starts[0] + np.arange(rows)) * dv
    extent = (x[0] - du / 2, x[-1] + du / 2, y[0] - dv / 2, y[-1] + dv / 2)
    shown: Any = {
        "extent": extent,
        "origin": "lower",
        "interpolation": "nearest",
        "aspect": "auto",
    }
    volume, cmap, (low, high) = panel.under
    axes.set_facecolor("white" if cmap == "gray_r" else "black")
    drawn = axes.imshow(cut(volume), cmap=cmap, vmin=low, vmax=high, **shown)
    if panel.over is not None:
        values, cmap, (low, high) = panel.over
        image = np.ma.masked_less(cut(values), 0.02 * high)
        drawn = axes.imshow(image, cmap=cmap, vmin=low, vmax=high, **shown)

    def contour(values: np.ndarray, colour: str, **how: Any) -> None:
        level = how.pop("level", 0.5)
        if min(values.shape) > 1 and values.min() < level <= values.max():
            axes.contour(x, y, values, [level], colors=[colour], **how)

    for k, colour in zip(range(len(report.prob)), cycle(COLOURS), strict=False):
        if panel.name == "PET":
            for draw in _drawn(report, k, axis, at):
                contour(draw[parts[0], parts[1]], colour, linewidths=0.8)
        elif panel.over is None:
            contour(cut(report.prob[k]), colour, level=report.threshold, linewidths=1.5)
        if report.truth is not None:
            truth = cut(report.truth[k].float())
            contour(truth, TRUTH, linewidths=1.1, linestyles="dashed")
    axes.set_xlim(view[u])
    axes.set_ylim(view[v] if plane != "axial" else view[v][::-1])  # the nose is up
    axes.set_xticks([])
    axes.set_yticks([])
    ink, edge = ("black", "white") if panel.name == "PET" else ("white", "black")
    places = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04))
    for side, (right, up) in zip(SIDES[plane], places, strict=True):
        axes.text(
            right,
            up,
            side,
            transform=axes.transAxes,
            ha="center",
            va="center",
            fontsize=8,
            color=ink,
            path_effects=[withStroke(linewidth=1.5, foreground=edge)],
        )
    return drawn


def _drawn(
    report: SegmentationReport, label: int, axis: int, at: int
) -> list[np.ndarray]:
    """Each draw's probabilities in a plane of the scan's grid."""
    grid = Grid.of(report.scan)
    start, shape = [0, 0, 0], list(grid.shape)
    start[axis], shape[axis] = at, 1
    there = grid.part((start[0], start[1], start[2]), (shape[0], shape[1], shape[2]))
    affine = report.segmentation.grid.affine
    return [
        resampled(Image(draw[label], affine), there).values.select(axis, 0).numpy()
        for draw in report.segmentation.probabilities
    ]


def _volumes(report: SegmentationReport) -> bytes:
    """The posterior of each label's volume: points, or a histogram of many."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report.findings
    figure = Figure(figsize=(7.5, 0.7 + 0.9 * len(rows)), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    drawn: Any = figure.subplots(len(rows), 1, squeeze=False)
    for axes, row, colour in zip(drawn[:, 0], rows, cycle(COLOURS), strict=False):
        volumes = np.asarray(row.draws_ml)
        if len(volumes) >= 20:
            axes.hist(volumes, bins=min(30, len(volumes) // 3), color=colour, alpha=0.5)
            middle = axes.get_ylim()[1] / 2
        else:
            middle = 0.0
            axes.set_ylim(-1, 1)
            axes.plot(volumes, np.zeros_like(volumes), "o", color=colour, alpha=0.6)
        if row.interval_ml is not None:
            axes.plot(row.interval_ml, [middle, middle], color=colour, linewidth=2)
        axes.plot([row.mean_ml], [middle], "|", color=INK, markersize=22, mew=2)
        if row.truth_ml is not None:
            axes.axvline(row.truth_ml, color=TRUTH, linestyle="--", linewidth=1.5)
        axes.set_yticks([])
        known = [row.mean_ml, *row.draws_ml, row.mask_ml, row.truth_ml or 0.0]
        axes.set_xlim(0, 1.15 * max(*known, 1.0))
        axes.set_ylabel(row.label, rotation=0, ha="right", va="center", fontsize=9.5)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
    drawn[-1, 0].set_xlabel("volume in ml", color=FAINT)
    return _png(canvas)


def _png(canvas: Any) -> bytes:
    buffer = BytesIO()
    canvas.figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
