"""Who computes a layer's pruned backward, and how that is decided.

A backend is one module in this package that defines ``BACKEND``, an object with the methods of `Backend`;
its module name is its name in ``SDGPConfig(backend=...)``. `decide` chooses for one layer shape, once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from sdgp_accel.config import Pass, PruneSpec
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry, Window, flat
from sdgp_accel.layer_plan import LayerPlan, decode
from sdgp_accel.philox import Rng

if TYPE_CHECKING:
    from sdgp_accel.tuning.record import BackwardTimes

KERNELS = "cutlass"
CACHED_DECISIONS = 1 << 14  # shapes: generous for sequences of every length
FIRST_SPARSE_CAPABILITY = (8, 0)  # NVIDIA Ampere
UPDATE_DRIVER = "update the NVIDIA driver, or rebuild with a CUDA toolkit that it supports (CUDA_HOME)"


class Needs(NamedTuple):
    """Which pruned operands and by-products one backward asks for."""

    dgrad: bool
    wgrad: bool
    bias: bool


class Operands(NamedTuple):
    """What `Backend.prune_compress` hands to the two passes: the backend's own types, None where not needed."""

    dgrad: Any
    wgrad: Any
    bias: Tensor | None


class Backend(Hashable, Protocol):
    """One implementation of the pruned backward of Linear and Conv2d layers."""

    name: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device` at all, with the command that helps; None where it can."""

    def fingerprint(self) -> str:
        """Which build of its kernels this is: another text where they may be faster or slower."""

    def unsupported(self, geometry: Geometry, plan: LayerPlan, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this backend cannot take this layer; None where it can. Must not depend on anything else."""

    def prune_compress(
        self, dy: Tensor, geometry: Geometry, plan: LayerPlan, rng: Rng | None, needs: Needs
    ) -> Operands:
        """Prune dY, seen as [T, C], along C for dgrad and along T for wgrad, as `needs` says.

        dy: [..., C] of a Linear layer, [N, C, P, Q] of a convolution; any strides.
        `rng` carries this backward's seed and rank, with pass_index 0: dgrad uses it as it is, wgrad with
        ``pass_index=1``; None where no function of the plan draws. The bias gradient [C] is the sum of the
        unpruned dY over T.
        """

    def tilings(
        self, geometry: Geometry, pass_name: Pass, dtype: torch.dtype, device: torch.device
    ) -> Sequence[Hashable]:
        """The ways to launch this layer's dgrad or wgrad that are worth timing, best predicted first; may be empty.

        `str` of a tiling tells it from the others, in one process and in the next.
        """

    def dgrad(
        self,
        operand: Any,
        weight: Tensor,
        geometry: Geometry,
        tiling: Any = None,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """dX: [T, C_in], or [N, C_in, H, W] for a convolution, in the dtype of `weight`.

        tiling: one of `tilings`; None for the first. shape: a Linear layer's [..., C_in], where that is not [T, C_in].
        """

    def wgrad(
        self,
        operand: Any,
        x: Tensor,
        geometry: Geometry,
        tiling: Any = None,
        out: Tensor | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """dW [C_out, C_in (/ groups, R, S)] from x [..., C_in] or [N, C_in, H, W].

        tiling: as for `dgrad`. out: where dW goes, in the dtype of `x` or float32 (the gradient of a float32 master
        weight: not rounded to 16 bits in between); default a new tensor in the dtype of `x`. accumulate: add to what
        `out` holds.

        Raises ValueError as `check_out` does.
        """

    def bind(self, decision: Decision, call: Call) -> BoundBackward | None:
        """`prune_compress`, `dgrad` and `wgrad` of a decision's shape as one call; None where they go one by one."""


class Call(NamedTuple):
    """What a layer is called on.

    input_shape: of any rank; the geometry knows a Linear layer's as a matrix only. dtype: of the computation.
    weight_dtype: of the layer's parameters, which autocast has cast; their gradients may come in it at once.
    """

    input_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    weight_dtype: torch.dtype


class BoundBackward(Protocol):
    """The backward of one layer shape with the least work for the host: nothing is looked up or decided any more."""

    def __call__(self, dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool) -> Gradients | None:
        """The gradients that are asked for; None where a tensor lies in memory as was not foreseen."""


# Of a layer's input, weight and bias; None for what is not asked for.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def check_out(out: Tensor | None, accumulate: bool, x: Tensor, geometry: Geometry) -> None:
    """Raises ValueError where `Backend.wgrad` cannot deliver dW to `out`."""
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True needs an out tensor to add to; got out=None")
        return
    if out.shape != geometry.weight_shape or out.dtype not in (x.dtype, torch.float32) or out.device != x.device:
        raise ValueError(
            f"out must be a tensor of shape {tuple(geometry.weight_shape)}, dtype {x.dtype} or torch.float32, on "
            f"{x.device}; got shape {tuple(out.shape)}, {out.dtype}, on {out.device}"
        )


class Tilings(NamedTuple):
    """How the products of both passes are launched; None for the backend's own choice."""

    dgrad: Any = None
    wgrad: Any = None


class Decision(NamedTuple):
    """What runs the backward of one layer shape: the backend (None: the ordinary dense backward) and why.

    plan: resolved for this geometry; draws: the plan's, looked up once. times: what was measured, if anything.
    bound: the backward as one call, where the backend has that for this shape. single: what runs in its place where
    only dX, and where only dW is wanted; None: the same.
    """

    geometry: Geometry
    backend: Backend | None
    plan: LayerPlan
    draws: bool
    reason: str
    tilings: Tilings = Tilings()
    times: BackwardTimes | None = None
    bound: BoundBackward | None = None
    single: tuple[Decision, Decision] | None = None

    @property
    def name(self) -> str:
        """The backend's name, ``"dense"`` for None."""
        return "dense" if self.backend is None else self.backend.name

    def where(self, dx: bool, dw: bool) -> Decision:
        """What runs where dX, and where dW is wanted: of a first layer, or of a frozen one, only one of them is.

        What every step passes through asks for `single` first, which saves it the call.
        """
        return self if self.single is None or dx == dw else self.single[0 if dx else 1]


def build_command() -> str:
    """What builds the kernels, in the root of a checkout.

    In place where this is a checkout: Python would go on finding what lies there before what is installed.
    """
    is_checkout = (Path(__file__).parents[2] / "setup.py").exists()
    return f"SDGP_CUDA=1 pip install --no-cache-dir {'--editable ' if is_checkout else ''}."


def load_command(error: str, rebuild: str) -> str:
    """What helps where the built extension does not load, with `error`: its CUDA runtime, or else to `rebuild`.

    torch brings the runtime of one CUDA release only. The extension looks for others where this package puts them.
    """
    runtime = re.search(r"libcudart\.so\.(\d+): cannot open", error)
    if runtime is None:
        return rebuild
    release = int(runtime[1])
    return f"pip install 'nvidia-cuda-runtime{'-cu12' * (release == 12)}=={release}.*'"


def load(name: str) -> Backend | None:
    """The backend called `name`, or None where this installation has no such module."""
    module = f"{__name__}.{name}"
    if importlib.util.find_spec(module) is None:
        return None
    backend: Backend = importlib.import_module(module).BACKEND
    return backend


@functools.lru_cache(maxsize=CACHED_DECISIONS)
def decide_linear(
    plan_text: str,
    input_shape: tuple[int, ...],
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool,
    weight_dtype: torch.dtype,
) -> Decision:
    """`decide` for ``functional.linear`` on an input of this shape, measured where it is to be, remembered.

    dtype, weight_dtype: as in `Call`. deterministic: what ``torch.are_deterministic_algorithms_enabled()`` says; then
    nothing is measured.
    """
    decision = _tuned(
        decide(plan_text, LinearGeometry.of(input_shape, out_features), dtype, device), dtype, device, deterministic
    )
    return _bound(decision, Call(input_shape, dtype, device, weight_dtype))


@functools.lru_cache(maxsize=CACHED_DECISIONS)
def decide_conv2d(
    plan_text: str,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    window: Window,
    channels_last: bool,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool,
    weight_dtype: torch.dtype,
) -> Decision:
    """`decide` for ``functional.conv2d`` on an input of this shape; see `decide_linear`."""
    geometry = Conv2dGeometry.of(input_shape, weight_shape, flat(window), channels_last)
    decision = _tuned(decide(plan_text, geometry, dtype, device), dtype, device, deterministic)
    return _bound(decision, Call(input_shape, dtype, device, weight_dtype))


def _bound(decision: Decision, call: Call) -> Decision:
    if decision.single is not None:
        only_dx, only_dw = decision.single
        decision = decision._replace(single=(_bound(only_dx, call), _bound(only_dw, call)))
    backend, plan = decision.backend, decision.plan
    if backend is None or plan.grad_input is None or plan.grad_weight is None:  # one pass is torch's own op
        return decision
    return decision._replace(bound=backend.bind(decision, call))


def _tuned(decision: Decision, dtype: torch.dtype, device: torch.device, deterministic: bool) -> Decision:
    """With ``backend="auto"``, only the passes that the kernels make faster stay pruned. Chooses tilings."""
    geometry, backend, plan = decision.geometry, decision.backend, decision.plan
    if backend is None:
        return decision
    listed = [backend.tilings(geometry, name, dtype, device) for name in get_args(Pass)]
    best = Tilings(*(next(iter(tilings), None) for tilings in listed))
    if backend.name != KERNELS or plan.backend != "auto":
        return decision._replace(tilings=best)
    from sdgp_accel import tuning  # not needed where nothing is measured

    tuned = tuning.tune_shape(backend, plan, geometry, dtype, device, deterministic)
    # Predicted choices name no tilings, and another rank's GPU may have some that this one has not.
    timed = tuning.find_tilings(tuned, backend, geometry, dtype, device) or Tilings()
    tilings = Tilings(timed.dgrad or best.dgrad, timed.wgrad or best.wgrad)

    def chosen(prunes_dgrad: bool, prunes_wgrad: bool, reason: str) -> Decision:
        kept = plan._replace(
            grad_input=plan.grad_input if prunes_dgrad else None, grad_weight=plan.grad_weight if prunes_wgrad else None
        )
        if not kept.prunes:
            return Decision(geometry, None, kept, False, reason, times=tuned.times)
        return Decision(geometry, backend, kept, kept.draws, reason + _conversions(geometry), tilings, tuned.times)

    # With a pass that is not wanted left in the plan, the other one is still a single call of the extension.
    only_dx, only_dw = (chosen(prunes, prunes, tuned.single_reason(index)) for index, prunes in enumerate(tuned.single))
    return chosen(*tuned.prunes, tuned.reason)._replace(single=(only_dx, only_dw))


def forget_decisions() -> None:
    """Decide and warn afresh: for tests, and after the backends themselves have changed."""
    decide_linear.cache_clear()
    decide_conv2d.cache_clear()
    warn_once.cache_clear()
    from sdgp_accel import tuning

    tuning.forget()


def decide(plan_text: str, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Decision:
    """Which backend runs the backward of a layer of this shape, dtype and device.

    Raises RuntimeError where the plan asks for kernels on a device without sparse tensor cores, or where
    ``fallback="error"`` and the kernels cannot take the layer, TypeError for a dtype of other numbers. Warns once for
    each reason that concerns the device as a whole.
    """
    check_floating(dtype)
    plan = _resolve_scope(decode(plan_text), geometry)
    if 0 in (geometry.in_channels, geometry.positions, geometry.out_channels):
        return Decision(geometry, None, plan, False, "an input or output without elements: nothing to prune")
    backend, reason = _choose(plan, geometry, dtype, device)
    return Decision(geometry, backend, plan, plan.draws, reason)


def check_floating(dtype: torch.dtype) -> None:
    """Raise TypeError unless `dtype`, of a layer's input, is one of floating point numbers."""
    if not dtype.is_floating_point:
        raise TypeError(f"input must be a floating point tensor; got {dtype}")


Choice = tuple[Backend | None, str]


def _choose(plan: LayerPlan, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Choice:
    if not plan.prunes:
        return None, "both passes are dense"
    if plan.backend == "reference":
        return _reference(), "backend='reference'"
    missing = _no_sparse_tensor_cores(device)
    if missing is not None:
        if plan.backend != "auto":
            raise RuntimeError(
                f"backend={plan.backend!r} needs a CUDA device of compute capability 8.0 or later; {missing}; "
                "accepted here: backend='auto' or backend='reference'"
            )
        if device.type != "meta":  # shapes only: nothing runs
            warn_once(f"{missing}: gradients are pruned by the reference backend, and nothing is accelerated here")
        return _reference(), missing
    return _choose_on_gpu(plan, geometry, dtype, device)


def _choose_on_gpu(plan: LayerPlan, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Choice:
    name = KERNELS if plan.backend == "auto" else plan.backend
    backend = load(name)
    problem = f"the {name} kernels are not built; build them with: {build_command()}"
    if backend is not None:
        unavailable = backend.unavailable(device)
        if unavailable is None:
            unsupported = backend.unsupported(geometry, plan, dtype, device)
            if unsupported is not None:
                return _fall_back(plan, unsupported)
            auto = plan.backend == "auto"
            reason = "measured against dense at the first use of a shape" if auto else f"backend={name!r}"
            return backend, reason + _conversions(geometry)
        problem = unavailable
    warn_once(f"{device}: {problem}; until then fallback={plan.fallback!r} applies")
    return _fall_back(plan, problem)


def _conversions(geometry: Geometry) -> str:
    """What the kernels' layout, channels innermost, costs a convolution in another one."""
    if isinstance(geometry, LinearGeometry) or geometry.channels_last:
        return ""
    return "; not channels_last: each backward copies gradients and activations once"


def _fall_back(plan: LayerPlan, reason: str) -> Choice:
    if plan.fallback == "error":
        raise RuntimeError(f"fallback='error' and {reason}; accepted: fallback='dense' or fallback='emulate'")
    return _reference() if plan.fallback == "emulate" else None, reason


def _reference() -> Backend:
    backend = load("reference")
    assert backend is not None
    return backend


def _no_sparse_tensor_cores(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return f"device {device.type!r} has no sparse tensor cores"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_SPARSE_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} (compute capability {capability}) has no sparse tensor cores"
    return None


def _resolve_scope(plan: LayerPlan, geometry: Geometry) -> LayerPlan:
    """On a 2-D input of a Linear layer each row is its own sample, over which there is nothing to sum."""
    if not isinstance(geometry, LinearGeometry) or geometry.positions_per_sample > 1:
        return plan

    def resolved(spec: PruneSpec | None) -> PruneSpec | None:
        if spec is None or spec.scope != "sample_channel":
            return spec
        return PruneSpec(spec.function, spec.n, spec.m, "group", spec.eps)

    return plan._replace(grad_input=resolved(plan.grad_input), grad_weight=resolved(plan.grad_weight))


@functools.cache
def warn_once(message: str) -> None:
    """Emit `message` as a UserWarning, the first time it is given."""
    warnings.warn(message, stacklevel=3)
