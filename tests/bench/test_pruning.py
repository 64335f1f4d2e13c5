"""bench/pruning.py on a small gradient: what is timed, and what becomes of the times."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import pruning


def test_every_case_prunes_along_its_axis() -> None:
    x = torch.randn(2, 8, 6, 4).contiguous(memory_format=torch.channels_last)
    found = list(pruning.cases(x, [(2, 4), (1, 8)]))
    assert len(found) == 5 * 2 + 5
    assert len({case[:4] for case in found}) == len(found)
    for case in found:
        pruned = case.call()
        groups = pruned.movedim(1, -1) if case.axis == "channels" else pruned.t()
        kept = (groups.reshape(-1, case.m) != 0).sum(1)
        assert kept.max() == case.n


def test_a_row_by_a_clock_that_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning takes 3, 6 and 9 seconds, cloning 2, 3 and 3."""
    x = torch.randn(1, 4, 2, 2)
    (case, *_) = pruning.cases(x, [(2, 4)])
    times = itertools.chain([3.0, 2.0, 6.0, 3.0, 9.0, 3.0])
    monkeypatch.setattr(pruning, "seconds", lambda call, device: next(times))
    monkeypatch.setattr(pruning, "extra_peak", lambda call, device: 2.0 * x.nbytes)
    row = pruning.measure(case, x, 3)
    assert (row["function"], row["n"], row["m"], row["axis"]) == ("magnitude", 2, 4, "channels")
    assert (row["ratio"], row["ratio_quartiles"], row["limit"]) == (2.0, [1.5, 3.0], 2.0)
    assert (row["milliseconds"], row["clone_milliseconds"]) == (6000.0, 3000.0)
    assert (row["best_milliseconds"], row["best_clone_milliseconds"]) == (3000.0, 2000.0)
    assert row["peak_extra_per_input"] == 2.0


def test_the_command_writes_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pruning, "SHAPE", (2, 8, 4, 4))
    monkeypatch.setattr(pruning, "extra_peak", lambda call, device: 0.0)
    path = tmp_path / "pruning.json"
    result = CliRunner().invoke(pruning.main, ["--quick", "--repeats", "2", "--output", str(path)])
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["shape"] == [2, 8, 4, 4]
    assert [row["axis"] for row in written["rows"]] == ["channels", "positions"] * 5
