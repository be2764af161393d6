// Runs the CUDA kernels of sigmoid_loss through sigmoid_loss.h, as kernels.cu does those of softmax_loss: each case in
// several orders, the same to the bit, close to a computation in float64, in arrays of just their size.
//
//     sigmoid_kernels ORDERS [CASE...]
#include "cases.h"
#include "cuda/sigmoid_loss.h"

#if defined(FLOAT32_ALONE)  // the kernels of other dtypes are not compiled, and no case of theirs is to be named
namespace imbalance::cuda {
template <class>
std::int64_t sigmoid_sums_of(const SigmoidArguments&);
template <class>
cudaError_t sigmoid_loss_of(const SigmoidLossArguments&, cudaStream_t);
#define ABSENT(S)                                                             \
  template <>                                                                 \
  std::int64_t sigmoid_sums_of<S>(const SigmoidArguments&) {                  \
    return 0;                                                                 \
  }                                                                           \
  template <>                                                                 \
  cudaError_t sigmoid_loss_of<S>(const SigmoidLossArguments&, cudaStream_t) { \
    return cudaErrorNotSupported;                                             \
  }
ABSENT(double)
ABSENT(BFloat16)
ABSENT(Float16)
#undef ABSENT
}  // namespace imbalance::cuda
#endif

namespace {

// What a case has beside logits and class labels.
enum Option : unsigned {
  kLists = 1 << 0,  // instead of labels
  kBooleans = 1 << 1,
  kDense = 1 << 2,       // of the logits' dtype, 0, 1 and in between
  kWideDense = 1 << 3,   // float where the logits are not
  kVectors = 1 << 4,     // weights, bias and gammas of classes
  kRowWeights = 1 << 5,  // some of them 0
  kWeights = 1 << 6,     // of logits
  kUpstream = 1 << 7,    // of logits
  kLosses = 1 << 8,      // alone
  kInPlace = 1 << 9,
  kMean = 1 << 10,     // a divisor
  kNothing = 1 << 11,  // the normalizer is 0
  kUnalignedVectors = 1 << 12,
  kGradientOffset = 1 << 13,  // it is aligned where the logits are not, or the other way round
  kFar = 1 << 14,             // rows are 2^30 numbers apart
  kIgnoredClass = 1 << 15,    // a class is what is ignored
};

struct Case {
  const char* name;
  int images, classes, pixels;  // 0: rows
  unsigned options = 0;
  int gap = 0;     // of rows, or of a class's pixels
  int offset = 0;  // numbers before the first
  Dtype dtype = Dtype::float32;

