"""Schedules at points worked out by hand."""

import pytest

from sdgp_accel.training import load_recipe
from sdgp_accel.training.schedule import image_size, learning_rate


@pytest.mark.parametrize(
    ("name", "epoch", "expected"),
    [
        ("cifar10/dense", 0, 0.5e-4),
        ("cifar10/dense", 2.5, (0.5e-4 + 0.5) / 2),
        ("cifar10/dense", 5, 0.5),
        ("cifar10/dense", 77.5, 0.25),
        ("cifar10/dense", 150, 0),
        ("imagenet/resnet18-dense", 2, 1.0),
        ("imagenet/resnet18-dense", 45, 0.5),
        ("imagenet/resnet50-dense", 0, 1.7e-4),
        ("imagenet/resnet50-dense", 2, 1.7),
        ("imagenet/resnet50-dense", 66.5, 1.7 / 4),
    ],
)
def test_learning_rate(name, epoch, expected):
    assert learning_rate(load_recipe(name), epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "side"),
    # 160 + 32 (epoch - 65) / 11, to the nearest multiple of 32: half-way lies between epochs 70 and 71.
    [(0, 160), (65, 160), (70, 160), (71, 192), (76, 192), (87, 192)],
)
def test_image_size(epoch, side):
    assert image_size(load_recipe("imagenet/resnet18-dense").resolution, epoch) == side
