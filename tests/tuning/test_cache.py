"""Tuned layers on disk: what is read back, what is left out with a warning, and several processes that write."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from sdgp_accel import backends
from sdgp_accel.tuning import BackwardTimes, Tuned, cache
from sdgp_accel.tuning.cache import TuningCache

ENVIRONMENT = {"device": "a GPU", "driver": "580.1"}
TUNED = Tuned((True, False), "measured", ("128x256", None), BackwardTimes(4.0, 3.0, 2.0, compress_dgrad=0.5))
DENSE = Tuned((False, False), "dense is faster here")


@pytest.fixture(autouse=True)
def warn_again() -> None:
    backends.warn_once.cache_clear()


def test_what_was_added_is_there_the_next_time(tmp_path: Path) -> None:
    first = TuningCache(tmp_path / "new" / "folder", ENVIRONMENT)
    assert first.get("layer") is None
    first.add("layer", DENSE)
    first.add("layer", TUNED)  # the last word counts
    first.add("other", DENSE)
    again = TuningCache(tmp_path / "new" / "folder", ENVIRONMENT)
    assert again.get("layer") == first.get("layer") == TUNED
    assert again.get("other") == DENSE
    assert TuningCache(again.path.parent, dict(reversed(ENVIRONMENT.items()))).get("layer") == TUNED
    assert [path.suffix for path in sorted(again.path.parent.iterdir())] == [".json", ".lock"]


@pytest.mark.parametrize("change", [{"driver": "580.2"}, {"device": "another GPU"}, {"torch": "2.14"}])
def test_every_environment_has_its_own(tmp_path: Path, change: dict[str, str]) -> None:
    TuningCache(tmp_path, ENVIRONMENT).add("layer", TUNED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TuningCache(tmp_path, ENVIRONMENT | change).get("layer") is None


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "null", "[]", "3", '"text"', "\x00\xff", "[" * 100_000, "{}", '{"schema": 1}',
        json.dumps({"schema": 0, "environment": ENVIRONMENT, "layers": {}}),
        json.dumps({"schema": cache.SCHEMA, "environment": ENVIRONMENT, "layers": {"layer": {}}}),
        json.dumps({"schema": cache.SCHEMA, "environment": ENVIRONMENT, "layers": []}),
        json.dumps({"schema": cache.SCHEMA, "environment": {"device": "foreign"}, "layers": {"a": TUNED.to_dict()}}),
    ],
    ids=lambda text: text[:40] or "empty",
)  # fmt: skip
def test_damaged_and_foreign_files_are_left_out_and_replaced(tmp_path: Path, content: str) -> None:
    path = TuningCache(tmp_path, ENVIRONMENT).path
    path.write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match="ignoring .*, which holds no tuned layers of this machine"):
        damaged = TuningCache(tmp_path, ENVIRONMENT)
    assert damaged.get("layer") is None
    damaged.add("layer", DENSE)
    assert TuningCache(tmp_path, ENVIRONMENT).get("layer") == DENSE


def test_a_folder_that_cannot_be_written_only_warns(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remembering = TuningCache(tmp_path / "file" / "folder", ENVIRONMENT)
    with pytest.warns(UserWarning, match="not remembered in"):
        remembering.add("layer", TUNED)
    assert remembering.get("layer") == TUNED


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ((cache.tempfile, "mkstemp"), OSError(errno.ENOSPC, "No space left on device")),
        ((cache.os, "replace"), OSError(errno.EIO, "Input/output error")),
        ((cache, "FileLock"), NotImplementedError("no flock")),
    ],
    ids=["full", "broken", "without locks"],
)
def test_what_could_not_be_written_is_still_known_and_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[object, str], error: Exception
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise error

    remembering = TuningCache(tmp_path, ENVIRONMENT)
    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        with pytest.warns(UserWarning, match="not remembered in"):
            remembering.add("first", TUNED)
        remembering.add("second", DENSE)
    assert remembering.get("first") == TUNED
    assert not list(tmp_path.glob("*.partial"))
    remembering.add("third", DENSE)
    again = TuningCache(tmp_path, ENVIRONMENT)
    assert [again.get(key) for key in ("first", "second", "third")] == [TUNED, DENSE, DENSE]


def test_a_lock_that_hangs_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model has dozens of layers to remember."""
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.25)
    remembering = TuningCache(tmp_path, ENVIRONMENT)
    with cache.FileLock(remembering.path.with_suffix(".lock")):
        start = time.monotonic()
        with pytest.warns(UserWarning, match="not remembered in"):
            remembering.add("a", DENSE)
        for key in "bcd":
            remembering.add(key, DENSE)
        assert 0.25 <= time.monotonic() - start < 0.5
    remembering.add("e", DENSE)
    again = TuningCache(tmp_path, ENVIRONMENT)
    assert [again.get(key) for key in "abcde"] == [DENSE] * 5


def test_the_oldest_layers_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_LAYERS", 2)
    remembering = TuningCache(tmp_path, ENVIRONMENT)
    for key in "abc":
        remembering.add(key, DENSE)
    again = TuningCache(tmp_path, ENVIRONMENT)
    assert [again.get(key) for key in "abc"] == [None, DENSE, DENSE]


def test_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.folder() is None  # the tests' own setting: off
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    assert cache.folder() == tmp_path
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "sdgp_accel" / "tuning"
    monkeypatch.setenv(cache.VARIABLE, "")  # as if it were not set
    assert cache.folder() == tmp_path / "sdgp_accel" / "tuning"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.folder() == tmp_path / ".cache" / "sdgp_accel" / "tuning"
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache.folder() == tmp_path / ".cache" / "sdgp_accel" / "tuning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == tmp_path / ".cache" / "sdgp_accel" / "tuning"
    monkeypatch.setenv(cache.VARIABLE, "~/tuned")
    assert cache.folder() == tmp_path / "tuned"


WRITER = """
import sys
from pathlib import Path
from sdgp_accel.tuning import Tuned
from sdgp_accel.tuning.cache import TuningCache
folder, name, start = sys.argv[1:]
remembering = TuningCache(Path(folder), {"device": "a GPU", "driver": "580.1"})
Path(folder, name).touch()
while not Path(folder, start).exists():
    pass
for index in range(20):
    remembering.add(f"{name} {index}", Tuned((False, False), name))
"""


def test_processes_that_write_at_once_lose_nothing_and_readers_see_whole_files(tmp_path: Path) -> None:
    names = [f"writer{index}" for index in range(4)]
    folder = Path(__file__).parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, name, "go"], cwd=folder) for name in names]
    deadline = time.monotonic() + 120
    while not all((tmp_path / name).exists() for name in names) and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / "go").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a reader that met half a file would warn
        while any(writer.poll() is None for writer in writers) and time.monotonic() < deadline:
            TuningCache(tmp_path, ENVIRONMENT)
        assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
        result = TuningCache(tmp_path, ENVIRONMENT)
    assert all(result.get(f"{name} {index}").reason == name for name in names for index in range(20))
    assert not list(tmp_path.glob("*.partial"))
