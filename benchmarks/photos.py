"""Photographs that no bundled prior was trained on: squares of scikit-image's own.

    python benchmarks/photos.py --out photos.png

draws them all. They come with scikit-image, so nothing is downloaded.
"""

import argparse
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

Split = Literal["tune", "test"]

FILES: dict[Split, tuple[str, ...]] = {
    "tune": ("brick.png", "grass.png", "gravel.png", "motorcycle_left.png"),
    "test": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"),
}
"""Of scikit-image's data folder. The first three have no colours."""


def photos(n: int, size: int = 64, split: Split = "test") -> Float[Tensor, "n 3 y x"]:
    """Squares of held-out photographs at half their resolution, red, green, blue in 0 … 1.

    Each photograph is averaged over 2×2 pixels and cut into squares that do not overlap,
    those of most contrast first; the photographs take turns. The first n are the same
    whatever n is.

    Args:
        n: how many.
        size: their side in pixels.
        split: ``tune`` for choosing settings, ``test`` for reporting.

    Raises:
        ValueError: there are fewer than n.
    """
    turns = zip_longest(*(_squares(name, size) for name in FILES[split]))
    squares = [square for square in chain(*turns) if square is not None]
    if not 1 <= n <= len(squares):
        raise ValueError(f"{split} has 1 to {len(squares)} squares of {size}, not {n}")
    return torch.stack(squares[:n])


def _squares(name: str, size: int) -> list[Tensor]:
    import skimage
    from skimage.io import imread

    array = imread(Path(skimage.__file__).parent / "data" / name)
    photo = torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)
    half = avg_pool2d(photo.expand(3, -1, -1)[None].float() / 255, 2)[0]
    tiles = half.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4)
    squares = tiles.flatten(0, 1)
    contrast = squares.flatten(1).std(1)
    return list(squares[contrast.argsort(descending=True, stable=True)])


def main() -> None:
    """Draw a sheet of both parts."""
    from skimage.io import imsave

    parser = argparse.ArgumentParser(description="The held-out photographs.")
    parser.add_argument("--out", type=Path, default=Path("photos.png"))
    args = parser.parse_args()
    squares = torch.cat([photos(8, split="tune"), photos(32)])
    framed = pad(squares, [2] * 4, value=1.0).unflatten(0, (-1, 8))
    sheet = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    imsave(args.out, (255 * sheet).round().byte().numpy())


if __name__ == "__main__":
    main()
