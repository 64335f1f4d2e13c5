"""accelerate_ and restore_ on real models, and everything around a model that must not notice the swap."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import sdgp_accel as sdgp
from sdgp_accel import backends, philox, tuning

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:device 'cpu' has no sparse tensor cores")

Build = Callable[[], tuple[nn.Module, Any]]


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


def resnet(name: str) -> Build:
    return lambda: (getattr(torchvision.models, name)(num_classes=10), image())


def vit() -> tuple[nn.Module, Any]:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    return model, image()


def gpt2() -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config), torch.randint(64, (2, 16))


MODELS: dict[str, tuple[Build, int, int]] = {  # build, layers swapped, layers listed
    "resnet18": (resnet("resnet18"), 20, 21),
    "resnet50": (resnet("resnet50"), 53, 54),
    "regnet_x_400mf": (resnet("regnet_x_400mf"), 71, 72),
    "vit": (vit, 9, 10),
    "gpt2": (gpt2, 1, 11),
}


def output(model: nn.Module, batch: Any) -> Tensor:
    result = model(batch)
    return result if isinstance(result, Tensor) else result.logits


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 8))


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", MODELS)
def test_real_models_swap_run_and_restore(name: str) -> None:
    torch.manual_seed(0)
    build, swapped, listed = MODELS[name]
    model, batch = build()
    model.train()
    before = classes(model)
    keys, parameters = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    dense = copy.deepcopy(model)

    report = sdgp.accelerate_(model)
    assert (len(report.swapped), len(report.layers)) == (swapped, listed)
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert model.training

    expected, got = output(dense, batch), output(model, batch)
    assert torch.equal(got, expected)
    got.square().mean().backward()
    expected.square().mean().backward()
    pruned = {layer.name for layer in report.swapped}
    for (parameter_name, parameter), reference in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.shape == reference.grad.shape
    weights = [f"{n}.weight" for n in pruned]
    assert any(not torch.equal(model.get_parameter(n).grad, dense.get_parameter(n).grad) for n in weights)

    sdgp.restore_(model)
    assert classes(model) == before
    assert not any("sdgp" in key for module in model.modules() for key in vars(module))
    model.zero_grad()
    dense.zero_grad()
    torch.manual_seed(1)
    output(model, batch).square().mean().backward()
    torch.manual_seed(1)
    output(dense, batch).square().mean().backward()
    for parameter, reference in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(parameter.grad, reference.grad)


def test_gpt2_report_names_conv1d() -> None:
    model, _ = gpt2()
    report = sdgp.accelerate_(model)
    conv1d = [layer for layer in report.skipped if layer.kind == "Conv1D"]
    assert len(conv1d) == 8
    assert conv1d[0].reason == "Conv1D is neither nn.Linear nor nn.Conv2d"
    assert report["lm_head"].swapped


def test_report_as_data_and_as_table() -> None:
    report = sdgp.accelerate_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, (3, 1), stride=2), nn.Linear(8, 4)))
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["swapped"], data["skipped"]) == (2, 1)
    first, second, _ = data["layers"]
    third = report.layers[2]
    assert first["reason"] == "3 input channels < min_in_channels = 4"
    assert second == {
        "name": "1",
        "kind": "Conv2d",
        "shape": "8→16 3x1 /2",
        "swapped": True,
        "dgrad": "mvue 2:4",
        "wgrad": "mvue 2:4",
        "backend": "reference",
        "reason": "device 'cpu' has no sparse tensor cores",
        "aliases": [],
        "times": None,
        "tilings": [],
    }
    assert third.shape == "8→4"
    text = str(report)
    assert "2 of 3 layers swapped" in text
    assert "min_in_channels" in text
    assert len(report) == 2
    with pytest.raises(KeyError):
        report["missing"]
    timed = tuple(dataclasses.replace(third, name=str(i), reason=f"dense is faster here: {i} ms") for i in range(9))
    assert "dense is faster here: 8 ms" in str(dataclasses.replace(report, layers=timed))


def test_the_table_names_layers_and_says_why_below_or_beside_them() -> None:
    shared = nn.Linear(8, 8)
    report = sdgp.accelerate_(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(2, 8)), sdgp.SDGPConfig(n=1))
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert "0, 2 Linear 8→8 mvue 1:4 reference 1" in lines
    assert "3 Linear 2→8 2" in lines
    assert "1: device 'cpu' has no sparse tensor cores" in lines
    assert "2: 2 input channels < min_in_channels = 4" in lines
    for count in (6, 7):
        layers = [dataclasses.replace(report.layers[0], reason=f"reason {index}") for index in range(count)]
        last = f"6: reason {count - 1}" in str(sdgp.SwapReport(tuple(layers)))
        assert last == (count == 6), "a few reasons are listed below, more stand beside their layers"


def test_shapes_are_told_in_words() -> None:
    layers = {
        nn.Conv2d(8, 16, (3, 1), stride=2): "8→16 3x1 /2",
        nn.Conv2d(8, 16, 3, stride=(2, 1), groups=2): "8→16 3x3 /2x1 groups 2",
        nn.Conv2d(8, 16, 1, stride=(1, 2)): "8→16 1x1 /1x2",
        nn.Embedding(8, 16): "8x16",
        nn.LazyLinear(8): "0→8",
        nn.Bilinear(3, 4, 5): "5x3x4",
        nn.LazyConvTranspose2d(8, 3): "0→8 3x3",
    }
    report = sdgp.accelerate_(nn.Sequential(nn.Linear(8, 8), *layers))
    assert [layer.shape for layer in report.layers[1:]] == list(layers.values())


def test_swap_keeps_hooks_flags_dtype_and_memory_format() -> None:
    model = small_model().to(torch.float64).to(memory_format=torch.channels_last).eval()
    model[0].weight.requires_grad_(False)
    calls: list[str] = []
    model[0].register_forward_hook(lambda *a: calls.append("forward"))
    model[4].register_full_backward_hook(lambda *a: calls.append("backward"))
    weight = model[0].weight
    sdgp.accelerate_(model)
    assert model[0].weight is weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.dtype == torch.float64
    assert not model[0].training
    assert not weight.requires_grad
    model(torch.randn(2, 4, 4, 4).double()).sum().backward()
    assert calls == ["forward", "backward"]
    assert weight.grad is None


def test_idempotent_and_reconfigurable() -> None:
    model = small_model()
    first = sdgp.accelerate_(model)
    assert sdgp.accelerate_(model) == first
    second = sdgp.accelerate_(model, sdgp.SDGPConfig(prune="magnitude", grad_weight="dense"))
    assert (second["0"].dgrad, second["0"].wgrad) == ("magnitude 2:4", "dense")
    assert "sdgp=2:4 magnitude/dense" in repr(model[0])
    # what the new configuration excludes goes back to an ordinary layer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = sdgp.accelerate_(model, sdgp.SDGPConfig(min_in_channels=8))
    assert type(model[0]) is nn.Conv2d
    assert not report["0"].swapped
    assert type(model[4]) is sdgp.SDGPLinear


def test_filters() -> None:
    model = nn.ModuleDict({"body": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), "head": nn.Linear(8, 4)})
    sdgp.accelerate_(model, filter_fn="body.*")
    assert type(model["head"]) is nn.Linear
    report = sdgp.accelerate_(model, sdgp.SDGPConfig(n=1), filter_fn=["head", "body.1"])
    assert report["body.0"].dgrad == "mvue 2:4"  # keeps the configuration of the first call
    assert "not selected" in report["body.0"].reason
    assert report["body.1"].dgrad == report["head"].dgrad == "mvue 1:4"
    sdgp.restore_(model)
    sdgp.accelerate_(model, filter_fn=lambda module, name: module.out_features == 4)
    assert [type(m) is sdgp.SDGPLinear for m in (*model["body"], model["head"])] == [False, False, False, True]


def test_shared_modules_are_one_layer_with_two_names() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = sdgp.accelerate_(model, filter_fn="2")
    assert (len(report.layers), report.layers[0].name, report.layers[0].aliases) == (1, "0", ("2",))
    assert report["2"] is report["0"]
    assert type(shared) is sdgp.SDGPLinear


def test_the_model_itself_may_be_a_layer() -> None:
    layer = nn.Linear(8, 8)
    assert sdgp.accelerate_(layer)[""].swapped
    assert type(sdgp.restore_(layer)) is nn.Linear


def with_forward(module: nn.Module) -> nn.Module:
    """With a forward of its own, as hooks of Hugging Face's Accelerate leave a module."""
    inner = module.forward
    module.forward = lambda *arguments: inner(*arguments)  # type: ignore[method-assign]
    return module


