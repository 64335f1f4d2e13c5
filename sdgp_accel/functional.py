"""`linear` and `conv2d` with the forward of torch and a backward that prunes the output gradient."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from sdgp_accel import ops
from sdgp_accel.backends import Decision, Gradients, check_floating, decide_conv2d, decide_linear, warn_once
from sdgp_accel.config import SDGPConfig
from sdgp_accel.geometry import Window, flat, pair
from sdgp_accel.layer_plan import LayerKind, plan_string, prunes

_DEFAULT = SDGPConfig()
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # True where compiled autograd traces a backward


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, plan: str | SDGPConfig = _DEFAULT) -> Tensor:
    """`torch.nn.functional.linear` whose backward prunes the output gradient.

    input: [..., in_features], weight: [out_features, in_features], bias: [out_features]; floating point.
    plan: an `SDGPConfig`, or the string `layer_plan.plan_string` makes of it.

    The result has the bits of the dense function, under autocast too. In backward (spec: McDanel et al.,
    arXiv:2202.00774), with dY seen as [T, out_features],
    ``dX = prune(dY, along out_features) W``, ``dW = prune(dY, along T)^T X`` and ``db = Σ_T dY`` unpruned.

    Nested tensors run the ordinary dense backward, and so do tensors of classes with operations of their own (DTensor,
    quantized weights), everything under torch.func's transforms, in forward mode (torch.autograd.forward_ad) and in
    what torch.export and torch.jit.trace record.

    Raises TypeError for an input that is not floating point, and RuntimeError on double backward.
    """
    _check_tensor(input, weight)
    weight_shape = weight.shape
    compiling = torch.compiler.is_compiling()
    # Of other dims: torch's own error, or what it makes of a weight that is one row without its dimension.
    is_dense = not torch.is_grad_enabled() or input.dim() == 0 or len(weight_shape) != 2
    if is_dense or _is_foreign(input, weight, compiling):
        check_floating(input.dtype)
        return F.linear(input, weight, bias)
    if not isinstance(plan, str):
        plan = _encoded(plan, "linear")
    if compiling:
        if _is_autocast(input):
            input, weight, bias = _autocast(input, weight, bias)
        check_floating(input.dtype)
        if not prunes(plan):
            return F.linear(input, weight, bias)
        traced: Tensor = _Linear.apply(input, weight, bias, (plan, None, None))
        return traced
    to = None
    if torch._C._is_any_autocast_enabled() and _is_autocast(input):
        input, weight, bias, to = _autocast_but_masters(input, weight, bias)
    dtype = input.dtype if to is None else to
    deterministic = torch._C._get_deterministic_algorithms()
    decision = decide_linear(plan, input.shape, weight_shape[0], dtype, input.device, deterministic, weight.dtype)
    if decision.single is not None:
        decision = decision.where(input.requires_grad, weight.requires_grad)
    if decision.backend is None:
        return F.linear(input, weight, bias)
    if to is not None:
        input = input.to(to)
    result: Tensor = _Linear.apply(input, weight, bias, (plan, decision, to))
    return result


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    plan: str | SDGPConfig = _DEFAULT,
) -> Tensor:
    """`torch.nn.functional.conv2d` whose backward prunes the output gradient.

    input: [N, C_in, H, W] or [C_in, H, W], weight: [C_out, C_in / groups, R, S], bias: [C_out]; floating
    point, any memory format (channels_last gradients are pruned without a copy). `padding` may be ``"same"``
    or ``"valid"``. For `plan`, the numbers and the errors see `linear`; T runs over (n, p, q).
    """
    _check_tensor(input, weight)
    check_floating(input.dtype)
    is_dense = not torch.is_grad_enabled() or input.dim() not in (3, 4) or weight.dim() != 4  # dims: torch's own error
    # Where names are to be resolved: torch.jit.trace has no ints for that, and compares the line of both its calls.
    if is_dense or (isinstance(padding, str) and _is_foreign(input, weight, torch.compiler.is_compiling())):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    if isinstance(padding, str):
        if _is_autocast(input):
            input = input.to(_autocast_dtype(input))
        input, padding = resolve_padding(input, weight, padding, stride, dilation)
    window = (stride, pair("padding", padding), dilation, groups)
    return convolve(input, weight, bias, window, plan if isinstance(plan, str) else _encoded(plan, "conv2d"))


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, plan: str) -> Tensor:
    """`conv2d` with its integers as a layer has them."""
    _check_tensor(input, weight)
    input_shape, weight_shape = input.shape, weight.shape
    compiling = torch.compiler.is_compiling()
    is_dense = not torch.is_grad_enabled() or _is_foreign(input, weight, compiling)
    if is_dense or len(input_shape) != 4 or len(weight_shape) != 4:
        if not is_dense and len(input_shape) == 3:
            return convolve(input.unsqueeze(0), weight, bias, window, plan).squeeze(0)
        check_floating(input.dtype)
        return F.conv2d(input, weight, bias, *window)
    channels_last = is_channels_last(input) or is_channels_last(weight)
    if compiling:
        if _is_autocast(input):
            input, weight, bias = _autocast(input, weight, bias)
        check_floating(input.dtype)
        if not prunes(plan):
            return F.conv2d(input, weight, bias, *window)
        traced: Tensor = _Conv2d.apply(input, weight, bias, (plan, None, None, window, channels_last))
        return traced
    to = None
    if torch._C._is_any_autocast_enabled() and _is_autocast(input):
        input, weight, bias, to = _autocast_but_masters(input, weight, bias)
    dtype = input.dtype if to is None else to
    deterministic = torch._C._get_deterministic_algorithms()
    decision = decide_conv2d(
        plan, input_shape, weight_shape, window, channels_last, dtype, input.device, deterministic, weight.dtype
    )
    if decision.single is not None:
        decision = decision.where(input.requires_grad, weight.requires_grad)
    if decision.backend is None:
        return F.conv2d(input, weight, bias, *window)
    if to is not None:
        input = input.to(to)
    result: Tensor = _Conv2d.apply(input, weight, bias, (plan, decision, to, window, channels_last))
    return result


# Both functions: forward and setup_context in one, since the split form costs 14 µs more per call; and an eager
# backward that calls what the op calls, with the decision taken in forward, which saves 5 to 10 µs. The op is for
# whatever traces (torch.compile, compiled autograd and other tensor subclasses) and for a backward that is itself
# recorded. Under autocast parameters are cast within: their gradients may then come from the kernels as they are to be,
# in float32. autograd casts what comes in another dtype. What tells an ordinary eager backward stands in both, a frame
# less. An output that got no gradient stays without: parameters that a dense layer leaves alone are not moved by zeros.


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: tuple[str, Decision | None, torch.dtype | None],
    ) -> Tensor:
        needs_dx, needs_dw, _, _ = ctx.needs_input_grad
        kept, to = weight, call[2]
        if to is not None:
            ctx.parameter = weight
            weight, bias = weight.to(to), None if bias is None else bias.to(to)
            kept = _kept(ctx.parameter, weight) if needs_dx else weight
        ctx.save_for_backward(input if needs_dw else None, kept if needs_dx else None)
        ctx.call = call
        traced = call[1] is None
        if not traced:
            ctx.set_materialize_grads(False)
        if input.dim() == 2:
            return F.linear(input, weight, bias)
        # A view of the product, which as a Function's output could not be changed in place: not to be known as one.
        if traced or torch._C._len_torch_dispatch_stack():
            # Selective checkpointing and the like look for the product itself, which the other way hides from them.
            view = F.linear(input, weight, bias)
            result: Tensor = torch.ops.aten._unsafe_view.default(view, view.shape)
            return result
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db, _ = ctx.needs_input_grad
        plan, decision, to = ctx.call
        is_ordinary = (
            decision is not None
            and type(dy) is Tensor
            and not torch.is_grad_enabled()
            and not dy.is_meta  # which Dynamo of torch 2.6 cannot ask for, but it comes without a decision
            and not _is_dynamo_compiling()
        )
        if is_ordinary and _current_backward() != _whole_backward:
            x, weight = _asked_for(ctx, x, weight)
        if x is None and weight is None:
            return None, None, dy.sum(tuple(range(dy.dim() - 1))) if dy.dim() > 1 else dy, None
        if to is not None and weight is not None and weight.dtype != to:
            weight = weight.to(to)
        if is_ordinary:
            try:
                return *ops.run(dy, x, weight, needs_db, decision), None
            except RuntimeError:
                return *_for_batches(dy, x, weight, needs_db, decision), None
        gradients = ops.linear_backward(dy, x, weight, needs_db, plan)
        used = weight if to is None or weight is None else ctx.parameter
        dtype = None if to is None else ctx.parameter.dtype
        return *_place(_once(gradients, dy, x, used), dtype, needs_dx, needs_dw, needs_db), None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: tuple[str, Decision | None, torch.dtype | None, Window, bool],
    ) -> Tensor:
        needs_dx, needs_dw, _, _ = ctx.needs_input_grad
        kept, to = weight, call[2]
        if to is not None:
            ctx.parameter = weight
            weight, bias = weight.to(to), None if bias is None else bias.to(to)
            kept = _kept(ctx.parameter, weight) if needs_dx else weight
        if needs_dx and needs_dw:
            ctx.save_for_backward(input, kept)
        else:
            ctx.save_for_backward(input if needs_dw else None, kept if needs_dx else None)
            ctx.absent_shape = weight.shape if needs_dw else input.shape
        ctx.call = call
        if call[1] is not None:  # not traced
            ctx.set_materialize_grads(False)
        return F.conv2d(input, weight, bias, *call[3])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db, _ = ctx.needs_input_grad
        plan, decision, to, window, channels_last = ctx.call
        is_ordinary = (
            decision is not None
            and type(dy) is Tensor
            and not torch.is_grad_enabled()
            and not dy.is_meta  # which Dynamo of torch 2.6 cannot ask for, but it comes without a decision
            and not _is_dynamo_compiling()
        )
        if is_ordinary and _current_backward() != _whole_backward:
            x, weight = _asked_for(ctx, x, weight)
        if x is None and weight is None:
            return None, None, dy.sum((0, 2, 3)), None
        if to is not None and weight is not None and weight.dtype != to:
            weight = weight.to(to)
        if is_ordinary:
            try:
                return *ops.run(dy, x, weight, needs_db, decision), None
            except RuntimeError:
                return *_for_batches(dy, x, weight, needs_db, decision), None
        absent_shape = () if needs_dx and needs_dw else ctx.absent_shape
        gradients = ops.conv2d_backward(dy, x, weight, needs_db, absent_shape, flat(window), channels_last, plan)
        used = weight if to is None or weight is None else ctx.parameter
        dtype = None if to is None else ctx.parameter.dtype
        return *_place(_once(gradients, dy, x, used), dtype, needs_dx, needs_dw, needs_db), None


# The latest backward that wanted the weight of its first layer: taken to want those of all, since asking for each takes
# 5 µs, and 25 where autograd.grad was given the weights themselves.
_whole_backward = -1
_current_backward = torch._C._current_graph_task_id


def _asked_for(ctx: Any, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`x` and `weight`, None where this backward is not to deliver what they take part in: ``torch.autograd.grad`` may
    want some gradients only, as for adversarial examples, and `needs_input_grad` was made before, in forward.
    """
    global _whole_backward
    if x is None:
        return x, weight
    (to_input, _), (to_weight, _) = ctx.next_functions[:2]
    if _is_executed(to_weight):
        _whole_backward = _current_backward()
    else:
        x = None
    return x, weight if weight is not None and _is_executed(to_input) else None


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch's way to say of a leaf that autograd.grad was given it
        return True


