"""bench/gemm.py where there is no GPU: its rows with a made-up backend and clock, the README's reading of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from bench import gemm
from bench.tables.pages import summary
from bench.tables.products import GEMM
from bench.tables.sections import render
from sdgp_accel.backends import Operands
from sdgp_accel.backends.reference import ReferenceBackend
from sdgp_accel.backends.tiles import Tiling
from sdgp_accel.semi_structured import compress_matrix

CPU = torch.device("cpu")
ROW = {
    "layer": "net.fc", "T": 64, "pas": "wgrad", "m": 512, "n": 256, "k": 64_000, "tiling": "a tiling",
    "us": {"ours": [9.0, 10.0, 50.0], "cublas": [15.0, 14.0, 16.0]}, "unavailable": {"semi_structured": "8.x only"},
}  # fmt: skip


RIGHT, WRONG = Tiling("sm90", "128x256", 2, 1, 8), Tiling("sm90", "128x256", 1, 1, 8)


class MadeUp(ReferenceBackend):
    """Compressed operands and two tilings; products as the reference has them, the second tiling's wrong."""

    def prune_compress(self, *arguments: Any) -> Operands:
        pruned = super().prune_compress(*arguments)
        both = [None if x is None else compress_matrix(x, axis) for x, axis in ((pruned.dgrad, 1), (pruned.wgrad, 0))]
        return Operands(both[0], both[1], None)

    def tilings(self, *arguments: Any) -> tuple[Tiling, ...]:  # type: ignore[override]
        return RIGHT, WRONG

    def dgrad(self, operand: Any, weight: Any, geometry: Any, tiling: Any = None) -> Any:  # type: ignore[override]
        return super().dgrad(operand.decompress(), weight, geometry) * (2 if tiling == WRONG else 1)

    def wgrad(self, operand: Any, x: Any, geometry: Any, tiling: Any = None) -> Any:  # type: ignore[override]
        return super().wgrad(operand.decompress(), x, geometry) * (2 if tiling == WRONG else 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every closure is called once and took as many microseconds as its name has letters."""

    def time_in_turns(contenders: dict[str, list[Any]], repeats: int) -> dict[str, list[float]]:
        for closures in contenders.values():
            for closure in closures:
                closure()
        return {name: [float(len(name))] * repeats for name in contenders}

    monkeypatch.setattr(gemm, "time_in_turns", time_in_turns)
    monkeypatch.setattr(gemm, "CACHE_BYTES", 3 * 2 * (48 * 32 + 32 * 24 + 48 * 24))  # of three times all operands


@pytest.mark.parametrize("name", ["dgrad", "wgrad"])
def test_every_contender_multiplies_the_same_operands_in_every_turn(
    clock: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    contenders: dict[str, list[Any]] = {}
    monkeypatch.setattr(gemm, "time_in_turns", lambda given, repeats: contenders.update(given) or {})
    gemm.measure(MadeUp(), gemm.Layer("net.fc", 48, 24, 32), name, False, CPU)
    results = [[closure().float() for closure in contenders[peer]] for peer in ("ours", "cublas")]
    for own, theirs in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs, atol=0.1, rtol=0.02)
    assert len({float(result.sum()) for result in results[0]}) == 4


def test_cusparselt_runs_with_what_its_own_search_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", lambda a: a)
    found = SimpleNamespace(mm_search=lambda *arguments: (7, 3, 1, 40))
    monkeypatch.setattr(torch._C, "_cusparselt", found, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda a, b, **settings: ran.append(settings))
    layer = gemm.Layer("net.fc", 48, 24, 32)
    for closure in gemm.cslt([gemm.problem(MadeUp(), layer, "dgrad", CPU) for _ in range(2)]):
        closure()
    assert len(ran) == 3  # and once to see whether it runs
    for settings in ran:
        assert (settings["alg_id"], settings["split_k"]) == (7, 3)
        assert settings.get("split_k_mode", settings.get("split_k_one_kernel")) == 1


def test_turns_are_shuffled_and_timed_one_by_one_on_buffers_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of milliseconds that only the contenders move; warming up takes longer."""
    now, calls = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = now[0]

        def elapsed_time(self, end: Any) -> float:
            return float(end.time - self.time)

    def closure(name: str, buffer: int, milliseconds: float) -> Any:
        def run() -> None:
            warm_up = len(calls) < 2 * gemm.WARM_UP
            now[0] += 100 if warm_up else milliseconds
            calls.append((name, buffer))

        return run

    for name, stand_in in (("Event", Event), ("_sleep", lambda cycles: None), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    contenders = {name: [closure(name, i, ms) for i in range(3)] for name, ms in (("ours", 0.25), ("peer", 0.5))}
    assert gemm.time_in_turns(contenders, 9) == {"ours": pytest.approx([250] * 9), "peer": pytest.approx([500] * 9)}
    assert [buffer for _, buffer in calls] == [i % 3 for i in range(2 * (gemm.WARM_UP + 9))]
    assert {name for name, _ in calls[::2]} == {"ours", "peer"}  # who comes first


@pytest.mark.parametrize("name", ["dgrad", "wgrad"])
def test_a_row(clock: None, name: str) -> None:
    row = gemm.measure(MadeUp(), gemm.Layer("net.fc", 48, 24, 32), name, True, CPU)
    assert (row["m"], row["n"], row["k"]) == ((48, 24, 32) if name == "dgrad" else (32, 24, 48))
    assert row["relative_error"] < 1e-2
    assert (row["T"], row["buffer_sets"]) == (48, 4)
    assert {peer: sample[0] for peer, sample in row["us"].items()} == {"ours": 4.0, "cublas": 6.0}
    assert set(row["unavailable"]) == {"cslt", "semi_structured"}
    assert all(row["unavailable"].values())
    assert set(row["search"]) == {str(RIGHT), str(WRONG)}
    assert row["fallback"] is None
    json.dumps(row)


def test_a_wrong_product_is_no_result(clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MadeUp, "tilings", lambda *arguments: (WRONG,))
    with pytest.raises(click.ClickException, match=r"net\.fc: wrong dgrad, relative error"):
        gemm.measure(MadeUp(), gemm.Layer("net.fc", 48, 24, 32), "dgrad", False, CPU)
    monkeypatch.setattr(MadeUp, "dgrad", lambda *arguments: torch.full((48, 24), float("nan")))
    with pytest.raises(click.ClickException, match="relative error nan"):
        gemm.measure(MadeUp(), gemm.Layer("net.fc", 48, 24, 32), "dgrad", False, CPU)
    monkeypatch.setattr(MadeUp, "tilings", lambda *arguments: ())
    with pytest.raises(click.ClickException, match="no sparse wgrad on this GPU"):
        gemm.measure(MadeUp(), gemm.Layer("net.fc", 48, 24, 32), "wgrad", False, CPU)


def test_another_family_is_called_the_fallback(clock: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[Any] = []
    real = MadeUp.dgrad

    def recording(self: MadeUp, *arguments: Any) -> Any:
        ran.append(arguments[-1])
        return real(self, *arguments)

    monkeypatch.setattr(MadeUp, "dgrad", recording)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    layer = gemm.Layer("net.fc", 48, 24, 32)
    assert gemm.measure(MadeUp(), layer, "dgrad", False, CPU, "sm90")["fallback"] is None
    assert {tiling.family for tiling in ran} == {"sm90"}
    ran.clear()
    row = gemm.measure(MadeUp(), layer, "dgrad", False, CPU, "sm80")
    assert {tiling.family for tiling in ran} == {"sm80"}
    assert row["fallback"] == "sm80"
    (tmp_path / "gemm.json").write_text(json.dumps({"benchmark": "gemm", "provenance": {}, "results": [row]}))
    assert "These are the sm80 kernels, the fallback for" in render(GEMM, tmp_path)
    assert "sm80 fallback, dgrad, 1 shapes: 1.50 × cuBLAS (dense)" in summary(tmp_path)


def test_layers_are_distinct_and_have_the_shapes_of_their_names() -> None:
    layers = {layer.name: tuple(layer[1:]) for layer in gemm.LAYERS}
    assert len(layers) == len(gemm.LAYERS)
    assert layers["vit_large.fc1"] == (128 * 196, 1024, 4096)
    assert layers["vit_large.fc2"] == (128 * 196, 4096, 1024)
    assert layers["gpt2_xl.qkv"] == (16 * 1024, 1600, 4800)
    assert layers["resnet50.1x1_1024_256"] == (256 * 14 * 14, 1024, 256)


def test_readme_table_reads_the_result_file(tmp_path: Path) -> None:
    (tmp_path / "gemm.json").write_text(json.dumps({"benchmark": "gemm", "provenance": {}, "results": [ROW]}))
    row = (
        "| net.fc, 64 positions | wgrad | 512 × 256 × 64000 | 10.0 | 1678 | 1.50 × | not measured yet | does not run |"
    )
    assert row in render(GEMM, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(gemm.main, [])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output
