// Where the tiles of A and B come from and where the tiles of D go: the one thing in which a convolution differs from a
// matrix product.
//
//   MatrixGather   D = A * B, all three plain matrices
//   DgradGather    rows of A are pixels of the compressed gradient, k runs over filter taps and, inside a tap, channels
//   WgradGather    k runs over output pixels; columns of B are activations under one filter tap
//
// A gather has parts (the residue classes of a strided dgrad, else one), each a product of its own, and a Loader, which
// copies the tiles of one thread block to shared memory, one k tile after the other, each in kCopies steps that the
// main loop can place where it likes. A 16-bit matrix moves in chunks of 8 values, 16 bytes: with cp.async where every
// row begins at a multiple of 16 bytes, as those of A always do and those of B with Tile::kAligned, else value by
// value. Chunks are swizzled, so that the 8 rows of a matrix of ldmatrix lie in different banks.
//
// Where the operands have no values, zeros are copied. Not every bit pattern of mma.sp's metadata is legal, zeros are
// not: to zero values goes the metadata of a row that exists, which is legal to the end of its padding.
#pragma once

#include <climits>

#include "sdgp/dgrad_residue.cuh"
#include "sdgp/fast_division.cuh"
#include "sdgp/product.cuh"
#include "sdgp/sm80_ptx.cuh"

namespace sdgp::sm80 {

constexpr int kTileK = 64;               // k per tile: one stage of the pipeline
constexpr int kTileValues = kTileK / 2;  // stored values of one row of A
constexpr int kTileWords = kTileK / 16;  // metadata words of one row of A
constexpr int kChunk = 8;                // 16-bit values in 16 bytes

// Which way A is contiguous: [m, k] for K, [k, m] for MN.
enum class Major : int { K = 0, MN = 1 };

// One product of a gather: its rows, and the tiles that its k range has.
struct Part {
  int rows, k_tiles;
};

// Where a chunk of columns of D goes in a row of the output; `count` <= 0 where nowhere.
struct ColumnRun {
  int64_t first;
  int count;
};

// Copies `count` values, 1 to 8, to a chunk of shared memory, and zeros to its rest; only zeros where nothing `exists`.
template <bool kAligned>
__device__ __forceinline__ void copy_chunk(uint32_t target, const uint16_t* source, bool exists, int count) {
  if constexpr (kAligned) {
    cp_async<16>(target, source, exists);
  } else {
    if (!exists) count = 0;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < count ? source[2 * i] : 0, high = 2 * i + 1 < count ? source[2 * i + 1] : 0;
      words[i] = low | high << 16;
    }
    store_shared_v4(target, words);
  }
}

// ---- A ----------------------------------------

// How the threads share a tile of A with k contiguous: a warp copies 32 rows, four lanes the values of a row, 8 rows at
// a time, and each lane the metadata of one row. In shared memory: 64 bytes of values per row, chunk c of row r at c ^
// (r / 2 % 4); 8 bytes of metadata per row, those of rows r and r + 16 side by side, the pairs as swizzled by
// metadata_pair(): the 16 rows that half a warp copies lie in different banks.
template <typename Tile>
struct KMajorTile {
  static constexpr int kCopies = 4, kRowStep = 8, kRowBytes = kTileValues * 2;
  static_assert(Tile::kThreads == Tile::kBlockM);

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ static int chunk() { return lane() % 4; }
  __device__ __forceinline__ static int row(int i) {
    return static_cast<int>(threadIdx.x) / 32 * 32 + lane() / 4 + i * kRowStep;
  }
  __device__ __forceinline__ static int metadata_row() { return row(lane() % 4); }
  // Where the rows r and r + 16 of pair `pair` lie; 32 rows are 16 pairs.
  __device__ __forceinline__ static int metadata_pair(int pair) { return (pair ^ pair / 8 % 2 * 4) * 16; }
  __device__ __forceinline__ static uint32_t target(uint32_t stage, int i) {
    return stage + row(i) * kRowBytes + (chunk() ^ (row(0) / 2 % 4)) * 16;
  }
  __device__ __forceinline__ static uint32_t metadata_target(uint32_t stage) {
    const int row = metadata_row();
    return stage + Tile::kMetadataAt + row / 32 * 256 + metadata_pair(row % 16) + row / 16 % 2 * 8;
  }
};

