// The row programs of a tile of rows, side by side in the lanes of a vector.
#pragma once

#include "../softmax_row.h"
#include "packs.h"
#include "softmax_loss.h"

namespace imbalance::cpu {
namespace {

// A tile's rows as columns of a table: what goes through the lanes of the row program.
template <class T, int64_t Rows>
struct alignas(64) Tile {
  T target[Rows], sum[Rows], shift[Rows], weighted_logits[Rows], weight_sum[Rows];
  T class_weight[Rows], sample_weight[Rows], parameter[Rows];
  T loss[Rows], d_target[Rows], d_rest[Rows], d_weights[Rows];
};

// The row programs of n rows of a tile; d_rest becomes the factor of exponentials.
template <int Bytes, class T, int64_t Rows>
IMBALANCE_INLINE void run_row_programs(Tile<T, Rows>& tile, int64_t n, const RowOptions<T>& options) {
  outline<false>([&]() IMBALANCE_LAMBDA {
    using L = Lanes<T, Bytes>;
    using M = Math<L>;
    for (int64_t i = 0; i < n; i += L::count) {
      const L sum = L::load(tile.sum + i);
      const RowSplit<L> split{L::load(tile.target + i),        M::log(sum),
                              L::load(tile.shift + i),         L::load(tile.weighted_logits + i),
                              L::load(tile.weight_sum + i),    L::load(tile.class_weight + i),
                              L::load(tile.sample_weight + i), L::load(tile.parameter + i)};
      const RowResult<L> result = row_program(split, options);
      result.loss.store(tile.loss + i);
      result.target.store(tile.d_target + i);
      M::select(M::equal(sum, L(T(0))), L(T(0)), result.rest / sum).store(tile.d_rest + i);
      result.weights.store(tile.d_weights + i);
    }
  });
}

// The log-probabilities of the targets of n rows of a tile, after the row programs, which do not ask for them. They
// take the place of the targets' logits: more columns would lie otherwise in the cache, also where nobody asks.
template <int Bytes, class T, int64_t Rows>
IMBALANCE_INLINE const T* log_probs_of(Tile<T, Rows>& tile, int64_t n) {
  outline<false>([&]() IMBALANCE_LAMBDA {
    using L = Lanes<T, Bytes>;
    for (int64_t i = 0; i < n; i += L::count) {
      const L rest = Math<L>::log(L::load(tile.sum + i));
      log_probability(L::load(tile.target + i), rest).store(tile.target + i);
    }
  });
  return tile.target;
}

// Whether a loss tells more of its rows than what they cost.
inline bool reports(const LossArguments& arguments) { return arguments.log_probs || arguments.correct; }

// Stores what a row tells. A row whose log-probability is NaN is not correct.
template <class T>
IMBALANCE_INLINE void store_report(const LossArguments& arguments, int64_t row, bool ignored, T log_prob,
                                   bool target_is_highest) {
  if (arguments.log_probs) static_cast<T*>(arguments.log_probs)[row] = ignored ? T(0) : log_prob;
  if (arguments.correct) arguments.correct[row] = !ignored && target_is_highest && log_prob == log_prob;
}

template <class T>
IMBALANCE_INLINE RowOptions<T> row_options_of(const LossArguments& arguments) {
  const SplitArguments& split = arguments.split;
  return {split.target != nullptr,
          arguments.objective,
          static_cast<T>(arguments.objective_parameters[1]),
          static_cast<T>(split.label_smoothing),
          static_cast<T>(split.label_smoothing / static_cast<double>(split.classes)),
          static_cast<T>(arguments.z_loss),
          static_cast<T>(arguments.inverse_divisor)};
}

}  // namespace
}  // namespace imbalance::cpu
