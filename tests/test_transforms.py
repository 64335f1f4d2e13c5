"""What is done to layers from outside: in-place changes, reuse, fx, jit.trace, torch.func, inference mode, nested
tensors, tensors of other classes.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import sdgp_accel as sdgp
from sdgp_accel.backends import forget_decisions

CONFIG = sdgp.SDGPConfig(prune="magnitude", backend="reference")


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`model` accelerated, and as it was."""
    dense = copy.deepcopy(model)
    sdgp.accelerate_(model, CONFIG)
    return model, dense


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.Linear(16, 8))


@pytest.fixture
def warns() -> Any:
    """Collects the warnings of a test; those that come once come again."""
    forget_decisions()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in caught]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (3, 4, 12), (2, 0, 12), (2, 3, 4, 12)])
def test_a_linear_layers_output_may_be_changed_in_place(
    shape: tuple[int, ...], bias: bool, autocast: bool, compiled: bool
) -> None:
    """torch's own function gives a view of its product for some of these shapes."""

    def step(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y: Tensor = layer(x)
            y += 1
            return y.relu_()

    ours, dense = twins(nn.Linear(12, 8, bias=bias))
    x = torch.randn(shape)
    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    y = run(ours, x)
    assert torch.equal(y, step(dense, x))
    y.sum().backward()
    assert ours.weight.grad is not None


def test_an_output_without_a_gradient_moves_no_parameter() -> None:
    for model, x in ((nn.Linear(8, 8), torch.randn(4, 8)), (nn.Conv2d(8, 8, 1), torch.randn(1, 8, 2, 2))):
        ours, _ = twins(model)
        other = nn.Linear(x.shape[-1], 2)
        x.requires_grad_()
        checkpoint(lambda unused, v, other=other: other(v), ours(x), x, use_reentrant=True).sum().backward()
        assert other.weight.grad is not None
        assert all(parameter.grad is None for parameter in ours.parameters())


def saved(node: Any) -> list[Tensor]:
    """What the graph from `node` on keeps for backward (not by hooks: under them layers keep something else)."""
    if node is None:
        return []
    own = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    tensors = [value for value in (*own, *getattr(node, "saved_tensors", ())) if isinstance(value, Tensor)]
    return tensors + [tensor for following, _ in node.next_functions for tensor in saved(following)]


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("uses", [1, 3])
def test_however_often_a_parameter_is_used_under_autocast_one_cast_is_kept(kind: str, uses: int) -> None:
    layer: nn.Module = nn.Linear(64, 64, bias=False) if kind == "linear" else nn.Conv2d(64, 64, 1, bias=False)
    ours, dense = twins(layer)
    x = torch.randn((8, 64) if kind == "linear" else (2, 64, 2, 2), requires_grad=True)

    def kept(model: nn.Module) -> tuple[int, Tensor]:
        """Bytes kept for backward beside the parameters themselves."""
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autocast("cpu", torch.bfloat16):
            y = x
            for _ in range(uses):
                y = model(y)
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved(y.grad_fn)}
        return sum(size for storage, size in sizes.items() if storage not in own), y

    ours_bytes, y = kept(ours)
    assert ours_bytes <= kept(dense)[0]
    function = sdgp.functional.linear if kind == "linear" else sdgp.functional.conv2d
    expected, weight = x.bfloat16(), ours.weight.bfloat16()
    for _ in range(uses):
        expected = function(expected, weight, plan=CONFIG)
    gradients = [torch.autograd.grad(out.float().square().sum(), x)[0] for out in (y, expected)]
    assert torch.equal(*gradients)


def test_a_cast_that_a_graph_keeps_is_of_no_use_to_another_forward() -> None:
    """Data that change behind the version counter's back are what the next forward uses."""
    layer = nn.Linear(8, 8, bias=False)
    sdgp.accelerate_(layer, CONFIG)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(x)
        layer.weight.data.zero_()
        second = layer(x)
    assert first.any()
    assert not second.any()
    (dx,) = torch.autograd.grad(second.sum(), x)
    assert not dx.any()


