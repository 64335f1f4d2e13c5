"""The measured choice of ``backend="auto"``: which passes stay pruned, what is remembered, and what never changes."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sdgp_accel import SDGPConfig, SDGPLinear, accelerate_, backends, functional, ops, prune, tuning
from sdgp_accel import tune as sdgp_tune
from sdgp_accel.backends import Decision, Tilings, gpu
from sdgp_accel.backends.reference import ReferenceBackend
from sdgp_accel.geometry import LinearGeometry
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.timing import HostClock
from sdgp_accel.tuning import BackwardTimes, Measurement, Tuned, cache, choose, measurement

CPU = torch.device("cpu")


class FakeKernels(ReferenceBackend):
    """The reference backend under the name of the kernels, with tilings to choose from."""

    name = backends.KERNELS

    def __init__(self) -> None:
        self.listed: tuple[str, ...] = ("predicted", "better")

    def tilings(self, geometry: Any, pass_name: str, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        return self.listed


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernels]:
    """A machine on which `KERNELS` exists and takes every layer."""
    fake = FakeKernels()
    monkeypatch.setattr(backends, "_no_sparse_tensor_cores", lambda device: None)
    monkeypatch.setattr(backends, "load", lambda name: fake if name == backends.KERNELS else ReferenceBackend())
    backends.forget_decisions()
    yield fake
    backends.forget_decisions()


FAST = {"dense_dgrad": 4.0, "dense_wgrad": 4.0, "sparse_dgrad": 2.0, "sparse_wgrad": 2.0}
SPARSE_DGRAD = {**FAST, "compress_both": 3.0, "compress_dgrad": 0.7, "compress_wgrad": 1.0}
NO_GAIN = {**FAST, "compress_both": 9.0, "compress_dgrad": 9.0, "compress_wgrad": 9.0}


def set_times(monkeypatch: pytest.MonkeyPatch, times: dict[str, float], host: float = 0.0) -> list[int]:
    """A clock that says this; the list grows by one for each layer that is measured."""
    measured: list[int] = []

    def median(candidates: dict[Any, Any], device: torch.device) -> dict[Any, measurement.Milliseconds]:
        if "dense_dgrad" not in candidates:
            return {key: measurement.Milliseconds(1.0 if key[1] == "better" else 2.0, 0.0) for key in candidates}
        measured.append(1)
        return {name: measurement.Milliseconds(times[name], host) for name in candidates if name in times}

    monkeypatch.setattr(measurement, "median_milliseconds", median)
    return measured


def decide(
    config: SDGPConfig | None = None,
    tokens: int = 24,
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Decision:
    plan = plan_string("linear", config or SDGPConfig())
    return backends.decide_linear(plan, (tokens, 16), 32, dtype, CPU, deterministic, dtype)


def decide_conv2d(deterministic: bool = False, channels_last: bool = True) -> Decision:
    return backends.decide_conv2d(
        plan_string("conv2d", SDGPConfig()), (2, 8, 6, 5), (16, 8, 3, 3), ((2, 2), (1, 1), (1, 1), 1), channels_last,
        torch.bfloat16, CPU, deterministic, torch.bfloat16,
    )  # fmt: skip


def measured_times(device: dict[str, float], host: float = 0.0) -> Measurement:
    return Measurement(BackwardTimes(**device), BackwardTimes(**dict.fromkeys(device, host)), Tilings())


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
    assert choose(measured_times({**FAST, **changes})) == expected


@pytest.mark.parametrize(
    ("host", "expected"), [(0.5, (True, True)), (1.9, (True, False)), (2.6, (True, False)), (4.1, (False, False))]
)
def test_a_host_that_is_slower_than_the_gpu_counts(host: float, expected: tuple[bool, bool]) -> None:
    times = {**FAST, "compress_both": 1.0, "compress_dgrad": 1.2, "compress_wgrad": 1.5}
    # On the host, dense is two calls, one pruned pass three calls and two pruned passes four, of `host` ms each. With
    # 1.9 ms both gain, but dgrad alone more, although the GPU takes longer for it.
    measured = measured_times(times, host)
    slow_both = measured._replace(host=measured.host._replace(compress_both=2 * host))
    assert choose(slow_both) == expected


def test_what_only_the_host_gains_from_runs_dense() -> None:
    """Dense convolutions take the host longer to launch; in a model the host has run ahead by then."""
    times = {**FAST, "compress_both": 4.5, "compress_dgrad": 2.5, "compress_wgrad": 2.5}
    measured = measured_times(times, host=1.0)
    slow_dense = measured.host._replace(dense_dgrad=8.0, dense_wgrad=8.0)
    assert choose(measured._replace(host=slow_dense)) == (False, False)


def test_what_a_pruned_layer_costs_the_host_beside_its_calls_counts() -> None:
    """Where the host is what limits: the calls alone gain 5 %."""
    device = {name: 0.01 * ms for name, ms in FAST.items()} | dict.fromkeys(("compress_dgrad", "compress_wgrad"), 1.0)
    measured = measured_times(device | {"compress_both": 0.01}, host=0.1)
    host = measured.host._replace(compress_both=0.03, sparse_dgrad=0.08, sparse_wgrad=0.08)
    assert choose(measured._replace(host=host)) == (False, False)
    assert choose(measured._replace(host=host._replace(compress_both=0.01))) == (True, True)


def test_auto_prunes_what_gains_and_launches_it_the_fastest_way(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, SPARSE_DGRAD)
    decision = decide()
    assert decision.backend is kernels
    assert decision.plan.grad_input is not None
    assert decision.plan.grad_weight is None
    assert decision.reason == "measured: backward 6.700 ms, dense 8.000 ms"
    assert decision.tilings.dgrad == "better"
    assert decision.times is not None
    assert decision.times == BackwardTimes(**SPARSE_DGRAD)


def test_auto_runs_dense_where_nothing_gains(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, NO_GAIN)
    decision = decide_conv2d()
    assert decision.backend is None
    assert not decision.draws
    assert decision.reason == "dense is faster here: 8.000 ms, sparse 13.000 ms"
    x, weight = torch.randn(24, 16).bfloat16(), torch.randn(32, 16).bfloat16().requires_grad_()
    y = functional.linear(x, weight)
    assert type(y.grad_fn).__name__ == type(torch.nn.functional.linear(x, weight).grad_fn).__name__


def test_a_report_lists_how_the_products_that_run_are_launched(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, model = torch.randn(24, 16).bfloat16(), torch.nn.Linear(16, 32).bfloat16()
    set_times(monkeypatch, SPARSE_DGRAD)
    assert sdgp_tune(model, x, SDGPConfig()).layers[0].tilings == ("better",)  # wgrad stays dense
    kernels_named = SDGPConfig(backend="cutlass")
    assert sdgp_tune(model, x, kernels_named).layers[0].tilings == ("predicted", "predicted")
    only_wgrad = SDGPConfig(backend="cutlass", grad_input="dense")
    assert sdgp_tune(model, x, only_wgrad).layers[0].tilings == ("predicted",)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_reports_tell_what_a_layout_costs(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format
) -> None:
    set_times(monkeypatch, SPARSE_DGRAD)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3)).bfloat16().to(memory_format=memory_format)
    x = torch.randn(2, 8, 6, 5).bfloat16().contiguous(memory_format=memory_format)
    for report in (accelerate_(model), sdgp_tune(model, x)):
        costs = "not channels_last: each backward copies gradients and activations once" in report.layers[0].reason
        assert costs is (memory_format == torch.contiguous_format)


def test_the_reason_tells_of_a_slow_host(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, {name: 0.01 * ms for name, ms in SPARSE_DGRAD.items()}, host=0.05)
    decision = decide()
    assert decision.backend is None
    assert decision.reason.endswith("on the GPU, but the host takes longer to launch it")


def test_naming_the_kernels_measures_nothing(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "measure", lambda *arguments: pytest.fail("measured"))
    decision = decide(SDGPConfig(backend="cutlass"))
    assert decision.backend is kernels
    assert decision.plan.grad_weight is not None
    assert decision.tilings == Tilings("predicted", "predicted")


def test_short_memory_means_dense_and_is_not_remembered(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def out_of_memory(*arguments: object) -> Measurement:
        raise torch.OutOfMemoryError

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuning, "measure", out_of_memory)
    decision = decide()
    assert decision.backend is None
    assert "too little free memory" in decision.reason
    assert not list(tmp_path.glob("*.json"))


def test_nothing_is_timed_while_a_cuda_graph_is_captured(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tuning, "measure", lambda *arguments: pytest.fail("measured"))
    plan = decode(plan_string("linear", SDGPConfig()))
    tuned = tuning.tune_shape(kernels, plan, LinearGeometry(24, 16, 32), torch.bfloat16, torch.device("cuda"), False)
    assert tuned.prunes == (False, False)
    assert "while a CUDA graph was captured" in tuned.reason


def test_a_machine_without_a_home_remembers_nothing(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache, "folder", homeless)
    set_times(monkeypatch, SPARSE_DGRAD)
    with pytest.warns(UserWarning, match=r"not remembered: Could not .*; name a folder with SDGP_TUNING_CACHE"):
        assert decide().backend is kernels


def test_gradients_of_a_chosen_pass_are_pruned_and_of_the_other_dense(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, {**FAST, "compress_both": 3.0, "compress_dgrad": 1.0, "compress_wgrad": 0.7})
    config = SDGPConfig(prune="magnitude")
    x, weight = torch.randn(24, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    dy = torch.randn(24, 32)
    functional.linear(x, weight, plan=config).backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight.detach())
    torch.testing.assert_close(weight.grad, prune(dy, config, dim=0).t() @ x.detach())


# Both passes together gain 0.5 ms of 8; one of them has to pay nearly as much for prune + compress, and loses.
SHARES = {**FAST, "compress_both": 3.5, "compress_dgrad": 2.5, "compress_wgrad": 1.9}


def test_a_pass_that_is_the_only_one_is_chosen_for_itself() -> None:
    assert choose(measured_times(SHARES)) == (True, True)
    assert tuning.choose_single(measured_times(SHARES)) == (False, True)
    assert tuning.choose_single(measured_times(SHARES, host=2.0)) == (False, False)  # two calls of 2 ms against one
    only_dgrad = {name: ms for name, ms in SPARSE_DGRAD.items() if "sparse_wgrad" not in name}
    assert tuning.choose_single(measured_times(only_dgrad)) == (True, False)


def test_frozen_layers_and_first_ones_run_what_gains_for_their_only_gradient(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, SHARES)
    config = SDGPConfig(prune="magnitude")
    dy = torch.randn(24, 32)

    def run(needs_dx: bool, needs_dw: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, weight = torch.randn(24, 16, requires_grad=needs_dx), torch.randn(32, 16, requires_grad=needs_dw)
        y = functional.linear(x, weight, plan=config)
        y.backward(dy)
        return y, x, weight

    y, x, weight = run(True, False)  # frozen: exactly the dense path
    assert type(y.grad_fn).__name__ == type(torch.nn.functional.linear(x, weight).grad_fn).__name__
    y, x, weight = run(False, True)
    torch.testing.assert_close(weight.grad, prune(dy, config, dim=0).t() @ x)
    _, x, weight = run(True, True)
    torch.testing.assert_close(weight.grad, prune(dy, config, dim=0).t() @ x.detach())
    torch.testing.assert_close(x.grad, prune(dy, config, dim=1) @ weight.detach())


def test_a_frozen_convolution_runs_what_gains_for_its_only_gradient(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, SHARES)
    x, weight = torch.randn(2, 8, 6, 5, requires_grad=True), torch.randn(16, 8, 3, 3)
    assert type(functional.conv2d(x, weight).grad_fn).__name__ == "ConvolutionBackward0"
    assert "_Conv2d" in type(functional.conv2d(x, weight.requires_grad_()).grad_fn).__name__


def test_gradients_that_are_asked_for_alone_run_what_gains_alone(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an eager backward, and in the op of a compiled one."""
    set_times(monkeypatch, SHARES)
    x, weight = torch.randn(24, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    dy = torch.randn(24, 32)
    (dx,) = torch.autograd.grad(functional.linear(x, weight), x, dy)
    torch.testing.assert_close(dx, dy @ weight.detach())
    with torch.no_grad():
        (dx,) = ops.linear_backward(dy, None, weight, False, plan_string("linear", SDGPConfig()))
    torch.testing.assert_close(dx, dy @ weight.detach())


def test_tune_reports_what_a_frozen_layer_runs(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, SHARES)
    model = torch.nn.Linear(16, 32).requires_grad_(False)
    report = sdgp_tune(model, torch.randn(24, 16), SDGPConfig()).layers[0]
    assert report.reason == "dense is faster here: dgrad alone takes 4.500 ms, dense 4.000 ms"
    assert sdgp_tune(model.requires_grad_(), torch.randn(24, 16), SDGPConfig()).layers[0].wgrad == "mvue 2:4"


def test_what_is_timed_is_hidden_from_selective_checkpointing(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the results of products, and hands them out in their order when it runs the layers again."""
    monkeypatch.setattr(measurement, "clock_for", lambda device: HostClock())
    layers = [SDGPLinear(16, 16, bias=False) for _ in range(2)]
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
    x = torch.randn(8, 16, requires_grad=True)

    def gradients(run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        backends.forget_decisions()
        monkeypatch.setattr(tuning, "choose", lambda measured: (False, False))
        return list(torch.autograd.grad(run(model, x).square().sum(), [x, *model.parameters()]))

    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    expected = gradients(lambda model, x: model(x))
    found = gradients(lambda model, x: checkpoint(model, x, use_reentrant=False, context_fn=kept))
    assert all(map(torch.equal, expected, found))


def test_timing_runs_on_the_layers_device(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is spread over several GPUs, most layers do not run on the current one."""
    current: list[torch.device] = []

    @contextlib.contextmanager
    def device(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def measured(*arguments: object) -> Measurement:
        assert current == [torch.device("cuda", 1)]
        return measured_times(SPARSE_DGRAD)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(tuning, "measure", measured)
    plan = decode(plan_string("linear", SDGPConfig()))
    geometry = LinearGeometry(24, 16, 32)
    tuned = tuning.tune_shape(kernels, plan, geometry, torch.bfloat16, torch.device("cuda", 1), False)
    assert tuned.prunes == (True, False)
    assert not current


def test_a_shape_is_timed_once_whatever_its_parameters_are_kept_in(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast they are in float32, but not to a compiled backward, which must run what `tune` reports."""
    measured = set_times(monkeypatch, SPARSE_DGRAD)
    plan = plan_string("linear", SDGPConfig())
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.decide_linear(plan, (24, 16), 32, torch.bfloat16, CPU, False, dtype).backend is kernels
    assert len(measured) == 1


def test_of_inputs_of_every_size_only_so_many_are_timed(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that differ from step to step: each timing takes longer than the step."""
    monkeypatch.setattr(tuning, "TIMED_SIZES", 3)
    for tokens, times in ((8, SPARSE_DGRAD), (80, NO_GAIN), (800, SPARSE_DGRAD)):
        set_times(monkeypatch, times)
        decide(tokens=tokens)
    monkeypatch.setattr(tuning, "measure", lambda *arguments: pytest.fail("timed a fourth size"))
    chosen = {tokens: decide(tokens=tokens) for tokens in (4, 16, 40, 96, 240, 400, 4000)}
    names = {tokens: decision.name for tokens, decision in chosen.items()}
    sparse = backends.KERNELS
    assert names == {4: sparse, 16: sparse, 40: "dense", 96: "dense", 240: "dense", 400: sparse, 4000: sparse}
    assert chosen[400].tilings.dgrad == "better"
    assert chosen[400].times is None
    assert chosen[400].reason == (
        "as with 800 positions, of 3 sizes that have been timed: measured: backward 6.700 ms, dense 8.000 ms"
    )
    assert decide(tokens=80).reason.startswith("dense is faster here")


def test_other_layers_and_resolutions_count_by_themselves(
    kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TIMED_SIZES", 1)
    measured = set_times(monkeypatch, SPARSE_DGRAD)
    plan, window = plan_string("conv2d", SDGPConfig()), ((1, 1), (1, 1), (1, 1), 1)
    for channels in (8, 12):
        for size in (6, 7, 9):
            shapes = (2, channels, size, size), (16, channels, 3, 3)
            backends.decide_conv2d(plan, *shapes, window, True, torch.bfloat16, CPU, False, torch.bfloat16)
    decide()
    decide(SDGPConfig(prune="magnitude"))
    decide(dtype=torch.float16)
    assert len(measured) == 2 + 3


# --- remembered --------------------------------------------------------------------------------------------------


@pytest.fixture
def remembering(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeKernels:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    return kernels


def next_process() -> None:
    """Forget what only this process knows."""
    backends.forget_decisions()
    tuning._open.cache_clear()


def test_a_shape_is_measured_once_per_machine(remembering: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = set_times(monkeypatch, SPARSE_DGRAD)
    first = decide()
    next_process()
    again = decide()
    assert len(measured) == 1
    assert again._replace(reason=first.reason) == first
    assert again.reason == f"{first.reason} (remembered)"
    decide(tokens=28)
    decide(SDGPConfig(prune="magnitude"))
    decide(dtype=torch.float16)
    assert len(measured) == 4


def test_convolutions_are_measured_for_each_layout_and_choice_of_cudnns_algorithms(
    remembering: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense times depend on both."""
    measured = set_times(monkeypatch, SPARSE_DGRAD)
    for benchmark in (False, True, False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        for channels_last in (False, True):
            decide_conv2d(channels_last=channels_last)
        next_process()
    assert len(measured) == 4


@pytest.mark.parametrize(
    ("module", "switch", "kind"),
    [
        (torch.backends.cudnn, "deterministic", "conv2d"),
        (torch.backends.cudnn, "enabled", "conv2d"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", "linear"),
        (torch.backends.cuda.matmul, "allow_fp16_accumulation", "linear"),
    ],
)
def test_layers_are_measured_for_each_setting_of_what_dense_products_depend_on(
    remembering: FakeKernels, monkeypatch: pytest.MonkeyPatch, module: Any, switch: str, kind: str
) -> None:
    before = getattr(module, switch, None)
    if before is None:
        pytest.skip(f"torch {torch.__version__} has no {switch}")
    measured = set_times(monkeypatch, SPARSE_DGRAD)
    try:
        for value in (before, not before, before, not before):
            setattr(module, switch, value)
            decide() if kind == "linear" else decide_conv2d()
            next_process()
    finally:
        setattr(module, switch, before)
    assert len(measured) == 2


def test_nothing_is_timed_under_autocast(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would cast the operands of what is timed; a backward that decides may run under another dtype's."""
    set_times(monkeypatch, SPARSE_DGRAD)
    enabled: list[bool] = []
    median = measurement.median_milliseconds

    def asked(*arguments: Any) -> Any:
        enabled.append(torch.is_autocast_enabled("cpu"))
        return median(*arguments)

    monkeypatch.setattr(measurement, "median_milliseconds", asked)
    with torch.autocast("cpu", torch.bfloat16):
        assert decide(dtype=torch.float16).times is not None
    assert enabled
    assert not any(enabled)


def test_what_a_busy_gpu_lets_measure_is_used_but_not_remembered(
    remembering: FakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measured_times(SPARSE_DGRAD)._replace(steady=False)
    monkeypatch.setattr(tuning, "measure", lambda *arguments: measured)
    with pytest.warns(UserWarning, match="as on a GPU that other processes use: .* not remembered"):
        assert decide().backend is remembering
    next_process()
    calm = set_times(monkeypatch, NO_GAIN)
    monkeypatch.setattr(tuning, "measure", measurement.measure)
    assert decide().backend is None
    assert len(calm) == 1


def test_dense_is_remembered_too(remembering: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = set_times(monkeypatch, NO_GAIN)
    assert decide().backend is None
    next_process()
    assert decide().backend is None
    assert len(measured) == 1


def test_a_tiling_that_is_no_more_is_measured_again(remembering: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = set_times(monkeypatch, SPARSE_DGRAD)
    decide()
    next_process()
    remembering.listed = ("new",)
    assert decide().tilings.dgrad == "new"
    assert len(measured) == 2
    next_process()
    assert decide().tilings.dgrad == "new"
    assert len(measured) == 2


@pytest.mark.parametrize("what", ["kernels", "torch", "sdgp_accel"])
def test_another_build_measures_for_itself(
    remembering: FakeKernels, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    measured = set_times(monkeypatch, SPARSE_DGRAD)
    decide()
    next_process()
    if what == "kernels":
        monkeypatch.setattr(remembering, "fingerprint", lambda: "90a 0123", raising=False)
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    else:
        monkeypatch.setattr("sdgp_accel.__version__", "99.0")
    decide()
    assert len(measured) == 2


def test_times_depend_on_what_they_were_measured_with(kernels: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
    versions, carveout = {"driver": "580", "cudnn": 91}, [None, 0, 16]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(gpu, "hardware", gpu.hardware.__wrapped__)
    monkeypatch.setattr(gpu, "_carveout", lambda: carveout[0])
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: versions["cudnn"])
    monkeypatch.setattr(tuning, "_driver", lambda: versions["driver"])
    seen = [tuning.environment(kernels, torch.device("cuda", 0))]
    assert tuning.environment(kernels, torch.device("cuda", 1)) == seen[0]  # another of the same kind
    del carveout[0]
    assert tuning.environment(kernels, torch.device("cuda", 0)) == seen[0]
    del carveout[0]
    seen.append(tuning.environment(kernels, torch.device("cuda", 0)))
    device.multi_processor_count = 114
    seen.append(tuning.environment(kernels, torch.device("cuda", 0)))
    device.name = "NVIDIA H200"
    seen.append(tuning.environment(kernels, torch.device("cuda", 0)))
    versions["driver"] = "590"
    seen.append(tuning.environment(kernels, torch.device("cuda", 0)))
    versions["cudnn"] = 92
    seen.append(tuning.environment(kernels, torch.device("cuda", 0)))
    assert len({tuple(environment.items()) for environment in seen}) == 6


def test_the_driver_is_found_where_the_kernel_module_tells_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Thu Sep 4\nGCC version: 13.3\n")
    monkeypatch.setattr(tuning, "Path", lambda name: version)
    assert tuning._driver() == "580.159.04"
    version.unlink()
    assert tuning._driver() == "unknown"


# --- deterministic -----------------------------------------------------------------------------------------------


def test_deterministic_algorithms_time_nothing(remembering: FakeKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, NO_GAIN)
    timed = decide()
    monkeypatch.setattr(tuning, "measure", lambda *arguments: pytest.fail("measured"))
    monkeypatch.setattr(tuning, "predict", lambda *arguments: Tuned((True, False), "predicted"))
    x = torch.randn(24, 16, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        functional.linear(x, torch.randn(32, 16)).sum().backward()
        predicted = decide(deterministic=True)
        assert decide_conv2d(deterministic=True).reason.startswith("predicted")
    finally:
        torch.use_deterministic_algorithms(False)
    assert (predicted.reason, predicted.tilings) == ("predicted", Tilings("predicted", "predicted"))
    assert decide() is timed  # what was measured is not touched


def test_a_report_without_a_filter_speaks_of_none() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    x = torch.randn(4, 8)
    reason = "not an SDGP layer: accelerate_ has not swapped it"
    assert [layer.reason for layer in sdgp_tune(model, x).layers] == [reason] * 2
    accelerate_(model, SDGPConfig(backend="reference"), filter_fn="0")
    assert [layer.reason for layer in sdgp_tune(model, x).layers] == ["backend='reference'", reason]
    unused = torch.nn.ModuleDict({"used": torch.nn.Linear(8, 8), "unused": torch.nn.Linear(8, 8)})
    unused.forward = lambda x: unused["used"](x)
    accelerate_(unused, SDGPConfig(backend="reference"))
    assert sdgp_tune(unused, x)["unused"].reason == "backend='reference'"


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be on a device that computes; got parameters on meta"):
        sdgp_tune(torch.nn.Linear(8, 8, device="meta"), torch.randn(4, 8))
