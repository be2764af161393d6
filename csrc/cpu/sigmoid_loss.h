// What bindings.cpp asks of the CPU kernels of sigmoid_loss. No torch and no threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../arguments.h"

namespace imbalance::cpu {

struct SigmoidLossArguments {
  SigmoidArguments call;
  double inverse_divisor;  // of the gradient
};

// The kernels of one instruction set, by Dtype; each works on tiles [first, last) of the logits, one after the other,
// and writes the sum of each tile's losses, not divided.
struct SigmoidKernels {
  std::size_t (*scratch_bytes)(const SigmoidArguments&);  // 64-byte aligned, of each call
  std::int64_t (*tiles)(const SigmoidArguments&);
  void (*loss[4])(const SigmoidLossArguments&, std::int64_t first, std::int64_t last, void* scratch, double* sums);
};

const SigmoidKernels* baseline_sigmoid_kernels();
#if defined(__x86_64__)
const SigmoidKernels* avx2_sigmoid_kernels();
const SigmoidKernels* avx512_sigmoid_kernels();
#endif

// Those of the instruction set that kernels() chose.
const SigmoidKernels* sigmoid_kernels();

}  // namespace imbalance::cpu
