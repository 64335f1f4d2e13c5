// One pass over dY [T, C] that emits its pruned and compressed forms along both axes.
//
// A thread owns 16 positions x 8 channels (x 16 for groups of 16), the smallest tile whose outputs are whole words:
//
//            channels c .. c+7                       dgrad operand (groups run to the right)
//          +-----------------+                         per position: 4 values (8 bytes), 1 byte of metadata
//  t       | 16-byte load    | ) M positions at a    wgrad operand (groups run downwards)
//  t+1     |                 | ) time                  per 4 positions: 2 rows of 8 values (16 bytes each)
//  ..      |                 |                         per 16 positions: 8 metadata words (16 bytes)
//  t+15    |                 |                       bias gradient: 8 partial sums
//          +-----------------+
//
// so that every 16-bit metadata word is put together by one thread, and threads exchange nothing (but for groups of 16
// channels). The next positions are loaded while the current ones are worked on. What lies beyond T or C is read as +0,
// whose packed form (values 0, metadata 0x4) is the operands' padding.
#pragma once

#include "sdgp/group_rules.cuh"
#include "sdgp/metadata.cuh"
#include "sdgp/tile_io.cuh"

namespace sdgp {

// The scope of one group: the rule itself has scaled its values.
struct GroupScope {
  static constexpr bool kScales = false;
  template <int M>
  __device__ __forceinline__ void scale_along_channels(uint32_t (&)[M], int, int) const {}
  template <int M>
  __device__ __forceinline__ void scale_along_positions(uint32_t (&)[M], int, int) const {}
};

// A larger scope: kept values are multiplied by a factor of their sample and channel. factors: of this thread's first
// channel; offsets[r]: from there to the sample of row r; channel_step is 0 where a single factor serves all.
template <typename Element, int kRows>
struct WideScope {
  static constexpr bool kScales = true;
  const float* factors;
  int64_t offsets[kRows];
  int channel_step, channels_left;

  __device__ __forceinline__ float at(int row, int channel) const {
    return channel < channels_left ? __ldg(factors + offsets[row] + channel * channel_step) : 1.0f;
  }

  __device__ __forceinline__ static void scale(uint32_t& pair, float factor0, float factor1) {
    pair = scale_nonzero<Element>(pair & 0xffffu, factor0) | scale_nonzero<Element>(pair >> 16, factor1) << 16;
  }

  // Halves are rows `row` and `row + 1`, elements are channels.
  template <int M>
  __device__ __forceinline__ void scale_along_channels(uint32_t (&group)[M], int row, int channel) const {
#pragma unroll
    for (int i = 0; i < M; ++i) scale(group[i], at(row, channel + i), at(row + 1, channel + i));
  }

  // Halves are channels `channel` and `channel + 1`, elements are rows.
  template <int M>
  __device__ __forceinline__ void scale_along_positions(uint32_t (&group)[M], int row, int channel) const {
#pragma unroll
    for (int i = 0; i < M; ++i) scale(group[i], at(row + i, channel), at(row + i, channel + 1));
  }
};

// Which sample the rows of a thread belong to, row by row.
struct SampleWalk {
  int64_t offset, stride;         // of the current row's sample in a table [samples, c], and from sample to sample
  int64_t left, rows_per_sample;  // rows left in this sample
  int64_t rows_left;              // rows left in dY: beyond its end the walk stands still

  __device__ __forceinline__ SampleWalk(int64_t row, int64_t t, int64_t c, int64_t positions_per_sample)
      : stride(positions_per_sample == 0 ? 0 : c),
        rows_per_sample(positions_per_sample == 0 ? INT64_MAX : positions_per_sample),
        rows_left(t - row) {
    const int64_t sample = row / rows_per_sample;
    offset = rows_left > 0 ? sample * stride : 0;
    left = rows_per_sample - (row - sample * rows_per_sample);
  }

