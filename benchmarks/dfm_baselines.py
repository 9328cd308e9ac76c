"""What DFM is compared with, trained on the same exams with the same U-Net.

    python benchmarks/dfm_baselines.py train --kind ct --out runs/dfm

- ``ssdu``: the mean alone, by splitting (Yaman et al. 2020; Batson, Royer 2019);
- ``ei``: splitting and equivariance to turns and shifts (Chen et al. 2021; deepinv's loss);
- ``ambient``: an unconditional D(x; σ) from measured rows of noisy images, some of which
  are held back (Daras et al. 2023), for the package's samplers to use;
- ``supervised``: an oracle, a conditional denoiser of images: it is shown the images that
  the exams are of.

Each sees as many exams as DFM does.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from make_exams import SLICES, parts
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from tqdm import tqdm

from invsolve import io
from invsolve.exams import load_exams
from invsolve.forward_prior import NetworkForwardPrior, UNetHead
from invsolve.operators.parametric import Rows
from invsolve.priors import AffineMap, Prior
from invsolve.priors.schedules import karras_sigmas
from invsolve.priors.weights import sha256
from invsolve.random import randn_like
from invsolve.samplers.core import ddim, transitions
from invsolve.shapes import per_item
from invsolve.training import log_normal, shown
from invsolve.training_dfm import (
    DFMConfig,
    divided,
    maker,
    misfit,
    network_of,
    unchanged,
    whitened,
)
from invsolve.training_loop import Batch, Optimisation, Plan, Task, fit

CONFIGS = {"ct": "dfm-ct-32.toml", "mr": "dfm-mr-64.toml"}
NAMES = ("ssdu", "ei", "ambient", "supervised")
SIGMAS = (0.01, 20.0)
"""The oracle's noise levels, over what its first guess lacks (`Oracle.spread`)."""


Make = Callable[[Any], NetworkForwardPrior]


@dataclass(frozen=True, eq=False)
class Setting:
    """A kind's exams, and the prior of its configuration with whatever head."""

    config: DFMConfig
    make: Make
    exams: Any
    val: Any

    def head(self) -> UNetHead:
        """The U-Net, its weights random."""
        network = network_of(self.exams.family, self.config.network)
        return UNetHead(network, bf16=self.config.optimisation.bf16)


def setting(kind: str, data: Path) -> Setting:
    """Of ``ct`` or ``mr``."""
    config = DFMConfig.read(Path(__file__).parents[1] / "configs" / CONFIGS[kind])
    exams, val = (load_exams(exams_file(data, kind, p)) for p in ("train", "val"))
    return Setting(
        config, cast(Make, maker(exams, config, torch.device("cpu"))), exams, val
    )


def exams_file(data: Path, kind: str, part: str = "train") -> Path:
    """What `make_exams` wrote."""
    return data / "exams" / f"{kind}-{part}.npz"


# --- the mean alone


def split(prior: NetworkForwardPrior, guess: Tensor, rows: Batch) -> Tensor:
    """What a guess says of rows that it did not see, of whitened measurements."""
    told = rows["target"] | rows["novel"]
    return misfit(prior, prior.measure(guess) - rows["x"], told)


def split_loss(make: Make, net: Any, **rows: Tensor) -> Tensor:
    """What the guess says of rows that it did not see."""
    prior = make(net)
    some = whitened(prior, rows)
    return split(prior, prior.guess(some["x"], some["context"]), some)


def ei_loss(make: Make, net: Any, **rows: Tensor) -> Tensor:
    """Splitting, and E‖T x̂ − R(A T x̂ + n)‖² over the variance of what a guess lacks.

    T turns by quarters and shifts: images like these are as likely.
    """
    from deepinv.loss import EILoss

    prior, C = make(net), rows["context"]
    rows = whitened(prior, rows)
    turns, down, right = rows["moves"][0].tolist()

    def moved(x: Tensor) -> Tensor:
        return torch.rot90(x, turns, (-2, -1)).roll((down, right), (-2, -1))

    def device(x: Tensor) -> Tensor:
        return prior.measure(x) + prior.sigma * prior.W * rows["noise"]

    def reconstructed(y: Tensor, physics: object) -> Tensor:
        return prior.guess(y, C)

    loss: Any = EILoss(cast(Any, moved))
    guess = prior.guess(rows["x"], C)
    again = loss(x_net=guess, physics=device, model=reconstructed)
    return split(prior, guess, rows) + again / VARIANCE


