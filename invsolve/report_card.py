"""How good a prior is: measured on images that it never saw, told on one page."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import pad

from .io import replace
from .likelihood import bits_per_dimension, log_likelihood
from .operators import GaussianNoise, Identity
from .priors import Prior
from .problem import InverseProblem
from .random import randn_like
from .report import machine, render, versions
from .samplers import tv, unconditional
from .training_data import Data, load

Images = Float[Tensor, "_ _ _ _"]  # (n, c, y, x), of any number
Numbers = Float[Tensor, " _"]

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""The noise levels of the denoising table, in the prior's range."""

LEVEL = 0.2
"""The one by whose denoising error images of another kind are told."""

TV_LAMBDAS = (0.2, 0.3, 0.5, 0.8, 1.2, 2.0)
"""λ in units of 1/σ: what TV denoising needs grows with the noise."""


@final
@dataclass(frozen=True)
class Denoising:
    """PSNR in dB at one noise level: of the noisy image, of TV's and of the prior's."""

    sigma: float
    noisy: float
    tv: float
    prior: float


@final
@dataclass(frozen=True)
class Likelihood:
    """Bits per dimension of some images, and how well they are told from held-out ones."""

    images: str
    bits: float
    error: float
    auroc: float | None = None
    auroc_denoising: float | None = None


@final
@dataclass(frozen=True)
class Memory:
    """Median distance to the nearest training image, of samples and held-out images."""

    samples: float
    held_out: float


@final
@dataclass(frozen=True, eq=False)
class ReportCard:
    """All that the page tells; the pictures are PNG files in base 64."""

    name: str
    denoising: list[Denoising]
    likelihood: list[Likelihood]
    memory: Memory
    data_range: float
    counts: Mapping[str, int]
    sheet: str
    held_out: str
    pairs: str
    spectrum: str
    facts: Mapping[str, Mapping[str, str]]
    level: float = LEVEL

    def numbers(self) -> dict[str, Any]:
        """What is not a picture, for a file."""
        return {
            "denoising": [vars(row) for row in self.denoising],
            "likelihood": [vars(row) for row in self.likelihood],
            "memory": vars(self.memory),
            "data_range": self.data_range,
            "counts": dict(self.counts),
        }


def evaluate(
    name: str,
    prior: Prior,
    data: Data,
    root: Path,
    *,
    other: Data | None = None,
    images: int = 16,
    samples: int = 16,
    steps: int = 25,
    train_images: int = 4000,
    generator: Generator,
    progress: Callable = iter,
) -> ReportCard:
    """Measure a prior on its validation images.

    Args:
        name: as the page calls it.
        prior: what is measured, in its own range.
        data: where its training and validation images are, and how they are read.
        root: the folder to which these places are relative.
        other: images of another kind, of as many channels; they are cut or filled with
            zeros to the same size.
        images: how many of each kind, evenly from what there is.
        samples: unconditional ones.
        steps: of the flow, for samples and likelihoods.
        train_images: among how many training images the nearest is looked for.
        generator: of every random number.
        progress: wraps the loops over the flow, as ``tqdm`` does.
    """
    inner = prior.normalised[0]
    train = _evenly(load(root / data.train, data, generator), train_images)
    held_out = _evenly(load(root / data.val, data, generator), images).float()
    seen = _evenly(train, images).float()
    kinds = {"held out": held_out, "seen in training": seen}
    if other is not None:
        strange = _evenly(load(root / other.val, other, generator), images).float()
        kinds["of another kind"] = _fit(strange, held_out)
    data_range = float(held_out.max() - held_out.min())

    drawn = unconditional(
        inner,
        torch.zeros(samples, *held_out.shape[1:]),
        steps=steps,
        generator=generator,
        progress=progress,
    )
    table = [
        denoising(inner, held_out, seen, sigma, data_range, generator)
        for sigma in LEVELS
    ]
    bits, errors = {}, {}
    for kind, x in kinds.items():
        log_p = log_likelihood(
            inner, x, steps=steps, generator=generator, progress=progress
        )
        bits[kind] = bits_per_dimension(log_p, x[0].numel())
        errors[kind] = _denoising_error(inner, x, LEVEL, generator)
    rows = [
        Likelihood(
            kind,
            float(b.mean()),
            float(b.std() / len(b) ** 0.5),
            None if kind == "held out" else auroc(bits["held out"], b),
            None if kind == "held out" else auroc(errors["held out"], errors[kind]),
        )
        for kind, b in bits.items()
    ]
    near, index = nearest(drawn, train)
    near_held_out, _ = nearest(held_out, train)
    closest = near.argsort()[:8]
    pairs = torch.cat([drawn[closest], train[index[closest]].float()])
    today = datetime.now(UTC).date().isoformat()
    facts = {
        "Prior": {k: str(v) for k, v in prior.info if v not in (None, "", ())},
        "Run": {
            "date": today,
            "machine": machine(torch.device("cpu")),
            "seed": str(generator.initial_seed()),
            "steps of the flow": str(steps),
            **versions(),
        },
    }
    return ReportCard(
        name,
        table,
        rows,
        Memory(float(near.median()), float(near_held_out.median())),
        data_range,
        {"samples": samples, "held_out": len(held_out), "train": len(train)},
        sheet(drawn, held_out),
        sheet(held_out[:16], held_out),
        sheet(pairs, held_out, columns=len(closest)),
        _spectra({"held out": held_out, "samples": drawn}),
        facts,
    )


