"""Gradient steps: Muon's is the momentum's polar factor, AdamW's is the sign's at first."""

import copy
import math
from pathlib import Path

import pytest
import torch
from test_training_loop import run, same
from torch import Generator, Tensor, nn
from torch.testing import assert_close

from invsolve import bf16
from invsolve.priors.unet import UNet, UNetConfig, laid_out
from invsolve.training_descent import Descends, Descent, inner_kernels

INNER = 2, 6
"""Which of its parameters are inner kernels."""


def network(last: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.Conv2d(6, 8, 3),
            nn.GroupNorm(2, 8),
            nn.Flatten(),
            nn.Linear(32, 5),
            nn.Linear(5, 1),
        )
    laid_out(net, channels_last=last)
    return net


def steps(net: nn.Sequential, descent: Descent, count: int, rate: float = 1.0) -> None:
    generator = Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(4, 2, 6, 6, generator=generator)
        descent.zero_grad()
        net(x).square().sum().backward()
        descent.step(rate)


def change(
    net: nn.Sequential, name: Descends, lr: float, rate: float = 1.0
) -> list[Tensor]:
    """What one step does to each parameter."""
    before = [p.detach().clone() for p in net.parameters()]
    steps(net, Descent(net, name, lr), 1, rate)
    return [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]


@pytest.mark.parametrize("last", [False, True])
def test_muon_turns_a_kernel_by_the_polar_factor_of_its_gradient(last: bool) -> None:
    """Newton–Schulz brings singular values between about 0.7 and 1.2, not to 1."""
    net = network(last)
    turned = change(net, "muon", 1e-2)
    parameters = list(net.parameters())
    for index in INNER:
        kernel_grad = parameters[index].grad
        assert kernel_grad is not None
        grad, delta = kernel_grad.flatten(1), turned[index].flatten(1)
        U, S, Vh = torch.linalg.svd(grad, full_matrices=False)
        rank = int((S > 1e-2 * S[0]).sum())
        expected = 1e-2 * 0.2 * math.sqrt(max(grad.shape))
        along = -(U.T @ delta @ Vh.T).diagonal()[:rank] / expected
        assert along.min() > 0.6
        assert along.max() < 1.3


@pytest.mark.parametrize(("native", "rounds"), [(True, True), (False, False)])
def test_muon_rounds_to_bfloat16_only_where_that_is_fast(
    native: bool, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is scaled by 1.1 has the same polar factor, to the rounding."""
    monkeypatch.setattr(bf16, "CPU", native)
    net = network()
    turned = []
    for scale in (1.0, 1.1):
        p = [nn.Parameter(w.detach().clone()) for w in net.parameters()]
        layers = copy.deepcopy(net)
        descent = Descent(layers, "muon", 1e-2)
        g = Generator().manual_seed(0)
        for weight in layers.parameters():
            weight.grad = scale * torch.randn(weight.shape, generator=g)
        descent.step(1.0)
        turned.append(
            [w.detach() - b for w, b in zip(layers.parameters(), p, strict=True)]
        )
    gaps = [(turned[0][i] - turned[1][i]).abs().max() / 1e-2 for i in INNER]
    assert (max(gaps) > 1e-4) == rounds


def test_the_rest_takes_adamw_s_step() -> None:
    """Its first is η in the direction of the gradient's sign."""
    net = network()
    moved, parameters = change(net, "muon", 1e-2), list(net.parameters())
    for index in {*range(len(moved))} - {*INNER}:
        grad = parameters[index].grad
        assert grad is not None
        seen = grad.abs() > 1e-4
        expected = -1e-2 * grad.sign()
        assert_close(moved[index][seen], expected[seen], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_rate_scales_the_step(name: Descends) -> None:
    whole = change(network(), name, 1e-2)
    half = change(network(), name, 1e-2, 0.5)
    for a, b in zip(whole, half, strict=True):
        assert_close(a, 2 * b, rtol=1e-3, atol=1e-7)


def test_the_layout_in_memory_changes_nothing() -> None:
    nets = [network(last) for last in (False, True)]
    for net in nets:
        steps(net, Descent(net, "muon", 1e-2), 3)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_close(a.contiguous(), b.contiguous(), rtol=0, atol=2e-3)
    start, moved = (list(net.parameters())[INNER[0]] for net in (network(), nets[0]))
    assert (start - moved).abs().max() > 1e-2


def test_what_it_remembers_goes_on_bit_for_bit() -> None:
    whole, cut = network(), network()
    descent = Descent(whole, "muon", 1e-2)
    steps(whole, descent, 2)
    cut.load_state_dict(whole.state_dict())
    again = Descent(cut, "muon", 1e-2)
    again.load_state_dict(copy.deepcopy(descent.state_dict()))
    steps(whole, descent, 2)
    steps(cut, again, 2)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_first_and_the_last_kernel_are_none_of_muon_s() -> None:
    net = UNet(UNetConfig(widths=(8, 8), classes=3))
    ids = {id(kernel) for kernel in inner_kernels(net)}
    left = {n for n, p in net.named_parameters() if p.ndim > 1 and id(p) not in ids}
    assert left == {
        "unet.conv_in.weight",
        "unet.conv_out.weight",
        "unet.class_embedding.weight",
    }


def test_a_checkpoint_of_the_other_optimizer_is_refused(tmp_path: Path) -> None:
    adamw = run(tmp_path)
    with pytest.raises(ValueError, match="differs in optimizer: choose"):
        run(tmp_path, optimizer="muon")
    assert same(adamw, run(tmp_path))


def test_torch_without_muon_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ModuleNotFoundError, match=r"torch 2\.9"):
        Descent(network(), "muon", 1e-2)
