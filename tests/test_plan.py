"""`plan` reproduces the reference table, explains what stays dense, and never touches the model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from sdgp_accel import models
from sdgp_accel.cli import main
from sdgp_accel.config import SDGPConfig
from sdgp_accel.plan import PlanReport, plan
from sdgp_accel.swap import accelerate_
from sdgp_accel.trace import trace

# Per cent of forward and backward time saved: A100 two-pass and fused, H100 two-pass and fused, and both with a 2:4
# speed-up of 1.5 on the H100. Computed independently of this package.
TABLE = {
    ("resnet9", 512): (20.0, 24.4, 7.6, 12.8, 16.3, 21.5),
    ("resnet18", 256): (11.4, 21.5, 3.1, 11.2, 8.2, 18.5),
    ("resnet50", 256): (5.6, 17.5, 1.4, 12.1, 3.7, 15.4),
    ("vit_base_patch16_224", 256): (11.8, 24.1, 2.7, 12.3, 6.4, 21.2),
    ("vit_large_patch16_224", 128): (15.1, 24.4, 3.1, 12.6, 10.4, 21.5),
}


def _meta(name: str, batch: int, **sizes: int) -> tuple[nn.Module, models.Batch]:
    with torch.device("meta"):
        return models.build(name, **sizes), models.example_batch(name, batch, device="meta", **sizes)


@pytest.mark.parametrize(("name", "batch"), list(TABLE))
def test_reference_table(name: str, batch: int) -> None:
    model, example = _meta(name, batch)
    figures: list[tuple[str, dict[str, float]]] = [("a100", {}), ("h100", {}), ("h100", {"sparse_speedup": 1.5})]
    reports = [plan(model, example, gpu, **changed) for gpu, changed in figures]
    got = [100 * saving for report in reports for saving in (report.saving("two_pass"), report.saving("fused"))]
    assert got == pytest.approx(list(TABLE[name, batch]), abs=0.06)  # the table is rounded to 0.1


def test_a_measured_gpu_charges_the_prune_function() -> None:
    model, example = _meta("resnet9", 512)
    cheap, dear = (plan(model, example, "h100-measured", SDGPConfig(prune=name)) for name in ("magnitude", "mvue"))
    assert cheap.saving("two_pass") > dear.saving("two_pass") >= 0
    assert cheap.saving("fused") == dear.saving("fused")
    both = plan(model, example, "h100-measured", SDGPConfig(prune={"grad_input": "magnitude", "grad_weight": "mvue"}))
    assert both.saving("two_pass") == dear.saving("two_pass")
    conv, linear = (SDGPConfig(prune="rescale_magnitude", scope=scope) for scope in (None, "group"))
    assert plan(model, example, "h100-measured", conv).saving("two_pass") < plan(
        model, example, "h100-measured", linear
    ).saving("two_pass")
    assert "prune + compress at its measured cost" in " ".join(str(dear).split())
    assert "measured cost" not in " ".join(str(plan(model, example, "h100")).split())


def test_resnet50_batch_256_takes_seconds() -> None:
    start = time.process_time()  # of this process: a busy machine is not the plan's fault
    model, example = _meta("resnet50", 256)
    plan(model, example)
    assert time.process_time() - start < 20


def test_layers_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(2), nn.Linear(9, 5, bias=False))
    (conv, linear) = trace(model, torch.randn(4, 8, 7, 7))
    assert (conv.name, conv.module) == ("0", model[0])
    work = conv.work
    assert (work.positions, work.reduction, work.out_channels, work.inputs) == (4 * 9, 72, 16, 4 * 8 * 49)
    assert work.passes == ("grad_weight",)  # the images need no gradient
    assert (linear.work.positions, linear.work.reduction, linear.work.out_channels) == (4 * 16, 9, 5)
    assert linear.work.passes == ("grad_input", "grad_weight")


def test_model_is_left_as_it_was() -> None:
    model = models.build("digits").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan(model, models.example_batch("digits", 8))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_neither_compilation_nor_no_grad_changes_the_plan() -> None:
    model, batch = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(8, 16)
    with torch.no_grad():
        report = plan(torch.compile(model), batch)
    assert report == plan(model, batch)
    assert [layer.name for layer in report.layers] == ["0", "1"]


def test_layers_called_by_keyword_and_parts_compiled_in_place_are_planned() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(input=x))

    model, batch = ByKeyword(), torch.randn(8, 16)
    expected = plan(nn.Sequential(OrderedDict(first=model.first, second=model.second)), batch)
    assert plan(model, batch) == expected
    model.second.compile()
    assert plan(model, batch) == expected
    model.compile()
    assert plan(model, batch) == expected


class WithCache(nn.Module):
    """Keeps what its forward has computed, as modules do with masks and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mask", None)
        self.positions: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.positions is None:
            self.positions, self.mask = torch.arange(8, device=x.device), torch.ones(8, device=x.device)
        return self.linear(x * self.mask + self.positions)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_nothing_that_a_forward_leaves_in_its_modules_stays() -> None:
    model = nn.Sequential(WithCache(), nn.utils.weight_norm(nn.Linear(8, 8)))
    x = torch.randn(2, 8)
    for refused in (False, True):
        if refused:
            model.append(nn.Linear(9, 9))
            with pytest.raises(RuntimeError, match="cannot run on shapes alone"):
                plan(model, x)
            del model[2]
        else:
            assert len(plan(model, x).layers) == 2
        assert model[0].positions is None
        assert model[0].mask is None
        assert model[1].weight.device.type == "cpu"
    model(x)


