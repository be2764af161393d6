// Chooses the CPU kernels for this processor, once.

#include "softmax_loss.h"

#include <cstdlib>
#include <cstring>

namespace imbalance::cpu {
namespace {

#if defined(__x86_64__)
constexpr const char* kInstructionSets[] = {"baseline", "avx2", "avx512"};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
constexpr const char* kInstructionSets[] = {"baseline"};
#endif

const Kernels* choose() {
  const char* asked = std::getenv("IMBALANCE_KERNELS_INSTRUCTION_SET");
  const auto wanted = [asked](const char* name) { return asked == nullptr || std::strcmp(asked, name) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (has_avx512() && wanted("avx512")) return avx512_kernels();
  if (has_avx2() && wanted("avx2")) return avx2_kernels();
#endif
  return wanted("baseline") ? baseline_kernels() : nullptr;
}

}  // namespace

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

const char* const* instruction_sets(int* count) {
  *count = sizeof(kInstructionSets) / sizeof(kInstructionSets[0]);
  return kInstructionSets;
}

}  // namespace imbalance::cpu
