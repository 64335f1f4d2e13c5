"""The README's picture shows the numbers of the result files: what is drawn into each panel, and its digest."""

import json

import pytest

from bench import figure
from tests.bench.test_report import GEMM, LAYERS, PRUNE, STEP

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def axis():
    shown = pyplot.figure()
    yield shown.add_subplot()
    pyplot.close(shown)


def rows(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def dots(axis):
    """What each label's points say: {label: {row's name: x}}."""
    return {
        line.get_label(): {rows(axis)[int(y)]: x for x, y in line.get_xydata()}
        for line in axis.get_lines()
        if not line.get_label().startswith("_")
    }


def test_steps_are_bars_over_the_fastest_dense_step(axis):
    """10, 9, 8 ms, and 7 of a model that has no compiled dense step."""
    compiled = {"name": "SDGP, compiled", "sdgp": True, "step": {"median": 7e-3}}
    other = STEP | {"model": "other", "contenders": [STEP["contenders"][0], compiled]}
    figure.steps(axis, [other, STEP])
    assert [name.split("\n")[:2] for name in rows(axis)] == [["resnet9", "batch 512"], ["other", "batch 512"]]
    bars = {(round(bar.get_y() + bar.get_height() / 2), bar.get_facecolor()): bar.get_width() for bar in axis.patches}
    legend = axis.get_legend_handles_labels()
    colors = {label: handle.patches[0].get_facecolor() for handle, label in zip(*legend, strict=True)}
    assert bars[0, colors["dense"]] == pytest.approx(10 / 9)
    assert bars[0, colors["dense, compiled"]] == pytest.approx(1)
    assert bars[0, colors["SDGP"]] == pytest.approx(8 / 9)
    assert sorted(width for (row, _), width in bars.items() if row == 1) == pytest.approx([0.7, 1])


def test_layers_are_dots_by_function_and_products_alone(axis):
    """Dense 0.6 ms over sparse products of 0.2 + 0.15 ms; the slower layer lies lower."""
    ran, unsupported = LAYERS["rows"]
    slow = ran | {"layer": "slow", "backward_speedup": 0.9, "auto_speedup": 1.0}
    slow["milliseconds"] = ran["milliseconds"] | {"sparse_dgrad": 0.6}
    paper = ran | {"prune": "rescale_magnitude", "backward_speedup": 1.6}
    figure.layers(axis, [LAYERS | {"rows": [ran, unsupported, slow, paper]}])
    assert rows(axis) == ["slow", "a.fc"]
    found = dots(axis)
    assert found["products alone"] == pytest.approx({"slow": 0.6 / 0.75, "a.fc": 0.6 / 0.35})
    assert found["mvue, prune + compress included"] == {"slow": 0.9, "a.fc": 1.5}
    assert found["rescale_magnitude, prune + compress included"] == {"a.fc": 1.6}


def test_products_are_peers_times_over_ours(axis):
    """Not those of a fallback: they are not what the GPU runs."""
    row = GEMM["results"][0]
    other = row | {"layer": "other", "pas": "wgrad", "us": {"ours": [4.0], "cublas": [3.0]}}
    fallback = GEMM | {"results": [row | {"layer": "fallback", "fallback": "sm80"}]}
    figure.products(axis, [GEMM | {"results": [row, other]}, fallback])
    assert rows(axis) == ["other", "fc"]
    assert dots(axis) == {
        "dgrad, over cuBLAS (dense)": {"fc": 1.5},
        "wgrad, over cuBLAS (dense)": {"other": 0.75},
        "dgrad, over cuSPARSELt": {"fc": 1.25},
    }


def test_prune_and_compress_of_both_operands_by_rule(axis):
    figure.prune(axis, [PRUNE | {"rows": [*PRUNE["rows"], PRUNE["rows"][0] | {"rule": "random", "clones": 2.5}]}])
    assert rows(axis) == ["mvue", "random"]
    assert [line.get_xydata().tolist() for line in axis.get_lines()[:2]] == [[[3.5, 0]], [[2.5, 1]]]


def test_the_digest_is_of_the_contents_of_all_that_is_shown(tmp_path):
    seen = set()
    for result in (STEP, LAYERS, GEMM, PRUNE, STEP | {"batch": 256}):
        (tmp_path / "result.json").write_text(json.dumps(result))
        seen.add(figure.digest(tmp_path))
    assert len(seen) == 5
    (tmp_path / "unrelated.json").write_text("{}")
    assert figure.digest(tmp_path) in seen
