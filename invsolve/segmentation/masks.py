"""Masks given scans, as a prior: every solver and sampler of the package draws them.

Dong & Gong, "Head and neck tumor segmentation from PET/CT images based on a 3D diffusion
model", Physics in Medicine & Biology 2024, have a network see CT, PET and a noisy mask,
and DDIM draw the mask. Here the network's last step is Bayes' rule for the voxel itself,
which no network need learn; that is not of the paper, nor is any number of its recipe.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import final

import torch
from torch import Tensor

from invsolve.priors import Prior
from invsolve.shapes import Sigma, X, per_item

RARE = -4.0
"""The logit of a mask before anything is learnt: most voxels are outside."""

Network = Callable[..., Tensor]
Box = tuple[slice, ...]


@final
class MaskPrior(Prior):
    """p(m | images), m = ±1 for each label and voxel: D = tanh(m_σ/σ² + F/2).

    F is the network's logit of m = 1 given the images and the noisy mask around. Were it
    to know nothing of the voxel's own m_σ = m + σn, whose likelihood has the logit
    2m_σ/σ², D would be E[m | m_σ, images] by Bayes' rule; so at low noise F has nothing
    left to do. σ is of m = ±1.

    A volume larger than a window is denoised in overlapping ones at every level, and D is
    their mean, weighted by a Gaussian (MultiDiffusion's). Windows share noise and mask
    where they overlap, so that they agree more often than they would if each were drawn
    alone; nothing forces those far apart to.

    Labels of which a voxel has at most one are *exclusive*: then F_k is the logit of k
    against none of them, by Bayes' rule 2m_σ,k/σ² is still what the voxel's own value
    adds to it, and D_k = 2 softmax(0, 2m_σ/σ² + F)_k − 1. Of one label both are the same.

    Args:
        net: F + 4 at (c_in m_σ, ¼ ln σ, condition=images), c_in = 1/√(1 + σ²).
        images: what is known, (channels, *space).
        sigma_min, sigma_max: the levels it was trained on.
        multiple_of: what the network needs a side to be divisible by; the volume is
            padded.
        window: the longest side that the network sees at once; all of it unless given.
        outside: the values of the images beyond their borders, one a channel.
        exclusive: whether the labels are.
    """

    def __init__(
        self,
        net: Network,
        images: Tensor,
        *,
        sigma_min: float,
        sigma_max: float,
        multiple_of: int = 1,
        window: int | None = None,
        outside: Sequence[float] = (),
        exclusive: bool = False,
    ) -> None:
        if window is not None and window % multiple_of:
            raise ValueError(
                f"a window's side must be divisible by {multiple_of}, got {window}"
            )
        self.net, self.images = net, images
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.multiple_of, self.window = multiple_of, window
        self.outside = tuple(outside) or (0.0,) * len(images)
        self.exclusive = exclusive

    def denoise(self, x: X, sigma: Sigma) -> X:
        sigma = per_item(sigma, x)
        boxes = list(windows(x.shape[2:], self.window, self.multiple_of))
        if len(boxes) == 1:
            return self._through(x, sigma, boxes[0])
        total, weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        for box in boxes:
            seen = tuple(
                slice(b.start, min(b.stop, n))
                for b, n in zip(box, x.shape[2:], strict=True)
            )
            w = bell([b.stop - b.start for b in seen]).to(x)
            total[:, :, *seen] += w * self._through(x, sigma, box)
            weight[:, :, *seen] += w
        return total / weight

    def logits(self, x: X, sigma: Sigma) -> X:
        """The logits in a volume of one window: 2m_σ/σ² + F."""
        return shown_logits(self.net, x, per_item(sigma, x), self.images[None])

    def _through(self, x: Tensor, sigma: Tensor, box: Box) -> Tensor:
        """D in a window, which may reach beyond the volume's end."""
        inner = x[:, :, *box]
        sides = [b.stop - b.start for b in box]
        images = torch.stack(
            [
                grown(image[box], sides, value)
                for image, value in zip(self.images, self.outside, strict=True)
            ]
        )
        # Beyond the border the mask is known to be −1: that is what is seen there.
        noisy = grown(inner, sides, -1.0)
        logits = shown_logits(self.net, noisy, sigma, images[None])
        kept = tuple(slice(0, n) for n in inner.shape[2:])
        logits = logits[:, :, *kept]
        return 2 * shares(logits) - 1 if self.exclusive else torch.tanh(logits / 2)

    def check(self, shape: tuple[int, ...]) -> None:
        if shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"the mask is of {tuple(shape[1:])} voxels, the images it is given "
                f"are of {tuple(self.images.shape[1:])}: bring them to one grid"
            )


def shown_logits(net: Network, x: Tensor, sigma: Tensor, images: Tensor) -> Tensor:
    """2m_σ/σ² + F, F = net(c_in m_σ, ¼ ln σ, images) − 4, σ shaped as m_σ broadcasts."""
    c_noise = (sigma.log() / 4).flatten().expand(len(x))
    images = images.expand(len(x), *images.shape[1:])
    F = net(x / (1 + sigma**2).sqrt(), c_noise, condition=images)
    return 2 * x / sigma**2 + F.float() + RARE


def shares(logits: Tensor) -> Tensor:
    """P of each of the labels that exclude one another; none of them has the logit 0."""
    return with_none(logits).softmax(1)[:, 1:]


def with_none(logits: Tensor) -> Tensor:
    """(batch, 1 + labels, *space): the logit of no label before the others."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)


def windows(
    space: Sequence[int], window: int | None, multiple_of: int
) -> Iterator[Box]:
    """Boxes that cover a volume, each overlapping the next by a quarter or more.

    A side longer than the window is covered by windows spread evenly; one that is not is
    covered by one box, as long as it must be to be divisible by ``multiple_of``.
    """
    axes = []
    for n in space:
        if window is None or n <= window:
            axes.append([slice(0, -(-n // multiple_of) * multiple_of)])
            continue
        count = 1 + -(-(n - window) * 4 // (3 * window))
        starts = [round(k * (n - window) / (count - 1)) for k in range(count)]
        axes.append([slice(s, s + window) for s in starts])
    yield from product(*axes)


def bell(sides: Sequence[int]) -> Tensor:
    """A Gaussian with a deviation of a quarter of each side: what a window weighs."""
    w = torch.ones(())
    for n in sides:
        t = (torch.arange(n) - (n - 1) / 2) / (n / 4)
        w = w[..., None] * torch.exp(-t.square() / 2)
    return w


def grown(x: Tensor, sides: Sequence[int], value: float) -> Tensor:
    """x with its last axes padded at their ends to the given sides."""
    room: list[int] = []
    for n, side in zip(reversed(x.shape[-len(sides) :]), reversed(sides), strict=True):
        room += [0, side - n]
    return torch.nn.functional.pad(x, room, value=value) if any(room) else x
