// column_sums on CUDA: sums over rows of p, of y p and of y, class by class, and their gradient. p = sigmoid(x), or the
// softmax of a row.
//
// - columns_of_rows: a block takes a stretch of rows and one block of their classes: each thread keeps the sums of the
//   classes of its pack, over every so-manieth row, and the block joins them in shared memory.
// - columns_of_images: a block takes one class and a stretch of the images' pixels.
// - add_parts: a warp adds up the parts of one sum.
// - gradient_of_rows, gradient_of_images: pack by pack.
// - softmax_of_rows, softmax_of_images: some lanes of a warp, or a block, sweep a row; a thread sweeps the classes of
//   its pack of pixels. They find what a softmax takes of each row, for the kernels of the sums; or else sweep it once
//   more, backwards, so that this begins with what the cache still holds, and write the gradient.
//
// The gradient of a softmax is p (g - sum p g), where g is that of p. In a sure row both g and the sum are nearly the g
// of the highest logit, so that is taken off all of them first, and what is left is small and exact.
//
// Sums are in float within a thread and in double from there on; the order of all of them depends on shapes, strides
// and the device alone. No atomics. Nothing of the logits' size but the gradient is allocated.

#include "column_sums.h"

#include <algorithm>
#include <type_traits>

#include "labels.cuh"
#include "launches.cuh"

namespace imbalance::cuda {
namespace {

constexpr int kColumnThreads = 256;
constexpr int kMostColumnLanes = 32;   // threads that share a row
constexpr int kRowsOfThread = 16;      // at least
constexpr int kBlocksOfProcessor = 8;  // at most, before stretches get longer
constexpr int kSoftmaxPacks = 8;       // of a lane; where 32 lanes need more a block takes the row
constexpr int kSoftmaxPixels = 4;      // of a thread, at most: each takes nine registers
constexpr std::int64_t kMostColumns = std::int64_t{1} << 30;

// What the softmax of a row takes: p = exp(x - shift) * factor.
template <class T>
struct RowSoftmax {
  T shift, factor;

  __device__ __forceinline__ T of(T x) const { return exponential(x - shift) * factor; }
};

// Logits as rows, or as images whose pixels lie side by side.
template <class S>
struct Columned {
  using T = Accumulate<S>;

  std::int64_t images;  // N of rows
  int pixels;           // 0: rows
  const S* logits;
  std::int64_t image_stride;  // of rows too
  std::int64_t class_stride;
  LabelsOf<S> labels;
  RowSoftmax<T>* softmax;     // (N,); null: p is a sigmoid
  const T* d_predicted;       // (C,)
  const T* d_true_positives;  // (C,)
  S* d_logits;                // contiguous
};

template <class T>
struct Odds {
  T p, n;

  explicit __device__ __forceinline__ Odds(T x) {
    const T small = exponential(x > T(0) ? -x : x), larger = T(1) / (T(1) + small), smaller = small * larger;
    p = x > T(0) ? larger : smaller;
    n = x > T(0) ? smaller : larger;
    if (x != x) p = n = x;
  }
};

// The three sums of a thread's columns.
template <class T, int width>
struct ThreeSums {
  T predicted[width], true_positives[width], positives[width];

