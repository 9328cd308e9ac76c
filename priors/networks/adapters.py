"""What lies between a published network and the F that a parameterisation asks for."""

from typing import final

from torch import Tensor, nn


@final
class Timed(nn.Module):
    """net(x, scale·t): of a network that counts its time otherwise."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, self.scale * t)


@final
class Negative(nn.Module):
    """−net(x, t)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.net(x, t)


@final
class ScaledScore(nn.Module):
    """σ·score(x, σ), told ln σ: of a network that gives the score itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        sigma = log_sigma.exp()
        return sigma.reshape(-1, *(1,) * (x.ndim - 1)) * self.net(x, sigma)
