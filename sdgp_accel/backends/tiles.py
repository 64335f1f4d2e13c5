"""Which instance of a sparse product runs a shape, and in how many parts: a cost model per family of kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Product = Literal["dgrad", "wgrad"]


class Tile(NamedTuple):
    """What a thread block computes at a time: rows and columns of the output.

    cluster: thread blocks that sit above each other and share loads of the dense operand. pingpong: two warpgroups take
    turns at tiles, so that one stores its own while the other computes (Hopper).
    """

    rows: int
    columns: int
    cluster: int
    pingpong: bool = False

    def __str__(self) -> str:
        """As in the instances' names."""
        return f"{self.rows}x{self.columns}" + "_pingpong" * self.pingpong


Costs = Mapping[Tile, float]

TILE_K = 128  # positions are padded to it: one step of the Hopper kernels' main loop, two of the others'
STAGE_K = 64  # channels are padded to it: half a step, what a filter's tap is rounded up to
TAP_COLUMNS = 64  # of convolutions' wgrads on Hopper: a box of the dense operand's TMA
# With few multiprocessors busy, those run faster: they have the power and the L2 cache to themselves (an H100).
IDLE_GAIN = 0.25
# Tile columns that run together: all where they are few, else groups of 8; 0 to 6 % faster than 4 or 16 on an H100.
FEW_COLUMNS, GROUP_N = 16, 8
MAX_ROUNDS = 8  # of thread blocks that splitting may make of a product: more even out no better
# Of sharing the last round's tiles, in steps of TILE_K of the fastest main loop (0.81 µs for 128x256 on an H200): a
# float32 tile of 128 KB is read at 64 bytes per cycle and multiprocessor, 1.2 µs; the flags are cleared by a launch of
# their own, some 2 µs. Among the tilings timed on an H200, 3 for the former and 1, 5, 8 and 12 for the latter choose no
# better.
PIECE_STEPS, SHARING_STEPS = 1.5, 2.5
SHARING_MARGIN = 1.03  # of the prediction, over its error elsewhere: what is not clearly faster is not shared
WARPS = 8  # that compute a tile, each with a flag for its part of it


@dataclass(frozen=True, eq=False)  # each is itself only: a key of caches
class Family:
    """Kernels for one generation of tensor cores: the tiles they come in, each with its time per multiply-add relative
    to the fastest."""

    name: str  # as in the instances' names
    dgrad: Costs
    wgrad: Costs
    # Of convolutions: dgrad gathers the compressed operand from images, wgrad the dense one.
    conv_dgrad: Costs
    conv_wgrad: Costs
    multiply_adds_per_byte: float  # of a sparse main loop (counted dense), per byte of device memory traffic
    store_steps: float = 1.0  # filling the pipeline and storing the tile, in steps of TILE_K of the fastest main loop
    suffix: str = ""  # of the tile in the instances' names
    tap_columns: int = 1  # the columns of a filter tap count in multiples of it, in a convolution's wgrad
    shares_tiles: bool = False  # between thread blocks, where the last round would leave some idle


# Medians over the products above 2e11 multiply-adds in bench/results/gemm-NVIDIA_H200.json, which timed every tile.
_SM90 = {
    Tile(128, 256, 2): 1.0, Tile(256, 128, 2): 1.09, Tile(128, 128, 2): 1.21, Tile(128, 192, 2): 1.08,
    Tile(128, 256, 1): 1.16, Tile(256, 128, 1): 1.09, Tile(128, 128, 1): 1.48, Tile(128, 192, 1): 1.26,
}  # fmt: skip
_SM90_DGRAD = _SM90 | {
    Tile(128, 128, 2, pingpong=True): 1.26, Tile(256, 64, 2, pingpong=True): 1.64,
    Tile(128, 128, 1, pingpong=True): 1.44, Tile(256, 64, 1, pingpong=True): 1.83,
}  # fmt: skip
_SM90_WGRAD = _SM90 | {Tile(64, 256, 1, pingpong=True): 1.96}
# About what least squares give over the convolutions of bench/layers.py on an H200, every tiling timed: clusters do not
# help, wide tiles do.
_SM90_CONV_DGRAD = {
    Tile(128, 256, 2): 1.02, Tile(256, 128, 2): 1.13, Tile(128, 128, 2): 1.26, Tile(128, 192, 2): 1.06,
    Tile(128, 256, 1): 1.0, Tile(256, 128, 1): 1.13, Tile(128, 128, 1): 1.23, Tile(128, 192, 1): 1.04,
    Tile(128, 128, 2, pingpong=True): 1.24, Tile(256, 64, 2, pingpong=True): 1.78,
    Tile(128, 128, 1, pingpong=True): 1.2, Tile(256, 64, 1, pingpong=True): 1.78,
}  # fmt: skip
# Narrow tiles gather less. Only (128, 256, 2) and (256, 128, 1) are fitted (ResNet-9's 3x3 layers on an H100), the
# others are set between, 64x192 as what 64x256 was thought to take above. What a fit to all convolutions gives chooses
# worse for those that take longest.
_SM90_CONV_WGRAD = {
    Tile(128, 256, 2): 1.15, Tile(256, 128, 2): 1.05, Tile(128, 128, 2): 1.35, Tile(128, 192, 2): 1.1,
    Tile(128, 256, 1): 1.3, Tile(256, 128, 1): 1.0, Tile(128, 128, 1): 1.5, Tile(128, 192, 1): 1.32,
    Tile(64, 192, 1, pingpong=True): 2.2,
}  # fmt: skip
SM90 = Family(
    "sm90", _SM90_DGRAD, _SM90_WGRAD, _SM90_CONV_DGRAD, _SM90_CONV_WGRAD,
    multiply_adds_per_byte=200.0,
    # By vit_large's fc1, fc2 and proj dgrads on an H200, which differ in k and in the number of tiles: a 128x256 tile
    # takes 0.81 us for each step and 2.46 us beside them. A ping-pong one takes 2.3 steps' time per area.
    store_steps=3.0,
    tap_columns=TAP_COLUMNS,
    shares_tiles=True,
)  # fmt: skip

