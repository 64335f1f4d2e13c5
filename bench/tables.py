"""Markdown tables from the result files under bench/results/: for the README, and speed.md beside the files.

Files are told apart by what they hold. Each table names the files it came from, the machine and the versions; what has
no file is "not measured yet". Columns called "predicted" hold a roofline's figures (`sdgp plan`), never measurements.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from bench.prediction import geometry_of, gpu_of, predict
from bench.step_time import MODELS
from sdgp_accel.config import PASSES
from sdgp_accel.roofline import GPU, Work
from sdgp_accel.tuning import BackwardTimes

NOT_MEASURED = "not measured yet"
CONTENDERS = ("dense", "dense, compiled", "SDGP", "SDGP, compiled")  # as `sdgp bench` calls them
PEERS = {"cublas": "cuBLAS (dense)", "cslt": "cuSPARSELt", "semi_structured": "`torch._sparse_semi_structured_mm`"}
Result = Any  # a result file's JSON
Row = dict[str, Any]


class Section(NamedTuple):
    """One kind of result file: which files are of that kind, their table, and what they come down to.

    claims: sentences without verbs, each true of the whole file, for the README's summary. notes: what stands below the
    table.
    """

    question: str
    accepts: Callable[[Result], bool]
    columns: Sequence[str]
    rows: Callable[[Result], Iterable[Sequence[str]]]
    claims: Callable[[Result], list[str]]
    notes: Callable[[Result], list[str]] = lambda result: []


class DamagedResult(ValueError):
    """A result file that holds something else; the message names it."""


def files(section: Section, results: Path) -> list[tuple[Path, Result]]:
    """The result files of `section`, by name. Raises DamagedResult for one that no table can be made of."""
    found = []
    for path in sorted(results.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if section.accepts(result):
                for part in (section.rows, section.claims, section.notes, machine, gpu_name):
                    list(part(result))  # here, where an error can be told with the file's name
                found.append((path, result))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise DamagedResult(f"{path} is damaged or no result of this project: {error!r}") from error
    return found


def render(section: Section, results: Path) -> str:
    """A table for each file of `section`, and where it comes from, for a page that lies beside the files."""
    texts = []
    for path, result in files(section, results):
        lines = table(section.columns, section.rows(result))
        texts.append("\n".join([*lines, "", *section.notes(result), f"From {source(path)}: {machine(result)}."]))
    return "\n\n".join(texts) or f"{NOT_MEASURED.capitalize()}."


def speed(results: Path) -> str:
    """The page with every measurement of layers, products and prune + compress."""
    parts = ["# Speed: every measurement", "Built by `python -m bench.report` from the files named below the tables."]
    for title, section in SPEED.items():
        parts += [f"## {title}", render(section, results)]
    return "\n\n".join(parts) + "\n"


def summary(results: Path) -> str:
    """One row per question: what its result files come down to, and on which machines; each where there are several."""
    rows = []
    for section in (CONVERGENCE, STEP_TIME, LAYERS, GEMM, PRUNE, CHECKS):
        found = [result for _, result in files(section, results)]
        gpus = dict.fromkeys(gpu_name(result) for result in found)
        claims = [
            f"{claim} ({gpu_name(result)})" if len(gpus) > 1 else claim
            for result in found
            for claim in section.claims(result)
        ]
        rows.append([section.question, "<br>".join(claims) or NOT_MEASURED, ", ".join(filter(None, gpus))])
    return "\n".join(table(("", "measured", "on"), rows))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def print_table(section: Section, result: Result) -> None:
    """The same on the terminal."""
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(section.columns):
        shown.add_column(plain(column), justify="right" if index > 1 else "left", no_wrap=index == 0)
    for row in section.rows(result):
        shown.add_row(*map(plain, row))
    console = Console(width=220)
    console.print(shown)
    for line in section.notes(result):
        console.print(plain(line))


def plain(text: str) -> str:
    """Without Markdown's marks."""
    return text.replace("**", "").replace("`", "")