  __device__ __forceinline__ ThreeSums() {
#pragma unroll
    for (int k = 0; k < width; ++k) predicted[k] = true_positives[k] = positives[k] = T(0);
  }
  __device__ __forceinline__ void add(int k, T p, T y, T weight) {
    predicted[k] += weight * p;
    if (y == T(0)) return;
    true_positives[k] += weight * (y * p);
    positives[k] += weight * y;
  }
  __device__ __forceinline__ void poison(int k) {
    predicted[k] = true_positives[k] = std::numeric_limits<T>::quiet_NaN();
  }
};

template <class S>
__device__ __forceinline__ Accumulate<S> probability(const Columned<S>& logits, std::int64_t row, Accumulate<S> x) {
  return logits.softmax ? logits.softmax[row].of(x) : Odds<Accumulate<S>>(x).p;
}

template <class S, bool dense, bool aligned>
__global__ void __launch_bounds__(kColumnThreads)
    columns_of_rows(const __grid_constant__ Columned<S> logits, std::int64_t rows_of_part, int lanes, double* parts) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width;
  SHARED_ARRAY(T, of_threads, kColumnThreads * width);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, group = thread / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes, classes = logits.labels.classes;
  const int length = lanes * width, column_blocks = (classes + length - 1) / length;
  const std::int64_t part = blockIdx.x / column_blocks;
  const int begin = static_cast<int>(blockIdx.x % column_blocks) * length;
  const Columns<aligned> columns{begin, classes, lanes, lane};
  const std::int64_t first = part * rows_of_part, last = min(first + rows_of_part, logits.images);
  ThreeSums<T, width> sums;
  for (std::int64_t row = first + group; row < last; row += groups) {
    const Counted<T> counted = counted_row<dense>(logits.labels, row);
    if (counted.outside) {
#pragma unroll
      for (int k = 0; k < width; ++k) sums.poison(k);
    }
    if (!counted.is_read) continue;
    T x[width], y[width];
    load_pack(logits.logits + row * logits.image_stride, columns, 0).to_values(x);
    load_labels<dense>(logits.labels, row, counted.label, columns, 0, y);
#pragma unroll
    for (int k = 0; k < width; ++k) sums.add(k, probability(logits, row, x[k]), y[k], counted.weight);
  }
  // One kind of sum after the other; a number's place is its column's, so that neighbours read neighbours.
  const auto join = [&](const T(&of_thread)[width], int kind) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < width; ++k) {
      of_threads[group * length + columns.template of<width>(0, k) - begin] = of_thread[k];
    }
    __syncthreads();
    for (int i = thread; i < length; i += static_cast<int>(blockDim.x)) {
      double sum = 0;
      for (int j = 0; j < groups; ++j) sum += of_threads[j * length + i];
      if (begin + i < classes) parts[(part * 3 + kind) * classes + begin + i] = sum;
    }
  };
  join(sums.predicted, 0);
  join(sums.true_positives, 1);
  join(sums.positives, 2);
}

// The sum over a block in double, for its first warp.
__device__ __forceinline__ double sum_of_block(double x, double* of_warps) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  x = sum_over_lanes(x, kWarp);
  __syncthreads();
  if (lane == 0) of_warps[warp] = x;
  __syncthreads();
  return sum_over_lanes(lane < kColumnThreads / kWarp ? of_warps[lane] : 0.0, kWarp);
}

// The labels of one class of a pack of pixels.
template <bool dense, int width, class S, class T, bool aligned>
__device__ __forceinline__ void load_pixel_labels(const Columned<S>& logits, std::int64_t image, int c,
                                                  const Columns<aligned>& pixels, T (&y)[width]) {
  const LabelsOf<S>& labels = logits.labels;
  if constexpr (dense) {
    const std::int64_t place = (image * labels.classes + c) * logits.pixels;
    if (labels.dense) {
      load_values(labels.dense + place, pixels, 0, T(0), y);
    } else if (labels.dense_wide) {
      load_values(labels.dense_wide + place, pixels, 0, T(0), y);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const int pixel = pixels.template of<width>(0, k);
        y[k] = pixel < pixels.end && labels.dense_boolean[place + pixel] ? T(1) : T(0);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      y[k] = T(0);
      const int pixel = pixels.template of<width>(0, k);
      if (pixel >= pixels.end) continue;
      const std::int64_t row = image * logits.pixels + pixel;
      if (labels.labels) {
        if (labels.labels[row] == c) y[k] = T(1);
      } else if (c != labels.ignore_index) {
        for (int j = 0; j < labels.list_length; ++j) {
          if (labels.lists[row * labels.list_length + j] == c) y[k] = T(1);
        }
      }
    }
  }
}

