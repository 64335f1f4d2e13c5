"""functional.linear / conv2d against the obvious version: dense autograd fed with the pruned output gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sdgp_accel as sdgp
from sdgp_accel import functional, ops, philox
from sdgp_accel.layer_plan import DEFAULT_SCOPE, plan_string
from sdgp_accel.pruning import prune_matrix

FUNCTIONS = ("magnitude", "random", "rescale_magnitude", "mvue")
SEED = torch.tensor([0x1234_5678_9ABC_DEF0, 42])

CONV_CASES: dict[str, dict[str, Any]] = {
    "3x3": {"padding": 1},
    "1x1": {"kernel": (1, 1)},
    "stride": {"stride": 2, "padding": (1, 0)},
    "dilated": {"dilation": (2, 1)},
    "same": {"padding": "same"},
    "same-even-kernel": {"padding": "same", "kernel": (6, 2), "dilation": (1, 2)},
    "valid": {"padding": "valid"},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 8, "stride": (2, 1)},
    "odd-channels": {"c_in": 5, "c_out": 7, "padding": 2},
    "no-bias": {"bias": False},
}


@pytest.fixture
def fixed_seed(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(philox, "draw", lambda device, generator=None: SEED.to(device))
    return SEED


def pruned(dy2d: Tensor, config: sdgp.SDGPConfig, kind: Any, axis: int, positions_per_sample: int) -> Tensor:
    pass_index = 1 - axis
    spec = config.spec(("grad_input", "grad_weight")[pass_index], DEFAULT_SCOPE[kind])
    if spec is None:
        return dy2d
    return prune_matrix(dy2d, spec, axis, positions_per_sample, philox.Rng(SEED, 0, pass_index))


def conv_inputs(
    case: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    case = dict(case)
    c_in, c_out = case.pop("c_in", 8), case.pop("c_out", 16)
    kernel, bias = case.pop("kernel", (3, 3)), case.pop("bias", True)
    x = torch.randn(2, c_in, 7, 9, dtype=dtype)
    weight = torch.randn(c_out, c_in // case.get("groups", 1), *kernel, dtype=dtype)
    return x, weight, torch.randn(c_out, dtype=dtype) if bias else None, case


def require_grad(*tensors: Tensor | None) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors if t is not None]


@pytest.mark.parametrize("function", [*FUNCTIONS, {"grad_input": "random", "grad_weight": "magnitude"}], ids=str)
@pytest.mark.parametrize("passes", [("sparse", "sparse"), ("sparse", "dense"), ("dense", "sparse")])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (3, 4, 12), (2, 3, 5, 12)])
def test_linear_is_dense_autograd_on_the_pruned_gradient(
    function: Any, passes: Any, shape: tuple[int, ...], fixed_seed: Tensor
) -> None:
    config = sdgp.SDGPConfig(prune=function, grad_input=passes[0], grad_weight=passes[1])
    x, weight, bias = require_grad(*(torch.randn(s, dtype=torch.float64) for s in (shape, (10, 12), (10,))))
    y = sdgp.functional.linear(x, weight, bias, config)
    dy = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)

    dy2d, x2d = dy.reshape(-1, 10), x.detach().reshape(-1, 12)
    per_sample = shape[-2] if len(shape) > 2 else 1
    expected_dx = pruned(dy2d, config, "linear", 1, per_sample) @ weight.detach()
    expected_dw = pruned(dy2d, config, "linear", 0, per_sample).T @ x2d
    torch.testing.assert_close(dx, expected_dx.view(shape))
    torch.testing.assert_close(dw, expected_dw)
    torch.testing.assert_close(db, dy2d.sum(0))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CONV_CASES.values(), ids=CONV_CASES)
def test_conv2d_is_dense_autograd_on_the_pruned_gradient(
    case: dict[str, Any], memory_format: torch.memory_format, function: str, fixed_seed: Tensor
) -> None:
    config = sdgp.SDGPConfig(prune=function)
    x, weight, bias, arguments = conv_inputs(case)
    leaves = require_grad(x.to(memory_format=memory_format), weight, bias)
    y = sdgp.functional.conv2d(leaves[0], leaves[1], *(leaves[2:] or [None]), **arguments, plan=config)
    dense = F.conv2d(leaves[0], leaves[1], *(leaves[2:] or [None]), **arguments)
    assert torch.equal(y, dense)
    assert y.stride() == dense.stride()

    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, dy)
    n, c, p, q = dy.shape
    dy2d = dy.permute(0, 2, 3, 1).reshape(-1, c)
    for index, axis in ((0, 1), (1, 0)):
        matrix = pruned(dy2d, config, "conv2d", axis, p * q)
        (expected,) = torch.autograd.grad(
            dense, leaves[index], matrix.reshape(n, p, q, c).permute(0, 3, 1, 2), retain_graph=True
        )
        torch.testing.assert_close(gradients[index], expected)
        assert gradients[index].is_contiguous() == expected.is_contiguous()
    if bias is not None:
        torch.testing.assert_close(gradients[2], dy.sum((0, 2, 3)))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products that the reference backend computes, in their order."""
    from sdgp_accel.backends import reference

    called: list[str] = []
    for name in ("dgrad", "wgrad"):
        original = getattr(reference.ReferenceBackend, name)
        monkeypatch.setattr(
            reference.ReferenceBackend, name, lambda *a, n=name, f=original, **k: (called.append(n), f(*a, **k))[1]
        )
    return called


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:])
def test_only_what_is_asked_for_is_computed_and_saved(needed: tuple[bool, bool, bool], called: list[str]) -> None:
    x, weight, bias = (
        torch.randn(shape, requires_grad=need)
        for shape, need in zip([(2, 8, 5, 5), (8, 8, 3, 3), (8,)], needed, strict=True)
    )
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = sdgp.functional.conv2d(x, weight, bias)
    y.sum().backward()
    assert called == [name for name, need in zip(("dgrad", "wgrad"), needed[:2], strict=True) if need]
    assert [t.grad is not None for t in (x, weight, bias)] == list(needed)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t, need in ((weight, needed[0]), (x, needed[1])) if need}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("are_leaves", [False, True])