  __device__ __forceinline__ void next() {
    --rows_left;
    if (--left == 0 && rows_left > 0) offset += stride, left = rows_per_sample;
  }
};

// Prunes a pair of groups, scales it, and packs its quads.
template <typename Rule, int M, bool kScales, typename Scale>
__device__ __forceinline__ void prune_and_pack(uint32_t (&x)[M], const GroupPair& groups,
                                               const RuleParameters& parameters, const Scale& scale,
                                               PackedQuads (&packed)[M / 4]) {
  if constexpr (Rule::kPacking == Packing::kPair && !kScales) {
    packed[0] = Rule::pack(x, parameters);
  } else {
    Rule::prune(x, groups, parameters);
    scale();
#pragma unroll
    for (int quad = 0; quad < M / 4; ++quad) {
      packed[quad] = pack_pruned({x[4 * quad], x[4 * quad + 1], x[4 * quad + 2], x[4 * quad + 3]});
    }
  }
}

// The in-register part, for this kernel and for the epilogues of kernels that produce dY. x[r][p] holds channels 2p
// (low half) and 2p + 1 (high half) of position r; kRows and kChannels are multiples of M.

// Groups along channels. values[r][j]: the two kept of quad j of position r; metadata[r]: 4 bits per quad.
// first_group: index of the group that starts at x[0][0]; a position has groups_per_row groups.
template <typename Rule, int M, int kRows, int kChannels, typename Scope>
__device__ __forceinline__ void compress_along_channels(const uint32_t (&x)[kRows][kChannels / 2], uint64_t first_group,
                                                        uint64_t groups_per_row, int channels_left,
                                                        const RuleParameters& parameters, const Scope& scope,
                                                        uint32_t (&values)[kRows][kChannels / 4],
                                                        uint32_t (&metadata)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; r += 2) {
    uint32_t nibbles = 0;
#pragma unroll
    for (int g = 0; g < kChannels / M; ++g) {
      uint32_t group[M];  // low half: position r, high half: position r + 1
#pragma unroll
      for (int i = 0; i < M; i += 2) {
        group[i] = zip_low(x[r][(g * M + i) / 2], x[r + 1][(g * M + i) / 2]);
        group[i + 1] = zip_high(x[r][(g * M + i) / 2], x[r + 1][(g * M + i) / 2]);
      }
      const uint64_t index = first_group + static_cast<uint64_t>(r) * groups_per_row + g;
      const int length = channels_left - g * M;
      PackedQuads packed[M / 4];
      prune_and_pack<Rule, M, Scope::kScales>(
          group, {{index, index + groups_per_row}, {length, length}}, parameters,
          [&] { scope.scale_along_channels(group, r, g * M); }, packed);
#pragma unroll
      for (int quad = 0; quad < M / 4; ++quad) {
        const int j = g * (M / 4) + quad;
        values[r][j] = zip_low(packed[quad].low, packed[quad].high);
        values[r + 1][j] = zip_high(packed[quad].low, packed[quad].high);
        nibbles |= packed[quad].nibbles << (4 * j);
      }
    }
    metadata[r] = nibbles & 0xffffu;
    metadata[r + 1] = nibbles >> 16;
  }
}

// Groups along positions. values[v][p]: the v-th kept value of channels 2p and 2p + 1; metadata[p]: 4 bits per quad of
// each channel, from bit 0 of its half on. first_group: index of the group that starts at x[0][0].
template <typename Rule, int M, int kRows, int kChannels, typename Scope>
__device__ __forceinline__ void compress_along_positions(const uint32_t (&x)[kRows][kChannels / 2],
                                                         uint64_t first_group, uint64_t groups_per_row,
                                                         int64_t positions_left, const RuleParameters& parameters,
                                                         const Scope& scope,
                                                         uint32_t (&values)[kRows / 2][kChannels / 2],
                                                         uint32_t (&metadata)[kChannels / 2]) {
#pragma unroll
  for (int p = 0; p < kChannels / 2; ++p) {
    metadata[p] = 0;
#pragma unroll
    for (int g = 0; g < kRows / M; ++g) {
      uint32_t group[M];
#pragma unroll
      for (int i = 0; i < M; ++i) group[i] = x[g * M + i][p];
      const uint64_t index = first_group + static_cast<uint64_t>(g) * groups_per_row + 2 * p;
      const int length = static_cast<int>(positions_left < kRows ? positions_left : kRows) - g * M;
      PackedQuads packed[M / 4];
      prune_and_pack<Rule, M, Scope::kScales>(
          group, {{index, index + 1}, {length, length}}, parameters,
          [&] { scope.scale_along_positions(group, g * M, 2 * p); }, packed);
#pragma unroll
      for (int quad = 0; quad < M / 4; ++quad) {
        const int j = g * (M / 4) + quad;
        values[2 * j][p] = packed[quad].low;
        values[2 * j + 1][p] = packed[quad].high;
        metadata[p] |= packed[quad].nibbles << (4 * j);
      }
    }
  }
}

