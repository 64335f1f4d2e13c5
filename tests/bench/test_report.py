"""The README shows what the result files say; the tables are built from made-up files here."""

import json
import re

import pytest
from click.testing import CliRunner

from bench import figure, report
from bench.prediction import predict
from bench.step_time import MODELS
from bench.tables import layers, products, pruning, sections, steps
from bench.tables.pages import speed
from sdgp_accel.roofline import GPUS

LINEAR = {"tokens": 512, "in_channels": 64, "out_channels": 128, "positions_per_sample": 1}
CONV = {
    "batch": 8, "in_channels": 16, "height": 8, "width": 8, "out_channels": 32, "out_height": 4, "out_width": 4,
    "kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "channels_last": True,
}  # fmt: skip
ORIGIN = {
    "gpu": {
        "name": "A GPU",
        "cuda": "13.0",
        "state": {"driver_version": "580", "clocks.sm": "1 MHz", "power.draw": "2 W"},
    },
    "versions": {"torch": "2.11.0"},
    "git_revision": "0123456789abcdef",
}
LAYERS = {
    "benchmark": "layers",
    "provenance": ORIGIN,
    "rows": [
        {
            "layer": "a.fc",
            "prune": "mvue",
            "geometry": LINEAR,
            "milliseconds": {
                "dense_dgrad": 0.3,
                "dense_wgrad": 0.3,
                "sparse_dgrad": 0.2,
                "sparse_wgrad": 0.15,
                "compress_both": 0.05,
            },
            "backward_speedup": 1.5,
            "auto_prunes": [True, True],
            "auto_speedup": 1.5,
        },
        {"layer": "a.conv", "prune": "mvue", "geometry": CONV, "unsupported": "odd channels"},
    ],
}
GEMM = {
    "provenance": ORIGIN,
    "results": [
        {
            "layer": "fc", "T": 64, "pas": "dgrad", "m": 64, "n": 32, "k": 128,
            "us": {"ours": [2.0, 2.1, 1.9], "cublas": [3.0], "cslt": [2.5]},
        }
    ],
}  # fmt: skip
BOTH = {"dgrad": True, "wgrad": True, "bias": False}
PRUNE_ROW = {
    "case": "a.fc", "t": 64, "c": 32, "dtype": "bfloat16", "rule": "mvue", "needs": BOTH,
    "microseconds": {"kernel": {"median": 35.0}}, "clones": 3.5, "torch_tiles": 0.5,
}  # fmt: skip
PRUNE = {
    "benchmark": "kernels",
    "provenance": ORIGIN,
    "rows": [
        PRUNE_ROW,
        PRUNE_ROW | {"case": "no dgrad", "needs": BOTH | {"dgrad": False}, "clones": 9.0},
        PRUNE_ROW | {"case": "no wgrad", "needs": BOTH | {"wgrad": False}, "clones": 9.0},
        PRUNE_ROW | {"case": "bias", "needs": BOTH | {"bias": True}, "clones": 9.0},
    ],
}


def contender(name, milliseconds, sdgp=False):
    return {
        "name": name,
        "sdgp": sdgp,
        "compiled": "compiled" in name,
        "step": {"median": milliseconds / 1e3},
        "peak_bytes": (3 if sdgp else 2) << 30,
    }


STEP = {
    "kind": "measurement",
    "model": "resnet9",
    "batch": 512,
    "outcome": "faster",
    "contenders": [contender("dense", 10), contender("SDGP", 8, sdgp=True), contender("dense, compiled", 9)],
    "sdgp_over_dense": {"dense": {"median": 0.8}, "dense, compiled": {"median": 0.9}},
    "settings": {"config": {"prune": "mvue"}},
    "prediction": {"gpu": {"title": "X1"}, "dense_seconds": 8e-3, "two_pass": {"seconds": 7.1e-3}},
    "provenance": ORIGIN,
}


PARTS = {"layers": layers.LAYERS, "gemm": products.GEMM, "prune": pruning.PRUNE}


def build(section, folder, content):
    (folder / "result.json").write_text(json.dumps(content))
    return sections.render(PARTS[section], folder) if section in PARTS else report.SECTIONS[section](folder)


def test_everything_is_in_step_with_the_results():
    result = CliRunner().invoke(report.main, ["--check"])
    assert result.exit_code == 0, result.output