@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_only_what_this_backward_asks_for_is_computed(
    kind: str, asked: tuple[bool, bool, bool], are_leaves: bool, autocast: bool, called: list[str]
) -> None:
    """As for adversarial examples, which take the gradient of the images alone."""
    function, shapes = {
        "linear": (sdgp.functional.linear, [(6, 8), (8, 8), (8,)]),
        "conv2d": (sdgp.functional.conv2d, [(2, 8, 5, 5), (8, 8, 3, 3), (8,)]),
    }[kind]
    leaves = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    inputs = leaves if are_leaves else [leaf * 1 for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = function(*inputs, plan=sdgp.SDGPConfig(prune="magnitude")).float().square().sum()
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert called == ["dgrad", "wgrad"]
    called.clear()
    wanted = [leaf for leaf, ask in zip(leaves, asked, strict=True) if ask]
    got = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert called == [name for name, ask in zip(("dgrad", "wgrad"), asked[:2], strict=True) if ask]
    for gradient, whole in zip(got, [g for g, ask in zip(expected, asked, strict=True) if ask], strict=True):
        torch.testing.assert_close(gradient, whole)
    called.clear()
    loss.backward()
    assert called == ["dgrad", "wgrad"]


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_saves_no_more_than_dense(kind: str) -> None:
    x, weight = (
        (torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3))
        if kind == "conv2d"
        else (torch.randn(4, 8), torch.randn(8, 8))
    )
    sizes = {}
    for module in (F, sdgp.functional):
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: (s.update({t.data_ptr(): t.nbytes}), t)[1], lambda t: t
        ):
            getattr(module, kind)(x.requires_grad_(), weight.requires_grad_())
        sizes[module.__name__] = sum(saved.values())
    assert sizes["sdgp_accel.functional"] <= sizes["torch.nn.functional"]


