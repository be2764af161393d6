// The CPU kernels of multilabel_softmax for AVX-512.

#if defined(__x86_64__)

// Before any header: an inline function of the standard library must not be compiled for AVX-512 and then, as the
// linker's pick of its copies, be called on a processor without it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "target_avx512.h"

#include "multilabel_softmax_kernels.h"

namespace imbalance::cpu {

const MultilabelKernels* avx512_multilabel_kernels() {
  static constexpr MultilabelKernels kernels = multilabel_kernels_of<64>();
  return &kernels;
}

}  // namespace imbalance::cpu

#include "target_end.h"

#endif
