"""Run by test_distributed.py under torchrun: FUNCTION DIRECTORY. Trains whole, then interrupted and resumed."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from sdgp_accel.config import SDGPConfig
from sdgp_accel.training import checkpoint, load_recipe, train

save = checkpoint.save
saves = 0


def save_and_crash(*arguments):
    """Save in both processes; both crash after the second time."""
    global saves
    save(*arguments)
    saves += 1
    if saves == 2:
        raise InterruptedError


function, directory = sys.argv[1], Path(sys.argv[2])
overrides = {"epochs": 3, "lr_peak_epoch": 1, "batch_size": 32, "checkpoint_steps": 8}
recipe = replace(load_recipe("digits", overrides), sdgp=SDGPConfig(prune=function))
dist.init_process_group("gloo")
whole = train(recipe, directory / "whole")
checkpoint.save = save_and_crash
with contextlib.suppress(InterruptedError):
    train(recipe, directory / "parts")
checkpoint.save = save
train(recipe, directory / "parts", resume=True)
sys.stdout.write(f"accuracy {whole.accuracy}\n")  # in one piece: both ranks write to one pipe, unbuffered
dist.destroy_process_group()
