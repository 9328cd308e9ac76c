"""Which samples of k-space are measured: Cartesian patterns as masks.

Zero frequency is in the middle, and only ``generator`` decides. `Mask.cartesian` is the
pattern with a full centre and an exact number of other columns, uniform at random.
"""

from math import ceil

import numpy as np
import torch
from torch import Generator, Tensor

from .masking import Mask


def random_columns(
    shape: tuple[int, int],
    acceleration: float,
    centre: float = 0.08,
    *,
    generator: Generator,
) -> Mask:
    """A full centre, and every other column with the same probability.

    fastMRI's random masks: of w columns round(w·centre) are the centre, the others are
    kept with probability (w/acceleration − centre)/(w − centre), so that w/acceleration
    are measured on average.

    Args:
        shape: (h, w) of k-space.
        acceleration: how many times fewer columns than w, on average.
        centre: the fraction of columns in the centre; fastMRI has 0.08 at acceleration
            4 and 0.04 at 8.
        generator: of the choice.
    """
    h, w = shape
    columns = _centre((w,), acceleration, centre)
    middle = int(columns.sum())
    probability = (w / acceleration - middle) / max(w - middle, 1)
    chosen = torch.rand(w, generator=generator, dtype=torch.float64) < probability
    return Mask((columns | chosen).expand(h, w).clone())


def equispaced_columns(
    shape: tuple[int, int],
    acceleration: float,
    centre: float = 0.08,
    *,
    generator: Generator,
) -> Mask:
    """A full centre, and other columns at equal distances from a random first one.

    fastMRI's equispaced masks by fraction: the distance is a = acceleration·(w − c)/(w −
    c·acceleration), with c = round(w·centre), so that with the centre about
    w/acceleration columns are measured. It need not be whole: columns are rounded, and
    so their gaps differ by one.

    Args:
        shape: (h, w) of k-space.
        acceleration: how many times fewer columns than w.
        centre: the fraction of columns in the centre.
        generator: of the first column, between 0 and round(a) − 1.
    """
    h, w = shape
    columns = _centre((w,), acceleration, centre)
    middle = int(columns.sum())
    if w <= middle * acceleration:
        raise ValueError(
            f"acceleration {acceleration} leaves no column beside the centre's "
            f"{middle}: lower the acceleration or the centre"
        )
    distance = acceleration * (w - middle) / (w - middle * acceleration)
    first = int(torch.randint(round(distance), (1,), generator=generator))
    chosen = torch.arange(first, w - 1, distance, dtype=torch.float64).round().long()
    columns[chosen] = True
    return Mask(columns.expand(h, w).clone())


def gaussian_columns(
    shape: tuple[int, int],
    acceleration: float,
    centre: float = 0.08,
    *,
    width: float = 0.15,
    generator: Generator,
) -> Mask:
    """A full centre, and other columns denser towards it.

    Exactly round(w/acceleration) columns: one after another is drawn from those left,
    with probability ∝ exp(−k²/2s²), k its distance from the middle and s = width·w.

    Args:
        shape: (h, w) of k-space.
        acceleration: how many times fewer columns than w.
        centre: the fraction of columns in the centre.
        width: s over w.
        generator: of the choice.
    """
    h, w = shape
    columns = _centre((w,), acceleration, centre)
    return Mask(_draw(columns, acceleration, width, generator).expand(h, w).clone())


def gaussian_points(
    shape: tuple[int, int],
    acceleration: float,
    centre: float = 0.08,
    *,
    width: float = 0.15,
    generator: Generator,
) -> Mask:
    """A full centre block, and other single samples denser towards it.

    For volumes with two phase encodes, (h, w) being those. Exactly
    round(hw/acceleration) samples, drawn one after another from those left with
    probability ∝ exp(−k²/2s²), k the distance from the middle in units of the grid's
    sides and s = width.

    Args:
        shape: (h, w) of the phase encodes.
        acceleration: how many times fewer samples than hw.
        centre: the block's sides as fractions of h and w.
        width: s.
        generator: of the choice.
    """
    samples = _centre(shape, acceleration, centre)
    return Mask(_draw(samples, acceleration, width, generator))


