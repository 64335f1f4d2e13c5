"""The peak of a step is the largest sum of bytes alive at once."""

from __future__ import annotations

import pytest
import torch

from sdgp_accel.memory import step_peak_bytes


def test_peak_counts_what_is_alive_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    kept = torch.ones(1000)

    def step() -> None:
        a = torch.ones(1000, 100)  # 400 kB
        b = a + kept[:100]  # 800 kB alive
        del a
        c = torch.ones(2000, 100)  # 1200 kB alive
        del b, c
        torch.ones(1000, 250)  # 1000 kB alive

    assert step_peak_bytes(step, torch.device("cpu")) == 1_200_000
    assert capfd.readouterr().err == ""
