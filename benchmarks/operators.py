"""How exact and how fast the operators are, beside other libraries: the docs' tables.

    python benchmarks/operators.py            # measure: JSON, CSV and a plot
    python benchmarks/operators.py --docs     # then write docs/operators.md

Every comparison is made in one run on one machine, and each time is the best of many.
What is not installed is left out, with the reason.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from math import pi
from pathlib import Path
from typing import Any, final
from unittest import mock

import torch
from ct_headneck import machine, put
from operator_table import FIELD_MM, ROWS, Group, Row, angles, sources
from torch import Generator, Tensor
from tqdm import tqdm

from invsolve import io, operators as ops
from invsolve.operators import LinearOperator, Operator, base, coils, nufft
from invsolve.random import randn_like

DOCS = Path("docs/operators.md")
PICTURES = Path("docs/operators")
HEAVY = ("astra", "deepinv", "diffusers", "matplotlib", "scipy.sparse", "skimage")
"""What ``import invsolve`` shall not bring along."""

TITLES: dict[Group, str] = {
    "ct": "Computed tomography",
    "mri": "Magnetic resonance",
    "imaging": "Photographs and microscopy",
    "nonlinear": "Nonlinear",
}


@final
class Clock:
    """Times functions: the best of as many runs as fit into a few tenths of a second."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def __call__(self, f: Callable[[], object], items: int = 1) -> dict[str, float]:
        """Milliseconds an item, of the wall clock and of all cores together."""
        f()
        best, end = (float("inf"), 0.0), time.perf_counter() + self.seconds
        while best[0] == float("inf") or time.perf_counter() < end:
            best = min(best, self._once(f))
        wall, cpu = (1e3 * t / items for t in best)
        return {"wall_ms": wall, "cpu_ms": cpu}

    def _once(self, f: Callable[[], object]) -> tuple[float, float]:
        self._wait()
        wall, cpu = time.perf_counter(), time.process_time()
        f()
        self._wait()
        return time.perf_counter() - wall, time.process_time() - cpu

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def normal(*shape: int, device: torch.device, complex: bool = False) -> Tensor:
    """White noise, always the same."""
    g = Generator().manual_seed(0)
    kind = torch.complex64 if complex else torch.float32
    return torch.randn(*shape, dtype=kind, generator=g).to(device)


@contextmanager
def own_cache() -> Iterator[None]:
    """An empty folder for cached matrices, so that building one can be timed."""
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, INVSOLVE_CACHE=folder):
            yield


def parallel_beam(clock: Clock, quick: bool) -> dict[str, Any]:
    """256² × 180 views: our matrix against ASTRA's CPU projector and deepinv's."""
    from invsolve.operators.ct import joseph

    n, batch, cpu = 256, 8 if quick else 64, torch.device("cpu")
    A = ops.ParallelBeam((n, n), angles(180, pi), backend="matrix")
    x = normal(batch, 1, n, n, device=cpu)
    found: dict[str, Any] = {"size": n, "views": 180, "batch": batch}
    with own_cache():
        for name in ("build_s", "load_s"):
            joseph.matrices.cache_clear()
            start = time.perf_counter()
            y = A(x[:1])
            found[name] = time.perf_counter() - start
        y = A(x)
    found["matrix_bytes"] = A.matrix_bytes
    ours = pair(clock, lambda: A.apply(x), lambda: A.adjoint(y), batch)
    found["rows"] = {"invsolve, matrix, one batch": ours}
    few = 1 if quick else 4
    for name, measure in (
        ("ASTRA, CPU, slice by slice", astra_on_cpu),
        ("deepinv Tomography, exact adjoint", deepinv_tomography),
    ):
        try:
            found["rows"][name] = measure(clock, x[:few])
        except ImportError as error:
            tqdm.write(f"left out: {name}: {error}")
    return found


def pair(
    clock: Clock, forward: Callable[[], object], adjoint: Callable, items: int
) -> dict[str, dict[str, float]]:
    """Both directions' times."""
    return {"forward": clock(forward, items), "adjoint": clock(adjoint, items)}