def checkerboard(t: int, c: int) -> Tensor:
    """A 0/1 matrix that is 2:4 along both axes."""
    return ((torch.arange(t)[:, None] + torch.arange(c)) % 2).double()


@pytest.mark.parametrize("function", ["none", "magnitude", "rescale_magnitude", "mvue"])
def test_gradcheck_linear(function: str) -> None:
    """Under a fixed mask on the output that is 2:4 along both axes these functions keep the whole gradient, so
    that the analytical gradient must be that of the masked function itself; ``none`` is n == m."""
    config = sdgp.SDGPConfig(n=4) if function == "none" else sdgp.SDGPConfig(prune=function)
    mask = torch.ones(5, 6).double() if function == "none" else checkerboard(5, 6)
    inputs = require_grad(*(torch.randn(s, dtype=torch.float64) for s in ((5, 7), (6, 7), (6,))))
    assert torch.autograd.gradcheck(lambda *a: sdgp.functional.linear(*a, plan=config) * mask, inputs)


@pytest.mark.parametrize("function", ["none", "rescale_magnitude", "mvue"])
@pytest.mark.parametrize("case", ["3x3", "stride", "dilated", "same-even-kernel", "grouped", "odd-channels"])
def test_gradcheck_conv2d(case: str, function: str) -> None:
    config = sdgp.SDGPConfig(n=4) if function == "none" else sdgp.SDGPConfig(prune=function)
    x, weight, bias, arguments = conv_inputs(CONV_CASES[case])
    inputs = require_grad(x[:1, :, :5, :6], weight[:6] if "groups" not in arguments else weight, bias)
    inputs[2] = inputs[2][: inputs[1].shape[0]].detach().requires_grad_()
    n, c, p, q = F.conv2d(*inputs, **arguments).shape
    mask = checkerboard(n * p * q, c).view(n, p, q, c).permute(0, 3, 1, 2)
    mask = torch.ones_like(mask) if function == "none" else mask
    assert torch.autograd.gradcheck(
        lambda *a: sdgp.functional.conv2d(*a, **arguments, plan=config) * mask, inputs, fast_mode=True
    )


def test_gradients_differ_between_steps_and_repeat_with_the_seed() -> None:
    x, weight = require_grad(torch.randn(8, 16), torch.randn(16, 16))

    def gradient() -> Tensor:
        (dx,) = torch.autograd.grad(sdgp.functional.linear(x, weight), x, torch.linspace(-1, 2, 128).view(8, 16))
        return dx

    torch.manual_seed(7)
    first, second = gradient(), gradient()
    torch.manual_seed(7)
    assert torch.equal(gradient(), first)
    assert not torch.equal(first, second)


def test_passes_and_ranks_draw_differently(fixed_seed: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    eye, dy = torch.eye(16), torch.rand(16, 16) + 0.5
    dy = (dy + dy.T) / 2  # symmetric: equal numbers would prune both axes alike

    def operands() -> tuple[Tensor, Tensor]:
        x, weight = require_grad(eye, eye)
        dx, dw = torch.autograd.grad(sdgp.functional.linear(x, weight), (x, weight), dy)
        return dx, dw

    dx, dw = operands()
    assert not torch.equal(dx, dw)
    monkeypatch.setattr(philox, "data_parallel_rank", lambda: 1)
    other_dx, other_dw = operands()
    assert not torch.equal(dx, other_dx)
    assert not torch.equal(dw, other_dw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x, weight, bias = require_grad(*(torch.randn(s).to(dtype) for s in ((2, 8, 6, 6), (8, 8, 3, 3), (8,))))
    y = sdgp.functional.conv2d(x, weight, bias)
    assert torch.equal(y, F.conv2d(x, weight, bias))
    y.sum().backward()
    assert {t.grad.dtype for t in (x, weight, bias)} == {dtype}


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 3, 8)])
def test_empty_linear(shape: tuple[int, ...]) -> None:
    x, weight, bias = require_grad(torch.randn(shape), torch.randn(6, 8), torch.randn(6))
    sdgp.functional.linear(x, weight, bias).sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(6, 8))
    assert torch.equal(bias.grad, torch.zeros(6))


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 4), (4, 0)])
def test_zero_features(in_features: int, out_features: int) -> None:
    x, weight = require_grad(torch.randn(5, in_features), torch.randn(out_features, in_features))
    sdgp.functional.linear(x, weight).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert weight.grad.shape == weight.shape