def test_shared_and_tied_layers_count_per_call() -> None:
    layer = nn.Linear(16, 16)
    report = plan(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(32, 16))
    assert [entry.name for entry in report.layers] == ["0", "0"]
    tied = plan(models.build("gpt"), models.example_batch("gpt", 2))
    assert tied.layers[-1].name == "head"


@pytest.mark.parametrize("batch_kind", ["tensor", "pair", "mapping", "inputs tuple"])
def test_every_kind_of_batch(batch_kind: str) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
            return self.layer(x) * scale

    x = torch.randn(6, 8)
    batch: dict[str, Any] = {
        "tensor": x,
        "pair": (x, torch.zeros(6)),
        "mapping": {"x": x, "scale": torch.ones(())},
        "inputs tuple": ((x, torch.ones(())), None),
    }
    report = plan(TwoInputs(), batch[batch_kind])
    assert report.batch == 6
    assert report.layers[0].work.positions == 6


def _reasons(report: PlanReport) -> dict[str, str]:
    return {layer.name: layer.dense_reason for layer in report.layers}


def test_what_stays_dense_says_why() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=4), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 64, 1)
    )
    model[2].requires_grad_(False)
    images = torch.randn(2, 3, 12, 12)
    reasons = _reasons(plan(model, images, filter_fn=lambda module, name: name != "3"))
    assert reasons == {"0": "3 inputs", "1": "grouped", "2": "", "3": "filtered"}
    assert _reasons(plan(model, images, filter_fn=["0", "2"]))["3"] == "filtered"
    assert plan(model, images).layers[2].work.passes == ("grad_input",)
    assert _reasons(plan(nn.Linear(4, 8), torch.randn(2, 4))) == {"": ""}
    paper = SDGPConfig(grad_weight="dense")
    assert {p for layer in plan(model, images, config=paper).layers for p in layer.work.sparse_passes} == {"grad_input"}
    assert _reasons(plan(model, images, config=SDGPConfig(n=4, m=8)))["3"] == "4:8"
    taken = {
        (n, m): _reasons(plan(model, images, config=SDGPConfig(n=n, m=m)))["3"] == ""
        for n, m in ((2, 8), (1, 16), (1, 2), (2, 12), (1, 32), (2, 32))
    }
    assert [pattern for pattern, is_taken in taken.items() if is_taken] == [(2, 8), (1, 16)]  # what kernels there are
    off = plan(model, images, config=SDGPConfig(grad_input="dense", grad_weight="dense"))
    assert _reasons(off)["3"] == "no pass pruned"
    assert off.saving("fused") == 0.0


