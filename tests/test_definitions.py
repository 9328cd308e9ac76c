"""Every operator against its definition: what the algebraic laws cannot tell."""

from math import pi

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import operators as ops


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (5, 8)], ids=str)
class TestFourier:
    def test_a_constant_goes_to_the_middle(self, shape: tuple[int, int]) -> None:
        h, w = shape
        expected = torch.zeros(1, 1, h, w, dtype=torch.complex128)
        expected[0, 0, h // 2, w // 2] = (h * w) ** 0.5
        assert_close(ops.Fourier()(torch.ones_like(expected)), expected)
        assert_close(ops.Fourier().adjoint(torch.ones_like(expected)), expected)

    def test_a_plane_wave_goes_to_its_frequency(self, shape: tuple[int, int]) -> None:
        h, w = shape
        row = torch.arange(h)[:, None] - h // 2
        column = torch.arange(w)[None, :] - w // 2
        phase = 2 * pi * (2 * row.double() / h - column.double() / w)
        wave = torch.polar(torch.ones_like(phase), phase)[None, None]
        expected = torch.zeros_like(wave)
        expected[0, 0, h // 2 + 2, w // 2 - 1] = (h * w) ** 0.5
        assert_close(ops.Fourier()(wave), expected)

    def test_energy_is_kept(self, shape: tuple[int, int], generator: Generator) -> None:
        x = torch.randn(1, 1, *shape, dtype=torch.complex128, generator=generator)
        y = ops.Fourier()(x)
        assert_close(y.norm(), x.norm())
        assert_close(ops.Fourier().adjoint(y), x)


def test_two_channels_are_real_and_imaginary_part(generator: Generator) -> None:
    x = torch.randn(2, 2, 3, 4, generator=generator)
    y = ops.ComplexChannels()(x)
    assert torch.equal(y.real, x[:, :1])
    assert torch.equal(y.imag, x[:, 1:])
    assert torch.equal(ops.RealImage()(x), x + 0j)


@pytest.mark.parametrize(
    ("w", "acceleration", "centre"),
    [(64, 4.0, 0.08), (65, 4.0, 0.08), (64, 2.0, 0.1), (30, 3.0, 0.1), (64, 1.0, 0.5)],
)
def test_cartesian_keeps_the_centre_and_so_many_columns(
    w: int, acceleration: float, centre: float, generator: Generator
) -> None:
    def columns() -> Tensor:
        A = ops.Mask.cartesian((8, w), acceleration, centre, generator=generator)
        mask = A.mask
        assert torch.equal(mask, mask[:1].expand_as(mask))
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        return mask[0]

    draws = torch.stack([columns() for _ in range(50)])
    middle = round(w * centre)
    below, above = middle // 2, (middle - 1) // 2
    assert (draws.sum(1) == round(w / acceleration)).all()
    assert (draws[:, w // 2 - below : w // 2 + above + 1] == 1).all()
    assert (draws.sum(0) > 0).all()  # every column has its chance


@pytest.mark.parametrize(("acceleration", "centre"), [(8.0, 0.5), (0.5, 0.1)])
def test_impossible_cartesian_masks_are_refused(
    acceleration: float, centre: float, generator: Generator
) -> None:
    with pytest.raises(ValueError, match="lower the acceleration or the centre"):
        ops.Mask.cartesian((8, 32), acceleration, centre, generator=generator)
