// column_sums on CPU: sums over rows of p, of y p and of y, class by class, and their gradient. p = sigmoid(x), or the
// softmax of a row.
//
// The logits are cut into tiles: rows times a piece of their classes, or images times a piece of their pixels. Each
// tile sums in float for a while and then in double, into a part of the result of its own; the parts are added up in
// their order (bindings.cpp). Tiles depend on shapes and strides alone, so the sums do not depend on threads. Rows so
// narrow that several fit a block lie side by side in it, as one long row of repeated classes. Labels that are listed
// add to the sums one by one, and never become one-hot.
//
// A softmax takes whole rows, or runs of an image's pixels with all their classes, whose exponentials stay in scratch
// between its sums and what is made of it: each logit is read from memory once, while a row fits the cache, and costs
// one exponential. Its gradient is p (g - sum p g), where g is that of p. Of a sure row both g and the sum are nearly
// the g of the highest logit, so that is taken off all of them first, and what is left is small and exact.
//
// One source for AVX-512, AVX2, SSE2 and NEON: column_sums_<instruction set>.cpp includes it.
#pragma once

#include "../objectives.h"
#include "column_sums.h"
#include "labels.h"

namespace imbalance::cpu {
namespace {

constexpr int64_t kColumnBlock = 2048;      // logits
constexpr int64_t kColumnTile = 1 << 16;    // logits, about
constexpr int64_t kFewestRows = 64;         // of a tile: its sums take a tenth of the memory of its logits
constexpr int64_t kMostChunks = 64;         // of rows
constexpr int64_t kFloatRows = 32;          // that are summed in float
constexpr int64_t kGathered = 64;           // logits of listed labels, to share the lanes
constexpr int64_t kMostPixels = 512;        // of a softmax's run: what is known of each stays in the L1 cache
constexpr int64_t kExponentials = 1 << 16;  // of a run: they stay in the L2 cache
constexpr int64_t kFewestPixels = 32;       // of a run, whatever its exponentials: two cache lines of floats

constexpr int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct ColumnTiling {
  int64_t side_by_side;  // rows in a block, 0 of images
  int64_t width;         // of a piece: classes of a row, or pixels of an image
  int64_t pieces;
  int64_t height;  // of a chunk: rows, or images
  int64_t chunks;
  int64_t run;     // of a piece: pixels that are worked on together
  int64_t beside;  // numbers that lie beside what is worked on together, at most

  explicit ColumnTiling(const ColumnSumsArguments& call) {
    const int64_t classes = larger(1, call.classes);
    if (call.pixels > 0) {
      side_by_side = 0;
      width = smaller(call.pixels, kColumnBlock);
      pieces = ceiling(call.pixels, width);
      height = larger(1, kColumnBlock / width);
      run = call.from_softmax ? kMostPixels : kColumnBlock;
      while (call.from_softmax && run * classes > kExponentials && run > kFewestPixels) run /= 2;
      run = smaller(run, width);
      beside = kColumnBlock;
    } else {
      const bool together = !call.from_softmax && 2 * classes <= kColumnBlock && call.image_stride == classes;
      side_by_side = together ? kColumnBlock / classes : 1;
      width = call.from_softmax ? classes : smaller(classes, kColumnBlock);
      run = 0;
      beside = larger(kColumnBlock, pad(width));
      pieces = ceiling(classes, width);
      height = larger(kFewestRows, larger(ceiling(kColumnTile, classes), ceiling(call.images, kMostChunks)));
      height = ceiling(height, side_by_side) * side_by_side;
    }
    chunks = ceiling(call.images, height);
    if (call.classes == 0) chunks = 0;
  }

  // From one class's exponentials to the next's: no power of two, whose runs would share a few of the cache's sets.
  int64_t run_stride() const { return pad(run) + kPadding; }
  // Numbers of a softmax's scratch: exponentials of a row, or of all classes of a run of pixels.
  int64_t exponentials(const ColumnSumsArguments& call) const {
    if (!call.from_softmax) return 0;
    return side_by_side == 0 ? call.classes * run_stride() : beside;
  }
  int64_t tiles() const { return chunks * pieces; }
  int64_t parts() const { return side_by_side == 0 ? tiles() : chunks; }  // pieces of rows share one
};

template <class S, int Bytes>
class ColumnTiles {
 public:
  using T = typename AccumulateOf<S>::type;
  using L = Lanes<T, Bytes>;
  using M = Math<L>;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  static int64_t scratch_numbers(const ColumnSumsArguments& call) {
    const ColumnTiling tiling(call);
    return 5 * tiling.beside + 6 * kColumnBlock + 4 * kGathered + 2 * tiling.exponentials(call);
  }

