"""The training loop: averaged weights, a learning rate that falls, runs that can be cut.

θ ← θ − r η U(∇ 1/n Σᵢ ℓᵢ(θ)), where U is AdamW's or Muon's step (`training_descent`), and
θ̄ ← d θ̄ + (1 − d) θ, of which θ̄ is kept. A batch of n is drawn whole, from one generator,
and only then divided; so the result does not depend, beyond rounding, on how it was
divided.
"""

import csv
import math
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from pydantic import Field, PositiveFloat
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from invsolve import io
from invsolve.priors.parameterisation import Predicts
from invsolve.priors.unet import laid_out
from invsolve.training_data import Section
from invsolve.training_descent import Descends, Descent

Progress = Callable[[Iterable[int]], Iterable[int]]
Stop = Callable[[], bool]
Batch = dict[str, Tensor]
"""Tensors that have one row for each item."""


class Optimisation(Section):
    """How long, and with what steps."""

    images: int = Field(default=60_000, gt=0)
    """How many images to see; crops count by their area."""
    batch: int = Field(default=8, gt=0)
    crop_batch: int = Field(default=16, gt=0)
    crop_part: float = Field(default=0.7, ge=0, le=1)
    """The part of the run that sees crops, if there are any."""
    optimizer: Descends = "adamw"
    """Or ``muon``: see `training_descent`."""
    lr: float = Field(default=6e-4, gt=0)
    warmup: int = Field(default=300, gt=0)
    """Steps over which the learning rate rises."""
    decay: float = Field(default=0.3, ge=0, le=1)
    """The last part of the run, over which the learning rate falls to zero."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    predicts: Predicts = "edm"
    weighting: Literal["plain", "snr+1"] = "plain"
    """Of the noise levels in the loss: F's own, or EDM's whatever F predicts."""
    sigma_data: PositiveFloat | tuple[PositiveFloat, ...] = 0.5
    """One for all channels, or one for each: then all of them weigh the same."""
    log_sigma_mean: float = -1.4
    log_sigma_std: float = Field(default=1.4, gt=0)
    class_dropout: float = Field(default=0.1, ge=0, le=1)
    """The part of the images whose class, if they have one, is not told."""
    bf16: bool = True
    """The network's passes in bfloat16, on a device that computes in it."""
    accumulate: int = Field(default=1, gt=0)
    """In how many parts a batch goes through the network: less memory, the same steps."""
    channels_last: bool = True
    """Keep the channels of a pixel side by side, which convolutions are faster with."""
    compile: bool = False
    """Compile loss and network with `torch.compile`; needs a C++ compiler."""


class Plan:
    """The steps of a run: first on crops, if there are any, then on whole images.

    Args:
        opt: how long.
        crop_area: a crop's area as a fraction of an image's; 0 without crops.
    """

    def __init__(self, opt: Optimisation, crop_area: float = 0.0) -> None:
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


@final
@dataclass(frozen=True)
class Task:
    """What is minimised, on what, and how it is measured.

    Attributes:
        make: () ↦ the network, its weights random.
        batch: (step, generator) ↦ the rows of a batch.
        loss: (network, **rows) ↦ the mean loss of these rows.
        measure: averaged network ↦ the numbers of ``names``, on held-out images.
        names: of what is measured.
        sheet: averaged network ↦ some of its samples, with values of 0 … 1.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, Generator], Batch]
    loss: Callable[..., Tensor]
    measure: Callable[[Any], list[float]]
    names: tuple[str, ...]
    sheet: Callable[[Any], Tensor]


def fit(
    task: Task,
    plan: Plan,
    checkpoint: Path,
    table: Path,
    *,
    told: dict[str, Any],
    seed: int,
    device: torch.device | None = None,
    every: int | None = None,
    progress: Progress = iter,
    stop: Stop = lambda: False,
    export: Callable[[nn.Module, int], object] = lambda net, seen: None,
    board: Path | None = None,
) -> tuple[Any, bool]:
    """The averaged network, and whether it is done; goes on from ``checkpoint``.

    Killed at any moment and started again it gives the same weights, bit for bit.

    Args:
        task: what is minimised.
        plan: in how many steps.
        checkpoint: a file with all that is needed to go on.
        table: a file (CSV) of losses and measurements against images seen.
        told: what the network is; a checkpoint of another, or of another optimizer, is
            refused.
        seed: of the weights, the data's order and the noise.
        device: where; the CPU unless given.
        every: images between two checkpoints; a fiftieth of all unless given.
        progress: wraps the loop, as ``tqdm`` does.
        stop: asked after each step whether time is up.
        export: called with the averaged network and the images it saw, when it is kept.
        board: a folder for TensorBoard's curves and sample sheets; none unless given.

    Raises:
        ValueError: the checkpoint is of another network, optimizer or the like, or a batch
            is too small to divide.
        ModuleNotFoundError: accelerate or TensorBoard is needed and not installed.
    """
    opt, processes = plan.opt, Processes(device or torch.device("cpu"))
    device, n_parts = processes.device, opt.accumulate * processes.count
    every = every or max(1, opt.images // 50)
    with torch.random.fork_rng():  # torch's layers initialise from the global state
        torch.manual_seed(seed)
        net = laid_out(task.make().to(device), opt.channels_last)
    ema = AveragedModel(net, avg_fn=warm_ema(opt.ema))
    descent = Descent(net, opt.optimizer, opt.lr)
    told = {**told, "optimizer": opt.optimizer}
    generator = Generator().manual_seed(seed)
    first, history, running = 0, [], []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        before = state["told"]
        others = [k for k in {**before, **told} if before.get(k) != told.get(k)]
        if others:
            raise ValueError(
                f"{checkpoint} is of a run that differs in {', '.join(others)}: choose "
                "another --out"
            )
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        descent.load_state_dict(state["descent"])
        generator.set_state(state["generator"].cpu())
        first, history = state["step"], state["history"]
        running = list(state["running"])

    objective = Objective(net, task.loss)
    if opt.compile:
        objective.compile()
    module = processes.wrap(objective)
    shown = Board(board, plan.seen(first)) if board and not processes.rank else None

    def save(step: int) -> None:
        if processes.rank:
            return
        state = {
            "told": told,
            "net": net.state_dict(),
            "ema": ema.state_dict(),
            "descent": descent.state_dict(),
            "generator": generator.get_state(),
            "step": step,
            "history": history,
            "running": torch.stack(running) if running else torch.empty(0),
        }
        io.replace(checkpoint, lambda path: torch.save(state, path))
        write_table(table, ("images", "loss", *task.names), history)
        export(ema.module, round(plan.seen(step)))

    step = first
    for step in progress(range(first, plan.steps)):
        descent.zero_grad()
        rows = task.batch(step, generator)
        mine = parts(rows, n_parts)[processes.rank :: processes.count]
        losses = []
        for k, part in enumerate(mine, 1):
            part = {name: v.to(device) for name, v in part.items()}
            # Of the mean over the batch, and for the mean over the processes.
            weight = processes.count * len(part["x"]) / len(rows["x"])
            with processes.exchange(module, now=k == len(mine)):
                loss = weight * module(part)
                loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        descent.step(plan.rate(step))
        ema.update_parameters(net)
        running.append(processes.mean(torch.stack(losses).sum()))
        before, seen = plan.seen(step), plan.seen(step + 1)
        if seen // every > before // every:
            mean = float(torch.stack(running).mean())
            running.clear()
            history.append([seen, mean, *task.measure(ema.module)])
            if shown:
                curves = dict(zip(("loss", *task.names), history[-1][1:], strict=True))
                curves["learning_rate"] = opt.lr * plan.rate(step)
                with torch.no_grad():
                    shown.add(seen, curves, task.sheet(ema.module))
            save(step + 1)
        if processes.mean(torch.tensor(float(stop()), device=device)) > 0:
            step += 1
            break
    else:
        step = plan.steps
    save(step)
    if shown:
        shown.close()
    return ema.module.eval().requires_grad_(False), step == plan.steps


@final
class Objective(nn.Module):
    """rows ↦ loss, as a module: what wraps modules then wraps network and loss alike."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, rows: Batch) -> Tensor:
        return self.loss(self.net, **rows)


