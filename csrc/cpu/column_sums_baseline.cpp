// The CPU kernels of column_sums for what every processor of the architecture has: SSE2 on x86-64, NEON on ARM.

#include "column_sums_kernels.h"

namespace imbalance::cpu {

const ColumnSumsKernels* baseline_column_sums_kernels() {
  static constexpr ColumnSumsKernels kernels = column_sums_kernels_of<16>();
  return &kernels;
}

}  // namespace imbalance::cpu
