"""Training a prior: denoising score matching over continuous noise levels.

Minimise E ‖F(c_in x_σ; c_noise) − (x₀ − c_skip x_σ)/c_out‖² with x_σ = x₀ + σn, which is
the loss of Karras et al. 2022 (eq. 8) with the weight 1/c_out². By the coefficients F
predicts EDM's mixture, the noise, the image or a rectified flow: see
`invsolve.priors.parameterisation.preconditioning`.
"""

import csv
import json
import math
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.distributions import Normal
from torch.optim.swa_utils import AveragedModel

from invsolve import io
from invsolve.priors import AffineMap, EDMPrior, UNet, UNetConfig
from invsolve.priors.parameterisation import Predicts, preconditioning
from invsolve.priors.weights import card_of, sha256
from invsolve.random import randn_like
from invsolve.training_data import Data, Section, draw, load

Progress = Callable[[Iterable[int]], Iterable[int]]


class Optimisation(Section):
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
    predicts: Predicts = "edm"
    sigma_data: float = Field(default=0.5, gt=0)
    log_sigma_mean: float = -1.4
    log_sigma_std: float = Field(default=1.4, gt=0)
    bf16: bool = True


class TrainConfig(Section):
    """A training run, as a TOML file tells it."""

    name: str
    data: Data
    network: dict[str, Any] = Field(default={})
    optimisation: Optimisation = Optimisation()
    card: dict[str, Any] = Field(default={})
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
    images = load(config.data.train, config.data, cutting)
    val = load(config.data.val, config.data, cutting)
    generator = Generator().manual_seed(seed)
    val = val[torch.linspace(0, len(val) - 1, 48).long()].float()

    network = UNetConfig.from_dict({**UNetConfig().to_dict(), **config.network})
    _check_size(images, config.data.crop, network)
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
        x0 = draw(images, config.data, n, crop, generator).to(device)
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
            prior = EDMPrior(ema.module, opt.sigma_data, predicts=opt.predicts)
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
    skip, scale, into, level = preconditioning(opt.predicts, sigma, opt.sigma_data)
    target = (x0 - skip * x) / scale
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=opt.bf16):
        out = net(into * x, level.flatten())
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


def _check_size(images: Tensor, crop: int, network: UNetConfig) -> None:
    channels, *sides = images.shape[1:]
    if channels != network.channels:
        raise ValueError(
            f"the images have {channels} channel(s), the network {network.channels}: "
            f"set network.channels = {channels}"
        )
    if any(side % network.multiple_of for side in (*sides, crop)):
        raise ValueError(
            f"this network needs sides that {network.multiple_of} divides, got images "
            f"of {tuple(sides)} and crops of {crop}: change them or network.widths"
        )


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
        predicts=config.optimisation.predicts,
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
