// multilabel_softmax on CUDA: log(1 + sum_neg exp(z)) + log(1 + sum_pos exp(-z)) of rows, and its gradient.
//
// Three kernels, by which threads share a row:
//
// - multilabel_in_lanes: narrow rows, each shared by 1 to 32 lanes of a warp, which hold it in registers between its
//   sums and its gradient. Nothing but shuffles between them.
// - multilabel_in_sweeps: longer rows, and rows that are not aligned from half that length on: one block reads a row in
//   pieces, and for its gradient again, the last piece first, so that it begins with what the cache still holds.
// - multilabel_in_planes: channels-first logits, whose pixels have a thread each (multilabel_softmax_planes.cuh).
//
// No atomics: a row's bits depend on its own values, its width and its alignment alone.

#include "multilabel_softmax.cuh"

#include <algorithm>

#include "multilabel_softmax_planes.cuh"

namespace imbalance::cuda {
namespace {

constexpr int kMultilabelPacks = 4;      // of a lane's registers
constexpr int kWideMultilabelPacks = 8;  // where 32 lanes need more, of aligned rows: others would spill kilobytes
constexpr int kMultilabelThreads = 128;
constexpr int kMultilabelSweepPacks = 2;  // at a time
constexpr int kMultilabelSweepThreads = 512;
constexpr std::int64_t kMostMultilabelClasses = std::int64_t{1} << 30;

// One pack's part in both sums.
template <class S, bool dense, bool aligned>
struct MultilabelPack {
  using T = Accumulate<S>;
  static constexpr int width = Pack<S>::width;

  T z[width];  // -inf where masked
  T y[width];

  __device__ __forceinline__ MultilabelPack(const MultilabelRows<S>& rows, std::int64_t row, int label,
                                            const Columns<aligned>& columns, int pack, const Pack<S>& numbers) {
    numbers.to_values(z);
    load_labels<dense>(rows.labels, row, label, columns, pack, y);
    if (rows.bias == nullptr) return;
    T bias[width];
    load_values(rows.bias, columns, pack, T(0), bias);
#pragma unroll
    for (int k = 0; k < width; ++k) z[k] = z[k] == -infinity<T>() ? z[k] : z[k] + bias[k];
  }

  __device__ __forceinline__ void raise(T* highest, T* highest_positive) const {
#pragma unroll
    for (int k = 0; k < width; ++k) raise_exponents(z[k], y[k], highest, highest_positive);
  }

  __device__ __forceinline__ void add(TwoSums<T>* sums) const {
    const T shift = multilabel_shift(sums->highest), shift_of_positives = multilabel_shift(sums->highest_positive);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      T negative, positive;
      two_exponentials<dense>(z[k], y[k], shift, shift_of_positives, &negative, &positive);
      sums->negative += negative;
      sums->positive += positive;
    }
  }

  __device__ __forceinline__ void spread(const TwoFactors<T>& factors, const Columns<aligned>& columns, int pack,
                                         S* d_row) const {
    T d[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      T negative, positive;
      two_exponentials<dense>(z[k], y[k], factors.shift, factors.shift_of_positives, &negative, &positive);
      d[k] = negative * factors.negative - positive * factors.positive;
    }
    store_pack(d_row, columns, pack, d);
  }
};

template <class S, bool aligned>
__device__ __forceinline__ void fill(const Columns<aligned>& columns, int pack, Accumulate<S> value, S* d_row) {
  Accumulate<S> values[Pack<S>::width];
#pragma unroll
  for (int k = 0; k < Pack<S>::width; ++k) values[k] = value;
  store_pack(d_row, columns, pack, values);
}

template <class S, bool dense, bool aligned, int packs>
__global__ void __launch_bounds__(kMultilabelThreads)
    multilabel_in_lanes(const __grid_constant__ MultilabelRows<S> rows, int lanes) {
  using T = Accumulate<S>;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes;
  const Columns<aligned> columns{0, rows.labels.classes, lanes, lane};
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * groups;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * groups; first < rows.count; first += step) {
    const std::int64_t row = first + group;
    const Counted<T> counted = rows.template counted<dense>(row);
    Pack<S> numbers[packs];
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      numbers[i] = counted.is_read ? load_pack(rows.logits + row * rows.image_stride, columns, i) : Pack<S>::masks();
    }
    const auto pack_of = [&](int i) {
      return MultilabelPack<S, dense, aligned>(rows, row, counted.label, columns, i, numbers[i]);
    };
    TwoSums<T> sums = TwoSums<T>::nothing();
    if (counted.is_read) {
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        if (!columns.template has<Pack<S>::width>(i)) break;
        pack_of(i).raise(&sums.highest, &sums.highest_positive);
      }
    }
    sums.highest = max_over_lanes(sums.highest, lanes);
    sums.highest_positive = max_over_lanes(sums.highest_positive, lanes);
    if (counted.is_read) {
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        if (!columns.template has<Pack<S>::width>(i)) break;
        pack_of(i).add(&sums);
      }
    }
    sums.negative = sum_over_lanes(sums.negative, lanes);
    sums.positive = sum_over_lanes(sums.positive, lanes);
    if (row >= rows.count) continue;
    S* const d_row = rows.d_logits ? rows.d_logits + row * rows.gradient_image_stride : nullptr;
    if (counted.is_read) {
      const TwoFactors<T> factors = finish(rows, row, counted, sums, lane == 0);
      if (d_row == nullptr) continue;
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        if (!columns.template has<Pack<S>::width>(i)) break;
        pack_of(i).spread(factors, columns, i, d_row);
      }
    } else {
      if (rows.losses && lane == 0) rows.losses[row] = counted.value_of_unread();
      for (int i = 0; d_row && i < packs; ++i) fill(columns, i, counted.value_of_unread(), d_row);
    }
  }
}

