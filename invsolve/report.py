"""What a reader should see of a solve: one figure, and one page with everything."""

import base64
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .io import Unit, replace
from .metrics import BODY_HU, body_mask, psnr, ssim
from .planes import PLANES, film, plane_scores, planes_figure
from .samplers import Kind
from .solve import Solution, Stats
from .units import MU_WATER, hu_to_mu, mu_to_hu

Volume = Float[Tensor, "slices h w"]

SOFT_TISSUE = (-160.0, 240.0)
"""The window, in HU, that shows soft tissue."""

DATA_RANGE_HU = 2000.0
"""The range that PSNR and SSIM of a CT refer to: from air to dense bone."""

KINDS: Mapping[Kind, str] = {
    "posterior_sample": "Posterior samples: images drawn as often as the measurements "
    "and the prior together make them likely. The image is their mean, and their "
    "standard deviation says where the measurements leave room; both are as good as "
    "the sampler's approximation and the prior are.",
    "point_estimate": "Point estimate: one best answer. It says nothing of its own "
    "uncertainty.",
    "steered": "Steered: samples of the prior pulled towards the measurements, without "
    "being the posterior's. Their spread is no uncertainty.",
}
SHORT: Mapping[Kind, str] = {
    "posterior_sample": "posterior samples",
    "point_estimate": "point estimate",
    "steered": "steered",
}


@final
@dataclass(frozen=True, eq=False)
class Result:
    """One method's answer in the unit that is shown, with what it cost and its score.

    Attributes:
        name: as the report calls the method.
        image: the mean over samples.
        std: the spread over samples, where it means something.
        kind: what the samples are.
        samples: how many there are for each slice.
        stats: what they cost.
        sample: the first of several.
        psnr, ssim: of the mean, one number for each slice; None without a truth.
        settings: the options that were given to the sampler.
    """

    name: str
    image: Volume
    std: Volume | None
    kind: Kind
    samples: int
    stats: Stats
    sample: Volume | None = None
    psnr: Tensor | None = None
    ssim: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        solution: Solution,
        unit: Unit,
        truth: Volume | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        colour: bool = False,
    ) -> "Result":
        """The result to show: attenuation becomes HU, the rest stays what it is.

        PSNR and SSIM of a CT are taken over the body, with a data range of 2000 HU; of
        other images over all pixels, with the range of the truth.

        Args:
            name: the method's.
            solution: of slices with one channel.
            unit: of the solution; of 1/mm the result is in HU.
            truth: (slices, h, w), in the unit that is shown.
            settings: the sampler's options, for the record.
            colour: whether the slices are one picture's colours, scored together.
        """
        image, spread, sample = shown(solution.mean[:, 0], unit), None, None
        if solution.kind != "point_estimate" and len(solution.samples) > 1:
            sample = shown(solution.samples[0, :, 0], unit)
        if solution.kind == "posterior_sample" and len(solution.samples) > 1:
            per_unit = 1000 / MU_WATER if unit == "1/mm" else 1.0
            spread = per_unit * solution.std[:, 0]
        scores = (
            (None, None)
            if truth is None
            else score(image, truth, shown_unit(unit), colour=colour)
        )
        return cls(
            name,
            image,
            spread,
            solution.kind,
            len(solution.samples),
            solution.stats,
            sample,
            *scores,
            settings or {},
        )


def told(options: Mapping[str, Any]) -> dict[str, Any]:
    """A sampler's options for the record: another method, or a solver, by its name."""
    return {k: _named(v) for k, v in options.items()}


def _named(method: Any) -> Any:
    if isinstance(method, tuple) and any(callable(v) for v in method):
        return ", ".join(str(_named(v)) for v in method)
    if isinstance(method, partial):
        given = ", ".join(f"{k}={_brief(v)}" for k, v in method.keywords.items())
        return f"{method.func.__name__}({given})"
    if callable(method):
        return getattr(method, "__name__", str(method))
    return method


