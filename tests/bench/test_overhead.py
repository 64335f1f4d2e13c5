"""What `bench/overhead.py` runs, counts and subtracts; what it measures depends on the machine."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cutlass_ops
from bench import overhead
from sdgp_accel import backends, philox
from sdgp_accel.backends import gpu
from sdgp_accel.nn import SDGPConv2d, SDGPLinear

FOLDER = Path(__file__).parents[2]


def test_every_case_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    # In a process of its own: it makes the package take the CPU for a GPU.
    command = [sys.executable, "bench/overhead.py", "--batches", "1", "--json", str(path)]
    subprocess.run(command, cwd=FOLDER, env=os.environ | {"PYTHONPATH": str(FOLDER)}, check=True, capture_output=True)
    results = json.loads(path.read_text())["results"]
    cases = {(row["backend"], row["layer"], row["prune"]) for row in results}
    assert len(cases) == len(results) == 12
    for row in results:
        (dense_forward, dense_backward), (forward, backward) = row["dense"], row["sdgp"]
        assert row["forward"] == forward - dense_forward
        assert row["backward"] == backward - dense_backward + row["replaced"]
        replacement = row.get("no_ops", 0.0) if row["backend"] == "idle" else row["empty_ops"]
        assert row["replaced"] == row["ops"] - replacement
        assert min(*row["dense"], *row["sdgp"], row["new_empty"]) > 0.0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """This process takes the CPU for a GPU, and notes what the backends that compute nothing are called for."""
    changed = (
        (cutlass_ops, "kernels"), (gpu, "device_facts"), (gpu, "current_device"), (gpu, "stream_of"),
        (backends, "_no_sparse_tensor_cores"), (backends, "_reference"), (philox, "next_seed"),
    )  # fmt: skip
    for module, name in changed:
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back
    monkeypatch.setitem(vars(cutlass_ops), "ARCHS", ())
    called: list[str] = []
    monkeypatch.setattr(overhead.Extension, "launch", staticmethod(lambda *_: called.append("launch")))
    for name in ("prune_compress", "dgrad", "wgrad"):
        idle = getattr(overhead.Idle, name)
        monkeypatch.setattr(
            overhead.Idle, name, lambda self, *a, name=name, idle=idle: called.append(name) or idle(self, *a)
        )
    overhead.pretend_gpu()
    yield called
    backends.forget_decisions()


class Operations(TorchDispatchMode):
    """Counts the operations that run, and notes their positions and results."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.outputs = Counter[str](), list[Any]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.counts[function.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        self.outputs.append(output)
        return output


def operations(call: Callable[[], Any]) -> Operations:
    with Operations() as found:
        call()
    return found