  ColumnTiles(const ColumnSumsArguments& call, void* memory)
      : call_(call),
        tiling_(call),
        given_(static_cast<const T*>(call.sample_weight)),
        d_predicted_(static_cast<const T*>(call.d_predicted)),
        d_true_positives_(static_cast<const T*>(call.d_true_positives)),
        weights_(static_cast<T*>(memory)),
        labels_(weights_ + tiling_.beside),
        predicted_(labels_ + tiling_.beside),
        true_positives_(predicted_ + tiling_.beside),
        positives_(true_positives_ + tiling_.beside),
        of_predicted_(positives_ + tiling_.beside),
        of_true_positives_(of_predicted_ + kColumnBlock),
        highest_(of_true_positives_ + kColumnBlock),
        of_highest_(highest_ + kColumnBlock),
        factors_(of_highest_ + kColumnBlock),
        dots_(factors_ + kColumnBlock),
        gathered_(dots_ + kColumnBlock),
        gathered_weights_(gathered_ + kGathered),
        gathered_classes_(reinterpret_cast<int64_t*>(gathered_weights_ + kGathered)),
        exponentials_(gathered_ + 4 * kGathered),
        of_p_(exponentials_ + tiling_.exponentials(call)) {
    if (call.from_softmax && call.d_logits) {
      for (int64_t c = 0; c < call.classes; ++c) begin_of_p(c);
    }
  }

  // Adds a tile up in its part of the sums (parts, 3, C).
  void sum(int64_t tile, double* sums) {
    const int64_t chunk = tile / tiling_.pieces, piece = tile % tiling_.pieces;
    double* const part = sums + (tiling_.side_by_side == 0 ? tile : chunk) * 3 * call_.classes;
    of_predictions_ = part;
    of_true_ = part + call_.classes;
    of_positives_ = part + 2 * call_.classes;
    const int64_t first = chunk * tiling_.height, last = smaller(first + tiling_.height, call_.images);
    if (tiling_.side_by_side == 0) {
      for (int64_t c = 0; c < 3 * call_.classes; ++c) part[c] = 0;
      for_runs(first, last, piece,
               [&](int64_t image, int64_t at, int64_t n) IMBALANCE_LAMBDA { sum_pixels(image, at, n); });
    } else {
      sum_rows(first, last, piece * tiling_.width);
    }
    add_gathered();
  }

  // Writes the gradient of a tile.
  void gradient(int64_t tile) {
    const int64_t chunk = tile / tiling_.pieces, piece = tile % tiling_.pieces, begin = piece * tiling_.width;
    const int64_t first = chunk * tiling_.height, last = smaller(first + tiling_.height, call_.images);
    if (tiling_.side_by_side == 0) {
      for_runs(first, last, piece, [&](int64_t image, int64_t at, int64_t n) IMBALANCE_LAMBDA {
        call_.from_softmax ? softmax_pixels_gradient(image, at, n) : pixels_gradient(image, at, n);
      });
      return;
    }
    if (call_.from_softmax) {
      for (int64_t row = first; row < last; ++row) softmax_row_gradient(row);
      return;
    }
    const int64_t n = smaller(tiling_.width, call_.classes - begin);
    if (begin != repeated_from_) {
      repeat(d_predicted_ + begin, n, of_predicted_);
      repeat(d_true_positives_ + begin, n, of_true_positives_);
      repeated_from_ = begin;
    }
    for (int64_t row = first; row < last; row += tiling_.side_by_side) {
      const int64_t rows = smaller(tiling_.side_by_side, last - row), place = row * call_.classes + begin;
      const T* const weights = stage_weights(row, rows, n);
      const S* const x = logits() + row * call_.image_stride + begin;
      S* const d = d_logits() + place;
      block_gradient(x, dense_labels(place, rows * n), weights, rows * n, of_predicted_, of_true_positives_, d);
      for (int64_t i = 0; !call_.dense && i < rows; ++i) {
        if (uncounted<T>(call_, row + i)) continue;
        for_listed(call_, row + i, [&](int64_t c) IMBALANCE_LAMBDA {
          if (c < begin || c >= begin + n) return;
          const int64_t at = i * n + c - begin;
          store_number(d + at, slope(x + i * call_.image_stride + c - begin,
                                     of_predicted_[c - begin] + of_true_positives_[c - begin]) *
                                   weight_of(row + i));
        });
      }
    }
  }

