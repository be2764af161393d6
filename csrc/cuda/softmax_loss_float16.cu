#include "softmax_loss.cuh"

namespace imbalance::cuda {

IMBALANCE_CUDA_DTYPE(Float16)

}  // namespace imbalance::cuda
