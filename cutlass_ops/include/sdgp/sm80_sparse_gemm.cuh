// Sparse product with mma.sp for GPUs from sm_80 on: D[M, N] = A[M, K at 2:4] * B[K, N], float32 accumulation. Where
// the tiles of A and B come from and where D goes is a policy (sm80_gather.cuh): matrices or, for convolutions, images.
//
//   dgrad: dX[T, C_in]     = dY[T, C_out]   * W[C_out, C_in]   A K-major: values [T, Kp/2],     metadata [T, Kp/16]
//   wgrad: dW[C_out, C_in] = dY^T[C_out, T] * X[T, C_in]       A M-major: values [Kp/2, C_out*], metadata [Kp/16,
//   C_out*]
//
// C_out* is C_out rounded up to a multiple of 8. B is row-major in both ([K, N], N contiguous). One metadata word of 16
// bits describes 16 consecutive k. The operands come as the prune+compress kernel writes them: the row-major metadata
// can be gathered by pixel, which no blocked layout allows, and becomes the registers of mma.sp with one ldmatrix per
// 64 k.
//
// One thread block computes a tile of kBlockM x kBlockN, each warp kWarpM x kWarpN of it. kStages tiles of 64 k are on
// their way from global to shared memory or in use; fragments are fetched one step ahead of the mma that needs them.
// Copies and fetches are spread over the mma of a tile, in a main loop without branches: whatever stands in one piece
// would find all warps there at a time, since they share a barrier per tile, and leave the tensor cores idle.
//
// What limits it on an A100, by calculation, not measured: per 32 k a 64 x 64 warp reads 6.25 KB of fragments and
// metadata, 50 cycles of the shared-memory port at 128 B per cycle, and a 256 x 128 block fills 17 KB, 136 cycles: 536
// cycles beside 512 of the sparse tensor cores (2048 multiply-adds per cycle, NVIDIA A100 whitepaper). A 128 x 128
// block needs 300 beside 256. The block is taller than wide because A has half the bytes: 128 x 256 would fill 20.5 KB
// and read 20 % more of L2.
#pragma once

#include "sdgp/product.cuh"
#include "sdgp/sm80_gather.cuh"

namespace sdgp::sm80 {

constexpr int kInstructionM = 16, kInstructionN = 8, kInstructionK = 32;

struct Problem {
  int m_tiles, n_tiles;  // m_tiles: of the largest part
  int rows, row_length;  // of the output
  int splits;            // the k range is cut in this many parts; > 1 only with Output::kPartial
  int group_n;           // tiles along N that run together (L2 reuse)
  void* out;             // [rows, row_length], or float [splits, rows, row_length] for Output::kPartial
  Output output;
  bool accumulate;  // out += result
};

template <typename Element_, typename Gather_, Major kMajorA_, int kBlockM_, int kBlockN_, int kWarpM_, int kWarpN_,
          int kStages_, int kBlocksPerSm_, bool kAligned_>
struct TileConfig {
  using Element = Element_;
  using Gather = Gather_;
  static constexpr Major kMajorA = kMajorA_;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr bool kAligned = kAligned_;  // rows of B and of D are whole chunks of 16 bytes

