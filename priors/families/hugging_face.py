"""diffusers' folders of a `UNet2DModel`: weights, and configurations that say the rest.

Ho et al. 2020 and Song et al. 2021 (DDPM, DDIM), Karras et al. 2022 (EDM), Liu et al. 2023
and Esser et al. 2024 (rectified flows), Song et al. 2021 (variance-exploding SDEs). The
network is diffusers' own class, made from the numbers in ``config.json``.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from ..base import Prior
from ..info import tell
from ..networks.adapters import Negative, ScaledScore, Timed
from ..networks.conditional import AtClass
from ..parameterisation import DiscretePrior, EDMPrior, FlowPrior
from .betas import alphas_cumprod, of_betas, without_terminal_signal
from .configs import read_json
from .family import Card, Family, State, filled, finished
from .sde import VEPrior

NAME = "diffusers"
SIGNATURE = {"conv_in.weight", "time_embedding.linear_1.weight", "conv_out.weight"}
PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"squaredcos_cap_v2": "cosine"}  # what diffusers calls otherwise than we do
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)
UNETS, LATENT = ("unet_ema", "unet"), ("vae", "vqvae", "movq")
# How attention was spelt when the first models were published.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# --- folders


def is_latent(path: Path) -> bool:
    """Whether it is the folder of a latent diffusion model with an autoencoder."""
    return all((path / n / "config.json").is_file() for n in ("vae", "unet"))


def find(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The weights of a diffusers folder, or file in it, and the card its files make.

    Returns:
        None where there is no such configuration.

    Raises:
        ValueError: it is a folder of diffusers', but not of one image-space U-Net.
    """
    folder = path if path.is_dir() else path.parent
    inside = (path / name for name in UNETS)
    if path.is_dir() and not (path / "config.json").is_file():
        folder = next((f for f in inside if (f / "config.json").is_file()), path)
    if not (folder / "config.json").is_file():
        if (path / "model_index.json").is_file():
            raise ValueError(
                f"it has no U-Net: there is no {path / 'unet/config.json'}"
            )
        return None
    whole = folder.parent if folder.name in UNETS else folder
    if latent := next((n for n in LATENT if (whole / n).is_dir()), None):
        raise ValueError(
            f"it is of a latent model: beside its U-Net there is a {latent!r}"
        )
    config = read_json(folder / "config.json")
    if "_class_name" not in config:
        return None
    card: dict[str, Any] = {"family": NAME, "network": config}
    places = (
        folder / "scheduler_config.json",
        folder / "scheduler" / "scheduler_config.json",
        folder.parent / "scheduler" / "scheduler_config.json",
        folder.parent / "scheduler_config.json",
    )
    if scheduler := next((p for p in places if p.is_file()), None):
        card["scheduler"] = read_json(scheduler)
    if path.is_file():
        return path, card
    weights = next((folder / n for n in WEIGHTS if (folder / n).is_file()), None)
    if weights is None:
        raise ValueError(
            f"there are no weights in {folder}: looked for {WEIGHTS[0]} or {WEIGHTS[1]}"
        )
    return weights, card


# --- the prior


def sniff(state: State, card: Card) -> bool:
    """Whether these are the weights of diffusers' `UNet2DModel`."""
    return card.get("family", NAME) == NAME and state.keys() >= SIGNATURE


def load(state: State, card: Card) -> Prior:
    """The prior of a `UNet2DModel`, on images in [−1, 1].

    The card's ``network`` is the model's configuration, its ``scheduler`` the scheduler's;
    `find` takes both from the folder. It may also give ``predicts`` ("eps", "v" or "x0"),
    ``class_label`` (needed where the network is class-conditional), ``scale`` and
    ``offset``.

    Raises:
        ValueError: the weights are not the configuration's, or one of the two
            configurations is missing, unknown, or of a model of something else than images.
    """
    if "network" not in card:
        raise ValueError(
            "it needs its config.json: load the folder, or give the card its entries as "
            "'network'"
        )
    config = card["network"]
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"it is a {kind}: of diffusers' only UNet2DModel is known")
    decisions: list[str] = []
    arguments = _arguments(config, state, decisions)
    net, channels = _network(arguments, state)
    if arguments.get("num_class_embeds") is not None:
        net = _at_class(net, arguments["num_class_embeds"], card)
        decisions.append(f"class {card['class_label']} (card)")
    levels = len(arguments["block_out_channels"])
    common = {"multiple_of": 2 ** (levels - 1), "channels": channels}
    centred = arguments.get("center_input_sample", False)
    prior = _prior(net, card, common, decisions)
    # The network maps [0, 1] to [−1, 1] at its door where it centres its input.
    tell(prior, range=(0.0 if centred else -1.0, 1.0))
    decisions.append(
        f"images of {channels} channel(s) in {'[0, 1]' if centred else '[-1, 1]'}, sizes "
        f"divisible by {common['multiple_of']}"
    )
    return finished(prior, card, decisions)


