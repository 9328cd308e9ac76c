"""The small U-Net of the bundled priors, on 2×2 pixels (or 2×2×2 voxels) a position.

diffusers' own in two dimensions, MONAI's in three.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .networks.conditional import AtClass


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
        positions: whether the network is told where each pixel lies in its image, so that
            it can be trained on crops of images that look different in each place (Wang et
            al., "Patch Diffusion", NeurIPS 2023; Hu et al., "Learning Image Priors through
            Patch-based Diffusion Models", NeurIPS 2024).
        classes: how many it tells apart; 0 if it is not told of any.
        dims: 2 for images, 3 for volumes, which need MONAI.
        condition: channels of another image that it is shown beside: a slice's
            neighbours, or the scans whose masks `Segmenter`s know of.
    """

    channels: int = 1
    widths: tuple[int, ...] = (48, 96, 128, 128)
    layers: int = 1
    patch: int = 2
    groups: int = 8
    positions: bool = False
    classes: int = 0
    dims: Literal[2, 3] = 2
    condition: int = 0

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

    Raises:
        ModuleNotFoundError: it is of volumes, and MONAI is not installed.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        out = config.channels * config.patch**config.dims
        channels = {
            "in_channels": out
            + config.condition * config.patch**config.dims
            + config.dims * config.positions,
            "out_channels": out,
            "norm_num_groups": config.groups,
            # The last is of images whose class is not told.
            "num_class_embeds": config.classes + 1 if config.classes else None,
        }
        make = _images if config.dims == 2 else _volumes
        self.unet = laid_out(make(config, channels))

    def forward(
        self,
        x: Float[Tensor, "batch channels *space"],
        c_noise: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
        position: Float[Tensor, "batch dims *space"] | None = None,
        condition: Float[Tensor, "batch shown *space"] | None = None,
    ) -> Float[Tensor, "batch channels *space"]:
        """F, with its class and the `positions` of its pixels where they are told.

        Unless they are given, the class is none, and x a whole image.
        """
        config, told = self.config, {}
        u = folded(x, config.patch)
        if condition is not None:
            u = torch.cat([u, folded(condition, config.patch)], 1)
        if config.positions:
            if position is None:
                sides = x.shape[2:]
                position = positions(torch.zeros(1, len(sides)), sides, sides).to(x)
            pool = F.avg_pool2d if config.dims == 2 else F.avg_pool3d
            where = pool(position, config.patch).expand(len(x), *(-1,) * (x.ndim - 1))
            u = torch.cat([u, where], 1)
        if config.classes:
            none = c_noise.new_full((len(x),), config.classes, dtype=torch.long)
            told["class_labels"] = none if label is None else label
        # The sinusoidal embedding is made for steps 0 … 1000; ¼ ln σ spans about ±1.
        out = self.unet(u, 1000 * c_noise, **told)
        return unfolded(out if config.dims == 3 else out.sample, config.patch)


def _images(config: UNetConfig, channels: dict[str, Any]) -> nn.Module:
    from diffusers.models.unets.unet_2d import UNet2DModel

    n = len(config.widths)
    return UNet2DModel(
        **channels,
        layers_per_block=config.layers,
        block_out_channels=config.widths,
        down_block_types=("DownBlock2D",) * n,
        up_block_types=("UpBlock2D",) * n,
        add_attention=False,
    )


def _volumes(config: UNetConfig, channels: dict[str, Any]) -> nn.Module:
    try:
        from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a U-Net of volumes needs MONAI: pip install 'invsolve[monai]'"
        ) from error
    net: Any = DiffusionModelUNet(
        spatial_dims=3,
        **channels,
        num_res_blocks=config.layers,
        channels=config.widths,
        attention_levels=(False,) * len(config.widths),
        num_head_channels=config.groups,
    )
    net.middle_block.attention = nn.Identity()
    return net


def laid_out(net: nn.Module, channels_last: bool = True) -> nn.Module:
    """The network, its kernels of images and volumes with the channels last or first."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in net.parameters():
        if weight.ndim in last:
            layout = last[weight.ndim] if channels_last else torch.contiguous_format
            weight.data = weight.data.contiguous(memory_format=layout)
    return net


def folded(x: Tensor, patch: int) -> Tensor:
    """Pixels of each patch become channels: (batch, c pᵈ, h/p, w/p …)."""
    for axis in range(2, x.ndim):
        x = x.unflatten(axis, (-1, patch)).movedim(axis + 1, 2).flatten(1, 2)
    return x


def unfolded(x: Tensor, patch: int) -> Tensor:
    """The inverse of `folded`."""
    for axis in reversed(range(2, x.ndim)):
        x = x.unflatten(1, (-1, patch)).movedim(2, axis + 1).flatten(axis, axis + 1)
    return x


def positions(
    corners: Tensor, sides: Sequence[int], whole: Sequence[int]
) -> Float[Tensor, "n dims *space"]:
    """(2(i + k) + 1)/N − 1: where the k-th pixel of a crop lies along each axis, in ±1.

    Args:
        corners: i, (n, dims), the first pixel of each crop.
        sides: of the crops.
        whole: N, the sides of the image they are cut from.
    """
    axes = []
    for axis, (side, n) in enumerate(zip(sides, whole, strict=True)):
        pixel = corners[:, axis, None] + torch.arange(side)
        shape = [len(corners), *(1,) * len(sides)]
        shape[1 + axis] = side
        axes.append(((2 * pixel + 1) / n - 1).reshape(shape).expand(-1, *sides))
    return torch.stack(axes, 1)


@final
class Guided(nn.Module):
    """F(x) + w (F(x, class) − F(x)): guidance without a classifier, of weight w.

    As D is affine in F, so is D guided. Ho & Salimans, "Classifier-Free Diffusion
    Guidance", 2022; w = 1 is the network held at its class.

    Args:
        net: a network that was trained with its class and without.
        label: the class.
        weight: w.
    """

    def __init__(self, net: nn.Module, label: int, weight: float) -> None:
        super().__init__()
        self.held, self.weight = AtClass(net, label), weight

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        without = self.held.net(x, c_noise)
        return without + self.weight * (self.held(x, c_noise) - without)
