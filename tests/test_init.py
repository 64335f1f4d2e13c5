"""The public names: all there, cheap to import, and functions where a submodule has the same name."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest

import sdgp_accel as sdgp


@pytest.mark.parametrize("name", sdgp.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(sdgp, name)
    assert callable(value) or name == "functional"
    assert name in dir(sdgp)


def test_importing_a_submodule_does_not_hide_the_function_of_its_name() -> None:
    for name in ("plan", "benchmark"):
        assert isinstance(importlib.import_module(f"sdgp_accel.{name}"), types.ModuleType)
        assert isinstance(getattr(sdgp, name), types.FunctionType)


def test_import_is_lazy() -> None:
    code = "import sys, sdgp_accel; assert sdgp_accel.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'sdgp_accel' has no attribute 'accelerate'"):
        _ = sdgp.accelerate
