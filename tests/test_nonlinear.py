"""Nonlinear operators: the laws of all of them, and what each one is."""

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.testing import assert_close

from invsolve import InverseProblem, operators as ops
from invsolve.linalg import dot
from invsolve.operators.base import Chain, Rescale
from invsolve.operators.nonlinear import (
    JPEG,
    NetworkOperator,
    PhaseRetrieval,
    Quantise,
    Saturate,
)

float64 = torch.float64
H, W = 6, 8


def network() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Dropout(0.5), nn.Conv2d(4, 2, 2)
    )
    g = Generator().manual_seed(0)
    for part in net.parameters():
        part.data = torch.randn(part.shape, generator=g) / 3
    return net.double()


def blur() -> ops.LinearOperator:
    kernel = torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.5, 0.2]], dtype=float64)
    return ops.Blur.from_kernel(kernel, (H, W))


def coded(kind: Any, **options: Any) -> PhaseRetrieval:
    g = Generator().manual_seed(3)
    return PhaseRetrieval.coded((H, W), 3, kind=kind, generator=g, **options)


def smooth_pictures() -> Tensor:
    at = torch.arange(float(max(H, W)), dtype=float64)
    waves = [
        torch.outer((k * at[:H] / 5).cos(), (at[:W] / 4 + k).sin()) for k in (1, 2)
    ]
    return torch.stack(waves)


@dataclass(frozen=True)
class Case:
    """An operator, and the images it takes."""

    A: ops.Operator
    shape: tuple[int, ...] = (2, H, W)
    complex_image: bool = False
    straight_through: bool = False
    any_shape: bool = False
    own_precision: bool = False

    def image(self, g: Generator, dtype: torch.dtype = float64) -> Tensor:
        kind = dtype.to_complex() if self.complex_image else dtype
        return torch.randn(3, *self.shape, dtype=kind, generator=g)


CASES = {
    "phase retrieval": Case(PhaseRetrieval((H, W))),
    "phase retrieval, odd": Case(PhaseRetrieval((5, 7), 1.5), (1, 5, 7)),
    "complex phase retrieval": Case(
        PhaseRetrieval((H, W), complex_image=True), complex_image=True
    ),
    "signs": Case(coded("signs")),
    "phases": Case(coded("phases", oversampling=1.3)),
    "complex phases": Case(coded("phases", complex_image=True), complex_image=True),
    "phases of two channels": Case(
        coded("phases", complex_image=True) @ ops.ComplexChannels()
    ),
    "saturate": Case(Saturate(), any_shape=True),
    "saturate above": Case(Saturate(1.5, low=-math.inf, high=0.7), any_shape=True),
    "quantise": Case(Quantise(0.4, 0.1), straight_through=True, any_shape=True),
    "jpeg": Case(JPEG(20, -3.0, 3.0), (2, 8, 16), straight_through=True),
    "network": Case(
        NetworkOperator(network(), (1, H, W)), (1, H, W), own_precision=True
    ),
    "saturate @ blur": Case(Saturate() @ blur()),
    "blur @ saturate": Case(blur() @ Saturate()),
    "phase retrieval @ rescale": Case(PhaseRetrieval((H, W)) @ Rescale(0.5, 0.5)),
    "rescale": Case(Rescale(-2.0, 0.3), any_shape=True),
    "warp": Case(ops.Warp(smooth_pictures())),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def A(case: Case) -> ops.Operator:
    return case.A


@pytest.fixture
def x(case: Case, generator: Generator) -> Tensor:
    return case.image(generator)


# --- the laws


def test_vjp_is_autograd(A: ops.Operator, x: Tensor, generator: Generator) -> None:
    """Through the straight-through operators too: they tell autodiff the same."""
    leaf = x.clone().requires_grad_()
    Ax = A(leaf)
    v = torch.randn(Ax.shape, dtype=Ax.dtype, generator=generator)
    (grad,) = torch.autograd.grad(Ax, leaf, v)
    assert_close(A.vjp(x, v), grad)
    assert_close(torch.func.vjp(A.apply, x)[1](v)[0], grad)


def test_the_pullback_is_the_measurement_and_the_vjp(
    A: ops.Operator, x: Tensor, generator: Generator
) -> None:
    """As often as it is asked, and also where gradients are off."""
    with torch.no_grad():
        y, pull = A.pullback(x)
        assert_close(y, A(x))
        for _ in range(2):
            v = torch.randn(y.shape, dtype=y.dtype, generator=generator)
            assert_close(pull(v), A.vjp(x, v))


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not case.straight_through]
)
def test_vjp_is_finite_differences(name: str, generator: Generator) -> None:
    """Re⟨v, dA(x)/dt⟩ = Re⟨J(x)ᴴv, d⟩ along x + t d."""
    case, step = CASES[name], 1e-5
    x, d = case.image(generator), case.image(generator)
    ahead, behind = case.A(x + step * d), case.A(x - step * d)
    v = torch.randn(ahead.shape, dtype=ahead.dtype, generator=generator)
    slope = dot(v, (ahead - behind) / (2 * step))
    assert_close(dot(case.A.vjp(x, v), d), slope, rtol=1e-6, atol=1e-6)


