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

// Top bit of each half: a >= b, for halves below 0x8000.
__device__ __forceinline__ uint32_t at_least(uint32_t a, uint32_t b) { return (a | 0x80008000u) - b; }

__device__ __forceinline__ uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (a & c) | (b & c); }

__device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }

__device__ __forceinline__ uint32_t nonzero_mask(uint32_t pair) {
  return spread_top_bits((pair & 0x7fff7fffu) + 0x7fff7fffu);
}

// Keys that order magnitudes: NaN (all alike) > inf > finite > 0.
template <typename Element>
__device__ __forceinline__ uint32_t magnitude_keys(uint32_t pair) {
  return __vminu2(pair & 0x7fff7fffu, both_halves(ElementTraits<Element>::kInfinity + 1));
}

}  // namespace sdgp
