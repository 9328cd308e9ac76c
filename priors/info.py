"""What a prior is, for those who choose one and for those who only use it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, final

from torch import nn

if TYPE_CHECKING:
    from .base import Prior

Range = tuple[float, float]


@final
@dataclass(frozen=True)
class Info:
    """A prior's metadata; what is None or empty is not known.

    Attributes:
        family: of checkpoints, such as "adm"; empty where no file was read.
        parameterisation: what its network predicts: "eps", "v", "x0", "edm" (a mixture of
            noise and image), "flow" or "score".
        unit: of the image's values.
        range: the values that an image of the training data could take, in that unit.
        channels: how many an image has.
        spatial_dims: 2 for images, 3 for volumes.
        multiple_of: what each of an image's sizes must be divisible by.
        sigma_min, sigma_max: the noise levels where it is trusted, in that unit.
        conditioning: what its network is told besides the noise level.
        licence: of the weights.
    """

    family: str = ""
    parameterisation: str = ""
    unit: str = ""
    range: Range | None = None
    channels: int | None = None
    spatial_dims: int | None = None
    multiple_of: int = 1
    sigma_min: float | None = None
    sigma_max: float | None = None
    conditioning: str = ""
    licence: str = ""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Each fact and its value in words."""
        words = {
            "unit": self.unit or "none",
            "range": "unknown"
            if self.range is None
            else "{:g} … {:g}".format(*self.range),
            "size rule": f"each size divisible by {self.multiple_of}",
            "noise levels": f"{self.sigma_min:.4g} … {self.sigma_max:.4g}"
            if self.sigma_min is not None
            else "unknown",
            "conditioning": self.conditioning or "none",
        }
        told = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self)}
        for left_out in ("multiple of", "sigma min", "sigma max"):
            del told[left_out]
        for name, value in (told | words).items():
            yield name, "unknown" if value in (None, "") else str(value)


def describe(prior: "Prior") -> Info:
    """What is known of a prior: told by its files, or seen in its parts."""
    from .base import Affine

    if isinstance(prior, Affine):
        inner = describe(prior.inner)
        scale, offset = prior.map.scale, prior.map.offset
        mapped = inner.range and tuple(scale * u + offset for u in inner.range)
        info = replace(inner, range=mapped)
    else:
        net = vars(prior).get("net")
        info = Info(
            parameterisation=_parameterisation(prior),
            channels=vars(prior).get("channels"),
            spatial_dims=_spatial_dims(net),
            multiple_of=vars(prior).get("multiple_of", 1),
            conditioning=_conditioning(net),
        )
    levels = {"sigma_min": prior.sigma_min, "sigma_max": prior.sigma_max}
    return replace(info, **levels, **prior.told)


def tell(prior: "Prior", **facts: Any) -> None:
    """Add to a prior what its files say of it; None and the empty say nothing."""
    known: Mapping[str, Any] = {k: v for k, v in facts.items() if v not in (None, "")}
    prior.told = {**prior.told, **known}


def _parameterisation(prior: "Prior") -> str:
    kinds = {
        "EDMPrior": "edm",
        "FlowPrior": "flow",
        "VEPrior": "score",
        "VPPrior": "eps",
    }
    return vars(prior).get("predicts", kinds.get(type(prior).__name__, ""))


def _spatial_dims(net: Any) -> int | None:
    if not isinstance(net, nn.Module):
        return None
    # The dimensions of convolutions' kernels; a linear layer has none.
    return next((p.ndim - 2 for p in net.parameters() if p.ndim > 3), None)


def _conditioning(net: Any) -> str:
    if not isinstance(net, nn.Module):
        return ""
    from .networks.conditional import AtClass, InTheMiddle

    if isinstance(net, InTheMiddle):
        return "the slices around the middle one"
    held = next((m for m in net.modules() if isinstance(m, AtClass)), None)
    return "" if held is None else f"class {int(held.label)}"
