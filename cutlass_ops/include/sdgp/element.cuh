// The two 16-bit element types, and arithmetic on two of them packed in a 32-bit register.
//
// A "pair" below is a 32-bit register that holds element i of two groups: group 0 in the low half, group 1 in the high
// half. Masks are pairs whose halves are 0x0000 or 0xffff.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sdgp {

template <typename Element>
struct ElementTraits;

template <>
struct ElementTraits<__half> {
  static constexpr uint32_t kInfinity = 0x7c00;
  static constexpr float kLargest = 65504.0f;
  static __device__ float to_float(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
  static __device__ uint32_t from_float(float x) { return __half_as_ushort(__float2half_rn(x)); }
  static __device__ __half2 from_floats(float low, float high) { return __floats2half2_rn(low, high); }
};

template <>
struct ElementTraits<__nv_bfloat16> {
  static constexpr uint32_t kInfinity = 0x7f80;
  static constexpr float kLargest = 3.3895313892515355e38f;
  static __device__ float to_float(uint32_t bits) { return __uint_as_float(bits << 16); }
  static __device__ uint32_t from_float(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  static __device__ __nv_bfloat162 from_floats(float low, float high) { return __floats2bfloat162_rn(low, high); }
};

__device__ __forceinline__ uint32_t both_halves(uint32_t half) { return half | half << 16; }

template <int kHalf>
__device__ __forceinline__ uint32_t half_of(uint32_t pair) {
  return kHalf == 0 ? pair & 0xffffu : pair >> 16;
}

// Two values, rounded.
template <typename Element>
__device__ __forceinline__ uint32_t pack_floats(float low, float high) {
  const auto pair = ElementTraits<Element>::from_floats(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// (low half of a, low half of b) and (high half of a, high half of b).
__device__ __forceinline__ uint32_t zip_low(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t zip_high(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// PTX's prmt itself: a selector nibble with bit 3 set replicates the sign of the byte it names (__byte_perm masks bit
// 3).
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// Spreads the top bit of each half over the half.
__device__ __forceinline__ uint32_t spread_top_bits(uint32_t pair) { return permute(pair, pair, 0xbb99); }

__device__ __forceinline__ uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (a & c) | (b & c); }

__device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }

// a >= b, for halves below 0x8000.
__device__ __forceinline__ uint32_t integer_at_least(uint32_t a, uint32_t b) {
  return spread_top_bits((a | 0x80008000u) - b);
}

// What follows takes the halves as float16 whatever they are: |x| of either type are ordered as integers, and so are
// float16 magnitudes up to infinity, 0x7c00. Instructions on two float16 take |x| for nothing and give whole masks.

__device__ __forceinline__ __half2 as_halves(uint32_t pair) { return *reinterpret_cast<const __half2*>(&pair); }
__device__ __forceinline__ uint32_t as_pair(__half2 halves) { return *reinterpret_cast<const uint32_t*>(&halves); }

// Whether both |x| of each pair are at most 0x7c00: neither NaN nor, in bfloat16, 2^121 or more. A sum of products with
// 0, which are NaN otherwise (or for 0x7c00 itself, which does not matter): it does not use the pipe of the others.
template <int kPairs>
__device__ __forceinline__ bool are_ordered(const uint32_t (&x)[kPairs]) {
  const __half2 zeros = as_halves(0);
  __half2 sum = zeros;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) sum = __hfma2(as_halves(x[i]), zeros, sum);
  return (as_pair(sum) & 0x7fff7fffu) == 0;
}

// |a| >= |b|, for ordered pairs.
__device__ __forceinline__ uint32_t magnitude_at_least(uint32_t a, uint32_t b) {
  uint32_t mask;
  asm("set.ge.u32.f16x2 %0, %1, %2;"
      : "=r"(mask)
      : "r"(as_pair(__habs2(as_halves(a)))), "r"(as_pair(__habs2(as_halves(b)))));
  return mask;
}

// For any pair: a NaN is unequal to 0.
__device__ __forceinline__ uint32_t nonzero_mask(uint32_t pair) {
  uint32_t mask;
  asm("set.neu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(pair), "r"(0));
  return mask;
}

// The larger and the smaller of two magnitudes, sign bits clear. Of what is not ordered the larger is not, either.
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  return as_pair(__hmax2_nan(as_halves(a), as_halves(b)));
}
__device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) {
  return as_pair(__hmin2(as_halves(a), as_halves(b)));
}

// Has the top bit of a half set where it is not below 0x7c00, for magnitudes.
__device__ __forceinline__ uint32_t not_ordered(uint32_t pair) { return pair + 0x04000400u; }

// Keys that order magnitudes: NaN (all alike) > inf > finite > 0.
template <typename Element>
__device__ __forceinline__ uint32_t magnitude_keys(uint32_t pair) {
  return __vminu2(pair & 0x7fff7fffu, both_halves(ElementTraits<Element>::kInfinity + 1));
}

}  // namespace sdgp
