"""Networks that are told a class, or shown what lies beside an image."""

from typing import final

import torch
from torch import Tensor, nn


@final
class AtClass(nn.Module):
    """net(x, t, class): a class-conditional network held at one class."""

    label: Tensor

    def __init__(self, net: nn.Module, label: int) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("label", torch.tensor(label), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, self.label.expand(len(x)))


@final
class InTheMiddle(nn.Module):
    """F of an image's middle channel, as a network says that is shown the others.

    Of the others it says 0, so that D takes them for independent Gaussian noise: ask it of
    the middle alone, as `invsolve.priors.Sliding` does.

    Args:
        net: (middle, c_noise, condition: the others, first to last) ↦ F of the middle.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        middle, others = apart(x)
        out = self.net(middle, c_noise, condition=others)
        nothing = torch.zeros_like(others[:, : x.shape[1] // 2])
        return torch.cat([nothing, out, nothing], 1)


def apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """The middle channel of an odd number, and the others."""
    k = x.shape[1] // 2
    return x[:, k : k + 1], torch.cat([x[:, :k], x[:, k + 1 :]], 1)