def test_a_batch_of_two_is_two_singles(A: ops.Operator, x: Tensor) -> None:
    y = A(x)

    def each(f: Callable[[Tensor, Tensor], Tensor]) -> None:
        singles = [f(x[i : i + 1], y[i : i + 1]) for i in range(2)]
        assert_close(f(x[:2], y[:2]), torch.cat(singles))

    each(lambda x, y: A(x))
    each(A.vjp)
    each(lambda x, y: A.guess(y))
    each(lambda x, y: A.image_like(y))


@pytest.mark.parametrize("dtype", [torch.float32, float64], ids=str)
def test_precision_follows_the_image(
    case: Case, dtype: torch.dtype, generator: Generator
) -> None:
    x, A = case.image(generator, dtype), case.A
    y = A(x)
    for t in (y, A.vjp(x, y), A.guess(y), A.image_like(y)):
        assert t.real.dtype == dtype


def test_images_are_told_by_their_measurements(A: ops.Operator, x: Tensor) -> None:
    y = A(x)
    A.check_measurements(y)
    like = A.image_like(y)
    assert (like.shape, like.dtype) == (x.shape, x.dtype)
    assert not like.any()
    guess = A.guess(y)
    assert (guess.shape, guess.dtype) == (x.shape, x.dtype)
    assert guess.isfinite().all()


def test_layout_in_memory_changes_nothing(A: ops.Operator, x: Tensor) -> None:
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert not strided.is_contiguous()
    assert_close(A(strided), A(x))
    assert_close(A.vjp(strided, A(x)), A.vjp(x, A(x)))


def test_moving_and_pickling_change_nothing(A: ops.Operator, x: Tensor) -> None:
    for same in (A.to(torch.device("cpu")), pickle.loads(pickle.dumps(A))):
        assert type(same) is type(A)
        assert torch.equal(same(x), A(x))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same(A: ops.Operator, x: Tensor) -> None:
    cuda, y = torch.device("cuda"), A(x)
    there = A.to(cuda)
    assert_close(there(x.to(cuda)).cpu(), y)
    assert_close(there.vjp(x.to(cuda), y.to(cuda)).cpu(), A.vjp(x, y))
    assert_close(there.guess(y.to(cuda)).cpu(), A.guess(y))


def test_operators_are_frozen_and_name_themselves(A: ops.Operator) -> None:
    assert repr(A).startswith(f"{type(A).__name__}(")
    with pytest.raises(AttributeError):
        A.anything = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not case.any_shape]
)
def test_wrong_shapes_are_refused_in_one_line(name: str, generator: Generator) -> None:
    case = CASES[name]
    x = case.image(generator)
    y = case.A(x)
    with pytest.raises(ValueError, match=r"expects an image|JPEG takes images") as e:
        case.A(x[..., :-1])
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"expects measurements|JPEG takes") as e:
        InverseProblem(y[..., :-1, :], case.A, ops.GaussianNoise(1.0))
    assert "\n" not in str(e.value)


# --- composition


def test_composition_is_application_in_turn(generator: Generator) -> None:
    x = torch.randn(2, 1, H, W, dtype=float64, generator=generator)
    B, S, Q = blur(), Saturate(), Quantise(0.1)
    assert torch.equal((S @ B)(x), S(B(x)))
    assert torch.equal((B @ S)(x), B(S(x)))
    assert torch.equal((Q @ S @ B)(x), Q(S(B(x))))
    assert torch.equal((Q @ (S @ B))(x), Q(S(B(x))))


