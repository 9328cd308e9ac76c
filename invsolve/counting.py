"""What a solve costs: passes of the network and applications of the operator."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import final

import torch
from torch import Tensor

from .operators import LinearOperator, Operator
from .operators.base import Around
from .priors import AffineMap, Prior
from .shapes import Sigma, X, Y


@final
@dataclass
class Tally:
    """Counts of images, so that a batch of 8 through the network is 8 forwards.

    And seconds: of a backward pass between the gradient's arrival at the network's
    output and at its input.
    """

    forwards: int = 0
    backwards: int = 0
    applies: int = 0
    adjoints: int = 0
    closed_forms: int = 0
    network_seconds: float = 0.0
    operator_seconds: float = 0.0

    @contextmanager
    def operator(self) -> Iterator[None]:
        """Time that is the operator's."""
        begin = perf_counter()
        yield
        self.operator_seconds += perf_counter() - begin


@final
class CountedPrior(Prior):
    """A prior that counts its network's forwards and backwards."""

    def __init__(self, inner: Prior, tally: Tally) -> None:
        self.inner, self.tally = inner, tally
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        tally = self.tally
        tally.forwards += len(x)
        begin = perf_counter()
        out = self.inner.denoise(x, sigma)
        tally.network_seconds += perf_counter() - begin
        if out.requires_grad:

            def arrive(grad: Tensor) -> None:
                nonlocal begin
                tally.backwards += len(grad)
                begin = perf_counter()

            def leave(grad: Tensor) -> None:
                tally.network_seconds += perf_counter() - begin

            out.register_hook(arrive)
            if x.requires_grad:
                x.register_hook(leave)
        return out

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        inner, map = self.inner.normalised
        return CountedPrior(inner, self.tally), map

    def check(self, shape: tuple[int, ...]) -> None:
        self.inner.check(shape)


def counted(operator: Operator, tally: Tally) -> Operator:
    """The operator, counting what is asked of it."""
    if isinstance(operator, LinearOperator):
        return CountedLinear(operator, tally)
    return CountedOperator(operator, tally)


@final
class CountedOperator(Operator):
    """A nonlinear operator that counts.

    A vjp counts as an apply and an adjoint, a pullback as an apply, and an adjoint for
    each v that is pulled back; a guess as one closed form.
    """

    def __init__(self, inner: Operator, tally: Tally) -> None:
        self.inner, self.tally = inner, tally

    def items(self, index: Tensor, ndim: int) -> "CountedOperator":
        inner = self.inner.items(index, ndim)
        return self if inner is self.inner else CountedOperator(inner, self.tally)

    def apply(self, x: X) -> Y:
        self.tally.applies += len(x)
        with self.tally.operator():
            return self.inner.apply(x)

    def vjp(self, x: X, v: Y) -> X:
        self.tally.applies += len(x)
        self.tally.adjoints += len(x)
        with self.tally.operator():
            return self.inner.vjp(x, v)

    def pullback(self, x: X) -> tuple[Y, Callable[[Y], X]]:
        self.tally.applies += len(x)
        with self.tally.operator():
            y, pull = self.inner.pullback(x)

        def counted_pull(v: Y) -> X:
            self.tally.adjoints += len(v)
            with self.tally.operator():
                return pull(v)

        return y, counted_pull

    def guess(self, y: Y) -> X:
        self.tally.closed_forms += len(y)
        with self.tally.operator():
            return self.inner.guess(y)

    def image_like(self, y: Y) -> X:
        return self.inner.image_like(y)

    def check_image(self, x: Tensor) -> None:
        self.inner.check_image(x)

    def check_measurements(self, y: Tensor) -> None:
        self.inner.check_measurements(y)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.inner.image_shape

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.inner.measurement_shape


@final
class CountedLinear(Around):
    """A linear operator that counts, inside conjugate gradients too.

    A ``pinv`` or ``prox`` of the operator's own is one closed form; the general ones
    run here, so that their applications are seen.
    """

    def __init__(self, inner: LinearOperator, tally: Tally) -> None:
        self.inner, self.tally = inner, tally

    def items(self, index: Tensor, ndim: int) -> "CountedLinear":
        inner = self.inner.items(index, ndim)
        return self if inner is self.inner else CountedLinear(inner, self.tally)

    @property
    def is_unitary(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.is_unitary

    def apply(self, x: X) -> Y:
        self.tally.applies += len(x)
        with self.tally.operator():
            return self.inner.apply(x)

    def adjoint(self, y: Y) -> X:
        self.tally.adjoints += len(y)
        with self.tally.operator():
            return self.inner.adjoint(y)

    def pinv(self, y: Y, *, max_steps: int = 100, rtol: float = 1e-6) -> X:
        if type(self.inner).pinv is LinearOperator.pinv:
            return super().pinv(y, max_steps=max_steps, rtol=rtol)
        self.tally.closed_forms += len(y)
        with self.tally.operator():
            return self.inner.pinv(y, max_steps=max_steps, rtol=rtol)

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 50,
        rtol: float = 1e-6,
    ) -> X:
        if type(self.inner).prox is LinearOperator.prox:
            return super().prox(v, y, rho, max_steps=max_steps, rtol=rtol)
        self.tally.closed_forms += len(y)
        with self.tally.operator():
            return self.inner.prox(v, y, rho, max_steps=max_steps, rtol=rtol)

    def norm(
        self, like: X | None = None, *, max_steps: int = 200, rtol: float = 1e-5
    ) -> float:
        return self.inner.norm(like, max_steps=max_steps, rtol=rtol)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of CUDA's allocator since its last reset, or of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
