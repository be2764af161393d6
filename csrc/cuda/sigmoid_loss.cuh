// sigmoid_loss on CUDA: value and gradient of any sigmoid-family loss, logit by logit, in one trip.
//
// Three kernels around the same formulas (sigmoid_objectives.h):
//
// - logits_of_labels: rows that follow each other, with class labels and without class vectors or weights: what
// detectors
//   have. 16 bytes of logits at a time, several on their way in each thread. A pack may reach over the ends of rows, so
//   narrow rows waste nothing.
// - logits_in_packs: rows of whole packs, and images, with everything: lists of classes, dense labels, class vectors,
//   weights and upstream gradients of logits, all read by packs too. The labels of pixels stay in registers over
//   several classes.
// - logits_apart: the rest (rows of odd width beside vectors, odd strides, the last numbers, float64), a number at a
//   time, neighbouring threads neighbouring numbers, with the objective chosen at run time.
//
// A block works on one share of the logits and writes the sum of their losses. Class labels never become one-hot:
// of a pack's numbers a bit each says which are positive. Nothing of the logits' size but the gradient is written, and
// with reduction "none" the losses. No atomics: a logit's bits depend on its own value, its row's width and its
// alignment alone.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../sigmoid_objectives.h"
#include "block_sum.cuh"
#include "launches.cuh"
#include "quick.cuh"
#include "sigmoid_loss.h"

namespace imbalance::cuda {

constexpr int kLogitThreads = 128;
constexpr int kLogitPacks = 4;        // of a thread at a time
constexpr int kRowPacks = 16;         // of a thread in all, of rows
constexpr int kClassesOfAShare = 16;  // of images: as many classes as share a block's loads of labels
constexpr int kLogitsApart = 4;       // numbers of a thread, in logits_apart
constexpr int kOfBlockApart = kLogitThreads * kLogitsApart;
constexpr int kLabelBlocks = 5;  // of a multiprocessor
constexpr int kGeneralBlocks = 4;

// Formulas in float use the device's approximations.
template <class T>
struct NumberOf {
  using type = T;
};
template <>
struct NumberOf<float> {
  using type = Quick;
};
template <class S>
using Number = typename NumberOf<Accumulate<S>>::type;

__device__ __forceinline__ float plain_number(Quick x) { return x.value; }
__device__ __forceinline__ double plain_number(double x) { return x; }

// Quotient and remainder by what the host knows, without a division.
class Divisor {
 public:
  struct Result {
    std::int64_t quotient;
    int remainder;
  };

  Divisor() = default;
  explicit Divisor(std::int64_t by)
      : by_(static_cast<std::uint64_t>(by)), inverse_(by > 0 ? ~std::uint64_t{0} / by_ : 0) {}

  // n is at least 0
  __device__ __forceinline__ Result operator()(std::int64_t n) const {
    std::uint64_t quotient = __umul64hi(static_cast<std::uint64_t>(n), inverse_);  // or one less
    std::uint64_t remainder = static_cast<std::uint64_t>(n) - quotient * by_;
    if (remainder >= by_) {
      remainder -= by_;
      ++quotient;
    }
    return {static_cast<std::int64_t>(quotient), static_cast<int>(remainder)};
  }

 private:
  std::uint64_t by_ = 0;
  std::uint64_t inverse_ = 0;
};

// SigmoidLossArguments with types.
template <class S>
struct Logits {
  using T = Accumulate<S>;

  const S* logits;
  S* gradient;
  std::int64_t image_stride, class_stride;  // rows are images of one pixel
  std::int64_t gradient_image_stride, gradient_class_stride;
  std::int64_t first, count;  // of the logits: those of logits_apart are from the first to count
  std::int64_t units;         // packs of pixels, of all images
  int classes;
  int pixels;  // 0: rows

  // Of packs, or numbers, that are neighbours: how far it is from one to the next of a thread.
  Divisor by_line;   // C of rows, P of images, or in logits_in_packs the packs of an image's pixels
  Divisor by_class;  // C
  int step_rows;     // or lines of pixels
  int step_columns;

  const std::int64_t* labels;
  const std::int64_t* lists;
  int list_length;
  const void* dense;
  LabelType label_type;
  std::int64_t ignore_index;
  unsigned ignored_label;  // the same where it is 0 to C, else 2^32 - 1: labels up to C are 32-bit integers

  T positive, negative, parameter;
  const T* positive_weight;
  const T* negative_weight;
  const T* bias;
  const T* class_parameter;
  const T* sample_weight;
  bool weight_of_logits;

  const T* upstream;            // (count,)
  const T* upstream_of_result;  // ()
  const T* normalizer;
  const T* divisor;
  T share;
  T* losses;
  T* sums;
  bool does_more;  // than to add up losses and to write a gradient

  // Nothing counts, so that nothing is read.
  __device__ __forceinline__ bool is_nothing() const { return normalizer != nullptr && *normalizer == T(0); }
  __device__ __forceinline__ T gradient_scale() const {
    const T by = upstream_of_result != nullptr ? *upstream_of_result * share : share;
    const T* const over = normalizer != nullptr ? normalizer : divisor;
    return over != nullptr ? by / *over : by;
  }
};

// A bit for each number of a pack.
struct Bits {
  unsigned positive;
  unsigned off;      // ignored, of weight 0, or not there: 0 whatever they hold
  unsigned outside;  // of a label that is none: NaN

