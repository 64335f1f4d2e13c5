"""Host time of one SDGP layer over its dense twin: Python, dispatch and bookkeeping, without any arithmetic.

    python bench/overhead.py [--json FILE]

Forward and backward of tiny layers on a CPU, in turns, in one thread. The SDGP layer runs with a backend that
computes nothing, and the dense layer's own backward ops, timed alone, are taken off the dense side; what remains
of the difference is what this package adds to a layer on any device. Seeds of random functions are drawn for real.
Limit: 15 µs. Each figure is the fastest of many short batches: what the code costs when nobody disturbs it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sdgp_accel as sdgp
from sdgp_accel import backends
from sdgp_accel.backends.reference import ReferenceBackend
from sdgp_accel.provenance import provenance

LIMIT = 15e-6
FUNCTIONS = ("rescale_magnitude", "mvue")


class Idle(ReferenceBackend):
    """Takes everything and computes nothing: hands out the same gradients again and again."""

    name = "idle"

    def __init__(self, gradients: dict[str, Tensor]) -> None:
        self._gradients = gradients

    def prune_compress(self, dy2d: Tensor, *_: Any) -> backends.Operands:
        return backends.Operands(dy2d, dy2d, self._gradients["bias"])

    def dgrad(self, *_: Any) -> Tensor:
        return self._gradients["x"]

    def wgrad(self, *_: Any) -> Tensor:
        return self._gradients["weight"]


def fastest(calls: dict[str, Callable[[], Any]], batches: int, size: int = 50) -> dict[str, float]:
    """Seconds per call of each of `calls`, run in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(batches):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(size):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / size)
    return best


def measure(kind: str, function: str, batches: int) -> dict[str, Any]:
    """One layer kind and prune function: seconds of each side and the overhead."""
    config = sdgp.SDGPConfig(prune=function, backend="reference")
    if kind == "linear":
        dense, x = nn.Linear(8, 8), torch.randn(8, 8)
    else:
        dense, x = nn.Conv2d(8, 8, 1), torch.randn(2, 8, 2, 2).to(memory_format=torch.channels_last)
    x.requires_grad_()
    layer = type(dense)(8, 8, *([1] if kind == "conv2d" else []))
    sdgp.accelerate_(layer, config)
    dy = dense(x).detach()
    weight = dense.weight.detach()
    gradients = {"x": torch.empty_like(x), "weight": torch.empty_like(weight), "bias": torch.empty(8)}
    backends._reference = lambda: Idle(gradients)
    backends.forget_decisions()

    def step(module: nn.Module) -> Callable[[], Any]:
        leaves = [x, *module.parameters()]
        return lambda: torch.autograd.grad(module(x), leaves, dy)

    def dense_ops() -> None:
        if kind == "linear":
            _ = dy @ weight, dy.t() @ x.detach(), dy.sum(0)
        else:
            torch.ops.aten.convolution_backward.default(
                dy, x.detach(), weight, [8], (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, True, True)
            )

    seconds = fastest({"dense": step(dense), "sdgp": step(layer), "dense_ops": dense_ops}, batches)
    overhead = seconds["sdgp"] - (seconds["dense"] - seconds["dense_ops"])
    return {"layer": kind, "prune": function, **seconds, "overhead": overhead, "limit": LIMIT}


@click.command()
@click.option("--batches", type=click.IntRange(min=1), default=400, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here.")
def main(batches: int, path: Path | None) -> None:
    torch.set_num_threads(1)
    results = [measure(kind, function, batches) for kind in ("linear", "conv2d") for function in FUNCTIONS]
    table = Table(title="Host time per layer, forward and backward, µs")
    for column in ("layer", "prune", "dense", "of it arithmetic", "sdgp, no arithmetic", "overhead", "limit"):
        table.add_column(column, justify="left" if column in ("layer", "prune") else "right")
    for row in results:
        times = (row["dense"], row["dense_ops"], row["sdgp"], row["overhead"], row["limit"])
        table.add_row(row["layer"], row["prune"], *(f"{seconds * 1e6:.1f}" for seconds in times))
    Console().print(table)
    if path is not None:
        data = {"schema": 1, "provenance": provenance(torch.device("cpu")), "results": results}
        path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
