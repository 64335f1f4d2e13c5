"""`accelerate_` and `restore_`: exchange the classes of a model's layers in place.

Only ``module.__class__`` changes (and one attribute is added), so the module object, its Parameters, hooks,
names, buffers, dtype, device, memory format and training flag are the ones it had.
"""

from __future__ import annotations

import contextlib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sdgp_accel import batch as batches
from sdgp_accel.backends import Decision, forget_decisions
from sdgp_accel.config import SDGPConfig
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.nn import SDGPConv2d, SDGPLayer, SDGPLinear, decide_layer, layer_input, layer_kind, warn_of_scope
from sdgp_accel.report import LayerReport, SwapReport, describe_as_it_is, describe_skipped, describe_swapped

Filter = Callable[[nn.Module, str], bool] | str | Iterable[str] | None

_SWAPS: dict[type[Any], type[nn.Module]] = {nn.Linear: SDGPLinear, nn.Conv2d: SDGPConv2d}
_ORIGINALS: dict[type[Any], type[Any]] = {SDGPLinear: nn.Linear, SDGPConv2d: nn.Conv2d}

# DTensor: FSDP2's sharded parameters, which are ordinary tensors whenever the layer runs.
_ORDINARY_WEIGHTS = ("Tensor", "Parameter", "DTensor", "FakeTensor")


class Step(NamedTuple):
    """What `accelerate_` will do to one module; `config` None: make (or leave) it an ordinary layer."""

    module: nn.Module
    config: SDGPConfig | None
    report: LayerReport


def accelerate_(model: nn.Module, config: SDGPConfig | None = None, filter_fn: Filter = None) -> SwapReport:
    """Give every eligible Linear and Conv2d of `model`, in place, a backward that prunes by `config`.

    filter_fn: ``(module, name) -> bool``, or one or several glob patterns of names (``"blocks.*.mlp.*"``);
        None takes every layer. A shared module counts as selected where any of its names is. Layers that are
        not selected are left alone, so several calls can give several configurations to parts of a model.

    Idempotent; calling it again with another configuration replaces the old one. All or nothing: whatever it
    raises, it raises before the first layer changes. Exact `nn.Linear` and `nn.Conv2d` only: subclasses may
    compute something else. Warns where no layer is eligible.

    Returns a `SwapReport` of every layer with weights. Raises TypeError for wrong argument types, and
    RuntimeError where ``fallback="error"`` and a layer cannot run on the kernels.
    """
    steps = plan_swap(model, config, filter_fn)
    report = SwapReport(tuple(step.report for step in steps))
    if not report.swapped:  # here, where nothing has changed yet: a warning may be an error
        warnings.warn("accelerate_ found no layer to swap in this model; see the returned report", stacklevel=2)
    for step in steps:
        if step.config is not None:
            swap_layer(step.module, step.config)
        elif isinstance(step.module, SDGPLayer):
            restore_layer(step.module)
    return report


def restore_(model: nn.Module) -> nn.Module:
    """Turn every SDGP layer of `model` back into `nn.Linear` or `nn.Conv2d`, in place, and return `model`.

    Raises RuntimeError, before changing anything, where a wrapper (FSDP2, parametrizations) has derived its
    own class from an SDGP layer, or a hook of another library has replaced its forward: undo that first.
    """
    check_model(model)
    layers = [module for module in model.modules() if isinstance(module, SDGPLayer)]
    for module in layers:
        _check_restorable(module)
    for module in layers:
        restore_layer(module)
    return model


def plan_swap(model: nn.Module, config: SDGPConfig | None = None, filter_fn: Filter = None) -> list[Step]:
    """What `accelerate_` would do with these arguments; raises what it raises, changes nothing."""
    check_model(model)
    config = checked_config(config)
    select = selector(filter_fn)
    return [_plan_step(module, names, config, select) for module, names in _layers(model)]


