// Chooses the CPU kernels of column_sums: those of the instruction set of the others.

#include "column_sums.h"

#include <cstring>

#include "softmax_loss.h"

namespace imbalance::cpu {

const ColumnSumsKernels* column_sums_kernels() {
#if defined(__x86_64__)
  if (std::strcmp(kernels()->name, "avx512") == 0) return avx512_column_sums_kernels();
  if (std::strcmp(kernels()->name, "avx2") == 0) return avx2_column_sums_kernels();
#endif
  return baseline_column_sums_kernels();
}

}  // namespace imbalance::cpu
