// The prune functions on one pair of groups held in registers (sdgp_accel/group_rules.py has the same rules as
// vectorised torch; both give the same bits). Every float operation is an explicitly rounded intrinsic: a fused
// multiply-add would change the result.
#pragma once

#include "sdgp/division.cuh"
#include "sdgp/element.cuh"
#include "sdgp/metadata.cuh"
#include "sdgp/philox.cuh"

namespace sdgp {

// Two groups along one axis: their row-major indices in the grid of groups and how many of their elements exist
// (fewer than M at the end of the axis; elements beyond are +0).
struct GroupPair {
  uint64_t index[2];
  int length[2];
};

struct RuleParameters {
  Stream stream;  // random, mvue
  float eps;      // rescale_magnitude
};

// Bit i: element i of one group has one of its N largest keys; a tie goes to the lower index.
template <int N, int M>
__device__ __forceinline__ uint32_t largest_two(const uint32_t (&keys)[M]) {
  static_assert(N == 1 || N == 2);
  uint32_t best = keys[0], second = 0;
  int best_index = 0, second_index = -1;
#pragma unroll
  for (int i = 1; i < M; ++i) {
    if (keys[i] > best) {
      second = best, second_index = best_index;
      best = keys[i], best_index = i;
    } else if (second_index < 0 || keys[i] > second) {
      second = keys[i], second_index = i;
    }
  }
  return N == 1 ? 1u << best_index : 1u << best_index | 1u << second_index;
}

// Bit i: element i of the group in half kHalf is among the N largest magnitudes.
template <typename Element, int N, int M, int kHalf>
__device__ __forceinline__ uint32_t largest_magnitudes(const uint32_t (&x)[M]) {
  uint32_t keys[M];
#pragma unroll
  for (int i = 0; i < M; ++i) keys[i] = half_of<kHalf>(magnitude_keys<Element>(x[i]));
  return largest_two<N, M>(keys);
}

// Masks of the two largest of four in both groups; at_least(a, b): masks of a >= b. A tie goes to the lower index.
template <typename AtLeast>
__device__ __forceinline__ void keep_two_of_four(const uint32_t (&x)[4], const AtLeast& at_least, uint32_t (&keep)[4]) {
  const uint32_t beats01 = at_least(x[0], x[1]), beats02 = at_least(x[0], x[2]), beats03 = at_least(x[0], x[3]);
  const uint32_t beats12 = at_least(x[1], x[2]), beats13 = at_least(x[1], x[3]), beats23 = at_least(x[2], x[3]);
  keep[0] = majority(beats01, beats02, beats03);
  keep[1] = majority(~beats01, beats12, beats13);
  keep[2] = majority(~beats02, ~beats12, beats23);
  keep[3] = majority(~beats03, ~beats13, ~beats23);
}

template <typename Element, int M, int kHalf>
__device__ __forceinline__ bool is_finite_group(const uint32_t (&x)[M]) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < M; ++i) finite = finite && (half_of<kHalf>(x[i]) & 0x7fffu) < ElementTraits<Element>::kInfinity;
  return finite;
}

template <int kHalf>
__device__ __forceinline__ void replace_half(uint32_t& pair, uint32_t bits) {
  pair = kHalf == 0 ? (pair & 0xffff0000u) | bits : (pair & 0xffffu) | bits << 16;
}

// kept value * scale, rounded; a zero stays +0 even where the scale is not finite.
template <typename Element>
__device__ __forceinline__ uint32_t scale_nonzero(uint32_t bits, float scale) {
  using Traits = ElementTraits<Element>;
  return (bits & 0x7fffu) == 0 ? 0u : Traits::from_float(__fmul_rn(Traits::to_float(bits), scale));
}

// total / (kept + eps), 1 where kept is 0.
__device__ __forceinline__ float rescale_factor(float total, float kept, float eps) {
  return kept == 0.0f ? 1.0f : __fdiv_rn(total, __fadd_rn(kept, eps));
}

