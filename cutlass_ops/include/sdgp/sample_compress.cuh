// mvue and random with 2:4: prune+compress for the rules of quad_rules.cuh, whose limit is arithmetic, not memory.
//
// A thread has the same tile as in prune_compress.cuh. Its rows wait in a column of shared memory that no other thread
// touches: asynchronous copies bring them there two steps of four rows ahead of use, and a loop can index them, so that
// the code of four quads serves all (that of sixteen would overflow the instruction cache).
#pragma once

#include "sdgp/quad_rules.cuh"
#include "sdgp/tile_io.cuh"

namespace sdgp {

constexpr int kBatch = 4;  // quads at a time: as many as hide each other's latency

// 16 bytes from global to shared memory; zeros where they do not exist.
__device__ __forceinline__ void copy_async(uint4* target, const void* source, bool exists) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Of all groups of copies but the last.
__device__ __forceinline__ void wait_for_earlier_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// Four quads in registers, x01 and x23. Quad i is group `group` + i / 2 * stride + i % 2 and has length_of(i) elements,
// all four where `whole`; the groups have the upper half of `group` in common, as `random` supposes, where `close`.
template <typename Rule, typename LengthOf>
__device__ __forceinline__ void compress_batch(const uint32_t (&x01)[kBatch], const uint32_t (&x23)[kBatch],
                                               uint64_t group, uint64_t stride, const Stream& stream,
                                               const TilePhilox& random, bool close, bool whole,
                                               const LengthOf& length_of, PackedQuad (&packed)[kBatch]) {
  const bool ordinary = close && (whole || !Rule::kNeedsLength);
  uint32_t irregular = 0;
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const uint32_t lower = static_cast<uint32_t>(group + i / 2 * stride + i % 2);
    bool regular = ordinary;
    packed[i] = Rule::compress(x01[i], x23[i], random(lower), regular);
    if (!regular) irregular |= 1u << i;
  }
  if (irregular == 0) return;
  if (ordinary) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if ((irregular >> i & 1) != 0 && Rule::compress_sparse(x01[i], x23[i], packed[i])) irregular &= ~(1u << i);
    }
  }
#pragma unroll 1
  while (irregular != 0) {
    const int quad = __ffs(static_cast<int>(irregular)) - 1;
    irregular &= irregular - 1;
    uint32_t first = x01[0], second = x23[0];
#pragma unroll
    for (int i = 1; i < kBatch; ++i) {
      if (i == quad) first = x01[i], second = x23[i];
    }
    const uint64_t index = group + quad / 2 * stride + quad % 2;
    const PackedQuad rare = Rule::compress_any(first, second, philox(stream, index, 0), length_of(quad));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (i == quad) packed[i] = rare;
    }
  }
}

