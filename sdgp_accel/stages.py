"""Where the time of a backward pass goes: named stages, free unless somebody records them.

The backward ops wrap their work in ``with stage("prune_compress" | "dgrad" | "wgrad")``. A `StageRecorder`
collects the durations while it is entered; otherwise `stage` hands out one shared context manager that does
nothing. The recorder is process-wide, not thread-local: autograd runs CUDA backwards on its own threads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

import torch

StageName = Literal["prune_compress", "dgrad", "wgrad"]

_IDLE = contextlib.nullcontext()
_recorder: StageRecorder | None = None


def stage(name: StageName) -> contextlib.AbstractContextManager[None]:
    """Context manager around one stage of a layer's backward; a shared no-op unless a recorder is active."""
    return _IDLE if _recorder is None else _recorder.measure(name)


def is_recording() -> bool:
    """Whether a recorder is active: then backwards go stage by stage."""
    return _recorder is not None


class StageRecorder:
    """Adds up the seconds spent in each stage while it is entered (``with recorder: loss.backward()``).

    On a CUDA device the stages are timed with events on the current stream, so recording does not
    synchronise; `seconds` does. Recorders do not nest: entering a second one raises RuntimeError.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._host: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> StageRecorder:
        global _recorder
        if _recorder is not None:
            raise RuntimeError("a StageRecorder is already recording; only one can record at a time")
        _recorder = self
        return self

    def __exit__(self, *exc: object) -> None:
        global _recorder
        _recorder = None

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the body of the ``with`` block as one occurrence of stage `name`."""
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._host.append((name, time.perf_counter() - began))

    def reset(self) -> None:
        """Forget what was recorded."""
        self._host.clear()
        self._events.clear()

    def seconds(self) -> dict[str, float]:
        """Total seconds per stage since construction or the last `reset`; waits for the GPU where needed."""
        if self._events:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        timed = [(name, start.elapsed_time(end) * 1e-3) for name, start, end in self._events]
        for name, spent in self._host + timed:
            totals[name] = totals.get(name, 0.0) + spent
        return totals
