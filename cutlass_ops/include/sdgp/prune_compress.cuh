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

#include <climits>

#include "sdgp/group_rules.cuh"
#include "sdgp/metadata.cuh"
#include "sdgp/tile_io.cuh"

namespace sdgp {

// Which sample the rows of a tile belong to.
class SampleWalk {
 public:
  // offset of the current row's sample in a table [samples, c], 0 where one sample is everything.
  int64_t offset;

  __device__ __forceinline__ SampleWalk(int64_t row, int64_t t, int64_t c, int64_t positions_per_sample)
      : offset(0),
        stride_(c),
        left_(INT_MAX),
        rows_per_sample_(static_cast<int>(min(positions_per_sample, int64_t{INT_MAX}))),
        rows_left_(static_cast<int>(min(t - row, int64_t{INT_MAX}))) {
    if (positions_per_sample == 0 || rows_left_ <= 0) return;
    const int64_t sample = row / positions_per_sample;
    offset = sample * c;
    left_ = static_cast<int>(min((sample + 1) * positions_per_sample - row, int64_t{INT_MAX}));
  }

  // Whether the next `rows` that exist are of one sample.
  __device__ __forceinline__ bool stays(int rows) const { return left_ >= min(rows, rows_left_); }

  // Beyond the last row of dY it stands still.
  __device__ __forceinline__ void advance(int rows) {
    rows_left_ -= rows, left_ -= rows;
    while (left_ <= 0 && rows_left_ > 0) offset += stride_, left_ += rows_per_sample_;
  }

 private:
  int64_t stride_;
  int left_, rows_per_sample_, rows_left_;  // left_: rows left in the sample
};

// rescale_magnitude over more than one group: one factor per sample and channel, or a single one, for kChannels
// channels from `channel` on. They are loaded for every step anew: from the L1 cache, which costs less than registers.
template <typename Element, int kChannels>
class ScopeFactors {
 public:
  __device__ __forceinline__ ScopeFactors(const float* table, int64_t channel, int64_t c, bool is_single)
      : table_(table + (is_single ? 0 : channel)),
        channels_left_(static_cast<int>(min(c - channel, int64_t{kChannels}))),
        is_single_(is_single),
        is_vector_(c % 4 == 0 && reinterpret_cast<uintptr_t>(table) % 16 == 0) {}

  // Those of the sample at `offset`.
  __device__ __forceinline__ void load(int64_t offset) {
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < kChannels; e += 4) {
      float4 four{1.0f, 1.0f, 1.0f, 1.0f};
      if (is_single_) {
        four.x = four.y = four.z = four.w = __ldg(table_);
      } else if (is_vector_ && e < channels_left_) {
        four = __ldg(reinterpret_cast<const float4*>(table_ + offset + e));
      } else if (!is_vector_) {
        if (e < channels_left_) four.x = __ldg(table_ + offset + e);
        if (e + 1 < channels_left_) four.y = __ldg(table_ + offset + e + 1);
        if (e + 2 < channels_left_) four.z = __ldg(table_ + offset + e + 2);
        if (e + 3 < channels_left_) four.w = __ldg(table_ + offset + e + 3);
      }
      factors_[e] = four.x, factors_[e + 1] = four.y, factors_[e + 2] = four.z, factors_[e + 3] = four.w;
      sum += (four.x + four.y) + (four.z + four.w);
    }
    are_finite_ = isfinite(sum);
  }

  // scaled = x times the factors, rounded.
  __device__ __forceinline__ void scale(const uint32_t (&x)[kChannels / 2], uint32_t (&scaled)[kChannels / 2]) const {
    using Traits = ElementTraits<Element>;
#pragma unroll
    for (int p = 0; p < kChannels / 2; ++p) {
      // The sum with +0 turns -0 into +0 and nothing else; a factor that is not finite turns zeros into NaN.
      const uint32_t product = pack_floats<Element>(__fmaf_rn(Traits::to_float(x[p] & 0xffffu), factors_[2 * p], 0.0f),
                                                    __fmaf_rn(Traits::to_float(x[p] >> 16), factors_[2 * p + 1], 0.0f));
      scaled[p] = are_finite_ ? product : product & nonzero_mask(x[p]);
    }
  }

