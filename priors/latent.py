"""Priors of latents: an autoencoder between images and what the diffusion sees.

x = Dec(z) with z₀ ~ p(z), of which ``denoise(z, σ) = E[z₀ | z₀ + σn = z]`` is known.
Rombach, Blattmann, Lorenz, Esser, Ommer, "High-Resolution Image Synthesis with Latent
Diffusion Models", CVPR 2022.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from invsolve.bf16 import autocast
from invsolve.random import Randomness, randn_like
from invsolve.shapes import Sigma, X

from .base import AffineMap, Prior
from .families.betas import alphas_cumprod, of_betas, without_terminal_signal
from .families.configs import read_json
from .families.family import Card, Family, State, filled, sigma_data_of
from .families.hugging_face import PREDICTS, RENAMED, SCHEDULES, WEIGHTS
from .info import tell
from .parameterisation import DiscretePrior, EDMPrior, SigmaData, check_image
from .reading import read_checkpoint
from .unet import UNet, UNetConfig

Images = Float[Tensor, "batch c h w"]
Latents = Float[Tensor, "batch k i j"]


class Autoencoder(nn.Module, ABC):
    """Images (batch, channels, h, w) ↔ latents (batch, latent_channels, h/f, w/f).

    Both ways are differentiable, and the latents are as the diffusion sees them.

    Attributes:
        channels, latent_channels: of images and of latents.
        factor: f, how many pixels a side a latent stands for.
    """

    channels: int
    latent_channels: int
    factor: int

    def encode(self, x: Images, generator: Randomness | None = None) -> Latents:
        """The mean of q(z | x), or a draw from it if a generator is given.

        Raises:
            ValueError: there is only a decoder.
        """
        raise ValueError(
            "this latent prior has no encoder, which this needs: use ldps, or stsl with "
            "init='gaussian'"
        )

    @abstractmethod
    def decode(self, z: Latents) -> Images:
        """Dec(z)."""


@final
class KLAutoencoder(Autoencoder):
    """z = (μ(x) − shift) · scale and x = Dec(z / scale + shift), by a variational network.

    Args:
        vae: diffusers' ``AutoencoderKL``.
        scale, shift: numbers, or one for each latent channel.
        patch: pixels a side that are folded into channels at the network's door.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        vae: Any,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.vae, self.patch = vae, patch
        self.channels = vae.config.in_channels // patch**2
        self.latent_channels = vae.config.latent_channels
        self.factor = patch * 2 ** (len(vae.config.block_out_channels) - 1)
        for name, value in (("scale", scale), ("shift", shift)):
            value = torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(name, value)

    def posterior(self, x: Images) -> Any:
        """q(z | x) before scale and shift, with ``mean``, ``std`` and ``kl()``."""
        folded = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        return self.vae.encode(folded).latent_dist

    def encode(self, x: Images, generator: Randomness | None = None) -> Latents:
        q = self.posterior(x)
        z = q.mean
        if generator is not None:
            z = z + q.std * randn_like(z, generator)
        return (z - self.shift) * self.scale

    def decode(self, z: Latents) -> Images:
        out = self.vae.decode(z / self.scale + self.shift).sample
        return F.pixel_shuffle(out, self.patch) if self.patch > 1 else out


