"""Diffusion with forward models: signals learnt from their measurements alone.

Tewari, Yin, Cazenavette, Rezchikov, Tenenbaum, Durand, Freeman, Sitzmann, "Diffusion with
Forward Models: Solving Stochastic Inverse Problems Without Direct Supervision", NeurIPS
2023. An exam's rows are divided into context C, target T and novel rows N. Noise is added
to the target's data, u = y_T + s n; the network predicts the *signal*, Ŝ ≈ E[S | y_C, u],
and what is compared with data is A_T Ŝ and A_N Ŝ: no signal is ever seen.

Here measurements are whitened, row by row, and u = y_T + s n is the state (the paper's is
u/√(1+s²)). Other than the paper: the target's own noise is corrected for (`corrected`), a
layer of conjugate gradients fuses prediction and data (`NetworkForwardPrior.fused`), and
the deterministic context branch is a first guess of the signal, not a rendering of it.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from invsolve.linalg import cg, largest_eigenvalue
from invsolve.operators.parametric import Parametric
from invsolve.priors import AffineMap, Prior
from invsolve.random import Randomness, randn_like
from invsolve.shapes import Sigma, X, per_item

Rows = Bool[Tensor, "_ *grid"]
DENSE = 2048
"""Pixels up to which null directions are sought by a dense eigendecomposition."""


class ForwardPrior(Prior):
    """p(S | y_C) through Ŝ = E[S | y_C, y_T + s n], for C and T of a family of operators.

    Attributes:
        family: the operators A_φ, of images in their own unit.
        sigma: σ_y, the noise of the measurements, in their unit.
        scale: the whitening W of each row.
        gain: an image in its own unit over the network's.
        target_rows: how many rows a target has.
        context_rows: the largest context that was trained with.
    """

    family: Parametric
    sigma: float
    scale: Float[Tensor, "*grid"]
    gain: float
    target_rows: int
    context_rows: int

    @abstractmethod
    def signal(
        self, y: Tensor, context: Rows, u: Tensor, target: Rows, s: Sigma
    ) -> Tensor:
        """Ŝ = E[S | y_C, u], of u = y_T + s n.

        Args:
            y: whitened measurements, of which the context's rows are used.
            context, target: C and T, (batch, *grid); one row of them holds for all.
                Without target rows it is E[S | y_C], and u and s do not matter.
            u: the noisy target.
            s: its noise level, in whitened units.
        """

    @abstractmethod
    def residual(self, y: Tensor, rows: Rows, generator: Randomness) -> Tensor:
        """A draw of N(0, Cov(S | y_rows)), as far as the prior knows it."""

    def denoise(self, x: X, sigma: Sigma) -> X:
        raise ValueError(
            "a prior learnt from measurements answers for measurements, not for noisy "
            "images: use it with samplers.dfm"
        )

    @property
    def normalised(self) -> tuple[Prior, AffineMap]:
        return self, AffineMap(self.gain, 0.0)

    def check(self, shape: tuple[int, ...]) -> None:
        if tuple(shape) != self.family.image:
            raise ValueError(
                f"this prior was trained for images of {self.family.image}, got "
                f"{tuple(shape)}: its geometry is part of it"
            )

    def to(self, device: torch.device) -> "ForwardPrior":
        moved = copy.copy(super().to(device))
        assert isinstance(moved, ForwardPrior)
        moved.family = self.family.to(device)
        return moved

    def measure(self, x: Tensor) -> Tensor:
        """W A x."""
        return self.gain * self._scale * self.family.full.apply(x)

    def adjoint(self, v: Tensor) -> Tensor:
        """AᴴW v."""
        return self.gain * self.family.full.adjoint(self._scale * v)

    def variance(self) -> Tensor:
        """(σ_y W)², of every measurement."""
        return (self.sigma * self._scale).square()

    def precision(self, context: Rows, target: Rows, s: Sigma) -> Tensor:
        """1/Var of what is known: 1/(σ_y W)² in C, 1/((σ_y W)² + s²) in T, else 0."""
        v = self.variance()
        known = self.family.spread(context) / v
        return known + self.family.spread(target) / (v + per_item(s, v).square())

    def corrected(self, o: Tensor, u: Tensor, s: Sigma) -> Tensor:
        """E[y_T | u] = o + κ (u − o) with κ = σ²/(σ² + s²), where o = E[A_T S | u].

        The data's noise is part of u, so that it is partly known.
        """
        v = self.variance()
        return o + v / (v + per_item(s, v).square()) * (u - o)

    @property
    def _scale(self) -> Tensor:
        return self.family.spread(self.scale[None])


@final
class GaussianForwardPrior(ForwardPrior):
    """The exact Ŝ of S ~ N(m, Σ): what a network would be at best.

    Args:
        family: the operators.
        mean: m, an image.
        cov: Σ, of its pixels in order.
        sigma: σ_y.
        scale: the whitening; none unless given.
        target_rows: of a target.
    """

    def __init__(
        self,
        family: Parametric,
        mean: Float[Tensor, "*image"],
        cov: Float[Tensor, "d d"],
        *,
        sigma: float,
        scale: Float[Tensor, "*grid"] | None = None,
        target_rows: int = 1,
    ) -> None:
        self.family, self.mean, self.cov, self.sigma = family, mean, cov, sigma
        self.scale = mean.new_ones(family.grid) if scale is None else scale
        self.gain, self.target_rows = 1.0, target_rows
        self.context_rows = self.scale.numel()
        self.sigma_min, self.sigma_max = 1e-3, 80.0
        basis = torch.eye(mean.numel()).to(mean).reshape(-1, *mean.shape)
        self.matrix = parts(self.measure(basis)).flatten(1).T
        self.inverse = torch.linalg.inv(cov)

    def signal(
        self, y: Tensor, context: Rows, u: Tensor, target: Rows, s: Sigma
    ) -> Tensor:
        data = self.family.join(y, context, u)
        weight, information = self._information(y, context, target, s)
        r = weight * parts(data - self.measure(self.mean[None])).flatten(1)
        d = torch.linalg.solve(information, (r @ self.matrix)[..., None])[..., 0]
        return self.mean + d.reshape(len(y), *self.mean.shape)

    def residual(self, y: Tensor, rows: Rows, generator: Randomness) -> Tensor:
        none = torch.zeros_like(rows)
        _, information = self._information(y, rows, none, torch.ones(()))
        root = torch.linalg.cholesky(torch.linalg.inv(information))
        n = randn_like(self.mean.expand(len(y), *self.mean.shape), generator)
        return (root @ n.flatten(1)[..., None])[..., 0].reshape(n.shape)

    def _information(
        self, y: Tensor, context: Rows, target: Rows, s: Sigma
    ) -> tuple[Tensor, Tensor]:
        weight = self.precision(context, target, s).expand(-1, *y.shape[1:])
        if y.is_complex():
            weight = weight[..., None].expand(*weight.shape, 2)
        weight = weight.flatten(1).to(self.matrix)
        weighted = weight[:, :, None] * self.matrix
        return weight, self.inverse + self.matrix.T @ weighted


Head = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images, ¼ ln s) ↦ (the correction of the first guess, ln μ of each item)."""


