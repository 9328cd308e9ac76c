"""Stacks of slices whose prior is known exactly, and solves of them that are cut."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from invsolve import InverseProblem
from invsolve.operators import GaussianNoise, ParallelBeam
from invsolve.priors import GaussianPrior, Slices, StationaryPrior

SIDE, DEPTH = 32, 16


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def stack(h: int, w: int) -> Slices:
    """A prior of volumes whose slices (1, h, w) are Gaussian and correlated within."""
    factor = torch.randn(h * w, 3, generator=seeded(5), dtype=torch.float64) / 2
    cov = torch.eye(h * w).double() / 2 + factor @ factor.T
    return Slices(GaussianPrior(torch.zeros(1, h, w).double(), cov, 0.01, 20.0), 0, 4)


def cut_after(steps: int) -> Callable[[Iterable], Iterator]:
    """A progress bar that fails after so many steps of the whole run."""
    seen = 0

    def progress(loop: Iterable) -> Iterator:
        nonlocal seen
        for item in loop:
            if seen == steps:
                raise InterruptedError
            seen += 1
            yield item

    return progress


def roughness(x: Tensor) -> float:
    return float(x.diff(dim=2).abs().mean())


@dataclass(frozen=True)
class Toy:
    """A Gaussian field, correlated along z, and the exact prior of its slices."""

    truth: Tensor
    prior: Slices
    problem: InverseProblem

    @classmethod
    def make(cls) -> "Toy":
        f = torch.fft.fftfreq(SIDE)
        power = (1 + 400 * (f[:, None] ** 2 + f**2)) ** -1.5
        power = 0.04 * power / power.mean()
        z = torch.arange(DEPTH).float()
        along = torch.exp(-0.5 * ((z[:, None] - z) / 4) ** 2) + 1e-4 * torch.eye(DEPTH)
        white = torch.randn(DEPTH, SIDE, SIDE, generator=seeded(2))
        alike = torch.einsum("ij,jhw->ihw", torch.linalg.cholesky(along), white)
        truth = torch.fft.ifft2(torch.fft.fft2(alike) * power.sqrt()).real[None, None]
        A = ParallelBeam((SIDE, SIDE), torch.linspace(0, torch.pi, 9)[:-1])
        y = A(truth)
        inner = StationaryPrior(torch.zeros(1, SIDE, SIDE), power, 0.01, 100.0)
        noise = GaussianNoise(1e-3 * float(y.max()))
        return cls(truth, Slices(inner), InverseProblem(y, A, noise))

    def psnr(self, x: Tensor) -> float:
        span = self.truth.max() - self.truth.min()
        return float(10 * (span**2 / (x - self.truth).square().mean()).log10())
