"""Summaries against numpy, the host clock against itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdgp_accel.timing import HostClock, Stats, clock_for


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
