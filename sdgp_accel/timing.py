"""Clocks and summaries for benchmarks: moments on the device's own time line, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments and tells the seconds between two of them."""

    def mark(self) -> Any:
        """A moment: when the work issued so far is done."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds from `start` to `end`; only after `synchronize`."""

    def synchronize(self) -> None:
        """Wait until everything marked has happened."""


class HostClock:
    """For work that is done when its call returns."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Their difference."""
        return end - start

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CudaClock:
    """CUDA events on the current stream: marking does not wait for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """An event recorded behind the work issued so far."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Time on the GPU between the two events."""
        return float(start.elapsed_time(end)) * 1e-3

    def synchronize(self) -> None:
        """Wait for the current stream. Others may be waiting for other processes, as NCCL's do."""
        torch.cuda.current_stream(self._device).synchronize()


def clock_for(device: torch.device) -> Clock:
    """The clock of `device`."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Stats:
    """A sample's median, quartiles, extremes and size; in the sample's unit."""

    median: float
    low: float
    high: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, sample: Sequence[float]) -> Stats:
        """Summarise a non-empty sample."""
        if len(sample) == 1:
            low = high = sample[0]
        else:
            low, _, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(statistics.median(sample), low, high, min(sample), max(sample), len(sample))
