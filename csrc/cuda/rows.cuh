// A row on the device: what its logits mean, its target, the packs of it that a thread holds, and its end.
//
// The kernels of softmax_loss.cuh differ in which threads share a row; everything else of them is here. The target is
// taken out of the rest before anything is summed, never subtracted afterwards. A row that is ignored, or whose target
// is no class, is not read.
#pragma once

#include <type_traits>

#include "../softmax_row.h"
#include "row_reduce.cuh"
#include "softmax_loss.h"

namespace imbalance::cuda {

// How effective logits come from raw ones. Most losses need the first or the second, which cost one instruction a
// number at most.
enum class Map {
  plain,    // z = x
  affine,   // z = scale * x + bias, with a positive scale: a mask stays one
  general,  // every option; weights of classes too, where they are spread over the row
};

// Logits and how to split them: SplitArguments with types.
template <class S>
struct Rows {
  using T = Accumulate<S>;

  std::int64_t count;  // N
  int classes;         // C
  const S* logits;
  std::int64_t stride;         // of rows, or of images
  std::int64_t pixels;         // of an image, channels-first; else 0
  std::int64_t class_stride;   // channels-first
  const std::int64_t* target;  // (N,); null for class probabilities
  const S* probabilities;      // as the logits, contiguous; null, or these
  const T* probabilities_wide;
  std::int64_t ignore_index;
  T scale;
  const T* factor;        // (C,)
  const T* bias;          // (C,)
  const T* class_margin;  // (C,)
  const T* class_weight;  // (C,)
  TargetMap<T> target_map;
  T kept;                 // 1 - label smoothing
  T smoothing_per_class;  // label smoothing / C
  bool spreads;           // weights of classes are spread over the row, by smoothing or as probabilities

  __device__ __forceinline__ bool is_circle() const { return target_map.kind == MarginKind::circle; }
};

// What becomes of the rows; null is not written. Either losses or a split or neither.
template <class S>
struct Results {
  using T = Accumulate<S>;

  RowOptions<T> options;
  T first_parameter;
  const T* class_parameter;  // (C,) first parameters
  const T* sample_weight;    // (N,)
  const T* upstream;         // (N,) or ()
  std::int64_t upstream_step;
  const T* normalizer;  // ()
  const T* divisor;     // ()
  T* losses;            // (N,)
  T* log_probs;         // (N,) of the targets, beside losses
  T* target;            // (N,) the split
  T* rest;
  T* shift;
  T* weighted_logits;
  T* weight_sum;
  S* d_logits;  // as the logits
  std::int64_t gradient_stride;
  std::int64_t gradient_class_stride;

