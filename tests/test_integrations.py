"""SDGP layers under the rest of PyTorch: autocast, GradScaler, torch.compile, checkpointing, DDP, FSDP2."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sdgp_accel as sdgp

pytestmark = pytest.mark.filterwarnings("ignore:device 'cpu' has no sparse tensor cores")

MAGNITUDE = sdgp.SDGPConfig(prune="magnitude")
RESCALE = sdgp.SDGPConfig(prune="rescale_magnitude")


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(72, 6),
    )


def batch(size: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(size, 4, 8, 8)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


# --- mixed precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_forward_has_the_dense_bits(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    dense = conv_net().to(memory_format=memory_format)
    model = copy.deepcopy(dense)
    sdgp.accelerate_(model)
    x = batch().to(memory_format=memory_format)
    with torch.autocast("cpu", dtype):
        expected, got = dense(x), model(x)
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    got.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


class CastCounter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the casts between dtypes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **kwargs or {})


def test_autocast_of_a_layer_that_runs_dense_is_torchs_own() -> None:
    """Which casts a parameter once, however often it is used."""
    layer = sdgp.SDGPLinear(8, 8, config=sdgp.SDGPConfig(grad_input="dense", grad_weight="dense"))
    x = torch.randn(4, 8).bfloat16()
    with CastCounter() as casts, torch.autocast("cpu", torch.bfloat16):
        layer(layer(x))
    assert casts.count == 2


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_no_double_backward_through_parameters_that_autocast_casts(kind: str) -> None:
    layer = sdgp.SDGPLinear(8, 8) if kind == "linear" else sdgp.SDGPConv2d(8, 8, 3)
    x = torch.randn((4, 8) if kind == "linear" else (2, 8, 5, 5), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x).float()
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_autocast_casts_no_parameter_to_float64(kind: str) -> None:
    """A float64 input meets 16-bit parameters, which is torch's own error."""
    layer = sdgp.SDGPLinear(8, 8) if kind == "linear" else sdgp.SDGPConv2d(8, 8, 3)
    dense = nn.Linear(8, 8) if kind == "linear" else nn.Conv2d(8, 8, 3)
    x = torch.randn((4, 8) if kind == "linear" else (2, 8, 5, 5), dtype=torch.float64)
    for module in (dense, layer):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            module(x)


@pytest.mark.parametrize("computed", ["weight", "bias"])
def test_autocast_of_a_computed_weight(computed: str) -> None:
    weight, bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
    x = torch.randn(4, 8)
    for scale in (1.0, 2.0):
        with torch.autocast("cpu", torch.bfloat16):
            y = sdgp.functional.linear(
                x, weight * scale if computed == "weight" else weight, bias * scale if computed == "bias" else bias,
                sdgp.SDGPConfig(prune="magnitude"),
            )  # fmt: skip
        assert y.dtype == torch.bfloat16
        dw, db = torch.autograd.grad(y.float().sum(), [weight, bias])
        if scale == 1.0:
            expected = dw, db
    assert torch.equal(dw, expected[0] * (scale if computed == "weight" else 1.0))
    assert torch.equal(db, expected[1] * (scale if computed == "bias" else 1.0))


def test_autocast_leaves_float64_alone_and_backward_may_run_under_it() -> None:
    layer = sdgp.SDGPLinear(8, 8, dtype=torch.float64, config=MAGNITUDE)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 8, dtype=torch.float64))
    assert y.dtype == torch.float64
    layer = sdgp.SDGPLinear(64, 64, config=MAGNITUDE)
    x = torch.randn(3, 64)
    plain = gradients(layer, layer(x).square().sum())
    loss = layer(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(layer, loss), plain, strict=True))


