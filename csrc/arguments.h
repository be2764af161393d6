// What bindings.cpp hands to the kernels of either device: plain pointers, sizes and strides.
#pragma once

#include <cstdint>

#include "binary_objectives.h"
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

// How dense labels are stored.
enum class LabelType : int { logits, accumulate, boolean };

// Logits are rows (N, C) whose classes lie side by side, or images (B, C, P) whose pixels do; N = B * P. Of labels,
// lists and dense there is one. Class vectors are (C,), and where they are null a number stands for them.
struct SigmoidArguments {
  Dtype dtype;           // of logits and of their gradient
  std::int64_t images;   // B, or N of rows
  std::int64_t classes;  // C
  std::int64_t pixels;   // P; 0: rows
  const void* logits;
  std::int64_t image_stride;  // of rows too
  std::int64_t class_stride;  // 1 of rows

  const std::int64_t* labels;  // (N,) in [0, C], C is the background
  const std::int64_t* lists;   // (N, list_length) in [0, C)
  std::int64_t list_length;
  const void* dense;  // the logits' shape, contiguous
  LabelType label_type;
  std::int64_t ignore_index;

  BinaryObjectiveKind objective;
  double objective_parameters[3];
  const void* class_parameter;
  double positive;
  double negative;
  const void* positive_weight;
  const void* negative_weight;
  const void* bias;
  const void* sample_weight;  // (N,), or the logits' shape, contiguous; null: one
  bool weight_of_logits;      // the latter

  const void* upstream;  // gradient of the losses, the logits' shape, contiguous; null: one
  void* losses;          // the logits' shape, contiguous; null: their sums, or nothing
  void* d_logits;        // may be the logits themselves; null for the losses alone
  std::int64_t gradient_image_stride;
  std::int64_t gradient_class_stride;

  std::int64_t rows() const { return images * (pixels == 0 ? 1 : pixels); }
};

}  // namespace imbalance
