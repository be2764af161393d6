// Ends what target_avx2.h or target_avx512.h began; GCC keeps it to the end of the file, where templates are
// instantiated.

#if defined(__clang__)
#pragma clang attribute pop
#endif
