// softmax_loss and target_and_rest on CPU.
//
// A row is read from memory once, in blocks that fit the L1 cache: each block is mapped to effective logits, its
// maximum and the sum of its exponentials join the row's, and the exponentials are kept (in the gradient's own row
// where that is possible, else in a scratch row that fits the L2 cache), so that the gradient costs one multiplication
// per element. Rows are taken in tiles, whose row programs run side by side in the lanes of a vector. Nothing of the
// logits' size but the gradient is ever allocated. The target is taken out of its block before the block is summed,
// never subtracted afterwards.
//
// One source for AVX-512, AVX2, SSE2 and NEON: softmax_loss_<instruction set>.cpp includes it. A row's bits depend on
// its own values, its width and the instruction set alone.
#pragma once

#include <type_traits>

#include "class_map.h"
#include "row_programs.h"
#include "softmax_loss.h"
#include "softmax_loss_planes.h"

namespace imbalance::cpu {
namespace {

constexpr int64_t kBlock = 4096;           // elements; a block of floats takes 16 KB of L1
constexpr int64_t kAhead = 2048;           // elements by which short rows are fetched ahead, at least
constexpr int64_t kTileRows = 64;          // at most
constexpr int64_t kTileBytes = 128 << 10;  // of a tile's exponentials

constexpr int64_t blocks_of(int64_t classes) { return (classes + kBlock - 1) / kBlock; }

constexpr int64_t tile_rows(int64_t classes, std::size_t bytes_per_number) {
  const int64_t fit = kTileBytes / (pad(classes) * static_cast<int64_t>(bytes_per_number) + 1);
  return fit < 1 ? 1 : fit > kTileRows ? kTileRows : fit;
}

// Scratch memory of one call, in numbers: three blocks, the shift of every block of a tile's rows, and their
// exponentials.
template <class T>
struct Scratch {
  T* effective;     // (kBlock) logits
  T* weights;       // (kBlock) u
  T* slopes;        // (kBlock) of the logit map
  T* shifts;        // (tile rows, blocks)
  T* exponentials;  // (tile rows, padded classes)

  static int64_t count(int64_t classes) {
    return 3 * pad(kBlock) + pad(tile_rows(classes, sizeof(T)) * blocks_of(classes)) +
           tile_rows(classes, sizeof(T)) * pad(classes);
  }
  IMBALANCE_INLINE Scratch(void* memory, int64_t classes)
      : effective(static_cast<T*>(memory)),
        weights(effective + pad(kBlock)),
        slopes(weights + pad(kBlock)),
        shifts(slopes + pad(kBlock)),
        exponentials(shifts + pad(tile_rows(classes, sizeof(T)) * blocks_of(classes))) {}
};

// A row after its sweep. Shift and sum are over the rest.
template <class T>
struct SweptRow {
  T target;        // z_t - shift
  T target_slope;  // dz_t / dx_t
  T shift;         // max_{j != t} z_j, 0 where there is none
  T sum;           // sum_{j != t} exp(z_j - shift)
  T weighted_logits;
  T weight_sum;
  T target_weight;  // u_t
};

// The coefficients of a row's gradient (softmax_row.h); rest multiplies exponentials.
template <class T>
struct RowGradient {
  T target;
  T rest;
  T weights;
};

// The rows of one call: typed views of the arguments, and the loops over blocks.
template <class S, int Bytes, bool OneBlock>
class Rows : public ClassMap<S, Bytes> {
 public:
  using Map = ClassMap<S, Bytes>;
  using Map::arguments;
  using Map::bends;
  using Map::class_weight;
  using Map::classes;
  using Map::has_target;
  using Map::has_weights;
  using typename Map::L;
  using typename Map::M;
  using typename Map::T;

  explicit IMBALANCE_INLINE Rows(const SplitArguments& a) : Map(a) {}

