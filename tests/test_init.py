"""The public names: all there, cheap to import, and functions where a submodule has the same name."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

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


X = torch.ones(4, 8)
TAKES_MODEL = {
    "accelerate_": (),
    "restore_": (),
    "set_active_": (True,),
    "tune": (X,),
    "validate": (X,),
    "benchmark": (X,),
    "plan": (X,),
}


@pytest.mark.parametrize("name", TAKES_MODEL)
def test_a_model_that_is_no_module_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):
        getattr(sdgp, name)("resnet18", *TAKES_MODEL[name])


@pytest.mark.parametrize("name", ["accelerate_", "tune", "validate", "benchmark", "plan"])
def test_a_config_that_is_none_is_refused(name: str) -> None:
    arguments = () if name == "accelerate_" else (X,)
    with pytest.raises(TypeError, match=r"config must be an SDGPConfig or None; got str"):
        getattr(sdgp, name)(nn.Linear(8, 4), *arguments, config="mvue")


@pytest.mark.parametrize(
    ("gpu", "figures", "error", "message"),
    [
        ("v100", {}, ValueError, "gpu must be one of 'a100', .*; got 'v100'"),
        (80, {}, TypeError, "gpu must be a name in roofline.GPUS or a roofline.GPU; got 80"),
        ("a100", {"tflops": "312"}, ValueError, "tflops must be greater than 0 .*; got '312'"),
        ("a100", {"sparse_speedup": None, "flops": 1}, TypeError, "unknown GPU figure flops; accepted: bandwidth"),
    ],
)
def test_wrong_gpus_are_named(gpu: Any, figures: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sdgp.plan(nn.Linear(8, 4), X, gpu, **figures)
