// How a launch of the kernels of scope_scales.cuh covers dY; host and device agree on it.
#pragma once

#include <cstdint>

#include "sdgp/prune_compress_cover.h"

namespace sdgp {

// Rows of a block, at most: enough to hide its beginning and end, few enough for blocks on every multiprocessor.
constexpr int64_t kPartRows = 256;

// Blocks of `lanes` threads along channels; parts of a sample; samples. Channels run fastest.
struct ScopeCover {
  int lane_bits, lanes;
  unsigned channel_blocks, parts;
  int64_t samples, rows, part_rows;  // rows: of a sample

  int64_t blocks() const { return static_cast<int64_t>(channel_blocks) * parts * samples; }
};

inline ScopeCover cover_scopes(int64_t t, int64_t c, int64_t positions_per_sample) {
  const Cover lanes = cover_matrix(t, c, 0);
  const int64_t rows = positions_per_sample == 0 ? t : positions_per_sample;
  const int64_t parts = (rows + kPartRows - 1) / kPartRows;
  return {lanes.lane_bits, lanes.lanes, lanes.channel_blocks,      static_cast<unsigned>(parts),
          t / rows,        rows,        (rows + parts - 1) / parts};
}

}  // namespace sdgp
