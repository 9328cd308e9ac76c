"""Checkpoints are read as data: what is in them, what is refused, what never runs."""

import io
import os
import pickle
import random
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    Persistent,
    fill,
    persistent,
    save_edm,
    save_score_sde,
    score_sde_shapes,
)
from safetensors.torch import save_file
from torch import Tensor

from invsolve.priors.reading import read_checkpoint

SHAPES = {"stem.weight": (4, 2, 3, 3), "stem.bias": (4,), "out.weight": (2, 4)}
STATE = fill(SHAPES)


def save_torch(path: Path, content: Any, *, legacy: bool = False) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


WRITERS: dict[str, Callable[[Path], None]] = {
    "safetensors": lambda path: save_file(STATE, path),
    "torch": lambda path: save_torch(path, STATE),
    "legacy": lambda path: save_torch(path, STATE, legacy=True),
    "edm": lambda path: save_edm(path, persistent(STATE, "EDMPrecond")),
}


class Runs:
    """Pickled as a call."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call = call, args

    def __reduce__(self) -> Any:
        return self.call


def storage_bytes(content: Any) -> Runs:
    """The call by which a pickled tensor makes its storage, of anything at all."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return Runs(vars(torch.storage)["_load_from_bytes"], file.getvalue())


def storage_of(tensor: Tensor) -> Runs:
    make, arguments = tensor.__reduce_ex__(2)[1][0].__reduce__()
    return Runs(make, *arguments)


def save_view(
    path: Path,
    storage: Any,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
) -> None:
    """A network whose one weight is this view."""
    node = Persistent()
    node.arguments = {}
    rebuild = vars(sys.modules["torch._utils"])["_rebuild_tensor_v2"]
    view = Runs(rebuild, storage, offset, size, stride, False, {})
    vars(node)["_buffers"] = {"weight": view}
    save_edm(path, node)


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value) and state[name].dtype == value.dtype


