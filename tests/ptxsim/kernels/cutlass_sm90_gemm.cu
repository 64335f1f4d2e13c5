// CUTLASS's own sm_90a collective GEMM, untouched: D[m, n] = A[m, k] B[k, n] in bf16, n contiguous in B and D. IS_SPARSE (0 or 1), LAYOUT_A,
// CLUSTER_M, SCHEDULE and EPILOGUE come from the command line. For sparse, CUTLASS's own compressor kernel makes its operand.
#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/transform/device/transform_universal_adapter.hpp"
#include "cutlass/transform/kernel/sparse_gemm_compressor.hpp"
#include "cutlass/util/packed_stride.hpp"

using Element = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using LayoutA = cutlass::layout::LAYOUT_A;
using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using Cluster = cute::Shape<cute::Int<CLUSTER_M>, cute::_1, cute::_1>;
using Problem = cute::Shape<int, int, int, int>;
#if IS_SPARSE
using Class = cutlass::arch::OpClassSparseTensorOp;
#else
using Class = cutlass::arch::OpClassTensorOp;
#endif
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, Class, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, Row, 8,
    Element, Row, 8, cutlass::epilogue::EPILOGUE>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, Class, Element, LayoutA, 8, Element, Row, 8, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::SCHEDULE>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

template <typename Op, typename Arguments>
int run_op(Op& op, const Arguments& arguments) {
  cutlass::Status status = op.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = op.initialize(arguments, nullptr);
  if (status == cutlass::Status::kSuccess) status = op.run(nullptr);
  return static_cast<int>(status);
}

#if IS_SPARSE
using Config = typename Mainloop::SparseConfig;
using StrideA = cutlass::gemm::TagToStrideA_t<LayoutA>;
using Utility = cutlass::transform::kernel::StructuredSparseCompressorUtility<Problem, Element, LayoutA, Config>;
using Compressor = cutlass::transform::device::TransformUniversalAdapter<
    cutlass::transform::kernel::StructuredSparseCompressor<Problem, Element, LayoutA, Config, cutlass::arch::Sm90>>;

StrideA stride_a(int m, int k) { return cutlass::make_cute_packed_stride(StrideA{}, cute::make_shape(m, k, 1)); }

extern "C" void sizes(int m, int n, int k, int64_t* values, int64_t* metadata_bytes) {
  Utility utility(Problem{m, n, k, 1}, stride_a(m, k));
  *values = int64_t(utility.get_tensorA_m_physical()) * utility.get_tensorA_k_physical();
  *metadata_bytes = int64_t(utility.get_metadata_m_physical()) * utility.get_metadata_k_physical();
}

extern "C" int compress(int m, int n, int k, Element* a, Element* values, void* metadata) {
  cutlass::KernelHardwareInfo hardware;
  typename Compressor::Arguments arguments{
      Problem{m, n, k, 1}, {a, stride_a(m, k), values, static_cast<typename Mainloop::ElementE*>(metadata)}, {hardware}};
  Compressor compressor;
  return run_op(compressor, arguments);
}
#endif

extern "C" int run(int m, int n, int k, Element* a, void* metadata, Element* b, Element* d) {
  Problem problem{m, n, k, 1};
  auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(n, k, 1));
  auto stride_d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(m, n, 1));
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = 4;
#if IS_SPARSE
  typename Mainloop::Arguments operands{a, Config::fill_layoutA(problem), b, stride_b, static_cast<typename Mainloop::ElementE*>(metadata),
                                        Config::fill_layoutE(problem)};
#else
  auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, cute::make_shape(m, k, 1));
  typename Mainloop::Arguments operands{a, stride_a, b, stride_b};
#endif
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm, problem, operands, {{1.f, 0.f}, nullptr, stride_d, d, stride_d}, hardware};
  static Gemm gemm;
  return run_op(gemm, arguments);
}