def test_empty_batch_conv2d() -> None:
    x, weight, bias = require_grad(torch.randn(0, 8, 5, 5), torch.randn(4, 8, 3, 3), torch.randn(4))
    sdgp.functional.conv2d(x, weight, bias).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros(4))


def test_zero_positions_fail_as_in_the_dense_layer() -> None:
    x, weight = require_grad(torch.randn(1, 8, 2, 2), torch.randn(4, 8, 3, 3))
    with pytest.raises(RuntimeError, match="Kernel size"):
        sdgp.functional.conv2d(x, weight)


def test_unbatched_conv2d() -> None:
    config = sdgp.SDGPConfig(prune="rescale_magnitude")
    x, weight = require_grad(torch.randn(8, 6, 6), torch.randn(4, 8, 3, 3))
    y = sdgp.functional.conv2d(x, weight, plan=config)
    assert torch.equal(y, F.conv2d(x, weight))
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    (batched,) = torch.autograd.grad(sdgp.functional.conv2d(x[None], weight, plan=config), x, dy[None])
    assert torch.equal(dx, batched)


def test_non_contiguous_inputs_and_gradients() -> None:
    config = sdgp.SDGPConfig(prune="magnitude")
    x = torch.randn(12, 5).t().requires_grad_()  # [5, 12], column-major
    weight = torch.randn(12, 20)[:, ::2].t()[:10].detach().requires_grad_()
    dy = torch.randn(10, 5).t()
    strided = torch.autograd.grad(sdgp.functional.linear(x, weight, plan=config), (x, weight), dy)
    y = sdgp.functional.linear(x.contiguous(), weight.contiguous(), plan=config)
    for got, expected in zip(strided, torch.autograd.grad(y, (x, weight), dy.contiguous()), strict=True):
        torch.testing.assert_close(got, expected)
    # sum() hands back an expanded gradient with zero strides
    sdgp.functional.conv2d(torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(8, 8, 1, 1)).sum().backward()


def test_channels_last_gradient_is_pruned_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdgp_accel.backends import reference

    seen: list[int] = []
    monkeypatch.setattr(
        reference, "prune_matrix", lambda matrix, *a: (seen.append(matrix.data_ptr()), prune_matrix(matrix, *a))[1]
    )
    x, weight = require_grad(torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last), torch.randn(8, 8, 3, 3))
    y = sdgp.functional.conv2d(x, weight)
    dy = torch.randn_like(y)
    assert dy.is_contiguous(memory_format=torch.channels_last)
    y.backward(dy)
    assert seen == [dy.data_ptr()] * 2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_non_finite_gradients_reach_both_passes(function: str, value: float) -> None:
    x, weight = require_grad(torch.rand(8, 8) + 1, torch.rand(8, 8) + 1)
    y = sdgp.functional.linear(x, weight, plan=sdgp.SDGPConfig(prune=function))
    dy = torch.randn(8, 8)
    dy[3, 5] = value
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert not dx[3].isfinite().any()
    assert not dw[5].isfinite().any()


