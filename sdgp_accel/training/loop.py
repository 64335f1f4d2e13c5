"""The training loop, and what it needs built."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sdgp_accel import SwapReport, accelerate_, models, set_active_
from sdgp_accel.training import checkpoint
from sdgp_accel.training.blur_pool import add_blur_pool_
from sdgp_accel.training.data import Data, generator_for, load_data
from sdgp_accel.training.distributed import World, join_world
from sdgp_accel.training.log import Log
from sdgp_accel.training.recipe import Recipe
from sdgp_accel.training.schedule import learning_rate

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Result:
    """What a finished run reached: final test accuracy in percent, and the log's rows, one for each epoch.

    seconds: of all epochs, also of those before a resume.
    """

    accuracy: float
    seconds: float
    rows: list[dict[str, float]]


def train(
    recipe: Recipe,
    output_dir: Path,
    data_dir: Path | None = None,
    resume: bool = False,
    device: str | None = None,
) -> Result:
    """Train by `recipe`; write ``checkpoint.pt``, ``log.csv``, TensorBoard events and ``weights.pt`` to `output_dir`.

    Under ``torchrun`` this is one of several data-parallel processes. `resume` goes on from the checkpoint in
    `output_dir`. `device` is ``"cpu"``, ``"cuda"``, or None for a GPU where there is one.

    Raises ValueError or FileNotFoundError for what `load_data` and `checkpoint.load` do not accept and for a
    checkpoint in `output_dir` without `resume`; RuntimeError where the loss is no longer finite.
    """
    saved = output_dir / CHECKPOINT
    if saved.exists() and not resume:
        raise ValueError(f"output_dir must be new, or pass resume; {output_dir} holds the checkpoint of a run")
    with (
        join_world(device) as world,
        global_state(recipe, world.rank),
        nullcontext(load_data(recipe, data_dir, world)) as data,  # before the log, so that a failure leaves no folder
        Log(output_dir, world.is_main) as log,
    ):
        model, report = build_model(recipe, data.num_classes, world.device)
        optimizer = build_optimizer(recipe, model)
        scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.amp == "float16")
        progress = checkpoint.Progress()
        if resume:
            progress = checkpoint.load(saved, world, recipe, model, optimizer, scaler)
        log.say(describe(recipe, world, report))

        parallel, sparse = world.parallel(model), True
        while progress.epoch < recipe.epochs:
            started = time.perf_counter() - progress.seconds
            loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=world.device)
            parallel.train()
            batches = data.train(progress.epoch, progress.step)
            for images, labels in log.bar(
                batches, f"epoch {progress.epoch + 1}/{recipe.epochs}", data.steps_per_epoch, progress.step
            ):
                lr = learning_rate(recipe, progress.epoch + progress.step / data.steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                if report is not None:
                    sparse = follow_schedule(recipe, progress, data.steps_per_epoch, model, sparse, log)
                with autocast(recipe, world.device):
                    loss = F.cross_entropy(parallel(images), labels, label_smoothing=recipe.label_smoothing)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                loss_sum += loss.detach()
                progress.step += 1
                if recipe.checkpoint_steps and progress.step % recipe.checkpoint_steps == 0:
                    # The main process's progress is what all resume from: an equal share of the sum over all for each.
                    progress.loss_sum = float(world.sum(loss_sum.clone())) / world.size
                    progress.seconds = time.perf_counter() - started
                    checkpoint.save(saved, world, recipe, progress, model, optimizer, scaler)

            row = {
                "epoch": progress.epoch + 1,
                "loss": float(world.sum(loss_sum)) / (data.steps_per_epoch * world.size),
                "accuracy": test(recipe, world, model, data),
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - started, 3),
            }
            progress = checkpoint.Progress(progress.epoch + 1, rows=[*progress.rows, row])
            log.epoch(progress.rows, recipe.epochs)
            if not np.isfinite(row["loss"]):
                raise RuntimeError(f"the loss is {row['loss']} in epoch {row['epoch']}: training has diverged")
            checkpoint.save(saved, world, recipe, progress, model, optimizer, scaler)

        if world.is_main:
            checkpoint.write(model.state_dict(), output_dir / WEIGHTS)
        seconds = sum(row["seconds"] for row in progress.rows)
        result = Result(progress.rows[-1]["accuracy"], seconds, progress.rows)
        paper = "" if recipe.paper_top1 is None else f" (the paper: {recipe.paper_top1:.1f} %)"
        log.say(f"test accuracy: {result.accuracy:.2f} %{paper} after {result.seconds:.1f} s, in {output_dir}")
        return result


@contextmanager
def global_state(recipe: Recipe, rank: int) -> Iterator[None]:
    """Every global generator seeded, differently for each rank, and torch's global settings as the recipe wants them.

    The settings are put back at the end.
    """
    seed = generator_for("process", recipe.seed, rank).initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global one: a user's model may draw from it)
    torch.manual_seed(seed)
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(recipe.threads or before[0])
    torch.backends.cudnn.benchmark = not recipe.deterministic
    if recipe.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may split sums by timing
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.use_deterministic_algorithms(before[2])


def build_model(recipe: Recipe, num_classes: int, device: torch.device) -> tuple[nn.Module, SwapReport | None]:
    """The recipe's model on `device` with SDGP layers swapped in, and the report on that; None for dense training."""
    model = models.build(recipe.model, num_classes)
    if recipe.blur_pool:
        add_blur_pool_(model)
    model = model.to(device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.sdgp is None:
        return model, None
    only_conv2d = (lambda module, name: isinstance(module, nn.Conv2d)) if recipe.sdgp_layers == "conv2d" else None
    return model, accelerate_(model, recipe.sdgp, only_conv2d)


def follow_schedule(
    recipe: Recipe, progress: checkpoint.Progress, steps_per_epoch: int, model: nn.Module, sparse: bool, log: Log
) -> bool:
    """Make the SDGP layers prune in the next step, or not, as the recipe says; whether they do. `sparse`: before."""
    epochs = progress.epoch + progress.step / steps_per_epoch
    steps = progress.epoch * steps_per_epoch + progress.step
    active = recipe.sdgp_schedule.active(fraction=steps / (recipe.epochs * steps_per_epoch), epochs=epochs, steps=steps)
    if active != sparse:
        set_active_(model, active)
        log.say(f"{'sparse' if active else 'dense'} from epoch {epochs + 1:.4g} on")
    return active


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.SGD:
    """SGD with momentum; weight decay on everything but the parameters of BatchNorm."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    undecayed = [parameter for norm in norms for parameter in norm.parameters()]
    kept = {id(parameter) for parameter in undecayed}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in kept]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The recipe's mixed precision."""
    dtype = torch.float16 if recipe.amp == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=recipe.amp != "none")


