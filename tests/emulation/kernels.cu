// Runs the CUDA kernels of csrc/cuda through softmax_loss.h: a program, which says what is wrong and exits with 1.
//
//     kernels ORDERS [CASE...]
//
// Each case below, or those named, in forward, in reverse and in ORDERS random orders: the results must be the same to
// the bit, and close to those of a computation in float64. All arrays are allocations of just their size, so that
// AddressSanitizer sees what goes beyond them; what lies between rows, or before them, is NaN and must stay as it is.
#include "cases.h"
#include "cuda/softmax_loss.h"

#if defined(FLOAT32_ALONE)  // the kernels of other dtypes are not compiled, and no case of theirs is to be named
namespace imbalance::cuda {
template <class>
cudaError_t loss_rows_of(const LossArguments&, std::int64_t, cudaStream_t);
template <class>
cudaError_t split_rows_of(const SplitArguments&, const SplitVectors&, std::int64_t, cudaStream_t);
template <class>
cudaError_t split_backward_rows_of(const SplitBackwardArguments&, std::int64_t, cudaStream_t);
#define ABSENT(S)                                                                                        \
  template <>                                                                                            \
  cudaError_t loss_rows_of<S>(const LossArguments&, std::int64_t, cudaStream_t) {                        \
    return cudaErrorNotSupported;                                                                        \
  }                                                                                                      \
  template <>                                                                                            \
  cudaError_t split_rows_of<S>(const SplitArguments&, const SplitVectors&, std::int64_t, cudaStream_t) { \
    return cudaErrorNotSupported;                                                                        \
  }                                                                                                      \
  template <>                                                                                            \
  cudaError_t split_backward_rows_of<S>(const SplitBackwardArguments&, std::int64_t, cudaStream_t) {     \
    return cudaErrorNotSupported;                                                                        \
  }
ABSENT(double)
ABSENT(BFloat16)
ABSENT(Float16)
#undef ABSENT
}  // namespace imbalance::cuda
#endif

namespace {

using namespace imbalance;
using namespace imbalance::cuda;

// What a case has beside logits and targets; without kBare and kMean sample weights, a gradient for each row and a
// normalizer too.
enum Option : unsigned {
  kBias = 1 << 0,
  kScale = 1 << 1,
  kFactor = 1 << 2,
  kSoftcap = 1 << 3,
  kMargin = 1 << 4,  // of each class
  kCircle = 1 << 5,
  kWeights = 1 << 6,  // of classes
  kSmoothing = 1 << 7,
  kProbabilities = 1 << 8,      // instead of targets
  kWideProbabilities = 1 << 9,  // float where the logits are not
  kGammas = 1 << 10,            // of each class
  kZLoss = 1 << 11,
  kBare = 1 << 12,
  kMean = 1 << 13,     // one gradient for all rows, and a divisor
  kNothing = 1 << 14,  // the normalizer is 0
  kMasks = 1 << 15,    // of logits, and of a class by its bias; one row whole
  kInPlace = 1 << 16,
  kLosses = 1 << 17,            // alone
  kSplit = 1 << 18,             // target_and_rest and its backward
  kFar = 1 << 19,               // rows are 2^30 numbers apart
  kUnalignedVectors = 1 << 20,  // of classes, and probabilities
  kGradientStrided = 1 << 21,   // by one number more than the logits
  kGradientOffset = 1 << 22,
  kHigh = 1 << 23,  // logits far from 0
  // Of channels-first logits, and of their gradient: images are one number further apart than their classes take.
  kImagesApart = 1 << 24,
  kGradientImagesApart = 1 << 25,
};

// With little shared memory for the bias even short rows need clusters, or have none that is large enough.
constexpr Device kHopper{2, 227 << 10, 50 << 20, true}, kAmpere{2, 99 << 10, 50 << 20, false};
constexpr Device kMedium{2, 28 << 10, 50 << 20, true}, kSmall{2, 12 << 10, 50 << 20, true};
constexpr Device kSmaller{2, 9 << 10, 50 << 20, true}, kTiny{2, 4 << 10, 50 << 20, true};
constexpr Device kLittleCache{2, 99 << 10, 40000, false};  // one row at a time, where it is read twice

struct Case {
  const char* name;
  int rows, classes;
  unsigned cluster;  // blocks, of the last kernel that serves it
  unsigned options = 0;
  int gap = 0;     // stride - classes
  int offset = 0;  // numbers before the first row
  Device device = kHopper;
  Dtype dtype = Dtype::float32;
  int pixels = 0;  // of an image, channels-first; rows are those of all images, and the gap is between classes

