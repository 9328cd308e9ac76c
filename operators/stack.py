"""Several measurements of one image, and one measurement of several channels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import final

import torch
from torch import Tensor

from invsolve.shapes import X, Y

from .base import LinearOperator, tensors


@final
@dataclass(frozen=True, eq=False)
class Stack(LinearOperator):
    """y = (A₁ x, …, A_K x), flattened and joined to one tensor of shape (batch, total).

    ``Mask(weights) @ Stack(…)`` weights every measurement; `join` makes such weights
    from one tensor for each part. All parts measure real numbers, or all complex ones:
    write ``RealImage() @ A`` for a real part among complex ones.

    Args:
        operators: the Aₖ.
        shape: (channels, *space) of the images. May be left out if a part knows it;
            a part that knows only (h, w) is taken to see one channel.
        complex_image: whether the images are complex.
    """

    operators: Sequence[LinearOperator]
    shape: tuple[int, ...] = ()
    complex_image: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "operators", tuple(self.operators))
        if not self.operators:
            raise ValueError("a Stack needs at least one operator")
        shape = self.shape or max((A.image_shape for A in self.operators), key=len)
        if not shape:
            raise ValueError(
                "no operator of the Stack knows its images' shape: "
                "give Stack(operators, shape=(channels, h, w))"
            )
        object.__setattr__(self, "shape", (1,) * (3 - len(shape)) + tuple(shape))
        _ = self._part_shapes  # asks every operator whether it takes such images

    def apply(self, x: X) -> Y:
        return self.join([A.apply(x) for A in self.operators])

    def adjoint(self, y: Y) -> X:
        parts = zip(self.operators, self.split(y), strict=True)
        first, *others = [A.adjoint(part) for A, part in parts]
        return sum(others, first)

    def normal(self, x: X) -> X:
        first, *others = [A.normal(x) for A in self.operators]
        return sum(others, first)

    def split(self, y: Y) -> list[Tensor]:
        """One tensor for each operator, of the shape that it gives."""
        sizes = [prod(shape) for shape in self._part_shapes]
        parts = zip(y.split(sizes, 1), self._part_shapes, strict=True)
        return [part.reshape(len(y), *shape) for part, shape in parts]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """(batch, total), of one tensor for each operator."""
        shapes = [tuple(part.shape[1:]) for part in parts]
        if shapes != self._part_shapes:
            raise ValueError(
                f"the Stack's parts are (batch, …) of {self._part_shapes}, got {shapes}"
            )
        return torch.cat([part.flatten(1) for part in parts], 1)

    def items(self, index: Tensor, ndim: int) -> "Stack":
        parts = zip(self.operators, self._part_shapes, strict=True)
        some = [A.items(index, 1 + len(shape)) for A, shape in parts]
        same = all(one is A for one, A in zip(some, self.operators, strict=True))
        return self if same else replace(self, operators=some)

    def to(self, device: torch.device) -> "Stack":
        return replace(self, operators=[A.to(device) for A in self.operators])

    @property
    def adjoint_is_exact(self) -> bool:
        return all(A.adjoint_is_exact for A in self.operators)

    @property
    def takes_complex(self) -> bool:
        return self.complex_image

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return (sum(prod(shape) for shape in self._part_shapes),)

    @cached_property
    def _part_shapes(self) -> list[tuple[int, ...]]:
        """What each operator makes of an image, without the batch."""
        dtype = torch.complex64 if self.complex_image else torch.float32
        tensor = next(tensors(self.operators), None)
        device = torch.device("cpu") if tensor is None else tensor.device
        x = torch.zeros(1, *self.shape, dtype=dtype, device=device)
        parts = [A.items(torch.tensor([0]), x.ndim)(x) for A in self.operators]
        if len({part.is_complex() for part in parts}) > 1:
            raise ValueError(
                "a Stack measures real or complex numbers, not both: "
                "write RealImage() @ A for the real parts"
            )
        return [tuple(part.shape[1:]) for part in parts]


@final
@dataclass(frozen=True, eq=False)
class OnChannels(LinearOperator):
    """y = A x_S, of some of an image's channels: [A 0].

    A prior of several channels is measured in some of them: the image beside its
    segmentation, PET beside CT. The hidden channels of pinv are 0, those of prox v's.

    Args:
        operator: A, of images of the channels S.
        channels: S, in the order that A takes them.
        of: the number of channels of the images.
    """

    operator: LinearOperator
    channels: tuple[int, ...]
    of: int

    def __post_init__(self) -> None:
        S = self.channels
        if not S or len(set(S)) < len(S) or min(S) < 0 or max(S) >= self.of:
            raise ValueError(
                f"channels are distinct numbers from 0 to {self.of - 1}, at least one, "
                f"got {S}"
            )

    def apply(self, x: X) -> Y:
        return self.operator.apply(self._seen(x))

    def adjoint(self, y: Y) -> X:
        return self._among(self.operator.adjoint(y))

    def normal(self, x: X) -> X:
        return self._among(self.operator.normal(self._seen(x)))

    def pinv(self, y: Y, *, max_steps: int = 100, rtol: float = 1e-6) -> X:
        return self._among(self.operator.pinv(y, max_steps=max_steps, rtol=rtol))

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 50,
        rtol: float = 1e-6,
    ) -> X:
        u = self._seen(v)
        x = self.operator.prox(u, y, rho, max_steps=max_steps, rtol=rtol)
        return v + self._among(x - u)

    def norm(
        self, like: X | None = None, *, max_steps: int = 200, rtol: float = 1e-5
    ) -> float:
        seen = None if like is None else self._seen(like)
        return self.operator.norm(seen, max_steps=max_steps, rtol=rtol)

    def check_image(self, x: Tensor) -> None:
        if x.ndim < 3 or x.shape[1] != self.of:
            raise ValueError(
                f"OnChannels expects an image of shape (batch, {self.of}, …), "
                f"got {tuple(x.shape)}"
            )
        self.operator.check_image(self._seen(x))

    def check_measurements(self, y: Tensor) -> None:
        self.operator.check_measurements(y)

    @property
    def adjoint_is_exact(self) -> bool:
        return self.operator.adjoint_is_exact

    @property
    def image_channels(self) -> int:
        return self.of

    @property
    def takes_complex(self) -> bool:
        return self.operator.takes_complex

    @property
    def makes_complex(self) -> bool:
        return self.operator.makes_complex

    @property
    def image_shape(self) -> tuple[int, ...]:
        # The operator's shape may begin with its channels; its last two are space.
        return self.operator.image_shape[-2:]

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.operator.measurement_shape

    def _seen(self, x: Tensor) -> Tensor:
        return x[:, list(self.channels)]

    def _among(self, x: Tensor) -> Tensor:
        """The channels seen in their places among all, which are 0."""
        full = x.new_zeros(len(x), self.of, *x.shape[2:])
        return full.index_copy(1, torch.tensor(self.channels, device=x.device), x)


def on_channels(
    operator: LinearOperator, channels: int | Sequence[int], of: int
) -> OnChannels:
    """[A 0]: the operator on one channel, or on some, of an image that has ``of``."""
    chosen = (channels,) if isinstance(channels, int) else tuple(channels)
    return OnChannels(operator, chosen, of)
