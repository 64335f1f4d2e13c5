// CUTLASS's host reference: a GEMM on the CPU, of a 2:4 operand that CUTLASS's own host code uncompresses. ELEMENT comes
// from the command line.
#include <cstdint>
#include <vector>

#include "cutlass/cutlass.h"
#include "cutlass/layout/matrix.h"
#include "cutlass/util/host_uncompress.h"
#include "cutlass/util/reference/host/gemm.h"

using Element = ELEMENT;
using Row = cutlass::layout::RowMajor;

// d[m, n] = uncompressed(values [m, k / 2], words [m, k / 16]) * b[k, n]
extern "C" void run(int m, int n, int k, Element* values, uint16_t* words, Element* b, float* d) {
  std::vector<Element> dense(static_cast<size_t>(m) * k);
  cutlass::TensorRef<Element, Row> a(dense.data(), Row(k));
  cutlass::uncompress(a, cutlass::TensorRef<Element, Row>(values, Row(k / 2)),
                      cutlass::TensorRef<uint16_t, Row>(words, Row(k / 16)), m, k);
  cutlass::reference::host::Gemm<Element, Row, Element, Row, float, Row, float, float> gemm;
  gemm({m, n, k}, 1.f, a, {b, Row(n)}, 0.f, {d, Row(n)}, {d, Row(n)}, 0.f);
}