def denoising(
    prior: Prior,
    x0: Images,
    tuning: Images,
    sigma: float,
    data_range: float,
    generator: Generator,
) -> Denoising:
    """PSNR of D(x₀ + σn; σ), and of TV whose λ is the best on other images."""

    def score(x: Tensor, truth: Tensor) -> float:
        return float(10 * (data_range**2 / (x - truth).square().mean()).log10())

    noisy = tuning + sigma * randn_like(tuning, generator)
    tried = {lam: score(_tv(noisy, sigma, lam), tuning) for lam in TV_LAMBDAS}
    best = max(tried, key=tried.__getitem__)
    noisy = x0 + sigma * randn_like(x0, generator)
    with torch.no_grad():
        denoised = prior.denoise(noisy, torch.tensor(sigma))
    return Denoising(
        sigma,
        score(noisy, x0),
        score(_tv(noisy, sigma, best), x0),
        score(denoised, x0),
    )


def nearest(x: Images, train: Images) -> tuple[Numbers, Tensor]:
    """Each image's root-mean-square distance to its nearest training image, and which.

    A training image counts as it is and mirrored.
    """
    flat = x.flatten(1).float()
    best = torch.full((len(x),), torch.inf)
    index = torch.zeros(len(x), dtype=torch.long)
    for start in range(0, len(train), 512):
        part = train[start : start + 512].float()
        for candidates in (part, part.flip(-1)):
            distance = torch.cdist(flat, candidates.flatten(1))
            near, which = distance.min(1)
            index = torch.where(near < best, which + start, index)
            best = best.minimum(near)
    return best / flat.shape[1] ** 0.5, index


def auroc(usual: Numbers, strange: Numbers) -> float:
    """How often a strange image scores higher than a usual one, ties for a half.

    >>> import torch
    >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    gap = strange[:, None] - usual[None]
    return float((gap > 0).float().mean() + 0.5 * (gap == 0).float().mean())


def power_spectrum(x: Images) -> Float[Tensor, " frequency"]:
    """Mean |FFT|² over images, channels and directions, by the radius in cycles an image.

    White noise of variance 1 has 1 throughout.
    """
    n = min(x.shape[-2:])
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean((0, 1))
    fy, fx = (torch.fft.fftfreq(size) * n for size in x.shape[-2:])
    radius = (fy[:, None] ** 2 + fx**2).sqrt().round().long().flatten()
    inside = radius < n // 2
    sums = torch.zeros(n // 2).index_add(0, radius[inside], power.flatten()[inside])
    return sums / torch.bincount(radius[inside], minlength=n // 2)


def save_card(path: Path, card: ReportCard) -> None:
    """Write the page as one HTML file that needs no other."""
    html = render(
        "report_card.html.j2",
        title=f"{card.name}: report card of a prior",
        summary="Measured on images that training never saw.",
        card=card,
    )
    replace(path, lambda p: Path(p).write_text(html, encoding="utf-8"), ".html")


# --- parts


def _evenly(x: Tensor, n: int) -> Tensor:
    """n of the items at even distances; all of them if there are fewer."""
    if len(x) <= n:
        return x
    return x[torch.linspace(0, len(x) - 1, n).round().long()]


def _fit(x: Images, like: Images) -> Images:
    """Cut or filled with zeros around the middle, to the size of others."""
    if x.shape[1] != like.shape[1]:
        raise ValueError(
            f"the images of another kind have {x.shape[1]} channel(s), the prior's "
            f"{like.shape[1]}: give others"
        )
    for axis in (-1, -2):
        gap = like.shape[axis] - x.shape[axis]
        sides = [gap // 2, gap - gap // 2]
        x = pad(x, sides if axis == -1 else [0, 0, *sides])
    return x


def _tv(x: Images, sigma: float, lam: float) -> Images:
    return tv(
        InverseProblem(x, Identity(), GaussianNoise(sigma)), lam=lam / sigma, steps=60
    )


@torch.no_grad()
def _denoising_error(
    prior: Prior, x0: Images, sigma: float, generator: Generator
) -> Numbers:
    """The root mean square of D(x₀ + σn; σ) − x₀, image by image."""
    x = x0 + sigma * randn_like(x0, generator)
    gap = prior.denoise(x, torch.tensor(sigma)) - x0
    return gap.square().flatten(1).mean(1).sqrt()


def sheet(x: Images, like: Images, columns: int = 8) -> str:
    """Images side by side, in the window of others: a PNG file in base 64."""
    from matplotlib import image

    low, high = torch.quantile(like.flatten()[:: max(1, like.numel() // 10**6)], WINDOW)
    grey = ((x - low) / (high - low)).clamp(0, 1)
    empty = -len(grey) % columns
    filled = torch.cat([grey, grey.new_ones(empty, *grey.shape[1:])])
    times = max(1, 128 // grey.shape[-1])  # small images are shown larger
    large = filled.repeat_interleave(times, -1).repeat_interleave(times, -2)
    framed = pad(large, [2] * 4)
    rows = framed.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    array = rows.flatten(2, 3).flatten(0, 1).expand(-1, -1, 3).numpy()
    buffer = BytesIO()
    image.imsave(buffer, array, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


WINDOW = torch.tensor([0.005, 0.995])


def _spectra(named: Mapping[str, Images]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for label, x in named.items():
        power = power_spectrum(x)[1:]
        axes.loglog(range(1, len(power) + 1), power.numpy(), label=label)
    axes.set(xlabel="cycles an image", ylabel="power")
    axes.legend(frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
