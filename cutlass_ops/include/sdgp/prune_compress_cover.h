// How a launch of the prune+compress kernel covers dY; host and device agree on it.
#pragma once

#include <cstdint>

namespace sdgp {

constexpr int kBlockThreads = 128;
constexpr int kTilePositions = 16;  // per thread

constexpr int kTileChannels = 8;  // per thread

// Blocks of `lanes` threads along channels times kBlockThreads / lanes along positions; channels run fastest.
struct Cover {
  int lane_bits, lanes;
  unsigned channel_blocks;
  int64_t position_blocks;
};

// 32 lanes give the longest runs of memory; a narrow layer takes fewer, so that at most 1 in 16 is idle. Never 1:
// groups of 16 channels are shared by two lanes.
inline Cover cover_matrix(int64_t t, int64_t c, int64_t wgrad_k) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t tiles = ceil_div(c, 16) * 2;
  int lane_bits = 5;
  while (lane_bits > 1 && (ceil_div(tiles, 1 << lane_bits) << lane_bits) * 16 > tiles * 17) --lane_bits;
  const int64_t positions = t > wgrad_k ? t : wgrad_k;
  return {lane_bits, 1 << lane_bits, static_cast<unsigned>(ceil_div(tiles, 1 << lane_bits)),
          ceil_div(positions, (kBlockThreads >> lane_bits) * kTilePositions)};
}

}  // namespace sdgp
