#include "softmax_loss.cuh"

namespace imbalance::cuda {

IMBALANCE_CUDA_DTYPE(BFloat16)

}  // namespace imbalance::cuda
