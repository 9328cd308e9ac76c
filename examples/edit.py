"""Edit what a corrupted image shows: restore it by STSL, then say what it should be.

    python examples/edit.py MODEL small.png --factor 8 --source "a cat" --target "a dog"

MODEL is a latent diffusion model as diffusers saves it, the picture one reduced by the
factor. STSL, told the source prompt, finds the image behind it; the probability-flow ODE
carries its latents up to the noise level that ``strength`` sets, and down again told the
target prompt. After Rout et al., "Beyond First-Order Tweedie", CVPR 2024, whose second
stage swaps attention maps as well, which is not done here.
"""

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Generator, Tensor

import invsolve as iv
from invsolve import io
from invsolve.operators import Downsample, GaussianNoise
from invsolve.priors.latent import Condition, LatentPrior, load_latent
from invsolve.samplers import stsl
from invsolve.samplers.core import ddim, path
from invsolve.samplers.latents import ddpm_levels


@torch.no_grad()
def carried(prior: LatentPrior, z: Tensor, sigmas: Tensor, seed: Generator) -> Tensor:
    """Latents along the probability-flow ODE by DDIM, through levels in any order."""
    for sigma, sigma_next in pairwise(sigmas):
        z = ddim(z, prior.denoise(z, sigma), sigma, sigma_next, 0.0, seed)
    return z


def edit(
    problem: iv.InverseProblem,
    model: Path,
    source: Condition | str,
    target: Condition | str,
    *,
    strength: float = 0.6,
    guidance: float = 3.0,
    steps: int = 50,
    lam: float = 1.0,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """The restored image and the edited one, (n, c, h, w) each.

    Args:
        problem: what was measured of images in [0, 1]; linear.
        model: a folder of diffusers with a text encoder, unless conditions are tensors.
        source, target: what the image shows, and what it is to show.
        strength: in (0, 1], which part of the levels is gone up and down again.
        guidance: of the way down.
        steps: levels of STSL and of both ways.
        lam: of `stsl`.
        generator: where every random number comes from.

    Raises:
        ValueError: strength is out of its range, or the network takes no prompt.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength:g}")
    before = load_latent(model, condition=source)
    after = load_latent(model, condition=target, guidance=guidance)
    if not before.info.conditioning:
        raise ValueError(f"{model} is unconditional: there is nothing to edit by")
    options = {"steps": steps, "lam": lam, "trace": "off"}
    restored = iv.solve(problem, before, stsl, generator=generator, **options)
    x = restored.samples[0]
    sigmas = ddpm_levels(before, x, steps, None)
    low = sigmas[-max(2, round(strength * steps)) :]
    z = carried(before, before.encode(x), low.flip(0), generator)
    return x, after.decode(carried(after, z, path(low), generator)).detach()


def main() -> None:
    """Restore, edit, and write both beside each other."""
    parser = argparse.ArgumentParser(description="Edit what a corrupted image shows.")
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--sigma", type=float, default=0.02, help="of the noise")
    parser.add_argument("--source", default="", help="what it shows")
    parser.add_argument("--target", required=True, help="what it is to show")
    parser.add_argument("--strength", type=float, default=0.6)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("edited.png"))
    args = parser.parse_args()
    picture = io.read(args.picture, colour=True)
    y = picture.values[None]
    shape = (args.factor * y.shape[-2], args.factor * y.shape[-1])
    A = Downsample(args.factor, shape)
    both = edit(
        iv.InverseProblem(y, A, GaussianNoise(args.sigma)),
        args.model,
        args.source,
        args.target,
        strength=args.strength,
        guidance=args.guidance,
        generator=Generator().manual_seed(args.seed),
    )
    beside = torch.cat([x[0].clamp(0, 1) for x in both], -1)
    io.write(args.out, replace(picture, values=beside))


if __name__ == "__main__":
    main()
