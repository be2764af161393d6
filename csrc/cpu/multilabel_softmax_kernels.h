// multilabel_softmax on CPU: log(1 + sum_neg exp(z)) + log(1 + sum_pos exp(-z)) of rows, and its gradient, in one trip.
//
// A row is read from memory once. Its logits, and then their exponentials, stay in a scratch row, so that the gradient
// costs one multiplication per element. Positives that are listed are taken out of the scratch row by their index
// before anything is summed, and are summed on their own; with dense labels every logit takes the side of its label.
// Labels between 0 and 1 take both, in a loop of its own for the rows that have some. Channels-first logits have a way
// of their own (multilabel_softmax_planes.h).
//
// One source for AVX-512, AVX2, SSE2 and NEON: multilabel_softmax_<instruction set>.cpp includes it. A row's bits
// depend on its own values, its width and the instruction set alone.
#pragma once

#include "labels.h"
#include "multilabel_softmax.h"
#include "multilabel_softmax_planes.h"
#include "multilabel_softmax_sides.h"

namespace imbalance::cpu {
namespace {

// One side of the loss: log(1 + sum), of a sum that is relative to the shift, and what its gradient divides by.
template <class T>
struct Side {
  T value;
  T total;

  IMBALANCE_INLINE Side(T highest, T sum) {
    const T shift = multilabel_shift(highest);
    total = shift == 0 ? 1 + sum : std::exp(-shift) + sum;
    value = shift == 0 ? std::log1p(sum) : shift + std::log(total);
  }
};

template <class S, int Bytes>
class MultilabelRows {
 public:
  using T = typename AccumulateOf<S>::type;
  using L = Lanes<T, Bytes>;
  using M = Math<L>;
  using Two = TwoSides<L>;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  // Numbers of scratch memory: two rows, the listed classes and their logits.
  static int64_t scratch_numbers(const MultilabelArguments& call) {
    return 2 * pad(call.classes) + 2 * pad(longest_list(call));
  }

  MultilabelRows(const MultilabelLossArguments& arguments, void* memory)
      : call_(arguments.call),
        inverse_divisor_(static_cast<T>(arguments.inverse_divisor)),
        bias_(static_cast<const T*>(call_.bias)),
        row_(static_cast<T*>(memory)),
        second_(row_ + pad(call_.classes)),
        listed_(second_ + pad(call_.classes)),
        classes_(reinterpret_cast<int64_t*>(listed_ + pad(longest_list(call_)))) {}

  void operator()(int64_t row) {
    const int64_t n = call_.classes;
    S* const d_row = call_.d_logits ? static_cast<S*>(call_.d_logits) + row * call_.gradient_image_stride : nullptr;
    T* const loss = call_.losses ? static_cast<T*>(call_.losses) + row : nullptr;
    if (uncounted<T>(call_, row)) {
      if (loss) *loss = 0;
      if (d_row) std::memset(d_row, 0, static_cast<std::size_t>(n) * sizeof(S));
      return;
    }
    const S* const x = static_cast<const S*>(call_.logits) + row * call_.image_stride;
    const T weight = call_.sample_weight ? static_cast<const T*>(call_.sample_weight)[row] : T(1);
    const T upstream = call_.upstream ? static_cast<const T*>(call_.upstream)[row] : T(1);
    const T scale = weight * inverse_divisor_ * upstream;
    T value;
    if (!call_.dense) {
      value = sparse(row, x, n, scale, d_row);
    } else {
      const DenseLabels<T> labels = stage_dense<S, L>(call_, row * n, n, second_);
      value = labels.are_soft ? soft(labels.values, x, n, scale, d_row) : hard(labels.values, x, n, scale, d_row);
    }
    if (loss) *loss = weight * value;
  }

 private:
  const MultilabelArguments& call_;
  const T inverse_divisor_;
  const T* const bias_;
  T* const row_;            // (C) padded
  T* const second_;         // (C) padded
  T* const listed_;         // exponents of the listed classes, padded
  int64_t* const classes_;  // which these are

  static int64_t longest_list(const MultilabelArguments& call) { return call.lists ? call.list_length : 1; }