 private:
  const ColumnSumsArguments& call_;
  const ColumnTiling tiling_;
  const T* const given_;  // weights of rows
  const T* const d_predicted_;
  const T* const d_true_positives_;
  T* const weights_;    // beside a block's logits
  T* const labels_;     // the same, of dense labels
  T* const predicted_;  // sums of a block's columns
  T* const true_positives_;
  T* const positives_;
  T* const of_predicted_;  // gradients of the sums, beside a block's logits
  T* const of_true_positives_;
  T* const highest_;     // of each pixel: its highest logit,
  T* const of_highest_;  // the gradient of that one's p,
  T* const factors_;     // 1 / the sum of its exponentials,
  T* const dots_;        // sum p (g - that of the highest)
  T* const gathered_;    // logits of listed labels
  T* const gathered_weights_;
  int64_t* const gathered_classes_;
  T* const exponentials_;  // of a row, or of all classes of a run of pixels; a row's are then divided by their sum
  T* const of_p_;          // g, beside them: d_predicted, but while a row or a run is worked on
  int64_t count_gathered_ = 0;
  int64_t repeated_from_ = -1;
  double* of_predictions_ = nullptr;  // a part of the result
  double* of_true_ = nullptr;
  double* of_positives_ = nullptr;

  const S* logits() const { return static_cast<const S*>(call_.logits); }
  S* d_logits() const { return static_cast<S*>(call_.d_logits); }
  T weight_of(int64_t row) const { return given_ ? given_[row] : T(1); }

  const T* dense_labels(int64_t place, int64_t count) {
    return call_.dense ? stage_dense<S, L>(call_, place, count, labels_).values : nullptr;
  }

  // body(image, at, n) for each run of n pixels of images' pieces.
  template <class Body>
  IMBALANCE_INLINE void for_runs(int64_t first, int64_t last, int64_t piece, Body body) const {
    for (int64_t image = first; image < last; ++image) {
      const int64_t begin = piece * tiling_.width, end = smaller(begin + tiling_.width, call_.pixels);
      for (int64_t at = begin; at < end; at += tiling_.run) body(image, at, smaller(tiling_.run, end - at));
    }
  }

  // The weights beside a block of rows, n logits of each; null: ones.
  const T* stage_weights(int64_t first, int64_t rows, int64_t n) {
    bool any = given_ != nullptr;
    for (int64_t i = 0; !any && call_.labels && i < rows; ++i) any = uncounted<T>(call_, first + i);
    if (!any) return nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      const T weight = uncounted<T>(call_, first + i) ? T(0) : weight_of(first + i);
      for (int64_t j = 0; j < n; ++j) weights_[i * n + j] = weight;
    }
    return weights_;
  }

  void repeat(const T* from, int64_t n, T* to) const {
    for (int64_t i = 0; i < tiling_.side_by_side; ++i) {
      for (int64_t j = 0; j < n; ++j) to[i * n + j] = from[j];
    }
  }

  // ---------------------------------------------------------------- sums

  struct Sums {
    L predicted, true_positives, positives;
  };

