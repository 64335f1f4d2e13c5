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
    the trainer's own counters, so that a run resumed from ``ckpt_path`` goes on as it was. Steps are optimizer steps,
    those of every optimizer, as the trainer counts them.

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
        if self._active is not None and batch_idx % trainer.accumulate_grad_batches != 0:
            return  # in the middle of an optimizer step
        active = self.schedule.active(
            fraction=_fraction(trainer, batch_idx),
            epochs=trainer.current_epoch + batch_idx / trainer.num_training_batches,
            steps=trainer.global_step,
        )
        if active != self._active:
            set_active_(pl_module, active)
            self._active = active


def _fraction(trainer: pl.Trainer, batch_idx: int) -> float:
    """Of the training that is done: of its steps or of its batches, whichever will end it.

    Not of `estimated_stepping_batches`: several optimizers make more steps than that.
    """
    of_steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    per_epoch, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is None or epochs < 0 or not math.isfinite(per_epoch):
        return of_steps
    return max(of_steps, (trainer.current_epoch * per_epoch + batch_idx) / (epochs * per_epoch))