@final
class NetworkForwardPrior(ForwardPrior):
    """Ŝ by a network between two solves with the operator.

    The first guess S_det is the network's of the context alone; the second is of S_det,
    of what the noisy target says beyond it, and of how well C and T see each pixel.

    Args:
        family: the operators.
        head: the network; images of 2c + 2 channels go in.
        sigma: σ_y.
        scale: the whitening.
        gain: an image in its own unit over the network's.
        target_rows, context_rows: as trained.
        steps: of conjugate gradients.
        floor: the least noise, in whitened units, that a solve reckons with.
        ridge: of `back`; a thousandth of ‖WA‖² unless given.
    """

    def __init__(
        self,
        family: Parametric,
        head: Head,
        *,
        sigma: float,
        scale: Float[Tensor, "*grid"],
        gain: float = 1.0,
        target_rows: int = 1,
        context_rows: int = 1,
        steps: int = 8,
        floor: float = 0.03,
        ridge: float | None = None,
    ) -> None:
        self.family, self.head, self.sigma, self.scale = family, head, sigma, scale
        self.gain, self.steps, self.floor = gain, steps, floor
        self.target_rows, self.context_rows = target_rows, context_rows
        self.sigma_min, self.sigma_max = 0.01, 20.0
        self.ridge = 1e-3 * self._energy() if ridge is None else ridge

    def _energy(self) -> float:
        like = torch.zeros(1, *self.family.image).to(self.scale)
        start = randn_like(like, torch.Generator().manual_seed(0))

        def normal(x: Tensor) -> Tensor:
            return self.adjoint(self.measure(x))

        return float(largest_eigenvalue(normal, start, max_steps=30, rtol=1e-2))

    def precision(self, context: Rows, target: Rows, s: Sigma) -> Tensor:
        # Conjugate gradients of few steps cannot tell less noise than the floor.
        return super().precision(context, target, s).clamp_max(self.floor**-2)

    def signal(
        self, y: Tensor, context: Rows, u: Tensor, target: Rows, s: Sigma
    ) -> Tensor:
        guess = self.guess(y, context)
        return self.refined(guess, y, context, u, target, s) if target.any() else guess

    def guess(self, y: Tensor, context: Rows) -> Tensor:
        """S_det, from the context alone."""
        x = self.back(y, context)
        none, unseen = torch.zeros_like(x), torch.zeros_like(context)
        inputs = [x, none, *self._coverage(context, unseen, x)]
        level = x.new_ones(len(x))
        change, log_mu = self.head(torch.cat(inputs, 1), level)
        weight = self.precision(context, unseen, level)
        return self.fused(x + change, y, weight, log_mu.exp())

    def refined(
        self,
        guess: Tensor,
        y: Tensor,
        context: Rows,
        u: Tensor,
        target: Rows,
        s: Sigma,
    ) -> Tensor:
        """Ŝ from S_det and the noisy target; S_det itself is not trained by it."""
        guess = guess.detach()
        into = (1 + s**2).rsqrt()
        x = self.back(per_item(into, u) * (u - self.measure(guess)), target)
        inputs = [guess, x, *self._coverage(context, target, x)]
        level = (s.log() / 4).expand(len(x)).to(x)
        change, log_mu = self.head(torch.cat(inputs, 1), level)
        data = self.family.join(y, context, u)
        weight = self.precision(context, target, s)
        return self.fused(guess + change, data, weight, log_mu.exp())

    def fused(self, F: Tensor, data: Tensor, weight: Tensor, mu: Tensor) -> Tensor:
        """argmin_x ½‖WAx − data‖²_weight + μ/2 ‖x − F‖², by a few steps of CG from F.

        Where the data are certain it is they that are kept, and F elsewhere: of a mask
        it is the skip connection of Karras et al. 2022.
        """
        mu = per_item(mu, F)
        b = self.adjoint(weight * data) + mu * F
        return cg(
            lambda x: self.adjoint(weight * self.measure(x)) + mu * x,
            b,
            F,
            max_steps=self.steps,
            rtol=1e-5,
        )

    def back(self, v: Tensor, rows: Rows) -> Tensor:
        """The measurements of some rows as an image: least squares with a ridge."""
        weight = self.family.spread(rows).to(v.real.dtype)
        nothing = torch.zeros_like(self.adjoint(v))
        ridge = torch.tensor(self.ridge).to(nothing)
        return self.fused(nothing, v, weight, ridge)

    def residual(self, y: Tensor, rows: Rows, generator: Randomness) -> Tensor:
        """Of N(0, (AᴴwA + μ)⁻¹): as good as the network's μ is a precision."""
        none = torch.zeros_like(rows)
        weight = self.precision(rows, none, torch.ones(()))
        x = self.guess(y, rows)
        level = x.new_full((len(x),), math.log(self.sigma_min) / 4)
        inputs = [x, torch.zeros_like(x), *self._coverage(rows, none, x)]
        mu = self.head(torch.cat(inputs, 1), level)[1].exp()
        n = whole(randn_like(parts(y), generator), y)
        prior = per_item(mu, x).rsqrt() * randn_like(x, generator)
        noise = torch.where(weight > 0, n / weight.clamp_min(1e-12).sqrt(), 0)
        return self.fused(prior, noise, weight, mu)

    def _coverage(self, context: Rows, target: Rows, x: Tensor) -> list[Tensor]:
        seen = (self.family.coverage(context), self.family.coverage(target))
        return [c.to(x).expand(len(x), *c.shape[1:]) for c in seen]

    def to(self, device: torch.device) -> "NetworkForwardPrior":
        moved = super().to(device)
        assert isinstance(moved, NetworkForwardPrior)
        return moved


