"""Training a posterior sampler on measurements alone: diffusion with forward models.

Each step an exam's rows are divided anew into context C, target T and novel rows N, and
measured rows are compared with what the predicted signal says of them (`dfm_losses`). No
signal is needed, and none is seen; see `invsolve.forward_prior`.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from invsolve import io
from invsolve.exams import Exams, load_exams
from invsolve.forward_prior import (
    BEGINS,
    VARIATION_STEPS,
    ForwardPrior,
    LearntPrior,
    NetworkForwardPrior,
    UNetHead,
    learnt,
    parts,
    stored,
    whole,
)
from invsolve.identifiability import identifiability
from invsolve.operators import LinearOperator
from invsolve.operators.parametric import Parametric, Rows
from invsolve.priors import UNetConfig
from invsolve.priors.weights import sha256
from invsolve.random import randn_like
from invsolve.shapes import per_item
from invsolve.training import ConfigFile, log_normal, shown
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

FIRST, SOME = 512, 128
"""Exams by which the whitening and the strength of total variation are told."""
HELD_OUT = 64
"""Exams that measure a run."""


class ExamData(Section):
    """Files of exams (`invsolve.exams`)."""

    train: Path
    val: Path


class Split(Section):
    """How an exam's rows are divided: what is left of context and target is novel."""

    context: tuple[int, int]
    """The smallest and the largest context; each size is as likely."""
    target: int = Field(gt=0)
    centre: int = Field(default=0, ge=0)
    """Columns around the centre of k-space that are always context."""
    dropout: float = Field(default=0.1, ge=0, le=1)
    """The part of the exams whose context is not told, for guidance. A signal from nothing
    errs so much that these may be most of the loss: 0 where guidance is not needed."""

    @model_validator(mode="after")
    def _grows(self) -> "Split":
        if not self.centre < max(1, self.context[0]) <= self.context[1]:
            raise ValueError("context is [least, most], of more rows than the centre")
        return self

    def kept(self, grid: tuple[int, ...]) -> Bool[Tensor, "*grid"] | None:
        """The rows that are always context."""
        if not self.centre:
            return None
        first = (grid[-1] - self.centre + 1) // 2
        kept = torch.zeros(grid, dtype=torch.bool)
        kept[..., first : first + self.centre] = True
        return kept


class Weights(Section):
    """Of each part of the loss; 0 leaves it out."""

    guess: float = Field(default=1.0, ge=0)
    target: float = Field(default=1.0, ge=0)
    novel: float = Field(default=1.0, ge=0)
    smooth: float = Field(default=0.0, ge=0)
    """Of ⟨|∇Ŝ|²⟩, for signals that rows leave open where pictures are flat."""


class First(Section):
    """What the network's first guess begins with."""

    variation: bool = False
    """Total variation, its strength chosen by rows that the context leaves out, instead
    of least squares."""
    variation_steps: tuple[int, int] = VARIATION_STEPS
    """Of it, and of conjugate gradients in each."""
    nonnegative: bool = False


class DFMConfig(ConfigFile):
    """A training run, as a TOML file tells it."""

    kind: str = "dfm"
    name: str
    data: ExamData
    split: Split
    scale: float = Field(default=1.0, gt=0)
    """An image in its own unit over the network's, which should be of order 1."""
    network: dict[str, Any] = Field(default={})
    optimisation: Optimisation = Optimisation(log_sigma_mean=-0.8)
    weights: Weights = Weights()
    first: First = First()
    checkpoints: int = Field(default=20, gt=0)
    """How often a run is measured and kept."""
    tensorboard: bool = False
    card: dict[str, Any] = Field(default={})
    """Copied to the prior's card: licence, source, citation."""