def _for_batches(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool, decision: Decision) -> Gradients:
    """The dense backward where `ops.run` has just failed for a batch of gradients (``is_grads_batched``,
    ``jacobian(vectorize=True)``); for any other `dy` its error goes on. To ask beforehand would cost every backward
    3 µs.
    """
    if not torch._C._functorch.is_legacy_batchedtensor(dy):
        raise
    warn_once("layers run the ordinary dense backward for batches of gradients (is_grads_batched)")
    return ops.run(dy, x, weight, bias, decision._replace(backend=None, bound=None, single=None))


# The hooks of now; not to be asked for before torch 2.8, and taken for none there.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)

# By a parameter's id, the cast of it that some graph keeps for its backward: as long as it does, the parameter lives.
_casts: dict[int, weakref.ref[Tensor]] = {}


def _kept(parameter: Tensor, cast: Tensor) -> Tensor:
    """What a layer keeps for backward of a parameter that it has cast: the cast, or where a graph that is alive keeps
    one already, the parameter, to be cast again. So however often a parameter is used under autocast, one cast of it is
    in memory, as in dense layers, which share torch's; but no forward takes a cast of values that may have changed.

    Always the cast where hooks take what is saved: activation checkpointing expects the same dtype from the second
    forward as from the first, whatever other graphs have come to live or died in between.
    """
    other = _casts.get(id(parameter))
    if other is not None and other() is not None and _saved_tensors_hooks(False) is None:
        return parameter
    _casts[id(parameter)] = weakref.ref(cast)
    return cast


