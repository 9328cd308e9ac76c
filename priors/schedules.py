"""Noise levels: pure functions, highest level first, no network in sight."""

import torch
from jaxtyping import Float
from torch import Tensor


def karras_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[Tensor, " n"]:
    """n noise levels from sigma_max down to sigma_min (Karras et al. 2022, eq. 5).

    >>> karras_sigmas(3, 1.0, 8.0, rho=1.0)
    tensor([8.0000, 4.5000, 1.0000])
    """
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    hi, lo = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return ((hi + ramp * (lo - hi)) ** rho).float()


def ddpm_alphas_cumprod(
    steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02
) -> Float[Tensor, " steps"]:
    """ᾱ_t = Π (1 − β_s) for the linear β of Ho et al. 2020, in double precision."""
    betas = torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)
    return (1 - betas).cumprod(0)


def ddpm_sigmas(n: int, steps: int = 1000) -> Float[Tensor, " n"]:
    """σ_t = √(1/ᾱ_t − 1) at n of the DDPM's steps, t = (n−1)k … k, 0 with k = ⌊T/n⌋.

    >>> ddpm_sigmas(2)
    tensor([3.4430, 0.0100], dtype=torch.float64)
    """
    if not 1 <= n <= steps:
        raise ValueError(f"the DDPM schedule has 1 to {steps} steps, got {n}")
    alphas_cumprod = ddpm_alphas_cumprod(steps)
    t = torch.arange(0, n * (steps // n), steps // n).flip(0)
    return (1 / alphas_cumprod[t] - 1).sqrt()
