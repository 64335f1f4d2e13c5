"""Tuned layers on disk, so that a shape is measured once per machine and not once per run.

One JSON file for each combination of GPU, driver, libraries and kernels, in the folder that the environment variable
SDGP_TUNING_CACHE names; without it, ``sdgp_accel/tuning`` under $XDG_CACHE_HOME or ~/.cache. SDGP_TUNING_CACHE=off
remembers nothing. Delete the folder whenever you like.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from sdgp_accel.backends import warn_once
from sdgp_accel.tuning.record import Tuned

VARIABLE = "SDGP_TUNING_CACHE"
SCHEMA = 2
MAX_LAYERS = 1 << 14  # the oldest give way: sequences of every length would fill the disk
LOCK_SECONDS = 10.0  # once: training must not wait as long for each layer, whoever hangs with the lock


def folder() -> Path | None:
    """Where the files are; None where nothing is to be remembered. RuntimeError where there is no home directory."""
    named = os.environ.get(VARIABLE)
    if named == "off":
        return None
    if named:
        return Path(named).expanduser()
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative one is to be ignored (XDG Base Directory Specification).
    return (root if root.is_absolute() else Path.home() / ".cache") / "sdgp_accel" / "tuning"


class TuningCache:
    """The tuned layers of one environment: key -> `Tuned`.

    environment: whatever the times depend on besides the layer. A file that is damaged, or from another environment
    or format, is left out with a warning and replaced by the next `add`.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        digest = hashlib.sha256(json.dumps(self._environment, sort_keys=True).encode()).hexdigest()
        self._path = folder / f"{digest[:32]}.json"
        self._layers = self._read()
        self._patience = LOCK_SECONDS

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def get(self, key: str) -> Tuned | None:
        """What is known of a layer; what other processes have added since this object was made is not."""
        return self._layers.get(key)

    def add(self, key: str, tuned: Tuned) -> None:
        """Remember a layer, together with whatever other processes have put into the file.

        Readers see the file before or after, never in between. Warns where it cannot be written.
        """
        self._layers[key] = tuned
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock"), timeout=self._patience):
                self._layers = self._layers | self._read() | {key: tuned}  # some may never have been written
                self._write()
        # OSError: filelock's Timeout is one, too. NotImplementedError: its word for a file system without locks.
        except (OSError, NotImplementedError) as error:
            if isinstance(error, Timeout):
                self._patience = 0.0
            warn_once(f"measured choices are not remembered in {self._path.parent}: {error}")

    def _read(self) -> dict[str, Tuned]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA or content["environment"] != self._environment:
                raise ValueError("it is of another environment or format")
            return {key: Tuned.from_dict(values) for key, values in content["layers"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            warn_once(f"ignoring {self._path}, which holds no tuned layers of this machine: {error!r}")
            return {}

    def _write(self) -> None:
        layers = {key: tuned.to_dict() for key, tuned in list(self._layers.items())[-MAX_LAYERS:]}
        text = json.dumps({"schema": SCHEMA, "environment": self._environment, "layers": layers}, indent=1)
        handle, name = tempfile.mkstemp(dir=self._path.parent, suffix=".partial")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
