// What the sparse products of both kernel families share: legal metadata, 16-bit packing, the forms of an output.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace sdgp {

constexpr uint32_t kLegalMetadata = 0x4444;  // indices 0 and 1 in each of four groups

enum class Output : int { kElement, kFloat, kPartial };

// Values from one row to the next of a wgrad operand of `m` channels: whole chunks of 16 bytes, the last one filled up
// with zeros and legal metadata.
__host__ __device__ inline int64_t operand_pitch(int64_t m) { return (m + 7) / 8 * 8; }

// Metadata words from one row to the next of a dgrad operand whose rows of values are `padded_k` / 2 long: in whole
// chunks of 16 bytes as well, the last one filled up with legal metadata.
__host__ __device__ inline int64_t metadata_pitch(int64_t padded_k) { return (padded_k / 16 + 7) / 8 * 8; }

// Metadata words outside the operand arrive in shared memory as 0, which is not legal; legal words are never 0.
__device__ __forceinline__ uint32_t make_legal(uint32_t words) {
  if ((words & 0xffffu) == 0) words |= kLegalMetadata;
  if ((words >> 16) == 0) words |= kLegalMetadata << 16;
  return words;
}

template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    packed = reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    packed = reinterpret_cast<const uint32_t&>(pair);
  }
  return packed;
}

template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(packed));
  } else {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(packed));
  }
}

// Transposes 4 x 4 words held by the four lanes of a quad: afterwards lane q holds word q of lanes 0, 1, 2, 3.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool high = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, high ? words[i] : words[i + step], step);
      (high ? words[i] : words[i + step]) = received;
    }
  }
}

}  // namespace sdgp

// What a launch takes that the compiler does not report, for bench/static_evidence.py to find in the PTX: bytes of
// dynamic shared memory and stages of the pipeline.
#define SDGP_LAUNCH_FACTS(NAME, CONFIG) __constant__ int NAME##_facts[2] = {CONFIG::kSharedBytes, CONFIG::kStages};
