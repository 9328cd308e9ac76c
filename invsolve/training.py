"""Training a prior: denoising score matching over continuous noise levels.

Minimise E ‖F(c_in x_σ; ¼ ln σ) − (x₀ − c_skip x_σ)/c_out‖² with x_σ = x₀ + σn, which is
the loss of Karras et al. 2022 (eq. 8) with the weight 1/c_out².
"""

import csv
import json
import math
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.distributions import Normal
from torch.nn.functional import interpolate
from torch.optim.swa_utils import AveragedModel

from invsolve import io
from invsolve.priors import AffineMap, EDMPrior, UNet, UNetConfig
from invsolve.priors.weights import card_of, sha256
from invsolve.random import randn_like
from invsolve.units import hu_to_mu

Progress = Callable[[Iterable[int]], Iterable[int]]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Section):
    """Which images: every slice of every file in a folder, or parts of photographs."""

    train: Path
    val: Path
    pattern: str = "*.nii.gz"
    unit: Literal["HU", ""] = ""
    axes: str | None = None
    """Where the arrays' axes point, if their affines are wrong; see `invsolve.io.read`."""
    scale: float = Field(default=1.0, gt=0)
    offset: float = 0.0
    min_foreground: float = Field(default=0.005, ge=0, le=1)
    """Leave out slices with fewer pixels than this above 0.25 in the prior's range."""
    shift: int = Field(default=8, ge=0)
    """Random translation by up to so many pixels, the background coming in."""
    photo_crops: int = Field(default=0, ge=0)
    """Cut so many squares out of each file, a photograph in colour; 0 for slices."""
    size: int = Field(default=64, gt=0)
    """Side of those squares in pixels, after scaling."""
    zoom: float = Field(default=8.0, ge=1)
    """They are scaled down by up to so much, evenly in its logarithm."""
    flip: bool = True
    """Random left–right mirroring."""
    crop: int = Field(default=0, ge=0)
    """Side of the crops around the foreground that the first part of a run sees; 0 for
    whole images throughout. Where most of an image is background, crops show the
    network more for the same work; the last part lets it get used to whole images."""


class Optimisation(_Section):
    """How long, and with what steps."""

    images: int = Field(default=60_000, gt=0)
    """How many images to see; crops count by their area."""
    batch: int = Field(default=8, gt=0)
    crop_batch: int = Field(default=16, gt=0)
    crop_part: float = Field(default=0.7, ge=0, le=1)
    """The part of the run that sees crops, if there are any."""
    lr: float = Field(default=6e-4, gt=0)
    warmup: int = Field(default=300, gt=0)
    """Steps over which the learning rate rises."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """The last part of the run, over which the learning rate falls to zero."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    sigma_data: float = Field(default=0.5, gt=0)
    log_sigma_mean: float = -1.4
    log_sigma_std: float = Field(default=1.4, gt=0)
    bf16: bool = True


class TrainConfig(_Section):
    """A training run, as a TOML file tells it."""

    name: str
    data: Data
    network: dict[str, Any] = {}
    optimisation: Optimisation = Optimisation()
    card: dict[str, Any] = {}
    """Copied to the prior's card: licence, source, citation."""

    @classmethod
    def read(cls, path: Path) -> "TrainConfig":
        """The configuration in a file; a ValueError names what is wrong in it."""
        try:
            with path.open("rb") as file:
                return cls.model_validate(tomllib.load(file))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: {where}: {first['msg']}") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error


FOREGROUND = 0.25
"""What is above it in the prior's range is not background."""


class Plan:
    """The steps of a run: first on crops, if there are any, then on whole images.

    Args:
        opt: how long.
        crop_area: a crop's area as a fraction of an image's; 0 without crops.
    """

    def __init__(self, opt: Optimisation, crop_area: float) -> None:
        self.opt = opt
        self.per_crop_step = opt.crop_batch * crop_area
        part = opt.crop_part * opt.images if crop_area else 0
        self.crop_steps = round(part / self.per_crop_step) if part else 0
        whole = opt.images - self.crop_steps * self.per_crop_step
        self.steps = self.crop_steps + math.ceil(whole / opt.batch)

    def seen(self, step: int) -> float:
        """Images seen before a step, crops by their area."""
        crops = min(step, self.crop_steps)
        return crops * self.per_crop_step + (step - crops) * self.opt.batch

    def rate(self, step: int) -> float:
        """The learning rate, as a fraction: a rise, a plateau, and a linear fall."""
        left = 1 - self.seen(step) / self.opt.images
        fall = min(1.0, left / self.opt.decay) if self.opt.decay else 1.0
        return fall * min(1.0, (step + 1) / self.opt.warmup)


