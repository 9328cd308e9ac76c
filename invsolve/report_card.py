"""How good a prior is: measured on images that it never saw, told on one page.

A prior of latents is measured in them, and its autoencoder on images; what it draws is
decoded first. A prior of the middle one of some slices is measured there; it draws a
volume's slices, each among its neighbours, and has no likelihood.
"""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace as replaced
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import pad

from .io import replace
from .likelihood import bits_per_dimension, log_likelihood
from .metrics import psnr, ssim
from .operators import GaussianNoise, Identity
from .priors import Prior, Sliding
from .priors.latent import LatentPrior
from .priors.networks.conditional import InTheMiddle, apart
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

LATENT_LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
LATENT_LEVEL = 0.4
"""The same for latents, whose spread is about twice that of images in [−1, 1]."""

TV_LAMBDAS = (0.2, 0.3, 0.5, 0.8, 1.2, 2.0)
"""λ in units of 1/σ: what TV denoising needs grows with the noise."""

Denoiser = Callable[[Tensor], Tensor]
Rival = Callable[[float, Generator], Denoiser]
"""At a noise level, the denoiser without a network that the prior is set beside."""


@final
@dataclass(frozen=True)
class Denoising:
    """PSNR in dB at one noise level: of the noisy image, the rival's and the prior's."""

    sigma: float
    noisy: float
    rival: float
    prior: float


@final
@dataclass(frozen=True)
class Likelihood:
    """Bits per dimension of some images, and how well they are told from held-out ones.

    Without bits of a prior that is no density of images.
    """

    images: str
    bits: float | None = None
    error: float | None = None
    auroc: float | None = None
    auroc_denoising: float | None = None


@final
@dataclass(frozen=True)
class Reconstruction:
    """What an autoencoder leaves of held-out images: Dec(Enc(x)) beside x.

    Attributes:
        psnr, ssim: means over the images; PSNR in dB of all channels together, SSIM of
            each channel by itself.
        data_range: of both.
        sheet: images above, what is left of them below; a PNG file in base 64.
    """

    psnr: float
    ssim: float
    data_range: float
    sheet: str

    def numbers(self) -> dict[str, float]:
        """What is not a picture."""
        return {k: v for k, v in vars(self).items() if k != "sheet"}


@final
@dataclass(frozen=True)
class Memory:
    """Median distance to the nearest training image, of samples and held-out images."""

    samples: float
    held_out: float


@final
@dataclass(frozen=True, eq=False)
class ReportCard:
    """All that the page tells; the pictures are PNG files in base 64.

    Attributes:
        rival: ``TV``, or ``linear`` for a prior of latents.
        data_range: of the denoising's PSNR: the images' range, or the latents' spread.
        reconstruction: by the autoencoder of a prior of latents.
    """

    name: str
    rival: str
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
    level: float
    reconstruction: Reconstruction | None = None

    def numbers(self) -> dict[str, Any]:
        """What is not a picture, for a file; the rival goes by its name."""
        rival = self.rival.lower()
        coding = self.reconstruction
        return {
            **({} if coding is None else {"reconstruction": coding.numbers()}),
            "denoising": [
                {rival if k == "rival" else k: v for k, v in vars(row).items()}
                for row in self.denoising
            ],
            "likelihood": [vars(row) for row in self.likelihood],
            "memory": vars(self.memory),
            "data_range": self.data_range,
            "counts": dict(self.counts),
        }


