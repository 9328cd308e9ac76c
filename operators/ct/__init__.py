"""Computed tomography: line integrals of attenuation.

Coordinates: x runs along a row and y up the columns, from the image's centre. A ray at
angle θ has detector coordinate s = x cos θ + y sin θ, as in ASTRA.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from invsolve.shapes import X, Y

from ..base import LinearOperator

Backend = Literal["auto", "matrix", "astra"]
Window = Literal["ram-lak", "shepp-logan", "cosine", "hann"]

MATRIX_BYTES = 2**31
"""Above so much memory ``backend="auto"`` leaves the matrix for ASTRA."""

COLUMNS = 16
"""Images that are projected at once: about what a CPU's cache holds."""


@final
@dataclass(frozen=True, eq=False)
class ParallelBeam(LinearOperator):
    """y(θ, s) = ∫ x dl along parallel rays: a 2D sinogram.

    x is attenuation in 1/mm on square pixels, y has no unit. Images are (batch,
    channels, h, w), sinograms (batch, channels, angles, detectors).

    The rays follow Joseph's model (1982): a ray steps through the image row by row (or
    column by column, whichever it crosses less obliquely) and interpolates linearly.

    Args:
        shape: (h, w) of the images, in pixels.
        angles: θ of each view, in radians.
        pixel_mm: a pixel's side.
        detectors: elements of the detector; enough for the diagonal unless given.
        detector_mm: their pitch; a pixel's side unless given.
        backend: ``matrix`` keeps A and Aᵀ as sparse matrices (built in well under a
            second at 128² × 30; exact adjoint; batched; on any device; float64 too).
            ``astra`` projects with ASTRA (GPL-3, ``pip install 'invsolve[ct]'``),
            slice by slice on a CPU, all at once with CUDA, where its adjoint is only
            approximate. ``auto`` is the matrix as long as it stays under 2 GiB.

    >>> A = ParallelBeam((2, 2), torch.tensor([0.0]), pixel_mm=2.0, detectors=2)
    >>> A(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    tensor([[[[ 8., 12.]]]])
    """

    shape: tuple[int, int]
    angles: Float[Tensor, " views"]
    pixel_mm: float = 1.0
    detectors: int = 0
    detector_mm: float = 0.0
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if not self.pixel_mm > 0 or self.detector_mm < 0 or self.detectors < 0:
            raise ValueError("pixel_mm, detectors and detector_mm must be positive")
        if self.angles.numel() == 0:
            raise ValueError("at least one angle is needed")
        largest = float(self.angles.abs().max())
        if largest > 2 * torch.pi + 1e-3:
            raise ValueError(
                f"angles are in radians, but the largest is {largest:.4g}; if they are "
                "degrees, give torch.deg2rad(angles)"
            )
        if self.backend not in ("auto", "matrix", "astra"):
            raise ValueError(f"unknown backend {self.backend!r}: auto, matrix or astra")
        pitch = self.detector_mm or self.pixel_mm
        diagonal = self.pixel_mm * float(np.hypot(*self.shape))
        object.__setattr__(self, "detector_mm", pitch)
        count = self.detectors or int(np.ceil(diagonal / pitch))
        object.__setattr__(self, "detectors", count)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return (len(self.angles), self.detectors)

    def apply(self, x: X) -> Y:
        return _Project.apply(x, self._forward, self._backward)

    def adjoint(self, y: Y) -> X:
        return _Project.apply(y, self._backward, self._forward)

    def fbp(self, y: Y, *, window: Window = "ram-lak") -> X:
        """Filtered back-projection (Kak & Slaney 1988, §3.3) of views over 180°.

        x = (π/n) Σ_θ (h ∗ y_θ)(x cos θ + y sin θ), with h the band-limited ramp and an
        apodising window on it. The back-projection interpolates linearly between
        detectors.
        """
        filtered = _ramp_filter(y, self.detector_mm, window)
        h, w = self.shape
        angles = self.angles.to(y)
        rows = ((h - 1) / 2 - torch.arange(h).to(y)) * self.pixel_mm
        columns = (torch.arange(w).to(y) - (w - 1) / 2) * self.pixel_mm
        last = self.detectors - 1
        x = y.new_zeros(*y.shape[:-2], h, w)
        for view, theta in enumerate(angles):
            s = columns * theta.cos() + (rows * theta.sin())[:, None]
            index = s / self.detector_mm + last / 2
            low = index.floor().clamp(0, max(last - 1, 0))
            left, fraction = low.long(), index - low
            right = (left + 1).clamp_max(last)
            row = filtered[..., view, :]
            value = row[..., left] * (1 - fraction) + row[..., right] * fraction
            x += torch.where((index >= 0) & (index <= last), value, 0)
        return x * torch.pi / len(angles)

    def _geometry(self) -> tuple[Any, ...]:
        angles = tuple(self.angles.double().cpu().tolist())
        return (self.shape, angles, self.pixel_mm, self.detectors, self.detector_mm)

    def _uses_matrix(self) -> bool:
        # About 2 max(h, w) crossings a ray, 8 bytes each, for A and for Aᵀ.
        size = 32 * max(self.shape) * len(self.angles) * self.detectors
        return self.backend == "matrix" or (
            self.backend == "auto" and size <= MATRIX_BYTES
        )

    def _forward(self, x: Tensor) -> Tensor:
        if not self._uses_matrix():
            return _astra_project(self, x, forward=True)
        A, _ = _matrices(self._geometry(), x.dtype, x.device)
        return _multiply(A, x, self.measurement_shape)

    def _backward(self, y: Tensor) -> Tensor:
        if not self._uses_matrix():
            return _astra_project(self, y, forward=False)
        _, At = _matrices(self._geometry(), y.dtype, y.device)
        return _multiply(At, y, self.shape)


