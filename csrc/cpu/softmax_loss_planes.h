// softmax_loss of channels-first logits (B, C, P) on CPU, without a copy that moves the classes.
//
// Lanes are pixels: a pack of pixels is a pack of rows, and nothing is ever reduced across lanes. Pixels are taken in
// tiles. Each class's run of a tile's pixels is read from memory once, as effective logits into scratch that stays in
// the L2 cache; there the exponentials take their place, so that the gradient, written class by class in runs again,
// costs no second one. Where a tile of all classes would not fit, blocks of classes are swept twice. The target is
// taken out before anything is summed, never subtracted afterwards.
//
// A pixel's bits depend on its own values, the number of classes and the instruction set alone.
#pragma once

#include "class_map.h"
#include "planes.h"
#include "row_programs.h"

namespace imbalance::cpu {
namespace {

// What a tile knows of its pixels: the columns of their row programs, and beside them
template <class T>
struct PixelColumns : Tile<T, kMostPixels + kPadding> {
  static constexpr int64_t size = kMostPixels + kPadding;
  alignas(64) T highest[size];  // z_j of the rest so far
  T target_slope[size];         // dz_t / dx_t
  T target_weight[size];        // u_t
  T counts[size];               // 0 where the pixel is ignored, else 1
  T highest_logit[size];        // x_j of all classes so far, where it is asked for and no z_j of the rest
};

// Numbers of a class and a pixel: effective logits, and where they are needed weights and slopes.
constexpr int64_t parts_of(bool has_weights, bool bends) { return 1 + has_weights + bends; }

// The pixels of one call, tile by tile.
template <class S, int Bytes>
class Planes : public ClassMap<S, Bytes> {
 public:
  using Map = ClassMap<S, Bytes>;
  using Map::arguments;
  using Map::bends;
  using Map::classes;
  using Map::has_target;
  using Map::has_weights;
  using Map::maps_nothing;
  using typename Map::L;
  using typename Map::M;
  using typename Map::T;

  IMBALANCE_INLINE Planes(const LossArguments& loss, void* memory)
      : Map(loss.split),
        loss_(loss),
        tile_(classes, parts_of(has_weights(), bends()), sizeof(T)),
        effective_(static_cast<T*>(memory)),
        weights_(effective_ + tile_.classes * tile_.run),
        slopes_(effective_ + (tile_.parts - 1) * tile_.classes * tile_.run),
        options_(row_options_of<T>(loss)) {
    std::memset(static_cast<void*>(&columns_), 0, sizeof(columns_));
    fill(columns_.class_weight, T(1));
    fill(columns_.sample_weight, T(1));
    fill(columns_.parameter, static_cast<T>(loss.objective_parameters[0]));
    fill(columns_.counts, T(1));
  }

  IMBALANCE_INLINE void run(int64_t first_row, int64_t last_row) {
    for (first_ = first_row; first_ < last_row; first_ += tile_.pixels) {
      count_ = last_row - first_ < tile_.pixels ? last_row - first_ : tile_.pixels;
      begin_tile();
      for_blocks([&](int64_t start, int64_t n) IMBALANCE_LAMBDA {
        stage(start, n);
        if (loss_.correct && !maps_nothing()) raise_highest_logits(start, n);
        exclude_targets(start, n);
        join(start, n);
      });
      end_split();
      run_row_programs<Bytes>(columns_, count_, options_);
      store_losses();
      if (reports(loss_)) store_reports();
      if (loss_.d_logits == nullptr) continue;
      begin_spread();
      for_blocks([&](int64_t start, int64_t n) IMBALANCE_LAMBDA {
        if (n < classes) {
          stage(start, n);
          exponentiate(n);
        }
        spread(start, n);
      });
      store_targets();
    }
  }

 private:
  using Map::bias_;
  using Map::class_margin_;
  using Map::class_weight_;
  using Map::factor_;
  using Map::scale_;
  using Map::target_map_;

  const LossArguments& loss_;
  const PlanesTile tile_;
  T* const effective_;  // (block's classes, run) logits, then exponentials
  T* const weights_;    // the same shape: u
  T* const slopes_;     // the same shape: of the bend, times the class's factor
  const RowOptions<T> options_;
  int64_t first_, count_;  // the tile's rows
  bool any_ignored_ = false;
  PixelColumns<T> columns_;

