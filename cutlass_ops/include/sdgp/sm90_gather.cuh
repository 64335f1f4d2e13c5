// Where the producer finds the tiles of A and B, and where the epilogue puts the tiles of D: the one thing in which a
// convolution differs from a matrix product.
//
//   MatrixGather   D = A * B, all three plain matrices
//   DgradGather    rows of A are pixels of the compressed gradient, k runs over filter taps and, inside a tap, channels
//   WgradGather    k runs over output pixels; columns of B are activations under one filter tap, 64 channels at a time
//
// TMA's im2col mode walks the pixels of an image in memory order and adds a tap's offset to each, zero outside the
// image; so a tap costs the producer two small integers, and the padding costs nothing.
#pragma once

#include <climits>

#include "sdgp/fast_division.cuh"
#include "sdgp/sm90_ptx.cuh"

namespace sdgp::sm90 {

constexpr int kStageK = 64;                     // k per stage of B; a k tile
constexpr int kBlockK = 128;                    // k per block of A: 64 stored values and 8 metadata words of a row
constexpr int kBlockTiles = kBlockK / kStageK;  // k tiles per block of A
constexpr int kSlabM = 64;                      // rows per wgmma
constexpr int kSwizzleElements = 64;            // 16-bit elements in a 128-byte swizzled row

struct TensorMaps {
  CUtensorMap values, metadata, b;
};

// The k tiles of one part of a product.
struct KRange {
  int begin, end;
};

// A range of k tiles that is cut between blocks of A into parts, the first ones longer by a block where it is uneven.
struct SplitRange {
  int k_tiles, part_blocks, longer_parts;

  SplitRange(int k_tiles, int parts) : k_tiles(k_tiles) {
    const int blocks = (k_tiles + kBlockTiles - 1) / kBlockTiles;
    part_blocks = blocks / parts;
    longer_parts = blocks % parts;
  }
  __device__ __forceinline__ int begin(int part) const {
    return min((part * part_blocks + min(part, longer_parts)) * kBlockTiles, k_tiles);
  }
  __device__ __forceinline__ KRange operator()(int part) const { return {begin(part), begin(part + 1)}; }
};

// Consecutive columns of D that a tile's columns map to; `count` <= 0 where there are none.
struct ColumnRun {
  int first, count;
};

// The first of 64 columns of B to load for column `column` of a tile: beyond the last column of the matrix, the last 64
// again, whose columns of D are not stored. Loads that lie outside altogether were slow: with 2 of 18 of them on an
// H100, 25 to 40 % on the whole product.
__device__ __forceinline__ int column_inside(int column, int columns) {
  return min(column, (columns - 1) / kSwizzleElements * kSwizzleElements);
}

// A block of A as a matrix: [m, k] for Major::K, [k, m] for Major::MN, compressed along k.
template <Major kMajorA, int kBlockM>
__device__ __forceinline__ void load_matrix_values(const CUtensorMap& map, uint32_t barrier, uint32_t tile, int row,
                                                   int k_tile) {
  const int value = k_tile * (kStageK / 2);
  if constexpr (kMajorA == Major::K) {
    tma_load(&map, barrier, tile, value, row);
  } else {
#pragma unroll
    for (int slab = 0; slab < kBlockM / kSlabM; ++slab)
      tma_load(&map, barrier, tile + slab * (kSlabM * kBlockK), row + slab * kSlabM, value);
  }
}

template <Major kMajorA, int kBlockM>
__device__ __forceinline__ void load_matrix_metadata(const CUtensorMap& map, uint32_t barrier, uint32_t tile, int row,
                                                     int k_tile) {
  const int word = k_tile * (kStageK / 16);
  if constexpr (kMajorA == Major::K) {
    tma_load(&map, barrier, tile, word, row);
  } else {
#pragma unroll
    for (int slab = 0; slab < kBlockM / kSlabM; ++slab)
      tma_load(&map, barrier, tile + slab * (kSlabM * 16), row + slab * kSlabM, word);
  }
}

struct MatrixGather {
  static constexpr int kProducerRegisters = 40;
  static constexpr bool kHasEmptyParts = false;
  int m, n;
  SplitRange split;

  __device__ __forceinline__ KRange k_range(int part) const { return split(part); }