@pytest.mark.skipif(not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="not before torch 2.8")
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_checkpointing_under_autocast_beside_another_graph_of_the_layer(kind: str) -> None:
    """Which is alive in the second forward, and was not in the first."""
    ours, _ = twins(nn.Linear(8, 8) if kind == "linear" else nn.Conv2d(8, 8, 1))
    x = torch.randn((4, 8) if kind == "linear" else (2, 8, 2, 2), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad(ours(x).float().sum(), [x, *ours.parameters()])
        first = checkpoint(ours, x, use_reentrant=False)
        second = ours(x)
    for y in (first, second):
        got = torch.autograd.grad(y.float().sum(), [x, *ours.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_fx_traces_an_accelerated_model_and_the_graph_prunes() -> None:
    ours, dense = twins(small())
    traced = torch.fx.symbolic_trace(ours)
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(traced(x), dense(x))
    traced(x).square().sum().backward()
    pruned = [parameter.grad.clone() for parameter in ours.parameters()]
    ours.zero_grad()
    ours(x).square().sum().backward()
    dense(x).square().sum().backward()
    for gradient, ours_, dense_ in zip(pruned, ours.parameters(), dense.parameters(), strict=True):
        assert torch.equal(gradient, ours_.grad)
        assert gradient.dim() == 1 or not torch.equal(gradient, dense_.grad)


def test_jit_trace_records_the_dense_layers(warns: Any) -> None:
    ours, dense = twins(small().eval())
    x = torch.randn(2, 4, 4, 4)
    traced = torch.jit.trace(ours, x)
    assert torch.equal(traced(x), dense(x))
    traced(x).sum().backward()
    assert sum("torch.jit.trace records the ordinary dense layers" in text for text in warns()) == 1


@pytest.mark.parametrize("record", ["export", "strict export", "trace"])
def test_what_is_recorded_is_the_dense_model(record: str) -> None:
    """Its operators, so that it can be trained too, and convolutions that pad by name."""
    if record != "trace" and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip(f"torch {torch.__version__} does not say that it exports")
    if record == "strict export" and torch.torch_version.TorchVersion(torch.__version__) < (2, 9):
        pytest.skip(f"torch {torch.__version__} does not say so while it traces")  # not in 2.7, not tried with 2.8
    operators = []
    x = torch.randn(2, 4, 4, 4)
    for model in twins(nn.Sequential(nn.Conv2d(4, 8, 3, padding="same"), nn.Flatten(2), nn.Linear(16, 8))):
        if record == "trace":
            recorded = torch.jit.trace(model, x)
            operators.append([node.kind() for node in recorded.inlined_graph.nodes() if node.kind() != "prim::GetAttr"])
        else:
            exported = torch.export.export(model, (x,), strict=record == "strict export")
            recorded = exported.module()
            operators.append([node.target for node in exported.graph.nodes if node.op == "call_function"])
        recorded(x).sum().backward()
        assert all(parameter.grad is not None for parameter in recorded.parameters())
    assert operators[0] == operators[1]


def test_func_transforms_run_the_dense_layers(warns: Any) -> None:
    ours, dense = twins(small())
    x = torch.randn(3, 2, 4, 4, 4)
    assert torch.allclose(torch.func.vmap(ours)(x), torch.func.vmap(dense)(x))

    def loss(model: nn.Module) -> Any:
        return lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().sum()

    parameters = {name: parameter.detach() for name, parameter in dense.named_parameters()}
    per_sample = [torch.func.vmap(torch.func.grad(loss(m)), (None, 0))(parameters, x) for m in (ours, dense)]
    for name in parameters:
        torch.testing.assert_close(per_sample[0][name], per_sample[1][name])
    tangents = [torch.func.jvp(model, (x[0],), (torch.ones_like(x[0]),))[1] for model in (ours, dense)]
    torch.testing.assert_close(*tangents)
    assert sum("torch.func's transforms" in text for text in warns()) == 1


def test_compiled_func_transforms_run_the_dense_layers() -> None:
    x = torch.randn(2, 4, 4, 4)

    def results(model: nn.Module) -> tuple[Tensor, ...]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        def forward(x: Tensor) -> Any:  # of a function, torch.compile can tell the name
            return model(x)

        @torch.compile(backend="aot_eager", fullgraph=True)
        def transformed(parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
            gradients = torch.func.grad(loss)(parameters)
            return torch.func.vmap(forward)(x[None]), torch.func.jvp(forward, (x,), (x,))[1], *gradients.values()

        torch.compiler.reset()
        return transformed({name: parameter.detach() for name, parameter in model.named_parameters()})

    for ours, dense in zip(*map(results, twins(small())), strict=True):
        torch.testing.assert_close(ours, dense)


def test_forward_mode_runs_the_dense_layers(warns: Any) -> None:
    ours, dense = twins(small())
    x, direction = torch.randn(2, 2, 4, 4, 4)
    tangents = []
    for model in (ours, dense):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent)
    assert torch.equal(*tangents)
    assert sum("forward mode" in text for text in warns()) == 1


@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)])
def test_batches_of_gradients_run_the_dense_backward(asked: tuple[bool, bool], warns: Any) -> None:
    ours, dense = twins(small())
    x, batch = torch.randn(2, 4, 4, 4), torch.randn(3, 2, 8, 8)
    results = []
    for model in (ours, dense):
        leaf = x.clone().requires_grad_(asked[0])
        leaves = [leaf] * asked[0] + [*model.parameters()] * asked[1]
        results.append(torch.autograd.grad(model(leaf), leaves, batch, is_grads_batched=True))
    for gradient, expected in zip(*results, strict=True):
        torch.testing.assert_close(gradient, expected)
    assert sum("for batches of gradients" in text for text in warns()) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_nested_tensors_run_the_dense_layer(compiled: bool, warns: Any) -> None:
    ours, dense = twins(nn.Linear(8, 4))
    parts = [torch.randn(3, 8), torch.randn(5, 8)]
    for model in (ours, dense):
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(nested).values().square().sum().backward()
    assert torch.equal(ours.weight.grad, dense.weight.grad)
    assert compiled or sum("nested tensors" in text for text in warns()) == 1


