// A call of an operation, on either device: its schema, its checks, and the tensors whose memory the kernels get.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/sigmoid_loss.h"
#include "../label_arguments.h"

namespace imbalance {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return Dtype::float32;
    case at::kDouble:
      return Dtype::float64;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      TORCH_CHECK_TYPE(false, "input has dtype ", logits.scalar_type(), ", which the kernels do not take");
  }
}

at::ScalarType accumulate_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A result that is accumulated: () or a vector.
Tensor empty_result(const Tensor& logits, at::IntArrayRef sizes) {
  return at::empty(sizes, logits.options().dtype(accumulate_type(logits)));
}

void check_rows(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1), "logits must be (N, C) rows");
}

// Of a loss: rows, or channels-first.
void check_logits(const Tensor& logits) {
  if (logits.dim() != 3) return check_rows(logits);
  TORCH_CHECK_VALUE(logits.size(2) <= 1 || logits.stride(2) == 1, "channels-first logits must be (B, C, P) of pixels");
}

void check_device(const char* name, const Tensor& tensor, const Tensor& logits) {
  TORCH_CHECK_VALUE(tensor.device() == logits.device(), name, " is on ", tensor.device(), ", but logits are on ",
                    logits.device());
}

// One number that stays on its device, in the type that is accumulated.
Tensor number(const char* name, const Tensor& tensor, const Tensor& logits) {
  TORCH_CHECK_VALUE(tensor.numel() == 1, name, " must be one number");
  check_device(name, tensor, logits);
  return tensor.to(accumulate_type(logits));
}

// The arguments that split a row, as the schema has them.
#define SPLIT_SCHEMA                                                                            \
  "Tensor target, float scale, Tensor? factor, Tensor? bias, float? softcap, str margin_kind, " \
  "float[] margin_parameters, Tensor? class_margin, Tensor? class_weight, float label_smoothing, int ignore_index"
#define SPLIT_PARAMETERS                                                                                   \
  const Tensor &target, double scale, const OptionalTensor &factor, const OptionalTensor &bias,            \
      std::optional<double> softcap, std::string_view margin_kind, at::ArrayRef<double> margin_parameters, \
      const OptionalTensor &class_margin, const OptionalTensor &class_weight, double label_smoothing,      \
      int64_t ignore_index
#define SPLIT_NAMES                                                                                                  \
  target, scale, factor, bias, softcap, margin_kind, margin_parameters, class_margin, class_weight, label_smoothing, \
      ignore_index

// What the kernels get, and the tensors that own its memory.
class Split {
 public:
  SplitArguments arguments{};

  Split(const Tensor& logits, SPLIT_PARAMETERS) : logits_(logits) {
    check_logits(logits);
    arguments.dtype = dtype_of(logits);
    arguments.classes = logits.size(1);
    arguments.logits = logits.const_data_ptr();
    arguments.row_stride = logits.stride(0);
    if (logits.dim() == 3) {
      arguments.pixels = logits.size(2);
      arguments.class_stride = logits.stride(1);
    }
    check_device("target", target, logits);
    if (at::isFloatingType(target.scalar_type())) {
      TORCH_CHECK_VALUE(target.sizes() == logits.sizes(), "class probabilities must have the logits' shape");
      arguments.probabilities_are_logits_dtype = target.scalar_type() == logits.scalar_type();
      const Tensor usable = arguments.probabilities_are_logits_dtype ? target : target.to(accumulate_type(logits));
      arguments.probabilities = keep(usable).const_data_ptr();
    } else {
      TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == rows(), "target must be (N,)");
      arguments.target = keep(target.to(at::kLong)).const_data_ptr<int64_t>();
    }
    arguments.ignore_index = ignore_index;
    arguments.scale = scale;
    arguments.factor = class_vector("factor", factor);
    arguments.bias = class_vector("bias", bias);
    arguments.softcap = softcap.value_or(0.0);
    arguments.margin_kind = margin_kind_of(margin_kind);
    TORCH_CHECK_VALUE(margin_parameters.size() <= 4, "margin_parameters holds more than 4 numbers");
    std::copy(margin_parameters.begin(), margin_parameters.end(), arguments.margin_parameters);
    arguments.class_margin = class_vector("margin", class_margin);
    arguments.class_weight = class_vector("weight", class_weight);
    arguments.label_smoothing = label_smoothing;
  }

  const void* class_vector(const char* name, const OptionalTensor& vector) {
    if (!vector) return nullptr;
    TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == arguments.classes, name, " must be (C,)");
    return constant(name, *vector);
  }

  const void* row_vector(const char* name, const OptionalTensor& vector) {
    if (!vector) return nullptr;
    TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == rows(), name, " must be (N,)");
    return constant(name, *vector);
  }

  const void* scalar(const char* name, const OptionalTensor& scalar) {
    return scalar ? keep(number(name, *scalar, logits_)).const_data_ptr() : nullptr;
  }

  int64_t rows() const { return logits_.dim() == 3 ? logits_.size(0) * logits_.size(2) : logits_.size(0); }
  bool has_weights() const { return arguments.target == nullptr || arguments.label_smoothing > 0; }

 private:
  const Tensor logits_;
  std::vector<Tensor> kept_;

  const Tensor& keep(const Tensor& tensor) { return kept_.emplace_back(tensor.contiguous()); }

  const void* constant(const char* name, const Tensor& vector) {
    TORCH_CHECK_TYPE(vector.scalar_type() == accumulate_type(logits_), name, " must be ", accumulate_type(logits_));
    check_device(name, vector, logits_);
    return keep(vector).const_data_ptr();
  }

  static MarginKind margin_kind_of(std::string_view name) {
    if (name == "additive") return MarginKind::additive;
    if (name == "angular") return MarginKind::angular;
    TORCH_CHECK_VALUE(name == "circle", "margin_kind is '", name, "', but it must be additive, angular or circle");
    return MarginKind::circle;
  }
};