  IMBALANCE_INLINE bool ignored(int64_t row) const {
    return has_target() && arguments.target[row] == arguments.ignore_index;
  }
  IMBALANCE_INLINE const S* logits(int64_t row) const {
    return static_cast<const S*>(arguments.logits) + row * arguments.row_stride;
  }
  // Sweeps a row. Its exponentials, each relative to its block's shift, go to `exponentials` (null: nowhere), which has
  // room for whole packs unless it is `exact`; `shifts` gets one number per block. Where there are several, the highest
  // raw logit goes to `highest_logit` (null: nobody asks).
  IMBALANCE_INLINE SweptRow<T> sweep(int64_t row, T* exponentials, bool exact, T* shifts, T* highest_logit,
                                     const Scratch<T>& scratch) const {
    const T infinity = std::numeric_limits<T>::infinity();
    const int64_t target = has_target() ? arguments.target[row] : -1;
    SweptRow<T> swept{-infinity, 0, 0, 0, 0, 0, 0};
    T target_logit = -infinity;
    if (has_target()) map_target(row, target, &target_logit, &swept);
    T highest = -infinity;
    for (int64_t start = 0, block = 0; start < classes; start += kBlock, ++block) {
      const int64_t n = classes - start < kBlock ? classes - start : kBlock;
      T* z = exponentials && classes <= kBlock && !exact ? exponentials : scratch.effective;
      const int64_t excluded = target >= start && target < start + n ? target - start : -1;
      T block_highest = map_block(row, start, n, excluded, z);
      if (!OneBlock && highest_logit) {  // while the block lies in the L1 cache, and before it may be overwritten
        const T of_block = highest_logit_of(row, start, n);
        *highest_logit = of_block > *highest_logit ? of_block : *highest_logit;
      }
      if (!OneBlock && excluded >= 0) {
        const bool target_is_highest = !(z[excluded] < block_highest);
        z[excluded] = -infinity;
        if (target_is_highest) block_highest = maximum_of_block(z, n);
      }
      const T before = highest;
      highest = block_highest > highest ? block_highest : highest;
      if (before < highest && swept.sum > 0) swept.sum *= std::exp(before - highest);
      const T shift = highest == -infinity ? T(0) : highest;
      if (has_weights()) {
        swept.weighted_logits += (swept.shift - shift) * swept.weight_sum;
        weigh_block(row, start, n, scratch.weights);
        if (excluded >= 0) scratch.weights[excluded] = 0;
        add_weighted(z, scratch.weights, shift, n, &swept);
      }
      swept.shift = shift;
      const S* const next = logits(row) + start + (n < kAhead ? kAhead : n);
      swept.sum += exponentiate(z, shift, n, exponentials ? exponentials + start : z, exact && exponentials, next);
      if (shifts) shifts[block] = highest;
    }
    if (has_target()) {
      swept.target = target_logit - swept.shift;
      if (has_weights() && target_logit != -infinity) {
        swept.target_weight = class_weight(row);
        swept.weight_sum += swept.target_weight;
        swept.weighted_logits += swept.target_weight * swept.target;
      }
    }
    return swept;
  }

  // The highest raw logit of a block.
  IMBALANCE_INLINE T highest_logit_of(int64_t row, int64_t start, int64_t n) const {
    const S* const x = logits(row) + start;
    return outline<false>([=]() IMBALANCE_LAMBDA {
      Highest highest;
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
        const L raw = load_pack<L>(whole, x + i, m, -std::numeric_limits<T>::infinity());
        highest.of[a] = maximum(highest.of[a], raw);
      });
      return highest.value();
    });
  }

  // Writes a row's gradient from its exponentials. With one shift per block, `shifts` rescales them; null: they are
  // relative to the row's shift.
  IMBALANCE_INLINE void spread(int64_t row, const SweptRow<T>& swept, const RowGradient<T>& gradient,
                               const T* exponentials, const T* shifts, const Scratch<T>& scratch, S* d_logits) const {
    for (int64_t start = 0, block = 0; start < classes; start += kBlock, ++block) {
      const int64_t n = classes - start < kBlock ? classes - start : kBlock;
      RowGradient<T> of_block = gradient;
      if (shifts) of_block.rest *= std::exp(shifts[block] - swept.shift);
      if (has_weights()) weigh_block(row, start, n, scratch.weights);
      spread_block(row, start, n, exponentials + start, of_block, scratch, d_logits + start);
    }
    store_target(row, swept, gradient, d_logits);
  }