@torch.no_grad()
def test(recipe: Recipe, world: World, model: nn.Module, data: Data) -> float:
    """Top-1 accuracy of `model` on the whole test set, in percent."""
    model.eval()
    world.share_buffers(model)
    counts = torch.zeros(2, dtype=torch.float64, device=world.device)  # correct, all
    for images, labels in data.test():
        with autocast(recipe, world.device):
            logits = model(images)
            if recipe.test_flip:
                logits = logits + model(images.flip(3))
        counts += torch.stack([(logits.argmax(1) == labels).sum(), torch.tensor(len(labels), device=world.device)])
    correct, total = world.sum(counts).tolist()
    return 100 * float(correct) / float(total)


def describe(recipe: Recipe, world: World, report: SwapReport | None) -> str:
    """What is about to be trained, in a line or two."""
    how = "dense"
    if recipe.sdgp is not None and report is not None:
        functions = " / ".join(dict.fromkeys(recipe.sdgp.functions))
        backends = Counter(layer.backend for layer in report.layers)
        layers = ", ".join(f"{count} {backend}" for backend, count in backends.items())
        how = f"{functions} {recipe.sdgp.n}:{recipe.sdgp.m} (layers: {layers})"
    text = f"{recipe.model} on {recipe.data}, {how}; {world.size} x {world.device.type}, {recipe.epochs} epochs"
    if world.size != recipe.processes:
        meant, found = (f"{processes} x {recipe.batch_size}" for processes in (recipe.processes, world.size))
        text += f"\nThe learning rate is for batches of {meant} images; these are of {found}."
    return text