  // Forgotten on the way, or it becomes a shift, a mask and a comparison: three instructions in place of one.
  __device__ __forceinline__ bool is_positive(int k) const {
    unsigned bit = positive & 1u << k;
    forget(bit);
    return bit != 0;
  }
};

__host__ __device__ constexpr unsigned all_bits(int count) { return (1u << count) - 1; }

// What a row's label makes of its columns first, ..., first + count - 1; they are the numbers from `at` on.
template <class S>
__device__ __forceinline__ void mark_row(const Logits<S>& a, std::int64_t label, int first, int count, int at,
                                         Bits* bits) {
  const unsigned all = all_bits(count) << at;
  if (label == a.ignore_index) {
    bits->off |= all;
  } else if (label < 0 || label > a.classes) {
    bits->outside |= all;
  } else {
    const int place = static_cast<int>(label) - first;
    if (place >= 0 && place < count) bits->positive |= 1u << (at + place);
  }
}

template <class S>
__device__ __forceinline__ void mark_list(const Logits<S>& a, std::int64_t row, int first, int count, int at,
                                          Bits* bits) {
  const std::int64_t* const list = a.lists + row * a.list_length;
#pragma unroll 1
  for (int i = 0; i < a.list_length; ++i) {
    const std::int64_t label = list[i];
    if (label == a.ignore_index) continue;
    if (label < 0 || label >= a.classes) {
      bits->outside |= all_bits(count) << at;
    } else if (const int place = static_cast<int>(label) - first; place >= 0 && place < count) {
      bits->positive |= 1u << (at + place);
    }
  }
}

// Numbers beside a pack, in another type.
template <int width, class T>
__device__ __forceinline__ void load_beside(const T* p, T (&values)[width]) {
  constexpr int step = Pack<T>::width;
#pragma unroll
  for (int k = 0; k < width; k += step) {
    const Pack<T> pack = Pack<T>::load(p + k, Reads::once);
#pragma unroll
    for (int j = 0; j < step; ++j) values[k + j] = pack.get(j);
  }
}
template <int width, class T>
__device__ __forceinline__ void store_beside(T* p, const T (&values)[width]) {
  constexpr int step = Pack<T>::width;
#pragma unroll
  for (int k = 0; k < width; k += step) {
    T some[step];
#pragma unroll
    for (int j = 0; j < step; ++j) some[j] = values[k + j];
    Pack<T>::of_values(some).store(p + k);
  }
}

// The cost of one number of label 0 or 1, not weighted, and its weighted slope in the logit.
template <class T>
struct Cost {
  T value;
  T slope;
};
template <class S, class Objective>
__device__ __forceinline__ Cost<Accumulate<S>> hard_cost(const Objective& objective, Accumulate<S> x, bool positive,
                                                         Accumulate<S> parameter, Accumulate<S> scale_of_positive,
                                                         Accumulate<S> scale_of_negative) {
  using N = Number<S>;
  const Truth<N> truth(N(positive ? x : -x));
  const ValueAndSlope<N> cost = objective.hard(truth, positive, N(parameter));
  return {plain_number(cost.value), (positive ? scale_of_positive : -scale_of_negative) * plain_number(cost.slope)};
}

// The cost of a label in between, both weighted.
template <class S, class Objective>
__device__ __forceinline__ Cost<Accumulate<S>> soft_cost(const Objective& objective, Accumulate<S> x, Accumulate<S> y,
                                                         Accumulate<S> parameter, Accumulate<S> of_positive,
                                                         Accumulate<S> of_negative) {
  using N = Number<S>;
  const Sides<N> sides = objective.soft(Truth<N>(N(x)), N(y), N(parameter));
  const N positive(y * of_positive), negative((1 - y) * of_negative);
  return {plain_number(share_of(positive, sides.positive.value) + share_of(negative, sides.negative.value)),
          plain_number(share_of(positive, sides.positive.slope) + share_of(negative, sides.negative.slope))};
}

// What upstream gradients and labels that do not count make of a pack's costs.
template <class S>
__device__ __forceinline__ void settle(const Logits<S>& a, const Bits& bits, std::int64_t place,
                                       Accumulate<S> (&values)[Pack<S>::width],
                                       Accumulate<S> (&slopes)[Pack<S>::width]) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width;
  T upstream[width];
#pragma unroll
  for (int k = 0; k < width; ++k) upstream[k] = T(1);
  if (a.upstream != nullptr) load_beside(a.upstream + place, upstream);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    slopes[k] *= upstream[k];
    if (bits.outside & 1u << k) values[k] = slopes[k] = std::numeric_limits<T>::quiet_NaN();
    if (bits.off & 1u << k) values[k] = slopes[k] = T(0);
  }
}

// The end of a block.
template <class S>
__device__ __forceinline__ void write_sum(const Logits<S>& a, Accumulate<S> sum) {
  if (a.sums == nullptr) return;
  sum = sum_over_block<kLogitThreads>(sum);
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum * a.share;
}

// ---------------------------------------------------------------- packs

// Which logits a thread works on: packs that are some steps apart, of rows as they follow each other, or of some pixels
// and one class after the other.
template <class S>
struct Stretch {
  static constexpr int width = Pack<S>::width;

