"""Summaries against numpy, the host clock against itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdgp_accel.timing import CudaClock, HostClock, Stats, clock_for


def test_stats_agree_with_numpy() -> None:
    generator = np.random.default_rng(3)
    for size in (1, 2, 3, 10, 31):
        sample = generator.lognormal(size=size).tolist()
        stats = Stats.of(sample)
        expected = np.percentile(sample, [50, 25, 75, 0, 100])
        assert [stats.median, stats.low, stats.high, stats.minimum, stats.maximum] == pytest.approx(expected)
        assert stats.count == size


def test_host_clock_runs_forward() -> None:
    clock = clock_for(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    start = clock.mark()
    clock.synchronize()
    assert clock.seconds(start, clock.mark()) >= 0


def test_cuda_clock_uses_events_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[str, float]] = []

    class Stream(str):
        def synchronize(self) -> None:
            recorded.append((f"synchronized {self}", 0.0))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0

        def record(self, stream: str) -> None:
            self.at = 10.0 * len(recorded)
            recorded.append((stream, self.at))

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"stream of {device}"))
    # NCCL's stream may be waiting for a process that waits for this one.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("waited for all streams"))
    clock = clock_for(torch.device("cuda", 1))
    assert isinstance(clock, CudaClock)
    start, end = clock.mark(), clock.mark()
    clock.synchronize()
    assert clock.seconds(start, end) == pytest.approx(0.010)  # events tell milliseconds
    assert [name for name, _ in recorded] == ["stream of cuda:1"] * 2 + ["synchronized stream of cuda:1"]