def test_the_command_writes_what_is_stale_and_check_only_names_it(tmp_path, monkeypatch):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text("".join(f"<!-- results: {name} -->\nold\n<!-- end -->\n" for name in report.SECTIONS))
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "RESULTS", results)
    for result in ([], GEMM):  # nothing there yet, then pages and picture of another result
        (results / "gemm.json").write_text(json.dumps(result))
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        checked = CliRunner().invoke(report.main, ["--check"])
        assert checked.exit_code == 1
        assert "out of step with bench/results/: README.md and speed.md and speed.png;" in checked.output
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
        assert CliRunner().invoke(report.main, []).exit_code == 0
        assert CliRunner().invoke(report.main, ["--check"]).exit_code == 0
        assert "old" not in readme.read_text()
        assert ("| fc, 64 positions |" in (results / "speed.md").read_text()) == bool(result)


@pytest.mark.parametrize("section", ["layers", "gemm", "prune", "convergence"])
def test_missing_results_are_named_as_such(section, tmp_path):
    others = {"layers": GEMM, "gemm": PRUNE, "prune": STEP, "convergence": LAYERS}
    assert build(section, tmp_path, others[section]) == "Not measured yet."


def test_the_page_of_speeds_has_every_part(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GEMM))
    text = speed(tmp_path)
    assert text.count("\n## ") == 3
    assert text.count("Not measured yet.") == 2
    assert "\nFrom [a.json](a.json): A GPU" in text


def test_the_picture_knows_what_it_was_drawn_from(tmp_path):
    results, picture = tmp_path / "results", tmp_path / "speed.png"
    results.mkdir()
    assert not figure.is_current(picture, results)
    figure.draw(results, picture)  # with nothing to show
    assert figure.is_current(picture, results)
    sm80 = GEMM | {"results": [GEMM["results"][0] | {"fallback": "sm80"}]}
    for name, result in {"a": LAYERS, "b": GEMM, "c": PRUNE, "d": STEP, "e": sm80}.items():
        (results / f"{name}.json").write_text(json.dumps(result))
    assert not figure.is_current(picture, results)
    figure.draw(results, picture)
    assert figure.is_current(picture, results)
    (results / "e.json").unlink()
    assert not figure.is_current(picture, results)


def test_models_without_a_step_time_are_named(tmp_path):
    text = report.SECTIONS["step_time"](tmp_path)
    assert all(f"| {model} | not measured yet | not measured yet |" in text for model in MODELS)
    assert "| resnet9 | not measured yet" not in build("step_time", tmp_path, STEP)


def test_summary_says_what_there_is_and_what_there_is_not(tmp_path):
    empty = report.SECTIONS["summary"](tmp_path)
    assert empty.count("| not measured yet |") == 6
    eager = STEP | {"contenders": STEP["contenders"][:2], "sdgp_over_dense": {"dense": {"median": 0.8}}}
    cases = {"build": {"status": "passed"}, "tests-a": {"status": "passed"}, "racecheck-b": {"status": "failed"}}
    checks = {"benchmark": "suite", "provenance": ORIGIN, "cases": cases}
    for name, result in {"layers": LAYERS, "gemm": GEMM, "prune": PRUNE, "step": eager, "suite": checks}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    text = report.SECTIONS["summary"](tmp_path)
    assert text.count("| not measured yet |") == 1  # convergence
    assert "| resnet9, batch 512, `mvue`: +20.0 % (eager; compiled: not measured yet) | A GPU |" in text
    assert "`mvue`: 1.50 ×; `auto` prunes 1 of 1 layers: 1.50 ×" in text
    assert "| dgrad, 1 shapes: 1.50 × cuBLAS (dense), 1.25 × cuSPARSELt |" in text
    assert "mvue 3.50 ×" in text
    assert "| tests-a passed, racecheck-b failed | A GPU |" in text


def test_summary_names_the_machine_of_each_claim_where_there_are_several(tmp_path):
    other = GEMM | {"provenance": ORIGIN | {"gpu": ORIGIN["gpu"] | {"name": "B GPU"}}}
    for name, result in {"gemm-a": GEMM, "gemm-b": other}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    text = report.SECTIONS["summary"](tmp_path)
    claim = "dgrad, 1 shapes: 1.50 × cuBLAS (dense), 1.25 × cuSPARSELt"
    assert f"| {claim} (A GPU)<br>{claim} (B GPU) | A GPU, B GPU |" in text


def test_summary_of_convergence(tmp_path):
    cells = [
        {"cell": "dense", "mean": 1.5, "delta": 0.0},
        {"cell": "mvue 2:4 both", "mean": 1.54, "delta": 0.04},
    ]
    task = {"title": "A task", "score": "loss", "cells": cells}
    text = build("summary", tmp_path, {"environments": [{"device": "A GPU"}], "tasks": {"a": task}})
    assert "| A task: +0.040 (dense 1.500) | A GPU |" in text