// How a rule is called. Every rule has prune(x, groups, parameters): sets the dropped elements of a pair of groups to
// +0 and scales the kept. For 2:4 some have a shorter way to the packed form. kIsLong: a loop takes the groups of a
// tile one pair after the other, since code for all of them at once, 12000 instructions, is more than an H100's caches
// hold (mvue 2:8 took 10.4 times as long as a clone of dY, bench/results/development/h100-8-kernels.json).
enum class Packing {
  kFromPruned,  // prune, then pack what is not zero
  kPair,        // pack(x, parameters): a pair of quads
};

template <typename Element, int N, int M>
struct Magnitude {
  static constexpr bool kIsRandom = false, kIsLong = false;
  static constexpr Packing kPacking = N == 2 && M == 4 ? Packing::kPair : Packing::kFromPruned;

  static __device__ __forceinline__ PackedQuads pack(const uint32_t (&x)[4], const RuleParameters&) {
    uint32_t masks[4];
    keep(x, masks);
    return pack_kept(x, masks);
  }

  // keep[i]: the masks of what is kept of element i.
  static __device__ __forceinline__ void keep(const uint32_t (&x)[M], uint32_t (&keep)[M]) {
    if constexpr (N == 2 && M == 4) {
      if (are_ordered(x)) return keep_two_of_four(x, magnitude_at_least, keep);
      uint32_t keys[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) keys[i] = magnitude_keys<Element>(x[i]);
      keep_two_of_four(keys, integer_at_least, keep);
    } else {
      const uint32_t keep0 = largest_magnitudes<Element, N, M, 0>(x), keep1 = largest_magnitudes<Element, N, M, 1>(x);
#pragma unroll
      for (int i = 0; i < M; ++i) keep[i] = (keep0 >> i & 1 ? 0xffffu : 0u) | (keep1 >> i & 1 ? 0xffff0000u : 0u);
    }
  }

  static __device__ __forceinline__ void prune(uint32_t (&x)[M], const GroupPair&, const RuleParameters&) {
    uint32_t masks[M];
    keep(x, masks);
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] &= masks[i];
  }
};

template <typename Element, int N, int M>
struct RescaleMagnitude {
  static constexpr bool kIsRandom = false, kIsLong = false;
  static constexpr Packing kPacking = N == 2 && M == 4 ? Packing::kPair : Packing::kFromPruned;

  static __device__ __forceinline__ PackedQuads pack(const uint32_t (&x)[4], const RuleParameters& parameters) {
    using Traits = ElementTraits<Element>;
    uint32_t keep[4];
    keep_two_of_four(x, magnitude_at_least, keep);
    PackedQuads packed = pack_kept(x, keep);
    const float low[2] = {Traits::to_float(half_of<0>(packed.low)), Traits::to_float(half_of<1>(packed.low))};
    const float high[2] = {Traits::to_float(half_of<0>(packed.high)), Traits::to_float(half_of<1>(packed.high))};
    const float total[2] = {sum_of<0>(x), sum_of<1>(x)};
    float denominator[2], numerator[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float kept = __fadd_rn(fabsf(low[half]), fabsf(high[half]));
      numerator[half] = kept == 0.0f ? 1.0f : total[half];
      denominator[half] = kept == 0.0f ? 1.0f : __fadd_rn(kept, parameters.eps);
    }
    const float smallest = fminf(fminf(numerator[0], denominator[0]), fminf(numerator[1], denominator[1]));
    // Where the total is within this bound, the quad is ordered. Not max: fmaxf drops a NaN, their sum does not.
    const float bound = (total[0] + denominator[0]) + (total[1] + denominator[1]);
    if (smallest >= 0x1p-60f && bound <= 0x1p60f) {
      const float scale[2] = {divide(numerator[0], denominator[0]), divide(numerator[1], denominator[1])};
      packed.low = pack_floats<Element>(__fmul_rn(low[0], scale[0]), __fmul_rn(low[1], scale[1]));
      packed.high = pack_floats<Element>(__fmul_rn(high[0], scale[0]), __fmul_rn(high[1], scale[1]));
    } else {
      packed = Magnitude<Element, N, M>::pack(x, parameters);
      rescale_packed<0>(x, packed, total[0], parameters.eps);
      rescale_packed<1>(x, packed, total[1], parameters.eps);
    }
    return packed;
  }