class _Once(torch.autograd.Function):
    """Passes gradients through and stands in their graph as what cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(gradient.detach() for gradient in tensors[:count] if gradient is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "double backward through an SDGP layer is not supported (pruning is not differentiable); "
            "accelerate_ only layers that are differentiated once, or call sdgp_accel.restore_(model)"
        )


def _once(gradients: list[Tensor], *inputs: Tensor | None) -> Sequence[Tensor]:
    """The gradients; with ``create_graph=True``, made to depend on `inputs` through `_Once`.

    A compiled backward has no graph of its own, and torch.compile refuses double backward by itself.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    result: tuple[Tensor, ...] = _Once.apply(len(gradients), *gradients, *inputs)
    return result


def _place(gradients: Sequence[Tensor], dtype: torch.dtype | None, *needs: bool) -> list[Tensor | None]:
    """Put the gradients that were computed where autograd expects them, those of parameters in their `dtype` where that
    is given: compiled autograd of torch 2.6 does not cast.
    """
    position = iter(gradients)
    dx, *others = (next(position) if need else None for need in needs)
    return [dx, *(other if other is None or dtype is None else other.to(dtype) for other in others)]


def _check_tensor(input: object, weight: object) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a floating point tensor; got {input!r} of type {type(input).__name__}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor; got {weight!r} of type {type(weight).__name__}")


