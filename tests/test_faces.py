"""Property tests of the public portraits: drawn by code, deterministic, and each shows a face."""
import pytest
import torch

from drawings import faces


@pytest.fixture(scope="module")
def drawn():
    """400 portraits; drawing them may not touch the global random state."""
    before = torch.get_rng_state()
    images, labels = faces.draw(400, torch.Generator().manual_seed(0))
    return images, labels, torch.equal(before, torch.get_rng_state())


def test_portraits_have_the_shape_and_range_of_photographs(drawn):
    images, _, _ = drawn
    assert images.shape == (400, 3, 64, 64) and images.dtype == torch.float32
    assert images.isfinite().all() and images.min() >= -1 and images.max() <= 1


def test_there_is_one_class(drawn):
    assert faces.NAMES == ("face",)
    assert drawn[1].shape == (400,) and drawn[1].dtype == torch.int64 and not drawn[1].any()


def test_portraits_depend_on_the_generator_alone(drawn):
    a, b, c = [faces.draw(20, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert drawn[2], "drawing moved torch's global generator"


def test_portraits_do_not_depend_on_the_size_of_a_piece(drawn, monkeypatch):
    monkeypatch.setattr(faces, "PIECE", 7)
    images, _ = faces.draw(20, torch.Generator().manual_seed(0))
    off = (images - drawn[0][:20]).abs().max()
    assert off < 1e-3, f"the largest difference of a pixel is {off}"


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_image_is_an_error(n):
    with pytest.raises(ValueError, match=f"n = {n}, expected at least 1 image"):
        faces.draw(n)


def test_no_two_portraits_are_alike(drawn):
    """The two most similar of 400 still differ by more than the grain: on average 0.05 a pixel."""
    images = drawn[0].flatten(1)
    apart = torch.cdist(images, images) / images.shape[1] ** 0.5
    assert apart.fill_diagonal_(9).min() > 0.05, apart.min()


def test_left_and_right_are_equally_likely(drawn):
    """A pixel's mean and its mirror image's differ by about 1 standard error, not by several."""
    change = drawn[0] - drawn[0].flip(3)
    errors = change.mean(0) / (change.std(0) / 400 ** 0.5)
    assert errors[:, :, :32].square().mean().sqrt() < 2, errors.abs().max()


def test_the_middle_is_skin_with_two_dark_eyes(drawn):
    """On average a cheek is redder than blue, and both eyes are darker than the cheeks below them."""
    mean = drawn[0].mean(0)
    for column in (slice(22, 26), slice(38, 42)):
        eye, cheek = mean[:, 27:30, column].mean((1, 2)), mean[:, 35:38, column].mean((1, 2))
        assert cheek[0] > cheek[1] > cheek[2] and cheek[0] - cheek[2] > 0.2, cheek
        assert eye.mean() < cheek.mean() - 0.1, (eye, cheek)


def test_a_portrait_is_soft_as_a_photograph_is(drawn):
    """Neighbouring pixels of a photograph are alike: their correlation is above 0.9 in most portraits."""
    grey = drawn[0].mean(1)
    grey = grey - grey.mean((1, 2), keepdim=True)
    alike = (grey[:, :, 1:] * grey[:, :, :-1]).mean((1, 2)) / grey.square().mean((1, 2))
    assert alike.median() > 0.9, alike.median()
