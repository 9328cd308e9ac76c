"""Networks that are told a class."""

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
