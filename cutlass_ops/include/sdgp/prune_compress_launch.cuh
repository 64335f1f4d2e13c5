// Host side of prune_compress.cuh.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "sdgp/prune_compress.cuh"

namespace sdgp {

template <typename Element, template <typename, int, int> typename Rule, int N, int M, bool kWide>
int launch_prune_compress(const SdgpPruneCompress& problem) {
  const int64_t positions = std::max(problem.t, problem.wgrad_values == nullptr ? 0 : problem.wgrad_k);
  const int64_t channels = std::max(problem.c, problem.dgrad_values == nullptr ? 0 : problem.dgrad_k);
  const Cover cover = cover_matrix(positions, channels, kTileChannels<M>);
  const int64_t blocks = cover.channel_blocks * cover.position_blocks;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  prune_compress_kernel<Element, Rule<Element, N, M>, M, kWide>
      <<<static_cast<unsigned>(blocks), kBlockThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem, cover);
  return cudaGetLastError();
}

}  // namespace sdgp

// Defines the entry point of one instance.
#define SDGP_PRUNE_COMPRESS(NAME, ELEMENT, RULE, N, M, WIDE)                                      \
  extern "C" int NAME(const SdgpPruneCompress* problem) {                                         \
    return sdgp::launch_prune_compress<ELEMENT, sdgp::RULE, N, M, WIDE>(*problem);                \
  }
