"""What the sparse kernels make of one layer's backward: prune + compress, dgrad and wgrad, against cuBLAS and cuDNN.

    python -m bench.layers                            # every layer in the list, to bench/results/layers-<GPU>.json
    python -m bench.layers --only vit_large --prune rescale_magnitude

For each layer, dense and sparse parts are timed in turns in one process on random bf16 operands (channels_last, cuDNN
in benchmark mode); medians. "Backward" is all of it, compression included, as the one call that it is (the sum of its
parts where there is none). Beside it stands what the GPU's roofline predicts, so that its parameters can be corrected
(`bench.fit_roofline`). Needs a GPU with sparse tensor cores and the kernels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from bench.gpu import find_kernels, result_path
from bench.tables import layers as table
from bench.tables.sections import print_table
from sdgp_accel import SDGPConfig, tuning
from sdgp_accel.backends import KERNELS, Backend
from sdgp_accel.config import FUNCTIONS
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.provenance import provenance
from sdgp_accel.roofline import Work


def linear(tokens: int, in_channels: int, out_channels: int) -> LinearGeometry:
    return LinearGeometry(tokens, in_channels, out_channels)


def conv(
    batch: int, size: int, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, pad: int | None = None
) -> Geometry:
    pad = kernel // 2 if pad is None else pad
    window = (stride, stride, pad, pad, 1, 1, 1)
    weight_shape = (out_channels, in_channels, kernel, kernel)
    return Conv2dGeometry.of((batch, in_channels, size, size), weight_shape, window, channels_last=True)


# ViT-L/16 at 224 pixels has 197 tokens per image. GPT-2 XL: 1600 wide, 16 x 1024 tokens. ResNet-9 at batch 512 is the
# paper's net; torchvision's ResNet-18 and ResNet-50 at batch 256 on 224 pixels, each shape once; convolutions of a
# diffusion UNet's block of 64 x 64 pixels and 320 channels. Most telling first; layers with 3 inputs stay dense.
LAYERS: dict[str, Geometry] = {
    "vit_large.fc1": linear(128 * 197, 1024, 4096),
    "vit_large.fc2": linear(128 * 197, 4096, 1024),
    "resnet9.res1": conv(512, 16, 256, 256),
    "resnet9.res2": conv(512, 8, 512, 512),
    "resnet9.conv3": conv(512, 16, 256, 512),
    "resnet9.conv2": conv(512, 32, 128, 256, kernel=5, stride=2),
    "resnet9.conv4": conv(512, 8, 512, 256, pad=0),
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
    "unet.640_320": conv(16, 64, 640, 320),
    "unet.640_320_1x1": conv(16, 64, 640, 320, kernel=1),
    "unet.320_s2": conv(16, 64, 320, 320, stride=2),
    "resnet18.3x3_64_128_s2": conv(256, 56, 64, 128, stride=2),
    "resnet18.3x3_128_256_s2": conv(256, 28, 128, 256, stride=2),
    "resnet18.3x3_256_512_s2": conv(256, 14, 256, 512, stride=2),
    "resnet18.1x1_64_128_s2": conv(256, 56, 64, 128, kernel=1, stride=2),
    "resnet18.1x1_128_256_s2": conv(256, 28, 128, 256, kernel=1, stride=2),
    "resnet18.1x1_256_512_s2": conv(256, 14, 256, 512, kernel=1, stride=2),
    "resnet50.3x3_256_s2": conv(256, 28, 256, 256, stride=2),
    "resnet50.3x3_512_s2": conv(256, 14, 512, 512, stride=2),
    "resnet50.1x1_64_64": conv(256, 56, 64, 64, kernel=1),
    "resnet50.1x1_64_256": conv(256, 56, 64, 256, kernel=1),
    "resnet50.1x1_256_64": conv(256, 56, 256, 64, kernel=1),
    "resnet50.1x1_256_128": conv(256, 56, 256, 128, kernel=1),
    "resnet50.1x1_128_512": conv(256, 28, 128, 512, kernel=1),
    "resnet50.1x1_512_128": conv(256, 28, 512, 128, kernel=1),
    "resnet50.1x1_512_256": conv(256, 28, 512, 256, kernel=1),
    "resnet50.1x1_1024_512": conv(256, 14, 1024, 512, kernel=1),
    "resnet50.1x1_2048_512": conv(256, 7, 2048, 512, kernel=1),
    "resnet50.1x1_256_512_s2": conv(256, 56, 256, 512, kernel=1, stride=2),
    "resnet50.1x1_512_1024_s2": conv(256, 28, 512, 1024, kernel=1, stride=2),
    "resnet50.1x1_1024_2048_s2": conv(256, 14, 1024, 2048, kernel=1, stride=2),
}


def time_layer(backend: Backend, name: str, function: str, device: torch.device) -> dict[str, Any]:
    """One result row: the times in milliseconds, or the reason why the kernels do not take the layer."""
    geometry = LAYERS[name]
    kind = "linear" if isinstance(geometry, LinearGeometry) else "conv2d"
    # Group scope: the one that needs no pass of its own over the gradient.
    plan = decode(plan_string(kind, SDGPConfig(prune=function, scope="group", backend=KERNELS)))
    row: dict[str, Any] = {"layer": name, "prune": function, "geometry": geometry._asdict(), "dtype": "bfloat16"}
    unsupported = backend.unsupported(geometry, plan, torch.bfloat16, device)
    if unsupported is not None:
        return {**row, "unsupported": unsupported}
    measured = tuning.measure(backend, plan, geometry, torch.bfloat16, device)
    times, chosen = measured.device, tuning.choose(measured)
    totals = times.totals()
    return {
        **row,
        "dense_gflop_per_pass": Work.of(geometry).flops * 1e-9,
        "milliseconds": times._asdict(),
        "host_milliseconds": measured.host._asdict(),
        "tilings": [str(tiling) for tiling in measured.tilings],
        "backward_milliseconds": totals[True, True],
        "backward_speedup": times.dense / totals[True, True],
        "auto_prunes": chosen,
        "auto_speedup": times.dense / totals[chosen],
    }


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
    backend, device = find_kernels(" (see `sdgp plan` for predictions)")
    torch.backends.cudnn.benchmark = True
    path = path or result_path("layers")
    started, rows = time.monotonic(), []
    result: dict[str, Any] = {"benchmark": "layers", "rows": rows}
    for name, function in cases(only, functions):
        if time.monotonic() - started > 60.0 * minutes:
            break
        rows.append(time_layer(backend, name, function, device))
        result |= {"provenance": provenance(device), "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
    print_table(table.LAYERS, result)


if __name__ == "__main__":
    main()
