"""Memory of latent samplers at the size of Stable Diffusion 1.5: a table of docs/latent.md.

    python benchmarks/latent_memory.py

One level of a sampler (STSL with one inner step, PSLD) with a model of that architecture,
float32 weights. Its peak is counted on tensors that have a shape and no values: what the
operations of a CPU would hold, without their work. At 256², and at 512² as it is meant to
be done, it is run too, with random weights, and the resident memory is written beside.
Each case has a process of its own, which is ended beyond 11 GB. Each result is kept as it
comes; the same call goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ct_headneck import machine, put
from torch import Generator, Tensor, nn
from tqdm import tqdm

import invsolve as iv
from invsolve import bf16, io
from invsolve.operators import Downsample, GaussianNoise
from invsolve.priors import latent
from invsolve.priors.parameterisation import DiscretePrior
from invsolve.samplers import psld, stsl
from invsolve.speed import accelerated
from invsolve.volumes import peak_bytes

BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"
RESULTS = Path(__file__).parent / "results" / "latent_memory.json"
MOST = 11 * 10**9
"""Bytes that a case may hold."""

UNET: Mapping[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
SCHEDULE: Mapping[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
TOLD = (77, 768)
"""Tokens of a prompt, and their dimension."""

SAMPLERS: Mapping[str, tuple[Callable[..., Tensor], Mapping[str, Any]]] = {
    "stsl": (stsl, {"averages": 1}),
    "psld": (psld, {}),
}


@dataclass(frozen=True)
class Case:
    """One level of a sampler; ``run`` with values, else with shapes alone."""

    sampler: str
    size: int
    checkpointing: bool = False
    tile: int = 0
    precision: str = "float32"
    run: bool = False

    def __str__(self) -> str:
        how = "run" if self.run else "counted"
        forgets = "checkpointing" if self.checkpointing else "plain"
        tiles = f"tiles of {self.tile}" if self.tile else "whole"
        return f"{self.sampler} {self.size} {self.precision} {forgets} {tiles} {how}"


COUNTED = [
    Case(name, size, forgets, tile, precision)
    for size, forgets, tile, precision in (
        (256, False, 0, "float32"),
        (256, True, 0, "float32"),
        (512, False, 0, "float32"),
        (512, True, 0, "float32"),
        (512, False, 256, "float32"),
        (512, True, 256, "float32"),
        (512, False, 0, "bf16"),
        (512, True, 256, "bf16"),
    )
    for name in SAMPLERS
]
RUN = [
    Case(name, size, forgets, tile, run=True)
    for size, forgets, tile in ((256, False, 0), (256, True, 0), (512, True, 256))
    for name in SAMPLERS
]


# --- one case


def folder_of(path: Path) -> None:
    """The configurations of a diffusers folder."""
    for name, config in (
        ("vae/config.json", VAE),
        ("unet/config.json", UNET),
        ("scheduler/scheduler_config.json", SCHEDULE),
    ):
        (path / name).parent.mkdir()
        (path / name).write_text(json.dumps(config))


def weights(make: Callable[[Tensor], Tensor], folder: Path) -> dict[str, Tensor]:
    """In the place of the files of a folder's network: each tensor made of its shape."""
    import diffusers

    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        net = getattr(diffusers, config["_class_name"]).from_config(config)
    return {k: make(v) for k, v in net.state_dict().items()}


def loaded(case: Case) -> latent.LatentPrior:
    """The model by our own loader; of a case that is not run, on no device."""
    g = Generator().manual_seed(0)

    def drawn(t: Tensor) -> Tensor:
        return torch.empty(t.shape).normal_(0, 0.02, generator=g)

    make = drawn if case.run else (lambda t: t)
    with tempfile.TemporaryDirectory() as name:
        folder_of(Path(name))
        with mock.patch.object(latent, "_weights", lambda path: weights(make, path)):
            return latent.load_latent(
                name,
                condition={"encoder_hidden_states": torch.zeros(TOLD)},
                tile=case.tile or None,
                checkpointing=case.checkpointing,
            )


def parts(prior: latent.LatentPrior) -> list[nn.Module]:
    """The networks of a prior."""
    return [vars(prior.prior)["net"], prior.autoencoder]


