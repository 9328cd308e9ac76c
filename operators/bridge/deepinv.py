"""deepinv's physics as operators, and operators as deepinv's physics.

Shapes and layouts stay as the library of origin has them: complex numbers are two real
channels in deepinv, and its sinograms are (detectors, angles).
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, final

import torch
from torch import Generator, Tensor
from torch.fft import irfft2, rfft2
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from invsolve.operators.base import (
    Compose,
    Identity,
    LinearOperator,
    Operator,
    Scaled,
    dottest,
)
from invsolve.operators.blur import Blur
from invsolve.operators.masking import Mask
from invsolve.operators.noise import GaussianNoise, Noise
from invsolve.operators.resample import Downsample
from invsolve.shapes import X, Y, per_item

EXACT = 1e-4
"""A relative error above which an adjoint is not exact in float32."""

SMALLEST = 1e-6
"""Singular values below so much of the largest are taken for 0."""


@final
@dataclass(frozen=True, eq=False)
class FromDeepinv(LinearOperator):
    """y = ``physics.A(x)``, without its noise: a linear physics of deepinv's.

    ``pinv`` and ``prox`` are conjugate gradients of our own: deepinv's keep the
    settings of their last call, and stop at an absolute tolerance.

    Args:
        physics: a ``LinearPhysics``, which is never changed.
        image: (channels, *space); empty if it takes any.
        measured: the shape of an item's measurements; empty if not known.
        exact: whether its adjoint is one.
    """

    physics: Any
    image: tuple[int, ...] = ()
    measured: tuple[int, ...] = ()
    exact: bool = True

    def apply(self, x: X) -> Y:
        return _one_tensor(_run(self.physics, "A", x), self.physics)

    def adjoint(self, y: Y) -> X:
        return _run(self.physics, "A_adjoint", y)

    @property
    def adjoint_is_exact(self) -> bool:
        return self.exact

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.measured

    def to(self, device: torch.device) -> "FromDeepinv":
        return replace(self, physics=_bare(self.physics).to(device))

    def __repr__(self) -> str:
        return f"FromDeepinv({type(self.physics).__name__}, image={self.image})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "physics": _bare(self.physics)}


@final
@dataclass(frozen=True, eq=False)
class FromDeepinvSVD(LinearOperator):
    """y = U diag(s) Vᴴ x: a ``DecomposablePhysics`` of deepinv's, with closed forms.

    They hold for economic decompositions too: Vᴴ may drop what A does not see.

    Args:
        physics: the ``DecomposablePhysics``, which is never changed.
        image: (channels, *space); empty if it takes any.
        measured: the shape of an item's measurements; empty if not known.
    """

    physics: Any
    image: tuple[int, ...] = ()
    measured: tuple[int, ...] = ()

    def apply(self, x: X) -> Y:
        return _run(self.physics, "A", x)

    def adjoint(self, y: Y) -> X:
        return _run(self.physics, "A_adjoint", y)

    def pinv(self, y: Y, *, max_steps: int = 0, rtol: float = SMALLEST) -> X:
        """V diag(1/s) Uᴴ y, singular values ≤ rtol·max s left out."""
        physics = _in_precision_of(y, self.physics)
        s = physics.mask
        seen = s.abs() > max(rtol, SMALLEST) * s.abs().max()
        inverse = torch.where(seen, 1 / torch.where(seen, s, 1), 0)
        return physics.V(inverse * physics.U_adjoint(y))

    def prox(
        self,
        v: X,
        y: Y,
        rho: float | Tensor,
        *,
        max_steps: int = 0,
        rtol: float = 0.0,
    ) -> X:
        """v + V diag(1/(s² + ρ)) Vᴴ Aᴴ (y − A v): the closed form."""
        physics = _in_precision_of(v, self.physics)
        gradient = physics.V_adjoint(self.adjoint(y - self.apply(v)))
        if isinstance(rho, Tensor):
            rho = per_item(rho.flatten(), gradient)
        return v + physics.V(gradient / (physics.mask.abs().square() + rho))

    def norm(
        self, like: X | None = None, *, max_steps: int = 0, rtol: float = 0.0
    ) -> float:
        return float(self.physics.mask.abs().max())

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.measured

    def to(self, device: torch.device) -> "FromDeepinvSVD":
        return replace(self, physics=_bare(self.physics).to(device))

    def __repr__(self) -> str:
        return f"FromDeepinvSVD({type(self.physics).__name__}, image={self.image})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "physics": _bare(self.physics)}


@final
@dataclass(frozen=True, eq=False)
class FromDeepinvNonlinear(Operator):
    """y = ``physics.A(x)``, with ``physics.A_vjp``: a nonlinear physics of deepinv's.

    Args:
        physics: a ``Physics``, which is never changed.
        image: (channels, *space); empty if it takes any.
        measured: the shape of an item's measurements; empty if not known.
    """

    physics: Any
    image: tuple[int, ...] = ()
    measured: tuple[int, ...] = ()

    def apply(self, x: X) -> Y:
        return _one_tensor(_run(self.physics, "A", x), self.physics)

    def vjp(self, x: X, v: Y) -> X:
        return _in_precision_of(x, self.physics).A_vjp(x, v)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.image

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        return self.measured

    def to(self, device: torch.device) -> "FromDeepinvNonlinear":
        return replace(self, physics=_bare(self.physics).to(device))


def from_deepinv(physics: Any, image_shape: tuple[int, ...] | None = None) -> Operator:
    """A physics of deepinv's as an operator: linear, with an SVD, or neither.

    Measurements have deepinv's own layout, and the physics' noise is left out: give an
    `InverseProblem` its own. What is done to ``physics`` later changes nothing here.

    Args:
        physics: a ``deepinv.physics.Physics``.
        image_shape: (channels, *space). The physics' own ``img_size`` unless given; if
            it has none, shapes are not checked, and the adjoint is taken to be exact.

    Raises:
        TypeError: it is not a physics, or measures several tensors at once.
        ValueError: it does not take such images, or differs from item to item.
    """
    from deepinv.physics import DecomposablePhysics, LinearPhysics, Physics

    if not isinstance(physics, Physics):
        raise TypeError(
            f"{type(physics).__name__} is no deepinv.physics.Physics: for any object "
            "with A and A_adjoint use ops.as_operator"
        )
    bare = _bare(physics)
    own = getattr(physics, "img_size", None) or getattr(physics, "imsize", None) or ()
    image = tuple(image_shape or (own if len(own) > 2 else ()))
    kind = FromDeepinv if isinstance(physics, LinearPhysics) else FromDeepinvNonlinear
    kind = FromDeepinvSVD if isinstance(physics, DecomposablePhysics) else kind
    if not image:
        return kind(bare)
    g = Generator().manual_seed(0)
    x = torch.randn(1, *image, generator=g)
    x = x.to(next(bare.buffers(), x).device)
    try:
        y = _one_tensor(_run(bare, "A", x), bare)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{type(physics).__name__} does not take images of {image}: give "
            f"image_shape=(channels, height, width) ({str(error).splitlines()[0]})"
        ) from error
    if len(y) != 1:
        raise ValueError(
            f"{type(physics).__name__} has parameters of {len(y)} items, but an "
            "operator is the same for all: make one for each"
        )
    measured = tuple(y.shape[1:])
    A = kind(bare, image, measured)
    if not isinstance(A, FromDeepinv):
        return A
    noise = torch.randn(y.shape, generator=g).to(y)
    return replace(A, exact=dottest(A, x, noise) < EXACT)


def _same(x: Any, **_: Any) -> Any:
    return x


def _bare(physics: Any) -> Any:
    """A copy without noise and sensor, which can be pickled.

    deepinv's defaults are lambdas for the identity, and some classes keep the last
    adjoint that autograd made for them; neither can be.
    """
    copy = deepcopy(physics)
    copy.noise_model = copy.sensor_model = torch.nn.Identity()
    for name, value in list(vars(copy).items()):
        default = getattr(value, "__name__", "") == "<lambda>"
        if default and value.__module__ == "deepinv.physics.forward":
            setattr(copy, name, _same)
    if hasattr(copy, "_auto_grad_adjoint_fn"):
        copy._auto_grad_adjoint_fn = None
    return copy


@lru_cache(maxsize=8)
def _cast(physics: Any, dtype: torch.dtype) -> Any:
    def convert(t: Tensor) -> Tensor:
        if t.is_complex():
            return t.to(dtype.to_complex())
        return t.to(dtype) if t.is_floating_point() else t

    return deepcopy(physics)._apply(convert)


def _in_precision_of(t: Tensor, physics: Any) -> Any:
    """The physics with its numbers in a tensor's precision, if they are in another."""
    dtype = t.real.dtype
    if hasattr(physics, "dtype"):  # it computes in that one, whatever its buffers are
        return physics
    kinds = {b.real.dtype for b in physics.buffers() if b.is_floating_point()}
    kinds |= {b.real.dtype for b in physics.buffers() if b.is_complex()}
    return physics if kinds <= {dtype} else _cast(physics, dtype)