  int packs;                                           // that are left
  std::int64_t at, gradient_at, place;                 // of the first: in logits, gradient, and what is contiguous
  std::int64_t step_at, step_gradient_at, step_place;  // from pack to pack
  std::int64_t row;                                    // of the first number
  int column;                                          // its class
  std::int64_t step_rows;
  int step_columns;

  __device__ __forceinline__ void step(int classes) {
    row += step_rows;
    column += step_columns;
    if (column >= classes) {
      column -= classes;
      ++row;
    }
  }
  __device__ __forceinline__ void drop(int some, int classes) {
    packs -= some;
    at += some * step_at;
    gradient_at += some * step_gradient_at;
    place += some * step_place;
#pragma unroll
    for (int i = 0; i < some; ++i) step(classes);
  }
};

template <class S>
__device__ __forceinline__ Stretch<S> stretch_of(const Logits<S>& a) {
  constexpr int width = Pack<S>::width;
  const int thread = static_cast<int>(threadIdx.x);
  Stretch<S> stretch{};
  if (a.pixels > 0) {
    const unsigned shares = static_cast<unsigned>((a.classes + kClassesOfAShare - 1) / kClassesOfAShare);
    const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x / shares) * kLogitThreads + thread;
    const typename Divisor::Result image = a.by_line(unit);
    const int c = static_cast<int>(blockIdx.x % shares) * kClassesOfAShare, pixel = image.remainder * width;
    stretch.packs = unit < a.units ? min(kClassesOfAShare, a.classes - c) : 0;
    stretch.at = image.quotient * a.image_stride + c * a.class_stride + pixel;
    stretch.gradient_at = image.quotient * a.gradient_image_stride + c * a.gradient_class_stride + pixel;
    stretch.place = (image.quotient * a.classes + c) * a.pixels + pixel;
    stretch.step_at = a.class_stride;
    stretch.step_gradient_at = a.gradient_class_stride;
    stretch.step_place = a.pixels;
    stretch.row = image.quotient * a.pixels + pixel;
    stretch.column = c;
    stretch.step_columns = 1;
    return stretch;
  }
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kRowPacks * kLogitThreads + thread) * width;
  const typename Divisor::Result line = a.by_line(first);
  constexpr int step = kLogitThreads * width;
  const std::int64_t left = a.count - first;
  stretch.packs = static_cast<int>(min(max(left, std::int64_t{0}) + (step - 1), std::int64_t{kRowPacks * step})) / step;
  stretch.at = stretch.gradient_at = stretch.place = first;
  stretch.step_at = stretch.step_gradient_at = stretch.step_place = step;
  stretch.row = line.quotient;
  stretch.column = line.remainder;
  stretch.step_rows = a.step_rows;
  stretch.step_columns = a.step_columns;
  return stretch;
}

// Labels of the pixels of a pack, which serve all classes.
template <int width>
struct Pixels {
  int classes[width];  // -1: none
  Bits bits;
};
template <class S>
__device__ __forceinline__ Pixels<Pack<S>::width> pixels_of(const Logits<S>& a, const Stretch<S>& stretch) {
  constexpr int width = Pack<S>::width;
  Pixels<width> pixels{{}, {0, 0, 0}};
#pragma unroll
  for (int k = 0; k < width; ++k) pixels.classes[k] = -1;
  if (a.pixels == 0 || a.labels == nullptr || stretch.packs == 0) return pixels;
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const std::int64_t label = a.labels[stretch.row + k];
    const bool ignored = label == a.ignore_index, is_label = label >= 0 && label <= a.classes;
    pixels.classes[k] = is_label && !ignored ? static_cast<int>(label) : -1;
    pixels.bits.off |= (ignored ? 1u : 0u) << k;
    pixels.bits.outside |= (!ignored && !is_label ? 1u : 0u) << k;
  }
  return pixels;
}

template <class S>
__device__ __forceinline__ unsigned bits_of_booleans(const Logits<S>& a, std::int64_t place) {
  constexpr int width = Pack<S>::width;
  const auto* const given = static_cast<const unsigned char*>(a.dense) + place;
  unsigned bits = 0;
#pragma unroll
  for (int w = 0; w < width / 4; ++w) {
    const std::uint32_t four = reinterpret_cast<const std::uint32_t*>(given)[w];
    bits |= ((four & 1u) | (four >> 7 & 2u) | (four >> 14 & 4u) | (four >> 21 & 8u)) << (4 * w);
  }
  return bits;
}

// Labels and class vectors beside `step` numbers of a pack, those of the weights multiplied.
template <class T, int step>
struct Beside {
  T y[step];
  T positive[step];
  T negative[step];
  T bias[step];
  T parameter[step];
};

// Numbers of a class vector: of a pack's columns, or of images one for all.
template <int step, class T>
__device__ __forceinline__ void load_class_values(const T* vector, T constant, int column, bool images,
                                                  T (&values)[step]) {
  if (vector != nullptr && !images) {
    const Pack<T> pack = Pack<T>::load(vector + column, Reads::again);
#pragma unroll
    for (int k = 0; k < step; ++k) values[k] = pack.get(k);
    return;
  }
  const T value = vector != nullptr ? vector[column] : constant;
#pragma unroll
  for (int k = 0; k < step; ++k) values[k] = value;
}

