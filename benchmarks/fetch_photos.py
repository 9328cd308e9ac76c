"""The photographs that the natural-image prior is trained on, with their licences.

    python benchmarks/fetch_photos.py --out $INVSOLVE_DATA/photos

Nine photographs under CC0 and CC BY 4.0 from Debian's package of Lomiri's wallpapers,
whose copyright file names author and licence of each. They are scaled to at most 2000
pixels a side and written as PNG: eight for training, one for validation.
"""

import argparse
import csv
import io
import tarfile
import urllib.request
from hashlib import sha256
from pathlib import Path

import numpy as np

PACKAGE = (
    "http://deb.debian.org/debian/pool/main/l/lomiri-wallpapers/"
    "lomiri-wallpapers-16.04_20.04.0-2_all.deb"
)
SHA256 = "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab"
BY = "CC-BY-4.0"
PHOTOS = {
    "aitzgorri_by_Aitzol_Berasategi": ("Aitzol Berasategi", BY, "train"),
    "friends_by_Aitzol_Berasategi": ("Aitzol Berasategi", BY, "train"),
    "life_by_Aitzol_Berasategi": ("Aitzol Berasategi", BY, "train"),
    "picosdeeuropa_by_Aitzol_Berasategi": ("Aitzol Berasategi", BY, "val"),
    "sunset_by_Aitzol_Berasategi": ("Aitzol Berasategi", BY, "train"),
    "Picture_0B_by_freespace": ("Trevor Freespace", BY, "train"),
    "Picture_1A_by_freespace": ("Trevor Freespace", BY, "train"),
    "Wine_by_Jakkub_Mede": ("Jakub Mede", BY, "train"),
    "seeding_by_Clements_Engelhardt": ("Clemens Engelhardt", "CC0-1.0", "train"),
}
"""Author, licence and use of each."""

SIDE = 2000


def main() -> None:
    """Fetch the package, or take it from a file, and write what is free of it."""
    from skimage.io import imread, imsave
    from skimage.transform import rescale
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description="Photographs for training.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deb", type=Path, help="the package, if it is here already")
    args = parser.parse_args()
    if args.deb:
        package = args.deb.read_bytes()
    else:
        try:
            with urllib.request.urlopen(PACKAGE, timeout=60) as answer:
                package = answer.read()
        except OSError as error:
            raise SystemExit(
                f"cannot fetch {PACKAGE} ({error}): on Debian, apt-get download "
                "lomiri-wallpapers-16.04, and give the file as --deb"
            ) from error
    if sha256(package).hexdigest() != SHA256:
        raise SystemExit("the package is not the one whose licences were read")
    pictures = {}
    with tarfile.open(fileobj=io.BytesIO(data_of(package))) as archive:
        for member in archive:
            name = Path(member.name).stem
            file = archive.extractfile(member) if name in PHOTOS else None
            if file is not None:
                pictures[name] = file.read()
    rows = [("file", "author", "licence", "source")]
    for name, (author, licence, part) in tqdm(PHOTOS.items()):
        path = args.out / part / f"{name}.png"
        image = imread(io.BytesIO(pictures[name]))[..., :3] / 255
        scale = min(1.0, SIDE / max(image.shape[:2]))
        small = rescale(image, scale, anti_aliasing=True, channel_axis=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path, (255 * small).round().astype(np.uint8), check_contrast=False)
        rows.append((f"{part}/{path.name}", author, licence, PACKAGE))
    with (args.out / "LICENCES.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def data_of(package: bytes) -> bytes:
    """The data.tar of a Debian package, which is an ``ar`` archive of three files."""
    at = len(b"!<arch>\n")
    while at < len(package):
        header = package[at : at + 60]
        name, size = header[:16].decode().strip(), int(header[48:58])
        if name.startswith("data.tar"):
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise SystemExit("the package holds no data")


if __name__ == "__main__":
    main()
