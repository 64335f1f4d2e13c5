"""Are the gradients right? Every pass of every SDGP layer against float64, on a model's own activations.

**Tolerance.** A backend sums K products of values that are exact in the compute dtype, in some order, in an
accumulator with unit roundoff u_a (float32's for fp16, bf16 and fp32; TF32 also rounds the operands), and rounds
the sum once to the compute dtype, u_o. Higham & Mary (2019, "A new approach to probabilistic rounding error
analysis", SIAM J. Sci. Comput. 41(5), theorem 3.1) bound the error of an inner product, for rounding errors that
are independent with mean zero, by ``λ sqrt(K) u_a Σ|a_k b_k|``, with a failure probability that falls like
``exp(-λ²/2)`` per value. Where values are subnormal the error of a rounding is absolute instead: half of the smallest
one, η. In the Frobenius norm over a whole result of s values, with |A||B| the product of the moduli, C the exact result
and u_t = 2^-11 for TF32 (else 0)::

    ‖C_computed - C‖ ≤ (λ sqrt(K) u_a + 2 u_t) ‖|A||B|‖ + u_o ‖C‖ + sqrt(s) (λ sqrt(K) η_a + η_o) / 2

The worst case, linear in K, would pass results that are plainly wrong for the millions of positions of a
convolution's wgrad. λ = 8 instead of a usual 4 leaves room for Winograd convolutions, whose transforms lose a few
more bits, and for fused multiply-adds that round in other places.

torch's own 16-bit convolutions on a CPU without instructions for them round more often, after each tap of the filter
or each image. There twice the error of torch's convolution of the same operands is allowed, where that is more.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdgp_accel import batch as batches
from sdgp_accel import ops, philox
from sdgp_accel.backends import Decision, dense
from sdgp_accel.batch import LossFn
from sdgp_accel.config import Pass, PruneSpec, SDGPConfig
from sdgp_accel.eligibility import Filter, check_model
from sdgp_accel.geometry import Geometry, LinearGeometry
from sdgp_accel.model_state import left_as_it_was
from sdgp_accel.nn import SDGPLayer, decide_layer, layer_input
from sdgp_accel.pruning import prune_matrix
from sdgp_accel.targets import Target, find_targets, gemm_node
from sdgp_accel.validation_report import Bias, PassCheck, ValidationReport

LAMBDA = 8.0
TF32_ROUNDOFF = 2.0**-11
FP16_LOSS_SCALE = 2.0**10  # gradients of a mean over a batch underflow in fp16; no figure here depends on the scale


class _Call(NamedTuple):
    """One backward of one layer: dY [.., C_out] or [N, C_out, P, Q], both other operands, and what runs it."""

    dy: Tensor
    x: Tensor
    weight: Tensor
    decision: Decision

    @property
    def geometry(self) -> Geometry:
        """The decision's."""
        return self.decision.geometry


def validate(
    model: nn.Module,
    batch: Any,
    config: SDGPConfig | None = None,
    filter_fn: Filter = None,
    *,
    loss_fn: LossFn | None = None,
    autocast: torch.dtype | None = None,
    draws: int = 8,
    seed: int = 0,
) -> ValidationReport:
    """Check dgrad and wgrad of every layer that `accelerate_(model, config, filter_fn)` would swap.

    batch: what a DataLoader yields: a tensor, a mapping of keyword arguments, or (inputs, targets).
    config: None takes each SDGP layer of an accelerated model with its own configuration, whatever `filter_fn`
        selects, and the default `SDGPConfig` for a model that has none.
    loss_fn: ``(output, targets) -> scalar``; see `batch.loss` for the default.
    autocast: the dtype to run the forward pass in, as under ``torch.autocast``.
    draws: draws of ``mvue`` to estimate its bias from; 0 leaves it out.

    One dense forward and backward pass gives every layer its true x and dY; the layer is checked at the moment
    its dY is there, so that no more than one layer's tensors are held. A second, pruned pass gives the end-to-end
    cosines. The model is left as it was: classes, parameters, gradients, buffers, random state.

    Raises TypeError or ValueError for wrong arguments and for a loss that is not one finite value, or that nothing in
    the model can change.
    """
    check_model(model)
    batches.check_loss_fn(loss_fn)
    if not isinstance(draws, int) or draws < 0 or draws == 1:
        raise ValueError(f"draws must be 0 or an int >= 2; got {draws!r}")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an int of 64 bits; got {seed!r}")
    batches.check_autocast(autocast)
    with left_as_it_was(model):
        targets, swap = find_targets(model, config, filter_fn)
        for module in model.modules():
            if isinstance(module, SDGPLayer):
                module.sdgp_active = False  # the dense gradients, from classes too that cannot be exchanged
        checks: list[PassCheck] = []
        handles = [_watch(target, checks, draws) for target in targets]
        try:
            _run(model, batch, loss_fn, autocast, seed)
        finally:
            for handle in handles:
                handle.remove()
        gradients = {target.name: _weight_gradient(target.module) for target in targets}
        for parameter in model.parameters():
            parameter.grad = None
        for target in targets:
            target.prune()
        _run(model, batch, loss_fn, autocast, seed)
        cosines = {target.name: _cosine(_weight_gradient(target.module), gradients[target.name]) for target in targets}
    if not checks:
        warnings.warn("validate found no backward pass to check in this model; see the report's `swap`", stacklevel=2)
    return ValidationReport(tuple(_with_end_to_end(check, cosines) for check in checks), swap)