def without_weight(module: nn.Module) -> nn.Module:
    module.weight = None
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ConvTranspose2d(8, 8, 3), "transposed convolutions are not supported"),
        (nn.Conv1d(8, 8, 3), "Conv1d is neither nn.Linear nor nn.Conv2d"),
        (nn.Embedding(8, 8), "an embedding has no GEMM in its backward"),
        (nn.LazyLinear(8), "its parameters are not initialized yet: run one batch first"),
        (with_forward(nn.Linear(8, 8)), "its forward was replaced (by a hook of another library?)"),
        (without_weight(nn.Linear(8, 8)), "it has no weight"),
        (nn.Linear(8, 8, dtype=torch.complex64), "its weight is torch.complex64, not real floating point"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "parametrized: its class belongs"),
        (nn.LSTM(8, 8), "LSTM is neither nn.Linear nor nn.Conv2d"),
        (nn.Bilinear(8, 8, 8), "Bilinear is neither nn.Linear nor nn.Conv2d"),
        (timm.layers.Conv2dSame(8, 8, 3), "Conv2dSame is a subclass of nn.Conv2d and may compute something else"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_cannot_be_swapped_says_why(module: nn.Module, reason: str) -> None:
    kind = type(module)
    with pytest.warns(UserWarning, match="no layer to swap"):
        report = sdgp.accelerate_(nn.Sequential(module))
    assert report["0"].reason.startswith(reason)
    assert type(module) is kind


def test_a_layer_whose_forward_was_replaced_since_cannot_be_restored() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sdgp.accelerate_(model)
    with_forward(model[1])
    assert sdgp.accelerate_(model)["1"].swapped
    with pytest.raises(RuntimeError, match=r"its forward was replaced .* set_active_\(model, False\)"):
        sdgp.restore_(model)
    assert all(type(layer) is sdgp.SDGPLinear for layer in model)
    model(torch.randn(4, 8)).sum().backward()


def test_layers_take_their_arguments_as_torchs_own_do() -> None:
    linear = nn.utils.skip_init(sdgp.SDGPLinear, 8, 4, bias=False, config=sdgp.SDGPConfig(m=8))
    assert (linear.weight.shape, linear.bias, linear.sdgp_config.m) == ((4, 8), None, 8)
    conv = nn.utils.skip_init(sdgp.SDGPConv2d, 8, 4, 3, 2, 1, 2, 4, False, "reflect", dtype=torch.bfloat16)
    assert str(conv).startswith("SDGP" + str(nn.Conv2d(8, 4, 3, 2, 1, 2, 4, False, "reflect"))[:-1])
    assert conv.weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="sdgp_active must be True or False; got 'no'"):
        conv.sdgp_active = "no"


