"""Training that is faster because its gradients are sparse.

The names below are imported on first use, so that ``import sdgp_accel`` costs little and the parts that need
optional packages only need them when they are called.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdgp_accel import functional
    from sdgp_accel.benchmark import benchmark
    from sdgp_accel.config import SDGPConfig
    from sdgp_accel.nn import SDGPConv2d, SDGPLinear
    from sdgp_accel.philox import set_data_parallel_rank
    from sdgp_accel.plan import plan
    from sdgp_accel.pruning import prune
    from sdgp_accel.report import LayerReport, SwapReport
    from sdgp_accel.schedule import Schedule
    from sdgp_accel.semi_structured import compress
    from sdgp_accel.swap import accelerate_, restore_, set_active_
    from sdgp_accel.tuning.model import tune
    from sdgp_accel.validation import validate

__version__ = "0.1.0"

__all__ = [
    "LayerReport",
    "SDGPConfig",
    "SDGPConv2d",
    "SDGPLinear",
    "Schedule",
    "SwapReport",
    "accelerate_",
    "benchmark",
    "compress",
    "functional",
    "plan",
    "prune",
    "restore_",
    "set_active_",
    "set_data_parallel_rank",
    "tune",
    "validate",
]

_HOME = {
    "LayerReport": "report",
    "SDGPConfig": "config",
    "SDGPConv2d": "nn",
    "SDGPLinear": "nn",
    "Schedule": "schedule",
    "SwapReport": "report",
    "accelerate_": "swap",
    "benchmark": "benchmark",
    "compress": "semi_structured",
    "plan": "plan",
    "prune": "pruning",
    "restore_": "swap",
    "set_active_": "swap",
    "set_data_parallel_rank": "philox",
    "tune": "tuning.model",
    "validate": "validation",
}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("sdgp_accel.functional")
    if name not in _HOME:
        raise AttributeError(f"module 'sdgp_accel' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sdgp_accel.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `plan` and `benchmark` the functions: importing a submodule would bind its name here to the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
