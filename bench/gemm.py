"""The sparse products of Linear layers on Hopper against cuBLAS and cuSPARSELt: one dgrad or wgrad, no compression.

    python bench/gemm.py                    # every layer in the list, to bench/results/gemm-<GPU>.json
    python bench/gemm.py --only gpt2 --search

All three run in turns in one process on the same random bf16 operands, the gradient 2:4 sparse; medians over buffers
that together exceed the L2 cache. cuSPARSELt runs the algorithm its own search finds, on its own format. TFLOP/s count
the dense product. With --search, every tile and number of parts is timed too: what the heuristic in backends/tiles.py
leaves on the table. Needs an H100-class GPU and the kernels.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cutlass_ops
from sdgp_accel.backends.tiles import TILE_K, TILES, Tiling, choose_tiling
from sdgp_accel.provenance import provenance
from sdgp_accel.semi_structured import SparseOperand, compress_matrix

CACHE_BYTES = 1 << 28  # several times the L2 cache of any GPU so far
REPEATS, WARM_UP = 30, 3
HEAD_START = 2_000_000  # cycles that the GPU waits for the host before each turn: calls may cost more than products


class Layer(NamedTuple):
    """A Linear layer's backward: dY [tokens, out_channels], W [out_channels, in_channels], X [tokens, in_channels]."""

    name: str
    tokens: int
    in_channels: int
    out_channels: int


# 25088 and 50432 tokens: ViT-L/16 at 224 pixels with batch 128 (196 tokens) and 256 (197 tokens).
LAYERS = [
    *(
        Layer(f"vit_large.{name}", tokens, c_in, c_out)
        for tokens in (25088, 50432)
        for name, c_in, c_out in (("fc1", 1024, 4096), ("fc2", 4096, 1024), ("proj", 1024, 1024), ("qkv", 1024, 3072))
    ),
    Layer("gpt2_xl.fc1", 16384, 1600, 6400),
    Layer("gpt2_xl.fc2", 16384, 6400, 1600),
    Layer("gpt2_xl.qkv", 16384, 1600, 4800),
    Layer("llm_4096.o", 16384, 4096, 4096),
    Layer("llm_4096.up", 8192, 4096, 14336),
    Layer("llm_4096.down", 8192, 14336, 4096),
    Layer("square", 8192, 8192, 8192),
]


class Problem(NamedTuple):
    """One product [m, k] x [k, n] on its operands; `a` is dense [m, k] (a view for wgrad) with 2:4 zeros along k."""

    is_dgrad: bool
    a: Tensor
    operand: SparseOperand
    b: Tensor
    out: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.b.shape[1], self.b.shape[0]