  static IMBALANCE_INLINE void fill(T* column, T x) {
    for (int64_t i = 0; i < PixelColumns<T>::size; ++i) column[i] = x;
  }

  template <class Body>
  IMBALANCE_INLINE void for_blocks(Body body) const {
    cpu::for_blocks(tile_, classes, body);
  }
  template <class Body>
  IMBALANCE_INLINE void for_images(Body body) const {
    cpu::for_images(first_, count_, arguments.pixels, body);
  }

  IMBALANCE_INLINE const S* logits(int64_t image, int64_t c, int64_t pixel) const {
    return static_cast<const S*>(arguments.logits) + image * arguments.row_stride + c * arguments.class_stride + pixel;
  }
  IMBALANCE_INLINE S* d_logits(int64_t image, int64_t c, int64_t pixel) const {
    return static_cast<S*>(loss_.d_logits) + image * loss_.gradient_stride + c * loss_.gradient_class_stride + pixel;
  }
  IMBALANCE_INLINE bool ignored(int64_t i) const { return arguments.target[first_ + i] == arguments.ignore_index; }

  IMBALANCE_INLINE void begin_tile() {
    const T* const sample_weight = static_cast<const T*>(loss_.sample_weight);
    const T* const class_parameter = static_cast<const T*>(loss_.class_parameter);
    if (sample_weight) std::memcpy(columns_.sample_weight, sample_weight + first_, count_ * sizeof(T));
    if (has_target()) {
      const int64_t* const target = arguments.target + first_;
      int64_t ignored_pixels = 0;
      for (int64_t i = 0; i < count_; ++i) ignored_pixels += target[i] == arguments.ignore_index;
      any_ignored_ = ignored_pixels > 0;
      for (int64_t i = 0; any_ignored_ && i < count_; ++i) columns_.counts[i] = ignored(i) ? T(0) : T(1);
      for (int64_t i = 0; i < count_; i += 8) __builtin_prefetch(target + count_ + i);  // of the next tile
      for (int64_t i = 0; (class_weight_ || class_parameter) && i < count_; ++i) {
        const int64_t target = ignored(i) ? 0 : arguments.target[first_ + i];
        if (class_weight_) columns_.class_weight[i] = class_weight_[target];
        if (class_parameter) columns_.parameter[i] = class_parameter[target];
      }
    }
    for (int64_t i = 0; i < count_; i += L::count) {
      (-M::infinity()).store(columns_.highest + i);
      L(T(0)).store(columns_.shift + i);
      L(T(0)).store(columns_.weighted_logits + i);
      L(T(0)).store(columns_.weight_sum + i);
    }
    if (loss_.correct) fill(columns_.highest_logit, -std::numeric_limits<T>::infinity());
  }

  // Reads the tile's logits of a block of n classes: nothing else reads them, but for the targets'.
  IMBALANCE_INLINE void stage(int64_t start, int64_t n) const {
    for_images([&](int64_t i, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
      with_constant(bends(), [&](auto bent) IMBALANCE_LAMBDA {
        with_constant(has_weights(), [&](auto weighted) IMBALANCE_LAMBDA {
          outline<false>([=, this]() IMBALANCE_LAMBDA {
            for (int64_t j = 0; j < n; ++j) stage_run(bent, weighted, start + j, j * tile_.run + i, m, image, pixel);
          });
        });
      });
    });
  }

