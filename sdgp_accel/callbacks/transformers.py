"""For the Hugging Face `Trainer`: needs ``pip install 'sdgp_accel[transformers]'``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdgp_accel.schedule import Schedule
from sdgp_accel.swap import set_active_


class SDGPSchedule(TrainerCallback):
    """Switches the SDGP layers of the model on and off by a `Schedule` (see `set_active_`).

    ``Trainer(model, callbacks=[SDGPSchedule(Schedule(end=0.9))])`` for a model that `accelerate_` has been called on.
    Follows the trainer's own counters, so that ``train(resume_from_checkpoint=...)`` goes on as it was. Steps are
    optimizer steps.

    Raises TypeError for anything but a `Schedule`.
    """

    def __init__(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule; got {schedule!r}")
        self.schedule = schedule
        self._active: bool | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trainer's hook."""
        self._active = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trainer's hook, before each optimizer step's first batch."""
        active = self.schedule.active(
            fraction=state.global_step / state.max_steps, epochs=state.epoch or 0.0, steps=state.global_step
        )
        if active != self._active:
            set_active_(kwargs["model"], active)
            self._active = active