def test_layers(tmp_path):
    text = build("layers", tmp_path, LAYERS)
    head = "| a.fc | 64 → 128, 512 | 0.0, 0 | `mvue` | 600 | 0 | "
    assert head + "— | 50.0 | — | 1.50 × | 2.00 × | — | **1.50 ×** | — | dgrad + wgrad sparse, 1.50 × |" in text
    assert f"| a.conv | 16 → 32 3×3 /2, 8×4×4 | 0.0, 0 | `mvue` |{'  |' * 10} dense: odd channels |" in text
    assert "Predicted" not in text
    assert "[result.json](result.json): A GPU, driver 580, 1 MHz, 2 W, CUDA 13.0, torch 2.11.0" in text


def test_work_and_rate_of_a_layer_by_hand(tmp_path):
    """2 · 10,000 · 1000 · 5000 = 10^11 FLOP per pass; dY 100 MB, X 20 MB, W 10 MB; two passes in 0.6 ms."""
    geometry = LINEAR | {"tokens": 10_000, "in_channels": 1000, "out_channels": 5000}
    text = build("layers", tmp_path, LAYERS | {"rows": [LAYERS["rows"][0] | {"geometry": geometry}]})
    assert "| a.fc | 1000 → 5000, 10000 | 100.0, 130 | `mvue` | 600 | 333 | " in text


def test_layers_of_a_known_gpu_have_predictions_beside_them(tmp_path):
    """Measured: four times the dense ops predicted, twice prune + compress, five times the sparse products."""
    known = {**ORIGIN, "gpu": {**ORIGIN["gpu"], "name": "NVIDIA H100 80GB HBM3"}}
    row = LAYERS["rows"][0] | {"geometry": LINEAR | {"tokens": 8192, "in_channels": 1024, "out_channels": 1024}}
    predicted = predict(row, GPUS["h100-measured"])
    dense, sparse, compress = predicted.dense_dgrad, predicted.sparse_dgrad, predicted.compress_both
    row["milliseconds"] = {
        **dict.fromkeys(("dense_dgrad", "dense_wgrad"), 4 * dense),
        **dict.fromkeys(("sparse_dgrad", "sparse_wgrad"), 5 * sparse),
        "compress_both": 2 * compress,
    }
    text = build("layers", tmp_path, {**LAYERS, "provenance": known, "rows": [row]})
    assert "the roofline H100-MEASURED (`sdgp plan`)" in text
    whole = (compress + 2 * sparse) / (2 * compress + 10 * sparse)
    assert f"dense 0.25 ×; prune + compress 0.50 ×; products 0.20 ×; whole backward {whole:.2f} ×" in text
    cells = text.splitlines()[2].split(" | ")
    microseconds = [sections.microseconds(1e3 * value) for value in (2 * dense, 2 * compress, compress)]
    assert cells[6:9] == microseconds
    assert cells[11] == sections.times(dense / sparse)
    assert cells[13] == sections.times(2 * dense / (compress + 2 * sparse))


def test_claims_about_layers_are_of_one_prune_function_each():
    """Median and range of the layers that ran; `auto` counts as pruning where it prunes either pass."""
    ran, unsupported = LAYERS["rows"]
    rows = [
        ran | {"backward_speedup": speedup, "auto_prunes": prunes, "auto_speedup": auto}
        for speedup, prunes, auto in ((0.5, [False, False], 1), (2, [True, True], 2), (1, [False, True], 1.25))
    ]
    times = {"dense_dgrad": 1, "dense_wgrad": 2, "dense_both": 2.5, "compress_wgrad": 0.25, "sparse_wgrad": 0.75}
    other = ran | {"prune": "random", "backward_speedup": 7.0, "auto_speedup": 8.0, "milliseconds": times}
    claims = layers.layer_claims(LAYERS | {"rows": [*rows, unsupported, other]})
    assert claims == [
        "`mvue`: 1.00 × (0.50–2.00); `auto` prunes 2 of 3 layers: 1.25 × (1.00–2.00)",
        "`random`: 7.00 ×; `auto` prunes 1 of 1 layers: 8.00 ×; with the weight gradient alone pruned 1.25 ×",
    ]


def test_a_step_against_eager_dense_alone_says_so():
    """Also where SDGP's own step was compiled."""
    contenders = [contender("dense", 10), contender("SDGP, compiled", 7, sdgp=True)]
    eager = STEP | {"contenders": contenders, "sdgp_over_dense": {"dense": {"median": 0.7}}}
    assert steps.step_claims(eager)[0].endswith("+30.0 % (eager; compiled: not measured yet)")
    assert steps.step_claims(STEP) == ["resnet9, batch 512, `mvue`: +10.0 %"]