@final
class UNetHead(nn.Module):
    """The U-Net of the package as a `Head`, and ln μ = a + b · ¼ ln s.

    Args:
        unet: of 2c + 2 channels.
        channels: c, of the images.
        log_mu: a to begin with.
    """

    def __init__(self, unet: nn.Module, channels: int, log_mu: float = 2.0) -> None:
        super().__init__()
        self.unet, self.channels = unet, channels
        self.log_mu = nn.Parameter(torch.tensor([log_mu, 0.0]))

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        change = self.unet(x, level)[:, : self.channels].float()
        return change, self.log_mu[0] + self.log_mu[1] * level


def dfm_losses(
    prior: ForwardPrior,
    y: Tensor,
    context: Rows,
    target: Rows,
    novel: Rows,
    s: Float[Tensor, " batch"],
    noise: Tensor,
) -> dict[str, Tensor]:
    """Mean squares of what the signal says of measurements, in whitened units.

        target  ⟨(1 + s²)/s² |E[y_T | u] − y_T|²⟩   (the data's own noise corrected for)
        novel   ⟨|A_N Ŝ − y_N|²⟩
        guess   ⟨|A S_det − y|²⟩ over T and N

    Args:
        prior: of which the losses are.
        y: whitened measurements.
        context, target, novel: disjoint rows, (batch, *grid).
        s: the noise level of each item.
        noise: n, of unit variance in each part of y.

    Raises:
        ValueError: there is no novel row, without which Ŝ is arbitrary where it is not
            measured.
    """
    family = prior.family
    if not novel.any():
        raise ValueError(
            "there are no novel rows: an exam needs more rows than context and target"
        )
    T, N = family.spread(target), family.spread(novel)
    u = torch.where(T, y + per_item(s, y) * noise, 0)
    losses = {}
    if isinstance(prior, NetworkForwardPrior):
        guess = prior.guess(y, context)
        losses["guess"] = _mean_square(prior.measure(guess) - y, T | N)
        S = prior.refined(guess, y, context, u, target, s)
    else:
        S = prior.signal(y, context, u, target, s)
    o = prior.measure(S)
    weight = ((1 + s**2) / s**2).sqrt()
    error = prior.corrected(o, u, s) - y
    losses["target"] = _mean_square(per_item(weight, y) * error, T)
    losses["novel"] = _mean_square(o - y, N)
    return losses


