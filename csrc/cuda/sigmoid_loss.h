// What bindings.cpp asks of the CUDA kernels of sigmoid_loss: plain pointers into the device's memory. No torch.
//
// Every function launches on `stream` of the current device, waits for nothing, and returns what the launch returned.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../arguments.h"

namespace imbalance::cuda {

// Numbers () are float, or double where the logits are; null is absent.
struct SigmoidLossArguments {
  SigmoidArguments call;
  const void* upstream;    // () gradient of a reduced loss; null: one
  const void* normalizer;  // (): divides the gradient; where it is 0, so is everything
  const void* divisor;     // () of a mean: divides the gradient; null with a normalizer
  double share;            // multiplies the gradient and the sums
  void* sums;  // (sigmoid_sums(call),) sums of the losses, of a share of the logits each; null: not asked for
};

// How many sums there are: a function of the logits' shape, of what lies beside them and where.
std::int64_t sigmoid_sums(const SigmoidArguments& call);

// Value and gradient of every logit, in one trip.
cudaError_t sigmoid_loss(const SigmoidLossArguments& arguments, cudaStream_t stream);

// What a mean over labels is divided by: how many logits have a label that is a class or the background, in each of
// label_stretches(rows) stretches of rows.
std::int64_t label_stretches(std::int64_t rows);
cudaError_t label_counts(const SigmoidArguments& call, void* counts, cudaStream_t stream);

}  // namespace imbalance::cuda