def swap_layer(module: nn.Module, config: SDGPConfig) -> None:
    """Make an exact nn.Linear or nn.Conv2d (or one that is swapped already) an SDGP layer with `config`."""
    if type(module) in _SWAPS:
        module.__class__ = _SWAPS[type(module)]
    assert isinstance(module, SDGPLayer)
    module.sdgp_config = config


def _check_restorable(module: SDGPLayer) -> None:
    if type(module) not in _ORIGINALS:
        raise RuntimeError(
            f"{type(module).__name__} cannot become an ordinary layer again: its class was derived from an SDGP layer "
            "(by fully_shard, a parametrization or a subclass); undo that first, or switch pruning off: "
            "set_active_(model, False)"
        )
    if "forward" in vars(module):
        raise RuntimeError(
            f"{type(module).__name__} cannot become an ordinary layer again: its forward was replaced (by a hook of "
            "another library); undo that first, or switch pruning off: set_active_(model, False)"
        )


def restore_layer(module: SDGPLayer) -> None:
    """Make an SDGPLinear or SDGPConv2d an ordinary layer again; RuntimeError for classes derived from them."""
    _check_restorable(module)
    original = _ORIGINALS[type(module)]
    for name in ("_sdgp_config", "_sdgp_active", "_sdgp_plan"):
        module.__dict__.pop(name, None)
    module.__class__ = original


