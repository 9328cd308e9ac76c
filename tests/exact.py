"""Problems whose posterior is known exactly, and samplers followed without Monte Carlo.

With a Gaussian prior every sampler that is affine in its state is a chain
x = b + Σ_k F_k n_k of its draws n_k ~ N(0, I), so that mean b and covariance
Σ_k F_k F_kᵀ can be read off one run on unit vectors in place of noise.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, final
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.operators import GaussianNoise, LinearOperator
from invsolve.priors import (
    GaussianMixturePrior,
    GaussianPrior,
    Prior,
    ddpm_alphas_cumprod,
)
from invsolve.shapes import Sigma, X, Y

real = partial(torch.tensor, dtype=torch.float64)


@final
@dataclass(frozen=True, eq=False)
class Matrix(LinearOperator):
    """y = M x, with all the general methods: nothing in closed form."""

    matrix: Float[Tensor, "m d"]

    def apply(self, x: X) -> Y:
        return x @ self.matrix.T

    def adjoint(self, y: Y) -> X:
        return y @ self.matrix

    @property
    def image_shape(self) -> tuple[int, ...]:
        return (self.matrix.shape[1],)

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return (self.matrix.shape[0],)


# The toy: of two correlated numbers the first is measured.
MEAN = real([0.5, -0.5])
COV = real([[1.0, 0.8], [0.8, 1.0]])
A = real([[1.0, 0.0]])
SIGMA_Y = 0.2
Y_SEEN = real([1.5])
SIGMA_MIN, SIGMA_MAX = 1e-3, 200.0  # wider than the DDPM's own levels

PRIOR = GaussianPrior(MEAN, COV, SIGMA_MIN, SIGMA_MAX)
PROBLEM = InverseProblem(Y_SEEN[None], Matrix(A), GaussianNoise(SIGMA_Y))
POSTERIOR_COV = torch.linalg.inv(torch.linalg.inv(COV) + A.T @ A / SIGMA_Y**2)
POSTERIOR_MEAN = POSTERIOR_COV @ (
    torch.linalg.solve(COV, MEAN) + A.T @ Y_SEEN / SIGMA_Y**2
)

# The other toy: three components, of which a measurement of x₁ + 0.3 x₂ leaves two.
MIXTURE = GaussianMixturePrior(
    real([0.5, 0.3, 0.2]),
    real([[-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]),
    real(
        [
            [[0.1, 0.05], [0.05, 0.1]],
            [[0.1, -0.05], [-0.05, 0.1]],
            [[0.05, 0.0], [0.0, 0.15]],
        ]
    ),
    SIGMA_MIN,
    SIGMA_MAX,
)
MIXTURE_A = real([[1.0, 0.3]])
MIXTURE_SIGMA_Y = 0.3
MIXTURE_Y = real([0.9])
MIXTURE_PROBLEM = InverseProblem(
    MIXTURE_Y[None], Matrix(MIXTURE_A), GaussianNoise(MIXTURE_SIGMA_Y)
)


@final
class Refusing(Prior):
    """A prior whose network must not be asked."""

    sigma_min, sigma_max = SIGMA_MIN, SIGMA_MAX

    def denoise(self, x: X, sigma: Sigma) -> X:
        raise AssertionError("the network was asked")


def image_prior(generator: Generator) -> GaussianPrior:
    """Images (1, 4, 4) whose pixels are correlated: C = I/2 + BBᵀ."""
    factor = torch.randn(16, 3, generator=generator, dtype=torch.float64) / 3
    mean = torch.randn(1, 4, 4, generator=generator, dtype=torch.float64)
    return GaussianPrior(mean, torch.eye(16).double() / 2 + factor @ factor.T)


def ddpm_grid(steps: int) -> Tensor:
    """The DDPM's levels at t = unique(round(linspace(0, 999, steps))), falling."""
    t = torch.linspace(0, 999, steps, dtype=torch.float64).round().long().unique()
    return (1 / ddpm_alphas_cumprod()[t.flip(0)] - 1).sqrt()


def with_noise(
    noise: Tensor,
    sampler: Callable[..., Tensor],
    problem: InverseProblem,
    prior: Prior,
    **options: Any,
) -> Tensor:
    """The sampler's result when its k-th draw is noise[k]; it must make all of them."""
    draws = iter(noise)

    def given(x: Tensor, generator: object) -> Tensor:
        n = next(draws)
        assert n.shape == x.shape
        return n

    with ExitStack() as stack:
        modules = ("invsolve.samplers.core", "invsolve.samplers.solvers")
        for name in {sampler.__module__, *modules}:
            if hasattr(sys.modules[name], "randn_like"):
                stack.enter_context(
                    patch.object(sys.modules[name], "randn_like", given)
                )
        result = sampler(problem, prior, generator=Generator(), **options)
    assert next(draws, None) is None, "fewer draws than expected"
    return result


@final
@dataclass(frozen=True)
class Chain:
    """x = b + Σ_k F_k n_k.

    Attributes:
        offset: b.
        factors: F_k, (draws, d, d).
    """

    offset: Tensor
    factors: Tensor

    @property
    def mean(self) -> Tensor:
        return self.offset

    @property
    def cov(self) -> Tensor:
        return (self.factors @ self.factors.mT).sum(0)


def chain(
    sampler: Callable[..., Tensor],
    problem: InverseProblem,
    prior: Prior,
    draws: int,
    **options: Any,
) -> Chain:
    """The affine map from a sampler's draws to its result, read off in one batch."""
    d = problem.linear.adjoint(problem.y).shape[1]
    n = torch.zeros(draws, 1 + draws * d, d, dtype=problem.y.dtype)
    k = torch.arange(draws).repeat_interleave(d)
    j = torch.arange(d).repeat(draws)
    n[k, 1 + torch.arange(draws * d), j] = 1
    items = problem.items(torch.zeros(1 + draws * d, dtype=torch.long))
    x = with_noise(n, sampler, items, prior, **options)
    columns = (x[1:] - x[0]).reshape(draws, d, d)
    return Chain(x[0], columns.mT)


def eigen_ratios(cov: Tensor, of: Tensor) -> Tensor:
    """The eigenvalues of Σ^(−1/2) cov Σ^(−1/2): all 1 where cov = Σ."""
    L = torch.linalg.cholesky(of)
    half = torch.linalg.solve_triangular(L, cov, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    return torch.linalg.eigvalsh((whitened + whitened.mT) / 2)


@final
@dataclass(frozen=True)
class Recovery:
    """How a sampler's draws fall among the modes of the mixture's posterior.

    Attributes:
        occupancy: the share nearest to each component's posterior mean.
        chi2: the mean of ((y − Ax)/σ_y)².
    """

    occupancy: Tensor
    chi2: float


def recovery(draws: Tensor) -> Recovery:
    """Of draws for `MIXTURE_PROBLEM`."""
    posterior = MIXTURE.posterior(MIXTURE_A, MIXTURE_Y, MIXTURE_SIGMA_Y)
    means = torch.stack([part.mean for part in posterior.components])
    label = torch.cdist(draws, means).argmin(1)
    occupancy = torch.bincount(label, minlength=len(means)) / len(draws)
    residual = (draws @ MIXTURE_A.T - MIXTURE_Y) / MIXTURE_SIGMA_Y
    return Recovery(occupancy, float(residual.square().mean()))