 private:
  const float* table_;
  int channels_left_;
  bool is_single_, is_vector_, are_finite_ = true;
  float factors_[kChannels];
};

// Prunes a pair of groups and packs its quads. kIsScaled: the kept values are those of `scaled`.
template <typename Rule, int M, bool kIsScaled>
__device__ __forceinline__ void prune_and_pack(uint32_t (&x)[M], uint32_t (&scaled)[M], const GroupPair& groups,
                                               const RuleParameters& parameters, PackedQuads (&packed)[M / 4]) {
  if constexpr (kIsScaled) {
    uint32_t keep[M];
    Rule::keep(x, keep);
    if constexpr (Rule::kPacking == Packing::kPair) {
      packed[0] = pack_kept(scaled, keep);
      return;
    }
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] = scaled[i] & keep[i];
  } else if constexpr (Rule::kPacking == Packing::kPair) {
    packed[0] = Rule::pack(x, parameters);
    return;
  } else {
    Rule::prune(x, groups, parameters);
  }
#pragma unroll
  for (int quad = 0; quad < M / 4; ++quad) {
    packed[quad] = pack_pruned({x[4 * quad], x[4 * quad + 1], x[4 * quad + 2], x[4 * quad + 3]});
  }
}

// A queue in registers drops its first item and takes another one at its end: a loop that need not be unrolled goes
// through items and results in this way, since registers have no index. In an unrolled loop it costs nothing.
template <int kItems, int kSize>
__device__ __forceinline__ void push(uint32_t (&queue)[kItems][kSize], const uint32_t (&last)[kSize]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) queue[i][e] = i + 1 < kItems ? queue[i + 1][e] : last[e];
  }
}
template <int kItems>
__device__ __forceinline__ void push(uint32_t (&queue)[kItems], uint32_t last) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) queue[i] = i + 1 < kItems ? queue[i + 1] : last;
}

// The work in registers, along either axis. x[r][p] holds channels 2p (low half) and 2p + 1 (high half) of position r;
// kRows and kChannels are multiples of M. kIsScaled: x decides what is kept, the values come from `scaled`; otherwise
// that is x, too.

