"""The small U-Net of the bundled priors: diffusers' own, on 2×2 pixels a position."""

from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@final
@dataclass(frozen=True)
class UNetConfig:
    """What a U-Net is made of; written into the prior's card.

    Args:
        channels: how many channels an image has.
        widths: channels at each resolution, finest first; each halves the last.
        layers: residual blocks at each resolution.
        patch: pixels a side that are folded into channels at the door. 2 makes a pass
            about four times cheaper at equal depth, and costs little: the finest
            details are learnt across the folded channels.
        groups: of the group normalisation.
    """

    channels: int = 1
    widths: tuple[int, ...] = (48, 96, 128, 128)
    layers: int = 1
    patch: int = 2
    groups: int = 8

    @property
    def multiple_of(self) -> int:
        """What an image's height and width must be divisible by."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UNetConfig":
        """The configuration a card tells of; unknown names are a TypeError."""
        return cls(**{**values, "widths": tuple(values["widths"])})

    def to_dict(self) -> dict[str, Any]:
        """As a card tells it."""
        return {**asdict(self), "widths": list(self.widths)}


@final
class UNet(nn.Module):
    """F(x, c_noise): a convolutional U-Net without attention.

    It takes images of any size that ``config.multiple_of`` divides. Zero padding means
    "nothing there" at the border, so the prior's zero should be the background.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel

        n, folded = len(config.widths), config.channels * config.patch**2
        self.patch = config.patch
        self.unet = UNet2DModel(
            in_channels=folded,
            out_channels=folded,
            layers_per_block=config.layers,
            block_out_channels=config.widths,
            down_block_types=("DownBlock2D",) * n,
            up_block_types=("UpBlock2D",) * n,
            norm_num_groups=config.groups,
            add_attention=False,
        ).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        folded = F.pixel_unshuffle(x, self.patch)
        # The sinusoidal embedding is made for steps 0 … 1000; ¼ ln σ spans about ±1.
        out = self.unet(folded, 1000 * c_noise).sample
        return F.pixel_shuffle(out, self.patch)
