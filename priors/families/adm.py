"""ADM: the checkpoints of guided-diffusion and of what was built on it.

Dhariwal & Nichol, *Diffusion Models Beat GANs on Image Synthesis*, NeurIPS 2021, and
Nichol & Dhariwal, *Improved Denoising Diffusion Probabilistic Models*, ICML 2021. Files
are flat state dicts. The number of attention heads, the order in which their channels
lie and the noise schedule are not in the weights: they are taken from the card, else
from the published model that the shapes are of, else from the published models' habit.
"""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..base import Prior
from ..networks.adm import ADMConfig, ADMUNet
from ..networks.conditional import AtClass
from ..parameterisation import DiscretePrior
from ..schedules import ddpm_alphas_cumprod
from .family import Card, Family, State, filled, finished, overridden

NAME = "adm"
SIGNATURE = {"input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight"}

# What the published models have otherwise than 64 channels a head, q, k and v of a head
# side by side, and a linear schedule: by their width, widths, blocks and classes.
PUBLISHED: dict[tuple[int, tuple[int, ...], int, int | None], dict[str, Any]] = {
    (192, (192, 384, 576, 768), 3, 1000): {
        "model": "ImageNet 64×64",
        "new_attention_order": True,
        "schedule": "cosine",
    },
    (256, (256, 256, 512, 768, 1024), 2, 1000): {
        "model": "ImageNet 128×128",
        "head_channels": None,
    },
}


def cosine_alphas_cumprod(steps: int = 1000) -> Float[Tensor, " steps"]:
    """ᾱ_t = Π (1 − β_s), β_s = min(1 − f(s+1)/f(s), 0.999), f(s) = cos²(π/2 (s/T+ε)/(1+ε)).

    With ε = 0.008: Nichol & Dhariwal 2021, eq. 17.
    """
    s = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    f = torch.cos(torch.pi / 2 * (s + 0.008) / 1.008) ** 2
    return (f[1:] / f[:-1]).clamp_min(0.001).cumprod(0)


def sniff(state: State, card: Card) -> bool:
    """Whether these are an ADM U-Net's weights."""
    return card.get("family", NAME) == NAME and state.keys() >= SIGNATURE


def load(state: State, card: Card) -> Prior:
    """The prior of an ADM U-Net, on images in [−1, 1].

    The card may give ``schedule`` ("linear" or "cosine"), ``steps``, ``predicts`` ("eps",
    "x0" or "v"), ``class_label`` (needed where the network is class-conditional),
    ``scale`` and ``offset``; and in ``network`` what `ADMConfig` names.

    Raises:
        ValueError: the weights do not make an ADM U-Net, or the card is wrong.
    """
    try:
        inferred, decisions = architecture(state)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"the weights are no ADM U-Net: {error} is amiss") from error
    known = {k: v for k, v in inferred.items() if k not in ("model", "schedule")}
    values = overridden(card, known)
    values |= {k: tuple(values[k]) for k in ("widths", "attention")}
    if "heads" in card.get("network", {}):
        values["head_channels"] = card["network"].get("head_channels")
    config = ADMConfig(**values)
    if config.out_channels not in (config.channels, 2 * config.channels):
        raise ValueError(
            f"the network takes {config.channels} channels and gives "
            f"{config.out_channels}: it is conditional on further images, no prior"
        )
    net = filled(lambda: ADMUNet(config), state)
    whence = "card" if "network" in card else inferred.get("model", "assumed")
    order = "new" if config.new_attention_order else "legacy"
    decisions.append(f"attention: {_heads(config)} in the {order} order ({whence})")
    if config.classes is not None:
        label = card.get("class_label")
        if not isinstance(label, int) or not 0 <= label < config.classes:
            raise ValueError(
                f"the network is conditional on {config.classes} classes: give the "
                f"card a class_label of 0 … {config.classes - 1}"
            )
        net = AtClass(net, label)
        decisions.append(f"class {label} of {config.classes} (card)")
    schedule = card.get("schedule", inferred.get("schedule", "linear"))
    steps = int(card.get("steps", 1000))
    if schedule not in ("linear", "cosine"):
        raise ValueError(f"schedule must be 'linear' or 'cosine', got {schedule!r}")
    alphas_cumprod = (
        ddpm_alphas_cumprod(steps, 0.1 / steps, 20 / steps)
        if schedule == "linear"
        else cosine_alphas_cumprod(steps)
    )
    predicts = card.get("predicts", "eps")
    if predicts not in ("eps", "x0", "v"):
        raise ValueError(f"predicts must be 'eps', 'x0' or 'v', got {predicts!r}")
    decisions.append(f"predicts {predicts} in {steps} steps, {schedule} schedule")
    if config.out_channels > config.channels:
        decisions.append("its learnt variance is left out")
    multiple = 2 ** (len(config.widths) - 1)
    decisions.append(
        f"images of {config.channels} channel(s) in [-1, 1], sizes divisible by {multiple}"
    )
    prior = DiscretePrior(
        net,
        alphas_cumprod,
        predicts,
        multiple_of=multiple,
        channels=config.channels,
    )
    return finished(prior, card, decisions)


