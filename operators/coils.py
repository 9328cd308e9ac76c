"""Receive coils: their sensitivities, estimated or simulated, and fewer of them."""

from math import pi
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex
from torch import Tensor

from .mri import Fourier

Method = Literal["espirit", "low-res"]


def coil_maps(
    kspace: Complex[Tensor, "coils h w"],
    method: Method = "espirit",
    *,
    calibration: int = 24,
    kernel: int = 6,
    threshold: float = 0.02,
    crop: float = 0.95,
) -> Complex[Tensor, "coils h w"]:
    """The coils' sensitivities S, from the fully sampled middle of k-space.

    ``espirit`` (Uecker et al. 2014): patches of k-space lie in a subspace, that of the
    calibration matrix's singular vectors. Projecting every patch on it and averaging
    where patches overlap is, at each pixel, a matrix W of coils × coils, and S is the
    eigenvector with W S = S. Where the largest eigenvalue stays below ``crop`` there
    is no signal, and S = 0. Else Σ|S_c|² = 1, which leaves a phase free: it is such
    that the coils' first principal component is real and positive.

    ``low-res``: the coil images of the middle of k-space under a Hann window, divided
    by their root sum of squares. Rough, but smooth and never zero.

    Args:
        kspace: with zero frequency in the middle, as `Fourier` gives it.
        method: how.
        calibration: the side of the middle, in samples; less where k-space is smaller.
        kernel: the side of a patch, in samples.
        threshold: singular vectors are kept above so much of the largest singular value.
        crop: as above.

    Raises:
        ValueError: the middle is not fully sampled, or smaller than a patch.
    """
    if method not in ("espirit", "low-res"):
        raise ValueError(f"unknown method {method!r}: espirit or low-res")
    middle = _middle(kspace, calibration)
    if method == "espirit":
        if not 1 <= kernel <= min(middle.shape[1:]):
            raise ValueError(
                f"kernel {kernel} does not fit into a middle of "
                f"{middle.shape[1]}×{middle.shape[2]} samples"
            )
        W = _patch_projection(middle, kernel, threshold)
        values, vectors = torch.linalg.eigh(_at_pixels(W, kspace.shape[1:], kernel))
        maps = torch.where(values[..., -1:] >= crop, vectors[..., -1], 0)
        maps = maps.movedim(-1, 0)
    else:
        hann = [
            torch.hann_window(n + 2, periodic=False)[1:-1].to(kspace.real)
            for n in middle.shape[1:]
        ]
        images = torch.zeros_like(kspace)
        _middle(images, calibration, check=False).copy_(
            middle * hann[0][:, None] * hann[1]
        )
        maps = Fourier().adjoint(images)
        maps = maps / maps.abs().square().sum(0).sqrt().clamp_min(1e-30)
    samples = middle.flatten(1)
    principal = torch.linalg.eigh(samples @ samples.mH)[1][:, -1]
    phase = torch.einsum("c,chw->hw", principal.conj(), maps).angle()
    return maps * torch.polar(torch.ones_like(phase), -phase)


class Compressed(NamedTuple):
    """Fewer coils, and what became of the energy.

    Attributes:
        kspace: (batch, n, *k).
        matrix: M, (n, coils) with orthonormal rows: of maps it makes M @ maps.
        energy: the fraction of ‖kspace‖² that is kept.
    """

    kspace: Tensor
    matrix: Tensor
    energy: float


def compress_coils(kspace: Complex[Tensor, "batch coils *k"], n: int) -> Compressed:
    """The n virtual coils with the most energy (Buehrer et al. 2007).

    y′ = M y, with M's rows the first principal components of all samples.

    Args:
        kspace: the samples; zeros where nothing was measured do no harm.
        n: how many coils to keep.
    """
    coils = kspace.shape[1]
    if not 1 <= n <= coils:
        raise ValueError(f"of {coils} coils between 1 and {coils} can be kept, not {n}")
    samples = kspace.transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(samples @ samples.mH)
    matrix = vectors.flip(1)[:, :n].mH
    energy = float(values[-n:].sum() / values.sum().clamp_min(1e-30))
    return Compressed(
        torch.einsum("nc,bc...->bn...", matrix, kspace), matrix.contiguous(), energy
    )