// Groups along channels. values[r][j]: the two kept of quad j of position r; metadata[r]: 4 bits per quad.
// first_group: index of the group that starts at x[0][0]; a position has groups_per_row groups.
template <typename Rule, int M, int kRows, int kChannels, bool kIsScaled>
__device__ __forceinline__ void compress_along_channels(const uint32_t (&x)[kRows][kChannels / 2],
                                                        const uint32_t (&scaled)[kRows][kChannels / 2],
                                                        uint64_t first_group, uint64_t groups_per_row,
                                                        int channels_left, const RuleParameters& parameters,
                                                        uint32_t (&values)[kRows][kChannels / 4],
                                                        uint32_t (&metadata)[kRows]) {
  uint32_t rows[kRows][kChannels / 2], scaled_rows[kRows][kChannels / 2];
#pragma unroll
  for (int r = 0; r < kRows; ++r) push(rows, x[r]), push(scaled_rows, scaled[r]);
#pragma unroll(Rule::kIsLong ? 1 : kRows / 2)
  for (int r = 0; r < kRows; r += 2) {
    uint32_t nibbles = 0, kept[2][kChannels / 4];
#pragma unroll
    for (int g = 0; g < kChannels / M; ++g) {
      uint32_t group[M], scaled_group[M];  // low half: position r, high half: position r + 1
#pragma unroll
      for (int i = 0; i < M; i += 2) {
        const int p = (g * M + i) / 2;
        group[i] = zip_low(rows[0][p], rows[1][p]), group[i + 1] = zip_high(rows[0][p], rows[1][p]);
        scaled_group[i] = zip_low(scaled_rows[0][p], scaled_rows[1][p]);
        scaled_group[i + 1] = zip_high(scaled_rows[0][p], scaled_rows[1][p]);
      }
      const uint64_t index = first_group + static_cast<uint64_t>(r) * groups_per_row + g;
      const int length = channels_left - g * M;
      PackedQuads packed[M / 4];
      prune_and_pack<Rule, M, kIsScaled>(group, scaled_group, {{index, index + groups_per_row}, {length, length}},
                                         parameters, packed);
#pragma unroll
      for (int quad = 0; quad < M / 4; ++quad) {
        const int j = g * (M / 4) + quad;
        kept[0][j] = zip_low(packed[quad].low, packed[quad].high);
        kept[1][j] = zip_high(packed[quad].low, packed[quad].high);
        nibbles |= packed[quad].nibbles << (4 * j);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      push(values, kept[half]), push(metadata, nibbles >> 16 * half & 0xffffu);
      push(rows, rows[0]), push(scaled_rows, scaled_rows[0]);
    }
  }
}

// Groups along positions. values[v][p]: the v-th kept value of channels 2p and 2p + 1; metadata[p]: 4 bits per quad of
// each channel, from bit 0 of its half on. first_group: index of the group that starts at x[0][0].
template <typename Rule, int M, int kRows, int kChannels, bool kIsScaled>
__device__ __forceinline__ void compress_along_positions(const uint32_t (&x)[kRows][kChannels / 2],
                                                         const uint32_t (&scaled)[kRows][kChannels / 2],
                                                         uint64_t first_group, uint64_t groups_per_row,
                                                         int64_t positions_left, const RuleParameters& parameters,
                                                         uint32_t (&values)[kRows / 2][kChannels / 2],
                                                         uint32_t (&metadata)[kChannels / 2]) {
  constexpr int kPairs = kChannels / 2;
  uint32_t columns[kPairs][kRows], scaled_columns[kPairs][kRows], kept_columns[kPairs][kRows / 2];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) columns[p][r] = x[r][p], scaled_columns[p][r] = scaled[r][p];
  }
#pragma unroll(Rule::kIsLong ? 1 : kPairs)
  for (int p = 0; p < kPairs; ++p) {
    uint32_t word = 0, kept[kRows / 2];
#pragma unroll
    for (int g = 0; g < kRows / M; ++g) {
      uint32_t group[M], scaled_group[M];
#pragma unroll
      for (int i = 0; i < M; ++i) group[i] = columns[0][g * M + i], scaled_group[i] = scaled_columns[0][g * M + i];
      const uint64_t index = first_group + static_cast<uint64_t>(g) * groups_per_row + 2 * p;
      const int length = static_cast<int>(positions_left < kRows ? positions_left : kRows) - g * M;
      PackedQuads packed[M / 4];
      prune_and_pack<Rule, M, kIsScaled>(group, scaled_group, {{index, index + 1}, {length, length}}, parameters,
                                         packed);
#pragma unroll
      for (int quad = 0; quad < M / 4; ++quad) {
        const int j = g * (M / 4) + quad;
        kept[2 * j] = packed[quad].low;
        kept[2 * j + 1] = packed[quad].high;
        word |= packed[quad].nibbles << (4 * j);
      }
    }
    push(kept_columns, kept), push(metadata, word);
    push(columns, columns[0]), push(scaled_columns, scaled_columns[0]);
  }
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
#pragma unroll
    for (int v = 0; v < kRows / 2; ++v) values[v][p] = kept_columns[p][v];
  }
}

template <int kRows>
__device__ __forceinline__ void unpack_rows(const uint4 (&rows)[kRows], uint32_t (&x)[kRows][4]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) x[r][0] = rows[r].x, x[r][1] = rows[r].y, x[r][2] = rows[r].z, x[r][3] = rows[r].w;
}