template <class S, bool dense, bool aligned>
__global__ void __launch_bounds__(kMultilabelSweepThreads)
    multilabel_in_sweeps(const __grid_constant__ MultilabelRows<S> rows) {
  using T = Accumulate<S>;
  constexpr int together = sizeof(S) < 8 ? kMultilabelSweepPacks : 1;  // float64 would spill
  SHARED_ARRAY(TwoSums<T>, sums_of_warps, kMultilabelSweepThreads / kWarp);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
  const int length = threads * kMultilabelSweepPacks * Pack<S>::width;
  const int pieces = (rows.labels.classes + length - 1) / length;
  for (std::int64_t row = blockIdx.x; row < rows.count; row += gridDim.x) {
    const Counted<T> counted = rows.template counted<dense>(row);  // the same for all threads
    S* const d_row = rows.d_logits ? rows.d_logits + row * rows.gradient_image_stride : nullptr;
    const S* const x = rows.logits + row * rows.image_stride;
    if (!counted.is_read) {
      if (rows.losses && thread == 0) rows.losses[row] = counted.value_of_unread();
      for (int piece = 0; d_row && piece < pieces; ++piece) {
        const Columns<aligned> columns{piece * length, rows.labels.classes, threads, thread};
        for (int i = 0; i < kMultilabelSweepPacks; ++i) fill(columns, i, counted.value_of_unread(), d_row);
      }
      continue;
    }
    TwoSums<T> sums = TwoSums<T>::nothing();
    for (int piece = 0; piece < pieces; ++piece) {
      const Columns<aligned> columns{piece * length, rows.labels.classes, threads, thread};
#pragma unroll together
      for (int i = 0; i < kMultilabelSweepPacks; ++i) {
        if (!columns.template has<Pack<S>::width>(i)) break;
        const MultilabelPack<S, dense, aligned> pack(rows, row, counted.label, columns, i,
                                                     load_pack(x, columns, i, Reads::again));
        T highest = sums.highest, highest_positive = sums.highest_positive;
        pack.raise(&highest, &highest_positive);
        sums = sums.raised(highest, highest_positive);
        pack.add(&sums);
      }
    }
    sums = join(sums, kWarp);
    if (lane == 0) sums_of_warps[warp] = sums;
    __syncthreads();
    sums = join(lane < warps ? sums_of_warps[lane] : TwoSums<T>::nothing(), kWarp);
    __syncthreads();  // the next row's sums may be written
    const TwoFactors<T> factors = finish(rows, row, counted, sums, thread == 0);
    for (int piece = pieces - 1; d_row && piece >= 0; --piece) {
      const Columns<aligned> columns{piece * length, rows.labels.classes, threads, thread};
#pragma unroll together
      for (int i = 0; i < kMultilabelSweepPacks; ++i) {
        if (!columns.template has<Pack<S>::width>(i)) break;
        const MultilabelPack<S, dense, aligned> pack(rows, row, counted.label, columns, i, load_pack(x, columns, i));
        pack.spread(factors, columns, i, d_row);
      }
    }
  }
}

