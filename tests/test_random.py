"""Randomness that is passed in, one stream for each item if wanted."""

import pytest
import torch
from torch import Generator, Tensor

from invsolve.random import draw, poisson, randn_like, spawn


def seeded(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(s) for s in seeds]


def test_normal_moments(generator: Generator) -> None:
    n, k = 40_000, 4
    x = randn_like(torch.empty(n, 1, dtype=torch.float64), generator)
    assert x.dtype == torch.float64
    assert abs(float(x.mean())) < k / n**0.5
    assert abs(float(x.var()) - 1) < k * (2 / n) ** 0.5


def test_complex_numbers_have_unit_variance(generator: Generator) -> None:
    n, k = 40_000, 4
    z = randn_like(torch.empty(n, 1, dtype=torch.complex128), generator)
    for part in (z.real, z.imag):
        assert abs(float(part.square().mean()) - 0.5) < k * 0.5 * (2 / n) ** 0.5
    assert abs(float((z.real * z.imag).mean())) < k * 0.5 / n**0.5


def test_poisson_moments(generator: Generator) -> None:
    n, k, rate = 40_000, 4, 7.0
    counts = poisson(torch.full((n, 1), rate, dtype=torch.float64), generator)
    assert abs(float(counts.mean()) - rate) < k * (rate / n) ** 0.5
    assert abs(float(counts.var()) - rate) < k * ((2 * rate**2 + rate) / n) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_an_item_s_noise_is_its_own(dtype: torch.dtype) -> None:
    x = torch.empty(3, 2, 5, dtype=dtype)
    batch = randn_like(x, seeded(1, 2, 3))
    for i in range(3):
        assert torch.equal(batch[i : i + 1], randn_like(x[:1], seeded(i + 1)))
    assert not torch.equal(batch[0], batch[1])


def test_the_global_state_is_left_alone(generator: Generator) -> None:
    before = torch.get_rng_state()
    x = randn_like(torch.empty(3, 4), generator)
    poisson(x.abs(), spawn(generator, 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_as_many_generators_as_items(n: int) -> None:
    def zeros(like: Tensor, g: Generator) -> Tensor:
        return torch.zeros_like(like)

    with pytest.raises(ValueError, match=f"{n} generators were given for a batch of 3"):
        draw(zeros, torch.ones(3, 2), seeded(*range(n)))
    assert torch.equal(
        draw(zeros, torch.ones(n, 2), seeded(*range(n))), torch.zeros(n, 2)
    )


@pytest.mark.parametrize("n", [1, 3, 20])
def test_streams_do_not_depend_on_how_many_there_are(n: int) -> None:
    x = torch.empty(1, 8)
    some = spawn(seeded(5)[0], n)
    many = spawn(seeded(5)[0], 40)
    first = [randn_like(x, g) for g in some]
    assert len(some) == n
    assert all(
        torch.equal(a, randn_like(x, g)) for a, g in zip(first, many, strict=False)
    )


def test_streams_differ(generator: Generator) -> None:
    x = torch.empty(1, 8)
    streams = spawn(generator, 20) + spawn(generator, 20)
    assert len({tuple(randn_like(x, g)[0].tolist()) for g in streams}) == 40
