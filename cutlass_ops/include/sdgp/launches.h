// A launch of a kernel as an object: what is the same in every launch of one shape, found and checked once. Calling it
// takes addresses, 0 where there is none.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>

#include "sdgp/launch_checks.h"
#include "sdgp/prune_compress_api.h"
#include "sdgp/sparse_conv_api.h"
#include "sdgp/sparse_gemm_api.h"

namespace sdgp {

// Names of SDGP_LAYOUT_.., and how many k their tiles cover.
constexpr std::array<std::string_view, 5> kLayouts = {"row_major", "sm80", "sm90_k32", "sm90_k64", "sm90_k128"};
constexpr std::array<int64_t, 5> kLayoutTiles = {16, 32, 32, 64, 128};

inline std::string pattern_name(const std::string& prefix, int64_t n, int64_t m, const std::string& dtype) {
  check_choice("n", std::to_string(n), {"1", "2"});
  check_choice("m", std::to_string(m), {"4", "8", "16"});
  check_choice("dtype", dtype, {"f16", "bf16"});
  return prefix + "_" + std::to_string(n) + "_" + std::to_string(m) + "_" + dtype;
}

class PruneCompress {
 public:
  // positions_per_sample: of a scope wider than a group, 0 for one that is the whole tensor; none: the group.
  PruneCompress(const std::string& function, int64_t n, int64_t m, const std::string& dtype, int64_t t, int64_t c,
                int64_t row_stride, int64_t dgrad_k, int64_t dgrad_words, int64_t wgrad_k, int64_t wgrad_pitch,
                float eps, std::optional<int64_t> positions_per_sample, const std::string& metadata_layout,
                bool bias_is_float)
      : draws_(function == "random" || function == "mvue"), is_wide_(positions_per_sample.has_value()) {
    check_choice("function", function, {"magnitude", "random", "rescale_magnitude", "mvue"});
    check_matrix(t, c, row_stride);
    check_eps(eps);
    const auto layout = std::find(kLayouts.begin(), kLayouts.end(), metadata_layout) - kLayouts.begin();
    if (layout == std::ssize(kLayouts))
      throw std::invalid_argument(
          "metadata_layout must be one of row_major, sm80, sm90_k32, sm90_k64, sm90_k128; got '" + metadata_layout +
          "'");
    if (dgrad_k != 0) {
      check_padded("dgrad_k", dgrad_k, c, kLayoutTiles[layout]);
      check_extent("t and dgrad_k", t, dgrad_k);
    }
    const int64_t words = dgrad_k / 16, whole = layout == SDGP_LAYOUT_ROW_MAJOR ? (words + 7) / 8 * 8 : words;
    if (dgrad_words == 0) dgrad_words = words;
    if (dgrad_words != words && dgrad_words != whole) {
      throw std::invalid_argument("dgrad_words must be dgrad_k / 16 = " + std::to_string(words) +
                                  ", or row-major that padded to a multiple of 8; got " + std::to_string(dgrad_words));
    }
    if (wgrad_pitch == 0) wgrad_pitch = c;
    if (wgrad_k != 0) {
      check_padded("wgrad_k", wgrad_k, t, kLayoutTiles[layout]);
      if (wgrad_pitch != c && wgrad_pitch != (c + 7) / 8 * 8) {
        throw std::invalid_argument("wgrad_pitch must be c = " + std::to_string(c) +
                                    ", or that padded to a multiple of 8; got " + std::to_string(wgrad_pitch));
      }
      check_extent("wgrad_pitch and wgrad_k", wgrad_pitch, wgrad_k);
    }
    if (is_wide_) {
      if (function != "rescale_magnitude")
        throw std::invalid_argument("function must be 'rescale_magnitude' with positions_per_sample; got '" + function +
                                    "'");
      check_samples(*positions_per_sample, t);
    }
    name_ = pattern_name("sdgp_" + (is_wide_ ? "scaled_magnitude" : function), n, m, dtype);
    function_ = instance<SdgpPruneCompressFunction>(name_);
    problem_.t = t;
    problem_.c = c;
    problem_.row_stride = row_stride;
    problem_.dgrad_k = dgrad_k;
    problem_.dgrad_words = dgrad_words;
    problem_.wgrad_k = wgrad_k;
    problem_.wgrad_pitch = wgrad_pitch;
    problem_.eps = eps;
    problem_.positions_per_sample = positions_per_sample.value_or(0);
    problem_.metadata_layout = static_cast<int32_t>(layout);
    problem_.bias_is_float = bias_is_float;
  }

