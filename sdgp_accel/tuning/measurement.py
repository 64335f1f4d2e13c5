"""Timing the parts of one layer's backward, dense and sparse in turns, on made-up operands of its shape."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sdgp_accel.backends import Backend, Call, Decision, Needs, Operands, Tilings, dense
from sdgp_accel.config import Pass
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.philox import Rng
from sdgp_accel.timing import clock_for
from sdgp_accel.tuning.record import BackwardTimes

ROUNDS, LEAST_ROUNDS = 9, 3
WARM_UP_ROUNDS = 3  # the first call of a cuDNN convolution may search for its algorithm
BUDGET_MS = 5.0  # per candidate, beyond the warm-up and the least number of rounds
TILINGS = 8  # of each pass, the most promising ones: the fastest in gemm-NVIDIA_H200.json are among them, or 1 % apart
# A median beyond this multiple of the fastest round, and this much more, is not the work's own: processes that share a
# GPU take turns of about a millisecond. Its clock falls by less under load (1.98 to 1.46 GHz, the files of step_time).
STEADY, STEADY_MS = 1.5, 0.05

# GPU cycles of waiting, about 2 ms, in which the host launches a whole round: otherwise the first candidates of a round
# would be timed with the launch latency of an idle GPU, which a training step does not see.
HEAD_START_CYCLES = 4_000_000

Name = TypeVar("Name", bound=Hashable)


class Milliseconds(NamedTuple):
    """Of one call: on the device, and of the host until the call returns. steady: whether the device's rounds agree."""

    device: float
    host: float
    steady: bool = True


class Measurement(NamedTuple):
    """The times of one layer's backward on the device and on the host, with these tilings.

    steady: False where the device was busy with something else at times.
    """

    device: BackwardTimes
    host: BackwardTimes
    tilings: Tilings
    steady: bool = True


