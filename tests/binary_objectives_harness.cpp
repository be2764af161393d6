// csrc/binary_objectives.h over arrays, behind plain C functions, for tests/test_binary_objectives_cpp.py.
//
// Compiled with LANE_BYTES bytes to a pack of lanes; n is a whole number of packs. An exponent whose `halves` are not
// negative is a HalfExponent.
#include <cstdint>

#include "binary_objectives.h"
#include "cpu/simd.h"

using imbalance::BinaryObjectiveKind;
using imbalance::HalfExponent;
using imbalance::Sides;
using imbalance::Truth;
using imbalance::ValueAndSlope;

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

// run(exponent) with the type that stands for it.
template <class Number, class T, class Run>
Sides<Number> with_exponent(T exponent, int halves, const Run& run) {
  return halves >= 0 ? run(HalfExponent{halves}) : run(Number(exponent));
}

template <class Number, class T>
Sides<Number> sides(BinaryObjectiveKind kind, const Truth<Number>& t, Number y, const T* parameters,
                    const int* halves) {
  const Number second(parameters[1]), third(parameters[2]);
  return with_exponent<Number>(parameters[0], halves[0], [&](auto first) -> Sides<Number> {
    switch (kind) {
      case BinaryObjectiveKind::focal:
        return imbalance::focal_sides(t, y, first);
      case BinaryObjectiveKind::poly_focal:
        return imbalance::mixed_sides(
            t, [&](const Truth<Number>& side) { return imbalance::poly_focal(side, first, second); });
      case BinaryObjectiveKind::quality_focal:
        return imbalance::quality_focal_sides(t, y, first);
      case BinaryObjectiveKind::varifocal:
        return imbalance::varifocal_sides(t, y, first, second);
      case BinaryObjectiveKind::asymmetric:
        return with_exponent<Number>(parameters[1], halves[1], [&](auto of_positives) -> Sides<Number> {
          const ValueAndSlope<Number> negative = parameters[2] == 0
                                                     ? imbalance::focal(t.flipped(), first)
                                                     : imbalance::clipped_focal(t.flipped(), first, third);
          return {imbalance::focal(t, of_positives), {negative.value, -negative.slope}};
        });
      default: {
        const auto of_registry = static_cast<imbalance::ObjectiveKind>(kind);
        return imbalance::mixed_sides(t, [&](const Truth<Number>& side) {
          return imbalance::evaluate(of_registry, side, Number(parameters[0]), second);
        });
      }
    }
  });
}

// `results` are V+, its slope, V- and its slope, n of each.
template <class Number, class T>
void evaluate(int kind, std::int64_t n, const T* x, const T* y, const T* parameters, const int* halves, T* results) {
  Number* const number = nullptr;
  for (std::int64_t i = 0; i < n; i += sizeof(Number) / sizeof(T)) {
    const Truth<Number> truth(load(x + i, number));
    const auto both = sides(static_cast<BinaryObjectiveKind>(kind), truth, load(y + i, number), parameters, halves);
    store(both.positive.value, results + i);
    store(both.positive.slope, results + n + i);
    store(both.negative.value, results + 2 * n + i);
    store(both.negative.slope, results + 3 * n + i);
  }
}

}  // namespace

#define HARNESS(name, T, ...)                                                                            \
  extern "C" void evaluate_##name(int kind, std::int64_t n, const T* x, const T* y, const T* parameters, \
                                  const int* halves, T* results) {                                       \
    evaluate<__VA_ARGS__>(kind, n, x, y, parameters, halves, results);                                   \
  }

HARNESS(float, float, float)
HARNESS(double, double, double)
HARNESS(float_lanes, float, imbalance::cpu::Lanes<float, LANE_BYTES>)
HARNESS(double_lanes, double, imbalance::cpu::Lanes<double, LANE_BYTES>)

extern "C" const char* const* objective_names(int* count) {
  *count = sizeof(imbalance::kBinaryObjectiveNames) / sizeof(imbalance::kBinaryObjectiveNames[0]);
  return imbalance::kBinaryObjectiveNames;
}