ObjectiveKind objective_of(std::string_view name) {
  int index = 0;
  for (const char* known : kObjectiveNames) {
    if (name == known) return static_cast<ObjectiveKind>(index);
    ++index;
  }
  TORCH_CHECK_VALUE(false, "objective is '", name, "', which the kernels do not know");
}

#define LOSS_SCHEMA                                                                                                   \
  "str objective, float[] objective_parameters, Tensor? class_parameter, Tensor? sample_weight, Tensor? normalizer, " \
  "str reduction, float z_loss"
#define LOSS_PARAMETERS                                                                                         \
  std::string_view objective, at::ArrayRef<double> objective_parameters, const OptionalTensor &class_parameter, \
      const OptionalTensor &sample_weight, const OptionalTensor &normalizer, std::string_view reduction, double z_loss
#define LOSS_NAMES objective, objective_parameters, class_parameter, sample_weight, normalizer, reduction, z_loss

// What a loss may tell of its rows beside what they cost, and where a device puts it.
struct RowReports {
  bool with_log_probs, with_correct;
  Tensor log_probs;  // (N,) of the targets, 0 where nothing counts
  Tensor correct;    // (N,) bool: whether no logit is above the target's

  std::tuple<Tensor, Tensor> of(const Tensor& logits) const {
    const auto none = [&](at::ScalarType type) { return at::empty({0}, logits.options().dtype(type)); };
    return {with_log_probs ? log_probs : none(accumulate_type(logits)), with_correct ? correct : none(at::kBool)};
  }
  bool any() const { return with_log_probs || with_correct; }

  // Before rows are read. What is correct depends on log_probs, which say where a row is NaN.
  void allocate(const Tensor& logits, const Tensor& target) {
    if (!any()) return;
    TORCH_CHECK_VALUE(!at::isFloatingType(target.scalar_type()), "log_probs and correct need class indices");
    log_probs = empty_result(logits, target.sizes());
    if (with_correct) correct = at::empty(target.sizes(), logits.options().dtype(at::kBool));
  }
};
#define REPORTS_SCHEMA "bool with_log_probs, bool with_correct"

// What both devices' LossArguments have in common.
template <class LossArguments>
LossArguments loss_arguments(Split& split, const Tensor& d_logits, LOSS_PARAMETERS) {
  TORCH_CHECK_VALUE(reduction == "none" || reduction == "sum" || reduction == "mean", "reduction is '", reduction, "'");
  TORCH_CHECK_VALUE(!normalizer || normalizer->numel() == 1, "normalizer must be one number");
  LossArguments loss{};
  loss.split = split.arguments;
  loss.objective = objective_of(objective);
  TORCH_CHECK_VALUE(objective_parameters.size() <= 2, "objective_parameters holds more than 2 numbers");
  std::copy(objective_parameters.begin(), objective_parameters.end(), loss.objective_parameters);
  loss.class_parameter = split.class_vector("class_parameter", class_parameter);
  loss.sample_weight = split.row_vector("sample_weight", sample_weight);
  loss.z_loss = z_loss;
  if (d_logits.defined()) {
    loss.d_logits = d_logits.mutable_data_ptr();
    loss.gradient_stride = d_logits.stride(0);
    loss.gradient_class_stride = d_logits.stride(1);
  }
  return loss;
}

