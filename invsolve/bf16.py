"""bfloat16, where the device has instructions for it.

A processor without them goes through float32 and back: there bfloat16 takes several times
as long, and float32 is both faster and nearer.
"""

import torch


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