def test_multihead_attention_is_left_alone() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = sdgp.accelerate_(model)
    assert "without calling the layer" in report["self_attn.out_proj"].reason
    assert report["self_attn"].reason == "MultiheadAttention is neither nn.Linear nor nn.Conv2d"
    assert report["linear1"].swapped
    model(torch.randn(2, 4, 8)).sum().backward()


def test_weight_norm_by_hooks_still_works() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(8, 8))
    assert sdgp.accelerate_(layer)[""].swapped
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight_g.grad is not None


def test_model_without_layers_warns_and_reports_nothing() -> None:
    with pytest.warns(UserWarning, match="no layer to swap"):
        report = sdgp.accelerate_(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    assert report.layers == ()
    assert report, "none is not no report"
    assert "0 of 0" in str(report)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("resnet",), TypeError, "model must be a torch.nn.Module; got str"),
        ((nn.Linear(4, 4), "mvue"), TypeError, "config must be an SDGPConfig or None; got str"),
        ((nn.Linear(4, 4), None, 3), TypeError, "filter_fn must be a callable .* got 3"),
        ((nn.Linear(4, 4), None, nn.Linear), TypeError, "filter_fn must be a callable .* got <class .*Linear"),
        ((nn.Linear(4, 4), None, [1]), TypeError, r"filter_fn must be a callable .* got \[1\]"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sdgp.accelerate_(*arguments)
    if len(arguments) == 1:
        with pytest.raises(error, match=message):
            sdgp.restore_(*arguments)


def test_all_or_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

    def fails_late(module: nn.Module, name: str) -> bool:
        if name == "2":
            raise LookupError("late")
        return True

    with pytest.raises(LookupError):
        sdgp.accelerate_(model, filter_fn=fails_late)
    assert all(type(m) is nn.Linear for m in model)
    with pytest.raises(RuntimeError, match=r"backend='cutlass' needs a CUDA device"):
        sdgp.accelerate_(model, sdgp.SDGPConfig(backend="cutlass"))
    assert all(type(m) is nn.Linear for m in model)


@pytest.mark.parametrize("config", [{}, {"prune": "rescale_magnitude", "scope": "sample_channel"}], ids=str)
def test_a_warning_made_an_error_leaves_nothing_half_swapped(config: dict[str, Any], nothing_decided: None) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if config:
            warnings.filterwarnings("ignore", "device 'cpu' has no sparse tensor cores")
        with pytest.raises(UserWarning, match="2-D input" if config else "nothing is accelerated here"):
            sdgp.accelerate_(model, sdgp.SDGPConfig(**config))
    assert [type(m) for m in model] == [nn.Conv2d, nn.Linear]
    assert not any("sdgp" in key for m in model for key in vars(m))


def test_a_warning_made_an_error_restores_no_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sdgp.accelerate_(model, sdgp.SDGPConfig(backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="found no layer to swap"):
            sdgp.accelerate_(model, sdgp.SDGPConfig(grad_input="dense", grad_weight="dense"))
    assert isinstance(model[0], sdgp.SDGPLinear)


@pytest.mark.parametrize("construct", ["layer", "accelerate_"])
def test_linear_with_sample_channel_scope_warns_once_at_construction(construct: str, nothing_decided: None) -> None:
    config = sdgp.SDGPConfig(prune="rescale_magnitude", scope="sample_channel", backend="reference")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="2-D input") as caught:
        _ = sdgp.accelerate_(model, config) if construct == "accelerate_" else sdgp.SDGPLinear(8, 8, config=config)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 8)).sum().backward()


