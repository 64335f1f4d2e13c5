// How a launch of the prune+compress kernel covers dY; host and device agree on it.
#pragma once

#include <cstdint>

namespace sdgp {

constexpr int kBlockThreads = 128;
constexpr int kTilePositions = 16;  // per thread

template <int M>
constexpr int kTileChannels = M == 16 ? 16 : 8;  // per thread

// Blocks of `lanes` threads along channels times kBlockThreads / lanes along positions; channels run fastest.
struct Cover {
  int lanes;
  int64_t channel_blocks, position_blocks;
};

// 32 lanes give the longest runs of memory; a narrow layer takes fewer, so that at most 1 in 16 is idle.
inline Cover cover_matrix(int64_t positions, int64_t channels, int tile_channels) {
  const int64_t tiles = (channels + tile_channels - 1) / tile_channels;
  int64_t lanes = 32;
  while (lanes > 1 && (tiles + lanes - 1) / lanes * lanes * 16 > tiles * 17) lanes /= 2;
  const int64_t block_positions = kBlockThreads / lanes * kTilePositions;
  return {static_cast<int>(lanes), (tiles + lanes - 1) / lanes, (positions + block_positions - 1) / block_positions};
}

}  // namespace sdgp
