// multilabel_softmax on CPU: log(1 + sum_neg exp(z)) + log(1 + sum_pos exp(-z)) of rows, and its gradient, in one trip.
//
// A row is read from memory once. Its logits, and then their exponentials, stay in a scratch row, so that the gradient
// costs one multiplication per element. Positives that are listed are taken out of the scratch row by their index
// before anything is summed, and are summed on their own; with dense labels every logit takes the side of its label.
// Labels between 0 and 1 take both, in a loop of its own for the rows that have some.
//
// The shift of a sum is 0 where no logit is so large that it is needed: then 1 + the sum goes through log1p, and small
// sums keep their digits. Elsewhere it is the highest exponent, 0 among them, so that a sum with its 1 is never below
// 1 and nothing divides by 0.
//
// One source for AVX-512, AVX2, SSE2 and NEON: multilabel_softmax_<instruction set>.cpp includes it. A row's bits
// depend on its own values, its width and the instruction set alone.
#pragma once

#include "labels.h"
#include "multilabel_softmax.h"

namespace imbalance::cpu {
namespace {

constexpr int kNoShift = 16;  // exponents up to here are summed as they are

// One side of the loss: log(1 + sum), of a sum that is relative to `shift`, and what its gradient divides by.
template <class T>
struct Side {
  T value;
  T total;

  IMBALANCE_INLINE Side(T shift, T sum) {
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
    S* const d_row = call_.d_logits ? static_cast<S*>(call_.d_logits) + row * call_.gradient_stride : nullptr;
    T* const loss = call_.losses ? static_cast<T*>(call_.losses) + row : nullptr;
    if (uncounted<T>(call_, row)) {
      if (loss) *loss = 0;
      if (d_row) std::memset(d_row, 0, static_cast<std::size_t>(n) * sizeof(S));
      return;
    }
    const S* const x = static_cast<const S*>(call_.logits) + row * call_.row_stride;
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

  // z of a pack; -inf where the raw logit is, and beyond the row.
  template <class Whole>
  IMBALANCE_INLINE L effective(Whole whole, const S* x, int64_t i, int64_t m) const {
    const L raw = load_pack<L>(whole, x + i, m, -kInfinity);
    if (!bias_) return raw;
    return M::select(M::equal(raw, -M::infinity()), raw, raw + load_pack<L>(whole, bias_ + i, m, T(0)));
  }

  // exp(u - shift) in place of n exponents u, padded with -inf; returns their sum.
  IMBALANCE_INLINE T exponentiate(T* u, int64_t n, T shift) const {
    Four<L> sum(0);
    for_packs<L>(whole_packs<L>(n), [&](auto, int64_t i, int64_t, int a) IMBALANCE_LAMBDA {
      const L exponential = M::exp_nonpositive(L::load(u + i) - L(shift));
      exponential.store(u + i);
      sum.of[a] = sum.of[a] + exponential;
    });
    return sum.sum();
  }

  static IMBALANCE_INLINE T highest_of(const T* u, int64_t n) {
    Four<L> highest(-kInfinity);
    for_packs<L>(whole_packs<L>(n), [&](auto, int64_t i, int64_t, int a)
                                        IMBALANCE_LAMBDA { highest.of[a] = maximum(highest.of[a], L::load(u + i)); });
    return highest.highest();
  }

  static IMBALANCE_INLINE T shift_of(T highest) { return highest > kNoShift ? highest : T(0); }

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
    if (of_row > kNoShift && -lowest >= of_row) of_row = highest_of(row_, n);
    const T shift = shift_of(of_row), shift_of_listed = shift_of(of_listed);
    const Side<T> negative(shift, exponentiate(row_, n, shift));
    for (int64_t k = count; k < whole_packs<L>(count); ++k) listed_[k] = -kInfinity;
    const Side<T> positive(shift_of_listed, exponentiate(listed_, count, shift_of_listed));
    if (d_row) {
      const L factor(scale / negative.total);
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int)
                          IMBALANCE_LAMBDA { store_pack(whole, d_row + i, m, L::load(row_ + i) * factor); });
      const T of_positive = -scale / positive.total;
      for (int64_t k = 0; k < count; ++k) store_number(d_row + classes_[k], listed_[k] * of_positive);
    }
    return negative.value + positive.value;
  }

