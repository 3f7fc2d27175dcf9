"""Condition frames from images: modes, cropping, batches, bad input."""

from types import SimpleNamespace

import pytest
import torch
from stillmotion.nodes.common.images import own_size, trained_size
from stillmotion.nodes.dynamicrafter.conditioning import (
    check_counts,
    check_images,
    check_size,
    condition_frames,
    fit_image,
)

START, END = torch.full((1, 4, 2, 3), 1.0), torch.full((1, 4, 2, 3), 2.0)


def test_animate_repeats_the_start():
    frames = condition_frames(START, None, 5)
    assert frames.shape == (1, 4, 5, 2, 3) and (frames == 1).all()


def test_both_ends_have_zeros_between():
    frames = condition_frames(START, END, 5)
    assert frames[0, 0, :, 0, 0].tolist() == [1, 0, 0, 0, 2]
    assert condition_frames(START, END, 2)[0, 0, :, 0, 0].tolist() == [1, 2]


def circle(height, width):
    y, x = torch.meshgrid(torch.arange(height) - height / 2, torch.arange(width) - width / 2, indexing="ij")
    return ((x * x + y * y).sqrt() < min(height, width) / 4).float()[None, :, :, None].repeat(1, 1, 1, 3)


@pytest.mark.parametrize("old", [(100, 100), (60, 200), (200, 60), (33, 47)])
@pytest.mark.parametrize("new", [(64, 64), (96, 64), (64, 128)])
def test_nothing_is_stretched(old, new):
    shape_HW = fit_image(circle(*old), new[1], new[0])[0, ..., 0] > 0.5
    assert shape_HW.shape == new
    rows, columns = shape_HW.any(1).sum().item(), shape_HW.any(0).sum().item()
    assert abs(rows - columns) <= 0.12 * max(rows, columns) + 1


def test_an_image_that_fits_is_left_alone_and_alpha_is_dropped():
    image = torch.rand(1, 8, 16, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit_image(image, 16, 8), image[..., :3])


def test_size_0_is_that_of_the_training():
    source = SimpleNamespace(trained_size=(512, 320))
    assert trained_size(None, SimpleNamespace(), source) == (512, 320) and trained_size(None) is None
    assert own_size(0, 0, (512, 320)) == (512, 320) and own_size(64, 0, (512, 320)) == (64, 320)
    with pytest.raises(ValueError, match="set both, or connect the VAE that came with the model"):
        own_size(512, 0, None)


def test_counts():
    assert check_counts(16, 1, 1, None, "animate") == 1
    assert check_counts(16, 3, 1, 1, "interpolate") == 3
    assert check_counts(16, 1, 3, 3, "interpolate") == 3


@pytest.mark.parametrize("arguments, words", [
    ((0, 1, 1, None, "animate"), "frames is 0"),
    ((1, 1, 1, 1, "interpolate"), "needs at least 2"),
    ((16, 0, 1, None, "animate"), "batch_size is 0"),
    ((16, 2, 3, None, "animate"), "Batch sizes do not match"),
    ((16, 1, 2, 3, "interpolate"), "Batch sizes do not match"),
])
def test_bad_counts(arguments, words):
    with pytest.raises(ValueError, match=words):
        check_counts(*arguments)


@pytest.mark.parametrize("width, height, words", [(60, 64, "width is 60.*56 or 64"), (64, 7, "height is 7.*8 or 16")])
def test_bad_sizes_name_the_nearest(width, height, words):
    with pytest.raises(ValueError, match=words):
        check_size(width, height, 8)


IMAGE = torch.zeros(1, 8, 8, 3)


@pytest.mark.parametrize("images, words", [
    ((IMAGE, None, "interpolate"), "needs a second image"),
    ((IMAGE, IMAGE, "animate"), "takes one image"),
    ((IMAGE, IMAGE, "loop"), "takes one image"),
    ((IMAGE, None, "zoom"), "zoom.*animate, interpolate, loop"),
    ((IMAGE * torch.nan, None, "animate"), "image holds 192 NaN"),
    ((IMAGE, IMAGE / 0, "interpolate"), "image2 holds 192 NaN"),
])
def test_bad_images(images, words):
    with pytest.raises(ValueError, match=words):
        check_images(*images)


def test_a_picture_is_cut_to_any_shape():
    for width, height in ((4096, 32), (8, 4096), (1, 1)):
        assert fit_image(torch.rand(2, 64, 64, 3), width, height).shape == (2, height, width, 3)
