// What bindings.cpp asks of the CPU kernels: plain pointers, sizes and strides. No torch and no threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../arguments.h"
#include "../objectives.h"

namespace imbalance::cpu {

struct LossArguments {
  SplitArguments split;
  ObjectiveKind objective;
  double objective_parameters[2];
  const void* class_parameter;  // (C,)
  const void* sample_weight;    // (N,)
  double inverse_divisor;       // of the gradient
  const void* upstream;         // (N,) factor of the gradient, or null
  double z_loss;
  void* losses;                  // (N,) float or double, not divided
  void* log_probs;               // (N,) as the losses: of the targets, 0 where ignored; null: not asked for
  bool* correct;                 // (N,) whether no raw logit is above the target's; null: not asked for
  void* d_logits;                // in the logits' shape, may be the logits themselves; null for the losses alone
  std::int64_t gradient_stride;  // of rows; of images where logits are channels-first
  std::int64_t gradient_class_stride;
};

// How many rows' targets are classes, and how many neither classes nor ignored.
struct TargetCounts {
  std::int64_t classes;
  std::int64_t outside;
};

// The kernels of one instruction set, by Dtype; each works on rows [first_row, last_row).
struct Kernels {
  const char* name;
  std::size_t (*scratch_bytes)(const SplitArguments&);  // 64-byte aligned, of each call
  TargetCounts (*count_targets)(const SplitArguments&, std::int64_t first_row, std::int64_t last_row);
  void (*loss[4])(const LossArguments&, std::int64_t first_row, std::int64_t last_row, void* scratch);
  void (*split[4])(const SplitArguments&, const SplitVectors&, std::int64_t first_row, std::int64_t last_row,
                   void* scratch);
  void (*split_backward[4])(const SplitBackwardArguments&, std::int64_t first_row, std::int64_t last_row,
                            void* scratch);
};

const Kernels* baseline_kernels();  // what every processor of the architecture has: SSE2, NEON
#if defined(__x86_64__)
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
#endif

// The widest that this processor has, or the one that IMBALANCE_KERNELS_INSTRUCTION_SET names; null where that is not
// to be had.
const Kernels* kernels();

// The names of those in this binary, widest last; `count` gets their number.
const char* const* instruction_sets(int* count);

}  // namespace imbalance::cpu
