"""Diffusion with forward models: signals learnt from their measurements alone.

Tewari, Yin, Cazenavette, Rezchikov, Tenenbaum, Durand, Freeman, Sitzmann, "Diffusion with
Forward Models: Solving Stochastic Inverse Problems Without Direct Supervision", NeurIPS
2023. An exam's rows are divided into context C, target T and novel rows N. Noise is added
to the target's data, u = y_T + s n; the network predicts the *signal*, Ŝ ≈ E[S | y_C, u],
and what is compared with data is A_T Ŝ and A_N Ŝ: no signal is ever seen.

Here measurements are whitened, frequency by frequency, and u = y_T + s n is the state
(the paper's is u/√(1+s²)). Other than the paper: the target's own noise is corrected for
(`corrected`), a layer of conjugate gradients fuses prediction and data
(`NetworkForwardPrior.fused`), and the deterministic context branch is a first guess of the
signal, not a rendering of it.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .bf16 import autocast
from .linalg import cg, largest_eigenvalue
from .operators import LinearOperator
from .operators.parametric import Parametric, Rows
from .priors import AffineMap, Prior, UNet, UNetConfig
from .priors.families import Family, register
from .priors.families.family import Card, State, filled
from .random import Randomness, randn_like
from .shapes import Sigma, X, per_item
from .variation import total_variation

NAME = "dfm"
VARIATION_STEPS = (30, 4)
"""Of total variation: near its minimum, at the price of a pass of a small network."""


class ForwardPrior(Prior):
    """p(S | y_C) through Ŝ = E[S | y_C, y_T + s n], for C and T of a family of operators.

    Attributes:
        family: the operators A_φ, of images in their own unit.
        sigma: σ_y, the noise of the measurements, in their unit.
        whitening: W of each turned measurement (`Parametric.turned`), after which a
            target is of the order 1 from what its context says of it.
        gain: an image in its own unit over the network's.
        target_rows: how many rows a target has.
        context_rows: the largest context that was trained with.
        blind: whether it was trained without context as well, as guidance needs it.
    """

    family: Parametric
    sigma: float
    whitening: Float[Tensor, "*measured"]
    gain: float
    target_rows: int
    context_rows: int
    blind: bool = True

    @abstractmethod
    def guess(self, y: Tensor, context: Rows) -> Tensor:
        """E[S | y_C].

        Args:
            y: whitened measurements, of which the context's rows are used.
            context: C, (batch, *grid); one row of it holds for all.
        """

    @abstractmethod
    def signal(
        self,
        y: Tensor,
        context: Rows,
        u: Tensor,
        target: Rows,
        s: Sigma,
        guess: Tensor,
    ) -> Tensor:
        """Ŝ = E[S | y_C, u], of u = y_T + s n.

        Args:
            y, context: as for ``guess``.
            u: the noisy target.
            target: T, as C.
            s: its noise level, in whitened units.
            guess: E[S | y_C].
        """

    @abstractmethod
    def residual(
        self, y: Tensor, rows: Rows, mean: Tensor, generator: Randomness
    ) -> Tensor:
        """A draw of N(0, Cov(S | y_rows)), as far as the prior knows it.

        Args:
            y, rows: as y and context of ``guess``.
            mean: E[S | y_rows].
            generator: of the draw.
        """

    def in_bf16(self) -> "ForwardPrior":
        """The same with its network in bfloat16, if it has one."""
        return self

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

    def whitened(self, y: Tensor) -> Tensor:
        """Measurements in their own unit, turned and times W."""
        return self.W * self.family.turned(y)

    def measure(self, x: Tensor) -> Tensor:
        """W A(gain x), turned."""
        return self.whitened(self.family.full.apply(self.gain * x))

    def adjoint(self, v: Tensor) -> Tensor:
        """The adjoint of ``measure``."""
        return self.gain * self.family.linear.adjoint(self.family.unturned(self.W * v))

    def variance(self) -> Tensor:
        """(σ_y W)², of every measurement."""
        return (self.sigma * self.W).square()

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
    def W(self) -> Tensor:
        """The whitening, beside a batch."""
        return self.whitening[None, None]


@final
class GaussianForwardPrior(ForwardPrior):
    """The exact Ŝ of S ~ N(m, Σ): what a network would be at best.

    Args:
        family: the operators.
        mean: m, an image.
        cov: Σ, of its pixels in order.
        sigma: σ_y.
        whitening: W; none unless given.
        target_rows: of a target.
    """

    def __init__(
        self,
        family: Parametric,
        mean: Float[Tensor, "*image"],
        cov: Float[Tensor, "d d"],
        *,
        sigma: float,
        whitening: Float[Tensor, "*measured"] | None = None,
        target_rows: int = 1,
    ) -> None:
        self.family, self.mean, self.cov, self.sigma = family, mean, cov, sigma
        ones = mean.new_ones(family.measured)
        self.whitening = ones if whitening is None else whitening
        self.gain, self.target_rows = 1.0, target_rows
        self.context_rows = math.prod(family.grid)
        self.sigma_min, self.sigma_max = 1e-3, 80.0
        basis = torch.eye(mean.numel()).to(mean).reshape(-1, *mean.shape)
        self.matrix = parts(self.measure(basis)).flatten(1).T
        self.inverse = torch.linalg.inv(cov)

    def guess(self, y: Tensor, context: Rows) -> Tensor:
        nothing, none = torch.zeros_like(y), torch.zeros_like(context)
        level = torch.ones((), dtype=self.mean.dtype)
        return self.signal(y, context, nothing, none, level, nothing)

    def signal(
        self,
        y: Tensor,
        context: Rows,
        u: Tensor,
        target: Rows,
        s: Sigma,
        guess: Tensor,
    ) -> Tensor:
        data = self.family.join(y, context, u)
        weight, information = self._information(y, context, target, s)
        r = weight * parts(data - self.measure(self.mean[None])).flatten(1)
        d = torch.linalg.solve(information, (r @ self.matrix)[..., None])[..., 0]
        return self.mean + d.reshape(len(y), *self.mean.shape)

    def residual(
        self, y: Tensor, rows: Rows, mean: Tensor, generator: Randomness
    ) -> Tensor:
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
"""(images, ¼ ln s) ↦ (the correction of the first of them, ln μ of each item)."""


@final
class NetworkForwardPrior(ForwardPrior):
    """Ŝ by a network between two solves with the operator.

    The first guess S_det is the network's of the context alone, beginning with least
    squares or total variation; the second is of S_det, of what the noisy target says
    beyond it, and of how well C and T see each pixel.

    Args:
        family: the operators.
        head: the network; images of 2c + 2 channels go in.
        sigma: σ_y.
        whitening: W.
        gain: an image in its own unit over the network's.
        target_rows, context_rows, blind: as trained.
        steps: of conjugate gradients.
        floor: the least noise, in whitened units, that a solve reckons with: few steps
            of conjugate gradients cannot tell less.
        variation: λ of the total variation that S_det begins with, in the network's
            unit; 0 for least squares.
        variation_steps: of total variation, and of conjugate gradients in each.
        nonnegative: whether that is at least 0.
    """

    def __init__(
        self,
        family: Parametric,
        head: Head,
        *,
        sigma: float,
        whitening: Float[Tensor, "*measured"],
        gain: float = 1.0,
        target_rows: int = 1,
        context_rows: int = 1,
        blind: bool = True,
        steps: int = 8,
        floor: float = 0.05,
        variation: float = 0.0,
        variation_steps: Sequence[int] = VARIATION_STEPS,
        nonnegative: bool = False,
    ) -> None:
        self.family, self.head, self.sigma = family, head, sigma
        self.whitening, self.gain = whitening, gain
        self.steps, self.floor = steps, floor
        self.variation, self.nonnegative = variation, nonnegative
        self.variation_steps = tuple(variation_steps)
        self.target_rows, self.context_rows = target_rows, context_rows
        self.blind = blind
        self.sigma_min, self.sigma_max = 0.01, 20.0
        metrics = (self.W**-2, torch.ones_like(self.W))
        self.ridges = [RIDGE * self._energy(metric) for metric in metrics]

    def _energy(self, metric: Tensor) -> float:
        """The largest eigenvalue of AᴴW metric W A."""
        like = torch.zeros(1, *self.family.image).to(self.whitening)
        start = randn_like(like, torch.Generator().manual_seed(0))

        def normal(x: Tensor) -> Tensor:
            return self.adjoint(metric * self.measure(x))

        return float(largest_eigenvalue(normal, start, max_steps=30, rtol=1e-2))

    def precision(self, context: Rows, target: Rows, s: Sigma) -> Tensor:
        return super().precision(context, target, s).clamp_max(self.floor**-2)

    def guess(self, y: Tensor, context: Rows) -> Tensor:
        """S_det, from the context alone."""
        x = self.first(y, context)
        unseen = torch.zeros_like(context)
        level = x.new_ones(len(x))
        rest = self.back(y, context) - x
        inputs = [x, rest, *self.coverages(context, unseen, x)]
        change, log_mu = self.head(torch.cat(inputs, 1), level)
        weight = self.precision(context, unseen, level)
        return self.fused(x + change, y, weight, log_mu.exp())

    def first(self, y: Tensor, context: Rows) -> Tensor:
        """What S_det begins with: no network has seen it."""
        if not self.variation:
            return self.back(y, context)
        weight = self.family.spread(context) / self.variance()
        steps, cg_steps = self.variation_steps
        return total_variation(
            lambda x: self.adjoint(weight * self.measure(x)),
            self.adjoint(weight * y),
            self.variation,
            steps=steps,
            cg_steps=cg_steps,
            nonnegative=self.nonnegative,
        )

    def signal(
        self,
        y: Tensor,
        context: Rows,
        u: Tensor,
        target: Rows,
        s: Sigma,
        guess: Tensor,
    ) -> Tensor:
        """Ŝ from S_det and the noisy target."""
        into = (1 + s**2).rsqrt()
        x = self.back_whitened(per_item(into, u) * (u - self.measure(guess)), target)
        inputs = [guess, x, *self.coverages(context, target, x)]
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
        """Measurements of some rows as an image: least squares, in their own unit."""
        return self._least_squares(v, rows, self.W**-2, self.ridges[0])

    def back_whitened(self, v: Tensor, rows: Rows) -> Tensor:
        """The same of whitened numbers that are alike in size, such as noise."""
        return self._least_squares(v, rows, torch.ones_like(self.W), self.ridges[1])

    def _least_squares(self, v: Tensor, rows: Rows, metric: Tensor, ridge: float) -> X:
        weight = self.family.spread(rows) * metric
        nothing = torch.zeros_like(self.adjoint(v))
        return self.fused(nothing, v, weight, torch.tensor(ridge).to(nothing))

    def in_bf16(self) -> "NetworkForwardPrior":
        return _in_bf16(self)

    def residual(
        self, y: Tensor, rows: Rows, mean: Tensor, generator: Randomness
    ) -> Tensor:
        """Of N(0, (AᴴwA + μ)⁻¹): as good as the network's μ is a precision."""
        none = torch.zeros_like(rows)
        weight = self.precision(rows, none, torch.ones(()))
        level = mean.new_full((len(mean),), math.log(self.sigma_min) / 4)
        inputs = [mean, torch.zeros_like(mean), *self.coverages(rows, none, mean)]
        mu = self.head(torch.cat(inputs, 1), level)[1].exp()
        n = whole(randn_like(parts(y), generator), y)
        prior = per_item(mu, mean).rsqrt() * randn_like(mean, generator)
        noise = torch.where(weight > 0, n / weight.clamp_min(1e-12).sqrt(), 0)
        return self.fused(prior, noise, weight, mu)

    def coverages(self, context: Rows, target: Rows, x: Tensor) -> list[Tensor]:
        seen = (self.family.coverage(context), self.family.coverage(target))
        return [c.to(x).expand(len(x), *c.shape[1:]) for c in seen]


