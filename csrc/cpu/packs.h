// Loops over packs of lanes, with flags as constants, and the packs that they load and store.
#pragma once

#include <type_traits>

#include "storage.h"

#define IMBALANCE_LAMBDA __attribute__((always_inline))

namespace imbalance::cpu {
namespace {

using std::int64_t;

// Keeps a loop out of line, so that it is compiled once however often it is called; what it calls is inlined into it.
// Where rows are one block the call would cost as much as the loop, which is then inlined too.
template <bool Inline, class Body>
__attribute__((noinline)) auto outline(Body body)
  requires(!Inline)
{
  return body();
}
template <bool Inline, class Body>
IMBALANCE_INLINE auto outline(const Body& body)
  requires(Inline)
{
  return body();
}

constexpr int64_t kPadding = 16;  // numbers, of which the widest lanes have no more

constexpr int64_t pad(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }  // to whole packs

// body(flag) with the flag as a constant, so that each case gets a loop of its own.
template <class Body>
IMBALANCE_INLINE void with_constant(bool flag, Body body) {
  if (flag) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// body(whole, i, m, a) for each pack of n elements: at offset i, m elements, all of a pack if whole; a in 0..3 says
// which of four accumulators to use, so that their latencies overlap.
template <class L, class Body>
IMBALANCE_INLINE void for_packs(int64_t n, Body body) {
  constexpr int64_t pack = L::count;
  int64_t i = 0;
  for (; i + 4 * pack <= n; i += 4 * pack) {
#pragma GCC unroll 4
    for (int a = 0; a < 4; ++a) body(std::true_type{}, i + a * pack, pack, a);
  }
  for (; i + pack <= n; i += pack) body(std::true_type{}, i, pack, 0);
  if (i < n) body(std::false_type{}, i, n - i, 1);
}

// So many numbers as whole packs have.
template <class L>
constexpr int64_t whole_packs(int64_t n) {
  return (n + L::count - 1) / L::count * L::count;
}

// The accumulators of for_packs.
template <class L>
struct Four {
  using T = typename L::Scalar;
  L of[4];
  explicit IMBALANCE_INLINE Four(T x) : of{L(x), L(x), L(x), L(x)} {}
  IMBALANCE_INLINE T highest() const { return maximum_of(maximum(maximum(of[0], of[1]), maximum(of[2], of[3]))); }
  IMBALANCE_INLINE T sum() const { return sum_of((of[0] + of[1]) + (of[2] + of[3])); }
};

template <class L, bool Whole, class S>
IMBALANCE_INLINE L load_pack(std::integral_constant<bool, Whole>, const S* p, int64_t n, typename L::Scalar fill) {
  if constexpr (Whole) {
    return load<L>(p);
  } else {
    return load_first<L>(p, n, fill);
  }
}

template <class L, bool Whole, class S>
IMBALANCE_INLINE void store_pack(std::integral_constant<bool, Whole>, S* p, int64_t n, L x) {
  if constexpr (Whole) {
    store<L>(p, x);
  } else {
    store_first<L>(p, n, x);
  }
}

}  // namespace
}  // namespace imbalance::cpu
