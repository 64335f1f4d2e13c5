// Sparse product with wgmma.sp for Hopper: D[M, N] = A[M, K at 2:4] * B[K, N], float32 accumulation. Where the tiles of
// A and B come from and where D goes is a policy (sm90_gather.cuh): matrices or, for convolutions, images.
//
//   dgrad: dX[T, C_in]     = dY[T, C_out]   * W[C_out, C_in]   A K-major: values [T, Kp/2],     metadata [T, Kp/16]
//   wgrad: dW[C_out, C_in] = dY^T[C_out, T] * X[T, C_in]       A M-major: values [Kp/2, C_out*], metadata [Kp/16, C_out*]
//
// C_out* is C_out rounded up to a multiple of 8. B is row-major in both ([K, N], N contiguous). One metadata word of 16
// bits describes 16 consecutive k.
//
// One CTA computes tiles of kBlockM x kBlockN in slabs of 64 rows. Its two consumer warpgroups either share each tile
// (cooperative), or take turns at tiles (ping-pong): then one stores its tile while the other computes the next, which
// counts where k is short, and a tile may have only 64 rows. A producer thread feeds two rings through TMA: blocks of
// 128 k of A with their metadata (64 values are a 128-byte row, 8 metadata words the 16 bytes that TMA asks for), and
// stages of 64 k of B. CTAs of a cluster of two sit above each other in M, use the same B tile and load half of it
// each, multicast.
//
// What limits it: m64n256k32 takes 128 cycles of the tensor cores and reads 16 KB of B and 2 KB of A, so the
// shared-memory port (128 B/cycle) allows 1.78x the dense rate at most, and less where the tile fills use the same
// port: 20 KB per k32 step of a 128x256 tile beside 36 KB of reads. ncu on an H100, 4096x1024x25088 (dgrad of the same
// size in brackets): shared-memory pipe 82 % (76 %), L2 85 % (80 %), tensor cores 71 % (63 %) of the peak at 1.6 GHz,
// where the 700 W limit holds the clock. Tiles that stay in shared memory, never refilled, ran at 1400 TFLOP/s instead
// of 1160.
#pragma once

#include <algorithm>

#include "sdgp/grid_dependency.cuh"
#include "sdgp/product.cuh"
#include "sdgp/sm90_gather.cuh"
#include "sdgp/sm90_schedule.cuh"

namespace sdgp::sm90 {

constexpr int kInstructionK = 32;  // k per wgmma.sp with 16-bit elements
constexpr int kConsumers = 2;      // consumer warpgroups
constexpr int kSharedMemoryLimit = 232448;

struct Problem {
  Schedule schedule;
  int rows, row_length;  // of the output
  void* out;             // [rows, row_length], or float [parts, rows, row_length] for Output::kPartial
  Output output;
  bool accumulate;  // out += result
  bool overlaps;    // the kernel before, whose end it waits for at its own
  // Of helpers (sm90_schedule.cuh): [slots, CTAs of a cluster, accumulators of a thread / 4, consumer threads, 4] and
  // [slots, CTAs of a cluster, consumer warps].
  float* pieces;
  uint32_t* piece_flags;
};

enum class Consumers : int { kPingPong = 1, kCooperative = 2 };  // the value: warpgroups per tile

template <typename Element_, typename Gather_, Major kMajorA_, int kBlockM_, int kBlockN_, Consumers kConsumersOfTile>
struct TileConfig {
  using Element = Element_;
  using Gather = Gather_;
  static constexpr Major kMajorA = kMajorA_;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_;

  static constexpr int kTileConsumers = static_cast<int>(kConsumersOfTile);
  static constexpr int kSlabs = kBlockM / kSlabM / kTileConsumers;  // per consumer warpgroup
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr bool kSharesTiles = kTileConsumers == kConsumers;  // between clusters: sm90_schedule.cuh
  // Together the 168 per thread of the launch bound.
  static constexpr int kProducerRegisters = Gather::kProducerRegisters;
  static constexpr int kConsumerRegisters = (3 * 168 - kProducerRegisters) / kConsumers;

