// The first pass of rescale_magnitude over a scope wider than a group: sums of |dY| and of what magnitude pruning keeps
// of it, per (sample, channel) or over the whole tensor, and the factors they give.
//
// A block takes a part of one sample (of at most kPartRows rows) for its channels, so that a thread keeps its sums in
// registers from beginning to end. Groups that straddle a border are read on both sides, each side counts its own rows.
// Sums are float64, in a fixed order: threads, then the rows of threads of a block, then the parts. Additions of 16-bit
// values to float64 are exact while a scope's dynamic range fits 53 bits, and then their order does not matter.
#pragma once

#include <cuda_runtime.h>

#include "sdgp/prune_compress.cuh"
#include "sdgp/scope_cover.h"
#include "sdgp/scope_factors.cuh"

namespace sdgp {

// Conversion to float64 on the integer pipe (cvt.f64 runs at a quarter of the rate of float64 additions): the bits of
// |x| in the top of a double are |x| times a power of two, denormal or not. inf and NaN come out as finite values.
template <typename Element>
struct Magnified {
  static constexpr bool kIsHalf = ElementTraits<Element>::kInfinity == 0x7c00;
  static constexpr int kShift = kIsHalf ? 10 : 13;
  static constexpr double kUnit = kIsHalf ? 0x1p1008 : 0x1p896;  // 2^(1023 - exponent bias of Element)

  // Of the low and of the high half.
  static __device__ __forceinline__ double low(uint32_t pair) {
    return __hiloint2double(static_cast<int>((pair & 0x7fffu) << kShift), 0);
  }
  static __device__ __forceinline__ double high(uint32_t pair) {
    return __hiloint2double(static_cast<int>((pair & 0x7fff0000u) >> (16 - kShift)), 0);
  }
};

// The same for any value, in the same units.
template <typename Element>
struct Converted {
  static __device__ __forceinline__ double of(uint32_t bits) {
    return static_cast<double>(fabsf(ElementTraits<Element>::to_float(bits))) / Magnified<Element>::kUnit;
  }
  static __device__ __forceinline__ double low(uint32_t pair) { return of(pair & 0xffffu); }
  static __device__ __forceinline__ double high(uint32_t pair) { return of(pair >> 16); }
};

// A thread's sums for its 8 channels: of all, of what is kept along channels, of what is kept along positions.
struct ThreadSums {
  double all[kTileChannels], dgrad[kTileChannels], wgrad[kTileChannels];
};

// Groups of 16 channels are shared by lanes 2i and 2i + 1, so that both have sums for all 16: in shared memory, for
// want of registers.
using WideSums = double[16][kBlockThreads];

// Adds what magnitude pruning along channels keeps of the rows [first, end) of x.
template <typename Element, int N, int M, typename Values, int kRows, int kChannels>
__device__ __forceinline__ void add_along_channels(const uint32_t (&x)[kRows][kChannels / 2], int first, int end,
                                                   double (&sums)[kChannels]) {
#pragma unroll
  for (int r = 0; r < kRows; r += 2) {
    const uint32_t mine = (r >= first && r < end ? 0xffffu : 0u) | (r + 1 >= first && r + 1 < end ? 0xffff0000u : 0u);
#pragma unroll
    for (int g = 0; g < kChannels / M; ++g) {
      uint32_t group[M], keep[M];  // low half: row r, high half: row r + 1
#pragma unroll
      for (int i = 0; i < M; i += 2) {
        group[i] = zip_low(x[r][(g * M + i) / 2], x[r + 1][(g * M + i) / 2]);
        group[i + 1] = zip_high(x[r][(g * M + i) / 2], x[r + 1][(g * M + i) / 2]);
      }
      Magnitude<Element, N, M>::keep(group, keep);
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const uint32_t kept = group[i] & keep[i] & mine;
        sums[g * M + i] += Values::low(kept);
        sums[g * M + i] += Values::high(kept);
      }
    }
  }
}

