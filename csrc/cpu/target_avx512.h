// Everything from here to target_end.h is compiled for AVX-512.
#define IMBALANCE_AVX512  // g++ does not define __AVX512F__ behind a pragma

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2")
#endif