  // Every one a multiple of the 1024 bytes at which the 128-byte swizzle repeats.
  static constexpr int kSlabValueBytes = kSlabM * kBlockK / 2 * 2;
  static constexpr int kSlabMetadataBytes = kSlabM * kBlockK / 16 * 2;
  static constexpr int kValueBytes = kBlockM / kSlabM * kSlabValueBytes;
  static constexpr int kMetadataBytes = kBlockM / kSlabM * kSlabMetadataBytes;
  static constexpr int kStageBytes = kBlockN * kStageK * 2;
  static constexpr int kAlignment = 1024;

  // As many blocks of A as there is room for with the B that belongs to them, and the rest for B.
  static constexpr int kRingBytes = kSharedMemoryLimit - 2 * kAlignment;
  static constexpr int kBlocks = std::max(3, kRingBytes / (kValueBytes + kMetadataBytes + kBlockTiles * kStageBytes));
  static constexpr int kBlockBytes = kBlocks * (kValueBytes + kMetadataBytes);
  static constexpr int kStages = (kRingBytes - kBlockBytes) / kStageBytes;
  static constexpr int kSharedBytes = kBlockBytes + kStages * kStageBytes + 2 * kAlignment;  // for alignment, barriers

  static_assert(kBlockM == kSlabs * kTileConsumers * kSlabM && kBlockN % kSwizzleElements == 0);
  static_assert(kSlabs * kBlockN <= 256, "accumulators must fit the registers");
  static_assert(kStages >= 4);
};

// Blocks of A that a range of k takes: two k tiles each, begun anew with every segment.
template <typename Gather>
__device__ __forceinline__ int blocks_of(const KRange& k, const Gather& gather) {
  const int tiles = k.end - k.begin, segment = gather.segment_tiles(), rest = tiles % segment;
  return tiles / segment * (segment / kBlockTiles + segment % kBlockTiles) + (rest + 1) / kBlockTiles;
}

// Position in a ring; `parity` flips each time round.
template <int kSlots>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ void advance(int count) {
    const int rounds = (slot + count) / kSlots;
    slot += count - rounds * kSlots;
    parity ^= rounds & 1;
  }
};

// The metadata operands of the four instructions that cover 128 k: e[i] serves instruction i from lanes 0 and 1 of each
// quad (selector 0) and instruction i + 2 from lanes 2 and 3 (selector 1). An instruction wants, for row g = lane / 4
// in the low half and row g + 8 in the high half, k 0-15 from the even lane and k 16-31 from the odd one; ldmatrix
// gives lane q the words 2q and 2q + 1 of its rows, so neighbouring lanes exchange one register.
template <Major kMajorA>
__device__ __forceinline__ void load_metadata(uint32_t (&e)[2], uint32_t slab, int warp, int lane) {
  uint32_t row_address;
  if constexpr (kMajorA == Major::K) {
    row_address = slab + (warp * 16 + (lane & 15)) * 16;  // 8 words per row
  } else {
    const int k_word = lane & 7, chunk = warp * 2 + (lane >> 3 & 1);  // 64 rows per k word, 128-byte swizzle
    row_address = slab + k_word * 128 + (chunk ^ k_word) * 16;
  }
  uint32_t upper, lower;
  load_matrix_x2<kMajorA == Major::MN>(upper, lower, row_address);
  upper = make_legal(upper);
  lower = make_legal(lower);
  const uint32_t first = __byte_perm(upper, lower, 0x5410);
  const uint32_t second = __byte_perm(upper, lower, 0x7632);
  const bool odd = lane & 1;
  const uint32_t received = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  e[0] = odd ? received : first;
  e[1] = odd ? second : received;
}

