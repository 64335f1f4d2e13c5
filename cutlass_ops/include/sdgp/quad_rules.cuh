// mvue and random with 2:4, written for throughput: straight-line code without branches, four groups in flight. Same
// bits as the rules in group_rules.cuh, to which they defer for the rare group that they cannot take.
//
// What makes mvue, the default, short, and most of it work for the FMA pipe:
//  - A capped element is given the weight 1, so that two elements are always sampled, by the points u and 1 + u. In
//    shifted coordinates (R - 1) all running sums are multiples of 2^-24 in [-1, 1], which float32 holds exactly.
//  - No weight exceeds 1, so that u falls on element 0, 1 or 2 and 1 + u on element 1, 2 or 3: four comparisons.
//  - floor to a multiple of 2^-24 is an addition: p - 1 rounded down, because [-1, -1/2] has just that spacing and
//    above it the difference is exact.
//  - Where rounding makes a difference to that (a weight of 1 + 2^-24, a second round of capping), it is one of a few
//    units of 2^-24 at the ends of [0, 1): it is enough to keep u away from there.
//  - Divisions are those of division.cuh, and only the kept values are divided.
#pragma once

#include "sdgp/division.cuh"
#include "sdgp/group_rules.cuh"
#include "sdgp/metadata.cuh"

namespace sdgp {

// One compressed quad: the kept values in index order (low half first) and, in the top four bits of `code`,
// idx0 | idx1 << 2. (What else `code` holds comes from how it is made.)
struct PackedQuad {
  uint32_t values, code;
};

// word * 16 + the nibble of a quad.
__device__ __forceinline__ uint32_t append_nibble(uint32_t word, const PackedQuad& quad) {
  return __funnelshift_l(quad.code, word, 4);
}

// Packs the quad in the low halves of x.
__device__ __forceinline__ PackedQuad pack_single(const uint32_t (&x)[4]) {
  const PackedQuads packed = pack_pruned(x);
  return {zip_low(packed.low, packed.high), packed.nibbles << 28};
}

// Packs a quad of which at most two are not zero, zeros at the lowest free indices making up the two; false where more
// are not. By a table, since gradients of ReLUs and of masked tokens are full of such quads.
__device__ __forceinline__ bool pack_sparse(uint32_t x01, uint32_t x23, PackedQuad& packed) {
  // Bit i: element i is not zero. First they stand at bits 0, 16, 2, 18.
  const uint32_t top01 = (x01 & 0x7fff7fffu) + 0x7fff7fffu, top23 = (x23 & 0x7fff7fffu) + 0x7fff7fffu;
  const uint32_t spread = (top01 & 0x80008000u) >> 15 | (top23 & 0x80008000u) >> 13;
  const uint32_t nonzero = (spread | spread >> 15) & 0xfu;
  // For each of the sixteen, from the right: idx0 | idx1 << 2, or 15.
  const auto nibble = static_cast<uint32_t>(0xfffefdccf9884444u >> 4 * nonzero) & 0xfu;
  if (nibble == 0xfu) return false;
  const uint32_t selector = 0x1010u + (nibble & 3) * 0x22u + (nibble >> 2) * 0x2200u;
  packed = {permute(x01, x23, selector), nibble << 28};
  return true;
}

template <typename Type>
struct MvueQuad {
  using Element = Type;
  static constexpr bool kNeedsLength = false;         // elements that do not exist are zeros, which are never sampled
  static constexpr int kBlocksPerMultiprocessor = 5;  // 96 registers, of which none is spilled

  // Where every step below is exact and nothing saturates: sums up to 2^14 (fp16: x / weight stays finite) or 2^30;
  // free sums that are not lost in the whole sum, and for the wide exponents of bf16 from 2^-70 on.
  static constexpr bool kIsHalf = ElementTraits<Element>::kInfinity == 0x7c00;
  static constexpr float kLargestSum = kIsHalf ? 0x1p14f : 0x1p30f;
  static constexpr float kSmallestFreeSum = kIsHalf ? 0x1p-30f : 0x1p-70f;
  static constexpr uint32_t kEdge = 1u << 14;  // of u, as a random word: 64 units of 2^-24

