// What softmax_loss.h promises: the kernels of softmax_loss.cuh by dtype, and the small ones, of sums and scaling.

#include "softmax_loss.h"

#include <algorithm>

#include "launches.cuh"
#include "rows.cuh"

namespace imbalance::cuda {

// In softmax_loss.cuh, compiled in softmax_loss_<dtype>.cu.
template <class S>
cudaError_t loss_rows_of(const LossArguments&, std::int64_t rows, cudaStream_t stream);
template <class S>
cudaError_t split_rows_of(const SplitArguments&, const SplitVectors&, std::int64_t rows, cudaStream_t stream);
template <class S>
cudaError_t split_backward_rows_of(const SplitBackwardArguments&, std::int64_t rows, cudaStream_t stream);

namespace {

constexpr int kScaleThreads = 256;
constexpr int kSumThreads = kWarp * kWarp;
constexpr std::int64_t kStretch = 8192;  // numbers that a block sums, all of them on their way at a time
constexpr int kScalePacks = 4;
constexpr std::int64_t kMostClasses = std::int64_t{1} << 30;  // columns are 32-bit integers

// The sum over a block, for its first thread: in double, in an order that depends on the number of threads alone.
__device__ __forceinline__ double sum_over_block(double x) {
  SHARED_ARRAY(double, of_warps, kSumThreads / kWarp);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  x = sum_over_lanes(x, kWarp);
  if (lane == 0) of_warps[warp] = x;
  __syncthreads();
  return sum_over_lanes(of_warps[lane], kWarp);
}

// Each block sums a stretch of n numbers. The normalizer and the divisor are for the last stretch of all, the total.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_stretches(const T* numbers, std::int64_t n, const T* normalizer, const T* divisor, T* sums) {
  const std::int64_t first = blockIdx.x * kStretch, end = min(first + kStretch, n);
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kStretch / kSumThreads; ++i) {
    const std::int64_t at = first + i * kSumThreads + threadIdx.x;
    if (at < end) sum += numbers[at];
  }
  sum = sum_over_block(sum);
  if (threadIdx.x != 0) return;
  if (normalizer != nullptr) {
    sum = *normalizer == T(0) ? 0.0 : sum / *normalizer;
  } else if (divisor != nullptr) {
    sum /= *divisor;
  }
  sums[blockIdx.x] = static_cast<T>(sum);
}

// Each block sums the weights of a stretch of rows.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_weights(const std::int64_t* target, std::int64_t ignore_index, std::int64_t classes, const T* class_weight,
                const T* sample_weight, std::int64_t rows, T* sums) {
  const std::int64_t first = blockIdx.x * kStretch, end = min(first + kStretch, rows);
  double sum = 0;
  constexpr int count = kStretch / kSumThreads;
  std::int64_t labels[count];  // of class 0 where there are none, -1 where the row does not count
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const std::int64_t row = first + i * kSumThreads + threadIdx.x;
    labels[i] = row < end ? 0 : -1;
    if (row < end && target != nullptr) labels[i] = target[row];
    if (target != nullptr && (labels[i] >= classes || labels[i] == ignore_index)) labels[i] = -1;
  }
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const std::int64_t row = first + i * kSumThreads + threadIdx.x, label = labels[i];
    T of_sample(1), of_class(1);
    if (label >= 0 && sample_weight != nullptr) of_sample = sample_weight[row];
    if (label >= 0 && target != nullptr && class_weight != nullptr) of_class = class_weight[label];
    if (label >= 0) sum += static_cast<double>(of_sample) * of_class;
  }
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = static_cast<T>(sum);
}

// Multiplies rows by a factor; `lanes` threads share a piece of a row.
template <class S, bool aligned>
__global__ void __launch_bounds__(kScaleThreads) scale_rows(S* gradient, std::int64_t stride, std::int64_t rows,
                                                            int classes, const Accumulate<S>* factor, int lanes) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width;
  const T by = *factor;
  if (by == T(1)) return;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes, length = lanes * kScalePacks * width;
  const Pieces pieces(static_cast<std::int64_t>(gridDim.x) * groups, (classes + length - 1) / length);
  Piece<int> piece = pieces.at(static_cast<std::int64_t>(blockIdx.x) * groups + group);
  for (; piece.row < rows; piece = pieces.after(piece)) {
    S* const row = gradient + piece.row * stride;
    const Columns<aligned> columns{piece.index * length, classes, lanes, lane};
    Pack<S> packs[kScalePacks];
#pragma unroll
    for (int i = 0; i < kScalePacks; ++i) packs[i] = load_pack(row, columns, i);
#pragma unroll
    for (int i = 0; i < kScalePacks; ++i) {
      T values[width];
      packs[i].to_values(values);
#pragma unroll
      for (int k = 0; k < width; ++k) values[k] *= by;
      store_pack(row, columns, i, values);
    }
  }
}

}  // namespace