// The costs of a whole pack beside whatever there may be, a few numbers at a time. Sets bits of numbers of weight 0.
template <class S, class Objective>
__device__ __forceinline__ void general_costs(const Logits<S>& a, const Objective& objective, const Pack<S>& pack,
                                              std::int64_t row, int column, std::int64_t place, Accumulate<S> scale,
                                              Bits* bits, Accumulate<S> (&values)[Pack<S>::width],
                                              Accumulate<S> (&slopes)[Pack<S>::width]) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width, step = Pack<T>::width;
  const bool images = a.pixels > 0;
  Pack<S> given{};
  if (a.dense != nullptr && a.label_type == LabelType::logits) {
    given = Pack<S>::load(static_cast<const S*>(a.dense) + place, Reads::once);
  }
#pragma unroll
  for (int from = 0; from < width; from += step) {
    Beside<T, step> beside;
    load_class_values(a.positive_weight, a.positive, column + (images ? 0 : from), images, beside.positive);
    load_class_values(a.negative_weight, a.negative, column + (images ? 0 : from), images, beside.negative);
    load_class_values(a.bias, T(0), column + (images ? 0 : from), images, beside.bias);
    load_class_values(a.class_parameter, a.parameter, column + (images ? 0 : from), images, beside.parameter);
    if (a.sample_weight != nullptr) {
      T weight[step];
      if (images || a.weight_of_logits) {
        load_beside(a.sample_weight + (a.weight_of_logits ? place : row) + from, weight);
      } else {
#pragma unroll
        for (int k = 0; k < step; ++k) weight[k] = a.sample_weight[row];
      }
#pragma unroll
      for (int k = 0; k < step; ++k) {
        bits->off |= (weight[k] == T(0) ? 1u : 0u) << (from + k);
        beside.positive[k] *= weight[k];
        beside.negative[k] *= weight[k];
      }
    }
    bool soft = false;
    if (a.dense != nullptr && a.label_type != LabelType::boolean) {
      if (a.label_type == LabelType::accumulate) {
        load_beside(static_cast<const T*>(a.dense) + place + from, beside.y);
      } else {
#pragma unroll
        for (int k = 0; k < step; ++k) beside.y[k] = number_of(given.get(from + k));
      }
#pragma unroll
      for (int k = 0; k < step; ++k) {
        bits->positive |= (beside.y[k] == T(1) ? 1u : 0u) << (from + k);
        soft = soft || (beside.y[k] != T(0) && beside.y[k] != T(1));
      }
    }
    if (soft) {
#pragma unroll
      for (int k = 0; k < step; ++k) {
        const T x = number_of(pack.get(from + k)) + beside.bias[k];
        const Cost<T> cost =
            soft_cost<S>(objective, x, beside.y[k], beside.parameter[k], beside.positive[k], beside.negative[k]);
        values[from + k] = cost.value;
        slopes[from + k] = cost.slope * scale;
      }
    } else {
#pragma unroll
      for (int k = 0; k < step; ++k) {
        const T x = number_of(pack.get(from + k)) + beside.bias[k];
        const bool positive = bits->is_positive(from + k);
        const Cost<T> cost = hard_cost<S>(objective, x, positive, beside.parameter[k], beside.positive[k] * scale,
                                          beside.negative[k] * scale);
        values[from + k] = (positive ? beside.positive[k] : beside.negative[k]) * cost.value;
        slopes[from + k] = cost.slope;
      }
    }
  }
}

template <class S, class Objective>
__global__ void __launch_bounds__(kLogitThreads, kGeneralBlocks)
    logits_in_packs(const __grid_constant__ Logits<S> a, const __grid_constant__ Objective objective) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width;
  constexpr unsigned all = all_bits(width);
  const bool images = a.pixels > 0, nothing = a.is_nothing();
  const T scale = a.gradient_scale();
  Stretch<S> stretch = stretch_of(a);
  const Pixels<width> pixels = pixels_of(a, stretch);

  T sum = T(0);
  for (; stretch.packs > 0; stretch.drop(kLogitPacks, a.classes)) {
    // All packs are on their way, and their labels, before any is waited for.
    Pack<S> packs[kLogitPacks];
    std::int64_t labels[kLogitPacks];
    Stretch<S> here = stretch;
#pragma unroll
    for (int i = 0; i < kLogitPacks; ++i, here.step(a.classes)) {
      const bool there = i < stretch.packs && !nothing;
      packs[i] = there ? Pack<S>::load(a.logits + stretch.at + i * stretch.step_at, Reads::once) : Pack<S>{};
      labels[i] = there && !images && a.labels != nullptr ? a.labels[here.row] : a.ignore_index;
    }
    here = stretch;
#pragma unroll
    for (int i = 0; i < kLogitPacks; ++i, here.step(a.classes)) {
      if (i >= stretch.packs) break;
      const std::int64_t place = stretch.place + i * stretch.step_place;
      Bits bits{0, 0, 0};
      if (nothing) {
        bits.off = all;
      } else if (a.dense != nullptr) {
        if (a.label_type == LabelType::boolean) bits.positive = bits_of_booleans(a, place);
      } else if (images) {
        bits = pixels.bits;
#pragma unroll
        for (int k = 0; k < width; ++k) bits.positive |= (pixels.classes[k] == here.column ? 1u : 0u) << k;
      } else if (a.labels != nullptr) {
        mark_row(a, labels[i], here.column, width, 0, &bits);
      } else {
        mark_list(a, here.row, here.column, width, 0, &bits);
      }
      T values[width], slopes[width];
      if (bits.off == all) {
#pragma unroll
        for (int k = 0; k < width; ++k) values[k] = slopes[k] = T(0);
      } else {
        general_costs(a, objective, packs[i], here.row, here.column, place, scale, &bits, values, slopes);
        if (a.upstream != nullptr || (bits.off | bits.outside) != 0) settle(a, bits, place, values, slopes);
      }
#pragma unroll
      for (int k = 0; k < width; ++k) sum += values[k];
      if (a.losses != nullptr) store_beside(a.losses + place, values);
      if (a.gradient != nullptr) {
        Pack<S>::of_values(slopes).store(a.gradient + stretch.gradient_at + i * stretch.step_gradient_at);
      }
    }
  }
  write_sum(a, sum);
}

