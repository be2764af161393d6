// The operations' CUDA side: workspaces are allocated and kernels launched on torch's current stream.
#pragma once

#include <c10/core/DeviceGuard.h>
#if !defined(IMBALANCE_EMULATED)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "../cuda/column_sums.h"
#include "../cuda/multilabel_softmax.h"
#include "../cuda/sigmoid_loss.h"
#include "../cuda/softmax_loss.h"
#include "calls.h"

namespace imbalance {
namespace {

#if defined(IMBALANCE_EMULATED)
cudaStream_t current_stream() { return nullptr; }
void check_launch(cudaError_t error) { TORCH_CHECK(error == cudaSuccess, "CUDA error ", static_cast<int>(error)); }
#else
cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream(); }
void check_launch(cudaError_t error) { C10_CUDA_CHECK(error); }
#endif

// Nothing here waits for the device, so numbers that decide (a normalizer, an upstream gradient of one) stay there.
// What is allocated is of the stream that kernels run on: it may be freed while they still run.
struct Cuda {
  static Tensor empty_gradient(const Tensor& logits) { return at::empty(logits.sizes(), logits.options()); }

  // The sum of numbers (n,), divided by what the loss is.
  static Tensor sum(const Tensor& numbers, const cuda::LossArguments& loss) {
    const Tensor result = at::empty({}, numbers.options());
    const Tensor workspace = at::empty({cuda::sum_workspace(numbers.numel())}, numbers.options());
    check_launch(cuda::sum(dtype_of(numbers), numbers.const_data_ptr(), numbers.numel(), loss.normalizer, loss.divisor,
                           workspace.mutable_data_ptr(), result.mutable_data_ptr(), current_stream()));
    return result;
  }

  static Tensor mean_divisor(const Tensor& logits, int64_t rows, const cuda::LossArguments& loss) {
    const Tensor sums = empty_result(logits, {rows == 0 ? 0 : cuda::partial_sums(rows)});
    check_launch(cuda::weight_sums(loss, rows, sums.mutable_data_ptr(), current_stream()));
    return sums.numel() == 1 ? sums : sum(sums, {});
  }

  // Whether a row's target is a class and no logit is above its own, (N,): one more read of the logits.
  static Tensor highest_targets(const Tensor& logits, const Tensor& target, int64_t ignore_index) {
    const int64_t classes = logits.size(1);
    const Tensor is_class = target.ge(0).logical_and_(target.lt(classes)).logical_and_(target.ne(ignore_index));
    if (classes == 0) return is_class;
    const Tensor index = target.to(at::kLong).masked_fill(is_class.logical_not(), 0);
    const Tensor highest = logits.amax({1}, true);  // (N, 1) or (B, 1, P), and NaN where a logit is
    return logits.gather(1, index.reshape(highest.sizes())).ge(highest).flatten().logical_and_(is_class);
  }

  // With an upstream gradient there is no loss, which is then known already.
  static Tensor loss(const Tensor& logits, const Tensor& d_logits, const OptionalTensor& upstream, RowReports* reports,
                     SPLIT_PARAMETERS, LOSS_PARAMETERS) {
    const c10::DeviceGuard guard(logits.device());
    Split split(logits, SPLIT_NAMES);
    auto loss = loss_arguments<cuda::LossArguments>(split, d_logits, LOSS_NAMES);
    const bool reduced = reduction != "none";
    loss.normalizer = split.scalar("normalizer", normalizer);
    loss.upstream = reduced ? split.scalar("upstream", upstream) : split.row_vector("upstream", upstream);
    loss.upstream_step = reduced ? 0 : 1;
    reports->allocate(logits, target);
    Tensor losses, divisor, highest;
    if (!upstream) {
      losses = empty_result(logits, {split.rows()});
      loss.losses = losses.mutable_data_ptr();
    }
    if (reduction == "mean" && !normalizer) {
      divisor = mean_divisor(logits, split.rows(), loss);
      loss.divisor = divisor.const_data_ptr();
    }
    if (reports->any()) loss.log_probs = reports->log_probs.mutable_data_ptr();
    if (reports->with_correct) highest = highest_targets(logits, target, ignore_index);  // before the gradient
    check_launch(cuda::loss_rows(loss, split.rows(), current_stream()));
    if (reports->with_correct) {  // not where the row is NaN, nor where a normalizer of 0 lets nothing count
      highest.logical_and_(reports->log_probs.eq(reports->log_probs));
      if (normalizer) highest.logical_and_(normalizer->ne(0));
      reports->correct.copy_(highest);
    }
    return reduced && !upstream ? sum(losses, loss) : losses;
  }

  // How many logits a mean over labels counts.
  static Tensor label_count(const Tensor& logits, const SigmoidArguments& call) {
    const Tensor counts = empty_result(logits, {cuda::label_stretches(call.rows())});
    check_launch(cuda::label_counts(call, counts.mutable_data_ptr(), current_stream()));
    return counts.numel() == 1 ? counts : sum(counts, {});
  }