@final
class RenderedForwardPrior(ForwardPrior):
    """Ŝ by a network alone, which is shown measurements as pictures: as published.

    For nonlinear operators whose measurements lie on the signal's own pixels, (1, rows,
    h, w). It knows no closing draw.

    Args:
        family: the operators.
        head: the network; of c channels of the signal and 4 pictures a row.
        sigma, whitening, gain, target_rows, context_rows, blind: as
            `NetworkForwardPrior`'s.
    """

    def __init__(
        self,
        family: Parametric,
        head: Head,
        *,
        sigma: float,
        whitening: Float[Tensor, "*measured"],
        gain: float = 1.0,
        target_rows: int = 1,
        context_rows: int = 1,
        blind: bool = True,
    ) -> None:
        self.family, self.head, self.sigma = family, head, sigma
        self.whitening, self.gain = whitening, gain
        self.target_rows, self.context_rows = target_rows, context_rows
        self.blind = blind
        self.sigma_min, self.sigma_max = 0.01, 20.0

    def guess(self, y: Tensor, context: Rows) -> Tensor:
        nothing = y.new_zeros(len(y), *self.family.image)
        unseen, level = torch.zeros_like(context), y.new_ones(len(y))
        return self._corrected(nothing, y, context, torch.zeros_like(y), unseen, level)

    def signal(
        self,
        y: Tensor,
        context: Rows,
        u: Tensor,
        target: Rows,
        s: Sigma,
        guess: Tensor,
    ) -> Tensor:
        into = per_item((1 + s**2).rsqrt(), u)
        rest = into * (u - self.measure(guess))
        return self._corrected(guess, y, context, rest, target, s.expand(len(y)).to(y))

    def _corrected(
        self, S: Tensor, y: Tensor, C: Rows, rest: Tensor, T: Rows, s: Tensor
    ) -> Tensor:
        shown = [torch.where(self.family.spread(C), y, 0), self._mask(C, y)]
        shown += [torch.where(self.family.spread(T), rest, 0), self._mask(T, y)]
        pictures = torch.cat([v[:, 0] for v in shown], 1)
        return S + self.head(torch.cat([S, pictures], 1), s.log() / 4)[0]

    def _mask(self, rows: Rows, y: Tensor) -> Tensor:
        return self.family.spread(rows).to(y).expand(y.shape)

    def in_bf16(self) -> "RenderedForwardPrior":
        return _in_bf16(self)

    def residual(
        self, y: Tensor, rows: Rows, mean: Tensor, generator: Randomness
    ) -> Tensor:
        raise ValueError("a nonlinear operator's prior knows no closing draw: use none")


