// multilabel_softmax of channels-first logits (B, C, P) on CUDA: images of P pixels, whose logits of one class are
// neighbours.
//
// A thread owns some neighbouring pixels, and neighbouring threads their neighbours: it takes the classes one after the
// other, a few at a time, for the two sums of each of its pixels, and once more for their gradient, the last ones
// first, since the cache still holds those; so few threads run that it does. Threads do not speak to one another, and
// nothing is permuted. A pixel's bits depend on its own values and on C alone.
#pragma once

#include "multilabel_softmax.cuh"

namespace imbalance::cuda {

constexpr int kPixelThreads = 256;
constexpr int kPixelBlocks = 2;   // of a multiprocessor: 128 registers a thread; of float64 one
constexpr int kPixelClasses = 8;  // that are on their way at a time

// Pixels that a thread takes.
template <class S>
constexpr int multilabel_plane_width(bool aligned) {
  return aligned ? (sizeof(S) <= 4 ? 4 : 2) : 1;
}

// `width` neighbouring pixels of an image, and some of their classes.
template <class S, bool dense, int width>
class MultilabelPixels {
 public:
  using T = Accumulate<S>;
  using Sums = TwoSums<T>[width];
  using Factors = TwoFactors<T>[width];

  Counted<T> counted[width];

  __device__ __forceinline__ MultilabelPixels(const MultilabelRows<S>& rows, std::int64_t first_row)
      : rows_(rows), row_(first_row), image_(first_row / rows.pixels), pixel_(first_row - image_ * rows.pixels) {
    is_read_ = false;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      counted[k] = rows.template counted<dense>(first_row + k);
      is_read_ |= counted[k].is_read;
    }
  }

  // The classes from `first` on.
  __device__ __forceinline__ void load(int first, Reads reads) {
    first_ = first;
    const S* logits = rows_.logits + image_ * rows_.image_stride + first * rows_.class_stride + pixel_;
#pragma unroll
    for (int i = 0; i < kPixelClasses; ++i) {
      packs_[i] = is_read_ && has(i) ? Pack<S, width>::load(logits, reads) : Pack<S, width>::masks();
      logits += rows_.class_stride;
    }
    if constexpr (!dense) {
#pragma unroll
      for (int k = 0; k < width; ++k) positive_[k] = counted[k].is_read ? listed(k) : 0;
    }
  }

  // Adds them to the pixels' sums, all at once: of thousands of classes one by one, the errors would add up.
  __device__ __forceinline__ void add_to(Sums& sums) const {
    T highest[width], highest_positive[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      highest[k] = sums[k].highest;
      highest_positive[k] = sums[k].highest_positive;
    }
    T z[width], y[width];
#pragma unroll
    for (int i = 0; i < kPixelClasses; ++i) {
      if (!has(i)) break;
      numbers(i, z, y);
#pragma unroll
      for (int k = 0; k < width; ++k) raise_exponents(z[k], y[k], &highest[k], &highest_positive[k]);
    }
    TwoSums<T> added[width];
#pragma unroll
    for (int k = 0; k < width; ++k) added[k] = {highest[k], highest_positive[k], T(0), T(0)};
#pragma unroll
    for (int i = 0; i < kPixelClasses; ++i) {
      if (!has(i)) break;
      numbers(i, z, y);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        T negative, positive;
        two_exponentials<dense>(z[k], y[k], multilabel_shift(highest[k]), multilabel_shift(highest_positive[k]),
                                &negative, &positive);
        added[k].negative += negative;
        added[k].positive += positive;
      }
    }
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k] = sums[k].raised(highest[k], highest_positive[k]).plus(added[k]);
  }

  // Writes their gradient.
  __device__ __forceinline__ void spread(const Factors& factors) const {
    S* d = rows_.d_logits + image_ * rows_.gradient_image_stride + first_ * rows_.gradient_class_stride + pixel_;
    T z[width], y[width];
#pragma unroll
    for (int i = 0; i < kPixelClasses; ++i) {
      if (!has(i)) break;
      numbers(i, z, y);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        T negative, positive;
        two_exponentials<dense>(z[k], y[k], factors[k].shift, factors[k].shift_of_positives, &negative, &positive);
        z[k] = negative * factors[k].negative - positive * factors[k].positive;
      }
      Pack<S, width>::of_values(z).store(d);
      d += rows_.gradient_class_stride;
    }
  }

 private:
  const MultilabelRows<S>& rows_;
  const std::int64_t row_, image_, pixel_;
  bool is_read_;  // any of them
  int first_ = 0;
  Pack<S, width> packs_[kPixelClasses];
  unsigned positive_[width];  // which of the classes are listed, bit by bit

  __device__ __forceinline__ bool has(int i) const { return first_ + i < rows_.labels.classes; }

  // Which of the classes a pixel's label or list names.
  __device__ __forceinline__ unsigned listed(int k) const {
    const LabelsOf<S>& labels = rows_.labels;
    if (labels.lists == nullptr) return bit_of(counted[k].label);
    unsigned bits = 0;
#pragma unroll 1
    for (int j = 0; j < labels.list_length; ++j) {
      const std::int64_t c = labels.lists[(row_ + k) * labels.list_length + j];
      if (c != labels.ignore_index) bits |= bit_of(static_cast<int>(c));
    }
    return bits;
  }
  __device__ __forceinline__ unsigned bit_of(int c) const {
    const int at = c - first_;
    return at >= 0 && at < kPixelClasses ? 1u << at : 0u;
  }

  // Effective logits and labels of a class; nothing but masks of a pixel that is not read.
  __device__ __forceinline__ void numbers(int i, T (&z)[width], T (&y)[width]) const {
    packs_[i].to_values(z);
    const T bias = rows_.bias != nullptr ? load_constant(rows_.bias + first_ + i) : T(0);
    if constexpr (dense) load_labels(i, y);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const bool masked = z[k] == -infinity<T>() || !counted[k].is_read;
      z[k] = masked ? -infinity<T>() : z[k] + bias;
      if constexpr (!dense) y[k] = (positive_[k] >> i & 1u) != 0 ? T(1) : T(0);
      if (!counted[k].is_read) y[k] = T(0);
    }
  }

  __device__ __forceinline__ void load_labels(int i, T (&y)[width]) const {
    const LabelsOf<S>& labels = rows_.labels;
    const std::int64_t place = (image_ * labels.classes + first_ + i) * rows_.pixels + pixel_;
    if (labels.dense) {
      Pack<S, width>::load(labels.dense + place, Reads::again).to_values(y);
    } else if (labels.dense_wide) {
      Pack<T, width>::load(labels.dense_wide + place, Reads::again).to_values(y);
    } else if constexpr (width == 1) {
      y[0] = labels.dense_boolean[place] ? T(1) : T(0);
    } else {
      const auto bytes = *reinterpret_cast<const typename VectorOf<width>::type*>(labels.dense_boolean + place);
#pragma unroll
      for (int k = 0; k < width; ++k) y[k] = (bytes >> 8 * k & 1) != 0 ? T(1) : T(0);
    }
  }
};

