"""The operators of the docs: one row each, with an image it measures and a picture."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import pi
from pathlib import Path
from typing import Literal, final

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from invsolve import io, operators as ops, units
from invsolve.operators import Operator, coils, kernels, nufft

Group = Literal["ct", "mri", "imaging", "nonlinear"]
CT_SLICES = Path(__file__).parent.parent / "data" / "ct-headneck-val.nii.gz"
MARGIN = 20
"""Pixels of air that are cut off around the slices."""
FIELD_MM = (128 - 2 * MARGIN) * 3.906
"""The side of what is left."""


@final
@dataclass(frozen=True)
class Row:
    """An operator of the table.

    Attributes:
        group: the sheet it is shown on.
        name: the code that names it.
        equation: what it does.
        backends: what computes it, and where.
        make: the operator of n × n images.
        image: an n × n image (of a batch of one) that it measures.
        show: the measurements as a picture of grey or RGB.
        caption: what the picture shows.
    """

    group: Group
    name: str
    equation: str
    backends: str
    make: Callable[[int], Operator]
    image: Callable[[int], Tensor]
    show: Callable[[Operator, Tensor], Tensor]
    caption: str


def seeded() -> Generator:
    """One and the same randomness for each row."""
    return Generator().manual_seed(0)


@cache
def heads() -> Tensor:
    """Four slices of heads and necks, as attenuation in 1/mm."""
    inside = slice(MARGIN, -MARGIN)
    return units.hu_to_mu(io.read(CT_SLICES).values)[None, :, inside, inside]


def ct_slice(n: int) -> Tensor:
    """The CT slice with the largest body, (1, 1, n, n), in 1/mm."""
    largest = int((heads() > 0.5 * units.MU_WATER).sum((-2, -1)).argmax())
    return resized(heads()[:, largest : largest + 1], n)


def ct_volume(n: int) -> Tensor:
    """The slices and what lies linearly between them, (1, 1, n/16, n, n)."""
    size = (max(n // 16, 2), n, n)
    return interpolate(heads()[None], size=size, mode="trilinear", align_corners=True)


def complex_slice(n: int) -> Tensor:
    """The CT slice as a complex image of unit range, with a phase that varies slowly."""
    x = ct_slice(n)
    phase = torch.linspace(-1, 1, n)[:, None] + torch.linspace(0, 1, n)
    return torch.polar(x / x.max(), phase.expand_as(x).contiguous())


@cache
def photograph(name: str) -> Tensor:
    """One of the photographs that come with scikit-image, in [−1, 1]."""
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, name)().copy()).float()
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return (pixels.permute(2, 0, 1) / 127.5 - 1)[None]


def grey(n: int) -> Tensor:
    """(1, 1, n, n)."""
    return resized(photograph("camera"), n)


def colour(n: int) -> Tensor:
    """(1, 3, n, n)."""
    return resized(photograph("astronaut"), n)


def resized(x: Tensor, n: int) -> Tensor:
    """x at n × n pixels."""
    return interpolate(x, size=(n, n), mode="bilinear", antialias=True)


def as_it_is(A: Operator, y: Tensor) -> Tensor:
    """The measurements of one channel, or of three as colours from [−1, 1]."""
    return (y[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) if len(y[0]) == 3 else y[0, 0]


def logarithm(A: Operator, y: Tensor) -> Tensor:
    """log(1 + |y|), scaled, of the first channel."""
    return (1e3 * y[0, 0].abs() / y.abs().max()).log1p()


def four(A: Operator, y: Tensor) -> Tensor:
    """|y| of the first four coils, as a square."""
    a, b, c, d = y[0, :4].abs()
    return torch.cat([torch.cat([a, b], 1), torch.cat([c, d], 1)], 0)


def four_logarithms(A: Operator, y: Tensor) -> Tensor:
    """log(1 + |y|) of the first four coils, or codes, as a square."""
    return four(A, (1e3 * y.abs() / y.abs().max()).log1p())


def views(A: Operator, y: Tensor) -> Tensor:
    """Four of a cone beam's projections, the middle of each, one below the other."""
    projections = y[0, 0]
    step, quarter = len(projections) // 4, projections.shape[-1] // 4
    return projections[: 4 * step : step, :, quarter:-quarter].flatten(0, 1)


