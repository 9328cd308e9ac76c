"""Training a segmenter: cross entropy and square error of the mask behind a noisy one.

Minimise E [BCE(2m_σ/σ² + F; m) + ‖tanh(m_σ/σ² + F/2) − m‖²] over m_σ = m + σn, σ
log-normal; of labels that exclude one another the cross entropy and the square error of
all of them. Both terms are proper: at their least D is E[m | m_σ, images], so that draws
are calibrated. Dice is not, and is added only if asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import (
    binary_cross_entropy_with_logits as bce,
    cross_entropy,
)

from invsolve import io
from invsolve.bf16 import autocast
from invsolve.grids import resampled
from invsolve.priors import UNetConfig
from invsolve.random import randn_like
from invsolve.shapes import per_item
from invsolve.training import ConfigFile
from invsolve.training_data import Section
from invsolve.training_loop import (
    Batch,
    Optimisation,
    Plan,
    Progress,
    Stop,
    Task,
    fit,
)

from .cases import (
    SPACING_MM,
    Case,
    Modality,
    modalities_of,
    needed,
    prepared,
)
from .hecktor import hecktor_cases
from .masks import shares, shown_logits, with_none
from .segmenter import build, save


class Cases(Section):
    """Which patients, and what the network is shown of them."""

    train: Path
    val: Path
    """Folders in HECKTOR's layout: see `invsolve.segmentation.hecktor`."""
    modalities: dict[str, Modality] = Field(default=modalities_of(("ct", "pet")))
    """Names of `invsolve.segmentation.cases.MODALITIES`, or a table for each."""
    spacing_mm: float = Field(default=SPACING_MM, gt=0)
    """The side of the voxels that all is brought to."""
    labels: tuple[str, ...] = ("tumour",)
    """Names of the masks; the files' labels 1, 2 … in order, or all of them if one."""
    crop: int = Field(default=48, gt=0)
    """Side of the cubes that the first part of a run sees."""
    window: int = Field(default=64, gt=0)
    """Side of those that the last part sees."""
    positive: float = Field(default=0.5, ge=0, le=1)
    """The part of the cubes that is around a voxel of a mask."""
    flip: bool = True
    """Random left–right mirroring."""

    @field_validator("modalities", mode="before")
    @classmethod
    def _known(cls, told: Any) -> dict[str, Modality]:
        return modalities_of(told)


class SegmenterConfig(ConfigFile):
    """A segmenter's training run."""

    kind: Literal["segmenter"]
    name: str
    cases: Cases
    network: dict[str, Any] = Field(default={})
    optimisation: Optimisation = Optimisation(
        log_sigma_mean=1.5, log_sigma_std=1.5, batch=4, crop_batch=4
    )
    """How long; images are windows, of which a crop counts as a part."""
    sigma_min: float = 0.4
    sigma_max: float = 40.0
    exclusive: bool = False
    """Whether a voxel has one label at most."""
    dice: float = Field(default=0.0, ge=0)
    """The weight of a Dice loss, which is not proper: probabilities get too sure."""
    tensorboard: bool = False
    card: dict[str, Any] = Field(default={})


