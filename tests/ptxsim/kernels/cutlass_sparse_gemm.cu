// CUTLASS's own sm_80 sparse GEMM, untouched. ELEMENT, OUT, LAYOUT_A, LAYOUT_B, TILE_K and MMA_K come from the command line.
#include <cstdint>

#include "cutlass/gemm/device/gemm_sparse.h"
#include "cutlass/util/host_reorder.h"
#include "cutlass/util/host_uncompress.h"

using Element = ELEMENT;
using Out = OUT;
using Row = cutlass::layout::RowMajor;
using Gemm = cutlass::gemm::device::SparseGemm<
    Element, cutlass::layout::LAYOUT_A, Element, cutlass::layout::LAYOUT_B, Out, Row, Out, cutlass::arch::OpClassTensorOp,
    cutlass::arch::Sm80, cutlass::gemm::GemmShape<64, 64, TILE_K>, cutlass::gemm::GemmShape<32, 32, TILE_K>,
    cutlass::gemm::GemmShape<16, 8, MMA_K>, cutlass::epilogue::thread::LinearCombination<Out, 4, Out, Out>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3>;
using Word = Gemm::ElementE;

// Selector words per row of A.
extern "C" int words(int k) { return k / Gemm::kSparse / Gemm::kElementsPerElementE; }

// Row-major metadata [m, words(k)] to the kernel's own order, with CUTLASS's host function.
extern "C" void reorder(int m, int k, Word* e, Word* reordered) {
  int columns = words(k);
  cutlass::TensorRef<Word, Row> from(e, Row(columns));
  cutlass::TensorRef<Word, Gemm::LayoutE> to(reordered, Gemm::LayoutE::packed({m, columns}));
  cutlass::reorder_meta(to, from, {m, 1, columns});
}

// The dense A of packed values and row-major metadata, with CUTLASS's host function.
extern "C" void uncompress(int m, int k, Element* packed, Word* e, Element* dense) {
  cutlass::TensorRef<Element, Row> a(packed, Row(k / Gemm::kSparse)), full(dense, Row(k));
  cutlass::uncompress(full, a, cutlass::TensorRef<Word, Row>(e, Row(words(k))), m, k);
}

extern "C" int run(int m, int n, int k, Element* a, int lda, Element* b, int ldb, Out* d, Word* e) {
  Gemm gemm;
  Gemm::Arguments arguments({m, n, k}, {a, lda}, {b, ldb}, {d, n}, {d, n}, {e, Gemm::LayoutE::packed({m, words(k)})},
                            {Out(1), Out(0)});
  cutlass::Status status = Gemm::can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr);
  if (status == cutlass::Status::kSuccess) status = gemm();
  return static_cast<int>(status);
}
