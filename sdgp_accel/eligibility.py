"""Which layers of a model can be swapped, and which of them the user has selected."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sdgp_accel.config import SDGPConfig
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.nn import SDGPConv2d, SDGPLayer, SDGPLinear, layer_kind

Filter = Callable[[nn.Module, str], bool] | str | Iterable[str] | None

SWAPS: dict[type[Any], type[nn.Module]] = {nn.Linear: SDGPLinear, nn.Conv2d: SDGPConv2d}

# DTensor: FSDP2's sharded parameters, which are ordinary tensors whenever the layer runs.
_ORDINARY_WEIGHTS = ("Tensor", "Parameter", "DTensor", "FakeTensor")


def check_model(model: object) -> None:
    """Raise TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def checked_config(config: object) -> SDGPConfig:
    """`config`, the default for None; TypeError for anything else."""
    config = SDGPConfig() if config is None else config
    if not isinstance(config, SDGPConfig):
        raise TypeError(f"config must be an SDGPConfig or None; got {type(config).__name__}")
    return config


def selector(filter_fn: Filter) -> Callable[[nn.Module, str], bool]:
    """`filter_fn`, None or name patterns as ``(module, name) -> bool``; TypeError for anything else."""
    if filter_fn is None:
        return lambda module, name: True
    if callable(filter_fn) and not isinstance(filter_fn, type):
        return filter_fn
    patterns = [filter_fn] if isinstance(filter_fn, str) else list(filter_fn) if isinstance(filter_fn, Iterable) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"filter_fn must be a callable (module, name) -> bool or name patterns; got {filter_fn!r}")
    return lambda module, name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def layers_with_weights(model: nn.Module) -> Iterable[tuple[nn.Module, list[str]]]:
    """Every module with weights to multiply by, once, with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _has_weights(module):
            names.setdefault(module, []).append(name)
    return names.items()


def _has_weights(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, _ConvNd)):
        return True  # parametrized ones own no parameter called weight
    own = module.named_parameters(recurse=False)
    return any("weight" in name and (_is_lazy(p) or p.dim() >= 2) for name, p in own)


def _is_lazy(parameter: object) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def why_not(module: nn.Module, config: SDGPConfig) -> str | None:
    """The reason why `module` stays an ordinary layer, or None where it can be swapped."""
    if type(module) not in SWAPS and not isinstance(module, SDGPLayer):
        return _why_not_class(module)
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    if "forward" in vars(module) and not isinstance(module, SDGPLayer):
        return "its forward was replaced (by a hook of another library?): accelerate before that"
    if not isinstance(getattr(module, "weight", None), Tensor):
        return "it has no weight"
    if module.weight.is_complex() or not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}, not real floating point"
    weight_class = type(module.weight).__name__
    if weight_class not in _ORDINARY_WEIGHTS:
        return f"its weight is a {weight_class}, not an ordinary tensor"
    in_channels = _in_channels(module)
    if in_channels < config.min_in_channels:
        return f"{in_channels} input channels < min_in_channels = {config.min_in_channels}"
    if not decode(plan_string(layer_kind(module), config)).prunes:
        return "the configuration prunes neither pass"
    return None


def _why_not_class(module: nn.Module) -> str:
    kind = type(module)
    if any(_is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return "its parameters are not initialized yet: run one batch first"
    if nn.utils.parametrize.is_parametrized(module):
        return "parametrized: its class belongs to torch.nn.utils.parametrize; accelerate before parametrizing"
    if kind.__name__.startswith("FSDP"):
        return "its class belongs to fully_shard; accelerate before wrapping"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its owner (nn.MultiheadAttention) uses the weight without calling the layer"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolutions are not supported"
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return f"{kind.__name__} is a subclass of nn.{_base_name(module)} and may compute something else"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "an embedding has no GEMM in its backward"
    return f"{kind.__name__} is neither nn.Linear nor nn.Conv2d"


def _base_name(module: nn.Linear | nn.Conv2d) -> str:
    return "Linear" if isinstance(module, nn.Linear) else "Conv2d"


def _in_channels(module: nn.Linear | nn.Conv2d) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels
