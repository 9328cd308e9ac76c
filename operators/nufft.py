"""Non-Cartesian magnetic resonance: the Fourier transform along a trajectory."""

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from math import pi, prod, sqrt
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fft import fft2, ifft2, ifftshift

from invsolve.shapes import X, Y

from .base import LinearOperator, WithAdjoint

SINGLE = 1e-6
"""As exact as a transform in single precision gets."""


@final
@dataclass(frozen=True, eq=False)
class NonCartesian(LinearOperator):
    """y_j = (hw)^(−½) Σ_n x_n exp(−i k_j·(n − ⌊N/2⌋)): k-space along a trajectory.

    Images are (batch, channels, h, w), complex; y is (batch, channels, *samples). On a
    Cartesian grid it is `Fourier`. Multi-coil MRI is
    ``NonCartesian(shape, k) @ Coils(maps)``.

    The sums are FINUFFT's (Barnett, Magland & af Klinteberg 2019), on a CPU, or with
    CUDA cuFINUFFT's: ``pip install 'invsolve[mri]'``. AᴴA is a convolution, done by
    two FFTs of twice the size without a look at the trajectory (Fessler et al. 2005).

    Args:
        shape: (h, w) of the images, in pixels.
        trajectory: k, (*samples, 2), such as (spokes, readout, 2): down the image, and
            along its rows, in radians per pixel within [−π, π]. `radial` and `spiral`
            make some.
        eps: the relative accuracy of the sums; single precision reaches 1e-6.

    Raises:
        ModuleNotFoundError: finufft is not installed.
    """

    shape: tuple[int, int]
    trajectory: Float[Tensor, "*samples 2"]
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or not self.trajectory.numel():
            raise ValueError(
                f"NonCartesian needs pixels and samples, got shape {self.shape} "
                f"and a trajectory {tuple(self.trajectory.shape)}"
            )
        if not 1e-14 <= self.eps <= 1e-1:
            raise ValueError(
                f"eps is between 1e-14 and 0.1, as 1e-6 is, but got {self.eps}"
            )
        _check_trajectory(self.trajectory)

    @property
    def takes_complex(self) -> bool:
        return True

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return tuple(self.trajectory.shape[:-1])

    def apply(self, x: X) -> Y:
        return WithAdjoint.apply(x, self._forward, self._backward)

    def adjoint(self, y: Y) -> X:
        return WithAdjoint.apply(y, self._backward, self._forward)

    def normal(self, x: X) -> X:
        """AᴴA x, by the convolution, exact to ``eps``."""
        kernel = _toeplitz(
            self.trajectory, self.shape, x.real.dtype, x.device, self.eps
        )
        h, w = self.shape
        # One image after another: a padded one fits into a processor's cache.
        images = x.reshape(-1, h, w)
        images = images.split(1 if x.device.type == "cpu" else len(images))
        parts = [ifft2(kernel * fft2(p, s=(2 * h, 2 * w)))[..., :h, :w] for p in images]
        return torch.cat(parts).reshape(x.shape)

    def gridding(self, y: Y, weights: Float[Tensor, "*samples"] | None = None) -> X:
        """AᴴWy: the image at a glance, to begin with; W by default `density_compensation`.

        Where the samples leave no gap it is nearly x, in x's own unit. W is in no other
        place: A and Aᴴ know nothing of it.
        """
        if weights is None:
            weights = density_compensation(self.trajectory, self.shape)
        return self.adjoint(weights.to(y.device, y.real.dtype) * y)

    def _forward(self, x: Tensor) -> Tensor:
        y = _nufft(2, x, self.trajectory, self.shape, self.eps)
        return y / sqrt(self.shape[0] * self.shape[1])

    def _backward(self, y: Tensor) -> Tensor:
        x = _nufft(1, y, self.trajectory, self.shape, self.eps)
        return x / sqrt(self.shape[0] * self.shape[1])


def radial(
    spokes: int, readout: int, *, golden: bool = False
) -> Float[Tensor, "spokes readout 2"]:
    """Spokes through the middle of k-space, for `NonCartesian`.

    k = κ (sin θ, cos θ) with κ = 2π (i − ⌊n/2⌋)/n along the readout of n samples.

    Args:
        spokes: their number. π/2 times the image's width leaves no gap.
        readout: samples along each; twice the image's width is usual.
        golden: θ_j = jπ(√5 − 1)/2, 111.25° from each spoke to the next (Winkelmann et
            al. 2007), so that any run of spokes covers the circle; else θ_j = jπ/spokes.

    >>> radial(2, 4)[0, :, 1]
    tensor([-3.1416, -1.5708,  0.0000,  1.5708], dtype=torch.float64)
    """
    if spokes < 1 or readout < 2:
        raise ValueError(
            f"a radial trajectory has at least 1 spoke of 2 samples, got {spokes} "
            f"of {readout}"
        )
    step = pi * (sqrt(5) - 1) / 2 if golden else pi / spokes
    theta = step * torch.arange(spokes, dtype=torch.float64)[:, None]
    along = (torch.arange(readout, dtype=torch.float64) - readout // 2) / readout
    return 2 * pi * torch.stack([along * theta.sin(), along * theta.cos()], dim=-1)


def spiral(
    interleaves: int, readout: int, turns: float
) -> Float[Tensor, "interleaves readout 2"]:
    """Archimedean spirals from the middle of k-space to its edge, for `NonCartesian`.

    k = π t (sin θ, cos θ) with θ = 2π (turns·t + j/interleaves) and t = √(i/n), i < n:
    the samples of a readout lie about equally far from each other.

    Args:
        interleaves: their number; interleaves × turns of half the image's width leaves
            no gap.
        readout: n, samples along each.
        turns: how often each goes round.
    """
    if interleaves < 1 or readout < 2 or not turns > 0:
        raise ValueError(
            f"a spiral has interleaves, samples and turns, got {interleaves}, "
            f"{readout} and {turns}"
        )
    t = (torch.arange(readout, dtype=torch.float64) / readout).sqrt()
    start = torch.arange(interleaves, dtype=torch.float64)[:, None] / interleaves
    theta = 2 * pi * (turns * t + start)
    return pi * torch.stack([t * theta.sin(), t * theta.cos()], dim=-1)


def density_compensation(
    trajectory: Float[Tensor, "*samples 2"], shape: tuple[int, int], steps: int = 10
) -> Float[Tensor, "*samples"]:
    """The k-space area of every sample, in cells of the Cartesian grid.

    w ← w / (Ψw) from w = 1 (Pipe & Menon 1999), with (Ψw)_i = Σ_j ψ(k_i − k_j) w_j and
    ψ Fejér's kernel, whose transform is the image's overlap with itself, a triangle
    twice as wide: ψ ≥ 0, so that w stays positive. On a Cartesian grid w = 1.

    Args:
        trajectory: k, as `NonCartesian` takes it.
        shape: (h, w) of the images, in pixels.
        steps: of the iteration. More fit the sum ever better, by weights that alternate
            from sample to sample.
    """
    _check_trajectory(trajectory)
    h, w = shape
    rows = 1 - (torch.arange(2 * h).double() - h).abs() / h
    columns = 1 - (torch.arange(2 * w).double() - w).abs() / w
    overlap = (rows[:, None] * columns / (h * w)).to(trajectory.device)
    twice = (2 * h, 2 * w)
    weights = torch.ones(1, *trajectory.shape[:-1]).to(overlap)
    for _ in range(steps):
        image = overlap * _nufft(1, weights + 0j, trajectory, twice, SINGLE)
        weights = weights / _nufft(2, image, trajectory, twice, SINGLE).real
    return weights[0].to(trajectory.dtype)


def _check_trajectory(trajectory: Tensor) -> None:
    if not trajectory.isfinite().all():
        raise ValueError("the trajectory has NaN or infinite frequencies: drop those")
    largest = float(trajectory.abs().max())
    if largest > pi * (1 + 1e-6):
        raise ValueError(
            "a trajectory is in radians per pixel, within [−π, π], but its largest "
            f"frequency is {largest:.4g}: multiply cycles per field of view by 2π/N, "
            "cycles per mm by 2π times a pixel's side"
        )


def _nufft(
    kind: int, t: Tensor, trajectory: Tensor, shape: tuple[int, int], eps: float
) -> Tensor:
    """FINUFFT's type 1 (samples to pixels) or 2 (pixels to samples), not normalised."""
    samples = trajectory.shape[:-1]
    into, out_of = (samples, shape) if kind == 1 else (shape, samples)
    outer = t.shape[: t.ndim - len(into)]
    flat = t.resolve_conj().reshape(-1, *(into if kind == 2 else (prod(into),)))
    flat = flat.contiguous()
    if flat.dtype == torch.complex64:
        eps = max(eps, SINGLE)
    plan = _plan(kind, trajectory, shape, len(flat), flat.dtype, flat.device, eps)
    if flat.is_cuda:
        out = plan.execute(flat)
    else:
        out = torch.from_numpy(plan.execute(flat.numpy()))
    return out.reshape(*outer, *out_of)


@lru_cache(maxsize=16)
def _plan(
    kind: int,
    trajectory: Tensor,
    shape: tuple[int, int],
    transforms: int,
    dtype: torch.dtype,
    device: torch.device,
    eps: float,
) -> Any:
    """A plan that has sorted its samples, for every call with the same trajectory."""
    k = trajectory.reshape(-1, 2).to(device, dtype.to_real()).T.contiguous()
    options: dict[str, Any] = {
        "n_trans": transforms,
        "eps": eps,
        "isign": -1 if kind == 2 else 1,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        Plan = _import_plan("cufinufft")
        options["gpu_device_id"] = k.device.index
        plan = Plan(kind, shape, **options)
        plan.setpts(k[0], k[1])
    else:
        Plan = _import_plan("finufft")
        plan = Plan(kind, shape, nthreads=torch.get_num_threads(), **options)
        plan.setpts(k[0].numpy(), k[1].numpy())
    return plan


def _import_plan(library: str) -> Any:
    try:
        return import_module(library).Plan
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"NonCartesian needs {library}: pip install 'invsolve[mri]'"
        ) from None


@lru_cache(maxsize=16)
def _toeplitz(
    trajectory: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    eps: float,
) -> Tensor:
    """The spectrum of AᴴA's kernel q(n) = Σ_j exp(i k_j·n)/hw, |n| < N, on 2h × 2w."""
    h, w = shape
    with torch.inference_mode(False):
        ones = torch.ones(trajectory.shape[:-1], dtype=torch.complex128, device=device)
        q = _nufft(1, ones, trajectory, (2 * h, 2 * w), eps) / (h * w)
        # q(−n) = conj q(n), but for lags that no two pixels have: the spectrum is real.
        return fft2(ifftshift(q)).real.to(dtype)
