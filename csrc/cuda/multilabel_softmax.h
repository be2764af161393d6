// What bindings.cpp asks of the CUDA kernels of multilabel_softmax; as softmax_loss.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../label_arguments.h"

namespace imbalance::cuda {

struct MultilabelLossArguments {
  MultilabelArguments call;  // whose upstream is of the result: (N,), or () with a step of 0
  std::int64_t upstream_step;
  const void* normalizer;  // (): divides the gradient; where it is 0, so is everything
  const void* divisor;     // () of a mean: divides the gradient; null with a normalizer
};

// Losses, not divided, and the gradient of the logits, in one trip.
cudaError_t multilabel_rows(const MultilabelLossArguments& arguments, cudaStream_t stream);

}  // namespace imbalance::cuda
