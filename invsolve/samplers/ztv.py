"""The data step of volumes: least squares with total variation along z, by ADMM.

Chung, Ryu, McCann, Klasky, Ye, "Solving 3D Inverse Problems using Pre-trained 2D
Diffusion Models", CVPR 2023 (DiffusionMBIR), eq. 10; the splitting is Boyd et al. 2011,
§6.4.1. Volumes are (batch, channels, d, h, w), and z runs along d.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, final, get_args

import torch
from torch import Generator, Tensor

from ..linalg import dot
from ..operators import LinearOperator, Scaled
from ..problem import InverseProblem
from ..random import Randomness, randn_like
from ..shapes import PerItem, X, per_item
from ..shards import Shard


class Preset(TypedDict):
    """ρ and λ, over ‖√W A‖²."""

    rho: float
    lam: float


SPARSE_VIEW: Preset = {"rho": 10 / 389, "lam": 0.04 / 389}
"""DiffusionMBIR's ρ and λ for 8, 4 and 2 views, over ‖A‖² = 389 of its projector."""

LIMITED_ANGLE: Preset = {"rho": 10 / 389, "lam": 0.4 / 389}
"""DDS' for an arc; DiffusionMBIR's code has no script of its own for it."""

MRI: Preset = {"rho": 0.01, "lam": 0.005}
"""DiffusionMBIR's for undersampled k-space, where ‖A‖ = 1."""

SliceNoise = Literal["independent", "shared", "slerp"]

NORM_STEPS = 20
"""Of the power iteration for ‖A‖²: the presets need no more than its first digits."""