def train_dfm(
    config: DFMConfig,
    out: Path,
    *,
    seed: int,
    device: torch.device | None = None,
    progress: Progress = iter,
    stop: Stop = lambda: False,
    warn: Callable[[str], object] = lambda line: None,
) -> Path:
    """Train, or go on where ``out/checkpoint.pt`` left off; the card is returned.

    Writes ``NAME.safetensors`` (averaged weights, whitening, geometry), ``NAME.json``
    (its card), ``losses.csv`` and ``checkpoint.pt``, each whole or not at all.

    Args:
        config: what to train, on what.
        out: a folder for the results.
        seed: of the division of rows, the noise and the weights.
        device: where; the CPU unless given.
        progress: wraps the loop, as ``tqdm`` does.
        stop: asked after each step whether time is up.
        warn: called, before training, with what such exams cannot tell.

    Raises:
        ValueError: an exam has no novel rows, or the two files are of two geometries.
    """
    device, opt = device or torch.device("cpu"), config.optimisation
    train, val = load_exams(config.data.train), load_exams(config.data.val)
    check(train, val, config.split)
    kept = config.split.kept(train.family.grid)
    told = identifiability(train.family, train.rows, kept=kept).warnings
    for line in told:
        warn(line)
    network = network_of(train.family, config.network)
    make = maker(train, config, device)
    held_out = divided(val, range(min(HELD_OUT, len(val))), config, Generator())
    held_out = {k: v.to(device) for k, v in held_out.items()}

    def batch(step: int, generator: Generator) -> Batch:
        index = torch.randint(len(train), (opt.batch,), generator=generator)
        return divided(train, index, config, generator)

    def loss(net: Callable[..., Any], **rows: Tensor) -> Tensor:
        some = dfm_losses(
            make(net), weights=config.weights, **whitened(make(net), rows)
        )
        return torch.stack([vars(config.weights)[k] * v for k, v in some.items()]).sum()

    @torch.no_grad()
    def measure(net: UNetHead) -> list[float]:
        rows = whitened(make(net), held_out)
        some = dfm_losses(make(net), weights=config.weights, **rows)
        return [float(v) for v in some.values()]

    @torch.no_grad()
    def sheet(net: UNetHead) -> Tensor:
        rows = {k: v[:8] for k, v in whitened(make(net), held_out).items()}
        x = make(net).guess(rows["x"], rows["context"])[:, :1]
        return shown(x, x)

    def export(net: nn.Module, seen: int) -> None:
        state, card = stored(make(net), network)
        file = out / f"{config.name}.safetensors"
        io.replace(file, lambda path: save_file(state, path))
        card = {
            "name": config.name,
            **card,
            "unit": "",
            "training": {
                "exams": len(train),
                "exams_seen": seen,
                "measured": train.note,
                "split": config.split.model_dump(),
                "seed": seed,
                **opt.model_dump(),
            },
            "identifiability": told,
            "sha256": sha256(file),
            **config.card,
        }
        text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
        io.replace(
            out / f"{config.name}.json", lambda p: Path(p).write_text(text, "utf-8")
        )

    names = [k for k, weight in config.weights if weight]
    fit(
        Task(
            lambda: UNetHead(network, bf16=opt.bf16),
            batch,
            loss,
            measure,
            tuple(names),
            sheet,
        ),
        Plan(opt),
        out / "checkpoint.pt",
        out / "losses.csv",
        told={
            "network": network.to_dict(),
            "rows": config.split.model_dump(),
            "first": config.first.model_dump(exclude_defaults=True),
            "exams": sha256(config.data.train),
        },
        seed=seed,
        device=device,
        every=max(1, opt.images // config.checkpoints),
        progress=progress,
        stop=stop,
        export=export,
        board=out / "tensorboard" if config.tensorboard else None,
    )
    return out / f"{config.name}.json"


def network_of(family: Parametric, more: dict[str, Any]) -> UNetConfig:
    """The U-Net for these images: shown the data as an image, and what C and T see.

    Of nonlinear operators, the data of each row and whether it is in C and in T.

    Raises:
        ValueError: it does not divide the images' sides.
    """
    channels, *sides = family.image
    shown = channels + 2
    if not isinstance(family.full, LinearOperator):
        shown = 4 * family.measured[0]
    of_images = {"channels": channels, "condition": shown}
    network = UNetConfig.from_dict({**UNetConfig().to_dict(), **more, **of_images})
    if any(side % network.multiple_of for side in sides):
        raise ValueError(
            f"this network needs sides that {network.multiple_of} divides, the images are "
            f"{tuple(sides)}: change network.widths"
        )
    return network


def check(train: Exams, val: Exams, split: Split) -> None:
    """Refuse exams that cannot be divided, or are of two kinds, with a ValueError."""
    one, other = train.family, val.family
    x = torch.ones(1, *one.image)
    if (
        one.image != other.image
        or one.measured != other.measured
        or not torch.equal(one.full.apply(x), other.full.apply(x))
        or train.sigma != val.sigma
    ):
        raise ValueError(
            "the exams to train on and those held out are of two geometries or noises"
        )
    for exams in (train, val):
        fewest = int(exams.rows.flatten(1).sum(1).min())
        if fewest <= (needed := split.context[1] + split.target):
            raise ValueError(
                f"an exam has {fewest} rows, and context and target take {needed}: there "
                "are no novel rows; make split.context or split.target smaller"
            )
        kept = split.kept(exams.family.grid)
        if kept is not None and not exams.rows[:, kept].all():
            raise ValueError("an exam lacks the centre: make split.centre smaller")


def maker(
    exams: Exams, config: DFMConfig, device: torch.device
) -> Callable[[Any], LearntPrior]:
    """Head ↦ prior, its whitening told by what the context leaves of other rows.

    W is 1/√E|y_T − A_T x|², pooled where measurements are alike; x is what the first guess
    of y_C begins with, or 0 where A is not linear.

    Raises:
        ValueError: total variation is asked for, and A is not linear.
    """
    family, split = exams.family.to(device), config.split
    more: dict[str, Any] = {}

    def prior(head: Any, whitening: Tensor) -> LearntPrior:
        return learnt(
            family,
            head,
            sigma=exams.sigma,
            whitening=whitening,
            gain=config.scale,
            target_rows=split.target,
            context_rows=split.context[1],
            blind=split.dropout > 0,
            **more,
        )

    plain = prior(unchanged, torch.ones(family.measured, device=device))
    rows = divided(exams, range(min(FIRST, len(exams))), config, Generator())
    rows = {k: v.to(device) for k, v in rows.items()}
    told = rows["target"] | rows["novel"]
    x = rows["x"].real.new_zeros(len(rows["x"]), *family.image)
    if isinstance(plain, NetworkForwardPrior):
        y, context = plain.whitened(rows["x"]), rows["context"]
        if config.first.variation:
            plain.nonnegative = config.first.nonnegative
            plain.variation_steps = config.first.variation_steps
            plain.variation = strength(plain, y, context, told)
            more = {k: vars(plain)[k] for k in BEGINS}
        x = plain.first(y, context)
    elif config.first.variation:
        raise ValueError("first.variation needs a linear operator: leave it out")
    W = family.whitening(rows["x"] - family.full.apply(config.scale * x), told)
    first = prior(unchanged, W)

    def make(head: Any) -> LearntPrior:
        made = copy.copy(first)
        made.head = head
        return made

    return make


def strength(prior: NetworkForwardPrior, y: Tensor, context: Rows, told: Rows) -> float:
    """The λ whose total variation of y_C says most of the other rows, in decibels.

    By factors of √3 downhill from 1; no image is needed.
    """
    y, context, told = (v[:SOME] for v in (y, context, told))
    weight = torch.where(prior.family.spread(told), prior.family.density.to(y.real), 0)
    scores: dict[int, float] = {}

    def score(k: int) -> float:
        if k not in scores:
            trial = copy.copy(prior)
            trial.variation = 3 ** (k / 2)
            error = prior.measure(trial.first(y, context)) - y
            each = (weight * (error.conj() * error).real).flatten(1).sum(1)
            scores[k] = float((each / weight.flatten(1).sum(1)).log().mean())
        return scores[k]

    best = 0
    for step in (-1, 1):
        while abs(best) < WIDEST and score(best + step) < score(best):
            best += step
    return 3 ** (best / 2)


WIDEST = 16
"""Factors of √3 that λ may be from 1."""


def unchanged(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """The head before there is a network: it corrects nothing."""
    return torch.zeros_like(x[:, :1]), torch.zeros_like(level)


def divided(exams: Exams, index: Any, config: DFMConfig, generator: Generator) -> Batch:
    """Some exams, their rows divided at random, and the noise for their targets.

    Of every ``dropout``-th the context's rows are none of the three.
    """
    split, opt = config.split, config.optimisation
    index = torch.as_tensor(index)
    x, rows, n = exams.y[index], exams.rows[index], len(index)
    low, high = split.context
    context = torch.randint(low, high + 1, (n,), generator=generator)
    sizes = torch.stack(
        [context, torch.full((n,), split.target), torch.full((n,), -1)], 1
    )
    C, T, N = exams.family.split(
        rows, sizes, generator=generator, kept=split.kept(exams.family.grid)
    )
    dropped = torch.rand(n, generator=generator) < split.dropout
    C = C & ~dropped.reshape(-1, *(1,) * (C.ndim - 1))
    noise = whole(randn_like(parts(x), generator), x)
    return {
        "x": x,
        "context": C,
        "target": T,
        "novel": N,
        "s": log_normal(n, opt, generator),
        "noise": noise,
    }


def whitened(prior: ForwardPrior, rows: Batch) -> Batch:
    """A batch with its measurements whitened."""
    return {**rows, "x": prior.whitened(rows["x"])}


def dfm_losses(
    prior: ForwardPrior,
    x: Tensor,
    context: Rows,
    target: Rows,
    novel: Rows,
    s: Float[Tensor, " batch"],
    noise: Tensor,
    weights: Weights,
) -> dict[str, Tensor]:
    """Mean squares of what the signal says of measurements.

        target  ⟨(1 + s²)/s² |E[y_T | u] − y_T|²⟩   (the data's own noise corrected for)
        novel   ⟨|A_N Ŝ − y_N|²⟩
        guess   ⟨|A S_det − y|²⟩ over T and N
        smooth  ⟨|∇Ŝ|²⟩

    The target's is of whitened measurements; the others weigh frequencies as an image's
    mean square does (`Parametric.density`): E[S | ·] is where any such weights put the
    minimum, and these are fast on the details.

    Args:
        prior: of which the losses are.
        x: y, whitened measurements.
        context, target, novel: disjoint rows, (batch, *grid).
        s: the noise level of each item.
        noise: n, of unit variance in each part of y.
        weights: of which those that are not 0 are told.

    Raises:
        ValueError: there is no novel row, without which Ŝ is arbitrary where it is not
            measured.
    """
    y = x
    if not novel.flatten(1).any(1).all():
        raise ValueError(
            "there are no novel rows: an exam needs more rows than context and target"
        )
    guess = prior.guess(y, context)
    losses = {}
    if weights.guess:
        losses["guess"] = misfit(prior, prior.measure(guess) - y, target | novel)
    if weights.target or weights.novel:
        T = prior.family.spread(target)
        u = torch.where(T, y + per_item(s, y) * noise, 0)
        # What the first guess is, is not the second's to say.
        S = prior.signal(y, context, u, target, s, guess.detach())
        o = prior.measure(S)
        weight = ((1 + s**2) / s**2).sqrt()
        error = prior.corrected(o, u, s) - y
        losses["target"] = _mean_square(per_item(weight, y) * error, T)
        losses["novel"] = misfit(prior, o - y, novel)
        guess = S
    if weights.smooth:
        steps = [guess.diff(dim=d) for d in range(2, guess.ndim)]
        losses["smooth"] = torch.stack([d.square().mean() for d in steps]).sum()
    return {k: v for k, v in losses.items() if vars(weights)[k]}


def misfit(prior: ForwardPrior, error: Tensor, rows: Rows) -> Tensor:
    """⟨|A x − y|²⟩ over some rows, weighing frequencies as an image's mean square does.

    Args:
        prior: which knows the operators and the whitening.
        error: A x − y, whitened.
        rows: (batch, *grid).
    """
    density = prior.family.density.to(prior.W) / prior.W**2
    return _mean_square(error, torch.where(prior.family.spread(rows), density, 0))


def _mean_square(error: Tensor, weights: Tensor) -> Tensor:
    inside = weights.to(error.real).expand(error.shape)
    square = (error.conj() * error).real
    total = inside.sum() * (1 + error.is_complex())
    return (inside * square).sum() / total.clamp_min(1e-12)