template <class S, bool dense, bool aligned>
__global__ void __launch_bounds__(kColumnThreads)
    columns_of_images(const __grid_constant__ Columned<S> logits, std::int64_t pieces_of_part, std::int64_t pieces,
                      double* parts) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width;
  SHARED_ARRAY(double, of_warps, kColumnThreads / kWarp);
  const int thread = static_cast<int>(threadIdx.x), classes = logits.labels.classes, length = kColumnThreads * width;
  const int pieces_of_image = (logits.pixels + length - 1) / length;
  const std::int64_t part = blockIdx.x / classes;
  const int c = static_cast<int>(blockIdx.x % classes);
  ThreeSums<T, 1> sums;
  const std::int64_t last = min((part + 1) * pieces_of_part, pieces);
  for (std::int64_t piece = part * pieces_of_part; piece < last; ++piece) {
    const std::int64_t image = piece / pieces_of_image;
    const Columns<aligned> pixels{static_cast<int>(piece % pieces_of_image) * length, logits.pixels, kColumnThreads,
                                  thread};
    T x[width], y[width];
    load_pack(logits.logits + image * logits.image_stride + c * logits.class_stride, pixels, 0).to_values(x);
    load_pixel_labels<dense>(logits, image, c, pixels, y);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int pixel = pixels.template of<width>(0, k);
      if (pixel >= pixels.end) continue;
      const std::int64_t row = image * logits.pixels + pixel;
      const Counted<T> counted = counted_row<dense>(logits.labels, row);
      if (counted.outside) sums.poison(0);
      if (counted.is_read) sums.add(0, probability(logits, row, x[k]), y[k], counted.weight);
    }
  }
  const auto join = [&](T of_thread, int kind) {
    const double sum = sum_of_block(of_thread, of_warps);
    if (thread == 0) parts[(part * 3 + kind) * classes + c] = sum;
  };
  join(sums.predicted[0], 0);
  join(sums.true_positives[0], 1);
  join(sums.positives[0], 2);
}

// A warp adds up the parts of each sum.
template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    add_parts(const double* parts, std::int64_t count, std::int64_t width, T* sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (kColumnThreads / kWarp);
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * (kColumnThreads / kWarp) + threadIdx.x / kWarp;
  for (; i < width; i += warps) {
    double sum = 0;
    for (std::int64_t part = lane; part < count; part += kWarp) sum += parts[part * width + i];
    sum = sum_over_lanes(sum, kWarp);
    if (lane == 0) sums[i] = static_cast<T>(sum);
  }
}

template <class T>
__device__ __forceinline__ T logit_gradient(const Counted<T>& counted, T x, T y, T d_predicted, T d_true_positives) {
  if (!counted.is_read) return counted.value_of_unread();
  const Odds<T> odds(x);
  return counted.weight * (odds.p * odds.n) * (d_predicted + y * d_true_positives);
}

template <class S, bool dense, bool aligned>
__global__ void __launch_bounds__(kColumnThreads)
    gradient_of_rows(const __grid_constant__ Columned<S> logits, int lanes) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes, classes = logits.labels.classes, length = lanes * width;
  const int column_blocks = (classes + length - 1) / length;
  const int begin = static_cast<int>(blockIdx.x % column_blocks) * length;
  const Columns<aligned> columns{begin, classes, lanes, lane};
  T d_predicted[width], d_true_positives[width];
  load_values(logits.d_predicted, columns, 0, T(0), d_predicted);
  load_values(logits.d_true_positives, columns, 0, T(0), d_true_positives);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x / column_blocks) * groups;
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x / column_blocks) * groups + group;
  for (; row < logits.images; row += step) {
    const Counted<T> counted = counted_row<dense>(logits.labels, row);
    T x[width], y[width], d[width];
    load_pack(logits.logits + row * logits.image_stride, columns, 0).to_values(x);
    load_labels<dense>(logits.labels, row, counted.label, columns, 0, y);
#pragma unroll
    for (int k = 0; k < width; ++k) d[k] = logit_gradient(counted, x[k], y[k], d_predicted[k], d_true_positives[k]);
    store_pack(logits.d_logits + row * classes, columns, 0, d);
  }
}

