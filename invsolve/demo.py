"""The main job on real data: low-dose, sparse-view CT by six methods."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Generator, Tensor

from . import io, samplers
from .operators import ParallelBeam, TransmissionNoise
from .priors import Equivariant, Prior
from .problem import InverseProblem
from .report import Result, told
from .samplers.reddiff import PRESETS
from .simulate import measure
from .solve import Solution, solve
from .units import MU_WATER, hu_to_mu

PRIOR = "ct-headneck-128"
SLICES = "ct-headneck-val.nii.gz"
PROVENANCE = {
    "source": "OpenKBP grand challenge, validation part: patients that the bundled "
    "prior was not trained on",
    "data's licence": "MIT",
    "data's citation": "Babier et al., OpenKBP: The open-access knowledge-based "
    "planning grand challenge and dataset, Medical Physics 48 (2021)",
}
"""Where the bundled slices are from."""
VIEWS = 30
COUNTS = 2e4
"""Photons through air for an element of 4 mm: for each mm of detector about what
LoDoPaB-CT (Leuschner et al. 2021) has, 4,096 for one of 0.72 mm."""
FLOOR = 0.01
"""What the projector itself is wrong by; see `TransmissionNoise`."""
OVERSAMPLE = 2
"""Pixels are the means of what lies in them, not points; see `ParallelBeam`."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[Iterable], Iterable]]]
"""(what, images) ↦ a context in which a sampler's loop can be wrapped."""


@final
@dataclass(frozen=True)
class Method:
    """A sampler with the options that suit it.

    Args:
        name: as the report calls it.
        sampler: one of `invsolve.samplers`.
        options: the sampler's.
        samples: how many for each slice.
    """

    name: str
    sampler: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))


TV: Mapping[str, Any] = {"lam": 2.8 / MU_WATER, "steps": 200, "nonnegative": True}

PNP: Mapping[str, Any] = {
    "method": "admm",
    "steps": 20,
    "sigma_range": (0.03, 0.1),
    "lam": 0.8,
    "cg_steps": 15,
}
FROM_TV = partial(samplers.tv, **TV)

METHODS = (
    Method("FBP", samplers.fbp, {"window": "shepp-logan"}),
    Method("TV", samplers.tv, TV),
    Method("PnP from TV", samplers.pnp, {**PNP, "init": FROM_TV}),
    Method("RED-diff", samplers.reddiff, PRESETS["ct"]),
    Method(
        "mean of both",
        samplers.ensemble,
        {
            "methods": (
                partial(samplers.pnp, **PNP),
                partial(samplers.reddiff, **PRESETS["ct"]),
            ),
            "init": FROM_TV,
        },
    ),
    Method(
        "DDS",
        samplers.dds,
        {"steps": 20, "sigma_range": (0.03, 2.0), "lam": 0.3, "cg_steps": 20},
        samples=4,
    ),
)
"""What the demo compares, and how CT is solved unless told otherwise.

Tuned at 5,000 and 20,000 photons together, by ``benchmarks/tune_ct.py``'s grids, on
patients whom the README's table leaves out.
"""


def quick() -> tuple[Method, ...]:
    """The same methods with a third of the steps and two samples: to see it work."""
    return tuple(
        Method(m.name, m.sampler, _fewer(m.options), min(2, m.samples)) for m in METHODS
    )


def _fewer(options: Mapping[str, Any]) -> dict[str, Any]:
    """A third of the steps, of methods within and before a method, too."""

    def less(key: str, value: Any) -> Any:
        if isinstance(value, partial):
            return partial(value.func, **_fewer(value.keywords))
        if key == "methods":
            return tuple(less("", method) for method in value)
        return max(1, value // 3) if key == "steps" else value

    return {key: less(key, value) for key, value in options.items()}


def bundled(name: str) -> Path:
    """A file of the bundled data, in a checkout or in an installed package."""
    package = Path(__file__).parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"the bundled file {name} is missing: install the package again, or run from a "
        "checkout with its data folder"
    )


def needs_prior(sampler: Callable[..., Tensor]) -> bool:
    """Whether a sampler asks for a prior: its parameter then has no default."""
    import inspect

    prior = inspect.signature(sampler).parameters.get("prior")
    return prior is not None and prior.default is inspect.Parameter.empty


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """What the demo found.

    Attributes:
        truth: the slices that were measured, in HU.
        results: one for each method.
        problem: what was solved.
    """

    truth: Tensor
    results: list[Result]
    problem: InverseProblem


def compare(
    image: io.Image,
    prior: Prior,
    *,
    methods: Iterable[Method] = METHODS,
    views: int = VIEWS,
    counts: float = COUNTS,
    oversample: int = OVERSAMPLE,
    equivariant: bool = True,
    generator: Generator,
    device: torch.device,
    bar: Bar = lambda what, images: nullcontext(iter),
) -> Comparison:
    """Measure slices of an image (see `invsolve.simulate`), and solve by each method.

    Args:
        image: slices in HU, with square pixels.
        prior: of attenuation in 1/mm.
        methods: what to compare.
        views: evenly over 180°.
        counts: photons that reach a detector element through air.
        oversample: what the operator that is solved with takes pixels for; see
            `ParallelBeam`. What is measured does not depend on it.
        equivariant: take mirror images and shifts of what the prior knows for as likely
            (`priors.Equivariant`).
        generator: of the measurements' noise and of the samplers.
        device: where to compute.
        bar: makes a progress bar for each method.
    """
    x = hu_to_mu(image.values[:, None])
    h, w = x.shape[-2:]
    A = ParallelBeam(
        (h, w), even_angles(views), square_pixel(image), oversample=oversample
    )
    noise = TransmissionNoise(counts, FLOOR)
    y = measure(x, A, noise, generator=generator)
    problem = InverseProblem(y, A, noise)
    asked = Equivariant(prior) if equivariant else prior
    # Less than vacuum, as some scanners mark what they did not see, is vacuum here.
    truth = image.values.clamp_min(-1000)
    results: list[Result] = []
    solved: list[tuple[Method, Solution]] = []
    for method in methods:
        options = dict(method.options)
        first = _begun(options.get("init"), solved)
        if first is not None:
            options["init"] = first.mean
        with bar(method.name, method.samples * len(x)) as progress:
            solution = solve(
                problem,
                asked if needs_prior(method.sampler) else None,
                method.sampler,
                samples=method.samples,
                generator=generator,
                device=device,
                progress=progress,
                **options,
            )
        if first is not None:
            solution = replace(solution, stats=solution.stats + first.stats)
        solved.append((method, solution))
        results.append(
            Result.of(method.name, solution, "1/mm", truth, told(method.options))
        )
    return Comparison(truth, results, problem)


def _begun(init: object, solved: Iterable[tuple[Method, Solution]]) -> Solution | None:
    """What a method begins with, where another one has made it already."""
    if not isinstance(init, partial):
        return None
    for method, solution in solved:
        if (method.sampler, dict(method.options)) == (init.func, init.keywords):
            return solution
    return None


def even_angles(views: int) -> Tensor:
    """Angles of so many views evenly over 180°, in radians."""
    return torch.linspace(0, torch.pi, views + 1)[:-1]


def square_pixel(image: io.Image) -> float:
    """A pixel's side in mm, rounded to a nanometre; refused where it is not square."""
    _, y, x = image.spacing
    if abs(x - y) > 1e-3 * max(x, y):
        raise ValueError(
            f"pixels are {x:.4g}×{y:.4g} mm, but must be square: resample the image, "
            "or give --pixel-mm"
        )
    return round((x + y) / 2, 6)
