"""From the times of a layer's backward to the passes that are pruned."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

from sdgp_accel.tuning.measurement import Measurement

# Sparse must win by more than the difference between two measurements of one kernel, a few tenths of a per cent here.
REQUIRED_GAIN = 0.01
# What a pruned layer costs the host beyond the calls that are timed: its limit in bench/overhead.py.
HOST_OVERHEAD_MS = 0.015

Choice = TypeVar("Choice", bound=Hashable)


def choose(measured: Measurement) -> tuple[bool, bool]:
    """The fastest choice of passes to prune; (False, False) unless it gains at least `REQUIRED_GAIN` over dense.

    It has to gain twice: on the GPU, which decides where the host runs ahead of it, and where a backward takes as long
    as the GPU or as long as the host needs to launch it, whichever is longer.
    """
    return _fastest(measured.device.totals(), measured.host.totals(), (False, False))


def choose_single(measured: Measurement) -> tuple[bool, bool]:
    """`choose` for dgrad and for wgrad where it is the only pass that is wanted."""
    dgrad, wgrad = (_fastest(measured.device.single(i), measured.host.single(i), False) for i in (0, 1))
    return dgrad, wgrad


def _fastest(on_gpu: Mapping[Choice, float], host: Mapping[Choice, float], dense: Choice) -> Choice:
    alone = {choice: max(ms, host[choice] + HOST_OVERHEAD_MS * (choice != dense)) for choice, ms in on_gpu.items()}
    gaining = [
        choice
        for choice in on_gpu
        if all(times[choice] <= (1.0 - REQUIRED_GAIN) * times[dense] for times in (on_gpu, alone))
    ]
    return min(gaining, key=lambda choice: alone[choice], default=dense)