class Quantized(Tensor):
    """As quantization libraries have them: it takes part in a layer's forward and in nothing else."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantized:
        made: Quantized = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.conv2d):
            return func(
                *(arg.codes * arg.scale if isinstance(arg, Quantized) else arg for arg in args), **(kwargs or {})
            )
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a quantized tensor")


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 8, 5, 5)])
def test_a_weight_of_a_class_with_its_own_operations_runs_dense(shape: tuple[int, ...], warns: Any) -> None:
    """Quantized after the swap, as the base of adapters is: gradients pass through to the layers below."""
    ours, dense = twins(nn.Conv2d(8, 4, 3, padding="same") if len(shape) == 4 else nn.Linear(8, 4))
    x = torch.randn(shape)
    codes, gradients = torch.randint(-8, 8, ours.weight.shape, dtype=torch.int8), []
    for layer in (ours, dense):
        del layer.weight
        layer.weight = Quantized(codes, torch.tensor(0.25))
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert sum("for tensors of the class Quantized" in text for text in warns()) == 1


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 8, 5, 5)])
def test_an_input_of_a_class_with_its_own_operations_runs_dense(shape: tuple[int, ...], warns: Any) -> None:
    ours, dense = twins(nn.Conv2d(8, 4, 3, padding="same") if len(shape) == 4 else nn.Linear(8, 4))
    x = Quantized(torch.randint(-8, 8, shape, dtype=torch.int8), torch.tensor(0.25))
    for layer in (ours, dense):
        layer(x).square().sum().backward()
    assert torch.equal(ours.weight.grad, dense.weight.grad)
    assert sum("for tensors of the class Quantized" in text for text in warns()) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_inference_mode_records_nothing_even_where_gradients_are_enabled(compiled: bool) -> None:
    """``with torch.set_grad_enabled(trains)`` stands in many a forward, and validation runs in inference mode."""
    if compiled and torch.torch_version.TorchVersion(torch.__version__) < (2, 8):  # not tried with 2.7
        pytest.skip(f"torch {torch.__version__} compiles a backward here that it cannot prepare")
    ours, dense = twins(small())
    x = torch.randn(2, 4, 4, 4)
    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    with torch.inference_mode(), torch.set_grad_enabled(True):
        assert torch.equal(run(x), dense(x))
