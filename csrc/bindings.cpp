// The operations as torch knows them: their registration, and the build's own information. What a call is, is checked
// and allocated in bindings/calls.h; how a device runs it stands in bindings/cpu.h and bindings/cuda.h. Nothing else in
// csrc knows torch.
//
// The Python side (imbalance_kernels/ops) checks arguments with messages for users; what is checked here keeps memory
// safe when an operation is called directly. On the CPU targets are checked here for both, since reading them is part
// of the kernel's work; on a GPU nobody reads them but the kernels, which make the rows of wrong ones NaN.
//
// setup.py defines IMBALANCE_WITH_CUDA, the architectures, where it builds the CUDA kernels. Tests define
// IMBALANCE_EMULATED beside it: then those kernels are the only ones, run on the CPU (tests/emulation), and there is no
// CUDA runtime and no Python module.

#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <vector>

#include "bindings/cpu.h"
#if defined(IMBALANCE_WITH_CUDA)
#include "bindings/cuda.h"
#endif

#if !defined(IMBALANCE_EMULATED)
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#endif

namespace imbalance {
namespace {

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
