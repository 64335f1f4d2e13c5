"""Fixtures: the simulator, skipped visibly where kernels cannot be compiled."""

from __future__ import annotations

import pytest

from . import toolchain


@pytest.fixture(scope="session")
def sim():
    reason = toolchain.missing()
    if reason:
        pytest.skip(reason)
    from .engine import SimEngine

    return SimEngine()
