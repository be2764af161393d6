#include "softmax_loss.cuh"

namespace imbalance::cuda {

IMBALANCE_CUDA_DTYPE(double)

}  // namespace imbalance::cuda
