"""`benchmark`: turns, parts and statements. A fake clock makes every span between two marks one second."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

from sdgp_accel import benchmark as public_benchmark
from sdgp_accel import models
from sdgp_accel.benchmark import _TURN, _Contender, _settle, _watch_layers, benchmark
from sdgp_accel.benchmark_report import PARTS, BenchmarkReport, ContenderResult
from sdgp_accel.cli import main
from sdgp_accel.config import SDGPConfig
from sdgp_accel.nn import SDGPLinear
from sdgp_accel.plan import plan
from sdgp_accel.report import LayerReport, SwapReport
from sdgp_accel.swap import accelerate_, set_active_
from sdgp_accel.timing import Stats

pytestmark = pytest.mark.filterwarnings("ignore:.*nothing is accelerated here")
_MODULE = importlib.import_module("sdgp_accel.benchmark")  # the package's attribute of that name is the function
DETERMINISTIC = SDGPConfig(prune="magnitude")


class FakeClock:
    """Every mark is one second after the last one."""

    def __init__(self) -> None:
        self.now = 0
        self.synchronized = 0

    def mark(self) -> int:
        self.now += 1
        return self.now

    def seconds(self, start: int, end: int) -> float:
        assert self.synchronized >= end, "read before the work was waited for"
        return float(end - start)

    def synchronize(self) -> None:
        self.synchronized = self.now


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(_MODULE, "clock_for", lambda device: clock)
    return clock


def _small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 8))


def _small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(64, 16), torch.randint(8, (64,))


def test_steps_are_split_and_counted(fake_clock: FakeClock) -> None:
    report = benchmark(_small_model(), _small_batch(), DETERMINISTIC, steps=7, warmup=2)
    dense, sdgp = report.contenders
    assert (dense.name, sdgp.name) == ("dense", "SDGP")
    assert (dense.sdgp, sdgp.sdgp) == (False, True)
    for contender in report.contenders:
        assert contender.samples == (3.0,) * 7
        assert contender.forward == contender.backward == contender.optimizer == Stats.of([1.0] * 7)
        assert contender.peak_bytes > 0
        assert list(contender.parts) == [part for part in PARTS if part in contender.parts]
    # Watched, a backward takes 5 s: two layers with a mark before and after each. As shares of the counted second:
    assert dense.layers == pytest.approx({"0": 0.2, "2": 0.2})
    assert dense.stages == pytest.approx({"dense_layers": 0.4})
    assert dense.parts["other_backward"] == pytest.approx(0.6)
    assert sdgp.layers == pytest.approx({"0": 0.2, "2": 0.2})
    assert set(sdgp.stages) >= {"prune_compress", "dgrad", "wgrad"}
    assert "dense_layers" not in sdgp.stages


def test_contenders_take_turns(fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = _Contender.step
    monkeypatch.setattr(_Contender, "step", lambda self, clock: (order.append(self.name), real(self, clock))[1])
    monkeypatch.setitem(_TURN, "cpu", (1, 2))
    report = benchmark(_small_model(), _small_batch(), DETERMINISTIC, steps=5, warmup=0)
    turns = [name for index, name in enumerate(order) if index % 3 == 0][:6]
    assert turns == ["dense", "SDGP", "SDGP", "dense", "dense", "SDGP"]
    assert [len(contender.samples) for contender in report.contenders] == [5, 5]


def test_model_is_left_alone_and_contenders_start_equal() -> None:
    torch.manual_seed(0)
    model = _small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = benchmark(model, _small_batch(), DETERMINISTIC, steps=1, warmup=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    dense, sdgp = report.contenders
    assert sdgp.loss == pytest.approx(dense.loss, rel=1e-3)


def test_layers_are_timed_around_their_nodes_only() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 1, bias=False),
        nn.Flatten(2),
        nn.Linear(16, 6),
        nn.Linear(6, 6, bias=False),
    )
    clock = FakeClock()
    with _watch_layers(model, clock) as spans:
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = model(torch.randn(2, 4, 4, 4)).square().mean()
            loss.backward()
    assert [span.layer for span in spans] == ["5", "4", "2", "0"] * 2
    assert all(span.dense and span.end == span.start + 1 for span in spans)
    model(torch.randn(2, 4, 4, 4)).sum().backward()
    assert len(spans) == 8  # the hooks are gone


def test_sdgp_layers_are_watched_too() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(inplace=True), nn.Flatten(2), nn.Linear(4, 6))
    accelerate_(model, DETERMINISTIC)
    with _watch_layers(model, FakeClock()) as spans:
        model(torch.randn(2, 4, 4, 4)).square().mean().backward()
    assert [(span.layer, span.dense) for span in spans] == [("3", False), ("0", False)]


def test_a_dense_layer_beside_sdgp_layers_is_told_apart() -> None:
    report = benchmark(_small_model(), _small_batch(), DETERMINISTIC, filter_fn="0", steps=2, warmup=0)
    assert set(report.sdgp.stages) == {"prune_compress", "dgrad", "wgrad", "dense_layers"} - _unneeded(report)
    assert [layer.dense_reason for layer in report.prediction.layers] == ["", "filtered"]


@pytest.mark.parametrize("active", [True, False])
def test_an_accelerated_model_is_timed_dense_and_pruned(active: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))
    accelerate_(model, DETERMINISTIC, filter_fn=["0", "2"])
    set_active_(model, active)
    report = benchmark(model, torch.randn(8, 64), steps=1, warmup=0)
    dense, sdgp = report.contenders
    assert set(dense.stages) == {"dense_layers"}
    assert set(sdgp.stages) == {"prune_compress", "dgrad", "wgrad", "dense_layers"}
    assert [layer.dgrad for layer in report.swap.layers] == ["magnitude 2:4", "magnitude 2:4", "dense"]
    assert report.settings["config"]["prune"] == "magnitude"
    assert [layer.dense_reason for layer in report.prediction.layers] == ["", "", "no pass pruned"]
    assert model[0].sdgp_active is active
    accelerate_(model, filter_fn="0")
    report = benchmark(model, torch.randn(8, 64), steps=1, warmup=0)
    assert [layer.dgrad for layer in report.swap.swapped] == ["mvue 2:4", "magnitude 2:4"]
    assert report.settings["config"] is None
    report = benchmark(model, torch.randn(8, 64), SDGPConfig(prune="random"), steps=1, warmup=0)
    assert [layer.dgrad for layer in report.swap.layers] == ["random 2:4"] * 3
    assert report.settings["config"]["prune"] == "random"


def test_layers_of_derived_classes_are_timed_dense_too() -> None:
    model = nn.Sequential(nn.Linear(16, 16), SDGPLinear(16, 16, config=DETERMINISTIC))
    nn.utils.parametrizations.weight_norm(model[1])
    dense, sdgp = benchmark(model, torch.randn(8, 16), steps=1, warmup=0).contenders
    assert set(dense.stages) == {"dense_layers"}
    assert set(sdgp.stages) == {"prune_compress", "dgrad", "wgrad", "dense_layers"}


def test_what_is_not_swapped_says_why() -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 8))
    report = benchmark(model, torch.randn(8, 3), DETERMINISTIC, steps=1, warmup=0)
    assert report.swap["0"].reason == "3 input channels < min_in_channels = 4"
    with pytest.warns(UserWarning, match="benchmark found no layer to swap"):
        report = benchmark(model, torch.randn(8, 3), filter_fn="none", steps=1, warmup=0)
    assert report.outcome == "unpruned"


def _unneeded(report: BenchmarkReport) -> set[str]:
    # The first layer's input needs no gradient, so its dgrad may not run at all.
    return set() if "dgrad" in report.sdgp.stages else {"dgrad"}


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(autocast: torch.dtype) -> None:
    report = benchmark(_small_model(), _small_batch(), DETERMINISTIC, autocast=autocast, steps=1, warmup=0)
    assert report.settings["autocast"] == str(autocast).removeprefix("torch.")
    assert report.to_dict()["settings"]["config"]["prune"] == "magnitude"


def test_peers_are_compiled_when_the_contenders_are_not(fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model: (compiled.append(model), model)[1])
    report = benchmark(_small_model(), _small_batch(), DETERMINISTIC, peers=True, steps=1, warmup=0)
    names = ["dense", "SDGP", "dense, compiled", "SDGP, compiled"]
    assert [contender.name for contender in report.contenders] == names
    assert len(compiled) == 2
    assert report.contenders[2].stages == {}
    assert report.contenders[2].parts["backward"] == 1.0
    assert report.settings["left_out"] == {}
    report = benchmark(_small_model(), _small_batch(), DETERMINISTIC, peers=True, compile=True, steps=1, warmup=0)
    assert [contender.name for contender in report.contenders] == [*names[2:], *names[:2]]


def test_a_peer_that_cannot_run_is_left_out(fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module) -> Any:
        def forward(*inputs: Any) -> Any:
            raise RuntimeError("no compiler here\nand much more")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    report = benchmark(_small_model(), _small_batch(), DETERMINISTIC, peers=True, steps=1, warmup=1)
    assert [contender.name for contender in report.contenders] == ["dense", "SDGP"]
    assert report.settings["left_out"] == dict.fromkeys(("dense, compiled", "SDGP, compiled"), "no compiler here")
    assert "SDGP, compiled left out: no compiler here" in str(report)
    with pytest.raises(RuntimeError, match="no compiler here"):
        benchmark(_small_model(), _small_batch(), DETERMINISTIC, compile=True, peers=True, steps=1, warmup=1)


@pytest.mark.parametrize("compile", [False, True])
def test_a_compiled_model_runs_eagerly_unless_the_contenders_are_compiled(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append("compiled")
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend=backend))
    report = benchmark(
        compiler(_small_model(), backend=backend), _small_batch(), DETERMINISTIC, compile=compile, steps=1
    )
    assert bool(compilations) == compile
    assert [contender.compiled for contender in report.contenders] == [compile] * 2


class _ReadsValues(nn.Linear):
    """A model whose forward depends on values, as a router's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum().item() > 0 else -x)


