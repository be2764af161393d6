// multilabel_softmax of channels-first logits (B, C, P) on CPU, without a copy that moves the classes.
//
// Lanes are pixels: a pack of pixels is a pack of rows, and nothing is ever reduced across lanes. Each class's run of a
// tile's pixels is read from memory once, into scratch that stays in the L2 cache; there the exponentials take the
// logits' place, those of positives below 0, by which the gradient knows them. Where a tile of all classes would not
// fit, blocks of classes are swept twice, the second time backwards. Dense labels are staged beside the logits. Classes
// that labels or lists name are taken out of the scratch before anything is summed, and are summed on their own.
//
// A pixel's bits depend on its own values, the number of classes and the instruction set alone.
#pragma once

#include "labels.h"
#include "multilabel_softmax.h"
#include "multilabel_softmax_sides.h"
#include "planes.h"

namespace imbalance::cpu {
namespace {

// What a tile knows of its pixels.
template <class T>
struct PixelSides {
  static constexpr int64_t size = kMostPixels + kPadding;
  alignas(64) T highest[size];  // exponent of the negatives so far
  T sum[size];                  // of their exponentials, relative to its shift
  T highest_positive[size];     // the same of the positives
  T positive_sum[size];
  T counts[size];  // 0 where the pixel has no part, else 1
  T weight[size];
  T upstream[size];
  T loss[size];
  T factor[size];  // of exponentials, in the gradient
  T positive_factor[size];
};

// The pixels of one call, tile by tile.
template <class S, int Bytes>
class MultilabelPlanes {
 public:
  using T = typename AccumulateOf<S>::type;
  using L = Lanes<T, Bytes>;
  using M = Math<L>;
  using Two = TwoSides<L>;

  static std::size_t scratch_bytes(const MultilabelArguments& call) {
    const std::size_t listed = static_cast<std::size_t>(most_listed(call)) * (sizeof(T) + sizeof(int64_t));
    return static_cast<std::size_t>(tile_of(call).count()) * sizeof(T) + listed;
  }

  MultilabelPlanes(const MultilabelLossArguments& arguments, void* memory)
      : call_(arguments.call),
        inverse_divisor_(static_cast<T>(arguments.inverse_divisor)),
        bias_(static_cast<const T*>(call_.bias)),
        tile_(tile_of(call_)),
        z_(static_cast<T*>(memory)),
        labels_(z_ + tile_.part()),
        listed_(z_ + tile_.count()),
        places_(reinterpret_cast<int64_t*>(listed_ + most_listed(call_))) {
    std::memset(static_cast<void*>(&pixels_), 0, sizeof(pixels_));
    for (int64_t i = 0; i < PixelSides<T>::size; ++i) {
      pixels_.counts[i] = pixels_.weight[i] = pixels_.upstream[i] = T(1);
    }
  }

  void run(int64_t first_row, int64_t last_row) {
    for (first_ = first_row; first_ < last_row; first_ += tile_.pixels) {
      count_ = last_row - first_ < tile_.pixels ? last_row - first_ : tile_.pixels;
      begin_tile();
      for_blocks(tile_, call_.classes, [&](int64_t start, int64_t n) IMBALANCE_LAMBDA {
        stage(start, n);
        join(start, n);
      });
      finish();
      if (call_.d_logits == nullptr) continue;
      for (int64_t start = staged_; start >= 0; start -= tile_.classes) {
        const int64_t left = call_.classes - start, n = left < tile_.classes ? left : tile_.classes;
        if (n < call_.classes) {
          if (start != staged_) stage(start, n);
          exponentiate(n);
        }
        spread(start, n);
      }
    }
  }

 private:
  enum class Labels { listed, hard, soft };
  template <Labels labels>
  using Constant = std::integral_constant<Labels, labels>;

  const MultilabelArguments& call_;
  const T inverse_divisor_;
  const T* const bias_;
  const PlanesTile tile_;
  T* const z_;                     // (block's classes, run) logits, then exponentials
  T* const labels_;                // the same shape, dense; where they are soft, then exponentials of positives
  T* const listed_;                // exponents of the listed classes, pixel by pixel, then exponentials
  int64_t* const places_;          // class * run + pixel of each
  int64_t first_ = 0, count_ = 0;  // the tile's rows
  int64_t staged_ = 0;             // the block's first class
  bool are_soft_ = false;          // some labels of the block
  bool any_uncounted_ = false;
  int64_t listed_count_ = 0;
  int64_t first_listed_[kMostPixels + 1] = {};  // of each pixel, of lists
  PixelSides<T> pixels_;

