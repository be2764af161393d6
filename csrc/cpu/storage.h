// Storage types and their conversion to lanes of the accumulation type: whole packs, and the rest of a row.
#pragma once

#if defined(IMBALANCE_AVX512)
#include <immintrin.h>
#endif

#include <type_traits>

#include "../halves.h"
#include "simd.h"

namespace imbalance::cpu {

template <class L>
IMBALANCE_INLINE L load(const typename L::Scalar* p) {
  return L::load(p);
}
template <class L>
IMBALANCE_INLINE void store(typename L::Scalar* p, L x) {
  x.store(p);
}

// The bits of a pack of halves, widened to the lanes' width.
template <class L>
struct HalfBits {
  using Narrow = typename VectorOf<std::uint16_t, 2 * L::count>::type;
  using Wide = typename VectorOf<std::uint32_t, 4 * L::count>::type;

  static IMBALANCE_INLINE Wide load(const void* p) {
    Narrow narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    return __builtin_convertvector(narrow, Wide);
  }
  static IMBALANCE_INLINE void store(void* p, Wide wide) {
    const Narrow narrow = __builtin_convertvector(wide, Narrow);
    std::memcpy(p, &narrow, sizeof(narrow));
  }
};

template <class L>
IMBALANCE_INLINE L load(const BFloat16* p) {
  return L(bit_cast<typename L::Vector>(HalfBits<L>::load(p) << 16));
}

template <class L>
IMBALANCE_INLINE void store(BFloat16* p, L x) {
  using Wide = typename HalfBits<L>::Wide;
  const Wide bits = bit_cast<Wide>(x.v);
  const Wide rounded = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;  // to nearest, ties to even
  const Wide not_a_number = (bits >> 16) | 0x0040;
  HalfBits<L>::store(p, x.v == x.v ? rounded : not_a_number);
}

template <class L>
IMBALANCE_INLINE L load(const Float16* p) {
  using Wide = typename HalfBits<L>::Wide;
  using Vector = typename L::Vector;
  const Wide half = HalfBits<L>::load(p);
  const Wide magnitude = (half & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent's bias and makes denormals normal; infinity and NaN keep all exponent bits.
  const Wide finite = bit_cast<Wide>(bit_cast<Vector>(magnitude) * 5.192296858534828e33f);
  const Wide special = magnitude | 0x7f800000u;
  const Wide value = magnitude >= 0x0f800000u ? special : finite;
  return L(bit_cast<Vector>(value | ((half & 0x8000) << 16)));
}

template <class L>
IMBALANCE_INLINE void store(Float16* p, L x) {
  using Wide = typename HalfBits<L>::Wide;
  using Vector = typename L::Vector;
  const Wide bits = bit_cast<Wide>(x.v);
  const Wide magnitude = bits & 0x7fffffff;
  // A denormal half: adding 0.5 leaves its rounded mantissa in the low bits. Else 112 is taken off the exponent,
  // rounding to nearest, ties to even.
  const Wide denormal = bit_cast<Wide>(bit_cast<Vector>(magnitude) + 0.5f) - 0x3f000000u;
  const Wide normal = (magnitude + (((magnitude >> 13) & 1) + 0xc8000fffu)) >> 13;
  const Wide infinity = (bits & 0) + 0x7c00u;
  const Wide not_a_number = (bits & 0) + 0x7e00u;
  const Wide finite = magnitude < 0x38800000u ? denormal : normal;
  const Wide large = magnitude > 0x7f800000u ? not_a_number : infinity;
  HalfBits<L>::store(p, (magnitude >= 0x477ff000u ? large : finite) | ((bits >> 16) & 0x8000));
}

// The first n < L::count elements of p; the lanes behind them are `fill`.
template <class L, class S>
IMBALANCE_INLINE L load_first(const S* p, std::int64_t n, typename L::Scalar fill) {
#if defined(IMBALANCE_AVX512)
  if constexpr (std::is_same_v<S, float>) {
    return L(_mm512_mask_loadu_ps(L(fill).v, static_cast<__mmask16>((1u << n) - 1), p));
  }
#endif
  S stored[L::count];
  store<L>(stored, L(fill));
  std::int64_t done = 0;
  for (std::int64_t step = L::count / 2; step > 0; step /= 2) {
    if (n & step) {
      std::memcpy(stored + done, p + done, step * sizeof(S));
      done += step;
    }
  }
  return load<L>(stored);
}

template <class L, class S>
IMBALANCE_INLINE void store_first(S* p, std::int64_t n, L x) {
#if defined(IMBALANCE_AVX512)
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x.v);
    return;
  }
#endif
  S stored[L::count];
  store<L>(stored, x);
  std::int64_t done = 0;
  for (std::int64_t step = L::count / 2; step > 0; step /= 2) {
    if (n & step) {
      std::memcpy(p + done, stored + done, step * sizeof(S));
      done += step;
    }
  }
}

// One stored element as a number of the accumulation type, and back.
template <class S, class T = typename AccumulateOf<S>::type>
IMBALANCE_INLINE T number_of(const S* p) {
  if constexpr (std::is_same_v<S, T>) {
    return *p;
  } else {
    S stored[4] = {*p, *p, *p, *p};
    return load<Lanes<T, 16>>(stored).v[0];
  }
}
template <class S, class T>
IMBALANCE_INLINE void store_number(S* p, T x) {
  if constexpr (std::is_same_v<S, T>) {
    *p = x;
  } else {
    S stored[4];
    store(stored, Lanes<T, 16>(x));
    *p = stored[0];
  }
}

}  // namespace imbalance::cpu
