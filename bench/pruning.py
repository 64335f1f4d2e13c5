"""What pruning costs on this machine, as a multiple of `clone()` of the same tensor.

    python -m bench.pruning                     the paper's patterns on a 64 x 256 x 28 x 28 gradient
    python -m bench.pruning --quick             only 2:4

Each prune call is timed right next to a clone, in one process, and the median of the ratios of such pairs is
reported: on a shared machine both sides of a pair meet the same weather. Results go to bench/results/. On a busy
machine let nothing else run meanwhile: ``chrt --rr 1 python -m bench.pruning`` (Linux, as root); the file says so.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table

from sdgp_accel.config import PruneSpec, SDGPConfig
from sdgp_accel.philox import Rng, draw
from sdgp_accel.provenance import provenance
from sdgp_accel.pruning import prune, prune_matrix

SHAPE = (64, 256, 28, 28)
PAPER_PATTERNS = [(1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (2, 16), (4, 16), (8, 16), (4, 32), (8, 32), (16, 32)]
FUNCTIONS = ("magnitude", "random", "rescale_magnitude", "mvue")
# The aim: at most so many clones (float32, channels_last, groups along the channels).
LIMITS = {"magnitude": 2.0, "rescale_magnitude": 4.0, "mvue": 8.0}
LIMIT_OTHER = 16.0


def limit(function: str, n: int, m: int) -> float:
    return LIMITS.get(function, LIMIT_OTHER) if (n, m) == (2, 4) else LIMIT_OTHER


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> Callable[[], float]:
    """CPU time where there is just one thread: it does not count the time that others had the core."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds(call: Callable[[], torch.Tensor], device: str) -> float:
    synchronize(device)
    now = clock(device)
    start = now()
    result = call()
    synchronize(device)
    elapsed = now() - start
    del result
    return elapsed


def extra_peak(call: Callable[[], torch.Tensor], device: str) -> float:
    """Bytes that a call holds at its peak beyond what was held before it, its result included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - before)
    # The high-water mark of resident memory, in a child process: this one has had higher ones.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        Path("/proc/self/clear_refs").write_text("5")
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        call()
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        os.write(writer, str(peak - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return float(os.read(reader, 64))


class Case(NamedTuple):
    """One prune function at one pattern, with its scope where it sums, and the axis that its groups run along."""

    function: str
    n: int
    m: int
    axis: str
    call: Callable[[], torch.Tensor]


def cases(x: torch.Tensor, patterns: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Everything that is timed on the gradient x [N, C, H, W], channels_last: along positions only 2:4."""
    n_images, channels, height, width = x.shape
    matrix = x.permute(0, 2, 3, 1).reshape(n_images * height * width, channels)
    for n, m in patterns:
        for function in FUNCTIONS:
            for scope in ("sample_channel", "group") if function == "rescale_magnitude" else ("group",):
                label = f"{function}, {scope}" if function == "rescale_magnitude" else function
                along_channels = functools.partial(prune, x, SDGPConfig(prune=function, n=n, m=m, scope=scope), 1)
                yield Case(label, n, m, "channels", along_channels)
                if (n, m) == (2, 4):
                    spec = PruneSpec(function, n, m, scope)
                    yield Case(
                        label, n, m, "positions", functools.partial(along_positions, matrix, spec, height * width)
                    )


def along_positions(matrix: torch.Tensor, spec: PruneSpec, positions_per_sample: int) -> torch.Tensor:
    """`prune_matrix` with a seed drawn for this call, as `prune` draws its own."""
    return prune_matrix(matrix, spec, 0, positions_per_sample, Rng(draw(matrix.device)))


def measure(case: Case, x: torch.Tensor, repeats: int) -> dict[str, Any]:
    """One result row."""
    device = x.device.type
    case.call()
    pairs = [(seconds(case.call, device), seconds(x.clone, device)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "function": case.function,
        "n": case.n,
        "m": case.m,
        "axis": case.axis,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
        "limit": limit(case.function.split(",")[0], case.n, case.m),
        "milliseconds": 1e3 * statistics.median(a for a, _ in pairs),
        "clone_milliseconds": 1e3 * statistics.median(b for _, b in pairs),
        "best_milliseconds": 1e3 * min(a for a, _ in pairs),
        "best_clone_milliseconds": 1e3 * min(b for _, b in pairs),
        "peak_extra_per_input": extra_peak(case.call, device) / x.nbytes,
    }


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal; what is beyond its limit in red."""
    result = Table(title=title)
    for column in ("function", "N:M", "groups along", "median", "quartiles", "limit", "ms", "peak / input"):
        result.add_column(column, justify="left" if column in ("function", "groups along") else "right")
    for row in rows:
        low, high = row["ratio_quartiles"]
        colour = "green" if row["ratio"] <= row["limit"] else "red"
        result.add_row(
            row["function"],
            f"{row['n']}:{row['m']}",
            row["axis"],
            f"[{colour}]{row['ratio']:.2f}[/]",
            f"{low:.2f}–{high:.2f}",
            f"{row['limit']:.0f}",
            f"{row['milliseconds']:.1f}",
            f"{row['peak_extra_per_input']:.2f}",
        )
    return result


@click.command(help=__doc__)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=15, show_default=True, help="Pairs of prune and clone.")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads [default: torch's].")
@click.option("--quick", is_flag=True, help="Only 2:4.")
@click.option("--output", type=click.Path(path_type=Path), default=None, help="JSON file [default: bench/results/…].")
def main(device: str, dtype: str, repeats: int, threads: int | None, quick: bool, output: Path | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    x = torch.randn(SHAPE, device=device).to(getattr(torch, dtype)).contiguous(memory_format=torch.channels_last)
    rows = [measure(case, x, repeats) for case in cases(x, [(2, 4)] if quick else PAPER_PATTERNS)]
    title = f"Pruning {'x'.join(map(str, SHAPE))} {dtype} channels_last on {device}, in clones"
    Console().print(table(title, rows))
    where = device if device == "cuda" else f"cpu{torch.get_num_threads()}"
    output = output or Path(__file__).parent / "results" / f"pruning_{where}_{dtype}.json"
    result = {
        "provenance": provenance(torch.device(device)),
        "clock": clock(device).__name__,
        "real_time": os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR),
        "shape": SHAPE,
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(f"written to {output}")


if __name__ == "__main__":
    main()