  static __device__ __forceinline__ void prune(uint32_t (&x)[M], const GroupPair& groups,
                                               const RuleParameters& parameters) {
    uint32_t kept[M];
#pragma unroll
    for (int i = 0; i < M; ++i) kept[i] = x[i];
    Magnitude<Element, N, M>::prune(kept, groups, parameters);
    rescale<0>(x, kept, parameters.eps);
    rescale<1>(x, kept, parameters.eps);
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] = kept[i];
  }

 private:
  template <int kHalf>
  static __device__ __forceinline__ void rescale(const uint32_t (&x)[M], uint32_t (&kept)[M], float eps) {
    if (!is_finite_group<Element, M, kHalf>(x)) return;
    const float scale = rescale_factor(sum_of<kHalf>(x), sum_of<kHalf>(kept), eps);
#pragma unroll
    for (int i = 0; i < M; ++i) replace_half<kHalf>(kept[i], scale_nonzero<Element>(half_of<kHalf>(kept[i]), scale));
  }

  template <int kHalf>
  static __device__ __forceinline__ float sum_of(const uint32_t (&x)[M]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < M; ++i) sum = __fadd_rn(sum, fabsf(ElementTraits<Element>::to_float(half_of<kHalf>(x[i]))));
    return sum;
  }

  template <int kHalf>
  static __device__ __forceinline__ void rescale_packed(const uint32_t (&x)[4], PackedQuads& packed, float total,
                                                        float eps) {
    using Traits = ElementTraits<Element>;
    const uint32_t low = half_of<kHalf>(packed.low), high = half_of<kHalf>(packed.high);
    const float kept_total = __fadd_rn(fabsf(Traits::to_float(low)), fabsf(Traits::to_float(high)));
    // The sum of a finite group can overflow, so a sum that is not finite only calls for a closer look.
    if (!(total < __int_as_float(0x7f800000)) && !is_finite_group<Element, 4, kHalf>(x)) return;
    const float scale = rescale_factor(total, kept_total, eps);
    replace_half<kHalf>(packed.low, scale_nonzero<Element>(low, scale));
    replace_half<kHalf>(packed.high, scale_nonzero<Element>(high, scale));
  }
};

template <typename Element, int N, int M>
struct Random {
  static constexpr bool kIsRandom = true, kIsLong = M > 4;
  static constexpr Packing kPacking = Packing::kFromPruned;

  static __device__ __forceinline__ void prune(uint32_t (&x)[M], const GroupPair& groups,
                                               const RuleParameters& parameters) {
    uint32_t keys[2][M];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < M / 4; ++block) {
        const uint4 words = philox(parameters.stream, groups.index[half], block);
        keys[half][4 * block] = words.x, keys[half][4 * block + 1] = words.y;
        keys[half][4 * block + 2] = words.z, keys[half][4 * block + 3] = words.w;
      }
    }
    const uint32_t keep0 = choose<0>(x, keys[0], groups.length[0]), keep1 = choose<1>(x, keys[1], groups.length[1]);
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] &= (keep0 >> i & 1 ? 0xffffu : 0u) | (keep1 >> i & 1 ? 0xffff0000u : 0u);
  }

  // Bit i: element i of the group in half kHalf of x is kept, given a random key for each.
  template <int kHalf>
  static __device__ __forceinline__ uint32_t choose(const uint32_t (&x)[M], const uint32_t (&random_keys)[M],
                                                    int length) {
    const bool finite = is_finite_group<Element, M, kHalf>(x);
    uint32_t keys[M];
#pragma unroll
    for (int i = 0; i < M; ++i) {
      keys[i] = finite ? random_keys[i] : half_of<kHalf>(magnitude_keys<Element>(x[i]));
      if (i >= length) keys[i] = 0;  // loses every tie, having the higher index
    }
    return largest_two<N, M>(keys);
  }
};

template <typename Element, int N, int M>
struct Mvue {
  static constexpr bool kIsRandom = true, kIsLong = M > 4;
  static constexpr Packing kPacking = Packing::kFromPruned;
  static constexpr int kUnit = 1 << 24;  // probabilities and uniforms are integers in units of 2^-24

