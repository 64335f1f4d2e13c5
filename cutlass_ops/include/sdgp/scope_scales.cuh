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
  static constexpr bool kIsOrdered = true;  // for values below 2^121 (element.cuh)
  static constexpr bool kIsHalf = ElementTraits<Element>::kInfinity == 0x7c00;
  static constexpr int kShift = kIsHalf ? 10 : 13;
  static constexpr double kUnit = kIsHalf ? 0x1p1008 : 0x1p896;  // 2^(1023 - exponent bias of Element)

  // Of the low and of the high half.
  static __device__ __forceinline__ double low(uint32_t pair) {
    return __hiloint2double(static_cast<int>((pair & 0x7fffu) << kShift), 0);
  }
  static __device__ __forceinline__ double high(uint32_t pair) {
    const WideProduct shifted = multiply_wide(pair & 0x7fff0000u, 1u << (16 + kShift));  // with the zeros below it
    return __hiloint2double(static_cast<int>(shifted.high), static_cast<int>(shifted.low));
  }
};

// The same for any value, in the same units.
template <typename Element>
struct Converted {
  static constexpr bool kIsOrdered = false;
  static __device__ __forceinline__ double of(uint32_t bits) {
    return static_cast<double>(fabsf(ElementTraits<Element>::to_float(bits))) / Magnified<Element>::kUnit;
  }
  static __device__ __forceinline__ double low(uint32_t pair) { return of(pair & 0xffffu); }
  static __device__ __forceinline__ double high(uint32_t pair) { return of(pair >> 16); }
};