VARIANCE = 0.01
"""Of an image, roughly, about its guess: both losses are then of the order 1."""


# --- an unconditional prior from measurements


class Ambient(Prior):
    """D(x; σ) of which A x is known at some rows alone; the rest of x is not looked at.

    Args:
        model: the operators, and the network.
        rows: which; the same throughout a trajectory.
    """

    def __init__(self, model: NetworkForwardPrior, rows: Rows) -> None:
        self.model, self.rows = model, rows
        self.sigma_min, self.sigma_max = 0.01, 20.0

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        y = self.model.family.restrict_data(self.model.measure(x), self.rows)
        return ambient_mean(self.model, y, self.rows, sigma)

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        return self, AffineMap(self.model.gain, 0.0)


def ambient_mean(
    model: NetworkForwardPrior, y: Tensor, rows: Rows, s: Tensor
) -> Tensor:
    """E[x | A_R (x + s n)]; no fusion, as the noise of such data is not white."""
    x = model.back(y, rows)
    none = torch.zeros_like(rows)
    into = per_item((1 + s**2).rsqrt().expand(len(x)).to(x), x)
    seen = model.coverages(rows, none, x)
    level = (s.log() / 4).expand(len(x)).to(x)
    change, _ = model.head(torch.cat([into * x, torch.zeros_like(x), *seen], 1), level)
    return x / (1 + per_item(s.expand(len(x)).to(x), x) ** 2) + change


def ambient_loss(make: Make, net: Any, **rows: Tensor) -> Tensor:
    """⟨|A_N D − y_N|²⟩ over rows of which the network was not told."""
    model = make(net)
    rows = whitened(model, rows)
    R = rows["context"] | rows["target"]
    n = model.measure(rows["image_noise"])
    y = rows["x"] + per_item(rows["s"], n) * n
    D = ambient_mean(model, model.family.restrict_data(y, R), R, rows["s"])
    N = model.family.spread(rows["novel"])
    density = model.family.density / model.W**2
    weights = torch.where(N, density, 0).expand(n.shape)
    square = (model.measure(D) - rows["x"]).abs().square()
    return (weights * square).sum() / weights.sum()


# --- an oracle that was shown the images


class Oracle:
    """p(x | y_C) by a conditional denoiser of images.

    What DFM's network does with a target it does with the image itself.

    Args:
        model: the operators, and the network.
        spread: the standard deviation of an image about least squares.
    """

    def __init__(self, model: NetworkForwardPrior, spread: float) -> None:
        self.model, self.spread = model, spread

    def mean(self, y: Tensor, C: Rows, x: Tensor, s: Tensor, guess: Tensor) -> Tensor:
        """E[x₀ | y_C, x₀ + s n = x], with s in units of the spread."""
        model, none = self.model, torch.zeros_like(C)
        s = s.expand(len(x)).to(x)
        rest = per_item((1 + s**2).rsqrt() / self.spread, x) * (x - guess)
        inputs = [guess, rest, *model.coverages(C, none, x)]
        change, log_mu = model.head(torch.cat(inputs, 1), s.log() / 4)
        mu, known = log_mu.exp(), (s * self.spread).clamp_min(0.02 * self.spread) ** -2
        F = per_item(mu, x) * (guess + change) + per_item(known, x) * x
        F = F / per_item(mu + known, x)
        return model.fused(F, y, model.precision(C, none, s), mu + known)

    @torch.no_grad()
    def sample(self, y: Tensor, C: Rows, steps: int, generator: Generator) -> Tensor:
        """A draw, by DDIM."""
        guess = self.model.guess(y, C)
        levels = transitions(karras_sigmas(steps, *SIGMAS))
        x = guess + levels[0][0] * self.spread * randn_like(guess, generator)
        for s, s_next in levels:
            x0 = self.mean(y, C, x, s, guess)
            x = ddim(x, x0, s, s_next, 0.0, generator)
        return x


