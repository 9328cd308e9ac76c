"""Training a latent prior: an autoencoder, then denoising score matching on its latents.

The autoencoder minimises E |x − Dec(z)| + w KL(q(z | x) ‖ N(0, I)), z ~ q(z | x), both
as means over elements; its latents are then shifted and scaled to mean 0 and variance 1,
channel by channel, and the U-Net is trained on them as in `invsolve.training`.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from invsolve import io
from invsolve.bf16 import autocast
from invsolve.priors import AffineMap, EDMPrior, UNet, UNetConfig
from invsolve.priors.latent import AutoencoderConfig, KLAutoencoder, latent_card
from invsolve.priors.weights import sha256
from invsolve.random import randn_like
from invsolve.training import TrainConfig, held_out, matching, noised, samples, shown
from invsolve.training_data import Data, draw, faded, load
from invsolve.training_loop import (
    Batch,
    Optimisation,
    Plan,
    Progress,
    Stop,
    Task,
    fit,
)

LEVELS = (0.1, 0.4, 1.6)
"""The noise levels, of latents with variance 1, at which training reports denoising."""


class LatentConfig(TrainConfig):
    """A training run, as a TOML file tells it; ``optimisation`` is of the U-Net."""

    autoencoder: dict[str, Any] = Field(default={})
    encoding: Optimisation = Optimisation(images=20_000, batch=16, lr=1e-3)
    """How long, and with what steps, the autoencoder is trained."""
    kl: float = Field(default=1e-3, ge=0)
    """w, the weight of the divergence."""


def train_latent(
    config: LatentConfig,
    out: Path,
    *,
    seed: int,
    device: torch.device | None = None,
    progress: Progress = iter,
    stop: Stop = lambda: False,
) -> Path | None:
    """Train, or go on where ``out``'s checkpoints left off; the prior's card is returned.

    Writes ``NAME.safetensors`` (averaged weights of both networks, float16),
    ``NAME.json`` (its card), ``autoencoder.csv``, ``unet.csv`` and the checkpoints
    ``autoencoder.pt``, ``latents.pt`` and ``unet.pt``, each whole or not at all.

    Args:
        config: what to train, on what.
        out: a folder for the results.
        seed: of the data's order, the noise and the weights.
        device: where; the CPU unless given.
        progress: wraps the loops, as ``tqdm`` does.
        stop: asked after each step whether time is up.

    Returns:
        The card, or None if time was up before the autoencoder was done.
    """
    device, opt = device or torch.device("cpu"), config.optimisation
    if opt.predicts != "edm":
        raise ValueError(
            f"a latent prior's network predicts edm, not {opt.predicts}: leave "
            "optimisation.predicts out"
        )
    board = out / "tensorboard" if config.tensorboard else None
    part = partial(fit, seed=seed, device=device, progress=progress, stop=stop)
    cutting = Generator().manual_seed(seed)
    images = load(config.data.train, config.data, cutting)
    val = held_out(load(config.data.val, config.data, cutting)).to(device)
    coding = AutoencoderConfig.from_dict(
        {**AutoencoderConfig().to_dict(), **config.autoencoder}
    )
    network = UNetConfig.from_dict({**UNetConfig().to_dict(), **config.network})
    if network.channels != coding.latent_channels:
        raise ValueError(
            f"the latents have {coding.latent_channels} channels, the network "
            f"{network.channels}: set network.channels = {coding.latent_channels}"
        )

    def pictures(step: int, generator: Generator) -> Batch:
        x = draw(images, config.data, config.encoding.batch, 0, generator).x
        factor = coding.patch * 2 ** (len(coding.widths) - 1)
        h, w = (side // factor for side in x.shape[2:])
        z = x.new_empty(len(x), coding.latent_channels, h, w)
        return {"x": x, "noise": randn_like(z, generator)}

    autoencoder, done = part(
        Task(
            coding.build,
            pictures,
            partial(autoencoder_loss, kl=config.kl, bf16=config.encoding.bf16),
            lambda net: [reconstruction_psnr(net, val)],
            ("psnr",),
            lambda net: shown(net.decode(net.encode(val[:8])), val),
        ),
        Plan(config.encoding),
        out / "autoencoder.pt",
        out / "autoencoder.csv",
        board=board and board / "autoencoder",
        told={"autoencoder": coding.to_dict()},
    )
    if not done:
        return None
    latents = _latents(
        autoencoder, images, config.data, out / "latents.pt", cutting, device
    )
    shift, scale = latents.mean((0, 2, 3)), 1 / latents.std((0, 2, 3))
    autoencoder.shift.copy_(shift.reshape(-1, 1, 1))
    autoencoder.scale.copy_(scale.reshape(-1, 1, 1))
    latents = ((latents - shift[:, None, None]) * scale[:, None, None]).half()
    with torch.no_grad():
        val_latents = autoencoder.encode(val)

    def prior_of(net: nn.Module) -> EDMPrior:
        return EDMPrior(net, opt.sigma_data)

    def drawn(net: nn.Module) -> Tensor:
        return autoencoder.decode(samples(prior_of(net), val_latents[:8]))

    def rows(step: int, generator: Generator) -> Batch:
        index = torch.randint(len(latents), (opt.batch,), generator=generator)
        return noised(latents[index].float(), opt, generator)

    unet, _ = part(
        Task(
            lambda: UNet(network),
            rows,
            partial(matching, bf16=opt.bf16),
            lambda net: latent_psnr(prior_of(net), val_latents),
            tuple(f"psnr_at_{level}" for level in LEVELS),
            lambda net: shown(drawn(net), val),
        ),
        Plan(opt),
        out / "unet.pt",
        out / "unet.csv",
        board=board and board / "unet",
        told={"network": network.to_dict()},
    )
    return _export(
        config, coding, network, autoencoder, unet, val, val_latents, out, seed
    )


def autoencoder_loss(
    net: KLAutoencoder, x: Tensor, noise: Tensor, kl: float, bf16: bool
) -> Tensor:
    """mean |x − Dec(z)| + w mean KL(q(z | x) ‖ N(0, I)) with z = μ(x) + s(x) · noise."""
    with autocast(x.device, bf16):
        q = net.posterior(x)
        mean, logvar = q.mean.float(), q.logvar.float()
        back = net.decode(mean + (logvar / 2).exp() * noise)
    divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
    return (back.float() - x).abs().mean() + kl * divergence


@torch.no_grad()
def reconstruction_psnr(net: KLAutoencoder, val: Tensor) -> float:
    """PSNR in dB of Dec(Enc(x)), for a data range of 2; the mean over images."""
    parts = [(net.decode(net.encode(x)) - x).square() for x in val.split(8)]
    return float((10 * (4 / torch.cat(parts).flatten(1).mean(1)).log10()).mean())


@torch.no_grad()
def latent_psnr(prior: EDMPrior, val: Tensor) -> list[float]:
    """−10 log₁₀ of the mean square error of D(z₀ + σn; σ), at each of `LEVELS`.

    Latents have variance 1, so that 0 dB is the error of knowing nothing but the mean.
    """
    generator, result = Generator().manual_seed(0), []
    for level in LEVELS:
        sigma = torch.tensor(level, device=val.device)
        z = val + sigma * randn_like(val, generator)
        error = (prior.denoise(z, sigma) - val).square().mean()
        result.append(float(-10 * error.log10()))
    return result


def _latents(
    net: KLAutoencoder,
    images: Tensor,
    data: Data,
    cache: Path,
    generator: Generator,
    device: torch.device,
) -> Tensor:
    """μ(x) of every image and of its mirror image, some faded, before shift and scale."""
    if cache.exists():
        return torch.load(cache, weights_only=True).float()
    parts = []
    with torch.no_grad():
        for x in images.split(32):
            for v in (x, x.flip(-1)):
                v = faded(v.float(), data.fade, generator) if data.fade else v.float()
                parts.append(net.encode(v.to(device)).half().cpu())
    latents = torch.cat(parts)
    io.replace(cache, lambda path: torch.save(latents, path))
    return latents.float()


def _export(
    config: LatentConfig,
    coding: AutoencoderConfig,
    network: UNetConfig,
    autoencoder: KLAutoencoder,
    unet: nn.Module,
    val: Tensor,
    val_latents: Tensor,
    out: Path,
    seed: int,
) -> Path:
    parts = {"autoencoder": autoencoder, "network": unet}
    weights = {
        f"{part}.{k}": v.half().contiguous()
        for part, net in parts.items()
        for k, v in net.state_dict().items()
    }
    file = out / f"{config.name}.safetensors"
    io.replace(file, lambda path: save_file(weights, path))
    opt = config.optimisation
    denoising = latent_psnr(EDMPrior(unet, opt.sigma_data), val_latents)
    card = latent_card(
        config.name,
        coding,
        network,
        sigma_data=opt.sigma_data,
        map=AffineMap(config.data.scale, config.data.offset),
        unit=config.data.unit,
        training={
            "seed": seed,
            "kl": config.kl,
            "autoencoder": config.encoding.model_dump(),
            "network": opt.model_dump(),
        },
        held_out={
            "reconstruction_psnr": round(reconstruction_psnr(autoencoder, val), 2),
            "latent_denoising_db": {
                f"{level:g}": round(value, 2)
                for level, value in zip(LEVELS, denoising, strict=True)
            },
        },
        sha256=sha256(file),
        **config.card,
    )
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    path = out / f"{config.name}.json"
    io.replace(path, lambda p: Path(p).write_text(text, "utf-8"))
    return path


def main() -> None:
    """``python -m invsolve.training_latent CONFIG --out FOLDER``."""
    import argparse
    import os
    import time
    from functools import partial

    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("INVSOLVE_DATA", ".")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    config: Any = LatentConfig.read(arguments.config)
    folders = {k: arguments.data / getattr(config.data, k) for k in ("train", "val")}
    config = config.model_copy(update={"data": config.data.model_copy(update=folders)})
    until = time.monotonic() + 60 * arguments.minutes
    train_latent(
        config,
        arguments.out,
        seed=arguments.seed,
        progress=partial(tqdm, mininterval=10),
        stop=lambda: time.monotonic() > until,
    )


if __name__ == "__main__":
    main()