template <class S, bool dense, bool aligned>
__global__ void __launch_bounds__(kPixelThreads, sizeof(S) < 8 ? kPixelBlocks : 1)
    multilabel_in_planes(const __grid_constant__ MultilabelRows<S> rows) {
  using T = Accumulate<S>;
  constexpr int width = multilabel_plane_width<S>(aligned);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kPixelThreads * width;
  const int last = (rows.labels.classes - 1) / kPixelClasses * kPixelClasses;
  std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * kPixelThreads + threadIdx.x) * width;
  for (; row < rows.count; row += step) {
    MultilabelPixels<S, dense, width> pixels(rows, row);
    TwoSums<T> sums[width];
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k] = TwoSums<T>::nothing();
    for (int first = 0; first <= last; first += kPixelClasses) {
      pixels.load(first, Reads::again);
      pixels.add_to(sums);
    }
    TwoFactors<T> factors[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const Counted<T>& counted = pixels.counted[k];
      if (counted.is_read) {
        factors[k] = finish(rows, row + k, counted, sums[k], true);
      } else {
        const T value = counted.value_of_unread();
        if (rows.losses) rows.losses[row + k] = value;
        factors[k] = {value, value, T(0), T(0)};
      }
    }
    for (int first = last; rows.d_logits && first >= 0; first -= kPixelClasses) {
      pixels.load(first, Reads::once);
      pixels.spread(factors);
    }
  }
}

// Whether pixels come in whole packs, of all that has them.
template <class S>
bool is_aligned_in_planes(const MultilabelRows<S>& rows) {
  constexpr int width = multilabel_plane_width<S>(true);
  const auto at_packs = [](const auto* p) { return reinterpret_cast<std::uintptr_t>(p) % (width * sizeof(*p)) == 0; };
  return rows.pixels % width == 0 && rows.image_stride % width == 0 && rows.class_stride % width == 0 &&
         rows.gradient_image_stride % width == 0 && rows.gradient_class_stride % width == 0 && at_packs(rows.logits) &&
         at_packs(rows.d_logits) && at_packs(rows.labels.dense) && at_packs(rows.labels.dense_wide) &&
         at_packs(rows.labels.dense_boolean);
}

template <class S>
cudaError_t launch_in_planes(const MultilabelRows<S>& rows, bool dense, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(&device)) return error;
  return with_form(dense, is_aligned_in_planes(rows), [&](auto is_dense, auto is_aligned) {
    const auto kernel = &multilabel_in_planes<S, is_dense.value, is_aligned.value>;
    constexpr int of_block = kPixelThreads * multilabel_plane_width<S>(is_aligned.value);
    Shape shape{1, kPixelThreads, 1, 0};
    std::int64_t most = INT32_MAX;  // blocks at a time
    if (rows.d_logits != nullptr) {
      const std::size_t bytes = sizeof(S) + bytes_of_dense(rows.labels);
      most = most_at_a_time(device, static_cast<double>(rows.labels.classes) * bytes * of_block);
    }
    if (const cudaError_t error = fill_device(kernel, ceiling(rows.count, of_block), &shape, most)) return error;
    return launch(kernel, shape, stream, rows);
  });
}

}  // namespace imbalance::cuda
