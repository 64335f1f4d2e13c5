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
// so that every 16-bit metadata word is put together by one thread, and no value passes through shared memory. The next
// positions are loaded while the current ones are worked on. What lies beyond T or C is read as +0, whose packed form
// (values 0, metadata 0x4) is the operands' padding.
#pragma once

#include "sdgp/group_rules.cuh"
#include "sdgp/metadata.cuh"
#include "sdgp/quad_rules.cuh"
#include "sdgp/prune_compress_api.h"
#include "sdgp/prune_compress_cover.h"

namespace sdgp {

// The scope of one group: the rule itself has scaled its values.
struct GroupScope {
  static constexpr bool kScales = false;
  template <int M>
  __device__ __forceinline__ void scale_along_channels(uint32_t (&)[M], int, int) const {}
  template <int M>
  __device__ __forceinline__ void scale_along_positions(uint32_t (&)[M], int, int) const {}
};

// A larger scope: kept values are multiplied by a factor of their sample and channel.
template <typename Element>
struct WideScope {
  static constexpr bool kScales = true;
  const float* factors;  // [samples, c] from this thread's first channel on, or a single one
  int64_t row_length;    // c, or 0 for a single factor
  int64_t first_position;
  int64_t positions_per_sample;
  int channels_left;

  __device__ __forceinline__ float at(int row, int channel) const {
    if (row_length == 0) return __ldg(factors);
    if (channel >= channels_left) return 1.0f;
    return __ldg(factors + (first_position + row) / positions_per_sample * row_length + channel);
  }