def test_layers_built_directly_are_ordinary_modules() -> None:
    torch.manual_seed(0)
    linear = sdgp.SDGPLinear(8, 4, bias=False, dtype=torch.float64, config=sdgp.SDGPConfig(n=1))
    torch.manual_seed(0)
    plain = nn.Linear(8, 4, bias=False, dtype=torch.float64)
    assert torch.equal(linear.weight, plain.weight)
    plain.load_state_dict(linear.state_dict())
    conv = sdgp.SDGPConv2d(4, 8, 3, padding="same", padding_mode="circular")
    assert conv.sdgp_config == sdgp.SDGPConfig()
    conv.sdgp_config = sdgp.SDGPConfig(grad_weight="dense")
    assert conv.extra_repr().endswith("sdgp=2:4 mvue/dense")


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", ["same", 2, (0, 1)])
def test_padding_modes_match_the_dense_layer(padding: Any, padding_mode: str) -> None:
    dense = nn.Conv2d(4, 8, (3, 4), padding=padding, padding_mode=padding_mode).double()
    layer = copy.deepcopy(dense)
    sdgp.accelerate_(layer, sdgp.SDGPConfig(prune="magnitude"))
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    y = layer(x.requires_grad_())
    assert torch.equal(y, dense(x))
    n, c, p, q = y.shape
    mask = ((torch.arange(n * p * q)[:, None] + torch.arange(c)) % 2).view(n, p, q, c).permute(0, 3, 1, 2)
    dy = torch.randn_like(y) * mask  # 2:4 already: both passes are the dense ones
    got = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    expected = torch.autograd.grad(dense(x), [x, *dense.parameters()], dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(2, 1, 1), ([2, 1], [1, 1], [1, 2]), ((2,), (1,), (1,))])