def train_segmenter(
    config: SegmenterConfig,
    out: Path,
    *,
    seed: int,
    device: torch.device | None = None,
    checkpoint_every: int | None = None,
    progress: Progress = iter,
    stop: Stop = lambda: False,
    make: Callable[[], nn.Module] | None = None,
    cases: tuple[Sequence[Case], Sequence[Case]] | None = None,
) -> tuple[nn.Module, Path]:
    """Train, or go on where ``out/checkpoint.pt`` left off: the network and its card.

    Args:
        config: what to train, on what.
        out: a folder for weights, card, losses and checkpoint.
        seed: of the data's order, the noise and the weights.
        device: where; the CPU unless given.
        checkpoint_every: windows between two checkpoints.
        progress: wraps the loop, as ``tqdm`` does.
        stop: asked after each step whether time is up.
        make: another network than the configuration's, for comparisons; it is shown the
            images alone if it is an `invsolve.segmentation.segmenter.Unaware`.
        cases: those of both folders, where they were read before: see `read_cases`.
    """
    opt, data = config.optimisation, config.cases
    network = UNetConfig.from_dict(
        {
            **UNetConfig(
                dims=3,
                widths=(32, 64, 96),
                channels=len(data.labels),
                condition=len(data.modalities),
            ).to_dict(),
            **config.network,
        }
    )
    if data.crop % network.multiple_of or data.window % network.multiple_of:
        raise ValueError(
            f"this network needs crops that {network.multiple_of} divides, got "
            f"{data.crop} and {data.window}: change cases.crop and cases.window"
        )
    train, val = cases or (read_cases(data.train, data), read_cases(data.val, data))
    plan = Plan(opt, (data.crop / data.window) ** 3)

    def batch(step: int, generator: Generator) -> Batch:
        early = step < plan.crop_steps
        side, n = (data.crop, opt.crop_batch) if early else (data.window, opt.batch)
        images, mask = cubes(train, data, n, side, generator)
        return {**noisy(mask, opt, generator), "images": images}

    at = Generator().manual_seed(0)
    checked = cubes(val, data, min(8, len(val)), data.window, at)

    net, _ = fit(
        Task(
            make or partial(build, network),
            batch,
            partial(
                mask_loss, dice=config.dice, bf16=opt.bf16, exclusive=config.exclusive
            ),
            lambda net: first_pass(net, *checked, config.sigma_max, config.exclusive),
            ("dice_of_first_pass", "nll_of_first_pass"),
            lambda net: _sheet(net, *checked, config.sigma_max, config.exclusive),
        ),
        plan,
        out / "checkpoint.pt",
        out / "losses.csv",
        told={"network": network.to_dict(), "cases": data.model_dump(mode="json")},
        seed=seed,
        device=device,
        every=checkpoint_every,
        progress=progress,
        stop=stop,
        export=lambda net, seen: save(
            net,
            network,
            out,
            config.name,
            labels=list(data.labels),
            modalities=data.model_dump(mode="json")["modalities"],
            spacing_mm=data.spacing_mm,
            exclusive=config.exclusive,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            training={"windows_seen": seen, "seed": seed, **opt.model_dump()},
            **config.card,
        ),
        board=out / "tensorboard" if config.tensorboard else None,
    )
    return net, out / f"{config.name}.json"


def read_cases(folder: Path, data: Cases) -> list[Case]:
    """Every labelled patient of a folder, on the networks' grid.

    Raises:
        ValueError: a patient has no label or an empty one, or there is none at all.
    """
    cases, kinds = [], needed(data.modalities)
    for files in hecktor_cases(folder, scans=list(kinds)):
        if files.label is None:
            raise ValueError(f"{files.name} has no label: training needs one")
        scans = {k: io.read(file, kinds[k].unit) for k, file in files.scans.items()}
        code = io.read(files.label, "")
        case = prepared(scans, kinds, data.spacing_mm, files.name)
        moved = resampled(code, case.grid, nearest=True).values.round().int()
        one = len(data.labels) == 1
        masks = (
            [moved > 0] if one else [moved == k + 1 for k in range(len(data.labels))]
        )
        if not any(mask.any() for mask in masks):
            raise ValueError(
                f"the mask of {files.name} is empty: leave the patient out, or check that "
                "mask and CT lie in the same place"
            )
        cases.append(replace(case, masks=torch.stack(masks)))
    return cases