  // Nothing counts, so that nothing is read.
  __device__ __forceinline__ bool is_nothing() const { return normalizer != nullptr && *normalizer == T(0); }
};

// What a row is to be.
struct Place {
  std::int64_t row;
  int target;    // class index, -1 where there is none
  bool is_read;  // not ignored, and its target is a class
  bool outside;  // its target is no class: NaN
};

// The row's target as it is given; where there is none, one that is ignored.
template <class S>
__device__ __forceinline__ std::int64_t label_of(const Rows<S>& rows, std::int64_t row) {
  return rows.target != nullptr && row < rows.count ? rows.target[row] : rows.ignore_index;
}

template <class S>
__device__ __forceinline__ Place place_of(const Rows<S>& rows, std::int64_t row, std::int64_t label, bool is_nothing) {
  if (row >= rows.count || is_nothing) return {row, -1, false, false};
  if (rows.target == nullptr) return {row, -1, true, false};
  const bool is_class = label >= 0 && label < rows.classes, ignored = label == rows.ignore_index;
  return {row, is_class && !ignored ? static_cast<int>(label) : -1, is_class && !ignored, !is_class && !ignored};
}
template <class S>
__device__ __forceinline__ Place place_of(const Rows<S>& rows, std::int64_t row, bool is_nothing) {
  return place_of(rows, row, label_of(rows, row), is_nothing);
}

template <class T>
struct Target {
  T z;             // effective logit, -inf where masked or where there is none
  T slope;         // dz_t / dx_t
  T class_weight;  // w_t
  T weight;        // u_t
  T sample_weight;
  T parameter;  // the objective's first, for this row
};

// The numbers of a row that is read, and those of its target, whose raw logit `load_logit` loads.
template <class S, class LoadLogit>
__device__ __forceinline__ Target<Accumulate<S>> target_of(const Rows<S>& rows, const Results<S>& results,
                                                           const Place& place, const LoadLogit& load_logit) {
  using T = Accumulate<S>;
  Target<T> target{-infinity<T>(), T(0), T(1), T(0), T(1), results.first_parameter};
  if (!place.is_read) return target;
  if (results.sample_weight) target.sample_weight = results.sample_weight[place.row];
  if (place.target < 0) return target;
  if (results.class_parameter) target.parameter = results.class_parameter[place.target];
  const T x = load_logit();
  const bool masked = x == -infinity<T>();
  const T margin = rows.class_margin ? rows.class_margin[place.target] : rows.target_map.parameters[0];
  const TargetLogit<T> mapped = rows.target_map(masked ? T(0) : x, margin);
  const T multiplier = rows.factor ? rows.scale * rows.factor[place.target] : rows.scale;
  const T bias = rows.bias ? rows.bias[place.target] : T(0);
  if (!masked) target.z = multiplier * mapped.value + bias;
  target.slope = multiplier * mapped.slope;
  if (rows.class_weight) target.class_weight = rows.class_weight[place.target];
  if (rows.spreads && target.z != -infinity<T>()) target.weight = target.class_weight;
  return target;
}

template <class S>
__device__ __forceinline__ Target<Accumulate<S>> load_target(const Rows<S>& rows, const Results<S>& results,
                                                             const Place& place) {
  return target_of(rows, results, place,
                   [&] { return number_of(rows.logits[place.row * rows.stride + place.target]); });
}

// The coefficients of a row's gradient, and its shift; rest multiplies exponentials relative to that.
template <class T>
struct RowGradient {
  T target;  // of the raw logit
  T rest;
  T weights;
  T shift;
};

// What divides or multiplies the gradients of all rows.
template <class S>
__device__ __forceinline__ Accumulate<S> common_factor(const Results<S>& results) {
  using T = Accumulate<S>;
  const T upstream = results.upstream && results.upstream_step == 0 ? *results.upstream : T(1);
  const T* const divisor = results.normalizer ? results.normalizer : results.divisor;
  return divisor ? upstream / *divisor : upstream;
}

template <class T>
__device__ __forceinline__ RowSplit<T> split_of(const Target<T>& target, const RowSums<T>& sums) {
  const T shift = shift_of(sums.highest), target_logit = target.z - shift;
  return {target_logit,
          std::log(sums.total),
          shift,
          sums.weighted_logits + (target.weight == T(0) ? T(0) : target.weight * target_logit),
          sums.weight_sum + target.weight,
          target.class_weight,
          target.sample_weight,
          target.parameter};
}

template <class S>
__device__ __forceinline__ void write_split(const Results<S>& results, const Place& place,
                                            const RowSplit<Accumulate<S>>& split) {
  results.target[place.row] = split.target;
  results.rest[place.row] = split.rest;
  results.shift[place.row] = split.shift;
  if (results.weighted_logits) results.weighted_logits[place.row] = split.weighted_logits;
  if (results.weight_sum) results.weight_sum[place.row] = split.weight_sum;
}

// The end of a row that was read: its loss or its split, written if this thread `writes`, and its gradient.
template <class S>
__device__ __forceinline__ RowGradient<Accumulate<S>> finish(const Results<S>& results, const Place& place,
                                                             const Target<Accumulate<S>>& target,
                                                             const RowSums<Accumulate<S>>& sums, Accumulate<S> common,
                                                             bool writes) {
  using T = Accumulate<S>;
  const RowSplit<T> split = split_of(target, sums);
  if (results.target != nullptr) {
    if (writes) write_split(results, place, split);
    return {};
  }
  const RowResult<T> result = row_program(split, results.options);
  if (writes && results.losses) results.losses[place.row] = result.loss;
  if (writes && results.log_probs) results.log_probs[place.row] = log_probability(split.target, split.rest);
  const bool has_own = results.upstream && results.upstream_step != 0;
  const T factor = has_own ? results.upstream[place.row * results.upstream_step] * common : common;
  return {
      factor * (result.target - result.weights * target.weight) * target.slope,
      sums.total == T(0) ? T(0) : factor * (result.rest / sums.total),
      factor * result.weights,
      split.shift,
  };
}

// What is written for a row that is not read: 0, or NaN where its target is no class.
template <class T>
__device__ __forceinline__ T value_of_unread(const Place& place) {
  return place.outside ? std::numeric_limits<T>::quiet_NaN() : T(0);
}

// The end of such a row; its split is that of one class, with logit 0.
template <class S>
__device__ __forceinline__ void finish_unread(const Results<S>& results, const Place& place) {
  using T = Accumulate<S>;
  const T value = value_of_unread<T>(place);
  if (results.losses) results.losses[place.row] = value;
  if (results.log_probs) results.log_probs[place.row] = value;
  if (results.target)
    write_split(results, place, {value, value - infinity<T>(), value, value, value, T(0), T(0), T(0)});
}

// Class vectors (C,), or `Staged` stretches of them.
template <class T, bool staged_>
struct ClassVectors {
  static constexpr bool staged = staged_;
  const T* factor;
  const T* bias;
  const T* class_weight;
};

template <class S>
__device__ __forceinline__ ClassVectors<Accumulate<S>, false> vectors_of(const Rows<S>& rows) {
  return {rows.factor, rows.bias, rows.class_weight};
}

// Which class vectors a map needs beside the rows. An affine one always has a bias: zeros cost less than to ask.
template <class S>
__host__ __device__ __forceinline__ bool stages_bias(const Rows<S>& rows, Map map) {
  return map == Map::affine || rows.bias != nullptr;
}
template <class S>
__host__ __device__ __forceinline__ bool stages_factor(const Rows<S>& rows, Map map) {
  return map == Map::general && rows.factor != nullptr;
}
template <class S>
__host__ __device__ __forceinline__ bool stages_class_weight(const Rows<S>& rows, Map map) {
  return map == Map::general && rows.spreads && rows.class_weight != nullptr;
}

// Copies the stretches that a block needs to its shared memory, where they stay while rows pass. A barrier must follow.
// What lies beyond the classes becomes neutral.
template <bool aligned, class S>
__device__ __forceinline__ ClassVectors<Accumulate<S>, true> stage(const Rows<S>& rows, int first, int stretch,
                                                                   Map map) {
  using T = Accumulate<S>;
  ClassVectors<T, true> staged{nullptr, nullptr, nullptr};
  unsigned offset = 0;
  const auto copy = [&](const T* vector, T beyond) -> const T* {
    T* const copied = dynamic_smem<T>(offset, static_cast<unsigned>(stretch));
    offset += static_cast<unsigned>(stretch) * sizeof(T);
    for (int i = static_cast<int>(threadIdx.x); i < stretch; i += static_cast<int>(blockDim.x)) {
      const int column = first + i;
      copied[Staged<T, aligned, Pack<S>::width>::place(i, stretch)] =
          vector != nullptr && column < rows.classes ? vector[column] : beyond;
    }
    return copied;
  };
  if (stages_bias(rows, map)) staged.bias = copy(rows.bias, T(0));
  if (stages_factor(rows, map)) staged.factor = copy(rows.factor, T(1));
  if (stages_class_weight(rows, map)) staged.class_weight = copy(rows.class_weight, T(0));
  return staged;
}

// The bytes of that.
template <class S>
unsigned staged_bytes(const Rows<S>& rows, int stretch, Map map) {
  const int vectors = stages_bias(rows, map) + stages_factor(rows, map) + stages_class_weight(rows, map);
  return static_cast<unsigned>(vectors) * static_cast<unsigned>(stretch) * sizeof(Accumulate<S>);
}

// What comes before scale and factor: the soft cap, or Circle loss's map of the rest; and its slope.
template <class S, class T>
__device__ __forceinline__ T bend(const Rows<S>& rows, T x) {
  const T margin = rows.target_map.parameters[0], softcap = rows.target_map.softcap;
  if (rows.is_circle()) return maximum(x + margin, T(0)) * (x - margin);
  return softcap > T(0) ? softcap * std::tanh(x / softcap) : x;
}
template <class S, class T>
__device__ __forceinline__ T bend_slope(const Rows<S>& rows, T x) {
  const T margin = rows.target_map.parameters[0], softcap = rows.target_map.softcap;
  if (rows.is_circle()) {
    const bool detached = rows.target_map.parameters[1] != T(0);
    const T push = x + margin;
    return push > T(0) ? (detached ? push : push + (x - margin)) : T(0);
  }
  if (!(softcap > T(0))) return T(1);
  const T tanh = std::tanh(x / softcap);
  return (T(1) - tanh) * (T(1) + tanh);
}

// The effective logit of a class as one of the rest, -inf where masked.
template <Map map, class S, class T>
__device__ __forceinline__ T effective_logit(const Rows<S>& rows, const T& x, const T& factor, const T& bias) {
  if constexpr (map == Map::plain) {
    return x;
  } else if constexpr (map == Map::affine) {
    return rows.scale * x + bias;
  } else {
    return x == -infinity<T>() ? x : rows.scale * factor * bend(rows, x) + bias;
  }
}

// The slope of that.
template <class S, class T>
__device__ __forceinline__ T logit_slope(const Rows<S>& rows, T x, T factor) {
  return bend_slope(rows, x) * rows.scale * factor;
}

// u: a class weight, 0 where masked, or a smoothed weighted class probability.
template <class S, class T>
__device__ __forceinline__ T spread_weight(const Rows<S>& rows, const T& x, const T& bias, const T& probability,
                                           const T& class_weight) {
  const bool masked = x == -infinity<T>() || bias == -infinity<T>();
  T u = masked ? T(0) : T(1);
  if (rows.target == nullptr) u = rows.kept * probability + (masked ? T(0) : rows.smoothing_per_class);
  return u * class_weight;
}

// The packs of a row that a thread holds in registers.
template <class S, Map map, int packs, class Vectors, bool aligned>
class Tile {
 public:
  using T = Accumulate<S>;
  using Values = T[Pack<S>::width];
  static constexpr int width = Pack<S>::width;
  static constexpr int count = packs * width;  // numbers a thread