  // A block of A holds two k tiles, counted from the start of a segment of k. A range of k begins with a segment, or,
  // where clusters share a tile, anywhere with a block: `in_segment` says how many k tiles of the segment are before.
  __device__ __forceinline__ int segment_tiles() const { return INT_MAX; }
  __device__ __forceinline__ int in_segment(int) const { return 0; }
  __device__ __forceinline__ int64_t out_row(int row, int) const { return row < m ? row : -1; }
  __device__ __forceinline__ ColumnRun out_columns(int column) const { return {column, n - column}; }

  template <Major kMajorA, int kBlockM, int kColumnBlocks>
  struct Producer {
    const MatrixGather& gather;
    const TensorMaps& maps;
    int row, column, k_tile, b_row;

    __device__ __forceinline__ Producer(const MatrixGather& gather, const TensorMaps& maps, int, int row, int column,
                                        int k_tile, int first_b_row)
        : gather(gather), maps(maps), row(row), column(column), k_tile(k_tile), b_row(k_tile * kStageK + first_b_row) {}
    __device__ __forceinline__ void advance() { ++k_tile, b_row += kStageK; }
    __device__ __forceinline__ void load_values(uint32_t barrier, uint32_t tile) const {
      load_matrix_values<kMajorA, kBlockM>(maps.values, barrier, tile, row, k_tile);
    }
    __device__ __forceinline__ void load_metadata(uint32_t barrier, uint32_t tile) const {
      load_matrix_metadata<kMajorA, kBlockM>(maps.metadata, barrier, tile, row, k_tile);
    }
    __device__ __forceinline__ void load_b(uint32_t barrier, uint32_t target, int block, int cluster_size) const {
      const int b_column = column_inside(column + block * kSwizzleElements, gather.n);
      tma_load(&maps.b, barrier, target, cluster_size, b_column, b_row);
    }
  };
};

// The pixels of one image that the gather starts from, in the coordinates of the gathered tensor: pixel (i, j) starts
// at (lower_h + i * step_h, lower_w + j * step_w).
struct PixelGrid {
  int height = 0, width = 0;
  int lower_h = 0, lower_w = 0;
  int step_h = 1, step_w = 1;
  FastDivision by_height, by_width;

  PixelGrid() = default;
  PixelGrid(int height, int width, int lower_h, int lower_w, int step_h, int step_w)
      : height(height),
        width(width),
        lower_h(lower_h),
        lower_w(lower_w),
        step_h(step_h),
        step_w(step_w),
        by_height(height),
        by_width(width) {}
};

struct PixelStart {
  int n, h, w;
};

// From one pixel of a grid to the one `pixels` further on: images, lines of one, pixels of one.
struct PixelStep {
  int images, lines, pixels;

  PixelStep(const PixelGrid& grid, int pixels)
      : images(pixels / (int64_t{grid.height} * grid.width)),
        lines(pixels / grid.width - images * grid.height),
        pixels(pixels % grid.width) {}
};

__device__ __forceinline__ PixelStart pixel_start(const PixelGrid& grid, int pixel) {
  const int line = grid.by_width.quotient(pixel), n = grid.by_height.quotient(line);
  return {n, grid.lower_h + (line - n * grid.height) * grid.step_h,
          grid.lower_w + (pixel - line * grid.width) * grid.step_w};
}

// One spatial dimension of a dgrad: pixel first + i * stride of dX, for each first < stride (its residue modulo the
// stride), meets gradient pixels under `taps` of the filter's taps. Tap t of those is tap first_tap + t * tap_step of
// the filter and reads gradient pixel lower + i + last_offset - t * offset_step, `lower` being the same for all
// residues.
constexpr int kMaxStride = 8;  // TMA's im2col mode has no larger ones

struct Residue {
  int taps, first_tap, last_offset;
};

struct DgradAxis {
  int extent, stride;  // of dX
  int tap_step, offset_step;
  Residue residues[kMaxStride];
};

// dX[pixels, C_in], part by part: a part is the pixels whose residues modulo the stride are the same, since only
// certain taps meet a gradient pixel there. Each part has the rows of the largest; those beyond its last pixel are not
// stored.
struct DgradGather {
  static constexpr int kProducerRegisters = 56;
  static constexpr bool kHasEmptyParts = true;  // a stride beyond the filter's reach leaves pixels without a tap
  PixelGrid grid;                               // rows of a part, over dY
  int pixels, n;                                // rows of a part, columns of D
  FastDivision by_tap;                          // k tiles of one tap: C_out / 64 rounded up
  int taps_w;                                   // of the whole filter, in a row
  DgradAxis vertical, horizontal;
  uint8_t parts[kMaxStride * kMaxStride];  // vertical residue * kMaxStride + horizontal one, longest k range first