# Does it learn? From bench/convergence.py; its tables are in convergence_2_4.md.


def convergence(results: Path) -> str:
    """The tables that bench/convergence.py wrote."""
    path = results / "convergence_2_4.md"
    if not path.exists():
        return f"{NOT_MEASURED.capitalize()}."
    folded = ("<details><summary>All functions and passes, 2:4</summary>", path.read_text().strip(), "</details>")
    return "\n\n".join(folded)


def convergence_claims(result: Result) -> list[str]:
    claims = []
    for task in result["tasks"].values():
        cells = {cell["cell"]: cell for cell in task["cells"]}
        dense, pruned = cells.get("dense"), cells.get("mvue 2:4 both")
        if dense and pruned:
            digits = 3 if task["score"] == "loss" else 2
            claims.append(f"{task['title']}: {pruned['delta']:+.{digits}f} (dense {dense['mean']:.{digits}f})")
    return claims


CONVERGENCE = Section(
    "final validation loss (digits: accuracy) with the default, `mvue` 2:4 on both passes, minus dense",
    lambda result: isinstance(result, dict) and "tasks" in result and "environments" in result,
    (),
    lambda result: (),
    convergence_claims,
)


# Whole training steps, from bench/step_time.py. Emulations are not savings and stay out.


def step_time(results: Path) -> str:
    """One table over all models of the list and all files, and what the files were measured on."""
    found = files(STEP_TIME, results)
    rows = [[*row, source(path, "bench/results/")] for path, result in found for row in STEP_TIME.rows(result)]
    measured = {result["model"] for _, result in found}
    rows += [[model, *[NOT_MEASURED] * 5, "", "", ""] for model in MODELS if model not in measured]
    lines = table((*STEP_TIME.columns, "file"), rows)
    return "\n".join([*lines, *(f"\n{path.name}: {machine(result)}." for path, result in found)])


def step_saving(result: Result) -> float | None:
    """What the fastest SDGP step saves over the fastest dense one, as a share, paired by round."""
    ratios = [ratio["median"] for ratio in result["sdgp_over_dense"].values()]
    return 1 - max(ratios) if ratios else None


def step_row(result: Result) -> list[str]:
    left_out = result["settings"].get("left_out", {})
    times = []
    for name in CONTENDERS:
        found = next((c for c in result["contenders"] if c["name"] == name), None)
        missing = "does not run" if name in left_out else NOT_MEASURED
        times.append(missing if found is None else f"{1e3 * found['step']['median']:.2f}")
    saving = step_saving(result)
    return [
        step_label(result),
        *times,
        NOT_MEASURED if saving is None else f"**{100 * saving:+.1f} %**{within_spread(result)}{over_peers(result)}",
        predicted_saving(result),
        peak_memory(result),
    ]


def within_spread(result: Result) -> str:
    """A remark where the steps do not tell the fastest SDGP from the fastest dense one (`BenchmarkReport.outcome`)."""
    return ", within the spread" if result["outcome"] == "even" else ""


def peak_memory(result: Result) -> str:
    """Of the fastest SDGP step, and what that is over the fastest dense one's."""
    sdgp, dense = (
        min((c for c in result["contenders"] if c["sdgp"] == kind), key=lambda c: c["step"]["median"])["peak_bytes"]
        for kind in (True, False)
    )
    return f"{sdgp / 2**30:.2f} ({100 * (sdgp / dense - 1):+.1f} %)"


def step_label(result: Result) -> str:
    """Model, batch size, and what is pruned how."""
    config = result["settings"]["config"]
    prune = f"`{config['prune']}`" if isinstance(config["prune"], str) else str(config["prune"])
    dense = [f", {name} dense" for name in PASSES if config.get(name) == "dense"]
    return f"{result['model']}, batch {result['batch']}, {prune}{''.join(dense)}"


def over_peers(result: Result) -> str:
    """What the fastest SDGP step saves over each dense one, where there are several."""
    savings = [f"{name} {100 * (1 - r['median']):+.1f} %" for name, r in result["sdgp_over_dense"].items()]
    return f" ({'; '.join(savings)})" if len(savings) > 1 else ""


