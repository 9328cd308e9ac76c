"""RED: regularisation by denoising, the score of a smoothed prior as a gradient.

Romano, Elad, Milanfar, "The Little Engine That Could: Regularization by Denoising",
SIAM Journal on Imaging Sciences 2017, §5.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import X
from .core import Init, Progress, gives, initial
from .stopping import Discrepancy


@gives("point_estimate")
@torch.no_grad()
def red(
    problem: InverseProblem,
    prior: Prior,
    *,
    method: Literal["fixed-point", "gradient"] = "fixed-point",
    steps: int = 50,
    sigmas: Tensor | None = None,
    sigma_range: tuple[float, float] = (0.05, 0.4),
    lam: float = 1.0,
    lr: float | None = None,
    init: Init = "zeros",
    cg_steps: int = 50,
    rtol: float = 1e-6,
    discrepancy: float | None = None,
    generator: Randomness | None = None,
    progress: Progress = iter,
) -> X:
    """The x at which −∇ log p(y | x) + λ/σ² (x − D(x; σ)) vanishes.

    (x − D)/σ² is −∇ log p_σ by Tweedie's formula, so that with λ = 1 this is the mode of
    p(y | x) p_σ(x), and tends to the posterior's mode as σ falls to 0 (Reehorst &
    Schniter 2019 on what else it may be: a network's D is not quite a gradient).

        fixed-point:  x ← argmin −log p(y | x) + λ/2σ² ‖x − D(x; σ)‖²
        gradient:     x ← x − τ (−∇ log p(y | x) + λ/σ² (x − D(x; σ)))

    The paper's λ is λ/σ² here, and its σ is held fixed; so it is with a range of
    (σ, σ). Falling levels begin with a smooth prior, which has fewer local optima; what
    the data do not see moves by σ²/(C + σ²) of its way a step, slowly where σ is low.

    Args:
        problem: linear for ``fixed-point``, where noise other than Gaussian enters by
            its precision; any for ``gradient``.
        prior: the denoiser.
        method: one of the two above; both settle at the same x.
        steps: how many; each is one pass of the network.
        sigmas: the noise levels instead, one step each.
        sigma_range: the lowest and the highest, the others evenly between in ln σ; in
            the prior's range.
        lam: λ, the prior's weight; 1 is what Bayes asks for.
        lr: τ; unless given, 1/(‖A‖²_W + λ/σ²) with W the noise's precision, which
            cannot overshoot. It must be given for nonlinear operators.
        init: where to start: A⁺y, Aᴴy, zero, an image, or another method; see
            `core.initial`. A⁺y fits the data from the first, so that ``discrepancy``
            would stop there.
        cg_steps, rtol: of conjugate gradients, where there is no closed form.
        discrepancy: τ of Morozov's principle: stop an item once ‖y − A(x)‖²_W is at
            most so many times the number of measurements; see `Discrepancy`.
        generator: not used: nothing is random.
        progress: wraps the loop, as ``tqdm`` does.

    Returns:
        x, one for each item of y.

    Raises:
        ValueError: the operator is nonlinear, with ``fixed-point`` or without ``lr``.
    """
    if method not in ("fixed-point", "gradient"):
        raise ValueError(f"unknown method {method!r}: fixed-point or gradient")
    x = initial(problem, init)
    sigmas = falling(steps, sigmas, sigma_range, x)
    stop = Discrepancy(problem, x, discrepancy)
    data = curvature(problem, x) if method == "gradient" and lr is None else 0.0
    for sigma in progress(sigmas):
        rho = lam / sigma**2
        denoised = prior.denoise(x, sigma)
        if method == "fixed-point":
            x_next = problem.prox(denoised, rho, max_steps=cg_steps, rtol=rtol)
        else:
            tau = 1 / (data + rho) if lr is None else lr
            x_next = x - tau * (problem.misfit_grad(x) + rho * (x - denoised))
        x = stop.keep(x, x_next)
        if stop.all:
            break
    return x


def falling(
    steps: int, sigmas: Tensor | None, sigma_range: tuple[float, float], like: X
) -> Tensor:
    """The given levels, or evenly spaced ones in ln σ, highest first."""
    if sigmas is None:
        low, high = (math.log10(sigma) for sigma in sigma_range)
        sigmas = torch.logspace(high, low, steps, dtype=torch.float64)
    return sigmas.to(like.device, like.real.dtype)


def curvature(problem: InverseProblem, like: X) -> float:
    """‖A‖²_W, the largest curvature of the misfit, with W the noise's precision."""
    return problem.whitened()[0].norm(like) ** 2
