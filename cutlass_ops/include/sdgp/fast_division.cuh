// Division of indices by a number that is known on the host: a multiplication and a shift.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sdgp {

// x / divisor for 0 <= x < 2^31 and 1 <= divisor < 2^31. With s = ceil(log2(divisor)) and
// multiplier = ceil(2^(31 + s) / divisor) < 2^32 the error of the product is below x / 2^(31 + s) < 2^-s <= 1 / divisor
// (Granlund and Montgomery, PLDI 1994).
struct FastDivision {
  int divisor = 1;
  uint32_t multiplier = 1u << 31;
  int shift = 31;

  FastDivision() = default;
  explicit FastDivision(int divisor) : divisor(divisor) {
    while ((int64_t{1} << (shift - 31)) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ int quotient(int x) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * multiplier >> shift);
  }
};

}  // namespace sdgp
