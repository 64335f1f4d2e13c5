"""Host time of one SDGP layer over its dense twin: Python, dispatch and bookkeeping, without any arithmetic.

    python -m bench.overhead [--json FILE]

Steps of chains of tiny layers on a CPU, forward and then backward, in one thread; both directions are timed in the same
steps, so that neither has the caches to itself. Two backends, each against what it replaces:

- "idle" calls no op and allocates nothing, which leaves what every backend pays. Compared with the dense layer less its
  backward ops, which are timed alone (of a convolution's one op: less what a call for no gradient takes).
- "cutlass" is the real one with an extension that returns at once: its own Python, and the memory of operands, results
  and bias sums. Compared with the dense layer less the arithmetic of its backward ops alone, which is what they take
  beyond the same ops on no positions: a dense layer dispatches its ops and allocates their results on a GPU, too.
- "cutlass amp": the same with float32 parameters under autocast to bfloat16, as most training is.

Not in it: CUDA's launches, on either side, and what the extension does in its call (1.0 µs for prune + compress and
0.7 for a product when each was a call of its own, where a dense Linear takes 117 µs, with launches that return at
once). "linear" has an input [2, 4, 8], as in a transformer. Figures are of one of the `DEPTH` layers of a chain: what
a backward costs once, whatever its length, is spread over them. A seed of the random functions comes from an object
with C functions for methods, like a CUDA generator.

Limit: 15 µs for a backward. Each figure is the fastest of many short batches: what the code costs when nobody disturbs
it. On a busy machine, where the caches are never warm, it costs a multiple; beside it is what one `new_empty` takes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cutlass_ops
import sdgp_accel as sdgp
from sdgp_accel import backends, philox
from sdgp_accel.backends import gpu
from sdgp_accel.backends.reference import ReferenceBackend
from sdgp_accel.provenance import provenance

LIMIT = 15e-6
CASES = ("idle", "cutlass", "cutlass amp")
FUNCTIONS = ("rescale_magnitude", "mvue")
DEPTH = 8
BATCH = 10


class Idle(ReferenceBackend):
    """Takes everything and computes nothing: hands out the same gradients again and again."""

    def __init__(self, gradients: dict[str, Tensor]) -> None:
        self._gradients = gradients

    def prune_compress(self, dy: Tensor, *_: Any) -> backends.Operands:
        return backends.Operands(dy, dy, self._gradients["bias"])

    def dgrad(self, *_: Any) -> Tensor:
        return self._gradients["x"]

    def wgrad(self, *_: Any) -> Tensor:
        return self._gradients["weight"]


class Extension:
    """Stands in for the compiled kernels: takes every launch and does nothing."""

    def bind(self, *_: Any, **__: Any) -> Callable[..., None]:
        return self.launch

    launch = staticmethod("".format)  # a C function, as theirs are

    PruneCompress = SparseGemm = SparseConv = Backward = bind

    def device_problem(self) -> str:
        return ""

    def bias_partial_rows(self, t: int, c: int) -> int:
        return 1


def counting_generator() -> Any:
    """Counts as a CUDA generator does, by itself."""
    return SimpleNamespace(initial_seed=(1).__int__, get_offset=itertools.count(0, 4).__next__, set_offset=id)


def pretend_gpu() -> None:
    """Make the cutlass backend take CPU tensors for those of an H100."""
    extension, facts = Extension(), gpu.Device((9, 0), 132)
    cutlass_ops.kernels, cutlass_ops.ARCHS = lambda: extension, ("90a",)
    gpu.device_facts = lambda device: facts
    gpu.current_device, gpu.stream_of = lambda: None, lambda device: 0
    backends._no_sparse_tensor_cores = lambda device: None
    generator = counting_generator()
    philox.next_seed = lambda device: philox.take(generator)


def fastest(calls: dict[str, Callable[[], Any]], batches: int) -> dict[str, float]:
    """Seconds per call of each of `calls`, run in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(batches):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(BATCH):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / BATCH)
    return best


def fastest_steps(
    modules: dict[str, nn.Sequential], x: Tensor, dy: Tensor, batches: int, amp: bool
) -> dict[str, tuple[float, float]]:
    """Seconds of forward, under autocast or not, and of backward of a layer of each module, run in turns."""
    best, nothing = dict.fromkeys(modules, (float("inf"), float("inf"))), contextlib.nullcontext()
    for _ in range(batches):
        for name, module in modules.items():
            leaves, forward, backward = (x, *module.parameters()), 0.0, 0.0
            for _ in range(BATCH):
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16) if amp else nothing:
                    y = module(x)
                between = time.perf_counter()
                y.backward(dy)
                end = time.perf_counter()
                del y
                for leaf in leaves:
                    leaf.grad = None
                forward, backward = forward + between - start, backward + end - between
            count = BATCH * len(module)
            best[name] = min(best[name][0], forward / count), min(best[name][1], backward / count)
    return best


