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


def test_on_a_gpu_it_is_the_peak_beyond_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"held": 100, "peak": 500}

    def step() -> None:
        gpu.update(held=140, peak=max(gpu["peak"], 140))
        gpu.update(held=110)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gpu["held"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: gpu.update(peak=gpu["held"]))
    assert step_peak_bytes(step, torch.device("cuda")) == 40