  // One class's run of n pixels, to scratch from `to` on.
  template <bool bent, bool weighted>
  IMBALANCE_INLINE void stage_run(std::bool_constant<bent>, std::bool_constant<weighted>, int64_t c, int64_t to,
                                  int64_t n, int64_t image, int64_t pixel) const {
    const S* const x = logits(image, c, pixel);
    const T infinity = std::numeric_limits<T>::infinity();
    const T factor = factor_ ? factor_[c] : T(1), bias = bias_ ? bias_[c] : T(0);
    const T class_weight = class_weight_ ? class_weight_[c] : T(1);
    const L multiplier(scale_ * factor);
    const bool circle = target_map_.kind == MarginKind::circle;
    T *const effective = effective_ + to, *const weights = weights_ + to, *const slopes = slopes_ + to;
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
      const L raw = load_pack<L>(whole, x + i, m, T(0));
      auto masked = M::equal(raw, L(-infinity));
      L y = raw;
      if constexpr (bent) {
        L slope;
        if (circle) {
          y = this->bend(std::true_type{}, raw);
          slope = this->slope_of_bend(std::true_type{}, raw);
        } else {
          y = this->bend(std::false_type{}, raw);
          slope = this->slope_of_bend(std::false_type{}, raw);
        }
        (slope * L(factor)).store(slopes + i);
      }
      M::select(masked, raw, y * multiplier + L(bias)).store(effective + i);
      if constexpr (weighted) {
        if (bias == -infinity) masked = masked | ~masked;
        L u = M::select(masked, L(T(0)), L(class_weight));
        if (!has_target()) {
          const int64_t at = (image * classes + c) * arguments.pixels + pixel + i;
          u = this->weight_of(this->load_probabilities(whole, at, m), masked, L(class_weight));
        }
        u.store(weights + i);
      }
    });
  }

  // The highest raw logits of a block of n classes, which was read a moment ago.
  IMBALANCE_INLINE void raise_highest_logits(int64_t start, int64_t n) {
    for_images([&](int64_t first, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
      T* const highest = columns_.highest_logit + first;
      outline<false>([=, this]() IMBALANCE_LAMBDA {
        for (int64_t j = 0; j < n; ++j) {
          const S* const x = logits(image, start + j, pixel);
          for_packs<L>(m, [&](auto whole, int64_t i, int64_t count, int) IMBALANCE_LAMBDA {
            const L raw = load_pack<L>(whole, x + i, count, -std::numeric_limits<T>::infinity());
            maximum(L::load(highest + i), raw).store(highest + i);
          });
        }
      });
    });
  }

  // Takes those targets out of the rest that are among a block's n classes, and maps them.
  IMBALANCE_INLINE void exclude_targets(int64_t start, int64_t n) {
    if (!has_target()) return;
    const bool weighted = has_weights();
    const int64_t run = tile_.run;
    const T *const factor = factor_, scale = scale_;
    T *const effective = effective_, *const weights = weights_;
    const bool is_mapped = target_map_.kind == MarginKind::additive && target_map_.parameters[0] == 0 &&
                           !class_margin_ && !bends();  // as every class is
    for_images([&](int64_t first, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
      const int64_t* const targets = arguments.target + first_;
      for (int64_t i = first; i < first + m; ++i) {
        const int64_t target = targets[i], j = target - start;
        if (j < 0 || j >= n) continue;
        const int64_t at = j * run + i;
        if (is_mapped) {
          columns_.target[i] = effective[at];
          columns_.target_slope[i] = factor ? scale * factor[target] : scale;
        } else {
          const TargetLogit<T> mapped = this->target_logit(number_of(logits(image, target, pixel + i - first)), target);
          columns_.target[i] = mapped.value;
          columns_.target_slope[i] = mapped.slope;
        }
        effective[at] = -std::numeric_limits<T>::infinity();
        if (weighted) weights[at] = 0;
      }
    });
  }

  // Adds a block of n classes to what is known of the rest; of a tile with one block the exponentials are kept.
  IMBALANCE_INLINE void join(int64_t start, int64_t n) {
    with_constant(has_weights(), [&](auto weighted) IMBALANCE_LAMBDA {
      with_constant(n == classes && loss_.d_logits, [&](auto kept) IMBALANCE_LAMBDA {
        outline<false>([=, this]() IMBALANCE_LAMBDA { join_packs(weighted, kept, start, n); });
      });
    });
  }

