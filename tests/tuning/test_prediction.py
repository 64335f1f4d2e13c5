"""The choice without a clock: a function of its arguments alone, and close to what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from bench.fit_roofline import MEASURED
from bench.prediction import geometry_of
from sdgp_accel import SDGPConfig, roofline
from sdgp_accel.backends import gpu
from sdgp_accel.geometry import Conv2dGeometry, LinearGeometry
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.roofline import device_figures
from sdgp_accel.tuning import BackwardTimes
from sdgp_accel.tuning.prediction import predict

CUDA = torch.device("cuda", 0)
WIDE = LinearGeometry(8192, 14336, 4096)  # compute-bound, a gradient much narrower than the input
NARROW = LinearGeometry(50176, 256, 1024)  # memory-bound


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "device_facts", lambda device: gpu.Device((9, 0), 132, wgmma=True))


def plan(kind: str = "linear", **options: object):
    return decode(plan_string(kind, SDGPConfig(**options)))


@pytest.mark.parametrize("function", ["magnitude", "rescale_magnitude", "random", "mvue"])
def test_large_layers_gain_and_memory_bound_ones_do_not(function: str) -> None:
    tuned = predict(plan(prune=function), WIDE, CUDA)
    assert tuned.prunes == (True, True)
    assert tuned.times is None
    assert tuned.reason.startswith("deterministic algorithms, nothing is timed; predicted for H100")
    assert 1.05 < float(tuned.reason.split(": ")[-1].removesuffix(" × dense")) < 2.0
    assert predict(plan(prune=function), NARROW, CUDA).prunes == (False, False)


def test_only_passes_of_the_plan_and_nothing_else_matters() -> None:
    for passes in ((True, False), (False, True)):
        modes = ["sparse" if sparse else "dense" for sparse in passes]
        one = plan(prune="magnitude", grad_input=modes[0], grad_weight=modes[1])
        assert {predict(one, WIDE, CUDA).prunes for _ in range(3)} == {passes}


def test_one_pass_alone_has_to_make_up_for_its_compression() -> None:
    assert predict(plan(), WIDE, CUDA).single == (True, True)
    assert predict(plan(grad_weight="dense"), WIDE, CUDA).single == (True, False)
    shares = LinearGeometry(16384, 3072, 3072)
    assert predict(plan(), shares, CUDA).prunes == (True, True)
    assert predict(plan(), shares, CUDA).single == (False, False)
    assert predict(plan(), NARROW, CUDA).single == (False, False)


def test_what_compression_costs_decides() -> None:
    conv = Conv2dGeometry.of((512, 256, 16, 16), (256, 256, 3, 3), (1, 1, 1, 1, 1, 1, 1), True)
    assert any(predict(plan("conv2d", prune="rescale_magnitude", scope="group"), conv, CUDA).prunes)
    assert not any(predict(plan("conv2d", prune="rescale_magnitude", scope="sample_channel"), conv, CUDA).prunes)
    assert not any(predict(plan("conv2d", prune="mvue", m=16), conv, CUDA).prunes)
    assert not any(predict(plan("conv2d", prune={"grad_input": "mvue", "grad_weight": "random"}), conv, CUDA).prunes)


def test_a_gpus_own_costs_come_before_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 mvue takes longer, beside its faster memory, than on an H100; magnitude is only known of that."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    layer = LinearGeometry(8192, 2048, 4096)
    assert not any(predict(plan(prune="mvue"), layer, CUDA).prunes)
    assert predict(plan(prune="magnitude"), layer, CUDA).prunes == (True, True)


@pytest.mark.parametrize(
    ("capability", "wgmma", "gains"),
    [((9, 0), True, True), ((9, 0), False, False), ((10, 0), False, False), ((11, 0), False, False),
     ((8, 0), False, True), ((8, 9), False, True), ((12, 0), False, True)],
)  # fmt: skip
def test_only_kernels_that_keep_up_are_expected_to_gain(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], wgmma: bool, gains: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(gpu, "device_facts", lambda device: gpu.Device(capability, 132, wgmma))
    assert any(predict(plan(prune="magnitude"), WIDE, CUDA).prunes) is gains
    assert not any(predict(plan(prune="magnitude"), LinearGeometry(8192, 14337, 4096), CUDA).prunes)  # odd rows


@pytest.mark.parametrize(
    ("device", "entry"), [("NVIDIA H100 80GB HBM3", "h100-measured"), ("NVIDIA H200", "h200-measured")]
)
def test_it_is_near_what_was_measured(device: str, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    rows = [row for path in MEASURED[entry].layers for row in json.loads(path.read_text())["rows"]]
    dense = best = predicted = 0.0
    for row in rows:
        geometry = geometry_of(row["geometry"])
        kind = "linear" if isinstance(geometry, LinearGeometry) else "conv2d"
        chosen = predict(plan(kind, prune=row["prune"], scope="group"), geometry, CUDA).prunes
        times = BackwardTimes(**row["milliseconds"])
        totals = times.totals()
        dense, predicted, best = dense + times.dense, predicted + totals[chosen], best + min(totals.values())
    assert predicted - best < 0.25 * (dense - best)  # most of what there is to gain


@pytest.mark.parametrize(
    ("name", "capability", "figures"),
    [("NVIDIA H100 80GB HBM3", (9, 0), "h100-measured"), ("NVIDIA H200", (9, 0), "h200-measured"),
     ("NVIDIA A100-SXM4-40GB", (8, 0), "a100-40"), ("NVIDIA A100-SXM4-80GB", (8, 0), "a100-80"),
     ("NVIDIA GeForce RTX 4090", (8, 9), "rtx4090"), ("NVIDIA A30", (8, 0), "a30"), ("NVIDIA A10", (8, 6), "a10"),
     ("NVIDIA RTX A5000", (8, 6), "rtx-a6000"), ("NVIDIA GeForce RTX 3080", (8, 6), "rtx3090"),
     ("NVIDIA GeForce RTX 4080", (8, 9), "rtx4090"), ("NVIDIA GeForce RTX 5080", (12, 0), "rtx5090"),
     ("NVIDIA B200", (10, 0), "h100-measured"), ("Orin", (8, 7), "l40s"), ("NVIDIA GB10", (12, 1), "l40s"),
     ("NVIDIA GH200 480GB", (9, 0), "h100")],
)  # fmt: skip
def test_a_gpu_has_the_figures_of_its_kind(name: str, capability: tuple[int, int], figures: str) -> None:
    assert device_figures(name, capability) is roofline.GPUS[figures]