def test_linear_after_linear_stays_linear() -> None:
    B = blur()
    assert isinstance(B @ B, ops.LinearOperator)
    for A in (Saturate() @ B, B @ Saturate()):
        assert isinstance(A, Chain) and not isinstance(A, ops.LinearOperator)
        assert A.image_shape == A.measurement_shape == (H, W)
    P = PhaseRetrieval((H, W)) @ B
    assert (P.image_shape, P.measurement_shape) == ((H, W), (2 * H, 2 * W))


def test_a_guess_goes_back_through_the_parts(generator: Generator) -> None:
    """Where nothing saturates, the blur's own pseudo-inverse of y/c."""
    x = 0.1 * torch.rand(2, 1, H, W, dtype=float64, generator=generator)
    A = Saturate() @ blur()
    y = A(x)
    assert_close(A.guess(y), blur().pinv(y / 2))
    assert_close((Saturate() @ Rescale(2.0, -1.0)).guess(y), (y / 2 + 1) / 2)


@pytest.mark.parametrize(
    ("scale", "offset"), [(0.0, 1.0), (math.nan, 1.0), (math.inf, 0.0), (1.0, math.nan)]
)
def test_ranges_that_are_none_are_refused(scale: float, offset: float) -> None:
    with pytest.raises(ValueError, match="Rescale needs a finite scale"):
        Rescale(scale, offset)


@pytest.mark.parametrize(
    "of", [Saturate(), Quantise(0.1), JPEG(50)], ids=lambda A: type(A).__name__
)
def test_complex_images_are_refused_where_real_ones_are_needed(
    of: ops.Operator,
) -> None:
    x = torch.zeros(1, 1, 8, 8, dtype=torch.complex64)
    with pytest.raises(ValueError, match="is of real numbers"):
        of(x)
    with pytest.raises(ValueError, match="is of real numbers"):
        InverseProblem(x, of, ops.GaussianNoise(1.0))
    with pytest.raises(ValueError, match="is of real numbers"):
        (blur_of(8) @ of)(x)


def test_a_chain_refuses_what_its_last_part_cannot_have_measured() -> None:
    with pytest.raises(ValueError, match="JPEG takes images"):
        (JPEG(50) @ Saturate()).check_measurements(torch.zeros(1, 1, 8, 9))


def blur_of(n: int) -> ops.LinearOperator:
    return ops.Blur.gaussian(1.0, (n, n))


# --- phase retrieval


def dft_magnitude(x: Tensor, size: tuple[int, int]) -> Tensor:
    """|Σ x e^(−2πi …)| summed as it is written, the zero frequency in the middle."""

    def transform(n: int, N: int) -> Tensor:
        k = torch.arange(N, dtype=float64) - N // 2
        return torch.exp(-2j * torch.pi * torch.outer(k, torch.arange(n).double() / N))

    rows, columns = map(transform, x.shape[-2:], size)
    return (rows @ (x + 0j) @ columns.T).abs() / math.prod(size) ** 0.5


@pytest.mark.parametrize(
    ("shape", "oversampling", "size"),
    [((6, 8), 2.0, (12, 16)), ((5, 7), 1.5, (8, 11)), ((50, 3), 1.1, (55, 4))],
)
def test_phase_retrieval_is_the_magnitude_of_a_padded_dft(
    shape: tuple[int, int],
    oversampling: float,
    size: tuple[int, int],
    generator: Generator,
) -> None:
    x = torch.randn(2, 1, *shape, dtype=float64, generator=generator)
    A = PhaseRetrieval(shape, oversampling)
    assert A.measurement_shape == size
    assert_close(A(x), dft_magnitude(x, size))


def test_a_code_multiplies_the_image(generator: Generator) -> None:
    x = torch.randn(2, 1, H, W, dtype=float64, generator=generator)
    A = coded("phases", oversampling=2.0)
    assert A.codes is not None
    for k, code in enumerate(A.codes):
        plain = PhaseRetrieval((H, W))
        assert_close(A(x)[:, :, k], plain(code.to(torch.complex128) * x))


def test_codes_are_signs_or_phases() -> None:
    signs, phases = coded("signs").codes, coded("phases").codes
    assert signs is not None and phases is not None
    assert signs.unique().tolist() == [-1.0, 1.0]
    assert_close(phases.abs(), torch.ones(3, H, W))
    assert phases.mean().abs() < 4 / (3 * H * W) ** 0.5