  static PlanesTile tile_of(const MultilabelArguments& call) {
    return PlanesTile(call.classes, call.dense ? 2 : 1, sizeof(T));
  }
  static int64_t most_listed(const MultilabelArguments& call) {
    return call.dense ? 0 : pad(tile_of(call).pixels * (call.lists ? call.list_length : 1));
  }

  bool is_dense() const { return call_.dense != nullptr; }

  IMBALANCE_INLINE const S* logits(int64_t image, int64_t c, int64_t pixel) const {
    return static_cast<const S*>(call_.logits) + image * call_.image_stride + c * call_.class_stride + pixel;
  }

  // body(kind) with the kind of the block's labels as a constant.
  template <class Body>
  IMBALANCE_INLINE void with_labels(Body body) const {
    if (!is_dense()) {
      body(Constant<Labels::listed>{});
    } else if (are_soft_) {
      body(Constant<Labels::soft>{});
    } else {
      body(Constant<Labels::hard>{});
    }
  }

  // body(at, k) for each listed class k that is among a block's n classes.
  template <class Body>
  IMBALANCE_INLINE void for_listed_in(int64_t start, int64_t n, Body body) const {
    for (int64_t k = 0; k < listed_count_; ++k) {
      const int64_t at = places_[k] - start * tile_.run;
      if (at >= 0 && at < n * tile_.run) body(at, k);
    }
  }

  IMBALANCE_INLINE void begin_tile() {
    if (call_.sample_weight) {
      std::memcpy(pixels_.weight, static_cast<const T*>(call_.sample_weight) + first_, count_ * sizeof(T));
    }
    if (call_.upstream) {
      std::memcpy(pixels_.upstream, static_cast<const T*>(call_.upstream) + first_, count_ * sizeof(T));
    }
    if (call_.labels || call_.sample_weight) {
      const int64_t* const labels = call_.labels ? call_.labels + first_ : nullptr;
      const int64_t ignore_index = call_.ignore_index;
      T fewest = T(1);
      for (int64_t i = 0; i < count_; ++i) {
        T counts = labels && labels[i] == ignore_index ? T(0) : T(1);
        counts = pixels_.weight[i] == T(0) ? T(0) : counts;
        pixels_.counts[i] = counts;
        fewest = counts < fewest ? counts : fewest;
      }
      any_uncounted_ = fewest == T(0);
    }
    for (int64_t i = 0; i < count_; i += L::count) {
      (-M::infinity()).store(pixels_.highest + i);
      (-M::infinity()).store(pixels_.highest_positive + i);
    }
    if (call_.labels) gather_labels();
    if (call_.lists) gather_lists();
  }

  // The exponent of a logit; -inf where it is a mask.
  IMBALANCE_INLINE T positive_exponent(const S* x, int64_t c) const {
    const T raw = number_of(x), z = bias_ ? raw + bias_[c] : raw;
    return raw == -std::numeric_limits<T>::infinity() ? raw : -z;
  }

  // The exponents of the classes that labels name, of each pixel one.
  IMBALANCE_INLINE void gather_labels() {
    for_images(
        first_, count_, call_.pixels, [&](int64_t first, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
          const S* const x = logits(image, 0, pixel) - first;
          const int64_t* const labels = call_.labels + first_;
          const int64_t classes = call_.classes, ignore_index = call_.ignore_index, class_stride = call_.class_stride;
          for (int64_t i = first; i < first + m; ++i) {
            const bool is_class = labels[i] < classes && labels[i] != ignore_index;
            const int64_t c = is_class ? labels[i] : 0;
            const T exponent = positive_exponent(x + c * class_stride + i, c);
            listed_[i] = is_class ? exponent : -std::numeric_limits<T>::infinity();
            places_[i] = is_class ? c * tile_.run + i : -1;
          }
        });
    listed_count_ = count_;
    std::memcpy(pixels_.highest_positive, listed_, count_ * sizeof(T));
  }

