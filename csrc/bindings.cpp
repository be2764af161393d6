// The only file that knows torch: checks, allocation, threads and streams, the registration of the operations, and
// build information.
//
// The Python side (imbalance_kernels/ops) checks arguments with messages for users; what is checked here keeps memory
// safe when an operation is called directly. On the CPU targets are checked here for both, since reading them is part
// of the kernel's work; on a GPU nobody reads them but the kernels, which make the rows of wrong ones NaN.
//
// setup.py defines IMBALANCE_WITH_CUDA, the architectures, where it builds the CUDA kernels. Tests define
// IMBALANCE_EMULATED beside it: then those kernels are the only ones, run on the CPU (tests/emulation), and there is no
// CUDA runtime and no Python module.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#include <torch/version.h>

#include <limits>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/column_sums.h"
#include "cpu/multilabel_softmax.h"
#include "cpu/sigmoid_loss.h"
#include "cpu/softmax_loss.h"

#if defined(IMBALANCE_WITH_CUDA)
#include "cuda/column_sums.h"
#include "cuda/multilabel_softmax.h"
#include "cuda/sigmoid_loss.h"
#include "cuda/softmax_loss.h"
#endif

#if !defined(IMBALANCE_EMULATED)
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#if defined(IMBALANCE_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif
#endif

namespace imbalance {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---------------------------------------------------------------- arguments, on either device

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

// What the kernels of sigmoid_loss get, and the tensors that own its memory.
class Labelled {
 public:
  SigmoidArguments arguments{};

  Labelled(const Tensor& logits, const Tensor& d_logits, SIGMOID_PARAMETERS) : logits_(logits) {
    const bool images = logits.dim() == 3;
    TORCH_CHECK_VALUE(images || logits.dim() == 2, "logits must be (N, C) rows or (B, C, P) images");
    TORCH_CHECK_VALUE(logits.size(-1) <= 1 || logits.stride(-1) == 1, "logits must have a last dimension of stride 1");
    arguments.dtype = dtype_of(logits);
    arguments.images = logits.size(0);
    arguments.classes = logits.size(1);
    arguments.pixels = images ? logits.size(2) : 0;
    if (images && arguments.pixels == 0) arguments.images = 0;
    arguments.logits = logits.const_data_ptr();
    arguments.image_stride = logits.stride(0);
    arguments.class_stride = images ? logits.stride(1) : 1;
    check_device("target", target, logits);
    set_target(target);
    arguments.ignore_index = ignore_index;
    TORCH_CHECK_VALUE(reduction == "none" || reduction == "sum" || reduction == "mean", "reduction is '", reduction,
                      "'");
    TORCH_CHECK_VALUE(!normalizer || normalizer->numel() == 1, "normalizer must be one number");
    arguments.objective = binary_objective_of(objective);
    TORCH_CHECK_VALUE(objective_parameters.size() <= 3, "objective_parameters holds more than 3 numbers");
    std::copy(objective_parameters.begin(), objective_parameters.end(), arguments.objective_parameters);
    arguments.class_parameter = class_vector("class_parameter", class_parameter);
    arguments.positive = positive;
    arguments.negative = negative;
    arguments.positive_weight = class_vector("positive_weight", positive_weight);
    arguments.negative_weight = class_vector("negative_weight", negative_weight);
    arguments.bias = class_vector("bias", bias);
    arguments.weight_of_logits = sample_weight && sample_weight->dim() == logits.dim();
    if (sample_weight && !arguments.weight_of_logits) {
      TORCH_CHECK_VALUE(sample_weight->dim() == 1 && sample_weight->size(0) == arguments.rows(),
                        "sample_weight must be (N,)");
      arguments.sample_weight = constant("sample_weight", *sample_weight);
    } else if (sample_weight) {
      arguments.sample_weight = of_logits("sample_weight", *sample_weight);
    }
    if (d_logits.defined()) {
      arguments.d_logits = d_logits.mutable_data_ptr();
      arguments.gradient_image_stride = d_logits.stride(0);
      arguments.gradient_class_stride = images ? d_logits.stride(1) : 1;
    }
  }

  const void* of_logits(const char* name, const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.sizes() == logits_.sizes(), name, " must have the logits' shape");
    return constant(name, tensor);
  }

