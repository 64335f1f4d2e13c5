"""``sdgp bench``: the training step of a named model on this machine, dense and SDGP in turns."""

from __future__ import annotations

import functools
from pathlib import Path

import click
import torch
from torch import nn

from sdgp_accel import models
from sdgp_accel.benchmark import OptimizerFn, benchmark
from sdgp_accel.cli.options import OutputFile, config_options, model_options, output
from sdgp_accel.config import SDGPConfig
from sdgp_accel.roofline import GPUS

# Name -> (dtype of the parameters, dtype of autocast).
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "amp-bf16": (torch.float32, torch.bfloat16),
    "amp-fp16": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, None),
}
OPTIMIZERS: dict[str, OptimizerFn] = {
    "sgd": functools.partial(torch.optim.SGD, lr=1e-4, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-5),
}


@click.command("bench", context_settings={"show_default": True})
@model_options
@click.option("--batch", "-b", type=click.IntRange(min=1), help="Samples per step.  [default: 64; on a CPU 8]")
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="[default: cuda where there is a GPU]")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), help="[default: amp-bf16; on a CPU fp32]")
@click.option("--channels-last/--no-channels-last", default=True, help="Memory format of images.")
@click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), default="sgd", help="Whose step is timed.")
@click.option("--compile", is_flag=True, help="torch.compile both contenders.")
@click.option("--peers", is_flag=True, help="Also time both the other way: compiled, or with --compile eager.")
@click.option("--steps", type=click.IntRange(min=1), help="Counted steps of each.  [default: 50; on a CPU 5]")
@click.option("--warmup", type=click.IntRange(min=0), help="Uncounted steps of each.  [default: 10; on a CPU 1]")
@click.option("--gpu", type=click.Choice(list(GPUS)), help="Whose roofline to show.  [default: this GPU, else a100]")
@config_options
@click.option("--json", "json_path", type=OutputFile(), help="Write everything, with provenance, here.")
@click.option("--html", "html_path", type=OutputFile(), help="Write a self-contained page here.")
def command(
    model: str,
    image_size: int | None,
    seq_len: int | None,
    batch: int | None,
    device: str | None,
    precision: str | None,
    channels_last: bool,
    optimizer: str,
    compile: bool,
    peers: bool,
    steps: int | None,
    warmup: int | None,
    gpu: str | None,
    config: SDGPConfig,
    json_path: Path | None,
    html_path: Path | None,
) -> None:
    """Time the training step of MODEL, dense and SDGP in turns, and say where it goes.

    MODEL is resnet9 (the default), digits, gpt, gpt2-medium, conv_lm, ..., or the name of a torchvision or timm
    classifier. On a CPU nothing is accelerated; the times are then those of an emulation, shown beside a prediction
    for --gpu.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    dtype, autocast = PRECISIONS[precision or ("amp-bf16" if on_gpu else "fp32")]
    torch.manual_seed(0)
    with torch.device(device):  # initialised there: on a CPU that alone can take longer than the benchmark
        net = models.build(model, image_size=image_size, seq_len=seq_len).to(dtype)
    size = batch or (64 if on_gpu else 8)
    example = models.example_batch(model, size, image_size=image_size, seq_len=seq_len, device=device)
    report = benchmark(
        *_prepare(net, example, dtype, channels_last),
        config,
        optimizer=OPTIMIZERS[optimizer],
        autocast=autocast,
        compile=compile,
        peers=peers,
        steps=steps or (50 if on_gpu else 5),
        warmup=(10 if on_gpu else 1) if warmup is None else warmup,
        gpu=gpu,
        name=model,
    )
    try:
        for path, save in ((json_path, report.save_json), (html_path, report.save_html)):
            if path is not None:
                save(path)
    finally:  # what was measured is shown, whatever becomes of the files
        output().print(report)
    for path in filter(None, (json_path, html_path)):
        click.echo(f"wrote {path}")


def _prepare(
    net: nn.Module, batch: models.Batch, dtype: torch.dtype, channels_last: bool
) -> tuple[nn.Module, models.Batch]:
    """Floating-point inputs in `dtype`, images and convolutions in the memory format asked for."""
    inputs = batch.inputs.to(dtype) if batch.inputs.is_floating_point() else batch.inputs
    if inputs.dim() == 4 and channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        net = net.to(memory_format=torch.channels_last)
    return net, batch._replace(inputs=inputs)
