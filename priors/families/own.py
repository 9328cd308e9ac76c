"""invsolve's own U-Net under EDM's preconditioning, said in full by its card."""

import torch

from ..base import Prior
from ..parameterisation import EDMPrior
from ..unet import UNet, UNetConfig
from .family import Card, Family, State, filled, finished

NAME = "edm-unet"


def sniff(state: State, card: Card) -> bool:
    """Whether these are the weights of invsolve's own U-Net."""
    return card.get("family", NAME) == NAME and "unet.conv_in.weight" in state


def load(state: State, card: Card) -> Prior:
    """The prior of a network that `invsolve train` made; the card must say all of it.

    Raises:
        ValueError: the card lacks something, or the weights are not what it says.
    """
    try:
        config = UNetConfig.from_dict(card["network"])
        levels = [float(card[k]) for k in ("sigma_data", "sigma_min", "sigma_max")]
        _ = card["scale"], card["offset"]
    except KeyError as error:
        raise ValueError(f"its card lacks {error}") from error
    net = filled(lambda: UNet(config), state).to(memory_format=torch.channels_last)
    widths = ", ".join(map(str, config.widths))
    decisions = [
        f"U-Net: widths {widths}; {config.layers} block(s) a level (card)",
        f"images of {config.channels} channel(s), sizes divisible by {config.multiple_of}",
    ]
    prior = EDMPrior(
        net,
        *levels,
        predicts=card.get("predicts", "edm"),
        multiple_of=config.multiple_of,
        channels=config.channels,
    )
    return finished(prior, card, decisions)


FAMILY = Family(NAME, sniff, load)