def test_a_layers_window_may_be_assigned_as_torch_takes_it(
    stride: Any, padding: Any, dilation: Any, padding_mode: str
) -> None:
    """As code does that turns a classifier into a backbone for dense predictions."""
    dense = nn.Conv2d(4, 8, 3, padding=1, padding_mode=padding_mode)
    dense.stride, dense.padding, dense.dilation = stride, padding, dilation
    layer = copy.deepcopy(dense)
    report = sdgp.accelerate_(layer, sdgp.SDGPConfig(grad_input="dense"))
    assert report.swapped[0].shape.startswith("4→8 3x3 /2")
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    assert torch.equal(layer(x), dense(x))
    got, expected = (torch.autograd.grad(module(x).sum(), x) for module in (layer, dense))
    torch.testing.assert_close(got, expected)
    assert len(sdgp.tune(layer, x.detach()).swapped) == 1


def test_a_users_subclass_keeps_its_class() -> None:
    class Scaled(sdgp.SDGPLinear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Scaled(8, 8)
    report = sdgp.accelerate_(layer, sdgp.SDGPConfig(n=1))
    assert report[""].dgrad == "mvue 1:4"
    assert type(layer) is Scaled
    for undo in (sdgp.restore_, lambda layer: sdgp.accelerate_(layer, sdgp.SDGPConfig(min_in_channels=9))):
        with pytest.raises(RuntimeError, match="Scaled cannot become an ordinary layer again"):
            undo(layer)


def test_a_wrong_configuration_is_refused_and_changes_nothing() -> None:
    layer = sdgp.SDGPLinear(8, 8)
    with pytest.raises(TypeError, match="config must be an SDGPConfig; got 'mvue'"):
        layer.sdgp_config = "mvue"
    assert layer.sdgp_config == sdgp.SDGPConfig()


def test_deepcopy_pickle_and_ema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "draw", lambda device, generator=None: torch.tensor([5, 6]))
    model = small_model()
    sdgp.accelerate_(model, sdgp.SDGPConfig(n=1))
    batch = torch.randn(2, 4, 4, 4)

    def gradients(m: nn.Module) -> list[Tensor]:
        m.zero_grad()
        m(batch).square().sum().backward()
        return [p.grad.clone() for p in m.parameters()]

    expected = gradients(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(twin) == classes(model)
        assert twin[0].sdgp_config == model[0].sdgp_config
        assert all(torch.equal(a, b) for a, b in zip(gradients(twin), expected, strict=True))
        sdgp.restore_(twin)
        assert type(twin[0]) is nn.Conv2d
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    assert type(average.module[0]) is sdgp.SDGPConv2d
    assert torch.equal(average(batch), average.module(batch))
    dense = small_model()
    dense.load_state_dict(model.state_dict())


def test_optimizer_and_checkpoints_stay_valid_across_the_swap() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sdgp.accelerate_(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(2, 4, 4, 4)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_after_moving_to_another_dtype_the_plan_is_decided_anew() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sdgp.accelerate_(model)
    model.to(torch.bfloat16)
    model(torch.randn(2, 8, dtype=torch.bfloat16)).sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


class FakeKernels:
    """Kernels on a pretended GPU: Linear layers with even features in 16 bits, computed by the reference."""

    name = "cutlass"

    def __init__(self, unavailable: str | None = None) -> None:
        self._unavailable = unavailable
        self._reference = backends.load("reference")

    def unavailable(self, device: torch.device) -> str | None:
        return self._unavailable

    def unsupported(self, geometry: Any, plan: Any, dtype: torch.dtype, device: torch.device) -> str | None:
        if dtype not in (torch.float16, torch.bfloat16):
            return f"dtype {dtype} is not float16 or bfloat16"
        return "grouped" if geometry.groups > 1 else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reference, name)


@pytest.fixture
def nothing_decided() -> Iterator[None]:
    """No decision is cached and no warning has been given, before and after."""
    backends.forget_decisions()
    yield
    backends.forget_decisions()


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, nothing_decided: None) -> Callable[[Any], None]:
    def install(kernels: Any) -> None:
        load = backends.load
        monkeypatch.setattr(backends, "_no_sparse_tensor_cores", lambda device: None)
        monkeypatch.setattr(backends, "load", lambda name: kernels if name == "cutlass" else load(name))

    return install


