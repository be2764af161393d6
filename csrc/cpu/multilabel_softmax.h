// What bindings.cpp asks of the CPU kernels of multilabel_softmax. No torch and no threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../label_arguments.h"

namespace imbalance::cpu {

struct MultilabelLossArguments {
  MultilabelArguments call;
  double inverse_divisor;  // of the gradient
};

// The kernels of one instruction set, by Dtype; each works on rows [first, last).
struct MultilabelKernels {
  std::size_t (*scratch_bytes)(const MultilabelArguments&);  // 64-byte aligned, of each call
  void (*loss[4])(const MultilabelLossArguments&, std::int64_t first, std::int64_t last, void* scratch);
};

const MultilabelKernels* baseline_multilabel_kernels();
#if defined(__x86_64__)
const MultilabelKernels* avx2_multilabel_kernels();
const MultilabelKernels* avx512_multilabel_kernels();
#endif

// Those of the instruction set that kernels() chose.
const MultilabelKernels* multilabel_kernels();

}  // namespace imbalance::cpu