  // What a pack of probabilities adds to the sums; of dense labels y to all three.
  template <class Whole>
  IMBALANCE_INLINE Sums of_pack(Whole whole, L p, const T* y, const T* weights, int64_t i, int64_t m) const {
    const L zero(T(0));
    const L label = y ? load_pack<L>(whole, y + i, m, T(0)) : zero;
    Sums sums{p, M::select(M::equal(label, zero), zero, label * p), label};
    if constexpr (!Whole::value) {  // beyond what there is p would be 1/2
      const auto inside = L::iota() < static_cast<typename L::Integer>(m) - typename L::Mask{};
      sums.predicted = M::select(inside, p, zero);
    }
    if (weights) {
      const L weight = load_pack<L>(whole, weights + i, m, T(0));
      const auto nothing = M::equal(weight, zero);
      sums.predicted = M::select(nothing, zero, weight * sums.predicted);
      sums.true_positives = M::select(nothing, zero, weight * sums.true_positives);
      sums.positives = M::select(nothing, zero, weight * sums.positives);
    }
    return sums;
  }

  // The sigmoids of a pack.
  template <class Whole>
  static IMBALANCE_INLINE L sigmoids(Whole whole, const S* x, int64_t i, int64_t m) {
    return Truth<L>(load_pack<L>(whole, x + i, m, T(0))).p;
  }

  template <class Body>
  static IMBALANCE_INLINE void with_forms(const T* y, const T* weights, Body body) {
    with_constant(y != nullptr, [&](auto dense) IMBALANCE_LAMBDA {
      with_constant(weights != nullptr, [&](auto weighted) IMBALANCE_LAMBDA { body(dense, weighted); });
    });
  }
  template <class Body>
  static IMBALANCE_INLINE void with_forms(const T* y, const T* weights, bool from_softmax, Body body) {
    with_constant(from_softmax, [&](auto softmax) IMBALANCE_LAMBDA {
      with_forms(y, weights, [&](auto dense, auto weighted) IMBALANCE_LAMBDA { body(dense, weighted, softmax); });
    });
  }

  void sum_rows(int64_t first, int64_t last, int64_t begin) {
    const int64_t n = smaller(tiling_.width, call_.classes - begin), most = tiling_.side_by_side * n;
    for (int64_t c = begin; c < begin + n; ++c) of_predictions_[c] = of_true_[c] = of_positives_[c] = 0;
    clear(most);
    int64_t blocks = 0;
    for (int64_t row = first; row < last; row += tiling_.side_by_side) {
      const int64_t rows = smaller(tiling_.side_by_side, last - row);
      const int64_t place = row * call_.classes + begin, at = row * call_.image_stride + begin;
      const T* const y = dense_labels(place, rows * n);
      const T* const weights = stage_weights(row, rows, n);
      const S* const x = logits() + at;
      if (call_.from_softmax) {
        if (uncounted<T>(call_, row)) continue;
        make_probabilities(x, n);
      }
      with_forms(y, weights, call_.from_softmax, [&](auto dense, auto weighted, auto softmax) IMBALANCE_LAMBDA {
        for_packs<L>(rows * n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
          const L p = softmax ? load_pack<L>(whole, exponentials_ + i, m, T(0)) : sigmoids(whole, x, i, m);
          const Sums sums = of_pack(whole, p, dense ? y : nullptr, weighted ? weights : nullptr, i, m);
          (L::load(predicted_ + i) + sums.predicted).store(predicted_ + i);
          if constexpr (dense) {
            (L::load(true_positives_ + i) + sums.true_positives).store(true_positives_ + i);
            (L::load(positives_ + i) + sums.positives).store(positives_ + i);
          }
        });
      });
      for (int64_t i = 0; !y && i < rows; ++i) {
        if (uncounted<T>(call_, row + i)) continue;
        for_listed(call_, row + i, [&](int64_t c) IMBALANCE_LAMBDA {
          if (c < begin || c >= begin + n) return;
          call_.from_softmax ? add_listed(exponentials_[c], c, weight_of(row))
                             : gather(x + i * call_.image_stride + c - begin, c, weight_of(row + i));
        });
      }
      if (++blocks % kFloatRows == 0) add_block(most, n, begin, y != nullptr);
    }
    add_block(most, n, begin, call_.dense != nullptr);
  }

  void clear(int64_t count) {
    for (int64_t i = 0; i < pad(count); ++i) predicted_[i] = true_positives_[i] = positives_[i] = 0;
  }

