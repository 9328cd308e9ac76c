"""The noise schedules that configurations name, as ᾱ_t in double precision."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..schedules import ddpm_alphas_cumprod
from .adm import cosine_alphas_cumprod

SCHEDULES = ("linear", "scaled_linear", "sigmoid", "cosine")
STEPS = 100_000  # real ones have thousands


def alphas_cumprod(
    schedule: str, steps: int, beta_min: float = 1e-4, beta_max: float = 0.02
) -> Float[Tensor, " steps"]:
    """ᾱ_t = Π (1 − β_s) for β_s between β_min and β_max along a named schedule.

    - ``linear``: β rises evenly (Ho et al. 2020)
    - ``scaled_linear``: √β does (Rombach et al. 2022)
    - ``sigmoid``: β follows a sigmoid on [−6, 6] (Xu et al. 2022, GeoDiff)
    - ``cosine``: Nichol & Dhariwal 2021, eq. 17, without β_min and β_max

    Raises:
        ValueError: the schedule is unknown, or its numbers make none.
    """
    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ValueError(
            f"the noise schedule {schedule!r} is unknown: known are {known}"
        )
    if not (1 < steps <= STEPS and 0 < beta_min <= beta_max < 1):
        raise ValueError(
            f"{steps} steps from β = {beta_min:g} to {beta_max:g} are no noise schedule"
        )
    if schedule == "linear":
        return ddpm_alphas_cumprod(steps, beta_min, beta_max)
    if schedule == "cosine":
        return cosine_alphas_cumprod(steps)
    if schedule == "scaled_linear":
        ends = (beta_min**0.5, beta_max**0.5)
        betas = torch.linspace(*ends, steps, dtype=torch.float64) ** 2
    else:
        ramp = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        betas = beta_min + ramp * (beta_max - beta_min)
    return of_betas(betas.tolist())


def of_betas(betas: Sequence[float]) -> Float[Tensor, " steps"]:
    """ᾱ_t = Π (1 − β_s)."""
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


def without_terminal_signal(
    alphas_cumprod: Float[Tensor, " steps"],
) -> Float[Tensor, " steps-1"]:
    """√ᾱ shifted and scaled so that it starts where it did and ends at 0.

    Lin et al. 2024, *Common Diffusion Noise Schedules and Sample Steps are Flawed*,
    algorithm 1. The last step, where nothing of the image is left, is left out.
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1]))[:-1] ** 2