  // Dense labels of 0 and 1, which may lie in second_.
  IMBALANCE_INLINE T hard(const T* y, const S* x, int64_t n, T scale, S* d_row) {
    const L one(T(1)), zero(T(0));
    Four<L> of_negatives(-kInfinity), of_positives(-kInfinity);
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
      const L z = effective(whole, x, i, m);
      const auto is_positive = M::equal(load_pack<L>(whole, y + i, m, T(0)), one);
      const auto masked = M::equal(z, -M::infinity());
      of_negatives.of[a] = maximum(of_negatives.of[a], M::select(is_positive, -M::infinity(), z));
      of_positives.of[a] = maximum(of_positives.of[a], M::select(is_positive & ~masked, -z, -M::infinity()));
      z.store(row_ + i);
    });
    const T shift = shift_of(of_negatives.highest()), shift_of_positives = shift_of(of_positives.highest());
    Four<L> negatives(0), positives(0);
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
      const L z = L::load(row_ + i);
      const auto is_positive = M::equal(load_pack<L>(whole, y + i, m, T(0)), one);
      const L u = M::select(is_positive, -z - L(shift_of_positives), z - L(shift));
      const L e = M::exp_nonpositive(M::select(M::equal(z, -M::infinity()), z, u));
      negatives.of[a] = negatives.of[a] + M::select(is_positive, zero, e);
      positives.of[a] = positives.of[a] + M::select(is_positive, e, zero);
      e.store(row_ + i);
    });
    const Side<T> negative(shift, negatives.sum()), positive(shift_of_positives, positives.sum());
    if (d_row) {
      const L factor(scale / negative.total), of_positive(-scale / positive.total);
      for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int) IMBALANCE_LAMBDA {
        const auto is_positive = M::equal(load_pack<L>(whole, y + i, m, T(0)), one);
        store_pack(whole, d_row + i, m, L::load(row_ + i) * M::select(is_positive, of_positive, factor));
      });
    }
    return negative.value + positive.value;
  }

  // Dense labels from 0 to 1, which may lie in second_: weights of both sides' exponentials.
  IMBALANCE_INLINE T soft(const T* y, const S* x, int64_t n, T scale, S* d_row) {
    const L one(T(1)), zero(T(0));
    Four<L> of_negatives(-kInfinity), of_positives(-kInfinity);
    const auto exponents = [&](auto whole, int64_t i, int64_t m, L* of_negative, L* of_positive) IMBALANCE_LAMBDA {
      const L label = load_pack<L>(whole, y + i, m, T(0)), z = effective(whole, x, i, m);
      const auto masked = M::equal(z, -M::infinity());
      *of_negative = M::select(M::equal(label, one), -M::infinity(), z);
      *of_positive = M::select(M::equal(label, zero) | masked, -M::infinity(), -z);
      return label;
    };
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
      L of_negative, of_positive;
      exponents(whole, i, m, &of_negative, &of_positive);
      of_negatives.of[a] = maximum(of_negatives.of[a], of_negative);
      of_positives.of[a] = maximum(of_positives.of[a], of_positive);
    });
    const T shift = shift_of(of_negatives.highest()), shift_of_positives = shift_of(of_positives.highest());
    Four<L> negatives(0), positives(0);
    for_packs<L>(n, [&](auto whole, int64_t i, int64_t m, int a) IMBALANCE_LAMBDA {
      L of_negative, of_positive;
      const L label = exponents(whole, i, m, &of_negative, &of_positive);
      of_negative = (one - label) * M::exp_nonpositive(of_negative - L(shift));
      of_positive = label * M::exp_nonpositive(of_positive - L(shift_of_positives));
      negatives.of[a] = negatives.of[a] + of_negative;
      positives.of[a] = positives.of[a] + of_positive;
      of_negative.store(row_ + i);
      of_positive.store(second_ + i);
    });
    const Side<T> negative(shift, negatives.sum()), positive(shift_of_positives, positives.sum());
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

template <class S, int Bytes>
void multilabel_rows(const MultilabelLossArguments& arguments, int64_t first, int64_t last, void* scratch) {
  MultilabelRows<S, Bytes> rows(arguments, scratch);
  for (int64_t row = first; row < last; ++row) rows(row);
}

std::size_t multilabel_scratch_bytes(const MultilabelArguments& call) {
  // class indices are as wide as doubles
  return static_cast<std::size_t>(MultilabelRows<double, 16>::scratch_numbers(call)) * sizeof(double);
}

template <int Bytes>
constexpr MultilabelKernels multilabel_kernels_of() {
  return {
      multilabel_scratch_bytes,
      {multilabel_rows<float, Bytes>, multilabel_rows<double, Bytes>, multilabel_rows<BFloat16, Bytes>,
       multilabel_rows<Float16, Bytes>},
  };
}

}  // namespace
}  // namespace imbalance::cpu
