// The last stage of the factors of rescale_magnitude, for every instance of scope_scales.cuh: adds up the sums of
// blocks where a scope has several.
#include <cuda_runtime.h>

#include "sdgp/scope_cover.h"
#include "sdgp/scope_factors.cuh"

namespace sdgp {
namespace {

constexpr int kThreads = 256;

// Sums of parts [parts, kSums, scopes] to factors; a thread per scope.
__global__ void __launch_bounds__(kThreads)
    scope_scales_kernel(const __grid_constant__ SdgpScopeScales problem, int64_t parts, int64_t scopes) {
  const int64_t scope = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (scope >= scopes) return;
  double sums[kSums] = {};
#pragma unroll 4
  for (int64_t part = 0; part < parts; ++part) {
#pragma unroll
    for (int which = 0; which < kSums; ++which) sums[which] += problem.sums[(part * kSums + which) * scopes + scope];
  }
  store_factors(problem, scope, sums);
}

// The same for a single scope: a block.
__global__ void __launch_bounds__(kThreads)
    single_scope_scale_kernel(const __grid_constant__ SdgpScopeScales problem, int64_t parts) {
  __shared__ double block_sums[kSums][kThreads];
#pragma unroll
  for (int which = 0; which < kSums; ++which) {
    double sum = 0.0;
    for (int64_t part = threadIdx.x; part < parts; part += kThreads) sum += problem.sums[part * kSums + which];
    block_sums[which][threadIdx.x] = sum;
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
#pragma unroll
      for (int which = 0; which < kSums; ++which) {
        block_sums[which][threadIdx.x] += block_sums[which][threadIdx.x + half];
      }
    }
  }
  if (threadIdx.x != 0) return;
  const double sums[kSums] = {block_sums[kSumAll][0], block_sums[kSumDgrad][0], block_sums[kSumWgrad][0]};
  store_factors(problem, 0, sums);
}

}  // namespace
}  // namespace sdgp

extern "C" int64_t sdgp_scope_workspace(int64_t t, int64_t c, int64_t positions_per_sample) {
  const sdgp::ScopeCover cover = sdgp::cover_scopes(t, c, positions_per_sample);
  if (positions_per_sample == 0) return cover.blocks() * sdgp::kSums;
  return cover.parts == 1 ? 0 : cover.parts * sdgp::kSums * cover.samples * c;
}

extern "C" int sdgp_finish_scope_scales(const SdgpScopeScales* problem) {
  const sdgp::ScopeCover cover = sdgp::cover_scopes(problem->t, problem->c, problem->positions_per_sample);
  const auto stream = static_cast<cudaStream_t>(problem->stream);
  if (problem->positions_per_sample == 0) {
    sdgp::single_scope_scale_kernel<<<1, sdgp::kThreads, 0, stream>>>(*problem, cover.blocks());
  } else if (cover.parts > 1) {
    const int64_t scopes = cover.samples * problem->c, blocks = (scopes + sdgp::kThreads - 1) / sdgp::kThreads;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    sdgp::scope_scales_kernel<<<static_cast<unsigned>(blocks), sdgp::kThreads, 0, stream>>>(*problem, cover.parts,
                                                                                            scopes);
  }
  return cudaGetLastError();
}