template <typename Rule>
__global__ void __launch_bounds__(kBlockThreads, Rule::kBlocksPerMultiprocessor)
    sample_compress_kernel(const __grid_constant__ SdgpPruneCompress problem, const __grid_constant__ Cover cover) {
  constexpr int kRows = 4, kSteps = kTilePositions / kRows;
  __shared__ uint4 stages[2][kRows][kBlockThreads];
  __shared__ float bias_sums[kBlockThreads][kTileChannels];

  const Place place(cover);
  const int64_t c = problem.c, t = problem.t, channel = place.channel, position = place.position;
  const bool vector_loads = can_load_vectors(problem.dy, c, problem.row_stride);
  const auto* source = static_cast<const uint16_t*>(problem.dy) + position * problem.row_stride + channel;
  const auto channels_left = static_cast<int>(min(c - channel, int64_t{kTileChannels}));
  int rows_left = channel < c ? static_cast<int>(min(t - position, int64_t{kTilePositions})) : 0;
  // The next four rows, to stage `stage`; each call for the rows after the last one's.
  auto fetch = [&](int stage) {
    if (vector_loads) {
#pragma unroll
      for (int r = 0; r < kRows; ++r, source += problem.row_stride) {
        copy_async(&stages[stage][r][threadIdx.x], source, r < rows_left);
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r, source += problem.row_stride) {
        stages[stage][r][threadIdx.x] = r < rows_left ? load_channels(source, channels_left) : uint4{};
      }
    }
    rows_left -= kRows;
    commit_copies();
  };
  fetch(0);

  const Stream streams[2] = {load_stream(problem, 0), load_stream(problem, 1)};
  const RoundKeys keys(streams[0]);  // the streams differ only in their counters
  // Groups along channels and along positions: how many there are in a row of groups, and the tile's first.
  const auto quads_per_row = static_cast<uint64_t>((c + 3) / 4);
  uint64_t dgrad_group = static_cast<uint64_t>(position) * quads_per_row + static_cast<uint64_t>(channel / 4);
  uint64_t wgrad_group =
      static_cast<uint64_t>(position / 4) * static_cast<uint64_t>(c) + static_cast<uint64_t>(channel);
  const TilePhilox dgrad_random(streams[0], keys, dgrad_group), wgrad_random(streams[1], keys, wgrad_group);
  const bool dgrad_close = dgrad_group >> 32 == (dgrad_group + kTilePositions * quads_per_row) >> 32;
  const bool wgrad_close = wgrad_group >> 32 == (wgrad_group + kSteps * static_cast<uint64_t>(c) + kTileChannels) >> 32;
  const bool has_dgrad = problem.dgrad_values != nullptr && channel < (c + 7) / 8 * 8;
  const bool has_wgrad = problem.wgrad_values != nullptr && channel < c;
  DgradRows<kTileChannels> dgrad_rows(problem, position, channel);
  auto* wgrad_values = static_cast<uint16_t*>(problem.wgrad_values) + position / 2 * problem.wgrad_pitch;

  uint32_t nibbles[kSteps] = {};  // of wgrad's quads, eight channels of a step in a word
  float bias[kTileChannels] = {};
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    const int64_t row = position + step * kRows;
    if (step + 1 < kSteps) {
      fetch((step + 1) % 2);
    } else {
      commit_copies();
    }
    wait_for_earlier_copies();
    auto& rows = stages[step % 2];

    if (problem.bias != nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint4 x = rows[r][threadIdx.x];
        const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < kTileChannels; ++e) {
          bias[e] += ElementTraits<typename Rule::Element>::to_float(pairs[e / 2] >> (16 * (e & 1)) & 0xffffu);
        }
      }
    }

    if (has_dgrad) {
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const uint4 x0 = rows[2 * half][threadIdx.x], x1 = rows[2 * half + 1][threadIdx.x];
        PackedQuad packed[kBatch];
        compress_batch<Rule>(
            {x0.x, x0.z, x1.x, x1.z}, {x0.y, x0.w, x1.y, x1.w}, dgrad_group, quads_per_row, streams[0], dgrad_random,
            dgrad_close, channels_left == kTileChannels, [&](int i) { return channels_left - 4 * (i % 2); }, packed);
#pragma unroll
        for (int r = 0; r < kBatch; r += 2) {
          dgrad_rows.store({packed[r].values, packed[r + 1].values},
                           append_nibble(append_nibble(0, packed[r + 1]), packed[r]));
        }
        dgrad_group += 2 * quads_per_row;
      }
    }

    if (has_wgrad && row < problem.wgrad_k) {
      uint32_t word = 0;
#pragma unroll 1
      for (int half = 1; half >= 0; --half) {  // channels 4..7, then 0..3
        uint2 x[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) x[r] = reinterpret_cast<const uint2*>(&rows[r][threadIdx.x])[half];
        PackedQuad packed[kBatch];
        compress_batch<Rule>(
            {zip_low(x[0].x, x[1].x), zip_high(x[0].x, x[1].x), zip_low(x[0].y, x[1].y), zip_high(x[0].y, x[1].y)},
            {zip_low(x[2].x, x[3].x), zip_high(x[2].x, x[3].x), zip_low(x[2].y, x[3].y), zip_high(x[2].y, x[3].y)},
            wgrad_group + 4 * half, 2, streams[1], wgrad_random, wgrad_close, t - row >= kRows,
            [&](int) { return static_cast<int>(min(t - row, int64_t{kRows})); }, packed);
#pragma unroll
        for (int i = kBatch - 1; i >= 0; --i) word = append_nibble(word, packed[i]);
        // In the place of what has been read: the first and the second kept of each quad.
        reinterpret_cast<uint2*>(&rows[0][threadIdx.x])[half] = {zip_low(packed[0].values, packed[1].values),
                                                                 zip_low(packed[2].values, packed[3].values)};
        reinterpret_cast<uint2*>(&rows[1][threadIdx.x])[half] = {zip_high(packed[0].values, packed[1].values),
                                                                 zip_high(packed[2].values, packed[3].values)};
      }
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        store_channels(wgrad_values + v * problem.wgrad_pitch, channel, problem.wgrad_pitch, rows[v][threadIdx.x]);
      }
#pragma unroll
      for (int s = 0; s + 1 < kSteps; ++s) nibbles[s] = nibbles[s + 1];
      nibbles[kSteps - 1] = word;
    }
    wgrad_values += 2 * problem.wgrad_pitch;
    wgrad_group += static_cast<uint64_t>(c);
  }

  if (problem.dgrad_values != nullptr) pad_dgrad(problem, cover, place, (c + 7) / 8 * 8);
  if (has_wgrad && position < problem.wgrad_k) {
    uint32_t metadata[kTileChannels / 2];
#pragma unroll
    for (int p = 0; p < kTileChannels / 2; ++p) {
      metadata[p] = 0;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const uint32_t pair = nibbles[s] >> (8 * p);
        metadata[p] |= (pair & 0xfu) << (4 * s) | (pair >> 4 & 0xfu) << (4 * s + 16);
      }
    }
    store_wgrad_metadata(problem, position, channel, metadata);
  }
  if (problem.bias != nullptr) store_bias_partials(problem, cover, place, bias, bias_sums);
}

}  // namespace sdgp