def test_kernels_are_used_where_they_fit_and_dense_where_not(pretend_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(FakeKernels())
    monkeypatch.setattr(tuning, "tune_shape", lambda *arguments: tuning.Tuned((True, True), "measured"))
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3, groups=2)).to(torch.bfloat16)
    report = sdgp.accelerate_(model, sdgp.SDGPConfig(backend="cutlass"))
    assert [layer.backend for layer in report.layers] == ["cutlass", "dense"]
    assert report["1"].reason == "grouped"
    assert (report["1"].dgrad, report["1"].wgrad) == ("dense", "dense")
    (tuned,) = sdgp.tune(model[1], torch.randn(1, 8, 4, 4, dtype=torch.bfloat16)).layers
    assert (tuned.dgrad, tuned.wgrad, tuned.backend, tuned.reason) == ("dense", "dense", "dense", "grouped")
    y = model[1](torch.randn(1, 8, 4, 4, dtype=torch.bfloat16))
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"  # exactly the dense path
    y = model[0](torch.randn(4, 8, dtype=torch.bfloat16))
    assert "_Linear" in type(y.grad_fn).__name__


def test_tune_reports_what_each_layer_will_run(pretend_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(FakeKernels())
    times = iter([("sparse", "dense"), ("dense", "dense")])

    def tuned(*arguments: Any) -> tuning.Tuned:
        dgrad, _ = next(times)
        parts = tuning.BackwardTimes(2.0, 3.0, sparse_dgrad=1.0, compress_dgrad=0.25)
        return tuning.Tuned((dgrad == "sparse", False), "measured", times=parts)

    monkeypatch.setattr(tuning, "tune_shape", tuned)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Linear(16, 4)).to(torch.bfloat16)
    report = sdgp.accelerate_(model, filter_fn=["0", "2"])
    assert {layer.reason for layer in report.swapped} == {"measured against dense at the first use of a shape"}
    state = copy.deepcopy(model.state_dict())
    report = sdgp.tune(model, torch.randn(4, 8, dtype=torch.bfloat16))
    assert [(layer.dgrad, layer.wgrad, layer.backend) for layer in report.layers] == [
        ("mvue 2:4", "dense", "cutlass"),
        ("dense", "dense", "dense"),
        ("dense", "dense", "dense"),
    ]
    assert report["0"].reason == "measured"
    assert report["0"].times.sparse_dgrad == 1.0
    row = next(line for line in str(report).splitlines() if line.startswith(" 0 "))
    assert row.split()[-5:] == ["2.000→1.000", "3.000", "0.250", "5.000→4.250", "1"]
    times = tuning.BackwardTimes(2.0, 3.0, 1.0, 1.5, compress_both=0.25, compress_dgrad=0.2, compress_wgrad=0.1)
    both = dataclasses.replace(report["0"], wgrad="mvue 2:4", times=times)
    row = next(line for line in str(sdgp.SwapReport((both,))).splitlines() if line.startswith(" 0 "))
    assert row.split()[-5:] == ["2.000→1.000", "3.000→1.500", "0.250", "5.000→2.750", "1"]
    assert report.to_dict()["layers"][0]["times"]["dense_wgrad"] == 3.0
    assert not report["3"].swapped
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    model(torch.randn(4, 8, dtype=torch.bfloat16)).sum().backward()  # decided already: `times` is used up
    assert not model[0]._forward_hooks


