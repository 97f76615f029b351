"""Property tests of the public blood smears: drawn by code, deterministic, and each shows its class."""
import pytest
import torch

import data
from drawings import smears


@pytest.fixture(scope="module")
def drawn():
    """400 smears; drawing them may not touch the global random state."""
    before = torch.get_rng_state()
    images, labels = smears.draw(400, torch.Generator().manual_seed(0))
    return images, labels, torch.equal(before, torch.get_rng_state())


def middle(images, side):
    return images[:, :, 32 - side:32 + side, 32 - side:32 + side]


def test_smears_have_the_shape_and_range_of_photographs(drawn):
    images, labels, _ = drawn
    assert images.shape == (400, 3, 64, 64) and images.dtype == torch.float32
    assert labels.shape == (400,) and labels.dtype == torch.int64
    assert images.isfinite().all() and images.min() >= -1 and images.max() <= 1


def test_the_classes_are_those_of_the_private_cells_in_their_order_and_equally_likely(drawn):
    assert tuple(smears.CELLS) == data.CELLS
    count = torch.bincount(drawn[1], minlength=8)
    assert (count - 50).abs().max() < 5 * (400 / 8 * 7 / 8) ** 0.5, count.tolist()


def test_smears_depend_on_the_generator_alone(drawn):
    draw = lambda seed: smears.draw(20, torch.Generator().manual_seed(seed))
    (a, label_a), (b, label_b), (c, _) = draw(1), draw(1), draw(2)
    assert torch.equal(a, b) and torch.equal(label_a, label_b) and not torch.equal(a, c)
    assert drawn[2], "drawing moved torch's global generator"


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_image_is_an_error(n):
    with pytest.raises(ValueError, match=f"n = {n}"):
        smears.draw(n)


def test_cells_have_their_textbooks_sizes_and_stains(drawn):
    """Platelets are the smallest, eosinophils the reddest; an erythroblast has the darkest nucleus."""
    images, labels, _ = drawn
    dark = ((images.mean(1) < 0.35) & (images[:, 2] > images[:, 1] + 0.05)).flatten(1).sum(1).float()
    size = torch.stack([dark[labels == k].mean() for k in range(8)])
    assert size.argmin() == data.CELLS.index("platelet"), size
    assert size[data.CELLS.index("monocyte")] > size[data.CELLS.index("lymphocyte")], size
    red = (middle(images, 16)[:, 0] - middle(images, 16)[:, 2]).flatten(1).mean(1)
    assert torch.stack([red[labels == k].mean() for k in range(7)]).argmax() == data.CELLS.index("eosinophil")
    light = middle(images, 4).flatten(1).mean(1)
    light = torch.stack([light[labels == k].mean() for k in range(8)])
    assert light.argmin() == data.CELLS.index("erythroblast"), light


def test_a_class_is_seen_in_the_picture(drawn):
    """The nearest of the other half's class means, in 8 x 8 pixels, is right 3 times as often as a guess."""
    images, labels, _ = drawn
    small = torch.nn.functional.avg_pool2d(images, 8).flatten(1)
    known, new = slice(0, 200), slice(200, 400)
    means = torch.stack([small[known][labels[known] == k].mean(0) for k in range(8)])
    right = (torch.cdist(small[new], means).argmin(1) == labels[new]).float().mean()
    assert right > 3 / 8, right