  // Moves the block's sums to those in double.
  void add_block(int64_t count, int64_t n, int64_t begin, bool dense) {
    for (int64_t i = 0; i < count; i += n) {
      for (int64_t c = 0; c < n; ++c) of_predictions_[begin + c] += predicted_[i + c];
      for (int64_t c = 0; dense && c < n; ++c) of_true_[begin + c] += true_positives_[i + c];
      for (int64_t c = 0; dense && c < n; ++c) of_positives_[begin + c] += positives_[i + c];
    }
    clear(count);
  }

  void sum_pixels(int64_t image, int64_t begin, int64_t n) {
    const int64_t first = image * call_.pixels + begin, stride = tiling_.run_stride();
    const T* const weights = stage_weights(first, n, 1);
    const S* const logits_of_run = logits() + image * call_.image_stride + begin;
    if (call_.from_softmax) exponentiate_pixels<false>(logits_of_run, n);
    for (int64_t c = 0; c < call_.classes; ++c) {
      const S* const x = logits_of_run + c * call_.class_stride;
      const T* const exponentials = exponentials_ + c * stride;
      const T* const y = dense_labels((image * call_.classes + c) * call_.pixels + begin, n);
      with_forms(y, weights, call_.from_softmax, [&](auto dense, auto weighted, auto softmax) IMBALANCE_LAMBDA {
        const L zero(T(0));
        Sums of[4] = {{zero, zero, zero}, {zero, zero, zero}, {zero, zero, zero}, {zero, zero, zero}};
        for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
          const L p = softmax ? L::load(exponentials + i) * L::load(factors_ + i) : sigmoids(whole, x, i, m);
          const Sums sums = of_pack(whole, p, dense ? y : nullptr, weighted ? weights : nullptr, i, m);
          of[a].predicted = of[a].predicted + sums.predicted;
          of[a].true_positives = of[a].true_positives + sums.true_positives;
          of[a].positives = of[a].positives + sums.positives;
        });
        const auto total = [&](L Sums::* which) IMBALANCE_LAMBDA {
          return sum_of((of[0].*which + of[1].*which) + (of[2].*which + of[3].*which));
        };
        of_predictions_[c] += total(&Sums::predicted);
        if constexpr (dense) {
          of_true_[c] += total(&Sums::true_positives);
          of_positives_[c] += total(&Sums::positives);
        }
      });
    }
    for (int64_t i = 0; !call_.dense && i < n; ++i) {
      if (uncounted<T>(call_, first + i)) continue;
      for_listed(call_, first + i, [&](int64_t c) IMBALANCE_LAMBDA {
        call_.from_softmax ? add_listed(exponentials_[c * stride + i] * factors_[i], c, weight_of(first + i))
                           : gather(logits_of_run + c * call_.class_stride + i, c, weight_of(first + i));
      });
    }
  }

  void add_listed(T p, int64_t c, T weight) {
    of_true_[c] += weight * p;
    of_positives_[c] += weight;
  }

  void gather(const S* x, int64_t c, T weight) {
    gathered_[count_gathered_] = number_of(x);
    gathered_weights_[count_gathered_] = weight;
    gathered_classes_[count_gathered_] = c;
    if (++count_gathered_ == kGathered) add_gathered();
  }

  void add_gathered() {
    for (int64_t i = 0; i < count_gathered_; i += L::count) {  // beyond them lie earlier ones
      (Truth<L>(L::load(gathered_ + i)).p * L::load(gathered_weights_ + i)).store(gathered_ + i);
    }
    for (int64_t i = 0; i < count_gathered_; ++i) {
      of_true_[gathered_classes_[i]] += gathered_[i];
      of_positives_[gathered_classes_[i]] += gathered_weights_[i];
    }
    count_gathered_ = 0;
  }

  // ---------------------------------------------------------------- gradient

  // p (1 - p) times what is given.
  static IMBALANCE_INLINE T slope(const S* x, T times) {
    const Truth<Lanes<T, 16>> truth(Lanes<T, 16>(number_of(x)));
    return truth.p.v[0] * truth.n.v[0] * times;
  }

  // The gradient of n logits; the gradients of the sums lie beside them.
  void block_gradient(const S* x, const T* y, const T* weights, int64_t n, const T* of_predicted,
                      const T* of_true_positives, S* d) const {
    with_forms(y, weights, [&](auto dense, auto weighted) IMBALANCE_LAMBDA {
      const L zero(T(0));
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
        const Truth<L> truth(load_pack<L>(whole, x + i, m, T(0)));
        L times = load_pack<L>(whole, of_predicted + i, m, T(0));
        if constexpr (dense) {
          times = times + load_pack<L>(whole, y + i, m, T(0)) * load_pack<L>(whole, of_true_positives + i, m, T(0));
        }
        L slope = truth.p * truth.n * times;
        if constexpr (weighted) {
          const L weight = load_pack<L>(whole, weights + i, m, T(0));
          slope = M::select(M::equal(weight, zero), zero, weight * slope);
        }
        store_pack(whole, d + i, m, slope);
      });
    });
  }

  void pixels_gradient(int64_t image, int64_t begin, int64_t n) {
    const int64_t first = image * call_.pixels + begin;
    const T* const weights = stage_weights(first, n, 1);
    S* const d = d_logits();
    for (int64_t c = 0; c < call_.classes; ++c) {
      const int64_t place = (image * call_.classes + c) * call_.pixels + begin;
      for (int64_t i = 0; i < n; ++i) of_predicted_[i] = d_predicted_[c];
      for (int64_t i = 0; i < n; ++i) of_true_positives_[i] = d_true_positives_[c];
      const S* const x = logits() + image * call_.image_stride + c * call_.class_stride + begin;
      block_gradient(x, dense_labels(place, n), weights, n, of_predicted_, of_true_positives_, d + place);
    }
    for (int64_t i = 0; !call_.dense && i < n; ++i) {
      if (uncounted<T>(call_, first + i)) continue;
      const S* const x = logits() + image * call_.image_stride + begin + i;
      for_listed(call_, first + i, [&](int64_t c) IMBALANCE_LAMBDA {
        const T d_x = slope(x + c * call_.class_stride, d_predicted_[c] + d_true_positives_[c]) * weight_of(first + i);
        store_number(d + (image * call_.classes + c) * call_.pixels + begin + i, d_x);
      });
    }
  }

  // ---------------------------------------------------------------- softmax

  struct RowSoftmax {
    T factor;      // 1 / the sum of exponentials
    T of_highest;  // the gradient of the highest logit's p
  };

  // Makes the exponentials of a row of n logits, relative to the highest. A row of nothing but -inf, or with inf or
  // NaN, makes them, or their sum, NaN.
  template <bool for_gradient>
  IMBALANCE_INLINE RowSoftmax exponentiate_row(const S* x, int64_t n) {
    Four<L> highest(-kInfinity), of_highest(0), total(0);
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
      const L logit = load_pack<L>(whole, x + i, m, -kInfinity);
      if constexpr (for_gradient) {
        of_highest.of[a] = M::select(M::less(highest.of[a], logit), L::load(of_p_ + i), of_highest.of[a]);
      }
      highest.of[a] = maximum(highest.of[a], logit);
    });
    const L shift(highest.highest());
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
      const L exponential = M::exp_nonpositive(load_pack<L>(whole, x + i, m, -kInfinity) - shift);
      exponential.store(exponentials_ + i);
      total.of[a] = total.of[a] + exponential;
    });
    for (int a = 0; for_gradient && a < 4; ++a) {
      of_highest.of[a] = M::select(M::equal(highest.of[a], shift), of_highest.of[a], -M::infinity());
    }
    return {1 / total.sum(), of_highest.highest()};
  }

  // Makes the probabilities of a row of n logits, in place of its exponentials.
  void make_probabilities(const S* x, int64_t n) {
    const L factor(exponentiate_row<false>(x, n).factor);
    for_packs<L>(whole_packs<L>(n), [&](auto, int64_t i, int64_t, int) IMBALANCE_LAMBDA {
      (L::load(exponentials_ + i) * factor).store(exponentials_ + i);
    });
  }

  // The same of n pixels, class by class: exponentials, and in factors_ 1 / their sums.
  template <bool for_gradient>
  void exponentiate_pixels(const S* x, int64_t n) {
    const int64_t whole_run = whole_packs<L>(n), stride = tiling_.run_stride();
    for (int64_t i = 0; i < whole_run; ++i) highest_[i] = -kInfinity;
    for (int64_t i = 0; i < whole_run; ++i) of_highest_[i] = factors_[i] = 0;
    for (int64_t c = 0; c < call_.classes; ++c) {
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
        const L logit = load_pack<L>(whole, x + c * call_.class_stride + i, m, T(0)), highest = L::load(highest_ + i);
        if constexpr (for_gradient) {
          const L of_p = L::load(of_p_ + c * stride + i), of_highest = L::load(of_highest_ + i);
          M::select(M::less(highest, logit), of_p, of_highest).store(of_highest_ + i);
        }
        maximum(highest, logit).store(highest_ + i);
        logit.store(exponentials_ + c * stride + i);
      });
    }
    for (int64_t c = 0; c < call_.classes; ++c) {
      T* const exponentials = exponentials_ + c * stride;
      for_packs<L>(whole_run, [&](auto, int64_t i, int64_t, int) IMBALANCE_LAMBDA {
        const L exponential = M::exp_nonpositive(L::load(exponentials + i) - L::load(highest_ + i));
        exponential.store(exponentials + i);
        (L::load(factors_ + i) + exponential).store(factors_ + i);
      });
    }
    for (int64_t i = 0; i < whole_run; i += L::count) (L(T(1)) / L::load(factors_ + i)).store(factors_ + i);
  }

  // Of one class: g beside its exponentials as it is where no label is.
  void begin_of_p(int64_t c) {
    if (tiling_.side_by_side > 0) {
      of_p_[c] = d_predicted_[c];
      return;
    }
    const int64_t stride = tiling_.run_stride();
    for (int64_t i = 0; i < stride; ++i) of_p_[c * stride + i] = d_predicted_[c];
  }

  // body(g's place) of each listed label of a row, whose classes' places are `stride` apart.
  IMBALANCE_INLINE void set_listed(int64_t row, T* of_p, int64_t stride, bool is_labelled) const {
    for_listed(call_, row, [&](int64_t c) IMBALANCE_LAMBDA {
      of_p[c * stride] = is_labelled ? d_predicted_[c] + d_true_positives_[c] : d_predicted_[c];
    });
  }

  // g of n dense labels, where their positives' part counts for nothing without a label, whatever it is.
  IMBALANCE_INLINE L of_dense(L predicted, L true_positives, L label) const {
    return predicted + M::select(M::equal(label, L(T(0))), L(T(0)), label * true_positives);
  }

  void softmax_row_gradient(int64_t row) {
    const int64_t n = call_.classes;
    S* const d = d_logits() + row * n;
    if (uncounted<T>(call_, row)) {
      std::memset(static_cast<void*>(d), 0, static_cast<std::size_t>(n) * sizeof(S));
      return;
    }
    if (const T* const y = dense_labels(row * n, n)) {
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
        const auto load = [&](const T* from) IMBALANCE_LAMBDA { return load_pack<L>(whole, from + i, m, T(0)); };
        of_dense(load(d_predicted_), load(d_true_positives_), load(y)).store(of_p_ + i);
      });
    } else {
      set_listed(row, of_p_, 1, true);
    }
    const RowSoftmax softmax = exponentiate_row<true>(logits() + row * call_.image_stride, n);
    const L reference(softmax.of_highest);
    Four<L> dots(0);
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
      const L relative = load_pack<L>(whole, of_p_ + i, m, T(0)) - reference;
      dots.of[a] = dots.of[a] + L::load(exponentials_ + i) * relative;
    });
    const L dot(dots.sum() * softmax.factor), times(softmax.factor * weight_of(row));
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
      const L relative = load_pack<L>(whole, of_p_ + i, m, T(0)) - reference;
      store_pack(whole, d + i, m, times * L::load(exponentials_ + i) * (relative - dot));
    });
    if (!call_.dense) set_listed(row, of_p_, 1, false);
  }

  void softmax_pixels_gradient(int64_t image, int64_t begin, int64_t n) {
    const int64_t first = image * call_.pixels + begin, whole_run = whole_packs<L>(n), stride = tiling_.run_stride();
    const auto place_of = [&](int64_t c) { return (image * call_.classes + c) * call_.pixels + begin; };
    const T* const weights = stage_weights(first, n, 1);
    for (int64_t c = 0; call_.dense && c < call_.classes; ++c) {
      const T* const y = dense_labels(place_of(c), n);
      const L predicted(d_predicted_[c]), true_positives(d_true_positives_[c]);
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
        of_dense(predicted, true_positives, load_pack<L>(whole, y + i, m, T(0))).store(of_p_ + c * stride + i);
      });
    }
    for (int64_t i = 0; !call_.dense && i < n; ++i) set_listed(first + i, of_p_ + i, stride, true);
    exponentiate_pixels<true>(logits() + image * call_.image_stride + begin, n);
    for (int64_t i = 0; i < whole_run; ++i) dots_[i] = 0;
    for (int64_t c = 0; c < call_.classes; ++c) {
      for_packs<L>(whole_run, [&](auto, int64_t i, int64_t, int) IMBALANCE_LAMBDA {
        const L relative = L::load(of_p_ + c * stride + i) - L::load(of_highest_ + i);
        (L::load(dots_ + i) + L::load(exponentials_ + c * stride + i) * relative).store(dots_ + i);
      });
    }
    for (int64_t i = 0; i < whole_run; ++i) dots_[i] *= factors_[i];
    for (int64_t i = 0; weights && i < n; ++i) factors_[i] = weights[i] == 0 ? 0 : weights[i] * factors_[i];
    for (int64_t c = 0; c < call_.classes; ++c) {
      S* const d = d_logits() + place_of(c);
      with_constant(weights != nullptr, [&](auto weighted) IMBALANCE_LAMBDA {
        for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
          const L relative = L::load(of_p_ + c * stride + i) - L::load(of_highest_ + i), factor = L::load(factors_ + i);
          L d_x = factor * L::load(exponentials_ + c * stride + i) * (relative - L::load(dots_ + i));
          if constexpr (weighted) d_x = M::select(M::equal(factor, L(T(0))), L(T(0)), d_x);
          store_pack(whole, d + i, m, d_x);
        });
      });
    }
    for (int64_t i = 0; !call_.dense && i < n; ++i) set_listed(first + i, of_p_ + i, stride, false);
  }
};

