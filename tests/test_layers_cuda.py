"""SDGP layers on a CUDA device, whatever backend is built: graphs, streams, autocast, memory, no synchronisation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdgp_accel as sdgp
from sdgp_accel import backends, philox
from sdgp_accel.pruning import prune_matrix
from sdgp_accel.stages import StageRecorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

REFERENCE = sdgp.SDGPConfig(backend="reference")


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.Flatten(),
        nn.Linear(16 * 9, 8),
    )  # fmt: skip
    return net.cuda().to(memory_format=torch.channels_last)


def batch() -> Tensor:
    return torch.randn(4, 8, 8, 8, device="cuda").to(memory_format=torch.channels_last)


def test_seeds_follow_the_generator() -> None:
    device = torch.device("cuda")
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first, second = philox.next_seed(device), philox.next_seed(device)
    assert isinstance(first, tuple)
    assert first != second
    torch.cuda.set_rng_state(state)
    assert philox.next_seed(device) == first
    x = torch.randn(24, 40, device=device)
    spec = sdgp.SDGPConfig().spec("grad_input", "group")
    assert spec is not None
    on_device = torch.tensor(first, device=device)
    words = [prune_matrix(x, spec, 1, 1, philox.Rng(seed)) for seed in (first, on_device)]
    assert torch.equal(*words)


@pytest.mark.parametrize("function", ["magnitude", "random", "rescale_magnitude", "mvue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv2d_is_dense_autograd_on_the_pruned_gradient(
    memory_format: torch.memory_format, dtype: torch.dtype, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = philox.next_seed(torch.device("cuda"))
    monkeypatch.setattr(philox, "next_seed", lambda device: seed)
    config = sdgp.SDGPConfig(prune=function, backend="reference")
    x = torch.randn(2, 8, 9, 7, device="cuda", dtype=dtype).to(memory_format=memory_format).requires_grad_()
    weight = torch.randn(16, 8, 3, 3, device="cuda", dtype=dtype).requires_grad_()
    y, dense = sdgp.functional.conv2d(x, weight, padding=1, plan=config), F.conv2d(x, weight, padding=1)
    assert torch.equal(y, dense)
    assert y.stride() == dense.stride()
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, weight), dy)
    n, c, p, q = dy.shape
    matrix = dy.permute(0, 2, 3, 1).reshape(-1, c)
    for index, leaf in enumerate((x, weight)):
        spec = config.spec(("grad_input", "grad_weight")[index], "sample_channel")
        pruned = prune_matrix(matrix, spec, 1 - index, p * q, philox.Rng(seed, 0, index))
        (expected,) = torch.autograd.grad(dense, leaf, pruned.view(n, p, q, c).permute(0, 3, 1, 2), retain_graph=True)
        error = (got[index] - expected).norm() / expected.norm()
        assert error <= {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


def test_same_masks_as_on_the_cpu() -> None:
    """The numbers are a function of the seed, not of the device."""
    seed = torch.tensor([123456789, 42])
    dy = torch.randn(37, 20)
    for function in ("random", "mvue"):
        for axis in (0, 1):
            spec = sdgp.SDGPConfig(prune=function).spec("grad_input", "group")
            on_cpu = prune_matrix(dy, spec, axis, 1, philox.Rng(seed, 1, 1 - axis))
            on_gpu = prune_matrix(dy.cuda(), spec, axis, 1, philox.Rng(seed.cuda(), 1, 1 - axis))
            assert torch.equal(on_cpu, on_gpu.cpu())


def test_a_step_waits_for_nothing() -> None:
    model = conv_net()
    sdgp.accelerate_(model, REFERENCE)
    model(batch()).square().sum().backward()
    x = batch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_draw_anew() -> None:
    layer = sdgp.SDGPLinear(32, 32, bias=False, config=REFERENCE).cuda()
    x, dy = torch.randn(16, 32, device="cuda", requires_grad=True), torch.randn(16, 32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(layer(x), x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (dx,) = torch.autograd.grad(layer(x), x, dy)
    replays = []
    for _ in range(64):
        graph.replay()
        replays.append(dx.clone())
    assert not torch.equal(replays[0], replays[1])
    mean, true = torch.stack(replays).mean(0), dy @ layer.weight
    assert (mean - true).norm() < 0.5 * (replays[0] - true).norm()  # unbiased: the noise averages out
    torch.cuda.manual_seed(3)
    graph.replay()
    first = dx.clone()
    torch.cuda.manual_seed(3)
    graph.replay()
    assert torch.equal(dx, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_scaler_and_channels_last(dtype: torch.dtype) -> None:
    dense = conv_net()
    model = copy.deepcopy(dense)
    sdgp.accelerate_(model, REFERENCE)
    x = batch()
    with torch.autocast("cuda", dtype):
        expected, got = dense(x), model(x)
    assert torch.equal(got, expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)
    weight = model[5].weight.detach().clone()
    scaler.scale((got.float() * 1e38).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    if dtype == torch.float16:
        assert scaler.get_scale() == 2.0**9
        assert torch.equal(model[5].weight, weight)


def test_forward_holds_no_more_memory_than_dense() -> None:
    held = []
    for accelerate in (False, True):
        model = conv_net()
        if accelerate:
            sdgp.accelerate_(model, REFERENCE)
        x = batch()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = model(x)
        held.append(torch.cuda.memory_allocated() - before)
        del y, model
    assert held[1] <= held[0]


def test_stages_are_timed_with_events() -> None:
    layer = sdgp.SDGPConv2d(16, 16, 3, config=REFERENCE).cuda()
    x = torch.randn(8, 16, 32, 32, device="cuda", requires_grad=True)
    recorder = StageRecorder("cuda")
    with recorder:
        layer(x).sum().backward()
    seconds = recorder.seconds()
    assert set(seconds) == {"prune_compress", "dgrad", "wgrad"}
    assert all(0 < spent < 10 for spent in seconds.values())


def test_compile_fullgraph() -> None:
    model = conv_net()
    sdgp.accelerate_(model, sdgp.SDGPConfig(prune="rescale_magnitude", backend="reference"))
    compiled = torch.compile(model, fullgraph=True)
    x = batch()

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(x).float().square().sum()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for got, expected in zip(gradients(compiled), gradients(model), strict=True):
        assert (got - expected).norm() <= 5e-2 * expected.norm() + 1e-3


@pytest.mark.parametrize(("autocast", "tf32"), [(None, False), (None, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.filterwarnings("ignore:.*kernels are not built")
def test_validate(backend: Any, autocast: torch.dtype | None, tf32: bool) -> None:
    torch.backends.cudnn.allow_tf32 = tf32
    report = sdgp.validate(conv_net(), batch(), sdgp.SDGPConfig(backend=backend), autocast=autocast)
    assert report.ok, str(report)


def test_auto_without_kernels_is_dense_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < backends.FIRST_SPARSE_CAPABILITY:
        pytest.skip("needs sparse tensor cores")
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: None if name == backends.KERNELS else load(name))
    backends.forget_decisions()
    model = conv_net()
    with pytest.warns(UserWarning, match="kernels are not built; build them with: SDGP_CUDA=1") as caught:
        report = sdgp.accelerate_(model)
    assert len(caught) == 1
    assert {layer.backend for layer in report.layers} == {"dense"}
    dense = copy.deepcopy(model)
    sdgp.restore_(dense)
    x = batch()
    for net in (model, dense):
        net(x).square().sum().backward()
    for a, b in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    backends.forget_decisions()


@pytest.mark.filterwarnings("ignore:.*kernels are")
def test_tune_decides_before_the_first_step() -> None:
    backends.forget_decisions()
    model, x = conv_net(), batch()
    sdgp.accelerate_(model)
    report = sdgp.tune(model, x, autocast=torch.bfloat16)
    assert all(layer.reason for layer in report.layers)

    def decided() -> int:
        return backends.decide_conv2d.cache_info().currsize + backends.decide_linear.cache_info().currsize

    before = decided()
    assert before == len(report) == 3
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert decided() == before