class _Project(torch.autograd.Function):
    """A linear map whose gradient is its adjoint, and the other way round."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, there: Callable, back: Callable) -> Tensor:
        ctx.there, ctx.back = there, back
        return there(t)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return _Project.apply(grads[0], ctx.back, ctx.there), None, None


def _multiply(M: Tensor, t: Tensor, shape: tuple[int, ...]) -> Tensor:
    columns = t.reshape(-1, M.shape[1]).T
    parts = [M @ part.contiguous() for part in columns.split(COLUMNS, dim=1)]
    return torch.cat(parts, dim=1).T.reshape(*t.shape[:-2], *shape)


@lru_cache(maxsize=8)
def _matrices(
    geometry: tuple[Any, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A and Aᵀ as CSR with 32-bit indices, shared by all equal geometries."""
    import scipy.sparse

    (h, w), angles, pixel, detectors, pitch = geometry
    s = (np.arange(detectors) - (detectors - 1) / 2) * (pitch / pixel)
    rows = []
    for theta in angles:
        cos, sin = np.cos(theta), np.sin(theta)
        # The ray's foot (x, y) = s (cos θ, sin θ) and direction (−sin θ, cos θ), in
        # pixels; rows count downwards, so that row = centre − y.
        column, row = s * cos + (w - 1) / 2, (h - 1) / 2 - s * sin
        if abs(cos) >= abs(sin):  # it crosses every row: interpolate between columns
            k = np.arange(h)
            t = (k - row[:, None]) / -cos
            crossing = column[:, None] - t * sin
            rows.append(_joseph(crossing, w, k[None] * w, 1, pixel / abs(cos), h * w))
        else:
            k = np.arange(w)
            t = (k - column[:, None]) / -sin
            crossing = row[:, None] - t * cos
            rows.append(_joseph(crossing, h, k[None], w, pixel / abs(sin), h * w))
    matrix = scipy.sparse.vstack(rows, format="csr")

    def to_torch(m: Any) -> Tensor:
        with warnings.catch_warnings():  # torch calls its CSR layout a beta feature
            warnings.filterwarnings("ignore", "Sparse CSR tensor support")
            return torch.sparse_csr_tensor(
                torch.from_numpy(m.indptr.astype(np.int32)),
                torch.from_numpy(m.indices.astype(np.int32)),
                torch.from_numpy(m.data).to(dtype),
                size=m.shape,
                check_invariants=False,
            ).to(device)

    return to_torch(matrix), to_torch(matrix.T.tocsr())


def _joseph(
    crossing: np.ndarray, n: int, base: np.ndarray, stride: int, step: float, size: int
) -> Any:
    """One view's rows: each crossing is shared linearly by its two neighbours."""
    import scipy.sparse

    low = np.floor(crossing).astype(np.int64)
    fraction = crossing - low
    weight = np.stack([1 - fraction, fraction]) * step
    index = np.stack([low, low + 1])
    inside = (index >= 0) & (index < n) & (weight > 1e-9)
    ray = np.broadcast_to(np.arange(len(crossing))[None, :, None], index.shape)
    column = base[None] + index * stride
    return scipy.sparse.csr_matrix(
        (weight[inside], (ray[inside], column[inside])), shape=(len(crossing), size)
    )


