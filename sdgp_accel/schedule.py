"""SDGP for part of training and dense for the rest: when pruning is on."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from sdgp_accel.config import check_choice

Unit = Literal["fraction", "epochs", "steps"]


@dataclass(frozen=True)
class Schedule:
    """Pruning is on from `start` (included) to `end` (excluded; None: the end of training).

    unit: of both: ``"fraction"`` of the whole training, ``"epochs"`` (2.5 is the middle of the third) or optimizer
    ``"steps"``. ``Schedule(end=0.9)`` trains the last tenth dense.

    A function of the position alone: a resumed run needs no state of it. Raises ValueError or TypeError naming the
    argument.
    """

    start: float = 0.0
    end: float | None = None
    unit: Unit = "fraction"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, get_args(Unit))
        for name, value in (("start", self.start), ("end", self.end if self.end is not None else 0.0)):
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number; got {value!r}")
        limit = 1.0 if self.unit == "fraction" else float("inf")
        if not 0.0 <= self.start < limit:
            raise ValueError(f"start must be at least 0 and below {limit:g} {self.unit}; got {self.start!r}")
        if self.end is not None and not self.start < self.end <= limit:
            raise ValueError(
                f"end must be greater than start = {self.start!r} and at most {limit:g} {self.unit}; got {self.end!r}"
            )

    def active(self, *, fraction: float, epochs: float, steps: float) -> bool:
        """Whether the step that begins at this position prunes; the position in each unit."""
        position = {"fraction": fraction, "epochs": epochs, "steps": steps}[self.unit]
        return self.start <= position and (self.end is None or position < self.end)
