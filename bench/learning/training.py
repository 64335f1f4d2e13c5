"""Train one cell with several seeds side by side: eagerly on a CPU, as one CUDA graph on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import sdgp_accel as sdgp
from bench.learning.cells import Cell
from bench.learning.tasks import Batch, Data, Task
from sdgp_accel import models

WARMUP_STEPS = 3  # run eagerly before a step is captured, so that every lazy initialisation is behind us


class DeadlinePassed(Exception):
    """The time box closed in the middle of a run; nothing of it is kept."""


class Run:
    """One seed of one cell. Everything a step reads or writes is on the device, its own position included."""

    def __init__(self, task: Task, cell: Cell, seed: int, data: Data, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.model = task.build().to(device)
        config = cell.config()
        if config is not None:
            sdgp.accelerate_(self.model, config, lambda module, name: not (cell.dense_head and name == "head"))
        self.data = data
        self.batches = data.draw(task.steps, task.batch, seed)
        self.rates = learning_rates(task).to(device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.rate = torch.zeros((), device=device)
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.rate, weight_decay=task.weight_decay, fused=True, capturable=on_gpu
        )

    def step(self) -> None:
        batch = self.data.gather(self.batches.index_select(0, self.position)[0])
        self.rate.copy_(self.rates.index_select(0, self.position)[0])
        self.optimizer.zero_grad(set_to_none=True)
        models.loss(self.model(batch.inputs), batch.targets).backward()
        self.optimizer.step()
        self.position += 1

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Mean validation loss and accuracy in percent."""
        self.model.eval()
        losses, hits = [], []
        for batch in batches:
            output = self.model(batch.inputs)
            losses.append(models.loss(output, batch.targets))
            hits.append((output.argmax(-1) == batch.targets).float().mean())
        self.model.train()
        return {"loss": torch.stack(losses).mean().item(), "accuracy": 100 * torch.stack(hits).mean().item()}


def learning_rates(task: Task) -> Tensor:
    """float32 [steps]: linear warm-up, then half a cosine down to a tenth of the peak."""

    def rate(step: int) -> float:
        if step < task.warmup:
            return (step + 1) / task.warmup
        progress = (step - task.warmup) / max(1, task.steps - task.warmup)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))

    return task.lr * torch.tensor([rate(step) for step in range(task.steps)])


def train(task: Task, cell: Cell, seeds: Sequence[int], device: torch.device, deadline: float) -> list[dict[str, Any]]:
    """Train `cell` once per seed; one result per seed, with the curve of the validation loss and accuracy.

    Raises DeadlinePassed where ``time.time()`` passes `deadline` first.
    """
    started = time.time()
    data = task.data(device)
    validation = data.validation()
    runs = [Run(task, cell, seed, data, device) for seed in seeds]
    curves: list[list[dict[str, float]]] = [[] for _ in runs]
    step = eager_steps(runs) if device.type == "cpu" else graphed_steps(runs, device)
    stops = {round(task.steps * i / task.evaluations) for i in range(1, task.evaluations + 1)}
    for done in range(1, task.steps + 1):
        step()
        if done in stops:
            for run, curve in zip(runs, curves, strict=True):
                curve.append({"step": done, **run.evaluate(validation)})
            if time.time() > deadline:
                raise DeadlinePassed
    seconds = (time.time() - started) / len(runs)
    return [
        {"seed": seed, "final": curve[-1], "curve": curve, "seconds": round(seconds, 2), "data_sha256": data.sha256}
        for seed, curve in zip(seeds, curves, strict=True)
    ]


def eager_steps(runs: Sequence[Run]) -> Callable[[], None]:
    def step() -> None:
        for run in runs:
            run.step()

    return step


def graphed_steps(runs: Sequence[Run], device: torch.device) -> Callable[[], None]:
    """Steps of all runs at once: the first ones eager, then replays of one CUDA graph with a branch per run.

    The models are far too small to fill a GPU or to hide kernel launches; the branches run beside each other.
    """
    streams = [torch.cuda.Stream(device) for _ in runs]
    graph = torch.cuda.CUDAGraph()
    done = 0

    def fork_join() -> None:
        current = torch.cuda.current_stream(device)
        for run, stream in zip(runs, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run.step()
        for stream in streams:
            current.wait_stream(stream)

    def step() -> None:
        nonlocal done
        if done < WARMUP_STEPS:
            fork_join()
        else:
            if done == WARMUP_STEPS:
                with torch.cuda.graph(graph):
                    fork_join()
            graph.replay()
        done += 1

    return step
