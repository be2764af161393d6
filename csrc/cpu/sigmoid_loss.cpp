// Chooses the CPU kernels of sigmoid_loss: those of the instruction set of the others.

#include "sigmoid_loss.h"

#include <cstring>

#include "softmax_loss.h"

namespace imbalance::cpu {

const SigmoidKernels* sigmoid_kernels() {
#if defined(__x86_64__)
  if (std::strcmp(kernels()->name, "avx512") == 0) return avx512_sigmoid_kernels();
  if (std::strcmp(kernels()->name, "avx2") == 0) return avx2_sigmoid_kernels();
#endif
  return baseline_sigmoid_kernels();
}

}  // namespace imbalance::cpu
