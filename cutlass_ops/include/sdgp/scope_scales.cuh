// The first pass of rescale_magnitude over a scope wider than a group: sums of |dY| and of what magnitude pruning keeps
// of it, per (sample, channel) or over the whole tensor, and the factors they give.
//
// Sums are float64 and meet in atomic additions. Additions of 16-bit values to float64 are exact while a scope's
// dynamic range fits 53 bits, and then their order does not matter.
#pragma once

#include <cuda_runtime.h>

#include "sdgp/prune_compress.cuh"

namespace sdgp {

constexpr int kScopeSteps = 4;  // tiles of kTilePositions that a thread walks through

// Sums of one channel.
struct ScopeSums {
  double all, dgrad, wgrad;
};

template <typename Element>
__device__ __forceinline__ double magnitude_of(uint32_t bits) {
  return static_cast<double>(fabsf(ElementTraits<Element>::to_float(bits & 0xffffu)));
}

__device__ __forceinline__ void add_sums(double* sums, int64_t scopes, int64_t scope, const ScopeSums& value) {
  atomicAdd(sums + scope, value.all);
  atomicAdd(sums + scopes + scope, value.dgrad);
  atomicAdd(sums + 2 * scopes + scope, value.wgrad);
}

// kept[r][p]: what magnitude pruning along channels leaves of x.
template <typename Element, int N, int M, int kRows, int kChannels>
__device__ __forceinline__ void keep_along_channels(const uint32_t (&x)[kRows][kChannels / 2],
                                                    uint32_t (&kept)[kRows][kChannels / 2]) {
#pragma unroll
  for (int r = 0; r < kRows; r += 2) {
#pragma unroll
    for (int g = 0; g < kChannels / M; ++g) {
      uint32_t group[M];
#pragma unroll
      for (int i = 0; i < M; i += 2) {
        group[i] = zip_low(x[r][(g * M + i) / 2], x[r + 1][(g * M + i) / 2]);
        group[i + 1] = zip_high(x[r][(g * M + i) / 2], x[r + 1][(g * M + i) / 2]);
      }
      Magnitude<Element, N, M>::prune(group, {}, {});
#pragma unroll
      for (int i = 0; i < M; i += 2) {
        kept[r][(g * M + i) / 2] = zip_low(group[i], group[i + 1]);
        kept[r + 1][(g * M + i) / 2] = zip_high(group[i], group[i + 1]);
      }
    }
  }
}

template <typename Element, int N, int M>
__device__ __forceinline__ void keep_along_positions(const uint32_t (&x)[M][kTileChannels / 2],
                                                     uint32_t (&kept)[M][kTileChannels / 2]) {
#pragma unroll
  for (int p = 0; p < kTileChannels / 2; ++p) {
    uint32_t group[M];
#pragma unroll
    for (int i = 0; i < M; ++i) group[i] = x[i][p];
    Magnitude<Element, N, M>::prune(group, {}, {});
#pragma unroll
    for (int i = 0; i < M; ++i) kept[i][p] = group[i];
  }
}

template <typename Element, int N, int M>
__global__ void __launch_bounds__(kBlockThreads)
    scope_sums_kernel(const __grid_constant__ SdgpScopeScales problem, const __grid_constant__ Cover cover) {
  constexpr int kRows = M;
  __shared__ ScopeSums block_sums[kBlockThreads];

  Place place(cover);
  place.position *= kScopeSteps;
  const int64_t c = problem.c, t = problem.t, channel = place.channel;
  const bool single = problem.positions_per_sample == 0;
  const int64_t scopes = single ? 1 : t / problem.positions_per_sample * c;
  const bool vector = can_load_vectors(problem.dy, c, problem.row_stride);
  const auto* dy = static_cast<const uint16_t*>(problem.dy);
  SampleWalk walk(place.position, t, c, problem.positions_per_sample);

  ScopeSums sums[kTileChannels] = {};
  int64_t sample = walk.offset;
  auto flush = [&] {
#pragma unroll
    for (int e = 0; e < kTileChannels; ++e) {
      if (channel + e < c) add_sums(problem.sums, scopes, sample + channel + e, sums[e]);
      sums[e] = {};
    }
  };

  uint4 next[kRows];
  load_rows(dy, t, c, problem.row_stride, vector, place.position, channel, next);
#pragma unroll 1
  for (int step = 0; step < kTilePositions * kScopeSteps; step += kRows) {
    const int64_t row = place.position + step;
    uint32_t x[kRows][kTileChannels / 2], dgrad[kRows][kTileChannels / 2], wgrad[kRows][kTileChannels / 2];
    unpack_rows(next, x);
    load_rows(dy, step + kRows < kTilePositions * kScopeSteps ? t : 0, c, problem.row_stride, vector, row + kRows,
              channel, next);
    keep_along_positions<Element, N, M>(x, wgrad);
    if constexpr (M == 16) {
      // As in prune_compress_kernel, and back again.
      const bool odd = place.lane % 2 != 0;
      uint32_t wide[8][8], kept[8][8];
      widen(x, odd, wide);
      keep_along_channels<Element, N, M, 8, 16>(wide, kept);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const uint32_t mine = odd ? kept[r][p + 4] : kept[r][p];
          const uint32_t received = __shfl_xor_sync(0xffffffffu, odd ? kept[r][p] : kept[r][p + 4], 1);
          dgrad[r][p] = odd ? received : mine;
          dgrad[r + 8][p] = odd ? mine : received;
        }
      }
    } else {
      keep_along_channels<Element, N, M, kRows, kTileChannels>(x, dgrad);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!single && walk.offset != sample) {
        flush();
        sample = walk.offset;
      }
#pragma unroll
      for (int e = 0; e < kTileChannels; ++e) {
        const int shift = 16 * (e % 2);
        sums[e].all += magnitude_of<Element>(x[r][e / 2] >> shift);
        sums[e].dgrad += magnitude_of<Element>(dgrad[r][e / 2] >> shift);
        sums[e].wgrad += magnitude_of<Element>(wgrad[r][e / 2] >> shift);
      }
      walk.next();
    }
  }

  if (single) {
    ScopeSums total{};
#pragma unroll
    for (int e = 0; e < kTileChannels; ++e) {
      total.all += sums[e].all, total.dgrad += sums[e].dgrad, total.wgrad += sums[e].wgrad;
    }
    block_sums[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < kBlockThreads; ++i) {
      total.all += block_sums[i].all, total.dgrad += block_sums[i].dgrad, total.wgrad += block_sums[i].wgrad;
    }
    add_sums(problem.sums, 1, 0, total);
  } else if (place.position < t) {
    flush();
  }
}

