// What the sparse products of both kernel families share: legal metadata, 16-bit packing, the forms of an output, and
// the sum of split-K partial results.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
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

// Each object launches the kernel of its own: of a name with external linkage the linker would take one for all
// objects, which may be that of an instance compiled for Hopper alone, and then no other GPU could add up its partial
// results.
namespace {

// out[i] (+)= sum over splits of partials[split][i], added in the order of the splits: the same bits on every run.
// kVector: 4, or 1 where that does not divide `count` or `out` is not aligned for it.
template <typename Out, int kVector>
__global__ void __launch_bounds__(256)
    reduce_partials_kernel(const float* __restrict__ partials, Out* __restrict__ out, const int64_t count,
                           const int splits, const bool accumulate) {
  struct alignas(4 * kVector) Floats {
    float at[kVector];
  };
  struct alignas(sizeof(Out) * kVector) Outs {
    Out at[kVector];
  };
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * kVector;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVector; i < count; i += stride) {
    Floats sum = *reinterpret_cast<const Floats*>(partials + i);
    for (int split = 1; split < splits; ++split) {
      const Floats part = *reinterpret_cast<const Floats*>(partials + split * count + i);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum.at[j] += part.at[j];
    }
    Outs* target = reinterpret_cast<Outs*>(out + i);
    Outs result{};
    if (accumulate) result = *target;
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      result.at[j] = static_cast<Out>(accumulate ? sum.at[j] + static_cast<float>(result.at[j]) : sum.at[j]);
    *target = result;
  }
}

template <typename Out>
int reduce_partials(const void* workspace, void* out, int64_t count, int splits, bool accumulate, int sm_count,
                    cudaStream_t stream) {
  const auto* partials = static_cast<const float*>(workspace);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((count + 1023) / 1024, 4 * sm_count));
  if (count % 4 == 0 && reinterpret_cast<uintptr_t>(out) % (4 * sizeof(Out)) == 0) {
    reduce_partials_kernel<Out, 4>
        <<<blocks, 256, 0, stream>>>(partials, static_cast<Out*>(out), count, splits, accumulate);
  } else {
    reduce_partials_kernel<Out, 1>
        <<<blocks, 256, 0, stream>>>(partials, static_cast<Out*>(out), count, splits, accumulate);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace sdgp

// What a launch takes that the compiler does not report, for bench/static_evidence.py to find in the PTX: bytes of
// dynamic shared memory and stages of the pipeline.
#define SDGP_LAUNCH_FACTS(NAME, CONFIG) \
  __constant__ int NAME##_facts[2] = {CONFIG::kSharedBytes, CONFIG::kStages};