  // With an upstream gradient there is no loss, which is then known already.
  static Tensor sigmoid_loss(const Tensor& logits, const Tensor& d_logits, const OptionalTensor& upstream,
                             SIGMOID_PARAMETERS) {
    const c10::DeviceGuard guard(logits.device());
    SigmoidCall labelled(logits, d_logits, SIGMOID_NAMES);
    const bool reduced = reduction != "none";
    cuda::SigmoidLossArguments loss{
        labelled.arguments, nullptr, labelled.scalar("normalizer", normalizer), nullptr, 1, nullptr};
    Tensor losses, sums, divisor;
    if (upstream && reduced) loss.upstream = labelled.scalar("upstream", upstream);
    if (upstream && !reduced) loss.call.upstream = labelled.of_logits("upstream", *upstream);
    if (!upstream && !reduced) {
      losses = empty_result(logits, logits.sizes());
      loss.call.losses = losses.mutable_data_ptr();
    }
    if (reduction == "mean" && !normalizer) {
      if (loss.call.labels) {
        divisor = label_count(logits, loss.call);
        loss.divisor = divisor.const_data_ptr();
      } else {
        loss.share = 1 / static_cast<double>(logits.numel());
      }
    }
    if (!upstream && reduced) {
      sums = empty_result(logits, {cuda::sigmoid_sums(loss.call)});
      loss.sums = sums.mutable_data_ptr();
    }
    check_launch(cuda::sigmoid_loss(loss, current_stream()));
    if (upstream || !reduced) return losses;
    cuda::LossArguments by{};
    by.normalizer = loss.normalizer;
    by.divisor = loss.divisor;
    if (logits.numel() == 0 && loss.divisor == nullptr && reduction == "mean" && !normalizer) {
      return empty_result(logits, {}).fill_(std::numeric_limits<double>::quiet_NaN());
    }
    return sum(sums, by);
  }

  static Tensor multilabel_softmax(const Tensor& logits, const Tensor& d_logits, const OptionalTensor& upstream,
                                   MULTILABEL_PARAMETERS) {
    const c10::DeviceGuard guard(logits.device());
    MultilabelCall multilabel(logits, d_logits, MULTILABEL_NAMES);
    cuda::MultilabelLossArguments loss{multilabel.arguments, 0, multilabel.scalar("normalizer", normalizer), nullptr};
    MultilabelArguments& call = loss.call;
    const bool reduced = reduction != "none";
    call.upstream =
        reduced ? multilabel.scalar("upstream", upstream) : multilabel.vector("upstream", upstream, call.rows());
    loss.upstream_step = reduced ? 0 : 1;
    cuda::LossArguments sums{};  // what a mean divides by, and how the losses are summed
    sums.split.dtype = call.dtype;
    sums.split.target = call.labels;
    sums.split.classes = call.classes + 1;  // the background counts
    sums.split.ignore_index = ignore_index;
    sums.normalizer = loss.normalizer;
    Tensor losses, divisor;
    if (!upstream) {
      losses = empty_result(logits, {call.rows()});
      call.losses = losses.mutable_data_ptr();
    }
    if (reduction == "mean" && !normalizer) {
      divisor = mean_divisor(logits, call.rows(), sums);
      loss.divisor = sums.divisor = divisor.const_data_ptr();
    }
    check_launch(cuda::multilabel_rows(loss, current_stream()));
    return reduced && !upstream ? sum(losses, sums) : losses;
  }

  // Sums (3, C).
  static Tensor column_sums(const Tensor& logits, const ColumnSumsCall& columns) {
    const ColumnSumsArguments& call = columns.arguments;
    int64_t count = 0;
    check_launch(cuda::column_parts(call, &count));
    const Tensor parts = at::empty({count, 3, call.classes}, logits.options().dtype(at::kDouble));
    const Tensor sums = empty_result(logits, {3, call.classes});
    const Tensor softmax = empty_result(logits, {call.from_softmax ? call.rows() : 0, 2});
    check_launch(cuda::column_sums(call, softmax.mutable_data_ptr(), count, parts.mutable_data_ptr<double>(),
                                   sums.mutable_data_ptr(), current_stream()));
    return sums;
  }

  static void column_sums_gradient(const ColumnSumsCall& columns) {
    check_launch(cuda::column_sums_gradient(columns.arguments, current_stream()));
  }

  static void split_rows(const Split& split, const SplitVectors& out) {
    check_launch(cuda::split_rows(split.arguments, out, split.rows(), current_stream()));
  }

  static void split_backward_rows(const Split& split, const SplitBackwardArguments& backward) {
    check_launch(cuda::split_backward_rows(backward, split.rows(), current_stream()));
  }

  static void scale(const Tensor& gradient, const Tensor& factor) {
    const Tensor by = number("factor", factor, gradient);
    check_launch(cuda::scale(dtype_of(gradient), gradient.mutable_data_ptr(), gradient.stride(0), gradient.size(0),
                             gradient.size(1), by.const_data_ptr(), current_stream()));
  }
};

}  // namespace
}  // namespace imbalance