# By calculation for an A100, not measured: the longest of the tensor cores (2048 multiply-adds per cycle and
# multiprocessor), the shared-memory port (128 bytes per cycle; fragments, metadata and fills) and L2 (5120 bytes per
# cycle for all 108, NVIDIA A100 whitepaper) on 32 k of a tile: 536, 300, 204 and 221 cycles, in the order of these
# tables.
_SM80_DGRAD = {Tile(256, 128, 1): 1.0, Tile(128, 128, 1): 1.12, Tile(128, 64, 1): 1.52}
_SM80_WGRAD = {Tile(256, 128, 1): 1.0, Tile(128, 128, 1): 1.12, Tile(64, 128, 1): 1.65}
SM80 = Family(
    "sm80", _SM80_DGRAD, _SM80_WGRAD, _SM80_DGRAD, _SM80_WGRAD,
    # 0.8 x 2048 multiply-adds per cycle beside 0.85 x 1555 GB/s at 1.41 GHz for 108 multiprocessors (A100 40 GB).
    multiply_adds_per_byte=190.0,
)  # fmt: skip
# The largest tile of SM80 needs this much shared memory; GPUs of these compute capabilities have 99 KB (CUDA C++
# Programming Guide, technical specifications per compute capability) and run the others.
LARGEST_SHARED_BYTES = 136 << 10
SMALL_SHARED_MEMORY = {(8, 6), (8, 9), (12, 0), (12, 1)}
_LARGEST = Tile(256, 128, 1)
_SM80_SMALL_WGRAD = {tile: cost for tile, cost in _SM80_WGRAD.items() if tile != _LARGEST}
_SM80_SMALL_DGRAD = {tile: cost for tile, cost in _SM80_DGRAD.items() if tile != _LARGEST}
SM80_SMALL = replace(
    SM80,
    dgrad=_SM80_SMALL_DGRAD,
    wgrad=_SM80_SMALL_WGRAD,
    conv_dgrad=_SM80_SMALL_DGRAD,
    conv_wgrad=_SM80_SMALL_WGRAD,
)
# Rows that do not begin at multiples of 16 bytes, copied value by value. One tile: the cost compares with nothing, and
# only says how much the reduction may be split.
_ANY = {Tile(128, 64, 1): 6.0}
SM80_ANY = replace(SM80, dgrad=_ANY, wgrad=_ANY, conv_dgrad=_ANY, conv_wgrad=_ANY, suffix="_any", tap_columns=8)


class Tiling(NamedTuple):
    """How one product is launched."""

    family: str
    tile: str  # as in the instance's name
    cluster_size: int
    splits: int  # parts of the reduction, each into its own float32 partial result
    group_n: int  # tile columns that run together, for reuse in L2
    owned_steps: int = 0  # of TILE_K, by the owner of a tile of the last round, the rest by others; 0: none is shared