def held(prior: latent.LatentPrior) -> int:
    """Bytes of the weights."""
    tensors = [t for net in parts(prior) for t in (*net.parameters(), *net.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def valueless(prior: latent.LatentPrior) -> Iterator[None]:
    """Meanwhile tensors are shapes; what looks at values is left out."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def unchecked(self: Any, y: Tensor, operator: Any, noise: Any) -> None:
        vars(self).update(y=y, operator=operator, noise=noise)

    def step(_: DiscretePrior, sigma: Tensor) -> Tensor:
        return sigma

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for net in (m for whole in parts(prior) for m in whole.modules()):
            for k, p in net._parameters.items():
                if p is not None:
                    net._parameters[k] = nn.Parameter(torch.empty(p.shape), False)
            for k, b in net._buffers.items():
                if b is not None:
                    net._buffers[k] = torch.empty(b.shape)
        for kind, name, value in (
            (iv.InverseProblem, "__init__", unchecked),
            (DiscretePrior, "step", step),
        ):
            stack.enter_context(mock.patch.object(kind, name, value))
        yield


def level(case: Case, prior: latent.LatentPrior) -> int:
    """The most bytes that tensors take during one level, beside the weights."""
    sampler, options = SAMPLERS[case.sampler]
    side = case.size // 4
    A, noise = Downsample(4, (case.size, case.size)), GaussianNoise(0.02)
    given = iv.InverseProblem(torch.full((1, 3, side, side), 0.5), A, noise)
    faster = accelerated(prior, case.precision, False)  # pyright: ignore[reportArgumentType]
    g, sigmas = Generator().manual_seed(0), torch.tensor([1.0])
    return peak_bytes(
        lambda: sampler(given, faster, sigmas=sigmas, generator=g, **options)
    )


def resident(key: str) -> int:
    """Bytes that Linux says this process holds (``VmRSS``), or held at most (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise SystemExit("this system does not tell what a process holds")


def one(case: Case) -> dict[str, int]:
    """What a case takes, in bytes; ``resident`` is what the process grew by."""
    prior = loaded(case)
    if not case.run:
        with valueless(prior):
            return {"weights": held(prior), "tensors": level(case, prior)}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    tensors = level(case, prior)
    more = resident("VmHWM") - before
    return {"weights": held(prior), "tensors": tensors, "resident": more}


# --- all of them


def watched(case: Case) -> dict[str, Any]:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(case))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{child.pid}/statm")
    while child.poll() is None:
        pages = status.read_text().split()
        if len(pages) > 1 and int(pages[1]) * os.sysconf("SC_PAGE_SIZE") > MOST:
            child.kill()
            child.wait()
            return {"over": MOST}
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"{case} failed, see above")
    assert child.stdout is not None
    return json.loads(child.stdout.read())


def run(path: Path, cases: list[Case]) -> dict[str, Any]:
    """All results, of which those that are not there yet are made."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rows = found.setdefault("rows", {})
    for case in tqdm(cases, desc="memory"):
        if str(case) in rows:
            continue
        rows[str(case)] = watched(case)
        found["date"] = datetime.now(UTC).date().isoformat()
        found["machine"] = machine()
        text = json.dumps(found, indent=1) + "\n"
        io.replace(path, lambda p, text=text: Path(p).write_text(text))
    return found


def gib(size: float) -> str:
    """In units of 2³⁰ bytes."""
    return f"{size / 2**30:.2f}"


def cells(case: Case, rows: Mapping[str, Any]) -> list[str]:
    """A case's numbers: weights, tensors, their sum, half of it; and if it was run."""
    row = rows[str(case)]
    both = row["weights"] + row["tensors"]
    half = gib(both / 2) if case.precision == "float32" else ""
    twin = rows.get(str(Case(**{**asdict(case), "run": True})), {})
    ran = f"more than {MOST / 10**9:.0f} GB" if "over" in twin else ""
    if "resident" in twin:
        ran = f"{gib(twin['tensors'])} / {gib(twin['resident'])}"
    return [gib(row["weights"]), gib(row["tensors"]), gib(both), half, ran]


def table(found: Mapping[str, Any]) -> str:
    """All cases that are there, in GiB."""
    head = ["sampler", "side", "network in", "checkpointing", "tiles", "weights"]
    head += ["other tensors", "together", "half (derived)", "run: tensors / resident"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for case in COUNTED:
        if str(case) not in found["rows"]:
            continue
        tiles = f"{case.tile}²" if case.tile else "–"
        row = [f"`{case.sampler}`", str(case.size), case.precision]
        row += ["yes" if case.checkpointing else "–", tiles]
        lines.append(f"| {' | '.join(row + cells(case, found['rows']))} |")
    lines += [
        "",
        "GiB at the peak of one level for one image. Counted on a CPU's operations, in "
        "float32 or with the denoiser under bf16 autocast; the last column was run there, "
        "with random weights: tensors beside the weights, and by how much the resident "
        "memory grew. *Half* is derived, not measured: all weights and tensors at two "
        f"bytes for four. {found['date']}, {found['machine']}. Made by "
        "`python benchmarks/latent_memory.py`.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Make what is missing, and write the page's table."""
    parser = argparse.ArgumentParser(description="Memory of latent samplers.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=Path("docs/latent.md"))
    args = parser.parse_args()
    if args.one:
        bf16.CPU = True  # memory is counted as on a device that has it
        sys.stdout.write(json.dumps(one(Case(**json.loads(args.one)))))
        return
    found = run(args.results, [*COUNTED, *RUN])
    put(args.docs, table(found), BEGIN, END)


if __name__ == "__main__":
    main()