def test_a_model_that_shapes_alone_do_not_run_has_no_prediction(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), _ReadsValues(16, 8))
    report = benchmark(model, _small_batch(), DETERMINISTIC, steps=1, warmup=0)
    assert report.prediction is None
    why = "the forward of Sequential cannot run on shapes alone"
    assert report.settings["unpredicted"].startswith(why)
    assert f"not predicted: {why}" in report.verdict
    assert "not predicted" in str(report)
    report.save_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["prediction"] is None
    report.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert why in page
    assert "layers gain" not in page
    measured = replace(measured_report((0.8, 0.8, 0.8)), prediction=None, settings=report.settings)
    assert measured.layers == []
    assert "0.800" in str(measured)


def test_an_unknown_gpu_is_refused_before_anything_runs() -> None:
    def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise AssertionError("ran")

    with pytest.raises(ValueError, match="gpu must be one of"):
        benchmark(_small_model(), _small_batch(), loss_fn=loss_fn, gpu="h1000")


def test_the_fastest_of_each_side_are_compared() -> None:
    report = measured_report((0.8, 0.81, 0.79))
    compiled = _contender("SDGP, compiled", True, (0.7, 0.7, 0.7), {})
    report = replace(report, contenders=(*report.contenders, replace(compiled, compiled=True)))
    assert (report.sdgp.name, report.fastest_sdgp.name) == ("SDGP", "SDGP, compiled")
    assert "The SDGP, compiled step is faster than dense: +30.0% saved" in report.verdict
    assert report.to_dict()["fastest_sdgp"] == "SDGP, compiled"
    assert "SDGP, compiled / this" in str(report)