def test_subclasses_stay_dense_and_swapped_layers_do_not() -> None:
    class Gated(nn.Linear):
        pass

    model = nn.Sequential(Gated(16, 16), nn.Linear(16, 16))
    accelerate_(model)
    assert _reasons(plan(model, torch.randn(8, 16))) == {"0": "Gated", "1": ""}


def test_an_accelerated_model_is_planned_as_it_is_configured() -> None:
    model = nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    accelerate_(model, SDGPConfig(min_in_channels=1), filter_fn="0")
    accelerate_(model, SDGPConfig(grad_input="dense"), filter_fn="1")
    accelerate_(model, filter_fn="2")
    nn.utils.parametrizations.weight_norm(model[2])
    batch = torch.randn(8, 2)
    report = plan(model, batch)
    assert _reasons(report) == {"0": "", "1": "", "2": "", "3": "no pass pruned"}
    assert [layer.work.sparse_passes for layer in report.layers] == [
        ("grad_weight",), ("grad_weight",), ("grad_input", "grad_weight"), (),
    ]  # fmt: skip
    assert _reasons(plan(model, batch, filter_fn="none")) == _reasons(report)
    with pytest.raises(TypeError, match="filter_fn must be a callable"):
        plan(model, batch, filter_fn=5)
    assert _reasons(plan(model, batch, config=SDGPConfig())) == {"0": "2 inputs", "1": "", "2": "", "3": ""}


def test_what_holds_matrices_and_is_no_layer_is_named() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2)
            self.norm, self.other_norm = nn.LayerNorm((3, 16)), nn.RMSNorm((3, 16))
            self.token = nn.Parameter(torch.zeros(1, 1, 16))
            self.positions = nn.Parameter(torch.zeros(1, 3, 16))
            self.scale = nn.Parameter(torch.ones(16, 1))
            self.embedding = nn.Embedding(8, 16)
            self.head = nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.embedding(tokens))
            return self.head(self.attention(x, x, x)[0])

    report = plan(Attention(), torch.zeros(2, 3, dtype=torch.int64))
    assert report.left_out == {"MultiheadAttention": 1, "NonDynamicallyQuantizableLinear": 1}
    report = plan(nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(4, 4)), torch.randn(2, 4, 8))
    data = json.loads(report.to_json())
    assert data["left_out"] == {"Conv1d": 2}
    for text in (data["note"], " ".join(str(report).split())):
        assert "hold weight matrices of their own and may multiply by them: 2 × Conv1d. They are neither" in text
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3))
    assert plan(parametrized, torch.randn(2, 4, 8)).left_out == {"ParametrizedConv1d": 1}


def test_gpt2_of_transformers_names_its_conv1d() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=32)
    report = plan(transformers.GPT2LMHeadModel(config), torch.zeros(2, 16, dtype=torch.int64))
    assert report.left_out == {"Conv1D": 8}
    assert [layer.name for layer in report.layers] == ["lm_head"]


@pytest.mark.parametrize("name", ["resnet9", "resnet18", "gpt", "conv_lm", "timm/vit_tiny_patch16_224"])
def test_where_every_product_is_a_layers_nothing_is_left_out(name: str) -> None:
    report = plan(*_meta(name, 2))
    assert not report.left_out
    assert "hold weight matrices" not in str(report)