def test_weight_shared_with_a_dense_use_keeps_both_gradients_under_autocast() -> None:
    """Autocast caches its copy of a weight; a copy made where gradients are off would cut the dense use's graph."""
    layer = sdgp.SDGPLinear(8, 8, bias=False, config=MAGNITUDE)
    x = torch.ones(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(x)
        second = nn.functional.linear(x, layer.weight)
    (from_dense,) = torch.autograd.grad(second.float().sum(), layer.weight)
    (from_sdgp,) = torch.autograd.grad(first.float().sum(), layer.weight)
    assert from_dense.abs().sum() > 0
    assert from_sdgp.abs().sum() > 0


@pytest.mark.parametrize("function", ["magnitude", "random", "rescale_magnitude", "mvue"])
def test_grad_scaler_sees_an_overflow(function: str) -> None:
    model = conv_net()
    sdgp.accelerate_(model, sdgp.SDGPConfig(prune=function))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = (model(batch()) * 1e4).float().square().sum()  # overflows fp16 once scaled
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))

    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = model(batch()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


# --- graphs that run in pieces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = conv_net()
    sdgp.accelerate_(model)
    x = batch().requires_grad_()
    torch.manual_seed(3)
    expected = gradients(model, model(x).square().sum())
    torch.manual_seed(3)
    y = checkpoint(model, x, use_reentrant=reentrant)
    got = gradients(model, y.square().sum())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="hooks cannot be asked for"
)
def test_activation_checkpointing_saves_the_same_beside_other_graphs() -> None:
    """Which may keep a layer's weight, cast, during the first forward, and be gone before the second."""
    layer = sdgp.SDGPLinear(16, 16)
    x = torch.randn(8, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        other = layer(x)
        y = checkpoint(layer, x, use_reentrant=False)
    del other
    torch.manual_seed(3)
    got = torch.autograd.grad(y.float().square().sum(), (x, layer.weight))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.manual_seed(3)
    expected = torch.autograd.grad(y.float().square().sum(), (x, layer.weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 12), (2, 3, 4, 12)])
def test_selective_checkpointing_meets_the_operations_of_the_dense_layer(shape: tuple[int, ...], bias: bool) -> None:
    dense = nn.Linear(12, 8, bias=bias)
    layer = copy.deepcopy(dense)
    sdgp.accelerate_(layer)

    def operations(module: nn.Module) -> list[Any]:
        met = []

        def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if not context.is_recompute:  # which ends sooner in a dense layer of torch 2.6
                met.append(operation)
            return CheckpointPolicy.MUST_SAVE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        checkpoint(module, torch.randn(shape), use_reentrant=False, context_fn=contexts).sum().backward()
        return [operation for operation in met if operation is not torch.ops.aten._unsafe_view.default]

    met = operations(layer)
    assert torch.ops.aten.linear.default not in met
    assert met == operations(dense)


def test_gradient_accumulation_adds_the_steps() -> None:
    model = conv_net()
    sdgp.accelerate_(model, RESCALE)
    x = batch()
    parts = [gradients(model, model(part).square().sum()) for part in x.split(2)]
    model.zero_grad()
    for part in x.split(2):
        model(part).square().sum().backward()
    for parameter, first, second in zip(model.parameters(), *parts, strict=True):
        torch.testing.assert_close(parameter.grad, first + second)


def test_a_layer_used_twice_accumulates_both_uses() -> None:
    layer = sdgp.SDGPLinear(8, 8, config=MAGNITUDE)
    x = torch.randn(4, 8)
    got = gradients(layer, layer(layer(x)).sum())
    inner = layer(x).detach().requires_grad_()
    outer = gradients(layer, layer(inner).sum())
    layer.zero_grad()
    layer(x).backward(inner.grad)
    assert all(torch.allclose(g, a + p.grad) for g, a, p in zip(got, outer, layer.parameters(), strict=True))


def test_frozen_parts_get_no_gradient() -> None:
    model = conv_net()
    model[0].requires_grad_(False)
    sdgp.accelerate_(model)
    model(batch()).sum().backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_resumes_bit_identically_from_the_generator_state() -> None:
    model = conv_net()
    sdgp.accelerate_(model)
    x = batch()
    gradients(model, model(x).square().sum())
    state = torch.get_rng_state()
    expected = gradients(model, model(x).square().sum())
    other = gradients(model, model(x).square().sum())
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, model(x).square().sum()), expected, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(other, expected, strict=True))


# --- torch.compile ---------------------------------------------------------------------------------------------


