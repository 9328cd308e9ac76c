"""Training a prior: denoising score matching over continuous noise levels.

Minimise E ‖F(c_in x_σ; c_noise) − (x₀ − c_skip x_σ)/c_out‖² with x_σ = x₀ + σn, which is
the loss of Karras et al. 2022 (eq. 8) with the weight 1/c_out². By the coefficients F
predicts EDM's mixture, the noise, the image or a rectified flow: see
`invsolve.priors.parameterisation.preconditioning`. So weighed, a network that predicts the
image learns little of small noise, and one that predicts the noise little of large: with
``weighting = "snr+1"`` the loss is ‖D − x₀‖² (1/σ² + 1/σ_d²) of them all, as EDM's is
(Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR
2022, §4).
"""

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.distributions import Normal

from invsolve import io, priors
from invsolve.bf16 import autocast
from invsolve.priors import AffineMap, EDMPrior, Prior, Sliding, UNet, UNetConfig
from invsolve.priors.networks.conditional import InTheMiddle, apart
from invsolve.priors.parameterisation import (
    SigmaData,
    each_channel,
    preconditioning,
)
from invsolve.priors.unet import positions
from invsolve.priors.weights import card_of, sha256
from invsolve.random import randn_like
from invsolve.samplers import unconditional
from invsolve.shapes import per_item
from invsolve.training_data import Data, Section, draw, load, load_classes
from invsolve.training_loop import (
    Batch,
    Optimisation,
    Plan,
    Progress,
    Stop,
    Task,
    fit,
)

C = TypeVar("C", bound="ConfigFile")


