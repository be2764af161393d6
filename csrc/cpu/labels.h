// Labels of a block, staged as numbers beside its logits. Like storage.h it is compiled for each instruction set.
#pragma once

#include "../label_arguments.h"
#include "packs.h"

namespace imbalance::cpu {
namespace {

template <class T>
struct DenseLabels {
  const T* values;
  bool are_soft;  // one of them is neither 0 nor 1
};

// `count` booleans as numbers.
template <class L>
IMBALANCE_INLINE void stage_booleans(const bool* from, int64_t count, typename L::Scalar* to) {
  using T = typename L::Scalar;
  using Bytes = typename VectorOf<std::int8_t, L::count>::type;
  int64_t i = 0;
  for (; i + L::count <= count; i += L::count) {
    Bytes bytes;
    std::memcpy(&bytes, from + i, sizeof(bytes));
    const auto integers = __builtin_convertvector(bytes, typename L::Mask);
    L(__builtin_convertvector(integers, typename L::Vector)).store(to + i);
  }
  for (; i < count; ++i) to[i] = from[i] ? T(1) : T(0);
}

// `count` dense labels from `place` on, as numbers: where they lie, or in `staged`, which has room for whole packs.
template <class S, class L, class Call>
IMBALANCE_INLINE DenseLabels<typename L::Scalar> stage_dense(const Call& call, int64_t place, int64_t count,
                                                             typename L::Scalar* staged) {
  using T = typename L::Scalar;
  if (call.label_type == LabelType::boolean) {
    stage_booleans<L>(static_cast<const bool*>(call.dense) + place, count, staged);
    return {staged, false};
  }
  const T* values = staged;
  if (call.label_type == LabelType::accumulate || std::is_same_v<S, T>) {
    values = static_cast<const T*>(call.dense) + place;
  } else {
    const S* const from = static_cast<const S*>(call.dense) + place;
    for_packs<L>(count, [&](auto whole, int64_t i, int64_t n, int) IMBALANCE_LAMBDA {
      store_pack(whole, staged + i, n, load_pack<L>(whole, from + i, n, T(0)));
    });
  }
  typename L::Mask soft{};
  for_packs<L>(count, [&](auto whole, int64_t i, int64_t n, int) IMBALANCE_LAMBDA {
    const L y = load_pack<L>(whole, values + i, n, T(0));
    soft |= (y.v != L(T(0)).v) & (y.v != L(T(1)).v);
  });
  typename L::Integer any = 0;
  for (int i = 0; i < L::count; ++i) any |= soft[i];
  return {values, any != 0};
}

// body(c) for each class that a row's label or list names, once.
template <class Call, class Body>
IMBALANCE_INLINE void for_listed(const Call& call, int64_t row, Body body) {
  const int64_t* const list = call.labels ? call.labels + row : call.lists + row * call.list_length;
  const int64_t length = call.labels ? 1 : call.list_length;
  for (int64_t k = 0; k < length; ++k) {
    const int64_t c = list[k];
    bool is_new = c != call.ignore_index && c < call.classes;  // the class C is the background
    for (int64_t j = 0; j < k && is_new; ++j) is_new = list[j] != c;
    if (is_new) body(c);
  }
}

// Whether a row has no part, by its label or its weight.
template <class T, class Call>
IMBALANCE_INLINE bool uncounted(const Call& call, int64_t row) {
  return (call.labels && call.labels[row] == call.ignore_index) ||
         (call.sample_weight && static_cast<const T*>(call.sample_weight)[row] == T(0));
}

}  // namespace
}  // namespace imbalance::cpu