  // The backward of target_and_rest: the row again, relative to the shift that the forward found.
  IMBALANCE_INLINE void sweep_and_spread(int64_t row, T shift, const RowGradient<T>& gradient,
                                         const Scratch<T>& scratch, S* d_logits) const {
    SweptRow<T> swept{};
    T target_logit = 0;
    if (has_target()) {
      map_target(row, arguments.target[row], &target_logit, &swept);
      const bool masked = target_logit == -std::numeric_limits<T>::infinity();
      if (has_weights() && !masked) swept.target_weight = class_weight(row);
    }
    T* z = scratch.effective;
    for (int64_t start = 0; start < classes; start += kBlock) {
      const int64_t n = classes - start < kBlock ? classes - start : kBlock;
      map_block(row, start, n, -1, z);
      if (has_weights()) weigh_block(row, start, n, scratch.weights);
      exponentiate(z, shift, n, z, false, logits(row) + start + n);
      spread_block(row, start, n, z, gradient, scratch, d_logits + start);
    }
    store_target(row, swept, gradient, d_logits);
  }

 private:
  using Map::bias_;
  using Map::class_weight_;
  using Map::factor_;
  using Map::scale_;
  using Map::target_map_;

  IMBALANCE_INLINE void store_target(int64_t row, const SweptRow<T>& swept, const RowGradient<T>& gradient,
                                     S* d_logits) const {
    if (!has_target()) return;
    const T d_target = (gradient.target - gradient.weights * swept.target_weight) * swept.target_slope;
    store_number(d_logits + arguments.target[row], d_target);
  }

  IMBALANCE_INLINE void map_target(int64_t row, int64_t target, T* target_logit, SweptRow<T>* swept) const {
    const TargetLogit<T> mapped = this->target_logit(number_of(logits(row) + target), target);
    *target_logit = mapped.value;
    swept->target_slope = mapped.slope;
  }

  // Effective logits of a block, all classes as the rest, padded with -inf to whole packs; returns their maximum. With
  // rows of one block the excluded class (-1: none) is -inf as well, taken out in registers: a store into z that the
  // loads of the next loop overlap would hold up the whole pipeline, row after row. With many blocks the caller stores
  // it, once a row.
  IMBALANCE_INLINE T map_block(int64_t row, int64_t start, int64_t n, int64_t excluded, T* z) const {
    const S* x = logits(row) + start;
    if (bends()) {
      bend_block(x, n, z);
      return map_affine(z, start, n, excluded, z);
    }
    if (!factor_ && !bias_ && scale_ == 1) return copy_block(x, n, excluded, z);
    return map_affine(x, start, n, excluded, z);
  }

  static IMBALANCE_INLINE L without(L z, int64_t i, int64_t excluded) {
    if constexpr (OneBlock) {
      using Integer = typename L::Integer;
      const auto is_excluded = L::iota() == static_cast<Integer>(excluded - i) - typename L::Mask{};
      return M::select(is_excluded, -M::infinity(), z);
    } else {
      return z;
    }
  }