  template <bool weighted, bool kept>
  IMBALANCE_INLINE void join_packs(std::bool_constant<weighted>, std::bool_constant<kept>, int64_t start, int64_t n) {
    const int64_t image = first_ / arguments.pixels, pixel = first_ % arguments.pixels;
    const S* const next = logits(image, 0, pixel + count_);  // fetched while this loop computes and waits for nothing
    const int64_t run = tile_.run, class_stride = arguments.class_stride, count = count_;
    const bool first_block = start == 0;
    for (int64_t i = 0; i < count; i += L::count) {
      T *const z = effective_ + i, *const weights = weights_ + i;
      const S* const fetched = next + i;
      const L before = L::load(columns_.highest + i);
      L highest_of[4] = {before, before, before, before};
      for_classes(
          n, [&](int64_t j, int a) IMBALANCE_LAMBDA { highest_of[a] = maximum(highest_of[a], L::load(z + j * run)); });
      const L highest = maximum_of_four(highest_of);
      const L shift = M::select(M::equal(highest, -M::infinity()), L(T(0)), highest);
      if constexpr (weighted) {
        const L moved = L::load(columns_.shift + i) - shift, weight_sum = L::load(columns_.weight_sum + i);
        L relative_sums[4] = {L::load(columns_.weighted_logits + i) + moved * weight_sum, L(T(0)), L(T(0)), L(T(0))};
        L weight_sums[4] = {weight_sum, L(T(0)), L(T(0)), L(T(0))};
        for_classes(n, [&](int64_t j, int a) IMBALANCE_LAMBDA {
          const L u = L::load(weights + j * run), relative = L::load(z + j * run) - shift;
          relative_sums[a] = relative_sums[a] + M::select(M::equal(u, L(T(0))), L(T(0)), u * relative);
          weight_sums[a] = weight_sums[a] + u;
        });
        sum_of_four(relative_sums).store(columns_.weighted_logits + i);
        sum_of_four(weight_sums).store(columns_.weight_sum + i);
      }
      L sums[4] = {L(T(0)), L(T(0)), L(T(0)), L(T(0))};
      if (!first_block) {
        const L grown = M::exp_nonpositive(before - highest);
        sums[0] = L::load(columns_.sum + i) * M::select(M::equal(before, highest), L(T(1)), grown);
      }
      for_classes(n, [&](int64_t j, int a) IMBALANCE_LAMBDA {
        __builtin_prefetch(fetched + j * class_stride);
        const L exponential = M::exp_nonpositive(L::load(z + j * run) - shift);
        sums[a] = sums[a] + exponential;
        if constexpr (kept) exponential.store(z + j * run);
      });
      sum_of_four(sums).store(columns_.sum + i);
      highest.store(columns_.highest + i);
      shift.store(columns_.shift + i);
    }
  }

  // The targets relative to the shift, and their part in what is weighted.
  IMBALANCE_INLINE void end_split() {
    if (!has_target()) return;
    for (int64_t i = 0; i < count_; i += L::count) {
      const L target = L::load(columns_.target + i), relative = target - L::load(columns_.shift + i);
      relative.store(columns_.target + i);
      if (!has_weights()) continue;
      const auto masked = M::equal(target, -M::infinity());
      const L u = M::select(masked, L(T(0)), L::load(columns_.class_weight + i));
      const L weighted = L::load(columns_.weighted_logits + i) + M::select(masked, L(T(0)), u * relative);
      u.store(columns_.target_weight + i);
      weighted.store(columns_.weighted_logits + i);
      (L::load(columns_.weight_sum + i) + u).store(columns_.weight_sum + i);
    }
  }

  IMBALANCE_INLINE void store_losses() const {
    T* const losses = static_cast<T*>(loss_.losses) + first_;
    for (int64_t i = 0; i < count_; ++i) losses[i] = any_ignored_ && ignored(i) ? T(0) : columns_.loss[i];
  }

  // Before the gradient takes the place of the targets' logits.
  IMBALANCE_INLINE void store_reports() {
    const T* const log_probs = log_probs_of<Bytes>(columns_, count_);
    const T* const highest = maps_nothing() ? columns_.highest : columns_.highest_logit;
    outline<false>([=, this]() IMBALANCE_LAMBDA {
      for_images([&](int64_t first, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
        for (int64_t i = first; i < first + m; ++i) {
          const bool compares = loss_.correct && !ignored(i);
          const S* const x = compares ? logits(image, arguments.target[first_ + i], pixel + i - first) : nullptr;
          store_report(loss_, first_ + i, ignored(i), log_probs[i], compares && !(highest[i] > number_of(x)));
        }
      });
    });
  }