# What stands for ordinary tensors while something traces.
_STAND_INS = ("FakeTensor", "FunctionalTensor")
_NO_DISPATCH = Tensor.__torch_dispatch__


def _has_its_own_operations(tensor: Tensor) -> bool:
    """True for a tensor of a class that computes by itself (``__torch_dispatch__``) and warns of it: it may know how a
    Linear layer is differentiated, but not what a pruned backward is made of, and has no memory for kernels to read.
    """
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return False
    if kind.__torch_dispatch__ is _NO_DISPATCH or kind.__name__ in _STAND_INS:
        return False
    _warn_of_class(kind.__name__)
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # Dynamo cannot trace a warning: it calls this
def _warn_of_class(name: str) -> None:
    if name == "DTensor":  # by name: importing torch.distributed.tensor takes half a second
        warn_once(
            "layers with tensor-parallel weights (DTensor) run the ordinary dense backward; the others draw by the "
            "rank of their process: call sdgp_accel.set_data_parallel_rank with its place among the data-parallel "
            "ones, so that tensor-parallel processes, whose copies of the others are to stay alike, draw alike"
        )
    else:
        warn_once(f"layers run the ordinary dense backward for tensors of the class {name}")


def _is_foreign(input: Tensor, weight: Tensor, compiling: bool) -> bool:
    """True where only torch's own functions can go: an autograd function has no part there, or would lose its backward
    (``torch.export.export(strict=True)``).
    """
    if type(weight) is not nn.Parameter and _has_its_own_operations(weight):
        return True
    if compiling:
        # What torch.compiler.is_exporting returns, itself true in all that torch.compile of torch 2.7 to 2.13 traces.
        is_exporting: bool = getattr(torch.compiler, "_is_exporting_flag", False)  # not before torch 2.7
        if is_exporting or torch._C._are_functorch_transforms_active():
            return True
    elif torch.is_inference_mode_enabled():  # where nothing is recorded, whatever enable_grad says within it
        return True
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        warn_once("layers under torch.func's transforms (vmap, grad, jvp, ..) run the ordinary dense backward")
        return True
    elif forward_ad._current_level >= 0:
        warn_once("layers in forward mode (torch.autograd.forward_ad) run the ordinary dense backward")
        return True
    elif torch._C._get_tracing_state() is not None:
        warn_once("torch.jit.trace records the ordinary dense layers")
        return True
    elif input.is_nested:
        warn_once("layers run the ordinary dense backward for nested tensors")
        return True
    return type(input) is not Tensor and _has_its_own_operations(input)