  static constexpr int kWarpsN = kBlockN / kWarpN, kThreads = 32 * (kBlockM / kWarpM) * kWarpsN;
  static constexpr int kBlocksM = kWarpM / kInstructionM, kBlocksN = kWarpN / kInstructionN;  // of a warp
  static constexpr int kValueBytes = kBlockM * kTileValues * 2, kMetadataBytes = kBlockM * kTileWords * 2;
  static constexpr int kMetadataAt = kValueBytes, kOperandBAt = kValueBytes + kMetadataBytes;  // in a stage
  static constexpr int kStageBytes = kOperandBAt + kTileK * kBlockN * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  static_assert(kBlockM % kWarpM == 0 && kBlockN % kWarpN == 0 && kWarpM % kInstructionM == 0 && kWarpN % 32 == 0);
  static_assert(kStages >= 3 && kStageBytes % 128 == 0 && kOperandBAt % 128 == 0);
};

// The mma fragments of one warp, fetched from a stage in shared memory. A tile of 64 k is two steps of mma.sp, each of
// two blocks of 16 k: blocks s and s + 2 in step s where A is K-major, 2s and 2s + 1 where it is M-major.
//
// One ldmatrix fetches the metadata of a tile. M-major: matrix i has, for the 16 rows of block i, the words of k block
// c in its rows 2c (m 0-7) and 2c + 1 (m 8-15), so that its transposition gives lane c of each quad a register of
// mma.sp: lanes 0 and 1 hold step 0 (selector 0), lanes 2 and 3 step 1 (selector 1). K-major: a row of a matrix is the
// words of two rows of A that are 16 apart, so lanes 0 and 1 of a quad receive words (0, 1) and (2, 3) of the one
// (selector 0), lanes 2 and 3 those of the other (selector 1); the low halves are step 0, the high ones step 1.
template <typename Config>
struct FragmentReader {
  static constexpr bool kIsKMajor = Config::kMajorA == Major::K;
  static constexpr int kRowBytesB = Config::kBlockN * 2;
  static constexpr int kRowBytesA = kIsKMajor ? kTileValues * 2 : Config::kBlockM * 2;
  static constexpr int kStepRowsB = kIsKMajor ? 16 : 32;
  static_assert(Config::kWarpM == 64);  // what one ldmatrix fetches the metadata of

  uint32_t a_offset, b_offset, metadata_offset;  // of this lane, in a stage

  __device__ __forceinline__ FragmentReader(int warp_m, int warp_n, uint32_t lane) {
    const uint32_t in_eight = lane & 7, high = lane >> 4;
    if constexpr (kIsKMajor) {
      // Matrices of an ldmatrix: (upper rows, k block s), (lower rows, s), (upper, s + 2), (lower, s + 2).
      const uint32_t row = warp_m + (lane & 15);
      a_offset = row * kRowBytesA + (2 * high ^ row / 2 % 4) * 16;
      metadata_offset = warp_m * kTileWords * 2 + KMajorTile<Config>::metadata_pair(lane);
      b_offset = ((lane & 15) + high * 32) * kRowBytesB;
    } else {
      // The same of k blocks 2s and 2s + 1, from rows of k: matrix j holds stored k 8 (j / 2) .. and m 8 (j % 2) ..
      a_offset = (high * 8 + in_eight) * kRowBytesA + ((warp_m / kChunk + (lane >> 3 & 1)) ^ in_eight) * 16;
      const uint32_t block = in_eight / 2, chunk = warp_m / kChunk + 2 * (lane >> 3) + (lane & 1);
      metadata_offset = block * kRowBytesA + (chunk ^ 2 * block) * 16;
      b_offset = lane * kRowBytesB;
    }
    metadata_offset += Config::kMetadataAt;
    b_offset += Config::kOperandBAt + (warp_n / kChunk ^ in_eight) * 16;
  }

  __device__ __forceinline__ void load_a(uint32_t (&a)[Config::kBlocksM][4], uint32_t stage, int step) const {
#pragma unroll
    for (int i = 0; i < Config::kBlocksM; ++i) {
      if constexpr (kIsKMajor) {
        ldmatrix_x4(a[i], ((stage + a_offset) ^ step * 16) + i * kInstructionM * kRowBytesA);
      } else {
        ldmatrix_x4_trans(a[i], ((stage + a_offset) ^ 2 * i * 16) + step * kInstructionK / 2 * kRowBytesA);
      }
    }
  }

  // As ldmatrix brings it.
  __device__ __forceinline__ void load_metadata(uint32_t (&words)[4], uint32_t stage) const {
    if constexpr (kIsKMajor) {
      ldmatrix_x4(words, stage + metadata_offset);
    } else {
      ldmatrix_x4_trans(words, stage + metadata_offset);
    }
  }