def predicted_saving(result: Result) -> str:
    """What the roofline in the file lets the layers save (two-pass), as a share of the fastest dense step measured."""
    prediction = result["prediction"]
    saved = prediction["dense_seconds"] - prediction["two_pass"]["seconds"]
    step = min(contender["step"]["median"] for contender in result["contenders"] if not contender["sdgp"])
    return f"{100 * saved / step:+.1f} %, {prediction['gpu']['title']}"


def step_claims(result: Result) -> list[str]:
    saving = step_saving(result)
    if saving is None:
        return []
    has_compiled = any(c["compiled"] and not c["sdgp"] for c in result["contenders"])
    against = "" if has_compiled else f" (eager; compiled: {NOT_MEASURED})"
    return [f"{step_label(result)}: {100 * saving:+.1f} %{within_spread(result)}{against}"]


STEP_TIME = Section(
    "whole training step: time saved over the fastest dense step",
    lambda result: isinstance(result, dict) and "contenders" in result and result.get("kind") != "emulated",
    (
        "model",
        *(f"{name}, ms" for name in CONTENDERS),
        "saved: fastest SDGP over fastest dense",
        "predicted, of the layers alone",
        "peak memory, GiB (over dense)",
    ),
    lambda result: [step_row(result)],
    step_claims,
)


# One layer's backward, from bench/layers.py.


def layer_rows(result: Result) -> Iterable[list[str]]:
    gpu = gpu_of(result.get("provenance") or {})
    return [layer_row(row, gpu) for row in result["rows"]]


def layer_row(row: Row, gpu: GPU | None) -> list[str]:
    work = Work.of(geometry_of(row["geometry"]))
    size = f"{work.flops * 1e-9:.1f}, {1e-6 * (work.gradient_bytes + work.other_bytes):.0f}"
    name = [row["layer"], shape(row["geometry"]), size, f"`{row['prune']}`"]
    if "unsupported" in row:
        return [*name, *[""] * 10, f"dense: {row['unsupported']}"]
    ms = BackwardTimes(**row["milliseconds"])
    predicted = None if gpu is None else predict(row, gpu)
    passes = [name for name, pruned in zip(("dgrad", "wgrad"), row["auto_prunes"], strict=True) if pruned]
    auto = f"{' + '.join(passes)} sparse, {times(row['auto_speedup'])}" if passes else "dense"
    return [
        *name,
        microseconds(1e3 * ms.dense),
        f"{2e-9 * work.flops / ms.dense:.0f}",
        f"{microseconds(1e3 * predicted.dense)}" if predicted else "—",
        microseconds(1e3 * ms.compress_both),
        microseconds(1e3 * predicted.compress_both) if predicted else "—",
        times(ms.dense_dgrad / ms.sparse_dgrad),
        times(ms.dense_wgrad / ms.sparse_wgrad),
        times(predicted.dense_dgrad / predicted.sparse_dgrad) if predicted else "—",
        f"**{times(row['backward_speedup'])}**",
        times(predicted.dense / predicted.totals()[True, True]) if predicted else "—",
        auto,
    ]


def layer_notes(result: Result) -> list[str]:
    """How far the predictions are off."""
    gpu = gpu_of(result.get("provenance") or {})
    rows = [row for row in result["rows"] if "unsupported" not in row]
    if gpu is None or not rows:
        return []
    ratios: dict[str, list[float]] = {"dense": [], "prune + compress": [], "products": [], "whole backward": []}
    for row in rows:
        ms, predicted = BackwardTimes(**row["milliseconds"]), predict(row, gpu)
        ratios["dense"].append(predicted.dense / ms.dense)
        ratios["prune + compress"].append(predicted.compress_both / ms.compress_both)
        products = [part.sparse_dgrad + part.sparse_wgrad for part in (predicted, ms)]
        ratios["products"].append(products[0] / products[1])
        ratios["whole backward"].append(predicted.totals()[True, True] / ms.totals()[True, True])
    off = "; ".join(f"{part} {spread(values)}" for part, values in ratios.items())
    return [f"Predicted columns: the roofline {gpu.title} (`sdgp plan`). Predicted over measured time: {off}."]


