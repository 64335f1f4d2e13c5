"""The stage recorder: which stages a backward has, and that nobody pays when nobody records."""

from __future__ import annotations

import pytest
import torch

import sdgp_accel as sdgp
from sdgp_accel.stages import StageRecorder, stage

pytestmark = pytest.mark.filterwarnings("ignore:device 'cpu' has no sparse tensor cores")


def backward(config: sdgp.SDGPConfig) -> None:
    layer = sdgp.SDGPConv2d(8, 8, 3, config=config)
    layer(torch.randn(2, 8, 6, 6, requires_grad=True)).sum().backward()


def test_records_the_stages_of_each_backward() -> None:
    recorder = StageRecorder()
    with recorder:
        backward(sdgp.SDGPConfig())
    assert set(recorder.seconds()) == {"prune_compress", "dgrad", "wgrad"}
    once = recorder.seconds()["dgrad"]
    assert once > 0
    with recorder:
        backward(sdgp.SDGPConfig())
    assert recorder.seconds()["dgrad"] > once
    recorder.reset()
    assert recorder.seconds() == {}


def test_nothing_is_recorded_outside() -> None:
    recorder = StageRecorder()
    backward(sdgp.SDGPConfig())
    assert recorder.seconds() == {}
    assert stage("dgrad") is stage("wgrad")  # one shared no-op


def test_only_one_records_and_errors_stop_the_recording() -> None:
    with StageRecorder(), pytest.raises(RuntimeError, match="only one can record"):
        StageRecorder().__enter__()
    with pytest.raises(ZeroDivisionError), StageRecorder(), stage("dgrad"):
        _ = 1 / 0
    assert stage("dgrad") is stage("wgrad")


def test_on_a_gpu_events_are_read_after_waiting_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            marks.append(5.0 * len(marks))
            self.at = marks[-1]

        def elapsed_time(self, end: Event) -> float:
            assert marks[-1] < 0, "read before the work was waited for"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: marks.append(-1.0))
    recorder = StageRecorder("cuda")
    with recorder:
        for name in ("dgrad", "wgrad", "dgrad"):
            with stage(name):
                pass
    assert recorder.seconds() == {"dgrad": pytest.approx(0.010), "wgrad": pytest.approx(0.005)}  # 5 ms each
    recorder.reset()
    assert recorder.seconds() == {}