def test_a_weight_without_its_dimension_of_rows_runs_dense() -> None:
    """torch takes it: the result then has no such dimension."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    for config in (sdgp.SDGPConfig(backend="reference"), sdgp.SDGPConfig(grad_input="dense", grad_weight="dense")):
        y = sdgp.functional.linear(x, weight, None, config)
        for a, b in zip(torch.autograd.grad(y.sum(), [x, weight]), (weight.expand(3, 8), x.sum(0)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_double_backward_is_refused(kind: str) -> None:
    x, weight = (
        require_grad(torch.randn(2, 8, 4, 4), torch.randn(8, 8, 1, 1))
        if kind == "conv2d"
        else require_grad(torch.randn(4, 8), torch.randn(8, 8))
    )
    y = getattr(sdgp.functional, kind)(x, weight)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)  # itself fine
    with pytest.raises(RuntimeError, match=r"double backward .* not supported"):
        dx.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
@pytest.mark.parametrize("training", [False, True])
def test_non_floating_input_is_refused(dtype: torch.dtype, training: bool) -> None:
    with (
        torch.set_grad_enabled(training),
        pytest.raises(TypeError, match=rf"input must be a floating point tensor; got {dtype}"),
    ):
        sdgp.functional.linear(torch.ones(2, 4).to(dtype), torch.randn(4, 4, requires_grad=True))
    with torch.set_grad_enabled(training), pytest.raises(TypeError, match=rf"got {dtype}"):
        sdgp.functional.conv2d(torch.ones(1, 4, 2, 2).to(dtype), torch.randn(4, 4, 1, 1, requires_grad=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "full"}, "padding must be 'same', 'valid', an int or two ints; got 'full'"),
        ({"padding": "same", "stride": 2}, r"padding='same' needs stride 1; got stride \(2, 2\)"),
        ({"padding": "same", "stride": (1, 2)}, r"padding='same' needs stride 1; got stride \(1, 2\)"),
        ({"stride": 0}, r"stride must be positive; got \(0, 0\)"),
        ({"stride": (1, 2, 3)}, r"stride must be an int or two of them; got \(1, 2, 3\)"),
        ({"stride": 1.5}, r"stride must be an int or two of them; got 1.5"),
        ({"stride": (1, 2.5)}, r"stride must be an int or two of them; got \(1, 2.5\)"),
        ({"weight": None}, "weight must be a tensor; got None of type NoneType"),
        ({"dilation": ()}, r"dilation must be an int or two of them; got \(\)"),
        ({"plan": "mvue"}, "plan must be a string .* got 'mvue'"),
        ({"plan": 3}, "plan must be"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    x, weight = require_grad(torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3))
    with pytest.raises((ValueError, TypeError), match=message):
        sdgp.functional.conv2d(**{"input": x, "weight": weight} | arguments)


def test_sample_channel_scope_of_linear() -> None:
    """On [N, T, C] it sums over T; on a 2-D input each row is its own sample, and the scope is the group."""
    sample = sdgp.SDGPConfig(prune="rescale_magnitude", scope="sample_channel")
    group = sdgp.SDGPConfig(prune="rescale_magnitude", scope="group")
    x, weight = require_grad(torch.randn(2, 64, 8), torch.randn(8, 8))
    dy = torch.randn(2, 64, 8)

    def dx(config: sdgp.SDGPConfig, x: Tensor, dy: Tensor) -> Tensor:
        return torch.autograd.grad(sdgp.functional.linear(x, weight, plan=config), x, dy)[0]

    kept = prune_matrix(dy.view(128, 8), sdgp.SDGPConfig(prune="magnitude").spec("grad_input", "group"), 1, 64, None)
    kept = kept.view(2, 64, 8)
    scale = dy.abs().sum(1, keepdim=True) / kept.abs().sum(1, keepdim=True)
    torch.testing.assert_close(dx(sample, x, dy), (kept * scale) @ weight, rtol=1e-4, atol=1e-4)
    x2d, dy2d = x.detach()[0].requires_grad_(), dy[0]
    assert torch.equal(dx(sample, x2d, dy2d), dx(group, x2d, dy2d))


@pytest.mark.parametrize("given", [None, [1.0, 2.0]])
@pytest.mark.parametrize("layer", [sdgp.SDGPLinear(2, 4), sdgp.SDGPConv2d(2, 4, 1)], ids=["linear", "conv2d"])
def test_an_input_that_is_no_tensor_is_named(layer: Any, given: Any) -> None:
    with pytest.raises(TypeError, match=r"input must be a floating point tensor; got"):
        layer(given)


def test_no_input_channels_have_empty_gradients() -> None:
    x, weight = require_grad(torch.randn(2, 0, 5, 5), torch.randn(8, 0, 3, 3))
    for function in (sdgp.functional.conv2d, F.conv2d):
        dx, dw = torch.autograd.grad(function(x, weight).sum(), (x, weight))
        assert dx.shape == x.shape
        assert dw.shape == weight.shape
    x, weight = require_grad(torch.randn(3, 0), torch.randn(8, 0))
    dx, dw = torch.autograd.grad(sdgp.functional.linear(x, weight).sum(), (x, weight))
    assert (dx.shape, dw.shape) == (x.shape, weight.shape)


@pytest.mark.parametrize("shape", [(), (5,), (3, 5)])
def test_wrong_shapes_fail_as_in_the_dense_functions(shape: tuple[int, ...]) -> None:
    x, weight = require_grad(torch.randn(shape), torch.randn(4, 8))
    with pytest.raises(RuntimeError):
        sdgp.functional.linear(x, weight)
    with pytest.raises(RuntimeError):
        sdgp.functional.conv2d(x, weight.view(4, 8, 1, 1))


def test_no_grad_forward_is_the_dense_function() -> None:
    with torch.no_grad():
        x, weight = torch.randn(3, 8), torch.randn(4, 8)
        assert torch.equal(sdgp.functional.linear(x, weight), F.linear(x, weight))


def test_meta_tensors() -> None:
    x, weight = (torch.randn(s, device="meta", requires_grad=True) for s in ((2, 8, 5, 5), (8, 8, 3, 3)))
    sdgp.functional.conv2d(x, weight).sum().backward()
    assert x.grad.shape == x.shape
    x, weight = (torch.randn(s, device="meta", requires_grad=True) for s in ((3, 4, 8), (6, 8)))
    sdgp.functional.linear(x, weight).sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_ops_compute_what_the_eager_backward_does(kind: str, frozen: int | None, fixed_seed: Tensor) -> None:
    """A recorded backward (create_graph) goes through the op, a plain one calls its implementation."""
    shapes = ((2, 5, 8), (8, 8), (8,)) if kind == "linear" else ((2, 8, 5, 5), (8, 8, 3, 3), (8,))
    inputs = require_grad(*map(torch.randn, shapes))
    if frozen is not None:
        inputs[frozen].requires_grad_(False)
    y = getattr(sdgp.functional, kind)(*inputs)
    dy, inputs = torch.randn_like(y), [tensor for tensor in inputs if tensor.requires_grad]
    plain = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    recorded = torch.autograd.grad(y, inputs, dy, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_opcheck(name: str) -> None:
    config = sdgp.SDGPConfig(prune="magnitude")
    if name == "linear":
        arguments = (torch.randn(3, 4, 8), torch.randn(3, 4, 6), torch.randn(8, 6), True, plan_string("linear", config))
        op = ops.linear_backward
    else:
        x, weight = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last), torch.randn(8, 8, 3, 3)
        arguments = (
            torch.randn(2, 8, 2, 2), x, weight, True, (), (2, 2, 0, 0, 1, 1, 1), True, plan_string("conv2d", config),
        )  # fmt: skip
        op = ops.conv2d_backward
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_cast_is_kept_again_when_the_last_one_is_gone() -> None:
    """Else each backward after the first step would cast every parameter a second time."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    cast = parameter.half()
    assert functional._kept(parameter, cast) is cast
    assert functional._kept(parameter, parameter.half()) is parameter
    del cast
    fresh = parameter.half()
    assert functional._kept(parameter, fresh) is fresh