def test_compile_fullgraph_trains_as_eager_does() -> None:
    """Inductor, forward and backward in one graph each; convolutions in channels_last and a 3-D Linear."""
    model = conv_net().to(memory_format=torch.channels_last)
    model.append(nn.Unflatten(1, (2, 3))).append(nn.Linear(3, 4, bias=False))
    sdgp.accelerate_(model, sdgp.SDGPConfig(prune="rescale_magnitude", min_in_channels=1))
    x = batch().to(memory_format=torch.channels_last).requires_grad_()
    expected = gradients(model, model(x).square().sum())
    got = gradients(model, torch.compile(model, fullgraph=True)(x).square().sum())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compile_under_autocast() -> None:
    model = conv_net()
    sdgp.accelerate_(model, MAGNITUDE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(batch()), compiled(batch())
    assert torch.equal(got, expected)
    pairs = zip(gradients(model, got.float().sum()), gradients(model, expected.float().sum()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_aot_autograd(dynamic: bool) -> None:
    """Frozen weights and inputs without gradients; two batch sizes; no recompilation of the arithmetic needed."""
    model = conv_net()
    model[2].weight.requires_grad_(False)
    sdgp.accelerate_(model, MAGNITUDE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for size in (4, 3):
        expected = torch.autograd.grad(model(batch(size)).square().sum(), trainable)
        got = torch.autograd.grad(compiled(batch(size)).square().sum(), trainable)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_mvue_draws_anew_for_each_layer_and_step() -> None:
    layer = sdgp.SDGPLinear(16, 16, bias=False)
    compiled = torch.compile(lambda x: (layer(x), layer(x)), fullgraph=True, backend="aot_eager")
    dy = torch.linspace(-1, 2, 128).view(8, 16)
    x = torch.randn(8, 16, requires_grad=True)

    def both() -> list[Tensor]:
        first, second = compiled(x)
        return [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for y in (first, second)]

    torch.manual_seed(0)
    drawn = both() + both()
    assert len({tuple(t.flatten().tolist()) for t in drawn}) == 4
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(both() + both(), drawn, strict=True))


def test_swapping_a_compiled_model_recompiles_it() -> None:
    model = conv_net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    dense = gradients(model, compiled(batch()).square().sum())
    for config in (MAGNITUDE, sdgp.SDGPConfig(prune="magnitude", n=1)):
        sdgp.accelerate_(compiled, config)
        got = gradients(model, compiled(batch()).square().sum())
        expected = gradients(model, model(batch()).square().sum())
        for a, b, c in zip(got, expected, dense, strict=True):
            torch.testing.assert_close(a, b)
            assert a.dim() == 1 or not torch.allclose(a, c)  # bias gradients of the last layer are never pruned
    sdgp.restore_(compiled)
    for a, b in zip(gradients(model, compiled(batch()).square().sum()), dense, strict=True):
        torch.testing.assert_close(a, b)


def test_switching_a_compiled_model_recompiles_it_once_for_each_state() -> None:
    model = conv_net()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    dense = gradients(model, model(batch()).square().sum())
    sdgp.accelerate_(model, MAGNITUDE)
    sparse = gradients(model, model(batch()).square().sum())
    for active in (True, False, True, False):
        sdgp.set_active_(compiled, active)
        got = gradients(model, compiled(batch()).square().sum())
        for a, b in zip(got, sparse if active else dense, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 2
    ops = [{str(node.target) for node in graph.graph.nodes} for graph in counter.graphs]
    assert [any("autograd_function" in op for op in names) for names in ops] == [True, False]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_autograd_prunes_what_ran_eagerly(autocast: bool) -> None:
    model = conv_net()
    sdgp.accelerate_(model)

    def step(backward: Any) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(batch()).float().square().sum()
        with backward:
            return gradients(model, loss)

    expected = step(contextlib.nullcontext())
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(step(compiled_autograd._enable(compiler)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_export_and_trace_see_the_dense_forward() -> None:
    model = conv_net().eval()
    sdgp.accelerate_(model)
    expected = model(batch())
    assert torch.equal(torch.export.export(model, (batch(),)).module()(batch()), expected)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(model, batch())(batch()), expected)


# --- several processes -----------------------------------------------------------------------------------------


# Not in torch 2.6; 2.7 sums the gradients of dense models, too, where it should average; right in 2.9.
FSDP2_ON_CPU = torch.torch_version.TorchVersion(torch.__version__) >= (2, 9)


def _ddp(rank: int, accelerate_first: bool) -> list[Tensor]:
    model = conv_net()
    if accelerate_first:
        sdgp.accelerate_(model, RESCALE)
    parallel = nn.parallel.DistributedDataParallel(model)
    if not accelerate_first:
        sdgp.accelerate_(parallel, RESCALE)
    return gradients(parallel, parallel(batch(8).chunk(2)[rank]).square().sum())


def _fsdp(rank: int, accelerate_first: bool) -> list[Tensor]:
    model = conv_net()
    mesh = init_device_mesh("cpu", (2,))
    if accelerate_first:
        sdgp.accelerate_(model, RESCALE)
        for layer in (model[0], model[2]):  # a layer as its own unit gets a class derived from SDGPConv2d
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not accelerate_first:
        sdgp.accelerate_(model, RESCALE)
    model(batch(8).chunk(2)[rank]).square().sum().backward()
    return [p.grad.full_tensor() for p in model.parameters()]


def _refuse_wrapped(rank: int) -> list[str]:
    """What the report and restore_ say about layers that fully_shard has given classes of its own."""
    model, mesh = conv_net(), init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    reason = sdgp.accelerate_(model)["0"].reason
    fully_shard(model[2], mesh=mesh)
    again = sdgp.accelerate_(model, MAGNITUDE)["2"]  # its configuration can still be changed
    with pytest.raises(RuntimeError) as caught:
        sdgp.restore_(model)
    return [reason, again.dgrad, str(caught.value), type(model[5]).__name__]


def _tune_in_one(rank: int) -> Tensor:
    """A collective of all after one rank has tuned a model whose forward would be one too."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    sdgp.accelerate_(model)
    if rank == 1:
        assert len(sdgp.tune(model, torch.randn(4, 8))) == 1
    ranks = torch.ones(5) * rank
    dist.all_reduce(ranks)
    assert model.require_forward_param_sync
    return ranks


def _tensor_parallel(rank: int) -> list[Tensor]:
    """Gradients (whole) of a tensor-parallel model, before and after it is accelerated, and then compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (model, model, compiled):
        if results:
            sdgp.accelerate_(model)
        model.zero_grad()
        run(torch.linspace(-1, 1, 32).view(4, 8)).square().sum().backward()
        results.append(torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]))
    return results


def _draw(rank: int) -> Tensor:
    torch.manual_seed(5)
    layer = sdgp.SDGPLinear(16, 16)
    x = torch.randn(8, 16, requires_grad=True)
    return torch.autograd.grad(layer(x), x, torch.linspace(-1, 2, 128).view(8, 16))[0]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=patience)
    try:
        results = {
            "DDP, accelerated before": _ddp(rank, True),
            "DDP, accelerated after": _ddp(rank, False),
            "wrapped": _refuse_wrapped(rank),
            "drawn": _draw(rank),
            "tensor parallel": _tensor_parallel(rank),
            "tuned in one": _tune_in_one(rank),
        }
        if FSDP2_ON_CPU:
            results["FSDP2, accelerated before"] = _fsdp(rank, True)
            results["FSDP2, accelerated after"] = _fsdp(rank, False)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of `_worker` on both ranks; one spawn for all tests, since starting torch takes seconds."""
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_two_processes_equal_one_with_the_doubled_batch(
    order: str, wrapper: str, two_processes: list[dict[str, Any]]
) -> None:
    """The prune function sums within a sample, and 4 samples per rank make whole groups of 4 positions."""
    if wrapper == "FSDP2" and not FSDP2_ON_CPU:
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on CPUs that averages")
    model = conv_net()
    sdgp.accelerate_(model, RESCALE)
    expected = gradients(model, model(batch(8)).square().sum() / 2)  # the wrappers average over ranks
    for results in two_processes:
        for a, b in zip(results[f"{wrapper}, accelerated {order}"], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_wrapped_on_their_own_say_so(two_processes: list[dict[str, Any]]) -> None:
    reason, dgrad, refused, untouched = two_processes[0]["wrapped"]
    assert dgrad == "magnitude 2:4"
    assert reason == "its class belongs to fully_shard; accelerate before wrapping"
    assert refused.startswith("FSDPSDGPConv2d cannot become an ordinary layer again")
    assert untouched == "SDGPLinear"


def test_one_rank_may_tune_alone(two_processes: list[dict[str, Any]]) -> None:
    for results in two_processes:
        assert torch.equal(results["tuned in one"], torch.ones(5))


def test_tensor_parallel_layers_run_dense(two_processes: list[dict[str, Any]]) -> None:
    for results in two_processes:
        dense, accelerated, compiled = results["tensor parallel"]
        assert torch.equal(dense, accelerated)
        torch.testing.assert_close(compiled, dense)


def test_ranks_seeded_alike_prune_differently(two_processes: list[dict[str, Any]]) -> None:
    assert not torch.equal(two_processes[0]["drawn"], two_processes[1]["drawn"])
