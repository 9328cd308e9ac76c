"""The authors' own code, run from their checkouts: none of it is kept here.

`checkout` imports from a folder and forgets it again, since all three repositories call
their packages ``utils`` or ``guided_diffusion``. What they import and never use here
(hydra, OpenCV, LPIPS) is stood in for where it is not installed, and ``.cuda()`` stays on
the CPU. Nothing of their arithmetic is changed.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock, patch

import torch
from torch import Generator, Tensor, nn

from invsolve.priors import Prior
from invsolve.shapes import Sigma, X, per_item

UNUSED = (
    "blobfile",
    "cv2",
    "gdown",
    "hdf5storage",
    "hydra",
    "hydra.core",
    "hydra.core.hydra_config",
    "hydra.utils",
    "lpips",
    "motionblur",
    "motionblur.motionblur",
    "mpi4py",
    "omegaconf",
)


@contextlib.contextmanager
def checkout(root: Path) -> Iterator[Callable[[str], ModuleType]]:
    """``load(name)`` of a module below ``root``, silently, until the context ends."""
    if not root.is_dir():
        raise SystemExit(f"no checkout at {root}: give the folder of a git clone")
    before = set(sys.modules)
    sys.path.insert(0, str(root))
    try:
        tops = {name.partition(".")[0] for name in UNUSED}
        absent = {top for top in tops if not importlib.util.find_spec(top)}
        for name in UNUSED:
            if name.partition(".")[0] in absent:
                sys.modules[name] = MagicMock(__name__=name)
        with (
            contextlib.redirect_stdout(io.StringIO()),
            patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        ):
            yield importlib.import_module
    finally:
        sys.path.remove(str(root))
        for name in set(sys.modules) - before:
            path = getattr(sys.modules[name], "__file__", None)
            stood_in = isinstance(sys.modules[name], MagicMock)
            if stood_in or str(path or "").startswith(str(root)):
                del sys.modules[name]


@contextlib.contextmanager
def noise(
    generator: Generator,
    used: Callable[[int], bool] = lambda k: True,
    scale: Callable[[int], float] = lambda k: 1.0,
) -> Iterator[None]:
    """``torch.randn_like`` from our stream: the same numbers in the same order.

    Args:
        generator: the stream.
        used: whether the k-th draw has a counterpart in our sampler; one that has none
            comes from a stream of its own, so that it shows if it matters after all.
        scale: by which the k-th draw is multiplied.
    """
    calls, other = iter(range(10**9)), Generator().manual_seed(12345)

    def randn_like(like: Tensor, **_: object) -> Tensor:
        k = next(calls)
        g = generator if used(k) else other
        return scale(k) * torch.randn(like.shape, dtype=like.dtype, generator=g)

    with patch.object(torch, "randn_like", randn_like):
        yield


class EpsNet(nn.Module):
    """A prior as the network n̂(x_t, t) that the authors' code calls.

    n̂ = (x − D(x; σ_t))/σ_t with x = x_t/√ᾱ_t and σ_t = √(1/ᾱ_t − 1).

    Args:
        prior: what denoises.
        alphas_cumprod: ᾱ_t, as the authors' code has them.
    """

    def __init__(self, prior: Prior, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.prior, self.alphas_cumprod = prior, alphas_cumprod.double()

    def forward(self, x_t: Tensor, t: Tensor, *_: object, **__: object) -> Tensor:
        abar = self.alphas_cumprod[t.long()]
        a = per_item(abar.sqrt().to(x_t), x_t)
        sigma = (1 / abar - 1).sqrt().to(x_t)
        x = x_t / a
        return (x - self.prior.denoise(x, sigma)) / per_item(sigma, x)

    def load_state_dict(self, *_: object, **__: object) -> None:  # pyright: ignore
        """There are no weights to load."""


class PerChannel(Prior):
    """A prior of one channel for images of several, which it takes for a batch."""

    def __init__(self, inner: Prior) -> None:
        self.inner = inner
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        channels = x.shape[1]
        levels = sigma if sigma.ndim == 0 else sigma.repeat_interleave(channels)
        out = self.inner.denoise(x.flatten(0, 1)[:, None], levels)
        return out.reshape(x.shape)


class Clipped(Prior):
    """A prior whose images are clipped to [−1, 1], as much of the authors' code does."""

    def __init__(self, inner: Prior) -> None:
        self.inner = inner
        self.sigma_min, self.sigma_max = inner.sigma_min, inner.sigma_max

    def denoise(self, x: X, sigma: Sigma) -> X:
        return self.inner.denoise(x, sigma).clamp(-1, 1)