def cubes(
    cases: Sequence[Case], data: Cases, n: int, side: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Random cubes of patients: the images shown, and m = ±1, mirrored and varied.

    Air surrounds each patient. The scans' values are varied a little: see
    `Modality.varied`.
    """
    images, masks = [], []
    how = data.modalities
    air = [one.outside for one in how.values()]
    for _ in range(n):
        case = cases[int(torch.randint(len(cases), (), generator=generator))]
        draw = torch.rand(8, generator=generator)
        assert case.masks is not None
        where = case.masks.any(0).nonzero()
        space = torch.tensor(case.grid.shape)
        if draw[0] < data.positive:
            middle = where[int(draw[1] * len(where))]
        else:
            middle = (draw[1:4] * space).long()
        jitter = ((draw[4:7] - 0.5) * side / 2).long()
        corner = middle + jitter - side // 2
        # No cube has more air beyond the volume than it must.
        low, high = (
            torch.minimum(space - side, torch.zeros(3)),
            (space - side).clamp_min(0),
        )
        corner = corner.clamp(low.long(), high)
        amounts = torch.randn(len(case.scans), generator=generator)
        amount = dict(zip(case.scans, amounts, strict=True))
        varied = torch.stack(
            [one.varied(one.seen(case.scans[k]), amount[k]) for k, one in how.items()]
        )
        image = cut(varied, corner, side, air)
        inside = cut(case.masks, corner, side, [0.0] * len(data.labels))
        mask = 2.0 * inside - 1
        if data.flip and draw[7] < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        images.append(image)
        masks.append(mask)
    return torch.stack(images), torch.stack(masks)


def cut(x: Tensor, corner: Tensor, side: int, outside: Sequence[float]) -> Tensor:
    """A cube of (channels, z, y, x) from a corner, which may lie outside."""
    out = torch.tensor(outside, dtype=x.dtype)[:, None, None, None].repeat(
        1, *[side] * 3
    )
    source, target = [], []
    for at, n in zip(corner.tolist(), x.shape[1:], strict=True):
        first, last = max(at, 0), min(at + side, n)
        source.append(slice(first, last))
        target.append(slice(first - at, last - at))
    out[:, *target] = x[:, *source]
    return out


def noisy(mask: Tensor, opt: Optimisation, generator: Generator) -> Batch:
    """m_σ, σ and m, at log-normal levels stratified over the batch."""
    n = len(mask)
    quantile = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    levels = Normal(opt.log_sigma_mean, opt.log_sigma_std)
    sigma = levels.icdf(quantile.clamp(1e-4, 1 - 1e-4)).exp()
    x = mask + per_item(sigma, mask) * randn_like(mask, generator)
    return {"x": x, "sigma": sigma, "mask": mask}


def mask_loss(
    net: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    mask: Tensor,
    images: Tensor,
    dice: float,
    bf16: bool,
    exclusive: bool = False,
) -> Tensor:
    """BCE + square error, and ``dice`` times 1 − 2 Σ p m/(Σ p + Σ m)."""
    with autocast(mask.device, bf16):
        logits = shown_logits(net, x, per_item(sigma, x), images)
    truth = (mask + 1) / 2
    if exclusive:
        p, none = shares(logits), 1 - truth.sum(1, keepdim=True)
        entropy = cross_entropy(with_none(logits), torch.cat([none, truth], 1))
        loss = entropy + 4 * (p - truth).square().sum(1).mean()
    else:
        p = logits.sigmoid()
        loss = bce(logits, truth) + 4 * (p - truth).square().mean()
    if dice:
        both = (p * truth).flatten(2).sum(2)
        total = (p + truth).flatten(2).sum(2)
        loss = loss + dice * (1 - (2 * both + 1) / (total + 1)).mean()
    return loss


@torch.no_grad()
def first_pass(
    net: Any, images: Tensor, mask: Tensor, sigma: float, exclusive: bool = False
) -> list[float]:
    """Dice of P(m = 1 | images) > ½ over all cubes together, and its mean NLL in nats."""
    p = probability(net, images, mask, sigma, exclusive)
    truth = (mask > 0).float()
    found = (p > 0.5).float()
    dice = 2 * (found * truth).sum() / (found.sum() + truth.sum()).clamp_min(1)
    nll = -(
        truth * p.clamp_min(1e-7).log() + (1 - truth) * (1 - p).clamp_min(1e-7).log()
    )
    return [float(dice), float(nll.mean())]


def probability(
    net: Any, images: Tensor, mask: Tensor, sigma: float, exclusive: bool = False
) -> Tensor:
    """By one pass at the highest level, where the noisy mask tells nothing."""
    generator = Generator().manual_seed(0)
    parts = []
    for image, m in zip(images.split(1), mask.split(1), strict=True):
        n = sigma * randn_like(m, generator)
        device = next(net.parameters()).device
        level = per_item(torch.full((1,), sigma), m)
        logits = shown_logits(net, n.to(device), level.to(device), image.to(device))
        parts.append((shares(logits) if exclusive else logits.sigmoid()).cpu())
    return torch.cat(parts)


def _sheet(
    net: Any, images: Tensor, mask: Tensor, sigma: float, exclusive: bool
) -> Tensor:
    """The first label's probability, in the middle slice of each cube."""
    middle = mask.shape[2] // 2
    return probability(net, images, mask, sigma, exclusive)[:, :1, middle]
