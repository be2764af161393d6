#include "sigmoid_loss.cuh"

namespace imbalance::cuda {

IMBALANCE_CUDA_SIGMOID_DTYPE(double)

}  // namespace imbalance::cuda
