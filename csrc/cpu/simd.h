// A pack of lanes as a number type: GCC and clang vector extensions, so that one source serves AVX-512, AVX2, SSE2 and
// NEON.
//
// The arithmetic is the compiler's; exp, expm1, log and log1p are polynomials of our own, without branches and without
// -ffast-math, so NaN and infinity behave. Measured against mpmath: relative errors below 2 units in the last place.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "../math.h"

namespace imbalance::cpu {

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = std::int32_t;
};
template <>
struct IntegerOf<double> {
  using type = std::int64_t;
};

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};

template <class T, int Bytes>
struct Lanes {
  using Scalar = T;
  using Integer = typename IntegerOf<T>::type;
  using Vector = typename VectorOf<T, Bytes>::type;
  using Mask = typename VectorOf<Integer, Bytes>::type;  // of comparisons: all bits of a lane or none
  static constexpr int count = Bytes / static_cast<int>(sizeof(T));

  Vector v;

  Lanes() = default;
  IMBALANCE_INLINE Lanes(Vector vector) : v(vector) {}
  IMBALANCE_INLINE Lanes(T scalar) : v(scalar - Vector{}) {}

  static IMBALANCE_INLINE Lanes load(const T* p) {
    Lanes x;
    std::memcpy(&x.v, p, Bytes);
    return x;
  }
  IMBALANCE_INLINE void store(T* p) const { std::memcpy(p, &v, Bytes); }

  // 0, 1, 2, ...
  static IMBALANCE_INLINE Mask iota() {
    Mask indices;
    for (int i = 0; i < count; ++i) indices[i] = i;
    return indices;
  }

  friend IMBALANCE_INLINE Lanes operator+(Lanes a, Lanes b) { return a.v + b.v; }
  friend IMBALANCE_INLINE Lanes operator-(Lanes a, Lanes b) { return a.v - b.v; }
  friend IMBALANCE_INLINE Lanes operator*(Lanes a, Lanes b) { return a.v * b.v; }
  friend IMBALANCE_INLINE Lanes operator/(Lanes a, Lanes b) { return a.v / b.v; }
  IMBALANCE_INLINE Lanes operator-() const { return -v; }
};

template <class To, class From>
IMBALANCE_INLINE To bit_cast(From from) {
  return __builtin_bit_cast(To, from);
}

template <class Half>
struct Halves {
  Half low, high;
};

// Horizontal sum and maximum, in a fixed order of lanes.
template <class T, int Bytes>
IMBALANCE_INLINE T sum_of(Lanes<T, Bytes> x) {
  if constexpr (Bytes > 16) {
    using Half = Lanes<T, Bytes / 2>;
    const Halves<Half> halves = bit_cast<Halves<Half>>(x);
    return sum_of(halves.low + halves.high);
  } else {
    T total = x.v[0];
    for (int i = 1; i < x.count; ++i) total += x.v[i];
    return total;
  }
}

// The larger; a NaN in b is dropped. On x86 one instruction, which no comparison and choice becomes.
template <class T, int Bytes>
IMBALANCE_INLINE Lanes<T, Bytes> maximum(Lanes<T, Bytes> a, Lanes<T, Bytes> b) {
  [[maybe_unused]] constexpr bool is_float = sizeof(T) == 4;
#if defined(IMBALANCE_AVX512)
  if constexpr (Bytes == 64 && is_float) return _mm512_maskz_max_ps(0xffff, b.v, a.v);
  if constexpr (Bytes == 64 && !is_float) return _mm512_maskz_max_pd(0xff, b.v, a.v);
#endif
#if defined(IMBALANCE_AVX2)
  if constexpr (Bytes == 32 && is_float) return _mm256_max_ps(b.v, a.v);
  if constexpr (Bytes == 32 && !is_float) return _mm256_max_pd(b.v, a.v);
#endif
#if defined(__x86_64__)
  if constexpr (Bytes == 16 && is_float) return _mm_max_ps(b.v, a.v);
  if constexpr (Bytes == 16 && !is_float) return _mm_max_pd(b.v, a.v);
#endif
  return b.v > a.v ? b.v : a.v;
}

template <class T, int Bytes>
IMBALANCE_INLINE T maximum_of(Lanes<T, Bytes> x) {
  if constexpr (Bytes > 16) {
    using Half = Lanes<T, Bytes / 2>;
    const Halves<Half> halves = bit_cast<Halves<Half>>(x);
    return maximum_of(maximum(halves.low, halves.high));
  } else {
    T highest = x.v[0];
    for (int i = 1; i < x.count; ++i) highest = x.v[i] > highest ? x.v[i] : highest;
    return highest;
  }
}