// ---------------------------------------------------------------- packs of rows with class labels

// What the labels of a pack's rows make of it, where one is no class or the pack reaches over the end of a row.
template <class S>
__device__ __forceinline__ Bits bits_of_rows(const Logits<S>& a, std::int64_t place) {
  constexpr int width = Pack<S>::width;
  const typename Divisor::Result line = a.by_line(place);
  const std::int64_t* labels = a.labels + line.quotient;
  Bits bits{0, 0, 0};
  int column = line.remainder;
#pragma unroll 1
  for (int at = 0; at < width; ++labels) {
    const int here = min(a.classes - column, width - at);
    mark_row(a, *labels, column, here, at, &bits);
    at += here;
    column = 0;
  }
  return bits;
}

template <class S, class Objective>
__global__ void __launch_bounds__(kLogitThreads, kLabelBlocks)
    logits_of_labels(const __grid_constant__ Logits<S> a, const __grid_constant__ Objective objective) {
  using T = Accumulate<S>;
  constexpr int width = Pack<S>::width, step = kLogitThreads * width;
  const T scale = a.gradient_scale(), scale_of_positive = a.positive * scale, scale_of_negative = a.negative * scale;
  const bool nothing = a.is_nothing();
  const int more = nothing || a.does_more;  // than most calls: one register to look at
  const auto classes = static_cast<unsigned>(a.classes);

  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * kRowPacks * step;
  const int of_block = static_cast<int>(min(a.count - block, std::int64_t{kRowPacks} * step));
  const int mine = static_cast<int>(threadIdx.x) * width;
  const typename Divisor::Result line = a.by_line(block + mine);
  const std::int64_t* labels = a.labels + line.quotient;  // of the thread's first row
  const S* logits = a.logits + block + mine;
  S* gradient = a.gradient + block + mine;
  forget(labels);
  forget(logits);
  forget(gradient);
  unsigned row = 0;
  int column = line.remainder;

  T sum = T(0);
#pragma unroll 1
  for (int group = 0; group < of_block; group += kLogitPacks * step) {
    // All packs are on their way, and their labels, before any is waited for.
    const int left = of_block - group - mine;
    Pack<S> packs[kLogitPacks];
    std::int64_t labels_of_packs[kLogitPacks];
    int columns[kLogitPacks];
#pragma unroll
    for (int i = 0; i < kLogitPacks; ++i) {
      columns[i] = column;
      if (i * step < left) {
        packs[i] = Pack<S>::load(logits + i * step, Reads::once);
        labels_of_packs[i] = __ldg(labels + row);
      }
      row += static_cast<unsigned>(a.step_rows);
      column += a.step_columns;
      if (column >= a.classes) {
        column -= a.classes;
        ++row;
      }
    }
    int left_again = left;  // compared anew, which costs less than to remember
    forget(left_again);
#pragma unroll
    for (int i = 0; i < kLogitPacks; ++i) {
      const bool there = i * step < left_again;
      Bits bits{0, 0, 0};
      bool usual = true;
      if (there) {
        const auto label = static_cast<unsigned>(labels_of_packs[i]), place = label - static_cast<unsigned>(columns[i]);
        const int of_row = a.classes - columns[i];
        usual = labels_of_packs[i] >> 32 == 0 && label <= classes && label != a.ignored_label && of_row >= width;
        bits.positive = place < static_cast<unsigned>(width) ? 1u << place : 0u;
        if (!usual) bits = bits_of_rows(a, block + group + mine + i * step);
      }
      T values[width], slopes[width], of_pack = T(0);
      const auto cost = [&](int k, bool positive) {
        const Cost<T> cost = hard_cost<S>(objective, number_of(packs[i].get(k)), positive, a.parameter,
                                          scale_of_positive, scale_of_negative);
        values[k] = cost.value;
        slopes[k] = cost.slope;
        of_pack += (positive ? a.positive : a.negative) * cost.value;
      };
      // Most packs have no positive, and then not one instruction for it.
      if (__any_sync(kAllLanes, bits.positive != 0)) {
#pragma unroll
        for (int k = 0; k < width; ++k) cost(k, bits.is_positive(k));
      } else {
#pragma unroll
        for (int k = 0; k < width; ++k) cost(k, false);
      }
      if (!there) continue;
      if (more == 0 && usual) {
        Pack<S>::of_values(slopes).store(gradient + i * step);
      } else {
        const std::int64_t place = block + group + mine + i * step;
        if (nothing) bits.off = all_bits(width);
#pragma unroll
        for (int k = 0; k < width; ++k) values[k] *= (bits.positive & 1u << k) != 0 ? a.positive : a.negative;
        settle(a, bits, place, values, slopes);
        of_pack = T(0);
#pragma unroll
        for (int k = 0; k < width; ++k) of_pack += values[k];
        if (a.losses != nullptr) store_beside(a.losses + place, values);
        if (a.gradient != nullptr) Pack<S>::of_values(slopes).store(gradient + i * step);
      }
      sum += of_pack;
    }
    logits += kLogitPacks * step;
    gradient += kLogitPacks * step;
  }
  write_sum(a, sum);
}