def simulated_maps(
    coils: int, shape: tuple[int, int], *, radius: float = 1.5
) -> Complex[Tensor, "coils h w"]:
    """Coils on a circle around the image: smooth, complex, Σ|S_c|² = 1.

    S_c(r) ∝ exp(i arg(r − r_c)) / |r − r_c|, the far field's decay with a phase that
    turns with the direction to the coil. r_c = ``radius`` (cos φ_c, sin φ_c) with
    φ_c = 2πc/coils, and r goes from −1 to 1 across the image.

    Args:
        coils: their number.
        shape: (h, w) of the images, in pixels.
        radius: of the circle; more than √2 is outside of the image.
    """
    if coils < 1 or not radius > 2**0.5:
        raise ValueError(
            f"at least one coil, outside of the image (radius > √2), is needed; got "
            f"{coils} coils at radius {radius}"
        )
    h, w = shape
    y = (torch.arange(h).double() - (h - 1) / 2) / (h / 2)
    x = (torch.arange(w).double() - (w - 1) / 2) / (w / 2)
    r = torch.complex(x.expand(h, w), y[:, None].expand(h, w))
    phi = 2 * pi * torch.arange(coils).double() / coils
    maps = (
        1 / (r - torch.polar(torch.full_like(phi, radius), phi)[:, None, None]).conj()
    )
    return (maps / maps.abs().square().sum(0).sqrt()).to(torch.complex64)


def _middle(kspace: Tensor, side: int, *, check: bool = True) -> Tensor:
    """The samples around zero frequency, a view."""
    for axis in (-2, -1):
        n = kspace.shape[axis]
        kept = min(side, n)
        kspace = kspace.narrow(axis, n // 2 - kept // 2, kept)
    missing = int((kspace == 0).all(0).sum())
    if check and missing:
        raise ValueError(
            f"{missing} of the middle {kspace.shape[1]}×{kspace.shape[2]} samples of "
            "k-space are missing: lower calibration to what was fully sampled"
        )
    return kspace


def _patch_projection(middle: Tensor, kernel: int, threshold: float) -> Tensor:
    """P, the projection on the span of all patches, (coils, k, k, coils, k, k)."""
    patches = middle.unfold(1, kernel, 1).unfold(2, kernel, 1)
    rows = patches.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(rows.mT @ rows.conj())
    span = vectors[:, values > threshold**2 * values[-1]]
    shape = (len(middle), kernel, kernel)
    return (span @ span.mH).reshape(*shape, *shape)


def _at_pixels(P: Tensor, shape: tuple[int, ...], kernel: int) -> Tensor:
    """W at every pixel, (h, w, coils, coils).

    W_cd(r) = k⁻² Σ_ab P_ca,db exp(2πi (a − b)·r/N): averaged over the patches that
    overlap, a projection depends on the distance of two samples alone, so that it is a
    convolution of k-space.
    """
    coils = len(P)
    lags = P.new_zeros(coils, coils, 2 * kernel - 1, 2 * kernel - 1)
    for i in range(kernel):
        for j in range(kernel):
            rows, columns = kernel - 1 - i, kernel - 1 - j
            lags[:, :, rows : rows + kernel, columns : columns + kernel] += P[
                :, :, :, :, i, j
            ].movedim(3, 1)
    waves = []
    for n in shape:
        r = torch.arange(n, device=P.device).to(P.real.dtype) - n // 2
        lag = torch.arange(1 - kernel, kernel, device=P.device).to(P.real.dtype)
        phase = 2 * pi / n * r[:, None] * lag
        waves.append(torch.polar(torch.ones_like(phase), phase))
    return torch.einsum("cdij,hi,wj->hwcd", lags, *waves) / kernel**2
