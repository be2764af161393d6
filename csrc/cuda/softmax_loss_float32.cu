#include "softmax_loss.cuh"

namespace imbalance::cuda {

IMBALANCE_CUDA_DTYPE(float)

}  // namespace imbalance::cuda
