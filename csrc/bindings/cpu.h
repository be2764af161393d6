// The operations' CPU side: targets are checked, rows are shared out among threads, and sums are in double.
#pragma once

#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../cpu/column_sums.h"
#include "../cpu/multilabel_softmax.h"
#include "../cpu/sigmoid_loss.h"
#include "../cpu/softmax_loss.h"
#include "calls.h"

namespace imbalance {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kGrain = 16384;  // logits that are worth a thread
constexpr int64_t kTargetGrain = 65536;
constexpr int64_t kPixels = 64;  // that one thread takes, at least

// The sum of value(i) for i < n in double, in an order that depends on n alone.
template <class Value>
double sum_of(int64_t n, const Value& value) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) sums[k] += value(i + k);
  }
  for (; i < n; ++i) sums[i % 8] += value(i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The mean's divisor: the sum of sample weight * class weight over rows that count, of which there are `valid`.
template <class T>
double divisor_of(const cpu::LossArguments& loss, int64_t rows, int64_t valid) {
  const auto* sample_weight = static_cast<const T*>(loss.sample_weight);
  const auto* class_weight = static_cast<const T*>(loss.split.class_weight);
  const int64_t* target = loss.split.target;
  const int64_t ignore_index = loss.split.ignore_index;
  if (sample_weight == nullptr && (target == nullptr || class_weight == nullptr)) return static_cast<double>(valid);
  return sum_of(rows, [&](int64_t row) {
    if (target != nullptr && target[row] == ignore_index) return 0.0;
    const double weight = sample_weight != nullptr ? sample_weight[row] : 1.0;
    return target != nullptr && class_weight != nullptr ? weight * class_weight[target[row]] : weight;
  });
}

// Page faults on fresh memory cost more than the arithmetic: asks for huge pages.
void ask_for_huge_pages([[maybe_unused]] uintptr_t begin, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct Cpu {
  static Tensor empty_gradient(const Tensor& logits) {
    Tensor gradient = at::empty(logits.sizes(), logits.options());
    ask_for_huge_pages(reinterpret_cast<uintptr_t>(gradient.mutable_data_ptr()), gradient.nbytes());
    return gradient;
  }

  // How many of the first `count` targets are classes, and how many neither that nor ignored.
  static cpu::TargetCounts count_targets(const SplitArguments& arguments, int64_t count) {
    const auto add = [](cpu::TargetCounts a, cpu::TargetCounts b) {
      return cpu::TargetCounts{a.classes + b.classes, a.outside + b.outside};
    };
    const auto count_more = [&](int64_t first, int64_t last, cpu::TargetCounts before) {
      return add(before, cpu::kernels()->count_targets(arguments, first, last));
    };
    return at::parallel_reduce(0, count, kTargetGrain, cpu::TargetCounts{0, 0}, count_more, add);
  }

  // Returns how many rows count.
  static int64_t check_targets(const Split& split) {
    const SplitArguments& arguments = split.arguments;
    if (arguments.target == nullptr) return split.rows();
    const cpu::TargetCounts counts = count_targets(arguments, split.rows());
    for (int64_t row = 0; counts.outside > 0 && row < split.rows(); ++row) {
      const int64_t target = arguments.target[row];
      const bool inside = target >= 0 && target < arguments.classes;
      TORCH_CHECK_INDEX(inside || target == arguments.ignore_index, "target ", target,
                        " is out of bounds: it must be in [0, ", arguments.classes,
                        ") or ignore_index=", arguments.ignore_index);
    }
    return counts.classes;
  }

  // Calls body(first_row, last_row, scratch) over all rows, of which pixels share cache lines, from torch's threads.
  template <class Body>
  static void for_rows(int64_t rows, int64_t classes, int64_t pixels, std::size_t scratch_bytes, const Body& body) {
    const int64_t bytes = (static_cast<int64_t>(scratch_bytes) + 63) / 64 * 64;
    const Tensor scratch = at::empty({at::get_num_threads() * bytes}, at::kByte);
    uint8_t* const memory = scratch.mutable_data_ptr<uint8_t>();
    const int64_t unit = pixels > 0 ? kPixels : 1;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, unit * classes));
    at::parallel_for(0, (rows + unit - 1) / unit, grain, [&](int64_t first, int64_t last) {
      body(first * unit, std::min(last * unit, rows), memory + at::get_thread_num() * bytes);
    });
  }
  template <class Body>
  static void for_rows(const Split& split, const Body& body) {
    const SplitArguments& arguments = split.arguments;
    const std::size_t bytes = cpu::kernels()->scratch_bytes(arguments);
    for_rows(split.rows(), arguments.classes, arguments.pixels, bytes, body);
  }

  template <class T>
  static Tensor loss_in(const Tensor& logits, const Tensor& d_logits, const OptionalTensor& upstream,
                        RowReports* reports, SPLIT_PARAMETERS, LOSS_PARAMETERS) {
    Split split(logits, SPLIT_NAMES);
    auto loss = loss_arguments<cpu::LossArguments>(split, d_logits, LOSS_NAMES);
    const bool reduced = reduction != "none";
    if (upstream && !reduced) loss.upstream = split.row_vector("upstream", upstream);
    const int64_t valid = check_targets(split);
    reports->allocate(logits, target);
    double divisor = 1;
    if (normalizer) {
      divisor = normalizer->item<double>();
    } else if (reduction == "mean") {
      divisor = divisor_of<T>(loss, split.rows(), valid);
    }
    if (normalizer && divisor == 0) {  // gives 0, whatever the rows hold
      if (d_logits.defined()) d_logits.zero_();
      if (reports->log_probs.defined()) reports->log_probs.zero_();
      if (reports->correct.defined()) reports->correct.zero_();
      return empty_result(logits, {}).zero_();
    }
    loss.inverse_divisor = 1 / divisor;
    if (upstream && reduced) loss.inverse_divisor *= upstream->item<double>();
    const Tensor losses = empty_result(logits, {split.rows()});
    loss.losses = losses.mutable_data_ptr();
    if (reports->log_probs.defined()) loss.log_probs = reports->log_probs.mutable_data_ptr();
    if (reports->correct.defined()) loss.correct = reports->correct.mutable_data_ptr<bool>();
    const auto run = cpu::kernels()->loss[static_cast<int>(loss.split.dtype)];
    for_rows(split, [&](int64_t first, int64_t last, void* scratch) { run(loss, first, last, scratch); });
    if (!reduced) return losses;
    const T* const row_losses = losses.const_data_ptr<T>();
    const double total = sum_of(split.rows(), [&](int64_t row) { return row_losses[row]; });
    return empty_result(logits, {}).fill_(total / divisor);
  }

  static Tensor loss(const Tensor& logits, const Tensor& d_logits, const OptionalTensor& upstream, RowReports* reports,
                     SPLIT_PARAMETERS, LOSS_PARAMETERS) {
    const auto run = logits.scalar_type() == at::kDouble ? &loss_in<double> : &loss_in<float>;
    return run(logits, d_logits, upstream, reports, SPLIT_NAMES, LOSS_NAMES);
  }

  // Labels are in [0, C], those of lists in [0, C), or ignored. Returns how many rows count.
  template <class Arguments>
  static int64_t check_labels(const Arguments& call, int64_t rows) {
    SplitArguments targets{};
    targets.target = call.labels ? call.labels : call.lists;
    if (targets.target == nullptr) return rows;
    targets.classes = call.classes + (call.labels ? 1 : 0);  // the background counts
    targets.ignore_index = call.ignore_index;
    const int64_t count = rows * (call.labels ? 1 : call.list_length);
    const cpu::TargetCounts counts = count_targets(targets, count);
    for (int64_t i = 0; counts.outside > 0 && i < count; ++i) {
      const int64_t target = targets.target[i];
      const bool inside = target >= 0 && target < targets.classes;
      TORCH_CHECK_INDEX(inside || target == call.ignore_index, "target ", target,
                        " is out of bounds: it must be in [0, ", targets.classes - 1, "]",
                        call.labels ? " (the last is the background)" : "", " or ignore_index=", call.ignore_index);
    }
    return call.labels ? counts.classes : rows;
  }

  static Tensor sigmoid_loss(const Tensor& logits, const Tensor& d_logits, const OptionalTensor& upstream,
                             SIGMOID_PARAMETERS) {
    SigmoidCall labelled(logits, d_logits, SIGMOID_NAMES);
    cpu::SigmoidLossArguments loss{labelled.arguments, 1};
    SigmoidArguments& call = loss.call;
    const bool reduced = reduction != "none";
    const int64_t valid = check_labels(call, call.rows());
    double divisor = 1;
    if (normalizer) {
      divisor = normalizer->item<double>();
    } else if (reduction == "mean") {
      divisor = static_cast<double>(valid) * static_cast<double>(call.classes);
    }
    if (normalizer && divisor == 0) {  // gives 0, whatever the logits hold
      if (d_logits.defined()) d_logits.zero_();
      return empty_result(logits, {}).zero_();
    }
    loss.inverse_divisor = 1 / divisor;
    if (upstream && reduced) loss.inverse_divisor *= upstream->item<double>();
    if (upstream && !reduced) call.upstream = labelled.of_logits("upstream", *upstream);
    const Tensor losses = reduced || upstream ? Tensor() : empty_result(logits, logits.sizes());
    if (losses.defined()) call.losses = losses.mutable_data_ptr();
    const auto* const kernels = cpu::sigmoid_kernels();
    const int64_t tiles = kernels->tiles(call);
    const auto run = kernels->loss[static_cast<int>(call.dtype)];
    const auto bytes = static_cast<int64_t>(kernels->scratch_bytes(call));
    const Tensor scratch = at::empty({at::get_num_threads() * bytes}, at::kByte);
    const Tensor sums = at::empty({tiles}, at::kDouble);
    uint8_t* const memory = scratch.mutable_data_ptr<uint8_t>();
    double* const of_tiles = sums.mutable_data_ptr<double>();
    const int64_t grain = std::max<int64_t>(1, kGrain * tiles / std::max<int64_t>(1, logits.numel()));
    at::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) {
      run(loss, first, last, memory + at::get_thread_num() * bytes, of_tiles);
    });
    if (!reduced) return losses;
    return empty_result(logits, {}).fill_(sum_of(tiles, [&](int64_t tile) { return of_tiles[tile]; }) / divisor);
  }

  static Tensor multilabel_softmax(const Tensor& logits, const Tensor& d_logits, const OptionalTensor& upstream,
                                   MULTILABEL_PARAMETERS) {
    MultilabelCall multilabel(logits, d_logits, MULTILABEL_NAMES);
    cpu::MultilabelLossArguments loss{multilabel.arguments, 1};
    MultilabelArguments& call = loss.call;
    const bool reduced = reduction != "none";
    const int64_t rows = call.rows();
    const int64_t valid = check_labels(call, rows);
    double divisor = 1;
    if (normalizer) {
      divisor = normalizer->item<double>();
    } else if (reduction == "mean") {
      divisor = static_cast<double>(valid);
    }
    if (normalizer && divisor == 0) {  // gives 0, whatever the rows hold
      if (d_logits.defined()) d_logits.zero_();
      return empty_result(logits, {}).zero_();
    }
    loss.inverse_divisor = 1 / divisor;
    if (upstream && reduced) loss.inverse_divisor *= upstream->item<double>();
    if (upstream && !reduced) call.upstream = multilabel.vector("upstream", upstream, rows);
    const Tensor losses = upstream ? Tensor() : empty_result(logits, {rows});
    if (losses.defined()) call.losses = losses.mutable_data_ptr();
    const auto* const kernels = cpu::multilabel_kernels();
    const auto run = kernels->loss[static_cast<int>(call.dtype)];
    for_rows(rows, call.classes, call.pixels, kernels->scratch_bytes(call),
             [&](int64_t first, int64_t last, void* scratch) { run(loss, first, last, scratch); });
    if (!reduced || upstream) return losses;
    const auto sum = [&](const auto* of_rows) { return sum_of(rows, [&](int64_t row) { return of_rows[row]; }); };
    const double total =
        call.dtype == Dtype::float64 ? sum(losses.const_data_ptr<double>()) : sum(losses.const_data_ptr<float>());
    return empty_result(logits, {}).fill_(total / divisor);
  }

  // Calls run(first_tile, last_tile, scratch) over all tiles, from torch's threads.
  template <class Run>
  static void for_column_tiles(const ColumnSumsArguments& call, const Run& run) {
    const auto* const kernels = cpu::column_sums_kernels();
    const auto bytes = (static_cast<int64_t>(kernels->scratch_bytes(call)) + 63) / 64 * 64;
    const Tensor scratch = at::empty({at::get_num_threads() * bytes}, at::kByte);
    uint8_t* const memory = scratch.mutable_data_ptr<uint8_t>();
    const int64_t tiles = kernels->tiles(call), logits = call.rows() * call.classes;
    const int64_t grain = std::max<int64_t>(1, kGrain * tiles / std::max<int64_t>(1, logits));
    at::parallel_for(0, tiles, grain,
                     [&](int64_t first, int64_t last) { run(first, last, memory + at::get_thread_num() * bytes); });
  }

  // Sums (3, C).
  static Tensor column_sums(const Tensor& logits, const ColumnSumsCall& columns) {
    const ColumnSumsArguments& call = columns.arguments;
    check_labels(call, call.rows());
    const auto* const kernels = cpu::column_sums_kernels();
    const int64_t parts = kernels->parts(call), width = 3 * call.classes;
    const Tensor sums = at::empty({parts, width}, at::kDouble);
    double* const of_parts = sums.mutable_data_ptr<double>();
    const auto run = kernels->sums[static_cast<int>(call.dtype)];
    for_column_tiles(call,
                     [&](int64_t first, int64_t last, void* scratch) { run(call, first, last, scratch, of_parts); });
    const Tensor result = empty_result(logits, {3, call.classes});
    const auto add_up = [&](auto* totals) {
      const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, parts));
      at::parallel_for(0, width, grain, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          double total = 0;
          for (int64_t part = 0; part < parts; ++part) total += of_parts[part * width + i];
          totals[i] = static_cast<std::remove_reference_t<decltype(*totals)>>(total);
        }
      });
    };
    if (call.dtype == Dtype::float64) {
      add_up(result.mutable_data_ptr<double>());
    } else {
      add_up(result.mutable_data_ptr<float>());
    }
    return result;
  }

  static void column_sums_gradient(const ColumnSumsCall& columns) {
    const ColumnSumsArguments& call = columns.arguments;
    check_labels(call, call.rows());
    const auto run = cpu::column_sums_kernels()->gradient[static_cast<int>(call.dtype)];
    for_column_tiles(call, [&](int64_t first, int64_t last, void* scratch) { run(call, first, last, scratch); });
  }

  static void split_rows(const Split& split, const SplitVectors& out) {
    check_targets(split);
    const auto run = cpu::kernels()->split[static_cast<int>(split.arguments.dtype)];
    for_rows(split,
             [&](int64_t first, int64_t last, void* scratch) { run(split.arguments, out, first, last, scratch); });
  }

  static void split_backward_rows(const Split& split, const SplitBackwardArguments& backward) {
    check_targets(split);
    const auto run = cpu::kernels()->split_backward[static_cast<int>(split.arguments.dtype)];
    for_rows(split, [&](int64_t first, int64_t last, void* scratch) { run(backward, first, last, scratch); });
  }

  static void scale(const Tensor& gradient, const Tensor& factor) {
    if (factor.item<double>() != 1) gradient.mul_(factor);
  }
};

}  // namespace
}  // namespace imbalance
