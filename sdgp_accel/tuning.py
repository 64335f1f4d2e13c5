"""``backend="auto"`` on a GPU: which passes of a layer gain from the sparse kernels is measured, not guessed.

The first time a layer shape is used, the parts of its backward are timed on made-up operands of that shape, dense and
sparse in turns, and the fastest combination runs from then on. Pruning and compressing is charged where it falls: once
for both passes, less where only one is pruned. What does not gain runs the ordinary dense backward.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdgp_accel.backends import Backend, Needs, Operands, dense
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.philox import Rng
from sdgp_accel.timing import clock_for

ROUNDS = 9
WARM_UP_ROUNDS = 3  # the first call of a cuDNN convolution may search for its algorithm
# Sparse must win by more than the difference between two measurements of one kernel, a few tenths of a per cent here.
REQUIRED_GAIN = 0.01

# GPU cycles of waiting, about 2 ms, in which the host launches a whole round: otherwise the first candidates of a round
# would be timed with the launch latency of an idle GPU, which a training step does not see.
HEAD_START_CYCLES = 4_000_000

Candidates = Mapping[str, Callable[[], Any]]


class BackwardTimes(NamedTuple):
    """Milliseconds of the parts of one layer's backward; None where the plan does not prune that pass."""

    dense_dgrad: float
    dense_wgrad: float
    sparse_dgrad: float | None = None
    sparse_wgrad: float | None = None
    compress_both: float | None = None
    compress_dgrad: float | None = None
    compress_wgrad: float | None = None

    @property
    def dense(self) -> float:
        """The ordinary backward."""
        return self.dense_dgrad + self.dense_wgrad

    def totals(self) -> dict[tuple[bool, bool], float]:
        """Milliseconds of the whole backward for each choice (dgrad pruned, wgrad pruned) that can run."""
        totals = {(False, False): self.dense}
        if self.sparse_dgrad is not None and self.compress_dgrad is not None:
            totals[True, False] = self.compress_dgrad + self.sparse_dgrad + self.dense_wgrad
        if self.sparse_wgrad is not None and self.compress_wgrad is not None:
            totals[False, True] = self.compress_wgrad + self.dense_dgrad + self.sparse_wgrad
        if self.sparse_dgrad is not None and self.sparse_wgrad is not None and self.compress_both is not None:
            totals[True, True] = self.compress_both + self.sparse_dgrad + self.sparse_wgrad
        return totals


def choose(times: BackwardTimes) -> tuple[bool, bool]:
    """The fastest choice of passes to prune; (False, False) unless it gains at least `REQUIRED_GAIN` over dense."""
    totals = times.totals()
    best = min(totals, key=lambda passes: totals[passes])
    return best if totals[best] <= (1.0 - REQUIRED_GAIN) * times.dense else (False, False)


def tune(
    backend: Backend, plan: LayerPlan, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> tuple[LayerPlan, str]:
    """`plan` reduced to the passes that gain on this device, and the reason with its times.

    A layer that cannot be timed (a CUDA graph is being captured, memory is short) runs dense, and the reason says so.
    """
    unpruned = plan._replace(grad_input=None, grad_weight=None)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return unpruned, "first used while a CUDA graph was captured, where nothing can be timed: run one step before"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            times = measure(backend, plan, geometry, dtype, device)
    except torch.OutOfMemoryError:
        return unpruned, "too little free memory to time the sparse kernels on this shape"
    prune_dgrad, prune_wgrad = choose(times)
    reduced = plan._replace(
        grad_input=plan.grad_input if prune_dgrad else None, grad_weight=plan.grad_weight if prune_wgrad else None
    )
    best = times.totals()[prune_dgrad, prune_wgrad]
    sparse = {name: total for name, total in times.totals().items() if name != (False, False)}
    if not reduced.prunes:
        return reduced, f"dense is faster here: {times.dense:.3f} ms, sparse {min(sparse.values()):.3f} ms"
    return reduced, f"measured: backward {best:.3f} ms, dense {times.dense:.3f} ms"


def measure(
    backend: Backend, plan: LayerPlan, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> BackwardTimes:
    """Time every part of the layer's backward that a choice of passes may consist of, in turns, on random operands."""
    x, weight, dy = _operands(geometry, dtype, device)
    matrix = dense.matrix_view(dy, geometry)
    rng = Rng(torch.zeros(2, dtype=torch.int64, device=device)) if plan.draws else None
    positions = geometry.positions_per_sample

    def compress(for_dgrad: bool, for_wgrad: bool) -> Operands:
        return backend.prune_compress(matrix, plan, rng, positions, Needs(for_dgrad, for_wgrad, False))

    candidates: dict[str, Callable[[], Any]] = {
        "dense_dgrad": lambda: dense.dgrad(dy, weight, geometry),
        "dense_wgrad": lambda: dense.wgrad(dy, x, geometry),
    }
    for_dgrad, for_wgrad = plan.grad_input is not None, plan.grad_weight is not None
    operands = compress(for_dgrad, for_wgrad)
    if for_dgrad:
        candidates["sparse_dgrad"] = lambda: backend.dgrad(operands.dgrad, weight, geometry)
        candidates["compress_dgrad"] = lambda: compress(True, False)
    if for_wgrad:
        candidates["sparse_wgrad"] = lambda: backend.wgrad(operands.wgrad, x, geometry)
        candidates["compress_wgrad"] = lambda: compress(False, True)
    if for_dgrad and for_wgrad:
        candidates["compress_both"] = lambda: compress(True, True)
    return BackwardTimes(**median_milliseconds(candidates, device))


def median_milliseconds(candidates: Candidates, device: torch.device, rounds: int = ROUNDS) -> dict[str, float]:
    """The median time of each candidate, called in turns; the first rounds are not counted."""
    clock = clock_for(device)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in candidates}
    for index in range(WARM_UP_ROUNDS + rounds):
        if device.type == "cuda":
            torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        for name, call in candidates.items():
            start = clock.mark()
            call()
            end = clock.mark()
            if index >= WARM_UP_ROUNDS:
                marks[name].append((start, end))
        clock.synchronize()  # so that at most one round of results is waiting to be freed
    return {
        name: 1e3 * statistics.median(clock.seconds(start, end) for start, end in pairs)
        for name, pairs in marks.items()
    }


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