def oracle_loss(make: Make, spread: float, net: Any, **rows: Tensor) -> Tensor:
    """⟨|x̂ − x|²⟩ of the guess and of the denoiser, over the spread's square."""
    model = make(net)
    x, s = rows["image"], rows["s"]
    y, C = whitened(model, rows)["x"], rows["context"]
    guess = model.guess(y, C)
    noisy = x + spread * per_item(s, x) * rows["image_noise"]
    S = Oracle(model, spread).mean(y, C, noisy, s, guess.detach())
    weight = per_item((1 + s**2) / s**2, x)
    parts = (guess - x).square().mean() + (weight * (S - x).square()).mean()
    return parts / spread**2


# --- training

AMBIENT = Optimisation(log_sigma_mean=-1.4)
"""The law of an image's noise levels."""


def task(name: str, kind: str, data: Path) -> tuple[Setting, Task, float]:
    """What is minimised, and the spread that an oracle needs."""
    at = setting(kind, data)
    config, spread = at.config, 1.0
    images = torch.empty(0)
    if name == "supervised":
        images = SLICES[kind](parts(data, kind)["train"]) / config.scale
        model, rows = (
            at.make(unchanged),
            divided(at.exams, range(256), config, Generator()),
        )
        y = whitened(model, rows)["x"]
        spread = float((model.back(y, rows["context"]) - images[:256]).std())
    loss: Callable[..., Tensor] = {
        "ssdu": partial(split_loss, at.make),
        "ei": partial(ei_loss, at.make),
        "ambient": partial(ambient_loss, at.make),
        "supervised": partial(oracle_loss, at.make, spread),
    }[name]

    def rows_of(exams: Any, index: Tensor, generator: Generator) -> Batch:
        rows = divided(exams, index, config, generator)
        like = torch.zeros(len(index), *exams.family.image)
        rows["image_noise"] = randn_like(like, generator)
        rows["moves"] = torch.randint(-3, 4, (len(index), 3), generator=generator)
        if name == "ambient":  # levels of images, not of targets
            rows["s"] = log_normal(len(index), AMBIENT, generator)
        if name == "supervised":
            rows["image"] = images[index]
        return rows

    def batch(step: int, generator: Generator) -> Batch:
        n = config.optimisation.batch
        index = torch.randint(len(at.exams), (n,), generator=generator)
        return rows_of(at.exams, index, generator)

    @torch.no_grad()
    def measure(net: Any) -> list[float]:
        generator = Generator().manual_seed(1)
        if name == "supervised":  # the exams held out come without their images
            return [float("nan")]
        return [
            float(loss(net, **rows_of(at.val, torch.arange(len(at.val)), generator)))
        ]

    def sheet(net: Any) -> Tensor:
        return shown(images[:1], images[:1])

    return at, Task(at.head, batch, loss, measure, ("held_out",), sheet), spread


def train(args: argparse.Namespace) -> None:
    """Each of the names, or on where it was cut."""
    end = time.monotonic() + 60 * args.minutes
    for name in args.names:
        out = args.out / f"{name}-{args.kind}"
        out.mkdir(parents=True, exist_ok=True)
        if (out / "done.safetensors").exists():
            continue
        at, what, spread = task(name, args.kind, args.data)
        net, done = fit(
            what,
            Plan(at.config.optimisation),
            out / "checkpoint.pt",
            out / "losses.csv",
            told={"name": name, "exams": sha256(exams_file(args.data, args.kind))},
            seed=args.seed,
            every=at.config.optimisation.images // 10,
            progress=partial(tqdm, desc=out.name, delay=1),
            stop=lambda: time.monotonic() > end,
        )
        if not done:
            return
        state = {**net.state_dict(), "spread": torch.tensor(spread)}
        state = {k: v.contiguous() for k, v in state.items()}
        io.replace(out / "done.safetensors", partial(save_file, state))


def trained(
    name: str, kind: str, at: Setting, out: Path
) -> tuple[NetworkForwardPrior, float]:
    """A baseline's network as a prior, and the spread."""
    path = out / f"{name}-{kind}" / "done.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: train it by benchmarks/dfm_baselines.py")
    state = load_file(path)
    spread = float(state.pop("spread"))
    head = at.head()
    head.load_state_dict(state)
    return at.make(head.eval().requires_grad_(False)), spread


def main() -> None:
    """Train them, one after another."""
    parser = argparse.ArgumentParser(description="Baselines of DFM.")
    parser.add_argument("what", choices=["train"])
    data = Path(os.environ.get("INVSOLVE_DATA", "."))
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--kind", choices=["ct", "mr"], required=True)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--out", type=Path, default=Path("runs/dfm"))
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
