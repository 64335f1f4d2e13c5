"""The list of `bench/kernels.py` and its arithmetic; timings need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import kernels
from sdgp_accel.backends import Needs
from sdgp_accel.backends.reference import ReferenceBackend


def test_bytes_by_hand() -> None:
    assert kernels.moved_bytes(100, 16, Needs(True, True, False)) == 100 * 16 * 4.25
    assert kernels.moved_bytes(100, 16, Needs(True, False, True)) == 100 * 16 * 3.125 + 64


def test_cases_are_distinct_and_on_the_lists() -> None:
    assert len(set(kernels.CASES)) == len(kernels.CASES)
    assert all(case.gradient in kernels.GRADIENTS and case.rule in kernels.RULES for case in kernels.CASES)
    assert all(t % positions == 0 for t, _, positions in kernels.GRADIENTS.values())


@pytest.mark.parametrize(
    ("rule", "needs", "has_tiles"),
    [("magnitude", Needs(True, True, False), True), ("magnitude", Needs(True, True, True), False),
     ("mvue", Needs(True, True, False), False)],
)  # fmt: skip
def test_a_row_by_a_clock_that_is_made_up(
    rule: str, needs: Needs, has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel takes 12 us, `clone()` 4 us and PyTorch's kernel 24 us; the first replays take longer."""
    t, c, clock, replays, seen = 64, 32, [0.0], [0], set[int]()
    contenders = [12e-6, 4e-6, 24e-6]

    def captured(run: Callable[[Tensor], Any], inputs: list[Tensor]) -> tuple[Any, None]:
        seconds = contenders.pop(0)
        seen.update(x.data_ptr() for x in inputs)
        assert all((x >= 0).all() for x in inputs)

        def replay() -> None:
            replays[0] += 1
            clock[0] += len(inputs) * seconds * (9 if replays[0] <= 5 * (2 + has_tiles) else 1)

        if seconds < 20e-6:  # which the CPU can do
            run(inputs[0])
        return SimpleNamespace(replay=replay), None

    marks = SimpleNamespace(mark=lambda: clock[0], seconds=lambda a, b: b - a, synchronize=lambda: None)
    monkeypatch.setattr(kernels, "CudaClock", lambda device: marks)
    monkeypatch.setattr(kernels, "captured", captured)
    monkeypatch.setattr(kernels, "GRADIENTS", {"small": (t, c, 16)})
    monkeypatch.setattr(kernels, "L2_BYTES", 10 * t * c)
    row = kernels.measure(ReferenceBackend(), kernels.Case("small", rule, needs, half_zeros=True), torch.device("cpu"))
    assert len(seen) * 2 * t * c > 2 * kernels.L2_BYTES
    assert (row["case"], row["t"], row["c"], row["rule"]) == ("small", t, c, f"{rule}, half zeros")
    found = {name: times["median"] for name, times in row["microseconds"].items()}
    assert found == pytest.approx({"kernel": 12.0, "clone": 4.0} | ({"torch_tile": 24.0} if has_tiles else {}))
    assert row["clones"] == pytest.approx(3.0)
    assert row["torch_tiles"] == (pytest.approx(0.5) if has_tiles else None)
    assert row["gigabytes_per_second"] == pytest.approx(1e-9 * kernels.moved_bytes(t, c, needs) / 12e-6)
