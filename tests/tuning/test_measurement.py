"""Timing the parts of a layer's backward: which parts, with which tilings, in how many rounds."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from sdgp_accel import SDGPConfig
from sdgp_accel.backends import Call, Tilings, dense
from sdgp_accel.backends.reference import ReferenceBackend
from sdgp_accel.geometry import Conv2dGeometry, LinearGeometry
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.tuning import measurement
from sdgp_accel.tuning.measurement import Milliseconds, measure, median_milliseconds

CPU = torch.device("cpu")
LINEAR = LinearGeometry(tokens=24, in_channels=16, out_channels=32)
CONV = Conv2dGeometry.of((2, 8, 6, 5), (16, 8, 3, 3), (2, 2, 1, 1, 1, 1, 1), True)


class Timeline:
    """A clock that only passes when a call says so; in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(measurement, "clock_for", lambda device: self)

    def call(self, name: str, *milliseconds: float) -> Any:
        """A callable that takes these times, one after the other, the last one again and again."""
        times = list(milliseconds)

        def called() -> None:
            self.calls.append(name)
            self.now += 1e-3 * (times.pop(0) if len(times) > 1 else times[0])

        return called

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        pass


class Tiled(ReferenceBackend):
    """A backend whose products take as long as their tilings say."""

    def __init__(self, timeline: Timeline, dgrad: dict[str, float], wgrad: dict[str, float]) -> None:
        self.timeline, self.milliseconds = timeline, {"grad_input": dgrad, "grad_weight": wgrad}

    def tilings(self, geometry: Any, pass_name: str, dtype: Any, device: Any) -> tuple[str, ...]:
        return tuple(self.milliseconds[pass_name])

    def dgrad(self, operand: Any, weight: Any, geometry: Any, tiling: Any = None) -> None:
        self.timeline.call(f"dgrad {tiling}", self.milliseconds["grad_input"].get(tiling, 1.0))()

    def wgrad(self, operand: Any, x: Any, geometry: Any, tiling: Any = None) -> None:
        self.timeline.call(f"wgrad {tiling}", self.milliseconds["grad_weight"].get(tiling, 1.0))()


