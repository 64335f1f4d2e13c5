"""``sdgp validate``: every layer's gradients of a named model, checked against float64."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from sdgp_accel import models
from sdgp_accel.cli.options import OutputFile, config_options, model_options, output
from sdgp_accel.config import SDGPConfig
from sdgp_accel.validation import validate

# Name -> (dtype of the parameters, dtype of autocast).
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "amp-bf16": (torch.float32, torch.bfloat16),
    "amp-fp16": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
    "fp32": (torch.float32, None),
    "fp64": (torch.float64, None),
}


def check_seed(context: click.Context, parameter: click.Parameter, seed: int) -> int:
    """`seed`; BadParameter where torch takes no such number. Not an IntRange, whose ends would fill the help page."""
    if not -(2**63) <= seed < 2**64:
        raise click.BadParameter(f"must have at most 64 bits; got {seed}")
    return seed


@click.command("validate", context_settings={"show_default": True})
@model_options
@click.option("--batch", "-b", type=click.IntRange(min=1), default=4, help="Samples.")
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="[default: cuda where there is a GPU]")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="fp32", help="What the layers compute in.")
@click.option("--draws", type=click.IntRange(min=0), default=8, help="Draws of mvue to estimate its bias from.")
@click.option("--layers", "patterns", multiple=True, metavar="GLOB", help="Only layers of these names; repeatable.")
@click.option("--seed", default=0, callback=check_seed, help="Of the model, the batch and the draws.")
@config_options
@click.option("--json", "json_path", type=OutputFile(), help="Write every check here.")
def command(
    model: str,
    image_size: int | None,
    seq_len: int | None,
    batch: int,
    device: str | None,
    precision: str,
    draws: int,
    patterns: tuple[str, ...],
    seed: int,
    config: SDGPConfig,
    json_path: Path | None,
) -> None:
    """Check the backward passes of MODEL: exit code 1 where a result is further from float64 than rounding explains, or
    mvue is biased.

    MODEL is resnet9 (the default), digits, gpt, conv_lm, ..., or the name of a torchvision or timm classifier; its
    weights and its batch are random.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype, autocast = PRECISIONS[precision]
    torch.manual_seed(seed)
    net = models.build(model, image_size=image_size, seq_len=seq_len).to(device, dtype)
    inputs, targets = models.example_batch(model, batch, image_size=image_size, seq_len=seq_len, device=device)
    example = (inputs.to(dtype) if inputs.is_floating_point() else inputs, targets)
    report = validate(net, example, config, patterns or None, autocast=autocast, draws=draws, seed=seed)
    console = output()
    console.print(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    for check in report.failures:
        console.print(f"FAILED: {check.layer} {check.pass_name}: {check.problem}", highlight=False, soft_wrap=True)
    if not report.checks:
        reasons = dict.fromkeys(layer.reason for layer in report.swap.skipped)
        raise click.ClickException(f"no layer was checked: {'; '.join(reasons) or 'none has a backward pass'}")
    if not report.ok:
        raise SystemExit(1)
