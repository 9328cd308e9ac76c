"""Priors on disk: a card (JSON) that says everything, and weights (safetensors)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .base import Affine, AffineMap, Prior
from .parameterisation import EDMPrior
from .unet import UNet, UNetConfig

BUNDLED = Path(__file__).parent / "bundled"
FAMILY = "edm-unet"


def available() -> list[str]:
    """The names of the bundled priors."""
    return sorted(card.stem for card in BUNDLED.glob("*.json"))


def card_of(
    name: str,
    network: UNetConfig,
    *,
    sigma_data: float,
    map: AffineMap,
    unit: str,
    training: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """The card of an EDM U-Net: all that `load` needs, and all that a user asks."""
    return {
        "name": name,
        "family": FAMILY,
        "network": network.to_dict(),
        "sigma_data": sigma_data,
        "sigma_min": 0.002,
        "sigma_max": 20.0,
        "scale": map.scale,
        "offset": map.offset,
        "unit": unit,
        "training": training,
        **more,
    }


def read_card(name_or_path: str | Path) -> tuple[dict[str, Any], Path]:
    """A prior's card and where it lies, by a bundled name, a file or a folder."""
    path = Path(name_or_path)
    if (BUNDLED / f"{name_or_path}.json").is_file():
        path = BUNDLED / f"{name_or_path}.json"
    elif path.is_dir():
        cards = sorted(path.glob("*.json"))
        if len(cards) != 1:
            raise ValueError(
                f"{path} holds {len(cards)} cards (*.json): name the one to load"
            )
        path = cards[0]
    elif path.suffix == ".safetensors":
        path = path.with_suffix(".json")
    if not path.is_file():
        names = ", ".join(available()) or "none"
        raise ValueError(
            f"unknown prior {str(name_or_path)!r}: give a bundled name ({names}) or "
            "the path of a card (.json) with its weights beside it"
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(card, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"cannot read the prior's card {path}: {error}") from error
    return card, path


def load(name_or_path: str | Path) -> Prior:
    """A trained prior, by its bundled name or by the path of its card or folder.

    Nothing in the files is executed: the card is JSON, the weights are safetensors.

    Raises:
        ValueError: the name is unknown, or a file is missing, damaged, or of another
            kind than it says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card, path = read_card(name_or_path)
    file = path.with_suffix(".safetensors")
    if not file.is_file():
        raise ValueError(f"the prior's weights are missing: there is no {file}")
    try:
        if card["family"] != FAMILY:
            raise ValueError(f"its family {card['family']!r} is not {FAMILY!r}")
        config = UNetConfig.from_dict(card["network"])
        if "sha256" in card and sha256(file) != card["sha256"]:
            raise ValueError("the weights are not those the card describes (sha256)")
        state = {k: v.float() for k, v in load_file(file).items()}
        if not all(v.isfinite().all() for v in state.values()):
            raise ValueError("some weights are not finite")
        net = UNet(config)
        net.load_state_dict(state)
        inner = EDMPrior(
            net.eval().requires_grad_(False),
            float(card["sigma_data"]),
            float(card["sigma_min"]),
            float(card["sigma_max"]),
            multiple_of=config.multiple_of,
            channels=config.channels,
        )
        return Affine(inner, AffineMap(float(card["scale"]), float(card["offset"])))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"its card lacks {error}" if isinstance(error, KeyError) else error
        first_line = str(reason).strip().split("\n")[0]
        raise ValueError(f"cannot load the prior {path.stem}: {first_line}") from error


def sha256(file: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
