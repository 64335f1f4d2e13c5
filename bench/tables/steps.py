"""Whole training steps, from bench/step_time.py. Emulations are not savings and stay out."""

from __future__ import annotations

from pathlib import Path

from bench.step_time import MODELS
from bench.tables.sections import NOT_MEASURED, Result, Section, files, machine, source, table
from sdgp_accel.config import PASSES

CONTENDERS = ("dense", "dense, compiled", "SDGP", "SDGP, compiled")  # as `sdgp bench` calls them


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