@final
@dataclass(frozen=True, eq=False)
class DataStep:
    """One step of ADMM towards argmin ½‖Ax − y‖²_W + λ Σ|D x| + κ/2 ‖x − v‖².

    D x holds the jumps x_{k+1} − x_k. With the splitting z of D x and its dual w:

        x ← a few conjugate gradients on (AᴴWA + ρDᴴD + κ) x = AᴴWy + ρDᴴ(z − w) + κv,
        q ← D x + w,   z ← shrink(q, λ/ρ),   w ← q − z.

    z and w are functions of q, so that q is all that is carried. x and q are
    overwritten: beside them no more than three volumes are held.

    Args:
        operator, y: A and y.
        weight: W, the noise's precision; what A was scaled by is in it.
        rho: ρ, one for each item; 0 for no coupling.
        threshold: λ/ρ.
        periodic: whether the first slice follows the last, as in the published code.
        shard: which of the slices x, q and y are of.
    """

    operator: LinearOperator
    y: Tensor
    weight: float | Tensor
    rho: PerItem
    threshold: float
    periodic: bool
    shard: Shard

    @classmethod
    def of(
        cls,
        problem: InverseProblem,
        *,
        rho: float,
        lam: float,
        aspect: float = 1.0,
        periodic: bool = False,
        shard: Shard | None = None,
    ) -> "DataStep":
        """With ρ and λ in units of ‖√W A‖², so that they mean the same for every A.

        Args:
            problem: linear, of volumes.
            rho, lam: of a volume whose voxels are cubes; 0 and 0 for no coupling.
            aspect: a voxel's height over its width. The data of a height are told by
                1/aspect slices, and so ρ and λ are divided by it; λ/ρ stays.
            periodic: as above.
            shard: the problem's slices among those of the processes; all unless given.

        Raises:
            ValueError: the images are no volumes, not of so many slices as the shard's,
                or a number is out of range.
        """
        if rho < 0 or lam < 0 or (lam > 0 and rho == 0):
            raise ValueError(
                f"rho must be > 0 and lam at least 0, or both 0 for no coupling, got "
                f"{rho} and {lam}"
            )
        if not aspect > 0:
            raise ValueError(f"aspect must be > 0, got {aspect}")
        like = problem.linear.image_like(problem.y)
        if like.ndim != 5:
            raise ValueError(
                "this needs volumes (batch, channels, d, h, w), but the problem's "
                f"images are {tuple(like.shape)}: use dds, or a SliceWise operator"
            )
        shard = shard or Shard(like.shape[2])
        if like.shape[2] != shard.size:
            raise ValueError(
                f"the problem has {like.shape[2]} slices, of which process {shard.rank} "
                f"has {shard.size}: give it its own, shard.cut of the measurements"
            )
        A, y, weight = problem.linear, problem.y, problem.noise.precision(problem.y)
        while isinstance(A, Scaled):  # a factor on y costs less than one on volumes
            y, weight, A = y / A.factor, weight * A.factor**2, A.inner
        none = torch.zeros(len(y)).to(like.real)
        uncoupled = cls(A, y, weight, none, 0.0, periodic, shard)
        if not rho:
            return uncoupled
        strength = rho / aspect * uncoupled.norm2(like)
        return replace(uncoupled, rho=strength, threshold=lam / rho)

    def jumps(self, like: X) -> Tensor:
        """q before the first step: zeros, for D x of a volume like this."""
        return like.new_zeros(*like.shape[:2], self._count(like), *like.shape[3:])

    def __call__(
        self, x: X, q: Tensor, *, cg_steps: int, kappa: float | Tensor = 0.0
    ) -> None:
        """A step from v = x and q, both of which it overwrites.

        Args:
            x: where conjugate gradients start, and v.
            q: as `jumps` gave it, or as the last step left it.
            cg_steps: how many.
            kappa: κ.
        """

        def gap(k: int, jump: Tensor) -> Tensor:  # z − w − D x
            return q[:, :, k] - 2 * self._dual(q[:, :, k]) - jump

        def normal(p: X) -> X:
            out = self._adjoint(self.operator.apply(p))
            self._pull(out, p, lambda _, jump: jump)
            return out.add_(p, alpha=float(kappa)) if kappa else out

        residual = self._adjoint(self.y - self.operator.apply(x))
        self._pull(residual, x, gap)
        self._descend(normal, residual, x, cg_steps)
        for k, jump in self._jumps(x):
            q[:, :, k] = self._dual(q[:, :, k]) + jump

    def sensitivity(self, like: X) -> X:
        """AᴴW A 1 of a volume of ones, or a ValueError where it is negative."""
        seen = self._adjoint(self.operator.apply(torch.ones_like(like)))
        most = self.shard.most(seen.real.max())
        least = -self.shard.most(-seen.real.min())
        if least < -1e-4 * most:
            raise ValueError(
                "the last step, of SIRT, needs an operator without negative entries: "
                "give final=False"
            )
        return seen

    def sirt(self, x: X) -> X:
        """x + AᴴW(y − Ax)/(AᴴWA1), where anything is seen; x is overwritten."""
        seen = self.sensitivity(x)
        gap = self._adjoint(self.y - self.operator.apply(x))
        least = 1e-3 * self.shard.most(seen.real.max())
        for k in range(x.shape[2]):
            part = gap[:, :, k] / seen[:, :, k]
            x[:, :, k] += torch.where(seen.real[:, :, k] > least, part, 0)
        return x

    def norm2(self, like: X) -> PerItem:
        """‖√W A‖² for each item, by power iteration from one and the same start."""
        start = Generator().manual_seed(0)
        x = slice_noise(like[:1], "independent", start, self.shard).expand_as(like)
        value = like.real.new_zeros(len(like))
        for _ in range(NORM_STEPS):
            x = x / per_item(self.dot(x, x).sqrt(), x)
            Mx = self._adjoint(self.operator.apply(x))
            x, value = Mx, self.dot(x, Mx)
        return value

    def dot(self, a: X, b: X) -> PerItem:
        """Re⟨a, b⟩ of volumes, slice by slice, which needs no volume of products."""
        slices = zip(a.unbind(2), b.unbind(2), strict=True)
        return self.shard.sum(torch.stack([dot(*pair) for pair in slices]).sum(0))

    def _adjoint(self, y: Tensor) -> X:
        """AᴴW y, in memory of its own."""
        return self.operator.adjoint(self.weight * y)

    def _count(self, x: X) -> int:
        """How many jumps begin here: one for each slice that another follows."""
        goes_on = self.periodic or self.shard.last < self.shard.depth
        return x.shape[2] - (not goes_on)

    def _jumps(self, x: X) -> Iterator[tuple[int, Tensor]]:
        """(k, x_{k+1} − x_k) for each; what follows the last slice may lie elsewhere."""
        if not self.rho.any():
            return
        beyond = self.shard.passed(x[:, :, 0], -1, self.periodic)
        for k in range(self._count(x)):
            after = x[:, :, k + 1] if k + 1 < x.shape[2] else beyond
            assert after is not None
            yield k, after - x[:, :, k]

    def _pull(self, out: X, x: X, of: Callable[[int, Tensor], Tensor]) -> None:
        """Add ρDᴴ of what ``of`` makes of x's jumps."""
        if not self.rho.any():
            return
        last = torch.zeros_like(out[:, :, 0])
        for k, jump in self._jumps(x):
            pull = per_item(self.rho, jump) * of(k, jump)
            out[:, :, k] -= pull
            if k + 1 < x.shape[2]:
                out[:, :, k + 1] += pull
            else:
                last = pull
        came = self.shard.passed(last, 1, self.periodic)
        if came is not None:
            out[:, :, 0] += came

    def _dual(self, q: Tensor) -> Tensor:
        """w: q, no longer than the threshold."""
        t = self.threshold
        return q * (t / q.abs().clamp_min(max(t, torch.finfo(q.dtype).tiny)))

    def _descend(self, normal: Callable[[X], X], r: X, x: X, steps: int) -> None:
        """Conjugate gradients from x and its residual r, both overwritten.

        As `linalg.cg`, item by item, but beside them only two volumes are held.
        """
        p, rr = (r.clone() if steps > 1 else r), self.dot(r, r)
        for left in range(steps - 1, -1, -1):
            Mp = normal(p)
            pMp = self.dot(p, Mp)
            alpha = _ratio(rr, pMp)
            x.addcmul_(per_item(alpha, x).to(x.dtype), p)
            if not left:
                return
            r.addcmul_(per_item(-alpha, r).to(r.dtype), Mp)
            del Mp
            rr, rr_old = self.dot(r, r), rr
            p.mul_(per_item(_ratio(rr, rr_old), p)).add_(r)