def refused(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


# --- what is read


@pytest.mark.parametrize("writer", WRITERS)
def test_every_container_gives_the_weights_back(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    WRITERS[writer](path)
    state, facts = read_checkpoint(path)
    same(state, STATE)
    container = {"legacy": "torch"}.get(writer, writer)
    assert facts["container"] == container


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("legacy", [True, False])
def test_precision_is_kept(dtype: torch.dtype, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    expected = {k: v.to(dtype) for k, v in STATE.items()} | {"n": torch.tensor(3)}
    save_torch(path, expected, legacy=legacy)
    same(read_checkpoint(path)[0], expected)
    save_edm(path, persistent(expected))
    same(read_checkpoint(path)[0], expected)


def test_a_safetensors_header_may_begin_as_a_pickle_does(tmp_path: Path) -> None:
    # The header is padded to a multiple of 8: some length ends in 0x80, as pickles begin.
    path = tmp_path / "file.safetensors"
    for n in range(300):
        save_file(STATE, path, {"note": "n" * n})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    state, facts = read_checkpoint(path)
    assert facts["container"] == "safetensors"
    assert state.keys() == STATE.keys()


def test_safetensors_metadata_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file(STATE, path, {"licence": "MIT"})
    assert read_checkpoint(path)[1]["metadata"] == {"licence": "MIT"}


OTHER = {k: v + 1 for k, v in STATE.items()}


@pytest.mark.parametrize(
    ("content", "took"),
    [
        (STATE, "all its weights"),
        ({"state_dict": STATE, "epoch": 3}, "its entry 'state_dict'"),
        ({"model": {"state_dict": STATE}}, "'model'; its entry 'state_dict'"),
        ({"model": OTHER, "ema": STATE}, r"'ema' \(moving average\)"),
        ({"model_ema": STATE, "state_dict": OTHER}, r"'model_ema' \(moving average\)"),
        ({"ema": None, "model": STATE}, "'model'"),
        ({"ema": {"decay": 0.9}, "model": STATE}, "'model'"),
        ({f"module.{k}": v for k, v in STATE.items()}, "without the prefix 'module.'"),
        (
            {f"module._orig_mod.{k}": v for k, v in STATE.items()},
            "'module.'; without the prefix '_orig_mod.'",
        ),
        (
            {
                "model": {f"module.{k}": v for k, v in OTHER.items()},
                "ema": {
                    **{f"online_model.{k}": v for k, v in OTHER.items()},
                    **{f"ema_model.{k}": v for k, v in STATE.items()},
                    "step": torch.tensor(3),
                },
            },
            r"moving average \(ema_model.*'ema_model.'",
        ),
        ({**STATE, "epoch": 3, "note": "x"}, "all its weights"),
    ],
)
def test_weights_are_found_and_said_which(
    content: Any, took: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.pt"
    save_torch(path, content)
    state, facts = read_checkpoint(path)
    same(state, STATE)
    assert re.search(took, facts["took"])


@pytest.mark.parametrize("fourier", [True, False])
def test_score_sde_average_goes_to_its_names(fourier: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    expected = fill(score_sde_shapes(fourier=fourier))
    save_score_sde(path, expected, torch.ones(5))
    state, facts = read_checkpoint(path)
    same(state, {"sigmas": torch.ones(5), **expected})
    assert "moving average (ema.shadow_params)" in facts["took"]


def test_score_sde_average_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    save_score_sde(path, fill(score_sde_shapes()), torch.ones(5))
    content = torch.load(path, weights_only=True)
    content["ema"]["shadow_params"].pop()
    save_torch(path, content)
    refused(path, "moving average does not fit")
    content["ema"]["shadow_params"].append(torch.zeros(2))
    save_torch(path, content)
    refused(path, "moving average does not fit")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_edm_pickles_tell_their_arguments(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    expected = {"model.enc.8x8_conv.weight": torch.rand(2, 1, 3, 3), "u": torch.rand(3)}
    arguments = {
        "sigma_data": 0.5,
        "channel_mult": [1, 2],
        "gain": np.float64(0.1),
        "few": np.int32(-7),
        "odd": {"a": 1},
    }
    save_edm(path, persistent(expected, "VPPrecond", **arguments), protocol)
    assert "torch_utils" not in sys.modules
    state, facts = read_checkpoint(path)
    same(state, expected)
    assert facts["preconditioning"] == "VPPrecond"
    assert facts["arguments"] == {
        "sigma_data": 0.5,
        "channel_mult": [1, 2],
        "gain": 0.1,
        "few": -7,
    }


def test_edm_views_and_shared_storages_are_what_they_were(tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    whole = torch.rand(6, 4)
    expected = {"weight": whole[1:3, 1:], "more": whole.T, "none": torch.rand(0, 3)}
    save_edm(path, persistent(expected))
    same(read_checkpoint(path)[0], expected)


# --- what is refused


@pytest.mark.parametrize("writer", WRITERS)
def test_a_truncated_file_is_refused_wherever_it_ends(
    writer: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    WRITERS[writer](path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), max(len(whole) // 60, 1)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, "cannot read the checkpoint")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("writer", ["safetensors", "torch", "edm"])
def test_weights_that_are_not_finite_are_refused(
    value: float, writer: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    bad = {**STATE, "stem.bias": torch.tensor([1.0, value, 0, 0])}
    if writer == "edm":
        save_edm(path, persistent(bad))
    elif writer == "torch":
        save_torch(path, bad)
    else:
        save_file(bad, path)
    refused(path, r"weights 'stem\.bias' are not finite")


def test_tensors_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    huge = torch.zeros(1).expand(10**6, 10**6)  # four bytes that unfold to terabytes
    for legacy in (True, False):
        save_torch(path, {"weight": huge}, legacy=legacy)
        refused(path, r"'weight' \(1000000×1000000\) is larger than the file")
    save_edm(path, persistent({"weight": huge}))
    refused(path, "larger than the file")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (6,), (1,)),
        (0, (7,), (1,)),
        (0, (6,), (2,)),
        (0, (3, 3), (1, 2)),
        (0, (-1,), (1,)),
        (-1, (2,), (1,)),
        (5, (2,), (-1,)),
        (0, (6,), ()),
    ],
)
def test_edm_views_beyond_their_storage_are_refused(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "file.pkl"
    save_view(path, storage_of(torch.rand(6)), 0, (2, 3), (3, 1))
    assert read_checkpoint(path)[0]["weight"].shape == (2, 3)
    save_view(path, storage_of(torch.rand(6)), offset, size, stride)
    refused(path, "larger than what is stored")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({}, "holds no weights, only nothing"),
        ({"epoch": 3, "note": "x"}, "holds no weights, only epoch, note"),
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({"weight": torch.empty(3, device="meta")}, "'weight' is not dense"),
    ],
)
def test_files_without_dense_named_weights_are_refused(
    content: Any, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.pt"
    save_torch(path, content)
    refused(path, why)


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    content: dict[str, Any] = {}
    content["model"] = content
    save_torch(path, content)
    refused(path, "holds no weights")


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    refused(path, "No such file")
    refused(tmp_path, "directory")
    for content in (b"", b"{}", b"a text", bytes(100), b"\x80\x04N."):
        path.write_bytes(content)
        refused(path, "cannot read the checkpoint")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    refused(path, "cannot read the checkpoint")
    save_edm(path, persistent(STATE))
    path.write_bytes(path.read_bytes() + b"more")
    refused(path, "something follows its end")
    path.write_bytes(pickle.dumps({"G_ema": 3}))
    refused(path, "without an 'ema' network")
    path.write_bytes(pickle.dumps({"ema": 3}))
    refused(path, "something else than a network")


# --- what never runs


def payloads(canary: Path) -> dict[str, Any]:
    code = f"open({str(canary)!r}, 'w').close()"
    return {
        "system": Runs(os.system, f"touch {canary}"),
        "exec": Runs(exec, code),
        "eval": Runs(eval, code),
        "open": Runs(open, str(canary), "w"),
        "mkdir": Runs(os.mkdir, str(canary)),
        "getattr": Runs(getattr, canary, "touch"),
        "torch.load": Runs(torch.load, str(canary)),
        "import": Runs(__import__, "os"),
        "path": Runs(Path.touch, canary),
        "function": Runs(torch.set_num_threads, 7),
    }


@pytest.mark.parametrize("container", ["torch", "legacy", "pickle", "edm", "storage"])
@pytest.mark.parametrize("payload", payloads(Path()))
def test_code_in_a_file_is_not_run(
    payload: str, container: str, tmp_path: Path
) -> None:
    path, canary = tmp_path / "file", tmp_path / "canary"
    attack = payloads(canary)[payload]
    threads = torch.get_num_threads()
    if container in ("torch", "legacy"):
        save_torch(path, {**STATE, "x": attack}, legacy=container == "legacy")
    elif container == "pickle":
        path.write_bytes(pickle.dumps(attack))
    elif container == "edm":
        save_edm(path, persistent(STATE), loss_fn=attack)
    else:  # within the bytes of a storage, which are a checkpoint again
        save_view(path, storage_bytes(attack), 0, (1,), (1,))
    refused(path, "cannot read the checkpoint")
    assert not canary.exists() and torch.get_num_threads() == threads


def test_what_a_file_asks_for_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    attack = Runs(os.system, "true")
    save_torch(path, {**STATE, "x": attack})
    refused(path, r"asks for the Python object \w+\.system, and only tensors")
    save_edm(path, persistent(STATE), loss_fn=attack)
    refused(path, r"asks for the Python object \w+\.system, and only tensors")


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def edm_of(state: bytes) -> bytes:
    """A pickle whose network's state is made by these opcodes."""
    make = named("torch_utils.persistence", "_reconstruct_persistent_obj")
    meta = b"}(" + text("class_name") + text("N") + text("state") + state + b"u"
    return b"\x80\x04}" + text("ema") + make + meta + b"\x85Rs."


def value(opcodes: bytes) -> bytes:
    """A state of one value, made by these opcodes."""
    return b"}" + text("a") + opcodes + b"s"


FUNCTION = named("torch._utils", "_rebuild_parameter")
OBJECT = named("builtins", "object")


@pytest.mark.parametrize(
    ("state", "why"),
    [
        # Attributes of a function that the reader may call, and of a class.
        (
            value(FUNCTION + b"N}" + text("__defaults__") + b")s\x86b"),
            "change a function",
        ),
        (value(FUNCTION + b"}" + text("function") + b"Nsb"), "change a function"),
        (value(named("collections", "OrderedDict") + b"}" + text("a") + b"Nsb"), ""),
        # An instance of what is no module, and a name within a name that is allowed.
        (value(named("copyreg", "_reconstructor") + OBJECT + b"\x85R"), "no module"),
        (value(named("collections", "OrderedDict.fromkeys")), r"OrderedDict\.fromkeys"),
        (value(named("torch.nn.modules", "sys")), r"torch\.nn\.modules\.sys"),
        # A slot of the memory so far off that it would be filled on the way there.
        (b"}r\xff\xff\xff\x7f", "holds no weights"),
        # Extensions, and objects of elsewhere.
        (value(b"\x82\x01"), ""),
        (value(b"NQ"), "objects outside itself"),
        (b"N", "state in it is not a dictionary"),
    ],
)
def test_tricks_of_the_pickle_machine_are_refused(
    state: bytes, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.pkl"
    path.write_bytes(edm_of(state))
    refused(path, why or "cannot read")


MODULE = named("torch.nn.modules.module", "Module") + b")\x81"


def modules(opcodes: bytes) -> bytes:
    """A state of these modules by their names."""
    return b"}" + text("_modules") + b"}(" + opcodes + b"us"


@pytest.mark.parametrize("depth", [50, 3000])
def test_modules_of_endless_ways_are_refused(depth: int, tmp_path: Path) -> None:
    # Each holds the next twice: 2^depth ways, told in a few bytes.
    body = MODULE + b"\x94"
    for i in range(depth):
        again = b"j" + i.to_bytes(4, "little")
        body = MODULE + modules(text("a") + body + text("b") + again) + b"b\x94"
    path = tmp_path / "file.pkl"
    path.write_bytes(edm_of(modules(text("a") + body)))
    refused(path, "modules are no tree")


def test_a_module_that_holds_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    itself = MODULE + b"\x94" + modules(text("a") + b"h\x00") + b"b"
    path.write_bytes(edm_of(modules(text("a") + itself)))
    refused(path, "modules are no tree")


# --- fuzzing


EVENTS = ("os.", "subprocess.", "shutil.", "socket.", "pty.", "webbrowser.")
READS = ("os.listdir", "os.scandir")
seen: list[str] = []
watching = False


def watch(event: str, args: Any) -> None:
    if watching and event.startswith(EVENTS) and event not in READS:
        seen.append(event)
    if watching and event == "open" and args[1] not in (None, "r", "rb"):
        seen.append(f"open {args}")


HOOKED: list[Callable[..., None]] = []


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What is done to the machine meanwhile: an audit hook cannot be taken away again."""
    global watching
    if watch not in HOOKED:
        sys.addaudithook(watch)
        HOOKED.append(watch)
    seen.clear()
    watching = True
    yield seen
    watching = False


def mutated(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        # Heads and tails hold the structure; most of a file is numbers.
        where = chance.choice((len(data), 400, -400))
        span = range(max(where, -len(data)), 0) if where < 0 else range(where)
        at = chance.choice(span) % max(len(data), 1)
        match chance.randrange(6):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                del data[at : at + chance.randrange(1, 9)]
            case 3:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                other = chance.randrange(len(data))
                data[at : at + 8] = data[other : other + 8]
            case 5:
                data[at:at] = chance.choice(
                    (b"cos\nsystem\n", b"(S'true'\ntR", b"R", b"b")
                )
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("writer", [*WRITERS, "attack"])
def test_damaged_files_are_read_or_refused_and_nothing_runs(
    writer: str, tmp_path: Path, watched: list[str]
) -> None:
    path, canary = tmp_path / "file", tmp_path / "canary"
    if writer == "attack":
        save_edm(path, persistent(STATE), loss_fn=payloads(canary)["system"])
    else:
        WRITERS[writer](path)
    whole, chance = path.read_bytes(), random.Random(0)
    read = 0
    for _ in range(1000):
        path.unlink()
        path.write_bytes(mutated(whole, chance))
        watched.clear()
        try:
            with warnings.catch_warnings(action="ignore"):  # as it is outside tests
                state, _facts = read_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            read += 1
            size = path.stat().st_size
            for value in state.values():
                assert value.numel() * value.element_size() <= size
                assert not value.is_floating_point() or value.isfinite().all()
        assert not watched and not canary.exists()
    if writer != "attack":
        assert 0 < read < 1000  # numbers changed, and structure broken
