"""Priors known in closed form: the oracles that samplers are tested against."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from invsolve.shapes import Sigma, X, per_item

from .base import Prior


@final
class GaussianPrior(Prior):
    """x₀ ~ N(m, C).

    D(x; σ) = m + C (C + σ²I)⁻¹ (x − m), applied in C's eigenbasis, so that a level
    costs no factorisation.

    Args:
        mean: m, of an image's shape.
        cov: C, (d, d) over the flattened image, or its diagonal in the image's shape.
    """

    def __init__(
        self,
        mean: Float[Tensor, "*x"],
        cov: Tensor,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        d = mean.numel()
        if cov.shape not in ((d, d), mean.shape):
            raise ValueError(
                f"cov must be ({d}, {d}) or of the mean's shape {tuple(mean.shape)}, "
                f"got {tuple(cov.shape)}"
            )
        full = cov if cov.shape == (d, d) and cov.ndim == 2 else cov.flatten().diag()
        self.mean, self.cov = mean, full
        self.eigenvalues, self.basis = torch.linalg.eigh(full)
        if self.eigenvalues[0] < -1e-6 * self.eigenvalues[-1].abs():
            raise ValueError("cov is not positive semi-definite")
        self.eigenvalues = self.eigenvalues.clamp_min(0)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        variance = sigma.reshape(-1, 1) ** 2
        gain = self.eigenvalues / (self.eigenvalues + variance)
        centred = (x - self.mean).flatten(1) @ self.basis
        return self.mean + ((centred * gain) @ self.basis.T).reshape(x.shape)

    def log_density(self, x: X, sigma: Sigma) -> Tensor:
        """log p_σ(x) of x₀ + σn, for each item."""
        variance = self.eigenvalues + sigma.reshape(-1, 1) ** 2
        centred = (x - self.mean).flatten(1) @ self.basis
        return -0.5 * (centred**2 / variance + (2 * torch.pi * variance).log()).sum(1)

    def posterior(
        self, A: Float[Tensor, "m d"], y: Float[Tensor, " m"], sigma: float
    ) -> "GaussianPrior":
        """p(x₀ | y) for y = A x₀ + σn: N(μ, Σ), exactly.

        μ = m + CAᵀ(ACAᵀ + σ²I)⁻¹(y − Am), Σ = C − CAᵀ(ACAᵀ + σ²I)⁻¹AC.
        """
        noise = sigma**2 * torch.eye(len(y)).to(self.cov)
        gain = torch.linalg.solve(A @ self.cov @ A.T + noise, A @ self.cov).T
        mean = self.mean.flatten() + gain @ (y - A @ self.mean.flatten())
        cov = self.cov - gain @ A @ self.cov
        return GaussianPrior(mean.reshape(self.mean.shape), (cov + cov.T) / 2)

    def evidence(
        self, A: Float[Tensor, "m d"], y: Float[Tensor, " m"], sigma: float
    ) -> Tensor:
        """log p(y) = log N(y; Am, ACAᵀ + σ²I)."""
        cov = A @ self.cov @ A.T + sigma**2 * torch.eye(len(y)).to(self.cov)
        mean = A @ self.mean.flatten()
        return torch.distributions.MultivariateNormal(mean, cov).log_prob(y)

    def sample(self, n: int, *, generator: Generator) -> Tensor:
        """(n, *x): independent draws."""
        z = torch.randn(n, len(self.cov), generator=generator).to(self.cov)
        x = (z * self.eigenvalues.sqrt()) @ self.basis.T
        return self.mean + x.reshape(n, *self.mean.shape)


@final
class StationaryPrior(Prior):
    """x₀ ~ N(m, F⁻¹ diag(S) F): a Gaussian field of any size, alike everywhere.

    D(x; σ) = m + F⁻¹ S/(S + σ²) F (x − m) with the orthonormal F, so that image-sized
    posteriors of circular blurs are known exactly. Channels are independent.

    Args:
        mean: m, (channels, h, w).
        spectrum: S, (h, w) or (channels, h, w), the power at each frequency, zero
            frequency first; real, at least 0, and the same at −f as at f.
    """

    def __init__(
        self,
        mean: Float[Tensor, "c h w"],
        spectrum: Float[Tensor, "*c h w"],
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        mirrored = spectrum.flip(-2, -1).roll((1, 1), (-2, -1))
        if spectrum.shape[-2:] != mean.shape[-2:] or (spectrum < 0).any():
            raise ValueError(
                f"spectrum must be at least 0 and of the images' size "
                f"{tuple(mean.shape[-2:])}, got {tuple(spectrum.shape)}"
            )
        if not torch.allclose(spectrum, mirrored):
            raise ValueError("spectrum must be the same at −f as at f")
        self.mean, self.spectrum = mean, spectrum
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    @classmethod
    def matern(
        cls, shape: tuple[int, int], scale: float, std: float = 1.0, slope: float = 1.5
    ) -> "StationaryPrior":
        """S ∝ (1 + |2π f scale|²)^−(slope + 1), of mean 0 and pixels of variance std².

        Args:
            shape: (h, w) of the images.
            scale: the correlation length in pixels.
            std: of a pixel.
            slope: how smooth the field is.
        """
        fy, fx = (torch.fft.fftfreq(n, dtype=torch.float64) for n in shape)
        k2 = (2 * torch.pi * scale) ** 2 * (fy[:, None] ** 2 + fx**2)
        power = (1 + k2) ** -(slope + 1)
        return cls(torch.zeros(1, *shape).double(), std**2 * power / power.mean())

    def denoise(self, x: X, sigma: Sigma) -> X:
        variance = per_item(sigma, x) ** 2
        gain = self.spectrum / (self.spectrum + variance)
        return self.mean + _filter(gain, x - self.mean)

    @property
    def cov(self) -> Float[Tensor, "d d"]:
        """C over the flattened image, which must be small enough for a matrix."""
        d = self.mean.numel()
        unit = torch.eye(d).to(self.mean).reshape(d, *self.mean.shape)
        return _filter(self.spectrum, unit).reshape(d, d)

    def log_density(self, x: X, sigma: Sigma) -> Tensor:
        """log p_σ(x) of x₀ + σn, for each item."""
        variance = self.spectrum + per_item(sigma, x) ** 2
        power = torch.fft.fft2(x - self.mean, norm="ortho").abs() ** 2
        terms = power / variance + (2 * torch.pi * variance).log()
        return -0.5 * terms.flatten(1).sum(1)

    def posterior(
        self, otf: Tensor, y: Float[Tensor, "c h w"], sigma: float
    ) -> "StationaryPrior":
        """p(x₀ | y) for the circular blur y = F⁻¹ diag(k̂) F x₀ + σn: again a field.

        Its spectrum is 1/(1/S + |k̂|²/σ²), and its mean that times k̂* F(y − Am)/σ²,
        transformed back, and m.

        Args:
            otf: k̂, as of `Blur`.
            y: one item's measurements.
            sigma: of the noise.
        """
        spectrum = self.spectrum / (1 + self.spectrum * otf.abs() ** 2 / sigma**2)
        residual = y - _filter(otf, self.mean)
        mean = self.mean + _filter(spectrum * otf.conj() / sigma**2, residual)
        return StationaryPrior(mean, spectrum, self.sigma_min, self.sigma_max)

    def evidence(self, otf: Tensor, y: Float[Tensor, "c h w"], sigma: float) -> Tensor:
        """log p(y), of the same blur and noise."""
        seen = StationaryPrior(_filter(otf, self.mean), self.spectrum * otf.abs() ** 2)
        return seen.log_density(y[None], y.new_tensor(sigma))[0]

    def sample(self, n: int, *, generator: Generator) -> Tensor:
        """(n, c, h, w): independent draws."""
        z = torch.randn(n, *self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + _filter(self.spectrum.sqrt(), z.to(self.mean.device))


def _filter(gain: Tensor, x: Tensor) -> Tensor:
    return torch.fft.ifft2(gain * torch.fft.fft2(x)).real


@final
class GaussianMixturePrior(Prior):
    """x₀ ~ Σ w_k N(m_k, C_k).

    D(x; σ) = Σ r_k(x) D_k(x; σ), with r_k ∝ w_k N(x; m_k, C_k + σ²I).

    Args:
        weights: w_k, positive; they are normalised to sum 1.
        means: m_k, (components, *x).
        covs: C_k, (components, d, d), or diagonals as (components, *x).
    """

    def __init__(
        self,
        weights: Float[Tensor, " components"],
        means: Float[Tensor, " components *x"],
        covs: Tensor,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        if not (weights > 0).all() or not len(weights) == len(means) == len(covs):
            raise ValueError(
                "weights must be positive, with one mean and one covariance for each"
            )
        parts = [GaussianPrior(m, c) for m, c in zip(means, covs, strict=True)]
        self._set(weights, parts, sigma_min, sigma_max)

    @classmethod
    def of(
        cls,
        weights: Float[Tensor, " components"],
        components: Sequence[GaussianPrior | StationaryPrior],
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> "GaussianMixturePrior":
        """The mixture of components of one shape: of fields, for any size of image.

        Args:
            weights: w_k ≥ 0, not all 0; they are normalised to sum 1.
            components: N(m_k, C_k), each.
            sigma_min, sigma_max: the levels between which it is to be asked.
        """
        if not (weights >= 0).all() or not weights.any():
            raise ValueError("weights must be at least 0, and not all of them 0")
        shapes = {tuple(c.mean.shape) for c in components}
        if len(weights) != len(components) or len(shapes) != 1:
            raise ValueError(
                f"give one component for each of {len(weights)} weights, all of one "
                f"shape: got {len(components)} of the shapes {sorted(shapes)}"
            )
        mixture = cls.__new__(cls)
        mixture._set(weights, components, sigma_min, sigma_max)
        return mixture

    def _set(
        self,
        weights: Tensor,
        components: Sequence[GaussianPrior | StationaryPrior],
        sigma_min: float,
        sigma_max: float,
    ) -> None:
        self.weights, self.components = weights / weights.sum(), list(components)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        parts = torch.stack([c.denoise(x, sigma) for c in self.components])
        r = self.responsibilities(x, sigma).T
        return (r.reshape(*r.shape, *(1,) * (x.ndim - 1)) * parts).sum(0)

    def responsibilities(self, x: X, sigma: Sigma) -> Float[Tensor, "batch components"]:
        """r_k(x), the probability that x₀ came from component k."""
        return (self._joint(x, sigma)).softmax(1)

    def log_density(self, x: X, sigma: Sigma) -> Tensor:
        """log p_σ(x) of x₀ + σn, for each item."""
        return self._joint(x, sigma).logsumexp(1)

    def _joint(self, x: X, sigma: Sigma) -> Tensor:
        log_p = [c.log_density(x, sigma) for c in self.components]
        return torch.stack(log_p, dim=1) + self.weights.log()

    def posterior(self, A: Tensor, y: Tensor, sigma: float) -> "GaussianMixturePrior":
        """p(x₀ | y) for y = A x₀ + σn: again a mixture, exactly.

        Its weights are ∝ w_k N(y; Am_k, AC_kAᵀ + σ²I). A is what the components'
        ``posterior`` takes: a matrix, or the transfer function of a circular blur.
        """
        parts = [c.posterior(A, y, sigma) for c in self.components]
        log_w = torch.stack([c.evidence(A, y, sigma) for c in self.components])
        weights = (log_w + self.weights.log()).softmax(0)
        return GaussianMixturePrior.of(weights, parts)

    def sample(self, n: int, *, generator: Generator) -> Tensor:
        """(n, *x): independent draws."""
        k = torch.multinomial(self.weights.cpu(), n, True, generator=generator)
        draws = [c.sample(n, generator=generator) for c in self.components]
        return torch.stack(draws)[k, torch.arange(n)]

    def to(self, device: torch.device) -> Prior:
        moved = super().to(device)
        assert isinstance(moved, GaussianMixturePrior)
        parts = [c.to(device) for c in self.components]
        moved.components = [
            p for p in parts if isinstance(p, GaussianPrior | StationaryPrior)
        ]
        return moved