  const void* scalar(const char* name, const OptionalTensor& scalar) {
    return scalar ? keep(number(name, *scalar, logits_)).const_data_ptr() : nullptr;
  }

 private:
  const Tensor logits_;
  std::vector<Tensor> kept_;

  const Tensor& keep(const Tensor& tensor) { return kept_.emplace_back(tensor.contiguous()); }

  const void* constant(const char* name, const Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == accumulate_type(logits_), name, " must be ", accumulate_type(logits_));
    check_device(name, tensor, logits_);
    return keep(tensor).const_data_ptr();
  }

  const void* class_vector(const char* name, const OptionalTensor& vector) {
    if (!vector) return nullptr;
    TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == arguments.classes, name, " must be (C,)");
    return constant(name, *vector);
  }

  void set_target(const Tensor& target) {
    const bool boolean = target.scalar_type() == at::kBool;
    if (boolean || at::isFloatingType(target.scalar_type())) {
      TORCH_CHECK_VALUE(target.sizes() == logits_.sizes(), "dense labels must have the logits' shape");
      const bool as_logits = target.scalar_type() == logits_.scalar_type();
      arguments.label_type = boolean ? LabelType::boolean : as_logits ? LabelType::logits : LabelType::accumulate;
      arguments.dense = keep(boolean || as_logits ? target : target.to(accumulate_type(logits_))).const_data_ptr();
      return;
    }
    TORCH_CHECK_VALUE((target.dim() == 1 || target.dim() == 2) && target.size(0) == arguments.rows(),
                      "target must be (N,) labels or (N, K) lists of classes");
    const int64_t* const indices = keep(target.to(at::kLong)).const_data_ptr<int64_t>();
    (target.dim() == 1 ? arguments.labels : arguments.lists) = indices;
    arguments.list_length = target.dim() == 1 ? 0 : target.size(1);
  }
};

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

  const void* vector(const char* name, const OptionalTensor& vector, int64_t size) {
    if (!vector) return nullptr;
    TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == size, name, " must be (", size, ",)");
    TORCH_CHECK_TYPE(vector->scalar_type() == accumulate_type(logits_), name, " must be ", accumulate_type(logits_));
    check_device(name, *vector, logits_);
    return keep(*vector).const_data_ptr();
  }

  const void* scalar(const char* name, const OptionalTensor& scalar) {
    return scalar ? keep(number(name, *scalar, logits_)).const_data_ptr() : nullptr;
  }

 private:
  static constexpr int64_t kNoLabel = 0;
  const Tensor logits_;
  std::vector<Tensor> kept_;

  const Tensor& keep(const Tensor& tensor) { return kept_.emplace_back(tensor.contiguous()); }
};

// What the kernels of multilabel_softmax get.
class MultilabelCall : public BesideLogits {
 public:
  MultilabelArguments arguments{};