def layer_claims(result: Result) -> list[str]:
    claims = []
    for function in dict.fromkeys(row["prune"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["prune"] == function and "unsupported" not in row]
        if rows:
            sparse, auto = (spread(row[key] for row in rows) for key in ("backward_speedup", "auto_speedup"))
            used = sum(any(row["auto_prunes"]) for row in rows)
            claims.append(f"`{function}`: {sparse}; `auto` prunes {used} of {len(rows)} layers: {auto}")
    return claims


LAYERS = Section(
    "one layer's backward, compression included: speed over dense",
    lambda result: isinstance(result, dict) and result.get("benchmark") == "layers",
    (
        "layer", "in → out, positions", "GFLOP, MB per dense pass", "prune", "dense, µs", "TFLOP/s", "predicted, µs",
        "prune + compress, µs", "predicted, µs", "dgrad", "wgrad", "each, predicted", "whole backward", "predicted",
        'what `backend="auto"` runs',
    ),
    layer_rows,
    layer_claims,
    layer_notes,
)  # fmt: skip


# The sparse products by themselves against their peers, from bench/gemm.py.


def gemm_row(row: Row) -> list[str]:
    us = medians(row["us"])
    ours = us["ours"]
    missing = (NOT_MEASURED, "does not run")
    return [
        f"{row['layer']}, {row['T']} positions",
        row["pas"],
        f"{row['m']} × {row['n']} × {row['k']}",
        microseconds(ours),
        f"{2e-6 * row['m'] * row['n'] * row['k'] / ours:.0f}",
        *(times(us[peer] / ours) if peer in us else missing[peer in row.get("unavailable", ())] for peer in PEERS),
    ]


def gemm_claims(result: Result) -> list[str]:
    claims = []
    for name in ("dgrad", "wgrad"):
        rows = [medians(row["us"]) for row in result["results"] if row["pas"] == name]
        peers = [(peer, [us[key] / us["ours"] for us in rows if key in us]) for key, peer in PEERS.items()]
        over = [f"{spread(ratios)} {peer}" for peer, ratios in peers if ratios]
        if over:
            family = fallback(result)
            claims.append(f"{f'{family} fallback, ' if family else ''}{name}, {len(rows)} shapes: {', '.join(over)}")
    return claims


def fallback(result: Result) -> str | None:
    """The family of kernels measured, where it is not the one that this GPU takes."""
    return next((row["fallback"] for row in result["results"] if row.get("fallback")), None)


def gemm_notes(result: Result) -> list[str]:
    family = fallback(result)
    if family is None:
        return []
    return [f"These are the {family} kernels, the fallback for shapes that this GPU's own kernels cannot take."]


GEMM = Section(
    "sparse products alone: speed over",
    lambda result: isinstance(result, dict) and bool(result.get("results")) and "pas" in result["results"][0],
    (
        "layer", "pass", "m × n × k", "ours, µs", "dense-equivalent TFLOP/s",
        *(f"over {peer}" for peer in PEERS.values()),
    ),
    lambda result: map(gemm_row, result["results"]),
    gemm_claims,
    gemm_notes,
)  # fmt: skip


# Prune and compress along both axes, in units of a copy of the same tensor, from bench/kernels.py.


def both_operands(result: Result) -> list[Row]:
    """The rows that write both operands and nothing else."""
    return [row for row in result["rows"] if row["needs"] == {"dgrad": True, "wgrad": True, "bias": False}]


def prune_row(row: Row) -> list[str]:
    tiles = row.get("torch_tiles")
    return [
        row["case"],
        f"{row['t']} × {row['c']} {row['dtype']}",
        row["rule"],
        microseconds(row["microseconds"]["kernel"]["median"]),
        f"**{times(row['clones'])}**",
        times(tiles) if tiles else "—",  # it prunes 2:4 by magnitude and nothing else
    ]


def prune_claims(result: Result) -> list[str]:
    ratios: dict[str, list[float]] = {}
    for row in both_operands(result):
        ratios.setdefault(row["rule"], []).append(row["clones"])
    return ["; ".join(f"{rule} {spread(values)}" for rule, values in ratios.items())]


PRUNE = Section(
    "prune + compress, both operands: time over `clone()` of the gradient",
    lambda result: isinstance(result, dict) and result.get("benchmark") == "kernels" and "rows" in result,
    ("layer", "gradient", "rule", "µs", "over `clone()`", "over `torch._sparse_semi_structured_tile`"),
    lambda result: map(prune_row, both_operands(result)),
    prune_claims,
)


SPEED = {
    "One layer's backward, prune + compress and both products included (`python -m bench.layers`)": LAYERS,
    "Sparse products alone, bf16 with float32 sums (`python -m bench.gemm`)": GEMM,
    "Prune + compress alone, both operands in one pass (`python -m bench.kernels`)": PRUNE,
}


# Tests and compute-sanitizer on a GPU, from the record of bench/suite.py.


def check_claims(result: Result) -> list[str]:
    checks = ("tests-", "memcheck-", "racecheck-")
    ran = {name: case["status"] for name, case in result["cases"].items() if name.startswith(checks)}
    return [", ".join(f"{name} {status}" for name, status in ran.items())] if ran else []


CHECKS = Section(
    "the kernels' and the layers' tests, and compute-sanitizer on a few of them",
    lambda result: isinstance(result, dict) and result.get("benchmark") == "suite",
    (),
    lambda result: (),
    check_claims,
)


def source(path: Path, folder: str = "") -> str:
    """A link to a result file in `folder`."""
    return f"[{path.name}]({folder}{path.name})"


def spread(ratios: Iterable[float]) -> str:
    """Median and range of speed ratios."""
    values = sorted(ratios)
    middle = times(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({values[0]:.2f}–{values[-1]:.2f})"


def gpu_name(result: Result) -> str:
    """What the numbers were measured on, as far as the file records it."""
    if "environments" in result:
        return ", ".join(dict.fromkeys(environment["device"] for environment in result["environments"]))
    origin = result.get("provenance") or {}
    return str((origin.get("gpu") or origin.get("cpu") or {}).get("name", ""))


def machine(result: Result) -> str:
    """GPU, driver, clocks and versions, as far as the file records them."""
    if not isinstance(result, dict):
        return "machine not recorded in the file"
    origin = result.get("provenance") or {}
    gpu = origin.get("gpu") or {}
    state = gpu.get("state_under_load") or gpu.get("state") or {}
    known = [
        gpu.get("name") or origin.get("cpu", {}).get("name"),
        state and f"driver {state.get('driver_version')}, {state.get('clocks.sm')}, {state.get('power.draw')}",
        gpu and f"CUDA {gpu.get('cuda')}",
        *(f"{name} {version}" for name, version in origin.get("versions", {}).items() if name == "torch"),
        origin.get("git_revision") and f"revision {origin['git_revision'][:12]}",
    ]
    text = ", ".join(filter(None, known)) or "machine not recorded in the file"
    return f"{text}. {origin['note'].rstrip('.')}" if origin.get("note") else text


def shape(geometry: dict[str, Any]) -> str:
    """A layer's geometry in words."""
    if "kernel" not in geometry:
        return f"{geometry['in_channels']} → {geometry['out_channels']}, {geometry['tokens']}"
    height, width = geometry["kernel"]
    stride = "" if set(geometry["stride"]) == {1} else f" /{geometry['stride'][0]}"
    positions = f"{geometry['batch']}×{geometry['out_height']}×{geometry['out_width']}"
    return f"{geometry['in_channels']} → {geometry['out_channels']} {height}×{width}{stride}, {positions}"


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def microseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f} ×"
