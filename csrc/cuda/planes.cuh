// softmax_loss of channels-first logits (B, C, P) on CUDA: images of P pixels, whose logits of one class are
// neighbours.
//
// Row b * P + p of rows.cuh is pixel p of image b; its classes are far apart, and those of its neighbours beside them.
// So lanes are pixels: a thread loads the same few neighbouring pixels of one class after the other, and neighbouring
// threads their neighbours. Nothing is permuted, and nothing of the size of the logits but the gradient is allocated.
#pragma once

#include "launches.cuh"
#include "rows.cuh"

namespace imbalance::cuda {

constexpr int kPlaneThreads = 256;  // of a block, at most
constexpr int kPlaneGroups = 16;    // of threads that share a pixel's classes, at most
constexpr int kPlaneBytes = 48;     // of a pixel's logits that a thread holds
constexpr int plane_threads(bool aligned) { return aligned ? 512 : 640; }  // of a multiprocessor, by their registers

// Pixels that a thread takes.
template <class S>
constexpr int plane_width(bool aligned) {
  return aligned ? (sizeof(S) <= 4 ? 4 : 2) : 1;
}

// How a block's threads share its pixels.
struct PlaneGroups {
  int groups;  // that share the classes of the same pixels
  int lanes;   // of a group
  int sweeps;  // that take all classes
};

// Where the numbers of a block's pixels are in its shared memory.
template <class T>
struct PlaneMemory {
  unsigned groups, pixels;

  __device__ __forceinline__ RowSums<T>* sums() const { return dynamic_smem<RowSums<T>>(0, groups * pixels); }
  __device__ __forceinline__ RowGradient<T>* gradients() const {
    return dynamic_smem<RowGradient<T>>(groups * pixels * sizeof(RowSums<T>), pixels);
  }
  __device__ __forceinline__ T* target_logits() const {
    return dynamic_smem<T>(pixels * (groups * sizeof(RowSums<T>) + sizeof(RowGradient<T>)), pixels);
  }
  unsigned bytes() const { return pixels * (groups * sizeof(RowSums<T>) + sizeof(RowGradient<T>) + sizeof(T)); }
};

// Packs of `width` neighbouring pixels that a thread holds in registers: one of every `step`th class.
template <class S, Map map, int packs, int width>
class PlaneTile {
 public:
  using T = Accumulate<S>;
  using Values = T[width];
  using Places = Place[width];

  // Of pixels from `pixel` of an image on; nothing but masks where these are not to be read.
  __device__ __forceinline__ PlaneTile(const Rows<S>& rows, std::int64_t image, std::int64_t pixel, bool is_read,
                                       int step)
      : rows_(rows),
        logits_(rows.logits + image * rows.stride + pixel),
        probabilities_at_(image * rows.classes * rows.pixels + pixel),
        is_read_(is_read),
        step_(step) {}

  __device__ __forceinline__ T logit(int of_class, int k) const {
    return number_of(logits_[of_class * rows_.class_stride + k]);
  }

  // The classes from `first` on.
  template <Reads reads>
  __device__ __forceinline__ void load(int first) {
    first_ = first;
    const S* logits = logits_ + first * rows_.class_stride;
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      packs_[i] = is_read_ && has(i) ? Pack<S, width>::load(logits, reads) : Pack<S, width>::masks();
      logits += step_ * rows_.class_stride;
    }
  }

  // Takes the targets out of the rest, and pixels that do not count out of everything.
  __device__ __forceinline__ void exclude(const Places& places) {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (!places[k].is_read) {
#pragma unroll
        for (int i = 0; i < packs; ++i) packs_[i].set(k, mask_number<S>());
      }
    }
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (!has(i)) break;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (class_of(i) == places[k].target) packs_[i].set(k, mask_number<S>());
      }
    }
  }

  // Adds what the packs hold to the sums of the pixels.
  __device__ __forceinline__ void add_to(RowSums<T> (&sums)[width]) {
    raise(sums);
    forget_values();
    Exponentials<T> exponentials[width];
    Values totals;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      exponentials[k] = Exponentials<T>(shift_of(sums[k].highest));
      totals[k] = T(0);
    }
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (!has(i)) break;
      Values x, z;
      packs_[i].to_values(x);
      const ClassNumbers of_class = class_numbers(i);
      map_pack(of_class, x, z);