def _run(physics: Any, name: str, t: Tensor) -> Any:
    """``physics.name(t)``, with the result in t's precision."""
    own = getattr(physics, "dtype", None)
    if own is None:
        return getattr(_in_precision_of(t, physics), name)(t)
    out = getattr(physics, name)(t.to(own.to_complex() if t.is_complex() else own))
    if not isinstance(out, Tensor):
        return out
    precision = t.real.dtype
    return out.to(precision.to_complex() if out.is_complex() else precision)


def _one_tensor(y: Any, physics: Any) -> Tensor:
    if isinstance(y, Tensor):
        return y
    raise TypeError(
        f"{type(physics).__name__} measures several tensors at once: bridge each of "
        "its parts by from_deepinv and join them by Stack"
    )


@final
@dataclass(frozen=True)
class SVD:
    """A = U diag(s) Vᴴ, with U and V orthonormal and s ≥ 0 of the spectrum's shape."""

    U: Callable[[Tensor], Tensor]
    U_adjoint: Callable[[Tensor], Tensor]
    s: Tensor
    V: Callable[[Tensor], Tensor]
    V_adjoint: Callable[[Tensor], Tensor]


def svd(A: LinearOperator, image_shape: tuple[int, ...]) -> SVD | None:
    """The decomposition of an operator, where it has a fast one; else None.

    V is complete (it does not drop what A does not see), as DDRM needs it. The blur's
    spectrum is deepinv's: half of the Fourier transform, as pairs of real numbers.
    """
    x = torch.zeros(1, *image_shape)
    match A:
        case Identity():
            return SVD(_same, _same, torch.ones_like(x), _same, _same)
        case LinearOperator(is_unitary=True):
            z = A.apply(x)
            return SVD(_same, _same, torch.ones_like(z.real), A.adjoint, A.apply)
        case Scaled() if inner := svd(A.inner, image_shape):
            sign, c = (1 if A.factor > 0 else -1), abs(A.factor)

            def flip(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
                return lambda t: sign * f(t)

            U, U_adjoint = flip(inner.U), flip(inner.U_adjoint)
            return SVD(U, U_adjoint, c * inner.s, inner.V, inner.V_adjoint)
        case Mask():
            s = A.mask.expand(torch.broadcast_shapes(A.mask.shape, x.shape))
            return SVD(_same, _same, s, _same, _same)
        case Blur():
            return _svd_of_blur(A, image_shape)
        case Downsample() if A.factor > 1:
            return _svd_of_blocks(A, x)
        case Compose(outer=outer, inner=F) if F.is_unitary:
            z = F.apply(x)
            if outer_svd := svd(outer, tuple(z.shape[1:])):
                o = outer_svd
                return SVD(
                    o.U,
                    o.U_adjoint,
                    o.s,
                    lambda t: F.adjoint(o.V(t)),
                    lambda t: o.V_adjoint(F.apply(t)),
                )
        case Compose(outer=F, inner=inner) if F.is_unitary:
            if inner_svd := svd(inner, image_shape):
                i = inner_svd
                return SVD(
                    lambda t: F.apply(i.U(t)),
                    lambda t: i.U_adjoint(F.adjoint(t)),
                    i.s,
                    i.V,
                    i.V_adjoint,
                )
    return None


def _svd_of_blur(A: Blur, image_shape: tuple[int, ...]) -> SVD:
    """k̂ = |k̂| e^{iφ}: V is Fourier's transform, and U that with the phase."""
    h, w = image_shape[-2:]
    half = A.otf[..., : w // 2 + 1]
    s = half.abs()
    phase = torch.where(s > 0, half / torch.where(s > 0, s, 1), 1)

    def to_image(t: Tensor) -> Tensor:
        return irfft2(torch.view_as_complex(t.contiguous()), s=(h, w), norm="ortho")

    def to_spectrum(t: Tensor) -> Tensor:
        return torch.view_as_real(rfft2(t, norm="ortho"))

    def turned(t: Tensor, by: Tensor) -> Tensor:
        z = torch.view_as_complex(t.contiguous()) * by.to(t.dtype.to_complex())
        return torch.view_as_real(z)

    return SVD(
        lambda t: to_image(turned(t, phase)),
        lambda t: turned(to_spectrum(t), phase.conj()),
        s[..., None].expand(1, image_shape[0], *s.shape[-2:], 2),
        to_image,
        to_spectrum,
    )


def _svd_of_blocks(A: Downsample, x: Tensor) -> SVD:
    """An orthonormal basis of each f×f block, the first of which is its mean (by f)."""
    f, c = A.factor, x.shape[1]
    n = f * f
    # The reflection that takes the first unit vector to the constant vector 1/f.
    axis = torch.full((n,), 1 / f, dtype=torch.float64)
    axis[0] += 1
    Q = 2 * torch.outer(axis, axis) / axis.square().sum() - torch.eye(n).double()

    def mixed(t: Tensor) -> Tensor:
        blocks = t.unflatten(1, (c, n))
        return torch.einsum("ij,bcjhw->bcihw", Q.to(t), blocks).flatten(1, 2)

    def means_only(y: Tensor) -> Tensor:
        rest = y.new_zeros(len(y), c, n - 1, *y.shape[2:])
        return torch.cat([y[:, :, None], rest], dim=2).flatten(1, 2)

    return SVD(
        lambda t: t.unflatten(1, (c, n))[:, :, 0],
        means_only,
        means_only(torch.full_like(A.apply(x), 1 / f)),
        lambda t: pixel_shuffle(mixed(t), f),
        lambda t: mixed(pixel_unshuffle(t, f)),
    )


def _pack(t: Tensor) -> Tensor:
    """Complex channels as twice as many real ones, real parts first."""
    return torch.cat([t.real, t.imag], dim=1) if t.is_complex() else t


def _unpack(t: Tensor, complex: bool) -> Tensor:
    if not complex:
        return t
    real, imag = t.chunk(2, dim=1)
    return torch.complex(real.contiguous(), imag.contiguous())


def to_deepinv(
    operator: LinearOperator,
    noise: Noise | None = None,
    image_shape: tuple[int, ...] | None = None,
) -> Any:
    """One of our operators as a ``deepinv.physics.LinearPhysics``.

    Where it has a singular value decomposition that is fast (`Mask`, `Blur`,
    `Downsample`, unitary operators, and these composed or scaled) it is a
    ``DecomposablePhysics``, as DDRM needs it. Complex measurements become real ones
    with twice the channels, real parts first. A nonlinear operator needs no bridge:
    ``deepinv.physics.Physics(A=operator.apply)``.

    Args:
        operator: what measures, on real images (put `ComplexChannels` before one that
            takes complex ones).
        noise: `GaussianNoise`, or none.
        image_shape: (channels, *space); the operator's own unless given, with one
            channel where it leaves the channels open.
    """
    own = operator.image_shape
    image = image_shape or (own if len(own) > 2 else (operator.image_channels, *own))
    if len(image) < 3:
        raise ValueError(
            f"{type(operator).__name__} takes images of any size: give to_deepinv "
            "image_shape=(channels, height, width)"
        )
    if noise is not None and not isinstance(noise, GaussianNoise):
        raise TypeError(
            f"to_deepinv takes GaussianNoise, not {type(noise).__name__}: set the "
            "physics' noise_model to one of deepinv's"
        )
    if operator.takes_complex:
        raise ValueError(
            f"{type(operator).__name__} takes complex images, but deepinv's are two "
            "real channels: give to_deepinv(operator @ ComplexChannels())"
        )
    plain, decomposed = _classes()
    found = svd(operator, image)
    made = plain(operator, image) if found is None else decomposed(operator, image)
    if noise is not None:
        from deepinv.physics import GaussianNoise as Theirs

        made.set_noise_model(Theirs(noise.sigma))
    return made


@cache
def _classes() -> tuple[Callable, Callable]:
    """Subclasses of deepinv's own, made when the first one is asked for."""
    from deepinv import physics

    theirs: Any = physics

    class FromInvsolve(theirs.LinearPhysics):
        """An operator of invsolve's, with its own closed forms."""

        def __init__(self, operator: LinearOperator, image: tuple[int, ...]) -> None:
            self.operator, self.image = operator, image
            self.packed = operator.apply(torch.zeros(1, *image)).is_complex()
            super().__init__(img_size=image)
            self.img_size = image

        def A(self, x: Tensor, **_: Any) -> Tensor:
            return _pack(self.operator.apply(x))

        def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
            return self.operator.adjoint(_unpack(y, self.packed))

        def A_adjoint_A(self, x: Tensor, **_: Any) -> Tensor:
            return self.operator.normal(x)

        def A_A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
            return self.A(self.A_adjoint(y))

        def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
            return self.A_adjoint(v)

        def A_dagger(
            self,
            y: Tensor,
            *_: Any,
            max_iter: int | None = None,
            tol: float | None = None,
            **__: Any,
        ) -> Tensor:
            y = _unpack(y, self.packed)
            return self.operator.pinv(y, max_steps=max_iter or 100, rtol=tol or 1e-6)

        def prox_l2(
            self,
            z: Tensor | float | None,
            y: Tensor,
            gamma: float | Tensor,
            *_: Any,
            max_iter: int | None = None,
            tol: float | None = None,
            **__: Any,
        ) -> Tensor:
            """argmin_x γ/2 ‖Ax − y‖² + ½ ‖x − z‖²: our ρ is 1/γ."""
            if not isinstance(z, Tensor):
                z = torch.full((len(y), *self.image), z or 0.0).to(y)
            gamma = per_item(torch.as_tensor(gamma).flatten().to(z), z)
            y = _unpack(y, self.packed)
            steps = max_iter or 50
            return self.operator.prox(
                z, y, 1 / gamma, max_steps=steps, rtol=tol or 1e-6
            )

        def update_parameters(self, mask: Tensor | None = None, **_: Any) -> None:
            if mask is not None:
                raise ValueError(
                    "an operator of invsolve's never changes: make another one by "
                    "to_deepinv"
                )

        def _apply(self, fn: Callable, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            self.operator = self.operator.to(self._device_holder.device)
            return self

        def __reduce__(self) -> tuple[Any, ...]:
            # A class made in a function has no name to be found by, but its maker has.
            state = {"_modules": self._modules, "_buffers": self._buffers}
            return to_deepinv, (self.operator, None, self.image), state

    class FromInvsolveSVD(FromInvsolve, theirs.DecomposablePhysics):
        """An operator of invsolve's with its singular value decomposition."""

        def __init__(self, operator: LinearOperator, image: tuple[int, ...]) -> None:
            super().__init__(operator, image)
            self._decompose()
            s = self._svd.s
            self.mask = torch.cat([s, s], dim=1) if self._pairs else s

        def _decompose(self) -> None:
            found = svd(self.operator, self.image)
            assert found is not None
            x = torch.zeros(1, *self.image, device=self._device_holder.device)
            self._svd, self._pairs = found, found.V_adjoint(x).is_complex()

        def U(self, x: Tensor) -> Tensor:
            return _pack(self._svd.U(_unpack(x, self._pairs)))

        def U_adjoint(self, x: Tensor, **_: Any) -> Tensor:
            # A copy, since DDRM writes into what it gets, which may be y itself.
            return _pack(self._svd.U_adjoint(_unpack(x, self.packed))).clone()

        def V(self, x: Tensor, **_: Any) -> Tensor:
            return self._svd.V(_unpack(x, self._pairs))

        def V_adjoint(self, x: Tensor) -> Tensor:
            return _pack(self._svd.V_adjoint(x))

        def _apply(self, fn: Callable, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            self._decompose()
            return self

    return FromInvsolve, FromInvsolveSVD