// A as a matrix [m, k]: values [m, padded_k / 2], metadata [m, metadata_pitch(padded_k)].
template <typename Tile>
struct KMajorMatrix {
  using Layout = KMajorTile<Tile>;
  static constexpr int kCopies = Layout::kCopies;

  const uint16_t *values, *metadata;  // of this thread's chunk in its first row, and of its row of metadata
  int64_t pitch;
  int rows_left;  // from the first row to the end of the matrix

  __device__ __forceinline__ KMajorMatrix(const void* all_values, const void* all_metadata, int m, int padded_k,
                                          int first_row, int k_tile)
      : pitch(padded_k / 2), rows_left(m - first_row - Layout::row(0)) {
    const int64_t row = first_row + Layout::row(0), metadata_row = min(first_row + Layout::metadata_row(), m - 1);
    values = static_cast<const uint16_t*>(all_values) + row * pitch + k_tile * kTileValues + Layout::chunk() * kChunk;
    metadata =
        static_cast<const uint16_t*>(all_metadata) + metadata_row * metadata_pitch(padded_k) + k_tile * kTileWords;
  }

  __device__ __forceinline__ void load(int copy, uint32_t stage, bool exists) const {
    const int step = copy * Layout::kRowStep;
    cp_async<16>(Layout::target(stage, copy), values + step * pitch, exists && step < rows_left);
    if (copy == 0) cp_async<8>(Layout::metadata_target(stage), metadata, exists);
  }

  __device__ __forceinline__ void advance() { values += kTileValues, metadata += kTileWords; }
};

// A of any pixels: values [pixels, padded_k / 2], metadata [pixels, metadata_pitch(padded_k)].
template <typename Tile>
struct KMajorPixels {
  using Layout = KMajorTile<Tile>;
  static constexpr int kCopies = Layout::kCopies;

  const uint8_t *values, *metadata;
  int value_pitch, metadata_pitch;  // in bytes, like the addresses: one multiply-add each

  __device__ __forceinline__ KMajorPixels(const void* values, const void* metadata, int padded_k)
      : values(static_cast<const uint8_t*>(values) + Layout::chunk() * 16),
        metadata(static_cast<const uint8_t*>(metadata)),
        value_pitch(padded_k),
        metadata_pitch(static_cast<int>(sdgp::metadata_pitch(padded_k)) * 2) {}

  // pixels[i]: whose values row i of this thread shows, -1 for zeros; metadata_pixel: whose metadata its row of
  // metadata does. k_tile: inside the operand's rows.
  __device__ __forceinline__ void load(int copy, uint32_t stage, const int (&pixels)[kCopies], int metadata_pixel,
                                       int k_tile, bool exists) const {
    cp_async<16>(Layout::target(stage, copy), values + k_tile * kTileValues * 2 + int64_t{pixels[copy]} * value_pitch,
                 exists && pixels[copy] != -1);
    if (copy == 0) {
      cp_async<8>(Layout::metadata_target(stage),
                  metadata + k_tile * kTileWords * 2 + int64_t{metadata_pixel} * metadata_pitch, exists);
    }
  }
};

// A with m contiguous: values [padded_k / 2, pitch], metadata [padded_k / 16, pitch], rows in whole chunks. In shared
// memory: rows of kBlockM values, chunk c of row r at c ^ (r % 8), and rows of kBlockM words, chunk c of row r at c ^
// 2r.
template <typename Tile>
struct MMajorMatrix {
  static constexpr int kChunks = Tile::kBlockM / kChunk, kRowStep = Tile::kThreads / kChunks;
  static constexpr int kCopies = kTileValues / kRowStep, kRowBytes = Tile::kBlockM * 2;
  static_assert(kRowStep % 8 == 0 && kTileValues % kRowStep == 0);