  bool has(unsigned any) const { return (options & any) != 0; }
};

constexpr unsigned kEverything = kBias | kScale | kFactor | kSoftcap | kWeights | kSmoothing | kGammas | kMasks;

constexpr Case kCases[] = {
    // rows_in_lanes, of 1 to 32 lanes
    {"lanes_1", 300, 16, 1},
    {"lanes_1_one_class", 5, 1, 1},
    {"lanes_1_mean", 7, 5, 1, kMean},
    {"lanes_2", 140, 31, 1, kBias, 0, 1},
    {"lanes_4", 70, 64, 1, kScale | kBias | kInPlace, 4},
    {"lanes_8", 40, 91, 1, kFactor | kSoftcap | kMargin | kMasks, 5},
    {"lanes_8_circle", 5, 128, 1, kCircle | kScale | kMasks | kZLoss},
    {"lanes_16", 20, 256, 1, kEverything},
    {"lanes_16_losses", 5, 200, 1, kBias | kLosses | kUnalignedVectors},
    {"lanes_32", 11, 500, 1, kProbabilities | kWeights | kSmoothing | kMasks},
    {"lanes_8_unaligned_wide", 5, 80, 1, kProbabilities | kWideProbabilities | kUnalignedVectors},
    {"lanes_8_unaligned_probabilities", 5, 80, 1, kProbabilities | kUnalignedVectors},
    {"lanes_32_odd", 11, 507, 1, kMean | kInPlace, 1, 2},
    {"lanes_32_bias", 5, 500, 1, kBias | kMasks},
    {"lanes_strided", 5, 80, 1, kLosses, 1},
    {"lanes_offset", 5, 80, 1, kLosses | kScale, 0, 1},
    {"lanes_gradient_strided", 5, 80, 1, kGradientStrided},
    {"lanes_gradient_offset", 5, 80, 1, kGradientOffset},
    {"lanes_many_rows", 200, 256, 1, kBias},
    {"lanes_high", 9, 40, 1, kHigh},
    {"lanes_high_bfloat16", 9, 40, 1, kHigh, 0, 0, kHopper, Dtype::bfloat16},
    {"lanes_wide", 11, 1000, 1, kInPlace},
    {"lanes_wide_bias", 11, 513, 1, kBias | kMasks, 2, 1},
    {"lanes_wide_everything", 5, 1024, 1, kEverything},
    {"lanes_wide_bfloat16", 7, 2048, 1, kBias | kInPlace, 0, 0, kHopper, Dtype::bfloat16},
    {"lanes_nothing", 5, 40, 1, kNothing, 4},
    {"lanes_far", 3, 20, 1, kFar},
    {"lanes_bfloat16", 11, 776, 1, kEverything, 8, 0, kHopper, Dtype::bfloat16},
    {"lanes_bfloat16_odd", 11, 777, 1, kBias, 0, 3, kHopper, Dtype::bfloat16},
    {"lanes_float16", 5, 96, 1, kProbabilities | kSmoothing, 0, 0, kHopper, Dtype::float16},

    // rows_over_clusters, of 1 to 16 blocks
    {"cluster_1", 5, 2000, 1, kInPlace},
    {"cluster_1_bias", 5, 2000, 1, kBias},
    {"cluster_1_odd", 5, 1999, 1, kScale | kBias | kMasks, 2, 1},
    {"cluster_1_two_warps", 5, 1028, 1, kBare},
    {"cluster_1_full", 3, 8192, 1, 0, 4},
    {"cluster_1_nothing", 3, 1601, 1, kNothing, 1},
    {"cluster_1_far", 3, 1600, 1, kFar},
    {"cluster_2", 3, 8196, 2},
    {"cluster_2_bias", 8, 4096, 2, kBias | kMasks | kInPlace, 0, 0, kSmall},
    {"cluster_4", 3, 16388, 4, kScale},
    {"cluster_4_everything", 5, 8000, 4, kEverything, 4, 0, kMedium},
    {"cluster_4_probabilities", 5, 4001, 4, kProbabilities | kSmoothing | kWeights | kMasks, 0, 0, kSmaller},
    {"cluster_8", 3, 32772, 8},
    {"cluster_8_odd", 5, 16001, 8, kBias | kMean, 1, 3, kSmall},
    {"cluster_16", 3, 65540, 16},
    {"cluster_1_losses", 7, 2001, 1, kLosses | kBias | kMasks},
    {"cluster_2_losses", 7, 4096, 2, kLosses | kBias, 0, 0, kSmall},
    {"cluster_2_split", 7, 4096, 1, kSplit | kBias, 0, 0, kSmall},
    {"cluster_1_high", 9, 2000, 1, kHigh},
    {"cluster_16_bias", 5, 32000, 16, kBias | kZLoss, 0, 0, kSmall},
    {"cluster_2_bfloat16", 3, 16408, 2, kBias, 0, 0, kHopper, Dtype::bfloat16},
    {"cluster_4_float16", 3, 16407, 4, kEverything & ~kMasks, 0, 0, kHopper, Dtype::float16},  // two a multiprocessor
    {"cluster_1_wide_probabilities", 5, 2000, 1, kProbabilities | kWideProbabilities, 0, 0, kHopper, Dtype::bfloat16},

    // rows_in_sweeps
    {"sweeps", 5, 20000, 1, 0, 0, 0, kAmpere},
    {"sweeps_odd", 5, 17001, 1, kEverything | kInPlace, 1, 1, kAmpere},
    {"sweeps_weights", 5, 2000, 1, kBias | kWeights | kSmoothing | kUnalignedVectors, 0, 0, kTiny},
    {"sweeps_probabilities", 3, 17000, 1, kProbabilities | kWeights | kInPlace, 0, 0, kLittleCache},
    {"sweeps_in_place", 5, 2001, 1, kBias | kInPlace, 0, 0, kTiny},
    {"sweeps_unaligned_bias", 5, 2000, 1, kLosses | kBias | kUnalignedVectors, 0, 0, kTiny},
    {"sweeps_losses", 5, 2001, 1, kLosses | kMasks},
    {"sweeps_high", 9, 20000, 1, kHigh, 0, 0, kAmpere},
    {"sweeps_losses_long", 5, 17000, 1, kLosses | kScale},
    {"sweeps_nothing", 3, 17000, 1, kNothing, 4, 0, kAmpere},
    {"sweeps_far", 3, 1600, 1, kFar | kBias, 0, 0, kTiny},
    {"sweeps_bfloat16", 3, 34000, 1, kBias, 0, 0, kAmpere, Dtype::bfloat16},
    {"sweeps_float64", 5, 2001, 1, kEverything, 0, 0, kHopper, Dtype::float64},
    {"sweeps_float64_short", 5, 10, 1, kProbabilities, 0, 0, kHopper, Dtype::float64},

    // rows_in_planes, of 1 to 16 threads a pixel
    {"planes_1", 1200, 5, 1, 0, 0, 0, kHopper, Dtype::float32, 600},
    {"planes_1_one_class", 12, 1, 1, kBare, 0, 0, kHopper, Dtype::float32, 4},
    {"planes_1_one_pixel", 300, 5, 1, kScale, 0, 0, kHopper, Dtype::float32, 1},
    {"planes_1_mean", 14, 12, 1, kMean | kMasks, 0, 0, kHopper, Dtype::float32, 7},
    {"planes_2", 600, 19, 1, kBias | kMasks, 0, 0, kHopper, Dtype::float32, 200},
    {"planes_2_in_place", 600, 21, 1, kInPlace, 4, 0, kHopper, Dtype::float32, 200},
    {"planes_2_odd", 603, 21, 1, kScale | kBias | kInPlace, 1, 1, kHopper, Dtype::float32, 201},
    {"planes_4_everything", 200, 40, 1, kEverything | kInPlace, 0, 4, kHopper, Dtype::float32, 100},
    {"planes_4_losses", 150, 30, 1, kLosses | kBias | kZLoss, 0, 0, kHopper, Dtype::float32, 50},
    {"planes_8_circle", 30, 96, 1, kCircle | kScale | kMasks | kZLoss, 0, 0, kHopper, Dtype::float32, 15},
    {"planes_8_margin", 40, 61, 1, kFactor | kSoftcap | kMargin | kUnalignedVectors, 0, 0, kHopper, Dtype::float32, 8},
    {"planes_16", 136, 150, 1, kInPlace, 0, 0, kHopper, Dtype::float32, 68},
    {"planes_16_probabilities", 24, 150, 1, kProbabilities | kWeights | kSmoothing | kMasks, 0, 0, kHopper,
     Dtype::float32, 12},
    {"planes_sweeps", 136, 400, 1, kInPlace, 0, 0, kHopper, Dtype::float32, 68},
    {"planes_sweeps_odd", 27, 385, 1, kEverything | kInPlace, 2, 3, kHopper, Dtype::float32, 9},
    {"planes_sweeps_losses", 24, 577, 1, kLosses | kWeights | kSmoothing, 0, 0, kHopper, Dtype::float32, 12},
    {"planes_sweeps_probabilities", 8, 200, 1, kProbabilities | kInPlace, 0, 0, kHopper, Dtype::float32, 4},
    {"planes_nothing", 24, 19, 1, kNothing, 0, 0, kHopper, Dtype::float32, 12},
    {"planes_nothing_probable", 24, 19, 1, kNothing | kProbabilities, 0, 0, kHopper, Dtype::float32, 12},
    {"planes_high", 36, 40, 1, kHigh, 0, 0, kHopper, Dtype::float32, 36},
    {"planes_high_sweeps", 36, 230, 1, kHigh, 0, 0, kHopper, Dtype::float32, 18},
    {"planes_far", 12, 20, 1, kFar, 0, 0, kHopper, Dtype::float32, 4},
    {"planes_far_sweeps", 4, 200, 1, kFar | kInPlace, 0, 0, kHopper, Dtype::float32, 2},
    {"planes_strided", 8, 20, 1, kLosses, 1, 0, kHopper, Dtype::float32, 4},
    {"planes_images_apart", 8, 20, 1, kLosses | kImagesApart, 0, 0, kHopper, Dtype::float32, 4},
    {"planes_offset", 8, 20, 1, kLosses | kScale, 0, 1, kHopper, Dtype::float32, 4},
    {"planes_narrow", 12, 20, 1, kLosses, 2, 0, kHopper, Dtype::float32, 6},
    {"planes_gradient_strided", 8, 20, 1, kGradientStrided, 0, 0, kHopper, Dtype::float32, 4},
    {"planes_gradient_apart", 8, 20, 1, kGradientImagesApart, 0, 0, kHopper, Dtype::float32, 4},
    {"planes_gradient_offset", 8, 20, 1, kGradientOffset, 0, 0, kHopper, Dtype::float32, 4},
    {"planes_unaligned_probabilities", 8, 20, 1, kProbabilities | kUnalignedVectors, 0, 0, kHopper, Dtype::float32, 4},
    {"planes_unaligned_wide", 8, 20, 1, kProbabilities | kWideProbabilities | kUnalignedVectors, 0, 0, kHopper,
     Dtype::float32, 4},
    {"planes_bfloat16", 600, 21, 1, kBias | kInPlace, 0, 0, kHopper, Dtype::bfloat16, 300},
    {"planes_bfloat16_odd", 75, 33, 1, 0, 0, 3, kHopper, Dtype::bfloat16, 25},
    {"planes_bfloat16_everything", 80, 150, 1, kEverything, 0, 4, kHopper, Dtype::bfloat16, 40},
    {"planes_float16", 80, 400, 1, kInPlace, 0, 0, kHopper, Dtype::float16, 40},
    {"planes_float16_odd", 77, 19, 1, kProbabilities | kSmoothing, 0, 0, kHopper, Dtype::float16, 11},
    {"planes_float16_probabilities", 24, 19, 1, kProbabilities, 0, 0, kHopper, Dtype::float16, 12},
    {"planes_wide_probabilities", 24, 19, 1, kProbabilities | kWideProbabilities, 0, 0, kHopper, Dtype::bfloat16, 8},
    {"planes_float64", 40, 19, 1, kEverything, 0, 0, kHopper, Dtype::float64, 20},
    {"planes_float64_odd", 35, 119, 1, kProbabilities, 0, 0, kHopper, Dtype::float64, 7},

    // rows_in_pieces
    {"pieces_1", 300, 16, 1, kSplit},
    {"pieces_8", 40, 100, 1, kSplit | kEverything | kInPlace},
    {"pieces_32_odd", 5, 301, 1, kSplit | kBias, 1, 1},
    {"pieces_high", 9, 100, 1, kSplit | kHigh},
    {"pieces_128", 5, 2000, 1, kSplit | kScale | kBias | kMasks},
    {"pieces_256", 5, 5001, 1, kSplit | kWeights | kSmoothing, 1, 3},
    {"pieces_unaligned_weights", 5, 1000, 1, kSplit | kWeights | kSmoothing | kUnalignedVectors},
    {"pieces_circle", 5, 9000, 1, kSplit | kCircle | kUnalignedVectors | kFactor},
    {"pieces_probabilities", 5, 700, 1, kSplit | kProbabilities | kWeights},
    {"pieces_far", 3, 20, 1, kSplit | kFar},
    {"pieces_bfloat16", 5, 1500, 1, kSplit | kEverything, 0, 0, kHopper, Dtype::bfloat16},
};

// Rows that may lie apart; or channels-first, images and their classes that may.
class Matrix {
 public:
  explicit Matrix(const Case& c, int more_gap = 0, int more_offset = 0, bool images_apart = false)
      : rows_(c.rows),
        classes_(c.classes),
        pixels_(c.pixels),
        class_stride_(c.pixels == 0 ? 1 : run(c, c.pixels) + more_gap),
        stride_(c.pixels == 0 ? run(c, c.classes) + more_gap : c.classes * class_stride_ + images_apart) {
    const auto offset = static_cast<std::size_t>(c.offset + more_offset);
    numbers_ = Numbers(c.dtype, at(rows_ - 1, classes_ - 1) + 1, offset, c.has(kFar));
  }

