"""bfloat16, where the device has instructions for it.

A processor without them goes through float32 and back: there bfloat16 takes several times
as long, and float32 is both faster and nearer.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def of_this_cpu() -> bool:
    """Whether torch finds such instructions on this machine."""
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    # An older torch tells the family only.
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))


CPU = of_this_cpu()
"""Whether this machine's processor computes in bfloat16."""


def native(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: of NVIDIA's those from Ampere on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return CPU if device.type == "cpu" else True


def autocast(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Networks in bfloat16 if that is wanted and the device computes in it."""
    on = wanted and native(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def avoided(device: torch.device) -> AbstractContextManager[Any]:
    """In it, what a library would cast to bfloat16 becomes float32, if that is faster.

    Muon of torch casts whatever it is given: on a processor without such instructions
    its step then takes longer than the network's passes.
    """
    return nullcontext() if native(device) else _Float32()


@final
class _Float32(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        if func is Tensor.to and torch.bfloat16 in (*args, kwargs.get("dtype")):
            args = [torch.float32 if a is torch.bfloat16 else a for a in args]
            kwargs = {
                k: torch.float32 if k == "dtype" else v for k, v in kwargs.items()
            }
            made = func(*args, **kwargs)
            # As a cast, it is nobody else's: it may be written to.
            return made.clone() if made is args[0] else made
        return func(*args, **kwargs)