def load_slices(folder: Path, data: Data) -> Tensor:
    """Every slice with something in it, in the prior's range: (n, 1, y, x), float16."""
    files = sorted(folder.glob(data.pattern))
    if not files:
        raise ValueError(f"no file matches {folder / data.pattern}: check data.train")
    to_prior = AffineMap(data.scale, data.offset).inverse
    kept = []
    for path in files:
        values = io.read(path, axes=data.axes).values
        u = to_prior(hu_to_mu(values) if data.unit == "HU" else values)
        foreground = (u > FOREGROUND).flatten(1).float().mean(1)
        kept.append(u[foreground >= data.min_foreground].half())
    slices = torch.cat(kept)[:, None]
    if not len(slices):
        raise ValueError(
            f"every slice in {folder} is background: check data.scale, data.unit and "
            "data.min_foreground"
        )
    return slices


def load_photos(folder: Path, data: Data, generator: Generator) -> Tensor:
    """Squares of photographs at random places and scales: (n, 3, y, x), float16."""
    from skimage.io import imread

    files = sorted(folder.glob(data.pattern))
    if not files:
        raise ValueError(f"no file matches {folder / data.pattern}: check data.train")
    to_prior = AffineMap(data.scale, data.offset).inverse
    kept = []
    for path in files:
        array = imread(path)
        if array.ndim != 3 or array.shape[2] < 3:
            raise ValueError(f"{path} is not in colour: leave it out")
        photo = torch.from_numpy(array[..., :3].copy()).permute(2, 0, 1)
        if min(photo.shape[1:]) < data.size:
            raise ValueError(f"{path} is smaller than data.size: leave it out")
        most = min(data.zoom, min(photo.shape[1:]) / data.size)
        for u in torch.rand(data.photo_crops, 3, generator=generator).tolist():
            side = round(data.size * most ** u[0])
            i, j = (
                int(f * (n - side + 1))
                for f, n in zip(u[1:], photo.shape[1:], strict=True)
            )
            square = photo[None, :, i : i + side, j : j + side].float() / 255
            small = interpolate(square, [data.size] * 2, mode="area")
            kept.append(to_prior(small).half())
    return torch.cat(kept)


def load_images(folder: Path, data: Data, generator: Generator) -> Tensor:
    """What the configuration asks for: slices, or squares of photographs."""
    if data.photo_crops:
        return load_photos(folder, data, generator)
    return load_slices(folder, data)


