"""The list of `bench/layers.py` and its arithmetic; timings need a GPU."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from bench import layers
from sdgp_accel import tuning
from sdgp_accel.backends.reference import ReferenceBackend
from sdgp_accel.tuning import BackwardTimes


def test_flop_of_a_layer_by_hand() -> None:
    assert layers.dense_flop(layers.linear(10, 4, 6)) == 2 * 10 * 4 * 6
    assert layers.dense_flop(layers.conv(2, 8, 4, 6, kernel=3, stride=2)) == 2 * (2 * 4 * 4) * 6 * (4 * 9)


@pytest.mark.parametrize("name", layers.LAYERS)
def test_a_row_of_every_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = BackwardTimes(4.0, 4.0, 2.0, 2.5, compress_both=1.5, compress_dgrad=1.0, compress_wgrad=1.0)
    monkeypatch.setattr(tuning, "measure", lambda *arguments: times)
    row = layers.time_layer(ReferenceBackend(), name, "mvue")
    assert row["backward_milliseconds"] == 6.0
    assert row["backward_speedup"] == pytest.approx(8 / 6)
    assert row["auto_prunes"] == (True, True)
    assert layers.table([row]).row_count == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(layers.main, [])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output