  bool has(unsigned any) const { return (options & any) != 0; }
  std::size_t rows() const {
    return static_cast<std::size_t>(images) * static_cast<std::size_t>(pixels > 0 ? pixels : 1);
  }
};

constexpr Case kCases[] = {
    // logits_of_labels
    {"labels", 40, 80, 0},
    {"labels_blocks", 230, 80, 0, kMean},
    {"labels_in_place", 40, 80, 0, kInPlace | kMean},
    {"labels_last", 31, 91, 0},
    {"labels_odd", 203, 91, 0, kInPlace},
    {"labels_narrow", 403, 3, 0},
    {"labels_binary", 403, 1, 0},
    {"labels_losses", 33, 12, 0, kLosses},
    {"labels_upstream", 33, 12, 0, kUpstream},
    {"labels_ignored_class", 33, 12, 0, kIgnoredClass},
    {"labels_nothing", 33, 12, 0, kNothing},
    {"labels_bfloat16", 75, 80, 0, kInPlace, 0, 0, Dtype::bfloat16},
    {"labels_bfloat16_odd", 75, 91, 0, 0, 0, 0, Dtype::bfloat16},
    {"labels_bfloat16_narrow", 403, 3, 0, 0, 0, 0, Dtype::bfloat16},
    {"labels_float16", 33, 80, 0, kMean, 0, 0, Dtype::float16},

    // logits_in_packs
    {"packs_row_weights", 33, 80, 0, kRowWeights},
    {"packs_weights", 33, 80, 0, kWeights | kMean},
    {"packs_vectors", 33, 80, 0, kVectors | kInPlace},
    {"packs_lists", 33, 20, 0, kLists},
    {"packs_booleans", 33, 20, 0, kBooleans | kUpstream},
    {"packs_dense", 33, 20, 0, kDense | kVectors},
    {"packs_losses", 33, 20, 0, kDense | kRowWeights | kLosses},
    {"packs_blocks", 230, 80, 0, kVectors | kRowWeights},
    {"packs_nothing", 33, 20, 0, kDense | kNothing},
    {"packs_bfloat16", 33, 80, 0, kDense | kVectors | kWeights, 0, 0, Dtype::bfloat16},
    {"packs_wide_bfloat16", 33, 80, 0, kWideDense | kUpstream, 0, 0, Dtype::bfloat16},
    {"packs_booleans_bfloat16", 33, 80, 0, kBooleans, 0, 0, Dtype::bfloat16},
    {"images", 3, 5, 36},
    {"images_classes", 2, 37, 20, kVectors | kInPlace},
    {"images_strided", 2, 5, 36, kMean, 4},
    {"images_row_weights", 3, 5, 36, kRowWeights | kUpstream},
    {"images_weights", 3, 5, 36, kWeights},
    {"images_dense", 2, 20, 36, kDense | kLosses},
    {"images_booleans", 2, 3, 36, kBooleans},
    {"images_nothing", 2, 3, 36, kNothing},
    {"images_blocks", 3, 3, 400, kVectors},
    {"images_bfloat16", 3, 5, 72, kVectors, 8, 0, Dtype::bfloat16},

    // logits_apart
    {"apart_vectors", 33, 91, 0, kVectors | kInPlace},
    {"apart_unaligned_vectors", 33, 20, 0, kVectors | kUnalignedVectors},
    {"apart_strided", 33, 20, 0, kMean, 4},
    {"apart_offset", 33, 20, 0, 0, 0, 1},
    {"apart_gradient_offset", 33, 20, 0, kGradientOffset},
    {"apart_offset_alone", 33, 20, 0, kGradientOffset, 0, 1},
    {"apart_row_weights", 33, 7, 0, kRowWeights | kUpstream},
    {"apart_dense", 33, 7, 0, kDense | kWeights},
    {"apart_lists", 33, 7, 0, kLists | kLosses},
    {"apart_booleans", 33, 7, 0, kBooleans},
    {"apart_nothing", 33, 7, 0, kDense | kNothing},
    {"apart_images", 3, 5, 63, kVectors | kRowWeights, 1},
    {"apart_images_lists", 2, 5, 36, kLists},
    {"apart_blocks", 43, 91, 0, kVectors},
    {"apart_far", 3, 5, 0, kFar},
    {"apart_wide_bfloat16", 33, 7, 0, kWideDense, 0, 0, Dtype::bfloat16},
    {"apart_float16", 33, 7, 0, kVectors | kDense, 1, 1, Dtype::float16},
    {"apart_float64", 33, 20, 0, kVectors | kDense, 0, 0, Dtype::float64},
    {"apart_float64_images", 2, 20, 9, kRowWeights, 1, 0, Dtype::float64},
};

constexpr int kListLength = 3;
constexpr double kPositive = 0.25, kNegative = 0.75, kGamma = 2;

std::int64_t ignored(const Case& c) { return c.has(kIgnoredClass) ? 2 : -100; }

struct Expected {
  double value;
  double slope;
};

// Logits or their gradient: lines of neighbours, rows of classes or the pixels of a class.
class Lines {
 public:
  explicit Lines(const Case& c, int more_offset = 0)
      : lines_(c.pixels > 0 ? c.images * c.classes : c.images),
        length_(c.pixels > 0 ? c.pixels : c.classes),
        stride_(c.has(kFar) ? (1 << 30) + 4 : length_ + c.gap) {
    numbers_ = Numbers(c.dtype, at(lines_ - 1, length_), static_cast<std::size_t>(c.offset + more_offset), c.has(kFar));
  }

  void* data() const { return numbers_.data(); }
  std::int64_t stride() const { return stride_; }
  // By its place, as if the lines were contiguous.
  double get(std::size_t place) const { return numbers_[at_place(place)]; }
  void set(std::size_t place, double x) { numbers_.set(at_place(place), x); }