def _ramp_filter(y: Tensor, pitch: float, window: Window) -> Tensor:
    """y ∗ h along the detector, h the ramp sampled in space (Kak & Slaney, eq. 61)."""
    n = y.shape[-1]
    size = 2 ** int(np.ceil(np.log2(2 * n)))
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    odd = k.remainder(2) == 1
    h = torch.where(odd, -1 / (torch.pi * k.where(odd, torch.ones_like(k))) ** 2, 0)
    h[0] = 1 / 4
    ramp = torch.fft.fft(h).real / pitch
    f = torch.fft.fftfreq(size, dtype=torch.float64)  # cycles per detector
    match window:
        case "ram-lak":
            apodise = torch.ones_like(f)
        case "shepp-logan":
            apodise = torch.sinc(f)
        case "cosine":
            apodise = torch.cos(torch.pi * f)
        case "hann":
            apodise = torch.cos(torch.pi * f).square()
        case _:
            raise ValueError(
                f"unknown window {window!r}: ram-lak, shepp-logan, cosine or hann"
            )
    response = (ramp * apodise).to(y)
    return torch.fft.ifft(torch.fft.fft(y, size) * response).real[..., :n].to(y.dtype)


def _import_astra() -> Any:
    try:
        import astra
    except ImportError as error:
        raise ModuleNotFoundError(
            "ParallelBeam(backend='astra') needs ASTRA: pip install 'invsolve[ct]'"
        ) from error
    return astra


def _astra_project(A: ParallelBeam, t: Tensor, *, forward: bool) -> Tensor:
    astra = _import_astra()
    # Without a CUDA driver ASTRA's CUDA calls crash the process or leave NaN behind.
    if t.is_cuda and astra.use_cuda():
        return _astra_cuda(astra, A, t, forward=forward)
    h, w = A.shape
    half_w, half_h = w * A.pixel_mm / 2, h * A.pixel_mm / 2
    volume = astra.create_vol_geom(h, w, -half_w, half_w, -half_h, half_h)
    angles = A.angles.double().cpu().numpy()
    beams = astra.create_proj_geom("parallel", A.detector_mm, A.detectors, angles)
    shape = A.measurement_shape if forward else A.shape
    flat = t.detach().to("cpu", torch.float32).reshape(-1, *t.shape[-2:]).contiguous()
    out = torch.empty(len(flat), *shape)
    projector = astra.create_projector("linear", beams, volume)
    try:
        project = astra.projector.direct_FP if forward else astra.projector.direct_BP
        for source, target in zip(flat.numpy(), out.numpy(), strict=True):
            project(projector, source, out=target)
    finally:
        astra.projector.delete(projector)
    return out.reshape(*t.shape[:-2], *shape).to(t)


def _astra_cuda(astra: Any, A: ParallelBeam, t: Tensor, *, forward: bool) -> Tensor:
    """All slices as one volume of parallel3d: one kernel launch and no copy."""
    h, w = A.shape
    flat = t.detach().to(torch.float32).reshape(-1, *t.shape[-2:])
    n = len(flat)
    half_w, half_h = w * A.pixel_mm / 2, h * A.pixel_mm / 2
    volume = astra.create_vol_geom(h, w, n, -half_w, half_w, -half_h, half_h, 0, n)
    angles = A.angles.double().cpu().numpy()
    # With one voxel a slice along the axis, pitch 1 keeps slices apart.
    beams = astra.create_proj_geom(
        "parallel3d", A.detector_mm, 1.0, n, A.detectors, angles
    )
    projector = astra.create_projector("cuda3d", beams, volume)
    sinogram = torch.empty(n, *A.measurement_shape, device=t.device)
    image = torch.empty(n, h, w, device=t.device)
    (image if forward else sinogram).copy_(flat)
    torch.cuda.current_stream().synchronize()  # ASTRA works in a stream of its own
    try:
        if forward:
            astra.experimental.direct_FP3D(projector, image, sinogram)
        else:
            astra.experimental.direct_BP3D(projector, image, sinogram)
    finally:
        astra.projector3d.delete(projector)
    out = sinogram if forward else image
    return out.reshape(*t.shape[:-2], *out.shape[1:]).to(t)