def _run(model: nn.Module, batch: Any, loss_fn: LossFn | None, autocast: torch.dtype | None, seed: int) -> None:
    torch.manual_seed(seed)
    device = next(model.parameters(), torch.empty(0)).device
    with torch.enable_grad():
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = batches.training_loss(model, batch, loss_fn)
        if not bool(loss.isfinite()):
            raise ValueError(f"the loss of batch must be finite to validate gradients; got {loss.item()}")
        (loss * (FP16_LOSS_SCALE if autocast == torch.float16 else 1.0)).backward()  # type: ignore[no-untyped-call]


def _watch(target: Target, checks: list[PassCheck], draws: int) -> torch.utils.hooks.RemovableHandle:
    """Check every backward of the layer, as soon as its dY is known."""
    calls = 0

    def after_forward(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        nonlocal calls
        if not output.requires_grad:
            return  # the first, gradient-free forward of activation checkpointing, or a frozen beginning
        calls += 1
        label = target.name if calls == 1 else f"{target.name} (call {calls})"
        x = layer_input(inputs, named)
        needs = {"grad_input": x.requires_grad, "grad_weight": target.module.weight.requires_grad}

        def on_gradient(dy: Tensor) -> None:
            with torch.no_grad():
                call = _call(target, x, dy)
                wanted: list[Pass] = ["grad_input", "grad_weight"]
                checks.extend(_check(label, call, name, draws) for name in wanted if needs[name])

        def on_gradients(gradients: tuple[Tensor | None, ...]) -> None:
            if gradients[0] is not None:
                on_gradient(gradients[0].reshape(shape))

        # A change in place of the output may take the output's own node out of the graph, but not the one behind it.
        # And by the time of that one FSDP has gathered the weight.
        node, shape = gemm_node(output.grad_fn), output.shape
        if node is None:
            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]
        else:
            node.register_prehook(on_gradients)

    return target.module.register_forward_hook(after_forward, with_kwargs=True)


def _call(target: Target, x: Tensor, dy: Tensor) -> _Call:
    """The operands of the layer's backward: x padded and cast as the layer itself does it."""
    needs_dx, weight = x.requires_grad, target.module.weight
    x, decision = decide_layer(target.module, x.detach().to(dy.dtype), target.config)
    # Each pass is checked by itself, as it runs together with the other.
    decision = decision.where(needs_dx, weight.requires_grad)._replace(single=None)
    if dy.dim() == 3 and isinstance(target.module, nn.Conv2d):
        dy = dy.unsqueeze(0)
    return _Call(dy, x, weight.detach().to(dy.dtype), decision)


