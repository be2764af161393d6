// The CPU kernels of sigmoid_loss for what every processor of the architecture has: SSE2 on x86-64, NEON on ARM.

#include "sigmoid_loss_kernels.h"

namespace imbalance::cpu {

const SigmoidKernels* baseline_sigmoid_kernels() {
  static constexpr SigmoidKernels kernels = sigmoid_kernels_of<16>();
  return &kernels;
}

}  // namespace imbalance::cpu
