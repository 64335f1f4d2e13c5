"""The sparse products of Linear layers and 1x1 convolutions against their peers: one dgrad or wgrad, no compression.

    python -m bench.gemm                    # every layer in the list, to bench/results/gemm-<GPU>.json
    python -m bench.gemm --only gpt2 --search

Ours and the peers run in turns in one process on the same random bf16 operands, the gradient 2:4 sparse; medians over
buffers that together exceed the L2 cache. TFLOP/s count the dense product. The peers:

- cublas: the dense product, `torch.mm`.
- cslt: cuSPARSELt, `torch._cslt_sparse_mm`, on its own format with the algorithm that its own search finds.
- semi_structured: CUTLASS in torch, `torch._sparse_semi_structured_mm`, for compute capability 8.x only.

A peer that cannot run is in the result with its reason. The family of kernels is the one that the backend takes on this
GPU; ``--family sm80`` measures on a Hopper GPU what shapes get there that Hopper's kernels cannot take, and the result
says so. With --search, every tiling is timed too: what the backend's heuristic leaves on the table. Needs a GPU with
sparse tensor cores and the kernels.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from bench.gpu import find_kernels, result_path
from bench.tables.products import GEMM
from bench.tables.sections import print_table
from sdgp_accel.backends import KERNELS, Backend, Needs
from sdgp_accel.backends.tiles import SM80, SM90, Product, rank_tilings
from sdgp_accel.config import Pass, PruneSpec
from sdgp_accel.geometry import LinearGeometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.provenance import provenance

CACHE_BYTES = 1 << 28  # several times the L2 cache of any GPU so far
REPEATS, WARM_UP, SEARCH_REPEATS = 30, 3, 7
HEAD_START = 2_000_000  # cycles that the GPU waits for the host before each turn: calls may cost more than products
MAX_ERROR = 1e-2  # of a bf16 product against another, relative in the norm: 2^-8 per rounding
MAGNITUDE = PruneSpec("magnitude", 2, 4)
PASSES: dict[Product, Pass] = {"dgrad": "grad_input", "wgrad": "grad_weight"}
FAMILIES = {family.name: family for family in (SM90, SM80)}

Closure = Callable[[], object]


class Layer(NamedTuple):
    """A layer's backward: dY [tokens, out_channels], W [out_channels, in_channels], X [tokens, in_channels]."""

    name: str
    tokens: int
    in_channels: int
    out_channels: int

    @property
    def geometry(self) -> LinearGeometry:
        return LinearGeometry(self.tokens, self.in_channels, self.out_channels)


def transformer(name: str, tokens: int, width: int, hidden: int) -> list[Layer]:
    """The Linear layers of a block."""
    shapes = {"fc1": (width, hidden), "fc2": (hidden, width), "qkv": (width, 3 * width), "proj": (width, width)}
    return [Layer(f"{name}.{layer}", tokens, *shape) for layer, shape in shapes.items()]


def pointwise(images: int, size: int, in_channels: int, out_channels: int) -> Layer:
    """A 1x1 convolution of stride 1, channels last: the same product as a Linear layer's."""
    return Layer(f"resnet50.1x1_{in_channels}_{out_channels}", images * size * size, in_channels, out_channels)


# 25088 and 50432 tokens: ViTs with 16 x 16 patches at 224 pixels, batch 128 (196 tokens) and 256 (197). GPT-2: 16
# sequences of 1024. An LLM block 4096 wide with a gated MLP: 8192 tokens. ResNet-50 at batch 256. Most telling first.
LAYERS = [
    *transformer("vit_large", 25088, 1024, 4096),
    Layer("llm_4096.up", 8192, 4096, 14336),
    Layer("llm_4096.down", 8192, 14336, 4096),
    Layer("llm_4096.qkv", 8192, 4096, 12288),
    Layer("llm_4096.o", 16384, 4096, 4096),
    *transformer("gpt2_xl", 16384, 1600, 6400),
    pointwise(256, 14, 1024, 256),
    pointwise(256, 14, 256, 1024),
    pointwise(256, 7, 512, 2048),
    pointwise(256, 7, 2048, 512),
    pointwise(256, 28, 128, 512),
    pointwise(256, 28, 512, 128),
    *transformer("vit_base", 50432, 768, 3072),
    *transformer("gpt2_medium", 16384, 1024, 4096),
    Layer("square", 8192, 8192, 8192),
    *transformer("vit_large_batch256", 50432, 1024, 4096),
    pointwise(256, 28, 512, 256),
    pointwise(256, 14, 1024, 512),
    pointwise(256, 56, 64, 64),
    pointwise(256, 56, 64, 256),
    pointwise(256, 56, 256, 64),
    pointwise(256, 56, 256, 128),
]


