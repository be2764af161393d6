// How 16-bit logits are stored, and the type in which statistics of a row are kept.
#pragma once

#include <cstdint>

namespace imbalance {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// Statistics are float, or double where the logits are.
template <class S>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};

}  // namespace imbalance
