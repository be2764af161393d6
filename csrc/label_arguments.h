// What bindings.cpp hands to the kernels of multilabel_softmax and column_sums, of either device.
#pragma once

#include "arguments.h"

namespace imbalance {

// Logits and labels are laid out as those of SigmoidArguments.
struct MultilabelArguments {
  Dtype dtype;  // of logits and of their gradient
  std::int64_t images;
  std::int64_t classes;
  std::int64_t pixels;
  const void* logits;
  std::int64_t image_stride;
  std::int64_t class_stride;

  const std::int64_t* labels;
  const std::int64_t* lists;
  std::int64_t list_length;
  const void* dense;
  LabelType label_type;
  std::int64_t ignore_index;

  const void* bias;           // (C,) or null
  const void* sample_weight;  // (N,) or null

  const void* upstream;  // gradient of the losses, (N,); null: one
  void* losses;          // (N,), not divided; null: the gradient alone
  void* d_logits;        // the logits' shape, may be the logits themselves; null for the losses alone
  std::int64_t gradient_image_stride;
  std::int64_t gradient_class_stride;

  std::int64_t rows() const { return images * (pixels == 0 ? 1 : pixels); }
};

// Logits, labels and weights as above; sums of columns are written, or the logits' gradient for that of the sums.
struct ColumnSumsArguments {
  Dtype dtype;
  std::int64_t images;
  std::int64_t classes;
  std::int64_t pixels;
  const void* logits;
  std::int64_t image_stride;
  std::int64_t class_stride;

  const std::int64_t* labels;
  const std::int64_t* lists;
  std::int64_t list_length;
  const void* dense;
  LabelType label_type;
  std::int64_t ignore_index;

  const void* sample_weight;  // (N,) or null
  bool from_softmax;          // p is a softmax over the classes of a row, not a sigmoid

  // For the gradient alone.
  const void* d_predicted;       // (C,)
  const void* d_true_positives;  // (C,)
  void* d_logits;                // the logits' shape, contiguous

  std::int64_t rows() const { return images * (pixels == 0 ? 1 : pixels); }
};

}  // namespace imbalance
