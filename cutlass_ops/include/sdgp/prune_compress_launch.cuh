// Host side of prune_compress.cuh and sample_compress.cuh.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "sdgp/prune_compress.cuh"
#include "sdgp/sample_compress.cuh"

namespace sdgp {

// Launches one of the kernels that give each thread a tile of dY, then sums up the bias gradient if asked for.
template <typename Element>
int launch_over_tiles(void (*kernel)(SdgpPruneCompress, Cover), const SdgpPruneCompress& problem) {
  const Cover cover = cover_matrix(problem.t, problem.c, problem.wgrad_values == nullptr ? 0 : problem.wgrad_k);
  const int64_t blocks = cover.channel_blocks * cover.position_blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), kBlockThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem,
                                                                                                         cover);
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess || problem.bias == nullptr) return launched;
  return sdgp_sum_bias_partials(&problem, std::is_same_v<Element, __nv_bfloat16>);
}

template <typename Element, template <typename, int, int> typename Rule, int N, int M, bool kIsScaled>
int launch_prune_compress(const SdgpPruneCompress& problem) {
  return launch_over_tiles<Element>(prune_compress_kernel<Element, Rule<Element, N, M>, M, kIsScaled>, problem);
}

}  // namespace sdgp

// Defines the entry point of one instance.
#define SDGP_PRUNE_COMPRESS(NAME, ELEMENT, RULE, N, M)                              \
  extern "C" int NAME(const SdgpPruneCompress* problem) {                           \
    return sdgp::launch_prune_compress<ELEMENT, sdgp::RULE, N, M, false>(*problem); \
  }

// The same for a rule of quad_rules.cuh.
#define SDGP_SAMPLE_COMPRESS(NAME, ELEMENT, RULE)                                                         \
  extern "C" int NAME(const SdgpPruneCompress* problem) {                                                 \
    return sdgp::launch_over_tiles<ELEMENT>(sdgp::sample_compress_kernel<sdgp::RULE<ELEMENT>>, *problem); \
  }

// Magnitude pruning, then one factor per sample and channel: the second pass of rescale_magnitude over a wide scope.
#define SDGP_SCALED_MAGNITUDE(NAME, ELEMENT, N, M)                                      \
  extern "C" int NAME(const SdgpPruneCompress* problem) {                               \
    return sdgp::launch_prune_compress<ELEMENT, sdgp::Magnitude, N, M, true>(*problem); \
  }
