// How the prune+compress kernels read dY and write the operands, for the tile of one thread: 16 positions x 8 channels.
#pragma once

#include <climits>

#include "sdgp/metadata.cuh"
#include "sdgp/prune_compress_api.h"
#include "sdgp/prune_compress_cover.h"

namespace sdgp {

// 8 channels of one position, of which `count` exist; the others are +0.
__device__ __forceinline__ uint4 load_channels(const uint16_t* source, int count) {
  uint32_t pairs[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) pairs[i / 2] |= static_cast<uint32_t>(source[i]) << (16 * (i & 1));
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Stores 8 channels of one row of a [.., channels] output that begins at a multiple of 16 bytes.
__device__ __forceinline__ void store_channels(uint16_t* row, int64_t channel, int64_t channels, uint4 pairs) {
  if (channels % 8 == 0) {
    if (channel < channels) *reinterpret_cast<uint4*>(row + channel) = pairs;
    return;
  }
  const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (channel + i < channels) row[channel + i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i & 1)));
  }
}

// The thread's place in dY.
struct Place {
  int lane, block_row, rows_per_block;
  unsigned channel_block, position_block;
  int64_t channel, position;  // the first ones of its tile

  __device__ __forceinline__ explicit Place(const Cover& cover)
      : lane(static_cast<int>(threadIdx.x) & (cover.lanes - 1)),
        block_row(static_cast<int>(threadIdx.x) >> cover.lane_bits),
        rows_per_block(kBlockThreads >> cover.lane_bits) {
    const unsigned row_of_blocks = blockIdx.x / cover.channel_blocks;
    position_block = row_of_blocks;
    channel_block = blockIdx.x - row_of_blocks * cover.channel_blocks;
    channel = (int64_t{channel_block} * cover.lanes + lane) * kTileChannels;
    position = (int64_t{position_block} * rows_per_block + block_row) * kTilePositions;
  }
};

__device__ __forceinline__ bool can_load_vectors(const void* dy, int64_t c, int64_t row_stride) {
  return (reinterpret_cast<uintptr_t>(dy) % 16 | row_stride % 8 | c % 8) == 0;
}

// Rows of dY, 8 channels each, from (row, channel) on; what does not exist is +0.
class Rows {
 public:
  __device__ __forceinline__ Rows(const void* dy, int64_t t, int64_t c, int64_t row_stride, int64_t row,
                                  int64_t channel)
      : next_(static_cast<const uint16_t*>(dy) + row * row_stride + channel),
        row_stride_(row_stride),
        rows_left_(channel < c ? static_cast<int>(min(t - row, int64_t{INT_MAX})) : 0),
        channels_left_(static_cast<int>(min(c - channel, int64_t{kTileChannels}))),
        vector_(can_load_vectors(dy, c, row_stride)) {}

  // The next kRows.
  template <int kRows>
  __device__ __forceinline__ void load(uint4 (&rows)[kRows]) {
    if (vector_) {
#pragma unroll
      for (int r = 0; r < kRows; ++r, next_ += row_stride_) {
        rows[r] = r < rows_left_ ? __ldg(reinterpret_cast<const uint4*>(next_)) : uint4{};
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r, next_ += row_stride_) {
        rows[r] = r < rows_left_ ? load_channels(next_, channels_left_) : uint4{};
      }
    }
    rows_left_ -= kRows;
  }

 private:
  const uint16_t* next_;
  int64_t row_stride_;
  int rows_left_, channels_left_;
  bool vector_;
};

// Where the dgrad operand's rows of kChannels (8 or 16) go, from one position to the next.
template <int kChannels>
class DgradRows {
 public:
  __device__ __forceinline__ DgradRows(const SdgpPruneCompress& problem, int64_t row, int64_t channel)
      : problem_(problem),
        values_(static_cast<uint8_t*>(problem.dgrad_values) + row * problem.dgrad_k + channel),
        metadata_(static_cast<uint8_t*>(problem.dgrad_metadata) + (row * problem.dgrad_words * 16 + channel) / 8),
        row_(row),
        channel_(channel),
        rows_(static_cast<int>(min(problem.t - row, int64_t{kTilePositions}))) {}

