"""Checkpoints from which a run goes on bit for bit as if it had never stopped.

That holds in the same environment with the same number of processes, on a GPU with ``deterministic: true``; the
data need no state (see `data`). Files hold tensors and plain values only and load with ``weights_only=True``.
"""

from __future__ import annotations

import io
import os
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sdgp_accel.training.distributed import World
from sdgp_accel.training.recipe import Recipe, recipe_from_dict

FORMAT = 1
# What may differ between a run and its continuation: it changes nothing that is computed.
FREE_FIELDS = ("workers", "checkpoint_steps", "paper_top1", "note")


@dataclass
class Progress:
    """Where a run stands: the next epoch and step, the epoch's loss and time so far, the finished epochs' log rows.

    loss_sum: over the epoch's steps, the mean of the processes.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)


def save(
    path: Path,
    world: World,
    recipe: Recipe,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Write the run's whole state to `path`, atomically; every process calls this, the main one writes."""
    random_states = world.gather(_random_state(world.device))
    if not world.is_main:
        return
    state = {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "random_states": random_states,
    }
    write(state, path)


def write(state: dict[str, Any], path: Path) -> None:
    """Save `state` to `path`, all or nothing, whatever stops the process or the machine.

    Raises OSError where there is no room for it.
    """
    content = io.BytesIO()  # torch's own writer says "unexpected pos" where a disk is full
    torch.save(state, content)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # else a machine that goes down now may be left with the name of an empty file
    os.replace(unfinished, path)


def saved_recipe(path: Path) -> Recipe:
    """The recipe of the run that wrote `path`."""
    return recipe_from_dict(_read(path)["recipe"], origin=str(path))


def load(
    path: Path,
    world: World,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Put `model`, `optimizer`, `scaler` and the random generators into the state saved in `path`.

    Raises FileNotFoundError where there is no file, ValueError where it was written by another recipe or
    another number of processes.
    """
    state = _read(path)
    saved, wanted = recipe_from_dict(state["recipe"], origin=str(path)).to_dict(), recipe.to_dict()
    differing = [key for key in wanted if key not in FREE_FIELDS and saved[key] != wanted[key]]
    if differing:
        listed = ", ".join(f"{key} = {saved[key]!r}, not {wanted[key]!r}" for key in differing)
        raise ValueError(f"the recipe must be the one that wrote {path}; that one has {listed}")
    if len(state["random_states"]) != world.size:
        raise ValueError(f"{path} goes on with {len(state['random_states'])} processes; got {world.size}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    _set_random_state(state["random_states"][world.rank], world.device)
    return Progress(**state["progress"])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"resume needs a checkpoint; there is no {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reads files of several kinds, and fails on what is none of them in many ways
        raise ValueError(f"{path} must be a checkpoint of format {FORMAT}; torch cannot read it") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of format {FORMAT}")
    return state


def _random_state(device: torch.device) -> dict[str, Any]:
    """The states of every generator that a model may draw from, as tensors and plain values."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (the global one)
    numpy_state["state"]["key"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy_state}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    numpy_state = state["numpy"]
    numpy_state["state"]["key"] = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
