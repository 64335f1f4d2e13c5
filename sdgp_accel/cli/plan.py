"""``sdgp plan``: the saving of each layer of a named model on a named GPU, predicted from shapes."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from sdgp_accel import models
from sdgp_accel.cli.options import OutputFile, model_options, output, pruning_options
from sdgp_accel.config import SDGPConfig
from sdgp_accel.plan import plan
from sdgp_accel.roofline import GPUS


@click.command("plan", context_settings={"show_default": True})
@model_options
@click.option("--batch", "-b", type=click.IntRange(min=1), default=64, help="Samples per step.")
@click.option("--gpu", type=click.Choice(list(GPUS)), default="a100", help="Whose peaks to use.")
@click.option("--tflops", type=float, help="Dense 16-bit tensor-core peak, TFLOP/s, instead of the GPU's.")
@click.option("--bandwidth", type=float, help="Memory bandwidth, TB/s.")
@click.option("--compute-efficiency", type=float, help="Share of --tflops that kernels reach.")
@click.option("--memory-efficiency", type=float, help="Share of --bandwidth that kernels reach.")
@click.option("--sparse-speedup", type=float, help="2:4 GEMM over dense GEMM, compute-bound.")
@pruning_options
@click.option("--json", "json_path", type=OutputFile(), help="Write every layer here.")
def command(
    model: str,
    batch: int,
    image_size: int | None,
    seq_len: int | None,
    gpu: str,
    tflops: float | None,
    bandwidth: float | None,
    compute_efficiency: float | None,
    memory_efficiency: float | None,
    sparse_speedup: float | None,
    config: SDGPConfig,
    json_path: Path | None,
) -> None:
    """Predict what SDGP saves per layer of MODEL. From shapes alone: needs no GPU and runs nothing.

    MODEL is resnet9 (the default), digits, gpt, conv_lm, ..., or the name of a torchvision or timm classifier. T×K→C in
    the table is a layer's product in the forward pass: T output positions or tokens, K inputs to each of C channels.
    """
    with torch.device("meta"):
        net = models.build(model, image_size=image_size, seq_len=seq_len)
        example = models.example_batch(model, batch, image_size=image_size, seq_len=seq_len, device="meta")
    report = plan(
        net,
        example,
        gpu,
        config,
        tflops=tflops,
        bandwidth=bandwidth,
        compute_efficiency=compute_efficiency,
        memory_efficiency=memory_efficiency,
        sparse_speedup=sparse_speedup,
    )
    output().print(report)
    if json_path is not None:
        json_path.write_text(report.to_json() + "\n")
