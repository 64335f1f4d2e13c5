"""The choice without a clock, for runs that must repeat themselves: a roofline of the layer on this GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from sdgp_accel.backends import gpu as gpus
from sdgp_accel.backends import tiles
from sdgp_accel.backends.products import choose_family
from sdgp_accel.config import PASSES
from sdgp_accel.geometry import Geometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.roofline import GPU, GPUS, Work, compress_seconds, dense_seconds, device_figures, sparse_seconds
from sdgp_accel.tuning.record import Tuned

COSTS_OF_COMPRESSION = GPUS["h100-measured"].compress_costs  # where a GPU's own are not known
REQUIRED_PREDICTED_GAIN = 0.05  # the roofline errs: tests/tuning/test_prediction.py holds its choices to measured ones

# From Hopper on data-centre GPUs (and Thor) have faster instructions than mma for dense products, wgmma and tcgen05,
# which leave mma.sp behind: on an H200 its median speed was 0.6 to 0.7 of cuBLAS (bench/results/speed.md).
# GeForce and RTX PRO still multiply by mma.
FIRST_BEYOND_MMA, FIRST_BLACKWELL_WITH_MMA = gpus.HOPPER, (12, 0)

CHOICES = ((False, False), (True, False), (False, True), (True, True))  # dgrad, wgrad pruned


def predict(plan: LayerPlan, geometry: Geometry, device: torch.device) -> Tuned:
    """The passes that the roofline lets gain on this CUDA device. Depends on nothing but the arguments."""
    facts = gpus.device_facts(device)
    family = choose_family(geometry, facts)
    is_beyond_mma = FIRST_BEYOND_MMA <= facts.capability < FIRST_BLACKWELL_WITH_MMA
    # The roofline is that of kernels that keep up; copying value by value takes several times as long.
    if family is tiles.SM80_ANY or (is_beyond_mma and family is not tiles.SM90):
        reason = "deterministic algorithms, nothing is timed; predicted: dense outruns the kernels that take this layer"
        return Tuned((False, False), reason)
    work = Work.of(geometry)
    gpu = device_figures(torch.cuda.get_device_name(device), facts.capability)
    gpu = replace(gpu, compress_costs={**COSTS_OF_COMPRESSION, **gpu.compress_costs})
    seconds = {passes: _seconds(plan, work, gpu, passes) for passes in CHOICES}
    possible = {passes: s for passes, s in seconds.items() if s is not None}
    dense = possible[False, False]
    best = min(possible, key=lambda passes: possible[passes])
    if possible[best] > (1.0 - REQUIRED_PREDICTED_GAIN) * dense:
        best = (False, False)
    gain = f"{dense / possible[best]:.2f} × dense" if any(best) else "dense"
    other = dense_seconds(work, gpu)  # the pass that is not wanted is a dense one in `possible`
    dgrad_gains, wgrad_gains = (
        possible.get(passes, dense) - other <= (1.0 - REQUIRED_PREDICTED_GAIN) * (dense - other)
        for passes in ((True, False), (False, True))
    )
    reason = f"deterministic algorithms, nothing is timed; predicted for {gpu.title}: {gain}"
    return Tuned(best, reason, single=(dgrad_gains, wgrad_gains))


def _seconds(plan: LayerPlan, work: Work, gpu: GPU, passes: tuple[bool, bool]) -> float | None:
    """Of the whole backward; None where the plan leaves one of `passes` dense."""
    specs = {
        name: spec
        for name, spec, wanted in zip(PASSES, (plan.grad_input, plan.grad_weight), passes, strict=True)
        if wanted
    }
    if None in specs.values():
        return None
    total = (2 - len(specs)) * dense_seconds(work, gpu) + len(specs) * sparse_seconds(work, gpu)
    # One sweep over dY makes both operands if their rules are the same.
    sweeps = [tuple(specs)] if len(set(specs.values())) == 1 else [(name,) for name in specs]
    for names in sweeps:
        spec = specs[names[0]]
        assert spec is not None
        total += compress_seconds(work, gpu, names, "two_pass", gpu.compress_cost(spec))
    return total