def test_a_cpu_is_never_said_to_save(tmp_path: Path) -> None:
    report = benchmark(models.build("digits"), models.example_batch("digits", 8), steps=2, warmup=0, gpu="h100")
    assert not report.accelerated
    assert report.outcome == "emulated"
    data = report.to_dict()
    assert data["kind"] == "emulated"
    assert data["sdgp_over_dense"] == {}
    assert data["layers"] == []
    text = str(report)
    assert "Nothing is accelerated here" in text
    assert "say nothing about savings" in " ".join(text.replace("│", " ").split())
    assert "Prediction for H100" in text
    assert "SDGP / this" not in text
    page = tmp_path / "page.html"
    report.save_html(page)
    assert "emulated" in page.read_text()
    assert "× this" not in page.read_text()


def test_layers_that_all_fall_back_are_not_called_emulated() -> None:
    emulated = benchmark(_small_model(), _small_batch(), DETERMINISTIC, steps=1, warmup=0)
    swapped = tuple(
        replace(layer, backend="dense", reason="the kernels are not built") for layer in emulated.swap.layers
    )
    contenders = tuple(replace(c, stages={"dense_layers": 0.1}) for c in emulated.contenders)
    report = replace(emulated, swap=SwapReport(swapped), contenders=contenders)
    assert report.to_dict()["kind"] == report.outcome == "unpruned"
    assert "because the kernels are not built" in report.verdict
    assert "(unpruned)" in str(report)


