// What bindings.cpp asks of the CPU kernels of column_sums. No torch and no threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../label_arguments.h"

namespace imbalance::cpu {

// The kernels of one instruction set, by Dtype; each works on tiles [first, last) of the logits.
struct ColumnSumsKernels {
  std::size_t (*scratch_bytes)(const ColumnSumsArguments&);  // 64-byte aligned, of each call
  std::int64_t (*tiles)(const ColumnSumsArguments&);
  std::int64_t (*parts)(const ColumnSumsArguments&);
  // Writes sums of p, of y p and of y to `sums` (parts, 3, C), a part of them for each tile. They add up to the result.
  void (*sums[4])(const ColumnSumsArguments&, std::int64_t first, std::int64_t last, void* scratch, double* sums);
  void (*gradient[4])(const ColumnSumsArguments&, std::int64_t first, std::int64_t last, void* scratch);
};

const ColumnSumsKernels* baseline_column_sums_kernels();
#if defined(__x86_64__)
const ColumnSumsKernels* avx2_column_sums_kernels();
const ColumnSumsKernels* avx512_column_sums_kernels();
#endif

// Those of the instruction set that kernels() chose.
const ColumnSumsKernels* column_sums_kernels();

}  // namespace imbalance::cpu