template <class S, bool dense, bool aligned>
__global__ void __launch_bounds__(kColumnThreads)
    gradient_of_images(const __grid_constant__ Columned<S> logits, std::int64_t pieces) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width;
  const int thread = static_cast<int>(threadIdx.x), classes = logits.labels.classes, length = kColumnThreads * width;
  const int pieces_of_image = (logits.pixels + length - 1) / length;
  for (std::int64_t work = blockIdx.x; work < pieces * classes; work += gridDim.x) {
    const std::int64_t piece = work / classes, image = piece / pieces_of_image;
    const int c = static_cast<int>(work % classes);
    const Columns<aligned> pixels{static_cast<int>(piece % pieces_of_image) * length, logits.pixels, kColumnThreads,
                                  thread};
    T x[width], y[width], d[width];
    load_pack(logits.logits + image * logits.image_stride + c * logits.class_stride, pixels, 0).to_values(x);
    load_pixel_labels<dense>(logits, image, c, pixels, y);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int pixel = pixels.template of<width>(0, k);
      if (pixel >= pixels.end) continue;
      const Counted<T> counted = counted_row<dense>(logits.labels, image * logits.pixels + pixel);
      d[k] = logit_gradient(counted, x[k], y[k], logits.d_predicted[c], logits.d_true_positives[c]);
    }
    store_pack(logits.d_logits + (image * classes + c) * logits.pixels, pixels, 0, d);
  }
}

// ---------------------------------------------------------------- softmax

// What is known of some of a row's exponentials, and of the g beside them.
template <class T>
struct SoftmaxSums {
  T highest;     // logit
  T of_highest;  // its g
  T total;       // sum exp(x - highest)
  T dot;         // sum exp(x - highest) (g - of_highest)

  static __device__ __forceinline__ SoftmaxSums nothing() { return {-infinity<T>(), T(0), T(0), T(0)}; }

  __device__ __forceinline__ void add(T x, T g) {
    const bool is_higher = x > highest;
    const T e = exponential(is_higher ? highest - x : x - highest);
    const T scale = is_higher ? e : T(1), more = is_higher ? T(1) : x == -infinity<T>() ? T(0) : e;
    const T of = is_higher ? g : of_highest;
    dot = (dot + (of_highest - of) * total) * scale + more * (g - of);
    total = total * scale + more;
    highest = is_higher ? x : highest;
    of_highest = of;
  }

  // Those of all of `lanes` neighbours.
  __device__ __forceinline__ SoftmaxSums joined(int lanes) const {
    const T top = max_over_lanes(highest, lanes);
    const T of = max_over_lanes(highest == top ? of_highest : -infinity<T>(), lanes);
    const T scale = highest == -infinity<T>() ? T(0) : exponential(highest - top);
    const T raised_dot = (dot + (of_highest - of) * total) * scale;
    return {top, of, sum_over_lanes(total * scale, lanes), sum_over_lanes(raised_dot, lanes)};
  }

  // NaN of a row that has inf, or nothing but -inf.
  __device__ __forceinline__ RowSoftmax<T> softmax() const { return {highest, T(1) / (total + (highest - highest))}; }
};

// The gradient of a row's logits, once it is swept.
template <class T>
struct SoftmaxSlope {
  RowSoftmax<T> weighted;
  T of_highest, dot;

  static __device__ __forceinline__ SoftmaxSlope after(const SoftmaxSums<T>& sums, T weight) {
    const RowSoftmax<T> softmax = sums.softmax();
    return {{softmax.shift, softmax.factor * weight}, sums.of_highest, sums.dot * softmax.factor};
  }
  __device__ __forceinline__ T of(T x, T g) const { return weighted.of(x) * ((g - of_highest) - dot); }
};

template <class T>
__device__ __forceinline__ T gradient_of_p(T d_predicted, T d_true_positives, T y) {
  return y == T(0) ? d_predicted : d_predicted + y * d_true_positives;
}