  // x01, x23: the group's elements 0, 1 and 2, 3; words: its random block, of which x is used. Clears `regular` where
  // only `compress_any` gives the result: fewer than two non-zeros, NaN, inf, extreme exponents, one value that dwarfs
  // the others, a last value of a few units of 2^-24, u at an edge.
  static __device__ __forceinline__ PackedQuad compress(uint32_t x01, uint32_t x23, const uint4& words, bool& regular) {
    using Traits = ElementTraits<Element>;
    const float a[4] = {fabsf(Traits::to_float(x01 & 0xffffu)), fabsf(Traits::to_float(x01 >> 16)),
                        fabsf(Traits::to_float(x23 & 0xffffu)), fabsf(Traits::to_float(x23 >> 16))};
    const float sum = __fadd_rn(__fadd_rn(__fadd_rn(a[0], a[1]), a[2]), a[3]);
    regular &= sum <= kLargestSum;

    // First round. free[i]: 1 where p = 2 a / sum < 1, 0 where the element is capped; (1 - p) 2^24 is exact near 1.
    const float inverse = reciprocal(sum);
    float free[4], size[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      free[i] = __saturatef(__fmaf_rn(__fmul_rn(inverse, a[i]), -0x1p25f, 0x1p24f));
      size[i] = __fmul_rn(free[i], a[i]);
    }
    // The free elements share 2, or 1 beside a capped one, and have these probabilities (the same ones where nothing
    // was capped). Two capped ones leave a free sum that is lost in the sum.
    const float free_sum = __fadd_rn(__fadd_rn(__fadd_rn(size[0], size[1]), size[2]), size[3]);
    regular &= free_sum > __fmaf_rn(sum, 0x1p-20f, kSmallestFreeSum);
    const float factor = __fmul_rn(free_sum < sum ? 1.0f : 2.0f, reciprocal(free_sum));
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = __fmul_rn(factor, size[i]);

    // Running sums less 1: after elements 0, 1, 2 (after element 3: 1). From the last free non-zero on they are what
    // the capped elements after it leave.
    const float running0 = __fadd_rd(p[0], -free[0]);
    const float weight0 = __fadd_rn(running0, 1.0f), weight2 = __fadd_rn(__fadd_rd(p[2], -free[2]), 1.0f);
    float running1 = __fadd_rn(weight0, __fadd_rd(p[1], -free[1]));
    float running2 = __fadd_ru(running1, weight2);  // exact up to 1, and what exceeds it stays visible
    const bool more_after_2 = size[3] > 0.0f;
    const bool more_after_1 = size[2] > 0.0f || more_after_2;
    if (!more_after_2) running2 = free[3];
    if (!more_after_1) running1 = __fadd_rn(running2, -weight2);
    regular &= running2 <= 1.0f;
    regular &= running1 <= running2;

    // The elements under the two points.
    regular &= words.x + kEdge >= 2 * kEdge;
    const float unit = static_cast<float>(words.x >> 8);
    const float point0 = __fmaf_rn(unit, 0x1p-24f, -1.0f), point1 = __fmul_rn(unit, 0x1p-24f);
    float kept_weight0 = weight0, kept_weight1 = __fadd_rn(running1, -running0);
    // Bits 0..15: the byte selector of both elements.
    uint32_t code = 0x40003210;
    constexpr uint32_t kNext0 = 0x10000022, kNext1 = 0x40002200;
    if (point0 >= running0) kept_weight0 = kept_weight1, code += kNext0;
    if (point0 >= running1) kept_weight0 = __fadd_rn(running2, -running1), code += kNext0;
    if (point1 >= running1) kept_weight1 = __fadd_rn(running2, -running1), code += kNext1;
    if (point1 >= running2) kept_weight1 = __fadd_rn(1.0f, -running2), code += kNext1;

    const uint32_t kept = permute(x01, x23, code);
    const float kept0 = Traits::to_float(kept & 0xffffu), kept1 = Traits::to_float(kept >> 16);
    return {pack_floats<Element>(quotient(kept0, kept_weight0), quotient(kept1, kept_weight1)), code};
  }

