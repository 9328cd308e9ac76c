"""Checkpoints read as data: tensors and plain facts, nothing of the file is ever run."""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import Tensor

State = dict[str, Tensor]

EMA = (
    "ema",
    "ema_state_dict",
    "model_ema",
    "state_dict_ema",
    "ema_model",
    "params_ema",
)
WRAPPERS = ("state_dict", "model_state_dict", "model", "params", "network", "net")
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "model.")
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
NESTING = 64  # of modules and dictionaries; real networks stay below ten


def read_checkpoint(path: str | Path) -> tuple[State, dict[str, Any]]:
    """The weights in a checkpoint, and what the file says of them.

    Known are safetensors, `torch.save`'s files (new and old) and the pickles of EDM
    (Karras et al. 2022), which carry modules and their source: tensors and arguments are
    taken from them, the source is not run. Of several sets of weights the moving average
    is taken, and prefixes that all names share (``module.`` …) are dropped.

    Args:
        path: the file.

    Returns:
        The state dict on the CPU, in the file's own precision, and facts:

        - ``container``: "safetensors", "torch" or "edm"
        - ``took``: which of the file's weights these are, in words
        - ``metadata``: of safetensors
        - ``preconditioning``, ``arguments``: the class of an EDM network, and the
          arguments it was made with

    Raises:
        ValueError: the file is missing, truncated or of another kind; it asks for code;
            or a tensor is not finite, not dense, or larger than the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
        facts: dict[str, Any] = {}
        if head.startswith(b"PK\x03\x04") or head.startswith(LEGACY_TORCH):
            facts["container"] = "torch"
            content = torch.load(path, map_location="cpu", weights_only=True)
            state, took = unwrap(content)
        # The length of its header may begin with a pickle's first byte.
        elif head[4:8] == bytes(4) and head[8:9] == b"{":
            facts["container"] = "safetensors"
            state, facts["metadata"] = _read_safetensors(path)
            state, took = unwrap(state)
        elif head.startswith(b"\x80"):
            facts["container"] = "edm"
            state, took, told = _read_edm(path)
            facts.update(told)
        else:
            raise ValueError(
                "it is no safetensors, no torch.save file and no EDM pickle"
            )
        facts["took"] = "; ".join(took) or "all its weights"
        _check(state, path.stat().st_size)
        return state, facts
    # A damaged file can make its parsers raise anything at all.
    except Exception as error:
        raise ValueError(f"cannot read the checkpoint {path}: {_why(error)}") from error


def unwrap(content: Any) -> tuple[State, list[str]]:
    """The weights within nested dictionaries, the moving average where there is one.

    Returns:
        The state dict without the prefixes that all its names share, and, in words,
        what was taken and dropped.
    """
    took: list[str] = []
    for _ in range(NESTING):
        if not isinstance(content, Mapping):
            raise ValueError(f"it holds a {type(content).__name__}, not named weights")
        if (averaged := _score_sde_average(content)) is not None:
            content = averaged
            took.append("the moving average (ema.shadow_params)")
            break
        name = next(
            (k for k in (*EMA, *WRAPPERS) if _has_weights(content.get(k))), None
        )
        if name is None:
            break
        content = content[name]
        took.append(
            f"its entry {name!r}" + (" (moving average)" if name in EMA else "")
        )
    state = {
        k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)
    }
    if not state:
        names = ", ".join(str(k)[:40] for k in list(content)[:5]) or "nothing"
        raise ValueError(f"it holds no weights, only {names}")
    # A file that holds the network beside its average, as flat names.
    if any(k.startswith("ema_model.") for k in state):
        state = {k: v for k, v in state.items() if k.startswith("ema_model.")}
        took.append("the moving average (ema_model.*)")
    while prefix := next(
        (p for p in PREFIXES if all(k.startswith(p) for k in state)), None
    ):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
        took.append(f"without the prefix {prefix!r}")
    return state, took


def _has_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and (
        any(isinstance(v, Tensor) for v in value.values())
        or any(isinstance(value.get(k), Mapping) for k in (*EMA, *WRAPPERS))
    )


def _score_sde_average(content: Mapping[Any, Any]) -> State | None:
    # score_sde keeps its average as a bare list of the trained parameters, in order.
    ema, model = content.get("ema"), content.get("model")
    if not isinstance(ema, Mapping) or not isinstance(model, Mapping):
        return None
    shadow = ema.get("shadow_params")
    if not isinstance(shadow, list):
        return None
    frozen = ("sigmas", "all_modules.0.W")  # a buffer, and the frozen Fourier features
    frozen_names = {k for k in model if k.removeprefix("module.") in frozen}
    trained = [k for k in model if k not in frozen_names]
    if len(shadow) != len(trained):  # the features are there, but were trained
        frozen_names = {k for k in frozen_names if k.endswith("sigmas")}
        trained = [k for k in model if k not in frozen_names]
    if len(shadow) != len(trained) or any(
        a.shape != model[k].shape for a, k in zip(shadow, trained, strict=True)
    ):
        raise ValueError("its moving average does not fit its own model")
    kept = {k: model[k] for k in frozen_names}
    return kept | dict(zip(trained, shadow, strict=True))


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}


def _check(state: State, size: int) -> None:
    for name, value in state.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"its tensor {name!r} is not dense")
        # Views can pretend to be larger than what is stored.
        if value.numel() * value.element_size() > size:
            shape = "×".join(map(str, value.shape))
            raise ValueError(f"its tensor {name!r} ({shape}) is larger than the file")
        if not _finite(value):
            raise ValueError(f"its weights {name!r} are not finite")


def _finite(value: Tensor) -> bool:
    if value.is_floating_point() and value.element_size() == 1:
        value = value.float()  # 8-bit floats know no isfinite
    return bool(value.isfinite().all())


def _why(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"it asks for the Python object {wanted[1]}, and only tensors and plain values "
            "are read: save its state dict alone, best as safetensors"
        )
    if "weights_only" in text:  # torch's advice, to run the file, is not ours
        return "it is damaged, or holds more than tensors and plain values"
    if isinstance(error, OSError):
        return error.strerror or text
    return text.split("\n")[0]


# --- EDM's pickles


def _read_edm(path: Path) -> tuple[State, list[str], dict[str, Any]]:
    with path.open("rb") as stream:
        content = _Unpickler(stream).load()
        if stream.read(1):
            raise ValueError("something follows its end")
    took: list[str] = []
    if isinstance(content, Mapping):
        name = next((k for k in ("ema", "net") if k in content), None)
        if name is None:
            raise ValueError("it is a pickle without an 'ema' network")
        content, took = content[name], [f"its network {name!r}"]
    if not isinstance(content, _Record):
        raise ValueError("it is a pickle of something else than a network")
    storages: dict[int, Any] = {}
    state = {k: v.tensor(storages) for k, v in _weights(content, set())}
    state, more = unwrap(state)
    arguments = content.state.get("_init_kwargs")
    told = {"preconditioning": content.kind, "arguments": _plain(arguments)}
    return state, took + more, told


@final
class _Forbidden(pickle.UnpicklingError):
    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"GLOBAL {module}.{name}")


class _Record:
    """Where a pickle would have made an object: its class's name, and its state."""

    kind = "module"
    state: dict[str, Any]

    def __new__(cls, *_: Any) -> "_Record":  # a pickle need not call __init__
        record = super().__new__(cls)
        record.state = {}
        return record

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, Mapping):
            raise ValueError("a network's state in it is not a dictionary")
        self.state = dict(state)


