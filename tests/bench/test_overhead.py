"""The measurement of `bench/overhead.py` runs; what it measures depends on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2]


def test_every_case_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    # In a process of its own: it makes the package take the CPU for a GPU.
    command = [sys.executable, "bench/overhead.py", "--batches", "1", "--json", str(path)]
    subprocess.run(command, cwd=FOLDER, env=os.environ | {"PYTHONPATH": str(FOLDER)}, check=True, capture_output=True)
    results = json.loads(path.read_text())["results"]
    cases = {(row["backend"], row["layer"], row["prune"]) for row in results}
    assert len(cases) == len(results) == 12
    for row in results:
        (dense_forward, dense_backward), (forward, backward) = row["dense"], row["sdgp"]
        assert row["forward"] == forward - dense_forward
        assert row["backward"] == backward - dense_backward + row["replaced"]
        replacement = row.get("no_ops", 0.0) if row["backend"] == "idle" else row["empty_ops"]
        assert row["replaced"] == row["ops"] - replacement
        assert min(*row["dense"], *row["sdgp"], row["new_empty"]) > 0.0
