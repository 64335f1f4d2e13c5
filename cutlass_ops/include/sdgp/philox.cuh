// Philox4x32-10 (Salmon et al., SC 2011), laid out as in sdgp_accel/philox.py.
#pragma once

#include <cstdint>

namespace sdgp {

// What the random numbers of one pruned gradient depend on, apart from the group's index.
struct Stream {
  uint32_t key0, key1;     // seed[0]
  uint32_t offset;         // low half of seed[1]
  uint32_t rank_and_pass;  // 2 * rank + pass index (0 = grad_input, 1 = grad_weight)
};

// Problem: SdgpPruneCompress.
template <typename Problem>
__device__ __forceinline__ Stream load_stream(const Problem& problem, uint32_t pass_index) {
  const bool on_device = problem.seed != nullptr;
  const auto key = static_cast<uint64_t>(on_device ? problem.seed[0] : problem.seed_values[0]);
  const int64_t offset = on_device ? problem.seed[1] : problem.seed_values[1];
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(offset),
          2 * problem.rank + pass_index};
}

constexpr int kPhiloxRounds = 10;

struct WideProduct {
  uint32_t low, high;
};

// Split in PTX: from a shifted 64-bit product the compiler makes one instruction more.
__device__ __forceinline__ WideProduct multiply_wide(uint32_t a, uint32_t b) {
  WideProduct product;
  asm("{\n.reg .b64 wide;\nmul.wide.u32 wide, %2, %3;\nmov.b64 {%0, %1}, wide;\n}"
      : "=r"(product.low), "=r"(product.high)
      : "r"(a), "r"(b));
  return product;
}

// One round on one counter.
__device__ __forceinline__ void philox_round(uint4& counter, uint32_t key0, uint32_t key1) {
  const WideProduct product0 = multiply_wide(counter.x, 0xD2511F53u), product1 = multiply_wide(counter.z, 0xCD9E8D57u);
  counter = {product1.high ^ counter.y ^ key0, product1.low, product0.high ^ counter.w ^ key1, product0.low};
}

// The round keys.
__device__ __forceinline__ uint32_t key0_of(const Stream& stream, uint32_t round) {
  return stream.key0 + round * 0x9E3779B9u;
}
__device__ __forceinline__ uint32_t key1_of(const Stream& stream, uint32_t round) {
  return stream.key1 + round * 0xBB67AE85u;
}

// The four words of one block of one group.
__device__ __forceinline__ uint4 philox(const Stream& stream, uint64_t group, uint32_t block) {
  uint4 counter = {static_cast<uint32_t>(group), (static_cast<uint32_t>(group >> 32) & 0xffffffu) | block << 24,
                   stream.offset, stream.rank_and_pass};
#pragma unroll
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    philox_round(counter, key0_of(stream, round), key1_of(stream, round));
  }
  return counter;
}

// The same for block 0 of groups that share the upper half of their indices, as those of one thread's tile do: what
// their counters have in common goes through the first two rounds once. The values are opaque to the compiler, which
// would rather add up the round keys for every few groups than keep them in registers.
struct RoundKeys {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];

  __device__ __forceinline__ explicit RoundKeys(const Stream& stream) {
#pragma unroll
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      key0[round] = opaque(key0_of(stream, round)), key1[round] = opaque(key1_of(stream, round));
    }
  }

  static __device__ __forceinline__ uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
  }
};

class TilePhilox {
 public:
  __device__ __forceinline__ TilePhilox(const Stream& stream, const RoundKeys& keys, uint64_t group) : keys_(keys) {
    const WideProduct offset = multiply_wide(stream.offset, 0xCD9E8D57u);
    const uint32_t upper = static_cast<uint32_t>(group >> 32) & 0xffffffu;
    const WideProduct next = multiply_wide(offset.high ^ upper ^ keys.key0[0], 0xD2511F53u);
    first_ = RoundKeys::opaque(stream.rank_and_pass ^ keys.key1[0]);
    second0_ = RoundKeys::opaque(offset.low ^ keys.key0[1]);
    second1_ = RoundKeys::opaque(next.high ^ keys.key1[1]);
    third_ = RoundKeys::opaque(next.low ^ keys.key1[2]);
  }

  // lower: the lower half of the group's index.
  __device__ __forceinline__ uint4 operator()(uint32_t lower) const {
    const WideProduct first = multiply_wide(lower, 0xD2511F53u);
    const WideProduct second = multiply_wide(first.high ^ first_, 0xCD9E8D57u);
    const WideProduct third0 = multiply_wide(second.high ^ second0_, 0xD2511F53u);
    const WideProduct third1 = multiply_wide(first.low ^ second1_, 0xCD9E8D57u);
    uint4 counter = {third1.high ^ second.low ^ keys_.key0[2], third1.low, third0.high ^ third_, third0.low};
#pragma unroll
    for (uint32_t round = 3; round < kPhiloxRounds; ++round) {
      philox_round(counter, keys_.key0[round], keys_.key1[round]);
    }
    return counter;
  }

 private:
  const RoundKeys& keys_;
  uint32_t first_, second0_, second1_, third_;
};

}  // namespace sdgp