def train(
    config: TrainConfig,
    out: Path,
    *,
    seed: int,
    device: torch.device | None = None,
    checkpoint_every: int | None = None,
    progress: Progress = iter,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train, or go on where ``out/checkpoint.pt`` left off; the prior's card is returned.

    Writes ``NAME.safetensors`` (averaged weights, float16), ``NAME.json`` (its card),
    ``losses.csv`` and ``checkpoint.pt``, each whole or not at all.

    Args:
        config: what to train, on what.
        out: a folder for the results.
        seed: of the data's order, the noise and the weights.
        device: where; the CPU unless given.
        checkpoint_every: images between two checkpoints; a fiftieth of all unless given.
        progress: wraps the loop, as ``tqdm`` does.
        stop: asked after each step whether time is up.
    """
    device = device or torch.device("cpu")
    opt = config.optimisation
    every = checkpoint_every or max(1, opt.images // 50)
    # Of the pictures' own: a run that goes on draws the same ones.
    cutting = Generator().manual_seed(seed)
    images = load_images(config.data.train, config.data, cutting)
    val = load_images(config.data.val, config.data, cutting)
    generator = Generator().manual_seed(seed)
    val = val[torch.linspace(0, len(val) - 1, 48).long()].float()

    network = UNetConfig.from_dict({**UNetConfig().to_dict(), **config.network})
    with torch.random.fork_rng():  # torch's layers initialise from the global state
        torch.manual_seed(seed)
        net = UNet(network).to(device)
    ema = AveragedModel(net, avg_fn=_warm_ema(opt.ema))
    adam = torch.optim.AdamW(
        net.parameters(), opt.lr, betas=(0.9, 0.99), weight_decay=0
    )
    plan = Plan(opt, config.data.crop**2 / images[0].numel())
    first, history = 0, []
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if state["network"] != network.to_dict():
            raise ValueError(
                f"{checkpoint} is of another network: choose another --out"
            )
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        adam.load_state_dict(state["adam"])
        generator.set_state(state["generator"].cpu())
        first, history = state["step"], state["history"]

    def save(step: int) -> Path:
        out.mkdir(parents=True, exist_ok=True)
        state = {
            "network": network.to_dict(),
            "net": net.state_dict(),
            "ema": ema.state_dict(),
            "adam": adam.state_dict(),
            "generator": generator.get_state(),
            "step": step,
            "history": history,
        }
        io.replace(checkpoint, lambda path: torch.save(state, path))
        return _export(config, network, ema, round(plan.seen(step)), history, out, seed)

    running: list[Tensor] = []
    step = first
    for step in progress(range(first, plan.steps)):
        for group in adam.param_groups:
            group["lr"] = opt.lr * plan.rate(step)
        crop = config.data.crop if step < plan.crop_steps else 0
        n = opt.crop_batch if crop else opt.batch
        x0 = _batch(images, config.data, n, crop, generator).to(device)
        loss = edm_loss(net, x0, opt, generator)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        ema.update_parameters(net)
        running.append(loss.detach())
        before, seen = plan.seen(step), plan.seen(step + 1)
        if seen // every > before // every:
            mean = float(torch.stack(running).mean())
            running.clear()
            prior = EDMPrior(ema.module, opt.sigma_data)
            history.append([seen, mean, *denoising_psnr(prior, val.to(device))])
            save(step + 1)
        if stop():
            step += 1
            break
    else:
        step = plan.steps
    return save(step)


def edm_loss(
    net: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    opt: Optimisation,
    generator: Generator,
) -> Tensor:
    """The mean of ‖F − target‖² at log-normal noise levels, stratified over the batch."""
    n = len(x0)
    quantile = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    log_sigma = Normal(opt.log_sigma_mean, opt.log_sigma_std).icdf(
        quantile.clamp(1e-4, 1 - 1e-4)
    )
    sigma = log_sigma.exp().to(x0.device).reshape(-1, 1, 1, 1)
    x = x0 + sigma * randn_like(x0, generator)
    d = opt.sigma_data
    total = (sigma**2 + d**2).sqrt()
    target = (x0 - (d / total) ** 2 * x) * total / (sigma * d)
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=opt.bf16):
        out = net(x / total, sigma.flatten().log() / 4)
    return (out.float() - target).square().mean()


LEVELS = (0.05, 0.2, 0.8)
"""The noise levels, in the prior's range, at which training reports its denoising."""


@torch.no_grad()
def denoising_psnr(prior: EDMPrior, val: Tensor) -> list[float]:
    """PSNR in dB of D(x₀ + σn; σ) at each of `LEVELS`, for a data range of 2."""
    generator, result = Generator().manual_seed(0), []
    for level in LEVELS:
        sigma = torch.tensor(level, device=val.device)
        square = torch.zeros(())
        for x0 in val.split(8):
            x = x0 + sigma * randn_like(x0, generator)
            square += (prior.denoise(x, sigma) - x0).square().mean().cpu() * len(x0)
        result.append(float(10 * (4 * len(val) / square).log10()))
    return result


def _batch(
    images: Tensor, data: Data, n: int, crop: int, generator: Generator
) -> Tensor:
    index = torch.randint(len(images), (n,), generator=generator)
    x = images[index].float()
    if data.flip:
        flip = torch.rand(n, generator=generator) < 0.5
        x[flip] = x[flip].flip(-1)
    if crop:
        return torch.stack([_crop(image, crop, generator) for image in x])
    if data.shift:
        pad = data.shift
        padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
        h, w = x.shape[-2:]
        corners = torch.randint(2 * pad + 1, (n, 2), generator=generator).tolist()
        x = torch.stack(
            [
                p[:, i : i + h, j : j + w]
                for p, (i, j) in zip(padded, corners, strict=True)
            ]
        )
    return x


def _crop(image: Tensor, side: int, generator: Generator) -> Tensor:
    """A square around a pixel of the foreground, inside the image."""
    where = (image[0] > FOREGROUND).nonzero()
    pick = int(torch.randint(len(where), (), generator=generator))
    jitter = torch.randint(-side // 2, side // 2 + 1, (2,), generator=generator)
    limit = torch.tensor(image.shape[-2:]) - side
    i, j = (where[pick] + jitter - side // 2).clamp_min(0).minimum(limit).tolist()
    return image[:, i : i + side, j : j + side]


def _warm_ema(decay: float) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """An exponential average that forgets its first steps faster than its later ones."""

    def average(mean: Tensor, new: Tensor, n: Any) -> Tensor:
        return mean.lerp(new, 1 - min(decay, float((1 + n) / (10 + n))))

    return average


def _export(
    config: TrainConfig,
    network: UNetConfig,
    ema: AveragedModel,
    seen: int,
    history: list[list[float]],
    out: Path,
    seed: int,
) -> Path:
    weights = {k: v.half().contiguous() for k, v in ema.module.state_dict().items()}
    file = out / f"{config.name}.safetensors"
    io.replace(file, lambda path: save_file(weights, path))
    card = card_of(
        config.name,
        network,
        sigma_data=config.optimisation.sigma_data,
        map=AffineMap(config.data.scale, config.data.offset),
        unit="1/mm" if config.data.unit == "HU" else config.data.unit,
        training={
            "images_seen": seen,
            "seed": seed,
            **config.optimisation.model_dump(),
        },
        sha256=sha256(file),
        **config.card,
    )
    names = ["images", "loss", *(f"psnr_at_{level}" for level in LEVELS)]
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    io.replace(out / f"{config.name}.json", lambda p: Path(p).write_text(text, "utf-8"))

    def write_csv(path: str) -> None:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([names, *history])

    io.replace(out / "losses.csv", write_csv)
    return out / f"{config.name}.json"
