"""Hounsfield units and linear attenuation: the one place where they meet."""

from torch import Tensor

MU_WATER = 0.0193
"""Linear attenuation of water in 1/mm at about 70 keV: the convention used here."""


def hu_to_mu(hu: Tensor) -> Tensor:
    """μ = μ_w (1 + HU/1000) in 1/mm; nothing attenuates less than vacuum.

    >>> import torch
    >>> hu_to_mu(torch.tensor([-1024.0, -1000.0, 0.0, 1000.0]))
    tensor([0.0000, 0.0000, 0.0193, 0.0386])
    """
    return MU_WATER * (1 + hu / 1000).clamp_min(0)


def mu_to_hu(mu: Tensor) -> Tensor:
    """HU = 1000 (μ/μ_w − 1).

    >>> import torch
    >>> mu_to_hu(torch.tensor([0.0, MU_WATER]))
    tensor([-1000.,     0.])
    """
    return 1000 * (mu / MU_WATER - 1)