// A thread's sums for its 8 channels: of what is kept along channels and along positions, and of the rest along
// positions with 2:4, where that takes no more additions than there are values, of all with other patterns.
struct ThreadSums {
  double dgrad[kTileChannels], wgrad[kTileChannels], rest[kTileChannels];
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

// Adds what magnitude pruning along positions keeps of the rows [first, end) of x, and the rest, as in ThreadSums.
template <typename Element, int N, int M, typename Values>
__device__ __forceinline__ void add_along_positions(const uint32_t (&x)[M][kTileChannels / 2], int first, int end,
                                                    ThreadSums& sums) {
#pragma unroll
  for (int p = 0; p < kTileChannels / 2; ++p) {
    uint32_t group[M], keep[M];
#pragma unroll
    for (int i = 0; i < M; ++i) group[i] = x[i][p];
    Magnitude<Element, N, M>::keep(group, keep);
    auto add = [&](double (&to)[kTileChannels], uint32_t pair) {
      to[2 * p] += Values::low(pair), to[2 * p + 1] += Values::high(pair);
    };
    if (first > 0 || end < M) {
#pragma unroll
      for (int i = 0; i < M; ++i) {
        if (i < first || i >= end) group[i] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < M; ++i) add(sums.rest, N == 2 && M == 4 ? group[i] & ~keep[i] : group[i]);
    if constexpr (N == 1) {  // one addition instead of M
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < M; ++i) largest |= group[i] & keep[i];
      add(sums.wgrad, largest);
    } else {
#pragma unroll
      for (int i = 0; i < M; ++i) add(sums.wgrad, group[i] & keep[i]);
    }
  }
}

// Parts four magnitudes, ordered, by size. A sum does not mind which of two equal ones is kept.
__device__ __forceinline__ void part_two_largest(const uint32_t (&x)[4], uint32_t (&largest)[2],
                                                 uint32_t (&others)[2]) {
  const uint32_t high01 = larger(x[0], x[1]), low01 = smaller(x[0], x[1]);
  const uint32_t high23 = larger(x[2], x[3]), low23 = smaller(x[2], x[3]);
  const uint32_t high = smaller(high01, high23), low = larger(low01, low23);
  largest[0] = larger(high01, high23), largest[1] = larger(high, low);
  others[0] = smaller(high, low), others[1] = smaller(low01, low23);
}

// Both of the above for 2:4 and four whole rows of ordered values, which is nearly always.
template <typename Values>
__device__ __forceinline__ void add_whole_quads(const uint32_t (&x)[4][kTileChannels / 2], ThreadSums& sums) {
  auto add = [](double (&to)[kTileChannels], int channel, int other, uint32_t pair) {
    to[channel] += Values::low(pair), to[other] += Values::high(pair);
  };
#pragma unroll
  for (int p = 0; p < kTileChannels / 2; ++p) {
    uint32_t largest[2], others[2];
    part_two_largest({x[0][p], x[1][p], x[2][p], x[3][p]}, largest, others);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      add(sums.wgrad, 2 * p, 2 * p + 1, largest[i]), add(sums.rest, 2 * p, 2 * p + 1, others[i]);
    }
  }
#pragma unroll
  for (int r = 0; r < 4; r += 2) {
#pragma unroll
    for (int p = 0; p < kTileChannels / 2; p += 2) {
      const uint32_t quads[4] = {zip_low(x[r][p], x[r + 1][p]), zip_high(x[r][p], x[r + 1][p]),
                                 zip_low(x[r][p + 1], x[r + 1][p + 1]), zip_high(x[r][p + 1], x[r + 1][p + 1])};
      uint32_t keep[4];
      keep_two_of_four(quads, magnitude_at_least, keep);
#pragma unroll
      for (int i = 0; i < 4; ++i) add(sums.dgrad, 2 * p + i, 2 * p + i, quads[i] & keep[i]);
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
// unordered: a top bit is set where something met is not below 2^121. wide: for M = 16, else null.
template <typename Element, int N, int M, typename Values>
__device__ __forceinline__ void sum_part(const SdgpScopeScales& problem, int64_t begin, int64_t end, int64_t row,
                                         int rows_per_block, int64_t channel, bool odd, WideSums* wide,
                                         uint32_t& unordered, ThreadSums& sums) {
  constexpr bool kPrefetches = M < 16;  // as far as registers go
  sums = {};
  if constexpr (M == 16) {
    for (auto& row : *wide) row[threadIdx.x] = 0.0;
  }
  uint4 next[M];
  auto load = [&](int64_t from) {
    Rows(problem.dy, problem.t, problem.c, problem.row_stride, from, channel).load(next);
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
      for (int p = 0; p < kTileChannels / 2; ++p) x[r][p] &= 0x7fff7fffu, unordered |= not_ordered(x[r][p]);
    }
    const auto first = static_cast<int>(max(begin - row, int64_t{0}));
    const auto last = static_cast<int>(max(min(end - row, int64_t{M}), int64_t{0}));
    if constexpr (N == 2 && M == 4 && Values::kIsOrdered) {
      if (first == 0 && last == M) {
        add_whole_quads<Values>(x, sums);
        continue;
      }
    }
    add_along_positions<Element, N, M, Values>(x, first, last, sums);
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
__global__ void __launch_bounds__(kBlockThreads, M == 4 ? 4 : 2)
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

  uint32_t unordered = 0;
  WideSums* wide = nullptr;
  if constexpr (M == 16) {
    __shared__ WideSums block_wide;
    wide = &block_wide;
  }
  ThreadSums sums;
  sum_part<Element, N, M, Magnified<Element>>(problem, begin, end, row, block_rows, channel, odd, wide, unordered,
                                              sums);
  if (__any_sync(0xffffffffu, (unordered & 0x80008000u) != 0)) {
    sum_part<Element, N, M, Converted<Element>>(problem, begin, end, row, block_rows, channel, odd, wide, unordered,
                                                sums);
  }
#pragma unroll
  for (int e = 0; e < kTileChannels; ++e) {
    block_sums[kSumAll][e][threadIdx.x] = N == 2 && M == 4 ? sums.wgrad[e] + sums.rest[e] : sums.rest[e];
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
