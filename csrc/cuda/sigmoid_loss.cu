// What sigmoid_loss.h promises: the kernels of sigmoid_loss.cuh by dtype, and the count of a mean.

#include "sigmoid_loss.h"

#include "block_sum.cuh"
#include "launches.cuh"

namespace imbalance::cuda {

// In sigmoid_loss.cuh, compiled in sigmoid_loss_<dtype>.cu.
template <class S>
std::int64_t sigmoid_sums_of(const SigmoidArguments&);
template <class S>
cudaError_t sigmoid_loss_of(const SigmoidLossArguments&, cudaStream_t stream);

namespace {

constexpr int kCountThreads = kWarp * kWarp;
constexpr std::int64_t kStretch = 8192;                       // labels that a block counts
constexpr std::int64_t kMostColumns = std::int64_t{1} << 30;  // columns and pixels are 32-bit integers

// Each block counts a stretch of rows.
template <class T>
__global__ void __launch_bounds__(kCountThreads) count_labels(const std::int64_t* labels, std::int64_t ignore_index,
                                                              std::int64_t classes, std::int64_t rows, T* counts) {
  const std::int64_t first = blockIdx.x * kStretch, end = min(first + kStretch, rows);
  double count = 0;  // exact, like a float's of the stretch
  for (std::int64_t row = first + threadIdx.x; row < end; row += kCountThreads) {
    const std::int64_t label = labels[row];
    if (label >= 0 && label <= classes && label != ignore_index) count += 1;
  }
  count = sum_over_block<kCountThreads>(count);
  if (threadIdx.x == 0) counts[blockIdx.x] = static_cast<T>(count * static_cast<double>(classes));
}

bool fits(const SigmoidArguments& call) { return call.classes <= kMostColumns && call.pixels <= kMostColumns; }

}  // namespace

std::int64_t sigmoid_sums(const SigmoidArguments& call) {
  std::int64_t sums = 0;
  if (!fits(call)) return sums;
  with_dtype(call.dtype, [&](auto s) {
    sums = sigmoid_sums_of<decltype(s)>(call);
    return cudaSuccess;
  });
  return sums;
}

cudaError_t sigmoid_loss(const SigmoidLossArguments& arguments, cudaStream_t stream) {
  if (!fits(arguments.call)) return cudaErrorInvalidValue;
  return with_dtype(arguments.call.dtype, [&](auto s) { return sigmoid_loss_of<decltype(s)>(arguments, stream); });
}

std::int64_t label_stretches(std::int64_t rows) { return (rows + kStretch - 1) / kStretch; }

cudaError_t label_counts(const SigmoidArguments& call, void* counts, cudaStream_t stream) {
  const std::int64_t rows = call.rows();
  if (rows == 0) return cudaSuccess;
  const Shape shape{static_cast<unsigned>(label_stretches(rows)), kCountThreads, 1, 0};
  return with_dtype(call.dtype, [&](auto s) {
    using T = Accumulate<decltype(s)>;
    return launch(&count_labels<T>, shape, stream, call.labels, call.ignore_index, call.classes, rows,
                  static_cast<T*>(counts));
  });
}

}  // namespace imbalance::cuda
