"""bfloat16 only where a device computes in it."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, device, nn

from invsolve import bf16
from invsolve.training import matching


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("wanted", [True, False])
def test_training_computes_in_it_only_where_it_is_native(
    native: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "CPU", native)
    layer, seen = nn.Linear(4, 4), []

    def net(x: Tensor) -> Tensor:
        out = layer(x)
        seen.append(out.dtype)
        return out

    matching(net, target=torch.zeros(2, 4), bf16=wanted, x=torch.ones(2, 4))
    assert seen == [torch.bfloat16 if native and wanted else torch.float32]


@pytest.mark.parametrize(
    ("has", "found"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True}, False),
    ],
)
def test_processors(
    has: dict[str, bool], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(get_capabilities=lambda: has))
    assert bf16.of_this_cpu() == found


@pytest.mark.parametrize(
    ("family", "found"), [("AVX2", False), ("AVX512", True), ("DEFAULT", False)]
)
def test_processors_by_a_torch_that_tells_the_family_only(
    family: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: family)
    assert bf16.of_this_cpu() == found


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, found in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _, c=capability: c
        )
        assert bf16.native(device("cuda")) == found


@pytest.mark.parametrize("native", [True, False])
def test_a_library_s_casts_become_float32_where_it_is_not(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "CPU", native)
    x = torch.arange(3.0)
    with bf16.avoided(x.device):
        casts = [
            x.bfloat16(),
            x.to(torch.bfloat16),
            x.to(dtype=torch.bfloat16, copy=True),
            x.to("cpu", torch.bfloat16),
        ]
        assert x.to(torch.float64).dtype == x.double().dtype == torch.float64
    wanted = torch.bfloat16 if native else torch.float32
    assert {cast.dtype for cast in casts} == {wanted}
    # Whoever casts has a tensor that it may write to.
    for cast in casts:
        cast.add_(1)
    assert x.tolist() == [0, 1, 2]
    assert x.bfloat16().dtype == torch.bfloat16
