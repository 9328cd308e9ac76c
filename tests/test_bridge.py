"""Operators of deepinv, SciPy and PyLops as ours, and ours as theirs."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

import invsolve as iv
from invsolve import operators as ops, priors, samplers
from invsolve.operators import LinearOperator
from invsolve.operators.bridge import (
    as_operator,
    from_deepinv,
    from_scipy,
    to_deepinv,
    to_scipy,
)

physics = pytest.importorskip("deepinv.physics")
their_samplers = pytest.importorskip("deepinv.sampling")

N = 8


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=Generator().manual_seed(1))


def kernel() -> Tensor:
    return rand(1, 1, 3, 4)


def sampling() -> Tensor:
    return (rand(N, N) > 0.4).float()


def coil_maps() -> Tensor:
    return torch.complex(rand(1, 3, N, N), rand(1, 3, N, N).flip(-1))


def tomography(normalize: bool, exact: bool = True) -> Any:
    return physics.Tomography(
        6, N, circle=False, normalize=normalize, adjoint_via_backprop=exact
    )


def three_rows() -> Any:
    g = Generator().manual_seed(2)
    return physics.CompressedSensing(20, (1, N, N), rng=g)


THEIRS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "Inpainting": (
        lambda: physics.Inpainting((1, N, N), mask=sampling()[None]),
        (1, N, N),
    ),
    "BlurFFT": (lambda: physics.BlurFFT((1, N, N), kernel()), (1, N, N)),
    "Blur, valid": (lambda: physics.Blur(kernel(), padding="valid"), (2, N, N)),
    "Blur, reflect": (lambda: physics.Blur(kernel(), padding="reflect"), (1, N, N)),
    "Downsampling": (
        lambda: physics.Downsampling((1, N, N), filter="bicubic", factor=2),
        (1, N, N),
    ),
    "MRI": (lambda: physics.MRI(sampling(), (N, N)), (2, N, N)),
    "MultiCoilMRI": (
        lambda: physics.MultiCoilMRI(sampling(), coil_maps(), (2, N, N)),
        (2, N, N),
    ),
    "Tomography": (lambda: tomography(False), (1, N, N)),
    "Tomography, normalised": (lambda: tomography(True), (1, N, N)),
    "CompressedSensing": (three_rows, (1, N, N)),
    "Decolorize": (physics.Decolorize, (3, N, N)),
    "SinglePixelCamera": (
        lambda: physics.SinglePixelCamera(
            20, (1, N, N), rng=Generator().manual_seed(3)
        ),
        (1, N, N),
    ),
    "Denoising": (physics.Denoising, (1, N, N)),
}
"""Classes of deepinv and the images they take."""

OURS: dict[str, tuple[LinearOperator, tuple[int, ...]]] = {
    "mask": (ops.Mask(sampling()), (2, N, N)),
    "blur": (ops.Blur.from_kernel(kernel()[0, 0], (N, N)), (1, N, N)),
    "blur of odd images": (ops.Blur.from_kernel(kernel()[0, 0], (7, 9)), (2, 7, 9)),
    "blur of each channel": (
        ops.Blur(torch.fft.fft2(rand(2, N, N) / N**2)),
        (2, N, N),
    ),
    "scaled downsampling": (-0.5 * ops.Downsample(2, (N, N)), (3, N, N)),
    "mri": (ops.Mask(sampling()) @ ops.Fourier() @ ops.ComplexChannels(), (2, N, N)),
    "fourier after blur": (
        ops.Fourier() @ ops.ComplexChannels() @ ops.Mask(rand(2, N, N)),
        (2, N, N),
    ),
    "identity": (ops.Identity(), (1, N, N)),
    "parallel beam": (
        ops.ParallelBeam((N, N), torch.linspace(0, torch.pi, 7)[:-1]),
        (1, N, N),
    ),
    "mask of a blur": (
        ops.Mask(sampling()) @ ops.Blur.from_kernel(kernel()[0, 0], (N, N)),
        (1, N, N),
    ),
}
"""Operators of ours and the images they take."""

DECOMPOSED = [name for name in OURS if name not in ("parallel beam", "mask of a blur")]


@pytest.fixture(params=THEIRS.values(), ids=list(THEIRS))
def theirs(request: pytest.FixtureRequest) -> tuple[Any, tuple[int, ...]]:
    make, shape = request.param
    return make(), shape


@pytest.fixture(params=OURS.values(), ids=list(OURS))
def ours(request: pytest.FixtureRequest) -> tuple[LinearOperator, tuple[int, ...]]:
    return request.param


def linear(physics: Any, shape: tuple[int, ...] | None = None) -> LinearOperator:
    A = from_deepinv(physics, shape)
    assert isinstance(A, LinearOperator)
    return A


def images(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(2, *shape, generator=generator)


def test_their_values_are_kept(
    theirs: tuple[Any, tuple[int, ...]], generator: Generator
) -> None:
    made, shape = theirs
    A, x = linear(made, shape), images(shape, generator)
    y = A(x)
    A.check_measurements(y)
    assert torch.equal(y, made.A(x))
    assert torch.equal(A.adjoint(y), made.A_adjoint(y))
    assert ops.dottest(A, x, torch.randn(y.shape, generator=generator)) < 1e-5
    assert A.adjoint_is_exact


def test_their_prox_and_pinv_are_solved(
    theirs: tuple[Any, tuple[int, ...]], generator: Generator
) -> None:
    made, shape = theirs
    A, v = linear(made, shape), images(shape, generator)
    y = A(v.flip(0))
    rho = torch.tensor([0.3, 2.0])[:, None, None, None]
    x = A.prox(v, y, rho)
    assert_close(A.adjoint(A(x) - y), rho * (v - x), rtol=1e-3, atol=1e-4)
    seen = A(A.pinv(y))
    assert float((seen - y).norm() / y.norm()) < 1e-2
    assert A.norm(v) == pytest.approx(LinearOperator.norm(A, v), rel=1e-3)


def test_there_and_back_changes_no_value(
    ours: tuple[LinearOperator, tuple[int, ...]], generator: Generator
) -> None:
    A, shape = ours
    B, x = linear(to_deepinv(A, None, shape)), images(shape, generator)
    y = A(x)
    packed = torch.cat([y.real, y.imag], 1) if y.is_complex() else y
    assert_close(B(x), packed)
    assert_close(B.adjoint(packed), A.adjoint(y))
    assert_close(B.prox(x, packed.flip(0), 0.5), A.prox(x, y.flip(0), 0.5))
    assert B.image_shape == shape


def test_ours_pass_for_physics(
    ours: tuple[LinearOperator, tuple[int, ...]], generator: Generator
) -> None:
    A, shape = ours
    made = to_deepinv(A, ops.GaussianNoise(0.25), shape)
    assert isinstance(made, physics.LinearPhysics)
    assert float(made.adjointness_test(num_samples=64)) < 1e-5  # a ratio of rms values
    assert float(made.noise_model.sigma) == 0.25
    z, x = images(shape, generator), images(shape, generator)
    y, gamma = made.A(x), torch.tensor([0.5, 4.0])
    got = made.prox_l2(z, y, gamma, max_iter=200, tol=1e-7)
    wide = gamma[:, None, None, None]
    gradient = wide * made.A_adjoint(made.A(got) - y) + got - z
    assert_close(gradient, torch.zeros_like(z), rtol=0, atol=1e-4)
    assert_close(made.prox_l2(None, y, 2.0), made.prox_l2(torch.zeros_like(z), y, 2.0))
    assert_close(made.A(made.A_dagger(y)), y, rtol=0, atol=1e-2)
    assert_close(made.A_adjoint_A(x), made.A_adjoint(y))
    assert_close(made.A_A_adjoint(y), made.A(made.A_adjoint(y)))
    assert torch.equal(made.A_vjp(x, y), made.A_adjoint(y))
    assert_close(made.clone().A(x), y)
    assert copy.deepcopy(made).noise_model.sigma == made.noise_model.sigma


@pytest.mark.parametrize("name", OURS)
def test_a_decomposition_is_one(name: str, generator: Generator) -> None:
    A, shape = OURS[name]
    made, x = to_deepinv(A, None, shape), images(shape, generator)
    assert isinstance(made, physics.DecomposablePhysics) == (name in DECOMPOSED)
    if name not in DECOMPOSED:
        return
    z, y = made.V_adjoint(x), made.A(x)
    assert made.mask.shape[1:] == z.shape[1:]
    assert (made.mask >= 0).all()
    assert_close(made.V(z), x)
    assert_close(made.U(made.mask * z), y)
    assert_close(made.V(made.mask * made.U_adjoint(y)), made.A_adjoint(y))
    assert_close(made.U(made.U_adjoint(y)), y)
    if "blur" not in name or name == "fourier after blur":
        assert_close(z.square().sum(), x.square().sum())


def test_masks_and_blurs_are_the_same_in_both_libraries(generator: Generator) -> None:
    x = images((1, N, N), generator)
    their_mask = physics.Inpainting((1, N, N), mask=sampling())
    assert torch.equal(ops.Mask(sampling())(x), their_mask.A(x))
    their_blur = physics.BlurFFT((1, N, N), kernel())
    assert_close(ops.Blur.from_kernel(kernel()[0, 0], (N, N))(x), their_blur.A(x))
    z = images((2, N, N), generator)
    ours, shape = OURS["mri"]
    their_mri = physics.MRI(sampling(), (N, N))
    assert_close(to_deepinv(ours, None, shape).A(z), their_mri.A(z))


@pytest.mark.parametrize("sampler", [samplers.dds, samplers.reddiff, samplers.dps])
@pytest.mark.parametrize("name", ["blur", "mask"])
def test_our_samplers_take_their_operators(
    name: str, sampler: Any, generator: Generator
) -> None:
    A, shape = OURS["blur"] if name == "blur" else (ops.Mask(sampling()), (1, N, N))
    theirs = THEIRS["BlurFFT" if name == "blur" else "Inpainting"][0]()
    noise = ops.GaussianNoise(0.1)
    prior = priors.GaussianPrior(torch.zeros(shape), torch.eye(N * N))
    y = noise.sample(A(images(shape, generator)), generator=generator)

    def draw(operator: ops.Operator) -> Tensor:
        problem = iv.InverseProblem(y, operator, noise)
        g = Generator().manual_seed(0)
        return iv.solve(problem, prior, sampler, generator=g, steps=5).samples

    assert_close(draw(from_deepinv(theirs)), draw(A), rtol=1e-3, atol=1e-4)


class Wiener(torch.nn.Module):
    """The denoiser of N(½, ¼²)."""

    def forward(self, x: Tensor, sigma: Any, **_: Any) -> Tensor:
        w = 0.0625 / (0.0625 + torch.as_tensor(sigma).to(x).square())
        return 0.5 + w * (x - 0.5)


PAIRS = {
    "blur": (OURS["blur"][0], THEIRS["BlurFFT"][0]),
    "mask": (ops.Mask(sampling()), THEIRS["Inpainting"][0]),
}
"""One and the same operator in both libraries."""


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sampler", ["DDRM", "DiffPIR", "DPS"])
def test_their_samplers_take_our_operators(name: str, sampler: str) -> None:
    ours, their_physics = PAIRS[name][0], PAIRS[name][1]()
    their_physics.set_noise_model(physics.GaussianNoise(0.05))
    made = to_deepinv(ours, ops.GaussianNoise(0.05))
    y = made.A(0.5 + 0.25 * rand(1, 1, N, N))

    def draw(one: Any) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            before = y.clone()
            match sampler:
                case "DDRM":
                    x = their_samplers.DDRM(Wiener(), np.linspace(1, 0, 20))(
                        y.clone(), one
                    )
                case "DiffPIR":
                    L2 = pytest.importorskip("deepinv.optim").L2
                    model = their_samplers.DiffPIR(Wiener(), L2(), max_iter=20)
                    x = model(y, one, x_init=torch.zeros(1, 1, N, N))
                case _:
                    g = Generator().manual_seed(5)
                    x = their_samplers.DPS(Wiener(), num_steps=20, rng=g)(y, one)
            assert torch.equal(y, before)
            return x

    assert_close(draw(made), draw(their_physics), rtol=1e-3, atol=1e-3)


def test_ddrm_fits_two_channels_of_k_space() -> None:
    A, shape = OURS["mri"]
    made = to_deepinv(A, ops.GaussianNoise(0.05), shape)
    y = made.A(0.5 + 0.25 * rand(2, *shape))
    x = their_samplers.DDRM(Wiener(), np.linspace(1, 0, 20))(y, made)
    assert float((made.A(x) - y).square().mean().sqrt()) < 0.05


def test_ddrm_does_not_change_our_measurements() -> None:
    made = to_deepinv(ops.Mask(sampling()), ops.GaussianNoise(0.05))
    y = made.A(rand(1, 1, N, N))
    before = y.clone()
    their_samplers.DDRM(Wiener(), np.linspace(1, 0, 5))(y, made)
    assert torch.equal(y, before)


def test_what_is_done_to_a_physics_later_changes_nothing(generator: Generator) -> None:
    made = physics.Inpainting((1, N, N), mask=sampling())
    A, x = linear(made), images((1, N, N), generator)
    y = A(x)
    made.update(mask=torch.ones(1, 1, N, N))
    assert torch.equal(A(x), y)


def test_a_physics_is_not_changed(generator: Generator) -> None:
    made = physics.Blur(kernel(), padding="circular")
    settings = made.max_iter, made.tol, made.solver
    A, x = linear(made, (1, N, N)), images((1, N, N), generator).double()
    A.prox(x, A.prox(x, A(x), 0.5, max_steps=3), 0.5)
    assert (made.max_iter, made.tol, made.solver) == settings
    assert made.filter.dtype == torch.float32
    ours = to_deepinv(ops.ParallelBeam((N, N), torch.tensor([0.0, 1.0])))
    settings = ours.max_iter, ours.tol, ours.solver
    ours.prox_l2(x, ours.A(x), 1.0, max_iter=3, tol=0.1)
    assert (ours.max_iter, ours.tol, ours.solver) == settings


def test_an_inexact_adjoint_is_told() -> None:
    A = linear(tomography(False, exact=False), (1, N, N))
    assert not A.adjoint_is_exact


def test_a_physics_without_a_shape_takes_any(generator: Generator) -> None:
    A = linear(physics.Blur(kernel(), padding="circular"))
    assert A.image_shape == A.measurement_shape == ()
    for shape in ((1, 6, 7), (3, N, N)):
        x = images(shape, generator)
        assert A(x).shape == x.shape


def test_a_nonlinear_physics_pulls_back(generator: Generator) -> None:
    x = images((1, N, N), generator)

    class Cube(physics.Physics):
        def A(self, x: Tensor, **_: Any) -> Tensor:
            return x**3

    A = from_deepinv(Cube(), (1, N, N))
    assert not isinstance(A, LinearOperator)
    assert_close(A(x), x**3)
    assert_close(A.vjp(x, x), 3 * x**3)
    assert A.image_like(A(x)).shape == x.shape
    assert_close(A.to(torch.device("cpu")).vjp(x, x), 3 * x**3)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_phase_retrieval_takes_complex_images(generator: Generator) -> None:
    made = physics.RandomPhaseRetrieval(30, (1, N, N), rng=Generator().manual_seed(6))
    x = images((1, N, N), generator).to(torch.complex64)
    A = from_deepinv(made)
    y = A(x)
    assert y.is_floating_point() and A.measurement_shape == y.shape[1:]
    assert_close(y, made.A(x))
    assert_close(A.vjp(x, y), made.A_vjp(x, y))


def test_what_cannot_be_bridged_is_refused_in_one_line() -> None:
    stacked = physics.Denoising().stack(physics.Denoising())
    batched = physics.Inpainting((1, N, N), mask=torch.ones(2, 1, N, N))
    multi_coil = physics.MultiCoilMRI(sampling(), coil_maps(), (2, N, N))
    fourier = ops.Mask(sampling()) @ ops.Fourier()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: from_deepinv(stacked, (1, N, N)), "join them by Stack"),
        (lambda: linear(stacked).apply(torch.ones(1, 1, N, N)), "join them by Stack"),
        (lambda: from_deepinv(batched), "parameters of 2 items"),
        (lambda: from_deepinv(multi_coil, (1, N, N)), "does not take images of"),
        (lambda: from_deepinv(ops.Identity()), "is no deepinv.physics.Physics"),
        (lambda: to_deepinv(ops.Identity()), "takes images of any size"),
        (lambda: to_deepinv(fourier), r"operator @ ComplexChannels\(\)"),
        (
            lambda: to_deepinv(ops.Mask(sampling()), ops.PoissonNoise(1.0)),
            "takes GaussianNoise, not PoissonNoise",
        ),
        (
            lambda: to_deepinv(ops.Mask(sampling())).update(mask=torch.ones(1)),
            "never changes",
        ),
        (lambda: as_operator(torch.eye(3)), "Tensor is no operator"),
        (lambda: from_scipy(np.eye(4), (1, 3)), "it would have to be"),
        (
            lambda: from_scipy(1j * np.eye(4), (1, 4)).apply(torch.ones(1, 1, 4)),
            "takes complex images",
        ),
    ]
    for wrong, words in cases:
        with pytest.raises((ValueError, TypeError), match=words) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_anything_with_an_adjoint_is_an_operator(generator: Generator) -> None:
    class Double(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Buffer(torch.tensor(2.0))

        def A(self, x: Tensor) -> Tensor:
            return self.factor * x

        def A_adjoint(self, y: Tensor) -> Tensor:
            return self.factor * y

    x = images((1, N, N), generator)
    A = as_operator(Double())
    assert isinstance(A, LinearOperator)
    assert torch.equal(A(x), 2 * x)
    assert_close(A.pinv(A(x)), x)
    assert torch.equal(A.to(torch.device("cpu"))(x), 2 * x)
    assert as_operator(A) is A
    blur = as_operator(physics.BlurFFT((1, N, N), kernel()))
    assert blur.image_shape == (1, N, N)


def test_the_bridge_imports_neither_library() -> None:
    import subprocess

    code = (
        "import sys, invsolve.operators.bridge; "
        "sys.exit('deepinv' in sys.modules or 'scipy.sparse' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["blur", "mri", "parallel beam"])
def test_scipy_sees_the_same_operator(name: str, generator: Generator) -> None:
    import scipy.sparse.linalg

    linalg: Any = scipy.sparse.linalg
    A, shape = OURS[name]
    S = to_scipy(A, shape, torch.float64)
    x = images(shape, generator).double()
    y = A(x)
    flat = torch.view_as_real(y) if y.is_complex() else y
    np.testing.assert_allclose(S @ x.flatten(1).numpy().T, flat.flatten(1).numpy().T)
    v = flat[0].flatten().numpy()
    np.testing.assert_allclose(
        S.rmatvec(v), A.adjoint(y)[0].flatten().numpy(), atol=1e-9
    )
    largest = linalg.svds(S, 1, return_singular_vectors=False)
    like = torch.zeros(1, *shape, dtype=torch.float64)
    assert float(largest[0]) == pytest.approx(A.norm(like), rel=1e-3)


def test_a_complex_matrix_takes_complex_images(generator: Generator) -> None:
    x = images((1, N, N), generator).to(torch.complex128)
    S = to_scipy(ops.Fourier(), (1, N, N), torch.complex128)
    F = from_scipy(S, (1, N, N), (1, N, N))
    assert_close(F(x), ops.Fourier()(x))
    assert_close(F.adjoint(x.conj()), ops.Fourier().adjoint(x.conj()))
    real = F @ ops.RealImage()
    assert_close(real(x.real), ops.Fourier()(x.real + 0j))


def test_sparse_matrices_and_flat_measurements(generator: Generator) -> None:
    import scipy.sparse

    M = scipy.sparse.random_array(
        (5, N * N), density=0.3, rng=np.random.default_rng(0), dtype=np.float32
    )
    A, x = from_scipy(M, (1, N, N)), images((1, N, N), generator)
    y = A(x)
    assert A.measurement_shape == (5,)
    assert_close(y, x.flatten(1) @ torch.from_numpy(M.toarray()).T)
    assert_close(A(A.pinv(y)), y, rtol=1e-3, atol=1e-3)


def test_pylops_speaks_scipy(generator: Generator) -> None:
    pylops = pytest.importorskip("pylops")
    A = from_scipy(
        pylops.FirstDerivative((N, N), axis=0, kind="forward"), (1, N, N), (1, N, N)
    )
    x = images((1, N, N), generator).double()
    expected = torch.zeros_like(x)
    expected[:, :, :-1] = x[:, :, 1:] - x[:, :, :-1]
    assert_close(A(x), expected)
    assert ops.dottest(A, x, x.flip(0)) < 1e-12
