"""Simulated brain MR: what an image of the population is made of."""

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from invsolve.population import (
    BRAIN_TISSUES,
    brain_mr,
    labelled_brain_mr,
    read_tissues,
    tissue_codes,
)

# Label, class, mean and spread in T1: air, fluid, two sides of one tissue, another.
TISSUES = {
    0: (0, 0.0, 0.0),
    4: (1, 40.0, 20.0),
    2: (2, 160.0, 0.0),
    41: (2, 160.0, 0.0),
    3: (3, 100.0, 10.0),
}


def blocks() -> Tensor:
    """A head of 32³: halves of one tissue, a core of fluid, air around."""
    labels = torch.zeros(32, 32, 32, dtype=torch.long)
    labels[6:26, 6:26, 6:16] = 2
    labels[6:26, 6:26, 16:26] = 41
    labels[13:19, 13:19, 13:19] = 4
    return labels


def draw(seed: int = 0, **options) -> Tensor:
    return brain_mr(blocks(), TISSUES, Generator().manual_seed(seed), **options)


def test_an_image_is_normalised_and_its_background_is_nothing() -> None:
    image = draw()
    assert image.shape == (16, 16, 16)
    assert float(image.min()) == 0
    assert float((image[0] + image[-1]).abs().max()) == 0
    assert 0.9 < float(image.quantile(0.995)) < 1.1


@pytest.mark.parametrize("seed", range(4))
def test_both_sides_of_a_tissue_are_alike(seed: int) -> None:
    """But for the bias field, which is within about a fifth."""
    image = draw(seed)
    left, right = image[5:11, 5:11, 4].mean(), image[5:11, 5:11, 11].mean()
    assert float((left / right).log().abs()) < 0.7


def test_fluid_is_dark_in_t1_and_bright_in_t2() -> None:
    for seed in range(4):
        t1, t2 = (draw(seed, contrast=c) for c in ("t1", "t2"))
        for image, darker in ((t1, True), (t2, False)):
            core, tissue = image[7:9, 7:9, 7:9].mean(), image[5:11, 5:11, 4].mean()
            assert (core < tissue) == darker


def test_the_seed_decides() -> None:
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_labels_without_a_tissue_are_refused() -> None:
    labels = blocks()
    labels[0, 0, 0] = 99
    with pytest.raises(ValueError, match=r"no tissue for the labels \[99\]"):
        brain_mr(labels, TISSUES, Generator())


def test_the_labels_come_with_the_image_that_shows_them() -> None:
    g = Generator().manual_seed(3)
    image, turned = labelled_brain_mr(blocks(), TISSUES, g, contrast="t1")
    assert torch.equal(image, draw(3, contrast="t1"))
    codes = tissue_codes(turned, {"fluid": (4,), "tissue": (2, 41)})
    assert codes.shape == image.shape
    assert int(image[codes == 0].count_nonzero()) < 0.5 * int((codes == 0).sum())
    assert float(image[codes == 1].mean()) < 0.6 * float(image[codes == 2].mean())


def test_a_coarse_voxel_is_of_what_most_of_it_is() -> None:
    labels = torch.zeros(2, 2, 6, dtype=torch.long)
    labels[..., 0] = 2  # four of eight voxels, three are fluid
    labels[..., 1] = torch.tensor([[4, 4], [4, 0]])
    labels[..., 2:4] = 41
    labels[0, 0, 4] = 3
    codes = tissue_codes(labels, {"fluid": (4,), "tissue": (2, 41)})
    assert codes.flatten().tolist() == [2, 2, 0]


def test_a_label_is_of_one_tissue_at_most() -> None:
    members = [label for labels in BRAIN_TISSUES.values() for label in labels]
    assert len(members) == len(set(members))


def test_the_table_is_read(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(
        "label,tissue_class,t1_mean_of_means,t1_std_of_means,t1_mean_of_stds,"
        "t1_std_of_stds\n0,0,7.0,1,5,2\n16,13,129.78,12.24,17.53,6.78\n"
    )
    assert read_tissues(table) == {0: (0, 0.0, 0.0), 16: (13, 129.78, 17.53)}
