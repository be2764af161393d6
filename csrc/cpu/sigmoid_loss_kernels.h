// sigmoid_loss on CPU: value and gradient of every logit in one trip.
//
// Logits are taken in blocks that fit the L1 cache: whole rows, a piece of a wide row, or the pixels of one class. What
// stands beside a block's logits is staged first, as numbers: labels (never one-hot for more than a block), the weights
// of rows, and for rows that share a block the class vectors, repeated. One loop then does a block, of a code of its
// own for each objective. Nothing of the logits' size but the gradient is ever allocated.
//
// One source for AVX-512, AVX2, SSE2 and NEON: sigmoid_loss_<instruction set>.cpp includes it.
#pragma once

#include "../sigmoid_objectives.h"
#include "labels.h"
#include "packs.h"
#include "sigmoid_loss.h"

namespace imbalance::cpu {
namespace {

constexpr int64_t kSigmoidBlock = 2048;  // logits
constexpr int64_t kMostHalves = 16;      // exponents up to 8 are products

// As in the standard library, whose own must not be compiled for an instruction set (sigmoid_loss_avx2.cpp).
template <class T>
void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}
template <class T>
void copy(const T* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A class vector beside a block: a number for each of its logits, or one for all.
template <class T>
struct Beside {
  const T* values;
  T constant;

  template <class L, class Whole>
  IMBALANCE_INLINE L load(Whole whole, int64_t i, int64_t n) const {
    return values ? load_pack<L>(whole, values + i, n, T(0)) : L(constant);
  }
};

// Halves are widened before a block and rounded after it, so that the loops exist for two types and not for four.
template <class T>
struct Block {
  int64_t count;
  const T* logits;
  const T* labels;
  Beside<T> positive;
  Beside<T> negative;
  Beside<T> bias;
  Beside<T> parameter;  // the objective's first
  const T* weight;      // null: one
  const T* upstream;    // null: one
  T scale;              // of the gradient
  T* losses;            // null: their sum alone
  T* gradient;          // null: the losses alone
};

// ---------------------------------------------------------------- a block

template <class T, int Bytes, class Objective, bool soft>
double block_loss(const Block<T>& block, const void* erased) {
  using L = Lanes<T, Bytes>;
  using M = Math<L>;
  const Objective objective = *static_cast<const Objective*>(erased);
  const L zero(T(0)), one(T(1)), scale(block.scale);
  L sum = zero;
  // A pack has work enough to hide its latencies; packs side by side would not fit the registers.
  const auto each = [&](auto whole, int64_t i, int64_t n) IMBALANCE_LAMBDA {
    const L x = load_pack<L>(whole, block.logits + i, n, T(0)) + block.bias.template load<L>(whole, i, n);
    const L y = load_pack<L>(whole, block.labels + i, n, T(0));
    const L parameter = block.parameter.template load<L>(whole, i, n);
    const L of_positive = block.positive.template load<L>(whole, i, n);
    const L of_negative = block.negative.template load<L>(whole, i, n);
    L value, slope;
    if constexpr (soft) {
      const Sides<L> sides = objective.soft(Truth<L>(x), y, parameter);
      const L positive = y * of_positive, negative = (one - y) * of_negative;
      value = share_of(positive, sides.positive.value) + share_of(negative, sides.negative.value);
      slope = share_of(positive, sides.positive.slope) + share_of(negative, sides.negative.slope);
    } else {
      const auto positive = M::equal(y, one);
      const ValueAndSlope<L> cost = objective.hard(Truth<L>(M::select(positive, x, -x)), positive, parameter);
      const L weight = M::select(positive, of_positive, of_negative);
      value = weight * cost.value;
      slope = M::select(positive, weight, -weight) * cost.slope;
    }
    slope = slope * scale;  // which is infinite where nothing counts
    if (block.weight) {
      const L weight = load_pack<L>(whole, block.weight + i, n, T(0));
      value = M::select(M::equal(weight, zero), zero, weight * value);
      slope = M::select(M::equal(weight, zero), zero, weight * slope);
    }
    if (block.losses) store_pack(whole, block.losses + i, n, value);
    if (block.gradient) {
      if (block.upstream) slope = slope * load_pack<L>(whole, block.upstream + i, n, T(0));
      store_pack(whole, block.gradient + i, n, slope);
    }
    if constexpr (!whole) {
      const auto inside = L::iota() < static_cast<typename L::Integer>(n) - typename L::Mask{};
      value = M::select(inside, value, zero);
    }
    sum = sum + value;
  };
  int64_t i = 0;
  for (; i + L::count <= block.count; i += L::count) each(std::true_type{}, i, L::count);
  if (i < block.count) each(std::false_type{}, i, block.count - i);
  return sum_of(sum);
}

// The loops of an objective, for hard labels and for soft ones.
template <class T>
struct BlockLoss {
  double (*hard)(const Block<T>&, const void* objective);
  double (*soft)(const Block<T>&, const void* objective);
};

// Exponents that are products have loops of their own.
struct ProductExponents {
  static IMBALANCE_INLINE bool is_product(double exponent) {
    return exponent * 2 == std::floor(exponent * 2) && exponent * 2 <= kMostHalves;
  }
  static IMBALANCE_INLINE HalfExponent as_product(double exponent) { return {static_cast<int>(exponent * 2)}; }

  template <class Body>
  static IMBALANCE_INLINE void choose(double gamma, const Body& body) {
    if (is_product(gamma)) return body(as_product(gamma));
    return body(gamma);
  }
  template <class Body>
  static IMBALANCE_INLINE void choose(double first, double second, const Body& body) {
    if (is_product(first) && is_product(second)) return body(as_product(first), as_product(second));
    return body(first, second);
  }
};

// ---------------------------------------------------------------- tiles

// How the logits are cut: into whole rows that share a block, pieces of one row, or pixels of one image, class by
// class.
struct Tiling {
  int64_t rows;    // of a block; 0: pieces, or pixels
  int64_t pieces;  // of a row, or of an image's pixels
  int64_t tiles;

  explicit Tiling(const SigmoidArguments& call) {
    const auto blocks = [](int64_t n) { return (n + kSigmoidBlock - 1) / kSigmoidBlock; };
    const bool dense_rows =
        call.image_stride == call.classes && (!call.d_logits || call.gradient_image_stride == call.classes);
    rows = 0;
    pieces = call.pixels > 0 ? blocks(call.pixels) : blocks(call.classes);
    tiles = call.images * pieces;
    if (call.pixels == 0 && call.classes > 0 && 2 * call.classes <= kSigmoidBlock && (dense_rows || call.images == 1)) {
      rows = kSigmoidBlock / call.classes;
      tiles = (call.images + rows - 1) / rows;
    }
    if (call.classes == 0) tiles = 0;
  }
};

template <class S, int Bytes>
class Tiles {
 public:
  using T = typename AccumulateOf<S>::type;
  using L = Lanes<T, Bytes>;

  static constexpr bool kIsHalf = !std::is_same_v<S, T>;
  static constexpr Beside<T> Block<T>::* kVectors[] = {&Block<T>::positive, &Block<T>::negative, &Block<T>::bias,
                                                       &Block<T>::parameter};
  static constexpr int64_t kArrays = 8;
  static int64_t scratch_numbers() { return kArrays * kSigmoidBlock; }

  Tiles(const SigmoidLossArguments& arguments, void* scratch, const BlockLoss<T>& loss, const void* objective)
      : call_(arguments.call), tiling_(arguments.call), loss_(loss), objective_(objective) {
    T* const memory = static_cast<T*>(scratch);
    labels_ = memory;
    weights_ = memory + kSigmoidBlock;
    pixel_labels_ = memory + 2 * kSigmoidBlock;
    widened_ = memory + 7 * kSigmoidBlock;
    fill(labels_, kSigmoidBlock, T(0));
    const auto vector = [&](int index, const void* values, double constant) {
      Beside<T> beside{static_cast<const T*>(values), static_cast<T>(constant)};
      if (values && tiling_.rows > 0) {  // repeated, for the rows of a block
        T* const repeated = memory + (3 + index) * kSigmoidBlock;
        for (int64_t i = 0; i < tiling_.rows; ++i) {
          copy(beside.values, call_.classes, repeated + i * call_.classes);
        }
        beside.values = repeated;
      }
      return beside;
    };
    block_.positive = vector(0, call_.positive_weight, call_.positive);
    block_.negative = vector(1, call_.negative_weight, call_.negative);
    block_.bias = vector(2, call_.bias, 0);
    block_.parameter = vector(3, call_.class_parameter, call_.objective_parameters[0]);
    block_.scale = static_cast<T>(arguments.inverse_divisor);
  }

  // The sum of a tile's losses.
  double operator()(int64_t tile) {
    if (tiling_.rows > 0) return rows(tile * tiling_.rows);
    const int64_t image = tile / tiling_.pieces, first = tile % tiling_.pieces * kSigmoidBlock;
    return call_.pixels > 0 ? pixels(image, first) : piece(image, first);
  }

 private:
  const SigmoidArguments& call_;
  const Tiling tiling_;
  const BlockLoss<T> loss_;
  const void* const objective_;
  T* labels_;        // of a block; 0 between blocks where labels are sparse
  T* weights_;       // of a block
  T* pixel_labels_;  // classes of an image's pixels, as numbers
  T* widened_;       // halves of a block, and then their gradient
  Block<T> block_{};

  bool is_dense() const { return call_.dense != nullptr; }
  bool ignored(int64_t row) const { return call_.labels && call_.labels[row] == call_.ignore_index; }

  // Sets what lies where the logits do: `at` is a block's place in them, `place` in what is contiguous.
  double run(int64_t place, int64_t at, int64_t gradient_at, int64_t count) {
    block_.count = count;
    const S* const logits = static_cast<const S*>(call_.logits) + at;
    S* const gradient = call_.d_logits ? static_cast<S*>(call_.d_logits) + gradient_at : nullptr;
    if constexpr (kIsHalf) {
      widen(logits, count, widened_);
      block_.logits = widened_;
      block_.gradient = gradient ? widened_ : nullptr;
    } else {
      block_.logits = logits;
      block_.gradient = gradient;
    }
    block_.upstream = call_.upstream ? static_cast<const T*>(call_.upstream) + place : nullptr;
    block_.losses = call_.losses ? static_cast<T*>(call_.losses) + place : nullptr;
    bool soft = false;
    block_.labels = labels_;
    if (is_dense()) soft = stage_dense(place, count);
    const double sum = (soft ? loss_.soft : loss_.hard)(block_, objective_);
    if (kIsHalf && gradient) {
      for_packs<L>(count, [&](auto whole, int64_t i, int64_t n, int) IMBALANCE_LAMBDA {
        store_pack(whole, gradient + i, n, load_pack<L>(whole, widened_ + i, n, T(0)));
      });
    }
    return sum;
  }

  static void widen(const S* from, int64_t count, T* to) {
    for_packs<L>(count, [&](auto whole, int64_t i, int64_t n, int)
                            IMBALANCE_LAMBDA { store_pack(whole, to + i, n, load_pack<L>(whole, from + i, n, T(0))); });
  }

  // Whole rows.
  double rows(int64_t first_row) {
    const int64_t count = smaller(tiling_.rows, call_.images - first_row);
    const auto each_label = [&](T value) {
      if (is_dense()) return;
      for (int64_t row = 0; row < count; ++row)
        set_labels(first_row + row, 0, call_.classes, labels_ + row * call_.classes, value);
    };
    each_label(T(1));
    const int64_t place = first_row * call_.classes;
    stage_weights(first_row, count, call_.classes, place);
    const double sum =
        run(place, first_row * call_.image_stride, first_row * call_.gradient_image_stride, count * call_.classes);
    each_label(T(0));
    return sum;
  }

  // A piece of a row.
  double piece(int64_t row, int64_t first) {
    const int64_t count = smaller(kSigmoidBlock, call_.classes - first);
    const Block<T> whole = block_;
    for (Beside<T> Block<T>::* const vector : kVectors) {
      if ((block_.*vector).values) (block_.*vector).values += first;
    }
    if (!is_dense()) set_labels(row, first, count, labels_, T(1));
    const int64_t place = row * call_.classes + first;
    stage_weights(row, 1, count, place);
    const double sum = run(place, row * call_.image_stride + first, row * call_.gradient_image_stride + first, count);
    if (!is_dense()) set_labels(row, first, count, labels_, T(0));
    block_ = whole;
    return sum;
  }

  // Some pixels of an image, one class after the other.
  double pixels(int64_t image, int64_t first) {
    const int64_t count = smaller(kSigmoidBlock, call_.pixels - first), first_row = image * call_.pixels + first;
    const Block<T> whole = block_;
    if (call_.labels) {
      for (int64_t i = 0; i < count; ++i) pixel_labels_[i] = static_cast<T>(call_.labels[first_row + i]);
    }
    if (!call_.weight_of_logits) stage_weights_of_pixels(first_row, count, nullptr);
    double sum = 0;
    for (int64_t c = 0; c < call_.classes; ++c) {
      for (Beside<T> Block<T>::* const vector : kVectors) {
        const Beside<T>& of_classes = whole.*vector;
        block_.*vector = {nullptr, of_classes.values ? of_classes.values[c] : of_classes.constant};
      }
      const int64_t place = (image * call_.classes + c) * call_.pixels + first;
      if (call_.labels) {
        for (int64_t i = 0; i < count; ++i) labels_[i] = pixel_labels_[i] == static_cast<T>(c) ? T(1) : T(0);
      } else if (call_.lists) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t* const list = call_.lists + (first_row + i) * call_.list_length;
          labels_[i] = T(0);
          for (int64_t k = 0; k < call_.list_length; ++k) {
            if (list[k] == c && c != call_.ignore_index) labels_[i] = T(1);
          }
        }
      }
      if (call_.weight_of_logits)
        stage_weights_of_pixels(first_row, count, static_cast<const T*>(call_.sample_weight) + place);
      sum += run(place, image * call_.image_stride + c * call_.class_stride + first,
                 image * call_.gradient_image_stride + c * call_.gradient_class_stride + first, count);
    }
    block_ = whole;
    return sum;
  }

