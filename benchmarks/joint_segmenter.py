"""The other way to masks: reconstruct, then segment. It is given all that it can use.

    python benchmarks/joint_segmenter.py simulate --data $INVSOLVE_DATA --out runs/joint
    python benchmarks/joint_segmenter.py train --data $INVSOLVE_DATA --out runs/joint

``simulate`` measures slices of training patients with 15 views and reconstructs them;
``train`` fits one network to clean slices and to these reconstructions, told which kind it
sees. Both go on where they stopped. The network and its first weights are those of the
joint prior's configuration, and its loss (binary cross-entropy) is proper.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality import METHODS, RESULTS, read
from quality_tasks import TASKS
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

import invsolve as iv
from invsolve import io
from invsolve.bf16 import autocast
from invsolve.metrics import body_mask
from invsolve.priors import AffineMap, UNet, UNetConfig
from invsolve.segmentation.uncertainty import brier
from invsolve.training import TrainConfig, begun
from invsolve.training_data import contours, draw, load
from invsolve.training_loop import Batch, Optimisation, Plan, Task, fit
from invsolve.units import hu_to_mu

CONFIG = Path(__file__).parents[1] / "configs" / "ct-organs-128.toml"
VIEWS, PASSES = 15, 10
KINDS = ("clean", "FBP", "pnp")
"""What the network may be shown, by the noise level it is told."""
CODES = torch.tensor([-0.5, 0.0, 0.5])
SLICES = 1000
"""Of training patients, evenly of all that have a body."""
CHUNK = 20
TUNING_PATIENTS = 9
LABELS = 3


@dataclass(frozen=True)
class Cases:
    """Slices of validation patients: μ in 1/mm, what is inside each label, whose."""

    x: Tensor
    inside: Tensor
    patients: list[str]


def cases(data: Path, part: str) -> Cases:
    """Two slices of each patient in whom all labels are contoured.

    At a third and at two thirds of the height over which there is mandible or parotid.
    The first nine of all patients are for ``tune``, the others for ``test``.
    """
    config = TrainConfig.read(CONFIG).data
    files = sorted((data / config.val).glob(config.pattern))
    if not files or config.labels is None:
        raise SystemExit(f"no patients in {data / config.val}: set INVSOLVE_DATA")
    tune = part == "tune"
    x, inside, patients = [], [], []
    for path in files[:TUNING_PATIENTS] if tune else files[TUNING_PATIENTS:]:
        found = contours(path, config.axes, config.labels)
        if found is None:
            continue
        mu = hu_to_mu(io.read(path, axes=config.axes).values).clamp_min(0)
        names = list(config.labels.bits)
        shown = [names.index(n) for n in ("mandible", "parotids")]
        heights = found[:, shown].flatten(1).any(1).nonzero().flatten()
        low, high = int(heights[0]), int(heights[-1])
        for share in (1 / 3, 2 / 3):
            z = round(low + share * (high - low))
            x.append(mu[z][None])
            inside.append(found[z])
            patients.append(path.name.split("_")[0])
    return Cases(torch.stack(x), torch.stack(inside), patients)


def reconstructed(
    x: Tensor, kind: str, generator: Generator, problem: iv.InverseProblem | None = None
) -> Tensor:
    """What becomes of slices that are measured with few views, in 1/mm.

    Args:
        x: μ, (n, 1, h, w).
        kind: one of `KINDS`, or "TV".
        generator: of the noise.
        problem: what was measured, if it was already.
    """
    if kind == "clean":
        return x
    task = TASKS["ct-15"]
    problem = problem or task.problem(x, generator)
    options = settings(kind)
    sampler, prior = (
        (METHODS[kind].sampler, iv.priors.load(task.prior))
        if kind in METHODS
        else (task.classical[kind][0], None)
    )
    if kind in METHODS:
        options |= {"steps": PASSES, **METHODS[kind].fixed}
    return iv.solve(
        problem,
        prior,
        sampler,
        generator=Generator().manual_seed(1),
        precision="bf16" if prior is not None else "float32",
        **options,
    ).mean


def settings(method: str) -> dict[str, Any]:
    """What `quality.py` found for CT of few views."""
    found = read(RESULTS / "ct-30.json")["settings"][method]["options"]
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def simulate(data: Path, out: Path, until: float) -> None:
    """``out/seen.safetensors``: (n, kinds, h, w) in 1/mm and the labels of each."""
    config = TrainConfig.read(CONFIG).data
    images = load(data / config.train, config, Generator())
    chosen = images[torch.linspace(0, len(images) - 1, SLICES).long()].float()
    del images
    mu, to_unit = chosen[:, :1].clamp_min(0), AffineMap(config.scale, config.offset)
    path = out / "seen.safetensors"
    done = chosen[:0, :1].expand(-1, len(KINDS), -1, -1).half()
    if path.exists():
        done = load_file(path)["seen"]
    for at in tqdm(range(len(done), SLICES, CHUNK), "simulate"):
        if time.monotonic() > until:
            return
        x, g = to_unit(mu[at : at + CHUNK]), Generator().manual_seed(at)
        problem = TASKS["ct-15"].problem(x, g)
        kinds = [reconstructed(x, kind, g, problem) for kind in KINDS]
        done = torch.cat([done, torch.cat(kinds, 1).half()])
        labels = (chosen[: len(done), 1:] > 0).to(torch.uint8)
        whole = {"seen": done.contiguous(), "labels": labels.contiguous()}
        io.replace(path, lambda p, whole=whole: save_file(whole, p))


class Segmenter:
    """P(label | image) in one pass.

    Args:
        net: shown the image in the prior's range, beside channels of nothing.
        map: from that range to 1/mm.
    """

    def __init__(self, net: nn.Module, map: AffineMap) -> None:
        self.net, self.map = net, map

    @classmethod
    def load(cls, path: Path) -> "Segmenter":
        """As ``train`` left it."""
        config = TrainConfig.read(CONFIG)
        net = UNet(network(config))
        net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        return cls(net.eval(), AffineMap(config.data.scale, config.data.offset))

    @torch.no_grad()
    def __call__(self, x: Tensor, kind: str) -> Tensor:
        """(n, labels, h, w), of images in 1/mm of a kind."""
        parts = []
        for part in x.split(16):
            code = CODES[KINDS.index(kind)].expand(len(part))
            parts.append(logits(self.net, self.map.inverse(part), code).sigmoid())
        return torch.cat(parts)


def network(config: TrainConfig) -> UNetConfig:
    """The joint prior's own."""
    return UNetConfig.from_dict({**UNetConfig().to_dict(), **config.network})


