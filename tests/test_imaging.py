"""The operators of photographs against their definitions."""

from math import exp, pi

import jaxtyping
import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from invsolve import operators as ops
from invsolve.operators import kernels
from invsolve.operators.base import LinearOperator
from invsolve.operators.blur import Crop, Edges, Pad, SpatialBlur
from invsolve.operators.colour import Bayer, Greyscale, Pattern
from invsolve.operators.resample import Decimate, Separable
from invsolve.operators.sensing import CompressedSensing, walsh_hadamard
from invsolve.operators.stack import OnChannels, Stack, on_channels

float64 = torch.float64
NUMPY = {"reflect": "reflect", "replicate": "edge", "constant": "constant"}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the types' checks, which would be the first to refuse a word."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def point(shape: tuple[int, int], row: int, column: int) -> Tensor:
    x = torch.zeros(1, 1, *shape, dtype=float64)
    x[0, 0, row, column] = 1
    return x


def moments(k: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel's mean and covariance, x to the right and y up from the middle pixel."""
    k, half = k.double(), len(k) // 2
    t = torch.arange(-half, half + 1, dtype=float64)
    r = torch.stack(torch.broadcast_tensors(t[None, :], -t[:, None]))
    mean = (k * r).sum((1, 2))
    return mean, torch.einsum("hw,ihw,jhw->ij", k, r, r) - torch.outer(mean, mean)


class TestBlur:
    @pytest.mark.parametrize("edges", ["circular", *NUMPY])
    @pytest.mark.parametrize("shape", [(3, 5), (4, 2), (1, 1), (7, 9)], ids=str)
    def test_a_point_blurs_to_the_kernel(
        self, shape: tuple[int, int], edges: Edges, generator: Generator
    ) -> None:
        kernel = torch.randn(shape, dtype=float64, generator=generator)
        top, left = 8 - shape[0] // 2, 10 - shape[1] // 2
        expected = torch.zeros(1, 1, 16, 20, dtype=float64)
        expected[0, 0, top : top + shape[0], left : left + shape[1]] = kernel
        A = ops.Blur.from_kernel(kernel, (16, 20), edges)
        assert_close(A(point((16, 20), 8, 10)), expected)

    def test_it_wraps_around_the_edges(self) -> None:
        kernel = torch.tensor([[1.0, 2.0, 4.0]], dtype=float64)
        row = ops.Blur.from_kernel(kernel, (5, 6))(point((5, 6), 0, 5))[0, 0, 0]
        assert_close(row, torch.tensor([4.0, 0, 0, 0, 1, 2], dtype=float64))

    @pytest.mark.parametrize("edges", NUMPY)
    @pytest.mark.parametrize("size", [(5, 3), (4, 6), (2, 1)], ids=str)
    def test_beyond_the_edges_it_is_scipy_s_convolution(
        self, edges: Edges, size: tuple[int, int], generator: Generator
    ) -> None:
        modes = {"reflect": "mirror", "replicate": "nearest", "constant": "constant"}
        import scipy.ndimage

        kernel = torch.randn(size, dtype=float64, generator=generator)
        x = torch.randn(7, 8, dtype=float64, generator=generator)
        expected = scipy.ndimage.convolve(x.numpy(), kernel.numpy(), mode=modes[edges])
        y = ops.Blur.from_kernel(kernel, (7, 8), edges)(x[None, None])[0, 0]
        assert_close(y, torch.from_numpy(expected))

    @pytest.mark.parametrize("size", [(5, 3), (4, 6)], ids=str)
    def test_valid_leaves_what_the_edges_do_not_reach(
        self, size: tuple[int, int], generator: Generator
    ) -> None:
        import scipy.signal

        kernel = torch.randn(size, dtype=float64, generator=generator)
        x = torch.randn(9, 8, dtype=float64, generator=generator)
        y = ops.Blur.from_kernel(kernel, (9, 8), "valid")(x[None, None])[0, 0]
        expected = scipy.signal.convolve2d(x.numpy(), kernel.numpy(), mode="valid")
        assert_close(y, torch.from_numpy(expected))

    def test_every_channel_has_its_kernel(self, generator: Generator) -> None:
        k = torch.randn(3, 4, 3, dtype=float64, generator=generator)
        x = torch.randn(2, 3, 8, 9, dtype=float64, generator=generator)
        y = ops.Blur.from_kernel(k, (8, 9))(x)
        for c in range(3):
            one = ops.Blur.from_kernel(k[c], (8, 9))
            assert_close(y[:, c : c + 1], one(x[:, c : c + 1]))

    def test_a_complex_image_blurs_part_by_part(self, generator: Generator) -> None:
        A = ops.Blur.gaussian(1.0, (8, 9))
        x = torch.randn(2, 1, 8, 9, dtype=torch.complex128, generator=generator)
        assert_close(A(x), torch.complex(A(x.real), A(x.imag)))

    @pytest.mark.parametrize("width", [0.8, 1.5, 3.0])
    def test_a_gaussian_blurs_by_its_width(self, width: float) -> None:
        n = 41
        k = ops.Blur.gaussian(width, (n, n))(point((n, n), n // 2, n // 2))[0, 0]
        _, cov = moments(k)
        assert float(k.sum()) == pytest.approx(1, rel=1e-6)
        assert_close(cov, width**2 * torch.eye(2, dtype=float64), rtol=5e-3, atol=1e-6)
        ratio = k[n // 2 + 1, n // 2 + 2] / k[n // 2, n // 2]
        assert float(ratio.log()) == pytest.approx(-5 / (2 * width**2), rel=1e-4)

    @pytest.mark.parametrize("edges", ["circular", "valid", *NUMPY])
    def test_a_kernel_larger_than_the_image_is_refused(self, edges: Edges) -> None:
        with pytest.raises(ValueError, match=r"kernel \(9×3\) is larger than the im"):
            ops.Blur.from_kernel(torch.ones(9, 3), (8, 8), edges)

    def test_kernels_that_make_no_sense_are_refused(self) -> None:
        with pytest.raises(ValueError, match="width must be > 0"):
            ops.Blur.gaussian(0.0, (8, 8))
        with pytest.raises(ValueError, match="kernel of zeros measures nothing"):
            ops.Blur.from_kernel(torch.zeros(3, 3), (8, 8))
        with pytest.raises(ValueError, match="NaN or infinite"):
            ops.Blur.from_kernel(torch.tensor([[1.0, torch.nan]]), (8, 8))
        with pytest.raises(ValueError, match="DFT of a real kernel"):
            ops.Blur(torch.randn(4, 5, dtype=torch.complex64))

    @pytest.mark.usefixtures("unchecked")
    def test_unknown_edges_are_refused(self) -> None:
        unknown = "mirror"
        with pytest.raises(ValueError, match="unknown edges 'mirror': choose one of c"):
            ops.Blur.from_kernel(torch.ones(3, 3), (8, 8), unknown)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="unknown edges 'mirror': choose one of c"):
            Pad((8, 8), ((1, 1), (1, 1)), unknown)  # pyright: ignore[reportArgumentType]


class TestMargins:
    margin = ((2, 3), (1, 4))

    @pytest.mark.parametrize("edges", [*NUMPY, "circular"])
    def test_a_margin_is_numpy_s(self, edges: Edges, generator: Generator) -> None:
        import numpy as np

        x = torch.randn(5, 6, dtype=float64, generator=generator)
        mode = {**NUMPY, "circular": "wrap"}[edges]
        expected = torch.from_numpy(np.pad(x.numpy(), self.margin, mode))  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert edges != "valid"
        assert torch.equal(
            Pad((5, 6), self.margin, edges)(x[None, None])[0, 0], expected
        )

    def test_a_crop_takes_the_margin_off(self, generator: Generator) -> None:
        x = torch.randn(2, 3, 5, 6, dtype=float64, generator=generator)
        y = Pad((5, 6), self.margin, "reflect")(x)
        assert torch.equal(Crop((10, 11), self.margin)(y), x)

    def test_impossible_margins_are_refused(self) -> None:
        with pytest.raises(ValueError, match="a reflect margin of at most 4, got 5"):
            Pad((5, 9), ((0, 5), (0, 0)), "reflect")
        with pytest.raises(ValueError, match="a circular margin of at most 5, got 6"):
            Pad((9, 5), ((0, 0), (6, 0)), "circular")
        with pytest.raises(ValueError, match="≥ 0 pixels on every side"):
            Pad((5, 5), ((0, -1), (0, 0)))
        with pytest.raises(ValueError, match="leaves nothing"):
            Crop((5, 5), ((2, 3), (0, 0)))


class TestSpatialBlur:
    shape = (21, 20)

    @pytest.mark.parametrize("edges", ["circular", "valid", *NUMPY])
    def test_equal_kernels_are_one_blur(
        self, edges: Edges, generator: Generator
    ) -> None:
        k = torch.rand(4, 3, dtype=float64, generator=generator)
        x = torch.randn(2, 3, *self.shape, dtype=float64, generator=generator)
        A = SpatialBlur.from_kernels(k.expand(3, 2, 4, 3), self.shape, edges)
        assert_close(A(x), ops.Blur.from_kernel(k, self.shape, edges)(x))

    @pytest.mark.parametrize("edges", ["circular", *NUMPY])
    def test_a_point_at_a_centre_spreads_by_its_kernel(
        self, edges: Edges, generator: Generator
    ) -> None:
        k = torch.rand(3, 4, 3, 3, dtype=float64, generator=generator)
        A = SpatialBlur.from_kernels(k, (21, 20), edges)  # regions of 7 × 5 pixels
        for i in range(3):
            for j in range(4):
                row, column = 7 * i + 3, 5 * j + 2
                y = A(point(self.shape, row, column))[0, 0]
                got = y[row - 1 : row + 2, column - 1 : column + 2]
                assert_close(got, k[i, j])
                assert_close(y.sum(), k[i, j].sum())

    def test_between_centres_the_kernels_are_interpolated(
        self, generator: Generator
    ) -> None:
        k = torch.rand(1, 4, 3, 3, dtype=float64, generator=generator)
        A = SpatialBlur.from_kernels(k, self.shape)
        y = A(point(self.shape, 10, 9))[0, 0]  # ⅖ of the way from column 7 to 12
        assert_close(y[9:12, 8:11], 0.6 * k[0, 1] + 0.4 * k[0, 2])

    def test_kernels_without_places_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no 3×9 regions: give fewer kernels"):
            SpatialBlur.from_kernels(torch.ones(3, 9, 1, 1), (8, 8))
        with pytest.raises(ValueError, match="larger than the image"):
            SpatialBlur.from_kernels(torch.ones(2, 2, 9, 1), (8, 8))
        otf = torch.ones(2, 4, 4, dtype=torch.complex64)
        with pytest.raises(ValueError, match="sum to 1 at every pixel"):
            SpatialBlur(otf, torch.ones(2, 4, 4))
        weights = torch.stack([torch.full((4, 4), 1.5), torch.full((4, 4), -0.5)])
        with pytest.raises(ValueError, match="≥ 0 and sum to 1"):
            SpatialBlur(otf, weights)

    @pytest.mark.usefixtures("unchecked")
    def test_weights_of_another_shape_are_refused(self) -> None:
        otf = torch.ones(2, 4, 4, dtype=torch.complex64)
        with pytest.raises(ValueError, match="one weight map for each kernel"):
            SpatialBlur(otf, torch.ones(1, 4, 4))


class TestKernels:
    def test_all_are_odd_squares_that_sum_to_1(self, generator: Generator) -> None:
        for k in (
            kernels.gaussian(0.3),
            kernels.gaussian((3.0, 1.0), 0.4),
            kernels.disk(0.2),
            kernels.disk(4.7),
            kernels.line(0.1, 1.0),
            kernels.line(12.0, 2.0),
            kernels.motion(9.0, generator=generator),
        ):
            assert k.shape[0] == k.shape[1]
            assert len(k) % 2 == 1
            assert (k >= 0).all()
            assert float(k.double().sum()) == pytest.approx(1, abs=1e-6)

    def test_a_gaussian_lies_along_its_angle(self) -> None:
        angle = torch.tensor(0.5, dtype=float64)
        mean, cov = moments(kernels.gaussian((4.0, 2.0), float(angle)))
        u = torch.stack([angle.cos(), angle.sin()])
        v = torch.stack([-angle.sin(), angle.cos()])
        expected = 16 * torch.outer(u, u) + 4 * torch.outer(v, v)
        assert_close(cov, expected, rtol=5e-3, atol=1e-3)
        assert_close(mean, torch.zeros(2, dtype=float64), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("radius", [0.3, 0.5, 1.0, 2.5, 6.2])
    def test_a_disk_is_flat_and_as_wide_as_its_radius(self, radius: float) -> None:
        k = kernels.disk(radius).double()
        assert len(k) == max(2 * int(radius + 0.4999) + 1, 1)
        if radius >= 1:
            area = 1 / float(k[len(k) // 2, len(k) // 2])  # the middle is all inside
            assert area == pytest.approx(pi * radius**2, rel=5e-3)
        if radius >= 2:
            _, cov = moments(k)  # a disk's R²/4, and by Sheppard what pixels add
            expected = (radius**2 / 4 + 1 / 12) * torch.eye(2, dtype=float64)
            assert_close(cov, expected, rtol=0.05, atol=1e-6)
        assert_close(k, k.T)
        assert_close(k, k.flip(0))

    def test_a_line_of_three_pixels_by_hand(self) -> None:
        row = torch.tensor([1 / 8, 7 / 8, 1, 7 / 8, 1 / 8]) / 3
        k = kernels.line(3.0, 0.0)
        assert_close(k.sum(0), row, rtol=0, atol=1e-3)
        assert_close(k[2], row, rtol=0, atol=1e-3)
        assert_close(kernels.line(3.0, pi / 2), k.T, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("angle", [0.3, 1.2, 2.5])
    def test_a_line_has_its_length_and_angle(self, angle: float) -> None:
        length = 24.0
        mean, cov = moments(kernels.line(length, angle))
        values, vectors = torch.linalg.eigh(cov)
        assert_close(mean, torch.zeros(2, dtype=float64), rtol=0, atol=1e-5)
        assert float(values[1]) == pytest.approx(length**2 / 12, rel=0.01)
        assert float(values[0]) < 0.25
        slope = torch.atan2(vectors[1, 1], vectors[0, 1]) % pi
        assert float(slope) == pytest.approx(angle, abs=0.01)

    def test_a_shake_without_turns_is_a_line(self, generator: Generator) -> None:
        state = generator.get_state()
        k = kernels.motion(9.0, turn=0.0, generator=generator)
        angle = 2 * pi * torch.rand(1, generator=generator.set_state(state))
        assert_close(k, kernels.line(9.0, float(angle)), rtol=0, atol=1e-5)

    def test_a_shake_has_the_extent_of_a_wandering_path(
        self, generator: Generator
    ) -> None:
        # The mean squared radius of a path whose direction is a Brownian motion, as
        # for polymers (Benoit & Doty 1953), with ω²/2 = L / persistence length.
        length, turn, draws = 20.0, 3.0, 400
        a = turn**2 / 2
        radius2 = 1 / (3 * a) - 1 / a**2 + 2 / a**3 - 2 / a**4 * (1 - exp(-a))
        got = []
        for _ in range(draws):
            k = kernels.motion(length, turn, generator=generator)
            mean, cov = moments(k)
            assert_close(mean, torch.zeros(2, dtype=float64), rtol=0, atol=1e-5)
            got.append(cov.trace() - 1 / 3)  # what the bilinear weights add
        mean, std = torch.stack(got).mean(), torch.stack(got).std()
        assert abs(float(mean) - radius2 * length**2) < 4 * std / draws**0.5  # k = 4

    def test_a_shake_is_its_generator_s(self) -> None:
        def draw(seed: int) -> Tensor:
            return kernels.motion(12.0, generator=Generator().manual_seed(seed))

        assert torch.equal(draw(0), draw(0))
        assert draw(0).shape != draw(1).shape or not torch.equal(draw(0), draw(1))

    def test_lengths_that_make_no_sense_are_refused(self, generator: Generator) -> None:
        for length in (0.0, -1.0, torch.inf, torch.nan):
            with pytest.raises(ValueError, match="length must be > 0 pixels"):
                kernels.line(length, 0.0)
            with pytest.raises(ValueError, match="length must be > 0 pixels"):
                kernels.motion(length, generator=generator)
            with pytest.raises(ValueError, match="radius must be > 0 pixels"):
                kernels.disk(length)
            with pytest.raises(ValueError, match="width must be > 0 pixels"):
                kernels.gaussian((1.0, length))
        with pytest.raises(ValueError, match="if its size is odd, got 4"):
            kernels.gaussian(1.0, size=4)


class TestDownsample:
    def test_it_is_the_mean_of_blocks(self, generator: Generator) -> None:
        x = torch.randn(2, 3, 6, 9, dtype=float64, generator=generator)
        y = ops.Downsample(3, (6, 9))(x)
        assert y.shape == (2, 3, 2, 3)
        assert_close(y[1, 2, 1, 0], x[1, 2, 3:6, 0:3].mean())
        assert_close(y[0, 1, 0, 2], x[0, 1, 0:3, 6:9].mean())

    @pytest.mark.parametrize("factor", [2, 3, 4])
    def test_bicubic_is_torch_s_up_to_the_edges(
        self, factor: int, generator: Generator
    ) -> None:
        shape = (6 * factor, 7 * factor)
        x = torch.randn(2, 3, *shape, dtype=float64, generator=generator)
        expected = torch.nn.functional.interpolate(
            x, size=(6, 7), mode="bicubic", antialias=True
        )
        y = ops.Downsample.bicubic(factor, shape)(x)
        assert_close(y, expected, rtol=0, atol=1e-12)

    def test_bicubic_s_rows_by_hand(self) -> None:
        # κ(¼), κ(¾), κ(5/4), κ(7/4) of Keys' cubic, halved by the factor of 2.
        cubic = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3], dtype=float64) / 256
        row = ops.Downsample.bicubic(2, (16, 16)).rows[3].double()
        assert_close(row[3:11], cubic)
        assert_close(row.sum(), torch.ones((), dtype=float64))

    @pytest.mark.parametrize("factor", [0, 4])
    def test_a_factor_that_does_not_divide_is_refused(self, factor: int) -> None:
        for make in (ops.Downsample, ops.Downsample.bicubic):
            with pytest.raises(ValueError, match="does not divide"):
                make(factor, (6, 8))
        with pytest.raises(ValueError, match="does not divide"):
            Decimate.from_kernel(torch.ones(3, 3), factor, (6, 8))

    def test_separable_is_two_matrices(self, generator: Generator) -> None:
        R, C = torch.randn(2, 4, 5, dtype=float64, generator=generator)
        x = torch.randn(2, 3, 5, 5, dtype=float64, generator=generator)
        expected = torch.einsum("ij,kl,bcjl->bcik", R, C, x)
        assert_close(Separable(R, C)(x), expected)

    def test_matrices_that_make_no_sense_are_refused(self) -> None:
        with pytest.raises(ValueError, match="matrix of zeros measures nothing"):
            Separable(torch.ones(2, 4), torch.zeros(2, 4))
        with pytest.raises(ValueError, match="NaN or infinite"):
            Separable(torch.full((2, 4), torch.nan), torch.ones(2, 4))

    def test_decimate_is_every_other_pixel_of_the_blur(
        self, generator: Generator
    ) -> None:
        k = torch.randn(3, 4, dtype=float64, generator=generator)
        x = torch.randn(2, 3, 6, 9, dtype=float64, generator=generator)
        y = Decimate.from_kernel(k, 3, (6, 9))(x)
        assert_close(y, ops.Blur.from_kernel(k, (6, 9))(x)[..., ::3, ::3])
        with pytest.raises(ValueError, match="larger than the image"):
            Decimate.from_kernel(k, 1, (6, 3))

    def test_decimating_a_box_is_the_mean_of_blocks(self, generator: Generator) -> None:
        x = torch.randn(2, 1, 8, 6, dtype=float64, generator=generator)
        box = torch.full((2, 2), 0.25, dtype=float64)
        y = Decimate.from_kernel(box, 2, (8, 6))(x)
        assert_close(y, ops.Downsample(2, (8, 6))(x))


class TestMask:
    def test_random_keeps_its_fraction(self, generator: Generator) -> None:
        n, keep = 100 * 100, 0.3
        kept = ops.Mask.random((100, 100), keep, generator=generator).mask.mean()
        assert abs(float(kept) - keep) < 4 * (keep * (1 - keep) / n) ** 0.5  # k = 4

    def test_masks_that_make_no_sense_are_refused(self, generator: Generator) -> None:
        with pytest.raises(ValueError, match="weights must be ≥ 0"):
            ops.Mask(torch.tensor([1.0, -0.5]))
        with pytest.raises(ValueError, match="weights must be ≥ 0"):
            ops.Mask(torch.tensor([1.0, torch.nan]))
        with pytest.raises(ValueError, match="weights must be finite"):
            ops.Mask(torch.tensor([1.0, torch.inf]))
        for keep in (0.0, 1.5):
            with pytest.raises(ValueError, match="fraction between 0 and 1"):
                ops.Mask.random((4, 4), keep, generator=generator)

    @pytest.mark.parametrize("corner", [(0, 0), (2, 3), (5, 5)])
    def test_a_box_is_hidden(self, corner: tuple[int, int]) -> None:
        (top, left), mask = corner, ops.Mask.box((8, 9), (3, 4), corner).mask
        expected = [
            [
                0.0 if top <= i < top + 3 and left <= j < left + 4 else 1.0
                for j in range(9)
            ]
            for i in range(8)
        ]
        assert mask.tolist() == expected

    def test_a_box_lies_in_the_middle_or_anywhere(self, generator: Generator) -> None:
        middle = ops.Mask.box((7, 8), (3, 2)).mask
        assert torch.equal(middle, middle.flip(0, 1))
        places = set()
        for _ in range(200):
            mask = ops.Mask.box((5, 6), (4, 4), generator=generator).mask
            hidden = (mask == 0).nonzero()
            places.add(tuple(hidden[0].tolist()))
            assert len(hidden) == 16
            assert (hidden.amax(0) - hidden.amin(0) == 3).all()
        assert places == {(i, j) for i in range(2) for j in range(3)}

    @pytest.mark.parametrize(
        ("size", "corner", "message"),
        [
            ((9, 2), None, "does not fit"),
            ((0, 2), None, "does not fit"),
            ((3, 3), (6, 0), r"corner is at most \(5, 5\)"),
            ((3, 3), (0, -1), r"corner is at most \(5, 5\)"),
        ],
    )
    def test_boxes_out_of_the_image_are_refused(
        self, size: tuple[int, int], corner: tuple[int, int] | None, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            ops.Mask.box((8, 8), size, corner)

    def test_a_box_has_one_place(self, generator: Generator) -> None:
        with pytest.raises(ValueError, match="not both"):
            ops.Mask.box((8, 8), (2, 2), (0, 0), generator=generator)

    @pytest.mark.parametrize("hide", [0.1, 0.25, 0.5])
    def test_strokes_hide_an_exact_fraction(
        self, hide: float, generator: Generator
    ) -> None:
        mask = ops.Mask.freeform((30, 41), hide, 3, generator=generator).mask
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert int((mask == 0).sum()) == round(hide * 30 * 41)

    def test_a_stroke_is_one_piece_of_a_round_brush(self, generator: Generator) -> None:
        import scipy.ndimage

        thin, thick = (
            ops.Mask.freeform((48, 64), hide, 1, generator=g).mask == 0
            for hide, g in (
                (0.05, Generator().manual_seed(3)),
                (0.2, Generator().manual_seed(3)),
            )
        )
        assert (thick | ~thin).all()  # the same path by a broader brush
        eight = torch.ones(3, 3)
        for stroke in (thin, thick):
            pieces = scipy.ndimage.label(stroke.numpy(), eight.numpy())
            assert pieces[1] == 1  # pyright: ignore[reportIndexIssue]
        away = torch.from_numpy(scipy.ndimage.distance_transform_edt(~thin.numpy()))
        # All of the thick stroke is near the thin one, none of the rest nearer by 2.
        assert away[thick].max() < away[~thick].min() + 2

    def test_strokes_add_up(self) -> None:
        one, both = (
            ops.Mask.freeform((48, 64), hide, n, generator=Generator().manual_seed(3))
            for n, hide in ((1, 0.03), (2, 0.25))
        )
        first, hidden = one.mask == 0, both.mask == 0
        alone = ops.Mask.freeform(
            (48, 64), 0.25, 1, generator=Generator().manual_seed(3)
        )
        assert (hidden | ~first).all()  # the first of the two strokes is there
        assert (hidden & (alone.mask == 1)).any()  # and so is the second

    @pytest.mark.parametrize(("of", "n"), [("rows", 10), ("columns", 15)])
    def test_whole_lines_are_missing(
        self, of: ops.masking.Lines, n: int, generator: Generator
    ) -> None:
        draws = []
        for _ in range(60):
            mask = ops.Mask.lines((10, 15), 0.4, of, generator=generator).mask
            mask = mask if of == "rows" else mask.T
            assert torch.equal(mask, mask[:, :1].expand_as(mask))
            assert int(mask[:, 0].sum()) == round(0.4 * n)
            draws.append(mask[:, 0])
        assert (torch.stack(draws).sum(0) > 0).all()  # every line has its chance

    def test_impossible_patterns_are_refused(self, generator: Generator) -> None:
        for keep in (0.0, 0.01, 1.5):
            with pytest.raises(ValueError, match="fraction between 1/8 and 1"):
                ops.Mask.lines((8, 9), keep, generator=generator)
        for hide, strokes in ((0.0, 1), (1.0, 1), (0.3, 0)):
            with pytest.raises(ValueError, match="at least one stroke"):
                ops.Mask.freeform((8, 8), hide, strokes, generator=generator)

    @pytest.mark.usefixtures("unchecked")
    def test_lines_are_rows_or_columns(self, generator: Generator) -> None:
        with pytest.raises(ValueError, match="rows or columns, got 'diagonals'"):
            ops.Mask.lines((8, 8), 0.5, "diagonals", generator=generator)  # pyright: ignore[reportArgumentType]


class TestColour:
    def test_grey_is_the_weighted_sum(self, generator: Generator) -> None:
        x = torch.randn(2, 3, 4, 5, dtype=float64, generator=generator)
        red, green, blue = x.unbind(1)
        y = Greyscale()(x)
        assert_close(y[:, 0], 0.299 * red + 0.587 * green + 0.114 * blue)
        assert_close(Greyscale((0.0, 2.0))(x[:, :2])[:, 0], 2 * green)

    @pytest.mark.parametrize("pattern", ["RGGB", "BGGR", "GRBG", "GBRG"])
    @pytest.mark.parametrize("shape", [(4, 6), (5, 7)], ids=str)
    def test_a_pixel_has_its_filter_s_colour(
        self, pattern: Pattern, shape: tuple[int, int], generator: Generator
    ) -> None:
        x = torch.randn(2, 3, *shape, dtype=float64, generator=generator)
        y = Bayer(pattern)(x)
        assert y.shape == (2, 1, *shape)
        for i in range(shape[0]):
            for j in range(shape[1]):
                c = "RGB".index(pattern[2 * (i % 2) + j % 2])
                assert torch.equal(y[:, 0, i, j], x[:, c, i, j])

    @pytest.mark.parametrize("A", [Greyscale(), Bayer()], ids=repr)
    def test_wrong_channels_are_refused(self, A: LinearOperator) -> None:
        for shape in ((1, 1, 4, 4), (1, 4, 4, 4), (3, 4, 4)):
            with pytest.raises(
                ValueError, match=r"an image of shape \(batch, 3, h, w\)"
            ):
                A(torch.ones(shape))
        with pytest.raises(
            ValueError, match=r"measurements of shape \(batch, 1, h, w\)"
        ):
            A.check_measurements(torch.ones(1, 3, 4, 4))

    def test_weights_that_make_no_sense_are_refused(self) -> None:
        for weights in ((0.0, 0.0), (1.0, torch.nan), ()):
            with pytest.raises(ValueError, match="finite weights, not all 0"):
                Greyscale(weights)

    @pytest.mark.usefixtures("unchecked")
    def test_unknown_patterns_are_refused(self) -> None:
        with pytest.raises(ValueError, match="unknown pattern 'RGBG': choose one of R"):
            Bayer("RGBG")  # pyright: ignore[reportArgumentType]


class TestCompressedSensing:
    def test_walsh_hadamard_is_scipy_s_matrix(self, generator: Generator) -> None:
        x = torch.randn(2, 3, 16, dtype=float64, generator=generator)
        import scipy.linalg

        H = torch.from_numpy(scipy.linalg.hadamard(16)).double() / 4
        assert_close(walsh_hadamard(x), x @ H)

    def test_it_is_some_rows_of_a_random_transform(self, generator: Generator) -> None:
        A = CompressedSensing.random((2, 4, 8), 0.3, generator=generator)
        x = torch.randn(3, 2, 4, 8, dtype=float64, generator=generator)
        import scipy.linalg

        H = torch.from_numpy(scipy.linalg.hadamard(32)).double() / 32**0.5
        assert set(A.signs.unique().tolist()) == {-1.0, 1.0}
        assert len(A.rows) == len(A.rows.unique()) == round(0.3 * 32)
        assert_close(A(x), (A.signs * x).flatten(2) @ H[:, A.rows])

    def test_every_row_and_sign_has_its_chance(self, generator: Generator) -> None:
        draws = [
            CompressedSensing.random((1, 4, 4), 0.25, generator=generator)
            for _ in range(60)
        ]
        assert len(torch.cat([A.rows for A in draws]).unique()) == 16
        assert (torch.stack([A.signs for A in draws]).sum(0).abs() < 60).all()

    def test_impossible_sensing_is_refused(self, generator: Generator) -> None:
        with pytest.raises(ValueError, match=r"power of two, got \(1, 6, 8\)"):
            CompressedSensing.random((1, 6, 8), 0.5, generator=generator)
        for keep in (0.0, 0.001, 1.2):
            with pytest.raises(ValueError, match="fraction between 1/16 and 1"):
                CompressedSensing.random((1, 4, 4), keep, generator=generator)
        signs = torch.ones(1, 4, 4)
        for rows in ([], [0, 0], [16], [-1]):
            with pytest.raises(ValueError, match="distinct indices from 0 to 15"):
                CompressedSensing(signs, torch.tensor(rows, dtype=torch.long))
        with pytest.raises(ValueError, match=r"signs are \+1 or −1"):
            CompressedSensing(0.5 * signs, torch.tensor([0]))


class TestStack:
    def test_measurements_lie_one_after_the_other(self, generator: Generator) -> None:
        parts = [ops.Mask(torch.rand(4, 6, generator=generator)), Bayer()]
        A = Stack(parts, shape=(3, 4, 6))
        x = torch.randn(2, 3, 4, 6, generator=generator)
        y = A(x)
        assert y.shape == (2, 3 * 24 + 24)
        assert torch.equal(y, torch.cat([B(x).flatten(1) for B in parts], 1))
        for part, B in zip(A.split(y), parts, strict=True):
            assert torch.equal(part, B(x))
        assert torch.equal(A.join(A.split(y)), y)

    def test_the_shape_is_a_part_s_unless_given(self) -> None:
        one = Stack([ops.Identity(), ops.Downsample(2, (4, 6))])
        assert one.image_shape == (1, 4, 6)
        assert one.measurement_shape == (24 + 6,)
        with pytest.raises(ValueError, match=r"give Stack\(operators, shape="):
            Stack([ops.Identity(), Bayer()])
        with pytest.raises(ValueError, match="at least one operator"):
            Stack([])

    def test_parts_of_different_images_are_refused(self) -> None:
        with pytest.raises(ValueError, match="Downsample expects an image of shape"):
            Stack([ops.Blur.gaussian(1.0, (8, 8)), ops.Downsample(2, (4, 6))])

    def test_real_and_complex_parts_are_refused(self) -> None:
        fourier = ops.Fourier() @ ops.RealImage()
        with pytest.raises(ValueError, match=r"write RealImage\(\) @ A"):
            Stack([fourier, ops.Identity()], shape=(1, 4, 6))
        mixed = [ops.Fourier(), ops.Identity()]
        assert Stack(mixed, shape=(1, 4, 6), complex_image=True).shape == (1, 4, 6)

    def test_wrong_shapes_are_refused(self) -> None:
        A = Stack([ops.Identity(), ops.Downsample(2, (4, 6))], shape=(2, 4, 6))
        with pytest.raises(ValueError, match="expects an image of shape"):
            A(torch.ones(1, 1, 4, 6))
        with pytest.raises(ValueError, match="expects measurements of shape"):
            A.check_measurements(torch.ones(1, 59))
        with pytest.raises(ValueError, match=r"parts are \(batch, …\) of"):
            A.join([torch.ones(1, 2, 4, 6), torch.ones(1, 2, 2, 2)])

    def test_weights_tell_which_part_to_believe(self, generator: Generator) -> None:
        # Two noisy looks at x: by their precisions, the mean of least variance.
        x = torch.randn(1, 1, 4, 6, dtype=float64, generator=generator)
        noise = torch.randn(2, *x.shape, dtype=float64, generator=generator)
        sigmas = (0.1, 0.5)
        A = Stack([ops.Identity(), ops.Identity()], shape=(1, 4, 6))
        looks = [x + s * n for s, n in zip(sigmas, noise, strict=True)]
        root = A.join([torch.full_like(x, 1 / s) for s in sigmas])
        z = (ops.Mask(root[0]) @ A).pinv(root * A.join(looks))
        expected = (looks[0] / 0.01 + looks[1] / 0.25) / (1 / 0.01 + 1 / 0.25)
        assert_close(z, expected)

    def test_a_stack_moves_its_parts(self) -> None:
        class Here(LinearOperator):
            def apply(self, x: Tensor) -> Tensor:
                return x

            def adjoint(self, y: Tensor) -> Tensor:
                return y

            def to(self, device: torch.device) -> ops.Identity:
                return ops.Identity()

        moved = Stack([Here(), Here()], shape=(1, 4, 6)).to(torch.device("cpu"))
        assert [type(A) for A in moved.operators] == [ops.Identity] * 2


class TestOnChannels:
    def test_only_the_channels_chosen_are_measured(self, generator: Generator) -> None:
        x = torch.randn(2, 3, 4, 6, dtype=float64, generator=generator)
        B = ops.Mask(torch.rand(2, 4, 6, dtype=float64, generator=generator))
        assert torch.equal(OnChannels(B, (2, 0), 3)(x), B(x[:, [2, 0]]))
        one = ops.Downsample(2, (4, 6))
        assert torch.equal(on_channels(one, 1, 3)(x), one(x[:, 1:2]))

    def test_what_is_hidden_stays(self, generator: Generator) -> None:
        v = torch.randn(2, 3, 4, 6, dtype=float64, generator=generator)
        A = on_channels(ops.Blur.gaussian(1.0, (4, 6)), [1], 3)
        y = A(v + 1)
        for hidden in (0, 2):
            assert torch.equal(A.prox(v, y, 0.1)[:, hidden], v[:, hidden])
            assert (A.pinv(y)[:, hidden] == 0).all()
            assert (A.adjoint(y)[:, hidden] == 0).all()

    def test_wrong_channels_are_refused(self) -> None:
        for channels in ((), (0, 0), (3,), (-1,)):
            with pytest.raises(ValueError, match="distinct numbers from 0 to 2"):
                OnChannels(ops.Identity(), channels, 3)
        A = on_channels(ops.Identity(), 0, 3)
        with pytest.raises(ValueError, match=r"image of shape \(batch, 3, …\)"):
            A(torch.ones(1, 2, 4, 6))