def shown(image: Tensor, unit: Unit) -> Tensor:
    """The image in the unit that is shown and written: HU for attenuation."""
    return mu_to_hu(image) if unit == "1/mm" else image


def shown_unit(unit: Unit) -> Unit:
    """HU for attenuation, else the unit itself."""
    return "HU" if unit == "1/mm" else unit


def score(
    image: Volume, truth: Volume, unit: Unit, *, colour: bool = False
) -> tuple[Tensor, Tensor]:
    """PSNR and SSIM of each slice; see `Result.of` for their range and region.

    Of a picture in colours they are one number each: PSNR over all colours, and the mean
    of their SSIMs.
    """
    x, x_true = image[:, None], truth[:, None]
    body, span = _region(truth, unit)
    if colour:
        flat, flat_true = (t.flatten(0, 1)[None, None] for t in (image, truth))
        return psnr(flat, flat_true, span), ssim(x, x_true, span).mean(0, keepdim=True)
    return psnr(x, x_true, span, body), ssim(x, x_true, span, body)


def _region(truth: Volume, unit: Unit) -> tuple[Tensor | None, float]:
    """The pixels that count, (slices, 1, h, w), and the data range."""
    if unit == "HU":
        return body_mask(hu_to_mu(truth[:, None])), DATA_RANGE_HU
    return None, max(float(truth.max() - truth.min()), 1e-6)


@final
@dataclass(frozen=True, eq=False)
class Report:
    """All that the figure and the page tell.

    Args:
        title: of the page.
        summary: a sentence or two below it.
        results: the methods, in the order in which they are shown.
        unit: of the images.
        truth: (slices, h, w), if it is known.
        window: the least and the largest value that the grey scale tells apart; soft
            tissue for HU, and what the images hold for others, unless given.
        facts: tables of the page: heading → (what → value).
        measured: a few lines for the figure that say what was measured.
        spacing: millimetres from voxel to voxel along (z, y, x), of slices that are one
            volume: the page then shows it from three sides, too.
        colour: whether the three slices are the colours of one picture, with values
            from 0 to 1.
    """

    title: str
    summary: str
    results: Sequence[Result]
    unit: Unit
    truth: Volume | None = None
    window: tuple[float, float] | None = None
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    measured: str = ""
    spacing: tuple[float, float, float] | None = None
    colour: bool = False

    @property
    def pictures(self) -> int:
        """How many there are to show of each method."""
        return 1 if self.colour else len(self.results[0].image)

    def picture(self, volume: Volume, index: int) -> Tensor:
        """One of them: (h, w), or (h, w, 3) with colours."""
        return volume.movedim(0, -1) if self.colour else volume[index]

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The window, chosen if none was given."""
        if self.window is not None:
            return self.window
        if self.colour:
            return 0.0, 1.0
        if self.unit == "HU":
            return SOFT_TISSUE
        reference = self.results[-1].image if self.truth is None else self.truth
        low, high = np.percentile(reference.cpu().numpy(), (0.5, 99.5))
        return float(low), float(max(high, low + 1e-6))

    def crop(self, index: int) -> tuple[slice, slice]:
        """Rows and columns of a slice's body, so that the figure is not mostly air."""
        h, w = self.results[0].image.shape[-2:]
        if self.unit != "HU":
            return slice(0, h), slice(0, w)
        reference = self.results[-1].image if self.truth is None else self.truth
        body = body_mask(hu_to_mu(reference[index][None, None]))[0, 0]
        rows, columns = body.any(1).nonzero(), body.any(0).nonzero()
        r0, r1 = int(rows[0]), int(rows[-1]) + 1
        c0, c1 = int(columns[0]), int(columns[-1]) + 1
        margin = 2 + round(0.04 * max(r1 - r0, c1 - c0))
        high, wide = r1 - r0 + 2 * margin, c1 - c0 + 2 * margin
        return (
            _around(r0, r1, max(high, round(0.75 * wide)), h),
            _around(c0, c1, max(wide, round(0.75 * high)), w),
        )


