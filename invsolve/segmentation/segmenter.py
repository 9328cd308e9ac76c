"""A trained segmenter: its network, what it was trained on, and its files."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Generator, Tensor, nn

from invsolve import io
from invsolve.io import Image
from invsolve.priors import Prior, UNet, UNetConfig
from invsolve.priors.families.family import filled
from invsolve.priors.reading import read_checkpoint
from invsolve.priors.unet import laid_out
from invsolve.priors.weights import sha256
from invsolve.random import randn_like, spawn
from invsolve.samplers import unconditional
from invsolve.samplers.core import Progress
from invsolve.samplers.solvers import DDIM
from invsolve.speed import Precision, accelerated

from .cases import SPACING_MM, Case, Modality, modalities_of, needed, prepared
from .masks import MaskPrior, Network
from .result import Segmentation

FAMILY = "mask-diffusion"
BUNDLED = Path(__file__).parent / "bundled"
DEFAULT = "petct-headneck"
WINDOW = 72
"""Voxels a side that the network sees at once unless its card or the caller says so."""
FEWEST_STEPS = 10
"""Below which modes come out with frequencies off by more than 3 %."""


@final
@dataclass(frozen=True, eq=False)
class Segmenter:
    """p(mask | scans) of any scans of its kind.

    Attributes:
        net: F, as `MaskPrior` tells of it.
        card: what its file says of it.
        multiple_of: what a side must be divisible by.
    """

    net: Network
    card: dict[str, Any]
    multiple_of: int

    @property
    def labels(self) -> tuple[str, ...]:
        """What the masks are of."""
        return tuple(self.card["labels"])

    @property
    def modalities(self) -> dict[str, Modality]:
        """Which scans it is shown (``ct``, ``pet``, ``mr``), and how."""
        return modalities_of(self.card["modalities"])

    @property
    def scans(self) -> dict[str, Modality]:
        """Which must be given, in this order."""
        return needed(self.modalities)

    @property
    def spacing_mm(self) -> float:
        """The side of a voxel that it sees."""
        return float(self.card.get("spacing_mm", SPACING_MM))

    @property
    def window(self) -> int:
        """Voxels a side that it sees at once unless asked otherwise."""
        return int(self.card.get("window", WINDOW))

    @property
    def exclusive(self) -> bool:
        """Whether a voxel has one label at most."""
        return bool(self.card.get("exclusive", False))

    def given(self, case: Case, window: int | None = None) -> MaskPrior:
        """p(mask | this patient's scans), for any sampler."""
        window = window or self.window
        return MaskPrior(
            self.net,
            case.shown(self.modalities),
            sigma_min=self.card["sigma_min"],
            sigma_max=self.card["sigma_max"],
            multiple_of=self.multiple_of,
            window=window // self.multiple_of * self.multiple_of,
            outside=[how.outside for how in self.modalities.values()],
            exclusive=self.exclusive,
        )


@final
class AcrossSlices(nn.Module):
    """A network of slices as one of volumes: each axial slice on its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor) -> Tensor:
        n, depth = x.shape[0], x.shape[2]
        flat = [v.movedim(2, 1).flatten(0, 1) for v in (x, condition)]
        out = self.net(flat[0], c_noise.repeat_interleave(depth), condition=flat[1])
        return out.unflatten(0, (n, depth)).movedim(1, 2)


@final
class Unaware(nn.Module):
    """F of the images alone: voxels are independent given them, as of a plain U-Net.

    Args:
        net: images ↦ logits of each label.
    """

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor) -> Tensor:
        return self.net(condition)


def build(network: UNetConfig) -> nn.Module:
    """The network that a card tells of, of slices or of volumes."""
    net = UNet(network)
    return AcrossSlices(net) if network.dims == 2 else net


def available() -> list[str]:
    """The names of the bundled segmenters."""
    return sorted(card.stem for card in BUNDLED.glob("*.json"))


def load(name_or_path: str | Path = DEFAULT) -> Segmenter:
    """A trained segmenter, by its name or by the path of its card (.json).

    Nothing in the files is executed.

    Raises:
        ValueError: the name is unknown, or a file is missing, damaged or of another kind.
    """
    path = BUNDLED / f"{name_or_path}.json"
    path = path if path.is_file() else Path(name_or_path)
    if path.is_dir():
        cards = sorted(path.glob("*.json"))
        path = cards[0] if len(cards) == 1 else path
    if not path.is_file() or path.suffix != ".json":
        raise ValueError(
            f"unknown segmenter {str(name_or_path)!r}: give a bundled name "
            f"({', '.join(available()) or 'none'}) or the path of a card (.json)"
        )
    try:
        card = json.loads(path.read_text("utf-8"))
        if card.get("family") != FAMILY:
            raise ValueError(f"its card is of the family {card.get('family')!r}")
        network = UNetConfig.from_dict(card["network"])
        file = path.with_suffix(".safetensors")
        if not file.is_file():
            raise ValueError(f"its weights are missing: there is no {file}")
        if sha256(file) != card["sha256"]:
            raise ValueError("the weights are not those the card describes (sha256)")
        state, _ = read_checkpoint(file)
        net = laid_out(filled(lambda: build(network), state))
        _ = [card[k] for k in ("labels", "sigma_min", "sigma_max")]
        modalities_of(card["modalities"])
    except ModuleNotFoundError:
        raise
    # A damaged card can make any of this raise anything at all.
    except Exception as error:
        first_line = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"cannot load the segmenter {path.stem}: {first_line}"
        ) from error
    return Segmenter(net, card, network.multiple_of)


def segment(
    *scans: Image,
    model: str | Path | Segmenter = DEFAULT,
    samples: int = 4,
    steps: int = 20,
    window: int | None = None,
    chunk: int = 1,
    generator: Generator,
    device: torch.device | None = None,
    precision: Precision = "float32",
    progress: Progress = iter,
) -> Segmentation:
    """Draws of the mask given scans, by DDIM: m ~ p(m | scans).

    They are brought to the model's grid by where they lie in millimetres; the result is
    on that grid, and `Segmentation.on` brings it to a scan's own.

    Args:
        scans: those of `Segmenter.scans`, in order: of ``petct-headneck`` a CT in HU and
            a PET in SUV, of one of brain tissues an MR.
        model: a segmenter, or the name or path of one.
        samples: how many draws.
        steps: of DDIM, at least 10.
        window: voxels a side that the network sees at once, the model's own unless
            given; less takes less memory.
        chunk: draws side by side.
        generator: of the draws, each of which has a stream of its own.
        device: where; the CPU unless given.
        precision: of the network's passes, ``float32`` or ``bf16`` (`invsolve.solve`).
        progress: wraps the loop over chunks, as ``tqdm`` does.

    Raises:
        ValueError: there are more scans or fewer, they are not of one place or not in
            these units, or a number is out of range.
    """
    segmenter = model if isinstance(model, Segmenter) else load(model)
    kinds = segmenter.scans
    check_scans(len(scans), segmenter)
    given = dict(zip(kinds, scans, strict=True))
    case = prepared(given, kinds, segmenter.spacing_mm)
    return segment_case(
        case,
        segmenter,
        samples=samples,
        steps=steps,
        window=window,
        chunk=chunk,
        generator=generator,
        device=device,
        precision=precision,
        progress=progress,
    )


def check_scans(n: int, segmenter: Segmenter) -> None:
    """Raises ValueError unless there are as many scans as the model needs."""
    kinds = [kind.upper() for kind in segmenter.scans]
    if n != len(kinds):
        raise ValueError(
            f"this model needs {len(kinds)} scan{'s' if len(kinds) > 1 else ''}, "
            f"{' and '.join(kinds)} in this order, got {n}"
        )


def segment_case(
    case: Case,
    segmenter: Segmenter,
    *,
    samples: int = 4,
    steps: int = 20,
    window: int | None = None,
    chunk: int = 1,
    generator: Generator,
    device: torch.device | None = None,
    precision: Precision = "float32",
    progress: Progress = iter,
) -> Segmentation:
    """`segment` of scans that are on the networks' grid already."""
    for name, value, least in (
        ("samples", samples, 1),
        ("chunk", chunk, 1),
        ("steps", steps, FEWEST_STEPS),
        ("window", window or segmenter.window, segmenter.multiple_of),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if min(case.grid.shape) < segmenter.multiple_of:
        raise ValueError(
            f"the body is {case.grid.shape} voxels of {segmenter.spacing_mm:g} mm, less "
            f"than the network's {segmenter.multiple_of}: give a larger part of it"
        )
    start = time.perf_counter()
    given = segmenter.given(case, window)
    given = given if device is None else given.to(device)
    prior = accelerated(given, precision, compile=False)
    like = torch.zeros(1, len(segmenter.labels), *case.grid.shape, device=device)
    streams = spawn(generator, samples)
    with torch.no_grad():
        expected = probability(prior, like, spawn(generator, 1)[0])
        draws: list[Tensor] = []
        for at in progress(range(0, samples, chunk)):
            part = streams[at : at + chunk]
            m = unconditional(
                prior,
                like.expand(len(part), *like.shape[1:]),
                steps=steps,
                solver=DDIM(),
                generator=part,
            )
            draws.append((1 + m.cpu()) / 2)
    return Segmentation(
        torch.cat(draws),
        expected[0].cpu(),
        case.grid,
        segmenter.labels,
        segmenter.card,
        passes=1 + samples * steps,
        seconds=time.perf_counter() - start,
    )


@torch.no_grad()
def probability(prior: Prior, like: Tensor, generator: Generator) -> Tensor:
    """P(m = 1 | scans) by one pass: (1 + D)/2 at the highest level, of noise alone."""
    highest = torch.tensor(prior.sigma_max, device=like.device)
    noise = highest * randn_like(like, generator)
    return (1 + prior.denoise(noise, highest)) / 2


def save(
    net: nn.Module, network: UNetConfig, out: Path, name: str, **said: Any
) -> Path:
    """Write ``NAME.safetensors`` (float16) and its card, each whole or not at all."""
    from safetensors.torch import save_file

    weights = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    file = out / f"{name}.safetensors"
    io.replace(file, lambda path: save_file(weights, path))
    card = {
        "name": name,
        "family": FAMILY,
        "network": network.to_dict(),
        **said,
        "sha256": sha256(file),
    }
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    path = out / f"{name}.json"
    io.replace(path, lambda p: Path(p).write_text(text, "utf-8"))
    return path