@pytest.mark.parametrize("case", overhead.CASES)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("function", overhead.FUNCTIONS)
def test_what_is_timed_is_what_the_row_says(
    case: str, kind: str, function: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Any] = []
    calls: dict[str, Callable[[], Any]] = {}

    def fastest_steps(modules: dict[str, nn.Sequential], x: Tensor, dy: Tensor, batches: int, amp: bool) -> Any:
        steps.append((modules, x, dy, amp))
        assert batches == 7
        return {"dense": (1.0, 10.0), "sdgp": (3.0, 15.0)}

    def fastest(given: dict[str, Callable[[], Any]], batches: int) -> dict[str, float]:
        calls.update(given)
        assert batches == 7
        return {"new_empty": 0.25, "ops": 6.0, "empty_ops": 2.0, "no_ops": 1.0}

    monkeypatch.setattr(overhead, "fastest_steps", fastest_steps)
    monkeypatch.setattr(overhead, "fastest", fastest)
    row = overhead.measure(case, kind, function, 7)
    replaced = 4.0 if case != "idle" else 5.0
    assert (row["forward"], row["backward"], row["limit"]) == (2.0, 5.0 + replaced, 15e-6)

    ((modules, x, dy, amp),) = steps
    assert amp == (case == "cutlass amp")
    layers = {name: {type(layer) for layer in module} for name, module in modules.items()}
    ours, theirs = (SDGPLinear, nn.Linear) if kind == "linear" else (SDGPConv2d, nn.Conv2d)
    assert layers == {"dense": {theirs}, "sdgp": {ours}}
    assert {len(module) for module in modules.values()} == {overhead.DEPTH}
    assert {parameter.dtype for module in modules.values() for parameter in module.parameters()} == {
        torch.float32 if amp else torch.bfloat16
    }
    assert {layer.sdgp_config.functions for layer in modules["sdgp"]} == {(function, function)}
    assert x.requires_grad
    for name, module in modules.items():
        launches.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = module(x)
        assert y.dtype == dy.dtype == torch.bfloat16
        y.backward(dy)
        assert x.grad is not None
        assert all(parameter.grad is not None for parameter in module.parameters())
        each = {"prune_compress": overhead.DEPTH, "dgrad": overhead.DEPTH, "wgrad": overhead.DEPTH}
        expected = {} if name == "dense" else each if case == "idle" else {"launch": overhead.DEPTH}
        assert Counter(launches) == expected

    # What a dense layer's backward consists of, and the same of nothing.
    counts = operations(calls["ops"]).counts
    wanted = {"mm": 2, "sum": 1} if kind == "linear" else {"convolution_backward": 1}
    assert {name: count for name, count in counts.items() if name in ("mm", "sum", "convolution_backward")} == wanted
    if kind == "linear":
        gradient, matrix = dy.flatten(0, -2), x.detach().flatten(0, -2)
        weight = modules["dense"][0].weight.detach().bfloat16()
        found = operations(calls["ops"]).outputs
        for expected in (gradient @ weight, gradient.t() @ matrix, gradient.sum(0)):
            assert any(output.shape == expected.shape and torch.equal(output, expected) for output in found)
        assert torch.Size([0, 8]) in [output.shape for output in operations(calls["empty_ops"]).outputs]
        assert "no_ops" not in calls
    else:
        for name, results in (("ops", (2, 8, 8)), ("empty_ops", (0, 8, 8)), ("no_ops", ())):
            (gradients,) = operations(calls[name]).outputs[-1:]
            assert tuple(len(gradient) for gradient in gradients if gradient is not None) == results
    assert set(operations(calls["new_empty"]).counts) == {"new_empty"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that only those who are timed let pass."""
    now = [0.0]
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_the_fastest_batch_of_calls_in_turns(clock: list[float]) -> None:
    ran: list[str] = []

    def call(name: str, *seconds: float) -> Callable[[], None]:
        each = itertools.chain.from_iterable(itertools.repeat(s, overhead.BATCH) for s in seconds)

        def run() -> None:
            ran.append(name)
            clock[0] += next(each)

        return run

    best = overhead.fastest({"a": call("a", 5.0, 3.0, 4.0), "b": call("b", 1.0, 2.0, 1.5)}, 3)
    assert best == {"a": pytest.approx(3.0), "b": pytest.approx(1.0)}
    assert ran == [name for _ in range(3) for name in "ab" for _ in range(overhead.BATCH)]


class Slow(torch.autograd.Function):
    """Takes time forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        layer.pass_time(0)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.layer.pass_time(1)
        return dy, None


class Layer(nn.Module):
    """So many seconds forward and backward; more in the first and in the last of three batches."""

    def __init__(self, clock: list[float], *seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.clock, self.seconds, self.calls, self.amp = clock, seconds, [0, 0], set[bool]()

    def pass_time(self, direction: int) -> None:
        self.clock[0] += self.seconds[direction] * (3, 1, 2)[self.calls[direction] // overhead.BATCH]
        self.calls[direction] += 1
        self.amp.add(torch.is_autocast_enabled("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.grad is None  # a gradient that is added to takes time of its own
        assert not x.is_leaf or x.grad is None
        return Slow.apply(x * (1 + self.weight), self)


@pytest.mark.parametrize("amp", [False, True])
def test_the_fastest_batch_of_steps_for_each_layer(clock: list[float], amp: bool) -> None:
    modules = {
        "dense": nn.Sequential(Layer(clock, 1.0, 2.0), Layer(clock, 3.0, 4.0)),
        "sdgp": nn.Sequential(Layer(clock, 5.0, 7.0)),
    }
    best = overhead.fastest_steps(modules, torch.zeros(2, requires_grad=True), torch.ones(2), 3, amp)
    assert best == {"dense": pytest.approx((2.0, 3.0)), "sdgp": pytest.approx((5.0, 7.0))}
    for layer in itertools.chain.from_iterable(modules.values()):
        assert layer.calls == [3 * overhead.BATCH] * 2
        assert layer.amp == ({False, True} if amp else {False})  # forward alone runs under autocast


def test_seeds_come_from_a_generator(launches: list[str]) -> None:
    """A constant would cost nothing."""
    seeds = [str(philox.next_seed(torch.device("cpu"))) for _ in range(3)]
    assert len(set(seeds)) == 3
