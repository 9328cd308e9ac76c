"""NCSN++, DDPM++ and ADM as Karras et al. 2022 arrange and name them.

NCSN++ and DDPM++ are of Song et al. 2021, ADM of Dhariwal & Nichol 2021. All three are
one U-Net block with different constants.
"""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adm import Resample, sinusoidal

Taps = tuple[float, ...]


@final
@dataclass(frozen=True)
class SongConfig:
    """What such a U-Net is made of.

    Args:
        kind: "song" (NCSN++, DDPM++) or "dhariwal" (ADM).
        channels, out_channels: of an image and of the output.
        resolution: the images' size while training. It is in the weights' names and
            limits nothing.
        widths: channels at each resolution, finest first; each halves the last.
        blocks: residual blocks at each resolution of the encoder.
        attention: whether there is attention, at each resolution.
        stem: channels after the first convolution.
        noise_channels, emb_channels: of the noise level's features, and of what is made
            of them.
        fourier: whether these features are of random frequencies, or sinusoidal.
        encoder: what the image, halved, does at each resolution: nothing ("standard"),
            is added ("skip") or is carried on with what it was added to ("residual").
        decoder: whether the output is made at the finest resolution only ("standard")
            or is a sum over all ("skip").
        taps: of the filter that halves and doubles.
        classes: how many it is conditional on; None for an unconditional one.
    """

    kind: Literal["song", "dhariwal"]
    channels: int
    out_channels: int
    resolution: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    stem: int
    noise_channels: int
    emb_channels: int
    fourier: bool
    encoder: Literal["standard", "skip", "residual"]
    decoder: Literal["standard", "skip"]
    taps: Taps
    classes: int | None

    def name(self, level: int, part: str) -> str:
        """What a part is called in the weights' names."""
        size = self.resolution >> level
        return f"{size}x{size}_{part}"


def kernel(taps: Taps, x: Tensor) -> Tensor:
    """k kᵀ / (Σk)² for each of x's channels."""
    k = torch.tensor(taps, dtype=x.dtype, device=x.device)
    return (k.outer(k) / k.sum() ** 2).expand(x.shape[1], 1, -1, -1)


def resampled(x: Tensor, way: Resample, taps: Taps) -> Tensor:
    """Filtered and halved, or doubled and filtered; zeros beyond the border."""
    if way is None:
        return x
    k, c, pad = kernel(taps, x), x.shape[1], (len(taps) - 1) // 2
    if way == "down":
        return F.conv2d(x, k, stride=2, padding=pad, groups=c)
    return F.conv_transpose2d(x, 4 * k, stride=2, padding=pad, groups=c)


def norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation of at least four channels a group."""
    return nn.GroupNorm(max(min(32, channels // 4), 1), channels, eps)


@final
class Block(nn.Module):
    """A residual block, and attention over all positions where there are heads."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        config: SongConfig,
        *,
        way: Resample = None,
        attends: bool = False,
    ) -> None:
        super().__init__()
        song = config.kind == "song"
        self.way: Resample = way
        self.taps, self.adaptive = config.taps, not song
        self.scale = math.sqrt(0.5) if song else 1.0
        self.heads = 0 if not attends else 1 if song else c_out // 64
        eps = 1e-6 if song else 1e-5
        self.norm0 = norm(c_in, eps)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(config.emb_channels, (1 + self.adaptive) * c_out)
        self.norm1 = norm(c_out, eps)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        projects = c_in != c_out or (song and way is not None)
        self.skip = nn.Conv2d(c_in, c_out, 1) if projects else nn.Identity()
        if self.heads:
            self.norm2 = norm(c_out, eps)
            self.qkv = nn.Conv2d(c_out, 3 * c_out, 1)
            self.proj = nn.Conv2d(c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(resampled(F.silu(self.norm0(x)), self.way, self.taps))
        emb = self.affine(emb)[..., None, None]
        if self.adaptive:
            scale, shift = emb.chunk(2, 1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + emb)
        x = self.skip(resampled(x, self.way, self.taps)) + self.conv1(F.silu(h))
        x = x * self.scale
        if self.heads:
            # q, k and v of a channel lie side by side.
            qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.heads, -1, 3))
            q, k, v = (part.mT for part in qkv.unbind(3))
            h = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
            x = (x + self.proj(h)) * self.scale
        return x


@final
class Frequencies(nn.Module):
    """2π f_i c_noise, of random frequencies f_i that are kept with the weights."""

    freqs: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(count))

    def forward(self, noise: Tensor) -> Tensor:
        return noise[:, None] * (2 * torch.pi * self.freqs)


