"""What the sparse kernels make of one layer's backward: prune + compress, dgrad and wgrad, against cuBLAS and cuDNN.

    python bench/layers.py                            # every layer in the list, to bench/results/layers-<GPU>.json
    python bench/layers.py --only vit_large --prune rescale_magnitude

For each layer, dense and sparse parts are timed in turns in one process on random bf16 operands (channels_last, cuDNN
in benchmark mode); medians. "Backward" is the sum of what one backward runs: compression included. Needs a GPU with
sparse tensor cores and the kernels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from sdgp_accel import SDGPConfig, tuning
from sdgp_accel.backends import KERNELS, Backend, load
from sdgp_accel.config import FUNCTIONS
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.provenance import provenance


def linear(tokens: int, in_channels: int, out_channels: int) -> LinearGeometry:
    return LinearGeometry(tokens, in_channels, out_channels)


def conv(batch: int, size: int, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> Geometry:
    pad = kernel // 2
    window = (stride, stride, pad, pad, 1, 1, 1)
    weight_shape = (out_channels, in_channels, kernel, kernel)
    return Conv2dGeometry.of((batch, in_channels, size, size), weight_shape, window, channels_last=True)


# ViT-L/16 at 224 pixels has 197 tokens per image. GPT-2 XL: 1600 wide, 16 x 1024 tokens. ResNet-9 at batch 512 is the
# paper's net; ResNet-50 at batch 256 on 224 pixels; one block of a diffusion UNet.
LAYERS: dict[str, Geometry] = {
    "vit_large.fc1": linear(128 * 197, 1024, 4096),
    "vit_large.fc2": linear(128 * 197, 4096, 1024),
    "resnet9.res1": conv(512, 16, 256, 256),
    "resnet9.res2": conv(512, 8, 512, 512),
    "resnet9.conv3": conv(512, 16, 256, 512),
    "resnet9.conv2": conv(512, 32, 128, 256, kernel=5, stride=2),
    "vit_large.qkv": linear(128 * 197, 1024, 3072),
    "vit_large.proj": linear(128 * 197, 1024, 1024),
    "gpt2_xl.fc1": linear(16 * 1024, 1600, 6400),
    "gpt2_xl.fc2": linear(16 * 1024, 6400, 1600),
    "llm_4096.up": linear(8192, 4096, 14336),
    "llm_4096.down": linear(8192, 14336, 4096),
    "resnet50.3x3_256": conv(256, 14, 256, 256),
    "resnet50.3x3_512": conv(256, 7, 512, 512),
    "resnet50.3x3_128": conv(256, 28, 128, 128),
    "resnet50.3x3_128_s2": conv(256, 56, 128, 128, stride=2),
    "resnet50.3x3_64": conv(256, 56, 64, 64),
    "resnet50.1x1_1024_256": conv(256, 14, 1024, 256, kernel=1),
    "resnet50.1x1_256_1024": conv(256, 14, 256, 1024, kernel=1),
    "resnet50.1x1_512_2048": conv(256, 7, 512, 2048, kernel=1),
    "unet.320": conv(16, 64, 320, 320),
}


def dense_flop(geometry: Geometry) -> float:
    """Multiplications and additions of one dense backward pass, dgrad or wgrad."""
    per_output = geometry.in_channels
    if isinstance(geometry, Conv2dGeometry):
        per_output *= geometry.kernel[0] * geometry.kernel[1]
    return 2.0 * geometry.positions * geometry.out_channels * per_output


def time_layer(backend: Backend, name: str, function: str) -> dict[str, Any]:
    """One result row: the times in milliseconds, or the reason why the kernels do not take the layer."""
    geometry, device = LAYERS[name], torch.device("cuda")
    kind = "linear" if isinstance(geometry, LinearGeometry) else "conv2d"
    # Group scope: the one that needs no pass of its own over the gradient.
    plan = decode(plan_string(kind, SDGPConfig(prune=function, scope="group", backend=KERNELS)))
    row: dict[str, Any] = {"layer": name, "prune": function, "geometry": geometry._asdict(), "dtype": "bfloat16"}
    unsupported = backend.unsupported(geometry, plan, torch.bfloat16, device)
    if unsupported is not None:
        return {**row, "unsupported": unsupported}
    times = tuning.measure(backend, plan, geometry, torch.bfloat16, device)
    totals = times.totals()
    return {
        **row,
        "dense_gflop_per_pass": dense_flop(geometry) * 1e-9,
        "milliseconds": times._asdict(),
        "backward_milliseconds": totals[True, True],
        "backward_speedup": times.dense / totals[True, True],
        "auto_prunes": tuning.choose(times),
        "auto_speedup": times.dense / totals[tuning.choose(times)],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="one layer's backward, bf16: dense ÷ sparse, and microseconds")
    for column in ("layer", "prune", "dense", "compress", "dgrad ×", "wgrad ×", "backward ×", "auto ×"):
        result.add_column(column, justify="left" if column in ("layer", "prune") else "right")
    for row in rows:
        if "unsupported" in row:
            result.add_row(row["layer"], row["prune"], row["unsupported"])
            continue
        ms = row["milliseconds"]
        result.add_row(
            row["layer"],
            row["prune"],
            f"{1e3 * (ms['dense_dgrad'] + ms['dense_wgrad']):.0f}",
            f"{1e3 * ms['compress_both']:.0f}",
            f"{ms['dense_dgrad'] / ms['sparse_dgrad']:.2f}",
            f"{ms['dense_wgrad'] / ms['sparse_wgrad']:.2f}",
            f"{row['backward_speedup']:.2f}",
            f"{row['auto_speedup']:.2f}",
        )
    return result


def cases(only: str, functions: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for function in functions:
        for name in LAYERS:
            if name.startswith(only):
                yield name, function


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", default="", help="Layers whose names start so.")
@click.option(
    "--prune", "functions", multiple=True, type=click.Choice(FUNCTIONS), default=("mvue", "rescale_magnitude")
)
@click.option("--minutes", default=float("inf"), help="Start no layer after this long.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Where the results go.")
def main(only: str, functions: tuple[str, ...], minutes: float, path: Path | None) -> None:
    """Time the backward of each layer in the list, dense and sparse."""
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA device: there is nothing to measure here (see `sdgp plan` for predictions)")
    device = torch.device("cuda")
    backend = load(KERNELS)
    problem = "not installed" if backend is None else backend.unavailable(device)
    if backend is None or problem is not None:
        raise click.ClickException(f"the {KERNELS} kernels: {problem}")
    torch.backends.cudnn.benchmark = True
    if path is None:
        path = Path("bench/results") / f"layers-{torch.cuda.get_device_name().replace(' ', '_')}.json"
    started, rows = time.monotonic(), []
    for name, function in cases(only, functions):
        if time.monotonic() - started > 60.0 * minutes:
            break
        rows.append(time_layer(backend, name, function))
        result = {"benchmark": "layers", "provenance": provenance(device), "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
    Console(width=110).print(table(rows))


if __name__ == "__main__":
    main()