def test_tune_decides_for_a_model_before_it_is_swapped(pretend_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(FakeKernels())
    monkeypatch.setattr(tuning, "tune_shape", lambda *arguments: tuning.Tuned((True, False), "measured"))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    report = sdgp.tune(model, x, sdgp.SDGPConfig(prune="magnitude"))
    assert [(layer.dgrad, layer.wgrad) for layer in report.layers] == [("magnitude 2:4", "dense")] * 2
    assert {type(module) for module in model} == {nn.Linear}
    decided = backends.decide_linear.cache_info().currsize
    sdgp.accelerate_(model, sdgp.SDGPConfig(prune="magnitude"))
    model(x).sum().backward()
    assert backends.decide_linear.cache_info().currsize == decided == 2


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_tune_covers_every_kind_of_padding(autocast: torch.dtype | None) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(8 * 4, 4),
    )  # fmt: skip
    sdgp.accelerate_(model, sdgp.SDGPConfig(backend="reference"))
    backends.forget_decisions()
    sdgp.tune(model, torch.randn(2, 4, 6, 6), autocast=autocast)
    decided = backends.decide_conv2d.cache_info().currsize + backends.decide_linear.cache_info().currsize
    assert decided == 4
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        model(torch.randn(2, 4, 6, 6))
    after = backends.decide_conv2d.cache_info().currsize + backends.decide_linear.cache_info().currsize
    assert after == 4  # the layers ask for exactly what was decided


@pytest.mark.parametrize("autocast", ["bf16", torch.float32, True])
def test_tune_names_an_autocast_that_is_none(autocast: object) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"autocast must be None, torch\.bfloat16 or torch\.float16; got "):
        sdgp.tune(model, torch.randn(4, 8), autocast=autocast)  # type: ignore[arg-type]


def test_fallback_modes(pretend_gpu: Any) -> None:
    pretend_gpu(FakeKernels())
    model = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16), nn.Linear(8, 8))
    report = sdgp.accelerate_(model, sdgp.SDGPConfig(fallback="emulate"))
    assert [layer.backend for layer in report.layers] == ["cutlass", "reference"]
    model = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16), nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match=r"fallback='error' and dtype torch.float32 is not float16 or bfloat16"):
        sdgp.accelerate_(model, sdgp.SDGPConfig(fallback="error"))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "kernels", [None, FakeKernels("built for sm_80 only; rebuild with: SDGP_CUDA=1 pip install .")]
)
def test_missing_kernels_fall_back_to_dense_with_one_warning(kernels: Any, pretend_gpu: Any) -> None:
    pretend_gpu(kernels)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="SDGP_CUDA=1 pip install") as caught:
        report = sdgp.accelerate_(model)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 8, dtype=torch.bfloat16)).sum().backward()
    assert {layer.backend for layer in report.layers} == {"dense"}