def test_a_saving_that_the_steps_do_not_bear_out_says_so(tmp_path):
    even = STEP | {"outcome": "even"}
    assert steps.step_claims(even) == ["resnet9, batch 512, `mvue`: +10.0 %, within the spread"]
    assert "| **+10.0 %**, within the spread (dense +20.0 %;" in build("step_time", tmp_path, even)


def test_the_machine_is_told_as_it_was_under_load_and_with_every_caveat():
    loaded = {"driver_version": "580", "clocks.sm": "3 MHz", "power.draw": "4 W"}
    origin = ORIGIN | {"gpu": ORIGIN["gpu"] | {"state_under_load": loaded}, "note": "One part was not timed."}
    wanted = "A GPU, driver 580, 3 MHz, 4 W, CUDA 13.0, torch 2.11.0, revision 0123456789ab. One part was not timed"
    assert sections.machine({"provenance": origin}) == wanted


def test_gemm(tmp_path):
    text = build("gemm", tmp_path, GEMM)
    assert "| fc, 64 positions | dgrad | 64 × 32 × 128 | 2.0 | 0 | 1.50 × | 1.25 × | not measured yet |" in text


def test_prune(tmp_path):
    text = build("prune", tmp_path, PRUNE)
    assert "| a.fc | 64 × 32 bfloat16 | mvue | 35.0 | **3.50 ×** | 0.50 × |" in text
    assert not any(other in text for other in ("no dgrad", "no wgrad", "bias"))


def test_step_time_compares_with_the_fastest_dense_step(tmp_path):
    text = build("step_time", tmp_path, STEP)
    head = "| resnet9, batch 512, `mvue` | 10.00 | 9.00 | 8.00 |"
    saved = "**+10.0 %** (dense +20.0 %; dense, compiled +10.0 %)"
    assert (
        f"{head} not measured yet | {saved} | +10.0 %, X1 | 3.00 (+50.0 %) | [result.json](bench/results/result.json)"
        in text
    )
    left_out = STEP["settings"] | {"left_out": {"SDGP, compiled": "no compiler"}}
    assert f"{head} does not run |" in build("step_time", tmp_path, STEP | {"settings": left_out})
    assert "result.json: A GPU, driver 580" in text


def test_what_is_pruned_how_is_in_the_name():
    config = {"prune": "magnitude", "grad_input": "sparse", "grad_weight": "dense"}
    label = steps.step_label(STEP | {"settings": {"config": config}})
    assert label == "resnet9, batch 512, `magnitude`, grad_weight dense"


def test_emulated_steps_are_no_savings(tmp_path):
    assert "| resnet9 | not measured yet" in build("step_time", tmp_path, STEP | {"kind": "emulated"})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"benchmark": "layers"}', b'{"benchmark": "suite"}',
     b'{"benchmark": "kernels", "rows": [{}]}', b'{"contenders": []}', b'{"results": [3]}',
     b'{"tasks": {"a": {}}, "environments": []}'],
)  # fmt: skip
def test_a_damaged_result_is_named(tmp_path, monkeypatch, content):
    path = tmp_path / "no_result.json"
    path.write_bytes(content)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    result = CliRunner().invoke(report.main, ["--check"])
    assert result.exit_code == 1
    assert f"{path} is damaged or no result of this project" in result.output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- results: step_time -->", "<!-- results: nothing -->", "results: nothing --> must name one of summary, "),
        ("<!-- results: step_time -->", "", "README.md has no section step_time"),
        ("<!-- end -->", "", "results: summary --> must name one of .* and have an end of its own"),
    ],
)
def test_a_readme_without_its_sections_is_left_alone(tmp_path, monkeypatch, old, new, message):
    text = report.README.read_text().replace(old, new, 1)
    readme = tmp_path / "README.md"
    readme.write_text(text)
    monkeypatch.setattr(report, "README", readme)
    for arguments in ([], ["--check"]):
        result = CliRunner().invoke(report.main, arguments)
        assert result.exit_code == 1
        assert re.search(message, result.output)
    assert readme.read_text() == text


def test_sections_are_filled_and_stay_filled(tmp_path):
    text = "before\n<!-- results: convergence -->\nold\n<!-- end -->\nafter\n"
    wanted = "before\n<!-- results: convergence -->\n\nNot measured yet.\n\n<!-- end -->\nafter\n"
    assert report.filled(text, tmp_path) == wanted
    assert report.filled(wanted, tmp_path) == wanted