#define SIGMOID_SCHEMA                                                                                      \
  "Tensor target, str objective, float[] objective_parameters, Tensor? class_parameter, float positive, "   \
  "float negative, Tensor? positive_weight, Tensor? negative_weight, Tensor? bias, Tensor? sample_weight, " \
  "Tensor? normalizer, int ignore_index, str reduction"
#define SIGMOID_PARAMETERS                                                                                            \
  const Tensor &target, std::string_view objective, at::ArrayRef<double> objective_parameters,                        \
      const OptionalTensor &class_parameter, double positive, double negative, const OptionalTensor &positive_weight, \
      const OptionalTensor &negative_weight, const OptionalTensor &bias, const OptionalTensor &sample_weight,         \
      const OptionalTensor &normalizer, int64_t ignore_index, std::string_view reduction
#define SIGMOID_NAMES                                                                                             \
  target, objective, objective_parameters, class_parameter, positive, negative, positive_weight, negative_weight, \
      bias, sample_weight, normalizer, ignore_index, reduction

BinaryObjectiveKind binary_objective_of(std::string_view name) {
  int index = 0;
  for (const char* known : kBinaryObjectiveNames) {
    if (name == known) return static_cast<BinaryObjectiveKind>(index);
    ++index;
  }
  TORCH_CHECK_VALUE(false, "objective is '", name, "', which the kernels do not know");
}

#define MULTILABEL_SCHEMA \
  "Tensor target, Tensor? bias, Tensor? sample_weight, Tensor? normalizer, int ignore_index, str reduction"
#define MULTILABEL_PARAMETERS                                                            \
  const Tensor &target, const OptionalTensor &bias, const OptionalTensor &sample_weight, \
      const OptionalTensor &normalizer, int64_t ignore_index, std::string_view reduction
#define MULTILABEL_NAMES target, bias, sample_weight, normalizer, ignore_index, reduction

// Labels beside logits (N, C) or (B, C, P), and the tensors that own the memory of what kernels get.
class BesideLogits {
 public:
  explicit BesideLogits(const Tensor& logits) : logits_(logits) {}

  // Sets the layout of the logits in a call's arguments.
  template <class Arguments>
  void set_logits(Arguments* arguments) const {
    const bool images = logits_.dim() == 3;
    TORCH_CHECK_VALUE(images || logits_.dim() == 2, "logits must be (N, C) rows or (B, C, P) images");
    TORCH_CHECK_VALUE(logits_.size(-1) <= 1 || logits_.stride(-1) == 1,
                      "logits must have a last dimension of stride 1");
    arguments->dtype = dtype_of(logits_);
    arguments->images = logits_.size(0);
    arguments->classes = logits_.size(1);
    arguments->pixels = images ? logits_.size(2) : 0;
    if (images && arguments->pixels == 0) arguments->images = 0;
    arguments->logits = logits_.const_data_ptr();
    arguments->image_stride = logits_.stride(0);
    arguments->class_stride = images ? logits_.stride(1) : 1;
  }

  // Sets labels, lists or dense of a call's arguments.
  template <class Arguments>
  void set_labels(const Tensor& target, int64_t rows, Arguments* arguments) {
    check_device("target", target, logits_);
    const bool boolean = target.scalar_type() == at::kBool;
    if (boolean || at::isFloatingType(target.scalar_type())) {
      TORCH_CHECK_VALUE(target.sizes() == logits_.sizes(), "dense labels must have the logits' shape");
      const bool as_logits = target.scalar_type() == logits_.scalar_type();
      arguments->label_type = boolean ? LabelType::boolean : as_logits ? LabelType::logits : LabelType::accumulate;
      arguments->dense = keep(boolean || as_logits ? target : target.to(accumulate_type(logits_))).const_data_ptr();
      return;
    }
    TORCH_CHECK_VALUE((target.dim() == 1 || target.dim() == 2) && target.size(0) == rows,
                      "target must be (N,) labels or (N, K) lists of classes");
    const int64_t* const indices = keep(target.to(at::kLong)).const_data_ptr<int64_t>();
    (target.dim() == 1 ? arguments->labels : arguments->lists) = indices;
    arguments->list_length = target.dim() == 1 ? 0 : target.size(1);
    // An empty list has no memory, and is a list nevertheless.
    if (target.dim() == 2 && indices == nullptr) arguments->lists = &kNoLabel;
  }

  // Sets the layout of the gradient where there is one.
  template <class Arguments>
  void set_gradient(const Tensor& d_logits, Arguments* arguments) const {
    if (!d_logits.defined()) return;
    arguments->d_logits = d_logits.mutable_data_ptr();
    arguments->gradient_image_stride = d_logits.stride(0);
    arguments->gradient_class_stride = d_logits.stride(1);
  }

