// Packs of 16 bytes, numbers in them, and which columns of a row a thread's packs hold.
#pragma once

#include <cstdint>

#include "../halves.h"
#include "device.cuh"

namespace imbalance::cuda {

template <class S>
using Accumulate = typename AccumulateOf<S>::type;

template <class T>
__device__ __forceinline__ T infinity() {
  return std::numeric_limits<T>::infinity();
}

__device__ __forceinline__ float number_of(float x) { return x; }
__device__ __forceinline__ double number_of(double x) { return x; }
__device__ __forceinline__ float number_of(BFloat16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float number_of(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void store_number(float* p, float x) { *p = x; }
__device__ __forceinline__ void store_number(double* p, double x) { *p = x; }
__device__ __forceinline__ void store_number(BFloat16* p, float x) {
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ void store_number(Float16* p, float x) { p->bits = __half_as_ushort(__float2half_rn(x)); }

// The register that holds a float or two halves, and back.
template <class Numbers>
__device__ __forceinline__ std::uint32_t packed(const Numbers& numbers) {
  std::uint32_t word;
  memcpy(&word, &numbers, sizeof(word));
  return word;
}
template <class Numbers>
__device__ __forceinline__ Numbers unpacked(std::uint32_t word) {
  Numbers numbers;
  memcpy(static_cast<void*>(&numbers), &word, sizeof(word));
  return numbers;
}

// Two halves, converted in one instruction.
__device__ __forceinline__ std::uint32_t word_of(BFloat16, float low, float high) {
  return packed(__floats2bfloat162_rn(low, high));
}
__device__ __forceinline__ std::uint32_t word_of(Float16, float low, float high) {
  return packed(__floats2half2_rn(low, high));
}

// The larger of each two.
__device__ __forceinline__ std::uint32_t larger(BFloat16, std::uint32_t a, std::uint32_t b) {
  return packed(__hmax2(unpacked<__nv_bfloat162>(a), unpacked<__nv_bfloat162>(b)));
}
__device__ __forceinline__ std::uint32_t larger(Float16, std::uint32_t a, std::uint32_t b) {
  return packed(__hmax2(unpacked<__half2>(a), unpacked<__half2>(b)));
}
__device__ __forceinline__ std::uint32_t larger(float, std::uint32_t a, std::uint32_t b) {
  return packed(fmaxf(unpacked<float>(a), unpacked<float>(b)));
}

// A number that takes no part: -inf.
template <class S>
__device__ __forceinline__ S mask_number() {
  S number;
  store_number(&number, -infinity<Accumulate<S>>());
  return number;
}

// Whether caches should keep what is loaded.
enum class Reads { once, again };

// What one instruction loads.
template <int bytes>
struct VectorOf;
template <>
struct VectorOf<16> {
  using type = uint4;
};
template <>
struct VectorOf<8> {
  using type = uint2;
};
template <>
struct VectorOf<4> {
  using type = unsigned;
};
template <>
struct VectorOf<2> {
  using type = unsigned short;
};

// Neighbouring numbers as they are stored, 16 bytes if nothing else is said, in registers; two halves share one.
// Registers have no index: that of a number must be a constant, as in an unrolled loop.
template <class S, int width_ = 16 / sizeof(S)>
struct Pack {
  using T = Accumulate<S>;
  using Vector = typename VectorOf<width_ * sizeof(S)>::type;
  static constexpr int width = width_;
  static constexpr int count = sizeof(Vector) < 4 ? 1 : sizeof(Vector) / 4;  // of words

  std::uint32_t words[count];

  static __device__ __forceinline__ Pack load(const S* p, Reads reads) {
    const auto* const vector = reinterpret_cast<const Vector*>(p);
    const Vector loaded = reads == Reads::again ? *vector : load_streaming(vector);
    Pack pack{};
    memcpy(pack.words, &loaded, sizeof(loaded));
    return pack;
  }
  static __device__ __forceinline__ Pack masks() {
    Pack pack{};
#pragma unroll
    for (int k = 0; k < width; ++k) pack.set(k, mask_number<S>());
    return pack;
  }
  __device__ __forceinline__ void store(S* p) const {
    Vector stored;
    memcpy(&stored, words, sizeof(stored));
    store_streaming(reinterpret_cast<Vector*>(p), stored);
  }

  __device__ __forceinline__ S get(int k) const {
    S number;
    if constexpr (sizeof(S) == 2) {
      number.bits = static_cast<std::uint16_t>(words[k / 2] >> (16 * (k % 2)));
    } else {
      memcpy(&number, &words[k * sizeof(S) / 4], sizeof(S));
    }
    return number;
  }
  __device__ __forceinline__ void set(int k, S number) {
    if constexpr (sizeof(S) == 2) {
      const std::uint32_t kept = words[k / 2] & (k % 2 ? 0x0000ffffu : 0xffff0000u);
      words[k / 2] = kept | static_cast<std::uint32_t>(number.bits) << (16 * (k % 2));
    } else {
      memcpy(&words[k * sizeof(S) / 4], &number, sizeof(S));
    }
  }

  // As something new to the compiler (device.cuh).
  __device__ __forceinline__ void forget_words() {
#pragma unroll
    for (int w = 0; w < count; ++w) forget(words[w]);
  }

  // The larger number of each two.
  __device__ __forceinline__ Pack or_larger(const Pack& other) const {
    static_assert(sizeof(S) <= 4);
    Pack pack;
#pragma unroll
    for (int w = 0; w < count; ++w) pack.words[w] = larger(S{}, words[w], other.words[w]);
    return pack;
  }

  // The numbers are the values, or the values rounded to the nearest.
  __device__ __forceinline__ void to_values(T (&values)[width]) const {
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] = number_of(get(k));
  }
  static __device__ __forceinline__ Pack of_values(const T (&values)[width]) {
    Pack pack{};
    if constexpr (width == 1) {
      S number;
      store_number(&number, values[0]);
      pack.set(0, number);
    } else if constexpr (sizeof(S) == 2) {
#pragma unroll
      for (int w = 0; w < count; ++w) pack.words[w] = word_of(S{}, values[2 * w], values[2 * w + 1]);
    } else {
      memcpy(pack.words, values, sizeof(pack.words));
    }
    return pack;
  }
};

// The columns of a stretch of a row that are a thread's: the `lanes` threads which share it take packs in turns.
// Aligned packs are as they lie in memory, and the row has all of a pack or nothing. Elsewhere a pack's numbers are
// `lanes` columns apart, so that neighbouring threads still load neighbouring numbers.
template <bool aligned>
struct Columns {
  int first;  // of the stretch
  int end;    // C
  int lanes;
  int lane;

  template <int width>
  __device__ __forceinline__ int of(int pack, int k) const {
    return aligned ? first + (pack * lanes + lane) * width + k : first + (pack * width + k) * lanes + lane;
  }

  // False: the row has nothing of the pack.
  template <int width>
  __device__ __forceinline__ bool has(int pack) const {
    return of<width>(pack, 0) < end;
  }

  // False: the pack does not hold the column. Saves comparing each of its numbers.
  template <int width>
  __device__ __forceinline__ bool may_hold(int pack, int column) const {
    const int step = aligned ? 1 : lanes, from = of<width>(pack, 0);
    return column >= from && column - from < width * step;
  }

  // The same, as something new to the compiler (device.cuh).
  __device__ __forceinline__ Columns forgotten() const {
    Columns same = *this;
    forget(same.lane);
    forget(same.lanes);
    return same;
  }
};

// A pack of a row; numbers that the row does not have are masks.
template <class S, bool aligned, int width = Pack<S>::width>
__device__ __forceinline__ Pack<S, width> load_pack(const S* row, const Columns<aligned>& columns, int pack,
                                                    Reads reads = Reads::once) {
  if constexpr (aligned) {
    const int column = columns.template of<width>(pack, 0);
    return column < columns.end ? Pack<S, width>::load(row + column, reads) : Pack<S, width>::masks();
  } else {
    const Columns<aligned> apart = columns.forgotten();
    Pack<S, width> loaded;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int column = apart.template of<width>(pack, k);
      loaded.set(k, column < apart.end ? row[column] : mask_number<S>());
    }
    return loaded;
  }
}

template <class S, bool aligned, int width>
__device__ __forceinline__ void store_pack(S* row, const Columns<aligned>& columns, int pack,
                                           const Accumulate<S> (&values)[width]) {
  if constexpr (aligned) {
    const int column = columns.template of<width>(pack, 0);
    if (column < columns.end) Pack<S, width>::of_values(values).store(row + column);
  } else {
    const Columns<aligned> apart = columns.forgotten();
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int column = apart.template of<width>(pack, k);
      if (column < apart.end) store_number(row + column, values[k]);
    }
  }
}

// The numbers beside a pack in another vector (C,) of the same columns: a class vector, or class probabilities. `fill`
// where there are none.
template <int width, class S, class T, bool aligned>
__device__ __forceinline__ void load_values(const S* vector, const Columns<aligned>& columns, int pack, T fill,
                                            T (&values)[width]) {
  if constexpr (aligned) {
    constexpr int step = 16 / sizeof(S) < width ? 16 / sizeof(S) : width;
    static_assert(width % step == 0);
    const int column = columns.template of<width>(pack, 0);
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] = fill;
    if (column >= columns.end) return;
#pragma unroll
    for (int k = 0; k < width; k += step) {
      const auto numbers = Pack<S, step>::load(vector + column + k, Reads::again);
#pragma unroll
      for (int j = 0; j < step; ++j) values[k + j] = number_of(numbers.get(j));
    }
  } else {
    const Columns<aligned> apart = columns.forgotten();
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int column = apart.template of<width>(pack, k);
      values[k] = column < apart.end ? number_of(vector[column]) : fill;
    }
  }
}

