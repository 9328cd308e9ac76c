"""The checkpoints of score_sde (DiffusionMBIR's among them) and of EDM, on one U-Net.

Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations*,
ICLR 2021; Chung et al., *Solving 3D Inverse Problems using Pre-trained 2D Diffusion
Models*, CVPR 2023 (DiffusionMBIR); Karras et al., *Elucidating the Design Space of
Diffusion-Based Generative Models*, NeurIPS 2022 (EDM).
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base import Affine, AffineMap, Prior
from ..networks.conditional import AtClass
from ..networks.song import SongConfig, SongUNet
from ..parameterisation import DiscretePrior, EDMPrior
from .family import Card, Family, State, filled, finished, overridden
from .sde import VEPrior, VPPrior

EDM, SCORE_SDE = "edm", "score-sde"
PRECONDITIONING = {
    "EDMPrecond": "edm",
    "VEPrecond": "ve",
    "VPPrecond": "vp",
    "iDDPMPrecond": "iddpm",
}
FIR, BOX = (1.0, 3.0, 3.0, 1.0), (1.0, 1.0)


# --- EDM


def sniff_edm(state: State, card: Card) -> bool:
    """Whether these are the weights of one of EDM's U-Nets."""
    layers = {k.removeprefix("model.") for k in state}
    stems = any(re.fullmatch(r"enc\.\d+x\d+_conv\.weight", k) for k in layers)
    return card.get("family", EDM) == EDM and stems and "map_layer0.weight" in layers


def load_edm(state: State, card: Card) -> Prior:
    """The prior of an EDM checkpoint, on images in [−1, 1].

    The card may give ``preconditioning`` ("edm", "ve", "vp", "iddpm", or EDM's class of
    that name), ``arguments`` (that class's), ``class_label``, ``scale`` and ``offset``;
    and in ``network`` what `SongConfig` names. EDM's own pickles say all but the last.

    Raises:
        ValueError: the weights do not make such a U-Net, or the card is wrong.
    """
    state = {k.removeprefix("model."): v for k, v in state.items()}
    levels = state.pop("u", None)
    told = card.get("preconditioning")
    kind = PRECONDITIONING.get(str(told), "edm" if told is None else told)
    config, net, decisions = _network(state, card)
    net = _at_class(net, config, card, decisions)
    decisions.append(f"preconditioning {kind}" + " (assumed)" * (told is None))
    arguments = {k: v for k, v in card.get("arguments", {}).items() if v is not None}
    common = _common(config, decisions, "[-1, 1]")
    get = _numbers(arguments)
    match kind:
        case "edm":
            low, high = get("sigma_min", 0.0), get("sigma_max", math.inf)
            prior = EDMPrior(
                net,
                get("sigma_data", 0.5),
                low or 0.002,
                high if math.isfinite(high) else 80.0,
                **common,
            )
        case "ve":
            prior = VEPrior(
                net, get("sigma_min", 0.02), get("sigma_max", 100.0), **common
            )
        case "vp":
            low = get("beta_min", 0.1)
            prior = VPPrior(
                net,
                low,
                low + get("beta_d", 19.9),
                t_min=get("epsilon_t", 1e-5),
                steps=int(get("M", 1000.0)),
                **common,
            )
        case "iddpm":
            if levels is None:
                raise ValueError("the weights lack iDDPM's noise levels 'u'")
            # u falls to 0 at its end; step 0 is the least level above.
            alphas_cumprod = 1 / (1 + levels.double()[:-1].flip(0) ** 2)
            prior = DiscretePrior(net, alphas_cumprod, "eps", **common)
        case _:
            raise ValueError(
                f"unknown preconditioning {kind!r}: give 'edm', 've', 'vp' or 'iddpm'"
            )
    return finished(prior, card, decisions)


# --- score_sde


def sniff_score_sde(state: State, card: Card) -> bool:
    """Whether these are the weights of score_sde's NCSN++ or DDPM++."""
    first = {"all_modules.0.W", "all_modules.0.weight"}  # features, or a linear layer
    return card.get("family", SCORE_SDE) == SCORE_SDE and bool(first & state.keys())