def first_guess(A: Operator, y: Tensor) -> Tensor:
    """|Aᴴy|: what the measurements say without more ado."""
    assert isinstance(A, ops.LinearOperator)
    return A.adjoint(y).abs()[0, 0]


def halves(A: Operator, y: Tensor) -> Tensor:
    """The left of a Stack's first part, and the right of its second one."""
    assert isinstance(A, ops.Stack)
    first, second = (part[0, 0] for part in A.split(y))
    second = interpolate(second[None, None], size=tuple(first.shape))[0, 0]
    middle = first.shape[1] // 2
    return torch.cat([first[:, :middle], second[:, middle:]], 1)


def angles(count: int, arc: float) -> Tensor:
    """So many from 0 up to the arc, without its end."""
    return torch.linspace(0, arc, count + 1)[:-1]


def fan(n: int, curved: bool) -> Operator:
    """A fan beam of 180 views, as a clinical scanner has it."""
    return ops.FanBeam(
        (n, n), angles(180, 2 * pi), 600.0, 1100.0, pixel_mm=FIELD_MM / n, curved=curved
    )


def cone(n: int, pitch: float) -> Operator:
    """A cone beam around a stack of slices: a turn, or two of a helix."""
    turns = 2 if pitch else 1
    return ops.ConeBeam(
        (max(n // 16, 2), n, n),
        angles(32 * turns, 2 * pi * turns) - pi * turns * bool(pitch),
        600.0,
        1100.0,
        voxel_mm=FIELD_MM / n,
        pitch_mm=pitch,
    )


def sampling(n: int) -> ops.Mask:
    """A quarter of k-space's columns."""
    return ops.Mask.cartesian((n, n), 4, generator=seeded())


def network() -> torch.nn.Module:
    """Two layers of fixed random convolutions: a stand-in for a learned simulator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 5, padding=2, padding_mode="circular"),
            torch.nn.Tanh(),
            torch.nn.Conv2d(8, 1, 5, padding=2, padding_mode="circular"),
        )


ANY = "torch, CPU and CUDA"
RAYS = "sparse matrix (CPU, CUDA), matrix-free (CPU), ASTRA (CPU, CUDA)"
CONES = "sparse matrix (CPU, CUDA), matrix-free (CPU), ASTRA (CUDA)"
NUFFT = "FINUFFT (CPU), cuFINUFFT (CUDA)"

ROWS = [
    Row(
        "ct",
        "ParallelBeam",
        "y(θ, s) = ∫ x dl along x cos θ + y sin θ = s",
        RAYS,
        lambda n: ops.ParallelBeam((n, n), angles(180, pi), pixel_mm=FIELD_MM / n),
        ct_slice,
        as_it_is,
        "180 views over 180°",
    ),
    Row(
        "ct",
        "FanBeam",
        "y(θ, s) = ∫ x dl from one source, flat detector",
        RAYS,
        lambda n: fan(n, curved=False),
        ct_slice,
        as_it_is,
        "180 views over 360°",
    ),
    Row(
        "ct",
        "FanBeam(curved=True)",
        "y(θ, γ) = ∫ x dl from one source, equiangular",
        "sparse matrix (CPU, CUDA), matrix-free (CPU)",
        lambda n: fan(n, curved=True),
        ct_slice,
        as_it_is,
        "180 views over 360°",
    ),
    Row(
        "ct",
        "ConeBeam",
        "y(θ, v, s) = ∫ x dl from one source, through a volume",
        CONES,
        lambda n: cone(n, 0.0),
        ct_volume,
        views,
        "4 of 32 projections",
    ),
    Row(
        "ct",
        "ConeBeam(pitch_mm=…)",
        "the same on a helix: source at z = pitch · θ/2π",
        CONES,
        lambda n: cone(n, 20.0),
        ct_volume,
        views,
        "4 of 64 projections, 2 turns",
    ),
    Row(
        "mri",
        "Fourier",
        "y = F x, orthonormal, zero frequency in the middle",
        ANY,
        lambda n: ops.Fourier(),
        complex_slice,
        logarithm,
        "log |k-space|",
    ),
    Row(
        "mri",
        "Mask.cartesian @ Fourier",
        "y = m ⊙ F x, one coil",
        ANY,
        lambda n: sampling(n) @ ops.Fourier(),
        complex_slice,
        logarithm,
        "4-fold, log |k-space|",
    ),
    Row(
        "mri",
        "Coils",
        "y_c = S_c ⊙ x",
        ANY,
        lambda n: ops.Coils(coils.simulated_maps(8, (n, n))),
        complex_slice,
        four,
        "4 of 8 coils",
    ),
    Row(
        "mri",
        "MultiCoil",
        "y_c = m ⊙ F (S_c ⊙ x): SENSE",
        ANY,
        lambda n: ops.MultiCoil(coils.simulated_maps(8, (n, n)), sampling(n).mask),
        complex_slice,
        four_logarithms,
        "4 of 8 coils, log |k-space|",
    ),
    Row(
        "mri",
        "NonCartesian(radial)",
        "y_j = (hw)^−½ Σₙ xₙ exp(−i k_j·n)",
        NUFFT,
        lambda n: ops.NonCartesian((n, n), nufft.radial(n // 4, 2 * n)),
        complex_slice,
        first_guess,
        "|Aᴴy| of 32 spokes",
    ),
    Row(
        "mri",
        "NonCartesian(spiral)",
        "the same along spirals",
        NUFFT,
        lambda n: ops.NonCartesian((n, n), nufft.spiral(8, 2 * n, n / 32)),
        complex_slice,
        first_guess,
        "|Aᴴy| of 8 interleaves",
    ),
    Row(
        "imaging",
        "Mask.random",
        "y = m ⊙ x",
        ANY,
        lambda n: ops.Mask.random((n, n), 0.3, generator=seeded()),
        colour,
        as_it_is,
        "30 % of the pixels",
    ),
    Row(
        "imaging",
        "Mask.box",
        "y = m ⊙ x, a rectangle hidden",
        ANY,
        lambda n: ops.Mask.box((n, n), (n // 2, n // 2)),
        colour,
        as_it_is,
        "the middle quarter hidden",
    ),
    Row(
        "imaging",
        "Mask.freeform",
        "y = m ⊙ x, brush strokes hidden",
        ANY,
        lambda n: ops.Mask.freeform((n, n), 0.2, generator=seeded()),
        colour,
        as_it_is,
        "20 % hidden",
    ),
    Row(
        "imaging",
        "Blur",
        "y = k ⊛ x, circular",
        ANY,
        lambda n: ops.Blur.gaussian(2.0, (n, n)),
        colour,
        as_it_is,
        "Gaussian, 2 pixels",
    ),
    Row(
        "imaging",
        'Blur(edges="reflect")',
        "y = C (k ⊛ P x), P pads and C crops",
        ANY,
        lambda n: ops.Blur.from_kernel(
            kernels.motion(15.0, generator=seeded()).float(), (n, n), "reflect"
        ),
        colour,
        as_it_is,
        "a hand's shake",
    ),
    Row(
        "imaging",
        "SpatialBlur",
        "y = Σₖ hₖ ⊛ (wₖ ⊙ x)",
        ANY,
        lambda n: ops.SpatialBlur.from_kernels(
            torch.stack(
                [kernels.gaussian(w, size=33).float() for w in (0.5, 1.5, 2.5, 4.0)]
            ).reshape(1, 4, 33, 33),
            (n, n),
            "reflect",
        ),
        colour,
        as_it_is,
        "sharp on the left",
    ),
    Row(
        "imaging",
        "Downsample",
        "y = the mean of each f×f block",
        ANY,
        lambda n: ops.Downsample(4, (n, n)),
        colour,
        as_it_is,
        "factor 4",
    ),
    Row(
        "imaging",
        "Downsample.bicubic",
        "y = R x Cᵀ, antialiased bicubic",
        ANY,
        lambda n: ops.Downsample.bicubic(4, (n, n)),
        colour,
        as_it_is,
        "factor 4",
    ),
    Row(
        "imaging",
        "Decimate",
        "y = (k ⊛ x) at every f-th pixel",
        ANY,
        lambda n: ops.Decimate.from_kernel(kernels.gaussian(1.6).float(), 4, (n, n)),
        colour,
        as_it_is,
        "Gaussian, then factor 4",
    ),
    Row(
        "imaging",
        "Greyscale",
        "y = Σ_c w_c x_c",
        ANY,
        lambda n: ops.Greyscale(),
        colour,
        as_it_is,
        "colourisation",
    ),
    Row(
        "imaging",
        "Bayer",
        "y = each pixel's one colour",
        ANY,
        lambda n: ops.Bayer(),
        colour,
        as_it_is,
        "demosaicking",
    ),
    Row(
        "imaging",
        "CompressedSensing",
        "y = rows of H (s ⊙ x), H Walsh–Hadamard's",
        ANY,
        lambda n: ops.CompressedSensing.random((1, n, n), 0.3, generator=seeded()),
        grey,
        first_guess,
        "|Aᴴy|, 30 % of the rows",
    ),
    Row(
        "imaging",
        "Stack",
        "y = (A₁ x, …, A_K x)",
        "its parts'",
        lambda n: ops.Stack(
            [ops.Blur.gaussian(2.0, (n, n)), ops.Downsample(2, (n, n))]
        ),
        grey,
        halves,
        "left: a blur; right: pixels of 2×2",
    ),
    Row(
        "nonlinear",
        "PhaseRetrieval",
        "y = |F P x|, P pads",
        ANY,
        lambda n: ops.PhaseRetrieval((n, n)),
        grey,
        logarithm,
        "log y, 2-fold oversampled",
    ),
    Row(
        "nonlinear",
        "PhaseRetrieval.coded",
        "y_k = |F (c_k ⊙ x)|",
        ANY,
        lambda n: ops.PhaseRetrieval.coded((n, n), 4, generator=seeded()),
        grey,
        lambda A, y: four_logarithms(A, y[:, 0]),
        "log y, 4 codes",
    ),
    Row(
        "nonlinear",
        "Saturate",
        "y = clip(a x, low, high)",
        ANY,
        lambda n: ops.Saturate(),
        colour,
        as_it_is,
        "twice the exposure",
    ),
    Row(
        "nonlinear",
        "Quantise",
        "y = o + q round((x − o)/q)",
        ANY,
        lambda n: ops.Quantise(0.5, origin=-1.0),
        colour,
        as_it_is,
        "5 levels",
    ),
    Row(
        "nonlinear",
        "JPEG",
        "y = Dᵀ q round(D x / q), blocks of 8×8",
        ANY,
        lambda n: ops.JPEG(10),
        colour,
        as_it_is,
        "quality 10",
    ),
    Row(
        "nonlinear",
        "NetworkOperator",
        "y = f(x), a frozen network",
        ANY,
        lambda n: ops.NetworkOperator(network()),
        grey,
        as_it_is,
        "random convolutions",
    ),
]
"""In the order of the docs."""


def sources(group: Group, n: int) -> dict[str, Tensor]:
    """The images that a group's operators measure, for the head of its sheet."""
    if group == "ct":
        return {"the image": ct_slice(n)[0, 0]}
    if group == "mri":
        return {"the image (magnitude)": complex_slice(n).abs()[0, 0]}
    return {
        "colour image": as_it_is(ops.Identity(), colour(n)),
        "grey image": grey(n)[0, 0],
    }
