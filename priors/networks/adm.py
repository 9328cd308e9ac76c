"""The U-Net of Dhariwal & Nichol 2021 (ADM), with the names of its published weights."""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Resample = Literal["up", "down"] | None
GROUPS = 32


@final
@dataclass(frozen=True)
class ADMConfig:
    """What an ADM U-Net is made of.

    Args:
        channels: of an image.
        out_channels: of the output, twice as many where it has learnt a variance.
        width: of the sinusoidal embedding; a quarter of the embedding's own.
        widths: channels at each resolution, finest first; each halves the last.
        blocks: residual blocks at each resolution of the encoder.
        attention: whether there is attention, at each resolution.
        head_channels: of each attention head; None for a number of heads.
        heads: of each attention where head_channels is None.
        new_attention_order: whether q, k and v are split before the heads are.
        scale_shift: whether the embedding scales and shifts, or is only added.
        resample: "residual" blocks that halve or double, "conv"olutions, or "pool"ing.
        classes: how many it is conditional on; None for an unconditional one.
    """

    channels: int
    out_channels: int
    width: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    head_channels: int | None
    heads: int
    new_attention_order: bool
    scale_shift: bool
    resample: Literal["residual", "conv", "pool"]
    classes: int | None

    def heads_of(self, channels: int) -> int:
        """How many heads an attention of so many channels has."""
        heads = (
            self.heads if self.head_channels is None else channels // self.head_channels
        )
        if heads < 1 or channels % heads:
            raise ValueError(
                f"{channels} channels of an attention cannot be cut into heads: give "
                "'heads' or 'head_channels' in the card's network"
            )
        return heads


def sinusoidal(t: Tensor, width: int) -> Tensor:
    """(cos ω_i t, sin ω_i t) with ω_i = 10000^(−i/h), i = 0 … h−1 for h = width/2."""
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * i / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, width % 2))


def resampled(x: Tensor, way: Resample) -> Tensor:
    """Each pixel four times, or the mean of each 2×2."""
    match way:
        case "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        case "down":
            return F.avg_pool2d(x, 2)
        case None:
            return x


@final
class ResBlock(nn.Module):
    """skip(x) + conv(norm(conv(norm(x)) with the embedding)), resampled in between."""

    def __init__(
        self, c_in: int, c_out: int, config: ADMConfig, way: Resample = None
    ) -> None:
        super().__init__()
        self.way: Resample = way
        self.scale_shift = config.scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(4 * config.width, (1 + config.scale_shift) * c_out)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, c_out),
            nn.SiLU(),
            nn.Identity(),  # dropout's place
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[:2](x)
        h, x = resampled(h, self.way), resampled(x, self.way)
        h = self.in_layers[2](h)
        emb = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, 1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + emb)
        return self.skip_connection(x) + self.out_layers[1:](h)


@final
class Attention(nn.Module):
    """x + proj(softmax(qᵀk/√c) v), over all positions, in heads of c channels."""

    def __init__(self, channels: int, config: ADMConfig) -> None:
        super().__init__()
        self.heads = config.heads_of(channels)
        self.new_order = config.new_attention_order
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)
        h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        return (flat + self.proj_out(h.flatten(1, 2))).reshape(x.shape)


@final
class Resampling(nn.Module):
    """Half or twice the size: by a convolution, or by the mean and by repetition."""

    def __init__(self, channels: int, way: Literal["up", "down"], conv: bool) -> None:
        super().__init__()
        self.way: Resample = way
        self.with_conv = conv
        if not conv:
            return
        if way == "down":
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not self.with_conv:
            return resampled(x, self.way)
        return self.op(x) if self.way == "down" else self.conv(resampled(x, "up"))


@final
class ADMUNet(nn.Module):
    """n̂(x_t, t), and a learnt variance in further channels where there is one.

    It takes images of any size that 2^(levels − 1) divides, and fractional steps t.
    """

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = config
        emb = 4 * config.width
        self.time_embed = nn.Sequential(
            nn.Linear(config.width, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        if config.classes is not None:
            self.label_emb = nn.Embedding(config.classes, emb)

        def resampling(channels: int, way: Literal["up", "down"]) -> nn.Module:
            if config.resample == "residual":
                return ResBlock(channels, channels, config, way)
            return Resampling(channels, way, config.resample == "conv")

        c = config.widths[0]
        stem = nn.Conv2d(config.channels, c, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([stem])])
        skips = [c]
        levels = list(zip(config.widths, config.attention, strict=True))
        for level, (width, attends) in enumerate(levels):
            if level:
                self.input_blocks.append(nn.ModuleList([resampling(c, "down")]))
                skips.append(c)
            for _ in range(config.blocks):
                block: list[nn.Module] = [ResBlock(c, width, config)]
                c = width
                if attends:
                    block.append(Attention(c, config))
                self.input_blocks.append(nn.ModuleList(block))
                skips.append(c)
        self.middle_block = nn.ModuleList(
            [ResBlock(c, c, config), Attention(c, config), ResBlock(c, c, config)]
        )
        self.output_blocks = nn.ModuleList()
        for level, (width, attends) in reversed(list(enumerate(levels))):
            for i in range(config.blocks + 1):
                block = [ResBlock(c + skips.pop(), width, config)]
                c = width
                if attends:
                    block.append(Attention(c, config))
                if level and i == config.blocks:
                    block.append(resampling(c, "up"))
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, c),
            nn.SiLU(),
            nn.Conv2d(c, config.out_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        emb = self.time_embed(sinusoidal(t, self.config.width).to(x.dtype))
        if label is not None:
            emb = emb + self.label_emb(label)
        stem, *encoder = self.input_blocks
        (conv,) = stem.children()
        h = conv(x)
        skips = [h]
        for block in encoder:
            h = _run(block, h, emb)
            skips.append(h)
        h = _run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = _run(block, torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)


def _run(block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    for layer in block.children():
        h = layer(h, emb)
    return h