@pytest.mark.parametrize("geometry", [LINEAR, CONV], ids=["linear", "conv2d"])
@pytest.mark.parametrize("config", [SDGPConfig(), SDGPConfig(grad_weight="dense"), SDGPConfig(grad_input="dense")])
def test_every_part_is_timed_and_no_generator_moves(
    geometry: LinearGeometry | Conv2dGeometry, config: SDGPConfig
) -> None:
    plan = decode(plan_string("linear" if geometry is LINEAR else "conv2d", config))
    state = torch.random.get_rng_state()
    measured = measure(ReferenceBackend(), plan, geometry, torch.float32, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = {"dense_dgrad", "dense_wgrad", "dense_both"}
    if config.grad_input == "sparse":
        expected |= {"sparse_dgrad", "compress_dgrad"}
    if config.grad_weight == "sparse":
        expected |= {"sparse_wgrad", "compress_wgrad"}
    if config.grad_input == config.grad_weight:
        expected.add("compress_both")
    for times in (measured.device, measured.host):
        assert {name for name, value in times._asdict().items() if value is not None} == expected
        assert all(value > 0.0 for value in times if value is not None)
    assert measured.tilings == Tilings(None, None)


@pytest.mark.parametrize("channels_last", [False, True])
def test_operands_lie_in_memory_as_the_layers_own(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of another layout take other kernels, or copies."""
    geometry = CONV._replace(channels_last=channels_last)
    seen: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(dense, "dgrad", lambda dy, weight, geometry: seen.update(dy=dy, weight=weight))
    monkeypatch.setattr(dense, "wgrad", lambda dy, x, geometry: seen.update(x=x))
    backend = Tiled(Timeline(monkeypatch), {}, {})
    measure(backend, decode(plan_string("conv2d", SDGPConfig())), geometry, torch.bfloat16, CPU)
    assert {tensor.dtype for tensor in seen.values()} == {torch.bfloat16}
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shapes = {"dy": (2, 16, 3, 3), "weight": geometry.weight_shape, "x": geometry.input_shape}
    assert {name: tuple(tensor.shape) for name, tensor in seen.items()} == shapes
    assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in seen.values())


def test_the_fastest_of_the_promising_tilings_is_what_gets_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(monkeypatch)
    dgrad = {"predicted": 2.0, "better": 1.5, "a": 3.0, "b": 4.0, "c": 3.5, "d": 5.0, "e": 4.5, "f": 6.0}
    assert len(dgrad) == measurement.TILINGS
    dgrad["unpromising"] = 0.1
    backend = Tiled(timeline, dgrad, {"only": 0.5})
    measured = measure(backend, decode(plan_string("linear", SDGPConfig())), LINEAR, torch.float32, CPU)
    assert measured.tilings == Tilings("better", "only")
    assert measured.device.sparse_dgrad == pytest.approx(1.5)
    assert measured.device.sparse_wgrad == pytest.approx(0.5)
    assert measured.host.sparse_dgrad != measured.device.sparse_dgrad
    assert "dgrad unpromising" not in timeline.calls
    tail = timeline.calls[len(timeline.calls) - 2 * (measurement.WARM_UP_ROUNDS + measurement.ROUNDS) :]
    assert set(tail) == {"dgrad better", "wgrad only"}  # timed afresh: the luckiest of several would be too fast


def test_candidates_take_turns_and_the_first_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(monkeypatch)
    candidates = {"a": timeline.call("a", 90.0, 50.0, 0.4, 0.1), "b": timeline.call("b", 0.2)}
    times = median_milliseconds(candidates, CPU)
    assert {name: ms.device for name, ms in times.items()} == {"a": pytest.approx(0.1), "b": pytest.approx(0.2)}
    calls, count = timeline.calls, measurement.WARM_UP_ROUNDS + measurement.ROUNDS
    rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(rounds) == count
    assert all(sorted(turn) == ["a", "b"] for turn in rounds)
    assert 0 < rounds.count(["a", "b"]) < count  # the one that follows the wait takes longer
    assert all(ms.host > 0.0 for ms in times.values())


def test_compression_is_timed_for_the_passes_that_it_would_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(monkeypatch)

    class Compresses(Tiled):
        def prune_compress(self, dy: Any, geometry: Any, plan: Any, rng: Any, needs: Any) -> Any:
            timeline.call("compress", {(True, False): 1.0, (False, True): 2.0, (True, True): 2.5}[needs[:2]])()
            assert not needs[2], "the gradient of a bias is no part of it"
            return super().prune_compress(dy, geometry, plan, rng, needs)

    backend = Compresses(timeline, {}, {})
    times = measure(backend, decode(plan_string("linear", SDGPConfig())), LINEAR, torch.float32, CPU).device
    compressions = (times.compress_both, times.compress_dgrad, times.compress_wgrad)
    assert compressions == (pytest.approx(2.5), pytest.approx(1.0), pytest.approx(2.0))


@pytest.mark.parametrize(("grad_weight", "takes"), [("sparse", True), ("sparse", False), ("dense", True)])
def test_a_backward_that_is_one_call_is_timed_as_one(
    grad_weight: Any, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it does not take tensors that lie as these do."""
    timeline = Timeline(monkeypatch)
    bound: list[Any] = []

    class Binds(Tiled):
        def bind(self, decision: Any, call: Any) -> Any:
            def run(dy: Any, x: Any, weight: Any, bias: bool) -> Any:
                assert (dy.shape, x.shape, weight.shape) == ((24, 32), (24, 16), (32, 16))
                assert not bias
                torch.rand(1)  # as a function draws
                timeline.call("both", 0.75)()
                return (dy, x, None) if takes else None

            bound.append((decision.tilings, call))
            return run

    backend = Binds(timeline, {"a": 2.0, "b": 1.0}, {"only": 0.5})
    plan = decode(plan_string("linear", SDGPConfig(grad_weight=grad_weight)))
    state = torch.random.get_rng_state()
    times = measure(backend, plan, LinearGeometry(24, 16, 32), torch.float32, CPU).device
    assert torch.equal(torch.random.get_rng_state(), state)
    if grad_weight == "dense" or not takes:
        assert bool(bound) == (grad_weight == "sparse")
        assert times.sparse_both is None
        return
    assert bound == [(Tilings("b", "only"), Call((24, 16), torch.float32, CPU, torch.float32))]
    assert times.sparse_both == pytest.approx(0.75)
    assert times.totals()[True, True] == times.sparse_both


def test_the_middle_of_the_rounds_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(monkeypatch)
    rounds = [0.3, 0.1, 0.2, 0.9, 0.5, 0.4, 0.6, 0.8, 0.7]
    assert len(rounds) == measurement.ROUNDS
    call = timeline.call("a", *[0.1] * measurement.WARM_UP_ROUNDS, *rounds)
    assert median_milliseconds({"a": call}, CPU)["a"].device == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("milliseconds", "steady"),
    [([1.0], True), ([1.0, 1.5], True), ([1.0, 2.0], False), ([0.01, 0.05], True), ([1.0] * 5 + [3.0] * 4, True)],
)
def test_rounds_that_differ_are_not_steady(
    monkeypatch: pytest.MonkeyPatch, milliseconds: list[float], steady: bool
) -> None:
    """Another process has the GPU for milliseconds at a time; a clock that falls takes less, and so does an event."""
    monkeypatch.setattr(measurement, "BUDGET_MS", 1e3)
    timeline = Timeline(monkeypatch)
    warm_up = [9.0] * measurement.WARM_UP_ROUNDS
    candidates = {"a": timeline.call("a", *warm_up, *milliseconds), "b": timeline.call("b", 1.0)}
    times = median_milliseconds(candidates, CPU)
    assert (times["a"].steady, times["b"].steady) == (steady, True)


def test_a_layer_is_timed_steadily_if_all_of_its_parts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, unsteady = decode(plan_string("linear", SDGPConfig())), ["dense_both"]
    monkeypatch.setattr(
        measurement,
        "median_milliseconds",
        lambda candidates, device: {name: Milliseconds(1.0, 0.0, name not in unsteady) for name in candidates},
    )
    assert not measure(ReferenceBackend(), plan, LINEAR, torch.float32, CPU).steady
    unsteady.clear()
    assert measure(ReferenceBackend(), plan, LINEAR, torch.float32, CPU).steady


def test_the_host_is_timed_in_milliseconds() -> None:
    times = median_milliseconds({"sleep": lambda: time.sleep(0.002)}, CPU)["sleep"]
    assert 2.0 <= times.host <= times.device < 1000.0


@pytest.mark.parametrize(("milliseconds", "rounds"), [(0.1, 9), (0.6, 8), (1.2, 4), (40.0, 3)])
def test_slow_candidates_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch, milliseconds: float, rounds: int) -> None:
    timeline = Timeline(monkeypatch)
    candidates = {name: timeline.call(name, milliseconds) for name in "ab"}
    assert median_milliseconds(candidates, CPU)["a"].device == pytest.approx(milliseconds)
    assert len(timeline.calls) == 2 * (measurement.WARM_UP_ROUNDS + rounds)
    assert isinstance(median_milliseconds(candidates, CPU)["b"], Milliseconds)
