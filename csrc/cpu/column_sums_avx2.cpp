// The CPU kernels of column_sums for AVX2.

#if defined(__x86_64__)

// Before any header: an inline function of the standard library must not be compiled for AVX2 and then, as the linker's
// pick of its copies, be called on a processor without it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "target_avx2.h"

#include "column_sums_kernels.h"

namespace imbalance::cpu {

const ColumnSumsKernels* avx2_column_sums_kernels() {
  static constexpr ColumnSumsKernels kernels = column_sums_kernels_of<32>();
  return &kernels;
}

}  // namespace imbalance::cpu

#include "target_end.h"

#endif