def test_the_table_shows_each_kind_of_layer_once_and_adds_up() -> None:
    with torch.device("meta"):
        model, batch = (
            nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(3)), nn.Linear(4096, 8)),
            torch.empty(4096, 4096),
        )
        report = plan(model, batch)
    text = str(report)
    rows = [line.split() for line in text.splitlines() if "4096→" in line or "calls" in line]
    expected = []
    for name, bound, layer, calls in (("0", "compute", 0, 1), ("2 × 1", "compute", 1, 2), ("3", "memory", 3, 1)):
        first = report.layers[layer]
        cells = [*name.split(), first.shape, bound, f"{1e3 * calls * first.backward:.3f}"]
        for schedule in ("two_pass", "fused"):
            gains = first.choice(schedule).sparse_passes
            cells += [f"{1e3 * calls * first.choice(schedule).seconds:.3f}"]
            cells += [f"{first.saved(schedule) / first.backward:.1%}" if gains else "–"]
        expected.append(cells)
    total, dense = ["4", "calls"], sum(layer.backward for layer in report.layers)
    total.append(f"{1e3 * dense:.3f}")
    for schedule in ("two_pass", "fused"):
        saved = sum(layer.saved(schedule) for layer in report.layers)
        total += [f"{1e3 * (dense - saved):.3f}", f"{saved / dense:.1%}"]
    assert rows == [*expected, total]
    assert f"two-pass: 3 of 4 layers gain; forward + backward {1e3 * report.dense:.3f}" in text
    assert f"ms, {report.saving('two_pass'):.1%} less" in text
    assert 0.1 < report.saving("two_pass") < 0.3


def test_a_layer_that_is_called_twice_gains_once() -> None:
    with torch.device("meta"):
        shared = nn.Linear(1024, 1024)
        report = plan(nn.Sequential(shared, shared), torch.empty(1024, 1024))
    assert report.gaining("fused") == ("0",)
    assert "fused: 1 of 1 layers gain" in str(report)
    assert "µs" in str(report)


def test_layers_of_different_kinds_are_listed_apart() -> None:
    """Their gradients are pruned over different values, which costs different time."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1))
            self.linear = nn.Linear(64, 64)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(self.convolutions(images).permute(0, 2, 3, 1))

    report = plan(Mixed(), torch.empty(8, 64, 16, 16), "h100-measured", SDGPConfig(prune="rescale_magnitude"))
    assert report.layers[1].work == report.layers[2].work
    assert [[layer.name for layer in group] for group in report.groups()] == [
        ["convolutions.0"], ["convolutions.1"], ["linear"]
    ]  # fmt: skip


def test_model_without_layers() -> None:
    report = plan(nn.ReLU(), torch.randn(2, 3))
    assert report.saving("fused") == 0.0
    assert "0 calls" in str(report)


def test_scripted_parts_are_run_and_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    assert len(plan(nn.Sequential(nn.Linear(8, 8), scripted), torch.randn(2, 8)).layers) == 1


def test_forward_that_reads_values_is_explained() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(RuntimeError, match="Reads cannot run on shapes alone"):
        plan(Reads(), torch.randn(2, 3))


def test_bad_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(inputs, targets\); got 3 items"):
        plan(nn.Linear(3, 3), (torch.ones(2, 3),) * 3)
    with pytest.raises(TypeError, match="batch must be a tensor"):
        plan(nn.Linear(3, 3), 7)


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    arguments = ["plan", "resnet9", "--batch", "512", "--gpu", "h100", "--sparse-speedup", "1.5", "--json", str(path)]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "features.1.0" in result.output
    assert "not a measurement" in " ".join(result.output.split())
    data = json.loads(path.read_text())
    assert data["kind"] == "prediction"
    assert data["two_pass"]["saving"] == pytest.approx(0.163, abs=0.0006)
    assert data["gpu"]["sparse_speedup"] == 1.5
    assert len(data["layers"]) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model"], "no_such_model"),
        (["resnet9", "--gpu", "v100"], "v100"),
        (["resnet9", "--pattern", "2-4"], "must look like 2:4"),
        (["resnet9", "--pattern", "5:4"], "n must be between 1 and m = 4"),
        (["resnet9", "--sparse-speedup", "9"], "sparse_speedup must be between 1 and 2"),
    ],
)
def test_command_line_errors(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["plan", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code != 0
    assert message in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_runs_as_a_program() -> None:
    program = "import sys; from sdgp_accel.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", "digits", "--batch", "8"], capture_output=True, text=True, check=True
    )
    assert "Prediction for A100, batch 8" in done.stdout
