// CUTLASS's own host-side code for 2:4 metadata, as a filter: the yardstick of sdgp_accel/layouts.py.
//
//   cutlass_host sm80 M W          stdin: uint16 words [M, W]          stdout: what reorder_meta makes of them
//   cutlass_host sm90_k<32|64|128> M W                                 stdout: the words where Sm90GemmSparseConfig puts them
//   cutlass_host uncompress M W    stdin: words [M, W], then values [M, 8 W]   stdout: dense [M, 16 W]
//
// Values are 16-bit patterns. M and W fill whole tiles (the caller pads).

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "cutlass/layout/matrix.h"
#include "cutlass/util/host_reorder.h"
#include "cutlass/util/host_uncompress.h"

using Words = std::vector<uint16_t>;
using RowMajor = cutlass::layout::RowMajor;
using Reordered = cutlass::layout::ColumnMajorInterleaved<2>;

static Words read(size_t count) {
  Words words(count);
  if (std::fread(words.data(), 2, count, stdin) != count) std::exit(2);
  return words;
}

static Words sm80(Words words, int m, int w) {
  Words reordered(words.size());
  cutlass::reorder_meta(cutlass::TensorRef<uint16_t, Reordered>(reordered.data(), Reordered::packed({m, w})),
                        cutlass::TensorRef<uint16_t, RowMajor>(words.data(), RowMajor::packed({m, w})), {m, 0, w});
  return reordered;
}

template <int K>
static Words sm90(Words const& words, int m, int w) {
  using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, cutlass::half_t>, cute::GMMA::Major::K,
                                               cute::sparse_elem<8, uint8_t>, cute::Int<K>>;
  auto layout = Config::fill_layoutE(cute::make_tuple(m, 0, 16 * w, 1));  // in bits: one per element of A
  Words placed(cute::cosize(layout) / 16);
  for (int row = 0; row < m; ++row) {
    for (int k = 0; k < 16 * w; ++k) {
      auto bit = layout(row, k, 0);
      placed[bit / 16] |= ((words[row * w + k / 16] >> (k % 16)) & 1) << (bit % 16);
    }
  }
  return placed;
}

static Words uncompress(Words words, int m, int w) {
  Words values = read(size_t(m) * w * 8), dense(size_t(m) * w * 16);
  auto half = [](Words& data) { return reinterpret_cast<cutlass::half_t*>(data.data()); };
  cutlass::uncompress(cutlass::TensorRef<cutlass::half_t, RowMajor>(half(dense), RowMajor::packed({m, 16 * w})),
                      cutlass::TensorRef<cutlass::half_t, RowMajor>(half(values), RowMajor::packed({m, 8 * w})),
                      cutlass::TensorRef<uint16_t, RowMajor>(words.data(), RowMajor::packed({m, w})), m, 16 * w);
  return dense;
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  std::string what = argv[1];
  int m = std::atoi(argv[2]), w = std::atoi(argv[3]);
  Words words = read(size_t(m) * w);
  Words result = what == "sm80"         ? sm80(words, m, w)
                 : what == "sm90_k32"   ? sm90<32>(words, m, w)
                 : what == "sm90_k64"   ? sm90<64>(words, m, w)
                 : what == "sm90_k128"  ? sm90<128>(words, m, w)
                                        : uncompress(words, m, w);
  std::fwrite(result.data(), 2, result.size(), stdout);
  return 0;
}