// Constants of the polynomials, per scalar type.
template <class T>
struct Polynomial;

template <>
struct Polynomial<float> {
  static constexpr float lowest = -87.33654f;  // exp of less is denormal, and taken as 0
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f;  // times an exponent exact
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23;
  static constexpr std::int32_t one = 0x3f800000;
  static constexpr std::int32_t sign = INT32_MIN;
  static constexpr std::int32_t sqrt_half = 0x3f3504f3;
  static constexpr int log_terms = 5, log1p_terms = 8;
  // (e^r - 1) / r on |r| <= ln(2) / 2, Chebyshev, 5.2e-9
  static constexpr float exp[] = {1.000000011099062f,    0.50000000138668177f,   0.16666502004013433f,
                                  0.041666460938501305f, 0.0083695082186582236f, 0.0013934090352815371f};
};

template <>
struct Polynomial<double> {
  static constexpr double lowest = -708.39641853226408;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.4426950408889634074;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52;
  static constexpr std::int64_t one = 0x3ff0000000000000;
  static constexpr std::int64_t sign = INT64_MIN;
  static constexpr std::int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr int log_terms = 11, log1p_terms = 17;
  // the same, 9.0e-18
  static constexpr double exp[] = {1.0,
                                   0.50000000000000059043,
                                   0.16666666666666671207,
                                   0.041666666666569333784,
                                   0.0083333333333258479847,
                                   0.0013888888933813813048,
                                   0.00019841269875819579062,
                                   0.000024801502674126313395,
                                   2.7557254139316890463e-6,
                                   2.7627050155151051502e-7,
                                   2.510573921958671297e-8};
};

// The square root of each lane: a vector extension has none, and its lanes one by one are not made into one again.
template <class L>
IMBALANCE_INLINE L square_root(L x) {
  constexpr bool is_float = sizeof(typename L::Scalar) == 4;
  constexpr int bytes = sizeof(x.v);
#if defined(IMBALANCE_AVX512)
  // the masked forms: GCC warns of what the others leave undefined
  if constexpr (bytes == 64 && is_float) return L(_mm512_maskz_sqrt_ps(0xffff, x.v));
  if constexpr (bytes == 64 && !is_float) return L(_mm512_maskz_sqrt_pd(0xff, x.v));
#endif
#if defined(IMBALANCE_AVX2)
  if constexpr (bytes == 32 && is_float) return L(_mm256_sqrt_ps(x.v));
  if constexpr (bytes == 32 && !is_float) return L(_mm256_sqrt_pd(x.v));
#endif
#if defined(__x86_64__)
  if constexpr (bytes == 16 && is_float) return L(_mm_sqrt_ps(x.v));
  if constexpr (bytes == 16 && !is_float) return L(_mm_sqrt_pd(x.v));
#elif defined(__ARM_NEON)
  if constexpr (bytes == 16 && is_float) return L(vsqrtq_f32(x.v));
  if constexpr (bytes == 16 && !is_float) return L(vsqrtq_f64(x.v));
#endif
  for (int i = 0; i < L::count; ++i) x.v[i] = std::sqrt(x.v[i]);
  return x;
}

// Whether a comparison holds of any lane.
template <class Mask>
IMBALANCE_INLINE bool any_of(Mask mask) {
  constexpr int bytes = sizeof(mask);
#if defined(IMBALANCE_AVX512)
  if constexpr (bytes == 64) return _mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#endif
#if defined(IMBALANCE_AVX2)
  if constexpr (bytes == 32) return _mm256_movemask_epi8(bit_cast<__m256i>(mask)) != 0;
#endif
#if defined(__x86_64__)
  if constexpr (bytes == 16) return _mm_movemask_epi8(bit_cast<__m128i>(mask)) != 0;
#endif
  std::uint64_t words[bytes / 8], any = 0;
  std::memcpy(words, &mask, bytes);
  for (std::uint64_t word : words) any |= word;
  return any != 0;
}

// e^x as 2^k (1 + tail), for x <= 0 (and a little above).
template <class L>
struct SplitExp {
  L power;  // 2^k
  L tail;   // e^r - 1