@functools.lru_cache(maxsize=1 << 14)
def rank_tilings(
    family: Family,
    product: Product,
    m: int,
    n: int,
    k: int,
    multiprocessors: int,
    conv: bool = False,
    shares: bool = True,
) -> tuple[Tiling, ...]:
    """For each tile and cluster its best number of splits at [m, k] x [k, n], and where a last round can be shared that
    too; least predicted time first, which is the default of a product.

    For SM90 that is within 7 % of the fastest of all at 50 products of transformers on an H200 (0.6 % on average;
    bench/results/gemm-NVIDIA_H200.json), within 15 % at 24 of 1x1 convolutions (2 %).

    Each round of thread blocks takes as long as one tile, a last one that leaves multiprocessors idle a little less;
    splitting the reduction of a wgrad fills it, and costs writing and reading the partial results. Sharing fills it as
    well (cutlass_ops/include/sdgp/sm90_schedule.cuh), at the price of a partial result for each shared piece only.
    conv: the product gathers from images. shares: whether k can be cut for sharing, at multiples of TILE_K.
    """
    steps = -(-k // TILE_K)
    matrix, gathering = (family.dgrad, family.conv_dgrad) if product == "dgrad" else (family.wgrad, family.conv_wgrad)
    tiles = gathering if conv else matrix

    def predictions(tile: Tile, step_time: float) -> Iterator[tuple[float, Tiling]]:
        tile_columns = -(-n // tile.columns)
        units = -(-m // (tile.rows * tile.cluster)) * tile_columns
        blocks, step_work = tile.cluster * units, tile.rows * tile.columns * TILE_K
        group_n = tile_columns if tile_columns < FEW_COLUMNS else GROUP_N
        tiling = Tiling(family.name, f"{tile}{family.suffix}", tile.cluster, 1, group_n)

        def cost(splits: int) -> float:
            rounds, rest = divmod(blocks * splits, multiprocessors)
            last_round = 1 - IDLE_GAIN * (1 - rest / multiprocessors) if rest else 0.0
            main_loop = step_work * (-(-steps // splits) * step_time + family.store_steps)
            partials = 8.0 * m * n * splits if splits > 1 else 0.0
            return (rounds + last_round) * main_loop + partials * family.multiply_adds_per_byte / multiprocessors

        # Not split, or into as many parts as some number of rounds holds.
        rounds = range(1, MAX_ROUNDS + 1) if product == "wgrad" else ()
        filling = (min(max(multiprocessors * count // blocks, 1), steps) for count in rounds)
        splits = min(sorted({1, *filling}), key=cost)
        yield cost(splits), tiling._replace(splits=splits)
        if shares and family.shares_tiles and not tile.pingpong:
            shared = _shared(units, multiprocessors // tile.cluster, steps, step_time, family.store_steps)
            if shared is not None:
                yield step_work * shared[0] * SHARING_MARGIN, tiling._replace(owned_steps=shared[1])

    fitting = {tile: step_time for tile, step_time in tiles.items() if tile.cluster <= multiprocessors}
    candidates = [candidate for tile, step_time in fitting.items() for candidate in predictions(tile, step_time)]
    return tuple(tiling for _, tiling in sorted(candidates, key=lambda candidate: candidate[0]))


def _shared(units: int, clusters: int, steps: int, step_time: float, store_steps: float) -> tuple[float, int] | None:
    """The time, in steps of the fastest main loop, where the last round's units are shared, and the steps of an owner;
    None where there is nothing to share.

    Owners and helpers take equally long: o = u / h (s - o + e), with u units, h helpers, s steps of a unit, o of its
    owner, and e steps of overhead for each unit and piece.
    """
    rounds, shared = divmod(units, clusters)
    if shared == 0 or steps < 2:
        return None
    per_helper = shared / (clusters - shared)
    owned = round(per_helper * (steps + store_steps / step_time) / (1 + per_helper))
    owned = min(max(owned, 1), steps - 1)
    tail, stretch = steps - owned, math.ceil(per_helper * (steps - owned))
    helped, added = (stretch - 1) // tail + 2, (tail - 1) // stretch + 2  # pieces of a helper and an owner, at most
    last_round = max(owned * step_time, stretch * step_time + helped * store_steps)
    last_round += added * PIECE_STEPS + store_steps + SHARING_STEPS
    return rounds * (steps * step_time + store_steps) + last_round, owned


def workspace_bytes(tiling: Tiling, outputs: int, multiprocessors: int) -> int:
    """Of a product with `outputs` elements in its result: SdgpSparseGemm's workspace in sparse_gemm_api.h."""
    if tiling.owned_steps:
        rows, columns = map(int, tiling.tile.split("x"))
        return multiprocessors // tiling.cluster_size * tiling.cluster_size * 4 * (rows * columns + WARPS)
    return 4 * tiling.splits * outputs if tiling.splits > 1 else 0
