// Everything from here to target_end.h is compiled for AVX2.
#define IMBALANCE_AVX2  // g++ does not define __AVX2__ behind a pragma

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
