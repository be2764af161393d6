// The CPU kernels for what every processor of the architecture has: SSE2 on x86-64, NEON on ARM.

#include "softmax_loss_kernels.h"

namespace imbalance::cpu {

const Kernels* baseline_kernels() {
  static constexpr Kernels kernels = kernels_of<16>("baseline");
  return &kernels;
}

}  // namespace imbalance::cpu