def _around(start: int, stop: int, length: int, size: int) -> slice:
    """A range of a length around the middle of another, inside the image."""
    length = min(size, length)
    first = min(max(0, (start + stop - length) // 2), size - length)
    return slice(first, first + length)


def save_figure(path: Path, report: Report, index: int | None = None) -> None:
    """Write the figure of one slice (the middle one unless given) as PNG."""
    png = figure(report, middle(report) if index is None else index)
    replace(path, lambda partial: Path(partial).write_bytes(png), ".png")


def save_page(path: Path, report: Report, *, most: int = 6) -> None:
    """Write the report as one HTML file that needs no other.

    Args:
        path: the file.
        report: what to tell.
        most: slices that are shown; the middle one first, the others evenly spread.
    """
    n = report.pictures
    first = middle(report)
    spread = torch.linspace(0, n - 1, min(n, most)).round().long().tolist()
    others = [k for k in dict.fromkeys(spread) if k != first][: most - 1]
    kinds: dict[Kind, None] = dict.fromkeys(result.kind for result in report.results)
    html = render(
        "report.html.j2",
        title=report.title,
        summary=report.summary,
        report=report,
        rows=[_row(result) for result in report.results],
        best={name: _best(report, name) for name in ("psnr", "ssim")},
        kinds=[(kind, KINDS[kind]) for kind in kinds],
        scored=report.truth is not None,
        slices=n,
        first=first,
        figure=_embedded(report, first),
        others=[(k, _embedded(report, k)) for k in others],
        volume=None if report.spacing is None or n < 2 else _volume(report),
    )
    replace(path, lambda p: Path(p).write_text(html, encoding="utf-8"), ".html")


def _volume(report: Report) -> dict[str, Any]:
    """What the page shows of slices that are one volume."""
    assert report.spacing is not None
    shown = {} if report.truth is None else {"Truth": report.truth}
    shown |= {result.name: result.image for result in report.results}
    told: list[tuple[str, dict[str, tuple[float, float]]]] = []
    if report.truth is not None:
        region, span = _region(report.truth, report.unit)
        region = None if region is None else region[:, 0]
        for result in report.results:
            scores = plane_scores(result.image, report.truth, span, region)
            told.append((result.name, scores))
    rows, columns = _bounds(report)
    shown = {name: volume[:, rows, columns] for name, volume in shown.items()}
    drawn = planes_figure(shown, report.spacing, report.limits)
    return {
        "figure": base64.b64encode(drawn).decode("ascii"),
        "film": film(shown, report.limits),
        "scores": told,
        "planes": [plane for plane in PLANES if told and plane in told[0][1]],
    }


def _bounds(report: Report) -> tuple[slice, slice]:
    """Rows and columns that hold the body in any slice; all of what is not CT."""
    reference = report.results[-1].image if report.truth is None else report.truth
    h, w = reference.shape[-2:]
    filled = (reference > BODY_HU).any(0)
    if report.unit != "HU" or not filled.any():
        return slice(0, h), slice(0, w)
    rows, columns = filled.any(1).nonzero(), filled.any(0).nonzero()
    return (
        slice(max(0, int(rows[0]) - 3), int(rows[-1]) + 4),
        slice(max(0, int(columns[0]) - 3), int(columns[-1]) + 4),
    )


def render(template: str, **values: Any) -> str:
    """A page of one of the templates beside this file; what is put in is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)


def middle(report: Report) -> int:
    """The slice in the middle of the stack."""
    return report.pictures // 2


def _embedded(report: Report, index: int) -> str:
    return base64.b64encode(figure(report, index)).decode("ascii")


def _row(result: Result) -> dict[str, Any]:
    s = result.stats
    return {
        "name": result.name,
        "kind": SHORT[result.kind],
        "psnr": _mean(result.psnr),
        "ssim": _mean(result.ssim),
        "samples": result.samples,
        "seconds": s.seconds,
        "passes": s.network_forwards + s.network_backwards,
        "operator": s.operator_applies + s.operator_adjoints + s.closed_forms,
        "settings": ", ".join(f"{k}={_brief(v)}" for k, v in result.settings.items()),
    }


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mean(value: Tensor | None) -> float | None:
    return None if value is None else float(value.mean())


def _best(report: Report, name: str) -> str | None:
    """Which method scores highest, if there is a choice."""
    scored = [(_mean(getattr(r, name)), r.name) for r in report.results]
    known = [(value, method) for value, method in scored if value is not None]
    return max(known)[1] if len(known) > 1 else None


def table(results: Sequence[Result]) -> str:
    """The results as plain text: one line for each method."""
    scored = any(result.psnr is not None for result in results)
    head = ["method", *(["PSNR", "SSIM"] if scored else [])]
    lines = [[*head, "seconds", "network passes", "samples"]]
    for result in results:
        row = _row(result)
        scores = [f"{row['psnr']:.2f} dB", f"{row['ssim']:.4f}"] if scored else []
        cost = [f"{row['seconds']:.1f}", f"{row['passes']}", f"{row['samples']}"]
        lines.append([result.name, *scores, *cost])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


INK, FAINT, BLANK = "#1b1f24", "#6a737d", "#f4f5f7"
GREY, SIGNED, SPREAD = "gray", "RdBu_r", "magma"
"""Colour maps of images, of errors and of standard deviations."""


def figure(report: Report, index: int) -> bytes:
    """One slice as PNG: images, their errors against the truth, and their spread.

    Of several methods each has a column; all images share one grey scale, all errors
    one diverging scale and all standard deviations one sequential scale. A single
    method has one row.
    """
    import matplotlib

    style: Any = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}
    with matplotlib.rc_context(style):
        draw = _one_method if len(report.results) == 1 else _many_methods
        return draw(report, index)


def _one_method(report: Report, index: int) -> bytes:
    result, truth = report.results[0], report.truth
    panels: list[tuple[str, str, Tensor, str, tuple[float, float]]] = []
    image = report.picture(result.image, index)
    if truth is not None:
        number = _number(index, report)
        true = report.picture(truth, index)
        panels.append(("Truth", number, true, GREY, report.limits))
    many, crop = result.sample is not None, report.crop(index)
    below = f"mean of {result.samples}" if many else _number(index, report)
    if result.psnr is not None:
        below = _scores(result, index)
    panels.append((result.name, below, image, GREY, report.limits))
    if result.sample is not None:
        one = report.picture(result.sample, index)
        panels.append(("One sample", f"of {result.samples}", one, GREY, report.limits))
    if truth is not None:
        error = _grey(image - report.picture(truth, index))
        limit = _round_up(_high(error[crop].abs(), 98.0))
        panels.append(("Error", "mean minus truth", error, SIGNED, (-limit, limit)))
    if result.std is not None:
        std = _grey(report.picture(result.std, index))
        limit = _round_up(_high(std[crop], 99.0))
        what = "of the posterior samples"
        panels.append(("Std. deviation", what, std, SPREAD, (0.0, limit)))
    canvas = _Canvas(report, crop, rows=1, columns=len(panels), right=0.12, bottom=0.62)
    for column, (name, text, values, cmap, limits) in enumerate(panels):
        axes = canvas.place(0, column)
        drawn = canvas.show(axes, values[crop], cmap, limits)
        canvas.title(axes, name, text)
        if values.ndim == 2:
            canvas.scale_below(column, drawn, "max" if cmap == SPREAD else "both")
    return canvas.png()


def _many_methods(report: Report, index: int) -> bytes:
    results, truth, crop = report.results, report.truth, report.crop(index)
    images = [report.picture(result.image, index)[crop] for result in results]
    stds = [
        None if r.std is None else _grey(report.picture(r.std, index))[crop]
        for r in results
    ]
    known = [std for std in stds if std is not None]
    ahead = 0 if truth is None else 1
    canvas = _Canvas(
        report,
        crop,
        rows=1 + (truth is not None) + bool(known),
        columns=ahead + len(results),
        left=0.36,
        right=0.98,
    )
    drawn = None
    for column, (result, image) in enumerate(zip(results, images, strict=True), ahead):
        axes = canvas.place(0, column)
        drawn = canvas.show(axes, image, GREY, report.limits)
        scores = SHORT[result.kind] if truth is None else _scores(result, index)
        canvas.title(axes, result.name, scores)
    canvas.name_row(0, "image", None if report.colour else drawn, "both")
    if truth is not None:
        true = report.picture(truth, index)[crop]
        axes = canvas.place(0, 0)
        canvas.show(axes, true, GREY, report.limits)
        canvas.title(axes, "Truth", _number(index, report))
        canvas.note(canvas.place(1, 0), report.measured)
        errors = [_grey(image - true) for image in images]
        limit = _round_up(float(np.median([_high(e.abs(), 98.0) for e in errors])))
        for column, error in enumerate(errors, 1):
            axes = canvas.place(1, column)
            drawn = canvas.show(axes, error, SIGNED, (-limit, limit))
        canvas.name_row(1, "error", drawn, "both")
    if known:
        row = canvas.rows - 1
        if truth is not None:
            canvas.note(canvas.place(row, 0), _MEANING)
        limit = _round_up(max(_high(std, 99.0) for std in known))
        for column, (result, std) in enumerate(zip(results, stds, strict=True), ahead):
            axes = canvas.place(row, column)
            if std is None:
                canvas.note(axes, _why_none(result))
            else:
                drawn = canvas.show(axes, std, SPREAD, (0.0, limit))
        canvas.name_row(row, "std. deviation", drawn, "max")
    return canvas.png()


_MEANING = """where the measurements
leave room: the spread
of the posterior samples"""


@final
class _Canvas:
    """A grid of images of one size, laid out in inches so that nothing overlaps."""

    WIDE, GAP, TOP, BAR = 2.45, 0.1, 0.62, 0.15

    def __init__(
        self,
        report: Report,
        crop: tuple[slice, slice],
        *,
        rows: int,
        columns: int,
        left: float = 0.12,
        right: float = 0.12,
        bottom: float = 0.12,
    ) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.unit, self.rows, self.columns, self.left = report.unit, rows, columns, left
        h, w = report.results[0].image[0][crop].shape
        self.tall = self.WIDE * h / w
        self.width = left + columns * (self.WIDE + self.GAP) - self.GAP + right
        self.height = self.TOP + rows * (self.tall + self.GAP) - self.GAP + bottom
        size = (self.width, self.height)
        self.figure = Figure(figsize=size, dpi=150, facecolor="white")
        self.backend = FigureCanvasAgg(self.figure)

    def box(self, x: float, y: float, wide: float, tall: float) -> Any:
        """Axes without ticks, (x, y) inches from the figure's upper left corner."""
        bottom = self.height - y - tall
        axes = self.figure.add_axes(
            (
                x / self.width,
                bottom / self.height,
                wide / self.width,
                tall / self.height,
            )
        )
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    def corner(self, row: int, column: int) -> tuple[float, float]:
        """Where an image begins, in inches from the upper left."""
        x = self.left + column * (self.WIDE + self.GAP)
        return x, self.TOP + row * (self.tall + self.GAP)

    def place(self, row: int, column: int) -> Any:
        """The axes of one image of the grid."""
        return self.box(*self.corner(row, column), self.WIDE, self.tall)

    def show(
        self, axes: Any, image: Tensor, cmap: str, limits: tuple[float, float]
    ) -> Any:
        """Draw an image so that it fills its axes; with colours it has no map."""
        if image.ndim == 3:
            low, high = limits
            image = ((image - low) / (high - low)).clamp(0, 1)
        return axes.imshow(
            image.cpu().numpy(),
            cmap=cmap,
            vmin=limits[0],
            vmax=limits[1],
            interpolation="nearest",
            aspect="auto",
        )

    def title(self, axes: Any, name: str, below: str) -> None:
        """Two lines above an image."""
        for inches, text, size, weight, colour in (
            (0.29, name, 12, "bold", INK),
            (0.09, below, 9, "normal", FAINT),
        ):
            axes.text(
                0.5,
                1 + inches / self.tall,
                text,
                transform=axes.transAxes,
                ha="center",
                va="bottom",
                fontsize=size,
                fontweight=weight,
                color=colour,
            )

    def note(self, axes: Any, text: str) -> None:
        """Words where there is no image."""
        axes.set_facecolor(BLANK)
        axes.text(
            0.5,
            0.5,
            text,
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=FAINT,
            fontsize=9.5,
            linespacing=1.6,
        )

    def name_row(self, row: int, label: str, drawn: Any, extend: str) -> None:
        """The row's name on its left, and its scale on its right."""
        x, y = self.corner(row, self.columns)
        if drawn is not None:
            axes = self.box(x, y + 0.03 * self.tall, self.BAR, 0.94 * self.tall)
            self._scale(axes, drawn, extend, "vertical")
        self.figure.text(
            (self.left - 0.16) / self.width,
            1 - (y + self.tall / 2) / self.height,
            label,
            rotation=90,
            ha="center",
            va="center",
            fontsize=10,
            color=FAINT,
        )

    def scale_below(self, column: int, drawn: Any, extend: str) -> None:
        """One image's scale, below it."""
        x, y = self.corner(0, column)
        left, wide = x + 0.05 * self.WIDE, 0.9 * self.WIDE
        axes = self.box(left, y + self.tall + self.GAP, wide, self.BAR)
        self._scale(axes, drawn, extend, "horizontal")

    def _scale(self, axes: Any, drawn: Any, extend: str, orientation: str) -> None:
        bar = self.figure.colorbar(
            drawn, cax=axes, extend=extend, orientation=orientation
        )
        bar.outline.set(edgecolor=FAINT, linewidth=0.5)
        bar.locator = _ticks()
        bar.update_ticks()
        bar.ax.tick_params(
            labelsize=8.5, length=2.5, color=FAINT, labelcolor=INK, pad=2
        )
        if self.unit:
            bar.set_label(self.unit, fontsize=9, labelpad=2, color=FAINT)

    def png(self) -> bytes:
        """The figure as a PNG file's content."""
        buffer = BytesIO()
        self.figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, steps=[1, 2, 4, 5, 10])


def _grey(image: Tensor) -> Tensor:
    """Of an error or a spread with colours, the mean over them."""
    return image.mean(-1) if image.ndim == 3 else image


def _number(index: int, report: Report) -> str:
    n = report.pictures
    return f"slice {index + 1} of {n}" if n > 1 else " "


def _scores(result: Result, index: int) -> str:
    if result.psnr is None or result.ssim is None:
        return SHORT[result.kind]
    return f"{float(result.psnr[index]):.2f} dB   SSIM {float(result.ssim[index]):.3f}"


def _why_none(result: Result) -> str:
    if result.kind == "posterior_sample":
        return "one sample:\nno standard deviation"
    return {
        "point_estimate": "no posterior:\npoint estimate",
        "steered": "no posterior:\nsteered samples",
    }[result.kind]


def _high(image: Tensor, percent: float) -> float:
    return float(np.percentile(image.cpu().numpy(), percent))


def _round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8, 10 times a power of ten."""
    if not value > 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
    return float(power * next((s for s in steps if s >= value / power - 1e-9), 10))


def versions() -> dict[str, str]:
    """The versions of what a result depends on; "–" for what is not installed."""
    names = ("invsolve", "torch", "numpy", "scipy", "diffusers", "scikit-image")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "–"
    return found


def machine(device: torch.device) -> str:
    """The processor that computed, in a few words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count() or 1} cores, {platform.system()}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