def _contender(name: str, sdgp: bool, samples: tuple[float, ...], stages: dict[str, float]) -> ContenderResult:
    third = Stats.of([sample / 3 for sample in samples])
    layers = {"0": sum(stages.values()) / 4, "2": sum(stages.values()) * 3 / 4} if stages else {}
    return ContenderResult(
        name, sdgp, False, Stats.of(samples), third, third, third, stages, layers, 1024, 1.0, samples
    )


def measured_report(sdgp: tuple[float, ...], dense: tuple[float, ...] = (1.0, 1.0, 1.0)) -> BenchmarkReport:
    """A report as a GPU would give it, from invented numbers."""
    layer = LayerReport("0", "Linear", "16→32", True, "mvue 2:4", "mvue 2:4", "cutlass", "fastest")
    contenders = (
        _contender("dense", False, dense, {"dense_layers": 0.2}),
        _contender("SDGP", True, sdgp, {"prune_compress": 0.01, "dgrad": 0.05, "wgrad": 0.04}),
        _contender("dense, compiled", False, tuple(1.1 * step for step in dense), {}),
    )
    provenance: dict[str, Any] = {
        "time": "2026-01-01T00:00:00+00:00",
        "sdgp_accel": "0",
        "git_revision": None,
        "versions": {"torch": "2"},
        "gpu": {"name": "NVIDIA H100"},
    }
    prediction = plan(_small_model(), _small_batch(), "h100")
    return BenchmarkReport(
        "model", 64, True, contenders, SwapReport((layer,)), prediction, {"steps": len(sdgp)}, provenance
    )


@pytest.mark.parametrize(
    ("sdgp", "outcome", "words"),
    [
        ((0.8, 0.81, 0.79), "faster", "faster than dense: +20.0% saved per step, +19.5% to +20.5% in the middle half"),
        ((1.2, 1.21, 1.19), "slower", "slower than dense: -20.0% saved per step, -20.5% to -19.5% in the middle half"),
        ((0.9, 1.0, 1.1), "even", "equally long"),
    ],
)
def test_measured_outcomes(sdgp: tuple[float, ...], outcome: str, words: str) -> None:
    report = measured_report(sdgp)
    assert report.outcome == outcome
    assert words in report.verdict
    assert report.fastest_dense.name == "dense"
    data = report.to_dict()
    assert data["kind"] == "measurement"
    assert data["sdgp_over_dense"]["dense"]["median"] == pytest.approx(sorted(sdgp)[1])
    assert [group["names"] for group in data["layers"]] == [("0",), ("2",)]
    assert sum(group["sdgp"] for group in data["layers"]) == pytest.approx(0.1)
    assert sum(group["dense"] for group in data["layers"]) == pytest.approx(0.2)
    for key, seconds in (
        ("predicted_dense", [layer.backward for layer in report.prediction.layers]),
        ("predicted_sdgp", [layer.two_pass.seconds for layer in report.prediction.layers]),
    ):
        assert sum(group[key] for group in data["layers"]) == pytest.approx(sum(seconds))
    assert [list(contender["parts"])[1:-1] for contender in data["contenders"]] == [
        ["dense_layers", "other_backward"],
        ["prune_compress", "dgrad", "wgrad", "other_backward"],
        ["backward"],
    ]
    assert "SDGP / this" in str(report)


def test_the_table_of_four_contenders_fits_a_narrow_terminal() -> None:
    report = measured_report((1.2, 1234.5, 4.5), dense=(1.1, 2345.6, 3.4))
    compiled = _contender("SDGP, compiled", True, (1234.5,) * 3, {})
    report = replace(report, contenders=(*report.contenders, compiled), accelerated=False)
    text = io.StringIO()
    Console(file=text, width=80).print(report)
    table = text.getvalue().split("╭")[0]
    assert "prune + compress" in table
    assert "compiled" in table
    assert "1,234,500.0" in table
    assert max(map(len, table.splitlines())) <= 80