template <int kRows>
__device__ __forceinline__ void unpack_rows(const uint4 (&rows)[kRows], uint32_t (&x)[kRows][4]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) x[r][0] = rows[r].x, x[r][1] = rows[r].y, x[r][2] = rows[r].z, x[r][3] = rows[r].w;
}

// Compresses kRows x kChannels values along channels and stores them; the dgrad side of the kernel.
template <typename Rule, int M, int kRows, int kChannels, typename Scope>
__device__ __forceinline__ void emit_dgrad(const SdgpPruneCompress& problem, const uint32_t (&x)[kRows][kChannels / 2],
                                           int64_t row, int64_t channel, const RuleParameters& parameters,
                                           const Scope& scope) {
  const uint64_t groups_per_row = static_cast<uint64_t>((problem.c + M - 1) / M);
  const uint64_t first_group = static_cast<uint64_t>(row) * groups_per_row + static_cast<uint64_t>(channel / M);
  const int channels_left = static_cast<int>(max(min(problem.c - channel, int64_t{kChannels}), int64_t{0}));
  uint32_t values[kRows][kChannels / 4], metadata[kRows];
  compress_along_channels<Rule, M, kRows, kChannels>(x, first_group, groups_per_row, channels_left, parameters, scope,
                                                     values, metadata);
  DgradRows<kChannels> rows(problem, row, channel);
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows.store(values[r], metadata[r]);
}

// Lanes 2i and 2i + 1 hold the two halves of 16-channel groups at the same 16 positions. They swap so that the even
// lane has the first 8 positions of all 16 channels and the odd lane the last 8.
__device__ __forceinline__ void widen(const uint32_t (&x)[16][4], bool odd, uint32_t (&wide)[8][8]) {
#pragma unroll
  for (int r = 0; r < 8; ++r) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint32_t keep = odd ? x[r + 8][p] : x[r][p];
      const uint32_t received = __shfl_xor_sync(0xffffffffu, odd ? x[r][p] : x[r + 8][p], 1);
      wide[r][p] = odd ? received : keep;
      wide[r][p + 4] = odd ? keep : received;
    }
  }
}

