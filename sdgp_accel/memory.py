"""The peak memory of one training step beyond what was allocated when it began."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def step_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Run `step` once and return the highest sum of bytes it held at any time: activations, gradients, workspaces.

    On a GPU from the caching allocator's statistics. On a CPU, whose allocator keeps none, from the profiler's record
    of every allocation and release; what libraries allocate behind torch's back is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _without_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocations = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(allocations, key=lambda allocation: allocation[0]):
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Swallow what the profiler's C++ side writes to file descriptor 2 when it starts."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