// ---------------------------------------------------------------- numbers

// Every objective, chosen at run time.
struct AnyObjective {
  BinaryObjectiveKind kind;
  double first, second, third;

  template <class N>
  IMBALANCE_INLINE ValueAndSlope<N> hard(const Truth<N>& t, bool positive, N parameter) const {
    switch (kind) {
      case BinaryObjectiveKind::quality_focal:
        return QualityFocal<double>{first}.hard(t, positive, parameter);
      case BinaryObjectiveKind::varifocal:
        return Varifocal<double>{first, second}.hard(t, positive, parameter);
      case BinaryObjectiveKind::asymmetric:
        return Asymmetric<Clipping::asked, double, double>{first, second, third}.hard(t, positive, parameter);
      default:
        return evaluate(static_cast<ObjectiveKind>(kind), t, parameter, number<N>(second));
    }
  }
  template <class N>
  IMBALANCE_INLINE Sides<N> soft(const Truth<N>& t, N y, N parameter) const {
    switch (kind) {
      case BinaryObjectiveKind::focal:
        return focal_sides(t, y, parameter);
      case BinaryObjectiveKind::quality_focal:
        return QualityFocal<double>{first}.soft(t, y, parameter);
      case BinaryObjectiveKind::varifocal:
        return Varifocal<double>{first, second}.soft(t, y, parameter);
      case BinaryObjectiveKind::asymmetric:
        return Asymmetric<Clipping::asked, double, double>{first, second, third}.soft(t, y, parameter);
      default:
        return mixed_sides(t, HardCost<AnyObjective, N>{*this, parameter});
    }
  }
};

// Where a number lies.
struct Spot {
  std::int64_t at;           // in the logits
  std::int64_t gradient_at;  // in the gradient
  std::int64_t place;        // in what is contiguous
  std::int64_t row;
  int column;  // class
  bool there;
};

template <class S>
__global__ void __launch_bounds__(kLogitThreads)
    logits_apart(const __grid_constant__ Logits<S> a, const __grid_constant__ AnyObjective objective) {
  using T = Accumulate<S>;
  const bool images = a.pixels > 0, nothing = a.is_nothing();
  const T scale = a.gradient_scale();
  const int length = images ? a.pixels : a.classes;
  const std::int64_t first = a.first + static_cast<std::int64_t>(blockIdx.x) * kOfBlockApart + threadIdx.x;
  const typename Divisor::Result start = a.by_line(first);

  const auto spot_of = [&](std::int64_t line, int column, std::int64_t place) -> Spot {
    const bool there = place < a.count;
    if (!images)
      return {line * a.image_stride + column, line * a.gradient_image_stride + column, place, line, column, there};
    const typename Divisor::Result image = a.by_class(line);
    return {image.quotient * a.image_stride + image.remainder * a.class_stride + column,
            image.quotient * a.gradient_image_stride + image.remainder * a.gradient_class_stride + column,
            place,
            image.quotient * a.pixels + column,
            image.remainder,
            there};
  };

  // All of a thread's numbers are on their way before it works on the first.
  Spot spots[kLogitsApart];
  S numbers[kLogitsApart];
  std::int64_t labels[kLogitsApart];
  std::int64_t line = start.quotient;
  int column = start.remainder;
#pragma unroll
  for (int i = 0; i < kLogitsApart; ++i) {
    spots[i] = spot_of(line, column, first + i * kLogitThreads);
    const bool there = spots[i].there && !nothing;
    if (there) numbers[i] = a.logits[spots[i].at];
    labels[i] = there && a.labels != nullptr ? a.labels[spots[i].row] : a.ignore_index;
    line += a.step_rows;
    column += a.step_columns;
    if (column >= length) {
      column -= length;
      ++line;
    }
  }

  T sum = T(0);
#pragma unroll 1
  for (int i = 0; i < kLogitsApart; ++i) {
    const Spot spot = spots[0];
    const S x_as_given = numbers[0];
    const std::int64_t label = labels[0];
#pragma unroll
    for (int j = 1; j < kLogitsApart; ++j) {  // registers have no index
      spots[j - 1] = spots[j];
      numbers[j - 1] = numbers[j];
      labels[j - 1] = labels[j];
    }
    if (!spot.there) continue;
    Bits bits{0, nothing ? 1u : 0u, 0};
    T y = T(0), weight = T(1);
    if (nothing) {
    } else if (a.labels != nullptr) {
      mark_row(a, label, spot.column, 1, 0, &bits);
    } else if (a.dense == nullptr) {
      mark_list(a, spot.row, spot.column, 1, 0, &bits);
    } else if (a.label_type == LabelType::boolean) {
      bits.positive = static_cast<const unsigned char*>(a.dense)[spot.place];
    } else {
      y = a.label_type == LabelType::logits ? number_of(static_cast<const S*>(a.dense)[spot.place])
                                            : static_cast<const T*>(a.dense)[spot.place];
      bits.positive = y == T(1) ? 1u : 0u;
    }
    const bool soft = y != T(0) && y != T(1);
    if (a.sample_weight != nullptr) weight = a.sample_weight[a.weight_of_logits ? spot.place : spot.row];
    T value = T(0), slope = T(0);
    if (weight == T(0)) bits.off = 1u;
    if (bits.off == 0 && bits.outside != 0) {
      value = slope = std::numeric_limits<T>::quiet_NaN();
    } else if (bits.off == 0) {
      const T bias = a.bias != nullptr ? a.bias[spot.column] : T(0), x = number_of(x_as_given) + bias;
      const T parameter = a.class_parameter != nullptr ? a.class_parameter[spot.column] : a.parameter;
      const T of_positive = weight * (a.positive_weight != nullptr ? a.positive_weight[spot.column] : a.positive);
      const T of_negative = weight * (a.negative_weight != nullptr ? a.negative_weight[spot.column] : a.negative);
      Cost<T> cost;
      if (soft) {
        cost = soft_cost<S>(objective, x, y, parameter, of_positive, of_negative);
        cost.slope *= scale;
      } else {
        cost = hard_cost<S>(objective, x, bits.positive != 0, parameter, of_positive * scale, of_negative * scale);
        cost.value *= bits.positive != 0 ? of_positive : of_negative;
      }
      value = cost.value;
      slope = cost.slope;
      if (a.upstream != nullptr) slope *= a.upstream[spot.place];
    }
    if (a.losses != nullptr) a.losses[spot.place] = value;
    sum += value;
    if (a.gradient != nullptr) store_number(a.gradient + spot.gradient_at, slope);
  }
  write_sum(a, sum);
}

