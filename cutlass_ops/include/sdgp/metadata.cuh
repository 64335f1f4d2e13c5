// Packing of a pruned quad (an aligned group of 4 with at most 2 non-zeros) into the hardware's 2:4 format, and where
// the metadata goes in CUTLASS's layouts.
#pragma once

#include "sdgp/element.cuh"
#include "sdgp/prune_compress_api.h"

namespace sdgp {

// Two quads, one per half: the kept values in index order and, in bits 0..3 of each half, idx0 | idx1 << 2.
struct PackedQuads {
  uint32_t low, high, nibbles;
};

// x[i]: element i of both quads; keep[i]: masks with exactly two elements set per quad, or 0 alone, which 1 completes.
__device__ __forceinline__ PackedQuads pack_kept(const uint32_t (&x)[4], const uint32_t (&keep)[4]) {
  PackedQuads packed;
  packed.low = select(keep[0], x[0], select(keep[1], x[1], x[2]));
  packed.high = select(keep[3], x[3], select(keep[2], x[2], x[1]));
  // idx0 = 0 if keep[0], 1 if keep[1], else 2; idx1 = 3 if keep[3], 2 if keep[2], else 1.
  const uint32_t idx0 = ~keep[0] & ((keep[1] & 0x00030003u) ^ 0x00020002u);
  const uint32_t idx1 = (keep[3] & 0x000c000cu) | ((keep[2] & 0x000c000cu) ^ 0x00040004u);
  packed.nibbles = idx0 | idx1;
  return packed;
}

// x: pruned quads. Where fewer than two are non-zero, zeros at the lowest free indices complete the two.
__device__ __forceinline__ PackedQuads pack_pruned(const uint32_t (&x)[4]) {
  uint32_t keep[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) keep[i] = nonzero_mask(x[i]);
  keep[0] |= ~majority(keep[1], keep[2], keep[3]);
  return pack_kept(x, keep);
}

// The place of word `word` (16 consecutive k) of row `row` of an operand with `rows` rows, in a tiled layout. Tiles
// come one after the other along the rows, then along k; within a tile the bits of row and word change places.
__device__ __forceinline__ int64_t tiled_word(int32_t layout, int64_t row, int64_t word, int64_t rows) {
  const auto l = static_cast<int>(row % 8), g = static_cast<int>(row / 8 % 2), x = static_cast<int>(word % 2);
  if (layout == SDGP_LAYOUT_SM80) {  // tiles of 32 rows x 2 words: l, half of the rows, x, g, from slow to fast
    const int64_t tile = word / 2 * ((rows + 31) / 32) + row / 32;
    return tile * 64 + ((l * 2 + row / 16 % 2) * 2 + x) * 2 + g;
  }
  // Tiles of 64 rows x 2 `pairs` words: quarter of the rows, x, l, pair of words, g.
  const int pairs = 1 << (layout - SDGP_LAYOUT_SM90_K32);
  const int64_t tile = word / (2 * pairs) * ((rows + 63) / 64) + row / 64;
  return tile * 128 * pairs + (((row / 16 % 4 * 2 + x) * 8 + l) * pairs + word / 2 % pairs) * 2 + g;
}

}  // namespace sdgp