  static __device__ __forceinline__ void prune(uint32_t (&x)[M], const GroupPair& groups,
                                               const RuleParameters& parameters) {
    estimate<0>(x, philox(parameters.stream, groups.index[0], 0).x >> 8);
    estimate<1>(x, philox(parameters.stream, groups.index[1], 0).x >> 8);
  }

  // The group in half kHalf of x, by the uniform number `uniform` / kUnit.
  template <int kHalf>
  static __device__ __forceinline__ void estimate(uint32_t (&x)[M], int uniform) {
    using Traits = ElementTraits<Element>;
    uint32_t bits[M];
    float value[M], size[M];
    float largest = 0.0f;
    int nonzeros = 0;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      bits[i] = half_of<kHalf>(x[i]);
      value[i] = Traits::to_float(bits[i]);
      nonzeros += value[i] != 0.0f;
      largest = fmaxf(largest, fabsf(value[i]));
    }
    if (!is_finite_group<Element, M, kHalf>(x)) {
      const uint32_t keep = largest_magnitudes<Element, N, M, kHalf>(x);
#pragma unroll
      for (int i = 0; i < M; ++i) replace_half<kHalf>(x[i], keep >> i & 1 ? bits[i] : 0u);
      return;
    }
    if (nonzeros <= N) return;

    const int exponent = min(max(254 - static_cast<int>(__float_as_uint(largest) >> 23), 1), 254);
    const float normaliser = __uint_as_float(static_cast<uint32_t>(exponent) << 23);
#pragma unroll
    for (int i = 0; i < M; ++i) size[i] = __fmul_rn(fabsf(value[i]), normaliser);

    // At most N rounds of capping, then the probabilities of what is left; a capped element has size 0. A loop that
    // ends where nothing more is capped, which with large M is nearly always at once.
    float probability[M];
    uint32_t capped = 0;
    int remaining = N;
#pragma unroll 1
    for (int round = 0;; ++round) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < M; ++i) total = __fadd_rn(total, size[i]);
      const float factor = __fdiv_rn(static_cast<float>(remaining), fmaxf(total, 0x1p-100f));
      uint32_t reached = 0;
#pragma unroll
      for (int i = 0; i < M; ++i) {
        probability[i] = __fmul_rn(factor, size[i]);
        if (probability[i] >= 1.0f) reached |= 1u << i;
      }
      if (reached == 0 || round == N) break;
      capped |= reached;
      remaining -= __popc(reached);
#pragma unroll
      for (int i = 0; i < M; ++i) {
        if (reached >> i & 1) size[i] = 0.0f;
      }
    }

    // Systematic sampling on integer running sums; from the last free non-zero on, the sum is the limit exactly. Only
    // what is sampled is divided: at most N elements, found as bits of `hits`.
    int last = -1;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (value[i] != 0.0f && !(capped >> i & 1)) last = i;
    }
    const int limit = remaining * kUnit, shift = kUnit - 1 - uniform;
    int running = 0, weights[N] = {};
    uint32_t hits = 0;
    float sampled[N] = {};
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const int next = i >= last ? limit : min(running + static_cast<int>(probability[i] * kUnit), limit);
      if ((next + shift) >> 24 != (running + shift) >> 24) {
        if constexpr (N == 2) weights[1] = weights[0], sampled[1] = sampled[0];
        weights[0] = next - running, sampled[0] = value[i];
        hits |= 1u << i;
      }
      running = next;
    }
    uint32_t estimates[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float estimate = __fdiv_rn(sampled[n], __fmul_rn(static_cast<float>(max(weights[n], 1)), 0x1p-24f));
      estimates[n] = Traits::from_float(fminf(fmaxf(estimate, -Traits::kLargest), Traits::kLargest));
    }
    const uint32_t last_hit = hits == 0 ? 0u : 0x80000000u >> __clz(static_cast<int>(hits));
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (capped >> i & 1) continue;
      const uint32_t estimate = last_hit >> i & 1 ? estimates[0] : estimates[N - 1];
      replace_half<kHalf>(x[i], hits >> i & 1 ? estimate : 0u);
    }
  }
};

}  // namespace sdgp
