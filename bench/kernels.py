"""The prune+compress kernel on its own: time and bandwidth against copying the tensor and against PyTorch's kernel.

    python -m bench.kernels            # to bench/results/kernels-<GPU>.json

Each case and its peers run in turns in one process, as CUDA graphs over buffers that together exceed the L2
cache. The peers are `clone()` of the same tensor (what memory allows) and ``torch._sparse_semi_structured_tile`` (2:4
along both axes by magnitude, CUTLASS's layout for sm_80).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.gpu import find_kernels, result_path
from sdgp_accel.backends import KERNELS, Backend, Needs
from sdgp_accel.config import PruneSpec
from sdgp_accel.geometry import LinearGeometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.philox import Rng
from sdgp_accel.provenance import provenance
from sdgp_accel.timing import CudaClock, Stats

# Gradients [T, C] of layers at the batch sizes of bench/layers.py, and positions per sample.
GRADIENTS = {
    "vit_large.fc1": (128 * 197, 4096, 197),
    "vit_large.fc2": (128 * 197, 1024, 197),
    "resnet9.conv2": (512 * 16 * 16, 256, 16 * 16),
    "resnet9.res2": (512 * 8 * 8, 512, 8 * 8),
    "resnet50.56x56_64": (256 * 56 * 56, 64, 56 * 56),
    "resnet50.28x28_512": (256 * 28 * 28, 512, 28 * 28),
    "resnet50.7x7_512": (256 * 7 * 7, 512, 7 * 7),
}
RULES = {
    "magnitude": PruneSpec("magnitude", 2, 4),
    "random": PruneSpec("random", 2, 4),
    "mvue": PruneSpec("mvue", 2, 4),
    "rescale group": PruneSpec("rescale_magnitude", 2, 4),
    "rescale sample_channel": PruneSpec("rescale_magnitude", 2, 4, "sample_channel"),
    "rescale tensor": PruneSpec("rescale_magnitude", 2, 4, "tensor"),
    "mvue 2:8": PruneSpec("mvue", 2, 8),
    "mvue 2:16": PruneSpec("mvue", 2, 16),
}
L2_BYTES = 50 << 20
REPEATS = 30


class Case(NamedTuple):
    """One row: a gradient, half of it zeros (as behind a ReLU) or none, a rule, and which outputs it asks for."""

    gradient: str
    rule: str
    needs: Needs
    half_zeros: bool = False


CASES = [Case(gradient, rule, Needs(True, True, False)) for gradient in GRADIENTS for rule in list(RULES)[:5]]
CASES += [Case("vit_large.fc2", rule, Needs(True, True, False)) for rule in list(RULES)[5:]]
CASES += [Case("vit_large.fc2", "mvue", needs) for needs in (Needs(True, False, False), Needs(False, True, False))]
CASES += [Case("vit_large.fc2", rule, Needs(True, True, True)) for rule in ("magnitude", "mvue")]
CASES += [Case("vit_large.fc1", rule, Needs(True, True, False), half_zeros=True) for rule in list(RULES)[:4]]


def moved_bytes(t: int, c: int, needs: Needs) -> float:
    """Bytes that one pass over dY has to move: each value read once, 9/16 of its bytes written per operand."""
    return 2.0 * t * c * (1 + 9 / 16 * (needs.dgrad + needs.wgrad)) + (4.0 * c if needs.bias else 0.0)


def measure(backend: Backend, case: Case, device: torch.device) -> dict[str, Any]:
    """Microseconds of the kernel and of its peers."""
    t, c, positions_per_sample = GRADIENTS[case.gradient]
    spec = RULES[case.rule]
    plan = LayerPlan(spec, spec, KERNELS, "error")
    rng = Rng((1, 2)) if spec.is_random else None
    geometry = LinearGeometry(t, c, c, positions_per_sample)
    inputs = [torch.randn(t, c, device=device, dtype=torch.bfloat16) for _ in range(2 + 2 * L2_BYTES // (2 * t * c))]
    if case.half_zeros:
        inputs = [x.relu() for x in inputs]

    def kernel(x: Tensor) -> Any:
        return backend.prune_compress(x, geometry, plan, rng, case.needs)

    contenders: dict[str, Callable[[Tensor], Any]] = {"kernel": kernel, "clone": Tensor.clone}
    if case.rule == "magnitude" and case.needs == Needs(True, True, False) and t % 32 == 0 and c % 32 == 0:
        contenders["torch_tile"] = lambda x: torch._sparse_semi_structured_tile(x)
    graphs = {name: captured(run, inputs) for name, run in contenders.items()}
    clock = CudaClock(device)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contenders}
    for repeat in range(-5, REPEATS):
        for name, (graph, _) in graphs.items():
            start = clock.mark()
            graph.replay()
            if repeat >= 0:
                marks[name].append((start, clock.mark()))
    clock.synchronize()
    stats = {
        name: Stats.of([1e6 * clock.seconds(*pair) / len(inputs) for pair in pairs]) for name, pairs in marks.items()
    }
    micro = stats["kernel"].median
    return {
        "case": case.gradient, "t": t, "c": c, "dtype": "bfloat16", "needs": case.needs._asdict(),
        "rule": f"{case.rule}, half zeros" if case.half_zeros else case.rule,
        "microseconds": {name: vars(value) for name, value in stats.items()},
        "gigabytes_per_second": moved_bytes(t, c, case.needs) / micro * 1e-3,
        "clones": micro / stats["clone"].median,
        "torch_tiles": micro / stats["torch_tile"].median if "torch_tile" in stats else None,
    }  # fmt: skip


def captured(run: Callable[[Tensor], Any], inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph that runs over all inputs, and its outputs: alive, so that each has its own memory."""
    run(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run(x) for x in inputs]
    return graph, outputs


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="prune + compress, bf16")
    for column in ("gradient", "rule", "outputs", "µs", "GB/s", "÷ clone", "÷ torch tile"):
        result.add_column(column, justify="left" if column in ("gradient", "rule", "outputs") else "right")
    for row in rows:
        outputs = " ".join(name for name, wanted in row["needs"].items() if wanted)
        tiles = "" if row["torch_tiles"] is None else f"{row['torch_tiles']:.2f}"
        micro = f"{row['microseconds']['kernel']['median']:.1f}"
        numbers = (f"{row['gigabytes_per_second']:.0f}", f"{row['clones']:.2f}", tiles)
        result.add_row(row["case"], row["rule"], outputs, micro, *numbers)
    return result


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Where the results go.")
def main(path: Path | None) -> None:
    """Time prune+compress for gradients of real layers."""
    backend, device = find_kernels(" (bench.static_evidence needs none)")
    path = path or result_path("kernels")
    rows = []
    for case in CASES:
        rows.append(measure(backend, case, device))
        result = {"benchmark": "kernels", "provenance": provenance(device), "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table(rows))


if __name__ == "__main__":
    main()
