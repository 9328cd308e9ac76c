"""SciPy's ``LinearOperator``, and so PyLops': matrices that act on flat vectors."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, final

import torch
from torch import Tensor

from invsolve.operators.base import LinearOperator
from invsolve.shapes import X, Y


@final
@dataclass(frozen=True, eq=False)
class FromSciPy(LinearOperator):
    """y = M x, item by item, on flattened images; computed by SciPy on the CPU.

    Args:
        matrix: M, a ``scipy.sparse.linalg.LinearOperator``, in whose precision it
            computes. A complex one is for complex images.
        image: (channels, *space), the shape of an item's image.
        measured: the shape of an item's measurements.
    """

    matrix: Any
    image: tuple[int, ...]
    measured: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = (prod(self.measured), prod(self.image))
        if shape != tuple(self.matrix.shape):
            raise ValueError(
                f"an operator of shape {tuple(self.matrix.shape)} does not take images "
                f"of {self.image} to measurements of {self.measured}: it would have to "
                f"be {shape}"
            )

    def apply(self, x: X) -> Y:
        if not x.is_complex() and self.matrix.dtype.kind == "c":
            raise ValueError(
                "a complex matrix takes complex images: compose it with RealImage() or "
                "ComplexChannels()"
            )
        there, back = self.matrix.matmat, self.matrix.rmatmat
        return _OnTheHost.apply(x, there, back, self.measured, self.image)

    def adjoint(self, y: Y) -> X:
        there, back = self.matrix.rmatmat, self.matrix.matmat
        return _OnTheHost.apply(y, there, back, self.image, self.measured)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.measured


class _OnTheHost(torch.autograd.Function):
    """A linear map of NumPy columns, whose gradient is its adjoint."""

    @staticmethod
    def forward(
        ctx: Any,
        t: Tensor,
        there: Callable,
        back: Callable,
        shape: tuple[int, ...],
        shape_back: tuple[int, ...],
    ) -> Tensor:
        ctx.arguments = back, there, shape_back, shape
        columns = t.detach().cpu().flatten(1).resolve_conj().resolve_neg().numpy().T
        out = torch.from_numpy(there(columns).T.copy()).reshape(len(t), *shape)
        return out.to(t.device, t.dtype.to_complex() if out.is_complex() else t.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        return _OnTheHost.apply(grads[0], *ctx.arguments), None, None, None, None


def from_scipy(
    matrix: Any,
    image_shape: tuple[int, ...],
    measurement_shape: tuple[int, ...] | None = None,
) -> LinearOperator:
    """A SciPy or PyLops operator as one of ours.

    Args:
        matrix: a ``scipy.sparse.linalg.LinearOperator`` or what ``aslinearoperator``
            takes (an array, a sparse matrix).
        image_shape: (channels, *space) of one item; their product is its columns.
        measurement_shape: of one item; its rows, flat, unless given.

    >>> import numpy as np
    >>> A = from_scipy(np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]), (1, 3))
    >>> A(torch.tensor([[[1.0, 2.0, 4.0]]]))
    tensor([[3., 6.]])
    """
    from scipy.sparse.linalg import aslinearoperator

    matrix = aslinearoperator(matrix)
    return FromSciPy(matrix, image_shape, measurement_shape or (matrix.shape[0],))


def to_scipy(
    operator: LinearOperator,
    image_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """One of our operators as a ``scipy.sparse.linalg.LinearOperator``.

    Args:
        operator: what measures; its tensors must be on the CPU.
        image_shape: (channels, *space) of one item.
        dtype: of the images. If it is real and the measurements are complex, these
            become real vectors of twice the length, real parts beside imaginary ones:
            over ℝ that is the same operator.
    """
    import scipy.sparse.linalg

    linalg: Any = scipy.sparse.linalg
    nothing = operator(torch.zeros(1, *image_shape, dtype=dtype))
    parts = nothing.is_complex() and not dtype.is_complex
    like = torch.view_as_real(nothing) if parts else nothing

    def matmat(columns: Any) -> Any:
        x = torch.as_tensor(columns.T.copy(), dtype=dtype)
        y = operator.apply(x.reshape(-1, *image_shape)).detach()
        return (torch.view_as_real(y) if parts else y).flatten(1).T.numpy()

    def rmatmat(columns: Any) -> Any:
        y = torch.as_tensor(columns.T.copy(), dtype=like.dtype)
        y = y.reshape(-1, *like.shape[1:])
        x = operator.adjoint(torch.view_as_complex(y) if parts else y)
        return x.detach().flatten(1).T.numpy()

    return linalg.LinearOperator(
        dtype=like.flatten()[:1].numpy().dtype,
        shape=(like.numel(), prod(image_shape)),
        matvec=lambda v: matmat(v.reshape(-1, 1)),
        rmatvec=lambda v: rmatmat(v.reshape(-1, 1)),
        matmat=matmat,
        rmatmat=rmatmat,
    )
