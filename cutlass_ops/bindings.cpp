// Python's view of the kernels: raw pointers, sizes and a stream as integers, no libtorch. Arguments are checked before
// anything is launched; a launch that fails raises RuntimeError with the kernel's name and CUDA's message. A call with
// positional arguments takes little of the host's time. Launches release the GIL, since one that meets a full queue
// waits for the GPU.
//
// Classes are local to the module, so that a process can hold two builds of it.
//
// Every instance is a C function in this shared library and is found by its name, so adding one means adding a file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "sdgp/backward_launch.h"
#include "sdgp/device_check_api.h"

namespace py = pybind11;

namespace {

using sdgp::Backward;
using sdgp::Product;
using sdgp::PruneCompress;
using sdgp::ScopeScales;
using sdgp::SparseConv;
using sdgp::SparseGemm;
using Launching = py::call_guard<py::gil_scoped_release>;

// Both kinds of product take these, and are called alike.
template <typename Kind, typename... Sizes, typename... Arguments>
void define_product(py::module_& module, const char* name, const char* doc, const Arguments&... sizes) {
  using Options = int64_t;
  py::class_<Kind, Product, std::shared_ptr<Kind>>(module, name, py::module_local(), doc)
      .def(py::init<const std::string&, Sizes..., Options, Options, Options, Options, Options, Options, bool, bool>(),
           py::arg("name"), py::kw_only(), sizes..., py::arg("padded_k"), py::arg("splits") = 1,
           py::arg("owned_blocks") = 0, py::arg("group_n") = 8, py::arg("cluster_size") = 2, py::arg("sm_count"),
           py::arg("out_is_float") = false, py::arg("accumulate") = false)
      .def(
          "__call__",
          [](const Kind& product, int64_t values, int64_t metadata, int64_t b, int64_t out, int64_t workspace,
             int64_t stream) { product(values, metadata, b, out, workspace, stream); },
          Launching(), py::arg("values"), py::arg("metadata"), py::arg("b"), py::arg("out"), py::arg("workspace") = 0,
          py::arg("stream") = 0);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The CUDA kernels of sdgp_accel. Pointers are device addresses; 0 where an output is not wanted.";
  module.attr("ARCHS") = SDGP_ARCHS;
  module.def(
      "has", [](const std::string& name) { return sdgp::find_function(name) != nullptr; }, py::arg("name"),
      "Whether this build holds the kernel instance `name`.");
  module.def(
      "device_problem",
      [] {
        const int error = sdgp_check_device();
        return std::string(error == cudaSuccess ? "" : cudaGetErrorString(static_cast<cudaError_t>(error)));
      },
      "Why kernels of this build cannot be launched on the current device, in CUDA's words; empty where they can.");
  module.def(
      "bias_partial_rows",
      [](int64_t t, int64_t c) {
        sdgp::check_matrix(t, c, c);
        return sdgp_bias_partial_rows(t, c);
      },
      py::arg("t"), py::arg("c"), "Rows of the workspace bias_partials, float32 [rows, c].");
  module.def(
      "scope_workspace",
      [](int64_t t, int64_t c, int64_t positions_per_sample) {
        sdgp::check_matrix(t, c, c);
        sdgp::check_samples(positions_per_sample, t);
        return sdgp_scope_workspace(t, c, positions_per_sample);
      },
      py::arg("t"), py::arg("c"), py::arg("positions_per_sample"),
      "Values of the workspace `sums` of ScopeScales, float64; it may be null where that is 0.");
  py::class_<PruneCompress, std::shared_ptr<PruneCompress>>(
      module, "PruneCompress", py::module_local(),
      "Prune dY [t, c] and compress it along both axes; SdgpPruneCompress in "
      "prune_compress_api.h. dgrad_k, wgrad_k: 0 where that operand is not wanted.")
      .def(py::init<const std::string&, int64_t, int64_t, const std::string&, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t, float, std::optional<int64_t>, const std::string&, bool>(),
           py::kw_only(), py::arg("function"), py::arg("n"), py::arg("m"), py::arg("dtype"), py::arg("t"), py::arg("c"),
           py::arg("row_stride"), py::arg("dgrad_k") = 0, py::arg("dgrad_words") = 0, py::arg("wgrad_k") = 0,
           py::arg("wgrad_pitch") = 0, py::arg("eps") = 0.0f, py::arg("positions_per_sample") = py::none(),
           py::arg("metadata_layout") = "row_major", py::arg("bias_is_float") = false)
      .def("__call__", &PruneCompress::operator(), Launching(), py::arg("dy"), py::arg("dgrad_values") = 0,
           py::arg("dgrad_metadata") = 0, py::arg("wgrad_values") = 0, py::arg("wgrad_metadata") = 0,
           py::arg("bias") = 0, py::arg("bias_partials") = 0, py::arg("seed") = 0, py::arg("key") = 0,
           py::arg("offset") = 0, py::arg("rank") = 0, py::arg("dgrad_scale") = 0, py::arg("wgrad_scale") = 0,
           py::arg("stream") = 0);
  py::class_<ScopeScales, std::shared_ptr<ScopeScales>>(
      module, "ScopeScales", py::module_local(),
      "The factors of rescale_magnitude over a scope wider than a group; SdgpScopeScales there.")
      .def(py::init<int64_t, int64_t, const std::string&, int64_t, int64_t, int64_t, int64_t, float>(), py::kw_only(),
           py::arg("n"), py::arg("m"), py::arg("dtype"), py::arg("t"), py::arg("c"), py::arg("row_stride"),
           py::arg("positions_per_sample"), py::arg("eps"))
      .def("__call__", &ScopeScales::operator(), Launching(), py::arg("dy"), py::arg("sums") = 0,
           py::arg("dgrad_scale") = 0, py::arg("wgrad_scale") = 0, py::arg("stream") = 0);
  py::class_<Product, std::shared_ptr<Product>>(module, "Product", py::module_local(),
                                                "A sparse product: SparseGemm or SparseConv.");
  define_product<SparseGemm, int64_t, int64_t, int64_t>(
      module, "SparseGemm", "The instance `name` of the sparse GEMM; SdgpSparseGemm in sparse_gemm_api.h.",
      py::arg("m"), py::arg("n"), py::arg("k"));
  define_product<SparseConv, const SparseConv::Shape&, const SparseConv::Window&>(
      module, "SparseConv",
      "The instance `name` of the sparse convolution; SdgpSparseConv in sparse_conv_api.h. shape: n, h, w, c_in, p, "
      "q, c_out, r, s; window: stride, padding, dilation, vertical first.",
      py::arg("shape"), py::arg("window"));
  py::class_<Backward>(
      module, "Backward", py::module_local(),
      "The launches of one layer's backward. All places are bytes from the beginning of one block. sweeps: "
      "(PruneCompress, ScopeScales or None, (values, metadata) of dgrad or None, the same of wgrad, workspace, "
      "dgrad_scale, wgrad_scale); dgrad, wgrad: (product, (values, metadata), workspace) or None.")
      .def(py::init<std::vector<Backward::Sweep>, std::optional<Backward::Part>, std::optional<Backward::Part>>(),
           py::arg("sweeps"), py::arg("dgrad"), py::arg("wgrad"))
      .def("__call__", &Backward::operator(), Launching(), py::arg("dy"), py::arg("block"), py::arg("bias") = 0,
           py::arg("seed") = 0, py::arg("key") = 0, py::arg("offset") = 0, py::arg("rank") = 0, py::arg("weight") = 0,
           py::arg("dx") = 0, py::arg("x") = 0, py::arg("dw") = 0, py::arg("stream") = 0);
}
