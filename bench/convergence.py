"""Does it learn as well? Dense training against every prune function, on tasks that can tell them apart.

    python -m bench.convergence run --task transformer --minutes 60     # resumable; most telling cells first
    python -m bench.convergence report                                  # table, plot and JSON from all finished runs

Every run is one line of ``bench/results/convergence.jsonl``; a run found there is not repeated.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import multiprocessing
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from bench.learning import summary, training
from bench.learning.cells import DENSE, Cell, by_value
from bench.learning.tasks import TASKS, Task
from sdgp_accel.backends import reference
from sdgp_accel.provenance import cpu_name, git_revision

RESULTS = Path(__file__).parent / "results"
PRUNING = {"package": "sdgp_accel.pruning", "triton": "bench.learning.triton_pruning"}


class Work(NamedTuple):
    """What one process does at a time: one cell with one or more seeds."""

    task: Task
    cell: Cell
    seeds: tuple[int, ...]
    device: str
    pruning: str
    deadline: float


def run_work(work: Work) -> list[dict[str, Any]]:
    """The results of `work`, ready to be written as lines; none where the time box closed first."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for dense and pruned runs alike
    if work.deadline <= time.time():
        return []
    device = torch.device(work.device)
    use_pruning(work.pruning)
    try:
        results = training.train(work.task, work.cell, work.seeds, device, work.deadline)
    except training.DeadlinePassed:
        return []
    identity = {"task": work.task.name, "setup": work.task.setup(), "cell": asdict(work.cell)}
    return [{**identity, **result, "environment": environment(device, work.pruning)} for result in results]


def use_pruning(name: str) -> None:
    """Let the reference backend of this process prune with the module `name` of `PRUNING`."""
    reference.prune_matrix = importlib.import_module(PRUNING[name]).prune_matrix


def environment(device: torch.device, pruning: str) -> dict[str, Any]:
    """Where and how a run took place."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pruning": pruning,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "revision": git_revision(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def outstanding(
    tasks: Sequence[Task],
    cells: Sequence[Cell],
    seeds: int,
    finished: Sequence[dict[str, Any]],
    device: str,
    pruning: str,
    deadline: float,
) -> Iterator[Work]:
    """The work that `finished` leaves, in the order of `cells`, tasks taking turns.

    A run is not repeated on another device, but for dense ones: what ran on a device is compared to dense runs there.
    A GPU process takes all seeds of a cell, which share one CUDA graph; a CPU process one seed.
    """
    here = device_name(torch.device(device))
    known = {
        run_key(line) for line in finished if Cell(**line["cell"]) != DENSE or line["environment"]["device"] == here
    }
    for cell in cells:
        for task in tasks:
            left = [seed for seed in range(seeds) if (task.name, task.setup(), cell, seed) not in known]
            for group in [left] if device == "cuda" else [[seed] for seed in left]:
                if group:
                    yield Work(task, cell, tuple(group), device, pruning, deadline)


def run_key(line: dict[str, Any]) -> tuple[str, str, Cell, int]:
    return line["task"], line["setup"], Cell(**line["cell"]), line["seed"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Finished runs. A last line that a crash cut short is removed from the file, so that its run is repeated."""
    if not path.exists():
        return []
    text = path.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    return [json.loads(line) for line in text.splitlines()]


@click.group()
def main() -> None:
    """Convergence of SDGP training against dense training."""


@main.command()
@click.option("--task", "names", multiple=True, type=click.Choice(sorted(TASKS)), help="Default: all of them.")
@click.option("--seeds", default=5, show_default=True)
@click.option("--cells", "cell_count", type=int, help="Only so many cells of the matrix, the most telling first.")
@click.option("--minutes", default=60.0, show_default=True, help="Stop starting and abandon runs after so long.")
@click.option("--jobs", default=1, show_default=True, help="Processes side by side.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--pruning", type=click.Choice(sorted(PRUNING)), help="Default: package on a CPU, triton on a GPU.")
@click.option("--lines", type=click.Path(path_type=Path), default=RESULTS / "convergence.jsonl", show_default=True)
def run(
    names: Sequence[str],
    seeds: int,
    cell_count: int | None,
    minutes: float,
    jobs: int,
    device: str,
    pruning: str | None,
    lines: Path,
) -> None:
    """Train what is not in LINES yet and append to it."""
    deadline = time.time() + 60 * minutes
    tasks = [task for name, task in TASKS.items() if not names or name in names]
    pruning = pruning or ("package" if device == "cpu" else "triton")
    work = list(outstanding(tasks, by_value()[:cell_count], seeds, read_lines(lines), device, pruning, deadline))
    click.echo(f"{sum(len(item.seeds) for item in work)} runs to do, {jobs} at a time, at most {minutes:g} minutes")
    lines.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool, lines.open("a") as file:
        futures = {pool.submit(run_work, item): item for item in work}
        for future in concurrent.futures.as_completed(futures):
            item = futures[future]
            for result in future.result():
                file.write(json.dumps(result) + "\n")
                file.flush()
                score = result["final"][item.task.score]
                click.echo(f"{item.task.name:12} {item.cell!s:36} seed {result['seed']}  {score:8.4f}")


@main.command()
@click.option("--lines", type=click.Path(path_type=Path), default=RESULTS / "convergence.jsonl", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def report(lines: Path, out: Path) -> None:
    """Write convergence.json, convergence.md and convergence.png from LINES."""
    summary.write(read_lines(lines), out)


if __name__ == "__main__":
    main()