def logits(net: nn.Module, u: Tensor, code: Tensor) -> Tensor:
    """The last channels of the network's answer to the image beside nothing."""
    shown = torch.cat([u, u.new_zeros(len(u), LABELS, *u.shape[2:])], 1)
    return net(shown, code)[:, 1:].float()


def train(data: Path, out: Path, until: float) -> None:
    """``out/segmenter.safetensors``, of as many slices of each kind."""
    config = TrainConfig.read(CONFIG)
    path = out / "seen.safetensors"
    if not path.exists():
        raise SystemExit(f"there is no {path}: simulate first")
    stored = load_file(path)
    u = AffineMap(config.data.scale, config.data.offset).inverse(stored["seen"].float())
    images = torch.cat([u, stored["labels"].float()], 1).half()
    opt = Optimisation(
        images=14_400, crop_part=0.8, decay=0.6, lr=4e-4, warmup=100, ema=0.998
    )
    crop, n_kinds = config.data.crop, len(KINDS)

    def batch(step: int, generator: Generator) -> Batch:
        side = crop if step < plan.crop_steps else 0
        n = opt.crop_batch if side else opt.batch
        x = draw(images, config.data, n, side, generator).x
        kind = torch.randint(n_kinds, (n,), generator=generator)
        return {
            "x": x[torch.arange(n), kind][:, None],
            "code": CODES[kind],
            "inside": x[:, n_kinds:],
        }

    def loss(net: nn.Module, x: Tensor, code: Tensor, inside: Tensor) -> Tensor:
        with autocast(torch.device("cpu"), opt.bf16):
            found = logits(net, x, code)
        return binary_cross_entropy_with_logits(found.float(), inside)

    held = cases(data, "tune")
    body = body_mask(held.x)
    g = Generator().manual_seed(0)
    problem = TASKS["ct-15"].problem(held.x, g)
    seen = {kind: reconstructed(held.x, kind, g, problem) for kind in KINDS}

    def measure(net: nn.Module) -> list[float]:
        own = Segmenter(net, AffineMap(config.data.scale, config.data.offset))
        found = [own(seen[kind], kind) * body for kind in KINDS]
        return [float(brier(p, held.inside).mean()) for p in found]

    def export(net: nn.Module, _: int) -> None:
        weights = {k: v.half().contiguous() for k, v in net.state_dict().items()}
        io.replace(out / "segmenter.safetensors", lambda p: save_file(weights, p))

    plan = Plan(opt, crop**2 / images.shape[-1] ** 2)
    fit(
        Task(
            lambda: begun(UNet(network(config)), config),
            batch,
            loss,
            measure,
            tuple(f"brier_{kind}" for kind in KINDS),
            lambda net: held.x,
        ),
        plan,
        out / "segmenter.pt",
        out / "segmenter.csv",
        told=network(config).to_dict(),
        seed=0,
        every=opt.images // 10,
        progress=lambda steps: tqdm(steps, "train", unit="batch"),
        stop=lambda: time.monotonic() > until,
        export=export,
    )


def main() -> None:
    """Simulate, or train."""
    parser = argparse.ArgumentParser(description="The segmenter of reconstructions.")
    parser.add_argument("what", choices=["simulate", "train"])
    data = os.environ.get("INVSOLVE_DATA", "data")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--out", type=Path, default=Path("runs/joint"))
    parser.add_argument("--minutes", type=float, help="stop after so many")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * (args.minutes or 1e9)
    {"simulate": simulate, "train": train}[args.what](args.data, args.out, until)


if __name__ == "__main__":
    main()
