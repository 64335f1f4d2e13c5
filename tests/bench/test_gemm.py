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

from bench import gemm, tables
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
    monkeypatch.setattr(gemm, "CACHE_BYTES", 3 * 2 * (48 * 32 + 32 * 24 + 48 * 24))


@pytest.mark.parametrize("name", ["dgrad", "wgrad"])
def test_a_row(clock: None, name: str) -> None:
    row = gemm.measure(MadeUp(), gemm.Layer("net.fc", 48, 24, 32), name, True, CPU)
    assert (row["m"], row["n"], row["k"]) == ((48, 24, 32) if name == "dgrad" else (32, 24, 48))
    assert row["relative_error"] < 1e-2
    assert row["buffer_sets"] >= 2
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
    assert "These are the sm80 kernels, the fallback for" in tables.render(tables.GEMM, tmp_path)
    assert "sm80 fallback, dgrad, 1 shapes: 1.50 × cuBLAS (dense)" in tables.summary(tmp_path)


def test_layers_are_distinct() -> None:
    assert len({layer.name for layer in gemm.LAYERS}) == len(gemm.LAYERS)


def test_readme_table_reads_the_result_file(tmp_path: Path) -> None:
    (tmp_path / "gemm.json").write_text(json.dumps({"benchmark": "gemm", "provenance": {}, "results": [ROW]}))
    row = (
        "| net.fc, 64 positions | wgrad | 512 × 256 × 64000 | 10.0 | 1678 | 1.50 × | not measured yet | does not run |"
    )
    assert row in tables.render(tables.GEMM, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(gemm.main, [])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output