  // The highest exponents of both sides.
  class Highest {
   public:
    IMBALANCE_INLINE Highest() : negatives_(-kInfinity), positives_(-kInfinity) {}
    IMBALANCE_INLINE void raise(int a, const Two& exponents) {
      negatives_.of[a] = maximum(negatives_.of[a], exponents.negative);
      positives_.of[a] = maximum(positives_.of[a], exponents.positive);
    }
    IMBALANCE_INLINE T negative() const { return negatives_.highest(); }
    IMBALANCE_INLINE T positive() const { return positives_.highest(); }
    IMBALANCE_INLINE Two shifts() const { return {L(multilabel_shift(negative())), L(multilabel_shift(positive()))}; }

   private:
    Four<L> negatives_, positives_;
  };

  // z of a pack; -inf where the raw logit is, and beyond the row.
  template <class Whole>
  IMBALANCE_INLINE L effective(Whole whole, const S* x, int64_t i, int64_t m) const {
    const L raw = load_pack<L>(whole, x + i, m, -kInfinity);
    if (!bias_) return raw;
    return M::select(M::equal(raw, -M::infinity()), raw, raw + load_pack<L>(whole, bias_ + i, m, T(0)));
  }

  // exp(u - shift) in place of n exponents u, padded with -inf; returns their sum.
  IMBALANCE_INLINE T exponentiate(T* u, int64_t n, T highest) const {
    const L shift(multilabel_shift(highest));
    Four<L> sum(0);
    with_constant(highest == kInfinity, [&](auto infinite) IMBALANCE_LAMBDA {
      for_packs<L>(whole_packs<L>(n), [&](auto, int64_t i, int64_t, int a) IMBALANCE_LAMBDA {
        const L e = exponential(infinite, L::load(u + i) - shift);
        e.store(u + i);
        sum.of[a] = sum.of[a] + e;
      });
    });
    return sum.sum();
  }

  static IMBALANCE_INLINE T highest_of(const T* u, int64_t n) {
    Four<L> highest(-kInfinity);
    for_packs<L>(whole_packs<L>(n), [&](auto, int64_t i, int64_t, int a)
                                        IMBALANCE_LAMBDA { highest.of[a] = maximum(highest.of[a], L::load(u + i)); });
    return highest.highest();
  }

