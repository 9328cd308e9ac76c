"""What all geometries share: line integrals, by whichever backend suits."""

from abc import abstractmethod
from functools import cached_property
from math import prod
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from invsolve.shapes import X, Y

from ..base import LinearOperator, WithAdjoint
from ..resample import Separable, finer_pixels
from . import astra, joseph
from .rays import Scan

Backend = Literal["auto", "matrix", "matrix-free", "astra"]

MATRIX_BYTES = 2**31
"""Above so much memory ``backend="auto"`` does without the matrix."""


class RayTransform(LinearOperator):
    """y = ∫ x dl along the rays of a scan: x in 1/mm, y without a unit.

    The operator works where its angles lie: ``A.to(device)`` moves it. By ``backend``:

    - ``matrix`` keeps A and Aᵀ as sparse matrices of Joseph's weights: exact adjoint,
      any device, float32 and float64, and the fastest on a CPU. `matrix_bytes` tells
      beforehand what they take; one that takes long to build is kept on disk (`cache`).
    - ``matrix-free`` builds the same matrix block by block each time it is applied: the
      same numbers, slowly, on the CPU, with little memory. Give it large batches.
    - ``astra`` projects with ASTRA (GPL-3, ``pip install 'invsolve[ct]'``), in float32.
      On a CPU that is slice by slice and for 2D only; with CUDA it is fast, and its
      adjoint is only approximate (see `adjoint_is_exact`).
    - ``auto`` is ASTRA where that has CUDA and the operator is on a GPU; else the
      matrix as long as it takes less than 2 GiB, and matrix-free beyond.
    """

    angles: Float[Tensor, " views"]
    backend: Backend

    @abstractmethod
    def _scan(self) -> Scan:
        """The geometry in plain numbers."""

    @cached_property
    def scan(self) -> Scan:
        """The geometry in plain numbers."""
        return self._scan()

    @cached_property
    def _pixels(self) -> Separable | None:
        """What gives finer pixels their values, where the scan has some."""
        if self.scan.oversample == 1:
            return None
        h, w = self.scan.shape
        return finer_pixels((h, w), self.scan.oversample)

    @property
    def matrix_bytes(self) -> int:
        """What A and Aᵀ take at most as float32 matrices, in bytes; builds nothing."""
        return joseph.matrix_bytes(self.scan)

    @property
    def adjoint_is_exact(self) -> bool:
        """False where ASTRA projects with CUDA: its back-projector is another model."""
        return not (self._chosen() == "astra" and self._on_gpu())

    def check_image(self, x: Tensor) -> None:
        super().check_image(x)
        _check_real(x, "an image")

    def check_measurements(self, y: Tensor) -> None:
        super().check_measurements(y)
        _check_real(y, "measurements")

    def apply(self, x: X) -> Y:
        return WithAdjoint.apply(x, self._forward, self._backward)

    def adjoint(self, y: Y) -> X:
        return WithAdjoint.apply(y, self._backward, self._forward)

    def _on_gpu(self) -> bool:
        return self.angles.is_cuda and astra.has_cuda()

    def _chosen(self) -> Backend:
        if self.backend != "auto":
            return self.backend
        if self._on_gpu() and not self.scan.curved:
            return "astra"
        return "matrix" if self.matrix_bytes <= MATRIX_BYTES else "matrix-free"

    def _forward(self, x: Tensor) -> Tensor:
        return self._project(x, self.image_shape, self.measurement_shape, forward=True)

    def _backward(self, y: Tensor) -> Tensor:
        return self._project(y, self.measurement_shape, self.image_shape, forward=False)

    def _astra_forward(self, items: Tensor) -> Tensor:
        fine = self._pixels.apply(items) if self._pixels else items
        out = astra.project(self.scan.finer, fine, forward=True)
        rays = self.scan.rays
        return out if rays == 1 else out.unflatten(-1, (-1, rays)).mean(-1)

    def _astra_backward(self, items: Tensor) -> Tensor:
        rays = self.scan.rays
        each = items if rays == 1 else items.repeat_interleave(rays, -1) / rays
        out = astra.project(self.scan.finer, each, forward=False)
        return self._pixels.adjoint(out) if self._pixels else out

    def _project(
        self, t: Tensor, given: tuple[int, ...], made: tuple[int, ...], *, forward: bool
    ) -> Tensor:
        leading = t.shape[: t.ndim - len(given)]
        match self._chosen():
            case "astra":
                where = self.angles.device if self._on_gpu() else "cpu"
                items = t.detach().to(where).reshape(-1, *given)
                by_astra = self._astra_forward if forward else self._astra_backward
                out = by_astra(items).to(t)
            case "matrix-free":
                blocks = joseph.apply_in_blocks if forward else joseph.adjoint_in_blocks
                out = blocks(self.scan, t.reshape(-1, prod(given)))
            case _:
                A, At = joseph.matrices(self.scan, t.dtype, t.device)
                out = joseph.multiply(A if forward else At, t.reshape(-1, prod(given)))
        return out.reshape(*leading, *made)


def _check_real(t: Tensor, what: str) -> None:
    if not t.is_floating_point():
        raise ValueError(
            f"attenuation is real, but {what} of {t.dtype} was given: convert it, or "
            "give the real part"
        )