cudaError_t loss_rows(const LossArguments& arguments, std::int64_t rows, cudaStream_t stream) {
  if (arguments.split.classes > kMostClasses) return cudaErrorInvalidValue;
  return with_dtype(arguments.split.dtype, [&](auto s) { return loss_rows_of<decltype(s)>(arguments, rows, stream); });
}

cudaError_t split_rows(const SplitArguments& arguments, const SplitVectors& out, std::int64_t rows,
                       cudaStream_t stream) {
  if (arguments.classes > kMostClasses) return cudaErrorInvalidValue;
  return with_dtype(arguments.dtype, [&](auto s) { return split_rows_of<decltype(s)>(arguments, out, rows, stream); });
}

cudaError_t split_backward_rows(const SplitBackwardArguments& arguments, std::int64_t rows, cudaStream_t stream) {
  if (arguments.split.classes > kMostClasses) return cudaErrorInvalidValue;
  return with_dtype(arguments.split.dtype,
                    [&](auto s) { return split_backward_rows_of<decltype(s)>(arguments, rows, stream); });
}

std::int64_t partial_sums(std::int64_t n) { return (n + kStretch - 1) / kStretch; }

cudaError_t weight_sums(const LossArguments& arguments, std::int64_t rows, void* sums, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const Shape shape{static_cast<unsigned>(partial_sums(rows)), kSumThreads, 1, 0};
  const SplitArguments& split = arguments.split;
  return with_dtype(split.dtype, [&](auto s) {
    using T = Accumulate<decltype(s)>;
    return launch(&sum_weights<T>, shape, stream, split.target, split.ignore_index, split.classes,
                  static_cast<const T*>(split.class_weight), static_cast<const T*>(arguments.sample_weight), rows,
                  static_cast<T*>(sums));
  });
}

cudaError_t sum(Dtype dtype, const void* numbers, std::int64_t n, const void* normalizer, const void* divisor,
                void* workspace, void* result, cudaStream_t stream) {
  const std::int64_t stretches = partial_sums(n);
  return with_dtype(dtype, [&](auto s) -> cudaError_t {
    using T = Accumulate<decltype(s)>;
    const auto run = [&](const void* of, std::int64_t count, const void* by, const void* or_by, void* to) {
      const Shape shape{static_cast<unsigned>(std::max<std::int64_t>(1, partial_sums(count))), kSumThreads, 1, 0};
      return launch(&sum_stretches<T>, shape, stream, static_cast<const T*>(of), count, static_cast<const T*>(by),
                    static_cast<const T*>(or_by), static_cast<T*>(to));
    };
    if (stretches <= 1) return run(numbers, n, normalizer, divisor, result);
    if (const cudaError_t error = run(numbers, n, nullptr, nullptr, workspace)) return error;
    return sum(dtype, workspace, stretches, normalizer, divisor, static_cast<T*>(workspace) + stretches, result,
               stream);
  });
}

std::int64_t sum_workspace(std::int64_t n) {
  std::int64_t numbers = 0;
  while (n > kStretch) numbers += n = partial_sums(n);
  return numbers;
}

cudaError_t scale(Dtype dtype, void* gradient, std::int64_t stride, std::int64_t rows, std::int64_t classes,
                  const void* factor, cudaStream_t stream) {
  if (rows == 0 || classes == 0) return cudaSuccess;
  if (classes > kMostClasses) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto s) -> cudaError_t {
    using S = decltype(s);
    constexpr int per_lane = kScalePacks * Pack<S>::width;
    const int lanes = lanes_for(static_cast<int>(classes), per_lane, kScaleThreads);
    const std::int64_t pieces = rows * ceiling(classes, lanes * per_lane);
    const bool aligned = reinterpret_cast<std::uintptr_t>(gradient) % 16 == 0 && stride % Pack<S>::width == 0 &&
                         classes % Pack<S>::width == 0;
    Shape shape{1, kScaleThreads, 1, 0};
    auto kernel = &scale_rows<S, false>;
    if (aligned) kernel = &scale_rows<S, true>;
    if (const cudaError_t error = fill_device(kernel, ceiling(pieces, kScaleThreads / lanes), &shape)) return error;
    return launch(kernel, shape, stream, static_cast<S*>(gradient), stride, rows, static_cast<int>(classes),
                  static_cast<const Accumulate<S>*>(factor), lanes);
  });
}

}  // namespace imbalance::cuda
