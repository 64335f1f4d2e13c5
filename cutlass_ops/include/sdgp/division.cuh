// Divisions that round like IEEE's without its branches, for operands whose range is known: an approximate reciprocal
// and residual corrections with fused multiply-adds (Markstein, IBM J. Res. Dev. 34, 1990). tests/kernels compares them
// with the hardware's IEEE division on a GPU: `reciprocal` and `quotient` for every pair of mantissas that can occur.
#pragma once

#include <cuda_runtime.h>

namespace sdgp {

__device__ __forceinline__ float approximate_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x, for x and 1 / x in the normal range.
__device__ __forceinline__ float reciprocal(float x) {
  const float guess = approximate_reciprocal(x);
  return __fmaf_rn(guess, __fmaf_rn(-x, guess, 1.0f), guess);
}

// x / weight, for a 16-bit x of at least 2^-100 in magnitude and a weight of k / 2^24 in (0, 1]: once rounded to 16
// bits it is the correctly rounded quotient. (Before that one in 17 million is off in float32's last bit, none of them
// next to a boundary of the 16-bit types: all pairs of mantissas were tried, with reciprocals that are off by up to one
// unit.)
__device__ __forceinline__ float quotient(float x, float weight) {
  const float inverse = approximate_reciprocal(weight);
  const float guess = __fmul_rn(x, inverse);
  return __fmaf_rn(__fmaf_rn(-weight, guess, x), inverse, guess);
}

// x / y, for any x and y in [2^-60, 2^60].
__device__ __forceinline__ float divide(float x, float y) {
  const float inverse = reciprocal(y);
  float guess = __fmul_rn(x, inverse);
  guess = __fmaf_rn(__fmaf_rn(-y, guess, x), inverse, guess);
  return __fmaf_rn(__fmaf_rn(-y, guess, x), inverse, guess);
}

}  // namespace sdgp