def astra_on_cpu(clock: Clock, x: Tensor) -> dict[str, Any]:
    """``direct_FP`` and ``direct_BP`` of the ``linear`` projector, on NumPy arrays."""
    import astra
    import numpy as np

    n = x.shape[-1]
    volume = astra.create_vol_geom(n, n)
    theta = np.linspace(0, pi, 180, endpoint=False)
    beams = astra.create_proj_geom("parallel", 1.0, int(np.ceil(n * 2**0.5)), theta)
    projector = astra.create_projector("linear", beams, volume)
    slices = [np.ascontiguousarray(item[0].numpy()) for item in x]
    sinogram = np.zeros(astra.geom_size(beams), np.float32)
    image = np.zeros((n, n), np.float32)

    def forward() -> None:
        for item in slices:
            astra.projector.direct_FP(projector, item, out=sinogram)

    def adjoint() -> None:
        for _ in slices:
            astra.projector.direct_BP(projector, sinogram, out=image)

    try:
        return pair(clock, forward, adjoint, len(slices))
    finally:
        astra.projector.delete(projector)


def deepinv_tomography(clock: Clock, x: Tensor) -> dict[str, Any]:
    """Its exact adjoint, slice by slice and as a batch; the faster of the two."""
    from deepinv.physics import Tomography

    A = Tomography(
        180, x.shape[-1], circle=False, normalize=False, parallel_computation=False
    )

    def run(batch: Tensor) -> dict[str, Any]:
        y = A.A(batch)
        return pair(clock, lambda: A.A(batch), lambda: A.A_adjoint(y), len(batch))

    with torch.no_grad():
        tried = [run(x[:1]), run(x)] if len(x) > 1 else [run(x)]
    return min(tried, key=lambda r: both(r))


def both(row: dict[str, dict[str, float]], clock: str = "wall_ms") -> float:
    """Forward and adjoint together."""
    return row["forward"][clock] + row["adjoint"][clock]


def multi_coil(clock: Clock, quick: bool) -> dict[str, Any]:
    """320² × 15 coils against the Fourier transforms alone; a NUFFT against another."""
    n, count, device = 320, 15, clock.device
    maps = coils.simulated_maps(count, (n, n))
    mask = ops.Mask.cartesian((n, n), 4, generator=Generator().manual_seed(0))
    x = normal(1, 1, n, n, device=device, complex=True)
    y = normal(1, count, n, n, device=device, complex=True)
    rows = {
        "bare FFTs, all coils at once": pair(
            clock, lambda: torch.fft.fft2(y), lambda: torch.fft.ifft2(y), 1
        ),
        "bare FFTs, coil by coil": pair(
            clock,
            lambda: [torch.fft.fft2(c) for c in y[0]],
            lambda: [torch.fft.ifft2(c) for c in y[0]],
            1,
        ),
    }
    for name, A in (
        ("MultiCoil", ops.MultiCoil(maps, mask.mask)),
        ("Mask @ Fourier @ Coils", mask @ ops.Fourier() @ ops.Coils(maps)),
    ):
        A = A.to(device)
        rows[name] = pair(clock, bind(A.apply, x), bind(A.adjoint, y), 1)
    found: dict[str, Any] = {"size": n, "coils": count, "rows": rows}
    trajectory = nufft.radial(64 if quick else n, 2 * n).float()
    try:
        found["nufft"] = nuffts(clock, trajectory, x)
    except ImportError as error:
        tqdm.write(f"left out: NUFFT: {error}")
    return found


def nuffts(clock: Clock, trajectory: Tensor, x: Tensor) -> dict[str, Any]:
    """Ours, and torchkbnufft's where it is installed."""
    n = x.shape[-1]
    A = ops.NonCartesian((n, n), trajectory).to(x.device)
    y = A(x)
    rows = {"NonCartesian": pair(clock, bind(A.apply, x), bind(A.adjoint, y), 1)}
    try:
        import torchkbnufft  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        tqdm.write(f"left out: torchkbnufft: {error}")
        return rows
    there = torchkbnufft.KbNufft((n, n)).to(x.device)
    back = torchkbnufft.KbNufftAdjoint((n, n)).to(x.device)
    k = trajectory.T.to(x.device)
    rows["torchkbnufft"] = pair(clock, lambda: there(x, k), lambda: back(y, k), 1)
    return rows


def bind(f: Callable[[Tensor], Tensor], t: Tensor) -> Callable[[], Tensor]:
    """f(t), to be timed."""
    return lambda: f(t)