  Bytes bytes() const {
    Bytes all;
    numbers_.check_untouched_before();
    for (int line = 0; line < lines_; ++line) {
      append(&all, numbers_.bytes(at(line, 0), at(line, length_)));
      if (line > 0 && stride_ < 1 << 30) numbers_.check_untouched(at(line - 1, length_), at(line, 0));
    }
    return all;
  }

 private:
  int lines_, length_;
  std::int64_t stride_;
  Numbers numbers_;

  std::size_t at(int line, int i) const { return static_cast<std::size_t>(line * stride_ + i); }
  std::size_t at_place(std::size_t place) const {
    const auto length = static_cast<std::size_t>(length_);
    return at(static_cast<int>(place / length), static_cast<int>(place % length));
  }
};

struct Problem {
  const Case& c;
  std::mt19937 random;
  Lines logits;
  std::vector<std::int64_t> labels;  // or lists
  std::vector<unsigned char> booleans;
  Numbers dense, positive, negative, bias, gamma;  // the latter of classes
  Numbers weight, upstream, upstream_of_result, normalizer, divisor;
  std::size_t count;

  explicit Problem(const Case& of) : c(of), random(static_cast<unsigned>(of.classes + of.images)), logits(of) {
    count = c.rows() * static_cast<std::size_t>(c.classes);
    std::normal_distribution<double> normal(0, 3);
    for (std::size_t i = 0; i < count; ++i) logits.set(i, normal(random));
    make_labels();
    const auto vector = [&](double low, double high) {
      return c.has(kVectors) ? uniform(static_cast<std::size_t>(c.classes), low, high, c.has(kUnalignedVectors))
                             : Numbers();
    };
    positive = vector(0.2, 1);
    negative = vector(0.2, 1);
    bias = vector(-2, 2);
    gamma = vector(0.5, 3);
    if (c.has(kRowWeights | kWeights)) {
      weight = uniform(c.has(kWeights) ? count : c.rows(), 0.5, 2, 0);
      for (std::size_t i = 0; i < (c.has(kWeights) ? count : c.rows()); i += 4) weight.set(i, 0);
      // What does not count is not looked at.
      for (std::size_t i = 0; i < count; ++i) {
        if (weight[c.has(kWeights) ? i : row_of(i)] == 0 && i % 3 == 0) logits.set(i, i % 2 == 0 ? NAN : INFINITY);
      }
    }
    if (c.has(kUpstream)) {
      upstream = uniform(count, -2, 2, 0);
    } else {
      upstream_of_result = uniform(1, 1, 2, 0);
    }
    if (c.has(kMean)) divisor = uniform(1, 2, 3, 0);
    if (!c.has(kMean)) normalizer = uniform(1, 2, 3, 0);
    if (c.has(kNothing)) normalizer.set(0, 0);
  }

  std::size_t class_of(std::size_t place) const {
    const auto classes = static_cast<std::size_t>(c.classes), pixels = static_cast<std::size_t>(c.pixels);
    return c.pixels > 0 ? place / pixels % classes : place % classes;
  }
  std::size_t row_of(std::size_t place) const {
    const auto classes = static_cast<std::size_t>(c.classes), pixels = static_cast<std::size_t>(c.pixels);
    return c.pixels > 0 ? place / pixels / classes * pixels + place % pixels : place / classes;
  }

  SigmoidLossArguments arguments(const Lines& of) const {
    SigmoidLossArguments a{};
    SigmoidArguments& call = a.call;
    call.dtype = c.dtype;
    call.images = c.images;
    call.classes = c.classes;
    call.pixels = c.pixels;
    call.logits = of.data();
    call.class_stride = c.pixels > 0 ? of.stride() : 1;
    call.image_stride = c.pixels > 0 ? of.stride() * c.classes : of.stride();
    if (c.has(kLists)) {
      call.lists = labels.data();
      call.list_length = kListLength;
    } else if (c.has(kBooleans)) {
      call.dense = booleans.data();
      call.label_type = LabelType::boolean;
    } else if (dense) {
      call.dense = dense.data();
      call.label_type = c.has(kWideDense) ? LabelType::accumulate : LabelType::logits;
    } else {
      call.labels = labels.data();
    }
    call.ignore_index = ignored(c);
    call.objective = BinaryObjectiveKind::focal;
    call.objective_parameters[0] = gamma ? 0 : kGamma;
    call.class_parameter = gamma.data();
    call.positive = kPositive;
    call.negative = kNegative;
    call.positive_weight = positive.data();
    call.negative_weight = negative.data();
    call.bias = bias.data();
    call.sample_weight = weight.data();
    call.weight_of_logits = c.has(kWeights);
    call.upstream = upstream.data();
    a.upstream = upstream_of_result.data();
    a.normalizer = normalizer.data();
    a.divisor = divisor.data();
    a.share = 0.5;
    return a;
  }