def layer_and_input(kind: str) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
    if kind == "linear":
        return nn.Linear(8, 8).bfloat16(), torch.randn(2, 4, 8).bfloat16().requires_grad_()
    layer = nn.Conv2d(8, 8, 3, padding=1).bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 4, 4).bfloat16().to(memory_format=torch.channels_last)
    return layer, x.requires_grad_()


def measure(case: str, kind: str, function: str, batches: int) -> dict[str, Any]:
    """One of `CASES`, layer kind and prune function: seconds of each side and the overhead."""
    backend, _, amp = case.partition(" ")
    layer, x = layer_and_input(kind)
    dense = nn.Sequential(*(copy.deepcopy(layer) for _ in range(DEPTH)))
    chain = copy.deepcopy(dense)
    # Scopes wider than a group take a second sweep over the gradient: not the case to judge the host by.
    asked = "reference" if backend == "idle" else backend
    sdgp.accelerate_(chain, sdgp.SDGPConfig(prune=function, scope="group", backend=asked))
    dy, weight = layer(x).detach(), layer.weight.detach()
    gradients = {"x": torch.empty_like(x), "weight": torch.empty_like(weight), "bias": torch.empty_like(layer.bias)}
    backends._reference = lambda: Idle(gradients)
    backends.forget_decisions()
    if amp:
        dense, chain = dense.float(), chain.float()

    x_data = x.detach()
    matrix, x_matrix = dy.flatten(0, -2), x_data.flatten(0, -2)

    def linear_ops(dy: Tensor, x: Tensor) -> None:
        _ = dy @ weight, dy.t() @ x, dy.sum(0)

    def convolution(dy: Tensor, x: Tensor, wanted: bool = True) -> None:
        torch.ops.aten.convolution_backward.default(
            dy, x, weight, [8], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (wanted, wanted, wanted)
        )

    ops, operands = (linear_ops, (matrix, x_matrix)) if kind == "linear" else (convolution, (dy, x_data))
    nothing = [operand[:0] for operand in operands]
    calls = {
        "new_empty": lambda: dy.new_empty(8), "ops": lambda: ops(*operands), "empty_ops": lambda: ops(*nothing),
    }  # fmt: skip
    if kind == "conv2d":
        calls["no_ops"] = lambda: convolution(*operands, wanted=False)
    steps = fastest_steps({"dense": dense, "sdgp": chain}, x, dy, batches, bool(amp))
    seconds = fastest(calls, batches)
    replaced = seconds["ops"] - (seconds.get("no_ops", 0.0) if backend == "idle" else seconds["empty_ops"])
    forward, backward = (ours - theirs for ours, theirs in zip(steps["sdgp"], steps["dense"], strict=True))
    return {
        "backend": case, "layer": kind, "prune": function, **steps, **seconds, "replaced": replaced,
        "forward": forward, "backward": backward + replaced, "limit": LIMIT,
    }  # fmt: skip


@click.command()
@click.option("--batches", type=click.IntRange(min=1), default=400, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here.")
def main(batches: int, path: Path | None) -> None:
    """Time the host's part of SDGP layers on this machine."""
    torch.set_num_threads(1)
    pretend_gpu()
    results = [measure(*case, batches) for case in itertools.product(CASES, ("linear", "conv2d"), FUNCTIONS)]
    table = Table(title="Host time of a layer, µs: dense, and what SDGP adds")
    for column in ("backend", "layer", "prune", "dense fwd", "bwd", "replaced", "SDGP fwd +", "bwd +", "new_empty"):
        table.add_column(column, justify="left" if column in ("backend", "layer", "prune") else "right")
    for row in results:
        times = (*row["dense"], row["replaced"], row["forward"], row["backward"], row["new_empty"])
        table.add_row(row["backend"], row["layer"], row["prune"], *(f"{seconds * 1e6:.1f}" for seconds in times))
    Console().print(table)
    if path is not None:
        data = {"schema": 4, "provenance": provenance(torch.device("cpu")), "results": results}
        path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
