"""Point-spread functions: square kernels of odd size, centred, that sum to 1.

Lengths are in pixels. Angles are in radians from the x axis (to the right) towards the
y axis (up).
"""

from math import ceil, cos, isfinite, pi, sin

import torch
from jaxtyping import Float
from torch import Generator, Tensor

STEPS_PER_PIXEL = 32
"""Points a pixel along a path, and across a disk: quadrature errors below 10⁻³."""


def gaussian(
    width: float | tuple[float, float], angle: float = 0.0, *, size: int | None = None
) -> Float[Tensor, "n n"]:
    """k(r) ∝ exp(−½ rᵀ Σ⁻¹ r), Σ = R diag(w₁², w₂²) Rᵀ: atmosphere, or a soft lens.

    Args:
        width: w, the standard deviation; or (w₁, w₂) along the two axes.
        angle: of the first axis: R turns by it.
        size: of the kernel, odd; large enough for 4 standard deviations unless given.
    """
    w1, w2 = width if isinstance(width, tuple) else (width, width)
    for w in (w1, w2):
        check_positive(w, "a blur's width")
    size = 2 * int(4 * max(w1, w2) + 1) + 1 if size is None else size
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a kernel has a middle pixel if its size is odd, got {size}")
    x, y = _grid(size // 2)
    along = x * cos(angle) + y * sin(angle)
    across = y * cos(angle) - x * sin(angle)
    k = torch.exp(-((along / w1) ** 2 + (across / w2) ** 2) / 2)
    return (k / k.sum()).float()


def disk(radius: float) -> Float[Tensor, "n n"]:
    """k(r) ∝ the part of each pixel with |r| ≤ R: an aperture out of focus.

    The part is the mean over 32 × 32 points of the pixel, so that the rim is smooth.
    """
    check_positive(radius, "a disk's radius")
    half = max(ceil(radius - 0.5), 0)
    n, s = 2 * half + 1, STEPS_PER_PIXEL
    t = (torch.arange(n * s, dtype=torch.float64) + 0.5) / s - n / 2
    inside = t[:, None] ** 2 + t[None, :] ** 2 <= radius**2
    k = inside.double().reshape(n, s, n, s).mean((1, 3))
    return (k / k.sum()).float()


def line(length: float, angle: float) -> Float[Tensor, "n n"]:
    """k = ∫₀¹ δ(r − (t − ½) L u) dt with u = (cos φ, sin φ): a pan at constant speed.

    δ is spread over its four nearest pixels by bilinear weights.
    """
    check_positive(length, "a motion's length")
    theta = torch.full((_steps(length),), angle, dtype=torch.float64)
    return _splat(path(length, theta))


def motion(
    length: float, turn: float = 2.0, *, generator: Generator
) -> Float[Tensor, "n n"]:
    """k = ∫₀¹ δ(r − p(t) + p̄) dt: the shake of a hand, p a path of random direction.

    p(t) = L ∫₀ᵗ (cos θ, sin θ) ds with θ(t) = θ₀ + ω W(t): θ₀ is uniform, W Brownian.
    The mean of the path p̄ lies in the middle pixel, so that the image does not move.

    Args:
        length: L, of the path.
        turn: ω, the standard deviation of the direction at the end; 0 is a line.
        generator: of the path.
    """
    check_positive(length, "a motion's length")
    return _splat(path(length, headings(_steps(length), turn, generator)))


def headings(steps: int, turn: float, generator: Generator) -> Float[Tensor, " steps"]:
    """θ(t) = θ₀ + ω W(t) at equal steps: a direction that wanders."""
    start = 2 * pi * torch.rand(1, generator=generator, device=generator.device)
    by = torch.randn(steps - 1, generator=generator, device=generator.device)
    bend = turn * by.cumsum(0) / max(steps - 1, 1) ** 0.5
    return torch.cat([start, start + bend]).cpu()


def path(length: float, theta: Float[Tensor, " steps"]) -> Float[Tensor, "steps 2"]:
    """The midpoints (x, y) of equal steps in directions θ, about their mean."""
    step = length / len(theta) * torch.stack([theta.cos(), theta.sin()], 1).double()
    middle = step.cumsum(0) - step / 2
    return middle - middle.mean(0)


def _splat(points: Float[Tensor, "steps 2"]) -> Float[Tensor, "n n"]:
    half = int(points.abs().max()) + 1
    n = 2 * half + 1
    column, row = half + points[:, 0], half - points[:, 1]
    i, j = row.long(), column.long()
    down, right = row - i, column - j
    k = torch.zeros(n, n, dtype=torch.float64)
    for di, vertical in ((0, 1 - down), (1, down)):
        for dj, horizontal in ((0, 1 - right), (1, right)):
            k.index_put_((i + di, j + dj), vertical * horizontal, accumulate=True)
    return (k / k.sum()).float()


def _steps(length: float) -> int:
    return max(ceil(STEPS_PER_PIXEL * length), 2)


def _grid(half: int) -> tuple[Tensor, Tensor]:
    t = torch.arange(-half, half + 1, dtype=torch.float64)
    return t[None, :], -t[:, None]


def check_positive(value: float, what: str) -> None:
    """Refuse what is no length in pixels."""
    if not (value > 0 and isfinite(value)):
        raise ValueError(f"{what} must be > 0 pixels, got {value}")