// Writes a 64 x kBlockN slab of accumulators. Lane l of warp w holds columns 8j + 2(l%4) + {0, 1} of row 16w + l/4 in
// d[4j], d[4j+1] and of the row 8 below in d[4j+2], d[4j+3].
template <typename Element, int kBlockN, bool kAccumulate, typename Gather>
__device__ __forceinline__ void store_slab(const float (&d)[kBlockN / 2], const Gather& gather, const Problem& problem,
                                           int part, int row, int column, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half, row += 8) {
    const int64_t out_row = gather.out_row(row, part);
#pragma unroll
    for (int block = 0; block < kBlockN / 8; block += 4) {  // 32 columns
      const ColumnRun run = gather.out_columns(column + 8 * block);
      const int count = out_row < 0 ? 0 : run.count;
      if (problem.output == Output::kElement) {
        Element* out = static_cast<Element*>(problem.out) + out_row * problem.row_length + run.first;
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float low = d[4 * (block + i) + 2 * half], high = d[4 * (block + i) + 2 * half + 1];
          const int own_column = 8 * i + 2 * (lane & 3);
          if (kAccumulate && own_column < count) {
            const float2 old = unpack<Element>(*reinterpret_cast<const uint32_t*>(out + own_column));
            low += old.x, high += old.y;
          }
          words[i] = pack<Element>(low, high);
        }
        transpose_quad(words, lane);
        const int store_column = 8 * (lane & 3);
        if (store_column < count)
          *reinterpret_cast<uint4*>(out + store_column) = make_uint4(words[0], words[1], words[2], words[3]);
      } else {
        const int64_t float_row =
            problem.output == Output::kPartial ? out_row + static_cast<int64_t>(part) * problem.rows : out_row;
        float* out = static_cast<float*>(problem.out) + float_row * problem.row_length + run.first;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int own_column = 8 * i + 2 * (lane & 3);
          if (own_column < count) {
            float2 value = make_float2(d[4 * (block + i) + 2 * half], d[4 * (block + i) + 2 * half + 1]);
            float2* target = reinterpret_cast<float2*>(out + own_column);
            if constexpr (kAccumulate) {
              const float2 old = *target;
              value.x += old.x, value.y += old.y;
            }
            *target = value;
          }
        }
      }
    }
  }
}

// Where a CTA's part of a piece is: of thread `thread` of its consumers, and the flag of its warp.
template <typename Config>
struct PieceOfThread {
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kQuads = Config::kBlockM * Config::kBlockN / kConsumerThreads / 4;
  float4* values;  // kConsumerThreads apart
  uint32_t* flag;

