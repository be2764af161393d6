// Chooses the CPU kernels of multilabel_softmax: those of the instruction set of the others.

#include "multilabel_softmax.h"

#include <cstring>

#include "softmax_loss.h"

namespace imbalance::cpu {

const MultilabelKernels* multilabel_kernels() {
#if defined(__x86_64__)
  if (std::strcmp(kernels()->name, "avx512") == 0) return avx512_multilabel_kernels();
  if (std::strcmp(kernels()->name, "avx2") == 0) return avx2_multilabel_kernels();
#endif
  return baseline_multilabel_kernels();
}

}  // namespace imbalance::cpu