  // Writes `value` where a row's target names one of `count` classes from `first` on.
  void set_labels(int64_t row, int64_t first, int64_t count, T* labels, T value) const {
    const int64_t* list = call_.labels ? call_.labels + row : call_.lists + row * call_.list_length;
    for (int64_t k = 0; k < (call_.labels ? 1 : call_.list_length); ++k) {
      const int64_t c = list[k] - first;
      if (list[k] != call_.ignore_index && c >= 0 && c < count) labels[c] = value;
    }
  }

  // Returns whether a label is neither 0 nor 1.
  bool stage_dense(int64_t place, int64_t count) {
    const DenseLabels<T> labels = cpu::stage_dense<S, L>(call_, place, count, labels_);
    block_.labels = labels.values;
    return labels.are_soft;
  }

  // The weights of `count` rows of `width` logits each, from `place` on; of an ignored row 0.
  void stage_weights(int64_t first_row, int64_t count, int64_t width, int64_t place) {
    bool any_ignored = false;
    for (int64_t row = 0; call_.labels && row < count; ++row) any_ignored |= ignored(first_row + row);
    const T* const given = static_cast<const T*>(call_.sample_weight);
    block_.weight = given && call_.weight_of_logits ? given + place : nullptr;
    if (!any_ignored && (block_.weight || !given)) return;
    for (int64_t row = 0; row < count; ++row) {
      T* const to = weights_ + row * width;
      if (ignored(first_row + row)) {
        fill(to, width, T(0));
      } else if (given && call_.weight_of_logits) {
        copy(given + place + row * width, width, to);
      } else {
        fill(to, width, given ? given[first_row + row] : T(1));
      }
    }
    block_.weight = weights_;
  }

