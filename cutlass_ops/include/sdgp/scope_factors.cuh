// From the sums of a scope to its factors.
#pragma once

#include "sdgp/group_rules.cuh"
#include "sdgp/prune_compress_api.h"

namespace sdgp {

enum { kSumAll, kSumDgrad, kSumWgrad, kSums };

__device__ __forceinline__ void store_factors(const SdgpScopeScales& problem, int64_t scope,
                                              const double (&sums)[kSums]) {
  const auto total = static_cast<float>(sums[kSumAll]);
  auto factor = [&](int which) { return rescale_factor(total, static_cast<float>(sums[which]), problem.eps); };
  if (problem.dgrad_scale != nullptr) problem.dgrad_scale[scope] = factor(kSumDgrad);
  if (problem.wgrad_scale != nullptr) problem.wgrad_scale[scope] = factor(kSumWgrad);
}

}  // namespace sdgp