  static void check_reduction(std::string_view reduction, const OptionalTensor& normalizer) {
    TORCH_CHECK_VALUE(reduction == "none" || reduction == "sum" || reduction == "mean", "reduction is '", reduction,
                      "'");
    TORCH_CHECK_VALUE(!normalizer || normalizer->numel() == 1, "normalizer must be one number");
  }

  const void* vector(const char* name, const OptionalTensor& vector, int64_t size) {
    if (!vector) return nullptr;
    TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == size, name, " must be (", size, ",)");
    return constant(name, *vector);
  }

  const void* of_logits(const char* name, const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.sizes() == logits_.sizes(), name, " must have the logits' shape");
    return constant(name, tensor);
  }

  const void* scalar(const char* name, const OptionalTensor& scalar) {
    return scalar ? keep(number(name, *scalar, logits_)).const_data_ptr() : nullptr;
  }

 private:
  static constexpr int64_t kNoLabel = 0;
  const Tensor logits_;
  std::vector<Tensor> kept_;

  const Tensor& keep(const Tensor& tensor) { return kept_.emplace_back(tensor.contiguous()); }

  const void* constant(const char* name, const Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == accumulate_type(logits_), name, " must be ", accumulate_type(logits_));
    check_device(name, tensor, logits_);
    return keep(tensor).const_data_ptr();
  }
};

// What the kernels of sigmoid_loss get, and the tensors that own its memory.
class SigmoidCall : public BesideLogits {
 public:
  SigmoidArguments arguments{};

  SigmoidCall(const Tensor& logits, const Tensor& d_logits, SIGMOID_PARAMETERS) : BesideLogits(logits) {
    set_logits(&arguments);
    set_labels(target, arguments.rows(), &arguments);
    set_gradient(d_logits, &arguments);
    check_reduction(reduction, normalizer);
    arguments.ignore_index = ignore_index;
    arguments.objective = binary_objective_of(objective);
    TORCH_CHECK_VALUE(objective_parameters.size() <= 3, "objective_parameters holds more than 3 numbers");
    std::copy(objective_parameters.begin(), objective_parameters.end(), arguments.objective_parameters);
    arguments.class_parameter = vector("class_parameter", class_parameter, arguments.classes);
    arguments.positive = positive;
    arguments.negative = negative;
    arguments.positive_weight = vector("positive_weight", positive_weight, arguments.classes);
    arguments.negative_weight = vector("negative_weight", negative_weight, arguments.classes);
    arguments.bias = vector("bias", bias, arguments.classes);
    arguments.weight_of_logits = sample_weight && sample_weight->dim() == logits.dim();
    arguments.sample_weight = arguments.weight_of_logits ? of_logits("sample_weight", *sample_weight)
                                                         : vector("sample_weight", sample_weight, arguments.rows());
  }
};

// What the kernels of multilabel_softmax get.
class MultilabelCall : public BesideLogits {
 public:
  MultilabelArguments arguments{};

  MultilabelCall(const Tensor& logits, const Tensor& d_logits, MULTILABEL_PARAMETERS) : BesideLogits(logits) {
    set_logits(&arguments);
    set_labels(target, arguments.rows(), &arguments);
    arguments.ignore_index = ignore_index;
    set_gradient(d_logits, &arguments);
    check_reduction(reduction, normalizer);
    arguments.bias = vector("bias", bias, arguments.classes);
    arguments.sample_weight = vector("sample_weight", sample_weight, arguments.rows());
  }
};

#define COLUMN_SUMS_SCHEMA "Tensor target, Tensor? sample_weight, int ignore_index, bool from_softmax"
#define COLUMN_SUMS_PARAMETERS \
  const Tensor &target, const OptionalTensor &sample_weight, int64_t ignore_index, bool from_softmax
#define COLUMN_SUMS_NAMES target, sample_weight, ignore_index, from_softmax

// What the kernels of column_sums get.
class ColumnSumsCall : public BesideLogits {
 public:
  ColumnSumsArguments arguments{};

  ColumnSumsCall(const Tensor& logits, COLUMN_SUMS_PARAMETERS) : BesideLogits(logits) {
    set_logits(&arguments);
    set_labels(target, arguments.rows(), &arguments);
    arguments.ignore_index = ignore_index;
    arguments.sample_weight = vector("sample_weight", sample_weight, arguments.rows());
    arguments.from_softmax = from_softmax;
  }
};

}  // namespace
}  // namespace imbalance
