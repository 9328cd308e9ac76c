"""Training a latent prior: an autoencoder, then denoising score matching on its latents.

The autoencoder minimises E |x − Dec(z)| + w KL(q(z | x) ‖ N(0, I)), z ~ q(z | x), both
as means over elements; its latents are then shifted and scaled to mean 0 and variance 1,
channel by channel, and the U-Net is trained on them as in `invsolve.training`.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from invsolve import io
from invsolve.priors import AffineMap, EDMPrior, UNet, UNetConfig
from invsolve.priors.latent import AutoencoderConfig, KLAutoencoder, latent_card
from invsolve.priors.weights import sha256
from invsolve.random import randn_like
from invsolve.training import Optimisation, Plan, Progress, TrainConfig, edm_loss
from invsolve.training_data import draw, load

LEVELS = (0.1, 0.4, 1.6)
"""The noise levels, of latents with variance 1, at which training reports denoising."""

Stop = Callable[[], bool]
Log = Callable[[Any], list[float]]


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
    ``NAME.json`` (its card), ``autoencoder.csv``, ``losses.csv`` and the checkpoints
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
    device = device or torch.device("cpu")
    cutting = Generator().manual_seed(seed)
    images = load(config.data.train, config.data, cutting)
    val = load(config.data.val, config.data, cutting)
    val = val[torch.linspace(0, len(val) - 1, 48).long()].float().to(device)
    coding = AutoencoderConfig.from_dict(
        {**AutoencoderConfig().to_dict(), **config.autoencoder}
    )
    network = UNetConfig.from_dict({**UNetConfig().to_dict(), **config.network})
    if network.channels != coding.latent_channels:
        raise ValueError(
            f"the latents have {coding.latent_channels} channels, the network "
            f"{network.channels}: set network.channels = {coding.latent_channels}"
        )

    def reconstruction(net: Any, generator: Generator) -> Tensor:
        x = draw(images, config.data, config.encoding.batch, 0, generator).to(device)
        return autoencoder_loss(net, x, config.kl, config.encoding.bf16, generator)

    autoencoder, done = _fit(
        coding.build,
        config.encoding,
        reconstruction,
        lambda net: [reconstruction_psnr(net, val)],
        out / "autoencoder",
        ("psnr",),
        seed,
        device,
        progress,
        stop,
    )
    if not done:
        return None
    latents = _latents(autoencoder, images, out / "latents.pt", device)
    shift, scale = latents.mean((0, 2, 3)), 1 / latents.std((0, 2, 3))
    autoencoder.shift.copy_(shift.reshape(-1, 1, 1))
    autoencoder.scale.copy_(scale.reshape(-1, 1, 1))
    latents = ((latents - shift[:, None, None]) * scale[:, None, None]).half()
    with torch.no_grad():
        val_latents = autoencoder.encode(val)
    opt = config.optimisation

    def matching(net: nn.Module, generator: Generator) -> Tensor:
        index = torch.randint(len(latents), (opt.batch,), generator=generator)
        return edm_loss(net, latents[index].float().to(device), opt, generator)

    unet, _ = _fit(
        lambda: UNet(network),
        opt,
        matching,
        lambda net: latent_psnr(EDMPrior(net, opt.sigma_data), val_latents),
        out / "unet",
        tuple(f"psnr_at_{level}" for level in LEVELS),
        seed,
        device,
        progress,
        stop,
    )
    return _export(
        config, coding, network, autoencoder, unet, val, val_latents, out, seed
    )


def autoencoder_loss(
    net: KLAutoencoder, x: Tensor, kl: float, bf16: bool, generator: Generator
) -> Tensor:
    """mean |x − Dec(z)| + w mean KL(q(z | x) ‖ N(0, I)) with one draw z ~ q(z | x)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        q = net.posterior(x)
        mean, logvar = q.mean.float(), q.logvar.float()
        z = mean + (logvar / 2).exp() * randn_like(mean, generator)
        back = net.decode(z)
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


def _latents(net: KLAutoencoder, images: Tensor, cache: Path, device: Any) -> Tensor:
    """μ(x) of every image and of its mirror image, before shift and scale."""
    if cache.exists():
        return torch.load(cache, weights_only=True).float()
    parts = []
    with torch.no_grad():
        for x in images.split(32):
            x = x.float().to(device)
            parts += [net.encode(v).half().cpu() for v in (x, x.flip(-1))]
    latents = torch.cat(parts)
    io.replace(cache, lambda path: torch.save(latents, path))
    return latents.float()


def _fit(
    make: Callable[[], nn.Module],
    opt: Optimisation,
    loss: Callable[[Any, Generator], Tensor],
    log: Log,
    stem: Path,
    names: tuple[str, ...],
    seed: int,
    device: torch.device,
    progress: Progress,
    stop: Stop,
) -> tuple[Any, bool]:
    """The averaged network and whether it is done; goes on from ``stem``.pt."""
    with torch.random.fork_rng():  # torch's layers initialise from the global state
        torch.manual_seed(seed)
        net = make().to(device).to(memory_format=torch.channels_last)
    ema = AveragedModel(
        net,
        avg_fn=lambda mean, new, n: mean.lerp(
            new, 1 - min(opt.ema, float((1 + n) / (10 + n)))
        ),
    )
    adam = torch.optim.AdamW(
        net.parameters(), opt.lr, betas=(0.9, 0.99), weight_decay=0
    )
    generator = Generator().manual_seed(seed)
    plan, every = Plan(opt, 0.0), max(1, opt.images // opt.batch // 25)
    first, history = 0, []
    checkpoint = stem.with_suffix(".pt")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        adam.load_state_dict(state["adam"])
        generator.set_state(state["generator"].cpu())
        first, history = state["step"], state["history"]

    def save(step: int) -> None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "net": net.state_dict(),
            "ema": ema.state_dict(),
            "adam": adam.state_dict(),
            "generator": generator.get_state(),
            "step": step,
            "history": history,
        }
        io.replace(checkpoint, lambda path: torch.save(state, path))

        def write_csv(path: str) -> None:
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([("images", "loss", *names), *history])

        io.replace(stem.with_suffix(".csv"), write_csv)

    done, running = first >= plan.steps, []
    for step in progress(range(first, plan.steps)):
        for group in adam.param_groups:
            group["lr"] = opt.lr * plan.rate(step)
        value = loss(net, generator)
        adam.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        ema.update_parameters(net)
        running.append(value.detach())
        done = step + 1 == plan.steps
        if done or (step + 1) % every == 0:
            mean = float(torch.stack(running).mean())
            running.clear()
            history.append([plan.seen(step + 1), mean, *log(ema.module)])
            save(step + 1)
        if stop():
            save(step + 1)
            break
    return ema.module.eval().requires_grad_(False), done


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
