"""Every option reaches what it is for: the commands hand on what was typed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sdgp_accel import SDGPConfig
from sdgp_accel.cli import main

PRUNING = (
    *("--prune", "rescale_magnitude", "--pattern", "1:4", "--grad-weight", "dense", "--scope", "tensor"),
    *("--backend", "reference", "--fallback", "emulate"),
)
CONFIG = SDGPConfig(
    prune="rescale_magnitude", n=1, m=4, grad_weight="dense", scope="tensor", backend="reference", fallback="emulate"
)


def called(monkeypatch: pytest.MonkeyPatch, function: str, *arguments: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a command passes to `function` of its module, which then raises instead of working."""
    passed: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(*positional: Any, **named: Any) -> None:
        passed.append((positional, named))
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sdgp_accel.cli.{arguments[0]}.{function}", stop)
    result = CliRunner().invoke(main, arguments)
    assert passed, result.output
    return passed[0]


def test_bench_hands_on_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--device", "cpu", "--batch", "3", "--precision", "amp-fp16", "--optimizer", "adamw", "--compile")
    options += ("--peers", "--steps", "7", "--warmup", "0", "--gpu", "h100", "--seq-len", "16", *PRUNING)
    (net, batch, config), named = called(monkeypatch, "benchmark", "bench", "gpt", *options)
    assert config == CONFIG
    assert (net.config.context, batch.inputs.shape) == (16, (3, 16))
    assert isinstance(named.pop("optimizer")(net.parameters()), torch.optim.AdamW)
    assert named == {
        "autocast": torch.float16, "compile": True, "peers": True, "steps": 7, "warmup": 0, "gpu": "h100",
        "name": "gpt",
    }  # fmt: skip


def test_bench_on_a_cpu_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    (net, batch, config), named = called(monkeypatch, "benchmark", "bench", "digits", "--device", "cpu")
    assert (config, net.head.weight.dtype, len(batch.inputs)) == (SDGPConfig(), torch.float32, 8)
    assert (named["steps"], named["warmup"], named["autocast"], named["gpu"]) == (5, 1, None, None)
    assert not named["compile"]
    assert not named["peers"]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_bench_prepares_images_and_weights_alike(
    precision: str, dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--device", "cpu", "--image-size", "32", "--precision", precision)
    options += () if channels_last else ("--no-channels-last",)
    (net, batch, _), named = called(monkeypatch, "benchmark", "bench", "resnet9", *options)
    weight = net.features[1][0].weight
    assert (batch.inputs.dtype, weight.dtype, named["autocast"]) == (dtype, dtype, None)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_validate_hands_on_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--device", "cpu", "--batch", "3", "--precision", "amp-bf16", "--draws", "5", "--seed", "7")
    options += ("--layers", "0.*", "--layers", "head", "--image-size", "16", *PRUNING)
    (net, (images, _), config, patterns), named = called(monkeypatch, "validate", "validate", "digits", *options)
    assert (config, patterns, images.shape) == (CONFIG, ("0.*", "head"), (3, 1, 16, 16))
    assert named == {"autocast": torch.bfloat16, "draws": 5, "seed": 7}
    (other, *_), _ = called(monkeypatch, "validate", "validate", "digits", "--device", "cpu", "--seed", "8")
    assert not torch.equal(net.head.weight, other.head.weight)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("model", ["digits", "gpt"])
def test_validate_computes_in_the_precision_asked_for(
    model: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    options = (model, "--device", "cpu", "--precision", precision)
    (net, (inputs, _), _, patterns), named = called(monkeypatch, "validate", "validate", *options)
    assert (net.head.weight.dtype, patterns, named["autocast"]) == (dtype, None, None)
    assert inputs.dtype == (dtype if model == "digits" else torch.int64)


def test_plan_hands_on_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"tflops": 100.0, "bandwidth": 2.0, "compute_efficiency": 0.5, "memory_efficiency": 0.75}
    figures["sparse_speedup"] = 1.25
    options = [text for name, value in figures.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    options += ["--batch", "3", "--seq-len", "16", *PRUNING[:8]]
    (net, batch, gpu, config), named = called(monkeypatch, "plan", "plan", "gpt", *options)
    assert (config.prune, config.n, config.grad_weight, config.scope) == ("rescale_magnitude", 1, "dense", "tensor")
    assert (gpu, batch.inputs.shape, net.config.context) == ("a100", (3, 16), 16)
    assert named == figures


def test_train_hands_on_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    options = ("--device", "cpu", "--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out"))
    (recipe, *rest), _ = called(monkeypatch, "train", "train", "cifar10/rescale-2-4", "--function", "mvue", *options)
    assert recipe.sdgp.functions == ("mvue", "mvue")
    assert (recipe.sdgp.grad_weight, recipe.data) == ("dense", "cifar10")  # the rest of the recipe's own pruning stays
    assert rest == [tmp_path / "out", tmp_path, False, "cpu"]
    (dense, *_), _ = called(monkeypatch, "train", "train", "--function", "dense", "--set", "lr=0.5")
    assert (dense.sdgp, dense.lr) == (None, 0.5)
    (pruned, *_), _ = called(monkeypatch, "train", "train", "cifar10/dense", "--function", "random")
    assert pruned.sdgp == SDGPConfig(prune="random")