def test_cpu_warns_once_that_nothing_is_accelerated(nothing_decided: None) -> None:
    model = small_model()
    with pytest.warns(UserWarning, match="nothing is accelerated here") as caught:
        sdgp.accelerate_(model)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4, 4, 4)).sum().backward()
        backends.forget_decisions()
        sdgp.accelerate_(small_model(), sdgp.SDGPConfig(backend="reference"))


# --- switched off ------------------------------------------------------------------------------------------------

MAGNITUDE = sdgp.SDGPConfig(prune="magnitude", backend="reference")


def weight_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_switched_off_runs_the_dense_backward_and_switched_on_prunes_again() -> None:
    model = small_model()
    x = torch.randn(3, 4, 4, 4)
    dense = weight_gradients(model, x)
    sdgp.accelerate_(model, MAGNITUDE)
    sparse = weight_gradients(model, x)
    assert not all(torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))
    for _ in range(2):
        assert sdgp.set_active_(model, False) is model
        assert all(torch.equal(a, b) for a, b in zip(weight_gradients(model, x), dense, strict=True))
        assert type(model[0](x).grad_fn).__name__ == "ConvolutionBackward0"
        assert type(model[4](torch.randn(2, 32)).grad_fn).__name__ == "AddmmBackward0"
        assert "(inactive)" in repr(model[0])
        sdgp.set_active_(model, True)
        assert all(torch.equal(a, b) for a, b in zip(weight_gradients(model, x), sparse, strict=True))
        assert "(inactive)" not in repr(model[0])


def test_the_switch_is_kept_by_everything_but_restore() -> None:
    model = small_model()
    sdgp.accelerate_(model, MAGNITUDE)
    plan = model[0]._sdgp_plan
    keys = list(model.state_dict())
    sdgp.set_active_(model, False)
    assert list(model.state_dict()) == keys
    x = torch.randn(2, 4, 4, 4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other[0].sdgp_active
        assert type(other[0](x).grad_fn).__name__ == "ConvolutionBackward0"
        assert sdgp.set_active_(other, True)[0]._sdgp_plan == plan
    report = sdgp.accelerate_(model, MAGNITUDE)
    assert not model[0].sdgp_active
    assert report["0"].backend == "dense"
    assert "switched off by set_active_" in report["0"].reason
    sdgp.tune(model, x)
    sdgp.validate(model, x, draws=0)
    model[4].sdgp_config = sdgp.SDGPConfig(prune="magnitude", n=1, backend="reference")
    assert not any(model[index].sdgp_active for index in (0, 4))
    assert type(model[0](x).grad_fn).__name__ == "ConvolutionBackward0"
    assert type(model[4](torch.randn(2, 32)).grad_fn).__name__ == "AddmmBackward0"
    sdgp.restore_(model)
    assert not any("sdgp" in key for module in model.modules() for key in vars(module))
    sdgp.accelerate_(model, MAGNITUDE)
    assert model[0].sdgp_active


def test_tune_says_of_a_switched_off_layer_what_it_runs_when_it_is_on() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sdgp.accelerate_(model, sdgp.SDGPConfig(backend="reference"))
    model[0].sdgp_active = False
    off, on = sdgp.tune(model, torch.randn(4, 8)).layers
    assert (off.dgrad, off.backend) == (on.dgrad, on.backend) == ("mvue 2:4", "reference")
    assert off.reason == f"{on.reason}; switched off by set_active_, and dense until it is on again"


def test_switching_what_cannot_be_switched() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got int"):
        sdgp.set_active_(3, True)
    with pytest.raises(TypeError, match="active must be True or False; got 1"):
        sdgp.set_active_(small_model(), 1)
    with pytest.warns(UserWarning, match="found no SDGP layer"):
        sdgp.set_active_(small_model(), False)


def test_a_switched_off_layer_draws_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sdgp.accelerate_(model, sdgp.SDGPConfig(prune="mvue", backend="reference"))
    sdgp.set_active_(model, False)
    state = torch.random.get_rng_state()
    model(torch.randn(2, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), state)
