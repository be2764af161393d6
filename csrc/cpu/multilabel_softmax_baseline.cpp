// The CPU kernels of multilabel_softmax for what every processor of the architecture has: SSE2 on x86-64, NEON on ARM.

#include "multilabel_softmax_kernels.h"

namespace imbalance::cpu {

const MultilabelKernels* baseline_multilabel_kernels() {
  static constexpr MultilabelKernels kernels = multilabel_kernels_of<16>();
  return &kernels;
}

}  // namespace imbalance::cpu