def _check(label: str, call: _Call, pass_name: Pass, draws: int) -> PassCheck:
    """One pass: the layer's gradient, and the same from float64 dense ops on the dY that it must have used."""
    is_dgrad = pass_name == "grad_input"
    spec = getattr(call.decision.plan, pass_name) if call.decision.backend is not None else None
    got, rng = _run_backward(call, is_dgrad)

    matrix = dense.matrix_view(call.dy, call.geometry)
    pruned = matrix if spec is None else _pruned(matrix, spec, call.geometry, rng)
    other = call.weight if is_dgrad else call.x
    # From here on in units near 1: gradients may be so large or so small that their norms and squares are not.
    dy_unit, unit = _unit(matrix), _unit(other)
    computed = [got]
    if not isinstance(call.geometry, LinearGeometry) and pruned.dtype.itemsize == 2 and pruned.device.type == "cpu":
        computed.append(_gemm(pruned, other, call.geometry, is_dgrad))
    pruned, other = pruned.double() / dy_unit, other.double() / unit
    exact = _gemm(pruned, other, call.geometry, is_dgrad)
    # Only norms and angles are taken of these: float32 will do, and is several times faster.
    plain = torch.float64 if call.dy.dtype == torch.float64 else torch.float32
    moduli = _gemm(pruned.abs().to(plain), other.abs().to(plain), call.geometry, is_dgrad)
    true = _gemm((matrix.double() / dy_unit).to(plain), other.to(plain), call.geometry, is_dgrad)

    terms = _terms(call.geometry, is_dgrad)
    size = float(exact.norm())
    relative, absolute = _roundoff(call.dy, call.geometry, terms)
    allowed = relative * float(moduli.norm()) + torch.finfo(call.dy.dtype).eps / 2 * size
    allowed += absolute * math.sqrt(exact.numel()) / dy_unit / unit
    error, *of_torch = (float((c.double().view_as(exact) / dy_unit / unit - exact).norm()) for c in computed)
    allowed = max([allowed, *(2 * e for e in of_torch if e < math.inf)])
    return PassCheck(
        layer=label,
        pass_name="dgrad" if is_dgrad else "wgrad",
        prune="dense" if spec is None else f"{spec.function} {spec.n}:{spec.m}",
        backend=call.decision.name,
        dtype=str(call.dy.dtype).removeprefix("torch."),
        terms=terms,
        error=error / size if size else error,
        tolerance=allowed / size if size else allowed,
        cosine=_cosine(exact, true),
        norm_ratio=size / float(true.norm()) if size else float(true.norm() == 0),
        bias=_bias(call, spec, dy_unit, other.to(plain), true, rng, draws)
        if spec and spec.function == "mvue" and draws
        else None,
    )


def _run_backward(call: _Call, is_dgrad: bool) -> tuple[Tensor, philox.Rng]:
    """The layer's gradient, and the random numbers that it used: those that torch's generator gives first."""
    x, weight = (None, call.weight) if is_dgrad else (call.x, None)
    device = call.dy.device
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    dx, dw, _ = ops.run(call.dy, x, weight, False, call.decision)
    result = dx if is_dgrad else dw
    assert result is not None
    generator.set_state(state)
    return result, philox.Rng(philox.next_seed(device), philox.data_parallel_rank(), 0 if is_dgrad else 1)


def _pruned(matrix: Tensor, spec: PruneSpec, geometry: Geometry, rng: philox.Rng) -> Tensor:
    """The gradient [T, C] that the pass consumes: along C for dgrad (pass 0), along T for wgrad (pass 1)."""
    return prune_matrix(matrix, spec, 1 - rng.pass_index, geometry.positions_per_sample, rng)


def _gemm(matrix: Tensor, other: Tensor, geometry: Geometry, is_dgrad: bool) -> Tensor:
    """dX from (dY, W) or dW from (dY, x), with dY as [T, C], by dense ops in the dtype of the operands."""
    if isinstance(geometry, LinearGeometry) and not is_dgrad:
        other = other.reshape(-1, geometry.in_channels)
    dy = dense.layer_view(matrix, geometry)
    return dense.dgrad(dy, other, geometry) if is_dgrad else dense.wgrad(dy, other, geometry)


def _terms(geometry: Geometry, is_dgrad: bool) -> int:
    """The products summed for one value of the result."""
    if not is_dgrad:
        return geometry.positions
    taps = 1 if isinstance(geometry, LinearGeometry) else math.prod(geometry.kernel)
    return geometry.out_channels // geometry.groups * taps


def _unit(values: Tensor) -> float:
    """The power of two at or below the largest of |values|."""
    return 2.0 ** (math.frexp(float(values.abs().max()) if values.numel() else 0.0)[1] - 1)