  __device__ __forceinline__ Tile(const Rows<S>& rows, const Columns<aligned>& columns, const Vectors& vectors)
      : rows_(rows), columns_(columns), vectors_(vectors) {}

  // Nothing but masks of a row that is not to be read.
  __device__ __forceinline__ void load(const Place& place, Reads reads = Reads::once) {
    forget(columns_.lane);
    if (!place.is_read) {
#pragma unroll
      for (int i = 0; i < packs; ++i) packs_[i] = Pack<S>::masks();
      return;
    }
    row_ = place.row;
    const S* const row = rows_.logits + place.row * rows_.stride;
#pragma unroll
    for (int i = 0; i < packs; ++i) packs_[i] = load_pack(row, columns_, i, reads);
  }

  // What another tile of these columns holds.
  __device__ __forceinline__ void take(const Tile& other) {
    row_ = other.row_;
#pragma unroll
    for (int i = 0; i < packs; ++i) packs_[i] = other.packs_[i];
  }

  // Takes the target out of the rest; returns whether it was this thread's.
  __device__ __forceinline__ bool exclude(int target) {
    forget(columns_.lane);
    bool found = false;
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (!columns_.template may_hold<width>(i, target)) continue;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (columns_.template of<width>(i, k) != target) continue;
        packs_[i].set(k, mask_number<S>());
        found = true;
      }
    }
    return found;
  }

  // Before each pass over the packs.
  __device__ __forceinline__ void forget_values() {
    forget(columns_.lane);
#pragma unroll
    for (int i = 0; i < packs; ++i) packs_[i].forget_words();
    forget_memory();
  }

  // The maximum of the rest.
  __device__ __forceinline__ T highest() {
    forget_values();
    T highest = -infinity<T>();
    Values x, z, factor, bias;
    if constexpr (map == Map::plain) {  // two halves at a time
      Pack<S> largest = packs_[0];
#pragma unroll
      for (int i = 1; i < packs; ++i) {
        if (!columns_.template has<width>(i)) break;
        largest = largest.or_larger(packs_[i]);
      }
      largest.to_values(x);
#pragma unroll
      for (int k = 0; k < width; ++k) highest = maximum(highest, x[k]);
    } else {
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        if (!columns_.template has<width>(i)) break;
        packs_[i].to_values(x);
        map_pack(i, x, z, factor, bias);
#pragma unroll
        for (int k = 0; k < width; ++k) highest = maximum(highest, z[k]);
      }
    }
    return highest;
  }

  // The sums of the rest, relative to a maximum.
  __device__ __forceinline__ RowSums<T> sums(T highest) {
    forget_values();
    RowSums<T> sums{highest, T(0), T(0), T(0)};
    const T shift = shift_of(highest);
    const Exponentials<T> exponential(shift);
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (!columns_.template has<width>(i)) break;
      Values x, z, factor, bias;
      packs_[i].to_values(x);
      map_pack(i, x, z, factor, bias);
#pragma unroll
      for (int k = 0; k < width; ++k) sums.total += exponential(z[k]);
      if constexpr (map == Map::general) {
        if (!rows_.spreads) continue;
        Values u;
        weigh_pack(i, x, bias, u);
#pragma unroll
        for (int k = 0; k < width; ++k) sums.add_weight(u[k], z[k] - shift);
      }
    }
    sums.total *= exponential.correction;
    return sums;
  }

  // Writes the gradient of the packs; that of the target is not yet right.
  __device__ __forceinline__ void spread(const RowGradient<T>& gradient, S* d_row) {
    forget_values();
    const Exponentials<T> exponential(gradient.shift);
    // Where slopes differ from number to number the scale is one of their factors.
    const T rest = gradient.rest * exponential.correction * (map == Map::affine ? rows_.scale : T(1));
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (!columns_.template has<width>(i)) break;
      Values x, z, factor, bias, d;
      packs_[i].to_values(x);
      map_pack(i, x, z, factor, bias);
#pragma unroll
      for (int k = 0; k < width; ++k) d[k] = rest * exponential(z[k]);
      if constexpr (map == Map::general) {
        if (rows_.spreads) {
          Values u;
          weigh_pack(i, x, bias, u);
#pragma unroll
          for (int k = 0; k < width; ++k) d[k] -= gradient.weights * u[k];
        }
#pragma unroll
        for (int k = 0; k < width; ++k) d[k] *= logit_slope(rows_, x[k], factor[k]);
      }
      store_pack(d_row, columns_, i, d);
    }
  }

  // Writes one number to all of them.
  __device__ __forceinline__ void fill(T value, S* d_row) {
    forget(columns_.lane);
    Values values;
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] = value;
#pragma unroll
    for (int i = 0; i < packs; ++i) store_pack(d_row, columns_, i, values);
  }

 private:
  const Rows<S>& rows_;
  Columns<aligned> columns_;
  Vectors vectors_;
  std::int64_t row_ = 0;  // the last that was read
  Pack<S> packs_[packs];

  // Effective logits, -inf where masked; factor and bias as far as the map has them.
  __device__ __forceinline__ void map_pack(int i, const Values& x, Values& z, Values& factor, Values& bias) const {
    if constexpr (map != Map::plain) load_or(vectors_.bias, i, T(0), bias);
    if constexpr (map == Map::general) load_or(vectors_.factor, i, T(1), factor);
#pragma unroll
    for (int k = 0; k < width; ++k) z[k] = effective_logit<map>(rows_, x[k], factor[k], bias[k]);
  }

  __device__ __forceinline__ void load_or(const T* vector, int i, T otherwise, Values& values) const {
    if (vector != nullptr || (map == Map::affine && Vectors::staged)) {
      if constexpr (Vectors::staged) {
        Staged<T, aligned, width>::load(vector, columns_, i, columns_.lanes * count, values);
      } else {
        load_values(vector, columns_, i, otherwise, values);
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] = otherwise;
  }

  // u: class weights over unmasked classes, or smoothed weighted class probabilities; 0 beyond the classes.
  __device__ __forceinline__ void weigh_pack(int i, const Values& x, const Values& bias, Values& u) const {
    Values weight, probability;
    if (rows_.target == nullptr) {
      if (rows_.probabilities) {
        load_values(rows_.probabilities + row_ * rows_.classes, columns_, i, T(0), probability);
      } else {
        load_values(rows_.probabilities_wide + row_ * rows_.classes, columns_, i, T(0), probability);
      }
    }
    load_or(vectors_.class_weight, i, T(1), weight);
#pragma unroll
    for (int k = 0; k < width; ++k) u[k] = spread_weight(rows_, x[k], bias[k], probability[k], weight[k]);
  }
};