def load_score_sde(state: State, card: Card) -> Prior:
    """The prior of a score_sde checkpoint.

    Its images are in [0, 1] where the SDE explodes the variance, in [−1, 1] where it
    preserves it. The card may give ``sde`` ("ve" or "vp"), ``centered`` (whether the
    images of a VE network are in [−1, 1]), ``sigma_min`` and ``sigma_max``, ``scale`` and
    ``offset``; and in ``network`` what `SongConfig` names.

    Raises:
        ValueError: the weights do not make such a U-Net, or the card is wrong.
    """
    sigmas = state.get("sigmas")
    fourier = "all_modules.0.W" in state
    state = renamed({k: v for k, v in state.items() if k != "sigmas"})
    config, net, decisions = _network(state, card)
    sde = card.get("sde", "ve" if fourier else "vp")
    assumed = " (assumed)" * ("sde" not in card)
    decisions.append(f"sde {sde}{assumed}")
    if sde == "vp":
        common = _common(config, decisions, "[-1, 1]")
        return finished(VPPrior(net, **common), card, decisions)
    if sde != "ve":
        raise ValueError(f"sde must be 've' or 'vp', got {sde!r}")
    if sigmas is None and not {"sigma_min", "sigma_max"} <= card.keys():
        raise ValueError(
            "the weights lack 'sigmas': give the card sigma_min, sigma_max"
        )
    ends = (0.0, 0.0) if sigmas is None else (float(sigmas[-1]), float(sigmas[0]))
    low, high = (
        float(card.get("sigma_min", ends[0])),
        float(card.get("sigma_max", ends[1])),
    )
    decisions.append(f"noise levels {low:g} … {high:g}")
    if not fourier and sigmas is None:
        raise ValueError(
            "the weights lack 'sigmas', by whose steps its network is told"
        )
    steps = None if fourier or sigmas is None else len(sigmas)
    if card.get("centered", False):
        common = _common(config, decisions, "[-1, 1]")
        prior = VEPrior(net, low, high, gain=1.0, steps=steps, **common)
        return finished(prior, card, decisions)
    # The network doubles its images to [−1, 1] at its door, where their noise is 2σ.
    common = _common(config, decisions, "[0, 1]")
    inner = VEPrior(net, 2 * low, 2 * high, steps=steps, **common)
    return finished(Affine(inner, AffineMap(0.5, 0.5)), card, decisions)


def renamed(state: State) -> dict[str, Tensor]:
    """The weights of score_sde's numbered modules under the names of `SongUNet`.

    Raises:
        ValueError: the modules do not follow one another as NCSN++'s and DDPM++'s do.
    """
    modules: list[dict[str, Tensor]] = []
    for name, value in state.items():
        found = re.fullmatch(r"all_modules\.(\d{1,4})\.([\w.]+)", name)
        if found is None:
            raise ValueError(f"the weights are not score_sde's: {name!r} is unknown")
        modules += [{} for _ in range(int(found[1]) + 1 - len(modules))]
        modules[int(found[1])][found[2]] = value
    kinds = [_kind(module) for module in modules]
    resampling = [
        kind == "block" and "Conv_2.weight" in m and _square(m["Conv_2.weight"])
        for kind, m in zip(kinds, modules, strict=True)
    ]
    levels = 1 + sum(resampling) // 2
    blocks, rest = divmod(
        kinds.count("block") - sum(resampling) - levels - 2, 2 * levels
    )
    if rest or sum(resampling) % 2 or blocks < 1:
        raise ValueError(
            "the weights are not NCSN++'s: its residual blocks do not add up"
        )
    new: dict[str, Tensor] = {}
    at = 0

    def here(kind: str) -> bool:
        return at < len(kinds) and kinds[at] == kind

    def take(kind: str, name: str) -> None:
        nonlocal at
        if not here(kind):
            seen = kinds[at] if at < len(kinds) else "nothing"
            raise ValueError(
                f"the weights are not NCSN++'s: its module {at} is {seen}, not {kind}"
            )
        for part, value in _parts(kind, modules[at]).items():
            new[f"{name}.{part}"] = value
        at += 1

    def block(name: str) -> None:
        take("block", name)
        if here("attention"):
            take("attention", name)

    def size(level: int) -> str:
        return "{0}x{0}".format(2 ** (levels - 1 - level))

    if here("features"):
        take("features", "map_noise")
    take("linear", "map_layer0")
    take("linear", "map_layer1")
    take("conv", f"enc.{size(0)}_conv")
    for level in range(levels):
        if level:
            take("block", f"enc.{size(level)}_down")
            if here("halving"):
                take("halving", f"enc.{size(level)}_aux_residual")
            elif here("combine"):
                take("combine", f"enc.{size(level)}_aux_skip")
        for i in range(blocks):
            block(f"enc.{size(level)}_block{i}")
    block(f"dec.{size(levels - 1)}_in0")
    take("block", f"dec.{size(levels - 1)}_in1")
    for level in reversed(range(levels)):
        if level < levels - 1:
            take("block", f"dec.{size(level)}_up")
        for i in range(blocks + 1):
            block(f"dec.{size(level)}_block{i}")
        if level == 0 or here("norm"):
            take("norm", f"dec.{size(level)}_aux_norm")
            take("conv", f"dec.{size(level)}_aux_conv")
    if at != len(modules):
        raise ValueError(f"the weights are not NCSN++'s: its module {at} is left over")
    return new


