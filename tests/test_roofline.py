"""The roofline against hand arithmetic and against an exhaustive, slower statement of itself."""

from __future__ import annotations

import random
from itertools import product

import pytest

from sdgp_accel.config import PASSES, PruneSpec
from sdgp_accel.geometry import Conv2dGeometry, LinearGeometry
from sdgp_accel.roofline import (
    GPU,
    GPUS,
    SCHEDULES,
    Work,
    best_backward,
    compress_rule,
    compress_seconds,
    dense_seconds,
    gpu_figures,
    known_gpu,
    sparse_seconds,
)

ROUND = GPU("round", tflops=100, bandwidth=1, compute_efficiency=1, memory_efficiency=1, sparse_speedup=2)


def test_compute_bound_by_hand() -> None:
    work = Work(positions=10_000, reduction=10_000, out_channels=10_000, inputs=10_000**2)
    assert dense_seconds(work, ROUND) == pytest.approx(2e12 / 1e14)
    assert sparse_seconds(work, ROUND) == pytest.approx(1e12 / 1e14)
    two_pass, fused = (best_backward(work, ROUND, schedule) for schedule in SCHEDULES)
    gradient = 2e8 / 1e12  # seconds to move dY once
    assert two_pass.compress == pytest.approx(2.125 * gradient)
    assert fused.compress == pytest.approx(0.125 * gradient)
    assert two_pass.seconds == pytest.approx(0.02 + 2.125 * gradient)


def test_memory_bound_by_hand() -> None:
    work = Work(positions=1_000_000, reduction=8, out_channels=8, inputs=8_000_000)
    assert dense_seconds(work, ROUND) == pytest.approx((16e6 + 16e6 + 128) / 1e12)
    assert sparse_seconds(work, ROUND) == pytest.approx((9e6 + 16e6 + 128) / 1e12)
    assert best_backward(work, ROUND, "two_pass").sparse_passes == ()
    assert best_backward(work, ROUND, "fused").sparse_passes == ("grad_input", "grad_weight")


def test_best_backward_is_the_cheapest_of_all_choices() -> None:
    random.seed(11)
    for _ in range(200):
        sizes = [2 ** random.randint(3, 17) for _ in range(3)]
        passes = random.choice([("grad_input",), ("grad_weight",), ("grad_input", "grad_weight")])
        work = Work(*sizes, inputs=sizes[0] * sizes[1] // random.choice([1, 9]), passes=passes, sparse_passes=passes)
        gpu = random.choice(list(GPUS.values()))
        gradient = 2 * sizes[0] * sizes[2] / gpu.byte_rate
        for schedule in SCHEDULES:
            costs = []
            for sparse in product((False, True), repeat=len(passes)):
                seconds = sum(sparse_seconds(work, gpu) if s else dense_seconds(work, gpu) for s in sparse)
                if any(sparse):
                    seconds += sum(sparse) * 9 / 16 * gradient
                    seconds += gradient if schedule == "two_pass" else -gradient if all(sparse) else 0
                costs.append(seconds)
            assert best_backward(work, gpu, schedule).seconds == pytest.approx(min(costs))


def test_nothing_to_prune_is_dense() -> None:
    work = Work(4096, 4096, 4096, 4096**2, passes=("grad_weight",), sparse_passes=())
    choice = best_backward(work, GPUS["a100"], "fused")
    assert choice.sparse_passes == ()
    assert choice.seconds == dense_seconds(work, GPUS["a100"])
    empty = Work(0, 64, 64, 0)  # sparse takes as long
    assert best_backward(empty, GPUS["a100"], "two_pass").sparse_passes == ()


def test_figures_can_be_overridden() -> None:
    changed = gpu_figures("h100", sparse_speedup=1.5, tflops=None)
    assert (changed.sparse_speedup, changed.tflops, changed.name) == (1.5, 989, "h100")
    assert gpu_figures(ROUND) is ROUND
    assert GPUS["h100"].sparse_speedup == 1.25


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"tflops": 0}, "tflops must be greater than 0"),
        ({"bandwidth": -1.0}, "bandwidth must be greater than 0"),
        ({"memory_efficiency": 1.5}, "memory_efficiency must be greater than 0 and at most 1; got 1.5"),
        ({"compute_efficiency": float("nan")}, "compute_efficiency"),
        ({"sparse_speedup": 3.0}, "sparse_speedup must be between 1 and 2; got 3.0"),
    ],
)
def test_impossible_figures_are_refused(figures: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_figures("a100", **figures)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gpu must be one of .*'h200'.*; got 'v100'"):
        gpu_figures("v100")
    with pytest.raises(TypeError, match="unknown GPU figure flops"):
        gpu_figures("a100", flops=3.0)


@pytest.mark.parametrize(
    ("name", "entry"),
    [("NVIDIA H100 80GB HBM3", "h100-measured"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H100 NVL", "h100"),
     ("NVIDIA H200", "h200-measured"), ("NVIDIA H200 NVL", "h200"), ("NVIDIA GH200 480GB", "h100"),
     ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100 80GB PCIe", "a100-80"),
     ("NVIDIA A10", "a10"), ("NVIDIA A10G", "a10g"), ("NVIDIA A40", "a40"), ("NVIDIA L4", "l4"), ("NVIDIA L40", "l40"),
     ("NVIDIA L40S", "l40s"), ("NVIDIA RTX A6000", "rtx-a6000"), ("NVIDIA RTX A4000", None),
     ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"), ("NVIDIA GeForce RTX 3090 Ti", "rtx3090"),
     ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 5090", "rtx5090"), ("", None)],
)  # fmt: skip
def test_known_gpus(name: str, entry: str | None) -> None:
    assert known_gpu(name) == entry
    assert entry is None or entry in GPUS


def test_a_costly_prune_function_costs_its_own_pass_only() -> None:
    gpu = gpu_figures(ROUND)
    costly = GPU("c", 100, 1, 1, 1, 2, compress_costs={"mvue": 3.0, "rescale_magnitude tensor": 4.0})
    work = Work(positions=10_000, reduction=10_000, out_channels=10_000, inputs=10_000**2)
    cost = costly.compress_cost(PruneSpec("mvue", 2, 4))
    assert (cost, costly.compress_cost(PruneSpec("magnitude", 2, 4))) == (3.0, 1.0)
    assert costly.compress_cost(PruneSpec("rescale_magnitude", 2, 4)) == 1.0
    assert costly.compress_cost(PruneSpec("rescale_magnitude", 2, 4, "tensor")) == 4.0
    cheap, dear = (best_backward(work, g, "two_pass", c) for g, c in ((gpu, 1.0), (costly, cost)))
    assert dear.compress == pytest.approx(3 * cheap.compress)
    assert dear.passes == cheap.passes
    assert best_backward(work, costly, "fused", cost) == best_backward(work, gpu, "fused")
    assert compress_seconds(work, gpu, PASSES, "two_pass") == pytest.approx(cheap.compress)
    assert compress_rule(PruneSpec("mvue", 2, 8)) == "mvue"
    with pytest.raises(ValueError, match=r"compress_costs\['mvue'\] must be greater than 0; got -1"):
        GPU("x", 1, 1, compress_costs={"mvue": -1})


def test_work_of_a_geometry_by_hand() -> None:
    assert Work.of(LinearGeometry(10, 4, 6)) == Work(10, 4, 6, 40)
    conv = Conv2dGeometry.of((2, 8, 9, 9), (12, 4, 3, 3), (2, 2, 1, 1, 1, 1, 2), channels_last=True)
    assert Work.of(conv) == Work(2 * 5 * 5, 4 * 9, 12, 2 * 8 * 9 * 9)