// The pieces of rows, or of images, that a group of threads works on: one, and then always the one `step` pieces
// further. Divides once, not for every piece.
template <class Index>
struct Piece {
  std::int64_t row;
  Index index;  // in the row
};
template <class Index>
class Pieces {
 public:
  __device__ __forceinline__ Pieces(std::int64_t step, Index of_a_row) : of_a_row_(of_a_row), step_(at(step)) {}

  __device__ __forceinline__ Piece<Index> at(std::int64_t index) const {
    return {index / of_a_row_, static_cast<Index>(index % of_a_row_)};
  }
  __device__ __forceinline__ Piece<Index> after(const Piece<Index>& piece) const {
    const Piece<Index> next{piece.row + step_.row, piece.index + step_.index};
    return next.index < of_a_row_ ? next : Piece<Index>{next.row + 1, next.index - of_a_row_};
  }

 private:
  Index of_a_row_;
  Piece<Index> step_;
};

// A tile beside these class vectors.
template <Map map, int packs, class S, class Vectors, bool aligned>
__device__ __forceinline__ Tile<S, map, packs, Vectors, aligned> tile_of(const Rows<S>& rows,
                                                                         const Columns<aligned>& columns,
                                                                         const Vectors& vectors) {
  return {rows, columns, vectors};
}

}  // namespace imbalance::cuda
