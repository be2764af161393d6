// Labels beside a row's packs, read as they are given, and which rows count.
#pragma once

#include "../label_arguments.h"
#include "vector.cuh"

namespace imbalance::cuda {

// One of labels, lists and dense is there.
template <class S>
struct LabelsOf {
  using T = Accumulate<S>;

  int classes;                 // C
  const std::int64_t* labels;  // (N,) in [0, C], C is the background
  const std::int64_t* lists;   // (N, list_length), padded with ignore_index
  int list_length;
  std::int64_t ignore_index;
  const S* dense;  // the logits' shape, contiguous; these, or one of the next two
  const T* dense_wide;
  const bool* dense_boolean;
  const T* sample_weight;  // (N,) or null
};

template <class S, class Arguments>
LabelsOf<S> labels_of(const Arguments& a) {
  using T = Accumulate<S>;
  LabelsOf<S> labels{};
  labels.classes = static_cast<int>(a.classes);
  labels.labels = a.labels;
  labels.lists = a.lists;
  labels.list_length = static_cast<int>(a.list_length);
  labels.ignore_index = a.ignore_index;
  labels.dense = a.label_type == LabelType::logits ? static_cast<const S*>(a.dense) : nullptr;
  labels.dense_wide = a.label_type == LabelType::accumulate ? static_cast<const T*>(a.dense) : nullptr;
  labels.dense_boolean = a.label_type == LabelType::boolean ? static_cast<const bool*>(a.dense) : nullptr;
  labels.sample_weight = static_cast<const T*>(a.sample_weight);
  return labels;
}

// Bytes of a dense label; 0 where labels are not dense.
template <class S>
std::size_t bytes_of_dense(const LabelsOf<S>& labels) {
  return labels.dense ? sizeof(S) : labels.dense_wide ? sizeof(Accumulate<S>) : labels.dense_boolean ? 1 : 0;
}

// How much a row counts.
template <class T>
struct Counted {
  bool is_read;  // its weight is not 0 and its label not ignored
  bool outside;  // its label is neither a class nor the background, or its list names what is no class: NaN
  int label;     // class, -1 where there is none
  T weight;

  // What is written for a row that is not read.
  __device__ __forceinline__ T value_of_unread() const { return outside ? std::numeric_limits<T>::quiet_NaN() : T(0); }
};

// Whether a row's list names what is no class.
template <class S>
__device__ __forceinline__ bool lists_no_class(const LabelsOf<S>& labels, std::int64_t row) {
  bool outside = false;
#pragma unroll 1
  for (int j = 0; j < labels.list_length; ++j) {
    const std::int64_t listed = labels.lists[row * labels.list_length + j];
    outside |= (listed < 0 || listed >= labels.classes) && listed != labels.ignore_index;
  }
  return outside;
}

template <bool dense, class S>
__device__ __forceinline__ Counted<Accumulate<S>> counted_row(const LabelsOf<S>& labels, std::int64_t row) {
  using T = Accumulate<S>;
  const T weight = labels.sample_weight ? labels.sample_weight[row] : T(1);
  if (weight == T(0)) return {false, false, -1, weight};
  if (dense) return {true, false, -1, weight};
  if (labels.labels == nullptr) {
    const bool outside = lists_no_class(labels, row);
    return {!outside, outside, -1, weight};
  }
  const std::int64_t label = labels.labels[row];
  if (label == labels.ignore_index) return {false, false, -1, weight};
  if (label < 0 || label > labels.classes) return {false, true, -1, weight};
  return {true, false, static_cast<int>(label), weight};
}

// The labels of a pack of a row, as numbers from 0 to 1.
template <bool dense, int width, class S, class T, bool aligned>
__device__ __forceinline__ void load_labels(const LabelsOf<S>& labels, std::int64_t row, int label,
                                            const Columns<aligned>& columns, int pack, T (&y)[width]) {
  if constexpr (dense) {
    const std::int64_t place = row * labels.classes;
    if (labels.dense) {
      load_values(labels.dense + place, columns, pack, T(0), y);
    } else if (labels.dense_wide) {
      load_values(labels.dense_wide + place, columns, pack, T(0), y);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const int column = columns.template of<width>(pack, k);
        y[k] = column < columns.end && labels.dense_boolean[place + column] ? T(1) : T(0);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < width; ++k) y[k] = T(0);
    const int count = labels.lists ? labels.list_length : 1;
    for (int j = 0; j < count; ++j) {
      int column = label;
      if (labels.lists) {
        const std::int64_t listed = labels.lists[row * labels.list_length + j];
        column =
            listed == labels.ignore_index || listed < 0 || listed >= labels.classes ? -1 : static_cast<int>(listed);
      }
      if (!columns.template may_hold<width>(pack, column)) continue;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (columns.template of<width>(pack, k) == column) y[k] = T(1);
      }
    }
  }
}

// Whether dense labels can be loaded as packs are.
template <class S>
bool are_aligned(const LabelsOf<S>& labels) {
  const auto at_packs = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return at_packs(labels.dense) && at_packs(labels.dense_wide);
}

}  // namespace imbalance::cuda