def test_json_schema(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report = benchmark(_small_model(), _small_batch(), DETERMINISTIC, steps=2, warmup=0, name="small")
    report.save_json(path)
    data = json.loads(path.read_text())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert set(data) == {
        "schema", "kind", "model", "batch", "machine", "outcome", "verdict", "contenders", "fastest_sdgp",
        "sdgp_over_dense", "swap", "prediction", "layers", "settings", "provenance",
    }  # fmt: skip
    assert (data["schema"], data["model"], data["batch"]) == (1, "small", 64)
    for contender in data["contenders"]:
        assert set(contender["step"]) == {"median", "low", "high", "minimum", "maximum", "count"}
        assert len(contender["samples"]) == contender["step"]["count"] == 2
        total = sum(contender["parts"].values())
        assert total >= contender["forward"]["median"] + contender["optimizer"]["median"]
    assert {"cpu", "gpu", "versions", "time", "git_revision", "settings"} <= set(data["provenance"])


def test_json_has_no_nan() -> None:
    report = measured_report((0.8, 0.8, 0.8))
    broken = replace(report, contenders=tuple(replace(c, loss=float("nan")) for c in report.contenders))
    assert json.loads(json.dumps(broken.to_dict(), allow_nan=False))["contenders"][0]["loss"] is None


@pytest.mark.parametrize("output", ["mapping with loss", "tensor without targets", "custom loss"])
def test_losses(output: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.layer(x)
            return {"loss": y.abs().mean(), "logits": y} if output == "mapping with loss" else y

    x = torch.randn(16, 8)
    batch: Any = {"x": x} if output == "mapping with loss" else (x, torch.zeros(16, 8)) if "custom" in output else x
    loss_fn = nn.functional.mse_loss if output == "custom loss" else None
    report = benchmark(Model(), batch, DETERMINISTIC, loss_fn=loss_fn, steps=1, warmup=0)
    assert report.contenders[0].loss > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an int >= 1; got 0"),
        ({"warmup": -1}, "warmup must be an int >= 0; got -1"),
        ({"autocast": torch.float32}, "autocast must be None, torch.bfloat16 or torch.float16"),
        ({"gpu": "v100"}, "gpu must be one of"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(_small_model(), _small_batch(), **arguments)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(TypeError, match=r"loss_fn must be a callable .* got 5"):
        benchmark(_small_model(), _small_batch(), loss_fn=5)
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar .* got torch.float32 of shape \(64, 8\)"):
        benchmark(_small_model(), _small_batch(), loss_fn=lambda output, targets: output)
    with pytest.raises(ValueError, match="model must have parameters with requires_grad=True"):
        benchmark(_small_model().requires_grad_(False), _small_batch())


@torch.no_grad()
def test_it_trains_where_gradients_are_off(fake_clock: FakeClock) -> None:
    assert benchmark(_small_model(), _small_batch(), steps=1, warmup=0).contenders[1].loss > 0


def test_models_without_a_device_are_refused() -> None:
    with pytest.raises(ValueError, match="found no parameters"):
        benchmark(nn.ReLU(), torch.randn(2))
    with pytest.raises(ValueError, match="found meta"):
        benchmark(_small_model().to("meta"), _small_batch())


def test_warm_up_ends_when_rounds_take_the_same_time() -> None:
    class Contender:
        steps = 0

        def step(self, clock: FakeClock) -> tuple[int, ...]:
            self.steps += 1
            clock.now += max(0, 50 - self.steps)  # faster and faster, until it is not
            return tuple(clock.mark() for _ in range(4))

    contender: Any = Contender()
    _settle([contender], FakeClock())
    assert 50 <= contender.steps <= 57


def test_public_name() -> None:
    assert public_benchmark is benchmark


def test_command_line(tmp_path: Path) -> None:
    json_path, html_path = tmp_path / "new" / "r.json", tmp_path / "new" / "r.html"
    arguments = ["bench", "gpt", "--batch", "2", "--seq-len", "16", "--steps", "2", "--warmup", "0"]
    arguments += ["--optimizer", "adamw", "--precision", "amp-bf16", "--prune", "magnitude", "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(json_path), "--html", str(html_path)])
    assert result.exit_code == 0, result.output
    assert "Nothing is accelerated here" in result.output
    assert result.output.endswith(f"wrote {html_path}\n")
    data = json.loads(json_path.read_text())
    assert data["model"] == "gpt"
    assert data["settings"]["optimizer"] == "AdamW"
    assert data["settings"]["config"]["prune"] == "magnitude"
    assert html_path.read_text().startswith("<!doctype html>")


def test_command_line_errors() -> None:
    runner = CliRunner()
    unknown = runner.invoke(main, ["bench", "no_such_model", "--device", "cpu"])
    assert unknown.exit_code == 1
    assert "no_such_model" in unknown.output
    assert runner.invoke(main, ["bench", "digits", "--steps", "0"]).exit_code == 2


def test_runs_as_a_program_in_the_memory_format_asked_for() -> None:
    command = [sys.executable, "-m", "sdgp_accel", "bench", "digits", "--steps", "1", "--no-channels-last"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=True)
    assert "digits, batch 8" in done.stdout