  __device__ __forceinline__ const Residue& row_residue(int part) const {
    return vertical.residues[parts[part] / kMaxStride];
  }
  __device__ __forceinline__ const Residue& column_residue(int part) const {
    return horizontal.residues[parts[part] % kMaxStride];
  }
  __device__ __forceinline__ KRange k_range(int part) const {
    return {0, row_residue(part).taps * column_residue(part).taps * by_tap.divisor};
  }
  __device__ __forceinline__ int segment_tiles() const { return by_tap.divisor; }
  __device__ __forceinline__ int in_segment(int k_tile) const {
    return k_tile - by_tap.quotient(k_tile) * by_tap.divisor;
  }
  __device__ __forceinline__ int64_t out_row(int row, int part) const {
    if (row >= pixels) return -1;
    if (vertical.stride == 1 && horizontal.stride == 1) return row;
    const int line = grid.by_width.quotient(row), image = grid.by_height.quotient(line);
    const int h = parts[part] / kMaxStride + (line - image * grid.height) * vertical.stride;
    const int w = parts[part] % kMaxStride + (row - line * grid.width) * horizontal.stride;
    if (h >= vertical.extent || w >= horizontal.extent) return -1;
    return (static_cast<int64_t>(image) * vertical.extent + h) * horizontal.extent + w;
  }
  __device__ __forceinline__ ColumnRun out_columns(int column) const { return {column, n - column}; }

  template <Major kMajorA, int kBlockM, int kColumnBlocks>
  struct Producer {
    static_assert(kMajorA == Major::K);
    const DgradGather& gather;
    const TensorMaps& maps;
    const PixelStart start;
    const Residue columns;
    int column, first_b_row, channel, u, tap, offset_h, offset_w;

    __device__ __forceinline__ Producer(const DgradGather& gather, const TensorMaps& maps, int part, int row,
                                        int column, int k_tile, int first_b_row)
        : gather(gather),
          maps(maps),
          start(pixel_start(gather.grid, row)),
          columns(gather.column_residue(part)),
          column(column),
          first_b_row(first_b_row),
          channel(0),
          u(0) {
      const Residue& rows = gather.row_residue(part);
      tap = rows.first_tap * gather.taps_w + columns.first_tap;
      offset_h = rows.last_offset;
      offset_w = columns.last_offset;
      if (k_tile == 0) return;
      const int met = gather.by_tap.quotient(k_tile), t = met / columns.taps;
      u = met - t * columns.taps;
      channel = (k_tile - met * gather.by_tap.divisor) * kStageK;
      tap += t * gather.vertical.tap_step * gather.taps_w + u * gather.horizontal.tap_step;
      offset_h -= t * gather.vertical.offset_step;
      offset_w -= u * gather.horizontal.offset_step;
    }
    __device__ __forceinline__ void advance() {
      channel += kStageK;
      if (channel < gather.by_tap.divisor * kStageK) return;
      channel = 0;
      tap += gather.horizontal.tap_step;
      offset_w -= gather.horizontal.offset_step;
      if (++u < columns.taps) return;
      u = 0;
      tap += gather.vertical.tap_step * gather.taps_w - columns.taps * gather.horizontal.tap_step;
      offset_w = columns.last_offset;
      offset_h -= gather.vertical.offset_step;
    }
    __device__ __forceinline__ void load_values(uint32_t barrier, uint32_t tile) const {
      tma_load_im2col(&maps.values, barrier, tile, 1, channel / 2, start.w, start.h, start.n, offset_w, offset_h);
    }
    __device__ __forceinline__ void load_metadata(uint32_t barrier, uint32_t tile) const {
      tma_load_im2col(&maps.metadata, barrier, tile, 1, channel / 16, start.w, start.h, start.n, offset_w, offset_h);
    }
    __device__ __forceinline__ void load_b(uint32_t barrier, uint32_t target, int block, int cluster_size) const {
      const int b_column = column_inside(column + block * kSwizzleElements, gather.n);
      tma_load_3d(&maps.b, barrier, target, cluster_size, b_column, tap, channel + first_b_row);
    }
  };
};

// dW[C_out, taps * C_in]. Columns of the product are counted in blocks of 64, `blocks_per_tap` for each tap.
struct WgradGather {
  static constexpr int kProducerRegisters = 56;
  static constexpr bool kHasEmptyParts = false;
  PixelGrid grid;  // output pixels, over X
  int m;
  SplitRange split;
  int channels, taps, taps_w, blocks_per_tap, dilation_h, dilation_w;
  PixelStep step;  // from one k tile to the next

