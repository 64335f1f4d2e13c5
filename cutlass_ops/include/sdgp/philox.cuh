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

__device__ __forceinline__ Stream load_stream(const int64_t* seed, uint32_t rank, uint32_t pass_index) {
  const auto key = static_cast<uint64_t>(seed[0]);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(seed[1]),
          2 * rank + pass_index};
}

constexpr int kPhiloxRounds = 10;

// One round on one counter.
__device__ __forceinline__ void philox_round(uint4& counter, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(counter.x) * 0xD2511F53u;
  const uint64_t product1 = static_cast<uint64_t>(counter.z) * 0xCD9E8D57u;
  counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(product1),
             static_cast<uint32_t>(product0 >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(product0)};
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

}  // namespace sdgp