@dataclass(frozen=True, eq=False)
class _Space:
    """Where a prior denoises: in images themselves, or in what stands for them.

    Attributes:
        encode, decode: from images in the prior's range and back.
        rival, name: what the prior's denoising is set beside.
        spread: of held-out items, the R of 10 log₁₀ R²/MSE.
        levels, level: the noise levels of the table, and that of the denoising error.
        told: of an item, what the prior denoises: all of it, or the middle channel.
        volume: of a prior of the middle channel, that of volumes which samples are of.
    """

    encode: Denoiser
    decode: Denoiser
    rival: Rival
    name: str
    spread: Callable[[Tensor], float]
    levels: tuple[float, ...]
    level: float
    told: Denoiser = lambda x: x
    volume: Prior | None = None


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
        prior: what is measured, in its own range; one of latents is measured in them.
        data: where its training and validation images are, and how they are read.
        root: the folder to which these places are relative.
        other: images of another kind, of as many channels or grey; they are cut or
            filled with zeros to the same size.
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
    inner.check(tuple(held_out.shape[1:]))
    space = _latents(inner, train) if isinstance(inner, LatentPrior) else _pixels(seen)
    if isinstance(vars(inner).get("net"), InTheMiddle):
        volume = Sliding(inner, held_out.shape[1])
        space = replaced(space, told=lambda x: apart(x)[0], volume=volume)
    coded = {kind: space.encode(x) for kind, x in kinds.items()}
    x0 = coded["held out"]
    back, spread = space.decode(x0), space.spread(x0)

    like = torch.zeros(samples, *x0.shape[1:])
    if space.volume is not None:
        like = torch.zeros(1, 1, samples, *x0.shape[2:])
    state = unconditional(
        space.volume or inner, like, steps=steps, generator=generator, progress=progress
    )
    drawn = space.decode(state if state.ndim == 4 else state[0].movedim(0, 1))
    table = [
        denoising(inner, space.rival, x0, sigma, spread, generator, told=space.told)
        for sigma in space.levels
    ]
    bits, errors = {}, {}
    for kind, x in coded.items():
        if space.volume is None:
            log_p = log_likelihood(
                inner, x, steps=steps, generator=generator, progress=progress
            )
            bits[kind] = bits_per_dimension(log_p, x[0].numel())
        errors[kind] = _denoising_error(inner, x, space, generator)
    rows = [_likelihood(kind, bits, errors) for kind in coded]
    told, told_back, told_train = map(space.told, (held_out, back, train))
    near, index = nearest(drawn, told_train)
    near_held_out, _ = nearest(told_back, told_train)
    closest = near.argsort()[:8]
    pairs = [drawn[closest], told_train[index[closest]].float()]
    spectra, coding = {"held out": told, "samples": drawn}, None
    if isinstance(inner, LatentPrior):
        coding = reconstruction(held_out, back)
        spectra["held out, decoded"] = back
    shown, window = [drawn, told[:16], *pairs], _window(held_out)
    if not data.photo_crops:  # channels are slices, or labels, and no colours
        shown, window = [_side_by_side(x, told) for x in shown], (0.0, 1.0)
    today = datetime.now(UTC).date().isoformat()
    facts = {
        "Prior": {k: str(v) for k, v in prior.info if v not in (None, "", ())},
        "Run": {
            "date": today,
            "machine": machine(torch.device("cpu")),
            "seed": str(generator.initial_seed()),
            "steps of the flow": str(steps),
            "held-out images": str(data.val),
            **({} if other is None else {"of another kind": str(other.val)}),
            **versions(),
        },
    }
    return ReportCard(
        name,
        space.name,
        table,
        rows,
        Memory(float(near.median()), float(near_held_out.median())),
        spread,
        {"samples": samples, "held_out": len(held_out), "train": len(train)},
        sheet(shown[0], window=window),
        sheet(shown[1], window=window),
        sheet(*shown[2:], window=window),
        _spectra(spectra),
        facts,
        space.level,
        coding,
    )


def denoising(
    prior: Prior,
    rival: Rival,
    x0: Images,
    sigma: float,
    data_range: float,
    generator: Generator,
    *,
    told: Denoiser = lambda x: x,
) -> Denoising:
    """PSNR of D(x₀ + σn; σ), and of the rival's at that level, of what is told of each."""
    classical = rival(sigma, generator)
    noisy = x0 + sigma * randn_like(x0, generator)
    with torch.no_grad():
        denoised = prior.denoise(noisy, torch.tensor(sigma))
    made = (noisy, classical(noisy), denoised)
    return Denoising(sigma, *(_psnr(told(x), told(x0), data_range) for x in made))


def tuned_tv(tuning: Images) -> Rival:
    """Total variation whose λ is, at each level, the best on other images."""

    def at(sigma: float, generator: Generator) -> Denoiser:
        noisy = tuning + sigma * randn_like(tuning, generator)
        errors = {
            lam: float((_tv(noisy, sigma, lam) - tuning).square().mean())
            for lam in TV_LAMBDAS
        }
        best = min(errors, key=errors.__getitem__)
        return lambda x: _tv(x, sigma, best)

    return at


def wiener(train: Images) -> Rival:
    """D(x; σ) = m + F⁻¹ S (S + σ²I)⁻¹ F (x − m): the best linear one, alike everywhere.

    S are the (c, c) spectra of all channels together, frequency by frequency, and m is
    the channels' mean, both over the training items. It is the denoiser of the Gaussian
    field with these moments, periodic at the edges; where nothing varies it has only m.
    """
    mean = train.mean((0, 2, 3), keepdim=True)
    fourier = torch.fft.fft2(train - mean, norm="ortho")
    S = torch.einsum("nchw,ndhw->hwcd", fourier, fourier.conj()) / len(train)

    def at(sigma: float, generator: Generator) -> Denoiser:
        gain = torch.linalg.solve(S + sigma**2 * torch.eye(S.shape[-1]), S)

        def denoise(x: Tensor) -> Tensor:
            filtered = torch.einsum("hwcd,ndhw->nchw", gain, torch.fft.fft2(x - mean))
            return mean + torch.fft.ifft2(filtered).real

        return denoise

    return at


