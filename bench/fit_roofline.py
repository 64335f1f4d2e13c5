"""The roofline's numbers for a GPU from measurements on it: an entry for `sdgp_accel.roofline.GPUS`.

    python -m bench.fit_roofline bench/results/layers_h100.json bench/results/kernels-NVIDIA_H100_80GB_HBM3.json

Peaks are those of the data sheet. Each other number is a median, so that no single layer decides it:

- memory_efficiency: what `clone()` of a gradient moves per second over the peak bandwidth (bench/kernels.py);
- compute_efficiency: a dense dgrad's or wgrad's FLOP/s over the peak rate, over the layers that are bound by compute
  even at twice the peak rate (bench/layers.py);
- sparse_speedup: a dense pass's time over a sparse one's, over the same layers;
- compress_costs: prune + compress of both operands over the time that 2.125 times the gradient's bytes take at that
  bandwidth, by prune function (bench/kernels.py).

Prints the entry, and how far each part of the backward is from what it predicts.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bench.kernels import RULES
from bench.prediction import geometry_of, predict
from sdgp_accel.config import PASSES
from sdgp_accel.roofline import GPU, GPUS, Work, compress_rule, compress_seconds, known_gpu, sparse_seconds

RESULTS = Path(__file__).parent / "results"
# What the entries of `GPUS` come from.
MEASURED = {"h100-measured": (RESULTS / "layers_h100.json", RESULTS / "kernels-NVIDIA_H100_80GB_HBM3.json")}
DIGITS = 2


def fit(name: str, layers: dict[str, Any], kernels: dict[str, Any]) -> GPU:
    """The entry `name`; the peaks are those of `GPUS`' entry for the GPU that `layers` was measured on."""
    device = layers["provenance"]["gpu"]["name"]
    sheet = GPUS.get(known_gpu(device) or "")
    if sheet is None:
        raise click.ClickException(f"the peaks of {device} are not in sdgp_accel.roofline.GPUS")
    both = [row for row in kernels["rows"] if row["needs"] == {"dgrad": True, "wgrad": True, "bias": False}]
    median = {id(row): {key: 1e-6 * value["median"] for key, value in row["microseconds"].items()} for row in both}
    copied = statistics.median(4 * row["t"] * row["c"] / median[id(row)]["clone"] for row in both)
    gpu = GPU(name, sheet.tflops, sheet.bandwidth, 1.0, round(copied / sheet.bandwidth * 1e-12, DIGITS), 2.0)

    costs: dict[str, list[float]] = {}
    for row in both:
        spec = RULES.get(row["rule"])
        if spec is not None and (spec.n, spec.m) == (2, 4):
            work = Work(row["t"], 1, row["c"], 0)
            bytes_only = compress_seconds(work, gpu, PASSES, "two_pass")
            costs.setdefault(compress_rule(spec), []).append(median[id(row)]["kernel"] / bytes_only)

    rates, speedups = [], []
    for row in layers["rows"]:
        work = Work.of(geometry_of(row["geometry"]))
        # At the full peak rate and a speed-up of 2, so that this does not depend on what is to be found.
        if "unsupported" in row or sparse_seconds(work, gpu) > work.flops / (gpu.flop_rate * gpu.sparse_speedup):
            continue
        for name_of_pass in ("dgrad", "wgrad"):
            dense, sparse = (row["milliseconds"][f"{kind}_{name_of_pass}"] for kind in ("dense", "sparse"))
            rates.append(work.flops / (1e-3 * dense) / gpu.flop_rate)
            speedups.append(dense / sparse)
    return replace(
        gpu,
        compute_efficiency=round(statistics.median(rates), DIGITS),
        sparse_speedup=round(statistics.median(speedups), DIGITS),
        compress_costs={rule: round(statistics.median(found), DIGITS) for rule, found in costs.items()},
    )


def errors(rows: list[dict[str, Any]], gpu: GPU) -> dict[str, list[float]]:
    """Predicted over measured time of each part of each layer's backward."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "unsupported" not in row:
            predicted = predict(row, gpu)._asdict()
            for part, milliseconds in row["milliseconds"].items():
                if milliseconds is not None and part in predicted:
                    found.setdefault(part, []).append(predicted[part] / milliseconds)
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("layers", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("kernels", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", default="h100-measured", show_default=True, help="What the entry is called.")
def main(layers: Path, kernels: Path, name: str) -> None:
    """Fit the roofline to result files of bench/layers.py and bench/kernels.py."""
    measured = json.loads(layers.read_text())
    gpu = fit(name, measured, json.loads(kernels.read_text()))
    click.echo(gpu)
    click.echo("predicted over measured: median, quartiles")
    for part, ratios in errors(measured["rows"], gpu).items():
        low, middle, high = statistics.quantiles(ratios, n=4)
        click.echo(f"  {part:15} {middle:.2f}  {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
