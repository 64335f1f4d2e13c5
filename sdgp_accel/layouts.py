"""How 2:4 metadata lies in memory: encoders and decoders between row-major words and CUTLASS's layouts.

The sparse operand A has M rows and K columns before compression. One 16-bit word describes 16 consecutive k of one
row: four groups, group g in bits 4g .. 4g+3, the index of its first kept value in the low two of them. Row-major
metadata is the matrix of these words, [M, K/16]. The layouts below permute whole words; where a matrix does not
fill their tiles they are padded with `PADDING_WORD`, since the hardware leaves all-zero nibbles undefined.

=========  ==========  ==================================================================================
name       tile        read by
=========  ==========  ==================================================================================
sm80       32 x 32     `cutlass::gemm::device::SparseGemm`: `reorder_meta` (cutlass/util/host_reorder.h) into
                       `ColumnMajorInterleaved<2>`, so that `ldmatrix` delivers the metadata registers
sm90_k<k>  64 x k      the sm_90 sparse collectives: `Sm90GemmSparseConfig` with k = min(tile K, 128), so that a
                       warp of `wgmma.sp` finds its registers side by side
=========  ==========  ==================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

K_PER_WORD = 16
PADDING_WORD = 0x4444  # four groups that keep elements 0 and 1


@dataclass(frozen=True)
class TiledLayout:
    """Tiles of words, one after the other along M, then along K; within a tile, permuted factors of row and word.

    row_factors, word_factors: a tile's row (word) index is split into digits with these radices, the most significant
        first; their products are the tile's size.
    memory_order: the digits (row digits first, numbered from 0) from the slowest to the fastest in memory.
    """

    name: str
    row_factors: tuple[int, ...]
    word_factors: tuple[int, ...]
    memory_order: tuple[int, ...]

    @property
    def tile_rows(self) -> int:
        return math.prod(self.row_factors)

    @property
    def tile_words(self) -> int:
        return math.prod(self.word_factors)

    def encode(self, words: Tensor) -> Tensor:
        """Row-major words, int16 [M, K/16] -> the words in this layout's order, int16, one-dimensional."""
        if words.dtype != torch.int16 or words.ndim != 2:
            raise ValueError(f"words must be int16 of 2 dimensions; got {words.dtype} of shape {tuple(words.shape)}")
        rows, columns = self._tiles(*words.shape)
        padded = words.new_full((rows * self.tile_rows, columns * self.tile_words), PADDING_WORD)
        padded[: words.shape[0], : words.shape[1]] = words
        digits = padded.view(rows, *self.row_factors, columns, *self.word_factors)
        return digits.permute(self._permutation()).reshape(-1)

    def decode(self, memory: Tensor, rows: int, words: int) -> Tensor:
        """The inverse of `encode`: int16 [rows, words]."""
        tiles = self._tiles(rows, words)
        expected = math.prod(tiles) * self.tile_rows * self.tile_words
        if memory.dtype != torch.int16 or memory.numel() != expected:
            raise ValueError(
                f"memory must hold {expected} int16 words for [{rows}, {words}] words in layout {self.name}; "
                f"got {memory.numel()} of {memory.dtype}"
            )
        shape = (tiles[0], *self.row_factors, tiles[1], *self.word_factors)
        permutation = self._permutation()
        digits = memory.view([shape[i] for i in permutation])
        inverse = sorted(range(len(permutation)), key=permutation.__getitem__)
        matrix = digits.permute(inverse).reshape(tiles[0] * self.tile_rows, tiles[1] * self.tile_words)
        return matrix[:rows, :words]

    def _tiles(self, rows: int, words: int) -> tuple[int, int]:
        return -(-rows // self.tile_rows), -(-words // self.tile_words)

    def _permutation(self) -> list[int]:
        # The viewed dimensions are: tile along M, row digits, tile along K, word digits.
        row_digits = len(self.row_factors)
        digits = [1 + i if i < row_digits else 2 + i for i in self.memory_order]
        return [1 + row_digits, 0, *digits]


def _sm90(k: int) -> TiledLayout:
    # cute's TensorEAtom_16bit: shape ((8, 2, 4), (16, 2, k / 32)), order ((3, 1, 5), (0, 4, 2)), fastest factor first.
    return TiledLayout(f"sm90_k{k}", (4, 2, 8), (k // 32, 2), (0, 4, 2, 3, 1))


# Of row m = 16 h + 8 g + l: the words of rows l and l + 8 lie side by side, then those of the next 16 k.
SM80 = TiledLayout("sm80", (2, 2, 8), (2,), (2, 0, 3, 1))
LAYOUTS = {layout.name: layout for layout in (SM80, _sm90(32), _sm90(64), _sm90(128))}