def _encoded(plan: SDGPConfig, kind: LayerKind) -> str:
    if not isinstance(plan, SDGPConfig):
        raise TypeError(f"plan must be an SDGPConfig or a plan string; got {plan!r}")
    return plan_string(kind, plan)


def _is_autocast(input: Tensor) -> bool:
    device_type = ops.device_type(input)
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast_but_masters(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype | None]:
    """`_autocast`, or the tensors as they are where the autograd function is to cast, and the dtype to cast to."""
    to = _autocast_dtype(input)
    # Of float64, which autocast leaves alone: there the cast parameters do not fit the input, as in a dense layer.
    if to != torch.float64 and _is_master(weight) and (bias is None or _is_master(bias)):
        return input, weight, bias, to
    return *_autocast(input, weight, bias), None


def _is_master(tensor: Tensor) -> bool:
    """True for a float32 parameter: it is cast within, where a tensor that was computed would be kept for backward."""
    return type(tensor) is nn.Parameter and tensor.dtype == torch.float32


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would. Inside the autograd function, where gradients are off, autocast would put an
    untracked copy of the weight into its cache, and the next dense use of that weight would lose its gradient.
    """
    input, weight = input.to(_autocast_dtype(input)), weight.to(_autocast_dtype(weight))
    return input, weight, None if bias is None else bias.to(_autocast_dtype(bias))


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast casts `tensor` to: by its own rule, float64 and numbers of other kinds stay as they are."""
    dtype = tensor.dtype
    if dtype == torch.float64 or not dtype.is_floating_point:
        return dtype
    return torch.get_autocast_dtype(ops.device_type(tensor))


def is_channels_last(tensor: Tensor) -> bool:
    """True for a 4-D tensor that is channels_last and not also contiguous."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def resolve_padding(
    input: Tensor, weight: Tensor, padding: str, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Resolve ``"same"`` and ``"valid"`` as torch does: what is asymmetric is padded first, on the far side."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be 'same', 'valid', an int or two ints; got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1; got stride {stride}")
    total_h, total_w = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    if total_h % 2 or total_w % 2:
        input = F.pad(input, (0, total_w % 2, 0, total_h % 2))
    return input, (total_h // 2, total_w // 2)