  void* data() const { return numbers_.data(); }
  std::int64_t stride() const { return stride_; }
  std::int64_t class_stride() const { return class_stride_; }
  double get(int row, int column) const { return numbers_[at(row, column)]; }
  void set(int row, int column, double x) { numbers_.set(at(row, column), x); }

  Bytes bytes() const {
    Bytes all;
    numbers_.check_untouched_before();
    std::size_t end = 0;  // of the run before
    const auto add = [&](std::size_t first, int count) {
      const Bytes more = numbers_.bytes(first, first + static_cast<std::size_t>(count));
      all.insert(all.end(), more.begin(), more.end());
      if (first - end < 1 << 20) numbers_.check_untouched(end, first);
      end = first + static_cast<std::size_t>(count);
    };
    if (pixels_ == 0) {
      for (int row = 0; row < rows_; ++row) add(at(row, 0), classes_);
    } else {
      for (int row = 0; row < rows_; row += pixels_) {
        for (int j = 0; j < classes_; ++j) add(at(row, j), pixels_);
      }
    }
    return all;
  }

 private:
  int rows_, classes_, pixels_;
  std::int64_t class_stride_, stride_;
  Numbers numbers_;

  // From one run of so many neighbours to the next.
  static std::int64_t run(const Case& c, int count) { return c.has(kFar) ? (1 << 30) + 4 : count + c.gap; }