  // Of the result, not divided, and of its gradient.
  Expected expected(std::size_t place) const {
    const std::size_t j = class_of(place), row = row_of(place);
    const double by = weight ? weight[c.has(kWeights) ? place : row] : 1;
    double y = 0;
    if (c.has(kNothing) || by == 0) return {0, 0};
    if (c.has(kLists)) {
      for (std::size_t k = 0; k < kListLength; ++k) {
        const std::int64_t label = labels[row * kListLength + k];
        if (label == static_cast<std::int64_t>(j)) y = 1;
        if (label != ignored(c) && (label < 0 || label >= c.classes)) return {NAN, NAN};
      }
    } else if (c.has(kBooleans)) {
      y = booleans[place];
    } else if (dense) {
      y = dense[place];
    } else if (labels[row] == ignored(c)) {
      return {0, 0};
    } else if (labels[row] < 0 || labels[row] > c.classes) {
      return {NAN, NAN};
    } else {
      y = labels[row] == static_cast<std::int64_t>(j);
    }
    const double x = logits.get(place) + (bias ? bias[j] : 0), g = gamma ? gamma[j] : kGamma;
    const double p = 1 / (1 + std::exp(-x)), n = 1 / (1 + std::exp(x));
    const double log_p = -std::log1p(std::exp(-x)), log_n = -std::log1p(std::exp(x));
    const double mixed = y * n + (1 - y) * p, entropy = -y * log_p - (1 - y) * log_n;
    const double power = std::pow(mixed, g), growth = g * std::pow(mixed, g - 1) * (1 - 2 * y) * p * n;
    const double share =
        by * (y * (positive ? positive[j] : kPositive) + (1 - y) * (negative ? negative[j] : kNegative));
    const double over = normalizer ? normalizer[0] : divisor[0];
    const double factor = 0.5 * (upstream ? upstream[place] : upstream_of_result[0]) / over;
    return {share * power * entropy, factor * share * (power * (p - y) + growth * entropy)};
  }

 private:
  Numbers uniform(std::size_t size, double low, double high, std::size_t offset) {
    Numbers numbers(wide(c.dtype), size, offset);
    std::uniform_real_distribution<double> between(low, high);
    for (std::size_t i = 0; i < size; ++i) numbers.set(i, between(random));
    return numbers;
  }

  void make_labels() {
    const auto classes = static_cast<unsigned>(c.classes);
    if (c.has(kBooleans)) {
      for (std::size_t i = 0; i < count; ++i) booleans.push_back(random() % 5 == 0);
      booleans.shrink_to_fit();
    } else if (c.has(kDense | kWideDense)) {
      dense = Numbers(c.has(kWideDense) ? wide(c.dtype) : c.dtype, count);
      for (std::size_t i = 0; i < count; ++i) dense.set(i, i < count / 2 ? random() % 4 == 0 : random() % 5 * 0.25);
    } else {
      const std::size_t each = c.has(kLists) ? kListLength : 1;
      for (std::size_t i = 0; i < each * c.rows(); ++i)
        labels.push_back(random() % (classes + (c.has(kLists) ? 0 : 1)));
      for (std::size_t i = 1; i < labels.size(); i += 5) labels[i] = ignored(c);
      if (c.rows() > 4) labels[4 * each] = (std::int64_t{1} << 32) + c.classes / 2;  // no class
      if (c.rows() > 8 && !c.has(kLists)) labels[8] = c.classes + 1;
      labels.shrink_to_fit();
    }
  }
};

double tolerance_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 1e-12 : dtype == Dtype::float32 ? 1e-5 : dtype == Dtype::float16 ? 1e-3 : 6e-3;
}