P = TypeVar("P", "NetworkForwardPrior", RenderedForwardPrior)


def _in_bf16(prior: P) -> P:
    faster = copy.copy(prior)
    if isinstance(prior.head, UNetHead):
        faster.head = copy.copy(prior.head)
        faster.head.bf16 = True
    return faster


LearntPrior = NetworkForwardPrior | RenderedForwardPrior


def learnt(family: Parametric, head: Head, **more: Any) -> LearntPrior:
    """A network's prior of this family: fused with its data where they are linear."""
    linear = isinstance(family.full, LinearOperator)
    make = NetworkForwardPrior if linear else RenderedForwardPrior
    return make(family, head, **more)


RIDGE = 1e-3
"""Of least squares, over the largest eigenvalue."""


@final
class UNetHead(nn.Module):
    """The U-Net of the package as a `Head`, and ln μ = a + b · ¼ ln s.

    Args:
        config: of c channels, shown c + 2 others (``condition``).
        bf16: whether the U-Net runs in bfloat16.
        log_mu: a to begin with.
    """

    def __init__(
        self, config: UNetConfig, *, bf16: bool = False, log_mu: float = 4.0
    ) -> None:
        super().__init__()
        self.unet, self.bf16 = UNet(config), bf16
        self.log_mu = nn.Parameter(torch.tensor([log_mu, 0.0]))

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        first, rest = x.tensor_split([self.unet.config.channels], 1)
        with autocast(x.device, self.bf16):
            change = self.unet(first, level, condition=rest)
        return change.float(), self.log_mu[0] + self.log_mu[1] * level