  // seed: an address, or 0 and the two numbers themselves.
  void operator()(int64_t dy, int64_t dgrad_values, int64_t dgrad_metadata, int64_t wgrad_values,
                  int64_t wgrad_metadata, int64_t bias, int64_t bias_partials, int64_t seed, int64_t key,
                  int64_t offset, uint32_t rank, int64_t dgrad_scale, int64_t wgrad_scale, int64_t stream) const {
    const bool for_dgrad = problem_.dgrad_k != 0, for_wgrad = problem_.wgrad_k != 0;
    check_pointer("dy", dy, 2);
    if (for_dgrad) {
      check_pointer("dgrad_values", dgrad_values, 16);
      check_pointer("dgrad_metadata", dgrad_metadata, 16);
      if (is_wide_) check_pointer("dgrad_scale", dgrad_scale, 4);
    }
    if (for_wgrad) {
      check_pointer("wgrad_values", wgrad_values, 16);
      check_pointer("wgrad_metadata", wgrad_metadata, 16);
      if (is_wide_) check_pointer("wgrad_scale", wgrad_scale, 4);
    }
    if (bias != 0) {
      check_pointer("bias", bias, problem_.bias_is_float ? 4 : 2);
      check_pointer("bias_partials", bias_partials, 4);
    }
    if (draws_ && seed != 0) check_pointer("seed", seed, 8);
    SdgpPruneCompress problem = problem_;
    problem.dy = pointer<const void>(dy);
    problem.dgrad_values = pointer<void>(for_dgrad ? dgrad_values : 0);
    problem.dgrad_metadata = pointer<void>(dgrad_metadata);
    problem.wgrad_values = pointer<void>(for_wgrad ? wgrad_values : 0);
    problem.wgrad_metadata = pointer<void>(wgrad_metadata);
    problem.bias = pointer<void>(bias);
    problem.bias_partials = pointer<float>(bias_partials);
    problem.seed = pointer<const int64_t>(seed);
    problem.seed_values[0] = key;
    problem.seed_values[1] = offset;
    problem.rank = rank;
    problem.dgrad_scale = pointer<const float>(dgrad_scale);
    problem.wgrad_scale = pointer<const float>(wgrad_scale);
    problem.stream = pointer<void>(stream);
    check_launch(name_, function_(&problem));
  }

 private:
  bool draws_, is_wide_;
  std::string name_;
  SdgpPruneCompressFunction* function_;
  SdgpPruneCompress problem_{};
};

class ScopeScales {
 public:
  ScopeScales(int64_t n, int64_t m, const std::string& dtype, int64_t t, int64_t c, int64_t row_stride,
              int64_t positions_per_sample, float eps)
      : name_(pattern_name("sdgp_scope_scales", n, m, dtype)) {
    check_matrix(t, c, row_stride);
    check_eps(eps);
    check_samples(positions_per_sample, t);
    function_ = instance<SdgpScopeScalesFunction>(name_);
    problem_.t = t;
    problem_.c = c;
    problem_.row_stride = row_stride;
    problem_.positions_per_sample = positions_per_sample;
    problem_.eps = eps;
    needs_sums_ = sdgp_scope_workspace(t, c, positions_per_sample) > 0;
  }

  void operator()(int64_t dy, int64_t sums, int64_t dgrad_scale, int64_t wgrad_scale, int64_t stream) const {
    check_pointer("dy", dy, 2);
    if (needs_sums_) check_pointer("sums", sums, 8);
    if (dgrad_scale != 0) check_pointer("dgrad_scale", dgrad_scale, 4);
    if (wgrad_scale != 0) check_pointer("wgrad_scale", wgrad_scale, 4);
    SdgpScopeScales problem = problem_;
    problem.dy = pointer<const void>(dy);
    problem.sums = pointer<double>(sums);
    problem.dgrad_scale = pointer<float>(dgrad_scale);
    problem.wgrad_scale = pointer<float>(wgrad_scale);
    problem.stream = pointer<void>(stream);
    check_launch(name_, function_(&problem));
  }