def test_energy_is_kept(generator: Generator) -> None:
    """‖y‖² = k ‖x‖², however far the padding goes."""
    x = torch.randn(2, 1, H, W, dtype=float64, generator=generator)
    for A, k in ((PhaseRetrieval((H, W), 1.7), 1), (coded("phases"), 3)):
        energy = A(x).square().flatten(1).sum(1)
        assert_close(energy, k * x.square().flatten(1).sum(1))


def test_the_trivial_ambiguities(generator: Generator) -> None:
    """−x, x turned by 180° and x shifted give the same y; a code tells all but −x."""
    x = torch.zeros(1, 1, H, W, dtype=float64)
    x[..., 1:4, 2:6] = torch.rand(3, 4, dtype=float64, generator=generator)
    A, C = PhaseRetrieval((H, W)), coded("signs")
    assert_close(A(-x), A(x))
    assert_close(C(-x), C(x))
    for same in (x.flip(-1, -2), x.roll((1, -1), (-2, -1))):
        assert_close(A(same), A(x))
        assert (C(same) - C(x)).abs().max() > 0.1
    assert (A(x.flip(-1)) - A(x)).abs().max() > 0.01


def test_only_a_global_phase_is_lost_of_complex_images(generator: Generator) -> None:
    x = torch.randn(1, 1, H, W, dtype=torch.complex128, generator=generator)
    A = coded("phases", complex_image=True)
    turned = x * torch.exp(torch.tensor(1.3j, dtype=torch.complex128))
    assert_close(A(turned), A(x))
    assert (A(x.conj()) - A(x)).abs().max() > 0.1


@pytest.mark.parametrize("of", [PhaseRetrieval((H, W)), coded("phases")], ids=repr)
def test_nothing_has_a_gradient_and_no_nan(of: PhaseRetrieval) -> None:
    x = torch.zeros(1, 1, H, W)
    assert torch.equal(of.vjp(x, torch.ones_like(of(x))), x)


def test_the_guess_without_codes_is_the_authors(generator: Generator) -> None:
    """|F⁻¹y|, of which the image's window is cut out."""
    y = torch.rand(1, 1, 12, 16, dtype=float64, generator=generator)
    full = torch.fft.fftshift(
        torch.fft.ifft2(torch.fft.ifftshift(y, (-2, -1)), norm="ortho"), (-2, -1)
    ).abs()
    assert_close(PhaseRetrieval((H, W)).guess(y), full[..., 3:9, 4:12])


@pytest.mark.parametrize("complex_image", [False, True])
def test_codes_find_the_image_again(complex_image: bool, generator: Generator) -> None:
    """From the spectral start, descent on ‖|Ax| − y‖² ends at x, but for a phase."""
    kind = torch.complex128 if complex_image else float64
    x = torch.randn(3, 1, H, W, dtype=kind, generator=generator)
    g = Generator().manual_seed(1)
    A = PhaseRetrieval.coded(
        (H, W), 8, kind="phases", complex_image=complex_image, generator=g
    )
    y = A(x)

    def alike(u: Tensor) -> Tensor:
        """|⟨u, x⟩| / ‖u‖‖x‖, item by item."""
        inner = (u.conj() * x).flatten(1).sum(1).abs()
        return inner / (dot(u, u) * dot(x, x)).sqrt()

    u = A.guess(y)
    assert (alike(u) > 0.7).all()
    assert_close(dot(A(u), A(u)), dot(y, y))
    for _ in range(300):
        u = u - A.vjp(u, A(u) - y) / 8
    assert_close(alike(u), torch.ones(3, dtype=float64))
    assert_close(A(u), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"oversampling": 0.5}, "oversampling must be ≥ 1"),
        ({"oversampling": math.nan}, "oversampling must be ≥ 1"),
        ({"shape": (0, 8)}, "at least one pixel"),
        ({"codes": torch.ones(H, W)}, r"codes must be \(k, 6, 8\)"),
        ({"codes": torch.ones(2, W, H)}, r"codes must be \(k, 6, 8\)"),
        ({"codes": torch.full((1, H, W), math.nan)}, "codes must be finite"),
    ],
)
def test_impossible_phase_retrieval_is_refused(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        PhaseRetrieval(**{"shape": (H, W), **bad})
    assert "\n" not in str(error.value)


def test_no_codes_are_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="at least one code"):
        PhaseRetrieval.coded((H, W), 0, generator=generator)


