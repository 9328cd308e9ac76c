"""deepinv's samplers, on our operators by the bridge, with our priors and our noise.

Our priors speak [−1, 1] here; deepinv's denoisers speak [0, 1].
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from invsolve.operators import GaussianNoise, LinearOperator
from invsolve.operators.bridge import to_deepinv
from invsolve.priors import Affine, AffineMap, Prior

from . import noise

HALF = AffineMap(0.5, 0.5)
"""x = u/2 + 1/2: from [−1, 1] to [0, 1]."""


def denoiser(prior: Prior) -> Any:
    """A prior as deepinv's ``Denoiser``."""
    from deepinv.models.base import Denoiser

    class FromPrior(Denoiser):
        def forward(self, x: Tensor, sigma: Any, **_: Any) -> Tensor:
            level = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1)
            level = level[0] if len(level) == 1 else level
            return prior.denoise(x, level)

    return FromPrior()


def physics(A: LinearOperator, sigma: float, shape: tuple[int, ...]) -> Any:
    """The operator with its noise, as deepinv's."""
    made = to_deepinv(A, GaussianNoise(sigma), image_shape=shape)
    dtype = torch.get_default_dtype()
    made.noise_model.sigma = made.noise_model.sigma.to(dtype)
    return made


def diffpir(
    prior: Prior,
    y: Tensor,
    A: LinearOperator,
    sigma: float,
    *,
    steps: int,
    lam: float,
    zeta: float,
    generator: Generator,
    shape: tuple[int, ...],
    cg_steps: int = 50,
    tol: float = 1e-4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its result in [0, 1], the levels it took in [−1, 1], and where it started from."""
    import deepinv as dinv

    P = physics(A, sigma, shape)
    # Its data fidelity passes no settings on.
    given = {"solver": "CG", "max_iter": cg_steps, "tol": tol}
    step = P.prox_l2
    P.prox_l2 = lambda z, y, gamma, **_: step(z, y, gamma, **given)
    model = dinv.sampling.DiffPIR(
        model=denoiser(Affine(prior, HALF)),
        data_fidelity=dinv.optim.data_fidelity.L2(),
        sigma=sigma,
        max_iter=steps,
        zeta=zeta,
        lambda_=lam,
    )
    with noise(generator):
        x = model(y, P)
    sigmas = model.sigmas[model.seq.long()].double()
    return x, sigmas, 2 * A.adjoint(y) - 1


def ddrm(
    prior: Prior,
    y: Tensor,
    A: LinearOperator,
    sigma: float,
    *,
    sigmas: np.ndarray,
    generator: Generator,
    shape: tuple[int, ...],
    first: float = 1.0,
    others: float = 1.0,
) -> Tensor:
    """Its result, all in the prior's own range; its noise multiplied as given."""
    import deepinv as dinv

    P = physics(A, sigma, shape)
    model = dinv.sampling.DDRM(denoiser(prior), sigmas=sigmas, eps=0.0)
    with noise(generator, scale=lambda k: others if k else first):
        return model(y.clone(), P)


def posterior(
    prior: Prior,
    y: Tensor,
    A: LinearOperator,
    sigma: float,
    guidance: str,
    *,
    steps: int,
    weight: float,
    generator: Generator,
    x_init: Tensor,
    shape: tuple[int, ...],
    cg_steps: int = 3,
) -> Tensor:
    """``DPS`` (for ``norm``) or ``PosteriorDiffusion``, by its DDPM solver; in [0, 1].

    Args:
        guidance: ``norm``, ``pigdm`` or ``moments``.
        x_init: x = u₀ + σn at the first level, in [−1, 1].
        cg_steps: of its conjugate gradients.
    """
    import deepinv as dinv

    s = dinv.sampling
    D = denoiser(Affine(prior, HALF))
    P = physics(A, sigma, shape)
    dtype = torch.float64
    if guidance == "norm":
        model = s.DPS(D, num_steps=steps + 1, weight=weight, rng=generator)
    else:
        terms = {
            "pigdm": s.PiGDMDataFidelity,
            "moments": s.MomentMatchingDataFidelity,
        }
        model = s.PosteriorDiffusion(
            data_fidelity=terms[guidance](
                D, weight=weight, cg_max_iter=cg_steps, cg_tol=1e-9
            ),
            denoiser=D,
            sde=s.VariancePreservingDiffusion(alpha=1.0),
            solver=s.DDPMSolver(
                timesteps=torch.linspace(1, 0, steps + 1, dtype=dtype), rng=generator
            ),
        )
    scale = model.sde.scale_t(torch.tensor(1.0, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(y, P, x_init=scale * x_init.to(dtype))


def vp_levels(steps: int) -> Tensor:
    """σ of its variance-preserving SDE at the times it steps through, without the 0."""
    import deepinv as dinv

    sde = dinv.sampling.VariancePreservingDiffusion()
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return torch.stack([sde.sigma_t(v) for v in t]).double()