// A pack of a row, and the g beside it: 0 where no gradient is asked for.
template <bool dense, class S, bool aligned>
__device__ __forceinline__ void load_row(const Columned<S>& logits, std::int64_t row, int label,
                                         const Columns<aligned>& columns, Reads reads,
                                         Accumulate<S> (&x)[Pack<S>::width], Accumulate<S> (&g)[Pack<S>::width]) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width;
  load_pack(logits.logits + row * logits.image_stride, columns, 0, reads).to_values(x);
#pragma unroll
  for (int k = 0; k < width; ++k) g[k] = T(0);
  if (logits.d_logits == nullptr) return;
  T y[width], of_true_positives[width];
  load_labels<dense>(logits.labels, row, label, columns, 0, y);
  load_values(logits.d_predicted, columns, 0, T(0), g);
  load_values(logits.d_true_positives, columns, 0, T(0), of_true_positives);
#pragma unroll
  for (int k = 0; k < width; ++k) g[k] = gradient_of_p(g[k], of_true_positives[k], y[k]);
}

// `lanes` threads share a row: of a warp, or if it is wide all of a block.
template <class S, bool dense, bool aligned, bool wide>
__global__ void __launch_bounds__(kColumnThreads)
    softmax_of_rows(const __grid_constant__ Columned<S> logits, int lanes) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes, classes = logits.labels.classes, length = lanes * width;
  const int pieces = (classes + length - 1) / length;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * groups;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * groups; first < logits.images; first += step) {
    const std::int64_t row = first + group;
    const Counted<T> counted =
        row < logits.images ? counted_row<dense>(logits.labels, row) : Counted<T>{false, false, -1, T(0)};
    T x[width], g[width];
    SoftmaxSums<T> sums = SoftmaxSums<T>::nothing();
    for (int piece = 0; counted.is_read && piece < pieces; ++piece) {
      const Columns<aligned> columns{piece * length, classes, lanes, lane};
      load_row<dense>(logits, row, counted.label, columns, Reads::again, x, g);
#pragma unroll
      for (int k = 0; k < width; ++k) sums.add(x[k], g[k]);
    }
    if constexpr (wide) {
      SHARED_ARRAY(SoftmaxSums<T>, of_warps, kColumnThreads / kWarp);
      sums = sums.joined(kWarp);
      if (lane % kWarp == 0) of_warps[lane / kWarp] = sums;
      __syncthreads();
      sums = lane % kWarp < kColumnThreads / kWarp ? of_warps[lane % kWarp] : SoftmaxSums<T>::nothing();
      sums = sums.joined(kWarp);
      __syncthreads();  // the next row's may be written
    } else {
      sums = sums.joined(lanes);
    }
    if (row >= logits.images) continue;
    if (logits.d_logits == nullptr) {
      if (lane == 0) logits.softmax[row] = sums.softmax();
      continue;
    }
    const auto slope = SoftmaxSlope<T>::after(sums, counted.weight);
    for (int piece = pieces - 1; piece >= 0; --piece) {
      const Columns<aligned> columns{piece * length, classes, lanes, lane};
      T d[width];
      if (counted.is_read) load_row<dense>(logits, row, counted.label, columns, Reads::once, x, g);
#pragma unroll
      for (int k = 0; k < width; ++k) d[k] = counted.is_read ? slope.of(x[k], g[k]) : counted.value_of_unread();
      store_pack(logits.d_logits + row * classes, columns, 0, d);
    }
  }
}

