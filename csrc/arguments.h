// What bindings.cpp hands to the kernels of either device: plain pointers, sizes and strides.
#pragma once

#include <cstdint>

#include "logit_map.h"

namespace imbalance {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// Class vectors (C,) and row vectors (N,) are float, or double where the logits are; null is absent. Logits are rows,
// or, for a loss alone, channels-first: B images of P pixels, where row b * P + p is the classes of pixel p of image b.
struct SplitArguments {
  Dtype dtype;                          // of logits and of their gradient
  std::int64_t classes;                 // C
  std::int64_t pixels;                  // P of channels-first logits (B, C, P); 0: logits are rows (N, C)
  const void* logits;                   // (N, C) or (B, C, P), its last stride 1
  std::int64_t row_stride;              // of rows; of images where logits are channels-first
  std::int64_t class_stride;            // of channels-first logits
  const std::int64_t* target;           // (N,), null for class probabilities
  const void* probabilities;            // contiguous, in the logits' shape
  bool probabilities_are_logits_dtype;  // else float, or double where the logits are
  std::int64_t ignore_index;

  double scale;
  const void* factor;  // (C,)
  const void* bias;    // (C,)
  double softcap;      // 0: none
  MarginKind margin_kind;
  double margin_parameters[4];
  const void* class_margin;  // (C,)

  const void* class_weight;  // (C,)
  double label_smoothing;
};

// The (N,) vectors of target_and_rest; the last two are null where no class weights are spread.
struct SplitVectors {
  void* target;
  void* rest;
  void* shift;
  void* weighted_logits;
  void* weight_sum;
};

struct SplitBackwardArguments {
  SplitArguments split;
  const void* rest;        // (N,)
  const void* shift;       // (N,)
  const void* d_target;    // (N,)
  const void* d_rest;      // (N,)
  const void* d_weighted;  // (N,) or null
  void* d_logits;          // (N, C), may be the logits themselves
  std::int64_t gradient_stride;
};

}  // namespace imbalance