def every_operator(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """The docs' table: errors, closed forms and milliseconds an image."""
    size = 64 if quick else 128
    rows = []
    for row in tqdm(ROWS, desc="operators", leave=False):
        try:
            rows.append(one_operator(row, clock, size))
        except (ImportError, AttributeError) as error:
            tqdm.write(f"left out: {row.name}: {error}")
    return rows


def one_operator(row: Row, clock: Clock, size: int) -> dict[str, Any]:
    """A row of the table."""
    A, image = row.make(size).to(clock.device), row.image(size).to(clock.device)
    batch = 1 if image.ndim == 5 else 8
    noise = randn_like(image, Generator().manual_seed(0))
    x = image.repeat(batch, *(1,) * (image.ndim - 1))
    y = A(x)
    found: dict[str, Any] = {
        "group": row.group,
        "name": row.name,
        "equation": row.equation,
        "backends": row.backends,
        "size": list(image.shape[1:]),
        "measurements": list(y.shape[1:]),
        "forward_ms": clock(lambda: A.apply(x), batch)["wall_ms"],
    }
    if isinstance(A, LinearOperator):
        w = randn_like(y[:1], Generator().manual_seed(1))
        found["adjoint_error"] = ops.dottest(A, noise, w)
        found["adjoint_ms"] = clock(lambda: A.adjoint(y), batch)["wall_ms"]
        found |= closed_forms(A, image, y[:1])
    else:
        found["adjoint_error"] = vjp_error(A, image, noise)
        found["adjoint_ms"] = clock(lambda: A.vjp(x, y), batch)["wall_ms"]
        found["own_vjp"] = type(A).vjp is not Operator.vjp
    return found


def closed_forms(A: LinearOperator, x: Tensor, y: Tensor) -> dict[str, bool]:
    """Which of pinv, prox and norm do without iterations."""
    asked: list[str] = []

    def cg(_: object, b: Tensor, start: Tensor, **__: object) -> Tensor:
        asked.append("cg")
        return start

    def largest_eigenvalue(_: object, start: Tensor, **__: object) -> Tensor:
        asked.append("power")
        return start.new_ones(()).abs()

    found = {}
    with (
        mock.patch.object(base, "cg", cg),
        mock.patch.object(base, "largest_eigenvalue", largest_eigenvalue),
    ):
        for name, run in (
            ("pinv", lambda: A.pinv(y)),
            ("prox", lambda: A.prox(x, y, 1.0)),
            ("norm", lambda: A.norm(x)),
        ):
            asked.clear()
            run()
            found[name] = not asked
    return found


def vjp_error(A: Operator, x: Tensor, v: Tensor) -> float | None:
    """|⟨J v, w⟩ − ⟨v, Jᴴ w⟩| / (‖Jv‖ ‖w‖), with J v by autodiff; None if it has none."""
    try:
        Jv = torch.func.jvp(A.apply, (x,), (v,))[1]
    except (RuntimeError, NotImplementedError):
        return None
    w = randn_like(Jv, Generator().manual_seed(1))
    difference = (Jv * w).sum() - (v * A.vjp(x, w)).sum()
    return float(difference.abs() / (Jv.norm() * w.norm()))


def scaling(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """Time and memory against size, views and batch."""
    rows: list[dict[str, Any]] = []
    device = clock.device

    def add(name: str, A: Operator, x: Tensor, **at: float) -> None:
        assert isinstance(A, LinearOperator)
        A, x = A.to(device), x.to(device)
        y = A.apply(x)
        times = pair(clock, lambda: A.apply(x), lambda: A.adjoint(y), len(x))
        rows.append(
            {
                "operator": name,
                **at,
                "forward_ms": times["forward"]["wall_ms"],
                "adjoint_ms": times["adjoint"]["wall_ms"],
                "cpu_ms": both(times, "cpu_ms"),
                "bytes": getattr(A, "matrix_bytes", 0),
            }
        )

    def beam(n: int, views: int) -> Operator:
        return ops.ParallelBeam((n, n), angles(views, pi))

    sizes = (64, 128) if quick else (64, 128, 256, 512)
    for n in tqdm(sizes, desc="sizes", leave=False):
        at = {"vary": "size", "size": n, "views": 60, "batch": 8}
        x = normal(8, 1, n, n, device=device)
        add("ParallelBeam, 60 views", beam(n, 60), x, **at)
        add("Blur", ops.Blur.gaussian(2.0, (n, n)), x, **at)
        maps = coils.simulated_maps(8, (n, n))
        add("MultiCoil, 8 coils", ops.MultiCoil(maps, torch.ones(n, n)), x + 0j, **at)
    counts = (8, 32) if quick else (8, 16, 32, 64, 128, 256, 512)
    n = 128 if quick else 256
    for views in tqdm(counts, desc="views", leave=False):
        at = {"vary": "views", "size": n, "views": views, "batch": 8}
        x = normal(8, 1, n, n, device=device)
        add(f"ParallelBeam, {n}²", beam(n, views), x, **at)
    for batch in tqdm((1, 8) if quick else (1, 2, 4, 8, 16, 32, 64, 128), leave=False):
        at = {"vary": "batch", "size": n, "views": 60, "batch": batch}
        x = normal(batch, 1, n, n, device=device)
        add(f"ParallelBeam, {n}² × 60", beam(n, 60), x, **at)
    return rows


def imports(quick: bool) -> dict[str, Any]:
    """Seconds of ``import invsolve`` in a fresh interpreter, and what came along."""
    code = (
        "import sys, time; s = time.perf_counter(); import {}; "
        "print(time.perf_counter() - s, *[m for m in {!r} if m in sys.modules])"
    )
    found: dict[str, Any] = {}
    for module in ("torch", "invsolve"):
        words = [
            subprocess.run(
                [sys.executable, "-c", code.format(module, HEAVY)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            for _ in range(1 if quick else 3)
        ]
        found[f"{module}_s"] = min(float(w[0]) for w in words)
        found[f"{module}_heavy"] = words[0][1:]
    return found


def on_cuda(clock: Clock, quick: bool) -> dict[str, Any]:
    """256³ parallel and cone beams beside ASTRA's bare calls, and copies to the host."""
    import astra

    from invsolve.operators.ct.astra import vectors_3d

    n, device = 128 if quick else 256, clock.device
    box = [-FIELD_MM / 2, FIELD_MM / 2] * 2
    theta = angles(180, pi)
    parallel = ops.ParallelBeam((n, n), theta, pixel_mm=FIELD_MM / n, backend="astra")
    cone = ops.ConeBeam(
        (n, n, n), 2 * theta, 1000.0, 1500.0, voxel_mm=FIELD_MM / n, backend="astra"
    )
    found: dict[str, Any] = {"size": n, "views": 180}
    direct = astra.projector3d
    for name, A, kind, thickness, rows in (
        ("ParallelBeam", parallel, "parallel3d_vec", float(n), n),
        ("ConeBeam", cone, "cone_vec", FIELD_MM, cone.detectors[0]),
    ):
        A = A.to(device)
        x = normal(1, n, n, n, device=device)
        x = x if name == "ParallelBeam" else x[None]
        y = A(x)
        ours = pair(clock, bind(A.apply, x), bind(A.adjoint, y), 1)
        volume = astra.create_vol_geom(n, n, n, *box, -thickness / 2, thickness / 2)
        columns = A.measurement_shape[-1]
        beams = astra.create_proj_geom(kind, rows, columns, vectors_3d(A.scan))
        projector = astra.create_projector("cuda3d", beams, volume)
        image = x.reshape(n, n, n).contiguous()
        sinogram = torch.zeros(rows, 180, columns, device=device)
        raw = pair(
            clock,
            lambda p=projector, i=image, s=sinogram: direct.direct_FP(p, i, out=s),
            lambda p=projector, i=image, s=sinogram: direct.direct_BP(p, s, out=i),
            1,
        )
        found[name] = {
            "invsolve": ours,
            "ASTRA": raw,
            "copies_to_host": copies_to_host(
                lambda A=A, x=x, y=y: (A(x), A.adjoint(y))
            ),
        }
        direct.delete(projector)
    return found


def copies_to_host(f: Callable[[], object]) -> int:
    """How many a profile of f shows."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        f()
        torch.cuda.synchronize()
    return sum("DtoH" in event.name for event in run.events() or [])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Four log–log panels: time against size, views and batch; memory against size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    panels = (
        ("size", "pixels a side", "ms an image"),
        ("views", "views", "ms an image"),
        ("batch", "images in a batch", "ms an image"),
    )
    for ax, (vary, xlabel, ylabel) in zip(axes, panels, strict=False):
        chosen = [r for r in rows if r["vary"] == vary]
        for i, name in enumerate(dict.fromkeys(r["operator"] for r in chosen)):
            same = [r for r in chosen if r["operator"] == name]
            at = [r[vary] for r in same]
            for key, style in (("forward_ms", "o-"), ("adjoint_ms", "o--")):
                label = name if key == "forward_ms" else None
                values = [r[key] for r in same]
                ax.plot(at, values, style, color=f"C{i}", ms=4, lw=1.3, label=label)
        decorate(ax, xlabel, ylabel, [r[vary] for r in chosen])
    for vary, label in (("size", "against size, 60 views"), ("views", "against views")):
        same = [r for r in rows if r["vary"] == vary and r["bytes"]]
        at, held = [r[vary] for r in same], [r["bytes"] / 2**20 for r in same]
        axes[3].plot(at, held, "o-", ms=4, lw=1.3, label=label)
    ticks = [r[v] for v in ("size", "views") for r in rows if r["vary"] == v]
    decorate(axes[3], "pixels a side, or views", "A and Aᵀ in MiB", ticks)
    figure.suptitle("forward: solid; adjoint: dashed", fontsize=9)
    save(figure, path, 110)
    plt.close(figure)


def decorate(ax: Any, xlabel: str, ylabel: str, ticks: list[float]) -> None:
    """Both axes logarithmic, with ticks at what was measured."""
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(sorted(set(ticks)), [f"{t:g}" for t in sorted(set(ticks))])
    ax.xaxis.minorticks_off()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False)


def save(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure whole or not at all, in 64 shades of each colour."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    full = BytesIO()
    figure.savefig(full, dpi=dpi)
    shades = [round(round(i / 255 * 63) / 63 * 255) for i in range(256)]
    small = Image.open(full).convert("RGB").point(shades * 3)
    io.replace(path, lambda p: small.save(p, format="PNG", optimize=True))


def sheet(group: Group, path: Path, size: int) -> None:
    """A contact sheet: what each operator of a group measures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tiles = [
        (name, "what is measured", image)
        for name, image in sources(group, size).items()
    ]
    for row in (r for r in ROWS if r.group == group):
        A = row.make(size)
        tiles.append((row.name, row.caption, row.show(A, A(row.image(size)))))
    columns = 4
    lines = -(-len(tiles) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 2.95 * lines), layout="constrained"
    )
    for ax in axes.flat:
        ax.axis("off")
    for ax, (name, caption, picture) in zip(axes.flat, tiles, strict=False):
        # A photograph keeps its shape; a sinogram has none, and fills its tile.
        ax.imshow(picture, cmap="gray", aspect="auto", interpolation="nearest")
        ax.set_box_aspect(1)
        ax.set_title(f"{name}\n", fontsize=9)
        where = {"ha": "center", "transform": ax.transAxes}
        ax.text(0.5, 1.03, caption, fontsize=7.5, color="0.35", **where)
    save(figure, path, 85)
    plt.close(figure)


def docs(result: dict[str, Any]) -> None:
    """Put tables and pictures into docs/operators.md, between its marks."""
    for group in tqdm(TITLES, desc="pictures", leave=False):
        sheet(group, PICTURES / f"{group}.png", 128)
        rows = [r for r in result["table"] if r["group"] == group]
        begin, end = f"<!-- {group}: begin -->", f"<!-- {group}: end -->"
        put(DOCS, operator_table(rows, result), begin, end)
    begin, end = "<!-- speed: begin -->", "<!-- speed: end -->"
    put(DOCS, speed(result), begin, end)


def operator_table(rows: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """A group's operators in Markdown."""
    linear = "adjoint_error" in rows[0] and "pinv" in rows[0]
    last = "pinv · prox · norm" if linear else "vjp"
    lines = [
        f"| operator | y = A(x) | adjoint error | {last} | backends | A, Aᴴ (ms) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        error = "–" if r["adjoint_error"] is None else f"{r['adjoint_error']:.0e}"
        if linear:
            form = " · ".join(
                "closed" if r[k] else ("power it." if k == "norm" else "CG")
                for k in ("pinv", "prox", "norm")
            )
        else:
            form = "its own" if r["own_vjp"] else "autodiff"
        times = f"{r['forward_ms']:.2g}, {r['adjoint_ms']:.2g}"
        equation = r["equation"].replace("|", "\\|")
        lines.append(
            f"| `{r['name']}` | {equation} | {error} | {form} | {r['backends']} | {times} |"
        )
    return "\n".join(lines)


def speed(result: dict[str, Any]) -> str:
    """The comparisons in Markdown."""
    ct, mri, loads = result["parallel_beam"], result["multi_coil"], result["imports"]
    ours = next(iter(ct["rows"].values()))
    lines = [
        f"Parallel beam, {ct['size']}² × {ct['views']} views, batch of {ct['batch']}, for "
        "one slice:",
        "",
        "| | A (ms) | Aᵀ (ms) | A and Aᵀ, against ours | CPU time, against ours |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in ct["rows"].items():
        wall = both(row) / both(ours)
        cpu = both(row, "cpu_ms") / both(ours, "cpu_ms")
        lines.append(f"| {name} | {cells(row)} | {wall:.1f} × | {cpu:.1f} × |")
    lines += [
        "",
        f"The matrix and its transpose take at most {ct['matrix_bytes'] / 2**20:.0f} MiB; "
        f"they are built in {ct['build_s']:.1f} s and loaded from the cache in "
        f"{ct['load_s']:.2f} s.",
        "",
        f"Multi-coil MRI, {mri['size']}² × {mri['coils']} coils:",
        "",
        "| | A (ms) | Aᴴ (ms) | A and Aᴴ, against the bare FFTs |",
        "| --- | --- | --- | --- |",
    ]
    bare = min(both(r) for n, r in mri["rows"].items() if n.startswith("bare"))
    for name, row in mri["rows"].items():
        lines.append(f"| {name} | {cells(row)} | {both(row) / bare:.2f} × |")
    if len(mri.get("nufft", {})) > 1:
        lines += ["", "NUFFT, 320 radial spokes:", "", "| | A (ms) | Aᴴ (ms) |"]
        lines += ["| --- | --- | --- |"]
        lines += [f"| {name} | {cells(row)} |" for name, row in mri["nufft"].items()]
    for name in ("ParallelBeam", "ConeBeam") if "cuda" in result else ():
        row = result["cuda"][name]
        lines += [
            "",
            f"`{name}` with CUDA, {result['cuda']['size']}³ × 180 views: A and Aᵀ take "
            f"{both(row['invsolve']) / both(row['ASTRA']):.2f} × ASTRA's bare calls, with "
            f"{row['copies_to_host']} copies to the host.",
        ]
    heavy = ", ".join(loads["invsolve_heavy"]) or f"none of {', '.join(HEAVY)}"
    lines += [
        "",
        f"`import invsolve` takes {loads['invsolve_s']:.1f} s (torch alone: "
        f"{loads['torch_s']:.1f} s) and imports {heavy}.",
        "",
        f"Best of many runs, float32, {result['threads']} thread(s) (ASTRA's CPU "
        f"projectors have one); {result['date']}, {result['machine']}, torch "
        f"{result['torch']}. Made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def cells(row: dict[str, dict[str, float]]) -> str:
    """Two columns of milliseconds."""
    return f"{row['forward']['wall_ms']:.3g} | {row['adjoint']['wall_ms']:.3g}"


def measure(device: torch.device, quick: bool) -> dict[str, Any]:
    """Everything, in the order in which it disturbs itself least."""
    clock = Clock(device, 0.05 if quick else 0.5)
    cpu = Clock(torch.device("cpu"), clock.seconds)
    small = Clock(device, 0.02 if quick else 0.2)
    steps: dict[str, Callable[[], Any]] = {
        "imports": lambda: imports(quick),
        "parallel_beam": lambda: parallel_beam(cpu, quick),
        "multi_coil": lambda: multi_coil(clock, quick),
        "table": lambda: every_operator(small, quick),
        "scaling": lambda: scaling(small, quick),
    }
    if device.type == "cuda":
        steps["cuda"] = lambda: on_cuda(clock, quick)
    else:
        tqdm.write("left out: CUDA: give --device cuda where there is one")
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "quick": quick,
    }
    for name, step in (bar := tqdm(steps.items())):
        bar.set_description(name)
        result[name] = step()
    return result


def main() -> None:
    """Measure and write it down; or write the docs from what was measured."""
    parser = argparse.ArgumentParser(description="How exact and how fast they are.")
    parser.add_argument("--quick", action="store_true", help="small, rough, a minute")
    parser.add_argument("--docs", action="store_true", help="write docs/operators.md")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/operators")
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    os.environ["INVSOLVE_CACHE"] = ""  # what is measured once need not be kept
    stem = args.out.with_name(f"{args.out.name}-{device.type}")
    if args.docs:
        docs(json.loads(stem.with_suffix(".json").read_text()))
        return
    result = measure(device, args.quick)
    flags = " --quick" * args.quick + f" --device {device.type}" * (
        device.type != "cpu"
    )
    result["command"] = f"python benchmarks/operators.py{flags}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    io.replace(stem.with_suffix(".json"), lambda p: Path(p).write_text(text))
    with stem.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(result["scaling"][0]))
        table.writeheader()
        table.writerows(result["scaling"])
    plot(result["scaling"], stem.with_suffix(".png"))
    print(speed(result))


if __name__ == "__main__":
    main()
