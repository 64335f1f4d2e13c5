// mvue and random with 2:4, written for throughput: one group per call, straight-line except where noted. Same bits as
// the rules in group_rules.cuh, to which they defer for the rare group that they cannot take.
//
// What makes mvue, the default, short, and most of it work for the FMA pipe:
//  - A capped element is given the weight 1, so that two elements are always sampled, by the points u and 1 + u. In
//    shifted coordinates (R - 1) all running sums are multiples of 2^-24 in [-1, 1], which float32 holds exactly.
//  - floor to a multiple of 2^-24 is an addition: p - 1 rounded down, because [-1, -1/2] has just that spacing and
//    above it the difference is exact.
//  - Divisions are those of division.cuh, and only the kept values are divided.
//
// A group still takes 181 instructions, of which Philox is 36 (17 wide multiplications): arithmetic, not memory, is
// what limits mvue. On an H100, 92 per group and direction would hide behind the memory traffic of both operands;
// measured, both take 3.2 times as long as a copy of dY (bench/results/kernels-NVIDIA_H100_80GB_HBM3.json).
#pragma once

#include "sdgp/division.cuh"
#include "sdgp/group_rules.cuh"
#include "sdgp/metadata.cuh"

namespace sdgp {

// One compressed quad: the kept values in index order (low half first) and idx0 | idx1 << 2.
struct PackedQuad {
  uint32_t values, nibble;
};

// Packs the quad in the low halves of x.
__device__ __forceinline__ PackedQuad pack_single(const uint32_t (&x)[4]) {
  const PackedQuads packed = pack_pruned(x);
  return {zip_low(packed.low, packed.high), packed.nibbles & 0xfu};
}

// At most two of the four are non-zero.
__device__ __forceinline__ bool has_few_nonzeros(uint32_t x01, uint32_t x23) {
  // Top bit of each half: non-zero; then each to a byte of 8 equal bits.
  const uint32_t first = (x01 & 0x7fff7fffu) + 0x7fff7fffu, second = (x23 & 0x7fff7fffu) + 0x7fff7fffu;
  return __popc(permute(first, second, 0xfdb9)) <= 2 * 8;
}

template <typename Element>
struct MvueQuad {
  // Where every step below is exact and nothing saturates: sums up to 2^14 (fp16: x / weight stays finite) or 2^30, and
  // for the wide exponents of bf16 free sums from 2^-70 and sampled values from 2^-100 on.
  static constexpr bool kIsHalf = ElementTraits<Element>::kInfinity == 0x7c00;
  static constexpr float kLargestSum = kIsHalf ? 0x1p14f : 0x1p30f;
  static constexpr float kSmallestFreeSum = 0x1p-70f;
  static constexpr float kSmallestSample = 0x1p-100f;

  // x01, x23: the group's elements 0, 1 and 2, 3; words: its random words. Clears `regular` where only
  // `compress_any` gives the result: NaN, inf, extreme exponents, and values so unequal that a second round of capping
  // finds something.
  static __device__ __forceinline__ PackedQuad compress(uint32_t x01, uint32_t x23, const uint4& words, bool& regular) {
    using Traits = ElementTraits<Element>;
    if (has_few_nonzeros(x01, x23)) return pack_single({x01, x01 >> 16, x23, x23 >> 16});
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
    // What is left of the 2 for the free elements, and their probabilities (the same ones where nothing was capped).
    const float free01 = __fadd_rn(free[0], free[1]), free23 = __fadd_rn(free[2], free[3]);
    const float remaining = __fadd_rn(__fadd_rn(free01, free23), -2.0f);
    const float free_sum = __fadd_rn(__fadd_rn(__fadd_rn(size[0], size[1]), size[2]), size[3]);
    if constexpr (!kIsHalf) regular &= free_sum >= kSmallestFreeSum;
    const float factor = __fmul_rn(remaining, reciprocal(free_sum));
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[i] = __fmul_rn(factor, size[i]);
      regular &= !(p[i] >= 1.0f);
    }

    // Running sums less 1: after elements 0, 1, 2 (after element 3: 1). From the last free non-zero on they are what
    // the capped elements after it leave.
    const float step1 = __fadd_rd(p[1], -free[1]), step2 = __fadd_rd(p[2], -free[2]);
    const float running0 = __fadd_rd(p[0], -free[0]);
    const float weight0 = __fadd_rn(running0, 1.0f);
    float running1 = __fadd_rn(weight0, step1);
    float running2 = __fadd_rn(running1, __fadd_rn(step2, 1.0f));
    const bool more_after_2 = size[3] > 0.0f;
    const bool more_after_1 = size[2] > 0.0f || more_after_2;
    running1 = fminf(more_after_1 ? running1 : 2.0f, __fadd_rn(free23, -1.0f));
    running2 = fminf(more_after_2 ? running2 : 2.0f, free[3]);

