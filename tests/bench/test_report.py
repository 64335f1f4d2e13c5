"""The README shows what the result files say; the tables are built from made-up files here."""

import json

import pytest
from click.testing import CliRunner

from bench import report, tables

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
    "meta": {"smi": "A GPU, 580", "torch": "2.11.0"},
    "results": [
        {
            "layer": "fc", "T": 64, "pas": "dgrad", "m": 64, "n": 32, "k": 128,
            "us": {"ours": [2.0, 2.1, 1.9], "cublas": [3.0], "cslt": [2.5], "peer_x.so": [4.0], "peer_y.so": [2.2]},
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
    "rows": [PRUNE_ROW, PRUNE_ROW | {"case": "one pass", "needs": BOTH | {"dgrad": False}}],
}


def contender(name, milliseconds, sdgp=False):
    return {"name": name, "sdgp": sdgp, "compiled": "compiled" in name, "step": {"median": milliseconds / 1e3}}


STEP = {
    "kind": "measurement",
    "model": "resnet9",
    "batch": 512,
    "contenders": [contender("dense", 10), contender("SDGP", 8, sdgp=True), contender("dense, compiled", 9)],
    "sdgp_over_dense": {"dense": {"median": 0.8}, "dense, compiled": {"median": 0.9}},
    "settings": {"config": {"prune": "mvue"}},
    "provenance": ORIGIN,
}


def build(section, folder, content):
    (folder / "result.json").write_text(json.dumps(content))
    return report.SECTIONS[section](folder)


def test_readme_is_in_step_with_the_results():
    result = CliRunner().invoke(report.main, ["--check"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("section", ["layers", "gemm", "prune", "step_time"])
def test_missing_results_are_named_as_such(section, tmp_path):
    assert report.SECTIONS[section](tmp_path) == tables.NOT_MEASURED
    others = {"layers": GEMM, "gemm": PRUNE, "prune": STEP, "step_time": LAYERS}
    assert build(section, tmp_path, others[section]) == tables.NOT_MEASURED


def test_layers(tmp_path):
    text = build("layers", tmp_path, LAYERS)
    row = "| a.fc | 64 → 128, 512 | `mvue` | 600 | 50.0 | 1.50 × | 2.00 × | **1.50 ×** | dgrad + wgrad sparse, 1.50 × |"
    assert row in text
    assert "| a.conv | 16 → 32 3×3 /2, 8×4×4 | `mvue` |  |  |  |  |  | dense: odd channels |" in text
    assert "1.50 × (1.50 to 1.50) the speed of dense over 1 layers; `auto` prunes 1 of them" in text
    assert "[result.json](bench/results/result.json): A GPU, driver 580, 1 MHz, 2 W, CUDA 13.0, torch 2.11.0" in text


def test_gemm(tmp_path):
    text = build("gemm", tmp_path, GEMM)
    assert "| fc, 64 positions | dgrad | 64 × 32 × 128 | 2.0 | 0 | 1.50 × | 1.25 × | 1.10 × |" in text
    assert "- dgrad: 1.50 × (1.50 to 1.50) dense cuBLAS, 1.25 × (1.25 to 1.25) cuSPARSELt over 1 shapes." in text


def test_prune(tmp_path):
    text = build("prune", tmp_path, PRUNE)
    assert "| a.fc | 64 × 32 bfloat16 | mvue | 35.0 | **3.50 ×** | 0.50 × |" in text
    assert "`clone()` of the gradient: mvue 3.50 × (3.50 to 3.50)." in text
    assert "one pass" not in text


def test_step_time_compares_with_the_fastest_dense_step(tmp_path):
    text = build("step_time", tmp_path, STEP)
    assert "| resnet9, batch 512 | `mvue` | dense 10.00; dense, compiled 9.00 | 8.00 | **+10.0 %** |" in text


def test_emulated_steps_are_no_savings(tmp_path):
    assert build("step_time", tmp_path, STEP | {"kind": "emulated"}) == tables.NOT_MEASURED


def test_long_tables_are_folded(tmp_path):
    assert "<details>" not in build("prune", tmp_path, PRUNE)
    assert "<details>" in build("prune", tmp_path, PRUNE | {"rows": [PRUNE_ROW] * tables.LONG})


def test_sections_are_filled_and_stay_filled(tmp_path):
    text = "before\n<!-- results: prune -->\nold\n<!-- end -->\nafter\n"
    wanted = f"before\n<!-- results: prune -->\n\n{tables.NOT_MEASURED}\n\n<!-- end -->\nafter\n"
    assert report.filled(text, tmp_path) == wanted
    assert report.filled(wanted, tmp_path) == wanted
