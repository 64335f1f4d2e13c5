// Host side of prune_compress.cuh.
#pragma once

#include <cuda_runtime.h>

#include "sdgp/prune_compress.cuh"

namespace sdgp {

template <typename Element, template <typename, int, int> typename Rule, int N, int M, bool kWide>
int launch_prune_compress(const SdgpPruneCompress& problem) {
  const Cover cover = cover_matrix(problem.t, problem.c, problem.dgrad_values == nullptr ? 0 : problem.dgrad_k,
                                   problem.wgrad_values == nullptr ? 0 : problem.wgrad_k);
  const int64_t blocks = cover.channel_blocks * cover.position_blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  prune_compress_kernel<Element, Rule<Element, N, M>, M, kWide>
      <<<static_cast<unsigned>(blocks), kBlockThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem, cover);
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess || problem.bias == nullptr) return launched;
  return sdgp_sum_bias_partials(problem.bias_partials, problem.t, problem.c, problem.bias, problem.stream);
}

}  // namespace sdgp

// Defines the entry point of one instance.
#define SDGP_PRUNE_COMPRESS(NAME, ELEMENT, RULE, N, M)                              \
  extern "C" int NAME(const SdgpPruneCompress* problem) {                           \
    return sdgp::launch_prune_compress<ELEMENT, sdgp::RULE, N, M, false>(*problem); \
  }

// Magnitude pruning, then one factor per sample and channel: the second pass of rescale_magnitude over a wide scope.
#define SDGP_SCALED_MAGNITUDE(NAME, ELEMENT, N, M)                                      \
  extern "C" int NAME(const SdgpPruneCompress* problem) {                               \
    return sdgp::launch_prune_compress<ELEMENT, sdgp::Magnitude, N, M, true>(*problem); \
  }