template <class S, int Bytes>
void column_sums_tiles(const ColumnSumsArguments& call, int64_t first, int64_t last, void* scratch, double* sums) {
  ColumnTiles<S, Bytes> tiles(call, scratch);
  for (int64_t tile = first; tile < last; ++tile) tiles.sum(tile, sums);
}

template <class S, int Bytes>
void column_gradient_tiles(const ColumnSumsArguments& call, int64_t first, int64_t last, void* scratch) {
  ColumnTiles<S, Bytes> tiles(call, scratch);
  for (int64_t tile = first; tile < last; ++tile) tiles.gradient(tile);
}

std::size_t column_scratch_bytes(const ColumnSumsArguments& call) {
  const std::size_t of_number = call.dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  return static_cast<std::size_t>(ColumnTiles<double, 16>::scratch_numbers(call)) * of_number;
}

std::int64_t column_tile_count(const ColumnSumsArguments& call) { return ColumnTiling(call).tiles(); }
std::int64_t column_part_count(const ColumnSumsArguments& call) { return ColumnTiling(call).parts(); }

template <int Bytes>
constexpr ColumnSumsKernels column_sums_kernels_of() {
  return {
      column_scratch_bytes,
      column_tile_count,
      column_part_count,
      {column_sums_tiles<float, Bytes>, column_sums_tiles<double, Bytes>, column_sums_tiles<BFloat16, Bytes>,
       column_sums_tiles<Float16, Bytes>},
      {column_gradient_tiles<float, Bytes>, column_gradient_tiles<double, Bytes>,
       column_gradient_tiles<BFloat16, Bytes>, column_gradient_tiles<Float16, Bytes>},
  };
}

}  // namespace
}  // namespace imbalance::cpu
