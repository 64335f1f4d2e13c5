"""The roofline's measured entries are what the committed result files say, by the documented command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import fit_roofline, layers
from bench.prediction import geometry_of, gpu_of, predict
from sdgp_accel.roofline import GPU, GPUS, Work, best_backward


@pytest.mark.parametrize("name", fit_roofline.MEASURED)
def test_entries_are_in_step_with_their_files(name: str) -> None:
    sources = fit_roofline.MEASURED[name]
    layers = [json.loads(path.read_text()) for path in sources.layers]
    kernels = None if sources.kernels is None else json.loads(sources.kernels.read_text())
    assert fit_roofline.fit(name, layers, kernels) == GPUS[name], "paste what python -m bench.fit_roofline prints"
    rows = [row for result in layers for row in result["rows"]]
    for ratios in fit_roofline.errors(rows, GPUS[name]).values():
        assert 0.7 < sorted(ratios)[len(ratios) // 2] < 1.4


def test_made_up_measurements_are_found_again() -> None:
    """Times made by a roofline give back its numbers."""
    truth = GPU("h100", 989, 3.35, 0.6, 0.7, 1.4, {"mvue": 2.5})
    origin = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}
    rows: list[dict[str, Any]] = []
    for name, geometry in layers.LAYERS.items():
        row: dict[str, Any] = {"layer": name, "prune": "mvue", "geometry": json.loads(json.dumps(geometry._asdict()))}
        rows.append({**row, "milliseconds": predict(row, truth)._asdict()})
    rows.append({"unsupported": "odd", "layer": "odd", "prune": "mvue", "geometry": rows[0]["geometry"]})
    t, c = 4096, 1024
    clone = 4 * t * c / truth.byte_rate
    kernel = {"case": "a", "t": t, "c": c, "rule": "mvue", "needs": {"dgrad": True, "wgrad": True, "bias": False}}
    kernel["microseconds"] = {"clone": {"median": 1e6 * clone}, "kernel": {"median": 1e6 * 2.5 * clone * 2.125 / 2}}
    found = fit_roofline.fit("found", [{"provenance": origin, "rows": rows}], {"rows": [kernel]})
    assert found == GPU("found", 989, 3.35, 0.6, 0.7, 1.4, {"mvue": 2.5})
    without = fit_roofline.fit("found", [{"provenance": origin, "rows": rows}])  # with the data sheet entry's bandwidth
    assert without == GPU("found", 989, 3.35, 0.6, 0.88, 1.4, {"mvue": round(2.5 * 0.88 / 0.7, 2)})
    assert all(ratio == pytest.approx(1) for ratios in fit_roofline.errors(rows, truth).values() for ratio in ratios)


def test_only_what_is_bound_by_compute_and_of_both_operands_at_2_4_is_fitted() -> None:
    """Rates and speed-ups by hand, each median another number than mean, dgrad's alone, or with what does not count."""
    sheet, rows = GPUS["h100"], []
    passes = {  # (dgrad, wgrad): rate over the peak, speed-up
        "llm_4096.up": ((0.5, 0.6), (1.2, 1.4)),
        "llm_4096.down": ((0.5, 0.6), (1.2, 1.4)),
        "gpt2_xl.fc1": ((0.9, 0.9), (1.9, 1.9)),
        "resnet50.1x1_64_64": ((0.02, 0.02), (1.0, 1.0)),  # bound by memory
    }
    for name, (rates, speedups) in passes.items():
        geometry = layers.LAYERS[name]
        dense = [1e3 * Work.of(geometry).flops / (rate * sheet.tflops * 1e12) for rate in rates]
        sparse = [time / speedup for time, speedup in zip(dense, speedups, strict=True)]
        row: dict[str, Any] = {"layer": name, "prune": "mvue", "geometry": geometry._asdict()}
        names = ("dense_dgrad", "dense_wgrad", "sparse_dgrad", "sparse_wgrad")
        row["milliseconds"] = {**dict(zip(names, dense + sparse, strict=True)), "compress_both": 1.0}
        rows.append(row)
    both = {"dgrad": True, "wgrad": True, "bias": False}
    cases = [
        ("mvue", both, 0.7, 2), ("mvue", both, 0.7, 3), ("mvue", both, 0.7, 10), ("rescale tensor", both, 0.7, 4),
        ("mvue, half zeros", both, 0.7, 50), ("mvue 2:8", both, 0.7, 50),
        *[("mvue", both | {"dgrad": False}, 0.1, 50)] * 7,
    ]  # fmt: skip
    kernels = []
    for rule, needs, reached, cost in cases:
        clone = 4 * 4096 * 1024 / (sheet.bandwidth * 1e12 * reached)
        times = {"clone": {"median": 1e6 * clone}, "kernel": {"median": 1e6 * cost * clone * 2.125 / 2}}
        kernels.append({"t": 4096, "c": 1024, "rule": rule, "needs": needs, "microseconds": times})
    origin = {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}
    found = fit_roofline.fit("found", [{"provenance": origin, "rows": rows}], {"rows": kernels})
    assert found == GPU("found", 989, 3.35, 0.6, 0.7, 1.4, {"mvue": 3.0, "rescale_magnitude tensor": 4.0})


def test_an_error_is_predicted_over_measured() -> None:
    gpu = GPUS["h100-measured"]
    row: dict[str, Any] = {"prune": "mvue", "geometry": layers.LAYERS["llm_4096.up"]._asdict()}
    row["milliseconds"] = {"dense_dgrad": 2 * predict(row, gpu).dense_dgrad, "dense_wgrad": None}
    assert fit_roofline.errors([row], gpu) == {"dense_dgrad": [0.5]}


def test_prediction_is_the_plans() -> None:
    row = {"prune": "mvue", "geometry": layers.LAYERS["llm_4096.up"]._asdict()}
    gpu = GPUS["h100-measured"]
    times = predict(row, gpu)
    best = best_backward(Work.of(geometry_of(row["geometry"])), gpu, "two_pass", gpu.compress_costs["mvue"])
    assert min(times.totals().values()) == pytest.approx(1e3 * best.seconds)
    assert gpu_of({"gpu": {"name": "NVIDIA H100 80GB HBM3"}}) is gpu
    assert gpu_of({"gpu": {"name": "Some other GPU"}}) is None
    assert gpu_of({}) is None


def test_the_command_prints_the_entry() -> None:
    sources = fit_roofline.MEASURED["h100-measured"]
    result = CliRunner().invoke(fit_roofline.main, [*map(str, sources.layers), "--kernels", str(sources.kernels)])
    assert result.exit_code == 0, result.output
    assert str(GPUS["h100-measured"]) in result.output
    assert "compress_both" in result.output


def test_a_gpu_without_a_data_sheet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({"provenance": {"gpu": {"name": "X1"}}, "rows": []}))
    result = CliRunner().invoke(fit_roofline.main, [str(file)])
    assert result.exit_code == 1
    assert "the peaks of X1 are not in" in result.output


def test_results_of_two_gpus_are_refused() -> None:
    files = [str(source.layers[0]) for source in fit_roofline.MEASURED.values()]
    result = CliRunner().invoke(fit_roofline.main, files)
    assert result.exit_code == 1
    assert "NVIDIA H100 80GB HBM3 and NVIDIA H200" in result.output
