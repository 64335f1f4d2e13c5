"""A training run that ends as in a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdgp_accel.training import Recipe, checkpoint, train


class Interrupted(Exception):
    """Stands for a crash."""


def train_and_crash(recipe: Recipe, output_dir: Path, saves: int) -> None:
    """Train until right after the checkpoint with this number, from 1 on."""
    save, left = checkpoint.save, saves

    def save_and_crash(*arguments):
        nonlocal left
        save(*arguments)
        left -= 1
        if left == 0:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_crash)
        with pytest.raises(Interrupted):
            train(recipe, output_dir)
