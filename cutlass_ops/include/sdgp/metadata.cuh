// Packing of a pruned quad (an aligned group of 4 with at most 2 non-zeros) into the hardware's 2:4 format.
#pragma once

#include "sdgp/element.cuh"

namespace sdgp {

// Two quads, one per half: the kept values in index order and, in bits 0..3 of each half, idx0 | idx1 << 2.
struct PackedQuads {
  uint32_t low, high, nibbles;
};

// x[i]: element i of both quads; keep[i]: masks with exactly two elements set per quad.
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
  keep[1] |= ~(keep[2] | keep[3]);
  return pack_kept(x, keep);
}

}  // namespace sdgp