  // As mma.sp takes it, in the order of multiply().
  __device__ __forceinline__ static void arrange_metadata(uint32_t (&e)[4], const uint32_t (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      e[i] = kIsKMajor ? __byte_perm(words[i & ~1], words[i | 1], i % 2 ? 0x7632 : 0x5410) : words[i];
  }

  // 16 columns, from column 16 `pair` of the warp.
  __device__ __forceinline__ void load_b(uint32_t (&b)[2][4], uint32_t stage, int step, int pair) const {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ldmatrix_x4_trans(b[j], ((stage + b_offset) ^ (2 * pair + j) * 16) + step * kStepRowsB * kRowBytesB);
  }

  // d += a * b, of 16 rows i.
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                  const uint32_t (&e)[4], int i, int step) {
    const uint32_t metadata = e[kIsKMajor ? i / 2 * 2 + step : i];
    if ((kIsKMajor ? i % 2 : step) == 0) {
      mma_sp_m16n8k32<typename Config::Element, 0>(d, a, b, metadata);
    } else {
      mma_sp_m16n8k32<typename Config::Element, 1>(d, a, b, metadata);
    }
  }
};

// Two neighbouring values of D, `count` of which exist, to element `index` of the output.
template <bool kAligned, typename Out>
__device__ __forceinline__ void store_two(Out* out, int64_t index, int count, bool accumulate, float low, float high) {
  if (count <= 0) return;
  Out* target = out + index;
  if constexpr (kAligned) {  // both exist
    struct alignas(2 * sizeof(Out)) Two {
      Out low, high;
    };
    if (accumulate) {
      const Two old = *reinterpret_cast<const Two*>(target);
      low += static_cast<float>(old.low), high += static_cast<float>(old.high);
    }
    *reinterpret_cast<Two*>(target) = {static_cast<Out>(low), static_cast<Out>(high)};
  } else {
    target[0] = static_cast<Out>(accumulate ? low + static_cast<float>(target[0]) : low);
    if (count > 1) target[1] = static_cast<Out>(accumulate ? high + static_cast<float>(target[1]) : high);
  }
}

// Writes a warp's accumulators. Lane l holds columns 8j + 2(l%4) + {0, 1} of row 16i + l/4 in d[i][j][0], d[i][j][1]
// and of the row 8 below in d[i][j][2], d[i][j][3]; `row` and `column` are where the warp's part begins.
template <typename Config>
__device__ __forceinline__ void store_block(const float (&d)[Config::kBlocksM][Config::kBlocksN][4],
                                            const typename Config::Gather& gather, const Problem& problem, int part,
                                            int split, int row, int column, int lane) {
  using Element = typename Config::Element;
  const bool in_chunks = Config::kAligned && problem.output == Output::kElement && !problem.accumulate;
#pragma unroll
  for (int i = 0; i < Config::kBlocksM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t out_row = gather.out_row(part, row + i * kInstructionM + half * 8 + lane / 4);
      const bool exists = out_row >= 0;
      if (problem.output == Output::kPartial) out_row += static_cast<int64_t>(split) * problem.rows;
      const int64_t first = out_row * problem.row_length;
#pragma unroll
      for (int j = 0; j < Config::kBlocksN; j += 4) {  // 32 columns
        if (in_chunks) {                               // lane q of a quad stores 8 columns
          uint32_t words[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) words[c] = pack<Element>(d[i][j + c][2 * half], d[i][j + c][2 * half + 1]);
          transpose_quad(words, lane);
          const ColumnRun run = gather.out_columns(column + (j + (lane & 3)) * kInstructionN);
          if (exists && run.count > 0)
            *reinterpret_cast<uint4*>(static_cast<Element*>(problem.out) + first + run.first) =
                make_uint4(words[0], words[1], words[2], words[3]);
          continue;
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const ColumnRun run = gather.out_columns(column + (j + c) * kInstructionN);
          const int own = 2 * (lane & 3), count = exists ? run.count - own : 0;
          const float low = d[i][j + c][2 * half], high = d[i][j + c][2 * half + 1];
          if (problem.output == Output::kElement) {
            store_two<Config::kAligned>(static_cast<Element*>(problem.out), first + run.first + own, count,
                                        problem.accumulate, low, high);
          } else {
            store_two<Config::kAligned>(static_cast<float*>(problem.out), first + run.first + own, count,
                                        problem.accumulate, low, high);
          }
        }
      }
    }
  }
}