def _heads(config: ADMConfig) -> str:
    if config.head_channels is None:
        return f"{config.heads} heads"
    return f"{config.head_channels} channels a head"


def architecture(state: State) -> tuple[dict[str, Any], list[str]]:
    """What the shapes tell, and what is assumed of the rest; and that in words."""
    stem = state["input_blocks.0.0.weight"]
    if stem.ndim != 4:
        raise ValueError(
            f"its images have {stem.ndim - 2} dimensions: only 2 are known"
        )
    period, resample = _period(state)
    count = _count(state, "output_blocks")
    if count % period:
        raise ValueError(
            f"the weights are no ADM U-Net: {count} blocks of its decoder do not make "
            f"levels of {period}"
        )
    firsts = range(1, count, period)  # the first residual block of each level
    widths = tuple(
        len(state[f"input_blocks.{i}.0.out_layers.3.weight"]) for i in firsts
    )
    emb = state["input_blocks.1.0.emb_layers.1.weight"]
    labels = state.get("label_emb.weight")
    attention = tuple(f"input_blocks.{i}.1.qkv.weight" in state for i in firsts)
    attended = [w for w, a in zip(widths, attention, strict=True) if a] + [widths[-1]]
    inferred = {
        "channels": stem.shape[1],
        "out_channels": len(state["out.2.weight"]),
        "width": state["time_embed.0.weight"].shape[1],
        "widths": widths,
        "blocks": period - 1,
        "attention": attention,
        "head_channels": 64 if all(w % 64 == 0 for w in attended) else None,
        "heads": 4,
        "new_attention_order": False,
        "scale_shift": len(emb) == 2 * widths[0],
        "resample": resample,
        "classes": None if labels is None else len(labels),
    }
    key = (inferred["width"], widths, period - 1, inferred["classes"])
    decisions = [
        f"ADM U-Net: widths {', '.join(map(str, widths))}; {period - 1} block(s) a level"
    ]
    if published := PUBLISHED.get(key):
        inferred |= published
        decisions.append(f"its shapes are those of the published {published['model']}")
    return inferred, decisions


def _period(state: State) -> tuple[int, str]:
    """Encoder blocks from one halving to the next, and how it halves."""
    pattern = re.compile(r"output_blocks\.(\d+)\.[12]\.(in_layers\.2|conv)\.weight")
    ups = {int(m[1]): m[2] for k in state if (m := pattern.fullmatch(k))}
    if ups:
        first = min(ups)
        return first + 1, "conv" if ups[first] == "conv" else "residual"
    # Pooling has no weights: it leaves gaps in the encoder's numbers. Or all is one level.
    count = _count(state, "output_blocks")
    there = {int(k.split(".")[1]) for k in state if k.startswith("input_blocks.")}
    return min(set(range(count)) - there, default=count), "pool"


def _count(state: State, blocks: str) -> int:
    numbers = [int(k.split(".")[1]) for k in state if k.startswith(blocks + ".")]
    if not numbers:
        raise ValueError(f"the weights are no ADM U-Net: they have no {blocks}")
    return 1 + max(numbers)


FAMILY = Family(NAME, sniff, load)