  const uint16_t *values, *metadata;  // of this thread's chunk, in its first row of the k tile
  int64_t pitch;
  bool has_values;

  __device__ __forceinline__ MMajorMatrix(const void* all_values, const void* all_metadata, int m, int first_m,
                                          int k_tile)
      : pitch(operand_pitch(m)) {
    const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks, column = first_m + chunk * kChunk;
    has_values = column < m;
    values = static_cast<const uint16_t*>(all_values) + (int64_t{k_tile} * kTileValues + row) * pitch + column;
    metadata = static_cast<const uint16_t*>(all_metadata) + (int64_t{k_tile} * kTileWords + row) * pitch +
               min(int64_t{column}, pitch - kChunk);
  }

  __device__ __forceinline__ void load(int copy, uint32_t stage, bool exists) const {
    const uint32_t chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
    const int step = copy * kRowStep;
    cp_async<16>(stage + row * kRowBytes + (chunk ^ row % 8) * 16 + step * kRowBytes, values + step * pitch,
                 exists && has_values);
    if (copy == 0 && row < kTileWords)
      cp_async<16>(stage + Tile::kMetadataAt + row * kRowBytes + (chunk ^ 2 * row) * 16, metadata, exists);
  }

  __device__ __forceinline__ void advance() { values += kTileValues * pitch, metadata += kTileWords * pitch; }
};

// ---- B ----------------------------------------

// How the threads share a tile of B: each copies one chunk of every kRowStep-th row. In shared memory: rows of kBlockN
// values, chunk c of row r at c ^ (r % 8).
template <typename Tile>
struct TileOfB {
  static constexpr int kChunks = Tile::kBlockN / kChunk, kRowStep = Tile::kThreads / kChunks;
  static constexpr int kCopies = kTileK / kRowStep, kRowBytes = Tile::kBlockN * 2;
  static_assert(kRowStep % 8 == 0 && kTileK % kRowStep == 0);

  __device__ __forceinline__ static int chunk() { return threadIdx.x % kChunks; }
  __device__ __forceinline__ static int row(int i) { return static_cast<int>(threadIdx.x) / kChunks + i * kRowStep; }
  __device__ __forceinline__ static uint32_t target(uint32_t stage, int i) {
    return stage + Tile::kOperandBAt + row(i) * kRowBytes + (chunk() ^ row(0) % 8) * 16;
  }
};

// B as a matrix [k, n] whose rows are `pitch` values apart.
template <typename Tile>
struct MatrixB {
  using Layout = TileOfB<Tile>;
  static constexpr int kCopies = Layout::kCopies;

  const uint16_t* source;  // of this thread's chunk, in its first row of the k tile
  int64_t pitch;
  int rows_left;  // from that row to the end of the matrix; none where there is no such column
  int count;

  __device__ __forceinline__ MatrixB(const void* b, int64_t pitch, int k, int n, int first_column, int first_row)
      : pitch(pitch) {
    const int column = first_column + Layout::chunk() * kChunk, row = first_row + Layout::row(0);
    count = min(n - column, kChunk);
    source = static_cast<const uint16_t*>(b) + row * pitch + column;
    rows_left = count > 0 ? k - row : 0;
  }

  __device__ __forceinline__ void load(int copy, uint32_t stage, bool exists) const {
    const int step = copy * Layout::kRowStep;
    copy_chunk<Tile::kAligned>(Layout::target(stage, copy), source + step * pitch, exists && step < rows_left, count);
  }

  __device__ __forceinline__ void advance() { source += kTileK * pitch, rows_left -= kTileK; }
};

// ---- matrices ----------------------------------------

// A Loader of two operands that know by themselves where their tiles are.
template <typename A, typename B>
struct OperandLoader {
  static constexpr int kCopies = A::kCopies + B::kCopies;

  A a;
  B b;

