"""validate: it passes what is right, names what is wrong, and leaves the model as it found it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sdgp_accel as sdgp
from sdgp_accel import philox, validation
from sdgp_accel.backends import reference
from sdgp_accel.cli import main
from sdgp_accel.pruning import prune_matrix
from sdgp_accel.validation_report import Bias

pytestmark = pytest.mark.filterwarnings("ignore:device 'cpu' has no sparse tensor cores")

CONV_LAYERS: dict[str, nn.Module] = {
    "same": nn.Conv2d(8, 12, (4, 3), padding="same"),
    "circular": nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
    "stride-dilation": nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2),
    "depthwise": nn.Conv2d(8, 16, 3, groups=8),
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(8 * 9, 16), nn.GELU(), nn.Linear(16, 5),
    )  # fmt: skip


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 3, 9, 9), torch.randint(5, (size,))


def by_pass(report: Any) -> dict[tuple[str, str], Any]:
    return {(check.layer, check.pass_name): check for check in report.checks}


@pytest.mark.parametrize("function", ["magnitude", "random", "rescale_magnitude", "mvue"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_reference_backend_passes(function: str, autocast: torch.dtype | None) -> None:
    report = sdgp.validate(model(), batch(), sdgp.SDGPConfig(prune=function), autocast=autocast)
    assert report.ok, str(report)
    checks = by_pass(report)
    assert set(checks) == {(name, p) for name in ("3", "6", "8") for p in ("dgrad", "wgrad")}
    assert checks["3", "dgrad"].terms == 8 * 9
    assert checks["3", "wgrad"].terms == 8 * 3 * 3
    assert checks["6", "wgrad"].terms == 8
    for check in report.checks:
        assert 0.3 < check.cosine < 1.0
        assert (check.bias is not None) == (function == "mvue")
        assert (check.end_to_end_cosine is not None) == (check.pass_name == "wgrad")
    assert report.swap["0"].reason.startswith("3 input channels")


@pytest.mark.parametrize("layer", CONV_LAYERS.values(), ids=CONV_LAYERS)
def test_convolutions_are_checked_with_their_own_padding(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), copy.deepcopy(layer))
    report = sdgp.validate(net, torch.randn(2, 3, 10, 11), sdgp.SDGPConfig(prune="rescale_magnitude"))
    assert report.ok, str(report)
    assert {check.layer for check in report.checks} == {"1"}


def test_float64_and_sequences_and_shared_layers() -> None:
    shared = nn.Linear(8, 8)
    net = nn.Sequential(shared, nn.GELU(), shared).double()
    report = sdgp.validate(net, torch.randn(2, 6, 8, dtype=torch.float64))
    assert report.ok, str(report)
    assert {check.layer for check in report.checks} == {"0", "0 (call 2)"}
    assert max(check.error for check in report.checks) < 1e-14


def test_layers_whose_output_is_changed_in_place_are_checked() -> None:
    """For inputs of three dimensions that output is a view, whose own node leaves the graph."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8, bias=False), nn.ReLU(inplace=True))
    torch.manual_seed(0)
    report = sdgp.validate(net, torch.randn(2, 3, 8))
    assert report.ok, str(report)
    assert set(by_pass(report)) == {("0", "wgrad"), ("2", "dgrad"), ("2", "wgrad")}