  __device__ __forceinline__ void scale(uint32_t& pair, float factor0, float factor1) const {
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

// Prunes a pair of groups, scales it, and packs its quads.
template <typename Rule, int M, typename Scale>
__device__ __forceinline__ void prune_and_pack(uint32_t (&x)[M], const GroupPair& groups,
                                               const RuleParameters& parameters, const Scale& scale,
                                               PackedQuads (&packed)[M / 4]) {
  if constexpr (Rule::kPacking == Packing::kPair) {
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

// The rule for single quads that belongs to a rule.
template <typename Rule>
struct QuadRule;
template <typename Element>
struct QuadRule<Random<Element, 2, 4>> : RandomQuad<Element> {};
template <typename Element>
struct QuadRule<Mvue<Element, 2, 4>> : MvueQuad<Element> {};

// Single quads, in runs of kRun whose groups have consecutive indices from run_index[..] on. length[i]: how many elements
// of the i-th quad of a run exist.
template <typename Rule, int kQuads, int kRun>
__device__ __forceinline__ void compress_quads(const uint32_t (&x01)[kQuads], const uint32_t (&x23)[kQuads],
                                               const uint64_t (&run_index)[kQuads / kRun], const int (&length)[kRun],
                                               const Stream& stream, PackedQuad (&packed)[kQuads]) {
  uint4 words[kQuads];
  philox_first_blocks<kQuads, kRun>(stream, run_index, words);
  uint32_t irregular = 0;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    packed[i] = QuadRule<Rule>::compress(x01[i], x23[i], words[i], 1u << i, irregular);
    if (length[i % kRun] < 4) irregular |= 1u << i;
    if (static_cast<uint32_t>(run_index[i / kRun]) > 0u - kRun) irregular |= 1u << i;  // the low half wraps in the run
  }
  while (irregular != 0) {
    const int which = __ffs(static_cast<int>(irregular)) - 1;
    irregular &= irregular - 1;
    uint32_t first = 0, second = 0;
    uint64_t index = 0;
    int elements = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (i == which) {
        first = x01[i], second = x23[i];
        index = run_index[i / kRun] + i % kRun, elements = length[i % kRun];
      }
    }
    const PackedQuad result = QuadRule<Rule>::compress_any(first, second, philox(stream, index, 0), elements);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (i == which) packed[i] = result;
    }
  }
}

// The in-register part, for this kernel and for the epilogues of kernels that produce dY. x[r][p] holds channels 2p
// (low half) and 2p + 1 (high half) of position r; kRows and kChannels are multiples of M.

// Groups along channels. values[r][j]: the two kept of quad j of position r; metadata[r]: 4 bits per quad.
// first_group: index of the group that starts at x[0][0]; a position has groups_per_row groups.
template <typename Rule, int M, int kRows, int kChannels, typename Scope>
__device__ __forceinline__ void compress_along_channels(const uint32_t (&x)[kRows][kChannels / 2],
                                                        uint64_t first_group, uint64_t groups_per_row,
                                                        int channels_left, const RuleParameters& parameters,
                                                        const Scope& scope, uint32_t (&values)[kRows][kChannels / 4],
                                                        uint32_t (&metadata)[kRows]) {
  if constexpr (Rule::kPacking == Packing::kSingle) {
    constexpr int kRun = kChannels / 4;
    uint32_t x01[kRows * kRun], x23[kRows * kRun];
    uint64_t row_index[kRows];
#pragma unroll
    for (int i = 0; i < kRows * kRun; ++i) x01[i] = x[i / kRun][i % kRun * 2], x23[i] = x[i / kRun][i % kRun * 2 + 1];
#pragma unroll
    for (int r = 0; r < kRows; ++r) row_index[r] = first_group + static_cast<uint64_t>(r) * groups_per_row;
    PackedQuad packed[kRows * kRun];
    int length[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) length[j] = channels_left - 4 * j;
    compress_quads<Rule, kRows * kRun, kRun>(x01, x23, row_index, length, parameters.stream, packed);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      metadata[r] = 0;
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        values[r][j] = packed[r * kRun + j].values;
        metadata[r] |= packed[r * kRun + j].nibble << (4 * j);
      }
    }
    return;
  }
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
      prune_and_pack<Rule, M>(group, {{index, index + groups_per_row}, {length, length}}, parameters,
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
  if constexpr (Rule::kPacking == Packing::kSingle) {
    static_assert(kRows == 4);
    uint32_t x01[kChannels], x23[kChannels];
#pragma unroll
    for (int p = 0; p < kChannels / 2; ++p) {
      x01[2 * p] = zip_low(x[0][p], x[1][p]), x01[2 * p + 1] = zip_high(x[0][p], x[1][p]);
      x23[2 * p] = zip_low(x[2][p], x[3][p]), x23[2 * p + 1] = zip_high(x[2][p], x[3][p]);
    }
    PackedQuad packed[kChannels];
    int length[kChannels];
#pragma unroll
    for (int e = 0; e < kChannels; ++e) length[e] = positions_left < kRows ? static_cast<int>(positions_left) : kRows;
    compress_quads<Rule, kChannels, kChannels>(x01, x23, {first_group}, length, parameters.stream, packed);
#pragma unroll
    for (int p = 0; p < kChannels / 2; ++p) {
      values[0][p] = zip_low(packed[2 * p].values, packed[2 * p + 1].values);
      values[1][p] = zip_high(packed[2 * p].values, packed[2 * p + 1].values);
      metadata[p] = packed[2 * p].nibble | packed[2 * p + 1].nibble << 16;
    }
    return;
  }
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
      prune_and_pack<Rule, M>(group, {{index, index + 1}, {length, length}}, parameters,
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

// The 8 channels from `channel` on of one position; channels that do not exist are +0.
__device__ __forceinline__ uint4 load_channels(const uint16_t* row, int64_t channel, int64_t channels, bool vector) {
  if (vector) return channel < channels ? __ldg(reinterpret_cast<const uint4*>(row + channel)) : uint4{};
  uint32_t pairs[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (channel + i < channels) pairs[i / 2] |= static_cast<uint32_t>(row[channel + i]) << (16 * (i & 1));
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Stores 8 channels of one row of a [.., c] output.
__device__ __forceinline__ void store_channels(uint16_t* row, int64_t channel, int64_t channels, bool vector,
                                               uint4 pairs) {
  if (vector) {
    if (channel < channels) *reinterpret_cast<uint4*>(row + channel) = pairs;
    return;
  }
  const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (channel + i < channels) row[channel + i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i & 1)));
  }
}

template <typename Element, typename Rule, int M, bool kWide>
__global__ void __launch_bounds__(kBlockThreads)
    prune_compress_kernel(const __grid_constant__ SdgpPruneCompress problem, const __grid_constant__ Cover cover) {
  using Traits = ElementTraits<Element>;
  constexpr int kRows = M, kChannels = kTileChannels<M>, kOctets = kChannels / 8;
  __shared__ float bias_sums[kBlockThreads][kChannels];

  const int lane = static_cast<int>(threadIdx.x) % cover.lanes;
  const int block_row = static_cast<int>(threadIdx.x) / cover.lanes;
  const int rows_per_block = kBlockThreads / cover.lanes;
  const int64_t position_block = blockIdx.x / cover.channel_blocks;
  const int64_t channel_block = blockIdx.x - position_block * cover.channel_blocks;
  const int64_t channel = (channel_block * cover.lanes + lane) * kChannels;
  const int64_t position = (position_block * rows_per_block + block_row) * kTilePositions;
  const int64_t c = problem.c, t = problem.t;

  const bool vector_loads = (reinterpret_cast<uintptr_t>(problem.dy) % 16 | problem.row_stride % 8 | c % 8) == 0;
  const bool vector_stores = c % 8 == 0;
  const auto* dy = static_cast<const uint16_t*>(problem.dy);
  const int channels_left = static_cast<int>(min(c - channel, int64_t{kChannels}));

  RuleParameters dgrad_parameters{{}, problem.eps}, wgrad_parameters{{}, problem.eps};
  if constexpr (Rule::kIsRandom) {
    dgrad_parameters.stream = load_stream(problem.seed, problem.rank, 0);
    wgrad_parameters.stream = load_stream(problem.seed, problem.rank, 1);
  }
  const uint64_t groups_per_row = static_cast<uint64_t>((c + M - 1) / M);

  auto load_step = [&](uint4 (&step)[kRows][kOctets], int first_row) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        const int64_t row = position + first_row + r;
        step[r][o] = row < t ? load_channels(dy + row * problem.row_stride, channel + 8 * o, c, vector_loads) : uint4{};
      }
    }
  };

  uint4 next[kRows][kOctets];
  uint32_t wgrad_metadata[kChannels / 2] = {};
  float bias[kChannels] = {};
  load_step(next, 0);