def measure(
    backend: Backend, plan: LayerPlan, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> Measurement:
    """Time every part that a choice of passes may consist of, the sparse products with their fastest tiling.

    The tilings are compared before, so that the winner's time is not the luckiest of several. Leaves the user's random
    generators alone. Raises torch.OutOfMemoryError where the operands do not fit.
    """
    x, weight, dy = _operands(geometry, dtype, device)
    rng = Rng((0, 0)) if plan.draws else None

    def compress(for_dgrad: bool, for_wgrad: bool) -> Operands:
        return backend.prune_compress(dy, geometry, plan, rng, Needs(for_dgrad, for_wgrad, False))

    candidates: dict[str, Callable[[], Any]] = {
        "dense_dgrad": lambda: dense.dgrad(dy, weight, geometry),
        "dense_wgrad": lambda: dense.wgrad(dy, x, geometry),
        "dense_both": lambda: dense.both(dy, x, weight, geometry),
    }
    for_dgrad, for_wgrad = plan.grad_input is not None, plan.grad_weight is not None
    operands = compress(for_dgrad, for_wgrad)
    products: dict[Pass, Callable[[Any], Any]] = {}
    if for_dgrad:
        products["grad_input"] = lambda tiling: backend.dgrad(operands.dgrad, weight, geometry, tiling)
        candidates["sparse_dgrad"] = lambda: products["grad_input"](tilings.dgrad)
        candidates["compress_dgrad"] = lambda: compress(True, False)
    if for_wgrad:
        products["grad_weight"] = lambda tiling: backend.wgrad(operands.wgrad, x, geometry, tiling)
        candidates["sparse_wgrad"] = lambda: products["grad_weight"](tilings.wgrad)
        candidates["compress_wgrad"] = lambda: compress(False, True)
    if for_dgrad and for_wgrad:
        candidates["compress_both"] = lambda: compress(True, True)
    tilings = _fastest_tilings(backend, products, geometry, dtype, device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the whole backward draws from the user's
        if for_dgrad and for_wgrad:
            decision = Decision(geometry, backend, plan, plan.draws, "", tilings)
            bound = backend.bind(decision, Call(tuple(x.shape), dtype, dy.device, dtype))
            if bound is not None and bound(dy, x, weight, False) is not None:
                candidates["sparse_both"] = lambda: bound(dy, x, weight, False)
        times = median_milliseconds(candidates, device)
    return Measurement(
        BackwardTimes(**{name: ms.device for name, ms in times.items()}),
        BackwardTimes(**{name: ms.host for name, ms in times.items()}),
        tilings,
        all(ms.steady for ms in times.values()),
    )


def _fastest_tilings(
    backend: Backend,
    products: Mapping[Pass, Callable[[Any], Any]],
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
) -> Tilings:
    """Of the `TILINGS` most promising ones of each pass; None where the backend has no choice."""
    listed = {name: backend.tilings(geometry, name, dtype, device)[:TILINGS] for name in products}
    candidates = {
        (name, tiling): lambda name=name, tiling=tiling: products[name](tiling)
        for name, tilings in listed.items()
        if len(tilings) > 1
        for tiling in tilings
    }
    times = median_milliseconds(candidates, device) if candidates else {}
    fastest = {
        name: min(tilings, key=lambda tiling: times[name, tiling].device if len(tilings) > 1 else 0.0)
        for name, tilings in listed.items()
        if tilings
    }
    return Tilings(fastest.get("grad_input"), fastest.get("grad_weight"))


def median_milliseconds(candidates: Mapping[Name, Callable[[], Any]], device: torch.device) -> dict[Name, Milliseconds]:
    """The median times of each candidate, called in turns, in as many rounds as `BUDGET_MS` allows.

    Each round in an order of its own: on an H200 the first after the wait took up to 10 us longer.
    """
    clock = clock_for(device)
    samples: dict[Name, list[Milliseconds]] = {name: [] for name in candidates}
    rounds, order = ROUNDS, random.Random(0)
    for index in range(WARM_UP_ROUNDS + ROUNDS):
        if index == WARM_UP_ROUNDS + rounds:
            break
        if device.type == "cuda":
            torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        marks = {}
        for name in order.sample(list(candidates), len(candidates)):
            call = candidates[name]
            start, called = clock.mark(), time.perf_counter()
            call()
            host = time.perf_counter() - called
            marks[name] = start, clock.mark(), host
        clock.synchronize()  # so that at most one round of results is waiting to be freed
        for name, (start, end, host) in marks.items():
            samples[name].append(Milliseconds(1e3 * clock.seconds(start, end), 1e3 * host))
        if index == WARM_UP_ROUNDS - 1:
            round_ms = sum(sample[-1].device for sample in samples.values())
            affordable = BUDGET_MS * len(candidates) / max(round_ms, 1e-6)
            rounds = min(ROUNDS, max(LEAST_ROUNDS, int(affordable)))
    return {name: _median(sample[WARM_UP_ROUNDS:]) for name, sample in samples.items()}


def _median(sample: Sequence[Milliseconds]) -> Milliseconds:
    device, host = [ms.device for ms in sample], [ms.host for ms in sample]
    median = statistics.median(device)
    return Milliseconds(median, statistics.median(host), median <= STEADY * min(device) + STEADY_MS)


def _operands(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and dY of random values: kernels run faster on zeros. The user's generators are left alone."""
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: tuple[int, ...], channels_last: bool = False) -> Tensor:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format).normal_(generator=generator)

    if isinstance(geometry, LinearGeometry):
        return (
            random((geometry.tokens, geometry.in_channels)),
            random((geometry.out_channels, geometry.in_channels)),
            random((geometry.tokens, geometry.out_channels)),
        )
    assert isinstance(geometry, Conv2dGeometry)
    return (
        random(geometry.input_shape, geometry.channels_last),
        random(geometry.weight_shape, geometry.channels_last),
        random(
            (geometry.batch, geometry.out_channels, geometry.out_height, geometry.out_width), geometry.channels_last
        ),
    )