// One class of a thread's pixels, and the g beside it: 0 where no gradient is asked for.
template <bool dense, int width, class S, class T, bool aligned>
__device__ __forceinline__ void load_pixels(const Columned<S>& logits, std::int64_t image, int c,
                                            const Columns<aligned>& pixels, const int (&label)[width], Reads reads,
                                            T (&x)[width], T (&g)[width]) {
  const S* const run = logits.logits + image * logits.image_stride + c * logits.class_stride;
  load_pack<S, aligned, width>(run, pixels, 0, reads).to_values(x);
#pragma unroll
  for (int k = 0; k < width; ++k) g[k] = T(0);
  if (logits.d_logits == nullptr) return;
  const T d_predicted = logits.d_predicted[c], d_true_positives = logits.d_true_positives[c];
  if (logits.labels.labels) {
#pragma unroll
    for (int k = 0; k < width; ++k) g[k] = label[k] == c ? T(1) : T(0);
  } else {
    load_pixel_labels<dense>(logits, image, c, pixels, g);
  }
#pragma unroll
  for (int k = 0; k < width; ++k) g[k] = gradient_of_p(d_predicted, d_true_positives, g[k]);
}

template <class S>
constexpr int softmax_pixels() {
  return std::min(kSoftmaxPixels, Pack<S>::width);
}

template <class S, bool dense, bool aligned>
__global__ void __launch_bounds__(kColumnThreads)
    softmax_of_images(const __grid_constant__ Columned<S> logits, std::int64_t pieces) {
  using T = Accumulate<S>;
  constexpr int width = softmax_pixels<S>();
  const int thread = static_cast<int>(threadIdx.x), classes = logits.labels.classes, length = kColumnThreads * width;
  const int pieces_of_image = (logits.pixels + length - 1) / length;
  for (std::int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const std::int64_t image = piece / pieces_of_image;
    const Columns<aligned> pixels{static_cast<int>(piece % pieces_of_image) * length, logits.pixels, kColumnThreads,
                                  thread};
    if (!pixels.template has<width>(0)) continue;
    const auto row_of = [&](int k) { return image * logits.pixels + pixels.template of<width>(0, k); };
    const auto counted = [&](int k) {
      const bool exists = pixels.template of<width>(0, k) < pixels.end;
      return exists ? counted_row<dense>(logits.labels, row_of(k)) : Counted<T>{false, false, -1, T(0)};
    };
    int label[width];
    SoftmaxSums<T> sums[width];
    T x[width], g[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      label[k] = counted(k).label;
      sums[k] = SoftmaxSums<T>::nothing();
    }
    for (int c = 0; c < classes; ++c) {
      load_pixels<dense>(logits, image, c, pixels, label, Reads::again, x, g);
#pragma unroll
      for (int k = 0; k < width; ++k) sums[k].add(x[k], g[k]);
    }
    if (logits.d_logits == nullptr) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (counted(k).is_read) logits.softmax[row_of(k)] = sums[k].softmax();
      }
      continue;
    }
    SoftmaxSlope<T> slopes[width];
    unsigned is_read = 0, outside = 0;  // a bit for each: counted() takes more registers than it is worth to keep
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const Counted<T> pixel = counted(k);
      is_read |= static_cast<unsigned>(pixel.is_read) << k;
      outside |= static_cast<unsigned>(pixel.outside) << k;
      slopes[k] = SoftmaxSlope<T>::after(sums[k], pixel.weight);
    }
    for (int c = classes - 1; c >= 0; --c) {
      T d[width];
      load_pixels<dense>(logits, image, c, pixels, label, Reads::once, x, g);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const Counted<T> pixel{(is_read >> k & 1) != 0, (outside >> k & 1) != 0, label[k], T(0)};
        d[k] = pixel.is_read ? slopes[k].of(x[k], g[k]) : pixel.value_of_unread();
      }
      store_pack(logits.d_logits + (image * classes + c) * logits.pixels, pixels, 0, d);
    }
  }
}

// ---------------------------------------------------------------- launches

template <class S>
Columned<S> columned(const ColumnSumsArguments& a) {
  using T = Accumulate<S>;
  Columned<S> logits{};
  logits.images = a.images;
  logits.pixels = static_cast<int>(a.pixels);
  logits.logits = static_cast<const S*>(a.logits);
  logits.image_stride = a.image_stride;
  logits.class_stride = a.class_stride;
  logits.labels = labels_of<S>(a);
  logits.d_predicted = static_cast<const T*>(a.d_predicted);
  logits.d_true_positives = static_cast<const T*>(a.d_true_positives);
  logits.d_logits = static_cast<S*>(a.d_logits);
  return logits;
}