class ConfigFile(Section):
    """A training run, as a TOML file tells it."""

    @staticmethod
    def kind_of(path: Path) -> str:
        """What the file asks to train: ``prior`` unless it says otherwise."""
        try:
            return str(tomllib.loads(path.read_text("utf-8")).get("kind", "prior"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error

    @classmethod
    def read(cls: type[C], path: Path) -> C:
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


class TrainConfig(ConfigFile):
    """A prior's training run."""

    name: str
    data: Data
    network: dict[str, Any] = Field(default={})
    optimisation: Optimisation = Optimisation()
    start: str = ""
    """The prior whose weights the network begins with, by name or card: see `begun`."""
    checkpoints: int = Field(default=50, gt=0)
    """How often a run is measured and kept."""
    tensorboard: bool = False
    """Write curves and samples to ``tensorboard/``, for TensorBoard to show."""
    card: dict[str, Any] = Field(default={})
    """Copied to the prior's card: licence, source, citation."""


def train(
    config: TrainConfig,
    out: Path,
    *,
    seed: int,
    device: torch.device | None = None,
    checkpoint_every: int | None = None,
    progress: Progress = iter,
    stop: Stop = lambda: False,
) -> Path:
    """Train, or go on where ``out/checkpoint.pt`` left off; the prior's card is returned.

    Writes ``NAME.safetensors`` (averaged weights, float16), ``NAME.json`` (its card),
    ``losses.csv`` and ``checkpoint.pt``, each whole or not at all; and, if asked,
    ``tensorboard/``.

    Args:
        config: what to train, on what.
        out: a folder for the results.
        seed: of the data's order, the noise and the weights.
        device: where; the CPU unless given.
        checkpoint_every: images between two checkpoints, instead of ``checkpoints``.
        progress: wraps the loop, as ``tqdm`` does.
        stop: asked after each step whether time is up.
    """
    opt, data = config.optimisation, config.data
    device = device or torch.device("cpu")
    # Of the pictures' own: a run that goes on draws the same ones.
    cutting = Generator().manual_seed(seed)
    images, labels, classes = load_classes(data.train, data, cutting)
    val = held_out(load(data.val, data, cutting))
    network = UNetConfig.from_dict(
        {
            **UNetConfig(classes=len(classes), dims=data.dims).to_dict(),
            **config.network,
        }
    )
    _check_fits(images, data, network, len(classes), opt.sigma_data)
    sides = images.shape[2:]
    plan = Plan(opt, data.crop ** len(sides) / sides.numel())

    def batch(step: int, generator: Generator) -> Batch:
        crop = data.crop if step < plan.crop_steps else 0
        n = opt.crop_batch if crop else opt.batch
        x0, corners, index = draw(images, data, n, crop, generator)
        rows = noised(x0, opt, generator)
        if network.condition:
            rows = in_the_middle(rows, generator)
        if network.positions:
            rows["position"] = positions(corners, x0.shape[2:], sides)
        if classes:
            told = torch.rand(n, generator=generator) >= opt.class_dropout
            rows["label"] = torch.where(told, labels[index], len(classes))
        return rows

    def prior_of(net: nn.Module) -> EDMPrior:
        asked = InTheMiddle(net) if network.condition else net
        return EDMPrior(asked, opt.sigma_data, predicts=opt.predicts)

    fit(
        Task(
            lambda: begun(UNet(network), config),
            batch,
            partial(matching, bf16=opt.bf16),
            lambda net: denoising_psnr(
                prior_of(net), val.to(device), middle=network.condition > 0
            ),
            tuple(f"psnr_at_{level}" for level in LEVELS),
            lambda net: shown(drawn(prior_of(net), network, val.to(device)), val),
        ),
        plan,
        out / "checkpoint.pt",
        out / "losses.csv",
        told=network.to_dict(),
        seed=seed,
        device=device,
        every=checkpoint_every or max(1, opt.images // config.checkpoints),
        progress=progress,
        stop=stop,
        export=lambda net, seen: _export(
            config, network, classes, net, seen, out, seed
        ),
        board=out / "tensorboard" if config.tensorboard else None,
    )
    return out / f"{config.name}.json"


def begun(net: UNet, config: TrainConfig) -> UNet:
    """The network with the weights of ``config.start``, if there is one to begin with.

    It may have more channels. F of these begins at zero, and the rest of F does not see
    them: they begin independent of the image, as Gaussian noise of √v = sigma_data. It may
    be shown neighbours, which it does not see at first. It may predict something else:
    then F begins wrong, but with features that are of use.

    Raises:
        ValueError: that prior's network, range or sigma_data is another.
    """
    if not config.start:
        return net
    opt = config.optimisation
    prior, to_unit = priors.load(config.start).normalised
    old = vars(prior).get("net")
    old = old.net if isinstance(old, InTheMiddle) else old
    n = old.config.channels if isinstance(old, UNet) else 0
    if not (
        isinstance(prior, EDMPrior)
        and isinstance(old, UNet)
        and replace(
            old.config, channels=net.config.channels, condition=net.config.condition
        )
        == net.config
        and not net.config.positions
        and _listed(prior.sigma_data, n) == _listed(opt.sigma_data, n)
        and to_unit == AffineMap(config.data.scale, config.data.offset)
    ):
        raise ValueError(
            f"{config.start} cannot be begun with: its network (but for channels, and "
            "without positions), scale, offset or sigma_data is another"
        )
    weights = net.state_dict()
    for name, part in old.state_dict().items():
        weights[name].zero_()[tuple(map(slice, part.shape))] = part
    return net


def _listed(sigma_data: SigmaData, channels: int) -> tuple[float, ...]:
    """Of the first so many channels."""
    each = isinstance(sigma_data, tuple)
    return sigma_data[:channels] if each else (sigma_data,) * channels


def noised(x0: Tensor, opt: Optimisation, generator: Generator) -> Batch:
    """c_in x_σ, c_noise, F's target and weight, at log-normal levels stratified over it."""
    sigma = per_item(log_normal(len(x0), opt, generator), x0)
    x = x0 + sigma * randn_like(x0, generator)
    data = each_channel(opt.sigma_data, x0)
    skip, scale, into, level = preconditioning(opt.predicts, sigma, data)
    rows = {
        "x": into * x,
        "c_noise": level.flatten(),
        "target": (x0 - skip * x) / scale,
    }
    if opt.weighting == "snr+1":
        rows["weight"] = scale**2 * (1 / sigma**2 + 1 / data**2)
    return rows


ENDS = 0.1
"""Of a batch's slices, the part that a volume ends at: `Sliding` mirrors it there."""


def in_the_middle(rows: Batch, generator: Generator) -> Batch:
    """Rows of neighbouring slices as those of the middle one, shown the others."""
    x, shown = apart(rows["x"])
    m = shown.shape[1] // 2
    ends = torch.rand(len(x), generator=generator) < ENDS
    shown[ends, :m] = shown[ends, m:].flip(1)
    others = {k: apart(v)[0] for k, v in rows.items() if k in ("target", "weight")}
    return {**rows, **others, "x": x, "condition": shown}


def log_normal(n: int, opt: Optimisation, generator: Generator) -> Float[Tensor, " n"]:
    """Noise levels of which every n-th part of the log-normal law has one."""
    quantile = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    law = Normal(opt.log_sigma_mean, opt.log_sigma_std)
    return law.icdf(quantile.clamp(1e-4, 1 - 1e-4)).exp()


def matching(
    net: Callable[..., Tensor],
    target: Tensor,
    bf16: bool,
    weight: Tensor | None = None,
    **told: Tensor,
) -> Tensor:
    """The mean of ‖F(c_in x_σ; c_noise) − target‖², weighed if there is a weight."""
    with autocast(target.device, bf16):
        out = net(**told)
    square = (out.float() - target).square()
    return (square if weight is None else weight * square).mean()


LEVELS = (0.05, 0.2, 0.8)
"""The noise levels, in the prior's range, at which training reports its denoising."""


@torch.no_grad()
def denoising_psnr(
    prior: EDMPrior, val: Tensor, *, middle: bool = False
) -> list[float]:
    """PSNR in dB of D(x₀ + σn; σ) at each of `LEVELS`, for a data range of 2.

    Of all channels, or of the middle one.
    """
    generator, result = Generator().manual_seed(0), []
    for level in LEVELS:
        sigma = torch.tensor(level, device=val.device)
        square = torch.zeros(())
        for x0 in val.split(8):
            x = x0 + sigma * randn_like(x0, generator)
            gap = prior.denoise(x, sigma) - x0
            gap = apart(gap)[0] if middle else gap
            square += gap.square().mean().cpu() * len(x0)
        result.append(float(10 * (4 * len(val) / square).log10()))
    return result


def samples(prior: Prior, like: Tensor) -> Tensor:
    """As many draws as ``like`` has images, always from the same noise."""
    return unconditional(
        prior,
        like,
        steps=12,
        sigma_range=(0.01, 20.0),
        generator=Generator().manual_seed(0),
    )


def drawn(prior: EDMPrior, network: UNetConfig, val: Tensor) -> Tensor:
    """Eight draws as images: of volumes their middle slices; or a volume's eight slices."""
    if not network.condition:
        return _middle(samples(prior, val[:8]))
    stack = apart(val[:1])[0].expand(8, -1, -1, -1)
    volume = samples(
        Sliding(prior, 1 + network.condition), stack.movedim(0, 1).unsqueeze(0)
    )
    return volume[0].movedim(1, 0)


def shown(x: Tensor, like: Tensor) -> Tensor:
    """0 … 1 of the range of ``like``."""
    return ((x - like.min()) / (like.max() - like.min())).clamp(0, 1)


def _middle(x: Tensor) -> Tensor:
    """Of volumes, the middle slices."""
    return x if x.ndim == 4 else x[:, :, x.shape[2] // 2]


def held_out(images: Tensor) -> Tensor:
    """At most 48 of them, evenly chosen."""
    chosen = torch.linspace(0, len(images) - 1, min(48, len(images)))
    return images[chosen.long()].float()


def _check_fits(
    images: Tensor,
    data: Data,
    network: UNetConfig,
    classes: int,
    sigma_data: SigmaData,
) -> None:
    channels, *sides = images.shape[1:]
    if isinstance(sigma_data, tuple) and len(sigma_data) != channels:
        raise ValueError(
            f"the images have {channels} channels, sigma_data {len(sigma_data)} numbers: "
            "give optimisation.sigma_data one number, or one for each channel"
        )
    if network.condition:
        if (beside := data.neighbours - 1) % 2 or network.condition != beside:
            raise ValueError(
                f"network.condition = {network.condition} asks for the middle slice of "
                f"{1 + network.condition}, shown the others: set it to an even number, and "
                f"data.neighbours to one more, not {data.neighbours}"
            )
        channels -= network.condition
    for name, has, wanted in (
        ("channels", network.channels, channels),
        ("classes", network.classes, classes),
        ("dims", network.dims, data.dims),
    ):
        if has != wanted:
            raise ValueError(
                f"the images have {wanted} {name}, the network {has}: set "
                f"network.{name} = {wanted}"
            )
    if any(side % network.multiple_of for side in (*sides, data.crop)):
        raise ValueError(
            f"this network needs sides that {network.multiple_of} divides, got images "
            f"of {tuple(sides)} and crops of {data.crop}: change them or network.widths"
        )
    if any(side < data.crop for side in sides):
        raise ValueError(
            f"crops of {data.crop} are larger than the images, {tuple(sides)}: set a "
            "smaller data.crop"
        )


def _export(
    config: TrainConfig,
    network: UNetConfig,
    classes: list[str],
    net: nn.Module,
    seen: int,
    out: Path,
    seed: int,
) -> None:
    weights = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    file = out / f"{config.name}.safetensors"
    io.replace(file, lambda path: save_file(weights, path))
    card = card_of(
        config.name,
        network,
        sigma_data=config.optimisation.sigma_data,
        map=AffineMap(config.data.scale, config.data.offset),
        predicts=config.optimisation.predicts,
        **_labels(config.data),
        **({"neighbours": n} if (n := config.data.neighbours) > 1 else {}),
        **({"plane": p} if (p := config.data.plane) != "axial" else {}),
        unit="1/mm" if config.data.unit == "HU" else config.data.unit,
        training={
            "images_seen": seen,
            "seed": seed,
            **({"start": config.start} if config.start else {}),
            **config.optimisation.model_dump(),
        },
        sha256=sha256(file),
        **({"classes": classes} if classes else {}),
        **config.card,
    )
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    io.replace(out / f"{config.name}.json", lambda p: Path(p).write_text(text, "utf-8"))


def _labels(data: Data) -> dict[str, Any]:
    """What a card says of the channels after the image: names, and the value inside."""
    if data.labels is None:
        return {}
    return {
        "labels": list(data.labels.bits),
        "label_value": data.scale * data.labels.value + data.offset,
    }