def test_a_magnitude_is_real() -> None:
    y = torch.zeros(1, 1, 12, 16, dtype=torch.complex64)
    with pytest.raises(ValueError, match="is of real numbers"):
        InverseProblem(y, PhaseRetrieval((H, W)), ops.GaussianNoise(1.0))


# --- saturation


def test_saturation_clips_what_is_too_bright() -> None:
    x = torch.tensor([[-0.9, -0.4, 0.0, 0.3, 0.5, 0.8]])
    expected = torch.tensor([[-1.0, -0.8, 0.0, 0.6, 1.0, 1.0]])
    assert_close(Saturate()(x), expected)
    ones = torch.ones_like(x)
    seen = torch.tensor([[0.0, 2.0, 2.0, 2.0, 0.0, 0.0]])
    assert_close(Saturate().vjp(x, ones), seen)
    one_sided = Saturate(10.0, low=-math.inf, high=5.0)
    assert_close(one_sided(x), torch.tensor([[-9.0, -4.0, 0.0, 3.0, 5.0, 5.0]]))


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"factor": 0.0}, "exposure must be > 0"),
        ({"factor": math.nan}, "exposure must be > 0"),
        ({"low": 1.0}, "least reading must be below"),
        ({"high": math.nan}, "least reading must be below"),
    ],
)
def test_impossible_saturation_is_refused(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Saturate(**bad)


# --- quantisation


def test_quantisation_takes_the_nearest_level(generator: Generator) -> None:
    levels = torch.linspace(-1, 1, 5, dtype=float64)
    A = Quantise(0.5, origin=-1.0)
    x = 2 * torch.rand(3, 1, 7, dtype=float64, generator=generator) - 1
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
    assert_close(A(x), nearest)
    assert_close(A(A(x)), A(x))
    assert_close(A(levels[None]), levels[None])


def test_the_straight_through_gradient_is_that_of_no_quantisation(
    generator: Generator,
) -> None:
    x, v = torch.randn(2, 3, 1, 8, 8, dtype=float64, generator=generator)
    for A in (Quantise(0.3), JPEG(10)):
        assert torch.equal(A.vjp(x, v), v)
        step = 1e-9  # the true derivative is 0
        assert_close(A(x + step * v), A(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_steps_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="step must be > 0"):
        Quantise(bad)


def test_an_origin_is_a_number() -> None:
    with pytest.raises(ValueError, match="origin must be finite"):
        Quantise(1.0, math.nan)


# --- JPEG


def smooth(generator: Generator) -> Tensor:
    """Images in [−1, 1] of two blocks by three."""
    x = torch.randn(2, 1, 16, 24, dtype=float64, generator=generator)
    x = ops.Blur.gaussian(2.0, (16, 24))(x)
    return x / x.abs().amax((1, 2, 3), keepdim=True)


def test_jpeg_rounds_the_cosine_transform_of_blocks(generator: Generator) -> None:
    """Against SciPy's transform, block by block."""
    from scipy.fft import dctn, idctn

    x, A = smooth(generator), JPEG(30)
    table = A.table.numpy()
    levels = (x + 1) * 127.5 - 128
    expected = torch.empty_like(x)
    for item in range(2):
        for r in range(0, 16, 8):
            for c in range(0, 24, 8):
                block = levels[item, 0, r : r + 8, c : c + 8].numpy()
                kept = table * (dctn(block, norm="ortho") / table).round()
                back = torch.from_numpy(idctn(kept, norm="ortho"))
                expected[item, 0, r : r + 8, c : c + 8] = (back + 128) / 127.5 - 1
    assert_close(A(x), expected)


def test_the_table_follows_the_quality() -> None:
    """50 is Annex K's own; 25 twice it and 75 half of it; 100 rounds to grey levels."""
    base = JPEG(50).table
    assert base[0].tolist() == [16, 11, 10, 16, 24, 40, 51, 61]
    assert base[:, 0].tolist() == [16, 12, 14, 14, 18, 24, 49, 72]
    assert base[7, 7] == 99 and base.max() == 121 and base.sum() == 3688
    assert torch.equal(JPEG(25).table, (2 * base).clamp(max=255))
    assert torch.equal(JPEG(75).table, (base / 2 + 0.01).round())
    assert (JPEG(100).table == 1).all()
    assert (JPEG(1).table == 255).all()


def test_quality_100_changes_next_to_nothing(generator: Generator) -> None:
    """Coefficients are off by half a level at most, and so 64 pixels by 8 · ½."""
    x = smooth(generator)
    error = 127.5 * (JPEG(100)(x) - x)
    assert error.abs().max() <= 4
    assert error.square().mean().sqrt() <= 0.5


def test_less_quality_is_less_like_the_image(generator: Generator) -> None:
    x = smooth(generator)
    errors = [float((JPEG(q)(x) - x).norm()) for q in (100, 90, 50, 20, 5)]
    assert errors == sorted(errors)
    assert errors[-1] > 3 * errors[0]


@pytest.mark.parametrize("quality", [5, 50, 95])
def test_jpeg_twice_is_jpeg_once(quality: int, generator: Generator) -> None:
    A = JPEG(quality)
    once = A(smooth(generator))
    assert_close(A(once), once)


def test_jpeg_of_another_range(generator: Generator) -> None:
    x = smooth(generator)
    assert_close(JPEG(40, 0.0, 1.0)((x + 1) / 2), (JPEG(40)(x) + 1) / 2)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"quality": 0}, "between 1 and 100"),
        ({"quality": 101}, "between 1 and 100"),
        ({"quality": 50, "low": 1.0}, "black must be below white"),
        ({"quality": 50, "high": math.inf}, "black must be below white"),
    ],
)
def test_impossible_jpeg_is_refused(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        JPEG(**bad)


# --- a network


def test_a_network_operator_is_the_network(generator: Generator) -> None:
    net = network().eval()
    x = torch.randn(2, 1, H, W, dtype=float64, generator=generator)
    A = NetworkOperator(net, (1, H, W))
    assert A.measurement_shape == (2, H - 1, W - 1)
    with torch.no_grad():
        assert_close(A(x), net(x))


def test_nothing_outside_changes_a_network_operator(generator: Generator) -> None:
    """Neither training, nor new weights; and it changes nothing outside."""
    net = network().train()
    x = torch.randn(2, 1, H, W, dtype=float64, generator=generator)
    A = NetworkOperator(net)
    before = A(x)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert torch.equal(A(x), before)  # no dropout
    for part in net.parameters():
        part.data.zero_()
    assert torch.equal(A(x), before)
    assert not before.requires_grad
    assert not A.module.training


def test_a_network_computes_in_its_own_precision(generator: Generator) -> None:
    x = torch.randn(2, 1, H, W, dtype=float64, generator=generator)
    A = NetworkOperator(network().float())
    assert A(x).dtype == A.vjp(x, A(x)).dtype == float64
    assert_close(A(x), NetworkOperator(network())(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(NetworkOperator(nn.ReLU())(x), x.relu())


def test_a_network_that_is_random_is_refused() -> None:
    class Anew(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5)

    with pytest.raises(ValueError, match="two answers to one image"):
        NetworkOperator(Anew(), (1, H, W))


def test_a_network_of_other_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not take images of shape \(3, 6, 8\)"):
        NetworkOperator(network(), (3, H, W))


def test_images_of_a_network_that_keeps_their_shape() -> None:
    y = torch.ones(2, 1, H, W)
    assert torch.equal(NetworkOperator(nn.ReLU()).guess(y), y)
    assert torch.equal(NetworkOperator(nn.ReLU(), (1, H, W)).guess(y), y)
    smaller = NetworkOperator(network(), (1, H, W))
    assert not smaller.guess(torch.ones(2, 2, H - 1, W - 1)).any()


def test_a_warp_moves_pictures_and_interpolates_between_pixels() -> None:
    pictures = smooth_pictures()
    A = ops.Warp(pictures)
    S = torch.zeros(1, 2, H, W, dtype=float64)
    assert_close(A(S)[0, 0], pictures)
    S[:, 0], S[:, 1] = 1, -2
    moved = A(S)[0, 0]
    assert_close(moved[:, :-1, 2:], pictures[:, 1:, :-2])
    assert_close(
        moved[:, -1, 2:], pictures[:, -1, :-2]
    )  # beyond the border, as it ends
    S[:, 0], S[:, 1] = 0.25, 0
    between = 0.75 * pictures[:, :-1] + 0.25 * pictures[:, 1:]
    assert_close(A(S)[0, 0, :, :-1], between)
    with pytest.raises(ValueError, match="pictures must be finite"):
        ops.Warp(pictures * math.nan)