  MultilabelCall(const Tensor& logits, const Tensor& d_logits, MULTILABEL_PARAMETERS) : BesideLogits(logits) {
    set_logits(&arguments);
    set_labels(target, arguments.rows(), &arguments);
    arguments.ignore_index = ignore_index;
    TORCH_CHECK_VALUE(reduction == "none" || reduction == "sum" || reduction == "mean", "reduction is '", reduction,
                      "'");
    TORCH_CHECK_VALUE(!normalizer || normalizer->numel() == 1, "normalizer must be one number");
    arguments.bias = vector("bias", bias, arguments.classes);
    arguments.sample_weight = vector("sample_weight", sample_weight, arguments.rows());
    if (d_logits.defined()) {
      arguments.d_logits = d_logits.mutable_data_ptr();
      arguments.gradient_image_stride = d_logits.stride(0);
      arguments.gradient_class_stride = d_logits.stride(1);
    }
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

// ---------------------------------------------------------------- the CPU

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
    Labelled labelled(logits, d_logits, SIGMOID_NAMES);
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

// ---------------------------------------------------------------- CUDA

#if defined(IMBALANCE_WITH_CUDA)

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
    Labelled labelled(logits, d_logits, SIGMOID_NAMES);
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

#endif  // IMBALANCE_WITH_CUDA

// ---------------------------------------------------------------- softmax_loss

// Device::loss returns the loss, () for "mean" and "sum", (N,) for "none". Logits are rows (N, C) or channels-first
// (B, C, P), of which the N rows are the B * P pixels. The gradient of the logits goes to d_logits
// where that is defined, for an upstream gradient of the loss's shape, or of one where that is absent. What the rows
// tell goes to `reports`.

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_loss(const Tensor& logits, SPLIT_PARAMETERS, LOSS_PARAMETERS,
                                                        bool with_gradient, bool with_log_probs, bool with_correct) {
  const Tensor d_logits = with_gradient ? Device::empty_gradient(logits) : Tensor();
  RowReports reports{with_log_probs, with_correct, {}, {}};
  const Tensor loss = Device::loss(logits, d_logits, std::nullopt, &reports, SPLIT_NAMES, LOSS_NAMES);
  const auto [log_probs, correct] = reports.of(logits);
  return {loss, with_gradient ? d_logits : at::empty({0}, logits.options()), log_probs, correct};
}

// The same, with the gradient in the logits' memory.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> softmax_loss_(const Tensor& logits, SPLIT_PARAMETERS, LOSS_PARAMETERS,
                                                 bool with_log_probs, bool with_correct) {
  TORCH_CHECK_VALUE(reduction != "none", "softmax_loss_ needs the upstream gradient of 'none': softmax_loss_backward_");
  RowReports reports{with_log_probs, with_correct, {}, {}};
  const Tensor loss = Device::loss(logits, logits, std::nullopt, &reports, SPLIT_NAMES, LOSS_NAMES);
  const auto [log_probs, correct] = reports.of(logits);
  return {loss, log_probs, correct};
}

// The gradient alone, once the upstream gradient is known.
template <class Device>
Tensor softmax_loss_backward(const Tensor& logits, SPLIT_PARAMETERS, LOSS_PARAMETERS, const Tensor& upstream) {
  const Tensor d_logits = Device::empty_gradient(logits);
  RowReports reports{};
  Device::loss(logits, d_logits, upstream, &reports, SPLIT_NAMES, LOSS_NAMES);
  return d_logits;
}

template <class Device>
void softmax_loss_backward_(const Tensor& logits, SPLIT_PARAMETERS, LOSS_PARAMETERS, const Tensor& upstream) {
  RowReports reports{};
  Device::loss(logits, logits, upstream, &reports, SPLIT_NAMES, LOSS_NAMES);
}

// Multiplies a gradient by an upstream gradient; returns at once where that is one.
template <class Device>
void scale_(const Tensor& gradient, const Tensor& factor) {
  check_rows(gradient);
  TORCH_CHECK_VALUE(factor.numel() == 1, "factor must be one number");
  const c10::DeviceGuard guard(gradient.device());
  Device::scale(gradient, factor);
}

// ---------------------------------------------------------------- sigmoid_loss

// Device::sigmoid_loss is as Device::loss, with the logits' shape in place of (N,).

template <class Device>
std::tuple<Tensor, Tensor> sigmoid_loss(const Tensor& logits, SIGMOID_PARAMETERS, bool with_gradient) {
  const Tensor d_logits = with_gradient ? Device::empty_gradient(logits) : Tensor();
  const Tensor loss = Device::sigmoid_loss(logits, d_logits, std::nullopt, SIGMOID_NAMES);
  return {loss, with_gradient ? d_logits : at::empty({0}, logits.options())};
}

template <class Device>
Tensor sigmoid_loss_(const Tensor& logits, SIGMOID_PARAMETERS) {
  TORCH_CHECK_VALUE(reduction != "none", "sigmoid_loss_ needs the upstream gradient of 'none': sigmoid_loss_backward_");
  return Device::sigmoid_loss(logits, logits, std::nullopt, SIGMOID_NAMES);
}

template <class Device>
Tensor sigmoid_loss_backward(const Tensor& logits, SIGMOID_PARAMETERS, const Tensor& upstream) {
  const Tensor d_logits = Device::empty_gradient(logits);
  Device::sigmoid_loss(logits, d_logits, upstream, SIGMOID_NAMES);
  return d_logits;
}

template <class Device>
void sigmoid_loss_backward_(const Tensor& logits, SIGMOID_PARAMETERS, const Tensor& upstream) {
  Device::sigmoid_loss(logits, logits, upstream, SIGMOID_NAMES);
}

// ---------------------------------------------------------------- multilabel_softmax

// Device::multilabel_softmax is as Device::loss.

template <class Device>
std::tuple<Tensor, Tensor> multilabel_softmax(const Tensor& logits, MULTILABEL_PARAMETERS, bool with_gradient) {
  const Tensor d_logits = with_gradient ? Device::empty_gradient(logits) : Tensor();
  const Tensor loss = Device::multilabel_softmax(logits, d_logits, std::nullopt, MULTILABEL_NAMES);
  return {loss, with_gradient ? d_logits : at::empty({0}, logits.options())};
}

template <class Device>
Tensor multilabel_softmax_(const Tensor& logits, MULTILABEL_PARAMETERS) {
  TORCH_CHECK_VALUE(reduction != "none",
                    "multilabel_softmax_ needs the upstream gradient of 'none': multilabel_softmax_backward_");
  return Device::multilabel_softmax(logits, logits, std::nullopt, MULTILABEL_NAMES);
}

template <class Device>
Tensor multilabel_softmax_backward(const Tensor& logits, MULTILABEL_PARAMETERS, const Tensor& upstream) {
  const Tensor d_logits = Device::empty_gradient(logits);
  Device::multilabel_softmax(logits, d_logits, upstream, MULTILABEL_NAMES);
  return d_logits;
}

template <class Device>
void multilabel_softmax_backward_(const Tensor& logits, MULTILABEL_PARAMETERS, const Tensor& upstream) {
  Device::multilabel_softmax(logits, logits, upstream, MULTILABEL_NAMES);
}

// ---------------------------------------------------------------- column_sums

template <class Device>
std::tuple<Tensor, Tensor, Tensor> column_sums(const Tensor& logits, COLUMN_SUMS_PARAMETERS) {
  const c10::DeviceGuard guard(logits.device());
  const Tensor sums = Device::column_sums(logits, ColumnSumsCall(logits, COLUMN_SUMS_NAMES));
  return {sums[0].clone(), sums[1].clone(), sums[2].clone()};  // no views of one another: torch asks for that
}

template <class Device>
Tensor column_sums_backward(const Tensor& logits, COLUMN_SUMS_PARAMETERS, const Tensor& d_predicted,
                            const Tensor& d_true_positives) {
  const c10::DeviceGuard guard(logits.device());
  const Tensor d_logits = Device::empty_gradient(logits);
  ColumnSumsCall columns(logits, COLUMN_SUMS_NAMES);
  columns.arguments.d_predicted = columns.vector("d_predicted", d_predicted, logits.size(1));
  columns.arguments.d_true_positives = columns.vector("d_true_positives", d_true_positives, logits.size(1));
  columns.arguments.d_logits = d_logits.mutable_data_ptr();
  Device::column_sums_gradient(columns);
  return d_logits;
}

// ---------------------------------------------------------------- target_and_rest

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> target_and_rest(const Tensor& logits, SPLIT_PARAMETERS) {
  check_rows(logits);
  const c10::DeviceGuard guard(logits.device());
  const Split split(logits, SPLIT_NAMES);
  const auto vector = [&](bool present) { return empty_result(logits, {present ? split.rows() : 0}); };
  const Tensor target_logit = vector(true), rest = vector(true), shift = vector(true);
  const Tensor weighted_logits = vector(split.has_weights()), weight_sum = vector(split.has_weights());
  const SplitVectors out{target_logit.mutable_data_ptr(), rest.mutable_data_ptr(), shift.mutable_data_ptr(),
                         split.has_weights() ? weighted_logits.mutable_data_ptr() : nullptr,
                         split.has_weights() ? weight_sum.mutable_data_ptr() : nullptr};
  Device::split_rows(split, out);
  return {target_logit, rest, shift, weighted_logits, weight_sum};
}

#define SPLIT_BACKWARD_SCHEMA "Tensor rest, Tensor shift, Tensor d_target, Tensor d_rest, Tensor d_weighted_logits"
#define SPLIT_BACKWARD_PARAMETERS \
  const Tensor &rest, const Tensor &shift, const Tensor &d_target, const Tensor &d_rest, const Tensor &d_weighted_logits
#define SPLIT_BACKWARD_NAMES rest, shift, d_target, d_rest, d_weighted_logits

template <class Device>
void split_gradient(const Tensor& logits, const Tensor& d_logits, SPLIT_PARAMETERS, SPLIT_BACKWARD_PARAMETERS) {
  check_rows(logits);
  const c10::DeviceGuard guard(logits.device());
  Split split(logits, SPLIT_NAMES);
  SplitBackwardArguments backward{};
  backward.split = split.arguments;
  backward.rest = split.row_vector("rest", rest);
  backward.shift = split.row_vector("shift", shift);
  backward.d_target = split.row_vector("d_target", d_target);
  backward.d_rest = split.row_vector("d_rest", d_rest);
  if (split.has_weights()) backward.d_weighted = split.row_vector("d_weighted_logits", d_weighted_logits);
  backward.d_logits = d_logits.mutable_data_ptr();
  backward.gradient_stride = d_logits.stride(0);
  Device::split_backward_rows(split, backward);
}

template <class Device>
Tensor target_and_rest_backward(const Tensor& logits, SPLIT_PARAMETERS, SPLIT_BACKWARD_PARAMETERS) {
  const Tensor d_logits = Device::empty_gradient(logits);
  split_gradient<Device>(logits, d_logits, SPLIT_NAMES, SPLIT_BACKWARD_NAMES);
  return d_logits;
}

template <class Device>
void target_and_rest_backward_(const Tensor& logits, SPLIT_PARAMETERS, SPLIT_BACKWARD_PARAMETERS) {
  split_gradient<Device>(logits, logits, SPLIT_NAMES, SPLIT_BACKWARD_NAMES);
}

// ---------------------------------------------------------------- registration

void define_operations(torch::Library& m) {
  m.def("softmax_loss(Tensor logits, " SPLIT_SCHEMA ", " LOSS_SCHEMA ", bool with_gradient, " REPORTS_SCHEMA
        ") -> (Tensor loss, Tensor d_logits, Tensor log_probs, Tensor correct)");
  m.def("softmax_loss_(Tensor(a!) logits, " SPLIT_SCHEMA ", " LOSS_SCHEMA ", " REPORTS_SCHEMA
        ") -> (Tensor loss, Tensor log_probs, Tensor correct)");
  m.def("softmax_loss_backward(Tensor logits, " SPLIT_SCHEMA ", " LOSS_SCHEMA ", Tensor upstream) -> Tensor d_logits");
  m.def("softmax_loss_backward_(Tensor(a!) logits, " SPLIT_SCHEMA ", " LOSS_SCHEMA ", Tensor upstream) -> ()");
  m.def("sigmoid_loss(Tensor logits, " SIGMOID_SCHEMA ", bool with_gradient) -> (Tensor loss, Tensor d_logits)");
  m.def("sigmoid_loss_(Tensor(a!) logits, " SIGMOID_SCHEMA ") -> Tensor loss");
  m.def("sigmoid_loss_backward(Tensor logits, " SIGMOID_SCHEMA ", Tensor upstream) -> Tensor d_logits");
  m.def("sigmoid_loss_backward_(Tensor(a!) logits, " SIGMOID_SCHEMA ", Tensor upstream) -> ()");
  m.def("multilabel_softmax(Tensor logits, " MULTILABEL_SCHEMA
        ", bool with_gradient) -> (Tensor loss, Tensor d_logits)");
  m.def("multilabel_softmax_(Tensor(a!) logits, " MULTILABEL_SCHEMA ") -> Tensor loss");
  m.def("multilabel_softmax_backward(Tensor logits, " MULTILABEL_SCHEMA ", Tensor upstream) -> Tensor d_logits");
  m.def("multilabel_softmax_backward_(Tensor(a!) logits, " MULTILABEL_SCHEMA ", Tensor upstream) -> ()");
  m.def("column_sums(Tensor logits, " COLUMN_SUMS_SCHEMA
        ") -> (Tensor predicted, Tensor true_positives, Tensor positives)");
  m.def("column_sums_backward(Tensor logits, " COLUMN_SUMS_SCHEMA
        ", Tensor d_predicted, Tensor d_true_positives) -> Tensor d_logits");
  m.def("scale_(Tensor(a!) gradient, Tensor factor) -> ()");
  m.def("target_and_rest(Tensor logits, " SPLIT_SCHEMA
        ") -> (Tensor target_logit, Tensor rest, Tensor shift, Tensor weighted_logits, Tensor weight_sum)");
  m.def("target_and_rest_backward(Tensor logits, " SPLIT_SCHEMA ", " SPLIT_BACKWARD_SCHEMA ") -> Tensor d_logits");
  m.def("target_and_rest_backward_(Tensor(a!) logits, " SPLIT_SCHEMA ", " SPLIT_BACKWARD_SCHEMA ") -> ()");
}

template <class Device>
void implement_operations(torch::Library& m) {
  m.impl("softmax_loss", &softmax_loss<Device>);
  m.impl("softmax_loss_", &softmax_loss_<Device>);
  m.impl("softmax_loss_backward", &softmax_loss_backward<Device>);
  m.impl("softmax_loss_backward_", &softmax_loss_backward_<Device>);
  m.impl("sigmoid_loss", &sigmoid_loss<Device>);
  m.impl("sigmoid_loss_", &sigmoid_loss_<Device>);
  m.impl("sigmoid_loss_backward", &sigmoid_loss_backward<Device>);
  m.impl("sigmoid_loss_backward_", &sigmoid_loss_backward_<Device>);
  m.impl("multilabel_softmax", &multilabel_softmax<Device>);
  m.impl("multilabel_softmax_", &multilabel_softmax_<Device>);
  m.impl("multilabel_softmax_backward", &multilabel_softmax_backward<Device>);
  m.impl("multilabel_softmax_backward_", &multilabel_softmax_backward_<Device>);
  m.impl("column_sums", &column_sums<Device>);
  m.impl("column_sums_backward", &column_sums_backward<Device>);
  m.impl("scale_", &scale_<Device>);
  m.impl("target_and_rest", &target_and_rest<Device>);
  m.impl("target_and_rest_backward", &target_and_rest_backward<Device>);
  m.impl("target_and_rest_backward_", &target_and_rest_backward_<Device>);
}

}  // namespace

