"""Priors on disk: a card (JSON) that says what the weights do not, and the weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from . import hub
from .base import Affine, AffineMap, Prior
from .families import REGISTERED, Family, hugging_face, monai, own
from .families.configs import joined, read_json
from .info import tell
from .parameterisation import SigmaData
from .reading import read_checkpoint
from .unet import UNetConfig

BUNDLED = Path(__file__).parent / "bundled"
FAMILY = own.NAME
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".pkl", ".bin")
CENTRED = ("adm", "edm", "score-sde")
"""Families whose networks see images in [−1, 1]."""


def available() -> list[str]:
    """The names of the bundled priors."""
    return sorted(card.stem for card in BUNDLED.glob("*.json"))


def card_of(
    name: str,
    network: UNetConfig,
    *,
    sigma_data: SigmaData,
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


@final
@dataclass(frozen=True)
class _Source:
    """What is to be loaded: the card, where it or its folder lies, and the weights."""

    card: dict[str, Any]
    path: Path
    weights: Path


def read_card(
    name_or_path: str | Path, card: Mapping[str, Any] | str | Path | None = None
) -> tuple[dict[str, Any], Path]:
    """All that is said of a prior, and the file or folder that says it.

    Args:
        name_or_path: a name or a path, as `load` takes it.
        card: what goes over it.
    """
    source = _find(name_or_path, card)
    return source.card, source.path


def load(
    name_or_path: str | Path, card: Mapping[str, Any] | str | Path | None = None
) -> Prior:
    """A trained prior, by its name or by the path of its file or folder.

    The family is known by the names of the weights, the moving average is taken where
    there is one, the architecture is inferred from the tensors' shapes or read from
    the configuration beside them, and ``prior.decisions`` tells all that was decided.
    Nothing in the files is executed.

    Args:
        name_or_path: a bundled name; a fetched one (`invsolve.priors.hub`); a card
            (.json) with its weights beside it; a checkpoint (safetensors, torch's
            .pt/.pth/.ckpt/.bin, EDM's .pkl), with or without a card of its name beside it;
            a folder of diffusers, or a MONAI bundle.
        card: what overrides the files: ``family``, ``network``, ``scale``, ``offset``,
            ``unit``, ``licence`` and what the family's loader names. A mapping, or the path
            of a JSON file.

    Raises:
        ValueError: the name is unknown; or a file is missing, damaged, asks for code, or is
            of another kind than it says.
        ModuleNotFoundError: the family needs a library that is not installed.
    """
    source = _find(name_or_path, card)
    said, file = source.card, source.weights
    if hugging_face.is_latent(file):
        return _latent(source)
    if not file.is_file():
        raise ValueError(f"the prior's weights are missing: there is no {file}")
    try:
        if "sha256" in said and sha256(file) != said["sha256"]:
            raise ValueError("the weights are not those the card describes (sha256)")
        state, facts = read_checkpoint(file)
        card = joined(facts, said)
        family = _family(state, card)
        prior = family.load(state, card)
    except ModuleNotFoundError:
        raise
    # A damaged card can make its family's loader raise anything at all.
    except Exception as error:
        reason = str(error).removeprefix(f"cannot read the checkpoint {file}: ")
        first_line = (reason.strip() or type(error).__name__).split("\n")[0]
        what = said.get("name", source.path.stem)
        raise ValueError(f"cannot load the prior {what}: {first_line}") from error
    if family.name in CENTRED:
        tell(_innermost(prior), range=(-1.0, 1.0))
    words = {k: str(said.get(k) or "") for k in ("unit", "licence")}
    tell(prior, family=family.name, **words)
    took = f"{family.name}, by {'its card' if 'family' in said else 'its weights'}"
    prior.decisions = [took, f"took {facts['took']}", *prior.decisions]
    return prior


def _latent(source: _Source) -> Prior:
    """diffusers' latent models, which their own folders say all of."""
    from .latent import load_latent

    words = {k: str(said) for k, said in source.card.items() if k != "name"}
    if unknown := sorted(words.keys() - {"unit", "licence"}):
        raise ValueError(
            f"the card of a latent model's folder gives unit and licence, not "
            f"{unknown[0]!r}: invsolve.priors.latent.load_latent takes prompts and tiles"
        )
    prior = load_latent(source.path)
    tell(prior, **words)
    return prior


def _find(
    name_or_path: str | Path, given: Mapping[str, Any] | str | Path | None
) -> _Source:
    over = (
        read_json(Path(given)) if isinstance(given, str | Path) else dict(given or {})
    )
    path = Path(name_or_path)
    if (BUNDLED / f"{name_or_path}.json").is_file():
        path = BUNDLED / f"{name_or_path}.json"
    elif str(name_or_path) in hub.NAMED and not path.exists():
        path = hub.fetched(str(name_or_path))
        over = joined(hub.NAMED[str(name_or_path)].card, over)
    if found := _foreign(path):
        weights, card = found
        return _Source({"name": path.stem, **joined(card, over)}, path, weights)
    if path.is_dir():
        cards = sorted(path.glob("*.json"))
        if len(cards) != 1:
            raise ValueError(
                f"{path} holds {len(cards)} cards (*.json): name the one to load"
            )
        path = cards[0]
    if path.is_file() and path.suffix != ".json":
        beside = path.with_suffix(".json")
        card = _read_card_file(beside) if beside.is_file() else {}
        where = beside if beside.is_file() else path
        return _Source({"name": path.stem, **joined(card, over)}, where, path)
    if not path.is_file():
        names = ", ".join(available()) or "none"
        raise ValueError(
            f"unknown prior {str(name_or_path)!r}: give a bundled name ({names}) or "
            "the path of a card (.json), a checkpoint or a folder"
        )
    card = {"name": path.stem, **joined(_read_card_file(path), over)}
    beside = (path.with_suffix(s) for s in SUFFIXES)
    return _Source(
        card,
        path,
        next((p for p in beside if p.is_file()), path.with_suffix(SUFFIXES[0])),
    )


def _foreign(path: Path) -> tuple[Path, dict[str, Any]] | None:
    if not path.exists() or path.suffix == ".json":
        return None
    if hugging_face.is_latent(path):
        return path, {}
    try:
        return hugging_face.find(path) or monai.find(path)
    except ValueError as error:
        raise ValueError(f"cannot load the prior {path.stem}: {error}") from error


def _read_card_file(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        why = str(error).removeprefix(f"cannot read the configuration {path}: ")
        raise ValueError(f"cannot read the prior's card {path}: {why}") from error


def _family(state: Mapping[str, Tensor], card: Mapping[str, Any]) -> Family:
    from . import latent  # which imports the families

    families = (*REGISTERED, latent.FAMILY)
    known = [family.name for family in families]
    if "family" in card and card["family"] not in known:
        raise ValueError(
            f"its family {card['family']!r} is unknown: known are {', '.join(known)}"
        )
    for family in families:
        if family.sniff(state, card):
            return family
    names = ", ".join(str(name)[:60] for name in list(state)[:3])
    raise ValueError(
        f"its weights are of no known family (looked for {', '.join(known)}): they begin "
        f"with {names}"
        if "family" not in card
        else f"its weights are not {card['family']}'s: they begin with {names}"
    )


def _innermost(prior: Prior) -> Prior:
    return _innermost(prior.inner) if isinstance(prior, Affine) else prior


def sha256(file: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