  std::size_t at(int row, int column) const {
    const int image = pixels_ == 0 ? row : row / pixels_, pixel = pixels_ == 0 ? 0 : row % pixels_;
    return static_cast<std::size_t>(image * stride_ + column * class_stride_ + pixel);
  }
};

// ---- Rows, and what they should become ----

constexpr std::int64_t kIgnored = -100;
constexpr double kGamma = 2, kEpsilon = 0.1, kZLossFactor = 0.01, kCap = 5, kCircleMargin = 0.25;
constexpr double kHeights[] = {12345, -5e8, 3e38, 23456};

struct Expected {
  double loss, log_prob;
  double target, rest, shift, weighted_logits, weight_sum;
  std::vector<double> gradient;  // of the loss, or of the split with the given gradients
};

struct Problem {
  const Case& c;
  std::mt19937 random;
  Matrix logits;
  std::vector<std::int64_t> target;
  Numbers probabilities, factor, bias, class_margin, class_weight, gammas;             // of classes
  Numbers sample_weight, upstream, normalizer, divisor, d_target, d_rest, d_weighted;  // of rows, or one
  double scale = 1;

  explicit Problem(const Case& of)
      : c(of), random(static_cast<unsigned>(of.classes + of.rows)), logits(of, 0, 0, of.has(kImagesApart)) {
    const auto rows = static_cast<std::size_t>(c.rows);
    std::normal_distribution<double> normal(0, c.has(kCircle) ? 0.3 : 3);
    for (int row = 0; row < c.rows; ++row) {
      // So far apart that another row's maximum leaves nothing of this one's exponentials.
      const double shift = c.has(kHigh)                ? kHeights[row / 2 % 4]
                           : c.has(kCircle | kSoftcap) ? 0
                           : row % 2 == 0              ? 60
                                                       : -60;
      for (int j = 0; j < c.classes; ++j) {
        const bool masked = c.has(kMasks) && (row == 4 || random() % 4 == 0);
        logits.set(row, j, masked ? -INFINITY : normal(random) + shift);
      }
      target.push_back(static_cast<std::int64_t>(random() % static_cast<unsigned>(c.classes)));
    }
    if (c.has(kMasks)) logits.set(0, static_cast<int>(target[0]), -INFINITY);
    if (rows > 1) target[rows > 2] = kIgnored;
    if (rows > 3) target[3] = (std::int64_t{1} << 32) + c.classes / 2;  // no class
    target.shrink_to_fit();
    for (int row = 0; c.pixels > 0 && row < c.rows; ++row) {  // they are read, but must not matter
      if (!is_counted(row)) {
        for (int j = 0; j < c.classes; ++j) logits.set(row, j, j % 3 == 0 ? INFINITY : NAN);
      }
    }

    if (c.has(kScale)) scale = c.has(kCircle) ? 4 : 0.7;
    if (c.has(kFactor)) factor = of_classes(0.5, 1.5);
    if (c.has(kBias)) bias = of_classes(-2, 2);
    if (c.has(kBias) && c.has(kMasks)) bias.set(2, -INFINITY);
    if (c.has(kMargin)) class_margin = of_classes(0, 1);
    if (c.has(kWeights)) class_weight = of_classes(0.5, 2);
    if (c.has(kGammas)) gammas = of_classes(0.5, 3);
    if (c.has(kProbabilities)) make_probabilities();
    if (c.has(kSplit)) {
      d_target = uniform(rows, -1, 1);
      d_rest = uniform(rows, -1, 1);
      if (c.has(kSmoothing | kProbabilities)) d_weighted = uniform(rows, -1, 1);
    } else if (!c.has(kBare)) {
      sample_weight = uniform(rows, 0.5, 2);
      upstream = uniform(c.has(kMean) ? 1 : rows, -2, 2);
      (c.has(kMean) ? divisor : normalizer) = uniform(1, 2, 3);
      if (c.has(kNothing)) normalizer.set(0, 0);
    }
  }