#pragma unroll
      for (int k = 0; k < width; ++k) totals[k] += exponentials[k](z[k]);
      if constexpr (map == Map::general) {
        if (!rows_.spreads) continue;
        Values u;
        weigh_pack(i, of_class, x, u);
#pragma unroll
        for (int k = 0; k < width; ++k) sums[k].add_weight(u[k], z[k] - shift_of(sums[k].highest));
      }
    }
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k].total += totals[k] * exponentials[k].correction;
  }

  // Writes the gradient of the packs, where `gradients` are the pixels' and d_pixels is that of their first class.
  __device__ __forceinline__ void spread(const RowGradient<T>* gradients, const Places& places, S* d_pixels,
                                         std::int64_t class_stride) {
    forget_values();
    d_pixels += first_ * class_stride;
    Exponentials<T> exponentials[width];
    Values target, rest, weights;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const RowGradient<T> gradient = gradients[k];
      exponentials[k] = Exponentials<T>(gradient.shift);
      target[k] = gradient.target;
      rest[k] = gradient.rest * exponentials[k].correction * (map == Map::affine ? rows_.scale : T(1));
      weights[k] = gradient.weights;
    }
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (!has(i)) break;
      Values x, z, d;
      packs_[i].to_values(x);
      const ClassNumbers of_class = class_numbers(i);
      map_pack(of_class, x, z);
#pragma unroll
      for (int k = 0; k < width; ++k) d[k] = rest[k] * exponentials[k](z[k]);
      if constexpr (map == Map::general) {
        if (rows_.spreads) {
          Values u;
          weigh_pack(i, of_class, x, u);
#pragma unroll
          for (int k = 0; k < width; ++k) d[k] -= weights[k] * u[k];
        }
#pragma unroll
        for (int k = 0; k < width; ++k) d[k] *= logit_slope(rows_, x[k], of_class.factor);
      }
#pragma unroll
      for (int k = 0; k < width; ++k) d[k] = class_of(i) == places[k].target ? target[k] : d[k];
      Pack<S, width>::of_values(d).store(d_pixels);
      d_pixels += step_ * class_stride;
    }
  }

 private:
  const Rows<S>& rows_;
  const S* const logits_;
  const std::int64_t probabilities_at_;
  const bool is_read_;
  const int step_;
  int first_ = 0;
  Pack<S, width> packs_[packs];

  struct ClassNumbers {
    T factor, bias, class_weight;
  };

  __device__ __forceinline__ int class_of(int i) const { return first_ + i * step_; }
  __device__ __forceinline__ bool has(int i) const { return class_of(i) < rows_.classes; }

  // Before each pass over the packs.
  __device__ __forceinline__ void forget_values() {
    forget(first_);
#pragma unroll
    for (int i = 0; i < packs; ++i) packs_[i].forget_words();
  }

  // Makes the sums relative to maxima that are no lower than those of the packs.
  __device__ __forceinline__ void raise(RowSums<T> (&sums)[width]) {
    forget_values();
    Values highest;
    if constexpr (map == Map::plain) {  // two halves at a time
      Pack<S, width> largest = packs_[0];
#pragma unroll
      for (int i = 1; i < packs; ++i) {
        if (!has(i)) break;
        largest = largest.or_larger(packs_[i]);
      }
      largest.to_values(highest);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) highest[k] = -infinity<T>();
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        if (!has(i)) break;
        Values x, z;
        packs_[i].to_values(x);
        map_pack(class_numbers(i), x, z);
#pragma unroll
        for (int k = 0; k < width; ++k) highest[k] = maximum(highest[k], z[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k] = sums[k].raised(maximum(sums[k].highest, highest[k]));
  }

  // As far as the map has them.
  __device__ __forceinline__ ClassNumbers class_numbers(int i) const {
    const auto load_or = [&](const T* vector, T otherwise) {
      return vector != nullptr ? load_constant(vector + class_of(i)) : otherwise;
    };
    ClassNumbers numbers{T(1), T(0), T(1)};
    if constexpr (map != Map::plain) numbers.bias = load_or(rows_.bias, T(0));
    if constexpr (map == Map::general) {
      numbers.factor = load_or(rows_.factor, T(1));
      if (rows_.spreads) numbers.class_weight = load_or(rows_.class_weight, T(1));
    }
    return numbers;
  }

  __device__ __forceinline__ void map_pack(const ClassNumbers& of_class, const Values& x, Values& z) const {
#pragma unroll
    for (int k = 0; k < width; ++k) z[k] = effective_logit<map>(rows_, x[k], of_class.factor, of_class.bias);
  }

  __device__ __forceinline__ void weigh_pack(int i, const ClassNumbers& of_class, const Values& x, Values& u) const {
    Values probability{};
    if (is_read_ && rows_.target == nullptr) {
      const std::int64_t at = probabilities_at_ + class_of(i) * rows_.pixels;
      if (rows_.probabilities) {
        Pack<S, width>::load(rows_.probabilities + at, Reads::again).to_values(probability);
      } else {
        Pack<T, width>::load(rows_.probabilities_wide + at, Reads::again).to_values(probability);
      }
    }
#pragma unroll
    for (int k = 0; k < width; ++k) {
      u[k] = spread_weight(rows_, x[k], of_class.bias, probability[k], of_class.class_weight);
    }
  }
};

