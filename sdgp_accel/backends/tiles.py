"""Which instance of a Hopper sparse product runs a shape, and in how many parts."""

from __future__ import annotations

import functools
from typing import NamedTuple

# (rows, columns) of the output per thread block, and the thread blocks of a cluster, which sit above each other and
# share loads of the dense operand -> time per multiply-add relative to the fastest, measured with large GEMMs on an
# H100 (bench/results/gemm_h100.json).
TILES = {
    (128, 256, 2): 1.0, (256, 128, 2): 1.08, (128, 128, 2): 1.3,
    (128, 256, 1): 1.25, (256, 128, 1): 1.12, (128, 128, 1): 1.5,
}  # fmt: skip
# The same for a convolution's wgrad, which gathers the dense operand from images: narrow tiles load less of it. Only
# (128, 256, 2) and (256, 128, 1) are measured (ResNet-9's 3x3 layers), the others are set between.
GATHERING_TILES = {
    (128, 256, 2): 1.15, (256, 128, 2): 1.05, (128, 128, 2): 1.35,
    (128, 256, 1): 1.3, (256, 128, 1): 1.0, (128, 128, 1): 1.5,
}  # fmt: skip
TILE_K = 128  # one step of the main loop; reduction lengths are padded to it
# Per multiprocessor of an H100: multiply-adds of a sparse main loop (counted dense) per byte of device memory traffic.
MULTIPLY_ADDS_PER_BYTE = 200.0
# With few multiprocessors busy, those run faster: they have the power and the L2 cache to themselves.
IDLE_GAIN = 0.25
# Tile columns that run together: all where they are few, else groups of 8; 0 to 6 % faster than 4 or 16.
FEW_COLUMNS, GROUP_N = 16, 8
MAX_SPLITS = 64


class Tiling(NamedTuple):
    """How one product is launched."""

    tile: str  # as in the instance's name
    cluster_size: int
    splits: int  # parts of the reduction, each into its own float32 partial result
    group_n: int  # tile columns that run together, for reuse in L2


def choose_tiling(m: int, n: int, k: int, multiprocessors: int, splittable: bool, gathering: bool = False) -> Tiling:
    """The tiling of [m, k] x [k, n] with the least predicted time: the first of `rank_tilings`.

    Within 4 % of the best tiling found by search at 24 shapes of ViT-L and 4096-wide layers on an H100.
    """
    return rank_tilings(m, n, k, multiprocessors, splittable, gathering)[0]


@functools.lru_cache(maxsize=1 << 14)
def rank_tilings(
    m: int, n: int, k: int, multiprocessors: int, splittable: bool, gathering: bool = False
) -> tuple[Tiling, ...]:
    """For each tile and cluster its best number of splits at [m, k] x [k, n], least predicted time first.

    Each round of thread blocks takes as long as one tile, a last one that leaves multiprocessors idle a little less;
    splitting the reduction fills it, and costs writing and reading the partial results. gathering: the dense operand
    comes from images.
    """
    steps = -(-k // TILE_K)
    tiles = GATHERING_TILES if gathering else TILES

    def cost(rows: int, columns: int, cluster: int, splits: int) -> float:
        blocks = cluster * -(-m // (rows * cluster)) * -(-n // columns) * splits
        rounds, rest = divmod(blocks, multiprocessors)
        last_round = 1 - IDLE_GAIN * (1 - rest / multiprocessors) if rest else 0.0
        # One more step stands for filling the pipeline and storing the result.
        main_loop = rows * columns * (-(-steps // splits) + 1) * TILE_K * tiles[rows, columns, cluster]
        partials = 8.0 * m * n * splits if splits > 1 else 0.0
        return (rounds + last_round) * main_loop + partials * MULTIPLY_ADDS_PER_BYTE / multiprocessors

    limit = min(MAX_SPLITS, steps) if splittable else 1
    best = [min((cost(*tile, splits), *tile, splits) for splits in range(1, limit + 1)) for tile in tiles]

    def tiling(rows: int, columns: int, cluster: int, splits: int) -> Tiling:
        tile_columns = -(-n // columns)
        group_n = tile_columns if tile_columns < FEW_COLUMNS else GROUP_N
        return Tiling(f"{rows}x{columns}", cluster, splits, group_n)

    return tuple(tiling(*candidate[1:]) for candidate in sorted(best, key=lambda candidate: candidate[0]))