def _mean_square(error: Tensor, rows: Tensor) -> Tensor:
    numbers = rows.expand_as(error).sum() * (1 + error.is_complex())
    square = (error.conj() * error).real
    return torch.where(rows, square, 0).sum() / numbers.clamp_min(1)


@final
@dataclass(frozen=True, eq=False)
class Identifiability:
    """Whether measurements like these can tell what the signal is.

    Attributes:
        never: rows that no exam acquired, (n, grid's axes).
        unpaired: pairs of rows that no exam acquired together: of these two the
            dependence is guessed.
        fewest: of the pairs that some exam acquired together, how many did.
        null: directions, (n, *image), of G = E[A_Nᴴ A_N] with an eigenvalue below
            ``tol`` of the largest: nothing was ever measured of them. None where the
            image is too large for it.
    """

    never: Tensor
    unpaired: int
    fewest: int
    null: Tensor | None

    @property
    def warnings(self) -> list[str]:
        """What is wrong, a line for each; empty if nothing is."""
        said = []
        if len(self.never):
            said.append(
                f"{len(self.never)} rows were never acquired, such as "
                f"{self.never[0].tolist()}: what only they see is not learnt"
            )
        if self.unpaired:
            said.append(
                f"{self.unpaired} pairs of rows were never acquired together: how they "
                "depend on each other is not learnt"
            )
        if self.null is not None and len(self.null):
            said.append(
                f"{len(self.null)} directions of the signal are never measured: samples "
                "will be arbitrary there"
            )
        return said


def identifiability(
    family: Parametric,
    rows: Rows,
    *,
    kept: Bool[Tensor, "*grid"] | None = None,
    tol: float = 1e-6,
) -> Identifiability:
    """Count what exams acquired jointly, and seek directions that none can tell.

    Args:
        family: of the operators.
        rows: φ of each exam.
        kept: rows that are always context, and so are never tested as novel ones: where
            they were acquired they count for G all the same, as data that are kept.
        tol: the least eigenvalue of G over the largest.
    """
    family.check(rows)
    flat = rows.flatten(1).double()
    together = (flat.T @ flat).round().long()
    times = together.diagonal()
    acquired = times > 0
    pairs = together[acquired][:, acquired]
    upper = pairs[torch.ones_like(pairs).triu(1) > 0]
    never = (~acquired).reshape(family.grid).nonzero()
    frequency = times / len(flat)
    if kept is not None:
        frequency = torch.where(kept.flatten() & acquired, 1.0, frequency)
    null = None
    pixels = math.prod(family.image)
    if pixels <= DENSE:
        basis = torch.eye(pixels, device=rows.device).reshape(-1, *family.image)
        weight = family.spread(frequency.reshape(1, *family.grid)).float()
        G = family.full.adjoint(weight * family.full.apply(basis)).flatten(1).double()
        values, vectors = torch.linalg.eigh((G + G.T) / 2)
        weak = values <= tol * values[-1]
        null = vectors[:, weak].T.reshape(-1, *family.image).float()
    positive = upper[upper > 0]
    return Identifiability(
        never,
        int((upper == 0).sum()),
        int(positive.min()) if len(positive) else 0,
        null,
    )


def parts(y: Tensor) -> Tensor:
    """Complex numbers as real and imaginary part, in a last axis."""
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def whole(v: Tensor, like: Tensor) -> Tensor:
    """The inverse of `parts`, where ``like`` says what there was."""
    return torch.view_as_complex(v.contiguous()) if like.is_complex() else v
