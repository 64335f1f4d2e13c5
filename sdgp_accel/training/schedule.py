"""What changes with the epoch: learning rate and image size, both piecewise linear in the epoch."""

from __future__ import annotations

import numpy as np

from sdgp_accel.training.recipe import Recipe, Resolution


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a fractional `epoch`: ``lr_start·lr`` → ``lr`` at `lr_peak_epoch` → 0 at the end."""
    knots = [0, recipe.lr_peak_epoch, recipe.epochs]
    return float(np.interp(epoch, knots, [recipe.lr_start * recipe.lr, recipe.lr, 0]))


def image_size(resolution: Resolution, epoch: int) -> int:
    """The side of the training images in `epoch`: constant, a ramp in multiples of 32, constant."""
    side = np.interp(epoch, [resolution.ramp_start, resolution.ramp_end], [resolution.start, resolution.end])
    return round(float(side) / 32) * 32