  static IMBALANCE_INLINE T copy_block(const S* x, int64_t n, int64_t excluded, T* z) {
    return outline<OneBlock>([=]() IMBALANCE_LAMBDA {
      Highest highest;
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
        const L effective = without(load_pack<L>(whole, x + i, m, -std::numeric_limits<T>::infinity()), i, excluded);
        highest.of[a] = maximum(highest.of[a], effective);
        effective.store(z + i);
      });
      return highest.value();
    });
  }

  // z = scale * factor * x + bias, but -inf where x is
  template <class Source>
  IMBALANCE_INLINE T map_affine(const Source* x, int64_t start, int64_t n, int64_t excluded, T* z) const {
    return outline<OneBlock>([=, this]() IMBALANCE_LAMBDA {
      const T infinity = std::numeric_limits<T>::infinity();
      Highest highest;
      with_constant(factor_, [&](auto has_factor) IMBALANCE_LAMBDA {
        with_constant(bias_, [&](auto has_bias) IMBALANCE_LAMBDA {
          for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
            const L raw = load_pack<L>(whole, x + i, m, -infinity);
            L effective = raw * L(scale_);
            if constexpr (has_factor) effective = effective * load_pack<L>(whole, this->factor_ + start + i, m, T(1));
            if constexpr (has_bias) effective = effective + load_pack<L>(whole, this->bias_ + start + i, m, T(0));
            effective = without(M::select(M::equal(raw, L(-infinity)), raw, effective), i, excluded);
            highest.of[a] = maximum(highest.of[a], effective);
            effective.store(z + i);
          });
        });
      });
      return highest.value();
    });
  }

  struct Highest {
    L of[4];
    IMBALANCE_INLINE Highest() : of{-M::infinity(), -M::infinity(), -M::infinity(), -M::infinity()} {}
    IMBALANCE_INLINE T value() const { return maximum_of(maximum(maximum(of[0], of[1]), maximum(of[2], of[3]))); }
  };

  struct Sum {
    L of[4];
    IMBALANCE_INLINE Sum() : of{T(0), T(0), T(0), T(0)} {}
    IMBALANCE_INLINE T value() const { return sum_of((of[0] + of[1]) + (of[2] + of[3])); }
  };

  static IMBALANCE_INLINE T maximum_of_block(const T* z, int64_t n) {
    return outline<OneBlock>([=]() IMBALANCE_LAMBDA {
      Highest highest;
      for_packs<L>(pad_to_packs(n), [&](auto, int64_t i, int64_t, int a)
                                        IMBALANCE_LAMBDA { highest.of[a] = maximum(highest.of[a], L::load(z + i)); });
      return highest.value();
    });
  }

  static IMBALANCE_INLINE int64_t pad_to_packs(int64_t n) { return (n + L::count - 1) / L::count * L::count; }

  // exp(z - shift) to `out`; returns their sum. z is padded; out too, unless it is `exact`. Meanwhile the logits of the
  // next block are fetched: this loop computes and waits for nothing, the next one does nothing but wait for memory.
  static IMBALANCE_INLINE T exponentiate(const T* z, T shift, int64_t n, T* out, bool exact, const S* next) {
    return outline<OneBlock>([=]() IMBALANCE_LAMBDA {
      Sum sum;
      for_packs<L>(exact ? n : pad_to_packs(n), [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
        __builtin_prefetch(next + i);
        const L exponential = M::exp_nonpositive(L::load(z + i) - L(shift));
        sum.of[a] = sum.of[a] + exponential;
        store_pack(whole, out + i, m, exponential);
      });
      return sum.value();
    });
  }

  // The bend of raw logits before scale.
  IMBALANCE_INLINE void bend_block(const S* x, int64_t n, T* bent) const {
    outline<OneBlock>([=, this]() IMBALANCE_LAMBDA {
      with_constant(target_map_.kind == MarginKind::circle, [&](auto circle) IMBALANCE_LAMBDA {
        for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
          store_pack(whole, bent + i, m, this->bend(circle, load_pack<L>(whole, x + i, m, T(0))));
        });
      });
    });
  }

  // The slope of the bend times the class's factor.
  IMBALANCE_INLINE void slope_block(const S* x, int64_t start, int64_t n, T* slopes) const {
    outline<OneBlock>([=, this]() IMBALANCE_LAMBDA {
      with_constant(target_map_.kind == MarginKind::circle, [&](auto circle) IMBALANCE_LAMBDA {
        for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
          L slope = this->slope_of_bend(circle, load_pack<L>(whole, x + i, m, T(0)));
          if (factor_) slope = slope * load_pack<L>(whole, factor_ + start + i, m, T(0));
          store_pack(whole, slopes + i, m, slope);
        });
      });
    });
  }

  // Where the rest takes no part: a raw logit or a bias of -inf.
  template <class Whole>
  IMBALANCE_INLINE auto masked(Whole whole, int64_t row, int64_t at, int64_t m) const {
    const L infinity = M::infinity();
    auto mask = M::equal(load_pack<L>(whole, logits(row) + at, m, T(0)), -infinity);
    if (bias_) mask |= M::equal(load_pack<L>(whole, bias_ + at, m, T(0)), -infinity);
    return mask;
  }

  // u of a block, padded with 0: class weights over unmasked classes, or smoothed weighted class probabilities.
  IMBALANCE_INLINE void weigh_block(int64_t row, int64_t start, int64_t n, T* weights) const {
    outline<OneBlock>([=, this]() IMBALANCE_LAMBDA {
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
        const int64_t at = start + i;
        const L inside = load_pack<L>(whole, weights_of_one(), m, T(0));
        const auto mask = masked(whole, row, at, m);
        L u = inside;
        if (class_weight_) u = load_pack<L>(whole, class_weight_ + at, m, T(0));
        if (has_target()) {
          u = M::select(mask, L(T(0)), u);
        } else {
          u = this->weight_of(this->load_probabilities(whole, row * classes + at, m), mask, u);
        }
        u.store(weights + i);
      });
    });
  }

  static IMBALANCE_INLINE const T* weights_of_one() {
    alignas(64) static constexpr T ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    return ones;
  }

  // Adds sum u (z - shift), where a weight of 0 takes no part, and sum u.
  static IMBALANCE_INLINE void add_weighted(const T* z, const T* weights, T shift, int64_t n, SweptRow<T>* swept) {
    outline<OneBlock>([=]() IMBALANCE_LAMBDA {
      Sum weighted_logits, weight_sum;
      for_packs<L>(pad_to_packs(n), [&](auto, int64_t i, int64_t, int a) IMBALANCE_LAMBDA {
        const L u = L::load(weights + i);
        const L relative = L::load(z + i) - L(shift);
        weighted_logits.of[a] = weighted_logits.of[a] + M::select(M::equal(u, L(T(0))), L(T(0)), u * relative);
        weight_sum.of[a] = weight_sum.of[a] + u;
      });
      swept->weighted_logits += weighted_logits.value();
      swept->weight_sum += weight_sum.value();
    });
  }

  // (rest * exponential - weights * u) * dz/dx of a block.
  IMBALANCE_INLINE void spread_block(int64_t row, int64_t start, int64_t n, const T* exponentials,
                                     const RowGradient<T>& gradient, const Scratch<T>& scratch, S* d_logits) const {
    const T* slopes = factor_ ? factor_ + start : nullptr;
    if (bends()) {
      slope_block(logits(row) + start, start, n, scratch.slopes);
      slopes = scratch.slopes;
    }
    outline<OneBlock>([=, this]() IMBALANCE_LAMBDA {
      const L rest(gradient.rest * scale_), weight(gradient.weights * scale_);
      with_constant(has_weights(), [&](auto weighted) IMBALANCE_LAMBDA {
        with_constant(slopes, [&](auto sloped) IMBALANCE_LAMBDA {
          for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
            L d = load_pack<L>(whole, exponentials + i, m, T(0)) * rest;
            if constexpr (weighted) d = d - L::load(scratch.weights + i) * weight;
            if constexpr (sloped) d = d * load_pack<L>(whole, slopes + i, m, T(0));
            store_pack(whole, d_logits + i, m, d);
          });
        });
      });
    });
  }
};