  explicit IMBALANCE_INLINE SplitExp(L x) {
    using P = Polynomial<typename L::Scalar>;
    const L shifted = x * L(P::log2_e) + L(P::round);
    const L k = shifted - L(P::round);
    const L r = (x - k * L(P::ln2_high)) - k * L(P::ln2_low);
    constexpr int terms = sizeof(P::exp) / sizeof(P::exp[0]);
    L series(P::exp[terms - 1]);
    for (int i = terms - 2; i >= 0; --i) series = series * r + L(P::exp[i]);
    tail = series * r;
    const typename L::Mask bits = (bit_cast<typename L::Mask>(shifted.v) << P::mantissa) + P::one;
    power = L(bit_cast<typename L::Vector>(bits));
  }
};

// 2 artanh(s) by its series, |s| <= 1/3
template <int Terms, class L>
IMBALANCE_INLINE L twice_artanh(L s) {
  using T = typename L::Scalar;
  const L square = s * s;
  L series(T(1) / T(2 * Terms - 1));
  for (int i = Terms - 2; i >= 0; --i) series = series * square + L(T(1) / T(2 * i + 1));
  return (s + s) * series;
}

}  // namespace imbalance::cpu

namespace imbalance {

template <class T, int Bytes>
struct Math<cpu::Lanes<T, Bytes>> {
  using L = cpu::Lanes<T, Bytes>;
  using Mask = typename L::Mask;
  using P = cpu::Polynomial<T>;
  using Scalar = T;
  static IMBALANCE_INLINE L infinity() { return L(std::numeric_limits<T>::infinity()); }
  static IMBALANCE_INLINE Mask less(L a, L b) { return a.v < b.v; }
  static IMBALANCE_INLINE Mask equal(L a, L b) { return a.v == b.v; }
  static IMBALANCE_INLINE bool any(Mask condition) { return cpu::any_of(condition); }
  static IMBALANCE_INLINE L select(Mask condition, L a, L b) { return condition ? a.v : b.v; }

  static IMBALANCE_INLINE L minus_abs(L x) {
    return L(cpu::bit_cast<typename L::Vector>(cpu::bit_cast<Mask>(x.v) | P::sign));
  }
  static IMBALANCE_INLINE L exp_nonpositive(L x) {
    const Mask tiny = less(x, L(P::lowest));
    const cpu::SplitExp<L> split(cpu::maximum(x, L(P::lowest)));
    return select(tiny, L(T(0)), split.power + split.power * split.tail);
  }
  static IMBALANCE_INLINE Pair<L> exp_and_expm1_nonpositive(L x) {
    const Mask tiny = less(x, L(P::lowest));
    const cpu::SplitExp<L> split(cpu::maximum(x, L(P::lowest)));
    const L tail = split.power * split.tail;
    return {select(tiny, L(T(0)), split.power + tail), (split.power - L(T(1))) + tail};
  }
  static IMBALANCE_INLINE L sqrt(L x) { return cpu::square_root(x); }
  static IMBALANCE_INLINE L log(L x) {
    const Mask bits = cpu::bit_cast<Mask>(x.v);
    const Mask exponent = (bits - P::sqrt_half) >> P::mantissa;
    const L mantissa(cpu::bit_cast<typename L::Vector>(bits - (exponent << P::mantissa)));
    const L k(__builtin_convertvector(exponent, typename L::Vector));
    const L f = mantissa - L(T(1));
    const L log_mantissa = cpu::twice_artanh<P::log_terms>(f / (L(T(2)) + f));
    const L result = k * L(P::ln2_high) + (k * L(P::ln2_low) + log_mantissa);
    const L at_zero_or_nan = select(equal(x, L(T(0))), -infinity(), x);
    return select(less(L(T(0)), x), result, at_zero_or_nan);
  }
  // As the logarithm of the sum, but where that has no exponent its mantissa's distance from 1 is x itself.
  static IMBALANCE_INLINE L log1p(L x, L sum) {
    const Mask bits = cpu::bit_cast<Mask>(sum.v);
    const Mask exponent = (bits - P::sqrt_half) >> P::mantissa;
    const L mantissa(cpu::bit_cast<typename L::Vector>(bits - (exponent << P::mantissa)));
    const L k(__builtin_convertvector(exponent, typename L::Vector));
    const L f = select(exponent == 0, x, mantissa - L(T(1)));
    const L result = k * L(P::ln2_high) + (k * L(P::ln2_low) + cpu::twice_artanh<P::log_terms>(f / (L(T(2)) + f)));
    return select(equal(x, x), result, x);
  }
  static IMBALANCE_INLINE L log1p_unit(L x) { return cpu::twice_artanh<P::log1p_terms>(x / (L(T(2)) + x)); }
};

}  // namespace imbalance