  // values: two kept of each quad; metadata: 4 bits per quad. Rows beyond the last are not written.
  __device__ __forceinline__ void store(const uint32_t (&values)[kChannels / 4], uint32_t metadata) {
    if (done_ < rows_) {
      if constexpr (kChannels == 8) {
        *reinterpret_cast<uint2*>(values_) = {values[0], values[1]};
        *metadata_of_row() = static_cast<uint8_t>(metadata);
      } else {
        *reinterpret_cast<uint4*>(values_) = {values[0], values[1], values[2], values[3]};
        *reinterpret_cast<uint16_t*>(metadata_of_row()) = static_cast<uint16_t>(metadata);
      }
    }
    advance();
  }

  // A row where there is nothing: legal metadata and, where the operand goes as far, zeros.
  __device__ __forceinline__ void pad() {
    if (done_ < rows_) {
      if (channel_ < problem_.dgrad_k) *reinterpret_cast<uint2*>(values_) = {0, 0};
      *metadata_of_row() = 0x44;
    }
    advance();
  }

 private:
  __device__ __forceinline__ void advance() {
    ++done_, values_ += problem_.dgrad_k, metadata_ += 2 * problem_.dgrad_words;
  }

  __device__ __forceinline__ uint8_t* metadata_of_row() const {
    if (problem_.metadata_layout == SDGP_LAYOUT_ROW_MAJOR) return metadata_;
    return static_cast<uint8_t*>(problem_.dgrad_metadata) +
           tiled_word(problem_.metadata_layout, row_ + done_, channel_ / 16, problem_.t) * 2 + channel_ / 8 % 2;
  }

  const SdgpPruneCompress& problem_;
  uint8_t *values_, *metadata_;  // of the current row; metadata in row-major order
  int64_t row_, channel_;        // the first
  int rows_, done_ = 0;
};

// The dgrad operand from channel `first`, a multiple of 8, on.
__device__ __forceinline__ void pad_dgrad(const SdgpPruneCompress& problem, const Cover& cover, const Place& place,
                                          int64_t first) {
  if (place.channel_block != cover.channel_blocks - 1) return;
  for (int64_t channel = first + place.lane * kTileChannels; channel < problem.dgrad_words * 16;
       channel += cover.lanes * kTileChannels) {
    DgradRows<kTileChannels> rows(problem, place.position, channel);
    for (int r = 0; r < kTilePositions; ++r) rows.pad();
  }
}

// metadata[p]: the wgrad operand's words of channels 2p and 2p + 1 for the 16 positions from `position` on.
__device__ __forceinline__ void store_wgrad_metadata(const SdgpPruneCompress& problem, int64_t position,
                                                     int64_t channel, const uint32_t (&metadata)[kTileChannels / 2]) {
  const int64_t c = problem.c;
  auto* words = static_cast<uint16_t*>(problem.wgrad_metadata);
  if (problem.metadata_layout == SDGP_LAYOUT_ROW_MAJOR) {
    store_channels(words + position / 16 * problem.wgrad_pitch, channel, problem.wgrad_pitch,
                   {metadata[0], metadata[1], metadata[2], metadata[3]});
    return;
  }
#pragma unroll
  for (int e = 0; e < kTileChannels; ++e) {
    if (channel + e >= c) break;
    words[tiled_word(problem.metadata_layout, channel + e, position / 16, c)] =
        static_cast<uint16_t>(metadata[e / 2] >> (16 * (e & 1)));
  }
}

// bias: a thread's sums over its positions. All threads of the block take part; sums are added up in a fixed order.
__device__ __forceinline__ void store_bias_partials(const SdgpPruneCompress& problem, const Cover& cover,
                                                    const Place& place, const float (&bias)[kTileChannels],
                                                    float (&sums)[kBlockThreads][kTileChannels]) {
  if (int64_t{place.position_block} * place.rows_per_block * kTilePositions >= problem.t) return;
#pragma unroll
  for (int e = 0; e < kTileChannels; ++e) sums[threadIdx.x][e] = bias[e];
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < cover.lanes * kTileChannels; e += kBlockThreads) {
    const int64_t target = int64_t{place.channel_block} * cover.lanes * kTileChannels + e;
    if (target >= problem.c) continue;
    float sum = 0.0f;
    for (int r = 0; r < place.rows_per_block; ++r) sum += sums[r * cover.lanes + e / kTileChannels][e % kTileChannels];
    problem.bias_partials[place.position_block * problem.c + target] = sum;
  }
}

}  // namespace sdgp
