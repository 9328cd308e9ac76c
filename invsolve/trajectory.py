"""What a sampler asked its prior on the way, seen from the prior's side."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from .priors import AffineMap, Prior
from .shapes import Sigma, X


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One pass of the network.

    Attributes:
        passes: how many there were before it.
        sigma: its noise level, in the prior's range; one for each image if they differ.
        x: (batch, channels, *space): what it was shown, x₀ + σn, in the image's unit.
        denoised: its answer D(x; σ), likewise.
    """

    passes: int
    sigma: Tensor
    x: Tensor
    denoised: Tensor


@final
@dataclass(eq=False)
class Recorder:
    """Keeps every so manieth pass of the first sample of each item, on the CPU.

    Args:
        every: 1 keeps all passes.
        map: from the prior's range to the image's unit.
    """

    every: int
    map: AffineMap
    chunks: list[list[Step]] = field(default_factory=list)
    images: int = 0
    passes: int = 0

    def begin(self, images: int) -> None:
        """A chunk begins, of whose images the first so many are to be kept."""
        self.chunks.append([])
        self.images, self.passes = images, 0

    def see(self, x: X, sigma: Sigma, denoised: X) -> None:
        """A pass of the network."""
        n = self.images
        if n and self.passes % self.every == 0:
            level = (sigma[:n] if sigma.ndim else sigma).detach().cpu()
            shown, answer = (self.map(v[:n].detach()).cpu() for v in (x, denoised))
            self.chunks[-1].append(Step(self.passes, level, shown, answer))
        self.passes += 1

    def steps(self) -> list[Step]:
        """The passes with the chunks' images side by side."""
        joined = []
        for steps in zip(*(c for c in self.chunks if c), strict=True):
            levels = [s.sigma for s in steps]
            joined.append(
                Step(
                    steps[0].passes,
                    torch.cat(levels) if levels[0].ndim else levels[0],
                    torch.cat([s.x for s in steps]),
                    torch.cat([s.denoised for s in steps]),
                )
            )
        return joined


@final
class RecordedPrior(Prior):
    """A prior of whose passes a recorder hears."""

    def __init__(self, inner: Prior, recorder: Recorder) -> None:
        self.inner, self.recorder = inner, recorder
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        out = self.inner.denoise(x, sigma)
        self.recorder.see(x, sigma, out)
        return out

    def check(self, shape: tuple[int, ...]) -> None:
        self.inner.check(shape)


Watch = Callable[[X, AffineMap], object]
"""Told each answer of the network, in the prior's range, and the map to the image's."""


@final
class WatchedPrior(Prior):
    """A prior each of whose answers is told."""

    def __init__(self, inner: Prior, watch: Watch, map: AffineMap) -> None:
        self.inner, self.watch, self.map = inner, watch, map
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        out = self.inner.denoise(x, sigma)
        self.watch(out.detach(), self.map)
        return out

    def check(self, shape: tuple[int, ...]) -> None:
        self.inner.check(shape)
