// What bindings.cpp asks of the CUDA kernels of column_sums; as softmax_loss.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../label_arguments.h"

namespace imbalance::cuda {

// How many parts the sums come in on the current device: what `parts` of the next must have room for.
cudaError_t column_parts(const ColumnSumsArguments& arguments, std::int64_t* parts);

// Writes sums of p, of y p and of y to `parts` (parts, 3, C), and those of all parts to `sums` (3, C): float, or double
// where the logits are. Those of a softmax take room for two numbers of each row at `softmax`, of the type of sums.
cudaError_t column_sums(const ColumnSumsArguments& arguments, void* softmax, std::int64_t count, double* parts,
                        void* sums, cudaStream_t stream);

// The gradient of the logits.
cudaError_t column_sums_gradient(const ColumnSumsArguments& arguments, cudaStream_t stream);

}  // namespace imbalance::cuda
