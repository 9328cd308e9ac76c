"""invsolve's own U-Net under EDM's preconditioning, said in full by its card."""

from torch import nn

from ..base import Prior
from ..networks.conditional import AtClass, InTheMiddle
from ..parameterisation import EDMPrior
from ..unet import Guided, UNet, UNetConfig, laid_out
from .family import Card, Family, State, filled, finished, sigma_data_of

NAME = "edm-unet"


def sniff(state: State, card: Card) -> bool:
    """Whether these are the weights of invsolve's own U-Net."""
    # Of images and of volumes.
    firsts = ("unet.conv_in.weight", "unet.conv_in.conv.weight")
    return card.get("family", NAME) == NAME and any(name in state for name in firsts)


def load(state: State, card: Card) -> Prior:
    """The prior of a network that `invsolve train` made; the card must say all of it.

    The user's card may give ``class_label``, a number or one of its ``classes``, and
    ``guidance``, the weight of it, where the network was told of classes.

    Raises:
        ValueError: the card lacks something, or the weights are not what it says.
    """
    try:
        config = UNetConfig.from_dict(card["network"])
        sigma_data = sigma_data_of(card)
        levels = [float(card[k]) for k in ("sigma_min", "sigma_max")]
        _ = card["scale"], card["offset"]
    except KeyError as error:
        raise ValueError(f"its card lacks {error}") from error
    net = laid_out(filled(lambda: UNet(config), state))
    channels = config.channels + config.condition
    widths = ", ".join(map(str, config.widths))
    decisions = [
        f"U-Net: widths {widths}; {config.layers} block(s) a level (card)",
        f"images of {channels} channel(s), sizes divisible by {config.multiple_of}",
    ]
    if config.condition:
        net = InTheMiddle(net)
        decisions.append(
            f"of which it denoises the middle one, shown {config.condition}"
        )
    if config.positions:
        decisions.append("it is told where each pixel lies; what it denoises is whole")
    if config.classes:
        net, said = _told(net, config.classes, card)
        decisions.append(said)
    prior = EDMPrior(
        net,
        sigma_data,
        *levels,
        predicts=card.get("predicts", "edm"),
        multiple_of=config.multiple_of,
        channels=channels,
    )
    return finished(prior, card, decisions)


def _told(net: nn.Module, classes: int, card: Card) -> tuple[nn.Module, str]:
    names = card.get("classes", [])
    label = card.get("class_label")
    if label is None:
        return net, f"none of its {classes} classes (give the card a class_label)"
    number = names.index(label) if label in names else label
    if type(number) is not int or not 0 <= number < classes:
        raise ValueError(
            f"its class_label is {label!r}: give a number of 0 … {classes - 1}"
            + (f" or one of {', '.join(names)}" if names else "")
        )
    weight = float(card.get("guidance", 1))
    net = AtClass(net, number) if weight == 1 else Guided(net, number, weight)
    return net, f"class {label}, guidance {weight:g} (card)"


FAMILY = Family(NAME, sniff, load)