def parts(rows: Batch, n: int) -> list[Batch]:
    """A batch in n parts; every n-th item belongs to one part.

    Neighbours in a batch are of neighbouring noise levels, so that parts are alike.

    Raises:
        ValueError: a part would be empty.
    """
    if (items := len(next(iter(rows.values())))) < n:
        raise ValueError(
            f"a batch of {items} cannot be divided into {n} parts: set a larger "
            "optimisation.batch (and crop_batch), or fewer processes or parts"
        )
    return [{k: v[i::n] for k, v in rows.items()} for i in range(n)]


@final
class Processes:
    """Those that train together, of ``torchrun`` or ``accelerate launch``; or this one.

    Args:
        device: what is computed on; of several GPUs, each process takes its own.

    Raises:
        ModuleNotFoundError: there are several, and accelerate is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self.count, self.rank, self.device = 1, 0, device
        self.accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.accelerator = _accelerator(device)
            self.count = self.accelerator.num_processes
            self.rank = self.accelerator.process_index
            self.device = self.accelerator.device

    def wrap(self, objective: Objective) -> nn.Module:
        """The objective, its gradients averaged over the processes."""
        together = self.accelerator
        return objective if together is None else together.prepare_model(objective)

    def exchange(self, objective: nn.Module, now: bool) -> AbstractContextManager:
        """Within it, gradients are averaged at once, or left for a later pass."""
        together = self.accelerator
        return nullcontext() if now or together is None else together.no_sync(objective)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        together = self.accelerator
        return value if together is None else together.reduce(value, "mean")


def _accelerator(device: torch.device) -> Any:
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "training by several processes needs accelerate: "
            "pip install 'invsolve[train]'"
        ) from error
    return Accelerator(cpu=device.type == "cpu")


@final
class Board:
    """Curves and sample sheets for TensorBoard, against images seen.

    Args:
        folder: for its event files.
        seen: images seen before; what an earlier, killed run told beyond is taken back.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, seen: float) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the curves need TensorBoard: pip install 'invsolve[train]'"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=round(seen) + 1)

    def add(self, seen: float, curves: dict[str, float], sheet: Tensor) -> None:
        """One point of each curve, and one sheet of images (n, channels, y, x)."""
        for name, value in curves.items():
            self.writer.add_scalar(name, value, round(seen))
        self.writer.add_images("samples", sheet, round(seen))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def write_table(path: Path, names: Iterable[str], rows: list[list[float]]) -> None:
    """A CSV file, whole or not at all."""

    def write(partial: str) -> None:
        with open(partial, "w", newline="") as file:
            csv.writer(file).writerows([names, *rows])

    io.replace(path, write)


def warm_ema(decay: float) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """An exponential average that forgets its first steps faster than its later ones."""

    def average(mean: Tensor, new: Tensor, n: Any) -> Tensor:
        return mean.lerp(new, 1 - min(decay, float((1 + n) / (10 + n))))

    return average