template <typename Element, typename Rule, int M, bool kWide>
__global__ void __launch_bounds__(kBlockThreads)
    prune_compress_kernel(const __grid_constant__ SdgpPruneCompress problem, const __grid_constant__ Cover cover) {
  constexpr int kRows = M, kChannels = kTileChannels;  // in registers at a time
  __shared__ float bias_sums[kBlockThreads][kChannels];

  const Place place(cover);
  const int64_t c = problem.c, t = problem.t, channel = place.channel, position = place.position;
  const int64_t padded_c = (c + 15) / 16 * 16;
  const bool vector_loads = can_load_vectors(problem.dy, c, problem.row_stride);
  const bool vector_stores = c % 8 == 0;
  const auto* dy = static_cast<const uint16_t*>(problem.dy);

  RuleParameters dgrad_parameters{{}, problem.eps}, wgrad_parameters{{}, problem.eps};
  if constexpr (Rule::kIsRandom) {
    dgrad_parameters.stream = load_stream(problem.seed, problem.rank, 0);
    wgrad_parameters.stream = load_stream(problem.seed, problem.rank, 1);
  }
  SampleWalk walk(position, t, c, kWide ? problem.positions_per_sample : 0);

  uint4 next[kRows];
  uint32_t wgrad_metadata[kChannels / 2] = {};
  float bias[kChannels] = {};
  load_rows(dy, t, c, problem.row_stride, vector_loads, position, channel, next);
#pragma unroll 1
  for (int step = 0; step < kTilePositions; step += kRows) {
    const int64_t row = position + step;
    uint32_t x[kRows][kChannels / 2];
    unpack_rows(next, x);
    if (step + kRows < kTilePositions) {
      load_rows(dy, t, c, problem.row_stride, vector_loads, row + kRows, channel, next);
    }

    if (problem.bias != nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < kChannels; ++e) {
          bias[e] += ElementTraits<Element>::to_float(x[r][e / 2] >> (16 * (e & 1)) & 0xffffu);
        }
      }
    }

    int64_t sample_offsets[kRows];
    if constexpr (kWide) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) sample_offsets[r] = walk.offset, walk.next();
    }
    const int channel_step = problem.positions_per_sample == 0 ? 0 : 1;

    if (problem.dgrad_values != nullptr) {
      if constexpr (M == 16) {
        const bool odd = place.lane % 2 != 0;
        const int64_t first_row = row + (odd ? 8 : 0), first_channel = channel - (odd ? 8 : 0);
        uint32_t wide[8][8];
        widen(x, odd, wide);
        if (first_row < t && first_channel < c) {
          if constexpr (kWide) {
            WideScope<Element, 8> scope{problem.dgrad_scale + first_channel * channel_step,
                                        {},
                                        channel_step,
                                        static_cast<int>(min(c - first_channel, int64_t{16}))};
#pragma unroll
            for (int r = 0; r < 8; ++r) scope.offsets[r] = odd ? sample_offsets[r + 8] : sample_offsets[r];
            emit_dgrad<Rule, M, 8, 16>(problem, wide, first_row, first_channel, dgrad_parameters, scope);
          } else {
            emit_dgrad<Rule, M, 8, 16>(problem, wide, first_row, first_channel, dgrad_parameters, GroupScope{});
          }
        }
      } else if (row < t && channel < padded_c) {
        if constexpr (kWide) {
          WideScope<Element, kRows> scope{problem.dgrad_scale + channel * channel_step,
                                          {},
                                          channel_step,
                                          static_cast<int>(min(c - channel, int64_t{8}))};
#pragma unroll
          for (int r = 0; r < kRows; ++r) scope.offsets[r] = sample_offsets[r];
          emit_dgrad<Rule, M, kRows, kChannels>(problem, x, row, channel, dgrad_parameters, scope);
        } else {
          emit_dgrad<Rule, M, kRows, kChannels>(problem, x, row, channel, dgrad_parameters, GroupScope{});
        }
      }
    }

    if (problem.wgrad_values != nullptr && row < problem.wgrad_k && channel < c) {
      uint32_t values[kRows / 2][kChannels / 2], metadata[kChannels / 2];
      const auto groups_per_row = static_cast<uint64_t>(c);
      const uint64_t first_group = static_cast<uint64_t>(row / M) * groups_per_row + static_cast<uint64_t>(channel);
      if constexpr (kWide) {
        WideScope<Element, kRows> scope{problem.wgrad_scale + channel * channel_step,
                                        {},
                                        channel_step,
                                        static_cast<int>(min(c - channel, int64_t{8}))};
#pragma unroll
        for (int r = 0; r < kRows; ++r) scope.offsets[r] = sample_offsets[r];
        compress_along_positions<Rule, M, kRows, kChannels>(x, first_group, groups_per_row, t - row, wgrad_parameters,
                                                            scope, values, metadata);
      } else {
        compress_along_positions<Rule, M, kRows, kChannels>(x, first_group, groups_per_row, t - row, wgrad_parameters,
                                                            GroupScope{}, values, metadata);
      }
#pragma unroll
      for (int v = 0; v < kRows / 2; ++v) {
        store_channels(static_cast<uint16_t*>(problem.wgrad_values) + (row / 2 + v) * c, channel, c, vector_stores,
                       {values[v][0], values[v][1], values[v][2], values[v][3]});
      }
#pragma unroll
      for (int p = 0; p < kChannels / 2; ++p) wgrad_metadata[p] |= metadata[p] << step;
    }
  }

  if (problem.dgrad_values != nullptr) pad_dgrad(problem, cover, place, padded_c);
  if (problem.wgrad_values != nullptr && position < problem.wgrad_k) {
    store_wgrad_metadata(problem, position, channel, wgrad_metadata);
  }
  if (problem.bias != nullptr) store_bias_partials(problem, cover, place, bias, bias_sums);
}

}  // namespace sdgp