  // Copies a part of the tile, or zeros where it does not exist.
  __device__ __forceinline__ void load(int copy, uint32_t stage, bool exists) const {
    if (copy < A::kCopies) {
      a.load(copy, stage, exists);
    } else {
      b.load(copy - A::kCopies, stage, exists);
    }
  }
  __device__ __forceinline__ void advance() { a.advance(), b.advance(); }
};

struct MatrixGather {
  const void *values, *metadata, *b;
  int m, n, k, padded_k;

  __host__ __device__ int parts() const { return 1; }
  __device__ __forceinline__ Part part(int) const { return {m, (k + kTileK - 1) / kTileK}; }
  __device__ __forceinline__ int64_t out_row(int, int row) const { return row < m ? row : -1; }
  __device__ __forceinline__ ColumnRun out_columns(int column) const { return {column, min(n - column, kChunk)}; }

  template <typename Tile>
  struct KMajorLoader : OperandLoader<KMajorMatrix<Tile>, MatrixB<Tile>> {
    __device__ __forceinline__ KMajorLoader(const MatrixGather& gather, int, int row, int column, int k_tile)
        : OperandLoader<KMajorMatrix<Tile>, MatrixB<Tile>>{
              {gather.values, gather.metadata, gather.m, gather.padded_k, row, k_tile},
              {gather.b, gather.n, gather.k, gather.n, column, k_tile * kTileK}} {}
  };

  template <typename Tile>
  struct MMajorLoader : OperandLoader<MMajorMatrix<Tile>, MatrixB<Tile>> {
    __device__ __forceinline__ MMajorLoader(const MatrixGather& gather, int, int row, int column, int k_tile)
        : OperandLoader<MMajorMatrix<Tile>, MatrixB<Tile>>{
              {gather.values, gather.metadata, gather.m, row, k_tile},
              {gather.b, gather.n, gather.k, gather.n, column, k_tile * kTileK}} {}
  };

  template <typename Tile>
  using Loader = std::conditional_t<Tile::kMajorA == Major::K, KMajorLoader<Tile>, MMajorLoader<Tile>>;
};

// ---- dgrad of a convolution ----------------------------------------

struct DgradAxis {
  int in, out, filter, stride, padding, dilation;
  int tap_step, offset_step;

  __host__ __device__ int classes() const { return stride < in ? stride : in; }
  __host__ __device__ int positions(int first) const { return (in - first + stride - 1) / stride; }
  __host__ __device__ ResidueClass residue_class(int first) const {
    return sdgp::residue_class(first, filter, stride, padding, dilation, tap_step);
  }
};

// dX[pixels, C_in]. A part is a residue class of input pixels modulo the stride: only the taps that meet a gradient
// pixel there take part, so nothing is multiplied by the zeros that a stride puts between gradients.
struct DgradGather {
  const void *values, *metadata, *b;
  int images, c_in, c_out, padded_k;
  DgradAxis vertical, horizontal;

  __host__ __device__ int parts() const { return vertical.classes() * horizontal.classes(); }
  __host__ __device__ int first_h(int part) const { return part / horizontal.classes(); }
  __host__ __device__ int first_w(int part) const { return part % horizontal.classes(); }
  __host__ __device__ Part part(int index) const {
    const int h = first_h(index), w = first_w(index);
    const int taps = vertical.residue_class(h).taps * horizontal.residue_class(w).taps;
    return {images * vertical.positions(h) * horizontal.positions(w), taps * ((c_out + kTileK - 1) / kTileK)};
  }

  // A row of a part: pixel (i, j) of its class in image n.
  struct ClassPixel {
    int n, i, j;
  };
  __device__ __forceinline__ ClassPixel class_pixel(int part, int row) const {
    const int height = vertical.positions(first_h(part)), width = horizontal.positions(first_w(part));
    const int line = row / width, n = line / height;
    return {n, line - n * height, row - line * width};
  }
  __device__ __forceinline__ int64_t out_row(int part, int row) const {
    const ClassPixel pixel = class_pixel(part, row);
    if (pixel.n >= images) return -1;
    const int h = first_h(part) + pixel.i * vertical.stride, w = first_w(part) + pixel.j * horizontal.stride;
    return (static_cast<int64_t>(pixel.n) * vertical.in + h) * horizontal.in + w;
  }
  __device__ __forceinline__ ColumnRun out_columns(int column) const { return {column, min(c_in - column, kChunk)}; }