  // The same of lists.
  IMBALANCE_INLINE void gather_lists() {
    int64_t count = 0;
    for_images(first_, count_, call_.pixels,
               [&](int64_t first, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
                 const S* const x = logits(image, 0, pixel) - first;
                 for (int64_t i = first; i < first + m; ++i) {
                   first_listed_[i] = count;
                   T highest = -std::numeric_limits<T>::infinity();
                   for_listed(call_, first_ + i, [&](int64_t c) IMBALANCE_LAMBDA {
                     const T exponent = positive_exponent(x + c * call_.class_stride + i, c);
                     highest = exponent > highest ? exponent : highest;
                     listed_[count] = exponent;
                     places_[count++] = c * tile_.run + i;
                   });
                   pixels_.highest_positive[i] = highest;
                 }
               });
    first_listed_[count_] = listed_count_ = count;
  }

  // Reads the tile's logits of a block of n classes, and dense labels: nothing else reads them, but for what is listed.
  IMBALANCE_INLINE void stage(int64_t start, int64_t n) {
    staged_ = start;
    are_soft_ = false;
    for_images(first_, count_, call_.pixels, [&](int64_t i, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
      const int64_t place = (image * call_.classes + start) * call_.pixels + pixel;
      for (int64_t j = 0; is_dense() && j < n; ++j) stage_labels(place + j * call_.pixels, m, j * tile_.run + i);
    });
    for_images(first_, count_, call_.pixels, [&](int64_t i, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
      with_constant(is_dense() && !are_soft_, [&](auto hard) IMBALANCE_LAMBDA {
        outline<false>([=, this]() IMBALANCE_LAMBDA {
          for (int64_t j = 0; j < n; ++j) {
            stage_run(hard, logits(image, start + j, pixel), start + j, m, j * tile_.run + i);
          }
        });
      });
    });
    for_listed_in(start, n,
                  [&](int64_t at, int64_t) IMBALANCE_LAMBDA { z_[at] = -std::numeric_limits<T>::infinity(); });
  }

  // One class's run of n pixels, to scratch at `to`; of hard labels exponents.
  template <bool hard>
  IMBALANCE_INLINE void stage_run(std::bool_constant<hard>, const S* x, int64_t c, int64_t n, int64_t to) const {
    const L bias(bias_ ? bias_[c] : T(0));
    T *const z = z_ + to, *const y = labels_ + to;
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
      const L raw = load_pack<L>(whole, x + i, m, -std::numeric_limits<T>::infinity());
      L staged = M::select(M::equal(raw, -M::infinity()), raw, raw + bias);
      if constexpr (hard) staged = Two::hard_exponent(staged, M::equal(L::load(y + i), L(T(1))));
      staged.store(z + i);
    });
  }

  void stage_labels(int64_t place, int64_t n, int64_t to) {
    const DenseLabels<T> labels = stage_dense<S, L>(call_, place, n, labels_ + to);
    are_soft_ |= labels.are_soft;
    if (labels.values != labels_ + to) std::memcpy(labels_ + to, labels.values, n * sizeof(T));
  }

  // Adds a block of n classes to the sums; of a tile with one block the exponentials are kept.
  IMBALANCE_INLINE void join(int64_t start, int64_t n) {
    with_labels([&](auto labels) IMBALANCE_LAMBDA {
      with_constant(n == call_.classes && call_.d_logits, [&](auto kept) IMBALANCE_LAMBDA {
        outline<false>([=, this]() IMBALANCE_LAMBDA { join_packs(labels, kept, start, n); });
      });
    });
  }