@final
class _UNet(nn.Module):
    """diffusers' network as (x, t) ↦ image."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.unet(x, t, class_labels=label, return_dict=False)[0]


def _arguments(
    config: Mapping[str, Any], state: State, decisions: list[str]
) -> dict[str, Any]:
    from diffusers.models.unets.unet_2d import UNet2DModel

    known = inspect.signature(UNet2DModel.__init__).parameters.keys() - {"self"}
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    if unknown := sorted(given.keys() - known):
        decisions.append(f"left out of its config: {', '.join(unknown)} (unknown)")
    given = {k: v for k, v in given.items() if k in known}
    widths, layers = given.get("block_out_channels"), given.get("layers_per_block", 2)
    numbers = (*widths, layers) if isinstance(widths, list | tuple) else ()
    if not widths or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError("its config lacks block_out_channels, or they are no numbers")
    if given.get("class_embed_type") is not None:
        raise ValueError(
            f"the network is conditional on a {given['class_embed_type']!r}, no prior"
        )
    if layers * len(widths) > len(state):  # or making it would not end
        raise ValueError(f"its config has {layers} layers a block, the weights fewer")
    shown = ", ".join(map(str, widths))
    decisions.insert(0, f"UNet2DModel: widths {shown}; {layers} block(s) a level")
    return given


def _network(arguments: Mapping[str, Any], state: State) -> tuple[nn.Module, int]:
    from diffusers.models.unets.unet_2d import UNet2DModel

    def make() -> nn.Module:
        try:
            return UNet2DModel(**arguments)
        except Exception as error:  # whatever its numbers break in diffusers
            why = str(error).split("\n")[0]
            raise ValueError(f"diffusers cannot make its U-Net: {why}") from error

    channels = state["conv_in.weight"].shape[1]
    given = len(state["conv_out.weight"])
    if given not in (channels, 2 * channels):
        raise ValueError(
            f"the network takes {channels} channels and gives {given}: it is conditional "
            "on further images, no prior"
        )
    net = filled(make, {_renamed(k): v for k, v in state.items()})
    return _UNet(net), channels


def _renamed(name: str) -> str:
    pattern = r"(.*attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)"
    found = re.fullmatch(pattern, name)
    return name if found is None else f"{found[1]}{RENAMED[found[2]]}.{found[3]}"


def _at_class(net: nn.Module, classes: Any, card: Card) -> nn.Module:
    label = card.get("class_label")
    if not isinstance(label, int) or not 0 <= label < classes:
        raise ValueError(
            f"the network is conditional on {classes} classes: give the card a "
            f"class_label of 0 … {classes - 1}"
        )
    return AtClass(net, label)


def _prior(
    net: nn.Module, card: Card, common: dict[str, Any], decisions: list[str]
) -> Prior:
    scheduler: Mapping[str, Any] = card.get("scheduler", {})
    kind = str(scheduler.get("_class_name", ""))
    told = scheduler.get("prediction_type", "epsilon")
    steps = int(scheduler.get("num_train_timesteps", 1000))
    if kind.startswith("EDM"):
        if told not in ("epsilon", "v_prediction"):
            raise ValueError(f"{kind}'s prediction_type {told!r} is unknown")
        if told == "v_prediction":  # c_out has the other sign
            net = Negative(net)
        low, high = scheduler.get("sigma_min", 0.002), scheduler.get("sigma_max", 80.0)
        decisions.append(f"{kind}: EDM's preconditioning of {told}")
        data = float(scheduler.get("sigma_data", 0.5))
        return EDMPrior(net, data, float(low), float(high), **common)
    if kind.startswith("FlowMatch") or told == "flow_prediction":
        decisions.append(f"{kind}: a rectified flow, told its time times {steps}")
        return FlowPrior(Timed(net, float(steps)), **common)
    if kind == "ScoreSdeVeScheduler":
        low, high = scheduler.get("sigma_min", 0.01), scheduler.get("sigma_max", 1348.0)
        decisions.append(f"{kind}: predicts the score at levels {low:g} … {high:g}")
        return VEPrior(ScaledScore(net), float(low), float(high), gain=1.0, **common)
    betas = ("beta_schedule", "beta_start", "trained_betas")
    if kind and not any(name in scheduler for name in betas):
        raise ValueError(f"its scheduler {kind} is unknown: it names no noise schedule")
    predicts = card.get("predicts", PREDICTS.get(told, told))
    if predicts not in PREDICTS.values():
        raise ValueError(f"predicts must be 'eps', 'v' or 'x0', got {predicts!r}")
    schedule = str(scheduler.get("beta_schedule", "linear"))
    abar = _alphas_cumprod(scheduler, SCHEDULES.get(schedule, schedule), steps)
    decisions.append(
        f"{kind or 'no scheduler_config.json'}: predicts {predicts} in {steps} steps, "
        f"{schedule} schedule" + " (assumed)" * (not kind)
    )
    if scheduler.get("rescale_betas_zero_snr"):
        abar = without_terminal_signal(abar)
        decisions.append("rescaled to zero terminal SNR; its last step is left out")
    return DiscretePrior(net, abar, predicts, **common)


def _alphas_cumprod(scheduler: Mapping[str, Any], schedule: str, steps: int) -> Tensor:
    if (trained := scheduler.get("trained_betas")) is not None:
        return of_betas([float(b) for b in trained])
    low, high = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    return alphas_cumprod(schedule, steps, float(low), float(high))


FAMILY = Family(NAME, sniff, load)