 private:
  bool needs_sums_;
  std::string name_;
  SdgpScopeScalesFunction* function_;
  SdgpScopeScales problem_{};
};

inline void check_multiple(const char* argument, int32_t size, int32_t factor) {
  check_size(argument, size, 1);
  if (size % factor != 0) {
    throw std::invalid_argument(std::string(argument) + " must be a multiple of " + std::to_string(factor) + "; got " +
                                std::to_string(size));
  }
}

// A sparse GEMM or convolution gradient.
class Product {
 public:
  virtual ~Product() = default;
  // step: SDGP_STEP_... overlaps: as SdgpSparseGemm's.
  virtual void operator()(int64_t values, int64_t metadata, int64_t b, int64_t out, int64_t workspace, int64_t stream,
                          int32_t step, bool overlaps) const = 0;
  // Whether there is something to do in SDGP_STEP_PREPARE.
  virtual bool needs_preparation() const = 0;
  // Whether it writes its result, for which it takes a kernel at least. What adds to a result may have nothing to add.
  virtual bool always_launches() const = 0;
};

// Problem: SdgpSparseGemm or SdgpSparseConv, which call alike what is alike.
template <typename Problem, typename Function>
class ProductOf : public Product {
 public:
  // k: how far padded_k must reach. kinds: how the names of these instances go on after their family's.
  ProductOf(const std::string& name, const Problem& problem, int64_t k, std::initializer_list<const char*> kinds)
      : name_(name), in_chunks_(!name.ends_with("_any")), function_(instance<Function>(name)), problem_(problem) {
    const auto is_kind = [&](const char* kind) {
      return name.starts_with(std::string("sdgp_sm80_") + kind) || name.starts_with(std::string("sdgp_sm90_") + kind);
    };
    if (std::none_of(kinds.begin(), kinds.end(), is_kind))
      throw std::invalid_argument("name must be that of an instance of this product; got " + name);
    // Hopper's copies end with the operand; the others read whole tiles of 64 k.
    check_padded("padded_k", problem.padded_k, k, name.starts_with("sdgp_sm90_") ? 16 : 64);
    if (problem.cluster_size != 1 && problem.cluster_size != 2) {
      throw std::invalid_argument("cluster_size must be 1 or 2; got " + std::to_string(problem.cluster_size));
    }
  }

  void operator()(int64_t values, int64_t metadata, int64_t b, int64_t out, int64_t workspace, int64_t stream,
                  int32_t step = SDGP_STEP_ALL, bool overlaps = false) const override {
    check_pointer("values", values, 16);
    check_pointer("metadata", metadata, 16);
    check_pointer("b", b, in_chunks_ ? 16 : 2);
    check_pointer("out", out, in_chunks_ ? 16 : problem_.out_is_float ? 4 : 2);
    if (problem_.splits > 1 || problem_.owned_blocks > 0) check_pointer("workspace", workspace, 16);
    Problem problem = problem_;
    problem.values = pointer<const void>(values);
    problem.metadata = pointer<const void>(metadata);
    problem.b = pointer<const void>(b);
    problem.out = pointer<void>(out);
    problem.workspace = pointer<void>(workspace);
    problem.step = step;
    problem.overlaps = overlaps;
    problem.stream = pointer<void>(stream);
    check_launch(name_, function_(&problem));
  }

  bool needs_preparation() const override { return problem_.owned_blocks > 0; }
  bool always_launches() const override { return problem_.accumulate == 0; }

