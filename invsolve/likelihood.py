"""How likely a prior holds an image to be, by its probability flow."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Generator, Tensor

from .priors import Prior
from .random import rademacher
from .shapes import PerItem, X


@torch.no_grad()
def log_likelihood(
    prior: Prior,
    x: X,
    *,
    steps: int = 40,
    probes: int = 1,
    sigma_range: tuple[float, float] | None = None,
    generator: Generator,
    progress: Callable = iter,
) -> PerItem:
    """log p(x₀) = log N(x_T; 0, σ_T²I) + ∫ (d − tr ∂D/∂x)/σ dσ, in nats.

    The integral runs along the probability flow dx/dσ = (x − D(x; σ))/σ from the lowest
    to the highest level, by Heun's method in ln σ; the trace is Hutchinson's estimate,
    vᵀ(∂D/∂x)v with v = ±1 (Song et al., ICLR 2021, §4.3; Grathwohl et al., ICLR 2019).
    What is told is the density of x₀ + σ_min n at x, in the images' own unit.

    Args:
        prior: a denoiser that can be differentiated.
        x: the images, (n, c, …).
        steps: two passes forward and as many backward for each.
        probes: v's for each image; the same throughout the flow.
        sigma_range: the lowest and the highest level, in the prior's range, where they
            are not the prior's. The highest must be far above the images' spread.
        generator: of the v's.
        progress: wraps the loop, as ``tqdm`` does.
    """
    inner, map = prior.normalised
    u = map.inverse(x)
    low, high = sigma_range or (inner.sigma_min, inner.sigma_max)
    ends = torch.tensor([low, high], dtype=u.dtype, device=u.device).log()
    times = torch.linspace(float(ends[0]), float(ends[1]), steps + 1).to(u)
    vs = [rademacher(u, generator) for _ in range(probes)]
    d, gained = u[0].numel(), torch.zeros(len(u)).to(u)

    def slope(u: X, sigma: Tensor) -> tuple[X, PerItem]:
        """du/d ln σ and the divergence that goes with it."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            out = inner.denoise(u, sigma)
            trace = torch.zeros(len(u)).to(u)
            for k, v in enumerate(vs):
                (g,) = torch.autograd.grad(out, u, v, retain_graph=k < probes - 1)
                trace = trace + (g * v).flatten(1).sum(1) / probes
        return (u - out).detach(), d - trace.detach()

    for t, t_next in progress(list(pairwise(times))):
        h = t_next - t
        du, div = slope(u, t.exp())
        du_next, div_next = slope(u + h * du, t_next.exp())
        u = u + h / 2 * (du + du_next)
        gained = gained + h / 2 * (div + div_next)
    square = (u / high).square().flatten(1).sum(1)
    log_noise = -square / 2 - d * (torch.log(torch.tensor(2 * torch.pi)) / 2 + ends[1])
    return log_noise + gained - d * torch.log(torch.tensor(map.scale)).to(u)


def bits_per_dimension(log_p: PerItem, dimensions: int) -> PerItem:
    """−log₂ p for each pixel and channel: less is likelier."""
    return -log_p / (dimensions * torch.log(torch.tensor(2.0)))
