"""A roofline of the backward passes: how long a GEMM takes at best, dense and with a 2:4 gradient.

t(F, B) = max(F / rate, B / bandwidth), with 16-bit operands and each of gradient, weight and activation moved once.
A sparse pass runs at `sparse_speedup` times the rate and moves 9/16 of the gradient's bytes (half of the values and
2 bits of metadata for each kept one). Producing the compressed operands costs bandwidth: a pass of its own over dY
("two-pass"), or only what the producer of dY writes beyond or short of dY itself ("fused").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from typing import Literal

from sdgp_accel.config import PASSES, PruneSpec, check_choice
from sdgp_accel.geometry import Conv2dGeometry, Geometry

BYTES = 2  # fp16 and bf16
COMPRESSED = 9 / 16

Schedule = Literal["two_pass", "fused"]
SCHEDULES: tuple[Schedule, ...] = ("two_pass", "fused")


def compress_rule(spec: PruneSpec) -> str:
    """The key of `GPU.compress_costs`: the prune function, with its scope where that needs a sweep of its own."""
    wide = spec.function == "rescale_magnitude" and spec.scope != "group"
    return f"{spec.function} {spec.scope}" if wide else spec.function


@dataclass(frozen=True)
class GPU:
    """The numbers of the roofline.

    tflops: dense 16-bit tensor-core peak with fp32 accumulation, TFLOP/s.
    bandwidth: peak memory bandwidth, TB/s.
    compute_efficiency, memory_efficiency: the shares of those peaks that good kernels reach, in (0, 1].
    sparse_speedup: a 2:4 GEMM's rate over a dense one's where both are compute-bound, in [1, 2].
    compress_costs: a prune+compress pass's time over that of moving its bytes at `byte_rate`, by `compress_rule`; 1 for
        rules that are not in it.

    ValueError names the figure that is out of range.
    """

    name: str
    tflops: float
    bandwidth: float
    compute_efficiency: float = 0.80
    memory_efficiency: float = 0.85
    sparse_speedup: float = 1.6
    compress_costs: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("tflops", 0.0, float("inf")),
            ("bandwidth", 0.0, float("inf")),
            ("compute_efficiency", 0.0, 1.0),
            ("memory_efficiency", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low < value <= high:
                raise ValueError(f"{name} must be greater than {low:g} and at most {high:g}; got {value!r}")
        if not isinstance(self.sparse_speedup, (int, float)) or not 1.0 <= self.sparse_speedup <= 2.0:
            raise ValueError(f"sparse_speedup must be between 1 and 2; got {self.sparse_speedup!r}")
        for rule, cost in self.compress_costs.items():
            if not cost > 0.0:
                raise ValueError(f"compress_costs[{rule!r}] must be greater than 0; got {cost!r}")

    def compress_cost(self, spec: PruneSpec) -> float:
        """Of pruning by `spec`, from `compress_costs`."""
        return self.compress_costs.get(compress_rule(spec), 1.0)

    @property
    def title(self) -> str:
        """The name as people write it."""
        return self.name.upper() if self.name in GPUS else self.name

    @property
    def flop_rate(self) -> float:
        """Reachable dense FLOP/s."""
        return self.tflops * 1e12 * self.compute_efficiency

    @property
    def byte_rate(self) -> float:
        """Reachable bytes/s."""
        return self.bandwidth * 1e12 * self.memory_efficiency


# Peaks: NVIDIA's data sheets, dense (their "with sparsity" figures halved). Efficiencies and sparse speed-ups are
# measurements of others, not data-sheet values:
#   Ampere: 0.80 of peak and 1.6x from 302 dense and 484 sparse TFLOP/s at 16384^3 (NVIDIA/cutlass issue 408).
#   Hopper: 0.68 of peak under its power limit; 1.25x from cuSPARSELt's 1.20-1.22x at 8192^3
#           (NVIDIA/CUDALibrarySamples issue 203).
#   Ada, GeForce Blackwell: same mma.sp instructions as Ampere, so Ampere's figures are assumed.
# GeForce cards accumulate in float32 at half the rate of other cards with the same chip.
GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        # A100 40 GB with the bandwidth rounded as in the literature: the figures of the project's reference table.
        GPU("a100", tflops=312, bandwidth=1.55),
        # A100 data sheet: 312 TFLOP/s; 40 GB 1,555 GB/s, 80 GB SXM 2,039 GB/s (PCIe: 1,935).
        GPU("a100-40", tflops=312, bandwidth=1.555),
        GPU("a100-80", tflops=312, bandwidth=2.039),
        # H100 SXM data sheet: 1,979 TFLOP/s with sparsity, 3.35 TB/s. H200 SXM: the same chip, 4.8 TB/s.
        # H100 PCIe: 1,513 TFLOP/s with sparsity, 2 TB/s.
        GPU("h100", 989, 3.35, compute_efficiency=0.68, memory_efficiency=0.88, sparse_speedup=1.25),
        GPU("h100-pcie", 756.5, 2.0, compute_efficiency=0.68, memory_efficiency=0.88, sparse_speedup=1.25),
        # An H100 80GB HBM3 and an H200 with this package's own kernels: `python -m bench.fit_roofline` makes these
        # entries from the files that it lists, and a test holds them to those.
        GPU(
            "h100-measured", tflops=989, bandwidth=3.35, compute_efficiency=0.72, memory_efficiency=0.85,
            sparse_speedup=1.34, compress_costs={
                "magnitude": 1.08, "random": 1.78, "mvue": 2.2, "rescale_magnitude": 1.25,
                "rescale_magnitude sample_channel": 2.41, "rescale_magnitude tensor": 2.45,
            },
        ),
        GPU("h200", 989, 4.8, compute_efficiency=0.68, memory_efficiency=0.88, sparse_speedup=1.25),
        GPU(
            "h200-measured", tflops=989, bandwidth=4.8, compute_efficiency=0.71, memory_efficiency=0.82,
            sparse_speedup=1.4, compress_costs={
                "magnitude": 1.15, "random": 2.37, "mvue": 2.91, "rescale_magnitude": 1.54,
                "rescale_magnitude sample_channel": 2.56, "rescale_magnitude tensor": 2.55,
            },
        ),
        # Data sheets, A10G: of AWS's instances.
        GPU("a30", tflops=165, bandwidth=0.933),
        GPU("a10", tflops=125, bandwidth=0.6),
        GPU("a10g", tflops=70, bandwidth=0.6),
        GPU("a40", tflops=149.7, bandwidth=0.696),
        GPU("l4", tflops=121, bandwidth=0.3),
        GPU("l40", tflops=181.05, bandwidth=0.864),
        GPU("l40s", tflops=362.05, bandwidth=0.864),
        # The architectures' white papers, appendix A, with float32 accumulation: GA102, Ada, RTX Blackwell.
        GPU("rtx-a6000", tflops=154.8, bandwidth=0.768),
        GPU("rtx3090", tflops=71, bandwidth=0.936),
        GPU("rtx6000-ada", tflops=364.2, bandwidth=0.96),
        GPU("rtx4090", tflops=165.2, bandwidth=1.008),
        GPU("rtx5090", tflops=209.5, bandwidth=1.792),
    )
}  # fmt: skip


# Words of what torch calls a GPU -> its entry. Measured entries hold for the very product that was measured.
_DEVICE_NAMES = {
    "H100 80GB HBM3": "h100-measured",
    "H100 PCIe": "h100-pcie",
    "H100": "h100",
    "GH200": "h100",
    "H200 NVL": "h200",
    "H200": "h200-measured",
    "A100-SXM4-40GB": "a100-40",
    "A100-PCIE-40GB": "a100-40",
    "A100": "a100-80",
    "A30": "a30",
    "A10": "a10",
    "A10G": "a10g",
    "A40": "a40",
    "L4": "l4",
    "L40": "l40",
    "L40S": "l40s",
    "RTX A6000": "rtx-a6000",
    "RTX 3090": "rtx3090",
    "RTX 6000 Ada": "rtx6000-ada",
    "RTX 4090": "rtx4090",
    "RTX 5090": "rtx5090",
}


def known_gpu(device_name: str) -> str | None:
    """The name in `GPUS` of the GPU that torch calls `device_name`; None for others."""
    return next((name for part, name in _DEVICE_NAMES.items() if re.search(rf"\b{part}\b", device_name)), None)


# Compute capability -> the entry nearest to a GPU that `known_gpu` does not know: one with the same instructions.
_ARCHITECTURES = {(8, 0): "a100-80", (8, 6): "rtx-a6000"} | dict.fromkeys([(8, 7), (8, 9), (12, 0), (12, 1)], "l40s")
_GEFORCES = {(8, 6): "rtx3090", (8, 9): "rtx4090", (12, 0): "rtx5090"}


def device_figures(name: str, capability: tuple[int, int]) -> GPU:
    """The figures of the GPU that torch calls `name`, or of one of its kind where it is not known."""
    kind = (_GEFORCES if "GeForce" in name else _ARCHITECTURES).get(capability, "h100-measured")
    return GPUS[known_gpu(name) or kind]


def gpu_figures(gpu: str | GPU, **overrides: float | None) -> GPU:
    """A named GPU or the user's own, with the given figures replaced (None keeps one).

    ValueError for an unknown name, TypeError for an unknown figure and for a `gpu` that is neither.
    """
    if isinstance(gpu, str):
        check_choice("gpu", gpu, tuple(GPUS))
        gpu = GPUS[gpu]
    if not isinstance(gpu, GPU):
        raise TypeError(f"gpu must be a name in roofline.GPUS or a roofline.GPU; got {gpu!r}")
    figures = {figure.name for figure in fields(GPU)} - {"name", "compress_costs"}
    unknown = set(overrides) - figures
    if unknown:
        raise TypeError(f"unknown GPU figure {', '.join(sorted(unknown))}; accepted: {', '.join(sorted(figures))}")
    changed = {name: value for name, value in overrides.items() if value is not None}
    return replace(gpu, **changed) if changed else gpu  # type: ignore[arg-type]


@dataclass(frozen=True)
class Work:
    """One layer's GEMM: `positions` x `reduction` times `reduction` x `out_channels`.

    positions: T, tokens or N*P*Q output positions. reduction: C_in for Linear, C_in/groups*R*S for Conv2d.
    inputs: elements of the layer's input (less than T*reduction for a convolution, whose windows overlap).
    passes: the backward passes autograd needs. sparse_passes: those of them that may be pruned.
    """

    positions: int
    reduction: int
    out_channels: int
    inputs: int
    passes: tuple[str, ...] = PASSES
    sparse_passes: tuple[str, ...] = PASSES

    @classmethod
    def of(cls, geometry: Geometry) -> Work:
        """The work of a layer, all of its backward passes."""
        if isinstance(geometry, Conv2dGeometry):
            taps = geometry.kernel[0] * geometry.kernel[1]
            inputs = geometry.batch * geometry.in_channels * geometry.height * geometry.width
            reduction = geometry.in_channels // geometry.groups * taps
        else:
            inputs, reduction = geometry.tokens * geometry.in_channels, geometry.in_channels
        return cls(geometry.positions, reduction, geometry.out_channels, inputs)

    @property
    def flops(self) -> float:
        """Of each of forward, dgrad and wgrad."""
        return 2.0 * self.positions * self.reduction * self.out_channels

    @property
    def gradient_bytes(self) -> float:
        """Of dY."""
        return float(BYTES) * self.positions * self.out_channels

    @property
    def other_bytes(self) -> float:
        """Of the activation and the weight, which stay dense."""
        return float(BYTES) * (self.inputs + self.reduction * self.out_channels)


@dataclass(frozen=True)
class Choice:
    """The fastest way through one layer's backward: which passes run sparse, and what everything takes, in seconds."""

    sparse_passes: tuple[str, ...]
    compress: float
    passes: float

    @property
    def seconds(self) -> float:
        """Compression and both passes."""
        return self.compress + self.passes