// ---------------------------------------------------------------- launches

// Which kernel serves a call, how many blocks of it, and how many logits are left to logits_apart.
struct LogitPlan {
  enum class Form { labels, packs, apart } form;
  std::int64_t blocks;
  std::int64_t left;

  std::int64_t blocks_of_left() const { return (left + kOfBlockApart - 1) / kOfBlockApart; }
};

template <class S>
LogitPlan plan_of(const SigmoidArguments& call) {
  using Form = LogitPlan::Form;
  const std::int64_t count = call.rows() * call.classes;
  const auto blocks_of = [](std::int64_t n, std::int64_t of_a_block) { return (n + of_a_block - 1) / of_a_block; };
  if constexpr (!std::is_same_v<S, double>) {
    constexpr int width = Pack<S>::width;
    const auto at_packs = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
    const bool images = call.pixels > 0;
    const bool vectors = call.positive_weight || call.negative_weight || call.bias || call.class_parameter;
    const bool beside = at_packs(call.logits) && at_packs(call.d_logits) && at_packs(call.dense) &&
                        at_packs(call.losses) && at_packs(call.upstream);
    if (images) {
      const bool whole =
          call.pixels % width == 0 && call.image_stride % width == 0 && call.class_stride % width == 0 &&
          (!call.d_logits || (call.gradient_image_stride % width == 0 && call.gradient_class_stride % width == 0));
      if (beside && whole && !call.lists && at_packs(call.sample_weight)) {
        return {
            Form::packs,
            blocks_of(call.images * (call.pixels / width), kLogitThreads) * blocks_of(call.classes, kClassesOfAShare),
            0};
      }
    } else {
      const bool one_after_another =
          call.images == 1 ||
          (call.image_stride == call.classes && (!call.d_logits || call.gradient_image_stride == call.classes));
      const bool whole = call.classes % width == 0;
      const std::int64_t blocks = blocks_of(count / width, kLogitThreads * kRowPacks), left = count % width;
      if (beside && one_after_another) {
        if (call.labels && !vectors && !call.sample_weight) return {Form::labels, blocks, left};
        const bool vectors_at_packs = at_packs(call.positive_weight) && at_packs(call.negative_weight) &&
                                      at_packs(call.bias) && at_packs(call.class_parameter) &&
                                      (!call.weight_of_logits || at_packs(call.sample_weight));
        if (whole && vectors_at_packs) return {Form::packs, blocks, left};
      }
    }
  }
  return {Form::apart, 0, count};
}

