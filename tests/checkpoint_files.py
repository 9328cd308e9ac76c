"""Tiny checkpoints in the families' own layouts, made by a rule and not by chance."""

import math
import pickle
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


def fill(shapes: Shapes, prefix: str = "") -> dict[str, Tensor]:
    """Weights 0.2 sin(0.7 i + φ), φ of the name: the same with every version of torch."""
    return {name: filled(prefix + name, shape) for name, shape in shapes.items()}


def filled(name: str, shape: tuple[int, ...]) -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    phase = zlib.crc32(name.encode()) % 1000
    return (0.2 * torch.sin(0.7 * i + phase)).reshape(shape).float()


def image(channels: int, sigma: Tensor, size: int = 16) -> Tensor:
    """Two images of about the spread of noise of these levels."""
    i = torch.arange(2 * channels * size**2, dtype=torch.float64)
    x = torch.sin(0.3 * i + 0.01 * i**1.5).reshape(2, channels, size, size).float()
    return x * (1 + sigma)[:, None, None, None]


def summary(x: Tensor) -> Tensor:
    """Five of its values, their mean and standard deviation."""
    flat = x.double().flatten()
    return torch.stack([*flat[:: len(flat) // 5][:5], flat.mean(), flat.std()])


# --- score_sde


def score_sde_shapes(
    *,
    width: int = 16,
    multiples: tuple[int, ...] = (1, 2),
    blocks: int = 1,
    attends: tuple[bool, ...] = (False, True),
    fourier: bool = True,
    residual: bool = True,
    channels: int = 1,
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an NCSN++'s weights, in their order."""
    modules: list[dict[str, tuple[int, ...]]] = []

    def plain(*weight: int) -> dict[str, tuple[int, ...]]:
        return {"weight": weight, "bias": (weight[0],)}

    def named(name: str, part: Shapes) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{k}": v for k, v in part.items()}

    def block(c_in: int, c_out: int, resamples: bool = False) -> None:
        parts = {
            "GroupNorm_0": plain(c_in),
            "Conv_0": plain(c_out, c_in, 3, 3),
            "Dense_0": plain(c_out, 4 * width),
            "GroupNorm_1": plain(c_out),
            "Conv_1": plain(c_out, c_out, 3, 3),
        }
        if c_in != c_out or resamples:
            parts["Conv_2"] = plain(c_out, c_in, 1, 1)
        modules.append({k: v for n, p in parts.items() for k, v in named(n, p).items()})

    def attention(c: int) -> None:
        parts = named("GroupNorm_0", plain(c))
        for i in range(4):
            parts |= {f"NIN_{i}.W": (c, c), f"NIN_{i}.b": (c,)}
        modules.append(parts)

    if fourier:
        modules.append({"W": (width,)})
    modules.append(plain(4 * width, 2 * width if fourier else width))
    modules.append(plain(4 * width, 4 * width))
    modules.append(plain(width, channels, 3, 3))
    c, c_image, skips = width, channels, [width]
    for level, multiple in enumerate(multiples):
        if level:
            block(c, c, resamples=True)
            if residual:
                modules.append(named("Conv2d_0", plain(c, c_image, 3, 3)))
                c_image = c
            skips.append(c)
        for _ in range(blocks):
            block(c, multiple * width)
            c = multiple * width
            skips.append(c)
            if attends[level]:
                attention(c)
    block(c, c)
    attention(c)
    block(c, c)
    for level in reversed(range(len(multiples))):
        for _ in range(blocks + 1):
            block(c + skips.pop(), multiples[level] * width)
            c = multiples[level] * width
        if attends[level]:
            attention(c)
        if level:
            block(c, c, resamples=True)
    modules += [plain(c), plain(channels, c, 3, 3)]
    return {
        f"all_modules.{i}.{name}": shape
        for i, module in enumerate(modules)
        for name, shape in module.items()
    }


def save_score_sde(path: Path, state: Mapping[str, Tensor], sigmas: Tensor) -> None:
    """score_sde's file: a model that is not the average, and the average as a list."""
    frozen = "all_modules.0.W"
    model = {"module.sigmas": sigmas} | {
        f"module.{k}": v if k == frozen else torch.full_like(v, 7.0)
        for k, v in state.items()
    }
    shadow = [v for k, v in state.items() if k != frozen]
    ema = {"decay": 0.999, "num_updates": 3, "shadow_params": shadow}
    optimizer = {"state": {}, "param_groups": []}
    torch.save({"optimizer": optimizer, "model": model, "ema": ema, "step": 5}, path)


# --- EDM


class Persistent(nn.Module):
    """Pickled as EDM's modules are: source, class name and state, to be made anew."""

    source, kind = "raise SystemExit('this must not run')", "UNetBlock"
    arguments: Mapping[str, Any]

    def __reduce__(self) -> Any:
        # The module stands in `sys.modules` only while a file is written.
        make = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        told = {"_init_args": (), "_init_kwargs": dict(self.arguments)}
        state = {k: v for k, v in self.__dict__.items() if k != "arguments"} | told
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": self.kind,
            "state": state,
        }
        return make, (meta,), None


def persistent(
    state: Mapping[str, Tensor], kind: str = "UNetBlock", **arguments: Any
) -> Persistent:
    """A tree of such modules with these weights; ``enc`` and ``dec`` are torch's own."""
    node = Persistent()
    node.kind, node.arguments = kind, arguments
    below: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = value
        elif value.is_floating_point() and head in ("weight", "bias"):
            node.register_parameter(head, nn.Parameter(value))
        else:
            node.register_buffer(head, value)
    for name, part in below.items():
        child: nn.Module = persistent(part)
        if name in ("enc", "dec"):
            child = nn.ModuleDict(dict(child.named_children()))
        node.add_module(name, child)
    return node


@contextmanager
def persistence() -> Iterator[None]:
    """A stand-in for the module of which EDM's pickles speak."""

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("read by executing it")

    name = "torch_utils.persistence"
    _reconstruct_persistent_obj.__module__ = name
    _reconstruct_persistent_obj.__qualname__ = _reconstruct_persistent_obj.__name__
    module = ModuleType(name)
    vars(module)["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    with mock.patch.dict(sys.modules, {name: module, "torch_utils": ModuleType("t")}):
        yield


def save_edm(path: Path, network: Persistent, protocol: int = 4, **more: Any) -> None:
    """EDM's file: a pickle of the averaged network and of what training needed."""
    with persistence(), path.open("wb") as file:
        pickle.dump({"ema": network, "loss_fn": None, **more}, file, protocol)