def _square(weight: Tensor) -> bool:
    return weight.shape[0] == weight.shape[1]


def _kind(module: dict[str, Tensor]) -> str:
    if "NIN_3.W" in module:
        return "attention"
    if {"GroupNorm_0.weight", "Conv_0.weight", "Conv_1.weight"} <= module.keys():
        return "block"
    if "Conv2d_0.weight" in module:
        return "halving"
    if "Conv_0.weight" in module:
        return "combine"
    if "W" in module:
        return "features"
    dims = module["weight"].ndim if "weight" in module else 0
    return {1: "norm", 2: "linear", 4: "conv"}.get(dims, "unknown")


BLOCK = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "affine",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
}


def _parts(kind: str, module: dict[str, Tensor]) -> dict[str, Tensor]:
    if kind == "features":
        return {"freqs": module["W"]}
    if kind == "block":
        new = {}
        for name, value in module.items():
            part, _, what = name.partition(".")
            new[f"{BLOCK.get(part, part)}.{what}"] = value
        return new
    if kind == "attention":
        # q, k and v of a channel come to lie side by side.
        weights = [module[f"NIN_{i}.W"].mT for i in range(3)]
        biases = [module[f"NIN_{i}.b"] for i in range(3)]
        return {
            "norm2.weight": module["GroupNorm_0.weight"],
            "norm2.bias": module["GroupNorm_0.bias"],
            "qkv.weight": torch.stack(weights, 1).flatten(0, 1)[..., None, None],
            "qkv.bias": torch.stack(biases, 1).flatten(),
            "proj.weight": module["NIN_3.W"].mT[..., None, None],
            "proj.bias": module["NIN_3.b"],
        }
    return {
        name.removeprefix("Conv2d_0.").removeprefix("Conv_0."): value
        for name, value in module.items()
    }


# --- both


def _network(state: State, card: Card) -> tuple[SongConfig, torch.nn.Module, list[str]]:
    """The network inferred from weights under `SongUNet`'s names, and what it is."""
    try:
        inferred = _inferred(state)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"the weights are no NCSN++ U-Net: they lack {error}"
        ) from error
    values = overridden(card, inferred)
    values |= {k: tuple(values[k]) for k in ("widths", "attention", "taps")}
    config = SongConfig(**values)
    if config.out_channels not in (config.channels, 2 * config.channels):
        raise ValueError(
            f"the network takes {config.channels} channels and gives "
            f"{config.out_channels}: it is conditional on further images, no prior"
        )
    # The filters' taps are in the configuration; augmentation is of training alone.
    left_out = ("resample_filter", "map_augment.weight")
    kept = {k: v for k, v in state.items() if not k.endswith(left_out)}
    net = filled(lambda: SongUNet(config), kept)
    names = {"song": "NCSN++/DDPM++ U-Net", "dhariwal": "ADM U-Net"}
    return (
        config,
        net,
        [
            f"{names[config.kind]}: widths {', '.join(map(str, config.widths))}; "
            f"{config.blocks} block(s) a level",
            f"{'Fourier' if config.fourier else 'sinusoidal'} features of the noise level, "
            f"{config.encoder} encoder, {config.decoder} decoder, "
            f"filter {', '.join(f'{t:g}' for t in config.taps)}",
        ],
    )