def forgetful(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """f(t), whose activations are computed again in the backward pass, not kept.

    f must give the same again: draws from a generator would be others.
    """
    if t.requires_grad and torch.is_grad_enabled():
        return checkpoint(f, t, use_reentrant=False)
    return f(t)


@final
class Tiled(Autoencoder):
    """An autoencoder run on overlapping squares, whose results are blended.

    The memory is that of one square, with gradients too: a square's activations are
    computed again in the backward pass. A square's result counts not at all within a
    quarter of the overlap from its inner edges, and the more the further in, so that the
    whole is the untiled one wherever a latent sees no further than that. (Group
    normalisation sees the whole image: with it the two differ a little.)

    Args:
        inner: the autoencoder.
        tile: side of the squares in pixels.
        overlap: of neighbours, in pixels.

    Raises:
        ValueError: a side is not a multiple of the factor, or the overlap too large.
    """

    def __init__(self, inner: Autoencoder, tile: int = 512, overlap: int = 128) -> None:
        super().__init__()
        self.inner, f = inner, inner.factor
        if tile % f or overlap % f or not 0 < overlap <= tile // 2:
            raise ValueError(
                f"tile and overlap must be multiples of {f} and the overlap at most half "
                f"a tile, got {tile} and {overlap}"
            )
        self.channels, self.latent_channels = inner.channels, inner.latent_channels
        self.factor, self.tile, self.overlap = f, tile // f, overlap // f

    def encode(self, x: Images, generator: Randomness | None = None) -> Latents:
        def run(square: Tensor) -> Tensor:
            if generator is not None:
                return self.inner.encode(square, generator)
            return forgetful(self.inner.encode, square)

        return self._blended(run, x, self.factor, 1, self.latent_channels)

    def decode(self, z: Latents) -> Images:
        def run(square: Tensor) -> Tensor:
            return forgetful(self.inner.decode, square)

        return self._blended(run, z, 1, self.factor, self.channels)

    def _blended(
        self,
        run: Callable[[Tensor], Tensor],
        t: Tensor,
        taken: int,
        given: int,
        channels: int,
    ) -> Tensor:
        """``taken`` values a side become ``given``, for each latent of a side."""
        sides = [n // taken for n in t.shape[-2:]]
        total = t.new_zeros(len(t), channels, *(given * n for n in sides))
        weights = t.new_zeros([given * n for n in sides])
        for i in self._starts(sides[0]):
            for j in self._starts(sides[1]):
                source, target = (
                    (
                        ...,
                        slice(i * k, (i + self.tile) * k),
                        slice(j * k, (j + self.tile) * k),
                    )
                    for k in (taken, given)
                )
                square = run(t[source])
                ramps = (
                    self._ramp(start, n, given).to(t)
                    for start, n in zip((i, j), sides, strict=True)
                )
                window = torch.outer(*ramps)
                total[target] += window * square
                weights[target] += window
        return total / weights

    def _starts(self, n: int) -> list[int]:
        last = max(0, n - self.tile)
        return [*range(0, last, self.tile - self.overlap), last]

    def _ramp(self, start: int, n: int, given: int) -> Tensor:
        """A square's weight along a side of n latents: 1, and less towards its edges."""
        length = min(self.tile, n) * given
        inside = torch.arange(length, dtype=torch.float64) + 0.5
        margin, rise = self.overlap * given / 4, self.overlap * given / 2
        ramp = torch.ones(length, dtype=torch.float64)
        if start > 0:
            ramp = ramp.minimum((inside - margin) / rise)
        if start + self.tile < n:
            ramp = ramp.minimum((length - inside - margin) / rise)
        return ramp.clamp_min(0)


@final
class LatentPrior(Prior):
    """p(x) of x = Dec(z), z₀ ~ p(z): it denoises latents, and encodes and decodes images.

    `invsolve.solve` checks images against it and maps its range as for any prior; the
    samplers in latents (`stsl`, `psld`, `ldps`, `resample`) run in z and give x.

    Args:
        prior: of the latents. Its conditioning is its own affair.
        autoencoder: between images in [−1, 1], or whatever ``map`` begins from, and z.
        map: from the autoencoder's range to the image's unit.
        checkpointing: forget the activations of network and autoencoder, and compute
            them again in the backward pass: less memory, about a third more time. A
            `Tiled` autoencoder does so by itself.
        bf16_coding: encode and decode in bfloat16, which `invsolve.solve`'s ``precision``
            leaves alone: faster on a device that computes in it, off by about a
            thousandth of the range; on others nothing changes.
    """

    def __init__(
        self,
        prior: Prior,
        autoencoder: Autoencoder,
        map: AffineMap | None = None,
        *,
        checkpointing: bool = False,
        bf16_coding: bool = False,
    ) -> None:
        self.prior, self.autoencoder = prior, autoencoder
        self.map = map or AffineMap(1.0, 0.0)
        self.checkpointing, self.bf16_coding = checkpointing, bf16_coding
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        """E[z₀ | z₀ + σn = z], of latents."""
        if x.ndim < 2 or x.shape[1] != self.autoencoder.latent_channels:
            raise ValueError(
                f"this prior denoises latents of {self.autoencoder.latent_channels} "
                "channels, not images: use a sampler that works in them (stsl, psld, "
                "ldps or resample), or invsolve.solve, which lets others do so"
            )

        def run(z: Tensor) -> Tensor:
            return self.prior.denoise(z, sigma)

        return forgetful(run, x) if self.checkpointing else run(x)

    def encode(self, x: X, generator: Randomness | None = None) -> Tensor:
        """Enc(x), the mean of q(z | x), or a draw from it if a generator is given."""
        code = partial(self.autoencoder.encode, generator=generator)
        return self._coded(code, self.map.inverse(x), again=generator is None)

    def decode(self, z: X) -> Tensor:
        """Dec(z), in the image's unit."""
        return self.map(self._coded(self.autoencoder.decode, z, again=True))

    def latent_like(self, x: X) -> Tensor:
        """Zeros of the shape, dtype and device of the latents of images like x."""
        return x.new_zeros(len(x), *self._latent_shape(tuple(x.shape[1:])))

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        inner = LatentPrior(
            self.prior,
            self.autoencoder,
            checkpointing=self.checkpointing,
            bf16_coding=self.bf16_coding,
        )
        return inner, self.map

    def check(self, shape: tuple[int, ...]) -> None:
        f = self.autoencoder.factor * vars(self.prior).get("multiple_of", 1)
        check_image(shape, self.autoencoder.channels, f)
        latent = self._latent_shape(shape)
        try:
            self.prior.check(latent)
        except ValueError as error:
            size, small = ("×".join(map(str, s[1:])) for s in (shape, latent))
            raise ValueError(
                f"images of {size} have latents of {small}, and {error}"
            ) from error

    def _latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        f = self.autoencoder.factor
        return (self.autoencoder.latent_channels, *(n // f for n in shape[1:]))

    def _coded(
        self, code: Callable[[Tensor], Tensor], t: Tensor, again: bool
    ) -> Tensor:
        """By the autoencoder; again: whether it may be computed a second time."""
        # Squares forget on their own: around them it would be done twice.
        whole = not isinstance(self.autoencoder, Tiled)
        forgets = self.checkpointing and whole and again
        with autocast(t.device, self.bf16_coding):
            coded = forgetful(code, t) if forgets else code(t)
        return coded.to(t.dtype)


@final
@dataclass(frozen=True)
class AutoencoderConfig:
    """The small autoencoder of the bundled latent priors; written into their cards.

    Args:
        channels: how many an image has.
        latent_channels: how many its latents have.
        widths: channels at each resolution, finest first; each halves the last.
        layers: residual blocks at each resolution.
        patch: pixels a side that are folded into channels at the door.
        groups: of the group normalisation.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (48, 96)
    layers: int = 1
    patch: int = 2
    groups: int = 8

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AutoencoderConfig":
        """The configuration a card tells of; unknown names are a TypeError."""
        return cls(**{**values, "widths": tuple(values["widths"])})

    def to_dict(self) -> dict[str, Any]:
        """As a card tells it."""
        return {**asdict(self), "widths": list(self.widths)}

    def build(self) -> KLAutoencoder:
        """The network, at random; no attention, so that images of any size will do."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        n, folded = len(self.widths), self.channels * self.patch**2
        blocks: dict[str, Any] = {  # diffusers' own annotations know of one block only
            "block_out_channels": self.widths,
            "down_block_types": ("DownEncoderBlock2D",) * n,
            "up_block_types": ("UpDecoderBlock2D",) * n,
        }
        vae = AutoencoderKL(
            **blocks,
            in_channels=folded,
            out_channels=folded,
            latent_channels=self.latent_channels,
            layers_per_block=self.layers,
            norm_num_groups=self.groups,
            mid_block_add_attention=False,
        )
        scale, shift = (
            torch.ones(self.latent_channels),
            torch.zeros(self.latent_channels),
        )
        return KLAutoencoder(vae, scale, shift, self.patch)


NAME = "latent-edm"


def latent_card(
    name: str,
    autoencoder: AutoencoderConfig,
    network: UNetConfig,
    *,
    sigma_data: SigmaData,
    map: AffineMap,
    unit: str,
    training: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """The card of a latent EDM U-Net: all that `from_card` needs, and a user asks."""
    return {
        "name": name,
        "family": NAME,
        "autoencoder": autoencoder.to_dict(),
        "network": network.to_dict(),
        "sigma_data": sigma_data,
        "sigma_min": 0.002,
        "sigma_max": 20.0,
        "scale": map.scale,
        "offset": map.offset,
        "unit": unit,
        "training": training,
        **more,
    }


def load_state(state: State, card: Card) -> LatentPrior:
    """The prior that a `latent_card` tells of, from ``autoencoder.*`` and ``network.*``.

    Raises:
        ValueError: the card lacks something, or the weights are not what it says.
    """
    try:
        coding = AutoencoderConfig.from_dict(card["autoencoder"])
        network = UNetConfig.from_dict(card["network"])
        sigma_data = sigma_data_of(card)
        levels = [float(card[k]) for k in ("sigma_min", "sigma_max")]
        map = AffineMap(float(card["scale"]), float(card["offset"]))
    except KeyError as error:
        raise ValueError(f"its card lacks {error}") from error

    def make() -> nn.Module:
        return nn.ModuleDict({"autoencoder": coding.build(), "network": UNet(network)})

    nets: Any = filled(make, state)
    prior = EDMPrior(
        nets["network"],
        sigma_data,
        *levels,
        multiple_of=network.multiple_of,
        channels=network.channels,
    )
    latent = LatentPrior(prior, nets["autoencoder"], map)
    decisions = [
        f"autoencoder: widths {coding.widths}, {coding.latent_channels} numbers for "
        f"{nets['autoencoder'].factor}×{nets['autoencoder'].factor} pixels (card)",
        f"U-Net of the latents: widths {network.widths}, EDM (card)",
    ]
    return _told(latent, decisions, NAME, parameterisation="edm", **_facts(card))


def sniff(state: State, card: Card) -> bool:
    """Whether these are the weights of a latent prior of our own."""
    wanted = ("autoencoder.scale", "network.unet.conv_in.weight")
    return card.get("family", NAME) == NAME and all(name in state for name in wanted)


FAMILY = Family(NAME, sniff, load_state)


def load_card(path: str | Path) -> LatentPrior:
    """A latent prior of our own, by its card (.json) with its weights beside it.

    Raises:
        ValueError: a file is missing or damaged, or is not what it says.
    """
    path = Path(path)
    card = read_json(path)
    if card.get("family") != NAME:
        raise ValueError(
            f"{path} is no latent prior's card: its family is not {NAME!r}"
        )
    state, _ = read_checkpoint(path.with_suffix(".safetensors"))
    return load_state(state, card)


# --- diffusers' folders

Condition = Mapping[str, Tensor]
"""What a network is told, by name and without a batch: ``encoder_hidden_states``
(tokens, dim), ``class_labels`` (), SDXL's ``text_embeds`` (dim) and ``time_ids`` (6)."""

TOLD = ("encoder_hidden_states", "class_labels", "text_embeds", "time_ids")


@final
class Conditioned(nn.Module):
    """F(x, t, ∅) + w (F(x, t, c) − F(x, t, ∅)): classifier-free guidance.

    Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022. With w = 1 it is F(x, t, c),
    one pass; else two. w > 1 is no denoiser of any prior: it exaggerates c.

    Args:
        unet: a U-Net of diffusers.
        condition: c.
        null: ∅, needed unless w = 1.
        guidance: w.
    """

    def __init__(
        self,
        unet: nn.Module,
        condition: Condition,
        null: Condition | None = None,
        guidance: float = 1.0,
    ) -> None:
        super().__init__()
        if guidance != 1 and null is None:
            raise ValueError(
                "guidance other than 1 needs the null condition: give null"
            )
        for part in (condition, null or {}):
            if unknown := sorted(set(part) - set(TOLD)):
                raise ValueError(
                    f"a condition {unknown[0]!r} is unknown: give " + ", ".join(TOLD)
                )
        self.unet, self.guidance = unet, guidance
        self.condition = nn.ParameterDict(_frozen(condition))
        self.null = nn.ParameterDict(_frozen(null or {}))
        self.embedding: Tensor | None = None

    @contextmanager
    def telling(self, embedding: Float[Tensor, "batch tokens dim"]) -> Iterator[None]:
        """Meanwhile each item is told its own embedding, with gradients."""
        self.embedding = embedding
        try:
            yield
        finally:
            self.embedding = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told: dict[str, Any] = dict(self.condition.items())
        own = self.embedding
        if own is not None:
            told.pop("encoder_hidden_states")
        out = self._ask(x, t, told, own)
        if self.guidance == 1:
            return out
        null = self._ask(x, t, self.null)
        return null + self.guidance * (out - null)

    def _ask(
        self, x: Tensor, t: Tensor, told: Any, own: Tensor | None = None
    ) -> Tensor:
        batched = {k: v.expand(len(x), *v.shape) for k, v in told.items()}
        if own is not None:
            batched["encoder_hidden_states"] = own
        added = {k: batched.pop(k) for k in TOLD[2:] if k in batched}
        if added:
            batched["added_cond_kwargs"] = added
        return self.unet(x, t, **batched).sample


def _frozen(condition: Condition) -> dict[str, nn.Parameter]:
    return {k: nn.Parameter(v, requires_grad=False) for k, v in condition.items()}


def load_latent(
    folder: str | Path,
    *,
    condition: Condition | str | None = None,
    null: Condition | str | None = None,
    guidance: float = 1.0,
    tile: int | None = None,
    overlap: int | None = None,
    checkpointing: bool = False,
    bf16_coding: bool = False,
) -> LatentPrior:
    """A latent diffusion model as diffusers saves it: ``vae/``, ``unet/``, ``scheduler/``.

    The autoencoder is an ``AutoencoderKL``, whose scale and shift are read from its
    configuration; the network a ``UNet2DModel`` or ``UNet2DConditionModel``. Images are
    in [0, 1]. Weights are safetensors, or torch files read as data; nothing is executed.

    Args:
        folder: as ``save_pretrained`` wrote it.
        condition: what the network is told: a prompt, which needs ``text_encoder/`` and
            ``tokenizer/`` in the folder and the package transformers, or tensors. A
            network with cross-attention is told the empty prompt unless given, or, where
            the folder has no text encoder, zeros.
        null: the same for ∅, of guidance.
        guidance: w of `Conditioned`; 1 for none.
        tile, overlap: of `Tiled`, in pixels, for big images; untiled unless given.
        checkpointing, bf16_coding: of `LatentPrior`.

    Raises:
        ValueError: a part is missing, damaged or of a kind not known here; or a prompt
            is given to a network that takes none.
        ModuleNotFoundError: a prompt needs transformers, which is not installed.
    """
    folder = Path(folder)
    vae_config, unet_config = (
        read_json(folder / k / "config.json") for k in ("vae", "unet")
    )
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    decisions: list[str] = []
    try:
        autoencoder = _autoencoder(folder / "vae", vae_config)
        unet = _unet(folder / "unet", unet_config)
        if unet_config["in_channels"] != autoencoder.latent_channels:
            raise ValueError(
                f"its network takes {unet_config['in_channels']} channels, but the "
                f"latents have {autoencoder.latent_channels}"
            )
        told = _condition(folder, unet_config, condition, decisions)
        nothing = None
        if guidance != 1:
            if not told:
                raise ValueError(
                    "its network is unconditional, so that there is nothing to be guided "
                    "by: leave guidance out"
                )
            nothing = _condition(folder, unet_config, null, decisions)
        net = Conditioned(unet, told, nothing, guidance).eval().requires_grad_(False)
        levels = 2 ** (len(unet_config["block_out_channels"]) - 1)
        prior = DiscretePrior(
            net,
            _schedule(schedule),
            _predicts(schedule),
            multiple_of=levels,
            channels=autoencoder.latent_channels,
        )
    except KeyError as error:
        raise ValueError(
            f"cannot load {folder}: a configuration lacks {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"cannot load {folder}: {error}") from error
    if tile is not None:
        whole, f = autoencoder, autoencoder.factor
        autoencoder = Tiled(whole, tile, overlap or max(f, tile // 4 // f * f))
        decisions.append(f"coded in squares of {tile} pixels")
    decisions.append(
        f"latents of {autoencoder.latent_channels} channels for "
        f"{autoencoder.factor}×{autoencoder.factor} pixels (vae/config.json)"
    )
    latent = LatentPrior(
        prior,
        autoencoder,
        AffineMap(0.5, 0.5),
        checkpointing=checkpointing,
        bf16_coding=bf16_coding,
    )
    conditioning = ", ".join(told) or ""
    facts = {"parameterisation": prior.predicts, "conditioning": conditioning}
    return _told(latent, decisions, "diffusers-latent", **facts)


def _weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, of one file or of the shards that its index names."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map", {}).values()
        files = [folder / Path(str(name)).name for name in sorted(set(named))]
    else:
        files = [folder / name for name in WEIGHTS if (folder / name).is_file()][:1]
    if not files:
        raise ValueError(f"there are no weights in {folder}")
    return {k: v for file in files for k, v in read_checkpoint(file)[0].items()}


def _of_class(config: Mapping[str, Any], known: Sequence[str]) -> str:
    name = config.get("_class_name")
    if name not in known:
        raise ValueError(f"its {name} is not known here: known are " + ", ".join(known))
    return str(name)


def _autoencoder(folder: Path, config: Mapping[str, Any]) -> Autoencoder:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    _of_class(config, ["AutoencoderKL"])
    state = {}
    for name, value in _weights(folder).items():
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in RENAMED:
            parts[-2] = RENAMED[parts[-2]]
            value = value.reshape(value.shape[:2]) if value.ndim == 4 else value
        state[".".join(parts)] = value
    vae = filled(lambda: AutoencoderKL.from_config(dict(config)), state)  # pyright: ignore[reportArgumentType, reportReturnType]
    scale, shift = _scale_and_shift(vae.config)
    return KLAutoencoder(vae, scale, shift).eval().requires_grad_(False)


def _scale_and_shift(config: Any) -> tuple[Tensor, Tensor]:
    """z = (μ − shift) · scale, from a scaling factor, and means and spreads if given."""
    scale = torch.tensor(float(config.scaling_factor))
    shift = torch.tensor(float(config.shift_factor or 0.0))
    if config.latents_mean is not None and config.latents_std is not None:
        shift = torch.tensor(config.latents_mean).reshape(-1)
        scale = scale / torch.tensor(config.latents_std).reshape(-1)
    return scale, shift


def _unet(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    import diffusers

    name = _of_class(config, ["UNet2DModel", "UNet2DConditionModel"])
    kind = getattr(diffusers, name)
    return filled(lambda: kind.from_config(dict(config)), _weights(folder))


def _schedule(config: Mapping[str, Any]) -> Float[Tensor, " T"]:
    kind = str(config.get("_class_name"))
    if config.get("prediction_type") == "flow_prediction" or "Flow" in kind:
        raise ValueError(f"its schedule {kind} is of a flow, which is not read here")
    if config.get("trained_betas") is not None:
        abar = of_betas(config["trained_betas"])
    else:
        name = str(config.get("beta_schedule", "linear"))
        abar = alphas_cumprod(
            SCHEDULES.get(name, name),
            int(config.get("num_train_timesteps", 1000)),
            float(config.get("beta_start", 1e-4)),
            float(config.get("beta_end", 0.02)),
        )
    return (
        without_terminal_signal(abar) if config.get("rescale_betas_zero_snr") else abar
    )


def _predicts(config: Mapping[str, Any]) -> Any:
    name = str(config.get("prediction_type", "epsilon"))
    if name not in PREDICTS:
        raise ValueError(
            f"its prediction type {name!r} is not one of " + ", ".join(PREDICTS)
        )
    return PREDICTS[name]


def _condition(
    folder: Path,
    config: Mapping[str, Any],
    given: Condition | str | None,
    decisions: list[str],
) -> Condition:
    """What the network is to be told, checked against what it can hear."""
    attends = config["_class_name"] == "UNet2DConditionModel"
    if isinstance(given, str) and not attends:
        raise ValueError(
            "its network is unconditional and takes no text: leave the prompt out"
        )
    if isinstance(given, Mapping):
        if "encoder_hidden_states" in given and not attends:
            raise ValueError("its network is unconditional: leave the embedding out")
        return _heard(given, config)
    if not attends:
        return {}
    if config.get("addition_embed_type"):
        raise ValueError(
            "its network is told more than a prompt: give condition as tensors "
            f"({', '.join(TOLD)})"
        )
    if given is None and not (folder / "text_encoder").is_dir():
        decisions.append("told zeros, since there is no text encoder")
        return {"encoder_hidden_states": torch.zeros(1, config["cross_attention_dim"])}
    decisions.append(f"told the prompt {given or ''!r}")
    return _heard({"encoder_hidden_states": _embedded(folder, given or "")}, config)


def _heard(told: Condition, config: Mapping[str, Any]) -> Condition:
    """The same, if an embedding is of the network's width."""
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    embedding = told.get("encoder_hidden_states")
    if embedding is None or not isinstance(width, int):
        return told
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise ValueError(
            f"the embedding must be (tokens, {width}), as the network's cross-attention "
            f"takes it, got {tuple(embedding.shape)}"
        )
    return told


def _embedded(folder: Path, prompt: str) -> Float[Tensor, "tokens dim"]:
    try:
        from transformers import (  # pyright: ignore[reportMissingImports]
            CLIPTextModel,
            CLIPTokenizer,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a prompt needs transformers: pip install 'invsolve[text]', or give "
            "condition as tensors"
        ) from error
    for part in ("tokenizer", "text_encoder"):
        if not (folder / part).is_dir():
            raise ValueError(f"a prompt needs {part}/, which is not in the folder")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(
            folder / "tokenizer", local_files_only=True
        )
        made: Any = CLIPTextModel.from_pretrained(
            folder / "text_encoder",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        encoder, read = made
        if missing := sorted(read["missing_keys"]):  # transformers would draw them
            raise ValueError(f"its weights lack {missing[0]!r}")
    # A damaged file can make transformers raise anything at all.
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(f"cannot read its text encoder: {first_line}") from error
    length = tokenizer.model_max_length
    tokens = tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True
    ).input_ids
    with torch.no_grad():
        return encoder(torch.tensor([tokens])).last_hidden_state[0].float()


def _facts(card: Card) -> dict[str, Any]:
    return {k: card.get(k, "") for k in ("unit", "licence")}


def _told(
    prior: LatentPrior, decisions: Sequence[str], family: str, **facts: Any
) -> LatentPrior:
    f, inner = prior.autoencoder.factor, vars(prior.prior).get("multiple_of", 1)
    prior.decisions = decisions
    image = {"channels": prior.autoencoder.channels, "multiple_of": f * inner}
    low, high = prior.map(torch.tensor([-1.0, 1.0])).tolist()
    tell(prior, family=family, spatial_dims=2, range=(low, high), **image, **facts)
    return prior