template <int packs, class S>
cudaError_t launch_in_lanes(void (*kernel)(MultilabelRows<S>, int), const MultilabelRows<S>& rows,
                            cudaStream_t stream) {
  const int lanes = lanes_for(rows.labels.classes, packs * Pack<S>::width, kWarp);
  Shape shape{1, kMultilabelThreads, 1, 0};
  const std::int64_t work = ceiling(rows.count, kMultilabelThreads / lanes);
  if (const cudaError_t error = fill_device(kernel, work, &shape)) return error;
  return launch(kernel, shape, stream, rows, lanes);
}

template <class S>
cudaError_t multilabel_rows_of(const MultilabelLossArguments& a, cudaStream_t stream) {
  using T = Accumulate<S>;
  const MultilabelArguments& call = a.call;
  MultilabelRows<S> rows{};
  rows.count = call.rows();
  rows.pixels = call.pixels;
  rows.logits = static_cast<const S*>(call.logits);
  rows.image_stride = call.image_stride;
  rows.class_stride = call.class_stride;
  rows.labels = labels_of<S>(call);
  rows.bias = static_cast<const T*>(call.bias);
  rows.upstream = static_cast<const T*>(call.upstream);
  rows.upstream_step = a.upstream_step;
  rows.normalizer = static_cast<const T*>(a.normalizer);
  rows.divisor = static_cast<const T*>(a.divisor);
  rows.losses = static_cast<T*>(call.losses);
  rows.d_logits = static_cast<S*>(call.d_logits);
  rows.gradient_image_stride = call.gradient_image_stride;
  rows.gradient_class_stride = call.gradient_class_stride;
  if (call.pixels > 0) return launch_in_planes(rows, call.dense != nullptr, stream);
  const auto at_packs = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  constexpr int width = Pack<S>::width;
  const bool dense = call.dense != nullptr;
  const bool aligned = call.classes % width == 0 && call.image_stride % width == 0 &&
                       call.gradient_image_stride % width == 0 && at_packs(call.logits) && at_packs(call.d_logits) &&
                       at_packs(call.bias) && are_aligned(rows.labels);
  if (call.classes <= kWarp * width * kMultilabelPacks) {
    return with_form(dense, aligned, [&](auto is_dense, auto is_aligned) {
      const auto kernel = &multilabel_in_lanes<S, is_dense.value, is_aligned.value, kMultilabelPacks>;
      return launch_in_lanes<kMultilabelPacks>(kernel, rows, stream);
    });
  }
  if (aligned && call.classes <= kWarp * width * kWideMultilabelPacks) {
    auto kernel = &multilabel_in_lanes<S, false, true, kWideMultilabelPacks>;
    if (dense) kernel = &multilabel_in_lanes<S, true, true, kWideMultilabelPacks>;
    return launch_in_lanes<kWideMultilabelPacks>(kernel, rows, stream);
  }
  return with_form(dense, aligned, [&](auto is_dense, auto is_aligned) {
    const auto kernel = &multilabel_in_sweeps<S, is_dense.value, is_aligned.value>;
    const int threads = threads_for(rows.labels.classes, kMultilabelSweepPacks * width, kMultilabelSweepThreads);
    Shape shape{1, static_cast<unsigned>(threads), 1, 0};
    if (const cudaError_t error = fill_device(kernel, rows.count, &shape)) return error;
    return launch(kernel, shape, stream, rows);
  });
}

}  // namespace

cudaError_t multilabel_rows(const MultilabelLossArguments& arguments, cudaStream_t stream) {
  if (arguments.call.rows() == 0) return cudaSuccess;
  if (arguments.call.classes > kMostMultilabelClasses) return cudaErrorInvalidValue;
  switch (arguments.call.dtype) {
    case Dtype::float32:
      return multilabel_rows_of<float>(arguments, stream);
    case Dtype::float64:
      return multilabel_rows_of<double>(arguments, stream);
    case Dtype::bfloat16:
      return multilabel_rows_of<BFloat16>(arguments, stream);
    case Dtype::float16:
      return multilabel_rows_of<Float16>(arguments, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace imbalance::cuda