// Whether all that is beside one another is made of whole packs.
template <class S>
bool is_aligned(const Columned<S>& logits) {
  const auto at_packs = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  constexpr int width = Pack<S>::width;
  const bool of_rows =
      logits.labels.classes % width == 0 && at_packs(logits.d_predicted) && at_packs(logits.d_true_positives);
  const bool of_images = logits.pixels % width == 0 && logits.class_stride % width == 0;
  return (logits.pixels > 0 ? of_images : of_rows) && logits.image_stride % width == 0 && at_packs(logits.logits) &&
         at_packs(logits.d_logits) && are_aligned(logits.labels);
}

template <class Function>
cudaError_t with_form(bool dense, bool aligned, const Function& f) {
  if (dense) return aligned ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  return aligned ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
}

// How logits are cut.
struct Cut {
  int lanes;           // that share a row
  int side_by_side;    // blocks for the classes of a row; of images C
  std::int64_t items;  // rows, or pieces of images
  std::int64_t items_of_part;
  std::int64_t parts;
};

template <class S>
cudaError_t cut_of(const ColumnSumsArguments& a, Cut* cut) {
  constexpr int width = Pack<S>::width;
  Device device;
  if (const cudaError_t error = current_device(&device)) return error;
  std::int64_t fewest = 1;
  if (a.pixels > 0) {
    *cut = {0, static_cast<int>(a.classes), a.images * ceiling(a.pixels, kColumnThreads * width), 0, 0};
  } else {
    const int lanes = lanes_for(static_cast<int>(a.classes), width, kMostColumnLanes);
    *cut = {lanes, ceiling(a.classes, lanes * width), a.images, 0, 0};
    fewest = kRowsOfThread * (kColumnThreads / lanes);
  }
  const std::int64_t blocks = static_cast<std::int64_t>(device.multiprocessors) * kBlocksOfProcessor;
  const std::int64_t most_parts = std::max<std::int64_t>(1, blocks / std::max(1, cut->side_by_side));
  cut->items_of_part = std::max<std::int64_t>(fewest, (cut->items + most_parts - 1) / most_parts);
  cut->parts = (cut->items + cut->items_of_part - 1) / cut->items_of_part;
  return cudaSuccess;
}

// Of each row what its softmax takes, or its gradient.
template <class S>
cudaError_t sweep_softmax(const ColumnSumsArguments& a, const Columned<S>& logits, cudaStream_t stream) {
  constexpr int width = Pack<S>::width;
  return with_form(a.dense != nullptr, is_aligned(logits), [&](auto dense, auto aligned) -> cudaError_t {
    Shape shape{1, kColumnThreads, 1, 0};
    if (a.pixels > 0) {
      const auto kernel = &softmax_of_images<S, dense.value, aligned.value>;
      const std::int64_t pieces = a.images * ceiling(a.pixels, kColumnThreads * softmax_pixels<S>());
      if (const cudaError_t error = fill_device(kernel, pieces, &shape)) return error;
      return launch(kernel, shape, stream, logits, pieces);
    }
    const int classes = static_cast<int>(a.classes);
    if (classes > kWarp * width * kSoftmaxPacks) {
      const auto kernel = &softmax_of_rows<S, dense.value, aligned.value, true>;
      if (const cudaError_t error = fill_device(kernel, a.images, &shape)) return error;
      return launch(kernel, shape, stream, logits, kColumnThreads);
    }
    const auto kernel = &softmax_of_rows<S, dense.value, aligned.value, false>;
    const int lanes = lanes_for(classes, width, kWarp);
    if (const cudaError_t error = fill_device(kernel, ceiling(a.images, kColumnThreads / lanes), &shape)) return error;
    return launch(kernel, shape, stream, logits, lanes);
  });
}

bool is_empty(const ColumnSumsArguments& a) { return a.rows() == 0 || a.classes == 0; }
bool is_too_large(const ColumnSumsArguments& a) { return a.classes > kMostColumns || a.pixels > kMostColumns; }

}  // namespace