def _ratio(a: PerItem, b: PerItem) -> PerItem:
    """a/b, 0 where b is not positive."""
    return torch.where(b > 0, a / b.where(b > 0, torch.ones_like(b)), 0)


def slice_noise(
    like: X, kind: SliceNoise, generator: Randomness, shard: Shard | None = None
) -> X:
    """Unit normal noise of a volume: in each slice its own, one for all, or between.

    ``slerp`` turns from one draw n₀ to another n₁ from the first slice to the last:

        n_k = (sin((1 − a)Ω) n₀ + sin(aΩ) n₁)/sin Ω,   a = k/(d − 1),

    with Ω the angle between them (Du et al., "Inter-Slice Consistent Stochasticity",
    ICLR 2026), so that neighbours' noise hardly differs. Each voxel's is N(0, 1) but
    for rounding; seen along z they are two numbers a column.

    Args:
        like: the volume, or a process's slices of it.
        kind: one of the three.
        generator: in the same state in every process, which draws all slices in turn
            and keeps its own.
        shard: which slices ``like`` has; all unless given.
    """
    if kind not in get_args(SliceNoise):
        raise ValueError(f"unknown noise {kind!r}: {', '.join(get_args(SliceNoise))}")
    shard = shard or Shard(like.shape[2])
    if kind == "independent":
        out = torch.empty_like(like)
        for k in range(shard.depth):
            n = randn_like(like[:, :, 0], generator)
            if shard.first <= k < shard.last:
                out[:, :, k - shard.first] = n
        return out
    first = randn_like(like[:, :, 0], generator)
    if kind == "shared" or shard.depth == 1:
        return first.unsqueeze(2).expand_as(like)
    last = randn_like(like[:, :, 0], generator)
    cosine = dot(first, last) / (dot(first, first) * dot(last, last)).sqrt()
    angle = per_item(cosine.acos(), like)
    a = torch.linspace(0, 1, shard.depth)[shard.first : shard.last]
    a = a.to(angle).reshape(-1, 1, 1)
    out = (torch.sin((1 - a) * angle) / angle.sin()) * first.unsqueeze(2)
    return out.addcmul_(
        (torch.sin(a * angle) / angle.sin()).to(out.dtype), last.unsqueeze(2)
    )