def set_active_(model: nn.Module, active: bool) -> nn.Module:
    """Switch the pruning of every SDGP layer of `model` off or on again, in place, and return `model`.

    A layer that is off runs the ordinary dense backward, from its next forward pass on; its configuration stays, and
    `accelerate_` does not switch it on. Costs nothing per step either way: the layer's plan is exchanged. Under
    torch.compile the next step recompiles, once for each of the two states; a captured CUDA graph has to be captured
    again. Checkpoints do not hold the switch: set it again when training resumes (recipes and callbacks do).

    Raises TypeError for a `model` that is no module or an `active` that is no bool. Warns where no layer is swapped.
    """
    check_model(model)
    if not isinstance(active, bool):
        raise TypeError(f"active must be True or False; got {active!r}")
    layers = [module for module in model.modules() if isinstance(module, SDGPLayer)]
    for layer in layers:
        layer.sdgp_active = active
    if not layers:
        warnings.warn("set_active_ found no SDGP layer in this model; call accelerate_ first", stacklevel=2)
    return model


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back classes, configurations and switches, gradients, buffers and the random state of `model`.

    What its parameters have registered to run after their gradients (`Tensor.register_post_accumulate_grad_hook`), an
    optimizer's step perhaps, does not run meanwhile, and what torch.compile has wrapped runs eagerly: hooks on layers
    would break its graphs. Raises ValueError for a model on the meta device, which cannot run.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model must be on a device that computes; got parameters on meta")
    before = {
        module: (module.sdgp_config, module.sdgp_active) if isinstance(module, SDGPLayer) else None
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    assigned = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = [(found, dict(found)) for parameter, _ in gradients if (found := parameter._post_accumulate_grad_hooks)]
    for registered, _ in hooks:
        registered.clear()  # autograd holds this very dictionary
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, state in before.items():
            if state is not None:
                swap_layer(module, state[0])
                assert isinstance(module, SDGPLayer)
                module.sdgp_active = state[1]
            elif isinstance(module, SDGPLayer):
                restore_layer(module)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for registered, kept in hooks:
            registered.update(kept)
        for names, kept in assigned:
            names.update(kept)
        for buffer, value in buffers:
            # What cannot be written to (expanded, made in inference mode) has not changed.
            with torch.no_grad(), contextlib.suppress(RuntimeError):
                buffer.copy_(value)


@contextlib.contextmanager
def _buffers_of_its_own(model: nn.Module) -> Iterator[None]:
    """Keeps the forward of DistributedDataParallel from broadcasting buffers, in which every rank has to take part."""
    wrappers = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    before = [wrapper.require_forward_param_sync for wrapper in wrappers]
    for wrapper in wrappers:
        wrapper.require_forward_param_sync = False
    try:
        yield
    finally:
        for wrapper, value in zip(wrappers, before, strict=True):
            wrapper.require_forward_param_sync = value


def tune(
    model: nn.Module, batch: Any, config: SDGPConfig | None = None, *, autocast: torch.dtype | None = None
) -> SwapReport:
    """Decide now, on the shapes of `batch`, what each SDGP layer of `model` runs, and report it with the times.

    Without this call each shape is decided where it is first used. With ``backend="auto"`` on a GPU that has the
    kernels, deciding means measuring dense and sparse dgrad and wgrad and prune + compress; what this machine has
    measured before is remembered (`sdgp_accel.tuning.cache`). Among data-parallel processes call it after
    ``init_process_group``, in any of them or in all; where the forward itself communicates (FSDP, SyncBatchNorm), in
    all.

    batch: what a DataLoader yields: a tensor, a mapping of keyword arguments, or (inputs, targets). config: decide
    for what ``accelerate_(model, config)`` would make of the model; None for the layers that are swapped already.
    autocast: the dtype of the autocast that training runs under. One forward pass; the model is left as it was. Layers
    that the pass does not reach are reported as `accelerate_` reports them, those that `set_active_` has switched off
    with what they run when they are on again, and all as if their inputs needed a gradient.

    Raises what `accelerate_` raises for `model` and `config`, and ValueError or TypeError for a bad `batch` or
    `autocast`.
    """
    batches.check_autocast(autocast)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        forget_decisions()  # each process may have taken its own before the group was there
    decisions: dict[nn.Module, Decision] = {}

    def after_forward(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        x = layer_input(inputs, named)
        decision = decide_layer(module, x.to(output.dtype), configs[module])[1]
        decisions[module] = decision.where(True, module.weight.requires_grad)  # the pass does not tell of inputs

    steps = plan_swap(model, config, (lambda module, name: False) if config is None else None)
    listed = [describe_as_it_is(step.module, step.report) if config is None else step.report for step in steps]
    configs = {step.module: step.config for step in steps if step.config is not None}
    handles = [layer.register_forward_hook(after_forward, with_kwargs=True) for layer in configs]
    device = next(model.parameters(), torch.empty(0)).device
    try:
        with (
            left_as_it_was(model),
            _buffers_of_its_own(model),
            torch.no_grad(),
            torch.autocast(device.type, autocast, enabled=autocast is not None),
        ):
            batches.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    layers = zip(steps, listed, strict=True)
    return SwapReport(tuple(_decided(step.module, report, decisions.get(step.module)) for step, report in layers))


def _decided(module: nn.Module, listed: LayerReport, decision: Decision | None) -> LayerReport:
    report = listed.decided(decision)
    if decision is None or not isinstance(module, SDGPLayer) or module.sdgp_active:
        return report
    return replace(report, reason=f"{report.reason}; switched off by set_active_, and dense until it is on again")


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


def _layers(model: nn.Module) -> Iterable[tuple[nn.Module, list[str]]]:
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


def _plan_step(
    module: nn.Module, names: list[str], config: SDGPConfig, select: Callable[[nn.Module, str], bool]
) -> Step:
    """Decide about one module without touching it."""
    if not any(select(module, name) for name in names):
        if isinstance(module, (SDGPLinear, SDGPConv2d)):
            kept = module.sdgp_config
            return Step(module, kept, describe_swapped(module, names, kept, "not selected: keeps its configuration"))
        return Step(module, None, describe_skipped(module, names, "not selected by filter_fn"))
    reason = _why_not(module, config)
    if reason is not None:
        if isinstance(module, SDGPLayer):
            _check_restorable(module)
        return Step(module, None, describe_skipped(module, names, reason))
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    warn_of_scope(layer_kind(module), config)  # here, where nothing has changed yet: a warning may be an error
    return Step(module, config, describe_swapped(module, names, config, None))


def _why_not(module: nn.Module, config: SDGPConfig) -> str | None:
    """The reason why `module` stays an ordinary layer, or None where it can be swapped."""
    if type(module) not in _SWAPS and not isinstance(module, SDGPLayer):
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