  // The coefficients of the gradient, with all that a pixel has one of.
  IMBALANCE_INLINE void begin_spread() {
    const T* const upstream = static_cast<const T*>(loss_.upstream);
    for (int64_t i = 0; i < count_; ++i) {
      const T factor = upstream ? upstream[first_ + i] : T(1);
      const T d_target = factor * columns_.d_target[i], weights = factor * columns_.d_weights[i];
      columns_.d_target[i] = (d_target - weights * columns_.target_weight[i]) * columns_.target_slope[i];
      columns_.d_rest[i] = factor * columns_.d_rest[i] * scale_;
      columns_.d_weights[i] = weights * scale_;
    }
  }

  // The second sweep's exponentials, where the first could not keep them.
  IMBALANCE_INLINE void exponentiate(int64_t n) const {
    outline<false>([=, this]() IMBALANCE_LAMBDA {
      const int64_t run = tile_.run, count = count_;
      for (int64_t i = 0; i < count; i += L::count) {
        const L shift = L::load(columns_.shift + i);
        T* const z = effective_ + i;
        for_classes(n, [&](int64_t j, int)
                           IMBALANCE_LAMBDA { M::exp_nonpositive(L::load(z + j * run) - shift).store(z + j * run); });
      }
    });
  }

  // (rest * exponential - weights * u) * dz/dx of a block of n classes, exactly 0 where the pixel is ignored.
  IMBALANCE_INLINE void spread(int64_t start, int64_t n) const {
    for_images([&](int64_t i, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
      with_constant(any_ignored_, [&](auto some) IMBALANCE_LAMBDA {
        with_constant(has_weights(), [&](auto weighted) IMBALANCE_LAMBDA {
          with_constant(bends(), [&](auto bent) IMBALANCE_LAMBDA {
            outline<false>([=, this]() IMBALANCE_LAMBDA {
              for (int64_t j = 0; j < n; ++j) {
                S* const d = d_logits(image, start + j, pixel);
                spread_run(some, weighted, bent, factor_ ? factor_[start + j] : T(1), j * tile_.run + i, i, m, d);
              }
            });
          });
        });
      });
    });
  }

  // One class's run of n pixels, from scratch at `from` and the tile's pixel `first` on.
  template <bool some_ignored, bool weighted, bool bent>
  IMBALANCE_INLINE void spread_run(std::bool_constant<some_ignored>, std::bool_constant<weighted>,
                                   std::bool_constant<bent>, T factor, int64_t from, int64_t first, int64_t n,
                                   S* d) const {
    const T *const exponentials = effective_ + from, *const weights = weights_ + from, *const slopes = slopes_ + from;
    const T *const d_rest = columns_.d_rest + first, *const d_weights = columns_.d_weights + first;
    const T* const counts = columns_.counts + first;
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
      L x = L::load(exponentials + i) * L::load(d_rest + i);
      if constexpr (weighted) x = x - L::load(weights + i) * L::load(d_weights + i);
      if constexpr (bent) {
        x = x * L::load(slopes + i);
      } else {
        x = x * L(factor);
      }
      if constexpr (some_ignored) x = M::select(M::equal(L::load(counts + i), L(T(0))), L(T(0)), x);
      store_pack(whole, d + i, m, x);
    });
  }

  IMBALANCE_INLINE void store_targets() const {
    if (!has_target()) return;
    S stored[PixelColumns<T>::size];
    for (int64_t i = 0; i < count_; i += L::count) store<L>(stored + i, L::load(columns_.d_target + i));
    const int64_t class_stride = loss_.gradient_class_stride, ignore_index = arguments.ignore_index;
    for_images([&](int64_t first, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
      const int64_t* const targets = arguments.target + first_ + first;
      S* const d = d_logits(image, 0, pixel);
      for (int64_t i = 0; i < m; ++i) {
        if (targets[i] != ignore_index) d[targets[i] * class_stride + i] = stored[first + i];
      }
    });
  }
};

template <class S, int Bytes>
void loss_planes(const LossArguments& arguments, int64_t first_row, int64_t last_row, void* memory) {
  Planes<S, Bytes>(arguments, memory).run(first_row, last_row);
}

int64_t planes_scratch_bytes(const SplitArguments& split, int64_t bytes_per_number) {
  const bool has_weights = split.target == nullptr || split.label_smoothing > 0;
  const bool bends = split.softcap > 0 || split.margin_kind == MarginKind::circle;
  return PlanesTile(split.classes, parts_of(has_weights, bends), bytes_per_number).count() * bytes_per_number;
}

}  // namespace
}  // namespace imbalance::cpu