#if defined(IMBALANCE_EMULATED)

TORCH_LIBRARY(imbalance_kernels_emulated, m) { define_operations(m); }
TORCH_LIBRARY_IMPL(imbalance_kernels_emulated, CPU, m) { implement_operations<Cuda>(m); }

#else

TORCH_LIBRARY(imbalance_kernels, m) { define_operations(m); }
TORCH_LIBRARY_IMPL(imbalance_kernels, CPU, m) { implement_operations<Cpu>(m); }
#if defined(IMBALANCE_WITH_CUDA)
TORCH_LIBRARY_IMPL(imbalance_kernels, CUDA, m) { implement_operations<Cuda>(m); }
#endif

static std::map<std::string, std::string> build_info() {
  return {{"torch", TORCH_VERSION},
#if defined(__clang__)
          {"compiler", "clang " __clang_version__},
#else
          {"compiler", "gcc " __VERSION__},
#endif
#if defined(IMBALANCE_WITH_CUDA)
          {"cuda", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)},
          {"cuda_architectures", IMBALANCE_WITH_CUDA},
#endif
          {"instruction_set", cpu::kernels()->name}};
}

static std::vector<std::string> instruction_sets() {
  int count = 0;
  const char* const* names = cpu::instruction_sets(&count);
  return {names, names + count};
}

static std::vector<std::string> objective_names() { return {std::begin(kObjectiveNames), std::end(kObjectiveNames)}; }

static std::vector<std::string> binary_objective_names() {
  return {std::begin(kBinaryObjectiveNames), std::end(kBinaryObjectiveNames)};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled kernels of imbalance-kernels; loading it registers torch.ops.imbalance_kernels.";
  if (cpu::kernels() == nullptr) {
    throw pybind11::import_error(
        "IMBALANCE_KERNELS_INSTRUCTION_SET names an instruction set that this binary or this processor does not have");
  }
  m.def("build_info", &build_info, "Compiler, torch version and instruction set in use.");
  m.def("instruction_sets", &instruction_sets, "The instruction sets in this binary.");
  m.def("binary_objective_names", &binary_objective_names, "Those of sigmoid_loss, in their order.");
  m.def("objective_names", &objective_names, "The objectives that the kernels know, in their order.");
  m.def("ask_for_huge_pages", &ask_for_huge_pages, "For fresh memory, by its address and size, before its first use.");
}

#endif

}  // namespace imbalance