// A stretch of a class vector in shared memory, padded to whole packs. Beside an aligned pack of halves lie two vectors
// of 16 bytes; these have a plane each, so that the lanes of a warp load neighbouring vectors, from different banks.
template <class T, bool aligned, int width>
struct Staged {
  static constexpr int step = 16 / sizeof(T) < width ? 16 / sizeof(T) : width;
  static constexpr int planes = aligned ? width / step : 1;

  static __device__ __forceinline__ int place(int i, int stretch) {
    return aligned ? i % width / step * (stretch / planes) + i / width * step + i % step : i;
  }

  static __device__ __forceinline__ void load(const T* vector, const Columns<aligned>& columns, int pack, int stretch,
                                              T (&values)[width]) {
    if constexpr (aligned) {
      const T* const first = vector + (pack * columns.lanes + columns.lane) * step;
#pragma unroll
      for (int k = 0; k < width; k += step) {
        const Pack<T> numbers = Pack<T>::load(first + k / step * (stretch / planes), Reads::again);
#pragma unroll
        for (int j = 0; j < step; ++j) values[k + j] = numbers.get(j);
      }
    } else {
      const Columns<aligned> apart = columns.forgotten();
#pragma unroll
      for (int k = 0; k < width; ++k) values[k] = vector[apart.template of<width>(pack, k) - apart.first];
    }
  }
};

}  // namespace imbalance::cuda