    // The element under each of the two points.
    const float unit = static_cast<float>(words.x >> 8);
    const float point0 = __fmaf_rn(unit, 0x1p-24f, -1.0f), point1 = __fmul_rn(unit, 0x1p-24f);
    const float weight1 = __fadd_rn(running1, -running0), weight2 = __fadd_rn(running2, -running1);
    const float weight3 = __fadd_rn(1.0f, -running2);
    float kept_weight0 = weight0, kept_weight1 = weight0;
    // Bits 0..15: the byte selector of both elements; bits 16..19: the nibble.
    uint32_t code = 0x1010;
    constexpr uint32_t kNext0 = 0x10022, kNext1 = 0x42200;
    if (point0 >= running0) kept_weight0 = weight1, code += kNext0;
    if (point0 >= running1) kept_weight0 = weight2, code += kNext0;
    if (point0 >= running2) kept_weight0 = weight3, code += kNext0;
    if (point1 >= running0) kept_weight1 = weight1, code += kNext1;
    if (point1 >= running1) kept_weight1 = weight2, code += kNext1;
    if (point1 >= running2) kept_weight1 = weight3, code += kNext1;
    regular &= kept_weight0 <= 1.0f;  // beyond 1, rounding has put both points on one element

    const uint32_t kept = permute(x01, x23, code);
    const float kept0 = Traits::to_float(kept & 0xffffu), kept1 = Traits::to_float(kept >> 16);
    if constexpr (!kIsHalf) {
      regular &= fabsf(kept0) >= kSmallestSample;
      regular &= fabsf(kept1) >= kSmallestSample;
    }
    return {pack_floats<Element>(quotient(kept0, kept_weight0), quotient(kept1, kept_weight1)), code >> 16};
  }

  static __device__ __forceinline__ PackedQuad compress_any(uint32_t x01, uint32_t x23, const uint4& words, int) {
    uint32_t x[4] = {x01 & 0xffffu, x01 >> 16, x23 & 0xffffu, x23 >> 16};
    Mvue<Element, 2, 4>::template estimate<0>(x, static_cast<int>(words.x >> 8));
    return pack_single(x);
  }
};

template <typename Element>
struct RandomQuad {
  static __device__ __forceinline__ PackedQuad compress(uint32_t x01, uint32_t x23, const uint4& words, bool& regular) {
    const bool beats01 = words.x >= words.y, beats02 = words.x >= words.z, beats03 = words.x >= words.w;
    const bool beats12 = words.y >= words.z, beats13 = words.y >= words.w, beats23 = words.z >= words.w;
    const bool keep0 = (beats01 && beats02) || (beats01 && beats03) || (beats02 && beats03);
    const bool keep1 = (!beats01 && beats12) || (!beats01 && beats13) || (beats12 && beats13);
    const bool keep2 = (!beats02 && !beats12) || (!beats02 && beats23) || (!beats12 && beats23);
    // Bits 0..15: the byte selector of both elements; bits 16..19: the nibble.
    const uint32_t code0 = keep1 ? 0x43210u : keep2 ? 0x85410u : 0xc7610u;
    const uint32_t code12 = keep2 ? 0x95432u : 0xd7632u;
    const uint32_t code = keep0 ? code0 : keep1 ? code12 : 0xe7654u;
    const uint32_t kept = permute(x01, x23, code);
    // A NaN or inf changes what is kept; a kept zero has to be stored at the lowest free index.
    constexpr uint32_t kToTopBit = (0x8000 - ElementTraits<Element>::kInfinity) * 0x10001;
    const uint32_t not_finite = ((x01 & 0x7fff7fffu) + kToTopBit) | ((x23 & 0x7fff7fffu) + kToTopBit);
    regular &= (not_finite & 0x80008000u) == 0;
    if ((((kept & 0x7fff7fffu) + 0x7fff7fffu) & 0x80008000u) != 0x80008000u) {
      const bool keep3 = !(keep0 && keep1) && !(keep0 && keep2) && !(keep1 && keep2);
      return pack_single({keep0 ? x01 : 0, keep1 ? x01 >> 16 : 0, keep2 ? x23 : 0, keep3 ? x23 >> 16 : 0});
    }
    return {kept, code >> 16};
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
