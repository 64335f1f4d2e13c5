"""What every test starts from."""

from __future__ import annotations

import pytest

from sdgp_accel.tuning import cache


@pytest.fixture(autouse=True)
def no_remembered_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor write what this machine's user has measured; subprocesses inherit it."""
    monkeypatch.setenv(cache.VARIABLE, "off")