template <typename Element>
__global__ void __launch_bounds__(256)
    scope_scales_kernel(const __grid_constant__ SdgpScopeScales problem, int64_t scopes) {
  const int64_t scope = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (scope >= scopes) return;
  const auto total = static_cast<float>(problem.sums[scope]);
  auto factor = [&](int64_t which) {
    return rescale_factor(total, static_cast<float>(problem.sums[which * scopes + scope]), problem.eps);
  };
  if (problem.dgrad_scale != nullptr) problem.dgrad_scale[scope] = factor(1);
  if (problem.wgrad_scale != nullptr) problem.wgrad_scale[scope] = factor(2);
}

template <typename Element, int N, int M>
int launch_scope_scales(const SdgpScopeScales& problem) {
  Cover cover = cover_matrix(problem.t, problem.c, 0);
  cover.position_blocks = (cover.position_blocks + kScopeSteps - 1) / kScopeSteps;
  const int64_t blocks = cover.channel_blocks * cover.position_blocks;
  const int64_t scopes = problem.positions_per_sample == 0 ? 1 : problem.t / problem.positions_per_sample * problem.c;
  const int64_t scale_blocks = (scopes + 255) / 256;
  if (blocks > INT32_MAX || scale_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  scope_sums_kernel<Element, N, M><<<static_cast<unsigned>(blocks), kBlockThreads, 0, stream>>>(problem, cover);
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return launched;
  scope_scales_kernel<Element><<<static_cast<unsigned>(scale_blocks), 256, 0, stream>>>(problem, scopes);
  return cudaGetLastError();
}

}  // namespace sdgp

#define SDGP_SCOPE_SCALES(NAME, ELEMENT, N, M) \
  extern "C" int NAME(const SdgpScopeScales* problem) { return sdgp::launch_scope_scales<ELEMENT, N, M>(*problem); }
