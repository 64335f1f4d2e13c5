"""What every test starts from."""

from __future__ import annotations

import sys
import zlib

import pytest
import torch

from sdgp_accel.tuning import cache


@pytest.fixture(autouse=True)
def no_remembered_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor write what this machine's user has measured; subprocesses inherit it."""
    monkeypatch.setenv(cache.VARIABLE, "off")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """A test draws the same random numbers alone as behind others, and others than its neighbours."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """torch.compile has seen no model yet: torch 2.7 and 2.8 count the recompilations of all models together."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