// Compresses kRows x kChannels values along channels and stores them; the dgrad side of the kernel.
template <typename Rule, int M, int kRows, int kChannels, bool kIsScaled>
__device__ __forceinline__ void emit_dgrad(const SdgpPruneCompress& problem, const uint32_t (&x)[kRows][kChannels / 2],
                                           const uint32_t (&scaled)[kRows][kChannels / 2], int64_t row, int64_t channel,
                                           const RuleParameters& parameters) {
  const uint64_t groups_per_row = static_cast<uint64_t>((problem.c + M - 1) / M);
  const uint64_t first_group = static_cast<uint64_t>(row) * groups_per_row + static_cast<uint64_t>(channel / M);
  const int channels_left = static_cast<int>(max(min(problem.c - channel, int64_t{kChannels}), int64_t{0}));
  uint32_t values[kRows][kChannels / 4], metadata[kRows];
  compress_along_channels<Rule, M, kRows, kChannels, kIsScaled>(x, scaled, first_group, groups_per_row, channels_left,
                                                                parameters, values, metadata);
  DgradRows<kChannels> rows(problem, row, channel);
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows.store(values[r], metadata[r]);
}

// scaled = x times the factors of each row's sample; walk: at the first row.
template <typename Element, int kRows, int kChannels>
__device__ __forceinline__ void scale_rows(const uint32_t (&x)[kRows][kChannels / 2], SampleWalk walk,
                                           ScopeFactors<Element, kChannels>& factors,
                                           uint32_t (&scaled)[kRows][kChannels / 2]) {
  if (walk.stays(kRows)) {
    factors.load(walk.offset);
#pragma unroll
    for (int r = 0; r < kRows; ++r) factors.scale(x[r], scaled[r]);
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r, walk.advance(1)) {
    factors.load(walk.offset);
    factors.scale(x[r], scaled[r]);
  }
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

// Blocks on a multiprocessor: as many as the registers allow without spilling any.
template <typename Element, typename Rule, int M, bool kIsScaled>
__global__ void __launch_bounds__(kBlockThreads, M == 4 ? (kIsScaled || Rule::kIsRandom ? 3 : 4) : 1)
    prune_compress_kernel(const __grid_constant__ SdgpPruneCompress problem, const __grid_constant__ Cover cover) {
  constexpr int kRows = M, kChannels = kTileChannels;  // in registers at a time
  __shared__ float bias_sums[kBlockThreads][kChannels];

  const Place place(cover);
  const int64_t c = problem.c, t = problem.t, channel = place.channel, position = place.position;
  const int64_t padded_c = (c + 15) / 16 * 16;

  RuleParameters dgrad_parameters{{}, problem.eps}, wgrad_parameters{{}, problem.eps};
  if constexpr (Rule::kIsRandom) {
    dgrad_parameters.stream = load_stream(problem, 0);
    wgrad_parameters.stream = load_stream(problem, 1);
  }
  const bool is_single = problem.positions_per_sample == 0;
  SampleWalk walk(position, t, c, kIsScaled ? problem.positions_per_sample : 0);

  Rows rows(problem.dy, t, c, problem.row_stride, position, channel);
  uint4 next[kRows];
  uint32_t wgrad_metadata[kChannels / 2] = {};
  float bias[kChannels] = {};
  rows.load(next);
#pragma unroll 1
  for (int step = 0; step < kTilePositions; step += kRows) {
    const int64_t row = position + step;
    uint32_t x[kRows][kChannels / 2];
    unpack_rows(next, x);
    if (step + kRows < kTilePositions) rows.load(next);

    if (problem.bias != nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < kChannels; ++e) {
          bias[e] += ElementTraits<Element>::to_float(x[r][e / 2] >> (16 * (e & 1)) & 0xffffu);
        }
      }
    }

    // wgrad first: it needs the rows as they are, and they take no registers while dgrad has them widened.
    if (problem.wgrad_values != nullptr && row < problem.wgrad_k && channel < c) {
      uint32_t values[kRows / 2][kChannels / 2], metadata[kChannels / 2];
      const auto groups_per_row = static_cast<uint64_t>(c);
      const uint64_t first_group = static_cast<uint64_t>(row / M) * groups_per_row + static_cast<uint64_t>(channel);
      const int64_t left = t - row;
      if constexpr (kIsScaled) {
        ScopeFactors<Element, kChannels> factors(problem.wgrad_scale, channel, c, is_single);
        // What is kept needs half the products. Other packings look at the zeros among them.
        if (Rule::kPacking == Packing::kPair && walk.stays(kRows)) {
          compress_along_positions<Rule, M, kRows, kChannels, false>(x, x, first_group, groups_per_row, left,
                                                                     wgrad_parameters, values, metadata);
          factors.load(walk.offset);
#pragma unroll
          for (int v = 0; v < kRows / 2; ++v) factors.scale(values[v], values[v]);
        } else {
          uint32_t scaled[kRows][kChannels / 2];
          scale_rows(x, walk, factors, scaled);
          compress_along_positions<Rule, M, kRows, kChannels, true>(x, scaled, first_group, groups_per_row, left,
                                                                    wgrad_parameters, values, metadata);
        }
      } else {
        compress_along_positions<Rule, M, kRows, kChannels, false>(x, x, first_group, groups_per_row, left,
                                                                   wgrad_parameters, values, metadata);
      }
#pragma unroll
      for (int v = 0; v < kRows / 2; ++v) {
        store_channels(static_cast<uint16_t*>(problem.wgrad_values) + (row / 2 + v) * problem.wgrad_pitch, channel,
                       problem.wgrad_pitch, {values[v][0], values[v][1], values[v][2], values[v][3]});
      }
#pragma unroll
      for (int p = 0; p < kChannels / 2; ++p) wgrad_metadata[p] |= metadata[p] << step;
    }

    if (problem.dgrad_values != nullptr) {
      if constexpr (M == 16) {
        const bool odd = place.lane % 2 != 0;
        const int64_t first_row = row + (odd ? 8 : 0), first_channel = channel - (odd ? 8 : 0);
        uint32_t wide[8][8];
        widen(x, odd, wide);
        if (first_row < t && first_channel < c) {
          if constexpr (kIsScaled) {
            uint32_t scaled[8][8];
            ScopeFactors<Element, 16> factors(problem.dgrad_scale, first_channel, c, is_single);
            scale_rows(wide, SampleWalk(first_row, t, c, problem.positions_per_sample), factors, scaled);
            emit_dgrad<Rule, M, 8, 16, true>(problem, wide, scaled, first_row, first_channel, dgrad_parameters);
          } else {
            emit_dgrad<Rule, M, 8, 16, false>(problem, wide, wide, first_row, first_channel, dgrad_parameters);
          }
        }
      } else if (row < t && channel < padded_c) {
        if constexpr (kIsScaled) {
          uint32_t scaled[kRows][kChannels / 2];
          ScopeFactors<Element, kChannels> factors(problem.dgrad_scale, channel, c, is_single);
          scale_rows(x, walk, factors, scaled);
          emit_dgrad<Rule, M, kRows, kChannels, true>(problem, x, scaled, row, channel, dgrad_parameters);
        } else {
          emit_dgrad<Rule, M, kRows, kChannels, false>(problem, x, x, row, channel, dgrad_parameters);
        }
      }
    }
    walk.advance(kRows);
  }

  if (problem.dgrad_values != nullptr) pad_dgrad(problem, cover, place, padded_c);
  if (problem.wgrad_values != nullptr && position < problem.wgrad_k) {
    store_wgrad_metadata(problem, position, channel, wgrad_metadata);
  }
  if (problem.bias != nullptr) store_bias_partials(problem, cover, place, bias, bias_sums);
}

}  // namespace sdgp