 protected:
  std::string name_;
  bool in_chunks_;  // moves its dense operand and its output in chunks of 16 bytes; else takes any rows of 2
  Function* function_;
  Problem problem_;
};

// The options of a launch, in any Problem.
template <typename Problem>
Problem with_options(Problem problem, int64_t padded_k, int64_t splits, int64_t owned_blocks, int64_t group_n,
                     int64_t cluster_size, int64_t sm_count, bool out_is_float, bool accumulate) {
  problem.padded_k = checked("padded_k", padded_k);
  problem.splits = checked("splits", splits);
  problem.owned_blocks = checked("owned_blocks", owned_blocks, 0);
  problem.group_n = checked("group_n", group_n);
  problem.cluster_size = checked("cluster_size", cluster_size);
  problem.sm_count = checked("sm_count", sm_count);
  problem.out_is_float = out_is_float;
  problem.accumulate = accumulate;
  return problem;
}

class SparseGemm : public ProductOf<SdgpSparseGemm, SdgpSparseGemmFunction> {
 public:
  template <typename... Options>
  SparseGemm(const std::string& name, int64_t m, int64_t n, int64_t k, Options... options)
      : ProductOf(name, with_options(sizes(m, n, k), options...), k, {"dgrad_", "wgrad_"}) {
    check_multiple("n", problem_.n, in_chunks_ ? 8 : 1);
  }

 private:
  static SdgpSparseGemm sizes(int64_t m, int64_t n, int64_t k) {
    SdgpSparseGemm problem{};
    problem.m = checked("m", m);
    problem.n = checked("n", n);
    problem.k = checked("k", k);
    return problem;
  }
};

class SparseConv : public ProductOf<SdgpSparseConv, SdgpSparseConvFunction> {
 public:
  using Shape = std::array<int64_t, 9>;   // n, h, w, c_in, p, q, c_out, r, s
  using Window = std::array<int64_t, 6>;  // stride, padding, dilation, vertical first

  template <typename... Options>
  SparseConv(const std::string& name, const Shape& shape, const Window& window, Options... options)
      : ProductOf(name, with_options(sizes(shape, window), options...), reduced(name, shape),
                  {"conv_dgrad_", "conv_wgrad_"}) {
    check_multiple("c_in", problem_.c_in, in_chunks_ ? 8 : 1);
  }

 private:
  static int64_t reduced(const std::string& name, const Shape& shape) {
    const auto [n, h, w, c_in, p, q, c_out, r, s] = shape;
    return name.find("wgrad") != std::string::npos ? n * p * q : c_out;
  }

  // How many outputs a filter of `filter` taps has along an axis of `in`.
  static int64_t outputs(int64_t in, int64_t filter, int64_t stride, int64_t padding, int64_t dilation) {
    const int64_t range = in + 2 * padding - dilation * (filter - 1);
    return range < 1 ? 0 : (range - 1) / stride + 1;
  }

  static SdgpSparseConv sizes(const Shape& shape, const Window& window) {
    for (const int64_t size : shape) checked("shape", size);
    for (const int i : {0, 1, 4, 5}) checked("stride and dilation", window[i]);
    for (const int i : {2, 3}) checked("padding", window[i], 0);
    const auto [n, h, w, c_in, p, q, c_out, r, s] = shape;
    const int64_t height = outputs(h, r, window[0], window[2], window[4]);
    const int64_t width = outputs(w, s, window[1], window[3], window[5]);
    if (p != height || q != width) {
      throw std::invalid_argument("shape must have p, q = " + std::to_string(height) + ", " + std::to_string(width) +
                                  " with this window; got " + std::to_string(p) + ", " + std::to_string(q));
    }
    // Factors below 2^31: a product of two, checked, times the third still fits into 64 bits.
    checked("shape's n * h * w", checked("shape's h * w", h * w) * n);
    checked("shape's n * p * q", checked("shape's p * q", p * q) * n);
    checked("shape's r * s * c_in", checked("shape's r * s", r * s) * c_in);
    SdgpSparseConv problem{};
    std::tie(problem.n, problem.h, problem.w, problem.c_in, problem.p, problem.q, problem.c_out, problem.r, problem.s) =
        std::tuple_cat(shape);
    std::tie(problem.stride_h, problem.stride_w, problem.padding_h, problem.padding_w, problem.dilation_h,
             problem.dilation_w) = std::tuple_cat(window);
    return problem;
  }
};

}  // namespace sdgp
