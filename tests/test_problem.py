"""The inverse problem: misfits, whitening, and the prior's range."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import InverseProblem, operators as ops
from invsolve.counting import Tally, counted
from invsolve.priors import AffineMap
from invsolve.random import Randomness

float64 = torch.float64
SHAPE = (3, 1, 6, 8)
BEAM = ops.ParallelBeam((6, 8), torch.tensor([0.0, 0.7, 1.5, 2.3]), detectors=10)


class Square(ops.Operator):
    def apply(self, x: Tensor) -> Tensor:
        return x**2


def image(g: Generator) -> Tensor:
    return torch.rand(SHAPE, dtype=float64, generator=g)


def problem(A: ops.Operator, noise: ops.Noise, g: Generator) -> InverseProblem:
    return InverseProblem(noise.sample(A(image(g)), generator=g), A, noise)


def gaussian(g: Generator) -> InverseProblem:
    return problem(BEAM, ops.GaussianNoise(0.3), g)


def transmission(g: Generator) -> InverseProblem:
    return problem(0.2 * BEAM, ops.TransmissionNoise(1e3), g)


def poisson(g: Generator) -> InverseProblem:
    return problem(BEAM, ops.PoissonNoise(0.01), g)


def mri(g: Generator) -> InverseProblem:
    mask = ops.Mask.random((6, 8), 0.6, generator=g)
    A = mask @ ops.Fourier() @ ops.RealImage()
    return problem(A, ops.GaussianNoise(0.3), g)


def nonlinear(g: Generator) -> InverseProblem:
    return problem(Square(), ops.GaussianNoise(0.3), g)


def counted_light(g: Generator) -> InverseProblem:
    """Photons of a nonlinear measurement: its range may have an offset all the same."""
    return problem(Square() @ ops.Mask(1 + image(g)[0]), ops.TransmissionNoise(1e3), g)


def sigma_of_each(g: Generator) -> InverseProblem:
    """A σ for every ray."""
    return problem(BEAM, ops.GaussianNoise(0.1 + torch.rand(4, 10, generator=g)), g)


Make = Callable[[Generator], InverseProblem]
LINEAR: list[Make] = [gaussian, transmission, poisson, mri, sigma_of_each]
NONLINEAR: list[Make] = [nonlinear, counted_light]
PROBLEMS: list[Make] = [*LINEAR, *NONLINEAR]


def dense(A: ops.LinearOperator) -> Tensor:
    eye = torch.eye(48, dtype=float64).reshape(-1, 1, 6, 8)
    columns = [real(A.apply(x.expand(SHAPE))) for x in eye.split(1)]
    return torch.stack(columns, dim=-1)  # one matrix for each item


def real(t: Tensor) -> Tensor:
    return (torch.view_as_real(t) if t.is_complex() else t).flatten(1)


@pytest.mark.parametrize("make", PROBLEMS)
def test_the_misfit_is_that_of_the_measured(make: Make, generator: Generator) -> None:
    p = make(generator)
    x = image(generator)
    assert_close(p.misfit(x), p.noise.nll(p.y, p.operator(x)))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(p.misfit(leaf).sum(), leaf)
    assert_close(p.misfit_grad(x), grad)


@pytest.mark.parametrize("make", LINEAR)
def test_whitened_is_least_squares_with_unit_noise(
    make: Make, generator: Generator
) -> None:
    p = make(generator)
    A, y = p.whitened()
    x = image(generator)
    weight = torch.as_tensor(p.noise.precision(p.y))
    expected = weight * (p.linear(x) - p.y).abs().square()
    assert_close((A(x) - y).abs().square(), expected)
    again = InverseProblem(y, A, ops.GaussianNoise(1.0))
    assert_close(again.misfit(x), expected.flatten(1).sum(1) / 2)


@pytest.mark.parametrize("channels", [1, 2])
def test_weights_of_each_item_and_channel(channels: int, generator: Generator) -> None:
    y = 1 + torch.rand(3, channels, 6, 8, dtype=float64, generator=generator)
    A, white = InverseProblem(y, ops.Identity(), ops.PoissonNoise(0.1)).whitened()
    assert_close(A(y), white)
    A.check_measurements(white)


def test_whitened_gaussian_misfits_are_the_misfit(generator: Generator) -> None:
    for p in (gaussian(generator), mri(generator)):
        A, y = p.whitened()
        x = image(generator)
        white = (A(x) - y).abs().square().flatten(1).sum(1) / 2
        assert_close(white, p.misfit(x))


@pytest.mark.parametrize("make", LINEAR)
@pytest.mark.parametrize("rho", [0.5, torch.tensor([0.1, 1.0, 20.0])], ids=type)
def test_prox_is_the_dense_solution(
    make: Make, rho: float | Tensor, generator: Generator
) -> None:
    p = make(generator)
    v = image(generator)
    r = rho.double()[:, None, None, None] if isinstance(rho, Tensor) else rho
    got = p.prox(v, r, max_steps=1000, rtol=1e-13)
    M = dense(p.linear)
    weight = torch.as_tensor(p.noise.precision(p.y), dtype=float64)
    parts = 2 if p.y.is_complex() else 1
    W = weight.expand(p.y.shape).flatten(1).repeat_interleave(parts, dim=1)
    r = torch.as_tensor(rho, dtype=float64).expand(3)
    normal = M.mT @ (W[..., None] * M) + r[:, None, None] * torch.eye(48)
    b = (M.mT @ (W * real(p.y))[..., None])[..., 0] + r[:, None] * v.flatten(1)
    expected = torch.linalg.solve(normal, b[..., None])[..., 0]
    assert_close(got.flatten(1), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "map"),
    [(make, AffineMap(0.25, 0.0)) for make in LINEAR]
    + [(make, AffineMap(2.0, -0.7)) for make in (gaussian, mri, *NONLINEAR)]
    + [(make, AffineMap(1.0, 0.5)) for make in (gaussian, mri, *NONLINEAR)]
    + [(make, AffineMap(1.0, 0.0)) for make in PROBLEMS],
)
def test_the_misfit_of_u_is_the_misfit_of_x(
    make: Make, map: AffineMap, generator: Generator
) -> None:
    p = make(generator)
    x = image(generator)
    u = map.inverse(x)
    seen = p.seen_through(map)
    assert_close(seen.misfit(u), p.misfit(x))
    assert_close(seen.misfit_grad(u), map.scale * p.misfit_grad(x))


def test_counts_cannot_be_shifted(generator: Generator) -> None:
    with pytest.raises(ValueError, match="needs GaussianNoise, not TransmissionNoise"):
        transmission(generator).seen_through(AffineMap(0.5, 0.5))


def test_a_nonlinear_problem_says_what_can_solve_it(generator: Generator) -> None:
    p = nonlinear(generator)
    x = image(generator)
    for ask in (p.whitened, lambda: p.prox(x, 1.0, max_steps=1, rtol=0.0)):
        with pytest.raises(
            ValueError, match=r"needs a linear operator.*use reddiff.*or dps"
        ):
            ask()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_measurements_that_are_not_finite_are_counted(bad: float) -> None:
    y = torch.zeros(1, 1, 4, 10)
    y[0, 0, 1, 2:5] = bad
    with pytest.raises(ValueError, match="3 of 40 measurements are NaN or infinite"):
        InverseProblem(y, BEAM, ops.GaussianNoise(1.0))


@pytest.mark.parametrize("shape", [(1, 1, 4, 9), (1, 1, 10, 4), (4, 10)], ids=str)
def test_measurements_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expects measurements .* 4, 10\), got"):
        InverseProblem(torch.zeros(shape), BEAM, ops.GaussianNoise(1.0))


def test_whole_numbers_are_refused() -> None:
    y = torch.zeros(1, 1, 4, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must be floating point, got torch\.int64"):
        InverseProblem(y, BEAM, ops.GaussianNoise(1.0))


@pytest.mark.parametrize("make", PROBLEMS)
def test_items_are_problems_of_their_own(make: Make, generator: Generator) -> None:
    p = make(generator)
    x, index = image(generator), torch.tensor([2, 0, 0, 1])
    assert_close(p.items(index).misfit(x[index]), p.misfit(x)[index])
    assert_close(p.items(index).misfit_grad(x[index]), p.misfit_grad(x)[index])


BEAM_OF_MASKED = ops.ParallelBeam((6, 8), torch.linspace(0, 2.5, 6), detectors=8)


def each_its_own(g: Generator) -> ops.Mask:
    """A mask for each item."""
    return ops.Mask((torch.rand(SHAPE, generator=g) < 0.5).double())


OF_EACH: dict[str, Callable[[ops.Mask], ops.Operator]] = {
    "mask": lambda m: m,
    "scaled": lambda m: 2.0 * m,
    "k-space": lambda m: m @ ops.Fourier() @ ops.RealImage(),
    "nonlinear": lambda m: Square() @ m,
    "channels": lambda m: ops.OnChannels(m, (0,), 1),
    "stack": lambda m: ops.Stack([m, ops.Identity()], SHAPE[1:]),
    "counted": lambda m: counted(m, Tally()),
    "counted, nonlinear": lambda m: counted(Square() @ m, Tally()),
}


@pytest.mark.parametrize("of", OF_EACH.values(), ids=OF_EACH)
def test_items_keep_their_own_masks(
    of: Callable[[ops.Mask], ops.Operator], generator: Generator
) -> None:
    A, x, index = of(each_its_own(generator)), image(generator), torch.tensor([2, 0, 2])
    y = A.apply(x)
    p = InverseProblem(y, A, ops.GaussianNoise(0.3))
    assert_close(p.items(index).operator.apply(x[index]), y[index])
    one_for_all = of(ops.Mask(each_its_own(generator).mask[0]))
    assert one_for_all.items(index, y.ndim) is one_for_all


def test_the_norm_is_the_largest_of_all_items(generator: Generator) -> None:
    A, like = each_its_own(generator) @ BEAM_OF_MASKED, image(generator)
    each = [
        A.items(torch.tensor([i]), 4).norm(like[:1], max_steps=2000, rtol=1e-12)
        for i in range(3)
    ]
    assert A.norm(like, max_steps=2000, rtol=1e-12) == pytest.approx(
        max(each), rel=1e-6
    )


def test_channels_of_volumes_are_no_items(generator: Generator) -> None:
    mask = ops.Mask(torch.rand(2, 3, 4, 4, generator=generator))
    volumes = torch.ones(3, 2, 3, 4, 4)
    p = InverseProblem(mask(volumes), mask, ops.GaussianNoise(0.3))
    assert p.items(torch.tensor([0])).operator is mask


def test_a_mask_for_each_of_other_items_is_refused(generator: Generator) -> None:
    y = image(generator)[:2]
    with pytest.raises(
        ValueError, match="a Mask of 3 items was given measurements of 2"
    ):
        InverseProblem(y, each_its_own(generator), ops.GaussianNoise(0.3))


def test_moving_to_a_device_changes_nothing(generator: Generator) -> None:
    p = mri(generator)
    moved, x = p.to(torch.device("cpu")), image(generator)
    assert_close(moved.misfit(x), p.misfit(x))


@final
@dataclass(frozen=True)
class Movable(ops.Noise):
    """Noise that says where it is."""

    place: str = "nowhere"

    def sample(self, z: Tensor, *, generator: Randomness) -> Tensor:
        return z

    def nll(self, y: Tensor, z: Tensor) -> Tensor:
        return (y - z).square().flatten(1).sum(1)

    def nll_grad(self, y: Tensor, z: Tensor) -> Tensor:
        return 2 * (z - y)

    def precision(self, y: Tensor) -> float:
        return 2.0

    def to(self, device: torch.device) -> "Movable":
        return Movable(device.type)


def test_the_noise_moves_with_the_problem() -> None:
    p = InverseProblem(torch.zeros(1, 1, 4, 10), BEAM, Movable())
    assert p.to(torch.device("cpu")).noise == Movable("cpu")


def test_what_was_measured_of_nothing_is_set_to_zero(generator: Generator) -> None:
    """Hidden pixels and rays that miss the image, but nothing that A reaches."""
    for p in (gaussian(generator), mri(generator)):
        x = image(generator)
        rows = dense(p.linear).abs().sum((0, 2)) > 0
        if p.y.is_complex():
            rows = rows.reshape(-1, 2).any(1)
        reached = rows.reshape(p.y.shape[1:])
        assert not reached.all()
        expected = torch.where(reached, p.y, 0)
        assert torch.equal(p.without_hidden(x).y, expected)
    p = nonlinear(generator)
    assert p.without_hidden(image(generator)) is p


@pytest.mark.parametrize("make", PROBLEMS)
def test_a_problem_knows_its_images(make: Make, generator: Generator) -> None:
    p = make(generator)
    like = p.image_like()
    assert like.shape == SHAPE and like.dtype == float64
    assert not like.any()
    assert p.seen_through(AffineMap(2.0, 0.0)).image_like().shape == SHAPE


class Duck:
    """An operator of another library: A and A_adjoint, and nothing else."""

    def A(self, x: Tensor) -> Tensor:
        return 2 * x.roll(1, -1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return 2 * y.roll(-1, -1)


def test_anything_with_an_adjoint_is_an_operator(generator: Generator) -> None:
    x, y = torch.randn(2, *SHAPE, dtype=float64, generator=generator)
    duck = Duck()
    p = InverseProblem(y, duck, ops.GaussianNoise(0.5))
    assert isinstance(p.operator, ops.LinearOperator)
    assert_close(p.misfit_grad(x), duck.A_adjoint(duck.A(x) - y) / 0.25)
    got = p.prox(x, 1.0, max_steps=10, rtol=1e-13)
    assert_close(got, (duck.A_adjoint(y) / 0.25 + x) / (4 / 0.25 + 1))
    assert p.items(torch.tensor([1])).operator is p.operator


def test_what_has_none_is_no_operator() -> None:
    nothing = torch.nn.Identity()
    with pytest.raises(TypeError, match="Identity is no operator"):
        InverseProblem(torch.zeros(SHAPE), nothing, ops.GaussianNoise(1.0))