def reconstruction(x: Images, back: Images) -> Reconstruction:
    """What is left of images once they are coded and decoded, in their own range."""
    data_range = float(x.max() - x.min())
    whole, single = (len(x), 1, 1, -1), (-1, 1, *x.shape[2:])
    return Reconstruction(
        float(psnr(back.reshape(whole), x.reshape(whole), data_range).mean()),
        float(ssim(back.reshape(single), x.reshape(single), data_range).mean()),
        data_range,
        sheet(*(_evenly(t, 8) for t in (x, back)), window=_window(x)),
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


def _pixels(seen: Images) -> _Space:
    """Of a prior of images; TV is tuned on some of those that it has seen."""
    return _Space(
        lambda x: x,
        lambda x: x,
        tuned_tv(seen),
        "TV",
        lambda x: float(x.max() - x.min()),
        LEVELS,
        LEVEL,
    )


def _latents(inner: LatentPrior, train: Images) -> _Space:
    """Of a prior of latents; the linear denoiser is fitted to the training images'."""

    @torch.no_grad()
    def by_parts(f: Denoiser, x: Tensor) -> Tensor:
        return torch.cat([f(part.float()) for part in x.split(32)])

    encode = partial(by_parts, inner.encode)
    return _Space(
        encode,
        partial(by_parts, inner.decode),
        wiener(encode(train)),
        "linear",
        lambda z: float(z.std((0, 2, 3)).square().mean().sqrt()),
        LATENT_LEVELS,
        LATENT_LEVEL,
    )


def _evenly(x: Tensor, n: int) -> Tensor:
    """n of the items at even distances; all of them if there are fewer."""
    if len(x) <= n:
        return x
    return x[torch.linspace(0, len(x) - 1, n).round().long()]


def _fit(x: Images, like: Images) -> Images:
    """Cut or filled with zeros around the middle, to the size of others; grey in theirs."""
    if x.shape[1] == 1:
        x = x.expand(-1, like.shape[1], -1, -1)
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


def _psnr(x: Images, truth: Images, data_range: float) -> float:
    """Of all images together: 10 log₁₀ of R² over the mean square error of them all."""
    return float(10 * (data_range**2 / (x - truth).square().mean()).log10())


def _tv(x: Images, sigma: float, lam: float) -> Images:
    return tv(
        InverseProblem(x, Identity(), GaussianNoise(sigma)), lam=lam / sigma, steps=60
    )


@torch.no_grad()
def _denoising_error(
    prior: Prior, x0: Images, space: _Space, generator: Generator
) -> Numbers:
    """The root mean square of D(x₀ + σn; σ) − x₀, image by image."""
    x = x0 + space.level * randn_like(x0, generator)
    gap = space.told(prior.denoise(x, torch.tensor(space.level)) - x0)
    return gap.square().flatten(1).mean(1).sqrt()


def _likelihood(
    kind: str, bits: Mapping[str, Numbers], errors: Mapping[str, Numbers]
) -> Likelihood:
    """A kind's row: its own bits, and how it is told from what was held out."""
    usual, own = "held out", bits.get(kind)
    strange = kind != usual
    return Likelihood(
        kind,
        None if own is None else float(own.mean()),
        None if own is None else float(own.std() / len(own) ** 0.5),
        auroc(bits[usual], own) if strange and own is not None else None,
        auroc(errors[usual], errors[kind]) if strange else None,
    )


Window = tuple[float, float]


def _window(like: Images) -> Window:
    """Nearly all values of images; all of them where nearly all are the same, as labels."""
    some = like.flatten()[:: max(1, like.numel() // 10**6)]
    low, high = torch.quantile(some, torch.tensor([0.005, 0.995])).tolist()
    if low == high:
        low, high = float(like.min()), float(like.max())
    return low, high if high > low else low + 1


def _side_by_side(x: Images, like: Images) -> Images:
    """Channels, each in the window of others', one beside the other, in one image."""
    scaled = []
    for channel, others in zip(x.unbind(1), like.split(1, 1), strict=True):
        low, high = _window(others)
        scaled.append((channel - low) / (high - low))
    return torch.cat(scaled, -1)[:, None]


def sheet(*shown: Images, window: Window) -> str:
    """Images side by side in a window, eight squares wide: a PNG file in base 64.

    Of several kinds each image of the first stands above those of the others.
    """
    from matplotlib import image

    low, high = window
    n, _, h, w = shown[0].shape
    columns = max(1, min(n, 8 * h // w))
    filled = torch.cat(
        [
            pad(part, [0] * 7 + [columns - len(part)], value=high)
            for row in zip(*(x.split(columns) for x in shown), strict=True)
            for part in row
        ]
    )
    filled = ((filled - low) / (high - low)).clamp(0, 1)
    times = max(1, 128 // h)  # small images are shown larger
    large = filled.repeat_interleave(times, -1).repeat_interleave(times, -2)
    framed = pad(large, [2] * 4)
    rows = framed.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    array = rows.flatten(2, 3).flatten(0, 1).expand(-1, -1, 3).numpy()
    buffer = BytesIO()
    image.imsave(buffer, array, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


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
