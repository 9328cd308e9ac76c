"""Whether measurements like these can tell what the signal is: asked before training.

The loss of novel rows sees G (Ŝ − E[S | ·]) alone, with G = E[A_Nᴴ A_N]: directions in
its null space are never tested, and a dependence between rows that no exam acquired
together is never learnt.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor

from .operators import LinearOperator
from .operators.parametric import Parametric, Rows

DENSE = 2048
"""Pixels up to which null directions are sought by a dense eigendecomposition."""


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
    if pixels <= DENSE and isinstance(family.full, LinearOperator):
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
