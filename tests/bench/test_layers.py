"""The list of `bench/layers.py` and its arithmetic; timings need a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from bench import layers
from bench.tables.layers import LAYERS
from bench.tables.sections import print_table
from sdgp_accel import models, tuning
from sdgp_accel.backends import Tilings
from sdgp_accel.backends.reference import ReferenceBackend
from sdgp_accel.config import PASSES
from sdgp_accel.roofline import Work
from sdgp_accel.trace import trace
from sdgp_accel.tuning import BackwardTimes, Measurement


def ungrouped(model: nn.Module, batch: models.Batch) -> set[Work]:
    """The convolutions of a model that may be pruned, for all passes."""
    calls = [call for call in trace(model, batch) if isinstance(call.module, nn.Conv2d)]
    return {replace(call.work, passes=PASSES, sparse_passes=PASSES) for call in calls if call.module.in_channels > 3}


@pytest.mark.parametrize(("model", "batch"), [("resnet9", 512), ("resnet18", 256), ("resnet50", 256)])
def test_every_convolution_of_the_papers_models_is_on_the_list(model: str, batch: int) -> None:
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        net, example = models.build(model), models.example_batch(model, batch, device="meta")
    assert ungrouped(net, example) <= {Work.of(geometry) for geometry in layers.LAYERS.values()}


def test_no_shape_twice() -> None:
    assert len(set(layers.LAYERS.values())) == len(layers.LAYERS)


@pytest.mark.parametrize("name", layers.LAYERS)
def test_a_row_of_every_layer(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times = BackwardTimes(4.0, 4.0, 2.0, 2.5, compress_both=1.5, compress_dgrad=1.0, compress_wgrad=1.0)
    monkeypatch.setattr(tuning, "measure", lambda *arguments: Measurement(times, times, Tilings()))
    row = layers.time_layer(ReferenceBackend(), name, "mvue", torch.device("cpu"))
    assert row["backward_milliseconds"] == 6.0
    assert row["backward_speedup"] == pytest.approx(8 / 6)
    assert row["auto_prunes"] == (True, True)
    assert row["dense_gflop_per_pass"] == pytest.approx(1e-9 * Work.of(layers.LAYERS[name]).flops)
    result = {"provenance": {"gpu": {"name": "NVIDIA H100 80GB HBM3"}}, "rows": [row]}
    print_table(LAYERS, result)
    printed = capsys.readouterr().out
    assert name in printed
    assert "H100-MEASURED" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(layers.main, [])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output