#pragma unroll 1
  for (int step = 0; step < kTilePositions; step += kRows) {
    uint32_t x[kRows][kChannels / 2];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        x[r][4 * o] = next[r][o].x, x[r][4 * o + 1] = next[r][o].y;
        x[r][4 * o + 2] = next[r][o].z, x[r][4 * o + 3] = next[r][o].w;
      }
    }
    if (step + kRows < kTilePositions) load_step(next, step + kRows);
    const int64_t row = position + step;

    if (problem.bias_partials != nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < kChannels; ++e) bias[e] += Traits::to_float(x[r][e / 2] >> (16 * (e & 1)) & 0xffffu);
      }
    }

    if (problem.dgrad_values != nullptr && row < t) {
      uint32_t values[kRows][kChannels / 4], metadata[kRows];
      const uint64_t first_group = static_cast<uint64_t>(row) * groups_per_row + static_cast<uint64_t>(channel / M);
      auto compress = [&](const auto& scope) {
        compress_along_channels<Rule, M, kRows, kChannels>(x, first_group, groups_per_row, channels_left,
                                                           dgrad_parameters, scope, values, metadata);
      };
      if constexpr (kWide) {
        const bool single = problem.positions_per_sample == 0;
        compress(WideScope<Element>{problem.dgrad_scale + (single ? 0 : channel), single ? 0 : c, row,
                                    problem.positions_per_sample, channels_left});
      } else {
        compress(GroupScope{});
      }
      if (channel < problem.dgrad_k) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (row + r >= t) break;
          auto* value_row = static_cast<uint32_t*>(problem.dgrad_values) + ((row + r) * problem.dgrad_k + channel) / 4;
          auto* metadata_row = static_cast<uint8_t*>(problem.dgrad_metadata) + ((row + r) * problem.dgrad_k + channel) / 8;
          if constexpr (kChannels == 8) {
            *reinterpret_cast<uint2*>(value_row) = {values[r][0], values[r][1]};
            *metadata_row = static_cast<uint8_t>(metadata[r]);
          } else {
            *reinterpret_cast<uint4*>(value_row) = {values[r][0], values[r][1], values[r][2], values[r][3]};
            *reinterpret_cast<uint16_t*>(metadata_row) = static_cast<uint16_t>(metadata[r]);
          }
        }
      }
    }

    if (problem.wgrad_values != nullptr && row < problem.wgrad_k && channel < c) {
      uint32_t values[kRows / 2][kChannels / 2], metadata[kChannels / 2];
      const uint64_t first_group = static_cast<uint64_t>(row / M) * static_cast<uint64_t>(c) + static_cast<uint64_t>(channel);
      auto compress = [&](const auto& scope) {
        compress_along_positions<Rule, M, kRows, kChannels>(x, first_group, static_cast<uint64_t>(c), t - row,
                                                            wgrad_parameters, scope, values, metadata);
      };
      if constexpr (kWide) {
        const bool single = problem.positions_per_sample == 0;
        compress(WideScope<Element>{problem.wgrad_scale + (single ? 0 : channel), single ? 0 : c, row,
                                    problem.positions_per_sample, channels_left});
      } else {
        compress(GroupScope{});
      }
#pragma unroll
      for (int v = 0; v < kRows / 2; ++v) {
        auto* value_row = static_cast<uint16_t*>(problem.wgrad_values) + (row / 2 + v) * c;
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
          store_channels(value_row, channel + 8 * o, c, vector_stores,
                         {values[v][4 * o], values[v][4 * o + 1], values[v][4 * o + 2], values[v][4 * o + 3]});
        }
      }
#pragma unroll
      for (int p = 0; p < kChannels / 2; ++p) wgrad_metadata[p] |= metadata[p] << step;
    }
  }

  if (problem.wgrad_values != nullptr && position < problem.wgrad_k) {
    auto* metadata_row = static_cast<uint16_t*>(problem.wgrad_metadata) + position / 16 * c;
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      store_channels(metadata_row, channel + 8 * o, c, vector_stores,
                     {wgrad_metadata[4 * o], wgrad_metadata[4 * o + 1], wgrad_metadata[4 * o + 2],
                      wgrad_metadata[4 * o + 3]});
    }
  }

  // Sums of the block's positions, added up in a fixed order.
  if (problem.bias_partials != nullptr) {
#pragma unroll
    for (int e = 0; e < kChannels; ++e) bias_sums[threadIdx.x][e] = bias[e];
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < cover.lanes * kChannels; e += kBlockThreads) {
      const int64_t target = channel_block * cover.lanes * kChannels + e;
      if (target >= c) continue;
      float sum = 0.0f;
      for (int r = 0; r < rows_per_block; ++r) sum += bias_sums[r * cover.lanes + e / kChannels][e % kChannels];
      problem.bias_partials[position_block * c + target] = sum;
    }
  }
}

}  // namespace sdgp