  SplitArguments arguments(const Matrix& of) const {
    SplitArguments a{};
    a.dtype = c.dtype;
    a.classes = c.classes;
    a.logits = of.data();
    a.row_stride = of.stride();
    a.pixels = c.pixels;
    a.class_stride = of.class_stride();
    a.target = probabilities ? nullptr : target.data();
    a.probabilities = probabilities.data();
    a.probabilities_are_logits_dtype = !c.has(kWideProbabilities);
    a.ignore_index = kIgnored;
    a.scale = scale;
    a.factor = factor.data();
    a.bias = bias.data();
    a.softcap = c.has(kSoftcap) ? kCap : 0;
    a.margin_kind = c.has(kCircle) ? MarginKind::circle : MarginKind::additive;
    if (c.has(kCircle)) a.margin_parameters[0] = kCircleMargin;
    a.class_margin = class_margin.data();
    a.class_weight = class_weight.data();
    a.label_smoothing = epsilon();
    return a;
  }

  Expected expected(int row) const {
    const std::int64_t label = probabilities ? -1 : target[static_cast<std::size_t>(row)];
    if (!probabilities && (label < 0 || label >= c.classes || c.has(kNothing))) {
      return unread(label == kIgnored || c.has(kNothing) ? 0 : NAN);
    }
    if (c.has(kNothing)) return unread(0);

    const int t = static_cast<int>(label);
    const auto classes = static_cast<std::size_t>(c.classes);
    std::vector<double> z(classes), slope(classes), u(classes), gradient(classes);
    double highest = -INFINITY, total = 0, weighted = 0, weight_sum = 0;
    for (int j = 0; j < c.classes; ++j) {
      const auto i = static_cast<std::size_t>(j);
      map(row, j, j == t, &z[i], &slope[i]);
      u[i] = weight(row, j, z[i] == -INFINITY);
      if (j != t) highest = std::max(highest, z[i]);
    }
    const double shift = highest == -INFINITY ? 0 : highest;
    for (int j = 0; j < c.classes; ++j) {
      const auto i = static_cast<std::size_t>(j);
      if (j != t) total += std::exp(z[i] - shift);
      if (u[i] != 0) weighted += u[i] * (z[i] - shift);
      weight_sum += u[i];
    }

    // Relative to shift.
    const double rest = std::log(total), z_t = t < 0 ? -INFINITY : z[static_cast<std::size_t>(t)] - shift;
    const double d = z_t - rest, p = 1 / (1 + std::exp(-d)), n = 1 / (1 + std::exp(d));
    const double log_p = d > 0 ? -std::log1p(std::exp(-d)) : d - std::log1p(std::exp(d));
    const double all = rest > z_t ? rest + std::log1p(std::exp(z_t - rest)) : z_t + std::log1p(std::exp(rest - z_t));
    const double spread = t < 0 ? 1 : epsilon() / c.classes, full = all + shift;
    const double z_loss = c.has(kZLoss) ? kZLossFactor : 0;
    double loss = spread == 0 ? 0 : spread * (weight_sum * all - weighted), slope_t = 0;
    if (t >= 0) {
      const double gamma = gammas ? gammas[static_cast<std::size_t>(t)] : kGamma;
      const double coefficient = (class_weight ? class_weight[static_cast<std::size_t>(t)] : 1) * (1 - epsilon());
      loss -= coefficient * std::pow(n, gamma) * log_p;
      slope_t = -coefficient * std::pow(n, gamma) * (n - (p == 0 ? 0 : gamma * p * log_p));
    }
    if (z_loss > 0) loss += z_loss * full * full;

    const auto r = static_cast<std::size_t>(row);
    const double sample = sample_weight ? sample_weight[r] : 1;
    const double by = sample * (upstream ? upstream[c.has(kMean) ? 0 : r] : 1) /
                      (normalizer ? normalizer[0]
                       : divisor  ? divisor[0]
                                  : 1);
    for (int j = 0; j < c.classes; ++j) {
      const auto i = static_cast<std::size_t>(j);
      const double q = total == 0 || j == t ? 0 : std::exp(z[i] - shift) / total;
      if (c.has(kSplit)) {
        gradient[i] = (j == t ? d_target[r] : d_rest[r] * q) + (d_weighted ? d_weighted[r] * u[i] : 0);
      } else {
        const double softmax = std::exp(z[i] - full);
        gradient[i] = slope_t * (j == t ? 1 : -q) + spread * (weight_sum * softmax - u[i]);
        if (z_loss > 0) gradient[i] += 2 * z_loss * full * softmax;
        gradient[i] *= by;
      }
      gradient[i] *= slope[i];
    }
    return {sample * loss, log_p, z_t, rest, shift, weighted, weight_sum, gradient};
  }