  __device__ __forceinline__ PieceOfThread(const Problem& problem, int slot, int cta_rank, int thread) {
    const int cta = slot * problem.schedule.cluster_size + cta_rank;
    values =
        reinterpret_cast<float4*>(problem.pieces) + static_cast<int64_t>(cta) * (kQuads * kConsumerThreads) + thread;
    flag = problem.piece_flags + cta * (kConsumerThreads / 32) + thread / 32;
  }
  __device__ __forceinline__ void store(const float (&d)[Config::kSlabs][Config::kBlockN / 2], int lane) const {
#pragma unroll
    for (int s = 0; s < Config::kSlabs; ++s)
#pragma unroll
      for (int i = 0; i < Config::kBlockN / 8; ++i)
        values[(s * (Config::kBlockN / 8) + i) * kConsumerThreads] =
            make_float4(d[s][4 * i], d[s][4 * i + 1], d[s][4 * i + 2], d[s][4 * i + 3]);
    __syncwarp();
    if (lane == 0) store_release(flag, 1);
  }
  __device__ __forceinline__ void add_to(float (&d)[Config::kSlabs][Config::kBlockN / 2]) const {
    while (!__all_sync(0xffffffffu, load_acquire(flag) != 0)) continue;
#pragma unroll
    for (int s = 0; s < Config::kSlabs; ++s)
#pragma unroll
      for (int i = 0; i < Config::kBlockN / 8; ++i) {
        const float4 value = values[(s * (Config::kBlockN / 8) + i) * kConsumerThreads];
        d[s][4 * i] += value.x, d[s][4 * i + 1] += value.y, d[s][4 * i + 2] += value.z, d[s][4 * i + 3] += value.w;
      }
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sparse_gemm_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ typename Config::Gather gather,
                       const __grid_constant__ Problem problem) {
  using Element = typename Config::Element;
  constexpr Major kMajorA = Config::kMajorA;
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kStages = Config::kStages;
  constexpr int kColumnBlocks = kBlockN / kSwizzleElements;
  constexpr int kColumnBlockBytes = kStageK * kSwizzleElements * 2;
  constexpr int kBlocks = Config::kBlocks;
  constexpr bool kSharesTiles = Config::kSharesTiles;

  // Shared memory: values and metadata of the blocks of A, stages of B, barriers.
  extern __shared__ uint8_t shared[];
  const uint32_t base = (smem_address(shared) + Config::kAlignment - 1) & ~(Config::kAlignment - 1u);
  const uint32_t value_tiles = base;
  const uint32_t metadata_tiles = value_tiles + kBlocks * Config::kValueBytes;
  const uint32_t b_tiles = metadata_tiles + kBlocks * Config::kMetadataBytes;
  const uint32_t full_a = b_tiles + kStages * Config::kStageBytes;
  const uint32_t empty_a = full_a + kBlocks * 8;
  const uint32_t full_b = empty_a + kBlocks * 8;
  const uint32_t empty_b = full_b + kStages * 8;

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  const int lane = threadIdx.x % 32;
  const int cluster_size = problem.schedule.cluster_size, cta_rank = cluster_cta_rank();

  // Barriers: full when the bytes have landed (one arrival announces how many), empty when every warp that computes the
  // tile has let go: of this CTA, and for B of every CTA that the tile is multicast to.
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.values);
    prefetch_tensor_map(&maps.metadata);
    prefetch_tensor_map(&maps.b);
    for (int block = 0; block < kBlocks; ++block) {
      mbarrier_init(full_a + 8 * block, 1);
      mbarrier_init(empty_a + 8 * block, 4 * Config::kTileConsumers);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full_b + 8 * stage, 1);
      mbarrier_init(empty_b + 8 * stage, 4 * Config::kTileConsumers * cluster_size);
    }
    fence_mbarrier_init();
  }
  if (cluster_size > 1) {
    cluster_meet();
  } else {
    __syncthreads();
  }

  launch_dependents();  // when all blocks run: the next kernel's take the place of those that have ended

  const Schedule& schedule = problem.schedule;
  const int segment_tiles = gather.segment_tiles();  // blocks of A start anew with every segment of k
  const int clusters = cluster_count();
  RingPosition<kBlocks> a_ring;
  RingPosition<kStages> b_ring;

  if (warpgroup == kConsumers) {
    // Producer: one thread.
    decrease_registers<Config::kProducerRegisters>();
    if (warp == 0 && elect_one()) {
      const int first_b_row = cta_rank * (kStageK / cluster_size);  // of this CTA's share of B
      for (int index = cluster_index(), position = 0; index < schedule.units;
           schedule.advance<kSharesTiles>(index, position, clusters)) {
        const WorkUnit unit = schedule.unit<kSharesTiles>(index, position, cta_rank, gather);
        typename Config::Gather::template Producer<kMajorA, kBlockM, kColumnBlocks> producer(
            gather, maps, unit.part, unit.m_tile * kBlockM, unit.n_tile * kBlockN, unit.k.begin, first_b_row);
        int tile_in_segment = kSharesTiles ? gather.in_segment(unit.k.begin) : 0;
#pragma unroll 1
        for (int k_tile = unit.k.begin; k_tile < unit.k.end; ++k_tile, producer.advance()) {
          if (tile_in_segment % kBlockTiles == 0) {
            const uint32_t full = full_a + 8 * a_ring.slot;
            mbarrier_wait(empty_a + 8 * a_ring.slot, a_ring.parity ^ 1);
            mbarrier_arrive_expect_tx(full, Config::kValueBytes + Config::kMetadataBytes);
            producer.load_values(full, value_tiles + a_ring.slot * Config::kValueBytes);
            producer.load_metadata(full, metadata_tiles + a_ring.slot * Config::kMetadataBytes);
            a_ring.advance();
          }
          if (++tile_in_segment == segment_tiles) tile_in_segment = 0;

          const uint32_t full = full_b + 8 * b_ring.slot;
          const uint32_t b_tile = b_tiles + b_ring.slot * Config::kStageBytes + first_b_row * 128;
          mbarrier_wait(empty_b + 8 * b_ring.slot, b_ring.parity ^ 1);
          mbarrier_arrive_expect_tx(full, Config::kStageBytes);
#pragma unroll
          for (int block = 0; block < kColumnBlocks; ++block)
            producer.load_b(full, b_tile + block * kColumnBlockBytes, block, cluster_size);
          b_ring.advance();
        }
      }
      // A CTA must not leave while its peer may still arrive on its barriers, so their last arrivals are waited for.
      // (What its peer multicasts into its tiles, its consumers have waited for.) A barrier of the cluster would come
      // behind the stores of D.
      if (cluster_size > 1) {
#pragma unroll 1
        for (int stage = 0; stage < kStages; ++stage, b_ring.advance())
          mbarrier_wait(empty_b + 8 * b_ring.slot, b_ring.parity ^ 1);
      }
      // What comes behind this kernel takes its end for the end of all before it.
      if (problem.overlaps) wait_for_preceding_grid();
    }
  } else {
    // Consumers: kSlabs slabs of 64 x kBlockN per warpgroup.
    increase_registers<Config::kConsumerRegisters>();
    constexpr uint64_t kDescriptorA = matrix_descriptor(Swizzle::k128B, 0, 8 * 128);
    constexpr uint64_t kDescriptorB = matrix_descriptor(Swizzle::k128B, kColumnBlockBytes, 8 * 128);
    constexpr int kStepA = kMajorA == Major::K ? kInstructionK / 2 * 2 : kInstructionK / 2 * 128;  // bytes
    constexpr int kStepB = kInstructionK * 128;
    constexpr int kSlabs = Config::kSlabs;
    constexpr int kTurns = kConsumers / Config::kTileConsumers;  // warpgroups that take turns at tiles
    const int first_slab = warpgroup % Config::kTileConsumers * kSlabs;
    const uint32_t first_value_slab = value_tiles + first_slab * Config::kSlabValueBytes;
    const uint32_t first_metadata_slab = metadata_tiles + first_slab * Config::kSlabMetadataBytes;

    float d[kSlabs][kBlockN / 2];
    uint32_t e_sets[2][kSlabs][2] = {};  // two sets: the MMAs in flight may still read one while the other is loaded
    int turn = 0;
    for (int index = cluster_index(), position = 0; index < schedule.units;
         schedule.advance<kSharesTiles>(index, position, clusters), ++turn) {
      const WorkUnit unit = schedule.unit<kSharesTiles>(index, position, cta_rank, gather);
      if (kTurns > 1 && turn % kTurns != warpgroup) {  // the other's: what is loaded for it passes by
        a_ring.advance(blocks_of(unit.k, gather));
        b_ring.advance(unit.k.end - unit.k.begin);
        continue;
      }
      // A main loop begins when the one before has seen all its tiles arrive: a parity cannot tell phases apart that
      // are two rounds of the ring from each other, so waiting ahead would let through to tiles that are the other's.
      if (kTurns > 1 && turn > 0) barrier_sync(1 + warpgroup, 128 * kConsumers);
      uint32_t used_block = 0, used_stage = 0;  // empty barriers of what the MMAs in flight read

      const auto release_block = [&] {
        if (used_block != 0 && lane == 0) mbarrier_arrive(used_block);
      };
      const auto release_stage = [&] {
        if (used_stage != 0 && lane < cluster_size) mbarrier_arrive_cluster(used_stage, lane);
      };
      // The MMAs of one stage of B: two of 32 k per slab. kHalf: of the block of A; the first brings the metadata.
      const auto consume_stage = [&]<int kSet, int kHalf>(bool accumulate) {
        auto& e = e_sets[kSet];
        if constexpr (kHalf == 0) {
          mbarrier_wait(full_a + 8 * a_ring.slot, a_ring.parity);
          const uint32_t slab = first_metadata_slab + a_ring.slot * Config::kMetadataBytes;
#pragma unroll
          for (int s = 0; s < kSlabs; ++s)
            load_metadata<kMajorA>(e[s], slab + s * Config::kSlabMetadataBytes, warp, lane);
        }
        mbarrier_wait(full_b + 8 * b_ring.slot, b_ring.parity);
        const uint32_t a_address = first_value_slab + a_ring.slot * Config::kValueBytes + kHalf * 2 * kStepA;
        const uint64_t a = kDescriptorA | descriptor_address(a_address);
        const uint64_t b = kDescriptorB | descriptor_address(b_tiles + b_ring.slot * Config::kStageBytes);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) fence_registers(d[s]);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) {
          const uint64_t slab_a = a + s * (Config::kSlabValueBytes >> 4);
          sparse_wgmma<Element, kBlockN, kMajorA, kHalf>(d[s], slab_a, b, e[s][0], accumulate);
          sparse_wgmma<Element, kBlockN, kMajorA, kHalf>(d[s], slab_a + (kStepA >> 4), b + (kStepB >> 4), e[s][1],
                                                         true);
        }
        wgmma_commit_group();
        wgmma_wait_group<1>();
        keep_registers(e_sets);
        release_stage();
        used_stage = empty_b + 8 * b_ring.slot;
        b_ring.advance();
        if constexpr (kHalf == 0) {
          release_block();
          used_block = empty_a + 8 * a_ring.slot;
        }
      };

      int k_tile = unit.k.begin, left_in_segment = segment_tiles;
      if constexpr (kSharesTiles) left_in_segment -= gather.in_segment(k_tile);
      const auto consume_block = [&]<int kSet>() {
        if (k_tile >= unit.k.end) return;
        consume_stage.template operator()<kSet, 0>(k_tile > unit.k.begin);
        const bool has_second = left_in_segment > 1 && k_tile + 1 < unit.k.end;
        if (has_second) consume_stage.template operator()<kSet, 1>(true);
        a_ring.advance();
        k_tile += has_second ? 2 : 1;
        left_in_segment -= has_second ? 2 : 1;
        if (left_in_segment == 0) left_in_segment = segment_tiles;
      };