def _inferred(state: State) -> dict[str, Any]:
    pattern = re.compile(r"enc\.(\d+)x\d+_block0\.conv1\.weight")
    sizes = sorted(
        {int(m[1]) for k in state if (m := pattern.fullmatch(k))}, reverse=True
    )
    if [sizes[0] >> i for i in range(len(sizes))] != sizes:
        raise ValueError("the weights are no NCSN++ U-Net: its levels do not halve")
    names = [f"{n}x{n}" for n in sizes]
    stem = state[f"enc.{names[0]}_conv.weight"]
    song = "out_conv.weight" not in state
    out = f"dec.{names[0]}_aux_conv.weight" if song else "out_conv.weight"
    blocks = sum(
        f"enc.{names[0]}_block{i}.conv0.weight" in state for i in range(len(state))
    )
    encoder = "standard"
    for kind in ("skip", "residual"):
        if any(k.endswith(f"_aux_{kind}.weight") for k in state):
            encoder = kind
    filters = [v for k, v in state.items() if k.endswith("resample_filter")]
    if filters:
        taps = tuple(filters[0].float().sum((0, 1, 2)).tolist())
    else:
        taps = BOX if encoder == "standard" else FIR
    labels = state.get("map_label.weight")
    deepest = f"dec.{names[-1]}_aux_conv.weight"
    return {
        "kind": "song" if song else "dhariwal",
        "channels": stem.shape[1],
        "out_channels": len(state[out]),
        "resolution": sizes[0],
        "widths": tuple(len(state[f"enc.{n}_block0.conv1.weight"]) for n in names),
        "blocks": blocks,
        "attention": tuple(f"enc.{n}_block0.qkv.weight" in state for n in names),
        "stem": len(stem),
        "noise_channels": state["map_layer0.weight"].shape[1],
        "emb_channels": len(state["map_layer0.weight"]),
        "fourier": "map_noise.freqs" in state,
        "encoder": encoder,
        "decoder": "skip" if len(names) > 1 and deepest in state else "standard",
        "taps": taps,
        "classes": None if labels is None else labels.shape[1],
    }


def _at_class(
    net: torch.nn.Module, config: SongConfig, card: Card, decisions: list[str]
) -> torch.nn.Module:
    if config.classes is None:
        return net
    label = card.get("class_label")
    if label is None:
        decisions.append(
            f"none of its {config.classes} classes (class_label is not set)"
        )
        return net
    if not isinstance(label, int) or not 0 <= label < config.classes:
        raise ValueError(
            f"class_label must be one of 0 … {config.classes - 1}, got {label!r}"
        )
    decisions.append(f"class {label} of {config.classes} (card)")
    return AtClass(net, label)


def _common(config: SongConfig, decisions: list[str], span: str) -> dict[str, Any]:
    multiple = 2 ** (len(config.widths) - 1)
    decisions.append(
        f"images of {config.channels} channel(s) in {span}, sizes divisible by {multiple}"
    )
    return {"multiple_of": multiple, "channels": config.channels}


def _numbers(arguments: dict[str, Any]) -> Callable[[str, float], float]:
    def get(name: str, default: float) -> float:
        return float(arguments.get(name, default))

    return get


FAMILIES = (
    Family(EDM, sniff_edm, load_edm),
    Family(SCORE_SDE, sniff_score_sde, load_score_sde),
)