 private:
  Numbers uniform(std::size_t count, double low, double high, std::size_t offset = 0) {
    Numbers numbers(wide(c.dtype), count, offset);
    std::uniform_real_distribution<double> between(low, high);
    for (std::size_t i = 0; i < count; ++i) numbers.set(i, between(random));
    return numbers;
  }
  Numbers of_classes(double low, double high) {
    return uniform(static_cast<std::size_t>(c.classes), low, high, c.has(kUnalignedVectors));
  }
  void make_probabilities() {
    const auto count = static_cast<std::size_t>(c.rows) * static_cast<std::size_t>(c.classes);
    probabilities = Numbers(c.has(kWideProbabilities) ? wide(c.dtype) : c.dtype, count, c.has(kUnalignedVectors));
    for (std::size_t i = 0; i < count; ++i) {
      const auto row = static_cast<int>(i) / c.classes, j = static_cast<int>(i) % c.classes;
      const bool masked = logits.get(row, j) == -INFINITY;  // then a probability would cost an infinite loss
      probabilities.set(place_of_probability(row, j),
                        masked ? 0 : static_cast<double>(random() % 100) / (50 * c.classes));
    }
  }
  std::size_t place_of_probability(int row, int j) const {
    const int image = c.pixels == 0 ? row : row / c.pixels, pixel = c.pixels == 0 ? 0 : row % c.pixels;
    const int step = c.pixels == 0 ? 1 : c.pixels;
    return static_cast<std::size_t>((image * c.classes + j) * step + pixel);
  }
  bool is_counted(int row) const {
    const std::int64_t label = target[static_cast<std::size_t>(row)];
    return !c.has(kNothing) && (c.has(kProbabilities) || (label >= 0 && label < c.classes));
  }
  double epsilon() const { return c.has(kSmoothing) ? kEpsilon : 0; }

  Expected unread(double value) const {
    return {value, value, value, value - INFINITY,
            value, value, value, std::vector<double>(static_cast<std::size_t>(c.classes), value)};
  }

  // A class's effective logit and its slope.
  void map(int row, int j, bool is_target, double* z, double* slope) const {
    const auto i = static_cast<std::size_t>(j);
    const double x = logits.get(row, j), multiplier = scale * (factor ? factor[i] : 1), m = kCircleMargin;
    const double from = x == -INFINITY ? 0 : x;
    double mapped = from;
    *slope = 1;
    if (c.has(kSoftcap)) {
      mapped = kCap * std::tanh(from / kCap);
      *slope = 1 - std::pow(std::tanh(from / kCap), 2);
    }
    if (c.has(kCircle)) {
      const double size = std::max(is_target ? 1 + m - from : from + m, 0.0), beyond = is_target ? 1 - m : m;
      mapped = size * (from - beyond);
      *slope = size > 0 ? size + (is_target ? -1 : 1) * (from - beyond) : 0;
    }
    if (is_target && class_margin) mapped -= class_margin[i];
    *slope *= multiplier;
    *z = x == -INFINITY ? x : multiplier * mapped + (bias ? bias[i] : 0);
  }