  // The same of pixels: each its own weight, or each logit's, from `of_logits` on.
  void stage_weights_of_pixels(int64_t first_row, int64_t count, const T* of_logits) {
    bool any_ignored = false;
    for (int64_t i = 0; call_.labels && i < count; ++i) any_ignored |= ignored(first_row + i);
    const T* const given = of_logits             ? of_logits
                           : call_.sample_weight ? static_cast<const T*>(call_.sample_weight) + first_row
                                                 : nullptr;
    block_.weight = given;
    if (!any_ignored) return;
    for (int64_t i = 0; i < count; ++i) weights_[i] = ignored(first_row + i) ? T(0) : given ? given[i] : T(1);
    block_.weight = weights_;
  }
};

template <class S, int Bytes>
void sigmoid_tiles(const SigmoidLossArguments& arguments, int64_t first, int64_t last, void* scratch, double* sums) {
  with_objective<ProductExponents>(arguments.call, [&](const auto& objective) {
    using Objective = std::decay_t<decltype(objective)>;
    using T = typename AccumulateOf<S>::type;
    const BlockLoss<T> loss{block_loss<T, Bytes, Objective, false>, block_loss<T, Bytes, Objective, true>};
    Tiles<S, Bytes> tiles(arguments, scratch, loss, &objective);
    for (int64_t tile = first; tile < last; ++tile) sums[tile] = tiles(tile);
  });
}

std::size_t sigmoid_scratch_bytes(const SigmoidArguments& call) {
  const std::size_t number = call.dtype == Dtype::float64 ? 8 : 4;
  return static_cast<std::size_t>(Tiles<float, 16>::scratch_numbers()) * number;
}

std::int64_t sigmoid_tile_count(const SigmoidArguments& call) { return Tiling(call).tiles; }

template <int Bytes>
constexpr SigmoidKernels sigmoid_kernels_of() {
  return {
      sigmoid_scratch_bytes,
      sigmoid_tile_count,
      {sigmoid_tiles<float, Bytes>, sigmoid_tiles<double, Bytes>, sigmoid_tiles<BFloat16, Bytes>,
       sigmoid_tiles<Float16, Bytes>},
  };
}

}  // namespace
}  // namespace imbalance::cpu