template <class S>
void clear(S* row, int64_t n) {
  std::memset(row, 0, static_cast<std::size_t>(n) * sizeof(S));
}

template <class S, int Bytes, bool OneBlock>
void loss_rows_of(const LossArguments& arguments, int64_t first_row, int64_t last_row, void* memory) {
  using T = typename AccumulateOf<S>::type;
  const Rows<S, Bytes, OneBlock> rows(arguments.split);
  const Scratch<T> scratch(memory, rows.classes);
  const int64_t classes = rows.classes, blocks = blocks_of(classes), tile_size = tile_rows(classes, sizeof(T));
  const bool with_gradient = arguments.d_logits != nullptr;
  // A row of many blocks leaves its exponentials in the gradient's row, unless the spread needs the logits that may be
  // there.
  const bool in_gradient = std::is_same_v<S, T> && blocks > 1 && !rows.bends() && !rows.has_weights();
  const T* sample_weight = static_cast<const T*>(arguments.sample_weight);
  const T* class_parameter = static_cast<const T*>(arguments.class_parameter);
  const T* upstream = static_cast<const T*>(arguments.upstream);
  const RowOptions<T> options = row_options_of<T>(arguments);
  Tile<T, kTileRows> tile;
  std::memset(&tile, 0, sizeof(tile));
  SweptRow<T> swept[kTileRows];
  // Which targets' raw logits are the highest: of a map that changes nothing the sweep's maxima say so.
  const bool compares = arguments.correct != nullptr, scans = compares && !rows.maps_nothing();
  bool is_highest[kTileRows] = {};

  for (int64_t tile_start = first_row; tile_start < last_row; tile_start += tile_size) {
    const int64_t tile_end = tile_start + tile_size < last_row ? tile_start + tile_size : last_row;
    const auto gradient_row = [&](int64_t row) IMBALANCE_LAMBDA {
      return static_cast<S*>(arguments.d_logits) + row * arguments.gradient_stride;
    };
    const auto exponentials_of = [&](int64_t row) IMBALANCE_LAMBDA {
      if constexpr (std::is_same_v<S, T>) {
        if (in_gradient) return gradient_row(row);
      }
      return scratch.exponentials + (row - tile_start) * pad(classes);
    };

    for (int64_t row = tile_start; row < tile_end; ++row) {
      if (rows.ignored(row)) continue;
      const int64_t i = row - tile_start;
      T* exponentials = with_gradient ? exponentials_of(row) : nullptr;
      T highest_logit = -std::numeric_limits<T>::infinity(), target_logit = 0;
      if (compares) target_logit = number_of(rows.logits(row) + arguments.split.target[row]);
      swept[i] = rows.sweep(row, exponentials, in_gradient, scratch.shifts + i * blocks,
                            scans && !OneBlock ? &highest_logit : nullptr, scratch);
      if (compares) {
        if (scans && OneBlock) highest_logit = rows.highest_logit_of(row, 0, classes);
        if (!scans && swept[i].sum != 0) highest_logit = swept[i].shift;
        is_highest[i] = !(highest_logit > target_logit);
      }
      tile.target[i] = swept[i].target;
      tile.sum[i] = swept[i].sum;
      tile.shift[i] = swept[i].shift;
      tile.weighted_logits[i] = swept[i].weighted_logits;
      tile.weight_sum[i] = swept[i].weight_sum;
      tile.class_weight[i] = rows.class_weight(row);
      tile.sample_weight[i] = sample_weight ? sample_weight[row] : T(1);
      tile.parameter[i] = class_parameter ? class_parameter[arguments.split.target[row]]
                                          : static_cast<T>(arguments.objective_parameters[0]);
    }

    run_row_programs<Bytes>(tile, tile_end - tile_start, options);
    if (reports(arguments)) {
      const T* const log_probs = log_probs_of<Bytes>(tile, tile_end - tile_start);
      for (int64_t row = tile_start; row < tile_end; ++row) {
        const int64_t i = row - tile_start;
        store_report(arguments, row, rows.ignored(row), log_probs[i], is_highest[i]);
      }
    }

    for (int64_t row = tile_start; row < tile_end; ++row) {
      const int64_t i = row - tile_start;
      const bool ignored = rows.ignored(row);
      static_cast<T*>(arguments.losses)[row] = ignored ? T(0) : tile.loss[i];
      if (!with_gradient) continue;
      if (ignored) {
        clear(gradient_row(row), classes);
        continue;
      }
      const T factor = upstream ? upstream[row] : T(1);
      const RowGradient<T> gradient{factor * tile.d_target[i], factor * tile.d_rest[i], factor * tile.d_weights[i]};
      rows.spread(row, swept[i], gradient, exponentials_of(row), blocks > 1 ? scratch.shifts + i * blocks : nullptr,
                  scratch, gradient_row(row));
    }
  }
}

