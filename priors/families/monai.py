"""MONAI's `DiffusionModelUNet` in two and three dimensions: state dicts and bundles.

Cardoso et al., *MONAI: An open-source framework for deep learning in healthcare*, 2022;
Pinaya et al., *Generative AI for Medical Imaging: extending the MONAI Framework*, 2023.
A bundle's configuration may hold expressions, which MONAI runs. They are never run here:
where the value of one is needed, the card has to say it.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from ..base import Prior
from ..info import tell
from ..networks.adapters import Negative, Timed
from ..networks.conditional import AtClass
from ..parameterisation import DiscretePrior, FlowPrior
from .betas import alphas_cumprod
from .configs import read_json
from .family import Card, Family, State, filled, finished

NAME = "monai"
SIGNATURE = {"conv_in.conv.weight", "time_embed.0.weight", "out.2.conv.weight"}
NETWORK = "DiffusionModelUNet"
DISCRETE, FLOW = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"), "RFlowScheduler"
LATENT = ("AutoencoderKL", "VQVAE", "SPADEAutoencoderKL", "AutoencoderKlMaisi")
PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
CONFIGS = ("inference.json", "train.json")
REFERENCES = 20  # that follow one another; real bundles have two or three


# --- bundles


def find(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The weights of a bundle's folder, or file in its ``models``, and its card.

    Returns:
        None where there is no bundle's configuration.

    Raises:
        ValueError: the bundle is not of one image-space diffusion U-Net.
    """
    if path.is_file() and path.parent.name != "models":
        return None
    folder = path if path.is_dir() else path.parent.parent
    file = next((p for n in CONFIGS if (p := folder / "configs" / n).is_file()), None)
    if file is None:
        return None
    bundle = read_json(file)
    parts = list(_targets(bundle))
    kinds = [kind for kind, _ in parts]
    if latent := next((kind for kind in kinds if kind in LATENT), None):
        raise ValueError(f"it is a latent model: its {file.name} has an {latent}")
    if kinds.count(NETWORK) != 1:
        raise ValueError(
            f"its {file.name} has {kinds.count(NETWORK)} {NETWORK}s, and needs one"
        )
    card: dict[str, Any] = {"family": NAME, "bundle": bundle}
    card["network"] = dict(parts[kinds.index(NETWORK)][1])
    schedulers = [part for kind, part in parts if kind in (*DISCRETE, FLOW)]
    if schedulers:
        card["scheduler"] = dict(schedulers[0])
    if path.is_file():
        return path, card
    weights = [
        p for p in (folder / "models").glob("*.*") if p.suffix in (".pt", ".pth")
    ]
    weights = [p for p in weights if p.name == "model.pt"] or weights
    if len(weights) != 1:
        raise ValueError(
            f"{folder / 'models'} has {len(weights)} files of weights: name the one to load"
        )
    return weights[0], card