// `groups` threads share the classes of a pixel, each every groups-th, so that few classes need few of them; their sums
// meet in shared memory, where one thread ends each pixel. A pixel's bits depend on its own values and on C alone. Of
// more classes than the threads hold all but the last are read twice, the last first, since the cache still holds
// those; then so few tiles run that it does.
template <class S, Map map, bool aligned>
__global__ void __launch_bounds__(plane_threads(aligned), 1)
    rows_in_planes(const __grid_constant__ Rows<S> rows, const __grid_constant__ Results<S> results,
                   const __grid_constant__ PlaneGroups shape) {
  using T = Accumulate<S>;
  constexpr int width = plane_width<S>(aligned), packs = kPlaneBytes / sizeof(S);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % shape.lanes, group = thread / shape.lanes, groups = shape.groups, sweeps = shape.sweeps;
  const int pixels = shape.lanes * width, classes = groups * packs;  // of the block, at a time
  const PlaneMemory<T> memory{static_cast<unsigned>(groups), static_cast<unsigned>(pixels)};
  RowSums<T>* const sums_of_groups = memory.sums();
  RowGradient<T>* const gradients = memory.gradients();
  T* const target_logits = memory.target_logits();
  const bool is_nothing = results.is_nothing();
  const T common = common_factor(results);

  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * pixels;
  std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * pixels;  // of the block's rows
  for (; first < rows.count; first += step) {
    const std::int64_t row = first + lane * width, image = row / rows.pixels, pixel = row - image * rows.pixels;
    const bool exists = row < rows.count;
    std::int64_t labels[width];
    Place places[width];
#pragma unroll
    for (int k = 0; k < width; ++k) labels[k] = label_of(rows, row + k);
    PlaneTile<S, map, packs, width> tile(rows, image, pixel, exists && !is_nothing, groups);
    if (sweeps == 1) {
      tile.template load<Reads::once>(group);
    } else {
      tile.template load<Reads::again>(group);
    }
#pragma unroll
    for (int k = 0; k < width; ++k) {
      places[k] = place_of(rows, row + k, labels[k], is_nothing);
      if (group != 0 || places[k].target < 0) continue;  // in place: it is read before the gradients are known
      target_logits[lane * width + k] = tile.logit(places[k].target, k);
    }

    RowSums<T> sums[width];
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k] = RowSums<T>::nothing();
    for (int i = 0; i < sweeps; ++i) {
      if (i > 0) tile.template load<Reads::again>(i * classes + group);
      tile.exclude(places);
      tile.add_to(sums);
    }
#pragma unroll
    for (int k = 0; k < width; ++k) sums_of_groups[group * pixels + lane * width + k] = sums[k];
    __syncthreads();  // sums of groups, logits of targets

    for (int i = thread; i < pixels && first + i < rows.count; i += threads) {
      const Place place = place_of(rows, first + i, is_nothing);
      if (!place.is_read) {
        finish_unread(results, place);
        const T value = value_of_unread<T>(place);
        gradients[i] = {value, value, value, T(0)};
        continue;
      }
      RowSums<T> joined = RowSums<T>::nothing();
      for (int j = 0; j < groups; ++j) joined.highest = maximum(joined.highest, sums_of_groups[j * pixels + i].highest);
      for (int j = 0; j < groups; ++j) joined = joined.plus(sums_of_groups[j * pixels + i].raised(joined.highest));
      const Target<T> target = target_of(rows, results, place, [&] { return target_logits[i]; });
      gradients[i] = finish(results, place, target, joined, common, true);
    }
    __syncthreads();  // gradients
    if (results.d_logits == nullptr || !exists) continue;
    S* const d_pixels = results.d_logits + image * results.gradient_stride + pixel;
    for (int i = sweeps - 1; i >= 0; --i) {
      if (i < sweeps - 1) {
        tile.template load<Reads::once>(i * classes + group);
        tile.exclude(places);
      }
      tile.spread(&gradients[lane * width], places, d_pixels, results.gradient_class_stride);
    }
  }
}

// Whether pixels come in whole packs, of all that has them.
template <class S>
bool is_aligned_in_planes(const Rows<S>& rows, const Results<S>& results) {
  constexpr int width = plane_width<S>(true);
  const auto at_packs = [](const auto* p) { return reinterpret_cast<std::uintptr_t>(p) % (width * sizeof(*p)) == 0; };
  return rows.pixels % width == 0 && rows.stride % width == 0 && rows.class_stride % width == 0 &&
         results.gradient_stride % width == 0 && results.gradient_class_stride % width == 0 && at_packs(rows.logits) &&
         at_packs(results.d_logits) && at_packs(rows.probabilities) && at_packs(rows.probabilities_wide);
}

}  // namespace imbalance::cuda
