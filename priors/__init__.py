"""Diffusion priors, all seen as denoisers."""

from . import hub as hub
from .analytic import (
    GaussianMixturePrior as GaussianMixturePrior,
    GaussianPrior as GaussianPrior,
    StationaryPrior as StationaryPrior,
)
from .base import Affine as Affine, AffineMap as AffineMap, Prior as Prior
from .equivariant import Equivariant as Equivariant
from .experts import Experts as Experts
from .families.denoisers import (
    from_callable as from_callable,
    from_deepinv as from_deepinv,
)
from .hub import fetch as fetch
from .info import Info as Info
from .parameterisation import (
    DiscretePrior as DiscretePrior,
    EDMPrior as EDMPrior,
    FlowPrior as FlowPrior,
)
from .schedules import (
    ddpm_alphas_cumprod as ddpm_alphas_cumprod,
    ddpm_sigmas as ddpm_sigmas,
    karras_sigmas as karras_sigmas,
)
from .slices import (
    Groups as Groups,
    Slices as Slices,
    Sliding as Sliding,
    TwoPlanes as TwoPlanes,
)
from .tilted import Tilted as Tilted
from .unet import UNet as UNet, UNetConfig as UNetConfig
from .weights import available as available, load as load