#pragma unroll 1
      while (k_tile < unit.k.end) {
        consume_block.template operator()<0>();
        consume_block.template operator()<1>();
      }
      if (kTurns > 1 && index + clusters < schedule.units)
        barrier_arrive(1 + (warpgroup + 1) % kTurns, 128 * kConsumers);
      wgmma_wait_group<0>();
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) fence_registers(d[s]);
      release_stage();
      release_block();
      if constexpr (Config::Gather::kHasEmptyParts) {
        if (unit.k.begin == unit.k.end) {
#pragma unroll
          for (int s = 0; s < kSlabs; ++s)
#pragma unroll
            for (float& value : d[s]) value = 0.0f;
        }
      }

      if constexpr (kSharesTiles) {
        const int thread = (warpgroup * 4 + warp) * 32 + lane;  // threadIdx.x, which need not be kept until here
        const Sharing sharing = schedule.sharing(index, position);
        if (sharing.pieces == kHelps) {
          PieceOfThread<Config>(problem, sharing.slot, cta_rank, thread).store(d, lane);
          continue;
        }
#pragma unroll 1
        for (int piece = 0; piece < sharing.pieces; ++piece)
          PieceOfThread<Config>(problem, sharing.slot + piece, cta_rank, thread).add_to(d);
      }

      const int column = unit.n_tile * kBlockN;
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        const int row = unit.m_tile * kBlockM + (first_slab + s) * kSlabM + warp * 16 + lane / 4;
        if (problem.accumulate) {
          store_slab<Element, kBlockN, true>(d[s], gather, problem, unit.part, row, column, lane);
        } else {
          store_slab<Element, kBlockN, false>(d[s], gather, problem, unit.part, row, column, lane);
        }
      }
    }
  }
}

}  // namespace sdgp::sm90
