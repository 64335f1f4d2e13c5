// Compares the divisions of division.cuh with IEEE's on a GPU: for every pair of mantissas that can reach them, and
// where those are too many, for 2^34 random pairs.
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

// A float32 in [2^-60, 2^60), by the mixing of SplitMix (Steele et al., OOPSLA 2014).
__device__ float random_float(unsigned long long state) {
  state = (state ^ state >> 30) * 0xbf58476d1ce4e5b9ull;
  state = (state ^ state >> 27) * 0x94d049bb133111ebull;
  const auto bits = static_cast<unsigned>((state ^ state >> 31) >> 32);
  return __uint_as_float((bits & 0x7fffffu) | (127 - 60 + (bits >> 23) % 120) << 23);
}

// counts[0]: reciprocals of [1, 2) that differ; counts[1]: quotients of an 11-bit numerator (fp16; bf16 has 8 bits) by
// k / 2^24, k = 1 .. 2^24, that differ once they are rounded to 16 bits; counts[2]: quotients of random pairs that
// differ.
__global__ void count_differences(unsigned long long* counts) {
  const unsigned k = blockIdx.x * blockDim.x + threadIdx.x;  // 0 .. 2^24 - 1
  unsigned long long different = 0, divided_differently = 0;
  const float weight = static_cast<float>(k + 1) * 0x1p-24f;
  for (unsigned mantissa = 0; mantissa < 1024; ++mantissa) {
    const float x = 1.0f + static_cast<float>(mantissa) * 0x1p-10f;
    different += !round_alike(sdgp::quotient(x, weight), __fdiv_rn(x, weight));
    const unsigned long long pair = 2 * (mantissa * (1ull << 24) + k);
    const float numerator = random_float(pair), denominator = random_float(pair + 1);
    divided_differently += sdgp::divide(numerator, denominator) != __fdiv_rn(numerator, denominator);
  }
  if (divided_differently != 0) atomicAdd(&counts[2], divided_differently);
  if (different != 0) atomicAdd(&counts[1], different);
  const float x = 1.0f + static_cast<float>(k >> 1) * 0x1p-23f;
  if (sdgp::reciprocal(x) != __frcp_rn(x)) atomicAdd(&counts[0], 1ull);
}

extern "C" int sdgp_count_division_differences(unsigned long long* counts) {
  count_differences<<<(1 << 24) / 256, 256>>>(counts);
  const cudaError_t launched = cudaGetLastError();
  return launched != cudaSuccess ? launched : cudaDeviceSynchronize();
}
