"""What is learned: the data of each task, its model and its hyper-parameters.

All randomness of the data is drawn up front on the CPU from the run's seed, so that every cell sees the same batches
from the same initial weights, on any device, and so that a whole training step can be captured in a CUDA graph.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bench.learning import corpus
from sdgp_accel import models


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


class Data(Protocol):
    """A task's data on one device."""

    sha256: str

    def draw(self, steps: int, batch: int, seed: int) -> Tensor:
        """The batches of a run: int64 [steps, batch], one row per step, on the device."""

    def gather(self, row: Tensor) -> Batch:
        """The batch that one row of `draw` stands for."""

    def validation(self) -> list[Batch]:
        """The same batches for every run."""


@dataclass(frozen=True)
class Task:
    """One model on one data set. `score` is what the table shows: the validation loss or the accuracy in percent."""

    name: str
    title: str
    model: str
    options: Mapping[str, Any]
    steps: int
    batch: int
    lr: float
    warmup: int
    weight_decay: float
    window: int = 0  # bytes of context; 0 for images
    score: str = "loss"
    evaluations: int = 16

    def __hash__(self) -> int:
        return hash(self.name)

    def settings(self) -> dict[str, Any]:
        """Everything that has to be equal for two runs of this task to be comparable."""
        return {key: value for key, value in asdict(self).items() if key not in ("title", "score")}

    def setup(self) -> str:
        """A hash of `settings`."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:12]

    def build(self) -> nn.Module:
        return models.build(self.model, **self.options)

    def data(self, device: torch.device) -> Data:
        return Text(self.window, device) if self.window else Digits(device)


class Text:
    """Windows of `window` + 1 bytes of the standard library's source; targets are the inputs shifted by one."""

    VALIDATION_WINDOWS = 512
    VALIDATION_BATCH = 128

    def __init__(self, window: int, device: torch.device) -> None:
        text = corpus.load()
        self.sha256 = text.sha256
        self.window = window
        self.train, self.held_out = text.train.to(device), text.validation.to(device)
        self.offsets = torch.arange(window + 1, device=device)

    def draw(self, steps: int, batch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        last = len(self.train) - self.window - 1
        return torch.randint(last + 1, (steps, batch), generator=generator).to(self.offsets.device)

    def gather(self, row: Tensor) -> Batch:
        return self._windows(self.train, row)

    def validation(self) -> list[Batch]:
        starts = torch.linspace(0, len(self.held_out) - self.window - 1, self.VALIDATION_WINDOWS, dtype=torch.float64)
        rows = starts.long().to(self.offsets.device).split(self.VALIDATION_BATCH)
        return [self._windows(self.held_out, row) for row in rows]

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        tokens = text[starts[:, None] + self.offsets].long()
        return Batch(tokens[:, :-1], tokens[:, 1:])


class Digits:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels; a fifth of them, always the same, is held out."""

    def __init__(self, device: torch.device) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.images = (torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16)[order].to(device)
        self.labels = torch.from_numpy(labels).long()[order].to(device)
        self.trained_on = len(labels) * 4 // 5

    def draw(self, steps: int, batch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        epochs = steps * batch // self.trained_on + 1
        order = torch.cat([torch.randperm(self.trained_on, generator=generator) for _ in range(epochs)])
        return order[: steps * batch].view(steps, batch).to(self.labels.device)

    def gather(self, row: Tensor) -> Batch:
        return Batch(self.images[row], self.labels[row])

    def validation(self) -> list[Batch]:
        return [Batch(self.images[self.trained_on :], self.labels[self.trained_on :])]


TASKS = {
    task.name: task
    for task in (
        Task(
            name="transformer",
            title="Char-level transformer, Python source",
            model="gpt",
            options={"layers": 4, "width": 128, "heads": 4, "context": 128},
            steps=1500,
            batch=16,
            lr=2e-3,
            warmup=100,
            weight_decay=0.1,
            window=128,
        ),
        Task(
            name="conv_lm",
            title="Causal dilated Conv2d + BatchNorm language model, Python source",
            model="conv_lm",
            options={"width": 128, "layers": 6},
            steps=1500,
            batch=16,
            lr=2e-3,
            warmup=100,
            weight_decay=0.1,
            window=128,
        ),
        Task(
            name="digits",
            title="Small conv net, scikit-learn's digits",
            model="digits",
            options={},
            steps=400,
            batch=64,
            lr=5e-3,
            warmup=20,
            weight_decay=1e-2,
            score="accuracy",
        ),
    )
}
