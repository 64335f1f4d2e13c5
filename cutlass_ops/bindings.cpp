// Python's view of the kernels: raw pointers, sizes and a stream as integers, no libtorch. Arguments are checked before
// anything is launched; a launch that fails raises RuntimeError with the kernel's name and CUDA's message.
//
// Every instance is a C function in this shared library and is found by its name, so adding one means adding a file.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

#include "sdgp/prune_compress_api.h"
#include "sdgp/sparse_conv_api.h"
#include "sdgp/sparse_gemm_api.h"

namespace py = pybind11;

namespace {

void* find_function(const std::string& name) {
  static std::unordered_map<std::string, void*> known;
  const auto found = known.find(name);
  if (found != known.end()) return found->second;
  static void* const library = [] {
    Dl_info self;
    dladdr(reinterpret_cast<void*>(&find_function), &self);
    return dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }();
  return known[name] = library == nullptr ? nullptr : dlsym(library, name.c_str());
}

template <typename Function>
Function* instance(const std::string& name) {
  void* const function = find_function(name);
  if (function == nullptr) throw py::value_error("this build has no kernel " + name + "; built for " SDGP_ARCHS);
  return reinterpret_cast<Function*>(function);
}

constexpr int kDriverErrorBase = 1000;  // entry points add it to a CUresult

void check_launch(const std::string& name, int error) {
  if (error == cudaSuccess) return;
  if (error >= kDriverErrorBase) {
    throw std::runtime_error(name + ": tensor map rejected, CUresult " + std::to_string(error - kDriverErrorBase));
  }
  cudaGetLastError();  // or the next call that looks would report this failure as its own
  throw std::runtime_error(name + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

void check_pointer(const char* argument, int64_t pointer, int64_t alignment) {
  if (pointer == 0) throw py::value_error(std::string(argument) + " must be a device pointer; got 0");
  if (pointer % alignment != 0) {
    throw py::value_error(std::string(argument) + " must be aligned to " + std::to_string(alignment) + " bytes; got " +
                          std::to_string(pointer));
  }
}

void check_size(const char* argument, int64_t size, int64_t least) {
  // Beyond 2^62 the addresses of 16-bit elements could not be counted in 64 bits.
  if (size < least || size >= int64_t{1} << 62) {
    throw py::value_error(std::string(argument) + " must be at least " + std::to_string(least) +
                          " and below 2^62; got " + std::to_string(size));
  }
}

void check_padded(const char* argument, int64_t padded, int64_t length, int64_t multiple = 16) {
  if (padded % multiple != 0 || padded < length) {
    throw py::value_error(std::string(argument) + " must be a multiple of " + std::to_string(multiple) + ", at least " +
                          std::to_string(length) + "; got " + std::to_string(padded));
  }
}

// Names of SDGP_LAYOUT_.., and how many k their tiles cover.
constexpr std::array<std::string_view, 5> kLayouts = {"row_major", "sm80", "sm90_k32", "sm90_k64", "sm90_k128"};
constexpr std::array<int64_t, 5> kLayoutTiles = {16, 32, 32, 64, 128};

// rows * stride must be countable.
void check_extent(const char* arguments, int64_t rows, int64_t stride) {
  int64_t extent;
  if (__builtin_mul_overflow(rows, stride, &extent) || extent >= int64_t{1} << 62) {
    throw py::value_error(std::string(arguments) + " must have a product below 2^62; got " + std::to_string(rows) +
                          " and " + std::to_string(stride));
  }
}

void check_matrix(int64_t dy, int64_t t, int64_t c, int64_t row_stride) {
  check_pointer("dy", dy, 2);
  check_size("t", t, 1);
  check_size("c", c, 1);
  check_size("row_stride", row_stride, c);
  check_extent("t and row_stride", t, row_stride);
}

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

std::string pattern_name(const std::string& prefix, int n, int m, const std::string& dtype) {
  return prefix + "_" + std::to_string(n) + "_" + std::to_string(m) + "_" + dtype;
}

void prune_compress(const std::string& function, int n, int m, const std::string& dtype, int64_t dy, int64_t t,
                    int64_t c, int64_t row_stride, int64_t dgrad_values, int64_t dgrad_metadata, int64_t dgrad_k,
                    int64_t wgrad_values, int64_t wgrad_metadata, int64_t wgrad_k, int64_t wgrad_pitch, int64_t bias,
                    int64_t bias_partials, int64_t seed, uint32_t rank, float eps, int64_t dgrad_scale,
                    int64_t wgrad_scale, int64_t positions_per_sample, const std::string& metadata_layout,
                    int64_t stream) {
  check_matrix(dy, t, c, row_stride);
  const auto layout = std::find(kLayouts.begin(), kLayouts.end(), metadata_layout) - kLayouts.begin();
  if (layout == std::ssize(kLayouts))
    throw py::value_error("metadata_layout must be one of row_major, sm80, sm90_k32, sm90_k64, sm90_k128; got '" +
                          metadata_layout + "'");
  const int64_t tile_k = kLayoutTiles[layout];
  if (dgrad_values != 0) {
    check_pointer("dgrad_values", dgrad_values, 16);
    check_pointer("dgrad_metadata", dgrad_metadata, 16);
    check_padded("dgrad_k", dgrad_k, c, tile_k);
    check_extent("t and dgrad_k", t, dgrad_k);
  }
  if (wgrad_values != 0) {
    check_pointer("wgrad_values", wgrad_values, 16);
    check_pointer("wgrad_metadata", wgrad_metadata, 16);
    check_padded("wgrad_k", wgrad_k, t, tile_k);
    if (wgrad_pitch == 0) wgrad_pitch = c;
    if (wgrad_pitch != c && wgrad_pitch != (c + 7) / 8 * 8) {
      throw py::value_error("wgrad_pitch must be c = " + std::to_string(c) +
                            ", or that padded to a multiple of 8; got " + std::to_string(wgrad_pitch));
    }
    check_extent("wgrad_pitch and wgrad_k", wgrad_pitch, wgrad_k);
  }
  if (bias != 0) {
    check_pointer("bias", bias, 4);
    check_pointer("bias_partials", bias_partials, 4);
  }
  if (function == "random" || function == "mvue") check_pointer("seed", seed, 8);
  const bool wide = dgrad_scale != 0 || wgrad_scale != 0;
  if (wide) {
    if (function != "rescale_magnitude")
      throw py::value_error("function must be 'rescale_magnitude' with scales; got '" + function + "'");
    if (dgrad_values != 0) check_pointer("dgrad_scale", dgrad_scale, 4);
    if (wgrad_values != 0) check_pointer("wgrad_scale", wgrad_scale, 4);
    check_size("positions_per_sample", positions_per_sample, 0);
  }
  const SdgpPruneCompress problem{pointer<const void>(dy),
                                  t,
                                  c,
                                  row_stride,
                                  pointer<void>(dgrad_values),
                                  pointer<void>(dgrad_metadata),
                                  dgrad_k,
                                  pointer<void>(wgrad_values),
                                  pointer<void>(wgrad_metadata),
                                  wgrad_k,
                                  wgrad_pitch,
                                  pointer<float>(bias),
                                  pointer<float>(bias_partials),
                                  pointer<const int64_t>(seed),
                                  rank,
                                  eps,
                                  pointer<const float>(dgrad_scale),
                                  pointer<const float>(wgrad_scale),
                                  positions_per_sample,
                                  static_cast<int32_t>(layout),
                                  pointer<void>(stream)};
  const std::string name = pattern_name("sdgp_" + (wide ? "scaled_magnitude" : function), n, m, dtype);
  check_launch(name, instance<SdgpPruneCompressFunction>(name)(&problem));
}

void scope_scales(int n, int m, const std::string& dtype, int64_t dy, int64_t t, int64_t c, int64_t row_stride,
                  int64_t positions_per_sample, float eps, int64_t sums, int64_t dgrad_scale, int64_t wgrad_scale,
                  int64_t stream) {
  check_matrix(dy, t, c, row_stride);
  check_size("positions_per_sample", positions_per_sample, 0);
  if (positions_per_sample > 0 && t % positions_per_sample != 0) {
    throw py::value_error("positions_per_sample must divide t = " + std::to_string(t) + "; got " +
                          std::to_string(positions_per_sample));
  }
  if (sdgp_scope_workspace(t, c, positions_per_sample) > 0) check_pointer("sums", sums, 8);
  if (dgrad_scale != 0) check_pointer("dgrad_scale", dgrad_scale, 4);
  if (wgrad_scale != 0) check_pointer("wgrad_scale", wgrad_scale, 4);
  const SdgpScopeScales problem{pointer<const void>(dy),
                                t,
                                c,
                                row_stride,
                                positions_per_sample,
                                eps,
                                pointer<double>(sums),
                                pointer<float>(dgrad_scale),
                                pointer<float>(wgrad_scale),
                                pointer<void>(stream)};
  const std::string name = pattern_name("sdgp_scope_scales", n, m, dtype);
  check_launch(name, instance<SdgpScopeScalesFunction>(name)(&problem));
}

// Instances that move their dense operand and their output in chunks of 16 bytes; the others take any rows of 2.
bool in_chunks(const std::string& name) { return !name.ends_with("_any"); }

bool is_wgrad(const std::string& name) { return name.find("wgrad") != std::string::npos; }

// What both kinds of sparse product take beside their shapes.
void check_product(const std::string& name, bool out_is_float, int64_t values, int64_t metadata, int64_t b, int64_t out,
                   int64_t workspace, int32_t padded_k, int32_t splits, int32_t group_n, int32_t cluster_size,
                   int32_t sm_count) {
  check_pointer("values", values, 16);
  check_pointer("metadata", metadata, 16);
  check_pointer("b", b, in_chunks(name) ? 16 : 2);
  check_pointer("out", out, in_chunks(name) ? 16 : out_is_float ? 4 : 2);
  check_size("splits", splits, 1);
  if (splits > 1) check_pointer("workspace", workspace, 16);
  check_size("group_n", group_n, 1);
  check_size("sm_count", sm_count, 1);
  if (cluster_size != 1 && cluster_size != 2) {
    throw py::value_error("cluster_size must be 1 or 2; got " + std::to_string(cluster_size));
  }
  // Hopper's copies end with the operand; the others read whole tiles of 64 k.
  check_padded("padded_k", padded_k, 0, name.starts_with("sdgp_sm90_") ? 16 : 64);
}

void check_multiple(const char* argument, int32_t size, int32_t factor) {
  check_size(argument, size, 1);
  if (size % factor != 0) {
    throw py::value_error(std::string(argument) + " must be a multiple of " + std::to_string(factor) + "; got " +
                          std::to_string(size));
  }
}

void sparse_gemm(const std::string& name, int64_t values, int64_t metadata, int64_t b, int64_t out, int64_t workspace,
                 int32_t m, int32_t n, int32_t k, int32_t padded_k, int32_t splits, int32_t group_n,
                 int32_t cluster_size, int32_t sm_count, bool out_is_float, bool accumulate, int64_t stream) {
  check_product(name, out_is_float, values, metadata, b, out, workspace, padded_k, splits, group_n, cluster_size,
                sm_count);
  check_size("m", m, 1);
  check_multiple("n", n, in_chunks(name) ? 8 : 1);
  check_padded("padded_k", padded_k, k);
  const SdgpSparseGemm problem{pointer<const void>(values),
                               pointer<const void>(metadata),
                               pointer<const void>(b),
                               pointer<void>(out),
                               pointer<void>(workspace),
                               m,
                               n,
                               k,
                               padded_k,
                               splits,
                               group_n,
                               cluster_size,
                               sm_count,
                               out_is_float,
                               accumulate,
                               pointer<void>(stream)};
  check_launch(name, instance<SdgpSparseGemmFunction>(name)(&problem));
}

void sparse_conv(const std::string& name, int64_t values, int64_t metadata, int64_t b, int64_t out, int64_t workspace,
                 const std::array<int32_t, 9>& shape, const std::array<int32_t, 6>& window, int32_t padded_k,
                 int32_t splits, int32_t group_n, int32_t cluster_size, int32_t sm_count, bool out_is_float,
                 bool accumulate, int64_t stream) {
  check_product(name, out_is_float, values, metadata, b, out, workspace, padded_k, splits, group_n, cluster_size,
                sm_count);
  for (const int32_t size : shape) check_size("shape", size, 1);
  check_multiple("c_in", shape[3], in_chunks(name) ? 8 : 1);
  for (const int i : {0, 1, 4, 5}) check_size("stride and dilation", window[i], 1);
  const auto [batch, h, w, c_in, p, q, c_out, r, s] = shape;
  check_padded("padded_k", padded_k, is_wgrad(name) ? int64_t{batch} * p * q : c_out);
  const SdgpSparseConv problem{pointer<const void>(values),
                               pointer<const void>(metadata),
                               pointer<const void>(b),
                               pointer<void>(out),
                               pointer<void>(workspace),
                               batch,
                               h,
                               w,
                               c_in,
                               p,
                               q,
                               c_out,
                               r,
                               s,
                               window[0],
                               window[1],
                               window[2],
                               window[3],
                               window[4],
                               window[5],
                               padded_k,
                               splits,
                               group_n,
                               cluster_size,
                               sm_count,
                               out_is_float,
                               accumulate,
                               pointer<void>(stream)};
  check_launch(name, instance<SdgpSparseConvFunction>(name)(&problem));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The CUDA kernels of sdgp_accel. Pointers are device addresses; 0 where an output is not wanted.";
  module.attr("ARCHS") = SDGP_ARCHS;
  module.def(
      "has", [](const std::string& name) { return find_function(name) != nullptr; }, py::arg("name"),
      "Whether this build holds the kernel instance `name`.");
  module.def("prune_compress", &prune_compress, py::kw_only(), py::arg("function"), py::arg("n"), py::arg("m"),
             py::arg("dtype"), py::arg("dy"), py::arg("t"), py::arg("c"), py::arg("row_stride"),
             py::arg("dgrad_values") = 0, py::arg("dgrad_metadata") = 0, py::arg("dgrad_k") = 0,
             py::arg("wgrad_values") = 0, py::arg("wgrad_metadata") = 0, py::arg("wgrad_k") = 0,
             py::arg("wgrad_pitch") = 0, py::arg("bias") = 0, py::arg("bias_partials") = 0, py::arg("seed") = 0,
             py::arg("rank") = 0, py::arg("eps") = 0.0f, py::arg("dgrad_scale") = 0, py::arg("wgrad_scale") = 0,
             py::arg("positions_per_sample") = 0, py::arg("metadata_layout") = "row_major", py::arg("stream") = 0,
             "Prune dY [t, c] and compress it along both axes; SdgpPruneCompress in prune_compress_api.h.");
  module.def("bias_partial_rows", &sdgp_bias_partial_rows, py::arg("t"), py::arg("c"),
             "Rows of the workspace bias_partials, float32 [rows, c].");
  module.def("scope_workspace", &sdgp_scope_workspace, py::arg("t"), py::arg("c"), py::arg("positions_per_sample"),
             "Values of the workspace `sums` of scope_scales, float64; it may be null where that is 0.");
  module.def("scope_scales", &scope_scales, py::kw_only(), py::arg("n"), py::arg("m"), py::arg("dtype"), py::arg("dy"),
             py::arg("t"), py::arg("c"), py::arg("row_stride"), py::arg("positions_per_sample"), py::arg("eps"),
             py::arg("sums") = 0, py::arg("dgrad_scale") = 0, py::arg("wgrad_scale") = 0, py::arg("stream") = 0,
             "The factors of rescale_magnitude over a scope wider than a group; SdgpScopeScales there.");
  module.def("sparse_gemm", &sparse_gemm, py::arg("name"), py::kw_only(), py::arg("values"), py::arg("metadata"),
             py::arg("b"), py::arg("out"), py::arg("workspace") = 0, py::arg("m"), py::arg("n"), py::arg("k"),
             py::arg("padded_k"), py::arg("splits") = 1, py::arg("group_n") = 8, py::arg("cluster_size") = 2,
             py::arg("sm_count"), py::arg("out_is_float") = false, py::arg("accumulate") = false, py::arg("stream") = 0,
             "The instance `name` of the sparse GEMM; SdgpSparseGemm in sparse_gemm_api.h.");
  module.def("sparse_conv", &sparse_conv, py::arg("name"), py::kw_only(), py::arg("values"), py::arg("metadata"),
             py::arg("b"), py::arg("out"), py::arg("workspace") = 0, py::arg("shape"), py::arg("window"),
             py::arg("padded_k"), py::arg("splits") = 1, py::arg("group_n") = 8, py::arg("cluster_size") = 2,
             py::arg("sm_count"), py::arg("out_is_float") = false, py::arg("accumulate") = false, py::arg("stream") = 0,
             "The instance `name` of the sparse convolution; SdgpSparseConv in sparse_conv_api.h. shape: n, h, "
             "w, c_in, p, q, c_out, r, s; window: stride, padding, dilation, vertical first.");
}
