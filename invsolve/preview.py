"""How far a solve has come: a picture that is made again while it runs."""

import math
import time
from io import BytesIO
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from .io import Unit, replace
from .planes import planes_figure
from .priors import AffineMap
from .report import SOFT_TISSUE
from .shapes import X
from .units import hu_to_mu


@final
class Preview:
    """Writes the network's last answer as a PNG, at most every so many seconds.

    For ``solve(…, watch=Preview("now.png"))``. D(x; σ) is the clean image that the solve
    is at: blurred while σ is large, and nearly the result at its end. Shown is the first
    of those in work, of a volume the planes through its middle.

    Args:
        path: of the PNG, which is always whole.
        unit: of the image; attenuation is shown as HU are.
        window: what is black and what is white, of CT in HU; soft tissue for CT, 0 to 1
            for colours, and for others the first answer's spread, unless given.
        spacing: millimetres from voxel to voxel along (z, y, x), of a volume.
        every: how many seconds.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        unit: Unit = "",
        window: tuple[float, float] | None = None,
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        every: float = 10.0,
    ) -> None:
        self.path, self.unit, self.spacing = Path(path), unit, spacing
        self.window, self.every, self.last = window, every, -math.inf

    def __call__(self, answer: X, map: AffineMap) -> None:
        """An answer in the prior's range, and the way to the image's unit."""
        if time.monotonic() >= self.last + self.every:
            self.show(answer, map)
            self.last = time.monotonic()

    def show(self, answer: X, map: AffineMap) -> None:
        """The same at once, say of a solution when it is there."""
        image = answer[0].detach()
        if self.window is None:
            self.window = self._chosen(image, map)
        limits = torch.tensor(self.window)
        limits = hu_to_mu(limits) if self.unit == "1/mm" else limits
        # Two numbers go into the prior's range, rather than a volume out of it.
        low, high = map.inverse(limits).tolist()
        if image.ndim == 4:
            png = planes_figure({"": image[0]}, self.spacing, (low, high))
        else:
            png = _picture((image - low) / (high - low))
        replace(self.path, lambda partial: Path(partial).write_bytes(png), ".png")

    def _chosen(self, image: Tensor, map: AffineMap) -> tuple[float, float]:
        if self.unit in ("1/mm", "HU"):
            return SOFT_TISSUE
        if image.ndim == 3 and len(image) == 3:
            return 0.0, 1.0
        some = image[0] if image.ndim == 3 else image[0, image.shape[1] // 2]
        values = map(some).float().flatten()
        low, high = values.quantile(torch.tensor([0.005, 0.995]).to(values)).tolist()
        return low, max(high, low + 1e-6)


def _picture(image: Tensor) -> bytes:
    """One slice, or three colours, from 0 to 1, as PNG."""
    from PIL import Image

    grey = (255 * image.float().clamp(0, 1)).round().to(torch.uint8).cpu()
    shown = grey.movedim(0, -1) if len(grey) == 3 else grey[0]
    file = BytesIO()
    Image.fromarray(shown.numpy()).save(file, "PNG")
    return file.getvalue()
