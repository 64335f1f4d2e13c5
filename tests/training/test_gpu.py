"""The paper's CIFAR-10 recipe on a GPU, on made-up images: mixed precision, channels_last, bit-identical resume."""

import pytest
import torch

from sdgp_accel.training import load_recipe, loop, train
from sdgp_accel.training.data import CIFAR10_COLOURS, InMemory, generator_for
from sdgp_accel.training.loop import WEIGHTS
from tests.training.crash import train_and_crash

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def made_up_images(recipe, data_dir, world):
    """1024 images of 10 classes, each class brighter than the one before."""
    labels = torch.arange(1024) % 10
    noise = torch.randint(120, (1024, 3, 32, 32), generator=generator_for("test", 1))
    images = (noise + 13 * labels[:, None, None, None]).to(torch.uint8)
    return InMemory(recipe, world, (images, labels), (images[:200], labels[:200]), CIFAR10_COLOURS)


@pytest.mark.parametrize("function", ["rescale_magnitude", "mvue"])
def test_cifar10_recipe_learns_and_resumes_bit_for_bit(function, tmp_path, monkeypatch):
    overrides = {"epochs": 3, "lr_peak_epoch": 1, "lr": 0.05, "batch_size": 128, "deterministic": True}
    recipe = load_recipe("cifar10/rescale-2-4", {**overrides, "sdgp": {"prune": function}, "checkpoint_steps": 3})
    monkeypatch.setattr(loop, "load_data", made_up_images)
    whole = train(recipe, tmp_path / "whole")

    train_and_crash(recipe, tmp_path / "parts", saves=1)
    train(recipe, tmp_path / "parts", resume=True)
    weights, resumed = (torch.load(tmp_path / name / WEIGHTS, weights_only=True) for name in ("whole", "parts"))
    assert [name for name in weights if not torch.equal(weights[name], resumed[name])] == []
    assert whole.rows[-1]["loss"] < whole.rows[0]["loss"]