  template <typename Tile>
  struct Loader {
    using A = KMajorPixels<Tile>;
    static constexpr int kRows = A::kCopies, kCopies = kRows + MatrixB<Tile>::kCopies;

    const DgradGather& gather;
    A a;
    MatrixB<Tile> b;
    ResidueClass vertical, horizontal;
    int column;
    int first_pixel[kRows], p[kRows], q[kRows];  // per row: of its image, and where tap (0, 0) looks
    int pixels[kRows], metadata_pixel;
    int tap_h = 0, tap_w = 0, k_tile = 0;

    __device__ __forceinline__ Loader(const DgradGather& gather, int part, int row, int column, int)
        : gather(gather),
          a(gather.values, gather.metadata, gather.padded_k),
          b(filter(0, 0, column)),
          vertical(gather.vertical.residue_class(gather.first_h(part))),
          horizontal(gather.horizontal.residue_class(gather.first_w(part))),
          column(column) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const ClassPixel pixel = gather.class_pixel(part, row + A::Layout::row(i));
        first_pixel[i] = pixel.n * gather.vertical.out * gather.horizontal.out;
        p[i] = pixel.n < gather.images ? pixel.i + vertical.highest : INT_MIN / 2;  // beyond the last row: no pixel
        q[i] = pixel.j + horizontal.highest;
      }
      start_tap();
    }

    // The filter [C_out, R, S, C_in] under one tap, as a matrix [C_out, C_in].
    __device__ __forceinline__ MatrixB<Tile> filter(int r, int s, int first_column) const {
      const int taps_w = gather.horizontal.filter;
      const int64_t pitch = static_cast<int64_t>(gather.vertical.filter) * taps_w * gather.c_in;
      const auto* tap = static_cast<const uint16_t*>(gather.b) + static_cast<int64_t>(r * taps_w + s) * gather.c_in;
      return MatrixB<Tile>(tap, pitch, gather.c_out, gather.c_in, first_column, 0);
    }

    __device__ __forceinline__ void start_tap() {
      const int up = tap_h * gather.vertical.offset_step, left = tap_w * gather.horizontal.offset_step;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = p[i] - up, col = q[i] - left;
        const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(gather.vertical.out) &&
                            static_cast<unsigned>(col) < static_cast<unsigned>(gather.horizontal.out);
        const int pixel = inside ? first_pixel[i] + row * gather.horizontal.out + col : -1;
        pixels[i] = pixel;
        if (i == A::Layout::lane() % 4) metadata_pixel = max(pixel, 0);
      }
      b = filter(vertical.first_tap + tap_h * gather.vertical.tap_step,
                 horizontal.first_tap + tap_w * gather.horizontal.tap_step, column);
    }

    __device__ __forceinline__ void load(int copy, uint32_t stage, bool exists) const {
      if (copy < kRows) {
        a.load(copy, stage, pixels, metadata_pixel, k_tile, exists);
      } else {
        b.load(copy - kRows, stage, exists);
      }
    }
    __device__ __forceinline__ void advance() {
      b.advance();
      if (++k_tile * kTileK < gather.c_out) return;
      k_tile = 0;
      if (++tap_w == horizontal.taps) tap_w = 0, ++tap_h;
      start_tap();
    }
  };
};

// ---- wgrad of a convolution ----------------------------------------

struct WgradAxis {
  int in, filter, stride, padding, dilation;
};