template <class S, int Bytes>
void loss_rows(const LossArguments& arguments, int64_t first_row, int64_t last_row, void* memory) {
  if (arguments.split.pixels > 0) {
    loss_planes<S, Bytes>(arguments, first_row, last_row, memory);
  } else if (blocks_of(arguments.split.classes) <= 1) {
    loss_rows_of<S, Bytes, true>(arguments, first_row, last_row, memory);
  } else {
    loss_rows_of<S, Bytes, false>(arguments, first_row, last_row, memory);
  }
}

template <class S, int Bytes>
void split_rows(const SplitArguments& arguments, const SplitVectors& out, int64_t first_row, int64_t last_row,
                void* memory) {
  using T = typename AccumulateOf<S>::type;
  const Rows<S, Bytes, false> rows(arguments);
  const Scratch<T> scratch(memory, rows.classes);
  for (int64_t row = first_row; row < last_row; ++row) {
    // An ignored row is one class with logit 0: log-odds +inf, log-probability 0.
    SweptRow<T> swept{0, 0, 0, 0, 0, 0, 0};
    if (!rows.ignored(row)) swept = rows.sweep(row, nullptr, false, nullptr, nullptr, scratch);
    static_cast<T*>(out.target)[row] = swept.target;
    static_cast<T*>(out.rest)[row] = std::log(swept.sum);
    static_cast<T*>(out.shift)[row] = swept.shift;
    if (out.weighted_logits) {
      static_cast<T*>(out.weighted_logits)[row] = swept.weighted_logits;
      static_cast<T*>(out.weight_sum)[row] = swept.weight_sum;
    }
  }
}