@final
class SongUNet(nn.Module):
    """F(x, c_noise), an image of x's size that 2^(levels − 1) divides."""

    def __init__(self, config: SongConfig) -> None:
        super().__init__()
        self.config = config
        song = config.kind == "song"
        noise, emb = config.noise_channels, config.emb_channels
        if config.fourier:
            self.map_noise = Frequencies(noise // 2)
        if config.classes is not None:
            width = noise if song else emb
            self.map_label = nn.Linear(config.classes, width, bias=song)
        self.map_layer0 = nn.Linear(noise, emb)
        self.map_layer1 = nn.Linear(emb, emb)

        levels = list(zip(config.widths, config.attention, strict=True))
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, skips, c_image = config.stem, [config.stem], config.channels
        stem = nn.Conv2d(config.channels, c, 3, padding=1)
        self.enc[config.name(0, "conv")] = stem
        for level, (width, attends) in enumerate(levels):
            if level:
                self.enc[config.name(level, "down")] = Block(c, c, config, way="down")
                if config.encoder == "skip":
                    skip = nn.Conv2d(config.channels, c, 1)
                    self.enc[config.name(level, "aux_skip")] = skip
                if config.encoder == "residual":
                    # Padded by the filter that goes before it.
                    skip = nn.Conv2d(c_image, c, 3, stride=2)
                    self.enc[config.name(level, "aux_residual")] = skip
                    c_image = c
                skips.append(c)
            for i in range(config.blocks):
                block = Block(c, width, config, attends=attends)
                self.enc[config.name(level, f"block{i}")] = block
                c = width
                skips.append(c)
        last = len(levels) - 1
        for level, (width, attends) in reversed(list(enumerate(levels))):
            if level == last:
                self.dec[config.name(level, "in0")] = Block(c, c, config, attends=True)
                self.dec[config.name(level, "in1")] = Block(c, c, config)
            else:
                self.dec[config.name(level, "up")] = Block(c, c, config, way="up")
            for i in range(config.blocks + 1):
                at_all = attends and (not song or i == config.blocks)
                block = Block(c + skips.pop(), width, config, attends=at_all)
                self.dec[config.name(level, f"block{i}")] = block
                c = width
            if song and (level == 0 or config.decoder == "skip"):
                self.dec[config.name(level, "aux_norm")] = norm(c, 1e-6)
                conv = nn.Conv2d(c, config.out_channels, 3, padding=1)
                self.dec[config.name(level, "aux_conv")] = conv
        if not song:
            self.out_norm = norm(c, 1e-5)
            self.out_conv = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def embedded(self, noise: Tensor, label: Tensor | None) -> Tensor:
        """The embedding of the noise level, and of the class where there is one."""
        config, song = self.config, self.config.kind == "song"
        told: Tensor | float = 0.0
        if config.classes is not None:
            classes = noise.new_zeros(len(noise), config.classes)
            if label is not None:
                classes = classes.scatter(1, label[:, None], 1.0)
            told = self.map_label(
                classes * math.sqrt(config.classes) if song else classes
            )
        if not song:
            emb = sinusoidal(noise, config.noise_channels)
            emb = self.map_layer1(F.silu(self.map_layer0(emb))) + told
            return F.silu(emb)
        if config.fourier:
            angles = self.map_noise(noise)
        else:
            half = config.noise_channels // 2
            i = torch.arange(half, dtype=noise.dtype, device=noise.device)
            angles = noise[:, None] * 10_000 ** (-i / (half - 1))
        emb = torch.cat([angles.sin(), angles.cos()], 1) + told
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        taps = self.config.taps
        emb = self.embedded(noise.to(x.dtype), label)
        image, h, skips = x, x, []
        for name, part in self.enc.items():
            if name.endswith("aux_skip"):
                image = resampled(image, "down", taps)
                h = skips[-1] = h + part(image)
            elif name.endswith("aux_residual"):
                pad = (len(taps) - 1) // 2 + 1
                k = kernel(taps, image)
                image = F.conv2d(image, k, padding=pad, groups=image.shape[1])
                h = skips[-1] = image = (h + part(image)) * math.sqrt(0.5)
            else:
                h = part(h, emb) if isinstance(part, Block) else part(h)
                skips.append(h)
        out = None
        for name, part in self.dec.items():
            if isinstance(part, Block):
                if "_block" in name:
                    h = torch.cat([h, skips.pop()], 1)
                h = part(h, emb)
            elif name.endswith("aux_conv"):
                seen = self.dec[name.replace("aux_conv", "aux_norm")](h)
                made = part(F.silu(seen))
                out = made if out is None else resampled(out, "up", taps) + made
        return self.out_conv(F.silu(self.out_norm(h))) if out is None else out
