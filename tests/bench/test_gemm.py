"""bench/gemm.py where there is no GPU: its table, the README's reading of its rows, and what it says."""

import json

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from bench import gemm, tables

ROW = {
    "layer": "net.fc", "T": 64, "pas": "wgrad", "m": 512, "n": 256, "k": 64_000,
    "tiling": {"tile": "128x256", "cluster_size": 2, "splits": 3, "group_n": 1},
    "us": {"ours": [9.0, 10.0, 50.0], "cublas": [15.0, 14.0, 16.0]},
}  # fmt: skip


def test_table_shows_medians_and_ratios_to_the_peers_there_are():
    console = Console(width=120, record=True)
    console.print(gemm.table([ROW]))
    line = next(line for line in console.export_text().splitlines() if "net.fc" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["net.fc", "wgrad", "512x256x64000", "128x256/3", "10.0", "1678", "1.50", "-"]


def test_readme_table_reads_the_result_file(tmp_path):
    (tmp_path / "gemm.json").write_text(json.dumps({"benchmark": "gemm", "provenance": {}, "results": [ROW]}))
    missing = " | ".join([tables.NOT_MEASURED] * 2)
    row = f"| net.fc, 64 positions | wgrad | 512 × 256 × 64000 | 10.0 | 1678 | 1.50 × | {missing} |"
    assert row in tables.gemm(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(gemm.main, [])
    assert result.exit_code == 1
    assert "compute capability 9.0" in result.output