def test_compiled_models_are_checked_eagerly() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    sdgp.accelerate_(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    x = torch.randn(4, 8)
    compiled(x).sum().backward()
    report = sdgp.validate(compiled, x)
    assert report.ok, str(report)
    assert len(report.checks) == 3
    assert len(sdgp.tune(compiled, x)) == 2
    compiled(x).sum().backward()
    assert counter.frame_count == 1


def test_dense_passes_and_frozen_weights() -> None:
    net = model()
    net[6].weight.requires_grad_(False)
    report = sdgp.validate(net, batch(), sdgp.SDGPConfig(grad_weight="dense"), filter_fn="[36]")
    checks = by_pass(report)
    assert set(checks) == {("3", "dgrad"), ("3", "wgrad"), ("6", "dgrad")}
    assert (checks["3", "wgrad"].prune, checks["3", "dgrad"].prune) == ("dense", "mvue 2:4")
    assert checks["3", "wgrad"].cosine == pytest.approx(1.0)


@pytest.mark.parametrize("pass_name", ["dgrad", "wgrad"])
def test_a_backend_that_is_slightly_wrong_fails(pass_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(reference.ReferenceBackend, pass_name)

    def wrong(*arguments: Any) -> Tensor:
        return right(*arguments) * (1 + 3e-4)

    monkeypatch.setattr(reference.ReferenceBackend, pass_name, wrong)
    report = sdgp.validate(model(), batch(), sdgp.SDGPConfig(prune="magnitude"))
    assert not report.ok
    assert {check.pass_name for check in report.failures} == {pass_name}
    assert "FAILED" in str(report)


def test_a_backend_that_drops_one_value_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.ReferenceBackend.prune_compress

    def wrong(self: Any, dy2d: Tensor, *arguments: Any) -> Any:
        operands = right(self, dy2d, *arguments)
        for operand in (operand for operand in operands[:2] if operand is not None):
            operand.view(-1)[operand.abs().argmax()] = 0
        return operands

    monkeypatch.setattr(reference.ReferenceBackend, "prune_compress", wrong)
    report = sdgp.validate(model(), batch(), sdgp.SDGPConfig(prune="rescale_magnitude"))
    assert len(report.failures) == len(report.checks) == 6


def test_a_biased_estimate_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(matrix: Tensor, spec: Any, axis: int, positions: int, rng: Any) -> Tensor:
        return prune_matrix(matrix, spec, axis, positions, rng) * 1.2

    monkeypatch.setattr(validation, "prune_matrix", biased)
    report = sdgp.validate(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(64, 64), draws=64)
    assert any(not check.bias.within_noise for check in report.checks)
    check = replace(report.checks[0], error=0.0, bias=Bias(0.2, 0.01, 64))
    assert check.problem == "bias +20.00 % in 64 draws, with a standard error of 1.00 %"


def test_non_finite_gradients_fail_and_non_finite_losses_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the loss of batch must be finite .* got (inf|nan)"):
        sdgp.validate(
            nn.Sequential(nn.Linear(4, 4)), torch.full((2, 4), float("inf")), loss_fn=lambda y, _: y.sum().abs()
        )
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    report = sdgp.validate(
        net, torch.randn(2, 4), loss_fn=lambda y, _: (y * 0).sqrt().sum()
    )  # d sqrt(0) = inf, * 0 = NaN
    assert not report.ok
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.Conv2d(3, 4, 1))])
def test_nothing_to_check_warns(model: nn.Module) -> None:
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="no backward pass to check"):
        report = sdgp.validate(model, torch.randn(1, 3, 4, 4, requires_grad=True))
    assert report.checks == ()


def test_the_model_is_left_as_it_was() -> None:
    net = model()
    sdgp.accelerate_(net, sdgp.SDGPConfig(prune="magnitude"), filter_fn="3")
    net[6].weight.grad = torch.ones_like(net[6].weight)
    state = copy.deepcopy(net.state_dict())
    types, config, gradient = [type(m) for m in net], net[3].sdgp_config, net[6].weight.grad
    examples, random_state = batch(), torch.get_rng_state()

    report = sdgp.validate(net, examples)  # no configuration: the layer's own
    assert {(check.layer, check.prune) for check in report.checks} == {("3", "magnitude 2:4")}
    sdgp.validate(net, examples, sdgp.SDGPConfig())
    with pytest.raises(ZeroDivisionError):
        sdgp.validate(net, examples, loss_fn=lambda output, targets: 1 / 0)

    assert [type(m) for m in net] == types
    assert net[3].sdgp_config is config
    assert net[6].weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert net[0].weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not net[3]._forward_hooks


