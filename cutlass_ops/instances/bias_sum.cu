// The second stage of the bias gradient, for every instance of the prune+compress kernel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "sdgp/prune_compress_api.h"
#include "sdgp/prune_compress_cover.h"

namespace sdgp {
namespace {

constexpr int kRows = 32;

__device__ void store(float* target, float sum) { *target = sum; }
__device__ void store(__half* target, float sum) { *target = __float2half_rn(sum); }
__device__ void store(__nv_bfloat16* target, float sum) { *target = __float2bfloat16_rn(sum); }

// bias[channel] = the sum of a column of partials [rows, c], in a fixed order, rounded once. A block takes 32 channels.
template <typename Bias>
__global__ void __launch_bounds__(32 * kRows)
    sum_bias_partials(const float* partials, int64_t rows, int64_t c, Bias* bias) {
  __shared__ float sums[kRows][32];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0.0f;
  if (channel < c) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kRows) sum += partials[row * c + channel];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= c) return;
  float total = 0.0f;
  for (int r = 0; r < kRows; ++r) total += sums[r][threadIdx.x];
  store(bias + channel, total);
}

template <typename Bias>
int launch(const SdgpPruneCompress& problem) {
  const int64_t blocks = (problem.c + 31) / 32;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 threads(32, kRows);
  sum_bias_partials<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(problem.stream)>>>(
      problem.bias_partials, sdgp_bias_partial_rows(problem.t, problem.c), problem.c, static_cast<Bias*>(problem.bias));
  return cudaGetLastError();
}

}  // namespace
}  // namespace sdgp

extern "C" int64_t sdgp_bias_partial_rows(int64_t t, int64_t c) { return sdgp::cover_matrix(t, c, 0).position_blocks; }

extern "C" int sdgp_sum_bias_partials(const SdgpPruneCompress* problem, int is_bfloat16) {
  if (problem->bias_is_float != 0) return sdgp::launch<float>(*problem);
  return is_bfloat16 != 0 ? sdgp::launch<__nv_bfloat16>(*problem) : sdgp::launch<__half>(*problem);
}
