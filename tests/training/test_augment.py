"""Batched augmentation against a loop over images, and anti-aliased downsampling against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdgp_accel.training import augment
from sdgp_accel.training.blur_pool import Blur, add_blur_pool_
from sdgp_accel.training.data import generator_for


def images_and_rngs(seed, height=9, width=7):
    images = (
        torch.rand(300, 3, height, width, generator=generator_for("test", seed)) + 0.1
    )  # no zeros: those mark the fill
    return images, generator_for("test", seed, 1), generator_for("test", seed, 1)


@pytest.mark.parametrize("seed", range(3))
def test_random_flip_mirrors_half_of_the_images(seed):
    images, rng, same = images_and_rngs(seed)
    wanted = torch.rand(300, generator=same) < 0.5
    expected = [image.flip(2) if flip else image for image, flip in zip(images, wanted, strict=True)]
    assert torch.equal(augment.random_flip(images, rng), torch.stack(expected))
    assert 100 < wanted.sum() < 200


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_pad_crop_translates_each_image_by_its_own_draw(padding):
    images, rng, _ = images_and_rngs(padding)
    height, width = images.shape[2:]
    seen = set()
    for image, moved in zip(images, augment.pad_crop(images, padding, rng), strict=True):
        padded = F.pad(image, [padding] * 4)
        matches = [
            (top, left)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            if torch.equal(padded[:, top : top + height, left : left + width], moved)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 0.9 * (1 - 0.05) * (2 * padding + 1) ** 2  # 300 draws out of at most 81 translations


@pytest.mark.parametrize("size", [1, 4, 7])
def test_cutout_makes_one_hole_inside_each_image(size):
    images, rng, _ = images_and_rngs(size)
    corners = set()
    for image, holed in zip(images, augment.cutout(images, size, rng), strict=True):
        hole = holed == 0
        rows, columns = hole[0].any(1).nonzero().flatten(), hole[0].any(0).nonzero().flatten()
        assert hole.sum() == 3 * size * size
        assert len(rows) == len(columns) == size
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == size - 1
        assert torch.equal(holed[~hole], image[~hole])
        corners.add((int(rows[0]), int(columns[0])))
    assert len(corners) > 0.9 * (9 - size + 1) * (7 - size + 1)


def test_augmentation_is_a_function_of_the_generator_state():
    images, rng, same = images_and_rngs(7)
    for function, *options in ((augment.random_flip,), (augment.pad_crop, 2), (augment.cutout, 3)):
        assert torch.equal(function(images, *options, rng), function(images, *options, same))


def test_blur_keeps_constants_and_averages_neighbours():
    x = torch.zeros(1, 2, 7, 7)
    x[0, 0, 3, 3] = 16.0
    spread = Blur(2)(x)
    assert spread[0, 0, 2:5, 2:5].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert spread.sum() == 16
    assert torch.equal(Blur(2)(x.bfloat16()), spread.bfloat16())
    assert torch.equal(Blur(1)(torch.ones(1, 1, 5, 5))[0, 0, 1:-1, 1:-1], torch.ones(3, 3))


def test_blur_pool_goes_before_strided_convolutions_only():
    strided = nn.Conv2d(16, 4, 3, stride=2)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 8, 3), nn.Sequential(strided))
    assert add_blur_pool_(model) is model
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[1], nn.Conv2d)
    assert [type(part) for part in model[2][0]] == [Blur, nn.Conv2d]
    assert model[2][0][1] is strided
    assert {name for name in model.state_dict() if "kernel" in name} == set()
    one_way = add_blur_pool_(nn.Sequential(nn.Conv2d(16, 4, 3, stride=(1, 2))))
    assert type(one_way[0][0]) is Blur


def test_blur_pool_resnet18_counts():
    from sdgp_accel import models

    model = add_blur_pool_(models.build("resnet18", 10))
    # Stages 2 to 4 halve the image in their first 3x3 convolution and in their shortcut; the stem has 3 channels.
    assert sum(isinstance(module, Blur) for module in model.modules()) == 6
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 10)
