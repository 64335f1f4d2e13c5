"""For Lightning's `Trainer`: needs ``pip install 'sdgp_accel[lightning]'``."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl

from sdgp_accel.schedule import Schedule
from sdgp_accel.swap import set_active_


class SDGPSchedule(pl.Callback):
    """Switches the SDGP layers of the model on and off by a `Schedule` (see `set_active_`).

    ``Trainer(callbacks=[SDGPSchedule(Schedule(end=0.9))])`` for a module that `accelerate_` has been called on. Follows
    the trainer's own counters, so that a run resumed from ``ckpt_path`` goes on as it was. Steps are optimizer steps.

    Raises TypeError for anything but a `Schedule`. When training starts, raises ValueError where the trainer does not
    know how long training is and the schedule's unit is ``"fraction"``.
    """

    def __init__(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule; got {schedule!r}")
        self.schedule = schedule
        self._active: bool | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self._active = None
        if self.schedule.unit == "fraction" and not math.isfinite(trainer.estimated_stepping_batches):
            raise ValueError(
                "unit must be 'epochs' or 'steps' where the trainer has neither max_steps nor max_epochs with a sized "
                f"dataloader; got {self.schedule.unit!r}"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        per_epoch = trainer.num_training_batches
        active = self.schedule.active(
            fraction=trainer.global_step / trainer.estimated_stepping_batches,
            epochs=trainer.current_epoch + (batch_idx / per_epoch if math.isfinite(per_epoch) else 0.0),
            steps=trainer.global_step,
        )
        if active != self._active:
            set_active_(pl_module, active)
            self._active = active
