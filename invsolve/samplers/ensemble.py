"""The mean of several methods' images.

Krogh, Vedelsby, "Neural Network Ensembles, Cross Validation, and Active Learning", NeurIPS
1994: what averaging gains is how far its members are apart.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..priors import Prior
from ..problem import InverseProblem
from ..random import Randomness
from ..shapes import X
from .core import Init, Progress, gives
from .pnp import pnp
from .reddiff import reddiff

Member = Callable[..., X]
"""A sampler with its settings, ``partial(pnp, steps=20)``."""


@gives("point_estimate")
def ensemble(
    problem: InverseProblem,
    prior: Prior,
    *,
    methods: Sequence[Member] = (pnp, reddiff),
    init: Init | None = None,
    generator: Randomness,
    progress: Progress = iter,
) -> X:
    """x̂ = 1/K Σₖ x̂ₖ, the mean of K methods' images.

        ‖x̂ − x‖² = 1/K Σₖ ‖x̂ₖ − x‖² − 1/K Σₖ ‖x̂ₖ − x̂‖²

    Its error is theirs on the average less their scatter. Methods that err in different
    ways, such as a descent from total variation's image and RED-diff's stochastic one,
    gain the most by it; it costs what they cost together.

    Args:
        problem: any that all members take.
        prior: what they share.
        methods: K of them, each called with ``(problem, prior, generator=…)``; what they
            are set to is in the prior's range, as a sampler's own options are.
        init: where those begin that take an ``init`` and do not name one themselves.
        generator: of all members, one after another.
        progress: wraps each member's loop in turn.

    Raises:
        ValueError: there are no methods.
    """
    if not methods:
        raise ValueError("an ensemble needs methods: give one or more")
    images = []
    for method in methods:
        more = {} if init is None or _begins(method) else {"init": init}
        images.append(
            method(problem, prior, generator=generator, progress=progress, **more)
        )
    return torch.stack(images).mean(0)


def _begins(method: Member) -> bool:
    """Whether a member says itself where it begins, or begins nowhere."""
    fixed = False
    while isinstance(method, partial):
        fixed = fixed or "init" in method.keywords
        method = method.func
    return fixed or "init" not in method.__annotations__
