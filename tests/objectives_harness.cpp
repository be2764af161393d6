// csrc/objectives.h and the lanes' own functions over arrays, behind plain C functions, for tests/test_objectives_cpp.py.
//
// Compiled with LANE_BYTES bytes to a pack of lanes; n is a whole number of packs.
#include <cstdint>

#include "cpu/simd.h"
#include "objectives.h"

using imbalance::Math;
using imbalance::ObjectiveKind;
using imbalance::Truth;

namespace {

template <class T>
T load(const T* p, T*) {
  return *p;
}
template <class T>
void store(T x, T* p) {
  *p = x;
}
template <class T, int Bytes>
imbalance::cpu::Lanes<T, Bytes> load(const T* p, imbalance::cpu::Lanes<T, Bytes>*) {
  return imbalance::cpu::Lanes<T, Bytes>::load(p);
}
template <class T, int Bytes>
void store(imbalance::cpu::Lanes<T, Bytes> x, T* p) {
  x.store(p);
}

template <class Number, class T>
void evaluate(int kind, std::int64_t n, const T* d, T first, T second, T* value, T* slope) {
  for (std::int64_t i = 0; i < n; i += sizeof(Number) / sizeof(T)) {
    const Truth<Number> truth(load(d + i, static_cast<Number*>(nullptr)));
    const auto result = imbalance::evaluate(static_cast<ObjectiveKind>(kind), truth, Number(first), Number(second));
    store(result.value, value + i);
    store(result.slope, slope + i);
  }
}

template <class Number, class T>
void function(int which, std::int64_t n, const T* x, T* y) {
  using M = Math<Number>;
  for (std::int64_t i = 0; i < n; i += sizeof(Number) / sizeof(T)) {
    const Number number = load(x + i, static_cast<Number*>(nullptr));
    const Number result = which == 0   ? M::exp_nonpositive(number)
                          : which == 1 ? M::exp_and_expm1_nonpositive(number).second
                          : which == 2 ? M::log(number)
                          : which == 3 ? M::log1p_unit(number)
                          : which == 4 ? M::log1p(number, Number(T(1)) + number)
                                       : M::sqrt(number);
    store(result, y + i);
  }
}

}  // namespace

#define HARNESS(name, T, ...)                                                                                      \
  extern "C" void evaluate_##name(int kind, std::int64_t n, const T* d, T first, T second, T* value, T* slope) {   \
    evaluate<__VA_ARGS__>(kind, n, d, first, second, value, slope);                                                \
  }                                                                                                                \
  extern "C" void function_##name(int which, std::int64_t n, const T* x, T* y) { function<__VA_ARGS__>(which, n, x, y); }

HARNESS(float, float, float)
HARNESS(double, double, double)
HARNESS(float_lanes, float, imbalance::cpu::Lanes<float, LANE_BYTES>)
HARNESS(double_lanes, double, imbalance::cpu::Lanes<double, LANE_BYTES>)

extern "C" const char* const* objective_names(int* count) {
  *count = sizeof(imbalance::kObjectiveNames) / sizeof(imbalance::kObjectiveNames[0]);
  return imbalance::kObjectiveNames;
}