class Problem(NamedTuple):
    """One product: the compressed gradient, the same dense (`a` [m, k], a view for wgrad), and W or X (`b` [k, n])."""

    layer: Layer
    name: Product
    operand: Any
    a: Tensor
    b: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.b.shape[1], self.b.shape[0]


def problem(backend: Backend, layer: Layer, name: Product, device: torch.device) -> Problem:
    """Random operands of dgrad or wgrad."""
    is_dgrad = name == "dgrad"
    dy = torch.randn(layer.tokens, layer.out_channels, device=device, dtype=torch.bfloat16)
    plan = LayerPlan(MAGNITUDE if is_dgrad else None, None if is_dgrad else MAGNITUDE, KERNELS, "error")
    operands = backend.prune_compress(dy, layer.geometry, plan, None, Needs(is_dgrad, not is_dgrad, False))
    operand = operands.dgrad if is_dgrad else operands.wgrad
    pruned = operand.decompress()
    b = torch.randn(
        layer.out_channels if is_dgrad else layer.tokens, layer.in_channels, device=device, dtype=torch.bfloat16
    )
    return Problem(layer, name, operand, pruned if is_dgrad else pruned.t(), b)


def ours(backend: Backend, p: Problem, tiling: Any) -> Callable[[], Tensor]:
    product = backend.dgrad if p.name == "dgrad" else backend.wgrad
    return functools.partial(product, p.operand, p.b, p.layer.geometry, tiling)


def cublas(problems: Sequence[Problem]) -> list[Closure]:
    outputs = [p.b.new_empty(p.sizes[:2]) for p in problems]
    return [functools.partial(torch.mm, p.a, p.b, out=out) for p, out in zip(problems, outputs, strict=True)]


def cslt(problems: Sequence[Problem]) -> list[Closure]:
    """With the algorithm and split that cuSPARSELt's search likes best; where that fails, its default search."""
    if not torch.backends.cusparselt.is_available():
        raise RuntimeError("this torch has no cuSPARSELt")
    compressed = [torch._cslt_compress(p.a.contiguous()) for p in problems]
    try:
        algorithm, split, mode, _ = torch._C._cusparselt.mm_search(
            compressed[0], problems[0].b, None, None, None, False
        )
        settings: dict[str, Any] = {"alg_id": algorithm, "split_k": split}
        if "split_k_mode" in str(torch.ops.aten._cslt_sparse_mm.default._schema):
            settings["split_k_mode"] = mode
        else:  # torch < 2.8
            settings["split_k_one_kernel"] = bool(mode)
        torch._cslt_sparse_mm(compressed[0], problems[0].b, **settings)
    except (AttributeError, TypeError, RuntimeError):
        settings = {"alg_id": torch._cslt_sparse_mm_search(compressed[0], problems[0].b)}
    return [
        functools.partial(torch._cslt_sparse_mm, a, p.b, **settings) for a, p in zip(compressed, problems, strict=True)
    ]


def semi_structured(problems: Sequence[Problem]) -> list[Closure]:
    """CUTLASS's sm_80 kernels as torch ships them; torch refuses other compute capabilities than 8.x."""

    def closure(p: Problem) -> Closure:
        values, metadata = sparse_semi_structured_from_dense_cutlass(p.a.contiguous())
        return functools.partial(torch._sparse_semi_structured_mm, values, metadata, p.b)

    first = closure(problems[0])
    first()
    return [first, *map(closure, problems[1:])]


PEERS: dict[str, Callable[[Sequence[Problem]], list[Closure]]] = {
    "cublas": cublas,
    "cslt": cslt,
    "semi_structured": semi_structured,
}