def _roundoff(dy: Tensor, geometry: Geometry, terms: int) -> tuple[float, float]:
    """The factors of ‖|A||B|‖ and of sqrt(s) in the tolerance (see the module's docstring)."""
    accumulator = torch.finfo(torch.float64 if dy.dtype == torch.float64 else torch.float32)
    result = torch.finfo(dy.dtype)
    is_linear = isinstance(geometry, LinearGeometry)
    sums = LAMBDA * math.sqrt(terms) / 2
    relative = sums * accumulator.eps
    absolute = sums * accumulator.smallest_normal * accumulator.eps + result.smallest_normal * result.eps / 2
    if dy.dtype == torch.float32 and dy.device.type == "cuda":
        exact = torch.get_float32_matmul_precision() == "highest" if is_linear else not torch.backends.cudnn.allow_tf32
        relative += 0.0 if exact else 2 * TF32_ROUNDOFF
    return relative, absolute


def _bias(
    call: _Call, spec: PruneSpec, dy_unit: float, other: Tensor, true: Tensor, rng: philox.Rng, draws: int
) -> Bias:
    """The projection of `draws` pruned gradients on the true one, without a GEMM per draw: <dX_r, dX> is
    <dY_r, D> with D = dX W^T, and <dW_r, dW> is <dY_r, D> with D = x dW^T (for Conv2d the convolution).

    other, true: in their units, as `_check` has them.
    """
    x, weight = (true, other) if rng.pass_index == 0 else (other, true)
    if isinstance(call.geometry, LinearGeometry):
        direction = F.linear(x.reshape(-1, x.shape[-1]), weight)
    else:
        geometry = call.geometry
        y = F.conv2d(x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        direction = dense.matrix_view(y, geometry)
    total = float(true.square().sum())
    if total == 0.0:
        return Bias(0.0, 0.0, draws)
    matrix = dense.matrix_view(call.dy, call.geometry)
    mean = 0.0
    for _ in range(draws):
        drawn = _pruned(matrix, spec, call.geometry, rng._replace(seed=philox.draw(matrix.device)))
        drawn = (drawn.double() / dy_unit).to(true.dtype)
        mean += float((drawn * direction).sum(dtype=torch.float64)) / total / draws
    scaled = (matrix.double() / dy_unit).to(true.dtype)
    deviation = math.sqrt(_projection_variance(scaled, drawn, direction, spec, 1 - rng.pass_index)) / total
    return Bias(mean - 1.0, deviation / math.sqrt(draws), draws)


def _projection_variance(matrix: Tensor, drawn: Tensor, direction: Tensor, spec: PruneSpec, axis: int) -> float:
    """An upper bound of the variance of <drawn, direction>, from the rule of ``mvue``, not from a sample: a sample
    would miss rare draws of large values.

    In a group with n to keep, an uncapped x_i becomes ±s with probability |x_i| / s, s being the same for all of
    them: the smallest value kept. At most n terms of Σ d_i out_i are not zero, so its second moment is at most
    n Σ d_i² |x_i| s; its mean is Σ d_i x_i.
    """

    def grouped(values: Tensor) -> Tensor:
        values = values.float() if axis == 1 else values.t().float()
        padded = F.pad(values, (0, -values.shape[1] % spec.m))
        return padded.reshape(padded.shape[0], -1, spec.m)

    kept = grouped(drawn).abs()
    smallest = kept.masked_fill(kept == 0, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0)
    x, d = grouped(matrix), grouped(direction)
    x = x.where(x.abs() < smallest, 0.0)
    moments = spec.n * (d.square() * x.abs() * smallest).sum(-1) - (d * x).sum(-1).square()
    return float(moments.clamp(min=0.0).sum(dtype=torch.float64))


def _weight_gradient(module: nn.Linear | nn.Conv2d) -> Tensor | None:
    """None for a weight that is computed from other parameters and has no gradient of its own."""
    weight = module.weight
    return weight.grad if weight.is_leaf else None


def _cosine(a: Tensor | None, b: Tensor | None) -> float:
    """Cosine of the angle between two tensors of one shape; 1 for two zeros, 0 for one; NaN for None."""
    if a is None or b is None:
        return math.nan
    a, b = a.double(), b.double()
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms else float(a.norm() == b.norm())


def _with_end_to_end(check: PassCheck, cosines: dict[str, float]) -> PassCheck:
    cosine = cosines.get(check.layer, math.nan)
    return replace(check, end_to_end_cosine=cosine) if check.pass_name == "wgrad" and cosine == cosine else check