def dense_seconds(work: Work, gpu: GPU) -> float:
    """One dense pass: forward, dgrad and wgrad alike, since they move the same three tensors."""
    return max(work.flops / gpu.flop_rate, (work.gradient_bytes + work.other_bytes) / gpu.byte_rate)


def sparse_seconds(work: Work, gpu: GPU) -> float:
    """One pass with a compressed gradient."""
    rate = gpu.flop_rate * gpu.sparse_speedup
    return max(work.flops / rate, (COMPRESSED * work.gradient_bytes + work.other_bytes) / gpu.byte_rate)


def compress_seconds(
    work: Work, gpu: GPU, sparse_passes: Sequence[str], schedule: Schedule, cost: float = 1.0
) -> float:
    """Making one compressed operand per sparse pass out of dY; both are written by the same sweep.

    two_pass: read dY, write the operands; takes `cost` (of `GPU.compress_costs`) times what moving the bytes takes.
    fused: dY's producer writes the operands, and dY itself only where a dense pass still wants it; below zero where one
    operand replaces dY. What it computes is supposed to hide behind the producer's own traffic.
    """
    replaces_gradient = set(sparse_passes) == set(work.passes)
    gradients_moved = {"two_pass": 1.0, "fused": -1.0 if replaces_gradient else 0.0}[schedule]
    seconds = (gradients_moved + COMPRESSED * len(sparse_passes)) * work.gradient_bytes / gpu.byte_rate
    return seconds * cost if schedule == "two_pass" else seconds


def best_backward(work: Work, gpu: GPU, schedule: Schedule, cost: float = 1.0) -> Choice:
    """The cheapest choice of sparse passes for one layer, dense included (and preferred on a tie).

    cost: as for `compress_seconds`.
    """
    dense = dense_seconds(work, gpu)
    sparse = sparse_seconds(work, gpu)
    best = Choice((), 0.0, dense * len(work.passes))
    for count in range(1, len(work.sparse_passes) + 1):
        for chosen in combinations(work.sparse_passes, count):
            compress = compress_seconds(work, gpu, chosen, schedule, cost)
            choice = Choice(chosen, compress, sparse * count + dense * (len(work.passes) - count))
            if choice.seconds < best.seconds:
                best = choice
    return best