// Adds the rows [first, end) of x, and what magnitude pruning along positions keeps of them.
template <typename Element, int N, int M, typename Values>
__device__ __forceinline__ void add_along_positions(const uint32_t (&x)[M][kTileChannels / 2], int first, int end,
                                                    double (&all)[kTileChannels], double (&kept)[kTileChannels]) {
#pragma unroll
  for (int p = 0; p < kTileChannels / 2; ++p) {
    uint32_t group[M], keep[M];
#pragma unroll
    for (int i = 0; i < M; ++i) group[i] = x[i][p];
    Magnitude<Element, N, M>::keep(group, keep);
    auto add = [&](double (&sums)[kTileChannels], uint32_t pair) {
      sums[2 * p] += Values::low(pair), sums[2 * p + 1] += Values::high(pair);
    };
    if (first > 0 || end < M) {
#pragma unroll
      for (int i = 0; i < M; ++i) {
        if (i < first || i >= end) group[i] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < M; ++i) add(all, group[i]);
    if constexpr (N == 2 && M == 4) {  // two additions instead of four
      const PackedQuads quads = pack_kept(group, keep);
      add(kept, quads.low), add(kept, quads.high);
    } else if constexpr (N == 1) {  // one addition instead of M
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < M; ++i) largest |= group[i] & keep[i];
      add(kept, largest);
    } else {
#pragma unroll
      for (int i = 0; i < M; ++i) add(kept, group[i] & keep[i]);
    }
  }
}

// Each lane gets the sums of its own 8 channels.
__device__ __forceinline__ void share_sums(const WideSums& wide, bool odd, double (&sums)[kTileChannels]) {
#pragma unroll
  for (int e = 0; e < kTileChannels; ++e) {
    const double mine = wide[odd ? e + 8 : e][threadIdx.x], other = wide[odd ? e : e + 8][threadIdx.x];
    sums[e] = mine + __shfl_xor_sync(0xffffffffu, other, 1);
  }
}

// The sums of a thread over every rows_per_block-th group of M rows of [begin, end), the first from `row` on.
// not_finite: a top bit is set where a NaN or inf was met. wide: for M = 16, else null.
template <typename Element, int N, int M, typename Values>
__device__ __forceinline__ void sum_part(const SdgpScopeScales& problem, int64_t begin, int64_t end, int64_t row,
                                         int rows_per_block, int64_t channel, bool odd, WideSums* wide,
                                         uint32_t& not_finite, ThreadSums& sums) {
  constexpr bool kPrefetches = M < 16;  // as far as registers go
  constexpr uint32_t kToTopBit = (0x8000 - ElementTraits<Element>::kInfinity) * 0x10001;
  const bool vector = can_load_vectors(problem.dy, problem.c, problem.row_stride);
  const auto* dy = static_cast<const uint16_t*>(problem.dy);
  sums = {};
  if constexpr (M == 16) {
    for (auto& row : *wide) row[threadIdx.x] = 0.0;
  }
  uint4 next[M];
  auto load = [&](int64_t from) {
    load_rows(dy, problem.t, problem.c, problem.row_stride, vector, from, channel, next);
  };
  if constexpr (kPrefetches) load(row);
  const int step = rows_per_block * M;
  // As often for all threads, because lanes share groups of 16.
  const auto steps = static_cast<int>((end - begin / M * M + step - 1) / step);
#pragma unroll 1
  for (int i = 0; i < steps; ++i, row += step) {
    uint32_t x[M][kTileChannels / 2];
    if constexpr (!kPrefetches) load(row);
    unpack_rows(next, x);
    if constexpr (kPrefetches) {
      if (i + 1 < steps) load(row + step);
    }
#pragma unroll
    for (int r = 0; r < M; ++r) {
#pragma unroll
      for (int p = 0; p < kTileChannels / 2; ++p) not_finite |= (x[r][p] & 0x7fff7fffu) + kToTopBit;
    }
    const auto first = static_cast<int>(max(begin - row, int64_t{0}));
    const auto last = static_cast<int>(max(min(end - row, int64_t{M}), int64_t{0}));
    add_along_positions<Element, N, M, Values>(x, first, last, sums.all, sums.wgrad);
    if constexpr (M == 16) {
      const int half = odd ? 8 : 0;
      uint32_t wide_x[8][8];
      double step_sums[16] = {};
      widen(x, odd, wide_x);
      add_along_channels<Element, N, M, Values, 8, 16>(wide_x, first - half, last - half, step_sums);
#pragma unroll
      for (int e = 0; e < 16; ++e) (*wide)[e][threadIdx.x] += step_sums[e];
    } else {
      add_along_channels<Element, N, M, Values, M, kTileChannels>(x, first, last, sums.dgrad);
    }
  }
  if constexpr (M == 16) share_sums(*wide, odd, sums.dgrad);
}