def time_in_turns(contenders: dict[str, list[Closure]], repeats: int) -> dict[str, list[float]]:
    """Samples of microseconds of each contender: its closures, one per set of buffers, in turns with all others.

    Each turn in an order of its own: on an H200 the first after the wait took up to 10 us longer. Each call on the next
    set of buffers, so that none finds W or X in the cache where the call before has read it.
    """
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
    order, count = random.Random(0), itertools.count()
    for _ in range(WARM_UP + repeats):
        torch.cuda._sleep(HEAD_START)
        for name in order.sample(list(contenders), len(contenders)):
            closures = contenders[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            closures[next(count) % len(closures)]()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [1e3 * start.elapsed_time(end) for start, end in pairs[WARM_UP:]] for name, pairs in events.items()}


def tilings_of(
    backend: Backend, p: Problem, family: str | None, device: torch.device
) -> tuple[Sequence[Hashable], bool]:
    """The tilings of a product, best predicted first, and whether they are another family's than the backend takes."""
    own = backend.tilings(p.layer.geometry, PASSES[p.name], torch.bfloat16, device)
    if not own:
        raise click.ClickException(f"{p.layer.name}: no sparse {p.name} on this GPU")
    if family is None or own[0].family == family:  # type: ignore[attr-defined]
        return own, False
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return rank_tilings(FAMILIES[family], p.name, *p.sizes, multiprocessors), True


def measure(
    backend: Backend, layer: Layer, name: Product, search: bool, device: torch.device, family: str | None = None
) -> dict[str, Any]:
    """One result row; ClickException for a wrong product."""
    first = problem(backend, layer, name, device)
    m, n, k = first.sizes
    size = 2 * (m * k + k * n + m * n)
    problems = [first, *(problem(backend, layer, name, device) for _ in range(CACHE_BYTES // size))]
    tilings, is_fallback = tilings_of(backend, first, family, device)
    exact = torch.mm(first.a, first.b).float()
    error = float((ours(backend, first, tilings[0])().float() - exact).norm() / exact.norm())
    if not error < MAX_ERROR:
        raise click.ClickException(f"{layer.name}: wrong {name}, relative error {error}")
    contenders: dict[str, list[Closure]] = {"ours": [ours(backend, p, tilings[0]) for p in problems]}
    unavailable = {}
    for peer, prepare in PEERS.items():
        try:
            contenders[peer] = prepare(problems)
        except (RuntimeError, AttributeError, TypeError, NotImplementedError) as reason:
            unavailable[peer] = str(reason).splitlines()[0]
    row: dict[str, Any] = {
        "layer": layer.name, "T": layer.tokens, "pas": name, "m": m, "n": n, "k": k, "tiling": str(tilings[0]),
        "fallback": family if is_fallback else None, "relative_error": error, "buffer_sets": len(problems),
        "us": time_in_turns(contenders, REPEATS), "unavailable": unavailable,
    }  # fmt: skip
    if search:
        found = time_in_turns({str(tiling): [ours(backend, first, tiling)] for tiling in tilings}, SEARCH_REPEATS)
        row["search"] = {tiling: statistics.median(sample) for tiling, sample in found.items()}
    return row


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", default="", help="Layers whose names start so.")
@click.option("--family", type=click.Choice(sorted(FAMILIES)), help="Kernels to time, instead of those for this GPU.")
@click.option("--search", is_flag=True, help="Also time every tiling.")
@click.option("--minutes", default=float("inf"), help="Start no layer after this long.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Where the results go.")
def main(only: str, family: str | None, search: bool, minutes: float, path: Path | None) -> None:
    """Time the products of each layer in the list."""
    backend, device = find_kernels()
    path = path or result_path(f"gemm-{family}" if family else "gemm")
    started, rows = time.monotonic(), []
    result: dict[str, Any] = {"benchmark": "gemm", "results": rows}
    for layer, name in itertools.product(LAYERS, PASSES):
        if layer.name.startswith(only) and time.monotonic() - started < 60 * minutes:
            rows.append(measure(backend, layer, name, search, device, family))
            result |= {"provenance": provenance(device)}
            path.write_text(json.dumps(result, indent=1) + "\n")
    print_table(GEMM, result)


if __name__ == "__main__":
    main()