// Grid: tiles of the largest part, parts, splits.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    sparse_gemm_kernel(const __grid_constant__ typename Config::Gather gather,
                       const __grid_constant__ Problem problem) {
  constexpr int kStages = Config::kStages, kBlocksM = Config::kBlocksM, kBlocksN = Config::kBlocksN;
  constexpr int kPairs = kBlocksN / 2, kSlots = 2 * kPairs;  // of 16 columns; of mma instructions per tile of k
  static_assert(kPairs >= 2);

  // Order of the tiles: groups of `group_n` tile columns, then rows, then the columns of the group.
  const int part = static_cast<int>(blockIdx.y), split = static_cast<int>(blockIdx.z);
  const int tile = static_cast<int>(blockIdx.x);
  const int first_column = tile / (problem.m_tiles * problem.group_n) * problem.group_n;
  const int columns = min(problem.group_n, problem.n_tiles - first_column);
  const int in_group = tile - first_column * problem.m_tiles;
  const int row = in_group / columns * Config::kBlockM;
  const int column = (first_column + in_group % columns) * Config::kBlockN;
  const Part extent = gather.part(part);
  if (row >= extent.rows) return;
  const int k_begin = static_cast<int>(static_cast<int64_t>(extent.k_tiles) * split / problem.splits);
  const int k_end = static_cast<int>(static_cast<int64_t>(extent.k_tiles) * (split + 1) / problem.splits);
  const int k_tiles = k_end - k_begin;

  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = smem_address(shared);
  using Loader = typename Config::Gather::template Loader<Config>;
  Loader loader(gather, part, row, column, k_begin);
  // Tiles beyond the last are zeros: with nothing to skip, the main loop has no branches.
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
#pragma unroll
    for (int copy = 0; copy < Loader::kCopies; ++copy)
      loader.load(copy, base + tile * Config::kStageBytes, tile < k_tiles);
    if (tile + 1 < k_tiles) loader.advance();
    cp_async_commit_group();
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / Config::kWarpsN * Config::kWarpM, warp_n = warp % Config::kWarpsN * Config::kWarpN;
  const FragmentReader<Config> reader(warp_m, warp_n, lane);
  float d[kBlocksM][kBlocksN][4] = {};
  uint32_t a[2][kBlocksM][4], b[2][2][4], e[4], words[4];

  cp_async_wait_group<kStages - 2>();
  __syncthreads();
  reader.load_metadata(words, base);
  reader.arrange_metadata(e, words);
  reader.load_a(a[0], base, 0);
  reader.load_b(b[0], base, 0, 0);
  uint32_t stage = base, free_stage = base + (kStages - 1) * Config::kStageBytes;
#pragma unroll 1
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    const uint32_t after = stage + Config::kStageBytes;
    const uint32_t next_stage = after == base + Config::kSharedBytes ? base : after;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int step = slot / kPairs, pair = slot % kPairs, next = slot + 1;
      if (step == 0) {  // a part of the tile kStages - 1 further on
#pragma unroll
        for (int copy = pair * Loader::kCopies / kPairs; copy < (pair + 1) * Loader::kCopies / kPairs; ++copy)
          loader.load(copy, free_stage, k_tile + kStages - 1 < k_tiles);
        if (next == kPairs) {
          if (k_tile + kStages < k_tiles) loader.advance();
          cp_async_commit_group();
          reader.load_a(a[1], stage, 1);
        }
      }
      reader.load_b(b[next % 2], next < kSlots ? stage : next_stage, next / kPairs % 2, next % kPairs);
      if (next == kSlots - 1) {  // those were the last fragments of this stage
        cp_async_wait_group<kStages - 2>();
        __syncthreads();  // the next stage has arrived for all; this one has been read by all
        reader.load_metadata(words, next_stage);
        reader.load_a(a[0], next_stage, 0);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < kBlocksM; ++i) reader.multiply(d[i][2 * pair + j], a[step][i], b[slot % 2][j], e, i, step);
      }
    }
    reader.arrange_metadata(e, words);
    free_stage = stage;
    stage = next_stage;
  }
  cp_async_wait_group<0>();
  store_block<Config>(d, gather, problem, part, split, row + warp_m, column + warp_n, lane);
}

}  // namespace sdgp::sm80