def problem(layer: Layer, is_dgrad: bool) -> Problem:
    """Random operands of one pass."""
    dy = torch.randn(layer.tokens, layer.out_channels, device="cuda", dtype=torch.bfloat16)
    groups = dy.view(-1, layer.out_channels // 4, 4) if is_dgrad else dy.view(-1, 4, layer.out_channels)
    dropped = torch.rand(groups.shape, device="cuda").argsort(2 if is_dgrad else 1) < 2
    groups.masked_fill_(dropped, 0)
    rows = layer.out_channels if is_dgrad else layer.tokens
    b = torch.randn(rows, layer.in_channels, device="cuda", dtype=torch.bfloat16)
    a = dy if is_dgrad else dy.t()
    out = torch.empty(a.shape[0], layer.in_channels, device="cuda", dtype=torch.bfloat16)
    return Problem(is_dgrad, a, compress_matrix(dy, 1 if is_dgrad else 0, k_align=TILE_K), b, out)


def ours(p: Problem, tiling: Tiling) -> Callable[[], None]:
    m, n, k = p.sizes
    workspace = p.out.new_empty(tiling.splits, m, n, dtype=torch.float32) if tiling.splits > 1 else None
    return functools.partial(
        _launch, p, workspace, f"sdgp_sm90_{'dgrad' if p.is_dgrad else 'wgrad'}_bf16_{tiling.tile}",
        values=p.operand.values.data_ptr(), metadata=p.operand.metadata.data_ptr(), b=p.b.data_ptr(),
        out=p.out.data_ptr(), workspace=0 if workspace is None else workspace.data_ptr(), m=m, n=n, k=k,
        padded_k=p.operand.values.shape[p.operand.axis] * 2, splits=tiling.splits, group_n=tiling.group_n,
        cluster_size=tiling.cluster_size, sm_count=multiprocessors(),
    )  # fmt: skip


def _launch(p: Problem, workspace: Tensor | None, name: str, **arguments: Any) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    cutlass_ops.kernels().sparse_gemm(name, stream=stream, **arguments)  # p and workspace own the pointers


def cublas(p: Problem) -> Callable[[], object]:
    return functools.partial(torch.mm, p.a, p.b, out=p.out)


def cusparselt(p: Problem) -> Callable[[], object]:
    """With the algorithm and split that cuSPARSELt's search likes best; where that fails, its default search."""
    compressed = torch._cslt_compress(p.a.contiguous())
    try:
        algorithm, split, mode, _ = torch._C._cusparselt.mm_search(compressed, p.b, None, None, None, False)
        settings: dict[str, Any] = {"alg_id": algorithm, "split_k": split}
        if "split_k_mode" in str(torch.ops.aten._cslt_sparse_mm.default._schema):
            settings["split_k_mode"] = mode
        else:  # torch < 2.8
            settings["split_k_one_kernel"] = bool(mode)
        torch._cslt_sparse_mm(compressed, p.b, **settings)
    except (AttributeError, TypeError, RuntimeError):
        settings = {"alg_id": torch._cslt_sparse_mm_search(compressed, p.b)}
    return functools.partial(torch._cslt_sparse_mm, compressed, p.b, **settings)


@functools.cache
def multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def time_in_turns(contenders: dict[str, list[Callable[[], object]]], repeats: int) -> dict[str, list[float]]:
    """Samples of microseconds of each contender: its closures, one per set of buffers, in turns with all others."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
    for i in range(WARM_UP + repeats):
        torch.cuda._sleep(HEAD_START)
        for name, closures in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            closures[i % len(closures)]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [1e3 * start.elapsed_time(end) for start, end in pairs[WARM_UP:]] for name, pairs in events.items()
    }


def relative_error(p: Problem) -> float:
    """Of the product in p.out, against cuBLAS in the same precision."""
    reference = torch.mm(p.a, p.b).float()
    return float((p.out.float() - reference).norm() / reference.norm())


def measure(layer: Layer, is_dgrad: bool, search: bool) -> dict[str, Any]:
    """One result row."""
    first = problem(layer, is_dgrad)
    m, n, k = first.sizes
    size = 2 * (m * k + k * n + m * n)
    problems = [first, *(problem(layer, is_dgrad) for _ in range(CACHE_BYTES // size))]
    chosen = choose_tiling(m, n, k, multiprocessors(), not is_dgrad)
    first.out.fill_(float("nan"))
    ours(first, chosen)()
    error = relative_error(first)
    if not error < 1e-2:
        raise click.ClickException(f"{layer.name}: wrong product, relative error {error}")
    contenders: dict[str, list[Callable[[], object]]] = {
        "ours": [ours(p, chosen) for p in problems],
        "cublas": [cublas(p) for p in problems],
    }
    if torch.backends.cusparselt.is_available():
        contenders["cslt"] = [cusparselt(p) for p in problems]
    times = time_in_turns(contenders, REPEATS)
    row: dict[str, Any] = {
        "layer": layer.name, "T": layer.tokens, "pas": "dgrad" if is_dgrad else "wgrad", "m": m, "n": n, "k": k,
        "tiling": chosen._asdict(), "relative_error": error, "buffer_sets": len(problems), "us": times,
    }  # fmt: skip
    if search:
        parts = (1,) if is_dgrad else (1, 2, 3, 4, 6, 8)
        tilings = [
            Tiling(f"{rows}x{columns}", cluster, splits, group)
            for (rows, columns, cluster), splits, group in itertools.product(TILES, parts, (4, 8, 16))
        ]
        found = time_in_turns({repr(tuple(t)): [ours(first, t)] for t in tilings}, 7)
        medians = {name: statistics.median(sample) for name, sample in found.items()}
        row["search"] = dict(sorted(medians.items(), key=lambda item: item[1]))
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="sparse products, bf16; TFLOP/s of the dense product")
    for column in ("layer", "pass", "m x n x k", "tile", "µs", "TFLOP/s", "x cuBLAS", "x cuSPARSELt"):
        result.add_column(column, justify="left" if column in ("layer", "pass") else "right")
    for row in rows:
        us = {name: statistics.median(sample) for name, sample in row["us"].items()}
        result.add_row(
            row["layer"], row["pas"], f"{row['m']}x{row['n']}x{row['k']}",
            f"{row['tiling']['tile']}/{row['tiling']['splits']}", f"{us['ours']:.1f}",
            f"{2e-6 * row['m'] * row['n'] * row['k'] / us['ours']:.0f}",
            *(f"{us[peer] / us['ours']:.2f}" if peer in us else "-" for peer in ("cublas", "cslt")),
        )  # fmt: skip
    return result


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", default="", help="Layers whose names start so.")
@click.option("--search", is_flag=True, help="Also time every tile and number of parts.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Where the results go.")
def main(only: str, search: bool, path: Path | None) -> None:
    """Time the products of each layer in the list."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise click.ClickException("the sparse products need an H100-class GPU (compute capability 9.0)")
    if "90a" not in cutlass_ops.ARCHS:
        raise click.ClickException("the kernels are not built for sm_90a; build them with: SDGP_CUDA=1 pip install .")
    if path is None:
        path = Path("bench/results") / f"gemm-{torch.cuda.get_device_name().replace(' ', '_')}.json"
    rows = []
    for layer, is_dgrad in itertools.product(LAYERS, (True, False)):
        if layer.name.startswith(only):
            rows.append(measure(layer, is_dgrad, search))
            result = {"benchmark": "gemm", "provenance": provenance(torch.device("cuda")), "results": rows}
            path.write_text(json.dumps(result, indent=1) + "\n")
    Console(width=120).print(table(rows))


if __name__ == "__main__":
    main()
