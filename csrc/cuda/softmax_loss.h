// What bindings.cpp asks of the CUDA kernels: plain pointers into the device's memory, sizes and strides. No torch.
//
// Every function launches on `stream` of the current device, waits for nothing, and returns what the launch returned.
// With no rows nothing is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../arguments.h"
#include "../objectives.h"

namespace imbalance::cuda {

// Class vectors (C,), row vectors (N,) and numbers () are float, or double where the logits are; null is absent.
struct LossArguments {
  SplitArguments split;
  ObjectiveKind objective;
  double objective_parameters[2];
  const void* class_parameter;  // (C,)
  const void* sample_weight;    // (N,)
  double z_loss;
  const void* upstream;  // gradient of the result: (N,), or () with a step of 0; null: one
  std::int64_t upstream_step;
  const void* normalizer;        // (): divides the gradient; where it is 0, so is everything
  const void* divisor;           // () of a mean: divides the gradient; null with a normalizer
  void* losses;                  // (N,) not divided; null: the gradient alone
  void* log_probs;               // (N,) of the targets, 0 where ignored; null: not asked for
  void* d_logits;                // in the logits' shape, may be the logits themselves; null for the losses alone
  std::int64_t gradient_stride;  // of rows; of images where logits are channels-first
  std::int64_t gradient_class_stride;
};

// softmax_loss: losses and the gradient of the logits, in one trip.
cudaError_t loss_rows(const LossArguments& arguments, std::int64_t rows, cudaStream_t stream);

// target_and_rest, and its backward.
cudaError_t split_rows(const SplitArguments& arguments, const SplitVectors& out, std::int64_t rows,
                       cudaStream_t stream);
cudaError_t split_backward_rows(const SplitBackwardArguments& arguments, std::int64_t rows, cudaStream_t stream);

// What a mean's divisor is the sum of: sample weight * class weight of the rows that count, summed over each of
// partial_sums(rows) stretches of rows.
std::int64_t partial_sums(std::int64_t rows);
cudaError_t weight_sums(const LossArguments& arguments, std::int64_t rows, void* sums, cudaStream_t stream);

// Sums n numbers in an order that depends on n alone, and divides: by the normalizer (0 where that is 0), else by the
// divisor, where there is one. `dtype` is float32 or float64, of them all; `workspace` has sum_workspace(n) numbers.
std::int64_t sum_workspace(std::int64_t n);
cudaError_t sum(Dtype dtype, const void* numbers, std::int64_t n, const void* normalizer, const void* divisor,
                void* workspace, void* result, cudaStream_t stream);

// Multiplies rows (N, C) of a gradient by a factor (), float or double where the gradient is; returns at once where
// that is one.
cudaError_t scale(Dtype dtype, void* gradient, std::int64_t stride, std::int64_t rows, std::int64_t classes,
                  const void* factor, cudaStream_t stream);

}  // namespace imbalance::cuda