template <typename Element, int N, int M>
__global__ void __launch_bounds__(kBlockThreads)
    scope_sums_kernel(const __grid_constant__ SdgpScopeScales problem, const __grid_constant__ ScopeCover cover) {
  // One column more than threads, so that the channels of a thread are in different banks.
  __shared__ double block_sums[kSums][kTileChannels][kBlockThreads + 1];

  const int lane = static_cast<int>(threadIdx.x) & (cover.lanes - 1);
  const int block_row = static_cast<int>(threadIdx.x) >> cover.lane_bits, block_rows = kBlockThreads >> cover.lane_bits;
  const unsigned piece = blockIdx.x / cover.channel_blocks, channel_block = blockIdx.x % cover.channel_blocks;
  const unsigned sample = piece / cover.parts, part = piece % cover.parts;
  const int64_t channel = (static_cast<int64_t>(channel_block) * cover.lanes + lane) * kTileChannels;
  const int64_t begin = sample * cover.rows + part * cover.part_rows;
  const int64_t end = min(begin + cover.part_rows, (sample + 1) * cover.rows);
  const int64_t row = begin / M * M + block_row * M;
  const bool odd = lane % 2 != 0;

  uint32_t not_finite = 0;
  WideSums* wide = nullptr;
  if constexpr (M == 16) {
    __shared__ WideSums block_wide;
    wide = &block_wide;
  }
  ThreadSums sums;
  sum_part<Element, N, M, Magnified<Element>>(problem, begin, end, row, block_rows, channel, odd, wide, not_finite,
                                              sums);
  if (__any_sync(0xffffffffu, (not_finite & 0x80008000u) != 0)) {
    sum_part<Element, N, M, Converted<Element>>(problem, begin, end, row, block_rows, channel, odd, wide, not_finite,
                                                sums);
  }
#pragma unroll
  for (int e = 0; e < kTileChannels; ++e) {
    block_sums[kSumAll][e][threadIdx.x] = sums.all[e];
    block_sums[kSumDgrad][e][threadIdx.x] = sums.dgrad[e];
    block_sums[kSumWgrad][e][threadIdx.x] = sums.wgrad[e];
  }
  __syncthreads();

  const int64_t c = problem.c;
  const bool is_single = problem.positions_per_sample == 0;
  double single[kSums] = {};
  for (int e = static_cast<int>(threadIdx.x); e < cover.lanes * kTileChannels; e += kBlockThreads) {
    const int64_t target = static_cast<int64_t>(channel_block) * cover.lanes * kTileChannels + e;
    if (target >= c) break;
    double total[kSums] = {};
#pragma unroll
    for (int which = 0; which < kSums; ++which) {
      for (int r = 0; r < block_rows; ++r) {
        total[which] += block_sums[which][e % kTileChannels][r * cover.lanes + e / kTileChannels];
      }
      total[which] *= Magnified<Element>::kUnit;
      single[which] += total[which];
    }
    if (is_single) continue;
    const int64_t scope = sample * c + target, scopes = cover.samples * c;
    if (cover.parts == 1) {
      store_factors(problem, scope, total);
    } else {
#pragma unroll
      for (int which = 0; which < kSums; ++which) problem.sums[(part * kSums + which) * scopes + scope] = total[which];
    }
  }
  if (!is_single) return;
  __syncthreads();
#pragma unroll
  for (int which = 0; which < kSums; ++which) block_sums[which][0][threadIdx.x] = single[which];
  __syncthreads();
  if (threadIdx.x >= kSums) return;
  double total = 0.0;
  for (int i = 0; i < kBlockThreads; ++i) total += block_sums[threadIdx.x][0][i];
  problem.sums[static_cast<int64_t>(blockIdx.x) * kSums + threadIdx.x] = total;
}

template <typename Element, int N, int M>
int launch_scope_scales(const SdgpScopeScales& problem) {
  const ScopeCover cover = cover_scopes(problem.t, problem.c, problem.positions_per_sample);
  const int64_t blocks = cover.blocks();
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  scope_sums_kernel<Element, N, M>
      <<<static_cast<unsigned>(blocks), kBlockThreads, 0, static_cast<cudaStream_t>(problem.stream)>>>(problem, cover);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? sdgp_finish_scope_scales(&problem) : static_cast<int>(launched);
}

}  // namespace sdgp

#define SDGP_SCOPE_SCALES(NAME, ELEMENT, N, M) \
  extern "C" int NAME(const SdgpScopeScales* problem) { return sdgp::launch_scope_scales<ELEMENT, N, M>(*problem); }
