import numpy as np
import pytest
import torch

from invsolve.grids import Grid, covered, resampled
from invsolve.io import Image

OBLIQUE = np.array(
    [
        [-1.9, 0.3, 0.1, 40.0],
        [0.25, -2.0, 0.2, 70.0],
        [-0.1, 0.2, 2.9, -55.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)


def world(grid: Grid) -> torch.Tensor:
    """(3, z, y, x): millimetres of each voxel."""
    axes = [torch.arange(n, dtype=torch.float64) for n in grid.shape]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    index = torch.stack([x, y, z, torch.ones_like(x)]).flatten(1)
    return (torch.from_numpy(grid.affine) @ index)[:3].unflatten(1, grid.shape)


def ramp(grid: Grid) -> Image:
    """What is linear in millimetres: 0.5 x − 0.2 y + 0.3 z."""
    x, y, z = world(grid)
    return Image((0.5 * x - 0.2 * y + 0.3 * z).float(), grid.affine)


@pytest.mark.parametrize("mm", [1.0, 2.5])
def test_what_is_linear_in_millimetres_stays_so(mm):
    source = Grid((20, 22, 24), OBLIQUE)
    target = source.spaced(mm)
    inside = tuple(slice(round(6 / mm) + 3, -round(6 / mm) - 3) for _ in range(3))
    found = resampled(ramp(source), target).values
    torch.testing.assert_close(
        found[inside], ramp(target).values[inside], rtol=0, atol=2e-3
    )


def test_its_own_grid_changes_nothing(generator):
    grid = Grid((5, 6, 7), OBLIQUE)
    image = Image(torch.randn(5, 6, 7, generator=generator), OBLIQUE)
    torch.testing.assert_close(resampled(image, grid).values, image.values)


def test_labels_stay_labels(generator):
    grid = Grid((12, 12, 12), OBLIQUE)
    labels = Image(torch.randint(4, (12, 12, 12), generator=generator).float(), OBLIQUE)
    found = resampled(labels, grid.spaced(1.3), nearest=True).values
    assert set(found.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_a_coarse_voxel_holds_about_the_mean_of_what_it_covers(generator):
    fine = torch.randn(40, 40, 40, generator=generator)
    image = Image(fine, np.diag([-1.0, -1.0, 1.0, 1.0]))
    found = resampled(image, Grid.of(image).spaced(4.0)).values
    # Point samples of white noise would keep its deviation of 1; means of 64 have 1/8.
    assert float(found.std()) < 0.3


def test_cubic_voxels_keep_the_extent():
    grid = Grid((30, 20, 10), np.diag([-2.0, -3.0, 4.0, 1.0]))
    cubes = grid.spaced(2.0)
    assert cubes.shape == (60, 30, 10)
    assert cubes.spacing == pytest.approx((2.0, 2.0, 2.0))
    # The outer face of the first voxels: half a voxel before each centre.
    for g in (grid, cubes):
        face = g.affine @ np.array([-0.5, -0.5, -0.5, 1.0])
        np.testing.assert_allclose(face[:3], [1.0, 1.5, -2.0], atol=1e-12)


def test_a_part_lies_where_it_is_cut_from(generator):
    grid = Grid((9, 8, 7), OBLIQUE)
    part = grid.part((2, 3, 1), (4, 3, 5))
    torch.testing.assert_close(world(part), world(grid)[:, 2:6, 3:6, 1:6])


def test_covered_is_the_part_that_overlaps():
    image = Image(torch.ones(10, 10, 10), np.diag([-1.0, -1.0, 1.0, 1.0]))
    grid = Grid.of(image)
    assert covered(image, grid) == 1.0
    assert covered(image, grid.part((5, 0, 0), (10, 10, 10))) == pytest.approx(0.5)
    assert covered(image, grid.part((50, 0, 0), (10, 10, 10))) == 0.0


def test_a_voxels_volume():
    assert Grid((1, 1, 1), np.diag([-4.0, -4.0, 4.0, 1.0])).voxel_ml == pytest.approx(
        0.064
    )