// dW[C_out, (R, S, C_in)]. Columns of D: the taps one after the other, each with C_in rounded up to whole chunks.
struct WgradGather {
  const void *values, *metadata, *b;
  int c_out, c_in, positions;
  WgradAxis vertical, horizontal;
  FastDivision by_width, by_height;  // of the gradient
  int minus_width, minus_height;     // a remainder is one multiply-add; to subtract would take a second instruction

  __host__ __device__ int parts() const { return 1; }
  __host__ __device__ int chunked_channels() const { return (c_in + kChunk - 1) / kChunk * kChunk; }
  int64_t columns() const { return int64_t{vertical.filter} * horizontal.filter * chunked_channels(); }
  __device__ __forceinline__ Part part(int) const { return {c_out, (positions + kTileK - 1) / kTileK}; }
  __device__ __forceinline__ int64_t out_row(int, int row) const { return row < c_out ? row : -1; }
  __device__ __forceinline__ ColumnRun out_columns(int column) const {
    const int tap = column / chunked_channels(), channel = column - tap * chunked_channels();
    const bool inside = tap < vertical.filter * horizontal.filter;
    return {static_cast<int64_t>(tap) * c_in + channel, inside ? min(c_in - channel, kChunk) : 0};
  }

  // B: activations [N, H, W, C_in], one row per output position, gathered under the tap of this thread's chunk.
  template <typename Tile>
  struct ImageB {
    using Layout = TileOfB<Tile>;
    static constexpr int kCopies = Layout::kCopies;

    const WgradGather& gather;
    const uint8_t* source;   // of this thread's channels
    int offset_h, offset_w;  // from where the filter stands to the tap
    int count, position;

    __device__ __forceinline__ ImageB(const WgradGather& gather, int first_column, int k_tile)
        : gather(gather), position(k_tile * kTileK + Layout::row(0)) {
      const int column = first_column + Layout::chunk() * kChunk;
      const int tap = column / gather.chunked_channels(), channel = column - tap * gather.chunked_channels();
      const int r = tap / gather.horizontal.filter, s = tap - r * gather.horizontal.filter;
      count = r < gather.vertical.filter ? min(gather.c_in - channel, kChunk) : 0;
      source = static_cast<const uint8_t*>(gather.b) + int64_t{channel} * 2;
      if constexpr (Tile::kAligned) source = whole(source);
      offset_h = r * gather.vertical.dilation - gather.vertical.padding;
      offset_w = s * gather.horizontal.dilation - gather.horizontal.padding;
    }

    __device__ __forceinline__ void load(int copy, uint32_t stage, bool exists) const {
      const int here = position + copy * Layout::kRowStep;
      const int line = gather.by_width.quotient(here), n = gather.by_height.quotient(line);
      const int h = (n * gather.minus_height + line) * gather.vertical.stride + offset_h;
      const int w = (line * gather.minus_width + here) * gather.horizontal.stride + offset_w;
      const bool inside = exists && count > 0 && here < gather.positions &&
                          static_cast<unsigned>(h) < static_cast<unsigned>(gather.vertical.in) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(gather.horizontal.in);
      const uint32_t pixel = (static_cast<uint32_t>(n) * gather.vertical.in + h) * gather.horizontal.in + w;
      const uint32_t pitch = 2u * gather.c_in;  // in bytes: the address is one multiply-add
      const auto* channels = reinterpret_cast<const uint16_t*>(source + uint64_t{pixel} * pitch);
      copy_chunk<Tile::kAligned>(Layout::target(stage, copy), channels, inside, count);
    }

    __device__ __forceinline__ void advance() { position += kTileK; }
  };

  template <typename Tile>
  struct Loader : OperandLoader<MMajorMatrix<Tile>, ImageB<Tile>> {
    __device__ __forceinline__ Loader(const WgradGather& gather, int, int row, int column, int k_tile)
        : OperandLoader<MMajorMatrix<Tile>, ImageB<Tile>>{{gather.values, gather.metadata, gather.c_out, row, k_tile},
                                                          {gather, column, k_tile}} {}
  };
};

}  // namespace sdgp::sm80