cudaError_t column_parts(const ColumnSumsArguments& a, std::int64_t* parts) {
  *parts = 0;
  if (is_empty(a)) return cudaSuccess;
  if (is_too_large(a)) return cudaErrorInvalidValue;
  return with_dtype(a.dtype, [&](auto s) -> cudaError_t {
    Cut cut;
    if (const cudaError_t error = cut_of<decltype(s)>(a, &cut)) return error;
    *parts = cut.parts;
    return cudaSuccess;
  });
}

cudaError_t column_sums(const ColumnSumsArguments& a, void* softmax, std::int64_t count, double* parts, void* sums,
                        cudaStream_t stream) {
  if (a.classes == 0) return cudaSuccess;
  return with_dtype(a.dtype, [&](auto s) -> cudaError_t {
    using S = decltype(s);
    using T = Accumulate<S>;
    if (count > 0) {
      Columned<S> logits = columned<S>(a);
      Cut cut;
      if (const cudaError_t error = cut_of<S>(a, &cut)) return error;
      if (a.from_softmax) {
        logits.softmax = static_cast<RowSoftmax<T>*>(softmax);
        if (const cudaError_t error = sweep_softmax<S>(a, logits, stream)) return error;
      }
      const Shape shape{static_cast<unsigned>(count * cut.side_by_side), kColumnThreads, 1, 0};
      const cudaError_t error = with_form(a.dense != nullptr, is_aligned(logits), [&](auto dense, auto aligned) {
        if (a.pixels > 0) {
          return launch(&columns_of_images<S, dense.value, aligned.value>, shape, stream, logits, cut.items_of_part,
                        cut.items, parts);
        }
        return launch(&columns_of_rows<S, dense.value, aligned.value>, shape, stream, logits, cut.items_of_part,
                      cut.lanes, parts);
      });
      if (error != cudaSuccess) return error;
    }
    const Shape shape{static_cast<unsigned>(std::min(1024, ceiling(3 * a.classes, kColumnThreads / kWarp))),
                      kColumnThreads, 1, 0};
    return launch(&add_parts<T>, shape, stream, static_cast<const double*>(parts), count, 3 * a.classes,
                  static_cast<T*>(sums));
  });
}

cudaError_t column_sums_gradient(const ColumnSumsArguments& a, cudaStream_t stream) {
  if (is_empty(a)) return cudaSuccess;
  if (is_too_large(a)) return cudaErrorInvalidValue;
  return with_dtype(a.dtype, [&](auto s) -> cudaError_t {
    using S = decltype(s);
    const Columned<S> logits = columned<S>(a);
    Cut cut;
    if (const cudaError_t error = cut_of<S>(a, &cut)) return error;
    if (a.from_softmax) return sweep_softmax<S>(a, logits, stream);
    return with_form(a.dense != nullptr, is_aligned(logits), [&](auto dense, auto aligned) -> cudaError_t {
      Shape shape{1, kColumnThreads, 1, 0};
      if (a.pixels > 0) {
        const auto kernel = &gradient_of_images<S, dense.value, aligned.value>;
        if (const cudaError_t error = fill_device(kernel, cut.items * a.classes, &shape)) return error;
        return launch(kernel, shape, stream, logits, cut.items);
      }
      const auto kernel = &gradient_of_rows<S, dense.value, aligned.value>;
      const std::int64_t groups = ceiling(a.images, kColumnThreads / cut.lanes);
      if (const cudaError_t error = fill_device(kernel, groups * cut.side_by_side, &shape)) return error;
      // Every block has the same classes all the time: as many blocks for each.
      const std::int64_t for_each = std::max<std::int64_t>(1, shape.blocks / cut.side_by_side);
      shape.blocks = static_cast<unsigned>(std::min(groups, for_each) * cut.side_by_side);
      return launch(kernel, shape, stream, logits, cut.lanes);
    });
  });
}

}  // namespace imbalance::cuda
