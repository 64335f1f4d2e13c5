"""The callback under Lightning's own trainer: on and off in time, and after a resume as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import sdgp_accel as sdgp

pl = pytest.importorskip("lightning.pytorch")

from sdgp_accel.callbacks.lightning import SDGPSchedule  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice on loggers and worker counts
]
CONFIG = sdgp.SDGPConfig(prune="magnitude", backend="reference")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.active: list[bool] = []
        sdgp.accelerate_(self.net, CONFIG)

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        pruned = ["_Linear" in type(layer(layer.weight).grad_fn).__name__ for layer in (self.net[0],)]
        self.active.append(pruned[0])
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(24, 8, generator=generator)), batch_size=4)  # 6 batches


def fit(
    module: Module,
    schedule: sdgp.Schedule | SDGPSchedule,
    folder: Path,
    ckpt_path: Any = None,
    *callbacks: Any,
    **options: Any,
) -> Any:
    scheduling = SDGPSchedule(schedule) if isinstance(schedule, sdgp.Schedule) else schedule
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[scheduling, *callbacks], default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **{"max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


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
    module = Module()
    fit(module, schedule, tmp_path, enable_checkpointing=False)
    assert module.active == [step in on for step in range(12)]


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    module = Module()
    fit(module, sdgp.Schedule(end=3, unit="steps"), tmp_path, accumulate_grad_batches=2, enable_checkpointing=False)
    assert module.active == [batch < 6 for batch in range(12)]


def test_a_step_is_pruned_as_a_whole(tmp_path: Path) -> None:
    module, schedule = Module(), sdgp.Schedule(end=1.5, unit="epochs")  # batch 9 is the second of a step
    fit(module, schedule, tmp_path, accumulate_grad_batches=2, max_epochs=2, enable_checkpointing=False)
    assert module.active == [batch < 10 for batch in range(12)]


def test_a_callback_serves_one_training_after_the_other(tmp_path: Path) -> None:
    callback = SDGPSchedule(sdgp.Schedule(start=6, end=9, unit="steps"))
    for module in (Module(), Module()):  # the first ends as the second has to begin: switched off
        fit(module, callback, tmp_path, enable_checkpointing=False)
        assert module.active == [6 <= step < 9 for step in range(12)]


class Two(Module):
    """Two optimizers, each of which makes a step per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> None:
        self.manual_backward(super().training_step(batch, index))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("options", "batches"), [({}, 12), ({"max_steps": 8}, 4), ({"max_steps": 99}, 12)])
def test_a_fraction_is_of_what_ends_training(options: dict[str, int], batches: int, tmp_path: Path) -> None:
    module = Two()
    fit(module, sdgp.Schedule(end=0.5), tmp_path, enable_checkpointing=False, **options)
    assert module.active == [batch < batches // 2 for batch in range(batches)]


@pytest.mark.parametrize("step", [5, 8])
def test_a_run_resumed_within_an_epoch_goes_on_by_the_schedule(step: int, tmp_path: Path) -> None:
    schedule = sdgp.Schedule(start=1 / 3, end=0.75)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step)
    fit(Module(), schedule, tmp_path, None, checkpoint, max_steps=step)
    second = Module()
    fit(second, schedule, tmp_path, tmp_path / f"step={step}.ckpt")
    assert second.active == [4 <= batch < 9 for batch in range(step, 12)]


def test_a_resumed_run_goes_on_by_the_schedule(tmp_path: Path) -> None:
    schedule = sdgp.Schedule(end=1.5, unit="epochs")
    whole = Module()
    fit(whole, schedule, tmp_path / "whole", enable_checkpointing=False)
    first, second = Module(), Module()
    trainer = fit(first, schedule, tmp_path / "parts", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "epoch1.ckpt")
    fit(second, schedule, tmp_path / "parts", ckpt_path=tmp_path / "epoch1.ckpt")
    assert first.active + second.active == whole.active == [step < 9 for step in range(12)]
    for parts, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parts, expected)


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        while True:
            yield torch.randn(8)


def test_a_fraction_of_an_unknown_length_is_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[SDGPSchedule(sdgp.Schedule(end=0.5))], max_epochs=-1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match="unit must be 'epochs' or 'steps'"):
        trainer.fit(Module(), DataLoader(Endless(), batch_size=4))


@pytest.mark.parametrize(
    "schedule", [sdgp.Schedule(end=2, unit="steps"), sdgp.Schedule(start=1, unit="epochs")], ids=str
)
def test_training_without_an_end_goes_by_steps_or_epochs(schedule: sdgp.Schedule, tmp_path: Path) -> None:
    class Stops(Module):
        def on_train_batch_end(self, *arguments: Any) -> None:
            self.trainer.should_stop = len(self.active) == 4

    module = Stops()
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[SDGPSchedule(schedule)], max_epochs=-1, min_epochs=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Endless(), batch_size=4))
    assert module.active == [schedule.unit == "steps" and step < 2 for step in range(4)]


def test_only_schedules_are_taken() -> None:
    with pytest.raises(TypeError, match=r"schedule must be a Schedule; got 0\.9"):
        SDGPSchedule(0.9)