  // Labels that are listed: the row is of negatives, but for those.
  IMBALANCE_INLINE T sparse(int64_t row, const S* x, int64_t n, T scale, S* d_row) {
    Four<L> highest(-kInfinity);
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
      const L z = effective(whole, x, i, m);
      highest.of[a] = maximum(highest.of[a], z);
      z.store(row_ + i);
    });
    T of_row = highest.highest();
    int64_t count = 0;
    T of_listed = -kInfinity, lowest = kInfinity;
    for_listed(call_, row, [&](int64_t c) IMBALANCE_LAMBDA {
      const T z = row_[c];
      if (z == -kInfinity) return;  // masked
      row_[c] = -kInfinity;
      classes_[count] = c;
      listed_[count++] = -z;
      of_listed = -z > of_listed ? -z : of_listed;
      lowest = -z < lowest ? -z : lowest;
    });
    if (of_row > kNoShift<T> && -lowest >= of_row) of_row = highest_of(row_, n);
    const Side<T> negative(of_row, exponentiate(row_, n, of_row));
    for (int64_t k = count; k < whole_packs<L>(count); ++k) listed_[k] = -kInfinity;
    const Side<T> positive(of_listed, exponentiate(listed_, count, of_listed));
    if (d_row) {
      const L factor(scale / negative.total);
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int)
                          IMBALANCE_LAMBDA { store_pack(whole, d_row + i, m, L::load(row_ + i) * factor); });
      const T of_positive = -scale / positive.total;
      for (int64_t k = 0; k < count; ++k) store_number(d_row + classes_[k], listed_[k] * of_positive);
    }
    return negative.value + positive.value;
  }

  // body(i, a, z, y) for each pack of a row with dense labels.
  template <class Body>
  IMBALANCE_INLINE void for_labelled(const T* y, const S* x, int64_t n, Body body) const {
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
      body(i, a, effective(whole, x, i, m), load_pack<L>(whole, y + i, m, T(0)));
    });
  }

  // Dense labels of 0 and 1, which may lie in second_.
  IMBALANCE_INLINE T hard(const T* y, const S* x, int64_t n, T scale, S* d_row) {
    Highest highest;
    for_labelled(y, x, n, [&](int64_t i, int a, L z, L label) IMBALANCE_LAMBDA {
      const auto is_positive = M::equal(label, L(T(1)));
      const L exponent = Two::hard_exponent(z, is_positive);
      highest.raise(a, Two::of_side(exponent, is_positive, -M::infinity()));
      exponent.store(row_ + i);
    });
    const Two shift = highest.shifts();
    Four<L> negatives(0), positives(0);
    with_constant(highest.negative() == kInfinity, [&](auto infinite) IMBALANCE_LAMBDA {
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
        const auto is_positive = M::equal(load_pack<L>(whole, y + i, m, T(0)), L(T(1)));
        const Two e = Two::hard(infinite, L::load(row_ + i), is_positive, shift);
        negatives.of[a] = negatives.of[a] + e.negative;
        positives.of[a] = positives.of[a] + e.positive;
        (e.negative - e.positive).store(row_ + i);  // one of them is 0
      });
    });
    const Side<T> negative(highest.negative(), negatives.sum()), positive(highest.positive(), positives.sum());
    if (d_row) {
      const L factor(scale / negative.total), of_positive(scale / positive.total), zero(T(0));
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
        const L e = L::load(row_ + i);
        store_pack(whole, d_row + i, m, e * M::select(M::less(e, zero), of_positive, factor));
      });
    }
    return negative.value + positive.value;
  }

  // Dense labels from 0 to 1, which may lie in second_: weights of both sides' exponentials.
  IMBALANCE_INLINE T soft(const T* y, const S* x, int64_t n, T scale, S* d_row) {
    Highest highest;
    for_labelled(y, x, n, [&](int64_t i, int a, L z, L label) IMBALANCE_LAMBDA {
      highest.raise(a, Two::soft_exponents(z, label));
      z.store(row_ + i);
    });
    const Two shift = highest.shifts();
    Four<L> negatives(0), positives(0);
    with_constant(highest.negative() == kInfinity, [&](auto infinite) IMBALANCE_LAMBDA {
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
        const L label = load_pack<L>(whole, y + i, m, T(0));
        const Two e = Two::soft(infinite, L::load(row_ + i), label, shift);
        negatives.of[a] = negatives.of[a] + e.negative;
        positives.of[a] = positives.of[a] + e.positive;
        e.negative.store(row_ + i);
        e.positive.store(second_ + i);
      });
    });
    const Side<T> negative(highest.negative(), negatives.sum()), positive(highest.positive(), positives.sum());
    if (d_row) {
      const L factor(scale / negative.total), factor_of_positives(scale / positive.total);
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
        const L d = L::load(row_ + i) * factor - L::load(second_ + i) * factor_of_positives;
        store_pack(whole, d_row + i, m, d);
      });
    }
    return negative.value + positive.value;
  }
};

bool is_of_planes(const MultilabelArguments& call) { return call.pixels > 0 && call.classes > 0; }

template <class S, int Bytes>
void multilabel_loss(const MultilabelLossArguments& arguments, int64_t first, int64_t last, void* scratch) {
  if (is_of_planes(arguments.call)) {
    MultilabelPlanes<S, Bytes>(arguments, scratch).run(first, last);
    return;
  }
  MultilabelRows<S, Bytes> rows(arguments, scratch);
  for (int64_t row = first; row < last; ++row) rows(row);
}

std::size_t multilabel_scratch_bytes(const MultilabelArguments& call) {
  if (is_of_planes(call)) {
    return call.dtype == Dtype::float64 ? MultilabelPlanes<double, 16>::scratch_bytes(call)
                                        : MultilabelPlanes<float, 16>::scratch_bytes(call);
  }
  // class indices are as wide as doubles
  return static_cast<std::size_t>(MultilabelRows<double, 16>::scratch_numbers(call)) * sizeof(double);
}

template <int Bytes>
constexpr MultilabelKernels multilabel_kernels_of() {
  return {
      multilabel_scratch_bytes,
      {multilabel_loss<float, Bytes>, multilabel_loss<double, Bytes>, multilabel_loss<BFloat16, Bytes>,
       multilabel_loss<Float16, Bytes>},
  };
}

}  // namespace
}  // namespace imbalance::cpu