  // The result for a group that keeps all its non-zeros; false where it is none.
  static __device__ __forceinline__ bool compress_sparse(uint32_t x01, uint32_t x23, PackedQuad& packed) {
    return pack_sparse(x01, x23, packed);
  }

  static __device__ __forceinline__ PackedQuad compress_any(uint32_t x01, uint32_t x23, const uint4& words, int) {
    uint32_t x[4] = {x01 & 0xffffu, x01 >> 16, x23 & 0xffffu, x23 >> 16};
    Mvue<Element, 2, 4>::template estimate<0>(x, static_cast<int>(words.x >> 8));
    return pack_single(x);
  }
};

template <typename Type>
struct RandomQuad {
  using Element = Type;
  static constexpr bool kNeedsLength = true;
  static constexpr int kBlocksPerMultiprocessor = 4;  // 128 registers, of which none is spilled

  // In the top bits of the halves, whether one of the four is NaN or inf.
  static __device__ __forceinline__ uint32_t not_finite(uint32_t x01, uint32_t x23) {
    constexpr uint32_t kToTopBit = (0x8000 - ElementTraits<Element>::kInfinity) * 0x10001;
    return ((x01 & 0x7fff7fffu) + kToTopBit) | ((x23 & 0x7fff7fffu) + kToTopBit);
  }

  // x01, x23: the group's elements 0, 1 and 2, 3; words: their random keys. Clears `regular` where only `compress_any`
  // gives the result: NaN or inf, which change what is kept, and a kept zero, which has to be at the lowest free index.
  static __device__ __forceinline__ PackedQuad compress(uint32_t x01, uint32_t x23, const uint4& words, bool& regular) {
    // The larger of each pair, unless both of one pair beat both of the other. Bits 0..15: the byte selector.
    uint32_t code = 0x80005410;
    if (words.x < words.y) code += 0x10000022;
    if (words.z < words.w) code += 0x40002200;
    if (min(words.x, words.y) >= max(words.z, words.w)) code = 0x40003210;
    if (min(words.z, words.w) > max(words.x, words.y)) code = 0xe0007654;
    const uint32_t kept = permute(x01, x23, code);
    const uint32_t nonzero = (kept & 0x7fff7fffu) + 0x7fff7fffu;
    regular &= ((not_finite(x01, x23) | ~nonzero) & 0x80008000u) == 0;
    return {kept, code};
  }

  // The result for a group of four finite elements, some kept one zero, of which `compress` made `packed`; false where
  // it is none.
  static __device__ __forceinline__ bool compress_sparse(uint32_t x01, uint32_t x23, PackedQuad& packed) {
    const uint32_t keep = 1u << (packed.code >> 28 & 3) | 1u << (packed.code >> 30);
    const uint32_t keep01 = (keep & 1) * 0xffffu | (keep >> 1 & 1) * 0xffff0000u;
    const uint32_t keep23 = (keep >> 2 & 1) * 0xffffu | (keep >> 3) * 0xffff0000u;
    return (not_finite(x01, x23) & 0x80008000u) == 0 && pack_sparse(x01 & keep01, x23 & keep23, packed);
  }

  static __device__ __forceinline__ PackedQuad compress_any(uint32_t x01, uint32_t x23, const uint4& words,
                                                            int length) {
    uint32_t x[4] = {x01 & 0xffffu, x01 >> 16, x23 & 0xffffu, x23 >> 16};
    const uint32_t keep = Random<Element, 2, 4>::template choose<0>(x, {words.x, words.y, words.z, words.w}, length);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = keep >> i & 1 ? x[i] : 0u;
    return pack_single(x);
  }
};

}  // namespace sdgp
