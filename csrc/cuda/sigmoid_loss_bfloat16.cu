#include "sigmoid_loss.cuh"

namespace imbalance::cuda {

IMBALANCE_CUDA_SIGMOID_DTYPE(BFloat16)

}  // namespace imbalance::cuda