@final
class _View:
    """A tensor to be: a view of a storage's bytes, as yet unread."""

    def __init__(
        self,
        storage: bytes,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        self.storage, self.offset, self.size, self.stride = (
            storage,
            offset,
            size,
            stride,
        )

    def tensor(self, storages: dict[int, Any]) -> Tensor:
        key = id(self.storage)
        if key not in storages:
            storages[key] = torch.load(
                io.BytesIO(self.storage), map_location="cpu", weights_only=True
            )
        storage = storages[key]
        dtype, data = storage.dtype, storage._untyped_storage
        # torch would enlarge the storage to what the view asks for.
        numbers = (self.offset, *self.size, *self.stride)
        whole = len(self.size) == len(self.stride) and min(numbers) >= 0
        last = (
            sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=False))
            + self.offset
        )
        if not whole or (
            all(self.size) and (last + 1) * dtype.itemsize > data.nbytes()
        ):
            raise ValueError("a tensor in it is larger than what is stored")
        return torch.empty(0, dtype=dtype).set_(
            data, self.offset, self.size, self.stride
        )


@final
class _Number:
    """NumPy's type of a scalar, as far as its name tells it."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"[fiub]\d{1,2}", name):
            raise ValueError(
                f"a number in it is of the unknown type {str(name)[:20]!r}"
            )
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def value(self, data: bytes) -> float | int | bool:
        import numpy as np

        return np.frombuffer(data, np.dtype(self.order + self.name), count=1)[0].item()


@final
class _Call:
    """A function that a pickle may call, and can do nothing else with."""

    __slots__ = ("function",)
    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError("it tries to change a function")

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("it tries to change a function")


def _persistent(meta: Any) -> _Record:
    record = _Record()
    record.kind = str(meta["class_name"])
    record.__setstate__(meta["state"])
    return record


def _storage(data: Any) -> bytes:
    if not isinstance(data, bytes) or not data.startswith(
        (LEGACY_TORCH, b"PK\x03\x04")
    ):
        raise ValueError("a storage in it is not torch's")
    return data


def _view(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _View:
    if not isinstance(storage, bytes):
        raise ValueError("a tensor in it has no storage")
    return _View(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _instance(kind: Any, *_: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, _Record)):
        raise ValueError("it makes an object of no module")
    return kind()


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _bytes(text: str, coding: str) -> bytes:
    # How pickles of protocol 2 spell bytes.
    if coding != "latin1":
        raise ValueError("bytes in it are spelt in an unknown way")
    return text.encode("latin1")


def _scalar(kind: Any, data: Any) -> Any:
    return kind.value(data)


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("_codecs", "encode"): _bytes,
    ("copyreg", "_reconstructor"): _instance,
    ("copy_reg", "_reconstructor"): _instance,
    ("numpy", "dtype"): _Number,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}
TYPES: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("dnnlib.util", "EasyDict"): dict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "object"): object,
    ("__builtin__", "object"): object,
}


@final
class _Unpickler(pickle._Unpickler):
    """Pickle's own machine, with nothing to call but `KNOWN` and inert stand-ins.

    The one written in Python: C's can be made to fill the memory by one opcode.
    """

    def find_class(self, module: str, name: str) -> Any:
        if function := KNOWN.get((module, name)):
            return _Call(function)
        if kind := TYPES.get((module, name)):
            return kind
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return type(name, (_Record,), {"kind": name})
        raise _Forbidden(module, name)

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside itself")


def _weights(
    module: _Record, seen: set[int], prefix: str = ""
) -> Iterator[tuple[str, _View]]:
    # A few bytes can name one module from many places, and so ask for endless work.
    if id(module) in seen or prefix.count(".") > NESTING:
        raise ValueError("its modules are no tree")
    seen.add(id(module))
    for group in ("_parameters", "_buffers"):
        for name, value in (module.state.get(group) or {}).items():
            if isinstance(value, _View):
                yield f"{prefix}{name}", value
    for name, child in (module.state.get("_modules") or {}).items():
        if isinstance(child, _Record):
            yield from _weights(child, seen, f"{prefix}{name}.")


def _plain(arguments: Any) -> dict[str, Any]:
    if not isinstance(arguments, Mapping):
        return {}
    plain = (str, int, float, bool, type(None))
    return {
        str(k): v
        for k, v in arguments.items()
        if isinstance(v, plain)
        or (isinstance(v, list | tuple) and all(isinstance(n, plain) for n in v))
    }