def _targets(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # A configuration's parts name the class they are of: MONAI's own are known by name.
    if isinstance(content, Mapping):
        target = content.get("_target_")
        if isinstance(target, str) and target.split(".")[0] in ("monai", "generative"):
            yield target.split(".")[-1], content
        for value in content.values():
            yield from _targets(value)
    elif isinstance(content, list):
        for value in content:
            yield from _targets(value)


def literal(value: Any, bundle: Mapping[str, Any], name: str) -> Any:
    """The value of a bundle's entry, its references followed.

    Raises:
        ValueError: it is an expression, or refers to one or to nothing.
    """
    for _ in range(REFERENCES):
        if isinstance(value, list):
            return [literal(v, bundle, name) for v in value]
        if not isinstance(value, str):
            return value
        if value.startswith("$"):
            raise ValueError(
                f"the bundle's {name!r} is the expression {value[:60]!r}, which is not "
                "run: give the card its value"
            )
        if not value.startswith("@"):
            return value
        at: Any = bundle
        for part in re.split("#|::", value[1:]):
            if isinstance(at, list) and part.isdecimal() and int(part) < len(at):
                at = at[int(part)]
            elif isinstance(at, Mapping) and part in at:
                at = at[part]
            else:
                raise ValueError(
                    f"the bundle's {name!r} refers to {value[:60]!r}, which is not there"
                )
        value = at
    raise ValueError(f"the bundle's {name!r} refers to itself")


# --- the prior


def sniff(state: State, card: Card) -> bool:
    """Whether these are the weights of MONAI's `DiffusionModelUNet`."""
    return card.get("family", NAME) == NAME and state.keys() >= SIGNATURE


def load(state: State, card: Card) -> Prior:
    """The prior of a `DiffusionModelUNet`, on images in [0, 1] unless the card scales them.

    The card's ``network`` is what that class is made with, its ``scheduler`` a MONAI
    scheduler's arguments; `find` takes both from a bundle. What the weights do not tell
    must be there: ``num_head_channels``, and ``norm_num_groups`` where it is not 32. The
    card may also give ``predicts`` ("eps", "v" or "x0"), ``class_label``, ``scale`` and
    ``offset``.

    Raises:
        ValueError: the weights do not make such a U-Net, or the card is wrong.
        ModuleNotFoundError: MONAI is not installed.
    """
    state = {_renamed(k): v for k, v in state.items()}
    try:
        inferred = architecture(state)
    except (KeyError, IndexError) as error:
        raise ValueError(f"the weights are no {NETWORK}: they lack {error}") from error
    bundle: Mapping[str, Any] = card.get("bundle", {})
    arguments, decisions = _arguments(card.get("network", {}), bundle, inferred)
    channels, given = inferred["in_channels"], inferred["out_channels"]
    if given not in (channels, 2 * channels):
        raise ValueError(
            f"the network takes {channels} channels and gives {given}: it is conditional "
            "on further images, no prior"
        )
    net: nn.Module = _Net(filled(lambda: _make(arguments), state))
    if (classes := inferred["num_class_embeds"]) is not None:
        label = card.get("class_label")
        if not isinstance(label, int) or not 0 <= label < classes:
            raise ValueError(
                f"the network is conditional on {classes} classes: give the card a "
                f"class_label of 0 … {classes - 1}"
            )
        net = AtClass(net, label)
        decisions.append(f"class {label} of {classes} (card)")
    common = {"multiple_of": 2 ** (len(inferred["channels"]) - 1), "channels": channels}
    prior = _prior(net, card, bundle, common, decisions)
    tell(prior, range=(0.0, 1.0))
    space = "images" if inferred["spatial_dims"] == 2 else "volumes"
    decisions.append(
        f"{space} of {channels} channel(s) in [0, 1] (assumed), sizes divisible by "
        f"{common['multiple_of']}"
    )
    return finished(prior, card, decisions)


@final
class _Net(nn.Module):
    """MONAI's network as (x, t) ↦ image."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.unet(x, t, class_labels=label)


def _renamed(name: str) -> str:
    """As MONAI calls what the earlier MONAI Generative Models called otherwise."""
    name = re.sub(r"(attentions\.\d+|attention)\.to_([qkv])\.", r"\1.attn.to_\2.", name)
    name = re.sub(
        r"(attentions\.\d+|attention)\.proj_attn\.", r"\1.attn.out_proj.", name
    )
    return name.replace(".upsampler.conv.conv.", ".upsampler.postconv.conv.")


def architecture(state: State) -> dict[str, Any]:
    """What the names and shapes tell of the network."""
    if any("transformer_blocks" in k for k in state):
        raise ValueError("the network is conditional on a context, no prior")
    stem = state["conv_in.conv.weight"]
    blocks = [re.match(r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv1", k) for k in state]
    at = {(int(m[1]), int(m[2])) for m in blocks if m and len(m[0]) < 60}
    levels = 1 + max(level for level, _ in at) if at else 0
    if not 1 <= levels <= 20:
        raise ValueError(f"the weights are no {NETWORK}: they have {levels} levels")
    first = "down_blocks.{}.resnets.0.conv1.conv.weight"
    labels = state.get("class_embedding.weight")
    attention = "middle_block.attention.attn."
    return {
        "spatial_dims": stem.ndim - 2,
        "in_channels": stem.shape[1],
        "out_channels": len(state["out.2.conv.weight"]),
        "num_res_blocks": tuple(sum(i == n for i, _ in at) for n in range(levels)),
        "channels": tuple(len(state[first.format(i)]) for i in range(levels)),
        "attention_levels": tuple(
            any(k.startswith(f"down_blocks.{i}.attentions.") for k in state)
            for i in range(levels)
        ),
        "resblock_updown": "down_blocks.0.downsampler.conv1.conv.weight" in state,
        "num_class_embeds": None if labels is None else len(labels),
        "include_fc": f"{attention}out_proj.weight" in state,
        "use_combined_linear": f"{attention}qkv.weight" in state,
    }


def _arguments(
    given: Mapping[str, Any], bundle: Mapping[str, Any], inferred: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    given = {k: v for k, v in given.items() if not k.startswith("_")}
    if "num_channels" in given:  # its earlier name
        given["channels"] = given.pop("num_channels")
    known = inspect.signature(_network_class().__init__).parameters.keys()
    if unknown := sorted(given.keys() - known):
        raise ValueError(
            f"the network entry {unknown[0]!r} is unknown to MONAI's {NETWORK}"
        )
    # What the weights tell themselves need not be read from the bundle.
    told = {k: literal(v, bundle, k) for k, v in given.items() if k not in inferred}
    if "num_head_channels" not in told:
        raise ValueError(
            "the weights do not tell how many channels an attention head has: give the "
            'card {"network": {"num_head_channels": …}}'
        )
    groups = told.setdefault("norm_num_groups", 32)
    widths = ", ".join(map(str, inferred["channels"]))
    blocks = ", ".join(map(str, inferred["num_res_blocks"]))
    decisions = [
        f"{NETWORK} in {inferred['spatial_dims']} dimensions: widths {widths}; {blocks} "
        "block(s) a level",
        f"attention: {told['num_head_channels']} channels a head; {groups} groups"
        + " (assumed)" * ("norm_num_groups" not in given),
    ]
    return {**inferred, **told}, decisions


def _network_class() -> Any:
    try:
        from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
    except ImportError as error:
        raise ModuleNotFoundError(
            "MONAI's networks need MONAI: pip install 'invsolve[monai]'"
        ) from error
    return DiffusionModelUNet


def _make(arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return _network_class()(**arguments)
    except Exception as error:  # whatever the numbers break in MONAI
        why = str(error).split("\n")[0]
        raise ValueError(f"MONAI cannot make its U-Net: {why}") from error


def _prior(
    net: nn.Module,
    card: Card,
    bundle: Mapping[str, Any],
    common: dict[str, Any],
    decisions: list[str],
) -> Prior:
    scheduler: Mapping[str, Any] = card.get("scheduler", {})
    kind = str(scheduler.get("_target_", "")).split(".")[-1]

    def get(name: str, default: Any) -> Any:
        return literal(scheduler.get(name, default), bundle, name)

    steps = int(get("num_train_timesteps", 1000))
    if kind == FLOW:
        decisions.append(f"{kind}: a rectified flow, told its time times {steps}")
        # MONAI's flow runs from noise to image: v = x₀ − n.
        return FlowPrior(Negative(Timed(net, float(steps))), **common)
    schedule = str(get("schedule", "linear_beta"))
    abar = alphas_cumprod(
        schedule.removesuffix("_beta"),
        steps,
        float(get("beta_start", 1e-4)),
        float(get("beta_end", 0.02)),
    )
    told = str(get("prediction_type", "epsilon"))
    predicts = card.get("predicts", PREDICTS.get(told, told))
    if predicts not in PREDICTS.values():
        raise ValueError(f"predicts must be 'eps', 'v' or 'x0', got {predicts!r}")
    decisions.append(
        f"{kind or 'no scheduler'}: predicts {predicts} in {steps} steps, {schedule} "
        "schedule" + " (assumed)" * (not scheduler)
    )
    return DiscretePrior(net, abar, predicts, **common)


FAMILY = Family(NAME, sniff, load)