void run_case(const Case& c) {
  const Problem problem(c);
  in_every_order([&] {
    Lines gradient(c, !c.has(kGradientOffset) ? 0 : c.offset > 0 ? -c.offset : 1);
    if (c.has(kInPlace)) {
      for (std::size_t i = 0; i < problem.count; ++i) gradient.set(i, problem.logits.get(i));
    }
    SigmoidLossArguments a = problem.arguments(c.has(kInPlace) ? gradient : problem.logits);
    const Numbers losses = c.has(kLosses) ? Numbers(wide(c.dtype), problem.count) : Numbers();
    a.call.losses = losses.data();
    if (!c.has(kLosses)) {
      a.call.d_logits = gradient.data();
      a.call.gradient_class_stride = a.call.class_stride;
      a.call.gradient_image_stride = a.call.image_stride;
    }
    const auto shares = static_cast<std::size_t>(sigmoid_sums(a.call));
    const Numbers sums(wide(c.dtype), shares);
    a.sums = sums.data();
    check(sigmoid_loss(a, nullptr));

    if (emulation::schedule.order == emulation::Order::forward) {
      double total = 0, ours = 0;
      for (std::size_t i = 0; i < problem.count; ++i) {
        const Expected exact = problem.expected(i);
        const double relative = c.dtype == Dtype::float64 ? 1e-12 : 1e-5;
        total += std::isnan(exact.value) ? 0 : exact.value;
        if (losses && !close(losses[i], exact.value, relative * (std::abs(exact.value) + 0.01))) {
          wrong("loss %zu is %.9g and should be %.9g", i, losses[i], exact.value);
        }
        if (c.has(kLosses)) continue;
        const double found = gradient.get(i);
        if (!close(found, exact.slope, tolerance_of(c.dtype) * (std::abs(exact.slope) + 0.01))) {
          wrong("gradient %zu is %.9g and should be %.9g", i, found, exact.slope);
        }
        if (exact.slope == 0 && exact.value == 0 && found != 0) wrong("gradient %zu is not 0", i);
      }
      bool any_nan = false;
      for (std::size_t i = 0; i < problem.count; ++i) any_nan |= std::isnan(problem.expected(i).value);
      for (std::size_t i = 0; i < shares; ++i) ours += sums[i];
      if (!close(ours, any_nan ? NAN : total / 2, 1e-5 * total))
        wrong("the sum is %.9g and should be %.9g", ours, total / 2);
    }
    Bytes results = sums.bytes(0, shares);
    if (c.has(kLosses)) {
      append(&results, losses.bytes(0, problem.count));
    } else {
      append(&results, gradient.bytes());
    }
    return results;
  });
}

void run_counts(int rows, int classes) {
  std::vector<std::int64_t> labels;
  double exact = 0;
  for (int i = 0; i < rows; ++i) {
    labels.push_back(i % 5 == 0 ? -100 : i % 7 == 0 ? (std::int64_t{1} << 32) + 1 : i % (classes + 2));
    exact += labels.back() >= 0 && labels.back() <= classes ? classes : 0;
  }
  labels.shrink_to_fit();
  SigmoidArguments call{};
  call.images = rows;
  call.classes = classes;
  call.labels = labels.data();
  call.ignore_index = -100;
  in_every_order([&] {
    const auto stretches = static_cast<std::size_t>(label_stretches(rows));
    const Numbers counts(Dtype::float32, stretches);
    check(label_counts(call, counts.data(), nullptr));
    double total = 0;
    for (std::size_t i = 0; i < stretches; ++i) total += counts[i];
    if (total != exact) wrong("%.9g labels and should be %.9g", total, exact);
    return counts.bytes(0, stretches);
  });
}

struct Function {
  const char* name;
  void (*run)();
};
constexpr Function kFunctions[] = {
    {"counts_of_few", [] { run_counts(100, 7); }},
    {"counts_of_a_stretch", [] { run_counts(8192, 3); }},
    {"counts_of_stretches", [] { run_counts(20001, 5); }},
};

}  // namespace

int main(int argc, char** argv) {
  return run_program(argc, argv, [](const auto& choose) {
    for (const Case& c : kCases) {
      if (choose(c.name)) run_case(c);
    }
    for (const Function& function : kFunctions) {
      if (choose(function.name)) function.run();
    }
  });
}
