"""The layers of a model that `validate` and `benchmark` let prune, whatever is swapped or switched off in it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from sdgp_accel import functional
from sdgp_accel.config import SDGPConfig
from sdgp_accel.eligibility import Filter, selector
from sdgp_accel.nn import SDGPLayer
from sdgp_accel.report import SwapReport, describe_as_it_is
from sdgp_accel.swap import plan_swap, swap_layer

# Autograd's names for the nodes of aten ops end in a digit, those of Python functions (SDGP's layers) do not.
GEMM_NODES = {"AddmmBackward0", "MmBackward0", "LinearBackward0", "ConvolutionBackward0"}
_SHAPE_NODES = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0"}


class Target(NamedTuple):
    """A layer that prunes, or is to, by its name, with its configuration."""

    name: str
    module: nn.Linear | nn.Conv2d
    config: SDGPConfig

    def prune(self) -> None:
        """Make it an SDGP layer that is switched on."""
        swap_layer(self.module, self.config)
        assert isinstance(self.module, SDGPLayer)
        self.module.sdgp_active = True


def takes_own(model: nn.Module, config: SDGPConfig | None) -> bool:
    """Whether `config` None stands for the configurations that the SDGP layers of `model` have."""
    return config is None and any(isinstance(module, SDGPLayer) for module in model.modules())


def find_targets(model: nn.Module, config: SDGPConfig | None, filter_fn: Filter) -> tuple[list[Target], SwapReport]:
    """The layers that `accelerate_` with these arguments would leave as SDGP layers, and its report.

    config None: the SDGP layers of an accelerated model with their own configurations, whatever `filter_fn` says.
    """
    own = takes_own(model, config)
    select = selector(filter_fn)
    steps = plan_swap(model, config, (lambda module, name: False) if own else select)
    targets = []
    for step in steps:
        if step.config is not None:
            assert isinstance(step.module, (nn.Linear, nn.Conv2d))
            targets.append(Target(step.report.name or "(the model)", step.module, step.config))
    return targets, SwapReport(
        tuple(describe_as_it_is(step.module, step.report) if own else step.report for step in steps)
    )


def gemm_node(node: Any) -> Any:
    """The node behind a layer's output that multiplies, past the views and casts around it; None where it is hidden."""
    while node is not None and node.name() in _SHAPE_NODES:
        node = node.next_functions[0][0]
    if node is None:
        return None
    python_function = getattr(node, "_forward_cls", None)
    is_sdgp = python_function is not None and python_function.__module__ == functional.__name__
    return node if is_sdgp or node.name() in GEMM_NODES else None
