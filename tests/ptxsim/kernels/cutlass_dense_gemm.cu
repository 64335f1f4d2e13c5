// CUTLASS's own sm_80 dense GEMM, untouched: D = A B + C, A row-major, B column-major, split over k by a semaphore.
#include "cutlass/gemm/device/gemm.h"

using Half = cutlass::half_t;
using Row = cutlass::layout::RowMajor;
using Gemm = cutlass::gemm::device::Gemm<
    Half, Row, Half, cutlass::layout::ColumnMajor, float, Row, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<64, 64, 32>, cutlass::gemm::GemmShape<32, 32, 32>, cutlass::gemm::GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<float, 4, float, float>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3, 8, 8, true>;

extern "C" int run(int m, int n, int k, Half* a, Half* b, float* c, float* d, int splits, void* workspace) {
  Gemm gemm;
  Gemm::Arguments arguments({m, n, k}, {a, k}, {b, k}, {c, n}, {d, n}, {1.f, 1.f}, splits);
  cutlass::Status status = Gemm::can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, workspace);
  if (status == cutlass::Status::kSuccess) status = gemm();
  return static_cast<int>(status);
}