  __device__ __forceinline__ KRange k_range(int part) const { return split(part); }
  __device__ __forceinline__ int segment_tiles() const { return INT_MAX; }
  __device__ __forceinline__ int in_segment(int) const { return 0; }
  __device__ __forceinline__ int64_t out_row(int row, int) const { return row < m ? row : -1; }
  __device__ __forceinline__ ColumnRun out_columns(int column) const {
    const int block = column / kSwizzleElements, tap = block / blocks_per_tap;
    const int channel = column - tap * blocks_per_tap * kSwizzleElements;
    return {tap * channels + channel, tap < taps ? channels - channel : 0};
  }

  template <Major kMajorA, int kBlockM, int kColumnBlocks>
  struct Producer {
    static_assert(kMajorA == Major::MN);
    const WgradGather& gather;
    const TensorMaps& maps;
    PixelStart start;
    int row, k_tile;
    int channel[kColumnBlocks], offsets[kColumnBlocks];  // of the column blocks; offset_w | offset_h << 16

    __device__ __forceinline__ Producer(const WgradGather& gather, const TensorMaps& maps, int, int row, int column,
                                        int k_tile, int first_b_row)
        : gather(gather),
          maps(maps),
          start(pixel_start(gather.grid, k_tile * kStageK + first_b_row)),
          row(row),
          k_tile(k_tile) {
#pragma unroll
      for (int i = 0; i < kColumnBlocks; ++i) {
        const int block = column / kSwizzleElements + i, tap = block / gather.blocks_per_tap;
        const int t = tap / gather.taps_w, u = tap - t * gather.taps_w;
        // Blocks past the last tap still owe their bytes to the barrier: they load the first block of the first tap.
        channel[i] = tap < gather.taps ? (block - tap * gather.blocks_per_tap) * kSwizzleElements : 0;
        offsets[i] = tap < gather.taps ? u * gather.dilation_w | t * gather.dilation_h << 16 : 0;
      }
    }
    __device__ __forceinline__ void advance() {
      const PixelGrid& grid = gather.grid;
      ++k_tile;
      start.n += gather.step.images;
      start.w += gather.step.pixels * grid.step_w;
      start.h += gather.step.lines * grid.step_h;
      if (start.w >= grid.lower_w + grid.width * grid.step_w) {
        start.w -= grid.width * grid.step_w;
        start.h += grid.step_h;
      }
      if (start.h >= grid.lower_h + grid.height * grid.step_h) {
        start.h -= grid.height * grid.step_h;
        ++start.n;
      }
    }
    __device__ __forceinline__ void load_values(uint32_t barrier, uint32_t tile) const {
      load_matrix_values<kMajorA, kBlockM>(maps.values, barrier, tile, row, k_tile);
    }
    __device__ __forceinline__ void load_metadata(uint32_t barrier, uint32_t tile) const {
      load_matrix_metadata<kMajorA, kBlockM>(maps.metadata, barrier, tile, row, k_tile);
    }
    __device__ __forceinline__ void load_b(uint32_t barrier, uint32_t target, int block, int cluster_size) const {
      tma_load_im2col(&maps.b, barrier, target, cluster_size, channel[block], start.w, start.h, start.n,
                      offsets[block] & 0xffff, offsets[block] >> 16);
    }
  };
};

}  // namespace sdgp::sm90
