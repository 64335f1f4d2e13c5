"""The callback under Hugging Face's own trainer: on and off in time, and after a resume as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import sdgp_accel as sdgp

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sdgp_accel.callbacks.transformers import SDGPSchedule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainer's advice on pinned memory
CONFIG = sdgp.SDGPConfig(prune="magnitude", backend="reference")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.active: list[bool] = []
        sdgp.accelerate_(self.layers, CONFIG)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layers[0](x)
        self.active.append("_Linear" in type(y.grad_fn).__name__)
        return {"loss": self.layers[1:](y).square().mean()}


class Data(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.randn(8, generator=torch.Generator().manual_seed(index))}


def train(net: Net, schedule: sdgp.Schedule | SDGPSchedule, folder: Path, resume: bool = False, **options: Any) -> None:
    callback = SDGPSchedule(schedule) if isinstance(schedule, sdgp.Schedule) else schedule
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=0.1, optim="sgd",
        per_device_train_batch_size=4, remove_unused_columns=False, logging_strategy="no",
        **{"num_train_epochs": 2, "save_strategy": "epoch", **options},
    )  # fmt: skip
    trainer = transformers.Trainer(net, arguments, train_dataset=Data(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume or None)


@pytest.mark.parametrize(
    ("schedule", "on"),
    [
        (sdgp.Schedule(end=0.75), range(9)),
        (sdgp.Schedule(start=0.5, end=1.5, unit="epochs"), range(3, 9)),
        (sdgp.Schedule(start=10, unit="steps"), range(10, 12)),
    ],
    ids=str,
)
def test_layers_prune_in_the_scheduled_steps(schedule: sdgp.Schedule, on: range, tmp_path: Path) -> None:
    net = Net()
    train(net, schedule, tmp_path)
    assert net.active == [step in on for step in range(12)]


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    net = Net()
    train(net, sdgp.Schedule(end=3, unit="steps"), tmp_path, gradient_accumulation_steps=2)
    assert net.active == [batch < 6 for batch in range(12)]


def test_a_callback_serves_one_training_after_the_other(tmp_path: Path) -> None:
    callback = SDGPSchedule(sdgp.Schedule(start=6, end=9, unit="steps"))
    for net in (Net(), Net()):  # the first ends as the second has to begin: switched off
        train(net, callback, tmp_path, save_strategy="no")
        assert net.active == [6 <= step < 9 for step in range(12)]


class Stop(transformers.TrainerCallback):
    """Ends training after the first epoch."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = True
        return control


def test_a_resumed_run_goes_on_by_the_schedule(tmp_path: Path) -> None:
    schedule = sdgp.Schedule(end=0.75)
    whole, first, second = Net(), Net(), Net()
    train(whole, schedule, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        trainer = transformers.Trainer
        patch.setattr(
            transformers,
            "Trainer",
            lambda *args, callbacks, **rest: trainer(*args, callbacks=[*callbacks, Stop()], **rest),
        )
        train(first, schedule, tmp_path / "parts")
    train(second, schedule, tmp_path / "parts", resume=True)
    assert first.active + second.active == whole.active == [step < 9 for step in range(12)]
    for parts, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parts, expected)


def test_only_schedules_are_taken() -> None:
    with pytest.raises(TypeError, match=r"schedule must be a Schedule; got 0\.9"):
        SDGPSchedule(0.9)