template <class S>
Logits<S> logits_of(const SigmoidLossArguments& arguments) {
  using T = Accumulate<S>;
  const SigmoidArguments& call = arguments.call;
  Logits<S> a{};
  a.logits = static_cast<const S*>(call.logits);
  a.gradient = static_cast<S*>(call.d_logits);
  a.image_stride = call.image_stride;
  a.class_stride = call.class_stride;
  a.gradient_image_stride = call.gradient_image_stride;
  a.gradient_class_stride = call.gradient_class_stride;
  a.classes = static_cast<int>(call.classes);
  a.pixels = static_cast<int>(call.pixels);
  a.labels = call.labels;
  a.lists = call.lists;
  a.list_length = static_cast<int>(call.list_length);
  a.dense = call.dense;
  a.label_type = call.label_type;
  a.ignore_index = call.ignore_index;
  a.positive = static_cast<T>(call.positive);
  a.negative = static_cast<T>(call.negative);
  a.parameter = static_cast<T>(call.objective_parameters[0]);
  a.positive_weight = static_cast<const T*>(call.positive_weight);
  a.negative_weight = static_cast<const T*>(call.negative_weight);
  a.bias = static_cast<const T*>(call.bias);
  a.class_parameter = static_cast<const T*>(call.class_parameter);
  a.sample_weight = static_cast<const T*>(call.sample_weight);
  a.weight_of_logits = call.weight_of_logits;
  a.upstream = static_cast<const T*>(call.upstream);
  a.upstream_of_result = static_cast<const T*>(arguments.upstream);
  a.normalizer = static_cast<const T*>(arguments.normalizer);
  a.divisor = static_cast<const T*>(arguments.divisor);
  a.share = static_cast<T>(arguments.share);
  a.losses = static_cast<T*>(call.losses);
  a.sums = static_cast<T*>(arguments.sums);
  const bool ignores_label = call.ignore_index >= 0 && call.ignore_index <= call.classes;
  a.ignored_label = ignores_label ? static_cast<unsigned>(call.ignore_index) : ~0u;
  a.does_more = call.upstream != nullptr || call.losses != nullptr || call.d_logits == nullptr;
  return a;
}

// Exponents of the defaults are products; of others a power is one approximate exponential, of a logarithm at hand.
struct DeviceExponents {
  template <class Body>
  static auto choose(double gamma, const Body& body) {
    if (gamma == 2) return body(FixedExponent<4>{});
    return body(gamma);
  }
  template <class Body>
  static auto choose(double first, double second, const Body& body) {
    if (first == 4 && second == 1) return body(FixedExponent<8>{}, FixedExponent<2>{});
    return body(first, second);
  }
};

// How lines of `length` are cut by steps of a thread.
template <class S>
Logits<S> stepping(Logits<S> a, std::int64_t length, std::int64_t step) {
  a.by_line = Divisor(length);
  a.step_rows = static_cast<int>(step / length);
  a.step_columns = static_cast<int>(step % length);
  return a;
}

template <class S>
cudaError_t launch_in_packs(const Logits<S>& of_call, const SigmoidArguments& call, const LogitPlan& plan,
                            cudaStream_t stream) {
  constexpr int width = Pack<S>::width;
  const bool images = call.pixels > 0;
  Logits<S> a = stepping(of_call, images ? call.pixels / width : call.classes, kLogitThreads * width);
  a.count = call.rows() * call.classes - plan.left;
  a.units = call.images * (call.pixels / width);
  const Shape shape{static_cast<unsigned>(plan.blocks), kLogitThreads, 1, 0};
  return with_objective<DeviceExponents>(call, [&](const auto& objective) {
    using Objective = std::decay_t<decltype(objective)>;
    auto kernel = &logits_in_packs<S, Objective>;
    if (plan.form == LogitPlan::Form::labels) kernel = &logits_of_labels<S, Objective>;
    return launch(kernel, shape, stream, a, objective);
  });
}

template <class S>
cudaError_t launch_apart(const Logits<S>& of_call, const SigmoidArguments& call, const LogitPlan& plan,
                         cudaStream_t stream) {
  Logits<S> a = stepping(of_call, call.pixels > 0 ? call.pixels : call.classes, kLogitThreads);
  a.by_class = Divisor(call.classes);
  a.count = call.rows() * call.classes;
  a.first = a.count - plan.left;
  if (a.sums != nullptr) a.sums += plan.blocks;
  const Shape shape{static_cast<unsigned>(plan.blocks_of_left()), kLogitThreads, 1, 0};
  const double* const parameters = call.objective_parameters;
  const AnyObjective objective{call.objective, parameters[0], parameters[1], parameters[2]};
  return launch(&logits_apart<S>, shape, stream, a, objective);
}

template <class S>
std::int64_t sigmoid_sums_of(const SigmoidArguments& call) {
  const LogitPlan plan = plan_of<S>(call);
  return plan.blocks + plan.blocks_of_left();
}

template <class S>
cudaError_t sigmoid_loss_of(const SigmoidLossArguments& arguments, cudaStream_t stream) {
  const SigmoidArguments& call = arguments.call;
  const LogitPlan plan = plan_of<S>(call);
  if (plan.blocks + plan.blocks_of_left() > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  const Logits<S> logits = logits_of<S>(arguments);
  if constexpr (!std::is_same_v<S, double>) {  // which is for tests
    if (plan.blocks > 0) {
      if (const cudaError_t error = launch_in_packs(logits, call, plan, stream)) return error;
    }
  }
  return plan.left > 0 ? launch_apart(logits, call, plan, stream) : cudaSuccess;
}

// The functions of sigmoid_loss.h for one dtype of logits, each compiled in a file of its own.
#define IMBALANCE_CUDA_SIGMOID_DTYPE(S)                              \
  template std::int64_t sigmoid_sums_of<S>(const SigmoidArguments&); \
  template cudaError_t sigmoid_loss_of<S>(const SigmoidLossArguments&, cudaStream_t);

}  // namespace imbalance::cuda
