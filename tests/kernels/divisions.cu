// Compares the divisions of division.cuh with IEEE's on a GPU, for every pair of mantissas that can reach them.
#include <cuda_runtime.h>

#include "sdgp/division.cuh"

// Whether a and b, positive, are the same after rounding to any number of fraction bits up to fp16's 10: denormal
// results have fewer.
__device__ bool round_alike(float a, float b) {
  if (a == b) return true;
  for (int bits = 0; bits <= 10; ++bits) {
    const int drop = 23 - bits;
    auto rounded = [&](float x) {
      const unsigned u = __float_as_uint(x);
      return (u + (1u << (drop - 1)) - 1 + (u >> drop & 1)) >> drop;
    };
    if (rounded(a) != rounded(b)) return false;
  }
  return true;
}

// counts[0]: reciprocals of [1, 2) that differ; counts[1]: quotients of an 11-bit numerator (fp16; bf16 has 8 bits) by
// k / 2^24, k = 1 .. 2^24, that differ once they are rounded to 16 bits.
__global__ void count_differences(unsigned long long* counts) {
  const unsigned k = blockIdx.x * blockDim.x + threadIdx.x;  // 0 .. 2^24 - 1
  unsigned long long different = 0;
  const float weight = static_cast<float>(k + 1) * 0x1p-24f;
  for (unsigned mantissa = 0; mantissa < 1024; ++mantissa) {
    const float x = 1.0f + static_cast<float>(mantissa) * 0x1p-10f;
    different += !round_alike(sdgp::quotient(x, weight), __fdiv_rn(x, weight));
  }
  if (different != 0) atomicAdd(&counts[1], different);
  const float x = 1.0f + static_cast<float>(k >> 1) * 0x1p-23f;
  if (sdgp::reciprocal(x) != __frcp_rn(x)) atomicAdd(&counts[0], 1ull);
}

extern "C" int sdgp_count_division_differences(unsigned long long* counts) {
  count_differences<<<(1 << 24) / 256, 256>>>(counts);
  const cudaError_t launched = cudaGetLastError();
  return launched != cudaSuccess ? launched : cudaDeviceSynchronize();
}
