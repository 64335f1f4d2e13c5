// Which tile a cluster of CTAs computes next, and of which k. A unit of a cluster is `cluster_size` tiles above each
// other; a product has m_units x n_tiles x parts of them.
//
// Units take turns at the clusters in rounds. Those of a last round that would leave clusters idle can be shared: every
// such unit has an owner, a cluster that computes its first `owned_blocks` blocks of k, and the rest of all of them is
// cut into equal stretches for the clusters left over, the helpers. A helper stores the accumulators of every piece of
// its stretch in the workspace and sets flags; the owner waits for them, adds the pieces in the order of k (the same
// bits on every run) and stores the tile. Stream-K (Osama et al., PPoPP 2023) cuts all of a product into such
// stretches. Here owners walk k in step with each other, as they do in whole rounds, so that what they read is shared
// in L2, and only the helpers' pieces, not every cluster's, go through the workspace.
//
// Helpers are the clusters with the lowest numbers, and they wait for nobody. GPUs start thread blocks in the order of
// their numbers (CUDA does not promise it; CUB's look-back scans rely on it, too), so that helpers start no later than the
// owners that wait for them, and what else occupies the GPU cannot bring about a deadlock.
#pragma once

#include <algorithm>

#include "sdgp/fast_division.cuh"
#include "sdgp/sm90_gather.cuh"

namespace sdgp::sm90 {

// What a CTA computes at a time.
struct WorkUnit {
  int m_tile, n_tile, part;
  KRange k;  // in units of kStageK
};

// What becomes of a unit's result. `pieces`: how many of helpers to add before it is stored, none to a unit that is not
// shared; kHelps: it is such a piece itself. `slot`: in the workspace, of the first piece or this one.
struct Sharing {
  int pieces, slot;
};
constexpr int kHelps = -1;

// Divisions by these numbers are made fast: with the GPU's own ones every tile of every CTA began with 1000 cycles of
// them, of 14500 for 128x256 tiles of k = 1024 (clock64 on an H200).
//
// Parts outermost (CTAs that run together share k, hence B), then groups of `group_n` tile columns, then rows, then the
// columns of the group. What a part is, the gather knows: a stretch of k, or of the rows.
struct Schedule {
  int units;  // shared work included: one more for each helper and owner, instead of the shared ones
  int n_tiles, cluster_size;
  FastDivision by_part, by_group, by_columns, by_last_columns;  // `by_last_columns`: of the last group

  int whole_units, k_tiles = 0, owned_blocks = 0;
  int helpers = 0, helped_blocks = 0;  // helped: blocks of k, of all shared units
  FastDivision by_tail, by_stretch;    // blocks of k: of one unit beyond its owner's, of a helper

  Schedule(int m_units, int n_tiles, int parts, int group_n, int cluster_size)
      : units(m_units * n_tiles * parts),
        n_tiles(n_tiles),
        cluster_size(cluster_size),
        by_part(m_units * n_tiles),
        by_group(m_units * std::min(group_n, n_tiles)),
        by_columns(std::min(group_n, n_tiles)),
        by_last_columns((n_tiles - 1) % by_columns.divisor + 1),
        whole_units(units) {}

  // Shares the last round of `clusters` clusters, if it is not full: they may be fewer than when `owned_blocks` was
  // chosen. False where k is too short. Of one part.
  bool share_last_round(int clusters, int k_tiles, int owned_blocks) {
    if (clusters < 1) return false;
    const int shared_units = units % clusters, blocks = (k_tiles + kBlockTiles - 1) / kBlockTiles;
    if (shared_units == 0) return true;
    const int64_t helped_blocks = int64_t{shared_units} * (blocks - owned_blocks);
    if (owned_blocks < 1 || helped_blocks < 1 || helped_blocks > INT_MAX / 2) return false;
    const auto stretch = static_cast<int>((helped_blocks - 1) / (clusters - shared_units) + 1);
    helpers = static_cast<int>((helped_blocks - 1) / stretch + 1);
    whole_units = units - shared_units;
    units = whole_units + helpers + shared_units;
    this->k_tiles = k_tiles;
    this->owned_blocks = owned_blocks;
    this->helped_blocks = static_cast<int>(helped_blocks);
    by_tail = FastDivision(blocks - owned_blocks);
    by_stretch = FastDivision(stretch);
    return true;
  }

  // The unit of CTA `cta_rank` of a cluster. `index` counts units and, behind the whole ones, clusters at shared work;
  // `position`: how many blocks of k of its stretch a helper has done.
  template <bool kSharesTiles, typename Gather>
  __device__ __forceinline__ WorkUnit unit(int index, int position, int cta_rank, const Gather& gather) const {
    if constexpr (kSharesTiles) {
      if (index >= whole_units) {
        const int worker = index - whole_units;
        if (worker >= helpers)
          return tile(whole_units + worker - helpers, 0, cta_rank, {0, owned_blocks * kBlockTiles});
        const Piece piece = piece_at(index, position);
        const int first = owned_blocks + piece.skipped, last = first + piece.blocks;
        return tile(whole_units + piece.unit, 0, cta_rank, {first * kBlockTiles, min(last * kBlockTiles, k_tiles)});
      }
    }
    const int part = by_part.quotient(index);
    return tile(index - part * by_part.divisor, part, cta_rank, gather.k_range(part));
  }

  // The consumers keep none of this while they multiply: registers are short.
  __device__ __forceinline__ Sharing sharing(int index, int position) const {
    const int worker = index - whole_units;
    if (worker < 0) return {0, 0};
    // A piece's slot is its unit's number among the shared ones plus its helper's: the next piece, in the order of k,
    // is another unit's or another helper's.
    if (worker < helpers) return {kHelps, piece_at(index, position).unit + worker};
    const int unit = worker - helpers, tail = by_tail.divisor;
    const int first = by_stretch.quotient(unit * tail), last = by_stretch.quotient(unit * tail + tail - 1);
    return {last - first + 1, unit + first};
  }

  template <bool kSharesTiles>
  __device__ __forceinline__ void advance(int& index, int& position, int clusters) const {
    if constexpr (kSharesTiles) {
      const int worker = index - whole_units;
      if (worker >= 0 && worker < helpers) {
        position += piece_at(index, position).blocks;
        if (position < min(by_stretch.divisor, helped_blocks - worker * by_stretch.divisor)) return;
      }
    }
    index += clusters;
  }

 private:
  // A helper's piece: of which shared unit, behind how many blocks of others' pieces, and how long. The last unit ends
  // with the last helper's stretch, or before it.
  struct Piece {
    int unit, skipped, blocks;
  };

  __device__ __forceinline__ Piece piece_at(int index, int position) const {
    const int tail = by_tail.divisor, stretch = by_stretch.divisor, first = (index - whole_units) * stretch;
    const int begin = first + position, unit = by_tail.quotient(begin), skipped = begin - unit * tail;
    return {unit, skipped, min(tail - skipped, first + stretch - begin)};
  }

  __device__ __forceinline__ WorkUnit tile(int index, int part, int cta_rank, const KRange& k) const {
    const int group = by_group.quotient(index), in_group = index - group * by_group.divisor;
    const int first_column = group * by_columns.divisor;
    const FastDivision& by = first_column + by_columns.divisor < n_tiles ? by_columns : by_last_columns;
    const int row = by.quotient(in_group);
    return {row * cluster_size + cta_rank, first_column + in_group - row * by.divisor, part, k};
  }
};

}  // namespace sdgp::sm90
