"""The roofline's numbers for a GPU from measurements on it: an entry for `sdgp_accel.roofline.GPUS`.

    python -m bench.fit_roofline LAYERS.json ... --kernels KERNELS.json    # of bench/layers.py and bench/kernels.py

Peaks are those of the data sheet. Each other number is a median, so that no single layer decides it:

- memory_efficiency: what `clone()` of a gradient moves per second over the peak bandwidth (bench/kernels.py; without
  its results, that of the GPU's entry);
- compute_efficiency: a dense dgrad's or wgrad's FLOP/s over the peak rate, over the layers that are bound by compute
  even at twice the peak rate (bench/layers.py);
- sparse_speedup: a dense pass's time over a sparse one's, over the same layers;
- compress_costs: prune + compress of both operands over the time that 2.125 times the gradient's bytes take at that
  bandwidth, by prune function (bench/kernels.py; without its results bench/layers.py, which times fewer functions).

Prints the entry, and how far each part of the backward is from what it predicts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from bench.kernels import RULES
from bench.prediction import geometry_of, predict
from sdgp_accel.config import PASSES, PruneSpec
from sdgp_accel.roofline import GPU, GPUS, Work, compress_rule, compress_seconds, known_gpu, sparse_seconds

RESULTS = Path(__file__).parent / "results"
ResultFile = click.Path(exists=True, dir_okay=False, path_type=Path)


class Sources(NamedTuple):
    """Result files that an entry of `GPUS` comes from."""

    layers: tuple[Path, ...]
    kernels: Path | None = None


MEASURED = {
    "h100-measured": Sources(
        (RESULTS / "development/h100-8-layers.json",), RESULTS / "development/h100-8-kernels.json"
    ),
    "h200-measured": Sources(
        (RESULTS / "layers-mvue-NVIDIA_H200.json", RESULTS / "layers-rescale_magnitude-NVIDIA_H200.json"),
        RESULTS / "kernels-NVIDIA_H200.json",
    ),
}
DIGITS = 2


def fit(name: str, layers: Sequence[dict[str, Any]], kernels: dict[str, Any] | None = None) -> GPU:
    """The entry `name`; the peaks are those of `GPUS`' entry for the GPU that `layers` were measured on.

    Raises ClickException for several GPUs, or one whose peaks are not known.
    """
    devices = {result["provenance"]["gpu"]["name"] for result in layers}
    if len(devices) != 1:
        raise click.ClickException(f"the results must be of one GPU; these are of {' and '.join(sorted(devices))}")
    (device,) = devices
    sheet = GPUS.get((known_gpu(device) or "").removesuffix("-measured"))
    if sheet is None:
        raise click.ClickException(f"the peaks of {device} are not in sdgp_accel.roofline.GPUS")
    gpu = replace(sheet, name=name, compute_efficiency=1.0, sparse_speedup=2.0, compress_costs={})
    rows = [row for result in layers for row in result["rows"] if "unsupported" not in row]
    if kernels is None:
        costs = layer_costs(rows, gpu)
    else:
        gpu, costs = kernel_costs(kernels, gpu)
    rates, speedups = [], []
    for row in rows:
        work = Work.of(geometry_of(row["geometry"]))
        # At the full peak rate and a speed-up of 2, so that this does not depend on what is to be found.
        if sparse_seconds(work, gpu) > work.flops / (gpu.flop_rate * gpu.sparse_speedup):
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


def kernel_costs(kernels: dict[str, Any], gpu: GPU) -> tuple[GPU, dict[str, list[float]]]:
    """`gpu` with the bandwidth that a clone reaches, and what each rule costs over that, from bench/kernels.py."""
    both = [row for row in kernels["rows"] if row["needs"] == {"dgrad": True, "wgrad": True, "bias": False}]
    median = {id(row): {key: 1e-6 * value["median"] for key, value in row["microseconds"].items()} for row in both}
    copied = statistics.median(4 * row["t"] * row["c"] / median[id(row)]["clone"] for row in both)
    gpu = replace(gpu, memory_efficiency=round(copied / gpu.bandwidth * 1e-12, DIGITS))
    costs: dict[str, list[float]] = {}
    for row in both:
        spec = RULES.get(row["rule"])
        if spec is not None and (spec.n, spec.m) == (2, 4):
            bytes_only = compress_seconds(Work(row["t"], 1, row["c"], 0), gpu, PASSES, "two_pass")
            costs.setdefault(compress_rule(spec), []).append(median[id(row)]["kernel"] / bytes_only)
    return gpu, costs


def layer_costs(rows: Sequence[dict[str, Any]], gpu: GPU) -> dict[str, list[float]]:
    """What each rule costs over moving its bytes, from bench/layers.py, which scales within groups."""
    costs: dict[str, list[float]] = {}
    for row in rows:
        rule = compress_rule(PruneSpec(row["prune"], 2, 4))
        bytes_only = compress_seconds(Work.of(geometry_of(row["geometry"])), gpu, PASSES, "two_pass")
        costs.setdefault(rule, []).append(1e-3 * row["milliseconds"]["compress_both"] / bytes_only)
    return costs


def errors(rows: list[dict[str, Any]], gpu: GPU) -> dict[str, list[float]]:
    """Predicted over measured time of each part of each layer's backward."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "unsupported" not in row:
            predicted = predict(row, gpu)._asdict()
            for part, milliseconds in row["milliseconds"].items():
                if milliseconds is not None and predicted.get(part) is not None:
                    found.setdefault(part, []).append(predicted[part] / milliseconds)
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("layers", nargs=-1, required=True, type=ResultFile)
@click.option("--kernels", type=ResultFile, help="Of bench/kernels.py.")
@click.option("--name", default="h100-measured", show_default=True, help="What the entry is called.")
def main(layers: tuple[Path, ...], kernels: Path | None, name: str) -> None:
    """Fit the roofline to result files of bench/layers.py and bench/kernels.py."""
    measured = [json.loads(path.read_text()) for path in layers]
    gpu = fit(name, measured, None if kernels is None else json.loads(kernels.read_text()))
    click.echo(gpu)
    click.echo("predicted over measured: median, quartiles")
    for part, ratios in errors([row for result in measured for row in result["rows"]], gpu).items():
        low, middle, high = statistics.quantiles(ratios, n=4)
        click.echo(f"  {part:15} {middle:.2f}  {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