  // u_j
  double weight(int row, int j, bool masked) const {
    const double even = masked ? 0 : 1, of_class = class_weight ? class_weight[static_cast<std::size_t>(j)] : 1;
    if (probabilities) {
      const double probability = probabilities[place_of_probability(row, j)];
      return of_class * ((1 - epsilon()) * probability + even * epsilon() / c.classes);
    }
    return c.has(kSmoothing) ? of_class * even : 0;
  }
};

// Of a gradient, relative to a number and to the row's largest.
double gradient_tolerance(Dtype dtype, double exact, double largest) {
  const double relative = dtype == Dtype::float64   ? 1e-12
                          : dtype == Dtype::float32 ? 2e-5
                          : dtype == Dtype::float16 ? 1e-3
                                                    : 6e-3;
  return relative * (std::abs(exact) + 0.01 * largest) + (dtype == Dtype::float16 ? 1e-7 : 0);
}

void check_rows(const Problem& problem, const std::vector<std::pair<const char*, Numbers>>& vectors,
                const Matrix* d_logits) {
  const Case& c = problem.c;
  for (int row = 0; row < c.rows; ++row) {
    const Expected exact = problem.expected(row);
    for (const auto& [what, numbers] : vectors) {
      if (!numbers) continue;
      const std::string_view name_of(what);
      const double value = name_of == "loss"              ? exact.loss
                           : name_of == "log_prob"        ? exact.log_prob
                           : name_of == "target"          ? exact.target
                           : name_of == "rest"            ? exact.rest
                           : name_of == "shift"           ? exact.shift
                           : name_of == "weighted_logits" ? exact.weighted_logits
                                                          : exact.weight_sum;
      const double ours = numbers[static_cast<std::size_t>(row)];
      const double relative = c.dtype == Dtype::float64 ? 1e-12 : 2e-5;
      if (!close(ours, value, relative * (std::abs(value) + 0.1))) {
        wrong("%s of row %d is %.9g and should be %.9g", what, row, ours, value);
      }
    }
    // The other gradients of a row that is all masked are 0 or NaN.
    const bool all_masked = std::isnan(exact.loss) && exact.rest == -INFINITY;
    if (d_logits == nullptr || (all_masked && !c.has(kSplit))) continue;
    double largest = 0;
    for (const double d : exact.gradient) largest = std::max(largest, std::abs(d));
    for (int j = 0; j < c.classes; ++j) {
      const double ours = d_logits->get(row, j), value = exact.gradient[static_cast<std::size_t>(j)];
      if (!close(ours, value, gradient_tolerance(c.dtype, value, largest))) {
        wrong("gradient of row %d, class %d, is %.9g and should be %.9g", row, j, ours, value);
      }
    }
  }
}

void check_cluster(const Case& c) {
  const unsigned cluster = emulation::machine->cluster;
  if (cluster != c.cluster) wrong("clusters of %u blocks", cluster);
}

void copy(const Matrix& from, const Case& c, Matrix* to) {
  for (int row = 0; row < c.rows; ++row) {
    for (int j = 0; j < c.classes; ++j) to->set(row, j, from.get(row, j));
  }
}

Bytes run_loss(const Problem& problem) {
  const Case& c = problem.c;
  Matrix d_logits(c, c.has(kGradientStrided), c.has(kGradientOffset), c.has(kGradientImagesApart));
  if (c.has(kInPlace)) copy(problem.logits, c, &d_logits);
  std::vector<std::pair<const char*, Numbers>> vectors;
  const auto rows = static_cast<std::size_t>(c.rows);
  vectors.emplace_back("loss", Numbers(wide(c.dtype), rows));
  vectors.emplace_back("log_prob", c.has(kProbabilities) ? Numbers() : Numbers(wide(c.dtype), rows));

  LossArguments a{};
  a.split = problem.arguments(c.has(kInPlace) ? d_logits : problem.logits);
  a.objective = ObjectiveKind::focal;
  a.objective_parameters[0] = kGamma;
  a.class_parameter = problem.gammas.data();
  a.sample_weight = problem.sample_weight.data();
  a.z_loss = c.has(kZLoss) ? kZLossFactor : 0;
  a.upstream = problem.upstream.data();
  a.upstream_step = c.has(kMean) ? 0 : 1;
  a.normalizer = problem.normalizer.data();
  a.divisor = problem.divisor.data();
  a.losses = vectors[0].second.data();
  a.log_probs = vectors[1].second.data();
  a.d_logits = c.has(kLosses) ? nullptr : d_logits.data();
  a.gradient_stride = c.has(kLosses) ? 0 : d_logits.stride();
  a.gradient_class_stride = c.has(kLosses) ? 0 : d_logits.class_stride();
  check(loss_rows(a, c.rows, nullptr));
  check_cluster(c);

  if (emulation::schedule.order == emulation::Order::forward) {
    check_rows(problem, vectors, c.has(kLosses) ? nullptr : &d_logits);
  }
  Bytes results = d_logits.bytes();
  for (const auto& [what, vector] : vectors) {
    if (vector) append(&results, vector.bytes(0, rows));
  }
  return results;
}

Bytes run_split(const Problem& problem) {
  const Case& c = problem.c;
  const auto rows = static_cast<std::size_t>(c.rows);
  const auto numbers = [&](bool present) { return present ? Numbers(wide(c.dtype), rows) : Numbers(); };
  Matrix d_logits(c, c.has(kGradientStrided), c.has(kGradientOffset));
  if (c.has(kInPlace)) copy(problem.logits, c, &d_logits);
  std::vector<std::pair<const char*, Numbers>> vectors;
  for (const char* const what : {"target", "rest", "shift"}) vectors.emplace_back(what, numbers(true));
  for (const char* const what : {"weighted_logits", "weight_sum"}) {
    vectors.emplace_back(what, numbers(c.has(kSmoothing | kProbabilities)));
  }
  const auto data = [&](std::size_t i) { return vectors[i].second.data(); };

  SplitBackwardArguments a{};
  a.split = problem.arguments(c.has(kInPlace) ? d_logits : problem.logits);
  check(split_rows(a.split, {data(0), data(1), data(2), data(3), data(4)}, c.rows, nullptr));
  a.rest = data(1);
  a.shift = data(2);
  a.d_target = problem.d_target.data();
  a.d_rest = problem.d_rest.data();
  a.d_weighted = problem.d_weighted.data();
  a.d_logits = d_logits.data();
  a.gradient_stride = d_logits.stride();
  check(split_backward_rows(a, c.rows, nullptr));
  check_cluster(c);

  if (emulation::schedule.order == emulation::Order::forward) check_rows(problem, vectors, &d_logits);
  Bytes results = d_logits.bytes();
  for (const auto& [what, vector] : vectors) {
    if (vector) append(&results, vector.bytes(0, rows));
  }
  return results;
}

void run_rows(const Case& c) {
  emulated_device = c.device;
  const Problem problem(c);
  in_every_order([&] { return c.has(kSplit) ? run_split(problem) : run_loss(problem); });
}

// ---- The small kernels ----

void run_scale(int rows, int classes, int gap, int offset, double by, unsigned options = 0) {
  const Case c{"", rows, classes, 1, options, gap, offset};
  Numbers factor(Dtype::float32, 1);
  factor.set(0, by);
  in_every_order([&] {
    Matrix gradient(c);
    for (int row = 0; row < rows; ++row) {
      for (int j = 0; j < classes; ++j) gradient.set(row, j, row + 0.01 * j);
    }
    check(scale(c.dtype, gradient.data(), gradient.stride(), rows, classes, factor.data(), nullptr));
    for (int row = 0; row < rows; ++row) {
      for (int j = 0; j < classes; ++j) {
        const double exact = by * (row + 0.01 * j);
        if (!close(gradient.get(row, j), exact, 1e-6 * std::abs(exact))) wrong("row %d, class %d", row, j);
      }
    }
    return gradient.bytes();
  });
}

void run_sum(std::size_t n, double normalizer, double divisor) {
  Numbers numbers(Dtype::float32, n), by(Dtype::float32, 1), or_by(Dtype::float32, 1);
  double exact = 0;
  for (std::size_t i = 0; i < n; ++i) {
    numbers.set(i, 0.1 * static_cast<double>(i % 101) - 1);
    exact += numbers[i];
  }
  by.set(0, normalizer);
  or_by.set(0, divisor);
  if (std::isnan(normalizer)) {  // without
    exact /= std::isnan(divisor) ? 1 : divisor;
  } else {
    exact = normalizer == 0 ? 0 : exact / normalizer;
  }
  in_every_order([&] {
    const Numbers result(Dtype::float32, 1);
    const Numbers workspace(Dtype::float32, static_cast<std::size_t>(sum_workspace(static_cast<std::int64_t>(n))));
    check(sum(Dtype::float32, numbers.data(), static_cast<std::int64_t>(n),
              std::isnan(normalizer) ? nullptr : by.data(), std::isnan(divisor) ? nullptr : or_by.data(),
              workspace.data(), result.data(), nullptr));
    if (!close(result[0], exact, 1e-6 * std::abs(exact))) wrong("the sum is %.9g and should be %.9g", result[0], exact);
    return result.bytes(0, 1);
  });
}

void run_weight_sums(int rows, bool with_targets, bool with_class_weights, bool with_sample_weights) {
  constexpr int classes = 7;
  const auto n = static_cast<std::size_t>(rows);
  std::vector<std::int64_t> target(n);
  Numbers class_weight(Dtype::float32, classes), sample_weight(Dtype::float32, n);
  double exact = 0;
  for (std::size_t i = 0; i < classes; ++i) class_weight.set(i, 0.5 + static_cast<double>(i));
  for (std::size_t i = 0; i < n; ++i) {
    target[i] = i % 5 == 0   ? kIgnored
                : i % 7 == 0 ? (std::int64_t{1} << 32) + 1
                             : static_cast<std::int64_t>(i % classes);
    sample_weight.set(i, 0.25 * static_cast<double>(i % 13));
    const double sample = with_sample_weights ? sample_weight[i] : 1;
    if (!with_targets) exact += sample;
    if (!with_targets || target[i] < 0 || target[i] >= classes) continue;
    exact += sample * (with_class_weights ? class_weight[static_cast<std::size_t>(target[i])] : 1);
  }
  LossArguments a{};
  a.split.dtype = Dtype::float32;
  a.split.classes = classes;
  a.split.target = with_targets ? target.data() : nullptr;
  a.split.ignore_index = kIgnored;
  a.split.class_weight = with_class_weights ? class_weight.data() : nullptr;
  a.sample_weight = with_sample_weights ? sample_weight.data() : nullptr;
  in_every_order([&] {
    const auto stretches = static_cast<std::size_t>(partial_sums(rows));
    const Numbers sums(Dtype::float32, stretches);
    check(weight_sums(a, rows, sums.data(), nullptr));
    double total = 0;
    for (std::size_t i = 0; i < stretches; ++i) total += sums[i];
    if (!close(total, exact, 1e-6 * exact)) wrong("the weights are %.9g and should be %.9g", total, exact);
    return sums.bytes(0, stretches);
  });
}

// All clusters work on as many rows, as few at a time as they then can be.
void run_rounds(int rows, int classes, int resident, unsigned blocks, const Device& device, int pixels = 0) {
  emulated_device = device;
  emulated_resident_clusters = resident;
  Case c{"", rows, classes, 1};
  c.pixels = pixels;
  run_loss(Problem(c));
  if (gridDim.x != blocks) wrong("%u blocks for %d rows, where %d fit", gridDim.x, rows, resident);
}

struct Function {
  const char* name;
  void (*run)();
};
constexpr Function kFunctions[] = {
    {"rounds_of_planes", [] { run_rounds(256, 385, 3, 1, kLittleCache, 128); }},
    {"rounds_of_some", [] { run_rounds(4, 2000, 3, 2, kHopper); }},
    {"rounds_of_all", [] { run_rounds(5, 2000, 3, 3, kHopper); }},
    {"rounds_of_few", [] { run_rounds(5, 2000, 7, 5, kHopper); }},
    {"rounds_of_the_cache", [] { run_rounds(5, 20000, 3, 1, kLittleCache); }},
    {"scale_1", [] { run_scale(600, 16, 0, 0, 0.5); }},
    {"scale_8", [] { run_scale(70, 100, 4, 4, -3); }},
    {"scale_strided", [] { run_scale(5, 100, 2, 0, 0.3); }},
    {"scale_offset", [] { run_scale(5, 100, 0, 2, 0.3); }},
    {"scale_narrow", [] { run_scale(5, 90, 2, 0, 0.3); }},
    {"scale_odd", [] { run_scale(5, 4099, 2, 1, 0.3); }},
    {"scale_by_one", [] { run_scale(5, 4099, 0, 0, 1); }},
    {"scale_far", [] { run_scale(3, 20, 0, 0, 2, kFar); }},
    {"sum_of_nothing", [] { run_sum(0, NAN, NAN); }},
    {"sum_of_few", [] { run_sum(5, NAN, 3); }},
    {"sum_of_a_stretch", [] { run_sum(8192, 4, 2); }},
    {"sum_of_stretches", [] { run_sum(20001, 4, NAN); }},
    {"sum_over_nothing", [] { run_sum(8193, 0, NAN); }},
    {"weight_sums", [] { run_weight_sums(20000, true, true, true); }},
    {"weight_sums_of_classes", [] { run_weight_sums(8192, true, true, false); }},
    {"weight_sums_of_samples", [] { run_weight_sums(100, false, true, true); }},
    {"weight_sums_count", [] { run_weight_sums(100, true, false, false); }},
};

}  // namespace

int main(int argc, char** argv) {
  return run_program(argc, argv, [](const auto& choose) {
    for (const Case& c : kCases) {
      if (choose(c.name)) run_rows(c);
    }
    emulated_device = kHopper;
    for (const Function& function : kFunctions) {
      if (choose(function.name)) function.run();
    }
  });
}
