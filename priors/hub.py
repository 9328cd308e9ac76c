"""Public checkpoints by name: where they are, whose they are, and how to fetch them.

They are kept in the folder ``priors`` of the user's cache: ``~/.cache/invsolve``
(``$XDG_CACHE_HOME/invsolve`` where that is set), or what ``INVSOLVE_CACHE`` names. Nothing
is ever downloaded but by `fetch`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

CHUNK = 2**16
"""Bytes that are written at once: what an interruption can lose."""


@final
@dataclass(frozen=True)
class File:
    """A file of a checkpoint.

    Args:
        name: under which it is kept.
        url: where it is.
        sha256: of its content, in hexadecimal; None where nobody published it.
    """

    name: str
    url: str
    sha256: str | None = None


@final
@dataclass(frozen=True)
class Entry:
    """A public checkpoint.

    Args:
        about: what its images are.
        licence: of the weights, in their authors' words.
        files: one checkpoint, or a folder's files.
        card: what its files do not say of it.
    """

    about: str
    licence: str
    files: tuple[File, ...]
    card: Mapping[str, Any] = field(default_factory=dict)


def _adm(
    file: str, about: str, sha256: str | None = None, classes: int | None = None
) -> Entry:
    url = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/{file}.pt"
    note = "" if classes is None else f"; needs a class_label of 0 … {classes - 1}"
    licence = "MIT (code); weights as guided-diffusion's model card allows: research"
    return Entry(about + note, licence, (File(f"{file}.pt", url, sha256),))


def _edm(file: str, about: str) -> Entry:
    url = f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{file}.pkl"
    return Entry(about, "CC BY-NC-SA 4.0", (File(f"{file}.pkl", url),))


def _google(name: str, about: str) -> Entry:
    url = f"https://huggingface.co/google/{name}/resolve/main/"
    names = ("config.json", "scheduler_config.json", "diffusion_pytorch_model.bin")
    files = tuple(File(file, url + file) for file in names)
    return Entry(about, "Apache-2.0", files)


# The one published sum is that of the file of 2,211,383,297 bytes; lists of Disco Diffusion
# give 983e3de6… for it, which is another model's.
IMAGENET_256 = "a37c32fffd316cd494cf3f35b339936debdc1576dad13fe57c42399a5dbc78b1"

NAMED: Mapping[str, Entry] = {
    "adm-imagenet-64": _adm("64x64_diffusion", "ImageNet 64²", classes=1000),
    "adm-imagenet-128": _adm("128x128_diffusion", "ImageNet 128²", classes=1000),
    "adm-imagenet-256": _adm("256x256_diffusion_uncond", "ImageNet 256²", IMAGENET_256),
    "adm-imagenet-256-classes": _adm(
        "256x256_diffusion", "ImageNet 256²", classes=1000
    ),
    "adm-imagenet-512": _adm("512x512_diffusion", "ImageNet 512²", classes=1000),
    "adm-lsun-bedroom": _adm("lsun_bedroom", "LSUN bedrooms 256²"),
    "adm-lsun-cat": _adm("lsun_cat", "LSUN cats 256²"),
    "adm-lsun-horse": _adm("lsun_horse", "LSUN horses 256²"),
    "edm-cifar10": _edm("edm-cifar10-32x32-uncond-vp", "CIFAR-10 32²"),
    "edm-ffhq-64": _edm("edm-ffhq-64x64-uncond-vp", "FFHQ faces 64²"),
    "edm-afhqv2-64": _edm("edm-afhqv2-64x64-uncond-vp", "AFHQv2 animal faces 64²"),
    "edm-imagenet-64": _edm("edm-imagenet-64x64-cond-adm", "ImageNet 64², by class"),
    "google/ddpm-cifar10-32": _google("ddpm-cifar10-32", "CIFAR-10 32²"),
    "google/ddpm-celebahq-256": _google("ddpm-celebahq-256", "CelebA-HQ faces 256²"),
    "google/ddpm-church-256": _google("ddpm-church-256", "LSUN churches 256²"),
    "google/ddpm-bedroom-256": _google("ddpm-bedroom-256", "LSUN bedrooms 256²"),
    "google/ddpm-cat-256": _google("ddpm-cat-256", "LSUN cats 256²"),
}


def folder() -> Path:
    """Where fetched checkpoints are kept.

    Raises:
        ValueError: the user wants nothing kept (``INVSOLVE_CACHE=""``).
    """
    named = os.environ.get("INVSOLVE_CACHE")
    if named == "":
        raise ValueError(
            'INVSOLVE_CACHE="" keeps nothing: name a folder in it, or unset it'
        )
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(named) if named else Path(base) / "invsolve") / "priors"


def fetched(name: str) -> Path:
    """Where a fetched checkpoint is: its file, or the folder of its files.

    Raises:
        ValueError: the name is unknown, or the checkpoint was not fetched.
    """
    entry = _entry(name)
    where = folder() / name
    if not all((where / file.name).is_file() for file in entry.files):
        raise ValueError(
            f"the prior {name!r} ({entry.about}; {entry.licence}) is not here yet: fetch "
            f"it by `invsolve priors fetch {name}`"
        )
    return where / entry.files[0].name if len(entry.files) == 1 else where


def fetch(name: str, *, progress: bool = True) -> Path:
    """A public checkpoint, downloaded unless it is here already.

    A download that was interrupted goes on where it ended. A file whose SHA-256 is known
    is believed only if it is right, and none appears under its name before it is whole.

    Args:
        name: one of `NAMED`.
        progress: whether to show a bar.

    Returns:
        Its file, or the folder of its files: what `invsolve.priors.load` takes.

    Raises:
        ValueError: the name is unknown, or a file is not the one it should be.
        OSError: the download failed; the next call goes on.
        ModuleNotFoundError: pooch is not installed.
    """
    pooch, requests = _import_pooch()
    pooch.get_logger().setLevel("WARNING")
    where = folder() / name
    for file in _entry(name).files:
        known = file.sha256 and f"sha256:{file.sha256}"
        try:
            pooch.retrieve(
                file.url,
                known,
                fname=file.name,
                path=where,
                downloader=lambda url, out, _, file=file: _download(
                    url, Path(out), where / f"{file.name}.part", progress
                ),
            )
        except requests.RequestException as error:
            raise OSError(
                f"cannot fetch {file.url}: {_why(error)}; run it again to go on"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{file.url} is not the file it should be (sha256): it was thrown away"
            ) from error
    return fetched(name)


def _download(url: str, out: Path, part: Path, progress: bool) -> None:
    """What is at a URL into a file, going on from the part that is there."""
    _, requests = _import_pooch()
    from tqdm import tqdm

    while True:
        before = part.stat().st_size if part.exists() else 0
        ask = {"Range": f"bytes={before}-"} if before else {}
        try:
            with requests.get(url, headers=ask, stream=True, timeout=30) as answer:
                if answer.status_code == 416:  # of another file, or of all of this one
                    part.unlink()
                    continue
                answer.raise_for_status()
                going_on = answer.status_code == 206
                size = int(answer.headers.get("Content-Length", 0)) or None
                start = before if going_on else 0
                with (
                    part.open("ab" if going_on else "wb") as stream,
                    tqdm(
                        desc=part.stem,
                        initial=start,
                        total=size and start + size,
                        unit="B",
                        unit_scale=True,
                        disable=not progress,
                        delay=1,
                    ) as bar,
                ):
                    for chunk in answer.iter_content(CHUNK):
                        stream.write(chunk)
                        bar.update(len(chunk))
        except requests.RequestException:
            # As long as something comes, what is left can be asked for.
            if part.exists() and part.stat().st_size > before:
                continue
            raise
        os.replace(part, out)
        return


def _why(error: Exception) -> str:
    answer = getattr(error, "response", None)
    if answer is not None:
        return f"the server says {answer.status_code} {answer.reason}"
    return type(error).__name__


def _entry(name: str) -> Entry:
    if name not in NAMED:
        raise ValueError(
            f"no checkpoint is named {name!r}: known are {', '.join(NAMED)}"
        )
    return NAMED[name]


def _import_pooch() -> tuple[Any, Any]:
    try:
        import pooch
        import requests
    except ImportError as error:
        raise ModuleNotFoundError(
            "fetching checkpoints needs pooch: pip install 'invsolve[hub]'"
        ) from error
    return pooch, requests