  template <Labels labels, bool kept>
  IMBALANCE_INLINE void join_packs(Constant<labels>, std::bool_constant<kept>, int64_t start, int64_t n) {
    const int64_t image = first_ / call_.pixels, pixel = first_ % call_.pixels;
    const S* const next = logits(image, 0, pixel + count_);  // fetched while this loop computes and waits for nothing
    const int64_t run = tile_.run, class_stride = call_.class_stride;
    for (int64_t i = 0; i < count_; i += L::count) {
      T *const z = z_ + i, *const y = labels_ + i;
      const Two before{L::load(pixels_.highest + i), L::load(pixels_.highest_positive + i)};
      L negatives[4] = {before.negative, before.negative, before.negative, before.negative};
      L positives[4] = {before.positive, before.positive, before.positive, before.positive};
      for_classes(n, [&](int64_t j, int a) IMBALANCE_LAMBDA {
        const Two exponents = exponents_of<labels>(z + j * run, y + j * run);
        negatives[a] = maximum(negatives[a], exponents.negative);
        if constexpr (labels != Labels::listed) positives[a] = maximum(positives[a], exponents.positive);
      });
      const Two highest{maximum_of_four(negatives), maximum_of_four(positives)}, shift = highest.shifts();
      Two sums{L(T(0)), L(T(0))};
      if (start > 0) {
        const Two shift_before = before.shifts();
        sums.negative = L::load(pixels_.sum + i) * M::exp_nonpositive(shift_before.negative - shift.negative);
        sums.positive = L::load(pixels_.positive_sum + i) * M::exp_nonpositive(shift_before.positive - shift.positive);
      }
      with_constant(highest.has_infinite(), [&](auto infinite) IMBALANCE_LAMBDA {
        const L zero(T(0));
        L of_negatives[4] = {sums.negative, zero, zero, zero}, of_positives[4] = {sums.positive, zero, zero, zero};
        for_classes(n, [&](int64_t j, int a) IMBALANCE_LAMBDA {
          __builtin_prefetch(next + i + j * class_stride);
          const Two e = exponentials<labels>(infinite, z + j * run, y + j * run, shift);
          of_negatives[a] = of_negatives[a] + e.negative;
          of_positives[a] = of_positives[a] + e.positive;
          if constexpr (kept) keep<labels>(e, z + j * run, y + j * run);
        });
        sums = {sum_of_four(of_negatives), sum_of_four(of_positives)};
      });
      highest.negative.store(pixels_.highest + i);
      sums.negative.store(pixels_.sum + i);
      if constexpr (labels == Labels::listed) continue;  // those are summed on their own
      highest.positive.store(pixels_.highest_positive + i);
      sums.positive.store(pixels_.positive_sum + i);
    }
  }

  // The exponents of a pack.
  template <Labels labels>
  static IMBALANCE_INLINE Two exponents_of(const T* z, const T* y) {
    const L staged = L::load(z);
    if constexpr (labels == Labels::listed) {
      return {staged, -M::infinity()};
    } else if constexpr (labels == Labels::hard) {
      return Two::of_side(staged, M::equal(L::load(y), L(T(1))), -M::infinity());
    } else {
      return Two::soft_exponents(staged, L::load(y));
    }
  }

  // What it adds to the sums.
  template <Labels labels, bool infinite>
  static IMBALANCE_INLINE Two exponentials(std::bool_constant<infinite> some, const T* z, const T* y,
                                           const Two& shift) {
    const L staged = L::load(z);
    if constexpr (labels == Labels::listed) {
      return {exponential(some, staged - shift.negative), L(T(0))};
    } else if constexpr (labels == Labels::hard) {
      return Two::hard(some, staged, M::equal(L::load(y), L(T(1))), shift);
    } else {
      return Two::soft(some, staged, L::load(y), shift);
    }
  }

  // In place of a pack's logits; soft labels have two exponentials, hard ones one of either sign.
  template <Labels labels>
  static IMBALANCE_INLINE void keep(const Two& e, T* z, T* y) {
    if constexpr (labels == Labels::soft) {
      e.negative.store(z);
      e.positive.store(y);
    } else {
      (e.negative - e.positive).store(z);
    }
  }

  // The second sweep's exponentials, where the first could not keep them.
  IMBALANCE_INLINE void exponentiate(int64_t n) const {
    with_labels([&](auto labels) IMBALANCE_LAMBDA {
      outline<false>([=, this]() IMBALANCE_LAMBDA {
        const int64_t run = tile_.run;
        for (int64_t i = 0; i < count_; i += L::count) {
          const Two highest{L::load(pixels_.highest + i), L::load(pixels_.highest_positive + i)};
          const Two shift = highest.shifts();
          T *const z = z_ + i, *const y = labels_ + i;
          with_constant(highest.has_infinite(), [&](auto infinite) IMBALANCE_LAMBDA {
            for_classes(n, [&](int64_t j, int) IMBALANCE_LAMBDA {
              keep<labels.value>(exponentials<labels.value>(infinite, z + j * run, y + j * run, shift), z + j * run,
                                 y + j * run);
            });
          });
        }
      });
    });
  }

