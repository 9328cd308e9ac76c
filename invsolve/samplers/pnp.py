"""Plug-and-play: an optimiser's proximal map of the prior is replaced by its denoiser.

Venkatakrishnan, Bouman, Wohlberg, "Plug-and-Play Priors for Model Based
Reconstruction", GlobalSIP 2013 (ADMM); Kamilov, Mansour, Wohlberg, "A Plug-and-Play
Priors Approach for Solving Nonlinear Imaging Inverse Problems", IEEE SPL 2017 (proximal
gradient); Zhang, Li, Zuo, Zhang, Van Gool, Timofte, "Plug-and-Play Image Restoration
with Deep Denoiser Prior", TPAMI 2021, Algorithm 1 (half-quadratic splitting: DPIR).
"""

from typing import Literal

import torch
from torch import Tensor

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import X
from .core import Init, Progress, gives, initial
from .red import curvature, falling
from .stopping import Discrepancy


@gives("point_estimate")
@torch.no_grad()
def pnp(
    problem: InverseProblem,
    prior: Prior,
    *,
    method: Literal["hqs", "admm", "pgd"] = "hqs",
    steps: int = 8,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] = (0.05, 0.4),
    lam: float = 0.23,
    lr: float | None = None,
    init: Init = "pinv",
    cg_steps: int = 50,
    rtol: float = 1e-6,
    discrepancy: float | None = None,
    generator: Randomness | None = None,
    progress: Progress = iter,
) -> X:
    """min −log p(y | x) + λφ(x) by splitting, with D(·; σ) in place of prox of σ²φ.

    With P(v) = argmin −log p(y | x) + λ/2σ² ‖x − v‖²:

        hqs:   x ← P(z),                        z ← D(x; σ)
        admm:  x ← P(z − u),   u ← u + x − z′,  z′ = D(x + u; σ)
        pgd:   z ← D(z + τ ∇ log p(y | z); σ)

    At a fixed σ, ``admm`` and ``pgd`` settle at the same image where λ = σ²/τ; ``hqs``
    settles nearer to the denoiser's, and is meant for falling levels. On a Gaussian
    prior D is the proximal map of σ²φ with φ = −log p, so that with λ = 1 the image is
    the posterior's mean, whatever σ; of other priors it is only near the mode.

    Args:
        problem: linear for ``hqs`` and ``admm``, where noise other than Gaussian
            enters by its precision; any for ``pgd``.
        prior: the denoiser.
        method: one of the three above.
        steps: how many; each is one pass of the network. 8 are DPIR's; the other two
            need more.
        sigmas: the noise levels instead, one step each.
        sigma_range: the lowest and the highest, the others evenly between in ln σ; in
            the prior's range. DPIR falls from 49/255 of the image's range to the
            noise's own σ; (σ, σ) is the fixed level that the other two papers have.
        lam: λ, the prior's weight for ``hqs`` and ``admm``; 0.23 is DPIR's.
        lr: τ, the step of ``pgd``; unless given, 1/‖A‖²_W with W the noise's
            precision, which cannot diverge. It must be given for nonlinear operators.
        init: where to start: A⁺y, Aᴴy, zero, an image, or another method; see
            `core.initial`.
        cg_steps, rtol: of conjugate gradients, where there is no closed form.
        discrepancy: τ of Morozov's principle: stop an item once ‖y − A(z)‖²_W is at
            most so many times the number of measurements; see `Discrepancy`.
        generator: not used: nothing is random.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        z, one for each item of y.

    Raises:
        ValueError: the operator is nonlinear, with ``hqs`` or ``admm``, or without
            ``lr``.
    """
    if method not in ("hqs", "admm", "pgd"):
        raise ValueError(f"unknown method {method!r}: hqs, admm or pgd")
    z = initial(problem, init)
    sigmas = falling(steps, sigmas, sigma_range, z)
    stop = Discrepancy(problem, z, discrepancy)
    if lr is None:
        lr = 1 / curvature(problem, z) if method == "pgd" else 0.0
    u = torch.zeros_like(z)
    for sigma in progress(sigmas):
        if method == "pgd":
            v = z - lr * problem.misfit_grad(z)
        else:
            x = problem.prox(z - u, lam / sigma**2, max_steps=cg_steps, rtol=rtol)
            v = x + u
        z_next = prior.denoise(v, sigma)
        if method == "admm":
            u = v - z_next
        z = stop.keep(z, z_next)
        if stop.all:
            break
    return z