def poisson_disc(
    shape: tuple[int, int],
    acceleration: float,
    centre: float = 0.08,
    *,
    growth: float = 2.0,
    generator: Generator,
) -> Mask:
    """A full centre block, and samples that keep their distance, denser towards it.

    Random darts, each kept unless it lies within the distance r of an earlier one
    (Cook 1986), until no more fit: r = r₀ (1 + growth·|k|), with |k| = 1 in the middle
    of k-space's edges and r₀ the largest that leaves room for all. Exactly
    round(hw/acceleration) samples. Whole samples would make rings of equal density, so
    that every r is varied at random by up to a fifth: two samples outside of the block
    are never nearer than 0.8 of the smaller of their r.

    Args:
        shape: (h, w) of the phase encodes.
        acceleration: how many times fewer samples than hw.
        centre: the block's sides as fractions of h and w.
        growth: of the distance towards the edge of k-space; 0 is the same everywhere.
        generator: of the darts.
    """
    if not growth >= 0:
        raise ValueError(f"the distance grows by growth ≥ 0, got {growth}")
    block = _centre(shape, acceleration, centre)
    wanted = round(block.numel() / acceleration) - int(block.sum())
    order = torch.randperm(block.numel(), generator=generator)
    order = order[~block.flatten()[order]]
    vary = 0.8 + 0.4 * torch.rand(shape, generator=generator, dtype=torch.float64)
    relative = vary * (1 + 2 * growth * _distance(shape))
    low, high, kept = 0.0, acceleration**0.5, order
    for _ in range(8):  # what fits grows as r₀ falls
        r0 = (low + high) / 2
        fitting = _darts(order, r0 * relative)
        if len(fitting) >= wanted:
            low, kept = r0, fitting
        else:
            high = r0
    surplus = torch.randperm(len(kept), generator=generator)
    block.view(-1)[kept[surplus[:wanted]]] = True
    return Mask(block)


def _centre(shape: tuple[int, ...], acceleration: float, centre: float) -> Tensor:
    """True in a block around zero frequency, of fraction ``centre`` along each axis."""
    if not acceleration >= 1 or not 0 <= centre <= 1:
        raise ValueError(
            f"acceleration is at least 1 and centre a fraction, got {acceleration} "
            f"and {centre}"
        )
    samples = torch.zeros(shape, dtype=torch.bool)
    block = samples
    for axis, n in enumerate(shape):
        middle = round(n * centre)
        block = block.narrow(axis, (n - middle + 1) // 2, middle)
    block.fill_(True)
    kept, middle = round(samples.numel() / acceleration), int(samples.sum())
    if not max(middle, 1) <= kept:
        raise ValueError(
            f"acceleration {acceleration} keeps {kept} of {samples.numel()}, but the "
            f"centre alone is {middle}: lower the acceleration or the centre"
        )
    return samples


def _distance(shape: tuple[int, ...]) -> Tensor:
    """|k| with every axis from −½ to ½."""
    axes = [(torch.arange(n).double() - n // 2) / n for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)


def _draw(
    centre: Tensor, acceleration: float, width: float, generator: Generator
) -> Tensor:
    """The centre and as many others as are wanted, denser near the middle."""
    if not width > 0:
        raise ValueError(f"the density's width must be > 0, got {width}")
    others = round(centre.numel() / acceleration) - int(centre.sum())
    log_weight = -0.5 * (_distance(tuple(centre.shape)) / width).square()
    # The largest of log-weights with Gumbel noise are such draws, one after another.
    uniform = torch.rand(centre.shape, generator=generator, dtype=torch.float64)
    order = log_weight - (-uniform.log()).log()
    order[centre] = -torch.inf
    samples = centre.clone()
    samples.view(-1)[order.flatten().topk(others).indices] = True
    return samples


def _darts(order: Tensor, radius: Tensor) -> Tensor:
    """Those of the samples, in this order, that no earlier one has within its radius."""
    h, w = radius.shape
    r = radius.flatten()[order].tolist()
    pad = ceil(max(r))
    hidden = np.zeros((h + 2 * pad, w + 2 * pad), dtype=bool)
    rows, columns = (order // w + pad).tolist(), (order % w + pad).tolist()
    discs: dict[int, np.ndarray] = {}
    kept = []
    for k, (i, j, r_k) in enumerate(zip(rows, columns, r, strict=True)):
        if hidden[i, j]:
            continue
        kept.append(k)
        n, size = ceil(r_k), ceil(r_k**2)  # squared distances are whole numbers
        if size not in discs:
            t = np.arange(-n, n + 1)
            discs[size] = t[:, None] ** 2 + t**2 < size
        hidden[i - n : i + n + 1, j - n : j + n + 1] |= discs[size]
    return order[kept]
