"""The measured choice of ``backend="auto"``: which passes stay pruned, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from sdgp_accel import SDGPConfig, backends, tuning
from sdgp_accel.backends.reference import ReferenceBackend
from sdgp_accel.geometry import Conv2dGeometry, LinearGeometry
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.tuning import BackwardTimes, choose

CPU = torch.device("cpu")
LINEAR = LinearGeometry(tokens=24, in_channels=16, out_channels=32)
CONV = Conv2dGeometry.of((2, 8, 6, 5), (16, 8, 3, 3), (2, 2, 1, 1, 1, 1, 1), True)


class FakeKernels(ReferenceBackend):
    """The reference backend under the name of the kernels."""

    name = backends.KERNELS


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> FakeKernels:
    """A machine on which `KERNELS` exists and takes every layer."""
    fake = FakeKernels()
    monkeypatch.setattr(backends, "_no_sparse_tensor_cores", lambda device: None)
    monkeypatch.setattr(backends, "load", lambda name: fake if name == backends.KERNELS else ReferenceBackend())
    backends.forget_decisions()
    yield fake
    backends.forget_decisions()


def set_times(monkeypatch: pytest.MonkeyPatch, **times: float) -> None:
    monkeypatch.setattr(
        tuning, "median_milliseconds", lambda candidates, device: {name: times[name] for name in candidates}
    )


FAST = {"dense_dgrad": 4.0, "dense_wgrad": 4.0, "sparse_dgrad": 2.0, "sparse_wgrad": 2.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"compress_both": 1.0, "compress_dgrad": 0.7, "compress_wgrad": 0.7}, (True, True)),
        ({"compress_both": 3.0, "compress_dgrad": 0.7, "compress_wgrad": 1.0}, (True, False)),
        ({"compress_both": 3.0, "compress_dgrad": 1.0, "compress_wgrad": 0.7}, (False, True)),
        ({"compress_both": 5.0, "compress_dgrad": 2.5, "compress_wgrad": 2.5}, (False, False)),
        ({"compress_both": 3.96, "compress_dgrad": 9.0, "compress_wgrad": 9.0}, (False, False)),  # gains 0.5 %
    ],
)
def test_the_fastest_combination_is_chosen(changes: dict[str, float], expected: tuple[bool, bool]) -> None:
    assert choose(BackwardTimes(**FAST, **changes)) == expected


def test_a_pass_that_is_dense_by_configuration_is_no_candidate() -> None:
    times = BackwardTimes(dense_dgrad=4.0, dense_wgrad=4.0, sparse_wgrad=0.1, compress_wgrad=0.1)
    assert set(times.totals()) == {(False, False), (False, True)}
    assert choose(times) == (False, True)


@pytest.mark.parametrize("geometry", [LINEAR, CONV], ids=["linear", "conv2d"])
@pytest.mark.parametrize("config", [SDGPConfig(), SDGPConfig(grad_weight="dense"), SDGPConfig(grad_input="dense")])
def test_every_part_is_timed_and_no_generator_moves(
    geometry: LinearGeometry | Conv2dGeometry, config: SDGPConfig
) -> None:
    plan = decode(plan_string("linear" if geometry is LINEAR else "conv2d", config))
    state = torch.random.get_rng_state()
    times = tuning.measure(ReferenceBackend(), plan, geometry, torch.float32, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    timed = {name for name, value in times._asdict().items() if value is not None}
    expected = {"dense_dgrad", "dense_wgrad"}
    if config.grad_input == "sparse":
        expected |= {"sparse_dgrad", "compress_dgrad"}
    if config.grad_weight == "sparse":
        expected |= {"sparse_wgrad", "compress_wgrad"}
    if config.grad_input == config.grad_weight:
        expected.add("compress_both")
    assert timed == expected
    assert all(value > 0.0 for value in times if value is not None)


def test_auto_prunes_what_gains(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, **FAST, compress_both=3.0, compress_dgrad=0.7, compress_wgrad=1.0)
    decision = backends.decide_linear(plan_string("linear", SDGPConfig()), (24, 16), 32, torch.bfloat16, CPU)
    assert decision.backend is kernels
    assert decision.plan.grad_input is not None
    assert decision.plan.grad_weight is None
    assert decision.reason == "measured: backward 6.700 ms, dense 8.000 ms"


def test_auto_runs_dense_where_nothing_gains(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, **FAST, compress_both=9.0, compress_dgrad=9.0, compress_wgrad=9.0)
    decision = backends.decide_conv2d(
        plan_string("conv2d", SDGPConfig()), (2, 8, 6, 5), (16, 8, 3, 3), (2, 2, 1, 1, 1, 1, 1), True,
        torch.bfloat16, CPU,
    )  # fmt: skip
    assert decision.backend is None
    assert not decision.draws
    assert decision.reason == "dense is faster here: 8.000 ms, sparse 13.000 ms"


def test_naming_the_kernels_measures_nothing(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "measure", lambda *arguments: pytest.fail("measured"))
    plan = plan_string("linear", SDGPConfig(backend="cutlass"))
    decision = backends.decide_linear(plan, (24, 16), 32, torch.bfloat16, CPU)
    assert decision.backend is kernels
    assert decision.plan.grad_weight is not None


def test_short_memory_means_dense(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: object) -> BackwardTimes:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tuning, "measure", out_of_memory)
    decision = backends.decide_linear(plan_string("linear", SDGPConfig()), (24, 16), 32, torch.bfloat16, CPU)
    assert decision.backend is None
    assert "too little free memory" in decision.reason


def test_gradients_of_a_chosen_pass_are_pruned_and_of_the_other_dense(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, **FAST, compress_both=3.0, compress_dgrad=1.0, compress_wgrad=0.7)
    config = SDGPConfig(prune="magnitude")
    x, weight = torch.randn(24, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    dy = torch.randn(24, 32)
    from sdgp_accel import functional, prune

    functional.linear(x, weight, plan=config).backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight.detach())
    torch.testing.assert_close(weight.grad, prune(dy, config, dim=0).t() @ x.detach())