  // The exponentials of what is listed, and their sums. Beyond them lie earlier ones.
  IMBALANCE_INLINE void sum_listed() {
    for (int64_t i = 0; call_.lists && i < count_; ++i) {
      const T shift = multilabel_shift(pixels_.highest_positive[i]);
      for (int64_t k = first_listed_[i]; k < first_listed_[i + 1]; ++k) listed_[k] -= shift;
    }
    for (int64_t k = 0; k < listed_count_; k += L::count) {
      const L exponent = L::load(listed_ + k), shift = call_.labels ? multilabel_shift(exponent) : L(T(0));
      M::exp_nonpositive(exponent - shift).store(listed_ + k);
    }
    if (call_.labels) std::memcpy(pixels_.positive_sum, listed_, count_ * sizeof(T));
    for (int64_t i = 0; call_.lists && i < count_; ++i) {
      T sum = 0;
      for (int64_t k = first_listed_[i]; k < first_listed_[i + 1]; ++k) sum += listed_[k];
      pixels_.positive_sum[i] = sum;
    }
  }

  // Losses, and what exponentials are multiplied by in the gradient.
  IMBALANCE_INLINE void finish() {
    if (!is_dense()) sum_listed();
    for (int64_t i = 0; i < count_; i += L::count) {
      const Two highest{L::load(pixels_.highest + i), L::load(pixels_.highest_positive + i)}, shift = highest.shifts();
      const OnePlus<L> negative(L::load(pixels_.sum + i), shift.negative);
      const OnePlus<L> positive(L::load(pixels_.positive_sum + i), shift.positive);
      const L weight = L::load(pixels_.weight + i),
              scale = weight * L(inverse_divisor_) * L::load(pixels_.upstream + i);
      const L loss = weight * (negative.log + positive.log);
      M::select(M::equal(L::load(pixels_.counts + i), L(T(0))), L(T(0)), loss).store(pixels_.loss + i);
      (scale / negative.total).store(pixels_.factor + i);
      (scale / positive.total).store(pixels_.positive_factor + i);
    }
    if (call_.losses) std::memcpy(static_cast<T*>(call_.losses) + first_, pixels_.loss, count_ * sizeof(T));
  }

  // The gradient of a block of n classes.
  IMBALANCE_INLINE void spread(int64_t start, int64_t n) const {
    for_listed_in(start, n, [&](int64_t at, int64_t k) IMBALANCE_LAMBDA { z_[at] = -listed_[k]; });
    for_images(first_, count_, call_.pixels, [&](int64_t i, int64_t m, int64_t image, int64_t pixel) IMBALANCE_LAMBDA {
      with_constant(any_uncounted_, [&](auto some) IMBALANCE_LAMBDA {
        with_constant(are_soft_, [&](auto soft) IMBALANCE_LAMBDA {
          outline<false>([=, this]() IMBALANCE_LAMBDA {
            S* d = static_cast<S*>(call_.d_logits) + image * call_.gradient_image_stride + pixel;
            d += start * call_.gradient_class_stride;
            for (int64_t j = 0; j < n; ++j) {
              spread_run(some, soft, j * tile_.run + i, i, m, d + j * call_.gradient_class_stride);
            }
          });
        });
      });
    });
  }

  // One class's run of n pixels, from scratch at `from` and the tile's pixel `first` on.
  template <bool some_uncounted, bool soft>
  IMBALANCE_INLINE void spread_run(std::bool_constant<some_uncounted>, std::bool_constant<soft>, int64_t from,
                                   int64_t first, int64_t n, S* d) const {
    const T *const e = z_ + from, *const of_positives = labels_ + from;
    const T *const factor = pixels_.factor + first, *const positive_factor = pixels_.positive_factor + first;
    const T* const counts = pixels_.counts + first;
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
      const L exponential = L::load(e + i), negative = L::load(factor + i), positive = L::load(positive_factor + i);
      L x;
      if constexpr (soft) {
        x = exponential * negative - L::load(of_positives + i) * positive;
      } else {
        x = exponential * M::select(M::less(exponential, L(T(0))), positive, negative);
      }
      if constexpr (some_uncounted) x = M::select(M::equal(L::load(counts + i), L(T(0))), L(T(0)), x);
      store_pack(whole, d + i, m, x);
    });
  }
};

}  // namespace
}  // namespace imbalance::cpu
