"""The denoiser with its Jacobian, for the samplers that look through the network."""

from collections.abc import Callable

import torch

from ..priors import Prior
from ..shapes import Sigma, X


def denoise_with_vjp(prior: Prior, x: X, sigma: Sigma) -> tuple[X, Callable[[X], X]]:
    """D(x; σ), and v ↦ Jᵀv with J = ∂D/∂x; each v is one backward pass.

    J is symmetric where D is a posterior mean, since then σ²J = Cov[x₀ | x].
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = prior.denoise(x, sigma)

    def vjp(v: X) -> X:
        return torch.autograd.grad(x0, x, v, retain_graph=True)[0]

    return x0.detach(), vjp
