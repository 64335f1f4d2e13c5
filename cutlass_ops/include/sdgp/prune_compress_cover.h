// How a launch of the prune+compress kernel covers dY; host and device agree on it.
#pragma once

#include <cstdint>

namespace sdgp {

constexpr int kBlockThreads = 128;
constexpr int kTilePositions = 16;  // per thread

constexpr int kTileChannels = 8;  // per thread

// Blocks of `lanes` threads along channels times kBlockThreads / lanes along positions; channels run fastest.
struct Cover {
  int lanes;
  int64_t channel_blocks, position_blocks;
};

// 32 lanes give the longest runs of memory; a narrow layer takes fewer, so that at most 1 in 16 is idle. Never 1:
// groups of 16 channels are shared by two lanes. Operands padded beyond the next multiple of 16 only add blocks at the
// end.
inline Cover cover_matrix(int64_t t, int64_t c, int64_t dgrad_k, int64_t wgrad_k) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tiles = ceil_div(c, 16) * 2;
  int64_t lanes = 32;
  while (lanes > 2 && ceil_div(tiles, lanes) * lanes * 16 > tiles * 17) lanes /= 2;
  const int64_t positions = t > wgrad_k ? t : wgrad_k, channels = c > dgrad_k ? c : dgrad_k;
  return {static_cast<int>(lanes), ceil_div(channels, lanes * kTileChannels),
          ceil_div(positions, kBlockThreads / lanes * kTilePositions)};
}

}  // namespace sdgp