template <class S, int Bytes>
void split_backward_rows(const SplitBackwardArguments& arguments, int64_t first_row, int64_t last_row, void* memory) {
  using T = typename AccumulateOf<S>::type;
  const Rows<S, Bytes, false> rows(arguments.split);
  const Scratch<T> scratch(memory, rows.classes);
  for (int64_t row = first_row; row < last_row; ++row) {
    S* d_logits = static_cast<S*>(arguments.d_logits) + row * arguments.gradient_stride;
    if (rows.ignored(row)) {
      clear(d_logits, rows.classes);
      continue;
    }
    const T rest = static_cast<const T*>(arguments.rest)[row];
    const bool empty = rest == -std::numeric_limits<T>::infinity();
    const RowGradient<T> gradient{
        static_cast<const T*>(arguments.d_target)[row],
        empty ? T(0) : static_cast<const T*>(arguments.d_rest)[row] * std::exp(-rest),
        arguments.d_weighted ? -static_cast<const T*>(arguments.d_weighted)[row] : T(0),
    };
    rows.sweep_and_spread(row, static_cast<const T*>(arguments.shift)[row], gradient, scratch, d_logits);
  }
}

std::size_t scratch_bytes(const SplitArguments& split) {
  const bool is_double = split.dtype == Dtype::float64;
  if (split.pixels > 0) return static_cast<std::size_t>(planes_scratch_bytes(split, is_double ? 8 : 4));
  const int64_t bytes =
      is_double ? Scratch<double>::count(split.classes) * 8 : Scratch<float>::count(split.classes) * 4;
  return static_cast<std::size_t>(bytes);
}

TargetCounts count_targets(const SplitArguments& split, int64_t first_row, int64_t last_row) {
  const int64_t ignore_index = split.ignore_index;
  TargetCounts counts{0, 0};
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t target = split.target[row];
    const int64_t counted = target != ignore_index, inside = (target >= 0) & (target < split.classes);
    counts.classes += counted & inside;
    counts.outside += counted & (inside ^ 1);
  }
  return counts;
}

// The functions of an instruction set, by Dtype.
template <int Bytes>
constexpr Kernels kernels_of(const char* name) {
  return {
      name,
      scratch_bytes,
      count_targets,
      {loss_rows<float, Bytes>, loss_rows<double, Bytes>, loss_rows<BFloat16, Bytes>, loss_rows<Float16, Bytes>},
      {split_rows<float, Bytes>, split_rows<double, Bytes>, split_rows<BFloat16, Bytes>, split_rows<Float16, Bytes>},
      {split_backward_rows<float, Bytes>, split_backward_rows<double, Bytes>, split_backward_rows<BFloat16, Bytes>,
       split_backward_rows<Float16, Bytes>},
  };
}

}  // namespace
}  // namespace imbalance::cpu