class Buffers(nn.Module):
    """Assigns one buffer anew, and has two that cannot be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("expanded", torch.ones(1).expand(8))
        with torch.inference_mode():
            self.register_buffer("constant", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + x.mean(0)
        return self.layer(x - self.expanded - self.constant)


def test_buffers_are_left_as_they_were_however_they_are_kept() -> None:
    net = Buffers()
    before = dict(net.named_buffers())
    assert sdgp.validate(net, torch.randn(4, 8)).ok
    assert all(buffer is before[name] for name, buffer in net.named_buffers())
    assert torch.equal(net.mean, torch.zeros(8))


class Scaled(sdgp.SDGPLinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(sdgp.SDGPLinear(8, 8))


@pytest.mark.parametrize("layer", [parametrized, lambda: Scaled(8, 8)], ids=["parametrized", "subclass"])
@pytest.mark.filterwarnings("error:The .grad attribute of a Tensor that is not a leaf")
def test_classes_derived_from_an_sdgp_layer_are_checked(layer: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), layer())
    sdgp.accelerate_(net, sdgp.SDGPConfig(prune="magnitude"))
    kind = type(net[1])
    for active in (True, False):
        sdgp.set_active_(net, active)
        report = sdgp.validate(net, torch.randn(4, 8))
        assert report.ok, str(report)
        assert {(check.layer, check.prune) for check in report.checks} == {
            ("0", "magnitude 2:4"),
            ("1", "magnitude 2:4"),
        }
        assert by_pass(report)["0", "wgrad"].end_to_end_cosine < 0.999  # a dense and a pruned pass were compared
        assert type(net[1]) is kind
        assert net[1].sdgp_active is active


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on CPUs")
def test_layers_that_fully_shard_has_wrapped_are_checked() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
        sdgp.accelerate_(net)
        for unit in (net[1], net[2]):
            fully_shard(unit, mesh=init_device_mesh("cpu", (1,)))
        report = sdgp.validate(net, torch.randn(4, 8), draws=0)
        assert report.ok, str(report)
        passes = [("0", "wgrad"), ("1", "dgrad"), ("1", "wgrad"), ("2.0", "dgrad"), ("2.0", "wgrad")]
        assert set(by_pass(report)) == set(passes)
        assert report.swap["1"].kind == "Linear"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("error:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_weight_that_hooks_compute_has_no_gradient_to_ask_for() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.utils.weight_norm(nn.Linear(8, 8)))
    checks = by_pass(sdgp.validate(net, torch.randn(4, 8), draws=0))
    assert checks["0", "wgrad"].end_to_end_cosine is not None
    assert checks["1", "wgrad"].end_to_end_cosine is None


def test_sdgp_layers_that_the_configuration_leaves_out_are_dense() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)), torch.randn(64, 8)
    config = sdgp.SDGPConfig(prune="magnitude")  # leaves out layers with 2 channels
    expected = sdgp.validate(net, x, config).checks
    sdgp.accelerate_(net, replace(config, min_in_channels=1))
    assert sdgp.validate(net, x, config).checks == expected


def test_the_report_of_an_accelerated_model_is_of_its_own_configurations() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    sdgp.accelerate_(net, sdgp.SDGPConfig(prune="magnitude", min_in_channels=1), filter_fn=["0", "1"])
    swap = sdgp.validate(net, torch.randn(4, 2), draws=0).swap
    assert [(layer.swapped, layer.dgrad) for layer in swap.layers] == [(True, "magnitude 2:4")] * 2 + [(False, "dense")]
    assert "not selected" not in swap["0"].reason
    with pytest.raises(TypeError, match="filter_fn must be a callable"):
        sdgp.validate(net, torch.randn(4, 2), filter_fn=5)
    assert swap["2"].reason == "not an SDGP layer: accelerate_ has not swapped it"


def test_an_optimizer_that_steps_within_the_backward_does_not_train() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sgd = torch.optim.SGD(net[0].parameters(), lr=1.0)
    order: list[str] = []
    for name, parameter in net[0].named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: order.append(name))
        parameter.register_post_accumulate_grad_hook(lambda _: sgd.step())
    state = copy.deepcopy(net.state_dict())
    x = torch.randn(4, 8)
    assert sdgp.validate(net, x, draws=0).ok
    with pytest.raises(ZeroDivisionError):
        sdgp.validate(net, x, loss_fn=lambda output, targets: 1 / 0)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert order == []
    net(x).sum().backward()  # and the next backward trains again
    assert sorted(order) == ["bias", "weight"]
    assert not torch.equal(net[0].weight, state["0.weight"])


def test_bias_has_the_predicted_noise() -> None:
    """The standard error is an upper bound, and within a small factor of what repeated estimates show."""
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    x = torch.randn(64, 32)
    biases = [by_pass(sdgp.validate(net, x, draws=4, seed=seed))["1", "dgrad"].bias for seed in range(12)]
    spread = torch.tensor([bias.value for bias in biases]).std()
    assert 0.2 * biases[0].standard_error < spread < 1.5 * biases[0].standard_error


def scaled(scale: float) -> Any:
    return lambda y, _: (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() * scale


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30])
def test_gradients_of_any_size_are_judged_alike(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where their squares or their norms overflow, or vanish, in float32."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(64, 32)
    report = sdgp.validate(net, x, loss_fn=scaled(scale))
    assert report.ok, str(report)
    if scale < 1e-30:  # what is subnormal may be wrong by more
        return
    for factor in (1 + 1e-4, 1 - 1e-4):
        right = reference.ReferenceBackend.wgrad
        with monkeypatch.context() as patch:
            patch.setattr(reference.ReferenceBackend, "wgrad", lambda *a, by=factor, run=right: run(*a) * by)
            report = sdgp.validate(net, x, loss_fn=scaled(scale))
        assert {check.pass_name for check in report.failures} == {"wgrad"}


@pytest.mark.parametrize("scale", [1e-7, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("layer", [nn.Linear(9, 16), nn.Conv2d(8, 16, 3, padding=1)], ids=["linear", "conv"])
def test_gradients_that_are_subnormal_in_float16_pass(layer: nn.Module, scale: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(layer)).half()
    x = torch.randn(4, 8, 9, 9, dtype=torch.float16, requires_grad=True)
    loss = scaled(scale)
    report = sdgp.validate(net, x, sdgp.SDGPConfig(prune="magnitude"), loss_fn=lambda y, _: loss(y.double(), None))
    assert len(report.checks) == 2
    assert report.ok, str(report)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [3, 7])
def test_convolutions_in_16_bits_on_a_cpu_pass(
    kernel: int, autocast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without instructions for them torch rounds after each tap (dgrad) and after each image (wgrad)."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(16, 16, kernel, padding=kernel // 2) for _ in range(2)))
    x, config = torch.randn(16, 16, 10, 10), sdgp.SDGPConfig(prune="magnitude")
    report = sdgp.validate(net, x, config, autocast=autocast)
    assert report.ok, str(report)
    prune_compress = reference.ReferenceBackend.prune_compress

    def without_an_image(self: Any, dy: Tensor, *arguments: Any) -> Any:
        operands = prune_compress(self, dy, *arguments)
        for operand in (operand for operand in operands[:2] if operand is not None):
            operand[:100] = 0
        return operands

    monkeypatch.setattr(reference.ReferenceBackend, "prune_compress", without_an_image)
    assert len(sdgp.validate(net, x, config, autocast=autocast).failures) == len(report.checks)


def test_small_gradients_do_not_vanish_in_float16() -> None:
    net, x, signs = nn.Linear(32, 16), torch.randn(64, 32), torch.randint(0, 2, (64, 16)) * 2.0 - 1
    report = sdgp.validate(
        net, x, autocast=torch.float16, draws=0, loss_fn=lambda y, _: (y.float() * signs).sum() * 2.0**-26
    )
    assert report.checks
    assert all(check.tolerance > 0 for check in report.checks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet"}, "model must be a torch.nn.Module; got str"),
        ({"draws": 1}, "draws must be 0 or an int >= 2; got 1"),
        ({"draws": 2.5}, "draws must be 0 or an int >= 2; got 2.5"),
        ({"autocast": "bf16"}, "autocast must be None, torch.bfloat16 or torch.float16; got 'bf16'"),
        ({"batch": 3}, "batch must be a tensor"),
        ({"config": "mvue"}, "config must be an SDGPConfig or None; got str"),
        ({"seed": "a"}, "seed must be an int of 64 bits; got 'a'"),
        ({"seed": 2**64}, "seed must be an int of 64 bits; got 18446744073709551616"),
        ({"loss_fn": 5}, r"loss_fn must be a callable \(output, targets\) -> scalar tensor, or None; got 5"),
        ({"loss_fn": lambda *_: 1.5}, "loss_fn must return a scalar tensor; got 1.5 of type float"),
        ({"loss_fn": lambda *_: None}, "loss_fn must return a scalar tensor; got None of type NoneType"),
        (
            {"loss_fn": lambda output, _: output},
            r"loss_fn must return a scalar floating-point tensor; got torch.float32 of shape \(2, 4\)",
        ),
        (
            {"loss_fn": lambda output, _: output.argmax()},
            r"scalar floating-point tensor; got torch.int64 of shape \(\)",
        ),
        ({"model": nn.Linear(4, 4).requires_grad_(False)}, "model must have parameters with requires_grad=True"),
        ({"model": nn.Linear(4, 4, device="meta")}, "model must be on a device that computes; got parameters on meta"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        sdgp.validate(**{"model": nn.Linear(4, 4), "batch": torch.randn(2, 4), **arguments})


def test_an_output_whose_loss_is_no_scalar_is_named() -> None:
    class Model(nn.Linear):
        def forward(self, input: Tensor) -> dict[str, Tensor]:
            return {"loss": super().forward(input)}

    with pytest.raises(ValueError, match=r"the loss in the output of model must be a scalar .* of shape \(2, 4\)"):
        sdgp.validate(Model(4, 4), torch.randn(2, 4))


def test_the_reference_uses_the_numbers_that_the_layer_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference gradient is rebuilt from the generator's state, not from a seed handed to the layer."""
    drawn: list[tuple[int, ...]] = []
    draw = philox.next_seed

    def recorded(device: torch.device) -> philox.Seed:
        seed = draw(device)
        drawn.append(tuple(seed.tolist() if isinstance(seed, torch.Tensor) else seed))
        return seed

    monkeypatch.setattr(philox, "next_seed", recorded)
    sdgp.validate(nn.Linear(8, 8), torch.randn(4, 8), draws=0)
    assert drawn[0] == drawn[1]


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checks.json"
    result = CliRunner().invoke(main, ["validate", "digits", "--device", "cpu", "--batch", "2", "--json", str(path)])
    assert result.exit_code == 0, result.output
    data = json.loads(path.read_text())
    assert data["ok"]
    assert {check["pass_name"] for check in data["checks"]} == {"dgrad", "wgrad"}
    assert data["swap"]["swapped"] > 0

    monkeypatch.setattr(reference.ReferenceBackend, "wgrad", lambda self, dy, x, *a: (dy.T @ x) * 1.01)
    result = CliRunner().invoke(
        main, ["validate", "digits", "--device", "cpu", "--batch", "2", "--layers", "head", "--draws", "0"]
    )
    assert result.exit_code == 1
    assert "FAILED: head wgrad" in result.output
    result = CliRunner().invoke(main, ["validate", "digits", "--device", "cpu", "--layers", "no_such_layer"])
    assert result.exit_code == 1
    assert "no layer was checked: not selected" in result.output
    result = CliRunner().invoke(main, ["validate", "digits", "--device", "cpu", "--pattern", "4:4"])
    assert result.exit_code == 1
    assert "the configuration prunes neither pass" in result.output
    result = CliRunner().invoke(main, ["validate", "digits", "--seed", str(2**64)])
    assert result.exit_code == 2
    assert "'--seed'" in result.output
    result = CliRunner().invoke(main, ["validate", "no_such_model"])
    assert result.exit_code == 1
    assert "no_such_model" in result.output