# --- on disk

WORD = "rows."
"""What the names of a family's tensors begin with, among the weights."""


def stored(
    prior: LearntPrior, network: UNetConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and card, of which `load_state` makes the prior again."""
    assert isinstance(prior.head, UNetHead)
    words = prior.family.words
    tensors = {k: v for k, v in words.items() if isinstance(v, Tensor)}
    state = {k: v.half() for k, v in prior.head.state_dict().items()}
    state |= {"whitening": prior.whitening.float()}
    state |= {WORD + k: _real(v).float() for k, v in tensors.items()}
    card = {
        "family": NAME,
        "network": network.to_dict(),
        "rows": {k: v for k, v in words.items() if k not in tensors},
        "sigma": prior.sigma,
        "scale": prior.gain,
        "target_rows": prior.target_rows,
        "context_rows": prior.context_rows,
        "blind": prior.blind,
        **_begins(vars(prior)),
    }
    return {k: v.contiguous() for k, v in state.items()}, card


def load_state(state: State, card: Card) -> LearntPrior:
    """The prior of a card and its weights.

    Raises:
        ValueError: the card lacks something, or the weights are not of its network.
    """
    words = {
        k.removeprefix(WORD): v.float() for k, v in state.items() if k.startswith(WORD)
    }
    if "maps" in words:
        words["maps"] = torch.view_as_complex(words["maps"])
    weights = {k: v for k, v in state.items() if k.startswith(("unet.", "log_mu"))}
    try:
        network = UNetConfig.from_dict(card["network"])
        family = Parametric.from_words({**card["rows"], **words})
        head = filled(lambda: UNetHead(network), weights)
        assert isinstance(head, UNetHead)
        prior = learnt(
            family,
            head,
            sigma=float(card["sigma"]),
            whitening=state["whitening"].float(),
            gain=float(card["scale"]),
            target_rows=int(card["target_rows"]),
            context_rows=int(card["context_rows"]),
            blind=bool(card.get("blind", True)),
            **_begins(card),
        )
    except KeyError as error:
        raise ValueError(f"its card or its weights lack {error}") from error
    prior.decisions = [
        f"{family.words['rows']} of {tuple(family.image)}, noise of {prior.sigma:g} (card)"
    ]
    return prior


BEGINS = ("variation", "variation_steps", "nonnegative")
"""What a card tells of the total variation that a network begins with."""


def _begins(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a `NetworkForwardPrior` begins with, if it is not least squares."""
    if not told.get("variation"):
        return {}
    return {k: told[k] for k in BEGINS if k in told}


def _real(v: Tensor) -> Tensor:
    return torch.view_as_real(v) if v.is_complex() else v


def _sniff(state: State, card: Card) -> bool:
    wanted = ("whitening", "log_mu", "unet.unet.conv_in.weight")
    return card.get("family", NAME) == NAME and all(name in state for name in wanted)


register(Family(NAME, _sniff, load_state))


def parts(y: Tensor) -> Tensor:
    """Complex numbers as real and imaginary part, in a last axis."""
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def whole(v: Tensor, like: Tensor) -> Tensor:
    """The inverse of `parts`, where ``like`` says what there was."""
    return torch.view_as_complex(v.contiguous()) if like.is_complex() else v
